"""Prepared TFDS sets whose images vary in size: read record by record, however many shards there are."""

import json
import os
import pickle

import numpy as np
import photographs
import pytest
from test_sources import image_features, make_set

from research.data import check, sources, tfds_description, tfds_records
from research.dataset_config import DatasetConfig
from research.errors import UserError

COUNT = 12


def _examples(count=COUNT):
    sizes = [(30 + 2 * i, 60 - i) for i in range(count)]
    return [
        {"image": photographs.encode(photographs.gradient(*size, i)), "label": i % 2} for i, size in enumerate(sizes)
    ]


@pytest.fixture
def pets(data_dir):
    """The folder of a prepared set of images of many sizes."""
    return make_set(data_dir, "pets", image_features, {"train": _examples(), "test": _examples(4)})


def _load(pets, **changes):
    config = DatasetConfig(**{"name": "pets", "data_dir": str(pets.parent.parent), "image_size": 16} | changes)
    return sources.load(config)


def test_images_of_many_sizes_are_read_when_needed(pets, capsys):
    dataset = _load(pets, validation_fraction=0.25)
    assert "decoding" not in capsys.readouterr().err
    assert (dataset.label_names, dataset.version) == (("cat", "dog"), "1.0.0")
    assert {role: len(split["label"]) for role, split in dataset.splits.items()} == {
        "train": 9,
        "validation": 3,
        "test": 4,
    }
    numbers = np.arange(9)
    assert dataset.train.training(numbers, numbers, 0)["image"].shape == (9, 16, 16, 3)
    assert not {"label", "image"} - dataset.test.keys()
    assert sorted(np.asarray(dataset.test["label"])) == [0, 0, 1, 1]


def test_other_features_are_left_alone(data_dir):
    def features(kinds):
        return kinds.FeaturesDict(
            dict(image_features(kinds).items())
            | {"file_name": kinds.Text(), "boxes": kinds.Sequence(kinds.BBoxFeature())}
        )

    examples = [example | {"file_name": "x", "boxes": []} for example in _examples(4)]
    pets = make_set(data_dir, "pets", features, {"train": examples, "test": examples})
    assert set(_load(pets).train) == {"image", "label"}


def test_gray_sets_stay_gray(data_dir):
    def features(kinds):
        return kinds.FeaturesDict(
            {"image": kinds.Image(shape=(None, None, 1)), "label": kinds.ClassLabel(num_classes=2)}
        )

    examples = [{"image": photographs.encode(photographs.gradient(20, 30), "PNG", "L"), "label": 1}] * 2
    pets = make_set(data_dir, "pets", features, {"train": examples, "test": examples})
    assert _load(pets).train["image"].shape == (2, 16, 16, 1)


def test_the_fingerprint_depends_on_the_contents_and_not_on_the_place(pets, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    os.rename(pets.parent, moved / "pets")
    there = _load(moved / "pets/1.0.0").fingerprints
    (moved / "pets").rename(pets.parent)
    assert _load(pets).fingerprints == there
    assert _load(pets, validation_fraction=0.25).fingerprints["train"] != there["train"]


def test_a_damaged_record_is_named_with_its_number(pets, capsys):
    (file,) = pets.glob("pets-train*")
    data = bytearray(file.read_bytes())
    position = 5000  # within an image
    data[position : position + 64] = b"\xff" * 64
    file.write_bytes(data)
    dataset, numbers = _load(pets), np.arange(COUNT)
    with pytest.raises(UserError, match=r"^train, example \d+ .* research\.data\.check pets"):
        dataset.train.training(numbers, numbers, 0)
    assert check.run(["pets", f"--data_dir={pets.parent.parent}"]) == 1
    assert "of 16 examples are damaged" in capsys.readouterr().out


def test_sources_go_to_other_processes(pets):
    source = sources.open_records("pets", str(pets.parent.parent))[1]["train"]
    again = pickle.loads(pickle.dumps(source))
    assert (len(again), again.fingerprint, again[3]) == (len(source), source.fingerprint, source[3])


def _sharded(pets, count, per_shard):
    """Makes the set one of `count` shards, each of which has `per_shard` examples and, as a file, the same contents."""
    (file,) = pets.glob("pets-train*")
    for shard in range(count):
        os.link(file, pets / f"pets-train.array_record-{shard:05}-of-{count:05}")
    file.unlink()
    info = json.loads((pets / "dataset_info.json").read_text())
    (train,) = [split for split in info["splits"] if split["name"] == "train"]
    train["shardLengths"] = [str(per_shard)] * count
    (pets / "dataset_info.json").write_text(json.dumps(info))


def test_a_set_of_a_thousand_shards_is_read(pets):
    _sharded(pets, 1024, COUNT)
    dataset = _load(pets)
    assert dataset.num_examples == 1024 * COUNT
    numbers = np.array([0, COUNT * 512 + 3, COUNT * 1024 - 1])
    batch = dataset.train.training(numbers, numbers, 0)
    assert batch["image"].shape == (3, 16, 16, 3)


def test_a_set_of_the_size_of_imagenet_is_opened_without_reading_it(pets):
    _sharded(pets, 1024, 1251)
    for file in pets.glob("pets-train*"):
        file.unlink()
        with file.open("wb") as sparse:
            sparse.truncate(140 * 2**20)  # reading it would fail
    description = tfds_description.read("pets", pets)
    source = tfds_records.TfdsSource("pets", pets, description, "train")
    assert len(source) == 1024 * 1251
    assert source.fingerprint
