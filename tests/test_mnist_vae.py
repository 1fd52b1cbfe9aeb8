"""The experiment as a user runs it, and the effect of every field of its config."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from drawn import loss_jaxpr, read_lines, same
from upath import UPath

from experiments import mnist_vae
from research import app, sharding
from research import config as config_lib
from research.data import sources
from research.errors import RecordError, UserError
from research.training import loop


def _drawn(count=40):
    rng = np.random.default_rng(0)
    images = (rng.random((count, 8, 8, 1)) * rng.integers(0, 256, (8, 8, 1))).astype(np.uint8)
    split = {"image": images, "label": (np.arange(count) % 3).astype(np.int32)}
    return sources.Dataset("drawn", ("a", "b", "c"), split, None, split)


def _config(**fields):
    config = mnist_vae.get_config()
    small = {"num_epochs": 2, "batch_size": 8, "final_samples": 5, "model.width": 8, "model.latents": 2}
    for path, value in (small | {"optimizer.ema_decay": 0.0} | fields).items():
        config_lib.assign(config, path, value)
    config_lib.check(config)
    return mnist_vae.EXPERIMENT.resolve(config, _drawn())


def _train(workdir, devices=1, signals=None, **fields):
    config, dataset = _config(**fields), _drawn()
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    task = mnist_vae.make_task(config, dataset)
    run, summary = loop.train_and_evaluate("mnist_vae", config, task, dataset, mesh, workdir, signals)
    return run.state, summary


@pytest.mark.slow
def test_one_device_and_eight_give_the_same_metrics_and_plots(tmp_path):
    metrics = []
    for devices in (1, 8):
        folder = tmp_path / str(devices)
        folder.mkdir()
        _, summary = _train(folder, devices)
        metrics.append({n: summary[n] for n in summary if n.startswith(("train_", "test_")) and n != "train_seconds"})
        plots = {path.stem for path in folder.glob("*.png")}
        assert plots == {"curves", "reconstructions", "samples", "traversals", "latents"}
    assert {"test_nll", "test_active_units", "test_bits_per_dim", "test_elbo", "test_kl"} <= metrics[0].keys()
    assert metrics[0]["test_nll"] < metrics[0]["test_loss"]
    for name, value in metrics[0].items():
        np.testing.assert_allclose(value, metrics[1][name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_resumed_run_is_bit_exact(stop, tmp_path):
    """Stopped within an epoch, it draws the same binarization and latents as an uninterrupted run."""
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
    state, summary = _train(folders[0], steps_per_dispatch=1)
    stop(3, lambda signals: _train(folders[1], signals=signals, steps_per_dispatch=1))
    resumed, other = _train(folders[1], steps_per_dispatch=1)
    same(resumed, state)
    assert other["test_nll"] == summary["test_nll"]
    assert read_lines(folders[1]) == read_lines(folders[0])


@pytest.mark.slow
def test_the_command_trains_evaluates_and_samples(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    workdir = f"--workdir={tmp_path / 'run'}"
    tiny = ["--config.dataset.name=digits", "--config.num_epochs=1", "--config.model.width=8"]
    summary = app.run(mnist_vae.EXPERIMENT, [workdir, *tiny, "--config.final_samples=3"])
    assert app.run(mnist_vae.EXPERIMENT, [workdir, "--mode=eval"])["test_nll"] == pytest.approx(summary["test_nll"])
    app.run(mnist_vae.EXPERIMENT, [workdir, "--mode=sample", "--num_samples=4"])
    assert (tmp_path / "run/samples-4-seed0.png").exists()
    (tmp_path / "run/samples-5-seed0.png").mkdir()
    with pytest.raises(RecordError, match=r"samples-5-seed0.png could not be written"):
        app.run(mnist_vae.EXPERIMENT, [workdir, "--mode=sample", "--num_samples=5"])
    for args, words in (
        (["--config.free_bits=0.1"], "free_bits 0.0 there, 0.1 here"),
        (["--config.dataset.validation_fraction=0.3"], "dataset.validation_fraction"),
        ([f"--reproduce={tmp_path / 'run/summary.json'}"], "--reproduce is for training"),
    ):
        with pytest.raises(UserError, match=words):
            app.run(mnist_vae.EXPERIMENT, [workdir, "--mode=eval", *args])
    with pytest.raises(UserError, match=r"config.json: this is not the summary.json of a run"):
        app.parse(mnist_vae.EXPERIMENT, [f"--reproduce={tmp_path / 'run/config.json'}"])


def test_samples_are_written_to_a_remote_workdir():
    config, dataset, workdir = _config(), _drawn(), UPath("memory://samples")
    options = mnist_vae.SampleOptions(num_samples=5, sample_seed=0)
    mnist_vae.sample(lambda _, x: np.zeros((5, 8, 8, 1)), config, dataset, options, workdir)  # pyright: ignore
    assert (workdir / "samples-5-seed0.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_saved_and_depend_on_the_seed(tmp_path, capsys):
    config, dataset = _config(), _drawn()
    latents = []

    def predict(function, arrays):
        latents.append(arrays["latents"])
        return np.zeros((len(arrays["latents"]), 8, 8, 1))

    for seed in (0, 0, 1):
        options = mnist_vae.SampleOptions(num_samples=5, sample_seed=seed)
        mnist_vae.sample(predict, config, dataset, options, tmp_path)  # pyright: ignore
        path = tmp_path / f"samples-5-seed{seed}.png"
        assert capsys.readouterr().out.strip() == str(path)
        assert path.read_bytes().startswith(b"\x89PNG")
    np.testing.assert_array_equal(latents[0], latents[1])
    assert not np.allclose(latents[0], latents[2])
    assert latents[0].shape == (5, 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.model.likelihood=gaussian", "--config.binarize=fixed"], "binarize=fixed: only a bernoulli"),
        (["--config.samples=5", "--config.free_bits=0.1"], "free_bits=0.1: IWAE has no KL"),
        (["--config.beta=0", "--config.beta_warmup=0.1"], "beta_warmup=0.1: beta is 0"),
        (["--config.beta=0", "--config.free_bits=0.1"], "free_bits=0.1: the KL has no weight"),
        (["--config.samples=5", "--config.gradient_samples=5"], "gradient_samples=5: must be below"),
        (["--config.gradient_samples=1"], "gradient_samples=1: must be below"),
        (["--config.samples=0"], "config.samples=0: must be at least 1"),
        (["--config.binarize=none"], "config.binarize='none': use one of"),
        (["--config.model.name=conv", "--config.model.depth=4"], "depth=4: images of 8x8 cannot be halved"),
        (["--num_samples=3"], "--num_samples is for --mode=sample"),
        (["--config.model.name=dens"], "'dens': use one of 'dense', 'conv', 'hierarchical'"),
        (["--config.model.groups=1,2"], "groups=1,2: dense has one layer of latents"),
        (["--config.model.likelihood=logistic", "--config.binarize=fixed"], "binarize=fixed: only a bernoulli"),
    ],
)
def test_bad_flags_name_what_is_right(args, words):
    with pytest.raises(UserError) as error:
        mnist_vae.EXPERIMENT.resolve(app.parse(mnist_vae.EXPERIMENT, args).config, _drawn())  # pyright: ignore
    assert words in str(error.value)


def test_a_text_has_no_images():
    text = SimpleNamespace(name="tiny_shakespeare", train={"text": np.zeros(9, np.uint8)})
    with pytest.raises(UserError, match="tiny_shakespeare has no images"):
        mnist_vae.EXPERIMENT.resolve(_config(), text)  # pyright: ignore


@functools.cache
def _loss(**fields):
    """Returns the jaxpr of the training loss."""
    config, dataset = _config(**fields), _drawn()
    task = mnist_vae.make_task(config, dataset)
    model = SimpleNamespace(
        encode=lambda x: (x[:, 0, :2, 0], x[:, 1, :2, 0]),
        decode=lambda z: jax.numpy.tile(z, 32 * {"bernoulli": 1, "gaussian": 2, "logistic": 15}[task.likelihood]),
    )
    return task.final_samples, loss_jaxpr(task, dataset, lambda: model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 2),
        ("beta", 2.0),
        ("beta_warmup", 0.5),
        ("free_bits", 0.1),
        ("binarize", "fixed"),
        ("final_samples", 7),
        ("model.likelihood", "gaussian"),
        ("model.likelihood", "logistic"),
    ],
)
def test_each_field_changes_the_loss(field, value):
    assert _loss(samples=3, gradient_samples=1) != _loss(samples=3)
    assert _loss(**{field: value}) != _loss()


@pytest.mark.parametrize("name", list(mnist_vae.EXPERIMENT.presets))
def test_presets_are_valid(name):
    config = mnist_vae.EXPERIMENT.presets[name]()
    config_lib.check(config)
    dataset = sources.Dataset("drawn", ("a",), {"image": np.zeros((2000, 28, 28, 1), np.uint8)}, None, {})
    config = mnist_vae.EXPERIMENT.resolve(config, dataset)
    task = mnist_vae.make_task(config, dataset)  # pyright: ignore
    assert task.samples == (50 if name == "iwae" else 1)
    assert task.final_samples == (100 if name == "hierarchical" else 5000)
    assert task.binarize == "stochastic"
