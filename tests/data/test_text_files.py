"""Text in files: plain or gzip, one or many, with fixed parts held out; and files that are no text."""

import errno
import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import DatasetConfig
from research.data import sources, text_files
from research.data.text_files import FileText
from research.data.text_source import hold_out
from research.errors import UserError

SAMPLE = ("Ça va? 日本語 Zürich\n" * 40).encode()


def read(text, *, is_utf8=True):
    """The whole text."""
    return b"".join(text.blocks(is_utf8=is_utf8))


def load(path, **fields):
    return sources.load(DatasetConfig(name="text", data_dir=str(path), **fields))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=12), min_size=1, max_size=4),
    st.booleans(),
)
def test_the_parts_are_the_whole_text_in_whole_characters(tmp_path_factory, contents, compressed):
    folder = tmp_path_factory.mktemp("text")
    for number, content in enumerate(contents):
        data = content.encode()
        (folder / f"{number}").write_bytes(gzip.compress(data, mtime=0) if compressed else data)
    expected = b"".join(
        content.encode() + (b"" if content.endswith("\n") or number == len(contents) - 1 else b"\n")
        for number, content in enumerate(contents)
    )
    text = FileText("text/train", text_files.find(str(folder))["train"])
    assert read(text) == expected
    parts = hold_out(text, validation=True)
    found = {}
    for role, part in parts.items():
        try:
            found[role] = read(part)
        except UserError:
            found[role] = b""  # too short to have this part
    assert found["train"] + found["validation"] + found["test"] == expected
    for part in found.values():
        part.decode()
    for size, percent in ((len(found["train"]), 90), (len(found["train"] + found["validation"]), 95)):
        assert 0 <= size - len(expected) * percent // 100 <= 3


def test_files_are_sorted_and_joined_with_newlines_between_them(data_dir):
    (data_dir / "b").mkdir()
    (data_dir / "b" / "x.txt").write_bytes(b"second\n")
    (data_dir / "c.gz").write_bytes(gzip.compress(b"third") + gzip.compress(b", in two members"))
    (data_dir / "a.txt").write_bytes(b"first")
    (data_dir / ".hidden").write_bytes(b"\0")
    text = FileText("text/train", text_files.find(str(data_dir))["train"])
    assert read(text) == b"first\nsecond\nthird, in two members"


def test_links_are_followed_and_an_unreadable_folder_is_an_error(data_dir, tmp_path, monkeypatch):
    (data_dir / "a").mkdir()
    (data_dir / "a" / "loop").symlink_to(data_dir)
    (data_dir / "broken").symlink_to("absent")
    (data_dir / "a" / "1.txt").write_bytes(b"one\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.txt").write_bytes(b"two")
    (data_dir / "linked").symlink_to(tmp_path / "elsewhere")
    assert read(FileText("text/train", text_files.find(str(data_dir))["train"])) == b"one\ntwo"
    iterdir = Path.iterdir

    def denied(path):
        if path.name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=r"/a could not be read \(Permission denied\)"):
        text_files.find(str(data_dir))


def test_a_file_is_a_text_of_bytes_whose_end_is_held_out(data_dir):
    (data_dir / "book.txt").write_bytes(SAMPLE)
    book = load(data_dir / "book.txt")
    parts = [split["text"] for split in (book.train, book.validation, book.test)]
    assert all(part.dtype == np.uint8 for part in parts)
    assert b"".join(part.tobytes() for part in parts) == SAMPLE
    np.testing.assert_allclose(np.divide(list(map(len, parts)), len(SAMPLE)), (0.9, 0.05, 0.05), atol=0.01)
    assert book.tokenizer is None
    # A fraction that is given replaces what is held out by default.
    other = load(data_dir / "book.txt", test_fraction=0.5)
    assert (other.validation, len(other.test["text"])) == (None, len(SAMPLE) // 2)
    other = load(data_dir / "book.txt", validation_fraction=0.5)
    assert len(other.train["text"]) == pytest.approx(0.475 * len(SAMPLE), abs=2)
    assert len(load(data_dir / "book.txt", train_fraction=0.5).train["text"]) == round(len(parts[0]) / 2)


def test_splits_are_folders_or_files(data_dir):
    (data_dir / "train").mkdir()
    (data_dir / "train" / "1.txt").write_bytes(b"to train on\n")
    (data_dir / "train" / "2.txt").write_bytes(b"more")
    (data_dir / "val.txt").write_bytes(b"to validate on")
    (data_dir / "test.txt.gz").write_bytes(gzip.compress(b"to test on"))
    (data_dir / "README").write_bytes(b"\0")
    found = load(data_dir)
    texts = [split["text"].tobytes() for split in (found.train, found.validation, found.test)]
    assert texts == [b"to train on\nmore", b"to validate on", b"to test on"]
    (data_dir / "test.txt.gz").unlink()
    assert (load(data_dir).validation, load(data_dir).test["text"].tobytes()) == (None, b"to validate on")


def test_latin_1_and_invalid_utf_8_are_bytes_but_not_for_a_tokenizer(data_dir):
    latin = ("Übermäßig\n" * 30).encode("latin-1")
    (data_dir / "a.txt").write_bytes(b"fine\n")
    (data_dir / "b.txt").write_bytes(latin)
    text = FileText("text/train", text_files.find(str(data_dir))["train"])
    assert read(text, is_utf8=False) == b"fine\n" + latin
    with pytest.raises(UserError, match=r"b\.txt is not in UTF-8 \(.* near byte 0\), which a tokenizer needs"):
        read(text)
    (data_dir / "b.txt").write_bytes("half a character: ü".encode()[:-1])
    text = FileText("text/train", text_files.find(str(data_dir))["train"])
    with pytest.raises(UserError, match=r"b\.txt is not in UTF-8 \(unexpected end of data near"):
        read(text)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no files: expected a file of text"),
        ({"a.txt": b""}, r"a\.txt: no text for text/train; use a longer one"),
        ({"a.txt": b"", "b.txt": b""}, r"a\.txt and 1 more: no text"),
        ({"a.txt": b"fine", "b.png": b"\x89PNG\r\n\x1a\n\0"}, r"b\.png is not a text: byte 8 is 0; remove it"),
        ({"a.txt": b"fine\n" * 2000 + b"\0"}, r"a\.txt is not a text: byte 10,000 is 0"),
        ({"a.txt": "UTF-16".encode("utf-16")}, "convert it to UTF-8 if it is UTF-16"),
        ({"a.txt": b"fine", "b.gz": gzip.compress(b"x" * 99)[:-9]}, r"b\.gz is a damaged gzip file"),
        ({"test.txt": b"fine"}, r"has test\.txt, but no train"),
        ({"train.txt": b"a", "val.txt": b"a", "validation": b"a"}, r"has both val\.txt and validation"),
        ({"train.bin": b"aa", "val.txt": b"a"}, "a split is either text or one file of tokens"),
        ({"a.bin": b"aa", "b.bin": b"aa"}, "a split is either text or one file of tokens"),
    ],
)
def test_what_is_no_text_is_named(data_dir, files, words):
    for name, content in files.items():
        (data_dir / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load(data_dir)


def test_a_folder_is_needed(data_dir):
    with pytest.raises(UserError, match=r"data_dir=.*absent: no such file or folder: expected a file of text"):
        load(data_dir / "absent")
    with pytest.raises(UserError, match=r"name=text needs --config.dataset.data_dir"):
        sources.load(DatasetConfig(name="text"))
