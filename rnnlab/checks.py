"""Checks of arguments: each error names the argument, what it got and what it takes."""

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_array", "check_choice", "check_lengths", "check_positive"]


def check_array(name: str, value: Any, shape: tuple[int | str, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return `value` as a C-contiguous array after checking type, dtype, shape and that every number is finite.

    `shape` gives a number for a fixed dimension and a letter for a free one; a free one may not be 0.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}")
    fits = len(value.shape) == len(shape) and all(
        got == want if isinstance(want, int) else got > 0 for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name} must have shape {wanted} with no empty dimension, got {value.shape}")
    if not np.isfinite(value).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(value))[0])
        raise ValueError(f"{name} must be finite, got {value[first]} at index {first}")
    return np.ascontiguousarray(value)


def check_lengths(name: str, value: Any, batch: int, steps: int) -> NDArray[np.int64]:
    """Return sequence lengths as int64 (B,), each in 1…T; None stands for T throughout."""
    if value is None:
        return np.full(batch, steps, np.int64)
    lengths = np.asarray(value)
    if lengths.dtype.kind not in "iu" or lengths.shape != (batch,):
        raise ValueError(
            f"{name} must be {batch} integers, one a sequence, got {lengths.dtype} of shape {lengths.shape}"
        )
    if lengths.min() < 1 or lengths.max() > steps:
        raise ValueError(f"{name} must lie in 1…{steps}, got {lengths.min()}…{lengths.max()}")
    return lengths.astype(np.int64)


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_positive(name: str, value: Any) -> int:
    """Return `value` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
