"""Loss prediction: the law L = a * C**b + c fitted to small models and extrapolated to larger ones.

The law and its use with muP are those of muScaling and nanoLM (arXiv 2304.06875): the models differ in width only and
are trained on the same data in the same order, and their losses are taken at the same step. C is the number of
parameters in millions (or the width, with other values of a and b and the same meaning of c). c is the limit of the
loss at infinite width.

The fit is unweighted least squares. For a given b the best a and c follow from linear regression, so only b is
searched, over its whole range (variable projection; Golub and Pereyra 1973). That needs no starting point and finds the
global minimum; on their own tables, the published scripts reach the same one by descent from (a, b, c) = (1, -1, 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.errors import UserError

PARAMETERS = 3
LEAST_POINTS = 4  # one more than parameters: without a residual no error can be estimated
LEVEL = 0.95  # probability of a prediction interval

STEEPEST, FLATTEST = -8.0, -1e-3  # range of b; beyond the flat end the law is a logarithm, without a finite limit
_GRID = 200
_SECTIONS = 60
_LEAST_EFFECT = 1e-30  # change of the losses when b changes by 1, as a fraction of their range
_SHRINK = (math.sqrt(5) - 1) / 2

# b must be two standard deviations from zero: otherwise the data do not tell a curve with a limit from one without.
MOST_RELATIVE_SD = 0.5


@dataclass(frozen=True)
class Fit:
    """A fitted law. The covariance is that of (a * smallest**b, b, c): the fit divides sizes by the smallest one, so
    that powers lie between 0 and 1 and steep laws stay well-conditioned.
    """

    a: float
    b: float
    c: float
    a_sd: float
    b_sd: float
    c_sd: float
    residual_sd: float  # sqrt(sum of squared residuals / (points - 3))
    points: int
    smallest: float
    largest: float
    covariance: np.ndarray  # [3, 3] float64

    def loss(self, size: float) -> float:
        """The law at ``size``."""
        return self.a * size**self.b + self.c


@dataclass(frozen=True)
class Forecast:
    """Predicted loss at one size, the interval in which a single new measurement lies with probability LEVEL, and the
    measured loss, if any.
    """

    size: float
    predicted: float
    low: float
    high: float
    measured: float | None = None

    @property
    def error(self) -> float | None:
        """predicted / measured - 1."""
        return None if self.measured is None else self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        return None if self.measured is None else self.low <= self.measured <= self.high


def fit_law(sizes: Sequence[float], losses: Sequence[float]) -> Fit:
    """Least-squares fit of ``losses`` [N] over ``sizes`` [N], N >= 4, sizes positive and all different.

    Standard deviations are those of the linearised problem, as from scipy's curve_fit: the residual variance times the
    inverse of J^T J. UserError for fewer points, invalid values, or losses that do not determine a curve.
    """
    size, loss = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if size.shape != loss.shape or size.ndim != 1:
        raise ValueError(f"sizes and losses: two vectors of one length, got {size.shape} and {loss.shape}")
    if len(size) < LEAST_POINTS:
        raise UserError(f"a fit of a, b, c and their errors needs at least {LEAST_POINTS} points, found {len(size)}")
    if not (np.isfinite(size).all() and (size > 0).all() and np.isfinite(loss).all()):
        raise UserError("sizes must be positive, sizes and losses finite numbers")
    if len(np.unique(size)) < len(size):
        raise UserError("a size appears twice; give one loss for each")
    if (loss == loss[0]).all():
        raise UserError("the loss does not change with size, so no curve can be fitted; check the table")
    smallest = float(size.min())
    u = np.log(size / smallest)
    b = _best_exponent(u, loss)
    slope, offset, residual = _line(b, u, loss)
    alpha, c = slope / b, offset - slope / b
    residual_sd = math.sqrt(float(residual @ residual) / (len(size) - PARAMETERS))
    jacobian = _jacobian(alpha, b, u)
    if np.abs(jacobian[:, 1]).max() < _LEAST_EFFECT * np.ptp(loss):
        raise UserError("the points do not determine a curve (its exponent has no effect); check the table")
    covariance = residual_sd**2 * _inverse_normal(jacobian)
    # a = alpha * smallest**-b, so its variance follows from those of alpha and b (delta method).
    factor = smallest**-b
    to_a = factor * np.array([1.0, -alpha * math.log(smallest), 0.0])
    return Fit(
        a=alpha * factor,
        b=b,
        c=c,
        a_sd=math.sqrt(max(float(to_a @ covariance @ to_a), 0.0)),
        b_sd=math.sqrt(covariance[1, 1]),
        c_sd=math.sqrt(covariance[2, 2]),
        residual_sd=residual_sd,
        points=len(size),
        smallest=smallest,
        largest=float(size.max()),
        covariance=covariance,
    )


def forecast(fit: Fit, size: float, measured: float | None = None, level: float = LEVEL) -> Forecast:
    """The law at ``size`` with a prediction interval.

    Half its width is Student's quantile for points - 3 degrees of freedom times sqrt(g^T covariance g + residual
    variance), where g is the law's gradient in its parameters: the uncertainty of the fit and the scatter of one run
    around the law. The interval is linearised and assumes that the law holds, so it does not cover a change of regime
    beyond the fitted sizes.
    """
    if not size > 0:
        raise ValueError(f"size: must be positive, got {size}")
    alpha = fit.a * fit.smallest**fit.b
    gradient = _jacobian(alpha, fit.b, np.log(np.array([size / fit.smallest])))[0]
    variance = float(gradient @ fit.covariance @ gradient) + fit.residual_sd**2
    half = student_quantile(level, fit.points - PARAMETERS) * math.sqrt(max(variance, 0.0))
    predicted = fit.loss(size)
    return Forecast(size, predicted, predicted - half, predicted + half, measured)


def weaknesses(fit: Fit, sizes: Sequence[float], losses: Sequence[float]) -> list[str]:
    """Reasons to distrust a forecast from ``fit``, which was fitted to these points; empty if there are none."""
    found = []
    points = sorted(zip(sizes, losses, strict=True))
    rises = [(s, t) for (s, one), (t, two) in zip(points, points[1:], strict=False) if two > one]
    if rises:
        (s, t), more = rises[0], f" and {len(rises) - 1} more times" if len(rises) > 1 else ""
        found.append(f"the loss is not monotonic: it rises from size {s:g} to {t:g}{more}")
    if fit.a <= 0:
        found.append("the fitted loss rises with size (a is not positive)")
    if fit.b >= FLATTEST * 1.01:
        found.append("the points show no limit: they fall like log(size) or faster, so c is arbitrary")
    elif fit.b <= STEEPEST * 0.99:
        found.append("the points fall to their limit at once (b is at the end of its range), so b is arbitrary")
    if fit.b_sd > MOST_RELATIVE_SD * abs(fit.b):
        found.append(
            f"b is {fit.b:.3f} with a standard deviation of {fit.b_sd:.3g}, more than {MOST_RELATIVE_SD:.0%} of it: "
            "the points do not determine how the loss flattens"
        )
    return found


def student_quantile(level: float, freedom: int) -> float:
    """t with P(-t < T < t) = ``level`` for Student's T with ``freedom`` >= 1 degrees of freedom."""
    if not 0 < level < 1 or freedom < 1:
        raise ValueError(f"level in (0, 1) and freedom >= 1, got {level} and {freedom}")
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _student_mass(theta: float, freedom: int) -> float:
    """P(-t < T < t) for t = sqrt(freedom) tan(theta): Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    total, term = 0.0, cosine if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _line(b: float, u: np.ndarray, loss: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Linear regression of ``loss`` on z = (e^(b u) - 1) / b: slope, offset and residual.

    Unlike e^(b u), z is not degenerate when b is almost zero.
    """
    z = np.expm1(b * u) / b
    centred = z - z.mean()
    slope = float(centred @ (loss - loss.mean()) / (centred @ centred))
    offset = float(loss.mean() - slope * z.mean())
    return slope, offset, loss - offset - slope * z


def _best_exponent(u: np.ndarray, loss: np.ndarray) -> float:
    """The b in [STEEPEST, FLATTEST] with the smallest sum of squares: a grid, then golden-section search."""

    def cost(b: float) -> float:
        residual = _line(b, u, loss)[2]
        return float(residual @ residual)

    grid = -np.geomspace(-STEEPEST, -FLATTEST, _GRID)
    best = int(np.argmin([cost(b) for b in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    left, right = high - _SHRINK * (high - low), low + _SHRINK * (high - low)
    cost_left, cost_right = cost(left), cost(right)
    for _ in range(_SECTIONS):
        if cost_left <= cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - _SHRINK * (high - low)
            cost_left = cost(left)
        else:
            low, left, cost_left = left, right, cost_right
            right = low + _SHRINK * (high - low)
            cost_right = cost(right)
    return (low + high) / 2


def _jacobian(alpha: float, b: float, u: np.ndarray) -> np.ndarray:
    """[N, 3]: derivatives of alpha e^(b u) + c by alpha, b and c."""
    power = np.exp(b * u)
    return np.stack([power, alpha * power * u, np.ones_like(u)], axis=1)


def _inverse_normal(jacobian: np.ndarray) -> np.ndarray:
    """(J^T J)^-1 by QR of J with columns scaled to unit length; UserError unless J has full rank."""
    lengths = np.linalg.norm(jacobian, axis=0)
    triangle = np.linalg.qr(jacobian / lengths, mode="r")
    if np.abs(np.diag(triangle)).min() < 1e-14:
        raise UserError("the points do not determine a curve (its parameters are not identifiable); check the table")
    inverse = np.linalg.inv(triangle) / lengths[:, None]
    return inverse @ inverse.T
