"""Loading a data set by name, and the contents of its splits."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from research.config import DatasetConfig
from research.data import sources, tfds_records, tfds_sets
from research.errors import UserError

RNG = np.random.default_rng(0)
MNIST = {
    "x_train": RNG.integers(0, 256, (40, 28, 28), np.uint8),
    "y_train": np.arange(40, dtype=np.uint8) % 10,
    "x_test": RNG.integers(0, 256, (10, 28, 28), np.uint8),
    "y_test": np.arange(10, dtype=np.uint8),
}


@pytest.fixture
def mnist_dir(data_dir):
    np.savez(data_dir / "mnist.npz", **MNIST)
    return data_dir


def load(name, data_dir="", fraction=0.0, part=1.0):
    config = DatasetConfig(name=name, data_dir=str(data_dir), validation_fraction=fraction, train_fraction=part)
    return sources.load(config)


def make_set(folder, name, features, splits):
    """Prepares a set with TFDS's own writer; `features` maps the module tfds.features to the features."""
    tfds = tfds_records.import_tfds()

    class Drawn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features(tfds.features))

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Drawn.name = name
    Drawn(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder / name / "1.0.0"


def image_features(features):
    return features.FeaturesDict(
        {"image": features.Image(shape=(None, None, 3)), "label": features.ClassLabel(names=["cat", "dog"])}
    )


def examples(count, shape=(4, 4, 3), label=1):
    png = io.BytesIO()
    Image.fromarray(np.full(shape, 7, np.uint8)).save(png, "PNG")
    return [{"image": png.getvalue(), "label": label}] * count


def test_digits_have_a_fixed_stratified_split():
    digits = load("digits")
    assert digits.name == "digits"
    assert digits.label_names == tuple("0123456789")
    assert digits.validation is None
    for split, count in {"train": 1437, "test": 360}.items():
        arrays = getattr(digits, split)
        assert arrays["image"].shape == (count, 32, 32, 1)
        assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)
        assert abs(np.bincount(arrays["label"]) / count - 0.1).max() < 0.005
        assert (arrays["image"].min(), arrays["image"].max()) == (0, 255)


def test_a_set_is_prepared_once_then_cached_and_follows_its_source(mnist_dir, capsys):
    first = load("mnist", mnist_dir)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["preparing", "decoding", "decoding"]
    again = load("mnist", mnist_dir)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(first.train["image"], again.train["image"])
    assert isinstance(again.train["image"], np.memmap)
    records = next((mnist_dir / "mnist" / "3.0.1").glob("*train*"))
    os.utime(records, (1, 1))
    load("mnist", mnist_dir)
    assert "decoding mnist/train once" in capsys.readouterr().err


@pytest.mark.parametrize(("fraction", "part"), [(0.0, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("name", ["digits", "pydoc", "mnist", "tiny_shakespeare"])
@pytest.mark.parametrize("cached", [True, False])
def test_no_caller_can_change_what_the_next_one_loads(mnist_dir, monkeypatch, name, cached, fraction, part):
    if not cached:  # a file, so that the cache cannot be written and the arrays stay in memory
        monkeypatch.setenv("MESHWORK_CACHE_DIR", str(mnist_dir / "mnist.npz"))
    (mnist_dir / "input.txt").write_bytes(bytes(range(32, 127)) * 4)
    dataset, again = (load(name, mnist_dir, fraction, part) for _ in range(2))
    for arrays in filter(None, (dataset.train, dataset.validation, dataset.test)):
        for feature in list(arrays):
            with pytest.raises(ValueError, match="read-only"):
                arrays.pop(feature)[0] = 1
    for later in (again, load(name, mnist_dir, fraction, part)):
        assert later.train.keys() == later.test.keys() != set()


def test_a_cached_set_loads_without_tfds(mnist_dir):
    load("mnist", mnist_dir)
    code = (
        "import sys; from research.config import DatasetConfig; from research.data import sources; "
        f"sources.load(DatasetConfig(name='mnist', data_dir={str(mnist_dir)!r})); "
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_validation_is_a_fixed_part_of_train(mnist_dir):
    whole = load("mnist", mnist_dir)
    one, two = (load("mnist", mnist_dir, 0.25) for _ in range(2))
    assert one.validation is not None
    assert two.validation is not None
    assert (len(one.train["label"]), len(one.validation["label"])) == (30, 10)
    np.testing.assert_array_equal(one.validation["image"], two.validation["image"])
    both = np.concatenate([one.train["image"], one.validation["image"]])
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in whole.train["image"])
    assert one.validation["label"].tolist() != whole.train["label"][-10:].tolist()


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_part_may_be_empty(mnist_dir, fraction):
    with pytest.raises(UserError, match=r"validation_fraction=0\.\d+ leaves"):
        load("mnist", mnist_dir, fraction)


def test_a_part_of_train_is_the_same_whatever_the_seed(mnist_dir):
    whole, half, third = (load("mnist", mnist_dir, 0.25, part) for part in (1.0, 0.5, 1 / 3))
    images = [{image.tobytes() for image in dataset.train["image"]} for dataset in (whole, half, third)]
    assert [len(found) for found in images] == [30, 15, 10]
    assert images[0] > images[1] > images[2]
    np.testing.assert_array_equal(half.validation["image"], whole.validation["image"])
    with pytest.raises(UserError, match=r"train_fraction=0\.001 leaves none of 30 examples"):
        load("mnist", mnist_dir, 0.25, 0.001)


def test_text_is_bytes_and_validation_is_its_own_split_or_the_end_of_train(data_dir):
    text = bytes(range(32, 127)) * 4
    (data_dir / "input.txt").write_bytes(text)
    own = load("tiny_shakespeare", data_dir)
    assert load("tiny_shakespeare", data_dir, part=0.5).train["text"].tobytes() == text[: len(own.train["text"]) // 2]
    assert own.label_names == ()
    assert own.validation is not None
    assert b"".join(part["text"].tobytes() for part in (own.train, own.validation, own.test)) == text
    held_out = load("tiny_shakespeare", data_dir, 0.5)
    assert held_out.validation is not None
    assert held_out.train["text"].tobytes() + held_out.validation["text"].tobytes() == own.train["text"].tobytes()


def test_the_first_that_can_be_had_with_one_line_for_each_other(data_dir, capsys):
    assert load("cifar10|imagenet2012 | digits", data_dir).name == "digits"
    first, second = capsys.readouterr().err.splitlines()
    assert f"cifar10 is not prepared in {data_dir} and cannot be downloaded (" in first
    assert "using imagenet2012 instead" in first
    assert "put cifar-10-binary.tar.gz or cifar-10-python.tar.gz into" in first
    assert "using digits instead" in second
    assert "tfds build imagenet2012 --file_format=array_record" in second


def test_a_single_unavailable_name_is_an_error(data_dir):
    with pytest.raises(UserError, match=r"cifar10 is not prepared in .* and cannot be downloaded") as caught:
        load("cifar10")
    assert "\n" not in str(caught.value)
    assert not (data_dir.parent / "home").exists()


def test_a_misspelt_name_is_an_error_even_among_alternatives(data_dir):
    with pytest.raises(UserError, match=r"cifra10: neither .* did you mean cifar10"):
        load("cifra10|digits", data_dir)
    with pytest.raises(UserError, match="did you mean digits"):
        load("digts", data_dir)
    with pytest.raises(UserError, match="name a data set"):
        load("mnist|", data_dir)


def test_a_folder_that_does_not_exist_is_an_error(data_dir, monkeypatch):
    with pytest.raises(UserError, match=r"--config\.dataset\.data_dir=.*absent: no such folder"):
        load("digits", data_dir / "absent")
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir / "gone"))
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR=.*gone: no such folder"):
        load("cifar10|digits")
    assert load("digits").name == "digits"


def test_any_prepared_set_of_images(data_dir):
    make_set(data_dir, "pets", image_features, {"train": examples(5), "validation": examples(3, label=0)})
    pets = load("pets", data_dir)
    assert pets.label_names == ("cat", "dog")
    assert pets.train["image"].shape == (5, 4, 4, 3)
    assert pets.train["label"].tolist() == [1] * 5
    assert pets.test["label"].tolist() == [0] * 3, "without a test split, validation takes its place"
    assert pets.validation is None


def test_configs_of_a_set(data_dir):
    for name in ("small", "large"):
        make_set(data_dir / "pets", name, image_features, {"train": examples(5), "test": examples(3)})
    with pytest.raises(UserError, match="use one of pets/large, pets/small"):
        load("pets", data_dir)
    assert tfds_sets.find("pets/small", data_dir) == data_dir / "pets" / "small" / "1.0.0"


def test_the_newest_version_is_taken(data_dir):
    for version in ("9.0.0", "10.0.0", "incomplete.ABCDEF_11.0.0"):
        (data_dir / "pets" / version).mkdir(parents=True)
        (data_dir / "pets" / version / "dataset_info.json").write_text("{}")
    assert tfds_sets.find("pets", data_dir) == data_dir / "pets" / "10.0.0"
    assert tfds_sets.find("a" * 300, data_dir) is None  # longer than a file's name may be


@pytest.mark.parametrize(
    ("features", "splits", "message"),
    [
        (image_features, {"test": examples(3) + examples(1, (5, 4, 3))}, r"pets/test, example \d: .*image_size=128"),
        (image_features, {"unsupervised": examples(3)}, "has no test split"),
        (lambda f: f.FeaturesDict({"x": f.Text()}), {"test": [{"x": "a"}]}, "needs a feature image or text"),
    ],
    ids=["shapes", "no-test", "features"],
)
def test_an_unsuitable_set_is_an_error(data_dir, features, splits, message):
    train = examples(3) if features is image_features else splits["test"]
    make_set(data_dir, "pets", features, {"train": train} | splits)
    with pytest.raises(UserError, match=message):
        load("pets", data_dir)


def test_a_label_out_of_range_is_named(mnist_dir):
    load("mnist", mnist_dir)
    features = mnist_dir / "mnist" / "3.0.1" / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "10"', '"numClasses": "9"'))
    with pytest.raises(UserError, match=r"mnist/(train|test), example \d+: label 9 is not in 0\.\.8"):
        load("mnist", mnist_dir)


def test_a_set_of_tfrecords_says_how_to_prepare_it(mnist_dir):
    load("mnist", mnist_dir)
    info = mnist_dir / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="`tfds build mnist --file_format=array_record"):
        load("mnist", mnist_dir)
    assert load("mnist|digits", mnist_dir).name == "digits"


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-10])])
@pytest.mark.parametrize("file", ["mnist-train.array_record-00000-of-00001", "features.json"])
def test_a_damaged_set_is_named(mnist_dir, file, damage):
    load("mnist", mnist_dir)
    damage(mnist_dir / "mnist" / "3.0.1" / file)
    with pytest.raises(UserError, match=r"mnist/3\.0\.1.*(damaged|No such file).* again"):
        load("mnist", mnist_dir)


@pytest.mark.parametrize("text", ["", "[]", '{"splits": 3}'])
def test_a_damaged_description_is_named(mnist_dir, text):
    load("mnist", mnist_dir)
    (mnist_dir / "mnist" / "3.0.1" / "dataset_info.json").write_text(text)
    with pytest.raises(UserError, match=r"mnist/3\.0\.1.*dataset_info"):
        load("mnist", mnist_dir)


@pytest.mark.slow
def test_the_real_sets():
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("needs TFDS_DATA_DIR with prepared cifar10 and tiny_shakespeare")
    cifar10 = load("cifar10|digits")
    assert cifar10.train["image"].shape == (50000, 32, 32, 3)
    assert np.bincount(cifar10.test["label"]).tolist() == [1000] * 10
    means = cifar10.train["image"].mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-3)
    assert load("tiny_shakespeare").train["text"].shape == (1003854,)
