"""TensorBoard events, read back by TensorBoard's own reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from drawn import read_lines, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from research.record import events


def _read(workdir):
    reader = EventAccumulator(str(workdir / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return reader.Reload()


def test_events_hold_metrics_config_and_pictures_once_after_a_kill(stop, tmp_path):
    """Stopped at step 15, with events appended as a run killed later might leave them: one whole, one cut off."""
    stop(15, lambda signals: run(tmp_path, signals=signals, steps_per_dispatch=1))
    file = next((tmp_path / "tensorboard").iterdir())
    whole = file.read_bytes()
    *_, last = events._frames(whole)
    file.write_bytes(whole + events._frame(last) + events._frame(last)[:-7])
    run(tmp_path, pictures=True)

    read = _read(tmp_path)
    lines = read_lines(tmp_path)
    for name in ("loss", "learning_rate", "test_accuracy", "epoch"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        shown = [(event.step, event.value) for event in read.Scalars(name)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    (curves,) = read.Images("curves")
    assert curves.step == 22
    assert curves.encoded_image_string == (tmp_path / "curves.png").read_bytes()
    (config,) = read.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert json.loads(text) == json.loads((tmp_path / "config.json").read_text())


def test_a_failure_to_write_events_is_one_warning(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("in the way")
    _, summary = run(tmp_path, pictures=True)
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
        "Events(pathlib.Path('.'), print).start('config', 0, 0); print('written'); import torch"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(events.__file__).parent.parent)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["written", "imported"], done.stderr
    assert _read(tmp_path).Tensors("config/text_summary")
