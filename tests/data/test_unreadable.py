"""Unreadable files are left alone: only damaged data should be deleted, and the error names the example."""

import errno
import os
from pathlib import Path

import pytest
from test_sources import examples, image_features, make_set

from research.config import DatasetConfig
from research.data import cache, prepare, sources, tfds_records
from research.errors import OutOfMemoryError, UserError


def load(data_dir, name="pets"):
    return sources.load(DatasetConfig(name=name, data_dir=str(data_dir)))


@pytest.fixture
def pets(data_dir):
    """The version folder of a prepared set."""
    return make_set(data_dir, "pets", image_features, {"train": examples(5), "test": examples(3)})


@pytest.fixture
def deny(monkeypatch):
    """`deny(path)`: a file or folder cannot be read, as without permission (which root always has)."""

    def deny_path(denied):
        def refusing(method):
            def refuse(path, *args, **kwargs):
                if denied in path.parents or (denied == path and method is not stat):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return method(path, *args, **kwargs)

            return refuse

        stat = Path.stat
        for name in ("stat", "iterdir", "open"):
            monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))

    return deny_path


@pytest.mark.parametrize("name", [".", "..", "../..", "features.json", "dataset_info.json", "label.labels.txt"])
def test_without_permission_it_says_what_could_not_be_read(data_dir, pets, deny, name):
    deny((pets / name).resolve())
    with pytest.raises(
        UserError, match=r"data.* could not be read \(Permission denied\); it is unchanged: fix"
    ) as caught:
        load(data_dir, "pets|digits")
    assert "delete" not in str(caught.value)


def test_a_data_folder_that_cannot_be_reached(data_dir, deny):
    (data_dir / "sets").mkdir()
    deny(data_dir)
    with pytest.raises(UserError, match=r"data/sets could not be read \(Permission denied\)"):
        load(data_dir / "sets", "digits")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose first byte is an I/O error")
def test_an_input_error_of_a_record_file_is_no_damage(data_dir, pets):
    (records,) = pets.glob("*train*")
    records.unlink()
    records.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"could not be read \(Input/output error\)") as caught:
        load(data_dir)
    assert "delete" not in str(caught.value)


def test_a_missing_record_file_is_named(data_dir, pets):
    (records,) = pets.glob("*train*")
    records.unlink()
    with pytest.raises(UserError, match=rf"{records}: No such file or directory; copy or prepare") as caught:
        load(data_dir)
    assert "delete" not in str(caught.value)


def test_damage_names_the_example(data_dir, pets):
    (records,) = pets.glob("*train*")
    content = bytearray(records.read_bytes())
    content[300] ^= 4
    records.write_bytes(content)
    source = tfds_records.import_tfds().builder_from_directory(pets).as_data_source("train")
    damaged = []
    for number in range(5):
        try:
            source[number]
        except RuntimeError:
            damaged.append(number)
    assert len(damaged) == 1
    with pytest.raises(UserError, match=rf"pets/train in .* is damaged \(example {damaged[0]}: .*: delete") as caught:
        load(data_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), OutOfMemoryError, "out of memory"),
        (ImportError("No module named 'tensorflow'"), UserError, "not supported .*tensorflow.*; the data is intact"),
        (NotImplementedError("decode"), UserError, "not supported .*decode.*; the data is intact"),
    ],
)
def test_other_failures_are_no_damage(data_dir, pets, monkeypatch, error, kind, words):
    def fail(path):
        raise error

    monkeypatch.setattr(tfds_records, "_builder", fail)
    with pytest.raises(kind, match=words) as caught:
        load(data_dir)
    assert "delete" not in str(caught.value)


def test_an_archive_that_cannot_be_read_is_no_damage(data_dir, deny):
    (data_dir / "input.txt").write_text("To be, or not to be" * 10)
    deny(data_dir / "input.txt")
    with pytest.raises(UserError, match=r"input\.txt could not be read \(Permission denied\)") as caught:
        prepare.prepare("tiny_shakespeare", data_dir)
    assert "delete" not in str(caught.value)


def test_an_unreadable_cache_entry_is_left_alone(data_dir, pets, deny, capsys):
    load(data_dir)
    entries = sorted(cache.folder().iterdir())
    deny(entries[0] / "entry.json")
    capsys.readouterr()
    cache._warn_once.cache_clear()
    assert len(load(data_dir).train["image"]) == 5
    err = capsys.readouterr().err
    assert "warning: no cache in" in err
    assert "Permission denied" in err
    assert "damaged" not in err
    assert sorted(cache.folder().iterdir()) == entries
