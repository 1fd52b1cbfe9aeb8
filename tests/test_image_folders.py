"""Training on a folder of photographs: from the first command to a prediction, interrupted, on several devices."""

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
from research.data import decoding, sources
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


def test_several_devices_see_the_same_examples(whole, folder, tmp_path):
    app.run(EXPERIMENT, _args(folder, tmp_path / "run", "--config.log_every_steps=1"), devices=jax.devices()[:8])
    losses = [[line["loss"] for line in _lines(run) if "loss" in line] for run in (whole[0], tmp_path / "run")]
    assert len(losses[0]) == 9
    np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1, 4, 6])
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


def test_an_exported_network_predicts_photographs_of_any_size_as_in_evaluation(whole, folder, tmp_path, capsys):
    args = ["linear", f"--workdir={whole[0]}", f"--out={tmp_path / 'artifact'}"]
    assert export.run(args) == 0
    manifest = json.loads((tmp_path / "artifact/manifest.json").read_text())
    assert manifest["center_crop"] == 0.875
    files = sorted((folder / "test").rglob("*.jpg"))
    capsys.readouterr()
    predict.main([f"--artifact={tmp_path / 'artifact'}", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    classes = [line.split("  ")[1].split()[0] for line in lines]
    assert classes == [file.parent.name for file in files]


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
