"""Image folders: every file gets the right label, the listing is cached and never stale, and bad folders are named."""

import errno
import hashlib
import io
import itertools
import os
import pickle
import shutil
import time
import tracemalloc
import types
import unicodedata

import numpy as np
import pytest
from PIL import Image

from research.data import folder, folder_listing
from research.data.source import DamagedError, held_out
from research.errors import UserError

_BUFFER = io.BytesIO()
Image.new("RGB", (2, 2), "red").save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()


def add(data_dir, *paths, content=PNG):
    """Writes a file at each path, str or bytes, relative to `data_dir`."""
    for path in paths:
        file = os.path.join(os.fsencode(data_dir), os.fsencode(path))
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(content)


def load(data_dir, hold_out=False):
    """The names of the classes, and all splits."""
    names, loaders = folder.load(str(data_dir), hold_out=hold_out)
    return names, {split: loader() for split, loader in loaders.items()}


def train(data_dir):
    return folder.load(str(data_dir), hold_out=False)[1]["train"]()


def labels(source):
    """The label of each file, by its path."""
    assert [source[number]["label"] for number in range(len(source))] == source.labels.tolist()
    return dict(zip(source.keys(), source.labels.tolist(), strict=True))


@pytest.fixture
def pets(data_dir):
    add(data_dir, "train/cat/1.png", "train/cat/2.jpg", "train/dog/1.png", "val/dog/1.png", "test/cat/1.png")
    return data_dir


@pytest.fixture
def settled(monkeypatch):
    """Makes every folder look as if it had last changed ten seconds ago."""
    later = types.SimpleNamespace(time=time.time, time_ns=lambda: time.time_ns() + 10**10)
    monkeypatch.setattr(folder_listing, "time", later)


@pytest.fixture
def scanned(monkeypatch, data_dir):
    """The folders below `data_dir` that have been scanned, relative to it."""
    scandir, paths = os.scandir, []

    def recording(path="."):
        relative = os.path.relpath(os.fsdecode(path), data_dir)
        if not relative.startswith(".."):
            paths.append(relative)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recording)
    return paths


def entries(tmp_path):
    return list(tmp_path.glob("cache/folder-*"))


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


def test_the_second_start_scans_no_class_folder(pets, settled, scanned, tmp_path):
    first = train(pets)
    assert scanned == [".", "train", "train", "train/cat", "train/dog"]
    scanned.clear()
    second = train(pets)
    assert scanned == [".", "train"]
    assert second.fingerprint == first.fingerprint
    assert labels(second) == labels(first)
    assert isinstance(second.labels, np.memmap)
    assert not second.labels.flags.writeable
    assert len(entries(tmp_path)) == 1


def test_warnings_are_repeated_when_the_listing_is_cached(pets, settled, capsys):
    add(pets, "train/cat/1.txt")
    for _ in range(2):
        train(pets)
        assert capsys.readouterr().err == f"warning: {pets}/train: skipped files of other types (1)\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda data_dir: add(data_dir, "dog/x/y/2.png"),
        lambda data_dir: add(data_dir, "dog/x/2.png"),
        lambda data_dir: (data_dir / "dog/x/y/1.png").unlink(),
        lambda data_dir: (data_dir / "dog/x/y/1.png").rename(data_dir / "dog/x/y/0.png"),
        lambda data_dir: shutil.rmtree(data_dir / "dog/x"),
        lambda data_dir: add(data_dir, "cow/1.png"),
        lambda data_dir: (data_dir / "cat").rename(data_dir / "zebra"),
    ],
)
def test_a_changed_folder_is_noticed(data_dir, settled, change):
    add(data_dir, "cat/1.png", "dog/1.png", "dog/x/1.png", "dog/x/y/1.png")
    before = labels(train(data_dir))
    change(data_dir)
    after = labels(train(data_dir))
    assert after != before
    files = sorted(path.relative_to(data_dir).as_posix().encode() for path in data_dir.rglob("*.png"))
    assert sorted(after) == files


def test_a_change_whose_modification_time_is_reset_is_noticed(data_dir, settled):
    # As by `tar -x` and `rsync -a`.
    add(data_dir, "cat/1.png", "dog/1.png")
    os.utime(data_dir / "cat", (1e9, 1e9))
    train(data_dir)
    add(data_dir, "cat/2.png")
    os.utime(data_dir / "cat", (1e9, 1e9))
    assert len(train(data_dir)) == 3


def test_a_copy_that_takes_the_place_of_the_folder_is_noticed(data_dir, settled, monkeypatch):
    add(data_dir, "a/cat/1.png", "a/dog/1.png", "b/cat/2.png", "b/dog/2.png")
    for path in ("a", "b"):
        for part in ("cat", "dog", "."):
            os.utime(data_dir / path / part, (1e9, 1e9))
    (data_dir / "link").symlink_to("a")
    train(data_dir / "link")
    (data_dir / "link").unlink()
    (data_dir / "link").symlink_to("b")
    assert list(train(data_dir / "link").keys()) == [b"cat/2.png", b"dog/2.png"]


def test_the_listing_of_a_folder_that_has_just_changed_is_not_cached(pets, scanned, monkeypatch, tmp_path):
    # A second change within the resolution of timestamps would not be noticed.
    clock = types.SimpleNamespace(time=time.time, time_ns=lambda: os.stat(pets / "train/dog").st_ctime_ns + 10**9)
    monkeypatch.setattr(folder_listing, "time", clock)
    train(pets)
    assert entries(tmp_path) == []
    scanned.clear()
    train(pets)
    assert "train/dog" in scanned


def test_a_new_class_of_train_changes_the_labels_of_an_unchanged_split(pets, settled):
    assert labels(load(pets)[1]["validation"]) == {b"dog/1.png": 1}
    add(pets, "train/bird/1.png")
    assert labels(load(pets)[1]["validation"]) == {b"dog/1.png": 2}


def test_each_location_has_its_own_listing(data_dir, settled, tmp_path):
    for name in "ab":
        add(data_dir, f"{name}/cat/{name}.png", f"{name}/dog/1.png")
    for name in "abab":
        assert next(iter(train(data_dir / name).keys())) == f"cat/{name}.png".encode()
    assert len(entries(tmp_path)) == 2


def test_listings_that_nobody_uses_are_removed_after_a_week(data_dir, settled, tmp_path):
    add(data_dir, "a/cat/1.png", "a/dog/1.png", "b/cat/1.png", "b/dog/1.png")
    train(data_dir / "b")
    for number in range(2, 5):
        add(data_dir, f"a/cat/{number}.png")
        train(data_dir / "a")
    assert len(entries(tmp_path)) == 4  # other hosts may still have mapped them
    for entry in entries(tmp_path):
        os.utime(entry, (time.time() - 8 * 24 * 60 * 60,) * 2)
    train(data_dir / "a")  # uses the newest again
    add(data_dir, "a/cat/5.png")
    train(data_dir / "a")
    assert len(entries(tmp_path)) == 3  # that one, the new one, and that of b


def test_a_damaged_cache_entry_is_replaced(pets, settled, tmp_path, capsys):
    expected = labels(train(pets))
    (entry,) = entries(tmp_path)
    (entry / "labels.npy").write_bytes(b"")
    assert labels(train(pets)) == expected
    assert capsys.readouterr().err.count("\n") == 1
    assert isinstance(train(pets).labels, np.memmap)


def test_without_a_cache_it_lists_at_every_start(pets, settled, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHWORK_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert labels(train(pets)) == {b"cat/1.png": 0, b"cat/2.jpg": 0, b"dog/1.png": 1}
    assert "no cache in" in capsys.readouterr().err


def test_a_source_can_be_sent_to_another_process(pets, settled):
    train(pets)
    source = train(pets)  # memory-mapped
    copy = pickle.loads(pickle.dumps(source))
    assert copy[2] == source[2]
    assert (copy.fingerprint, labels(copy)) == (source.fingerprint, labels(source))


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
    "one class": (["cat/1.png"], "{} has only one class folder, cat; classification needs two"),
    "one class of train": (["train/cat/1.png", "test/cat/1.png"], "{}/train has only one class folder, cat"),
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


def test_bad_splits_that_are_not_used_do_no_harm(data_dir):
    # As ImageNet's test split, whose labels are not published.
    add(data_dir, "train/a/1.png", "train/b/1.png", "val/a/1.png", "test/1.png")
    _, loaders = folder.load(str(data_dir), hold_out=False)
    assert len(loaders["validation"]()) == 1


def test_memory_per_file(data_dir, settled):
    add(data_dir, "first.png")
    for number in range(20):
        (data_dir / f"n{number:08d}").mkdir()
        for file in range(500):
            os.link(data_dir / "first.png", data_dir / f"n{number:08d}/n{number:08d}_{file:05d}.JPEG")
    (data_dir / "first.png").unlink()
    classes = {b"n%08d" % number: number for number in range(20)}
    tracemalloc.start()
    try:
        listing = folder_listing.scan(os.fsencode(data_dir), classes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing["ends"]) == 10_000
    assert peak < 100 * 10_000 + 200_000  # the names of one folder are a list


class FakeEntry:
    """An entry of a folder that does not exist."""

    def __init__(self, name):
        self.name = name

    def is_dir(self):
        return False

    def is_file(self):
        return True


class FakeFolder:
    """1,280 such entries, as `os.scandir` returns them."""

    def __enter__(self):
        return map(FakeEntry, [b"ILSVRC2012_%08d.JPEG" % number for number in range(1280)])

    def __exit__(self, *_):
        pass


@pytest.mark.slow
def test_as_many_files_as_imagenet_has(data_dir, settled, monkeypatch):
    for number in range(1000):
        (data_dir / f"n{number:04d}").mkdir()
    scandir, scans = os.scandir, itertools.count()

    def fake(path):
        if os.path.basename(os.fsencode(path)).startswith(b"n"):
            next(scans)
            return FakeFolder()
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fake)
        first, second = train(data_dir), train(data_dir)
    assert next(scans) == 1000
    assert len(second) == 1_280_000
    assert second.record_name(1_279_999) == str(data_dir / "n0999/ILSVRC2012_00001279.JPEG")
    assert np.array_equal(second.labels, np.repeat(np.arange(1000), 1280))
    assert second.fingerprint == first.fingerprint
    assert isinstance(second.labels, np.memmap)
