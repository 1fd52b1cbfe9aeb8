"""Tokenizers: prompts and texts, how many bytes a token stands for, bad files, and the command that trains them."""

import errno
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from research.data import named_sets, text_sets, tokenization, tokenizer
from research.data.tfds_sets import UnavailableError
from research.data.tokenization import Bytes, FromJson, Numbers
from research.errors import UserError

TEXT = "A naïve tokenizer reads 日本語 and 'quotes'. " * 20


@pytest.fixture(scope="module")
def pairs():
    return FromJson(tokenizer.train(iter([TEXT.encode()]), 300), "tokenizer.json")


def test_bytes_are_encoded_and_decoded():
    names = Bytes(tuple(map(chr, sorted(set("\n aé".encode())))))
    prompt = names.encode("a é")
    assert names.decode(prompt) == "a é"
    assert names.decode(names.encode("")) == "\n"
    assert names.decode(prompt[-1:]) == "\ufffd"  # half a character
    with pytest.raises(UserError, match="--prompt: the character 'ü' does not occur in the training data"):
        names.encode("aü")


def test_numbers_are_their_own_text():
    numbers = Numbers(12)
    assert numbers.encode("3 11").tolist() == [3, 11]
    assert numbers.encode("").tolist() == [0]
    assert numbers.decode(np.array([3, 11])) == "3 11 "
    for prompt in ("12", "-1", "a", "²"):
        with pytest.raises(UserError, match="trained on token numbers, without a tokenizer: give numbers from 0 to 11"):
            numbers.encode(prompt)


@pytest.mark.parametrize("text", ["A naïve tokenizer", "日本語 あ\n\n\t €", "<|endoftext|> x", " leading"])
def test_byte_pairs_round_trip_and_stand_for_the_bytes_of_the_text(pairs, text):
    tokens = pairs.encode(text)
    assert pairs.decode(tokens) == text
    assert pairs.num_bytes[tokens].sum() == len(text.encode())
    for token in tokens:
        # Each token alone, by the tokenizer itself; half a character decodes to a replacement character.
        alone = pairs.decode([token])
        assert "\ufffd" in alone or pairs.num_bytes[token] == len(alone.encode())


def test_special_tokens_stand_for_no_text():
    library = tokenization.library()
    model = library.Tokenizer(library.models.BPE({"a": 0, "<0x0A>": 1, "\u2581b": 2}, []))
    model.add_special_tokens(["<|endoftext|>"])
    model.add_tokens(["new"])
    found = FromJson(model.to_str(), "x")
    assert dict(zip(found.names, found.num_bytes.tolist())) == {
        "a": 1,
        "<0x0A>": 1,
        "\u2581b": 2,
        "<|endoftext|>": 0,
        "new": 3,
    }
    assert 3 not in found.encode("a")
    with pytest.raises(UserError, match="the tokenizer has no tokens for it"):
        found.encode("z")
    with pytest.raises(UserError, match="the tokenizer has no tokens for a newline"):
        found.encode("")
    # A vocabulary of words without one for unknown words: the library raises a bare Exception.
    words = FromJson(library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="?")).to_str(), "words.json")
    with pytest.raises(UserError, match=r"words\.json cannot encode the text \(.*\): use a tokenizer that"):
        words.encode_texts(["b"])
    # Unigram has the number of its token for unknown text, not the name.
    unigram = FromJson(library.Tokenizer(library.models.Unigram([("?", 0.0), ("a", -1.0)], unk_id=0)).to_str(), "x")
    assert unigram.encode("a").tolist() == [1]
    with pytest.raises(UserError, match="the tokenizer has no tokens for it"):
        unigram.encode("b")


def test_what_is_no_tokenizer_is_named(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"json: no such file; train a tokenizer with `python -m research\.data"):
        tokenization.read(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not in UTF-8"):
        tokenization.read(str(path))
    for content in ("", "{}", '{"model": 3}', "[1]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"json is not a tokenizer\.json of Hugging Face tokenizers"):
            tokenization.read(str(path))
    with pytest.raises(UserError, match="is a folder: give the file"):
        tokenization.read(str(tmp_path))
    assert tokenization.read("") is None
    for url, words in (
        ("foo://x", "foo:// is not supported"),
        ("s3://key:s3cr3t@host/x", "a URL with a password"),
        ("s3://bucket/x", "the package for s3:// is not installed"),
    ):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        for look in (tokenization.read, tokenization.exists):
            with pytest.raises(UserError, match=words):
                look(url)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", denied)
        for look in (tokenization.read, tokenization.exists):
            with pytest.raises(UserError, match=r"json could not be read \(Permission denied\): fix the cause"):
                look(str(path))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[text]"')):
        tokenization.read(str(path))
    with pytest.raises(UserError, match=re.escape('pip install -e ".[text]"')):
        tokenizer.run(["--name=pydoc", f"--out={tmp_path / 'x.json'}"])


def test_a_record_restores_its_tokenizer(pairs):
    restored = tokenization.restore(pairs.kind, pairs.names, pairs.content, "x")
    assert isinstance(restored, FromJson)
    assert restored.names == pairs.names
    assert isinstance(tokenization.restore("bytes", ("a",), "", "x"), Bytes)
    assert isinstance(tokenization.restore("numbers", ("0", "1"), "", "x"), Numbers)
    assert tokenization.restore("", (), "", "x") is None
    with pytest.raises(ValueError, match=f"x has the fingerprint {pairs.kind}, not 0"):
        tokenization.restore("0", pairs.names, pairs.content, "x")


def test_the_command_trains_on_the_training_split(data_dir, capsys):
    (data_dir / "train.txt").write_text(TEXT)
    (data_dir / "test.txt").write_text("zzzzzzzz " * 100)
    out = data_dir / "out.json"
    command = ["--name=text", f"--data_dir={data_dir}", "--vocabulary_size=280", f"--out={out}"]
    tokenizer.run(command)
    assert f"{out}: 280 tokens" in capsys.readouterr().out
    found = tokenization.read(str(out))
    assert found is not None
    assert len(found.names) == 280
    assert "zz" not in found.names
    assert sorted(path.name for path in data_dir.iterdir()) == ["out.json", "test.txt", "train.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--out="], "--out is missing"),
        (["--name="], "--name is missing"),
        (["--vocabulary_size=256"], "vocabulary_size"),
        (["extra"], "unexpected 'extra'"),
        (["--out=there.json"], "there.json exists"),
        (["--out=absent/x.json"], "no such folder"),
        (["--data_dir=absent"], "--data_dir=absent: no such file or folder"),
        (["--data_dir="], "--name=text needs --data_dir=DIR|FILE"),
        (["--name=pydoc|"], "--name='pydoc|': name a data set"),
    ],
)
def test_bad_options_of_the_command(data_dir, monkeypatch, changes, words):
    monkeypatch.chdir(data_dir)
    (data_dir / "there.json").write_text("")
    with pytest.raises(UserError, match=re.escape(words)) as error:
        tokenizer.run(["--name=text", f"--data_dir={data_dir}", "--out=new.json", *changes])
    assert "--config" not in str(error.value)
    assert [path.name for path in data_dir.iterdir()] == ["there.json"]


def test_the_command_uses_the_first_set_that_is_available(monkeypatch, capsys):
    def unavailable(name, config, own):
        raise UnavailableError(name, "is not prepared", "prepare it")

    monkeypatch.setattr(named_sets, "_load_tfds", unavailable)
    assert named_sets.open_text("tiny_shakespeare|pydoc", "").name == "pydoc"
    assert "WARNING: tiny_shakespeare is not prepared: using pydoc instead" in capsys.readouterr().err


def test_training_needs_utf_8():
    with pytest.raises(UserError, match=r"notes is not in UTF-8 \(.*\), which a tokenizer needs"):
        tokenizer.train(iter([b"fine\n" * 20_000, b"\xff"]), 300, "notes")


def test_images_are_not_a_text():
    with pytest.raises(UserError, match=r"own: the feature text is int64\[3\], not bytes, uint8 \[n\]: convert it"):
        text_sets.as_text("own", {"text": np.arange(3)})
    with pytest.raises(UserError, match="--name=digits is not a text"):
        text_sets.as_text("digits", {"image": np.zeros(3)})
    given = FromJson(tokenizer.train(iter([b""]), 256), "x")
    with pytest.raises(UserError, match=r"tokenizer is for texts, but --config.dataset.name=digits is none"):
        text_sets.tokenize("digits", {"train": {"image": np.zeros(3)}}, given)


def test_the_command_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        tokenizer.main(["--name=text"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out is missing")
    tokenizer.run(["--help"])
    assert "--vocabulary_size" in capsys.readouterr().out
