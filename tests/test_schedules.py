"""Learning-rate schedules equal their closed forms."""

import jax
import numpy as np
import optax
import pytest

from research import optimizers
from research.config import OptimizerConfig


def _schedule(num_train_steps, **fields):
    config = OptimizerConfig(**fields)
    return optimizers.unit_schedule(config, optimizers.boundaries(config, num_train_steps))


SHAPES = {  # the rate relative to its peak, at the fraction u of training after the warm-up
    "constant": lambda u: 1.0,
    "cosine": lambda u: 0.2 + 0.8 * (1 + np.cos(np.pi * u)) / 2,
    "one_cycle": lambda u: 0.2 + 0.8 * (1 + np.cos(np.pi * u)) / 2,
    "linear": lambda u: 1 - 0.8 * u,
}


@pytest.mark.parametrize(("name", "warmup"), [(n, w) for n in SHAPES for w in (0.0, 0.1)])
def test_schedules_equal_their_closed_forms(name, warmup):
    end_factor = 0.0 if name == "constant" else 0.2
    schedule = _schedule(100, schedule=name, warmup=warmup, end_factor=end_factor)
    rising = 30 if name == "one_cycle" and not warmup else round(100 * warmup)
    for step in range(100):
        expected = (step + 1) / rising if step < rising else SHAPES[name]((step - rising) / (100 - rising))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_the_step_schedule_divides_by_ten_at_half_and_three_quarters(warmup):
    schedule = _schedule(100, schedule="step", warmup=warmup)
    for step, expected in ((30, 1.0), (49, 1.0), (51, 0.1), (74, 0.1), (76, 0.01), (99, 0.01)):
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.parametrize(("milestones", "factor"), [("0.3,0.6,0.9", 0.2), ("29/100", 0.5)])
def test_milestones_are_those_of_optax(milestones, factor):
    schedule = _schedule(100, schedule="step", milestones=milestones, decay_factor=factor)
    steps = {"0.3,0.6,0.9": (30, 60, 90), "29/100": (29,)}[milestones]
    expected = optax.piecewise_constant_schedule(1.0, dict.fromkeys(steps, factor))
    for step in range(100):
        np.testing.assert_allclose(schedule(step), expected(step), rtol=1e-5)


@pytest.mark.parametrize("warmup", [0.0, 0.01])
def test_the_tripling_schedule_is_that_of_burda_et_al(warmup):
    """0.001 * 10^(-i/7) for 3^i passes, i = 0 ... 7: section 5 of the paper, 3,280 passes in all."""
    per_pass = 10
    schedule = _schedule(3280 * per_pass, schedule="tripling", warmup=warmup)
    passes = np.concatenate([np.full(3**i, 10 ** (-i / 7)) for i in range(8)])
    steps = np.arange(328 if warmup else 0, 3280 * per_pass)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), np.repeat(passes, per_pass)[steps], rtol=1e-5)
