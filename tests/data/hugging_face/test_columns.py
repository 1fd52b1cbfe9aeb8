"""Columns of Hugging Face sets: images and labels are found by type and name; examples without them."""

import errno
import os
from pathlib import Path

import datasets
import pytest
from hugging_face_sets import FEATURES, IMAGES, NAMES, encode, examples, open_split, save

from research.data import hugging_face
from research.data.source import DamagedError
from research.errors import UserError


def test_images_in_files_of_their_own(tmp_path):
    for number, name in enumerate(["cat/a b.png", "cat/b.png", "dog/ü.png"]):
        path = tmp_path / "pets" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    names, loaders, _ = hugging_face.load(f"{tmp_path}/pets", "")
    source = loaders["train"]()
    assert names == ("cat", "dog")
    assert [source[number] for number in range(3)] == [{"image": encode(i), "label": i // 2} for i in range(3)]
    path.unlink()
    with pytest.raises(DamagedError, match=f"refers to the file {path}, which is missing"):
        source[2]


def test_a_file_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    path = tmp_path / "pets" / "a.png"
    path.write_bytes(IMAGES[0])
    source = open_split(tmp_path / "pets")

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=rf"{path} could not be read \(Permission denied\)"):
        source[0]


def test_an_example_without_an_image_is_damaged(tmp_path):
    source = open_split(save(examples(3, image=[IMAGES[0], None, IMAGES[2]]), tmp_path / "pets"))
    assert source[2]["image"] == IMAGES[2]
    with pytest.raises(DamagedError, match="has no image"):
        source[1]


INTEGERS = datasets.Value("int64")


def test_missing_labels(tmp_path):
    source = open_split(save(examples(4, label=[0, None, 2, -1]), tmp_path / "pets"))
    assert source.labels.tolist() == [0, -1, 2, -1]
    assert [source[number]["label"] for number in range(4)] == [0, -1, 2, -1]


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_integer_labels_are_numbered(tmp_path, dtype):
    train = examples(3, FEATURES | {"label": datasets.Value(dtype)}, label=[3, None, 0])
    name = save(datasets.DatasetDict(train=train, test=train.select([0])), tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ("0", "1", "2", "3")
    assert open_split(name).labels.tolist() == [3, -1, 0]
    assert open_split(name, "test").labels.tolist() == [3]


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_strings_are_labels_in_alphabetical_order(tmp_path, dtype):
    features = FEATURES | {"label": datasets.Value(dtype)}
    train = examples(5, features, label=["newt", None, "cat", "", "newt"])
    splits = {
        "train": train,
        "test": train.select([2, 0]),
        "named": examples(3),
        "unlike": examples(1, features, label=["Cat"]),
    }
    name = save(datasets.DatasetDict(splits), tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ("cat", "newt")
    assert open_split(name).labels.tolist() == [1, -1, 0, -1, 1]
    assert open_split(name, "test")[1] == {"image": IMAGES[0], "label": 1}
    with pytest.raises(UserError, match="pets/unlike has the label 'Cat', which is none of the 2 classes"):
        open_split(name, "unlike")
    with pytest.raises(UserError, match="other label names than train"):
        open_split(name, "named")


@pytest.mark.parametrize("labels", [[0, 2**40], [None, -1]])
def test_integers_that_are_not_classes_are_no_labels(tmp_path, labels):
    name = save(examples(2, FEATURES | {"label": INTEGERS}, label=labels), tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ()
    assert open_split(name)[1] == {"image": IMAGES[1]}


def test_no_labels(tmp_path):
    unlabeled = examples(2, {"image": datasets.Image()})
    name = save(unlabeled, tmp_path / "pets")
    assert hugging_face.load(name, "")[0] == ()
    assert open_split(name).labels is None
    name = save(datasets.DatasetDict(train=examples(2), test=unlabeled), tmp_path / "test")
    assert open_split(name, "test")[1] == {"image": IMAGES[1]}


def test_columns_are_found_by_type_then_by_name(tmp_path):
    other = examples(3).rename_columns({"image": "photo", "label": "species"})
    assert open_split(save(other, tmp_path / "other"))[1] == {"image": IMAGES[1], "label": 1}
    several = {
        "mask": datasets.Image(),
        "img": datasets.Image(),
        "coarse_label": datasets.ClassLabel(2),
        "fine_label": datasets.ClassLabel(names=list(NAMES)),
        "label": INTEGERS,
    }
    values = {
        "mask": IMAGES[5:8],
        "img": IMAGES[:3],
        "coarse_label": [0] * 3,
        "fine_label": [0, 1, 2],
        "label": [9] * 3,
    }
    name = save(examples(3, several, **values), tmp_path / "several")
    assert hugging_face.load(name, "")[0] == NAMES
    assert open_split(name)[1] == {"image": IMAGES[1], "label": 1}


def test_columns_that_cannot_be_chosen(tmp_path):
    images = {"left": datasets.Image(), "right": datasets.Image()}
    name = save(examples(2, images, left=IMAGES[:2], right=IMAGES[:2]), tmp_path / "images")
    with pytest.raises(
        UserError, match="/train has several columns of type Image: left, right; rename one of them to i"
    ):
        open_split(name)
    labels = {"image": datasets.Image(), "kind": datasets.ClassLabel(2), "age": datasets.ClassLabel(2)}
    name = save(examples(2, labels, kind=[0, 1], age=[0, 1]), tmp_path / "labels")
    with pytest.raises(UserError, match="/train has several columns of type ClassLabel: kind, age; rename one of them"):
        hugging_face.load(name, "")


def test_a_set_without_images(tmp_path):
    features = {"text": datasets.Value("string"), "image": datasets.Value("binary"), "label": FEATURES["label"]}
    name = save(examples(2, features, text=["a", "b"]), tmp_path / "text")
    with pytest.raises(
        UserError, match=r"only text \(string\), image \(binary\), label \(ClassLabel\); mark the column of"
    ):
        open_split(name)


def test_splits_must_have_the_same_labels(tmp_path):
    other = examples(2, FEATURES | {"label": datasets.ClassLabel(names=["dog", "cat", "newt"])})
    name = save(datasets.DatasetDict(train=examples(2), test=other), tmp_path / "order")
    with pytest.raises(UserError, match="order/test has other label names than train, or in another order"):
        open_split(name, "test")
    integers = FEATURES | {"label": INTEGERS}
    splits = datasets.DatasetDict(train=examples(2, integers), test=examples(3, integers))
    with pytest.raises(UserError, match="more/test has the label 2, but there are only 2 classes"):
        open_split(save(splits, tmp_path / "more"), "test")
