"""NaN and infinity: named errors, skipped steps, and rewinds to a checkpoint."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import DATASET, Linear, read_lines, run, same
from flax import nnx

from experiments import char_rnn, cifar_cnn, cifar_speedrun, mnist_vae
from research import app, optimizers, randomness, sharding
from research.config import AugmentConfig, DatasetConfig, MeshConfig, OptimizerConfig
from research.data.pipeline import example_numbers
from research.errors import NonFiniteLossError, UserError
from research.process.signals import Signals
from research.randomness import Stream
from research.tasks.classification import Classification
from research.training import loop

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:overflow encountered in cast")]


@dataclasses.dataclass(frozen=True)
class Spoilt(Classification):
    """Gives one example, in some epochs, a loss of NaN or an infinite gradient."""

    example: int = 0
    epochs: tuple[int, ...] = (0,)
    what: str = "loss"

    def evaluate(self, model, batch, *, key, train):
        values = super().evaluate(model, batch, key=key, train=train)
        if not train:
            return values
        is_bad = (batch.index == self.example) & jnp.isin(batch.epoch, jnp.array(self.epochs))
        if self.what == "loss":
            spoilt = values["loss"] * jnp.where(is_bad, jnp.nan, 1.0)
        else:  # the derivative of the square root at 0
            spoilt = values["loss"] + jnp.sqrt(jnp.where(is_bad, 0.0 * values["loss"], 1.0)) - 1.0
        return values | {"loss": spoilt}


def _run(workdir, devices=1, axes=None, signals=None, epochs=(0,), what="loss", step=5, **fields):
    """Runs like `drawn.run`, with a bad example in step `step` of the first epoch."""
    config = cifar_cnn.CifarConfig(**{"num_epochs": 2, "batch_size": 8, "log_every_steps": 1, **fields})
    config.dataset, config.mesh = DatasetConfig(), MeshConfig(**axes or {})
    config.optimizer = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="linear")
    config.optimizer = optimizers.resolve(config.optimizer)
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    example = int(example_numbers(0, 90, 8 * step - 8, 8 * step)[0][3])
    task = Spoilt(Linear, (0.5,), (0.25,), AugmentConfig(), 0.0, example=example, epochs=epochs, what=what)
    workdir.mkdir(exist_ok=True)
    run, summary = loop.train_and_evaluate("drawn", config, task, DATASET, mesh, workdir, signals)
    return run.state, summary


def _by_hand(initial, without=(), order=None):
    """The parameters after 22 steps of SGD in NumPy float64; steps in `without` are skipped, also by the schedule."""
    kernel, bias = (np.float64(x) for x in initial)
    updates = 0
    for number in range(22):
        if number + 1 in without:
            continue
        position = order(number) if order else number
        index = example_numbers(0, 90, 8 * position, 8 * position + 8)[0]
        x = ((DATASET.train["image"][index] / 255 - 0.5) / 0.25).reshape(8, -1)
        logits = x @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(8), DATASET.train["label"][index]] -= 1
        rate = 0.1 * (1 - updates / 22)
        kernel, bias = kernel - rate * x.T @ p / 8, bias - rate * p.mean(0)
        updates += 1
    return bias, kernel


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(loop.Loop, "draw", lambda _: None)


@pytest.fixture(scope="module")
def initial():
    """The initial parameters."""
    model = Linear(nnx.Rngs(randomness.key(Stream.INITIALIZATION)))
    return np.asarray(model.linear.kernel[...]), np.asarray(model.linear.bias[...])


def _close(state, expected):
    for leaf, x in zip(jax.tree.leaves(state.params), expected):
        np.testing.assert_allclose(leaf, x, atol=2e-5)


@pytest.mark.parametrize(
    ("what", "words", "steps_per_dispatch"),
    [("loss", "the training loss became nan", 11), ("gradient", "the gradient's norm became (nan|inf)", 1)],
)
def test_the_step_and_the_quantity_are_named(what, words, steps_per_dispatch, tmp_path):
    with pytest.raises(NonFiniteLossError, match=f"{words} at step 5: ") as error:
        _run(tmp_path, what=what, steps_per_dispatch=steps_per_dispatch)
    assert (error.value.exit_code, error.value.step) == (3, 5)
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("what", "devices", "axes"),
    [
        ("gradient", 1, {}),
        pytest.param("loss", 8, {}, marks=pytest.mark.slow),
        ("loss", 8, {"data": 2, "fsdp": 4}),
        pytest.param("gradient", 4, {"data": 2, "model": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_changes_nothing(what, devices, axes, initial, tmp_path, capsys):
    """Against NumPy, on several meshes."""
    state, summary = _run(tmp_path, devices, axes, what=what, max_skipped_steps=1)
    _close(state, _by_hand(initial, without=(5,)))
    assert state.step == 22
    assert summary["skipped_steps"] == 1
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 23))
    assert [line["step"] for line in lines if line["skipped"]] == [5]
    # The schedule counts updates, not steps.
    np.testing.assert_allclose([x["learning_rate"] for x in lines[3:7]], 0.1 * (1 - np.array([3, 4, 4, 5]) / 22), 1e-5)
    applied = [line["loss"] for line in lines[:11] if line["step"] != 5]
    assert lines[10]["train_loss"] == pytest.approx(np.mean(applied), rel=1e-6)
    assert "WARNING: 1 of the steps " in capsys.readouterr().err


@pytest.fixture
def two_in_a_row(monkeypatch):
    """The loss of steps 5 and 6 is NaN."""
    evaluate = Classification.evaluate

    def spoilt(self, model, batch, *, key, train):
        values = evaluate(self, model, batch, key=key, train=train)
        if train:
            values["loss"] = jnp.where(batch.step // 2 == 2, jnp.nan, values["loss"])
        return values

    monkeypatch.setattr(Classification, "evaluate", spoilt)


@pytest.mark.parametrize("steps_per_dispatch", [1, 11])
def test_too_many_skipped_steps_in_a_row_are_an_error(two_in_a_row, steps_per_dispatch, tmp_path):
    options = {"epochs": (), "steps_per_dispatch": steps_per_dispatch}
    with pytest.raises(NonFiniteLossError, match="at step 6: "):
        _run(tmp_path / "one", max_skipped_steps=1, **options)
    assert _run(tmp_path / "two", max_skipped_steps=2, **options)[1]["skipped_steps"] == 2


def test_it_rewinds_to_a_checkpoint_and_takes_other_data(initial, tmp_path, capsys):
    """After the rewind step n takes batch n + 3 (from 0): batches 4 to 6 are never taken again."""
    options = {"step": 7, "checkpoint_every_steps": 4, "max_rewinds": 1}
    state, summary = _run(tmp_path / "x", **options)
    _close(state, _by_hand(initial, order=lambda number: number if number < 4 else number + 3))
    assert summary["rewinds"] == 1
    assert [line["step"] for line in read_lines(tmp_path / "x")] == list(range(1, 23))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert "the training loss became nan at step 7: back at the checkpoint of step 4, leaving out 3 batches" in line


def test_it_rewinds_to_the_start_and_at_most_max_rewinds_times(initial, tmp_path):
    state, _ = _run(tmp_path / "x", max_rewinds=1)
    _close(state, _by_hand(initial, order=lambda number: number + 5))
    with pytest.raises(NonFiniteLossError, match="at step 5: "):
        _run(tmp_path / "y")
    _run(tmp_path / "y", max_rewinds=1)  # a failed run may be resumed with more rewinds
    with pytest.raises(NonFiniteLossError):
        _run(tmp_path / "z", max_rewinds=1, epochs=(0, 1))


@pytest.mark.slow
def test_stopped_and_resumed_after_a_rewind_it_ends_the_same(stop, tmp_path):
    options = {"step": 7, "checkpoint_every_steps": 4, "max_rewinds": 1, "steps_per_dispatch": 1}
    state, _ = _run(tmp_path / "whole", **options)
    for at in (9, 17):
        stop(at, lambda signals: _run(tmp_path / "x", signals=signals, **options))
    same(_run(tmp_path / "x", **options)[0], state)
    assert read_lines(tmp_path / "x") == read_lines(tmp_path / "whole")


def test_no_checkpoint_holds_non_finite_parameters(tmp_path):
    """The learning rate overflows: the loss of the step is finite, the parameters after it are not."""
    with pytest.raises(NonFiniteLossError, match="a parameter became NaN or infinite at step 1: "):
        run(tmp_path, rate=1e39, checkpoint_every_steps=1)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


SMALL = {
    "cifar_cnn": (cifar_cnn, ["--config.dataset.name=digits"]),
    "cifar_speedrun": (cifar_speedrun, ["--config=quick", "--config.dataset.name=digits"]),
    "mnist_vae": (mnist_vae, ["--config.dataset.name=digits"]),
    "char_rnn": (char_rnn, ["--config.dataset.name=pydoc", "--config.model.layers=1"]),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", SMALL)
def test_every_experiment_counts_what_it_skips(name, env, capsys):
    """The first update overflows, so every later step is skipped."""
    module, args = SMALL[name]
    small = ["--config.model.width=4", "--config.optimizer.learning_rate=1e39", "--config.max_skipped_steps=2"]
    with pytest.raises(SystemExit) as exit_:
        app.main(module.EXPERIMENT, [*args, *small, "--workdir=x"])
    assert exit_.value.code == 3
    errors = capsys.readouterr().err
    assert re.search(r"^error: the (training loss|gradient's norm) became (nan|inf) at step 4: ", errors, re.MULTILINE)
    assert "Traceback" not in errors


def test_a_speedrun_refuses_max_rewinds(tmp_path):
    args = ["--config.max_rewinds=1", f"--workdir={tmp_path / 'x'}"]
    with pytest.raises(UserError, match=r"--config\.max_rewinds: a speedrun records nothing"):
        cifar_speedrun.run(cifar_speedrun.EXPERIMENT, args, Signals())
