"""An experiment may supply arrays or a grain source of its own; everything else works as for other data sets."""

import grain
import numpy as np
import photographs
import pytest

from research.data import images as images_lib
from research.data import sources
from research.dataset_config import DatasetConfig
from research.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 8, 8, 3), np.uint8)
LABELS = np.arange(50) % 2


def _arrays(part):
    return {"image": IMAGES[part], "label": LABELS[part]}


def _load(splits, names=("left", "right"), **changes):
    config = DatasetConfig(**{"name": "own"} | changes)
    return sources.load(config, {"own": lambda _: (names, splits)})


class Photos(grain.sources.RandomAccessDataSource):
    """Image files of several sizes."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"image": photographs.encode(photographs.gradient(20 + int(index), 30)), "label": int(index) % 2}


def test_arrays_are_a_data_set():
    dataset = _load({"train": _arrays(slice(40)), "test": _arrays(slice(40, 50))}, validation_fraction=0.25)
    assert (dataset.name, dataset.label_names, dataset.num_examples) == ("own", ("left", "right"), 30)
    assert dataset.train["label"].dtype == np.int32
    np.testing.assert_array_equal(dataset.test["image"], IMAGES[40:])
    assert dataset.validation is not None
    assert len(dataset.validation["label"]) == 10
    assert len(set(dataset.fingerprints.values())) == 3
    with pytest.raises(ValueError, match="read-only"):
        dataset.train["image"][0] = 0


@pytest.mark.parametrize(
    "returned", [None, {"train": {}}, ((), {}), (("a", "b"), [1, 2]), (None, {"train": {}}), ("cat", {"train": {}})]
)
def test_a_function_that_returns_something_else_is_told_what_to_return(returned):
    with pytest.raises(UserError, match=r"name=own: the function that loads it must return \(label names, splits\)"):
        sources.load(DatasetConfig(name="own"), {"own": lambda _: returned})


def test_a_mistyped_name_is_corrected(tmp_path):
    with pytest.raises(UserError, match="did you mean spirals"):
        sources.load(DatasetConfig(name="spiral", data_dir=str(tmp_path)), {"spirals": lambda _: ((), {})})


@pytest.mark.parametrize("images", [IMAGES[..., 0], IMAGES / 255, IMAGES.astype(int)])
def test_images_of_another_shape_or_dtype_are_refused_where_statistics_are_computed(images):
    dataset = _load({"train": {"image": images}, "test": {"image": images}})
    for statistic in (images_lib.channel_statistics, images_lib.pixel_means):
        with pytest.raises(UserError, match=r"images are .*they must be uint8 \[n, height, width, channels\]"):
            dataset.statistic(statistic, "image")


def test_the_function_gets_the_config():
    seen = []

    def load(config):
        seen.append(config.data_dir)
        return (), {"train": {"x": [1.5, 2.5]}, "test": {"x": [3.5]}}

    dataset = sources.load(DatasetConfig(name="own", data_dir="somewhere"), {"own": load})
    assert seen == ["somewhere"]
    np.testing.assert_array_equal(dataset.train["x"], np.float32([1.5, 2.5]))


def test_other_data_sets_stay_available():
    config = DatasetConfig(name="digits")
    assert sources.load(config, {"own": lambda _: pytest.fail("not asked for")}).name == "digits"


@pytest.mark.parametrize("wrap", [lambda x: x, grain.MapDataset.source], ids=["source", "MapDataset"])
def test_grain_sources_are_streamed(wrap):
    dataset = _load({"train": wrap(Photos()), "test": wrap(Photos())}, image_size=16, validation_fraction=0.3)
    assert dataset.train["image"].shape == (7, 16, 16, 3)
    numbers = np.arange(7)
    batch = dataset.train.training(numbers, numbers, 0)
    assert batch["image"].shape == (7, 16, 16, 3)
    assert set(batch["label"].tolist()) == {0, 1}
    again = _load({"train": wrap(Photos()), "test": wrap(Photos())}, image_size=16, validation_fraction=0.3)
    assert dataset.fingerprints == again.fingerprints


def test_a_source_of_numbers_needs_no_image_size():
    class Numbers(Photos):
        def __getitem__(self, index):
            return {"x": np.full(3, index, np.float64), "y": float(index)}

    dataset = _load({"train": Numbers(), "test": Numbers()}, names=())
    batch = dataset.train.training(np.array([2, 9]), np.zeros(2, int), 0)
    np.testing.assert_array_equal(batch["x"], np.float32([[2, 2, 2], [9, 9, 9]]))
    np.testing.assert_array_equal(batch["y"], np.float32([2, 9]))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"image": IMAGES, "label": LABELS[:3]}, "own, split train: .*same number of examples"),
        ({}, "own, split train: every feature needs"),
        ({"x": 3}, "same number of examples"),
        ({"x": np.array(["a", "b"])}, "the feature x has the dtype <U1; use numbers"),
        ({"x": np.array([{}, {}])}, "the feature x has the dtype object"),
    ],
)
def test_unusable_arrays_are_named(train, words):
    with pytest.raises(UserError, match=words):
        _load({"train": train, "test": _arrays(slice(3))})
