"""A saturating power law through measurements: how a figure falls as something grows, and what to expect beyond.

y = floor + factor * x^-exponent, as Hestness et al. 2017 (arXiv 1712.00409, section 4) found of validation losses. The
fit is least squares of log y, since what is small also varies less (Hoffmann et al. 2022, arXiv 2203.15556, section
3.3, fit logarithms too); its intervals are those of a linear model around it (the delta method).
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

_EXPONENTS = (1e-3, 5.0)
FEWEST = 4  # points; three parameters leave the interval at least one degree of freedom
FEWEST_SIZES = 3
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """y = floor + at_scale * (x / scale)^-exponent.

    Attributes:
      floor: what is left however large x grows.
      at_scale: what more there is at x = scale.
      exponent: by which that falls.
      scale: the geometric mean of the x that were fitted.
      covariance: of (floor, at_scale, exponent), [3, 3].
      residual_variance: of a measurement's logarithm around the law's.
      degrees_of_freedom: measurements less parameters.
    """

    floor: float
    at_scale: float
    exponent: float
    scale: float
    covariance: np.ndarray
    residual_variance: float
    degrees_of_freedom: int

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """The law at x, [...] to [...]."""
        return _law(np.array([self.floor, self.at_scale, self.exponent]), np.asarray(x) / self.scale)

    def interval(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """In which a new measurement at x, [...], lies with 95% confidence: (low, high), [...] each."""
        relative = np.asarray(x) / self.scale
        jacobian = _log_jacobian(np.array([self.floor, self.at_scale, self.exponent]), relative)
        variance = np.einsum("...i,ij,...j", jacobian, self.covariance, jacobian) + self.residual_variance
        reach = np.exp(stats.t.ppf((1 + _CONFIDENCE) / 2, self.degrees_of_freedom) * np.sqrt(variance))
        return self(x) / reach, self(x) * reach


def _law(parameters: np.ndarray, relative: np.ndarray) -> np.ndarray:
    floor, at_scale, exponent = parameters
    return floor + at_scale * relative**-exponent


def _log_jacobian(parameters: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Derivatives of the law's logarithm by its parameters, [..., 3]."""
    _, at_scale, exponent = parameters
    power = relative**-exponent
    gradient = np.stack([np.ones_like(power), power, -at_scale * power * np.log(relative)], axis=-1)
    return gradient / _law(parameters, relative)[..., None]


def fit(x: ArrayLike, y: ArrayLike) -> ScalingLaw:
    """The law through measurements y > 0, [n], at x > 0, [n]; the floor is not negative.

    Raises:
      ValueError: there are fewer than four measurements, or fewer than three different x, or one is not positive.
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
    """The parameters of least squares of y itself: linear but for the exponent, which is tried out."""

    def solved(exponent: float) -> tuple[float, np.ndarray]:
        matrix = np.stack([np.ones_like(relative), relative**-exponent], axis=1)
        solution, error = optimize.nnls(matrix, values)
        return error, np.array([*np.maximum(solution, 1e-9), exponent])

    return min((solved(exponent) for exponent in np.geomspace(0.01, 4, 100)), key=lambda pair: pair[0])[1]
