"""The command `python -m experiments.image_classifier`."""

import json

import numpy as np
import photographs
import pytest
from flax import nnx

from experiments import image_classifier
from research import app
from research.errors import UserError
from research.training import hyperparams

EXPERIMENT = image_classifier.EXPERIMENT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of two classes."""
    return photographs.make_folder(tmp_path_factory.mktemp("pets"), counts=(("train", 8), ("test", 4)))


def _resolved(folder, *args):
    command = app.parse(EXPERIMENT, [f"--config.dataset.data_dir={folder}", *args])
    return app.load(EXPERIMENT, command.config)


def test_the_default_is_resnet_18_at_96_pixels(folder):
    config, dataset, task = _resolved(folder)
    assert (config.model.name, config.model.width, config.dataset.name) == ("resnet18", 64, "folder")
    assert dataset.test["image"].shape[1:] == (96, 96, 3)
    assert (task.label_smoothing, task.mirror, task.augment.flip) == (0.1, True, "random")


def test_fields_reach_the_task(folder):
    flags = ["--config.label_smoothing=0.3", "--config.mirror=false", "--config.augment.flip=none"]
    task = _resolved(folder, *flags)[2]
    other = _resolved(folder, "--config.loss=sigmoid", "--config.augment.mixup=0.2")[2]
    assert (task.loss, other.loss, other.augment.mixup) == ("softmax", "sigmoid", 0.2)
    assert (task.label_smoothing, task.mirror, task.augment.flip) == (0.3, False, "none")


def test_stochastic_depth_is_a_traced_argument_of_the_step(folder):
    flags = ["--config.model.name=convnext_tiny", "--config.model.width=4", "--config.model.drop_path=0.2"]
    config, _, task = _resolved(folder, *flags)
    hparams = hyperparams.traced(config, 10)
    assert hparams["model.drop_path"] == np.float32(0.2)
    model = nnx.eval_shape(lambda: task.create_model(nnx.Rngs(0)))
    with hyperparams.applied(task, model, {"model.drop_path": 0.3}):
        assert [block.drop_path.rate for block in model.blocks] == [0.2, *[0.3] * 17]  # the first is never skipped
    assert {block.drop_path.rate for block in model.blocks} == {0.2}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.dataset.image_size=16"], "name=resnet18 needs images of 32x32 or more, not 16x16"),
        (["--config.dataset.train_image_size=16"], "name=resnet18 needs images of 32x32 or more, not 16x16"),
        (
            ["--config.dataset.train_crop=resize"],
            "no effect .* restore --config.dataset.crop_min_area=0.08",
        ),
        (["--config.dataset.image_size=0"], "train_image_size=64, .* or restore --config.dataset.train_image_size=0 "),
        (["--config.model.name=resnet20"], "name='resnet20': use one of 'resnet18', .* 'convnext_base'"),
        (["--config.model.drop_path=1"], "drop_path=1.0: must be below 1"),
        (["--config.augment.crop=100"], "augment.crop=100: must be below the images' side, 64"),
        (["--config.augment.mixup=0.2", "--config.batch_size=1"], "mixes the images of a batch, which has 1"),
        (["--config.augment.cutmix=1", "--config.microbatch_size=1"], "mixes the images of a batch, which has 1"),
        (["--config.augment.mixup=0.2", "--config.target_threshold=0.2"], "needs --config.loss=sigmoid"),
        (["--config.loss=sigmoid", "--config.target_threshold=0.2"], "needs .*mixup or cutmix"),
        (
            ["--config.loss=sigmoid", "--config.target_threshold=0.2", "--config.augment.mixup=0.2"],
            "label_smoothing=0.1 is without an effect",
        ),
        (["--config.dataset.name=pydoc", "--config.dataset.data_dir="], "pydoc has no images"),
        (["--config.dataset.data_dir="], "folder needs --config.dataset.data_dir=DIR"),
        (["--config.dataset.data_dir=nosuch"], "data_dir=nosuch: no such folder"),
    ],
)
def test_bad_input_is_named(flags, words, folder):
    with pytest.raises(UserError, match=words):
        _resolved(folder, *flags)


def test_a_text_is_refused_before_it_is_read(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("A text.\n" * 100)
    with pytest.raises(UserError, match="text has no images"):
        _resolved(tmp_path, "--config.dataset.name=text")
    captured = capsys.readouterr()
    assert "reading" not in captured.out + captured.err


@pytest.mark.slow
def test_it_trains(folder, tmp_path):
    args = ["--config.num_epochs=4", "--config.batch_size=8", "--config.model.width=8", f"--workdir={tmp_path}"]
    size = ["--config.dataset.image_size=48", "--config.dataset.train_image_size=32"]
    app.run(EXPERIMENT, [f"--config.dataset.data_dir={folder}", *size, *args])
    assert json.loads((tmp_path / "summary.json").read_text())["train_accuracy"] > 0.6
