"""Threads that run one kernel together, and the memory that kernels work in."""

import ctypes
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from ..cells import Cell
from . import threads
from .products import panel_units
from .simd import VECTOR_BYTES, draw_ticket, tickets_drawn

__all__ = ["empty", "plan", "predicted_seconds", "run_together", "wait_for_all"]

Array = NDArray[Any]

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
        return np.ndarray(shape, dtype, memory, -memory.__array_interface__["data"][0] % _LINE)
    step = 1 << (size.bit_length() - 4)
    size = -(-size // step) * step
    kept = _free.get(size)
    memory = kept.pop() if kept else np.empty(size + _LINE, np.uint8)
    # Not an array, so that views of the result refer to it, and not to the memory behind it.
    lease = (ctypes.c_char * size).from_address(memory.ctypes.data + -memory.ctypes.data % _LINE)
    weakref.finalize(lease, _keep, size, memory).atexit = False
    return np.ndarray(shape, dtype, lease)  # type: ignore[arg-type]


def _keep(size: int, memory: NDArray[np.uint8]) -> None:
    if sum(size * len(kept) for size, kept in list(_free.items())) + size <= _KEPT:
        _free.setdefault(size, []).append(memory)


# Threads ------------------------------------------------------------------------------------------------------------


#: What a plan counts with, in seconds: a thread takes up work; threads wait for each other; the cell on V units.
_START, _BARRIER, _CELL = 6e-5, 5e-7, 1.5e-8

#: FLOPs a core and second per byte of a vector register; bytes/s that all cores read from beyond their own caches, and
#: the size of those.
_RATE, _STREAM, _CACHE = 4e9, 1.2e11, 2**20

#: The share of that rate that tiles of 1, 2, 3 and more rows reach.
_SHARE = (0.35, 0.65, 0.8, 1.0)


def predicted_seconds(
    cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], parties: int, by_units: bool
) -> float:
    """Return about how long a forward pass takes: the arithmetic of the slowest thread, its weights, and waiting."""
    G, lanes = len(cell.gates), VECTOR_BYTES // dtype.itemsize
    units, rows = -(-H // lanes), B
    if by_units:
        most = panel_units(G, one_row=B == 1)
        units = -(-units // (most * parties)) * most
    else:
        rows = -(-B // parties)
    flops = 2.0 * T * rows * units * lanes * G * (H + I)
    arithmetic = flops / (_RATE * VECTOR_BYTES * 4 / dtype.itemsize * _SHARE[min(rows, 4) - 1])
    weights = units * lanes * G * H * dtype.itemsize
    streaming = T * weights * parties / _STREAM if weights > _CACHE else 0.0
    waiting = (_START + (T * _BARRIER if by_units else 0.0)) if parties > 1 else 0.0
    return arithmetic + streaming + T * rows * units * _CELL + waiting


def plan(cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], scaled: bool = False) -> tuple[int, bool]:
    """Return how many threads run a sequence, and whether they share the hidden units (or else the batch).

    Numbers are the same whatever the plan. The scaled adjoint looks at all units of a sequence: it shares the batch.
    """
    return _plan(cell, T, B, I, H, dtype, scaled, threads())


@lru_cache(4096)
def _plan(
    cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], scaled: bool, limit: int
) -> tuple[int, bool]:
    found = [(1, False)]
    for parties in range(2, limit + 1):
        found += [(parties, False)] if parties <= B else []
        found += [(parties, True)] if not scaled else []
    return min(found, key=lambda one: predicted_seconds(cell, T, B, I, H, dtype, *one))


_let_others_run = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

#: How often a waiting thread looks before it lets another run on its core: some 50 µs.
_LOOKS = 100_000


@njit(nogil=True)
def wait_for_all(counter, parties):
    """Return once `parties` threads have called this with the same `counter` (one int64, 0 at first)."""
    last = (draw_ticket(counter) + parties - 1) // parties * parties
    looks = 0
    while tickets_drawn(counter) < last:
        looks += 1
        if looks > _LOOKS:
            _let_others_run()


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rnnlab")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork

_current_core = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else None

#: Held by the call whose threads are at work: those of two calls could wait for each other for ever.
_busy = threading.Lock()

_place = threading.local()


def _cores(parties: int) -> list[int]:
    """Return a core for each party, the caller's first, because the scheduler may leave them all there; or −1."""
    if _current_core is not None:
        cores, here = sorted(os.sched_getaffinity(0)), _current_core()
        if len(cores) >= parties and here in cores:
            at = cores.index(here)
            return [cores[(at + k) % len(cores)] for k in range(parties)]
    return [-1] * parties


def _run_on(core: int, kernel: Callable[..., Any], *arguments: Any) -> None:
    """Run `kernel` in this thread, on that core if it is not −1."""
    if core not in (-1, getattr(_place, "core", -1)):
        os.sched_setaffinity(0, {core})  # of this thread
        _place.core = core
    kernel(*arguments)


def run_together(kernel: Callable[..., Any], arguments: tuple[Any, ...], parties: int, by_units: bool) -> None:
    """Call kernel(*arguments, counter, rank, parties, by_units) in as many threads as there are parties."""
    counter = np.zeros(1, np.int64)
    if parties == 1 or not _busy.acquire(blocking=False):
        kernel(*arguments, counter, 0, 1, False)
        return
    try:
        calls = [
            (core, kernel, *arguments, counter, rank, parties, by_units) for rank, core in enumerate(_cores(parties))
        ]
        others = [_pool(parties - 1).submit(_run_on, *call) for call in calls[1:]]
        kernel(*calls[0][2:])
        for other in others:
            other.result()
    finally:
        _busy.release()
