"""The choice of the splits to train, validate and test on, and of the version of a set."""

import io

import numpy as np
import pytest
from PIL import Image
from test_sources import examples, image_features, make_set

from research.config import DatasetConfig
from research.data import sources, tfds_sets
from research.errors import UserError


def load(data_dir, name="pets", **fields):
    return sources.load(DatasetConfig(name=name, data_dir=str(data_dir), **fields))


def numbered(count, start=0):
    """Examples with different gray values."""
    found = []
    for value in range(start, start + count):
        png = io.BytesIO()
        Image.new("RGB", (2, 2), (value, value, value)).save(png, "PNG")
        found.append({"image": png.getvalue(), "label": value % 2})
    return found


def values(split):
    return split["image"][:, 0, 0, 0].tolist()


@pytest.fixture
def pets(data_dir):
    """A set in which every example has a different gray value; the splits have 20, 5 and 5."""
    splits = {"train": numbered(20), "validation": numbered(5, 100), "test": numbered(5, 200)}
    make_set(data_dir, "pets", image_features, splits)
    return data_dir


@pytest.fixture
def train_only(data_dir):
    make_set(data_dir, "pets", image_features, {"train": numbered(40)})
    return data_dir


def test_splits_are_chosen_by_flags(pets):
    usual = load(pets)
    assert [min(values(split)) for split in (usual.train, usual.validation, usual.test)] == [0, 100, 200]
    other = load(pets, test_split="validation")
    assert min(values(other.test)) == 100
    assert other.validation is None
    swapped = load(pets, train_split="test", validation_split="train", test_split="validation")
    assert [min(values(split)) for split in (swapped.train, swapped.validation, swapped.test)] == [200, 0, 100]


def test_only_the_chosen_splits_are_decoded(pets, capsys):
    load(pets, test_split="validation")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["decoding pets/train once ...", "decoding pets/validation once ..."]


def test_a_test_split_is_held_out_whatever_else_is(train_only):
    one = load(train_only, test_fraction=0.25)
    two = load(train_only, test_fraction=0.25, validation_fraction=0.2, train_fraction=0.5)
    assert values(one.test) == values(two.test)
    assert (len(values(one.train)), len(values(one.test))) == (30, 10)
    assert sorted(values(one.train) + values(one.test)) == list(range(40))
    assert [len(values(split)) for split in (two.train, two.validation, two.test)] == [12, 6, 10]
    assert not set(values(two.validation)) & set(values(two.test))
    assert set(values(two.validation)) < set(values(one.train))
    assert values(one.test) != values(load(train_only, test_fraction=0.1, validation_fraction=0.25).validation)


def test_a_held_out_test_split_replaces_the_sets_own(pets):
    held_out = load(pets, test_fraction=0.25)
    assert max(values(held_out.test)) < 20
    assert min(values(held_out.validation)) == 100
    assert sorted(values(held_out.train) + values(held_out.test)) == list(range(20))


def test_a_held_out_test_split_of_a_text_is_its_end(data_dir):
    text = bytes(range(32, 127)) * 4
    (data_dir / "input.txt").write_bytes(text)
    own = load(data_dir, "tiny_shakespeare").train["text"].tobytes()
    parts = load(data_dir, "tiny_shakespeare", test_fraction=0.25, validation_fraction=0.5)
    assert b"".join(part["text"].tobytes() for part in (parts.train, parts.validation, parts.test)) == own
    assert len(parts.test["text"]) == round(0.25 * len(own))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no test split, only train: .*test_split.*--config.dataset.test_fraction=0.1"),
        ({"test_split": "tests"}, "--config.dataset.test_split=tests: pets has no such split, only train"),
        ({"test_fraction": 0.1, "validation_split": "dev"}, "--config.dataset.validation_split=dev: pets has no such"),
        ({"test_fraction": 0.1, "train_split": "all"}, "--config.dataset.train_split=all: pets has no such"),
        ({"test_split": "train"}, "train and test would both be the split train"),
        ({"test_fraction": 0.1, "validation_split": "train"}, "train and validation would both be the split train"),
        ({"test_split": "train", "test_fraction": 0.1}, r"test_split=train: .*test_fraction=0.1 .* one of the two"),
        (
            {"test_fraction": 0.1, "validation_split": "x", "validation_fraction": 0.1},
            r"validation_split=x: .*validation_fraction=0.1 .* one of the two",
        ),
        ({"test_fraction": 0.001}, r"test_fraction=0\.001 leaves 40 examples to train on and 0 to test on"),
    ],
)
def test_a_bad_choice_names_the_flag(train_only, fields, message, capsys):
    capsys.readouterr()
    with pytest.raises(UserError, match=message):
        load(train_only, **fields)
    assert not capsys.readouterr().err or fields == {"test_fraction": 0.001}, "something was decoded first"


def test_the_embedded_sets_have_the_same_flags():
    usual = sources.load(DatasetConfig(name="pydoc"))
    other = sources.load(DatasetConfig(name="pydoc", test_split="validation"))
    np.testing.assert_array_equal(other.test["text"], usual.validation["text"])
    with pytest.raises(UserError, match="digits has no such split, only train, test"):
        sources.load(DatasetConfig(name="digits", validation_split="validation"))


def test_an_exact_version(data_dir, capsys):
    older = make_set(data_dir, "pets", image_features, {"train": numbered(4), "test": numbered(2)})
    older.rename(older.with_name("0.9.0"))
    make_set(data_dir, "pets", image_features, {"train": numbered(8), "test": numbered(2)})
    assert len(load(data_dir).train["image"]) == 8
    exact = load(data_dir, "pets:0.9.0")
    assert (exact.name, len(exact.train["image"])) == ("pets:0.9.0", 4)
    capsys.readouterr()
    load(data_dir, "pets:1.0.0")
    assert "decoding" not in capsys.readouterr().err, "the cache entry is that of the same version without its number"
    with pytest.raises(UserError, match=r"pets:2\.0\.0 is not prepared in .*, which has pets:0\.9\.0, pets:1\.0\.0"):
        load(data_dir, "pets:2.0.0")
    assert load(data_dir, "pets:2.0.0|digits").name == "digits"
    for name in ("pets:", "pets:1", "pets:1.*.*", ":1.0.0"):
        with pytest.raises(UserError, match=r"a version has three numbers, as in \w+:3\.0\.1"):
            load(data_dir, name)


def test_a_version_of_a_config(data_dir):
    for name in ("small", "large"):
        make_set(data_dir / "pets", name, image_features, {"train": examples(5), "test": examples(3)})
    assert tfds_sets.find("pets/small:1.0.0", data_dir) == data_dir / "pets" / "small" / "1.0.0"
    with pytest.raises(UserError, match=r"use one of pets/large:1\.0\.0, pets/small:1\.0\.0"):
        tfds_sets.find("pets:1.0.0", data_dir)


def test_only_the_official_version_is_prepared(data_dir):
    np.savez(
        data_dir / "mnist.npz",
        **{f"x_{split}": np.zeros((4, 28, 28), np.uint8) for split in ("train", "test")},
        **{f"y_{split}": np.arange(4, dtype=np.uint8) for split in ("train", "test")},
    )
    with pytest.raises(UserError, match=r"mnist:9\.9\.9 is not prepared in"):
        load(data_dir, "mnist:9.9.9")
    assert not (data_dir / "mnist").exists()
    mnist = load(data_dir, "mnist:3.0.1")
    assert (mnist.name, len(mnist.train["image"])) == ("mnist:3.0.1", 4)
