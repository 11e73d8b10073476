"""How time is measured: interleaved in one process, warm, as medians and paired ratios with their spread."""

import importlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .kernels.simd import CHAINS, VECTOR_BYTES, run_chains

__all__ = ["Ratio", "bandwidth", "cuda_clock", "interleave", "peak_flops", "pin", "ratio", "thread_environment"]
__all__ += ["usable_cores", "wall_clock"]

Seconds = NDArray[np.float64]
Clock = Callable[[Callable[[], Any]], float]

_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class Ratio(NamedTuple):
    """A paired ratio: the median over pairs of peer's time / our time, and its quartiles."""

    median: float
    low: float
    high: float


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment in which every library, ours included, starts with so many threads.

    Libraries read it when they are imported. XLA reads none of these: it counts the cores it may run on, so pin the
    process to as many cores too (os.sched_setaffinity).
    """
    return dict.fromkeys(_THREAD_LIMITS, str(threads))


def pin(threads: int) -> bool:
    """Keep this process to so many cores, or return False if its libraries were started with other threads."""
    if any(os.environ.get(name) != value for name, value in thread_environment(threads).items()):
        return False
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    return True


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wall_clock(call: Callable[[], Any]) -> float:
    """Return the seconds that `call` takes; it must return only when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock(call: Callable[[], Any]) -> float:
    """Return the seconds between two CUDA events around `call` on the legacy default stream, CuPy's and PyTorch's."""
    cuda: Any = importlib.import_module("cupy").cuda
    start, end = cuda.Event(), cuda.Event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) * 1e-3


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (7, 200),
    sample: float = 5e-3,
    pause: float = 0.02,
    clock: Clock = wall_clock,
) -> dict[str, Seconds]:
    """Time `calls` in turn (a, b, c, a, b, c, …) and return the seconds of each in every round.

    Each call is warm before the clock starts. A call shorter than `sample` seconds is repeated within a round, so that
    no sample is much shorter. As many rounds run as fit into `seconds`, but no fewer and no more than `rounds`.

    The threads of one library go on spinning for milliseconds when their work is done, and would take the core of the
    next: before each sample everyone sleeps until all are quiet for `pause` seconds. A core that has slept has lost its
    caches and predicted branches, and the first call may take twice as long as the fifth: so the call then runs untimed
    for as long again, at least once. The order alternates.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(sample / max(clock(call), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    count = 0
    while count < rounds[0] or (count < rounds[1] and time.perf_counter() - start < seconds):
        names = list(calls) if count % 2 == 0 else list(calls)[::-1]
        for name in names:
            _wait_until_quiet(pause)
            _warm_up(calls[name], pause, clock)
            samples[name].append(_repeated(calls[name], repeats[name], clock))
        count += 1
    return {name: np.array(values) for name, values in samples.items()}


def _wait_until_quiet(pause: float, most: float = 1.0) -> None:
    """Sleep `pause` seconds at a time until this process takes under a tenth of a core, for `most` seconds at most."""
    start, busy = time.perf_counter(), pause
    while busy > 0.1 * pause and time.perf_counter() - start < most:
        before = time.process_time()
        time.sleep(pause)
        busy = time.process_time() - before


def _warm_up(call: Callable[[], Any], seconds: float, clock: Clock) -> None:
    """Run a call for so many seconds, at least once; the clock waits for a GPU."""
    start = time.perf_counter()
    clock(call)
    while time.perf_counter() - start < seconds:
        clock(call)


def _repeated(call: Callable[[], Any], count: int, clock: Clock) -> float:
    def several() -> None:
        for _ in range(count):
            call()

    return clock(several) / count


def ratio(ours: Seconds, peer: Seconds) -> Ratio:
    """Return peer / ours, pair by pair, so that what slows both of a pair cancels. Above 1, ours is faster."""
    low, median, high = np.quantile(peer / ours, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


def peak_flops(dtype: DTypeLike = "float32", threads: int = 1) -> float:
    """Measure the FLOP/s that `threads` cores reach together on fused multiply-adds in registers, the best of forty."""
    number, count = np.dtype(dtype), 2_000_000
    x = np.full(1, 0.5, number)[0]
    flops = 2.0 * CHAINS * (VECTOR_BYTES // number.itemsize) * count * threads
    return flops / _together(lambda _: run_chains(x, count), threads)


def bandwidth(threads: int = 1, megabytes: int = 64) -> float:
    """Measure the bytes/s that `threads` cores move together (STREAM's add, a + b → c), the best of forty.

    McCalpin (1995). `megabytes` is the size of each array; three of them must exceed the caches.
    """
    size = megabytes * 2**20 // 8
    arrays = [[np.ones(size) for _ in range(3)] for _ in range(threads)]
    return 3.0 * 8 * size * threads / _together(lambda k: np.add(arrays[k][0], arrays[k][1], out=arrays[k][2]), threads)


def _together(work: Callable[[int], Any], threads: int, repeats: int = 40) -> float:
    """Return the least seconds in which `threads` threads each did their work, on a core of its own if there is one."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []

    def alone(k: int) -> None:
        if cores:
            os.sched_setaffinity(0, {cores[k % len(cores)]})  # of this thread: the scheduler may leave all on one
        work(k)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(alone, range(threads)))
        return min(wall_clock(lambda: list(pool.map(alone, range(threads)))) for _ in range(repeats))
