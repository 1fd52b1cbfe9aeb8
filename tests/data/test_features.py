"""Features of data sets: images with named, numbered or no labels, and texts of one or many examples."""

import dataclasses
import functools

import jax
import linear
import numpy as np
import pytest
from flax import nnx
from test_sources import examples, image_features, make_set

from experiments import mnist_vae
from research import app
from research.config import DatasetConfig
from research.data import sources, tfds_records
from research.data.batch import Batch
from research.errors import UserError
from research.tasks.classification import Classification

CLASSIFICATION = Classification(nnx.Module, (0.5,), (0.25,))


def load(data_dir, name="pets", **fields):
    return sources.load(DatasetConfig(name=name, data_dir=str(data_dir), **fields))


def labeled(*labels):
    return [examples(1, label=label)[0] for label in labels]


def unlabeled(count):
    return [{"image": example["image"]} for example in examples(count, (8, 8, 3))]


def with_names(names):
    return lambda f: f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(names=names)})


def with_integers(dtype):
    return lambda f: f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), "label": f.Scalar(dtype)})


def without_labels(f):
    return f.FeaturesDict({"image": f.Image(shape=(None, None, 3))})


@pytest.mark.parametrize(
    "names",
    [["cat", "dog"], ["a\x1cb\x1d", "c\x85d\u2028", "e\x0bf\x0c", "\u00e9t\u00e9"], [" padded ", "", " ", "\x1e"]],
    ids=["plain", "control", "blank"],
)
def test_label_names_are_those_of_the_builder(data_dir, names):
    make_set(data_dir, "pets", with_names(names), {"train": labeled(*range(len(names))), "test": labeled(0)})
    pets = load(data_dir)
    assert pets.label_names == tuple(names)
    assert sorted(pets.train["label"].tolist()) == list(range(len(names)))


def test_label_names_with_the_line_ends_of_windows(data_dir):
    path = make_set(data_dir, "pets", with_names(["cat", "dog"]), {"train": labeled(0), "test": labeled(1)})
    (path / "label.labels.txt").write_bytes(b"cat\r\ndog\r\n")
    assert load(data_dir).label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\n", r"label\.labels\.txt has 1 lines, but the set has 2 classes"),
        (b"cat\ndog\nbird\n", r"label\.labels\.txt has 3 lines, but the set has 2 classes"),
        ("cat\n\u00e9t\u00e9\n".encode("latin-1"), r"label\.labels\.txt is not in UTF-8 .* byte 4.*convert it"),
    ],
)
def test_label_names_that_cannot_be_right(data_dir, content, message):
    path = make_set(data_dir, "pets", with_names(["cat", "dog"]), {"train": labeled(0), "test": labeled(1)})
    (path / "label.labels.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(data_dir)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_integers_are_the_classes_up_to_the_largest_in_train(data_dir, dtype):
    splits = {"train": labeled(0, 3, 5), "test": labeled(5, 3)}
    make_set(data_dir, "pets", with_integers(dtype), splits)
    pets = load(data_dir)
    assert pets.label_names == tuple("012345")
    assert (sorted(pets.train["label"].tolist()), sorted(pets.test["label"].tolist())) == ([0, 3, 5], [3, 5])
    assert pets.train["label"].dtype == np.int32
    CLASSIFICATION.check_data(pets)
    assert load(data_dir, train_fraction=0.34).label_names == tuple("012345"), (
        "a smaller part of train has fewer classes"
    )


def test_integers_that_train_does_not_have_are_an_error_where_labels_are_needed(data_dir):
    make_set(data_dir, "pets", with_integers(np.int64), {"train": labeled(0, 1), "test": labeled(1, 7, 2**40)})
    with pytest.raises(UserError, match="2 of 3 test examples have a label above 1, the largest in train"):
        CLASSIFICATION.check_data(load(data_dir))


@pytest.mark.parametrize("labels", [(0, 2**40), (-1, -7)])
def test_integers_that_number_no_classes_are_no_labels(data_dir, labels):
    make_set(data_dir, "pets", with_integers(np.int64), {"train": labeled(*labels), "test": labeled(0)})
    pets = load(data_dir)
    assert pets.label_names == ()
    assert pets.train.keys() == pets.test.keys() == {"image"}


def test_labels_of_another_type_are_no_labels(data_dir):
    features = lambda f: f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), "label": f.Text()})  # noqa: E731
    make_set(data_dir, "pets", features, {"train": labeled("a"), "test": labeled("b")})
    assert load(data_dir).train.keys() == {"image"}


def test_images_without_labels_suit_an_autoencoder_and_no_classifier(data_dir):
    make_set(data_dir, "pets", without_labels, {"train": unlabeled(12)})
    config = mnist_vae.get_config()
    config.dataset = DatasetConfig(name="pets", data_dir=str(data_dir), test_fraction=0.3)
    config.batch_size, config.model.width, config.model.latents = 4, 4, 2
    with pytest.raises(UserError, match="name=pets has no class labels, so it cannot be classified"):
        app.load(linear.EXPERIMENT, dataclasses.replace(linear.get_config(), dataset=config.dataset))
    config, pets, task = app.load(mnist_vae.EXPERIMENT, config)
    model = task.create_model(nnx.Rngs(0))
    batch = Batch({"image": pets.train["image"]}, np.arange(8), step=np.int32(0))
    evaluate = functools.partial(task.evaluate, model, train=True)
    assert jax.eval_shape(evaluate, batch, key=jax.random.key(0))["loss"].shape == (8,)

    def predict(function, arrays, **_):
        batch = Batch(arrays, np.arange(len(next(iter(arrays.values())))))
        shapes = jax.eval_shape(functools.partial(function, model), batch, jax.random.key(0))
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    (axes,) = task.plots(predict, pets)["latents"]().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unlabeled"]
    assert len(axes.collections[0].get_offsets()) == 4


def test_an_unlabeled_test_split_is_an_error_only_where_it_is_used(data_dir):
    splits = {"train": labeled(*10 * (0, 1)), "validation": labeled(1), "test": labeled(-1, -1)}
    make_set(data_dir, "pets", image_features, splits)
    pets = load(data_dir)
    assert pets.test["label"].tolist() == [-1, -1]
    with pytest.raises(
        UserError, match=r"2 of 2 test examples have no label .*--config\.dataset\.test_split"
    ) as caught:
        CLASSIFICATION.check_data(pets)
    assert "--config.dataset.test_fraction" in str(caught.value)
    CLASSIFICATION.check_data(load(data_dir, test_split="validation"))
    CLASSIFICATION.check_data(load(data_dir, test_fraction=0.5))


def texts(count):
    return [{"text": f"document {number}"} for number in range(count)]


def text_features(f):
    return f.FeaturesDict({"text": f.Text()})


@pytest.mark.parametrize("at_once", [1, 3, 2000])
def test_texts_are_separated_by_newlines_in_the_order_of_tfds(data_dir, monkeypatch, at_once):
    monkeypatch.setattr(tfds_records, "_EXAMPLES_AT_ONCE", at_once)
    splits = {"train": [*texts(7), {"text": ""}, {"text": "ends itself\n"}], "test": texts(1)}
    path = make_set(data_dir, "poems", text_features, splits)
    stored = [e["text"] for e in tfds_records.import_tfds().builder_from_directory(path).as_data_source("train")]
    poems = load(data_dir, "poems")
    assert poems.train["text"].tobytes() == b"\n".join(stored)
    assert poems.test["text"].tobytes() == b"document 0", "a single text is not changed"
    assert sorted(stored) == sorted(example["text"].encode() for example in splits["train"])


def test_the_order_of_texts_is_that_of_their_keys_wherever_the_set_is_prepared(data_dir, tmp_path):
    loaded = []
    for folder in (data_dir, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        make_set(folder, "poems", text_features, {"train": texts(9), "test": texts(1)})
        loaded.append(load(folder, "poems").train["text"].tobytes())
    assert loaded[0] == loaded[1]
