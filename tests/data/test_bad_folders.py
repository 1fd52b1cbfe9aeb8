"""Image folders with errors: unreadable files, and bad folders, which are named."""

import errno
import os
import shutil
import unicodedata

import pytest
from picture_folders import add, load, train

from research.data import folder
from research.data.source import DamagedError
from research.errors import UserError


def test_files_that_are_gone_are_damaged_records(pets):
    source = train(pets)
    (pets / "train/cat/1.png").unlink()
    (pets / "train/cat/2.jpg").unlink()
    (pets / "train/cat/2.jpg").mkdir()
    shutil.rmtree(pets / "train/dog")
    add(pets, "train/dog")
    for number in range(3):
        with pytest.raises(DamagedError, match=r"^has been removed or replaced by a folder since"):
            source[number]
    with pytest.raises(IndexError):
        source[3]


def test_an_empty_file_is_left_to_the_decoder(pets):
    add(pets, "train/cat/1.png", content=b"")
    assert train(pets)[0] == {"image": b"", "label": 0}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_now_is_not_damaged(pets, monkeypatch, number):
    source = train(pets)

    def refuse(path, *args):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(folder, "open", refuse, raising=False)
    path = pets / "train/cat/1.png"
    with pytest.raises(UserError) as caught:
        source[0]
    assert str(caught.value).startswith(f"{path} could not be read ({os.strerror(number)}); it is unchanged")


@pytest.mark.parametrize("denied", [".", "train", "train/cat", "train/cat/more"])
def test_a_folder_that_cannot_be_listed(pets, monkeypatch, denied):
    add(pets, "train/cat/more/1.png")
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path) == os.path.normpath(pets / denied):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError) as caught:
        load(pets)
    path = os.path.normpath(pets / denied)
    assert str(caught.value).startswith(f"{path} could not be read (Permission denied); it is unchanged")


def test_a_folder_that_vanishes_while_it_is_listed(pets, monkeypatch):
    scandir = os.scandir

    def vanish(path):
        if path == os.fsencode(pets / "train/dog"):
            (pets / "train/dog").rename(pets / "dog")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanish)
    with pytest.raises(UserError, match=r"train/dog could not be listed \(No such file or directory\): run again"):
        load(pets)


BAD = {
    "no folders": ([], "{} has no class folders: expected DIR/train/CLASS/IMAGE"),
    "images only": (["1.png", "2.png"], "{} has images, but no class folders: expected DIR/train/CLASS/IMAGE"),
    "other files only": (["labels.csv"], "{} has no class folders: expected"),
    "an empty train": (["train/"], "{}/train has no class folders: expected"),
    "images in train": (["train/1.png"], "{}/train has images, but no class folders"),
    "an empty class": (["a/1.png", "b/", "c/1.png"], "{}/b: no images (.png, .jpg, "),
    "three empty classes": (["a/1.png", "b/", "c/x/", "d/"], "{}/b and 2 more class folders: no images"),
    "a class of other files": (["a/1.png", "b/1.tiff"], "{}/b: no images (.png, .jpg, "),
    "no images": (["a/", "b/1.tiff"], "{} has no images (.png, "),
    "a class that train lacks": (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "{}/test/c: train has no class"),
    "two classes that train lacks": (
        ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png", "val/d/1.png"],
        "{}/val/c and 1 more: train has no class folder of this name",
    ),
    "images without class in test": (["train/a/1.png", "train/b/1.png", "test/1.png"], "{}/test has images, but no"),
    "an empty test": (["train/a/1.png", "train/b/1.png", "test/a/"], "{}/test has no images"),
    "test but no train": (["test/a/1.png", "val/a/1.png"], "{}/test is a split, but there is no train"),
    "another name for train": (["Training/a/1.png", "other/a/1.png"], "{}/Training is not the name of a split"),
    "another name for validation": (["train/a/1.png", "train/b/1.png", "valid/a/1.png"], "{}/valid is not the name"),
    "val and validation": (["train/a/1.png", "val/a/1.png", "validation/a/1.png"], "{} has both val and validation"),
}


@pytest.mark.parametrize(("paths", "message"), BAD.values(), ids=BAD)
def test_bad_folders(data_dir, paths, message):
    for path in paths:
        if path.endswith("/"):
            (data_dir / path).mkdir(parents=True)
        else:
            add(data_dir, path)
    for _ in range(2):  # from a cached listing, too
        with pytest.raises(UserError) as caught:
            load(data_dir)
        assert str(caught.value).startswith(message.format(data_dir))
        assert "\n" not in str(caught.value)


def test_bad_folders_from_a_cached_listing(data_dir, settled):
    test_bad_folders(data_dir, *BAD["an empty class"])


def test_too_few_images_to_hold_out(data_dir):
    add(data_dir, "cat/1.png", "dog/1.png")
    with pytest.raises(UserError, match=r"data has too few images \(2\) to hold out 10% for the split test: add"):
        load(data_dir, hold_out=True)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_does_not_exist(data_dir, name):
    (data_dir / "file").write_text("")
    with pytest.raises(UserError, match=rf"--config.dataset.data_dir={data_dir}/{name}: no such folder"):
        folder.load(str(data_dir / name), hold_out=True)


def test_no_folder_given():
    with pytest.raises(UserError, match=r"--config.dataset.name=folder needs --config.dataset.data_dir=DIR: expected"):
        folder.load("", hold_out=True)


def test_folders_next_to_the_splits_are_named(data_dir, capsys):
    add(data_dir, "train/a/1.png", "train/b/1.png", "bus/1.png", "car/1.png")
    load(data_dir)
    assert capsys.readouterr().err == f"warning: {data_dir}: skipped folders that are not splits: bus, car\n"


def test_a_class_in_another_unicode_normalization(data_dir):
    composed, decomposed = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    add(data_dir, f"train/{composed}/1.png", "train/b/1.png", f"test/{decomposed}/1.png")
    with pytest.raises(UserError, match="has no class folder of this name; it has one that looks the same but differs"):
        load(data_dir)


def test_bad_splits_that_are_not_used_do_no_harm(data_dir):
    # As ImageNet's test split, whose labels are not published.
    add(data_dir, "train/a/1.png", "train/b/1.png", "val/a/1.png", "test/1.png")
    _, loaders = folder.load(str(data_dir), hold_out=False)
    assert len(loaders["validation"]()) == 1
