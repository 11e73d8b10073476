"""What several runs say together: shares and averages with their intervals."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, t

from .checks import check_integer, check_number

__all__ = ["bootstrap", "columns", "t_interval", "wilson"]


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the share of successes and the ends of its interval: Wilson (1927), as advised by Brown et al. (2001).

    Raises ValueError for no trials, more successes than trials and a confidence outside (0, 1).
    """
    check_integer("trials", trials)
    check_integer("successes", successes, 0, trials)
    check_number("confidence", confidence, 0, 1, above=True)
    interval = binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return successes / trials, float(interval.low), float(interval.high)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the statistic of independent values and the ends of its percentile interval (Efron 1979).

    `statistic` reduces an array along `axis`, as np.mean and np.median do. The interval of a single value is NaN.
    Raises ValueError for values that are not one-dimensional, empty or not finite, and for options out of range.
    """
    sample = _sample(values)
    rng, tail = np.random.default_rng(seed), (1 - check_number("confidence", confidence, 0, 1, above=True)) / 2
    picks = rng.integers(sample.size, size=(check_integer("resamples", resamples), sample.size))
    low, high = np.quantile(statistic(sample[picks], axis=1), [tail, 1 - tail]) if sample.size > 1 else (np.nan, np.nan)
    return float(statistic(sample, axis=0)), float(low), float(high)


def t_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of independent values and the ends of its interval by Student's t distribution (1908).

    For a handful of values: the bootstrap of five from a normal distribution misses their mean in 15 of 100 cases where
    it promises 5. The interval of a single value is NaN. Raises ValueError as `bootstrap`.
    """
    sample, inside = _sample(values), check_number("confidence", confidence, 0, 1, above=True)
    mean, count = float(sample.mean()), sample.size
    if count == 1:
        return mean, float("nan"), float("nan")
    half = float(t.ppf((1 + inside) / 2, count - 1) * sample.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def _sample(values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not sample.size or not np.isfinite(sample).all():
        raise ValueError(f"values must be a list of at least one finite number, got {values!r}")
    return sample


def columns(name: str, interval: tuple[float, float, float]) -> dict[str, float]:
    """Return a value and its interval as columns of a tidy table, named as the functions of `plots` take them."""
    return dict(zip((name, f"low_{name}", f"high_{name}"), interval, strict=True))
