"""The hierarchical VAE as a user runs it: any mesh, resuming, every mode, and its fields' errors."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from drawn import loss_jaxpr, read_lines, same
from flax import nnx

from experiments import image_vae, mnist_vae
from research import app, sharding
from research import config as config_lib
from research.data import sources
from research.errors import UserError
from research.training import loop


def _drawn(channels=3, count=24):
    rng = np.random.default_rng(0)
    images = (rng.random((count, 4, 4, channels)) * rng.integers(0, 256, (4, 4, channels))).astype(np.uint8)
    split = {"image": images, "label": (np.arange(count) % 3).astype(np.int32)}
    return sources.Dataset("drawn", ("a", "b", "c"), split, None, split)


def _config(experiment=image_vae, dataset=None, **fields):
    config = experiment.EXPERIMENT.presets["hierarchical" if experiment is mnist_vae else "default"]()
    small = {"num_epochs": 2, "batch_size": 8, "final_samples": 2, "model.width": 4, "model.latents": 1}
    small |= {"model.groups": "1,1,0", "optimizer.ema_decay": 0.0, "optimizer.learning_rate": 0.01}
    for path, value in (small | fields).items():
        config_lib.assign(config, path, value)
    config_lib.check(config)
    return experiment.EXPERIMENT.resolve(config, dataset or _drawn())


def _train(workdir, devices=1, signals=None, **fields):
    workdir.mkdir(exist_ok=True)
    config, dataset = _config(**fields), _drawn()
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    task = image_vae.EXPERIMENT.make_task(config, dataset)
    run, summary = loop.train_and_evaluate("image_vae", config, task, dataset, mesh, workdir, signals)
    return run.state, summary


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one device: its workdir, state and summary."""
    workdir = tmp_path_factory.mktemp("image_vae") / "one"
    return (workdir, *_train(workdir, steps_per_dispatch=1))


def _metrics(summary):
    return {n: x for n, x in summary.items() if n.startswith(("train_", "test_")) and n != "train_seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"mesh.fsdp": 8, "mesh.data": 1}, {"remat": "blocks"}], ids=str)
def test_any_mesh_and_remat_give_the_same_metrics(trained, tmp_path, fields):
    _, summary = _train(tmp_path / "run", 1 if "remat" in fields else 8, **fields)
    expected = _metrics(trained[2])
    assert {"test_nll", "test_bits_per_dim", "test_elbo", "test_kl_group0", "test_kl_group1"} <= expected.keys()
    np.testing.assert_allclose(expected["test_bits_per_dim"], expected["test_loss"] / 48 / math.log(2), rtol=1e-6)
    for name, value in expected.items():
        if not name.startswith("train_grad_"):  # several replicas also estimate the noise
            np.testing.assert_allclose(value, summary[name], rtol=2e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_resumed_run_is_bit_exact_and_draws_its_plots(stop, trained, tmp_path):
    workdir, state, summary = trained
    assert {p.stem for p in workdir.glob("*.png")} == {
        "curves",
        "reconstructions",
        "samples",
        "interpolations",
        "groups",
    }
    folder = tmp_path / "stopped"
    stop(3, lambda signals: _train(folder, signals=signals, steps_per_dispatch=1))
    resumed, other = _train(folder, steps_per_dispatch=1)
    same(resumed, state)
    assert other["test_nll"] == summary["test_nll"]
    assert read_lines(folder) == read_lines(workdir)


@pytest.mark.slow
def test_the_command_trains_evaluates_and_samples_at_a_temperature(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    workdir = f"--workdir={tmp_path / 'run'}"
    tiny = [
        "--config.dataset.name=digits",
        "--config.num_steps=2",
        "--config.model.width=4",
        "--config.model.groups=1,1,0",
    ]
    summary = app.run(image_vae.EXPERIMENT, [workdir, *tiny, "--config.final_samples=2"])
    assert app.run(image_vae.EXPERIMENT, [workdir, "--mode=eval"])["test_nll"] == pytest.approx(summary["test_nll"])
    app.run(image_vae.EXPERIMENT, [workdir, "--mode=sample", "--num_samples=4", "--temperature=0.5"])
    assert (tmp_path / "run/samples-4-seed0-temperature0.5.png").exists()
    groups = json.loads((tmp_path / "run/config.json").read_text())["model"]["groups"]
    assert groups == "1,1,0"


def test_the_temperature_scales_the_latents(tmp_path):
    config, dataset, drawn = _config(), _drawn(), []

    def predict(function, arrays):
        drawn.append(arrays["latents"])
        return np.zeros((len(arrays["latents"]), 4, 4, 3))

    for temperature in (1.0, 0.5):
        options = image_vae.SampleOptions(num_samples=2, temperature=temperature)
        mnist_vae.sample(predict, config, dataset, options, tmp_path)  # pyright: ignore
    assert drawn[0].shape == (2, 5)
    np.testing.assert_array_equal(drawn[1], drawn[0] / 2)


@functools.cache
def _loss(**fields):
    """Returns the jaxpr of the training loss."""
    config, dataset = _config(**fields), _drawn()
    task = image_vae.EXPERIMENT.make_task(config, dataset)
    return loss_jaxpr(task, dataset, lambda: task.create_model(nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 2),
        ("beta", 2.0),
        ("beta_warmup", 0.5),
        ("free_bits", 0.1),
        ("model.groups", "2,1,0"),
        ("model.likelihood", "gaussian"),
    ],
)
def test_each_field_changes_the_loss(field, value):
    assert _loss(**{field: value}) != _loss()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.model.groups=1,x"], "groups=1,x: give the number of groups at each resolution"),
        (["--config.model.groups=9999,1"], "groups=9999,1: give at most 1,000 groups"),
        (["--config.model.groups=1,\u0663"], "give the number of groups at each resolution"),
        (["--config.model.groups=1," + 5000 * "9"], "give the number of groups at each resolution"),
        (["--config.model.groups=1,1,1,1"], "images of 4x4 cannot be halved 3 times"),
        (["--config=flat", "--config.model.depth=2", "--config.model.groups=1"], "conv has one layer of latents"),
        (["--config.binarize=fixed", "--config.model.groups=1,0"], "binarize=fixed: only a bernoulli"),
        (["--temperature=0.5"], "--temperature is for --mode=sample"),
    ],
)
def test_bad_flags_name_what_is_right(args, words):
    with pytest.raises(UserError) as error:
        image_vae.EXPERIMENT.resolve(app.parse(image_vae.EXPERIMENT, args).config, _drawn())  # pyright: ignore
    assert words in str(error.value)


def test_an_error_is_one_line_with_exit_code_2(capsys, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    with pytest.raises(SystemExit) as ended:
        app.main(image_vae.EXPERIMENT, [workdir, "--config.dataset.name=digits", "--config.model.groups=0"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", list(image_vae.EXPERIMENT.presets))
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (8, 8, 1)])
def test_presets_fit_every_named_data_set(name, shape):
    config = image_vae.EXPERIMENT.presets[name]()
    config_lib.check(config)
    dataset = sources.Dataset("drawn", ("a",), {"image": np.zeros((200, *shape), np.uint8)}, None, {})
    config = image_vae.EXPERIMENT.resolve(config, dataset)
    task = mnist_vae.make_task(config, dataset)
    assert task.likelihood == "logistic"
    assert task.binarize == ""


def test_the_learning_rate_rule_over_width():
    """muP: hidden kernels' rates fall with the width, those of the latents' inputs stay."""
    config = _config(**{"model.width": 16, "model.parametrization": "mup", "model.base_width": 4})
    task = image_vae.EXPERIMENT.make_task(config, _drawn())
    widths = task.widths
    block, group = widths["groups"][1]["blocks"][0], widths["groups"][1]
    assert block["conv"]["kernel"].get_value().rate_scale("adam") == 1 / 4
    assert group["project"]["kernel"].get_value().rate_scale("adam") == 1
    assert group["prior_head"]["kernel"].get_value().init_scale == 1 / 2
    assert widths["out"]["kernel"].get_value().init_scale == 1 / 2
