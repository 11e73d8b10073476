"""Threads that run one kernel together, and the memory that kernels work in."""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cells import Cell
from . import threads

__all__ = ["empty", "plan", "run_together"]

Array = NDArray[Any]

#: A second thread costs about as much as this many FLOPs take on one core.
_WORTH_A_THREAD = 2e7


# Memory -------------------------------------------------------------------------------------------------------------

#: Bytes below which memory is not worth keeping.
_SMALL = 1 << 16

#: Bytes of freed arrays that are kept for the next call: fresh pages cost more than the arithmetic on them.
_KEPT = 1 << 30

_LINE = 64  # bytes of a cache line, which no register should straddle

_free: dict[int, list[NDArray[np.uint8]]] = {}


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return what np.empty does, on a cache line; large arrays in memory that earlier ones have left."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        memory = np.empty(size + _LINE, np.uint8)
        return np.ndarray(shape, dtype, memory, -memory.ctypes.data % _LINE)
    step = 1 << (size.bit_length() - 4)
    size = -(-size // step) * step
    kept = _free.get(size)
    memory = kept.pop() if kept else np.empty(size + _LINE, np.uint8)
    # Not an array, so that views of the result refer to it, and not to the memory behind it.
    lease = (ctypes.c_char * size).from_address(memory.ctypes.data + -memory.ctypes.data % _LINE)
    weakref.finalize(lease, _keep, size, memory).atexit = False
    return np.ndarray(shape, dtype, lease)


def _keep(size: int, memory: NDArray[np.uint8]) -> None:
    if sum(size * len(kept) for size, kept in list(_free.items())) + size <= _KEPT:
        _free.setdefault(size, []).append(memory)


# Threads ------------------------------------------------------------------------------------------------------------

def plan(cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], scaled: bool = False) -> tuple[int, bool]:
    """Return how many threads run a sequence, and whether they share the hidden units (or else the batch)."""
    flops = 2.0 * T * B * len(cell.gates) * H * (H + I)
    parties = max(1, min(threads(), B, int(flops / _WORTH_A_THREAD)))
    return parties, False


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rnnlab")


_busy = threading.Lock()


def run_together(kernel: Callable[..., Any], arguments: tuple[Any, ...], parties: int, by_units: bool) -> None:
    """Call kernel(*arguments, counter, rank, parties, by_units) in as many threads as there are parties."""
    counter = np.zeros(1, np.int64)
    if parties == 1 or not _busy.acquire(blocking=False):
        kernel(*arguments, counter, 0, 1, False)
        return
    try:
        others = [_pool(parties - 1).submit(kernel, *arguments, counter, k, parties, by_units) for k in range(1, parties)]
        kernel(*arguments, counter, 0, parties, by_units)
        for other in others:
            other.result()
    finally:
        _busy.release()
