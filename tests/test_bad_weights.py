"""Weights that a run cannot start from (`--config.init.path`) and bad resets are one line, and leave nothing behind."""

import subprocess

import linear
import numpy as np
import pytest
from command import complains
from linear import ModelConfig
from safetensors.numpy import save_file
from weights import create_run, drawn_dataset, linear_config, save_run

from launch.artifacts import artifact
from research import app

FLAGS = ["--config.dataset.name=digits", "--config.dataset.train_fraction=0.1"]


def _truncated(path):
    save_file({"first.kernel": np.zeros((1024, 10), np.float32)}, path / "w.safetensors")
    data = (path / "w.safetensors").read_bytes()
    (path / "w.safetensors").write_bytes(data[:-100])
    return path / "w.safetensors"


def _text(path):
    (path / "w.safetensors").write_text("no weights")
    return path / "w.safetensors"


def _empty(path):
    (path / "w.safetensors").touch()
    return path / "w.safetensors"


def _pickle(path):
    (path / "w.pth").write_bytes(b"x")
    return path / "w.pth"


def _folder(path):
    return path


def _unfinished(path):
    (path / "config.json").write_text("{}")
    return path


def _changed_artifact(path):
    artifact.write(path / "artifact", {"functions": {}}, {"params.first.kernel": np.zeros((1024, 10), np.float32)}, {})
    weights = path / "artifact/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    return path / "artifact"


def _damaged_run(path):
    save_run(create_run(linear_config(model=ModelConfig()), drawn_dataset(10, 32)), path)
    for file in (path / "checkpoints/0/state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"x" * file.stat().st_size)
    return path


def _other_network(path):
    save_file({"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}, path / "w.safetensors")
    return path / "w.safetensors"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path / "none.safetensors", "there is no such file or folder"),
        (_folder, "this folder is neither the workdir of a run nor an artifact"),
        (_pickle, "is not a .safetensors file: convert it"),
        (_truncated, "is damaged or cannot be read"),
        (_text, "is damaged or cannot be read"),
        (_empty, "is damaged or cannot be read"),
        (_unfinished, "this run has no checkpoint yet"),
        (_changed_artifact, "weights.safetensors does not match its checksum"),
        (_damaged_run, "is damaged or cannot be read"),
        (
            _other_network,
            "missing there: first/bias, first/kernel, second/bias, second/kernel; unknown here: conv1/weight",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_and_leave_nothing_behind(make, words, tmp_path, capsys):
    (tmp_path / "weights").mkdir()
    path = make(tmp_path / "weights")
    _complains([f"--config.init.path={path}"], tmp_path, capsys, f"--config.init.path={path}", words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.init.reset=first"], "--config.init.reset needs --config.init.path"),
        (["--config.init.reset=a(", "--config.init.path=x"], "init.reset=a(: this is not a regular expression"),
    ],
)
def test_a_reset_that_means_nothing_is_one_line(flags, words, tmp_path, capsys):
    _complains(flags, tmp_path, capsys, words)


def _complains(flags, tmp_path, capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        app.main(linear.EXPERIMENT, [*FLAGS, f"--workdir={tmp_path / 'run'}", *flags])
    complains(subprocess.CompletedProcess(flags, exit_.value.code, *capsys.readouterr()), *words)
    assert not (tmp_path / "run").exists()
