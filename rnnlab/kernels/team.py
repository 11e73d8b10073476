"""Threads that run one kernel together, and the memory that kernels work in."""

import contextlib
import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from ..cells import Cell
from . import Array, threads
from .calls import draw_ticket, invoke, tickets_drawn
from .compiling import cached
from .products import panel_units, share
from .simd import VECTOR_BYTES, address

__all__ = ["CACHE", "Party", "empty", "groups_of", "plan", "post", "predicted_seconds", "run_together", "shares"]
__all__ += ["wait_for_all", "wait_until_done"]

# Memory -------------------------------------------------------------------------------------------------------------

#: Bytes below which memory is not worth keeping.
_SMALL = 1 << 17

#: Bytes of freed arrays that are kept for the next call: fresh pages cost more than the arithmetic on them.
_KEPT = 1 << 30

_LINE = 64  # bytes of a cache line, which no register should straddle

_free: dict[int, list[NDArray[np.uint8]]] = {}


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return what np.empty does, on a cache line; large arrays in memory that earlier ones have left."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    if size < _SMALL:
        return np.ndarray(shape, dtype, _new(size))
    step = 1 << (size.bit_length() - 4)
    size = -(-size // step) * step
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        memory = _new(size)
    # Not an array, so that views of the result refer to it, and not to the memory behind it.
    lease = _lease(size).from_address(memory.ctypes.data)
    lease.memory = memory
    return np.ndarray(shape, dtype, lease)


def _new(size: int) -> NDArray[np.uint8]:
    """Return so many bytes that begin on a cache line."""
    memory = np.empty(size + _LINE, np.uint8)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory.data)) % _LINE
    return memory[begin : begin + size]


@cache
def _lease(size: int) -> Any:
    """Return the type of so many bytes in `memory`, which is kept for others when they are gone."""

    def leave(lease: Any) -> None:
        if _keep is not None:  # at the interpreter's end names are gone before the last arrays are
            _keep(size, lease.memory)

    return type("Lease", (ctypes.Array,), {"_type_": ctypes.c_char, "_length_": size, "__del__": leave})


def _counters(count: int) -> NDArray[np.int64]:
    """Return zeros in cache lines that nothing else shares."""
    counters = empty((-(-count // _MAIL) * _MAIL,), np.dtype(np.int64))
    counters[:] = 0
    return counters


def _keep(size: int, memory: NDArray[np.uint8]) -> None:
    """Keep the memory of a freed array for the next of its size; where it is too much, sizes freed longest ago go."""
    if size > _KEPT:
        return
    _free[size] = [*_free.pop(size, []), memory]
    with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # another thread does the same
        while sum(size * len(kept) for size, kept in list(_free.items())) > _KEPT:
            oldest = next(iter(_free))
            _free[oldest] = _free[oldest][1:]
            if not _free[oldest]:
                del _free[oldest]


# Threads ------------------------------------------------------------------------------------------------------------


#: What a plan counts with, in seconds: a thread takes up work; threads wait for each other; the cell on V units.
_START, _BARRIER, _CELL = 5e-6, 5e-7, 1.5e-8

#: FLOPs a core and second per byte of a vector register; bytes/s that all cores read from beyond their own caches, and
#: the size of those.
_RATE, _STREAM, CACHE = 4e9, 1.2e11, 2**20

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
    streaming = T * weights * parties / _STREAM if weights > CACHE else 0.0
    waiting = (_START + (T * _BARRIER if by_units else 0.0)) if parties > 1 else 0.0
    return arithmetic + streaming + T * rows * units * _CELL + waiting


def plan(
    cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], by_sequences: bool = False
) -> tuple[int, bool]:
    """Return how many threads run a sequence, and whether they share the hidden units (or else the batch).

    Numbers are the same whatever the plan. `by_sequences` shares the batch: the scaled adjoint, for one, looks at all
    units of a sequence.
    """
    return _plan(cell, T, B, I, H, dtype, by_sequences, threads())


@lru_cache(4096)
def _plan(
    cell: Cell, T: int, B: int, I: int, H: int, dtype: np.dtype[Any], by_sequences: bool, limit: int
) -> tuple[int, bool]:
    found = [(1, False)]
    for parties in range(2, limit + 1):
        found += [(parties, False)] if parties <= B else []
        found += [(parties, True)] if not by_sequences else []
    return min(found, key=lambda one: predicted_seconds(cell, T, B, I, H, dtype, *one))


class Party(NamedTuple):
    """One of the threads of a call, for compiled code: it has a share of the units, or else of the sequences."""

    counter: NDArray[np.int64]
    parties: int
    by_units: bool
    rank: int


@njit
def shares(count, most, me):
    """Return which of `count` things, dealt out `most` at a time, are for a `Party`: first and last."""
    return share(count, most, me.rank, me.parties), share(count, most, me.rank + 1, me.parties)


@njit
def groups_of(B, M, me):
    """Return which of the groups of M sequences are for a `Party`: where units are shared all."""
    groups = (B + M - 1) // M
    return range(groups) if me.by_units else range(groups * me.rank // me.parties, groups * (me.rank + 1) // me.parties)


_let_others_run = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

#: How often a waiting thread looks before it lets another run on its core, some 50 µs; and before it falls asleep.
_LOOKS, _PATIENCE = 100_000, 1_000_000


@njit
def wait_for_all(counter, parties):
    """Return once `parties` threads have called this with the same `counter` (one int64, 0 at first)."""
    here = address(counter, 0)
    _wait_for(here, (draw_ticket(here) + parties - 1) // parties * parties)


@njit
def _wait_for(counter, tickets):
    """Return once so many tickets have been drawn from the counter at this address."""
    looks = 0
    while tickets_drawn(counter) < tickets:
        looks += 1
        if looks > _LOOKS:
            _let_others_run()


# What a mail consists of, one line of cache a thread: how many jobs were posted and done, and the last one.
_POSTED, _DONE, _CODE, _FRAME, _RANK, _MAIL = 0, 1, 2, 3, 4, _LINE // 8


@njit
def post(mails, parties, rank, code, frame):
    """Have the threads behind `mails` do a `job` as ranks 1, 2, …; only rank 0 does so."""
    for other in range(1, parties if rank == 0 else 0):
        mail = (other - 1) * _MAIL
        mails[mail + _CODE], mails[mail + _FRAME], mails[mail + _RANK] = code, frame, other
        draw_ticket(address(mails, mail + _POSTED))


@njit
def wait_until_done(mails, parties, rank):
    """Return once the jobs of `post` are done."""
    for other in range(1, parties if rank == 0 else 0):
        mail = (other - 1) * _MAIL
        _wait_for(address(mails, mail + _DONE), mails[mail + _POSTED])


@cached("threads")
def _serve(mail, looks):
    """Do the jobs that are posted, until none has come for so many looks."""
    done, looked = mail[_DONE], 0
    while looked < looks:
        looked += 1
        if tickets_drawn(address(mail, _POSTED)) > done:
            invoke(mail[_CODE], mail[_FRAME], mail[_RANK])
            done, looked = draw_ticket(address(mail, _DONE)), 0


class _Worker(threading.Thread):
    """A thread that takes up jobs within a microsecond while it is awake, and falls asleep when none come.

    Awake it needs no GIL. What it and the caller say to each other in Python is ordered by the GIL.
    """

    def __init__(self, mail: NDArray[np.int64]):
        super().__init__(name="rnnlab", daemon=True)
        self.mail, self.asleep, self.expected, self.core = mail, True, False, -1
        self.bell: SimpleQueue[None] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self.bell.get()
            while not self.asleep:
                _serve(self.mail, _PATIENCE)
                self.asleep = True
                if self.expected:
                    self.asleep = False


#: The threads that there are, and room for the mails of as many as there may be.
_workers: list[_Worker] = []
_mails = _counters(1024 * _MAIL)

#: What the threads of the call at work wait at.
_counter = _counters(1)

#: Held by the call whose threads are at work: those of two calls could wait for each other for ever.
_busy = threading.Lock()


def _forget() -> None:
    """Begin without threads: they do not survive a fork."""
    global _workers, _mails, _busy
    _workers, _mails, _busy = [], _counters(_mails.size), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

_current_core = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else None

#: The counter and the mails of a kernel that is alone, which looks at neither.
_ALONE = np.zeros(1, np.int64)


def _cores(parties: int) -> list[int]:
    """Return a core for each party, the caller's first, because the scheduler may leave them all there; or −1."""
    if _current_core is not None:
        cores, here = sorted(os.sched_getaffinity(0)), _current_core()
        if len(cores) >= parties and here in cores:
            at = cores.index(here)
            return [cores[(at + k) % len(cores)] for k in range(parties)]
    return [-1] * parties


def _wake(count: int) -> list[_Worker]:
    """Return so many threads that are awake, and stay so until they are no longer `expected`."""
    while len(_workers) < count:
        mail = _mails[len(_workers) * _MAIL :][:_MAIL]
        _serve(mail, 0)  # compiled before a thread needs it
        _workers.append(_Worker(mail))
    team = _workers[:count]
    for worker in team:
        worker.expected = True
    here = -1 if _current_core is None else _current_core()
    if any(worker.asleep or worker.core == here for worker in team):
        for worker, core in zip(team, _cores(count + 1)[1:], strict=True):
            if core not in (-1, worker.core):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(worker.native_id or 0, {core})
                    worker.core = core
            if worker.asleep:
                worker.asleep = False
                worker.bell.put(None)
    return team


def run_together(kernel: Callable[..., Any], arguments: tuple[Any, ...], parties: int, by_units: bool) -> None:
    """Call kernel(arguments, counter, mails, parties, by_units, 0), which is to `post` itself to the other threads.

    While those are at work for another caller it is alone.
    """
    if parties == 1 or not _busy.acquire(blocking=False):
        kernel(arguments, _ALONE, _ALONE, 1, False, 0)
        return
    try:
        _wake(parties - 1)
        _counter[0] = 0
        kernel(arguments, _counter, _mails, parties, by_units, 0)
    finally:
        for worker in _workers:
            worker.expected = False
        _busy.release()
