"""Checks of arguments, each error naming the argument, what it got and what it takes; and seeds."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels import Array
from .kernels.finite import all_finite

__all__ = ["check_array", "check_choice", "check_dtype", "check_flag", "check_integer", "check_lengths", "check_number"]
__all__ += ["generator"]


def check_array(
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    dtype: np.dtype[Any],
    past: Callable[[Array], NDArray[np.bool_]] | None = None,
) -> Array:
    """Return `value` as a C-contiguous array after checking type, dtype, shape and that every number is finite.

    `shape` gives a number for a fixed dimension and a letter for a free one; a free one may not be 0. Where `past` of
    the array is true nothing counts: the result is 0 there. Raises TypeError for type and dtype, else ValueError.
    """
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a numpy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}")
    fits = value.shape == shape or (
        len(value.shape) == len(shape)
        and all(got == want if isinstance(want, int) else got > 0 for got, want in zip(value.shape, shape, strict=True))
    )
    if not fits:
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must have shape {wanted} with no empty dimension, got {value.shape}")
    if past is not None:
        value = np.where(past(value), dtype.type(0), value)
    if not value.flags.carray:  # not contiguous, not aligned or read-only: kernels are compiled for none of these
        value = np.array(value, order="C")
    if not all_finite(value):
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise ValueError(f"{name} must be finite, got {value[first]} at index {first}")
    checked: Array = value
    return checked


def check_lengths(name: str, value: Any, batch: int, steps: int) -> NDArray[np.int64]:
    """Return sequence lengths as int64 (B,), each in 1…T; None stands for T throughout."""
    if value is None:
        return np.full(batch, steps, np.int64)
    try:
        lengths = np.asarray(value)
    except ValueError:  # a ragged list
        lengths = np.empty(0, object)
    if lengths.dtype.kind not in "iu" or lengths.shape != (batch,):
        raise ValueError(
            f"{name} must be {batch} integers, one a sequence, got {lengths.dtype} of shape {lengths.shape}"
        )
    if lengths.min() < 1 or lengths.max() > steps:
        raise ValueError(f"{name} must lie in 1…{steps}, got {lengths.min()}…{lengths.max()}")
    return lengths.astype(np.int64)


def check_dtype(name: str, value: Any) -> np.dtype[Any]:
    """Return the dtype if it is float32 or float64."""
    try:
        known = "" if value is None else np.dtype(value).name
    except TypeError:
        known = ""
    if known not in ("float32", "float64"):
        raise ValueError(f"{name} must be one of float32, float64, got {value!r}")
    return np.dtype(known)


def check_number(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    """Return `value` if it is a finite number in [low, high), or with `above` in (low, high)."""
    number = not isinstance(value, bool) and isinstance(value, int | float | np.integer | np.floating)
    if not (number and low <= value < high and np.isfinite(value) and not (above and value == low)):
        raise ValueError(f"{name} must be a finite number in {'(' if above else '['}{low}, {high}), got {value!r}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_integer(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return `value` if it is an integer of at least `least` and, where that is given, at most `most`."""
    fits = not isinstance(value, bool) and isinstance(value, int | np.integer)
    if not (fits and least <= value and (most is None or value <= most)):
        wanted = f"of at least {least}" if most is None else f"in {least}…{most}"
        raise ValueError(f"{name} must be an integer {wanted}, got {value!r}")
    return int(value)


def generator(seed: int | None, purpose: str) -> np.random.Generator:
    """Return the random numbers that `seed` holds for one purpose; those of different purposes are independent."""
    if seed is None:
        return np.random.default_rng()
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be None or an integer of at least 0, got {seed!r}")
    return np.random.default_rng([int(seed), *purpose.encode()])
