"""How sure a number is: bootstrap over users, paired differences, Holm's correction, intervals over seeds.

Rows of one user are not independent, so users are resampled, not rows. One call draws the same users for
every column it is given; differences of columns are therefore paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from reasonrec.tokenizers.errors import UserError

DRAWS = 2000
# A normal-theory test at 5% two-sided sees an effect of 2.8 standard errors (1.96 + 0.84) with a power of
# 80%.
MDE_FACTOR = 2.8
_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True)
class Difference:
    """A paired difference between two rows of a table.

    Attributes:
        value: Mean of a minus mean of b.
        low: Lower end of the 95% interval.
        high: Upper end.
        p: Two-sided bootstrap p-value, at least 2/(draws+1).
        mde: The smallest true difference that such a comparison would detect with a power of 80%.
    """

    value: float
    low: float
    high: float
    p: float
    mde: float


@dataclass(frozen=True)
class SeedInterval:
    """Mean over training seeds with a t-interval.

    Attributes:
        mean: Mean over the seeds.
        low: Lower end of the interval; NaN for a single seed.
        high: Upper end.
        n: Number of seeds.
        descriptive: True below five seeds: such an interval describes the runs, it confirms nothing.
    """

    mean: float
    low: float
    high: float
    n: int
    descriptive: bool


def bootstrap_means(
    users: ArrayLike, values: ArrayLike, *, where: ArrayLike | None = None, draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Resample users with replacement and take the mean over the rows of the resampled users.

    The mean is a ratio of sums (rows of the drawn users over their number), so users with many rows weigh
    more, as they do in the mean of the table. The same seed draws the same users in every call with the
    same users.

    Args:
        users: User of each row (rows,).
        values: Per-row values (rows,) or (rows, columns).
        where: Which rows count, (rows,) or (rows, columns); all by default. For slices.
        draws: Number of resamples.
        seed: Seed of the draws.

    Returns:
        Means (draws, columns); NaN where a draw holds no row that counts.

    Raises:
        UserError: If there are no rows, or the lengths differ.
    """
    users, values = np.asarray(users), np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if len(users) == 0 or len(users) != len(values):
        raise UserError(
            f"{len(users)} users and {len(values)} rows of values: pass one user per row, at least one row"
        )
    counted = np.ones_like(values) if where is None else np.broadcast_to(_as_columns(where), values.shape)
    _, user = np.unique(users, return_inverse=True)
    n_users, columns = int(user.max()) + 1, values.shape[1]
    sums = np.zeros((n_users, 2 * columns))
    np.add.at(sums, user, np.hstack([np.where(counted > 0, values, 0.0), counted]))
    rng = np.random.default_rng(seed)
    result = np.empty((draws, columns))
    step = max(1, _CHUNK_CELLS // n_users)
    for start in range(0, draws, step):
        n = min(step, draws - start)
        drawn = rng.integers(n_users, size=(n, n_users)) + np.arange(n)[:, None] * n_users
        weights = np.bincount(drawn.ravel(), minlength=n * n_users).reshape(n, n_users).astype(np.float64)
        totals = weights @ sums
        with np.errstate(invalid="ignore", divide="ignore"):
            result[start : start + n] = totals[:, :columns] / totals[:, columns:]
    return result


def _as_columns(where: ArrayLike) -> NDArray[np.float64]:
    where = np.asarray(where, dtype=np.float64)
    return where[:, None] if where.ndim == 1 else where


def percentile_interval(means: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the draws of one column; NaN draws are left out.

    Returns:
        Lower and upper end; both NaN if no draw counts.
    """
    counted = np.asarray(means, dtype=np.float64)
    counted = counted[~np.isnan(counted)]
    if counted.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(counted, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(users: ArrayLike, values: NDArray[np.floating], *, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over rows, such as of paired differences, with users drawn again (rows,)."""
    return percentile_interval(bootstrap_means(users, values[:, None], seed=seed)[:, 0])


def paired_difference(draws_a: ArrayLike, draws_b: ArrayLike, value: float) -> Difference:
    """Interval, p-value and detectable effect of a difference whose draws share their users.

    Args:
        draws_a: Draws of a (draws,), a column of `bootstrap_means`.
        draws_b: Draws of b from the same call, or from one with the same users and seed.
        value: The difference of the two means on the data themselves.
    """
    draws = np.asarray(draws_a, dtype=np.float64) - np.asarray(draws_b, dtype=np.float64)
    draws = draws[~np.isnan(draws)]
    low, high = percentile_interval(draws)
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
    return Difference(value=value, low=low, high=high, p=p, mde=MDE_FACTOR * float(draws.std()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction over the claims of one table.

    Args:
        p_values: The p-value of each claim.

    Returns:
        Adjusted p-values in the same order; a claim holds at level α if its value is at most α.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def seed_interval(values: Sequence[float], level: float = 0.95) -> SeedInterval:
    """T-interval of the mean over training seeds.

    Args:
        values: One number per seed.
        level: Coverage.

    Raises:
        UserError: If there is no value.
    """
    n = len(values)
    if n == 0:
        raise UserError("no seeds given: an interval over seeds needs at least two runs, five to confirm anything")
    mean = float(np.mean(values))
    if n == 1:
        return SeedInterval(mean=mean, low=float("nan"), high=float("nan"), n=1, descriptive=True)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return SeedInterval(mean=mean, low=mean - half, high=mean + half, n=n, descriptive=n < 5)
