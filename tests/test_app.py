"""The command line: every field is a flag that changes something, and bad input is one clear line."""

import functools
import math
import pathlib

import jax
import numpy as np
import pytest

from experiments import char_rnn, cifar_cnn, mnist_vae
from research import app, optimizers, sharding
from research import config as config_lib
from research.data import sources
from research.errors import UserError
from research.training.run import Training

EXPERIMENT = cifar_cnn.EXPERIMENT


def _parse(*argv):
    return app.parse(EXPERIMENT, argv).config


def _fields():
    return [(path, field, value) for path, field, value in config_lib.walk(EXPERIMENT.default_config)]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_docstring_and_every_field(flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        _parse(flag)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert cifar_cnn.__doc__.strip() in out
    for path, field, value in _fields():
        line = next(line for line in out.splitlines() if line.strip().startswith(f"--config.{path}="))
        assert getattr(field.type, "__name__", "float") in line
        assert f"default: {value}" in line or value in ("", None)
        assert field.metadata["help"] in out
        assert all(choice in out for choice in field.metadata["choices"])


def test_flags_start_from_the_preset_and_change_it():
    assert _parse() == cifar_cnn.get_config()
    assert _parse("--config=tutorial") == cifar_cnn.tutorial()
    config = _parse("--config.optimizer.learning_rate=0.5", "--config=tutorial", "--config.model.width=8")
    expected = cifar_cnn.tutorial()
    expected.optimizer.learning_rate, expected.model.width = 0.5, 8
    assert config == expected
    assert str(app.parse(EXPERIMENT, ["--workdir=x"]).workdir) == "x"


def test_the_tutorials_settings_stand_as_a_preset():
    config = cifar_cnn.tutorial()
    optimizer = config.optimizer
    optimizer = optimizers.resolve(optimizer)
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adam", 0.001, "constant")
    assert (config.batch_size, config.num_epochs, config.model.name) == (32, 10, "simple")
    assert config.augment == config_lib.AugmentConfig()
    assert config.label_smoothing == config.model.dropout == optimizer.weight_decay == 0


@pytest.mark.parametrize("preset", ["default", "tutorial"])
@pytest.mark.parametrize("name", config_lib.OPTIMIZERS)
def test_another_rule_brings_its_own_rate_and_momentum(name, preset):
    config = _parse(f"--config={preset}", f"--config.optimizer.name={name}")
    config.optimizer = optimizers.resolve(config.optimizer)
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == optimizers.DEFAULTS[name][:2]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optimiser.name=sgd", "config.optimizer.name"),
        ("--config.batchsize=8", "config.batch_size"),
        ("--config.learning_rate=1", "--config.optimizer.learning_rate?"),
        ("--config.width=1", "--config.model.width?"),
        ("--config.name=x", "--config.dataset.name or --config.optimizer.name or --config.model.name?"),
        ("--config.optimizer.momentun=0", "--config.optimizer.momentum?"),
        ("--epochs=1", "--config.num_epochs?"),
        ("--quux=1", "--help lists them all"),
        ("--config.seed=5000000000", "--config.seed=5000000000: must be at most 4294967295"),
        ("--work_dir=x", "workdir"),
        ("--config.num_epochs=ten", "config.num_epochs"),
        ("--config.num_epochs=1.5", "config.num_epochs"),
        ("--config.num_epochs=0", "--config.num_epochs=0: must be at least 1"),
        ("--config.batch_size=-8", "--config.batch_size=-8: must be at least 1"),
        ("--config.batch_size=0", "must be at least 1"),
        ("--config.model.width=-1", "must be at least 0"),
        ("--config.optimizer.learning_rate=nan", "must be a finite number"),
        ("--config.optimizer.learning_rate=inf", "must be a finite number"),
        ("--config.optimizer.clip_norm=1e-46", "must be a finite number of float32's, 0 or 1.2e-38 to 3.4e+38"),
        ("--config.optimizer.learning_rate=-1", "must be at least 0"),
        ("--config.optimizer.learning_rate=fast", "config.optimizer.learning_rate"),
        ("--config.optimizer.momentum=1", "must be below 1"),
        ("--config.optimizer.name=sdg", "'sgd'"),
        ("--config.optimizer.schedule=exp", "'cosine'"),
        ("--config.model.dtype=float16", "'bfloat16'"),
        ("--config.model.name=vgg", "'wide_resnet'"),
        ("--config.dataset.validation_fraction=1", "must be below 1"),
        ("--config.mesh.data=-2", "must be at least -1"),
        ("--config.microbatch_size=5", "is not a multiple of --config.microbatch_size=5"),
        ("--config=tutorials", "tutorial"),
        ("train", "unexpected argument 'train'"),
        ("--config.seed", "config.seed"),
    ],
)
def test_bad_flags_name_what_is_right(flag, words):
    with pytest.raises(UserError) as error:
        _parse(flag)
    assert words in str(error.value)


# A value of each field that must change what is compiled, what the state holds or what the steps are given.
OTHER = {
    "seed": 1,
    "num_epochs": 3,
    "batch_size": 16,
    "microbatch_size": 4,
    "steps_per_dispatch": 3,
    "max_skipped_steps": 1,
    "label_smoothing": 0.3,
    "mirror": True,
    "translate": True,
    "dataset.max_device_gib": 0.0,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.5,
    "optimizer.momentum": 0.5,
    "optimizer.weight_decay": 0.1,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 0.5,
    "optimizer.end_factor": 0.5,
    "optimizer.clip_norm": 1.0,
    "optimizer.ema_decay": 0.5,
    "optimizer.fixed_norm": True,
    "optimizer.batch_scaling": "linear",
    "mesh.data": 1,
    "mesh.fsdp": 2,
    "mesh.model": 2,
    "mesh.reduce_dtype": "bfloat16",
    "model.name": "airbench",
    "model.width": 6,
    "model.depth": 16,
    "model.pool": "average",
    "model.dropout": 0.5,
    "model.norm": "layer",
    "model.dtype": "bfloat16",
    "augment.crop": 1,
    "augment.flip": "random",
    "augment.cutout": 2,
}
ELSEWHERE = {  # and the fields whose effect another test shows
    "pictures_every_epochs": "test_train.py::test_pictures_every_epochs",
    "max_rewinds": "faults/test_not_finite.py::test_it_goes_back_to_a_checkpoint_and_takes_other_data",
    "mesh.sequence": "test_char_rnn.py::test_eight_devices_with_time_over_four_of_them_record_what_one_does",
    "optimizer.base_batch_size": "test_optimizers.py::test_the_rate_grows_with_the_batch",
    "distributed.start": "test_distributed.py::test_start",
    "distributed.timeout": "test_distributed.py::test_a_missing_process_is_named",
    "log_every_steps": "test_train.py::test_log_every_steps",
    "checkpoint_every_steps": "test_resume.py::test_checkpoints_within_an_epoch",
    "keep_checkpoints": "test_checkpoint.py::test_the_newest_and_the_best_are_kept",
    "dataset.name": "data/test_sources.py::test_the_first_that_can_be_had_with_one_line_for_each_other",
    "dataset.data_dir": "data/test_sources.py::test_a_set_is_prepared_once_then_cached_and_follows_its_source",
    "dataset.train_fraction": "data/test_sources.py::test_a_part_of_train_is_the_same_whatever_the_seed",
    "model.parametrization": "test_parametrization.py::test_what_updates_change_does_not_depend_on_the_width",
    "model.base_width": "test_parametrization.py::test_initial_kernels_and_rates_are_those_of_the_table",
    "dataset.validation_fraction": "data/test_sources.py::test_validation_is_a_fixed_part_of_train",
}


def _drawn():
    rng = np.random.default_rng(0)
    split = {
        "image": rng.integers(0, 256, (32, 26, 26, 1), np.uint8),
        "label": rng.integers(0, 3, 32).astype(np.int32),
    }
    return sources.Dataset("drawn", ("a", "b", "c"), split, None, split)


@functools.cache
def _before_training(base, path=None):
    """What the loop has before its first step: the programs, the state, the first inputs, the numbers of steps."""
    config = cifar_cnn.CifarConfig(num_epochs=2, batch_size=8)
    config.model.width = 1 if base == "wide_resnet" else 4
    config.model.name, config.model.depth = base, 10 if base == "wide_resnet" else 0
    config.optimizer.schedule, config.mesh.data = "linear", -1
    if path:
        config_lib.assign(config, path, OTHER[path])
    config_lib.check(config)
    dataset = _drawn()
    config = EXPERIMENT.resolve(config, dataset)
    mesh = sharding.make_mesh(config, jax.devices()[: 1 if path == "mesh.data" else 2])
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: texts.append(lowered.as_text()))
        run = Training(config, EXPERIMENT.make_task(config, dataset), dataset, mesh)
        run.compile(train=True)
    arrays = jax.tree.leaves(jax.tree.map(np.asarray, (run.state, run._train_batches.sample(), run._hparams)))
    return texts, [array.tobytes() for array in arrays], run.epoch_end_steps, run._sizer.capacity


@pytest.mark.parametrize("path", OTHER)
def test_every_field_changes_what_runs(path):
    base = "wide_resnet" if path == "model.depth" else "simple"
    assert _before_training(base, path) != _before_training(base)


def test_the_same_config_is_the_same_before_training():
    assert _before_training.__wrapped__("simple") == _before_training("simple")


def test_no_field_is_left_out():
    paths = {path for path, _, _ in config_lib.walk(EXPERIMENT.default_config)}
    assert paths == OTHER.keys() | ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"def {name}(" in (pathlib.Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("module", [cifar_cnn, char_rnn, mnist_vae], ids=lambda module: module.__name__)
def test_all_inputs_of_the_step_can_be_on_at_once(module, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    config = module.EXPERIMENT.default_config
    off = [path for path, field, value in config_lib.walk(config) if field.metadata["step_input"] and value == 0]
    assert off
    name = "pydoc" if module is char_rnn else "digits"
    small = [f"--config.dataset.name={name}", "--config.dataset.train_fraction=0.1", "--config.model.width=8"]
    small += ["--config.num_epochs=1", "--config.batch_size=8", f"--workdir={tmp_path / 'x'}"]
    small += ["--config.final_samples=2"] if module is mnist_vae else []
    summary = app.run(module.EXPERIMENT, [*small, *(f"--config.{path}=0.1" for path in off)])
    assert math.isfinite(summary["test_loss"])
