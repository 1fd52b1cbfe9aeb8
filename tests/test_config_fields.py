"""Every field of a config changes what runs, and every step input changes what the step computes."""

import copy
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import char_rnn, cifar_cnn, mnist_vae
from research import app, sharding
from research import config as config_lib
from research.data import sources
from research.training import hyperparams
from research.training.run import Training

EXPERIMENT = cifar_cnn.EXPERIMENT


# Another value of every field that decides what is compiled, what the state holds or which examples a step gets.
# Fields with `step_input` are traced arguments: see test_every_step_input_changes_what_the_step_computes.
OTHER = {
    "seed": 1,
    "num_epochs": 3,
    "num_steps": 5,
    "batch_size": 16,
    "microbatch_size": 4,
    "steps_per_dispatch": 3,
    "max_skipped_steps": 1,
    "mirror": True,
    "translate": True,
    "dataset.max_device_gib": 0.0,
    "optimizer.name": "adam",
    "optimizer.schedule": "cosine",
    "optimizer.fixed_norm": True,
    "optimizer.freeze": "logits",
    "optimizer.initial_accumulator": 0.1,
    "optimizer.learning_rate_scale": "logits:0.1",
    "optimizer.milestones": "0.9",
    "optimizer.batch_scaling": "linear",
    "optimizer.base_batch_size": 64,
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.model": 2,
    "mesh.reduce_dtype": "bfloat16",
    "model.name": "airbench",
    "model.width": 6,
    "model.depth": 3,
    "model.parametrization": "mup",
    "model.base_width": 2,
    "model.pool": "average",
    "model.norm": "layer",
    "model.norm_group": 2,
    "remat": "blocks",
    "model.dtype": "bfloat16",
    "augment.crop": 1,
    "augment.flip": "random",
    "augment.cutout": 2,
    "augment.randaugment": 2,
    "loss": "sigmoid",
    "target_threshold": 0.2,
}
# What a field needs to have an effect, or to be allowed.
NEEDS = {
    "model.depth": {"model.name": "airbench", "model.depth": 2},
    "model.parametrization": {"model.base_width": 4},
    "model.base_width": {"model.parametrization": "mup", "model.base_width": 4},
    "model.norm_group": {"model.norm": "batch"},
    "optimizer.base_batch_size": {"optimizer.batch_scaling": "linear"},
    "optimizer.initial_accumulator": {"optimizer.name": "adagrad"},
    "optimizer.milestones": {"optimizer.schedule": "step"},
    "augment.randaugment": {"augment.randaugment": 1, "augment.randaugment_magnitude": 5.0},
    "target_threshold": {"loss": "sigmoid", "augment.mixup": 0.2},
}
# Fields that only the host reads, each tested with its feature (data sources, checkpoints, weights to start from,
# logging, distributed start), and mesh.sequence, which convolutional networks do not support.
TESTED_ELSEWHERE = {
    "plot_every_epochs",
    "max_rewinds",
    "log_every_steps",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "eval_every_steps",
    "early_stopping_epochs",
    "keep_checkpoints",
    "dataset.name",
    "dataset.data_dir",
    "dataset.train_split",
    "dataset.validation_split",
    "dataset.test_split",
    "dataset.train_fraction",
    "dataset.validation_fraction",
    "dataset.test_fraction",
    "dataset.image_size",
    "dataset.train_image_size",
    "dataset.train_crop",
    "dataset.crop_min_area",
    "dataset.center_crop",
    "dataset.max_damaged",
    "dataset.tokenizer",
    "distributed.start",
    "distributed.timeout",
    "init.path",
    "init.reset",
    "mesh.sequence",
    "optimizer.decay_factor",
}


def _drawn(channels=1):
    rng = np.random.default_rng(0)
    split = {
        "image": rng.integers(0, 256, (32, 26, 26, channels), np.uint8),
        "label": rng.integers(0, 3, 32).astype(np.int32),
    }
    return sources.Dataset("drawn", ("a", "b", "c"), split, None, split)


def _with_needs(path):
    """A small config of which `path` may be changed."""
    config = cifar_cnn.CifarConfig(num_epochs=2, batch_size=8)
    config.model.width, config.optimizer.schedule = 4, "linear"
    for name, value in NEEDS.get(path, {}).items():
        config_lib.assign(config, name, value)
    return config


def _before_training(config, devices):
    """The programs, the state, the first batch and the numbers of steps that the loop has before its first step."""
    dataset = _drawn()
    config = EXPERIMENT.resolve(config, dataset)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: texts.append(lowered.as_text()))
        patch.setattr(Training, "check_per_device", lambda _: None)  # compiles and runs another program
        run = Training(config, EXPERIMENT.make_task(config, dataset), dataset, mesh)
        run.compile(train=True)
    arrays = jax.tree.leaves(jax.tree.map(np.asarray, (run.state, run._train_batches.example())))
    return texts, [array.tobytes() for array in arrays], run.epoch_end_steps, run._sizer.capacity


@functools.cache
def _before_training_unchanged(needs, devices):
    return _before_training(_with_needs(needs), devices)


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHER)
def test_every_field_changes_what_runs(path):
    config = _with_needs(path)
    config_lib.assign(config, path, OTHER[path])
    if path != "model.parametrization":  # "standard" is refused with the base_width that "mup" needs
        config_lib.check(config)
    devices = 2 if path.startswith("mesh.") else 1
    unchanged = _before_training_unchanged(path if path in NEEDS else None, devices)
    assert _before_training(config, 1 if path == "mesh.data" else devices) != unchanged


@pytest.mark.slow
def test_the_same_config_is_the_same_before_training():
    assert _before_training(_with_needs(None), 1) == _before_training_unchanged(None, 1)


def _step_inputs(experiment):
    """The fields that are traced arguments of the step, the schedule's warm-up (as its boundaries) and the seed too."""
    fields = [path for path, field, _ in config_lib.walk(experiment.default_config) if field.metadata["step_input"]]
    fields.remove("optimizer.decay_factor")  # of the schedule `step`, which has no end_factor: see test_optimizers
    return [*fields, "optimizer.warmup", "seed"]


def test_no_field_is_left_out():
    paths = {path for path, _, _ in config_lib.walk(EXPERIMENT.default_config)}
    assert paths == OTHER.keys() | set(_step_inputs(EXPERIMENT)) | TESTED_ELSEWHERE


EXPERIMENTS = {module.EXPERIMENT.name: module.EXPERIMENT for module in (cifar_cnn, char_rnn, mnist_vae)}


@functools.cache
def _all_inputs_on(name):
    """(config, run, results of its train step): an experiment of which no step input is off, compiled."""
    experiment = EXPERIMENTS[name]
    config = experiment.default_config
    config.num_epochs, config.batch_size, config.model.width, config.steps_per_dispatch = 1, 8, 8, 4
    config.dataset.name, config.dataset.train_fraction = "pydoc" if name == "char_rnn" else "digits", 0.05
    config.optimizer.name, config.optimizer.schedule, config.optimizer.warmup = "adamw", "linear", 0.5
    if name == "char_rnn":
        config.model.layers = 1
    config.optimizer.beta2, config.optimizer.epsilon = 0.9, 1e-3  # their defaults are constants
    if name == "cifar_cnn":
        config.augment.randaugment = 1
    for path in _step_inputs(experiment):
        value = operator.attrgetter(path)(config)
        config_lib.assign(config, path, 0.1 if value == 0 and path != "seed" else value)
    with pytest.MonkeyPatch.context() as patch:
        if name == "cifar_cnn":  # saturation needs colors, which the digits do not have
            patch.setattr(sources, "load", lambda *_: _drawn(channels=3))
        config, dataset, task = app.load(experiment, config)
    run = Training(config, task, dataset, sharding.make_mesh(config, jax.devices()[:1]))
    run.compile(train=True)
    return config, run


@functools.cache
def _four_steps(name, path=None, factor=1.0):
    """The state and the metrics after four steps of the compiled program, one step input multiplied by a factor."""
    config, run = _all_inputs_on(name)
    config = copy.deepcopy(config)
    if path:
        value = operator.attrgetter(path)(config)
        config_lib.assign(config, path, value + 1 if path == "seed" else value * factor)
    hparams = hyperparams.traced(config, 4)
    state = jax.tree.map(jnp.copy, run.state)  # the program donates it
    return run.train_program(state, run._train_batches.data, run._train_batches.example(), np.int32(4), hparams)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in EXPERIMENTS for path in _step_inputs(EXPERIMENTS[name])]
)
def test_every_step_input_changes_what_the_step_computes(name, path, monkeypatch):
    """One program with all of them on, called with two values of each."""
    # 0.05: below the 1/10 at which the first step caps `ema_decay`.
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (state, metrics), (other_state, other_metrics) = _four_steps(name), _four_steps(name, path, 0.05)
    assert np.isfinite(metrics["loss"]).all()
    assert np.isfinite(other_metrics["loss"]).all()
    pairs = zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((other_state, other_metrics)))
    assert any(not np.array_equal(a, b) for a, b in pairs)
