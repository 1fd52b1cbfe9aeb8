"""Listings of image folders: cached, never stale, and small for as many files as ImageNet has."""

import itertools
import os
import pickle
import shutil
import time
import tracemalloc
import types

import numpy as np
import pytest
from picture_folders import add, labels, load, train

from research.data import folder_listing


def entries(tmp_path):
    return list(tmp_path.glob("cache/folder-*"))


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
