"""The command `python -m experiments.cifar_cnn` as a user runs it."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from command import COMMAND, DIGITS, QUICK, complains, read_summary, run_command, run_here

from research.data import sources


@pytest.mark.slow
def test_it_trains_on_one_device_and_on_eight(env, tmp_path):
    summaries = []
    for devices in (1, 8):
        args = ["--config.dataset.name=digits", "--config.num_epochs=2", "--workdir", f"runs/{devices}"]
        done = run_command(env, *args, "--config.model.width=8", devices=devices)
        assert done.returncode == 0, done.stderr
        summaries.append(read_summary(tmp_path / f"runs/{devices}"))
        assert summaries[-1]["device_count"] == devices
        _, last = done.stdout.split("epoch 2/2")
        figures = r"test accuracy \d\.\d{4}, test loss \d\.\d{4}, test calibration error \d\.\d{4}"
        assert re.search(rf"^cifar_cnn on digits: {figures}$", last, re.MULTILINE)
        assert re.search(rf"[\d,]+ examples/s .* \(compilation excluded: .* s\), {devices} cpu device", last)
        assert last.splitlines()[-1].strip() == f"record: runs/{devices}"
        lines = [json.loads(line) for line in (tmp_path / f"runs/{devices}/metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == summaries[-1]["num_train_steps"] == 44
    one, eight = summaries
    assert one["test_accuracy"] > 0.3
    np.testing.assert_allclose(one["train_loss"], eight["train_loss"], rtol=2e-2)


def test_without_data_it_warns_once_and_trains_on_digits(env, tmp_path):
    done = run_command(env, *QUICK)
    assert done.returncode == 0, done.stderr
    loud = [line for line in done.stderr.splitlines() if "cifar10" in line]
    assert len(loud) == 1
    assert "digits" in loud[0]
    (workdir,) = (tmp_path / "runs/cifar_cnn").iterdir()
    assert read_summary(workdir)["dataset"] == "digits"
    assert json.loads((workdir / "config.json").read_text())["dataset"]["name"] == "digits"
    assert "cifar_cnn on digits" in done.stdout


def test_a_set_named_explicitly_is_never_replaced(env, tmp_path):
    complains(run_command(env, "--config.dataset.name=cifar10"), "cifar10")
    assert not list((tmp_path / "runs/cifar_cnn").glob("*"))


@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar(env, tmp_path):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([*COMMAND, *DIGITS, "--workdir=x"], env=env, stdout=child, stderr=child)
    os.close(child)
    out = b""
    while True:
        try:
            out += os.read(parent, 65536)
        except OSError:  # raised by a pseudo-terminal once its program has ended
            break
    assert process.wait() == 0
    text = out.decode()
    assert re.search(r"100%\|.*14/14 \[.*step/s, loss \d\.\d+, [\d,]+ examples/s\]", text)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.optimizer.nam=sgd"], ["config.optimizer.name"]),
        (["--config.batch_size=99", "--config.dataset.name=digits"], ["batch_size=99", "evenly over 8 devices"]),
        (["--config.batch_size=8000", "--config.dataset.name=digits"], ["batch_size=8000", "1,437"]),
        (["--config.dataset.data_dir=nowhere"], ["nowhere"]),
        (["--config.dataset.name=cifra10"], ["cifar10"]),
        (["--config.dataset.name=digits", "--config.augment.crop=32"], ["crop=32"]),
        (["--config.dataset.name=digits", "--config.model.depth=3"], ["depth=3"]),
        (["--config.dataset.name=digits", "--config.augment.saturation=0.4"], ["saturation=0.4", "3 channels, not 1"]),
        (["--config.dataset.name=digits", "--config.augment.randaugment=2"], ["randaugment=2", "needs both"]),
        (["--config.augment.erasing=1.5"], ["erasing=1.5", "must be at most 1"]),
        (["--config.augment.mixup=-1"], ["mixup=-1", "must be at least 0"]),
        (["--config.dataset.name=digits", "--config.target_threshold=0.2"], ["target_threshold=0.2", "loss=sigmoid"]),
        (["--config.optimizer.name=sgd", "--config.optimizer.momentum=0.9"], ["momentum", "sgd has none"]),
        (["--config.mesh.sequence=8", "--config.dataset.name=digits"], ["mesh.sequence=8", "not parallel over time"]),
        (["--workdir=file/run"], ["--workdir=file/run cannot be written", "Not a directory"]),
        (["--workdir=finished"], ["holds metrics.jsonl, but no config.json"]),
        (["--workdir=summarized"], ["holds summary.json, but no config.json"]),
        (["--workdir=file"], ["--workdir=file cannot be written"]),
        (["--workdir=" + 300 * "x"], ["cannot be read", "name too long"]),
        (["--config.dataset.data_dir=" + 300 * "x"], ["no such folder"]),
        (["--config.dataset.data_dir=~nobody-here/x"], ["no such folder"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, words, env, tmp_path, monkeypatch, capsys):
    Path("file").touch()
    Path("finished").mkdir()
    Path("finished/metrics.jsonl").touch()
    Path("summarized").mkdir()
    Path("summarized/summary.json").write_text('{"num_epochs": 99}')
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    before = sorted(tmp_path.rglob("*"))
    complains(run_here(args, capsys), *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_is_not_classified(env, tmp_path, monkeypatch, capsys):
    text = {"text": np.zeros(9, np.uint8)}
    monkeypatch.setattr(sources, "load", lambda config, own: sources.Dataset(config.name, (), text, None, text))
    complains(run_here(["--config.dataset.name=tiny_shakespeare"], capsys), "tiny_shakespeare has no images")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_damaged_archive_is_named(env, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar-10-python.tar.gz").write_bytes(b"not an archive")
    done = run_command(env, "--config.dataset.name=cifar10", "--config.dataset.data_dir=data")
    complains(done, "cifar-10-python.tar.gz")


@pytest.mark.slow
def test_a_non_finite_loss_exits_with_code_3(env, tmp_path):
    args = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.name=sgd", "--config=tutorial", "--workdir=x"]
    done = run_command(env, *DIGITS, *args)
    assert done.returncode == 3
    assert re.search(r"^error: the training loss became \S+ at step \d+:", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupt_exits_with_code_130(env, tmp_path):
    args = [*COMMAND, *DIGITS, "--config.num_epochs=10000", "--config.log_every_steps=1", "--workdir=x"]
    process = subprocess.Popen(args, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "x/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"error: stopped by SIGINT at step \d+ with a checkpoint: .*", err.splitlines()[-1])
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs CIFAR-10 prepared in TFDS_DATA_DIR")
def test_it_learns_real_cifar10(env, tmp_path):
    args = ["--config.num_epochs=1", "--config.model.width=8", "--config.batch_size=125", "--workdir=x"]
    part = ["--config.dataset.validation_fraction=0.1", "--config.dataset.train_fraction=0.5"]
    done = run_command(env | {"TFDS_DATA_DIR": os.environ["TFDS_DATA_DIR"], "XLA_FLAGS": ""}, *args, *part)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "x")
    assert summary["dataset"] == "cifar10"
    assert summary["num_train_steps"] == 180
    assert summary["test_accuracy"] > 0.3
    assert abs(summary["validation_accuracy"] - summary["test_accuracy"]) < 0.05
