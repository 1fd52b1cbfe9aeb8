"""TensorBoard events, read back by TensorBoard's own reader."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drawn import read_lines, run
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from research.record import events


def _open(workdir, reader=EventAccumulator):
    """TensorBoard's view of a folder; `Reload()` reads on from where it last stopped."""
    return reader(str(workdir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})


def _files(workdir):
    return sorted((workdir / "tensorboard").iterdir())


def _stored(workdir, name):
    """The (step, value) of a scalar in all files, as they are on disk."""
    events = [event for file in _files(workdir) for event in LegacyEventFileLoader(str(file)).Load()]
    values = [(event.step, value) for event in events for value in event.summary.value if value.tag == name]
    return [(step, value.simple_value) for step, value in values]


def _recorded(workdir, name):
    """The same values in metrics.jsonl."""
    lines = [line for line in read_lines(workdir) if name in line]
    return [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def _damage(workdir):
    """Repeats the last event, and cuts the repetition off, as a killed run may."""
    *_, last = _files(workdir)
    whole = last.read_bytes()
    *_, (_, start), (_, end) = events._decode(whole)
    last.write_bytes(whole + whole[start:end] + whole[start : end - 7])


def test_events_hold_metrics_config_and_plots_once_after_a_kill(stop, tmp_path):
    """Stopped at step 15, with events appended as a run killed later might leave them: one whole, one cut off."""
    stop(15, lambda signals: run(tmp_path, signals=signals, steps_per_dispatch=1))
    _damage(tmp_path)
    run(tmp_path, plots=True)

    read = _open(tmp_path).Reload()
    for name in ("loss", "learning_rate", "test_accuracy", "epoch"):
        expected = _recorded(tmp_path, name)
        assert [(event.step, event.value) for event in read.Scalars(name)] == expected
        assert _stored(tmp_path, name) == expected
    (curves,) = read.Images("curves")
    assert curves.step == 22
    assert curves.encoded_image_string == (tmp_path / "curves.png").read_bytes()
    # The resumed run was given another config, so there are two.
    *_, config = read.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert json.loads(text) == json.loads((tmp_path / "config.json").read_text())


def test_an_open_tensorboard_follows_a_run_that_is_stopped_resumed_and_extended(stop, tmp_path):
    """With both of TensorBoard's readers, which keep the file and the offset to which they have read."""

    def check():
        expected = _recorded(tmp_path, "loss")
        assert _stored(tmp_path, "loss") == expected
        assert [(event.step, event.value) for event in reader.Reload().Scalars("loss")] == expected
        assert [event.step for event in plugin.Reload().Tensors("loss")] == [step for step, _ in expected]
        return len(expected)

    options = {"steps_per_dispatch": 1, "keep_checkpoints": 9}
    stop(5, lambda signals: run(tmp_path, signals=signals, **options))
    reader, plugin = _open(tmp_path), _open(tmp_path, plugin_event_accumulator.EventAccumulator)
    assert check() == 5
    # Killed at step 17, the run has gone on after its last checkpoint and resumes at step 5.
    stop(17, lambda signals: run(tmp_path, signals=signals, **options))
    _damage(tmp_path)
    assert len(reader.Reload().Scalars("loss")) == len(plugin.Reload().Tensors("loss")) > 17
    shutil.rmtree(tmp_path / "checkpoints/17")
    shutil.rmtree(tmp_path / "checkpoints/11")
    run(tmp_path, **options)
    assert check() == 22
    run(tmp_path, num_epochs=3, **options)
    assert check() == 33
    config = reader.Tensors("config/text_summary")
    assert [event.step for event in config] == [0, 21]
    assert '"num_epochs": 3' in config[1].tensor_proto.string_val[0].decode()


def test_a_failure_to_write_events_is_one_warning(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("in the way")
    _, summary = run(tmp_path, plots=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "TensorBoard events are no longer written: " in warnings[0]
    assert (tmp_path / "curves.png").exists()


def test_writing_events_does_not_import_pytorch(tmp_path):
    """Importing it takes seconds; it can still be imported afterwards."""
    (tmp_path / "torch.py").write_text("print('imported')")
    code = (
        "import pathlib; from research.record.events import Events; "
        "Events(pathlib.Path('.'), print).start({}, 1, []); print('written'); import torch"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["written", "imported"], done.stderr
    assert _open(tmp_path).Reload().Tensors("config/text_summary")
