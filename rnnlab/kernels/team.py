"""Threads that run one kernel together, and the memory that kernels work in."""

import ctypes
import math
import os
import sys
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


_current_core = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else None


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rnnlab")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork

#: Held by the call whose threads are at work: those of two calls could wait for each other for ever.
_busy = threading.Lock()

_place = threading.local()


def _run_beside(core: int, cores: list[int], call: Callable[..., Any], *arguments: Any) -> None:
    """Run `call` in this thread, on another core than the caller's, where the scheduler may leave it for a while."""
    if core >= 0 and getattr(_place, "core", None) != core:
        os.sched_setaffinity(0, {core})
        _place.core = core
    call(*arguments)


def run_together(kernel: Callable[..., Any], arguments: tuple[Any, ...], parties: int, by_units: bool) -> None:
    """Call kernel(*arguments, counter, rank, parties, by_units) in as many threads as there are parties."""
    counter = np.zeros(1, np.int64)
    if parties == 1 or not _busy.acquire(blocking=False):
        kernel(*arguments, counter, 0, 1, False)
        return
    try:
        cores = sorted(os.sched_getaffinity(0)) if _current_core else []
        here = cores.index(_current_core()) if len(cores) >= parties else 0
        others = []
        for k in range(1, parties):
            core = cores[(here + k) % len(cores)] if len(cores) >= parties else -1
            others.append(
                _pool(parties - 1).submit(_run_beside, core, cores, kernel, *arguments, counter, k, parties, by_units)
            )
        kernel(*arguments, counter, 0, parties, by_units)
        for other in others:
            other.result()
    finally:
        _busy.release()
