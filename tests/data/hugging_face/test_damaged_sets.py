"""Damaged and missing files of Hugging Face sets, and names of nothing."""

import errno
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from hugging_face_sets import IMAGES, examples, open_split, save, save_parquet

from research.data import hugging_face
from research.errors import UserError


def test_a_damaged_arrow_file(pets, tmp_path):
    path = Path(save(pets, tmp_path / "pets")) / "train" / "data-00000-of-00001.arrow"
    contents = path.read_bytes()
    for damaged in (contents[:-200], b"\0" * len(contents), b""):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"hf:.*pets is damaged, or not a data set \(.*copy or download it again"
        ) as e:
            hugging_face.load(str(tmp_path / "pets"), "")
        assert "\n" not in str(e.value)


def test_offsets_that_point_outside_of_an_arrow_file(tmp_path):
    path = Path(save(examples(3), tmp_path / "pets")) / "data-00000-of-00001.arrow"
    contents = path.read_bytes()
    offsets = np.cumsum([0, *map(len, IMAGES[:3])], dtype=np.int32)
    damaged = np.array([0, 2**30, *offsets[2:]], np.int32)
    assert contents.count(offsets.tobytes()) == 1
    path.write_bytes(contents.replace(offsets.tobytes(), damaged.tobytes()))
    with pytest.raises(UserError, match=r"pets/train is damaged, or not a data set \(ArrowInvalid"):
        open_split(tmp_path / "pets")


def test_a_damaged_parquet_file(pets, tmp_path):
    path = Path(save_parquet(pets, tmp_path / "pets")) / "test.parquet"
    for damaged in (path.read_bytes()[:-9], b"PAR1", b""):
        path.write_bytes(damaged)
        for name in (tmp_path / "pets", path):
            with pytest.raises(UserError, match=r"is damaged, or not a data set") as error:
                hugging_face.load(str(name), "")
            assert "\n" not in str(error.value)


def test_files_that_are_missing(pets, tmp_path):
    name = save(pets, tmp_path / "pets")
    shutil.rmtree(tmp_path / "pets" / "test")
    with pytest.raises(UserError, match=r"pets is damaged, or not a data set \(.*test"):
        hugging_face.load(name, "")


def test_a_full_disk_is_not_damage(pets, tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    name = save_parquet(pets, tmp_path / "pets")
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fill)
    with pytest.raises(UserError, match=r"could not be read \(No space left on device\)"):
        hugging_face.load(name, "")


@pytest.mark.parametrize("name", ["/no/such/folder", "./pets", "../*.parquet", "a/b/c/d", "two words"])
def test_names_of_nothing(name):
    with pytest.raises(UserError, match=f"^--config.dataset.name=hf:{re.escape(name)}: no such file or folder: /"):
        hugging_face.load(name, "")


def test_no_name_and_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"--config.dataset.name=hf: names no data set; use hf:FOLDER or hf:OWNER"):
        hugging_face.load("", "")
    with pytest.raises(UserError, match=r"hf:\. is damaged, or not a data set \(EmptyDatasetError: .* any data files"):
        hugging_face.load(".", "")


def test_files_of_another_kind(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"notes.txt is not a Parquet file \(\*.parquet\)"):
        hugging_face.load(f"{tmp_path}/notes.txt", "")
