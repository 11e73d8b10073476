"""The clockwork: order, pairing, ratios, and limits that no program can pass."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

from rnnlab import timing


def test_calls_take_turns_in_alternating_order():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    ticks = iter(range(10_000))

    def clock(call):
        call()
        order.append("|")
        return float(next(ticks) + 1)

    times = timing.interleave(calls, seconds=0, rounds=(4, 4), pause=0, clock=clock)
    assert all(len(seconds) == 4 for seconds in times.values())
    rounds = "".join(order).split("|")[2:-1]  # after the first look at each: an untimed call and a timed one a sample
    assert rounds == [*"aabbbbaa"] * 2


def test_a_call_runs_untimed_for_as_long_as_the_core_has_slept(monkeypatch):
    now, calls = [0.0], []

    def nap(seconds):
        now[0] += seconds

    def clock(call):
        start = now[0]
        call()
        calls.append(now[0] - start)
        return calls[-1]

    monkeypatch.setattr(timing, "time", SimpleNamespace(sleep=nap, perf_counter=lambda: now[0], process_time=lambda: 0))
    for pause, warm in ((0, 1), (0.02, 7)):  # of 3 ms each
        calls.clear()
        timing.interleave({"call": lambda: nap(3e-3)}, seconds=0, rounds=(1, 1), pause=pause, clock=clock)
        np.testing.assert_allclose(calls, [3e-3] * (1 + warm) + [6e-3])  # a look, the warm-up, a sample of 5 ms or more


def test_short_calls_are_repeated_within_a_sample():
    counts = {"n": 0}

    def call():
        counts["n"] += 1
        time.sleep(1e-4)

    times = timing.interleave({"call": call}, seconds=0, rounds=(3, 3), sample=5e-3, pause=0)["call"]
    assert counts["n"] > 3 * 10  # sleeping 0.1 ms takes 0.1 to 0.3 ms: at least 16 to a sample of 5 ms
    assert (times >= 1e-4).all()
    assert np.median(times) < 2e-3  # of one call: a sample takes more


@pytest.mark.parametrize(("busy", "naps"), [([], 1), ([1, 1], 3), ([0.05], 1), ([1] * 1000, 50)])
def test_a_sample_waits_until_threads_of_other_libraries_are_quiet(monkeypatch, busy, naps):
    """Sleeps of 20 ms, in each of which the process took a share `busy` of a core: a second in all at the most."""
    now, used, shares = [0.0], [0.0], iter(busy)

    def sleep(seconds):
        now[0] += seconds
        used[0] += seconds * next(shares, 0)

    clocks = SimpleNamespace(sleep=sleep, perf_counter=lambda: now[0], process_time=lambda: used[0])
    monkeypatch.setattr(timing, "time", clocks)
    timing._wait_until_quiet(0.02)
    assert round(now[0] / 0.02) in (naps, naps + 1)  # the last one may end a rounding before the second is over


def test_ratio_is_paired():
    ours = np.array([1.0, 2.0, 4.0, 8.0])
    exact = timing.ratio(ours, 3 * ours)
    assert (exact.low, exact.median, exact.high) == (3, 3, 3)
    assert timing.ratio(ours, np.array([1.0, 4.0, 12.0, 32.0])).median == 2.5


def test_measured_limits_are_physical():
    # What else runs on the machine can only lower a measured limit: the best of each is taken, in turns, until both
    # were undisturbed. Half the lanes give half the rate; 0.3 allows for a clock that follows the load and still tells
    # 2 from 1 and from 4.
    peak = half = 0.0
    for _ in range(50):
        peak = max(peak, timing.peak_flops("float32"))
        half = max(half, timing.peak_flops("float64"))
        if peak / half == pytest.approx(2, rel=0.3):
            break
    assert peak / half == pytest.approx(2, rel=0.3)
    # 1 GHz with one 4-lane FMA pipeline at the least, 6 GHz with two 16-lane ones at the most
    assert 8e9 <= peak <= 6e9 * 2 * 16 * 2
    x = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    product = 2 * 256**3 / min(timing.wall_clock(lambda: x @ x) for _ in range(20))
    cores = timing.usable_cores()
    assert product < 1.1 * cores * peak  # BLAS cannot pass it; a clock that follows the load may be 10 % faster
    assert 5e8 < timing.bandwidth(megabytes=32) < 1e12  # less than one channel of DDR3, more than a socket's caches


def test_pin_wants_an_environment_that_libraries_started_with(monkeypatch):
    cores = os.sched_getaffinity(0)
    for name, value in timing.thread_environment(1).items():
        monkeypatch.setenv(name, value)
    assert not timing.pin(2)
    try:
        assert timing.pin(1)
        assert timing.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
