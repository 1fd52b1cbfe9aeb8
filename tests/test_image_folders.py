"""Training on a folder of photographs: from the first command to a prediction, interrupted, on several devices."""

import csv
import io
import json
import os
import shutil

import jax
import numpy as np
import photographs
import pytest
from linear import EXPERIMENT
from PIL import Image

from experiments import cifar_cnn
from launch import export, predict
from research import app
from research.data import decoding, folder_listing, sources
from research.data.streamed import StreamedSplit
from research.errors import UserError

FLAGS = ["--config.dataset.name=folder", "--config.dataset.image_size=16", "--config.batch_size=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder: 24 examples of two classes for training, 12 for testing."""
    return photographs.make_folder(tmp_path_factory.mktemp("pets"))


def _args(folder, workdir, *more):
    return [*FLAGS, f"--config.dataset.data_dir={folder}", f"--workdir={workdir}", "--config.num_epochs=3", *more]


def _lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The workdir of a run on one device, and its summary."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    args = _args(folder, workdir, "--config.log_every_steps=1", "--config.steps_per_dispatch=1")
    return workdir, app.run(EXPERIMENT, args, devices=jax.devices()[:1])


def test_it_learns_and_its_record_describes_the_data(whole, folder, capsys):
    workdir, summary = whole
    assert summary["test_accuracy"] == 1.0
    data = json.loads((workdir / "data.json").read_text())
    assert data["label_names"] == ["cat", "dog"]
    assert data["splits"]["train"] == {
        "image": {"dtype": "uint8", "shape": [24, 16, 16, 3]},
        "label": {"dtype": "int32", "shape": [24]},
    }
    assert len(data["statistics"]["image.channel_statistics"][0]) == 3
    evaluated = app.run(EXPERIMENT, [*_args(folder, workdir), "--mode=eval"], devices=jax.devices()[:1])
    assert evaluated["test_loss"] == summary["test_loss"]


@pytest.mark.slow
def test_several_devices_see_the_same_examples(whole, folder, tmp_path):
    app.run(EXPERIMENT, _args(folder, tmp_path / "run", "--config.log_every_steps=1"), devices=jax.devices()[:8])
    losses = [[line["loss"] for line in _lines(run) if "loss" in line] for run in (whole[0], tmp_path / "run")]
    assert len(losses[0]) == 9
    np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [4, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 6))])
def test_a_stopped_run_resumes_to_the_same_bits(step, whole, folder, stop, tmp_path):
    workdir, summary = whole
    args = _args(folder, tmp_path / "run", "--config.log_every_steps=1", "--config.steps_per_dispatch=1")
    devices = jax.devices()[:1]
    stop(step, lambda signals: app.run(EXPERIMENT, args, signals, devices))
    resumed = app.run(EXPERIMENT, args, devices=devices)
    assert _lines(tmp_path / "run") == _lines(workdir)
    assert resumed["test_loss"] == summary["test_loss"]


def test_a_moved_folder_is_the_same_data_and_another_one_is_not(whole, folder, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    shutil.copytree(whole[0], tmp_path / "run")
    args = _args(moved, tmp_path / "run", "--config.num_epochs=4")
    assert app.run(EXPERIMENT, args, devices=jax.devices()[:1])["num_epochs"] == 4
    shutil.copy(moved / "train/cat/0.jpg", moved / "train/cat/new.jpg")
    with pytest.raises(UserError, match="another version of folder"):
        app.run(EXPERIMENT, [*args, "--config.num_epochs=5"], devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def many_kinds(folder, tmp_path_factory):
    """The folder with photographs of many kinds and sizes in its test split, and files that are no images."""
    changed = tmp_path_factory.mktemp("many") / "pets"
    shutil.copytree(folder, changed)
    for number, (name, (kind, mode, options)) in enumerate(KINDS.items()):
        pixels = photographs.gradient(30 + 9 * number, 70 - 3 * number, number)
        (changed / "test/dog" / name).write_bytes(photographs.encode(pixels, kind, mode, **options))
    deep = Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32)
    deep.save(changed / "test/cat/16 bits.png")
    (changed / "test/cat/notes.txt").write_text("no image")
    (changed / "test/cat/.hidden.jpg").write_text("no image")
    return changed


KINDS = {
    "gray.jpg": ("JPEG", "L", {}),
    "cmyk.jpe": ("JPEG", "CMYK", {}),
    "turned.jpeg": ("JPEG", "RGB", {"exif": photographs.rotated_exif(6)}),
    "alpha.png": ("PNG", "RGBA", {}),
    "palette.png": ("PNG", "P", {}),
    "black and white.png": ("PNG", "1", {}),
    "猫, é.webp": ("WEBP", "RGB", {}),
    "x.BMP": ("BMP", "RGB", {}),
    "x.gif": ("GIF", "P", {}),
}


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory):
    """The artifact of the run."""
    artifact = tmp_path_factory.mktemp("exported") / "artifact"
    assert export.run(["linear", f"--workdir={whole[0]}", f"--out={artifact}"]) == 0
    return artifact


def test_predictions_are_those_of_the_checkpoint_for_photographs_of_any_kind(
    whole, many_kinds, exported, tmp_path, capsys
):
    predict.main([f"--artifact={exported}", f"--csv={tmp_path / 't.csv'}", "--top=2", str(many_kinds / "test")])
    assert "notes.txt" in capsys.readouterr().err
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    # The independent way: the run's own evaluation, of the same folder.
    command = app.parse(EXPERIMENT, [*_args(many_kinds, whole[0]), "--mode=eval"])
    training = app.restored(EXPERIMENT, command, app.start(command.config, jax.devices()[:1]))
    with jax.set_mesh(training.mesh):
        training.evaluate()
    examples, test = training.examples("test"), many_kinds / "test"
    listing = folder_listing.scan(os.fsencode(test), {b"cat": 0, b"dog": 1})
    files = [str(test / os.fsdecode(name)) for name in folder_listing.split(listing["paths"], listing["ends"])]
    assert rows.keys() == set(files)
    assert len(files) == 12 + len(KINDS) + 1
    for number, prediction, confidence in zip(examples["index"], examples["prediction"], examples["confidence"]):
        row = rows[files[number]]
        assert row["class_1"] == ("cat", "dog")[prediction]
        np.testing.assert_allclose(float(row["probability_1"]), confidence, atol=1e-3)
        np.testing.assert_allclose(float(row["probability_1"]) + float(row["probability_2"]), 1, atol=1e-5)


def _resized(pixels, described):
    """The crop and resize of a manifest's description, in NumPy: uint8 [h, w, c] to float [size, size, c]."""
    side = described["crop"]["fraction"] * min(pixels.shape[:2])
    for axis in (1, 0):
        length, size = pixels.shape[axis], described["size"][axis]
        scale, start = side / size, length / 2 - side / 2
        positions = np.arange(length) + 0.5 - start - (np.arange(size)[:, None] + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs(positions) / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        pixels = np.round(np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis))
    return pixels


def test_the_manifest_describes_how_photographs_become_inputs(exported):
    manifest = json.loads((exported / "manifest.json").read_text())
    described = manifest["functions"]["classify"]["image_files"]
    assert manifest["center_crop"] == described["crop"]["fraction"] == 0.875
    assert (described["size"], described["color"]) == ([16, 16], "RGB")
    for height, width in ((40, 70), (71, 45), (9, 12)):
        pixels = photographs.gradient(height, width)
        expected = decoding.decode_center(photographs.encode(pixels, "PNG"), 3, 16, 0.875)
        np.testing.assert_allclose(_resized(pixels, described), expected, atol=1)


def test_a_damaged_photograph_ends_the_run_in_one_line_with_its_checkpoint_intact(whole, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "train/dog/3.jpg").write_bytes(b"no image")
    args = _args(broken, tmp_path / "run")
    with pytest.raises(UserError, match=r"train/dog/3\.jpg is not an intact image .* research\.data\.check folder"):
        app.run(EXPERIMENT, args)
    # The same run continues without it.
    summary = app.run(EXPERIMENT, [*args, "--config.dataset.max_damaged=1"])
    assert summary["test_accuracy"] == 1.0


def test_a_photograph_that_is_removed_while_training_is_named(folder, tmp_path):
    changing = tmp_path / "changing"
    shutil.copytree(folder, changing)
    config = EXPERIMENT.default_config.dataset
    config.name, config.data_dir, config.image_size = "folder", str(changing), 16
    dataset = sources.load(config)
    assert isinstance(dataset.train, StreamedSplit)
    os.remove(changing / "train/cat/5.jpg")
    shutil.copy(changing / "train/cat/4.jpg", changing / "train/cat/99.jpg")  # comes too late to be seen
    numbers = np.arange(24)
    with pytest.raises(UserError, match=r"train/cat/5\.jpg .*max_damaged"):
        dataset.train.training(numbers, numbers * 0, 0)
    assert dataset.train.num_examples == 24


def test_photographs_may_be_gray_or_rotated(tmp_path):
    folder = photographs.make_folder(tmp_path / "pets", counts=(("train", 4), ("test", 2)))
    pixels = decoding.decode((folder / "train/cat/0.jpg").read_bytes(), 3)
    turned = io.BytesIO()
    Image.fromarray(np.rot90(pixels)).save(turned, "JPEG", exif=photographs.rotated_exif(6), quality=100)
    (folder / "train/cat/1.jpg").write_bytes(turned.getvalue())
    (folder / "train/cat/2.jpg").unlink()
    (folder / "train/cat/2.png").write_bytes(photographs.encode(pixels, "PNG", "L"))
    config = EXPERIMENT.default_config.dataset
    config.name, config.data_dir, config.image_size = "folder", str(folder), 16
    train = sources.load(config).train
    plain, upright, gray = (np.asarray(train["image"])[i].astype(float) for i in range(3))
    assert np.abs(plain - upright).mean() < 3
    assert np.ptp(gray, -1).max() == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.dataset.image_size=0"], "choose the size that they are"),
        (["--config.batch_size=104"], "batch_size=104 is larger than the training set"),
        (["--config.dataset.image_size=-1"], "image_size"),
        (["--config.dataset.train_crop=square"], "train_crop"),
        (["--config.dataset.test_split=holdout"], r"folder has no such split, only"),
    ],
)
def test_bad_input_is_named_before_training(flags, words, folder, tmp_path):
    with pytest.raises(UserError, match=words):
        app.run(EXPERIMENT, _args(folder, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_network_for_one_size_refuses_another_in_training(folder, tmp_path):
    args = [*_args(folder, tmp_path / "run"), "--config.dataset.train_image_size=24"]
    with pytest.raises(UserError, match="needs images of one size"):
        app.run(cifar_cnn.EXPERIMENT, args)


def test_plots_of_a_streamed_split_show_all_of_it_and_decode_the_mistakes_only(whole, folder, monkeypatch):
    command = app.parse(EXPERIMENT, [*_args(folder, whole[0]), "--mode=eval"])
    training = app.restored(EXPERIMENT, command, app.start(command.config, jax.devices()[:1]))
    with jax.set_mesh(training.mesh):
        accuracy = training.evaluate()["test_accuracy"]
    examples = training.examples("test")
    count = training.dataset.test.num_examples
    np.testing.assert_array_equal(examples["index"], np.arange(count))
    assert accuracy == (examples["label"] == examples["prediction"]).mean() == 1
    examples = {**examples, "prediction": np.where(examples["index"] < 2, 1 - examples["label"], examples["label"])}
    decoded = []
    evaluation = StreamedSplit.evaluation
    monkeypatch.setattr(StreamedSplit, "evaluation", lambda *args: decoded.extend(args[1].ravel()) or evaluation(*args))
    plots = training.task.evaluation_plots(examples, training.dataset)
    for name in ("confusion", "reliability"):
        plots[name]()
    assert not decoded
    plots["examples"]()
    assert sorted(decoded) == [0, 1]
