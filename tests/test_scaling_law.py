"""`launch.sweeps.scaling_law`: known laws are found again, and its intervals hold what they promise."""

import numpy as np
import pytest

from launch.sweeps import scaling_law

SIZES = np.array([1e4, 3e4, 1e5, 3e5, 1e6])


def _law(x):
    return 0.3 + 40 * x**-0.5


def test_a_law_without_noise_is_found():
    law = scaling_law.fit(SIZES, _law(SIZES))
    assert law.floor == pytest.approx(0.3, rel=1e-3)
    assert law.exponent == pytest.approx(0.5, rel=1e-3)
    assert law(1e8) == pytest.approx(_law(1e8), rel=1e-3)


def test_a_floor_is_not_negative():
    law = scaling_law.fit(SIZES, 2 - 0.1 * np.log(SIZES))
    assert law.floor >= 0
    assert law.at_scale > 0


def test_the_interval_of_an_extrapolation_has_a_new_measurement_as_often_as_it_says():
    random, noise = np.random.default_rng(0), 0.03  # of what is measured
    x = np.repeat(SIZES, 3)
    inside = 0
    for _ in range(200):
        low, high = scaling_law.fit(x, _law(x) * np.exp(noise * random.normal(size=x.size))).interval(4e6)
        inside += low < _law(4e6) * np.exp(noise * random.normal()) < high
    assert 180 <= inside <= 199  # 190 in the mean


def test_few_measurements_are_refused():
    with pytest.raises(ValueError, match="4 measurements"):
        scaling_law.fit([1, 2, 3], [3, 2, 1])
    with pytest.raises(ValueError, match="three sizes"):
        scaling_law.fit([1, 1, 2, 2], [3, 3, 1, 1])
    with pytest.raises(ValueError, match=r"above 0, and one is 0\.0"):
        scaling_law.fit([1, 2, 3, 4], [3, 2, 1, 0])
