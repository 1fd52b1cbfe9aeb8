"""Language models on tokens end to end: bits per byte, resuming, sampling without the original files, bad input."""

import json
import re
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from drawn import read_lines

from experiments import char_rnn
from research import app
from research.config import DatasetConfig
from research.data import sources, text, tokenizer
from research.data.sources import Dataset
from research.data.tokenization import Bytes
from research.errors import UserError
from research.record import data_json
from research.training import loop

TEXT = "".join(f"Line {n}: the naïve {'word ' * (n % 7)}of {n * n}.\n" for n in range(500))
TINY = [
    "--config.dataset.name=text",
    "--config.num_epochs=1",
    "--config.batch_size=8",
    "--config.sequence_length=16",
    "--config.model.name=simple",
    "--config.model.width=8",
    "--config.model.layers=1",
    "--config.log_every_steps=1",
    "--config.steps_per_dispatch=4",
]


def run(*args, signals=None):
    with mock.patch.object(loop.Loop, "draw"):  # plots take longer than training
        return app.run(char_rnn.EXPERIMENT, list(args), signals, jax.devices()[:1])


def losses(workdir):
    return [{name: line[name] for name in line if "loss" in name or "bits" in name} for line in read_lines(workdir)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has a text, two tokenizers, and a run trained on the tokens of one of them."""
    path = tmp_path_factory.mktemp("text")
    (path / "book.txt").write_text(TEXT)
    for size in (300, 320):
        (path / f"{size}.json").write_text(tokenizer.train(iter([TEXT.encode()]), size))
    flags = [f"--config.dataset.data_dir={path / 'book.txt'}", f"--config.dataset.tokenizer={path / '300.json'}"]
    run(*TINY, *flags, f"--workdir={path / 'run'}")
    return path


def _flags(folder, **changes):
    fields = {"data_dir": folder / "book.txt", "tokenizer": folder / "300.json"} | changes
    return [*TINY, *(f"--config.dataset.{name}={value}" for name, value in fields.items())]


def test_bits_per_byte_are_those_of_the_held_out_text(folder):
    summary = json.loads((folder / "run" / "summary.json").read_text())
    config = app.parse(char_rnn.EXPERIMENT, _flags(folder)).config
    dataset = sources.load(config.dataset)
    tokens = dataset.test["text"]
    held_out = TEXT.encode()[len(TEXT.encode()) * 95 // 100 :]
    assert dataset.tokenizer.decode(tokens).encode() == held_out
    # The first token is not predicted; in the byte-level alphabet each of its characters is a byte.
    predicted = len(held_out) - len(dataset.tokenizer.names[tokens[0]])
    bits = summary["test_loss"] * (len(tokens) - 1) / np.log(2) / predicted
    assert summary["test_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert summary["test_perplexity"] == pytest.approx(np.exp(summary["test_loss"]))
    assert summary["tokens_per_second"] == pytest.approx(16 * summary["examples_per_second"])
    prepared = char_rnn.prepare(config, dataset)
    assert prepared.test["count"][:].sum() == len(tokens) - 1


def test_a_streamed_text_gives_the_same_bits_and_resumes(folder, stop, tmp_path):
    args = [*_flags(folder, max_device_gib=0), f"--workdir={tmp_path}"]
    stop(9, lambda signals: run(*args, signals=signals))
    run(*args)
    assert losses(tmp_path) == losses(folder / "run")


def test_a_run_is_sampled_from_and_evaluated_without_its_tokenizer(folder, tmp_path, capsys):
    shutil.copytree(folder / "run", tmp_path / "run")
    lost = tmp_path / "lost.json"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["dataset"]["tokenizer"] = str(lost)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    workdir = f"--workdir={tmp_path / 'run'}"
    run(workdir, "--mode=sample", "--prompt=Line 12: the naïve", "--length=5")
    assert "Line 12: the naïve" in capsys.readouterr().out
    evaluated = run(workdir, "--mode=eval")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert evaluated["test_bits_per_byte"] == pytest.approx(summary["test_bits_per_byte"])
    (tmp_path / "run" / "tokenizer.json").write_text((folder / "320.json").read_text())
    with pytest.raises(UserError, match=r"data\.json is damaged .*tokenizer\.json has the fingerprint"):
        run(workdir, "--mode=sample")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing: restore it"):
        run(workdir, "--mode=sample")


@pytest.mark.parametrize("other", ["320.json", ""])
@pytest.mark.parametrize("mode", ["train", "eval", "sample"])
def test_another_tokenizer_is_refused_before_the_text_is_read(folder, monkeypatch, mode, other):
    monkeypatch.setattr(text, "streams", lambda *_: pytest.fail("read"))
    given = folder / other if other else ""
    words = re.escape(f"--workdir={folder / 'run'} holds a run with another tokenizer (")
    with pytest.raises(UserError, match=words):
        run(f"--workdir={folder / 'run'}", f"--mode={mode}", f"--config.dataset.tokenizer={given}")


def test_a_run_on_bytes_refuses_a_tokenizer(folder, tmp_path):
    split = {"tokens": np.zeros((2, 3), np.uint8)}
    data_json.write(tmp_path, Dataset("drawn", ("a", "b"), split, None, split, tokenizer=Bytes(("a", "b"))))
    recorded = data_json.read(tmp_path)
    assert recorded is not None
    assert isinstance(recorded.tokenizer, Bytes)
    assert recorded.tokenizer.names == ("a", "b")
    config = DatasetConfig()
    assert data_json.recorded_tokenizer(config, recorded, tmp_path) == config
    config.tokenizer = str(folder / "300.json")
    with pytest.raises(UserError, match=r"\(bytes there, .* here\): set --config.dataset.tokenizer=$"):
        data_json.recorded_tokenizer(config, recorded, tmp_path)


def test_bad_input_leaves_no_folder(folder, tmp_path):
    for changes, words in (
        ({"data_dir": folder / "absent"}, "no such file or folder"),
        ({"tokenizer": folder / "absent"}, "no such file; train a tokenizer"),
        ({"tokenizer": folder / "book.txt"}, "is not a tokenizer.json"),
        ({"name": "digits", "data_dir": ""}, "tokenizer is for texts"),
        ({"train_fraction": 0.001}, "need a longer text than the"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            run(*_flags(folder, **changes), f"--workdir={tmp_path / 'run'}")
        assert not (tmp_path / "run").exists()
