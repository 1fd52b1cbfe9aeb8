"""Image folders: every file gets the right label, the listing is cached and never stale, and bad folders are named."""

import hashlib
import os
import unicodedata

import numpy as np
import pytest
from picture_folders import PNG, add, labels, load, train

from research.data.source import held_out


def test_the_folders_of_splits(pets):
    names, splits = load(pets)
    assert names == ("cat", "dog")
    assert labels(splits["train"]) == {b"cat/1.png": 0, b"cat/2.jpg": 0, b"dog/1.png": 1}
    assert labels(splits["validation"]) == {b"dog/1.png": 1}
    assert labels(splits["test"]) == {b"cat/1.png": 0}
    assert splits["train"].labels.dtype == np.int32
    assert splits["train"][0] == {"image": PNG, "label": 0}
    assert splits["validation"].record_name(0) == str(pets / "val/dog/1.png")


@pytest.mark.parametrize("hold_out", [False, True])
def test_only_the_folders_that_exist_are_splits(data_dir, hold_out):
    add(data_dir, "train/cat/1.png", "train/dog/1.png", "validation/cat/1.png", "train.csv")
    assert set(load(data_dir, hold_out)[1]) == {"train", "validation"}


def test_classes_directly_in_the_folder(data_dir):
    add(data_dir, "cat/1.png", "dog/1.png")
    names, splits = load(data_dir)
    assert (names, set(splits)) == (("cat", "dog"), {"train"})
    assert labels(splits["train"]) == {b"cat/1.png": 0, b"dog/1.png": 1}


def test_a_single_class_is_a_set_of_images(data_dir):
    add(data_dir, "train/cat/1.png", "test/cat/1.png")
    names, splits = load(data_dir)
    assert (names, labels(splits["train"])) == (("cat",), {b"cat/1.png": 0})


def test_a_relative_folder_and_one_in_the_home_folder(data_dir, monkeypatch):
    add(data_dir, "pets/cat/1.png", "pets/dog/1.png")
    monkeypatch.chdir(data_dir)
    monkeypatch.setenv("HOME", str(data_dir))
    for given in ("pets", "./pets/", "~/pets"):
        assert train(given).record_name(0) == str(data_dir / "pets/cat/1.png")


def test_nested_folders_belong_to_their_class(data_dir):
    add(data_dir, "a/z.png", "a/b/c/1.png", "a/b/2.png", "b/a/1.png", "a/.png/1.png")
    source = train(data_dir)
    # A folder's own images come first.
    assert list(source.keys()) == [b"a/z.png", b"a/b/2.png", b"a/b/c/1.png", b"b/a/1.png"]
    assert source.labels.tolist() == [0, 0, 0, 1]


def test_hold_out_depends_on_the_path_only(data_dir):
    paths = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(60)]
    add(data_dir, *paths[::2])
    before = load(data_dir, hold_out=True)[1]
    add(data_dir, *paths[1::2])
    names, after = load(data_dir, hold_out=True)
    assert names == ("cat", "dog")
    assert set(before["test"].keys()) < set(after["test"].keys())
    assert set(before["train"].keys()) < set(after["train"].keys())
    low = {p for p in paths if hashlib.blake2b(p.encode(), digest_size=8, salt=b"test").digest() < b"\x19\x99\x99\x99"}
    assert set(map(bytes.decode, after["test"].keys())) == low
    assert set(map(bytes.decode, after["train"].keys())) == set(paths) - low
    assert after["test"][0]["label"] == after["test"].labels[0]
    assert before["test"].fingerprint != after["test"].fingerprint != after["train"].fingerprint


def test_the_held_out_fraction():
    keys = [f"class {number % 7}/{number}.png".encode() for number in range(10_000)]
    test, validation = held_out(keys, 0.1, b"test"), held_out(iter(keys), 0.25, b"validation")
    assert (test.dtype, test.shape) == (bool, (10_000,))
    assert abs(test.mean() - 0.1) < 0.01
    assert abs(validation[test].mean() - 0.25) < 0.05  # independent of the other salt
    assert not np.any(test & ~held_out(keys, 0.2, b"test"))  # a larger fraction holds out more
    assert held_out(keys, 1.0, b"").all()
    assert not held_out(keys, 0.0, b"").any()
    assert held_out([], 0.5, b"").shape == (0,)


def test_other_files_are_skipped_and_counted(data_dir, capsys):
    suffixes = ("jpg", "JPEG", "jpe", "Jfif", "mpo", "png", "webp", "bmp", "gif", "a.b.PNG")
    images = [f"cat/1.{suffix}" for suffix in suffixes]
    other = ["Thumbs.db", "cat/Thumbs.db", "cat/1.txt", "cat/png", "cat/1.png~", "dog/x/labels.csv"]
    hidden = [".DS_Store", "cat/._1.jpg", "cat/@eaDir/1.jpg/thumb.jpg", ".git/1.png", "cat/.cache/1.png"]
    add(data_dir, "dog/1.png", "README.png", "__MACOSX/cat/1.png", *images, *other, *hidden)
    os.mkfifo(data_dir / "cat/pipe.png")  # reading it would never end
    assert set(map(os.fsdecode, train(data_dir).keys())) == {"dog/1.png", *images}
    line = f"warning: {data_dir}: skipped files of other types (7), images in no class (1)\n"
    assert capsys.readouterr().err == line


def test_hidden_files_alone_are_not_mentioned(pets, capsys):
    add(pets, "train/.DS_Store", "train/cat/._1.png", "train/@eaDir/1.png")
    load(pets)
    assert capsys.readouterr().err == ""


NAMES = [
    b"with spaces, and 100% 'odd'",
    unicodedata.normalize("NFC", "é").encode(),
    unicodedata.normalize("NFD", "é").encode(),
    "猫 🐈".encode(),
    b"caf\xe9",  # Latin-1
    b"two\nlines\x1b[31m",
    b"-rf",
    b"x" * 200,
]


def test_any_name(data_dir):
    add(data_dir, *(name + b"/" + name + b".png" for name in NAMES))
    names, splits = load(data_dir)
    source = splits["train"]
    assert list(source.keys()) == [name + b"/" + name + b".png" for name in sorted(NAMES)]
    assert source.labels.tolist() == list(range(len(NAMES)))
    assert all(source[number]["image"] == PNG for number in range(len(source)))
    shown = [names[sorted(NAMES).index(name)] for name in NAMES]
    assert shown[:4] == [name.decode() for name in NAMES[:4]]
    assert shown[4:6] == ["caf\ufffd", "two\ufffdlines\ufffd[31m"]
    for number in range(len(source)):
        assert "\n" not in source.record_name(number)
        assert source.record_name(number).encode().startswith(os.fsencode(data_dir))  # can be encoded


def test_symlinks_are_followed(data_dir, tmp_path):
    add(tmp_path, "elsewhere/cat/1.png", "elsewhere/more/2.png", "3.png")
    add(data_dir, "dog/1.png")
    (data_dir / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (data_dir / "dog/more").symlink_to("../../elsewhere/more")
    (data_dir / "dog/3.png").symlink_to(tmp_path / "3.png")
    (tmp_path / "link").symlink_to(data_dir)
    expected = {b"cat/1.png": 0, b"dog/1.png": 1, b"dog/3.png": 1, b"dog/more/2.png": 1}
    assert labels(train(data_dir)) == expected
    assert labels(train(tmp_path / "link")) == expected


def test_loops_and_broken_links_are_skipped(data_dir, capsys):
    add(data_dir, "cat/1.png", "cat/a/2.png", "dog/b/1.png")
    (data_dir / "cat/a/up").symlink_to(data_dir / "cat")
    (data_dir / "cat/self").symlink_to(".")
    (data_dir / "dog/top").symlink_to(data_dir)
    (data_dir / "dog/gone.png").symlink_to("nowhere.png")
    (data_dir / "dog/in_file.png").symlink_to("b/1.png/x.png")
    (data_dir / "dog/own.png").symlink_to("own.png")
    source = train(data_dir)
    assert list(source.keys()) == [b"cat/1.png", b"cat/a/2.png", b"dog/b/1.png"]
    line = f"warning: {data_dir}: skipped broken links (3), links into a loop (3)\n"
    assert capsys.readouterr().err == line


def test_folders_that_contain_each_other_by_links(data_dir):
    add(data_dir, "cat/1.png", "dog/2.png")
    (data_dir / "cat/dog").symlink_to(data_dir / "dog")
    (data_dir / "dog/cat").symlink_to(data_dir / "cat")
    expected = {b"cat/1.png": 0, b"cat/dog/2.png": 0, b"dog/2.png": 1, b"dog/cat/1.png": 1}
    assert labels(train(data_dir)) == expected


def test_the_fingerprint_depends_on_names_and_labels_only(data_dir, tmp_path):
    paths = [f"{name}/{number}.png" for name in ("cat", "dog", "emu") for number in range(5)]
    add(data_dir, *paths)
    add(tmp_path / "copy", *reversed(paths), content=b"other")
    fingerprint = train(data_dir).fingerprint
    assert list(train(data_dir).keys()) == [path.encode() for path in paths]
    assert train(tmp_path / "copy").fingerprint == fingerprint
    (tmp_path / "copy/cat/0.png").rename(tmp_path / "copy/dog/10.png")
    assert train(tmp_path / "copy").fingerprint != fingerprint
    (data_dir / "cow").mkdir()
    (data_dir / "cat/0.png").rename(data_dir / "cow/0.png")
    assert train(data_dir).fingerprint != fingerprint
