"""The character language model end to end: the same on one device and on many, with errors for bad flags."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn import read_lines, same
from flax import nnx

from experiments import char_rnn
from research import app, optimizers, sharding
from research import config as config_lib
from research.config import MeshConfig, RNNConfig
from research.data import embedded
from research.data.sources import Dataset
from research.errors import UserError
from research.models import rnn
from research.tasks.generation import SampleOptions
from research.training import loop


def _split(count):
    return {"text": (np.arange(count) ** 2 % 11 + 97).astype(np.uint8)}


RAW = Dataset("drawn", (), _split(529), None, _split(90))


def _config(axes=None, **fields):
    """The config of a tiny network on 8 streams, cut into chunks of 8 characters."""
    config = char_rnn.get_config()
    config.batch_size, config.sequence_length, config.num_epochs, config.log_every_steps = 8, 8, 2, 1
    config.model = RNNConfig(**{"name": "mingru", "width": 8, "layers": 1, **fields})
    config.mesh = MeshConfig(**axes or {})
    return config


def _run(workdir, devices=1, axes=None, signals=None, **fields):
    """Trains the network; returns the state and the lines of metrics.jsonl."""
    config = _config(axes, **fields)
    config.steps_per_dispatch = 1  # so that it can be stopped anywhere
    config.optimizer = optimizers.resolve(config.optimizer)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    dataset = char_rnn.prepare(config, RAW)
    workdir.mkdir(exist_ok=True)
    task = char_rnn.make_task(config, dataset)
    run, _ = loop.train_and_evaluate("char_rnn", config, task, dataset, mesh, workdir, signals)
    return run.state, read_lines(workdir)


@pytest.mark.slow
def test_eight_devices_with_time_over_four_of_them_record_what_one_does(tmp_path):
    _, alone = _run(tmp_path / "one")
    _, together = _run(tmp_path / "eight", 8, {"data": 2, "sequence": 4})
    assert len(alone) == len(together) == 16
    for one, other in zip(alone, together):
        for figure in set(one) & {"loss", "test_loss", "test_perplexity"}:
            assert one[figure] == pytest.approx(other[figure], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_bit_exact(stop, tmp_path):
    """Stopped within an epoch, in the middle of the streams, with dropout."""
    fields = {"name": "lstm", "dropout": 0.2}
    state, lines = _run(tmp_path / "whole", **fields)
    assert "at step 5 " in stop(5, lambda signals: _run(tmp_path / "stopped", signals=signals, **fields))
    resumed, others = _run(tmp_path / "stopped", **fields)
    same(resumed, state)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.carry))
    assert others == lines


@pytest.mark.slow
def test_the_command_trains_evaluates_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    workdir = f"--workdir={tmp_path / 'run'}"
    tiny = ["--config.dataset.name=pydoc", "--config.num_epochs=1", "--config.batch_size=256", "--config.model.width=8"]
    summary = app.run(char_rnn.EXPERIMENT, [workdir, *tiny, "--config.model.layers=1", "--config.mesh.data=-1"])
    assert summary["characters_per_second"] == pytest.approx(128 * summary["examples_per_second"])
    assert summary["test_bits_per_byte"] == pytest.approx(summary["test_loss"] / np.log(2))
    evaluated = app.run(char_rnn.EXPERIMENT, [workdir, "--mode=eval"])
    assert evaluated["test_loss"] == pytest.approx(summary["test_loss"])
    sample = [workdir, "--mode=sample", "--prompt=class ", "--length=9"]
    for other_batch_size in ([], ["--config.batch_size=64"]):
        capsys.readouterr()
        app.run(char_rnn.EXPERIMENT, [*sample, *other_batch_size])
        assert "--- sample 1 of 1\nclass " in capsys.readouterr().out
    with monkeypatch.context() as without_data:
        without_data.setattr(embedded, "DATASETS", {})
        app.run(char_rnn.EXPERIMENT, sample)  # the record has the vocabulary
    evaluated = app.run(char_rnn.EXPERIMENT, [workdir, "--mode=eval", "--config.batch_size=64"])
    assert evaluated["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-2)  # with less context per stream


def test_bad_flags_name_what_is_right(tmp_path):
    for args, words in (
        (["--prompt=a"], "--prompt is for --mode=sample"),
        (["--mode=sample"], "give the --workdir of a run"),
        (["--mode=sample", f"--workdir={tmp_path}"], f"there is no config.json in {tmp_path}: give the --workdir"),
        (["--config.model.name=lstn"], "'lstn': use one of"),
        (["--config.sequence_len=8"], "did you mean --config.sequence_length?"),
        (["--config.optimizer.lr=1"], "did you mean --config.optimizer.learning_rate?"),
        (["--config.dataset.name=digits", f"--workdir={tmp_path / 'x'}"], "digits is not a text"),
        (["--config.dataset.name=pydoc", "--config.batch_size=9000", "--config.mesh.data=-1"], "lower either"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            app.run(char_rnn.EXPERIMENT, args)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(char_rnn.get_config())))
    with pytest.raises(UserError, match=re.escape("--top_p=0.0: must be above 0")):
        app.parse(char_rnn.EXPERIMENT, ["--mode=sample", f"--workdir={tmp_path}", "--top_p=0"])


@pytest.mark.parametrize(
    ("axes", "name", "words"),
    [
        ({"sequence": 2}, "lstm", "sequence=2: --config.model.name=lstm is not parallel over time"),
        ({"sequence": -1}, "gru", "sequence=-1: --config.model.name=gru is not parallel"),
        ({"data": 1, "fsdp": 1, "sequence": -1}, "lru", "sequence_length=12 cannot be split evenly over the 8 devices"),
    ],
)
def test_a_time_axis_that_cannot_be_split_is_an_error(axes, name, words):
    config = _config(axes, name=name)
    config.sequence_length = 12
    with pytest.raises(UserError, match=words):
        char_rnn.make_task(config, char_rnn.prepare(config, RAW))


def test_microbatches_and_sequence_length_shape_the_streams():
    config = _config()
    config.microbatch_size, config.sequence_length = 4, 16
    prepared = char_rnn.prepare(config, RAW)
    assert prepared.train["tokens"].shape == (529 // (8 * 16) * 8, 17)
    assert prepared.test["first"][:5].tolist() == [True] * 5  # 4 streams, and the second chunk of the first stream
    assert not prepared.test["first"][5:].any()


def test_every_preset_is_in_its_bounds():
    for preset in char_rnn.EXPERIMENT.presets.values():
        config_lib.check(preset())


def test_samples_are_printed_after_their_prompt(capsys):
    config = _config()
    dataset = char_rnn.prepare(config, RAW)

    def create():
        return rnn.RNN(config.model, len(dataset.label_names), nnx.Rngs(0))

    model = nnx.merge(*jax.jit(lambda: nnx.split(create()))())

    def predict(function, arrays, *, seed):
        return np.asarray(jax.jit(lambda x: function(model, x, jax.random.key(seed)))(arrays))

    def texts(**fields):
        options = SampleOptions(**{"prompt": "ab", "length": 20, "num_samples": 2, "temperature": 1.0, **fields})
        char_rnn.sample(predict, config, dataset, options, Path())  # pyright: ignore[reportArgumentType]
        return capsys.readouterr().out.splitlines()

    lines = texts()
    assert lines[::2] == ["--- sample 1 of 2", "--- sample 2 of 2"]
    assert lines[1] != lines[3]
    assert all(len(line) == 22 and line.startswith("ab") for line in lines[1::2])
    assert texts() == lines
    for changed in ({"sample_seed": 1}, {"temperature": 0.0}, {"top_p": 0.2}):
        assert texts(**changed) != lines
    with pytest.raises(UserError, match="'Z' does not occur in the training data"):
        texts(prompt="aZ")
