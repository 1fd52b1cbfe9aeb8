"""The command line: every field is a flag that changes something, and bad input is one clear line."""

import pytest

from experiments import cifar_cnn
from research import app, optimizers
from research import config as config_lib
from research.errors import UserError

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
        ("--config.optimizer.learning_rate=nan", "must be 0 or a finite float32"),
        ("--config.optimizer.learning_rate=inf", "must be 0 or a finite float32"),
        ("--config.optimizer.clip_norm=1e-46", "must be 0 or a finite float32, 1.2e-38 to 3.4e+38"),
        ("--config.optimizer.learning_rate=-1", "must be at least 0"),
        ("--config.optimizer.learning_rate=fast", "config.optimizer.learning_rate"),
        ("--config.optimizer.momentum=1", "must be below 1"),
        ("--config.optimizer.name=sdg", "'sgd'"),
        ("--config.optimizer.schedule=exp", "'cosine'"),
        ("--config.model.dtype=float16", "'bfloat16'"),
        ("--config.model.name=vgg", "'wide_resnet'"),
        ("--config.dataset.validation_fraction=1", "must be below 1"),
        ("--config.mesh.data=-2", "must be at least -1"),
        ("--config.model.norm_group=5", "norm_group=5 does not divide the 64 examples"),
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
