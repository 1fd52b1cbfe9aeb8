"""Scaling laws: fits a saturating power law to measurements, with prediction intervals for extrapolation.

y = floor + factor * x^-exponent, as Hestness et al. 2017 (arXiv 1712.00409, section 4) found for validation losses. The
fit is least squares in log y, since small values also vary less (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3,
fit logarithms too). The intervals linearize the law around the fit (the delta method).
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

_EXPONENTS = (1e-3, 5.0)
FEWEST = 4  # points: with three parameters, one degree of freedom is left for the interval
FEWEST_SIZES = 3
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """y = floor + at_scale * (x / scale)^-exponent.

    Attributes:
      floor: the limit for large x.
      at_scale: y - floor at x = scale.
      exponent: how fast y approaches the floor.
      scale: the geometric mean of the fitted x.
      covariance: of (floor, at_scale, exponent), [3, 3].
      residual_variance: of log y.
      degrees_of_freedom: number of measurements minus number of parameters.
    """

    floor: float
    at_scale: float
    exponent: float
    scale: float
    covariance: np.ndarray
    residual_variance: float
    degrees_of_freedom: int

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Predicts y at x, [...] to [...]."""
        return _law(np.array([self.floor, self.at_scale, self.exponent]), np.asarray(x) / self.scale)

    def interval(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The 95% prediction interval for a new measurement at x, [...]: (low, high), [...] each."""
        relative = np.asarray(x) / self.scale
        jacobian = _log_jacobian(np.array([self.floor, self.at_scale, self.exponent]), relative)
        variance = np.einsum("...i,ij,...j", jacobian, self.covariance, jacobian) + self.residual_variance
        reach = np.exp(stats.t.ppf((1 + _CONFIDENCE) / 2, self.degrees_of_freedom) * np.sqrt(variance))
        return self(x) / reach, self(x) * reach


def _law(parameters: np.ndarray, relative: np.ndarray) -> np.ndarray:
    floor, at_scale, exponent = parameters
    return floor + at_scale * relative**-exponent


def _log_jacobian(parameters: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Derivatives of log y with respect to the parameters, [..., 3]."""
    _, at_scale, exponent = parameters
    power = relative**-exponent
    gradient = np.stack([np.ones_like(power), power, -at_scale * power * np.log(relative)], axis=-1)
    return gradient / _law(parameters, relative)[..., None]


def fit(x: ArrayLike, y: ArrayLike) -> ScalingLaw:
    """Fits the law to measurements y > 0, [n], at x > 0, [n], with floor >= 0.

    Raises:
      ValueError: fewer than four measurements, fewer than three distinct x, or a y that is not positive.
    """
    sizes, values = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(sizes) < FEWEST or len(np.unique(sizes)) < FEWEST_SIZES:
        raise ValueError(f"a power law needs {FEWEST} measurements or more, at three sizes or more, not {len(sizes)}")
    if values.min() <= 0:
        raise ValueError(f"a power law needs measurements above 0, and one is {values.min()}")
    scale = float(np.exp(np.log(sizes).mean()))
    relative = sizes / scale
    found = optimize.least_squares(
        lambda parameters: np.log(_law(parameters, relative)) - np.log(values),
        _start(relative, values),
        jac=lambda parameters: _log_jacobian(parameters, relative),  # pyright: ignore[reportArgumentType]
        bounds=([0, 1e-12, _EXPONENTS[0]], [np.inf, np.inf, _EXPONENTS[1]]),
        x_scale="jac",
    )
    freedom = len(values) - 3
    variance = float(np.square(found.fun).sum()) / freedom
    covariance = variance * np.linalg.pinv(found.jac.T @ found.jac)
    floor, at_scale, exponent = map(float, found.x)
    return ScalingLaw(floor, at_scale, exponent, scale, covariance, variance, freedom)


def _start(relative: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Initial parameters: least squares in y, which is linear once the exponent is fixed, over a grid of exponents."""

    def solved(exponent: float) -> tuple[float, np.ndarray]:
        matrix = np.stack([np.ones_like(relative), relative**-exponent], axis=1)
        solution, error = optimize.nnls(matrix, values)
        return error, np.array([*np.maximum(solution, 1e-9), exponent])

    return min((solved(exponent) for exponent in np.geomspace(0.01, 4, 100)), key=lambda pair: pair[0])[1]
