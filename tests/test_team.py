"""Kernels in several threads, in bounds, in processes that share a cache; and the memory they work in."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import timeit
from types import SimpleNamespace

import naive
import numpy as np
import pytest
from conftest import TOLERANCE, parts_of, random_network, random_state, relative_error
from numba import njit

from rnnlab import CELLS
from rnnlab.kernels import LayerWeights, cpu, team
from rnnlab.kernels.calls import Bound, bind, borrow, job, perform
from rnnlab.kernels.compiling import _Files
from rnnlab.kernels.simd import VECTOR_BYTES
from rnnlab.timing import usable_cores

#: Numbers of float64 in one vector register.
V = VECTOR_BYTES // 8


def force(monkeypatch, parties, by_units):
    """Have every kernel run in so many threads; the scaled adjoint shares only sequences."""

    def plan(cell, T, B, I, H, dtype, scaled=False):
        return (min(parties, B), False) if scaled else (parties, by_units)

    monkeypatch.setattr(cpu, "plan", plan)
    monkeypatch.setattr(cpu, "threads", lambda: parties)


# Threads --------------------------------------------------------------------------------------------------------------


SHARED = [(cell, B, B > 1) for cell in CELLS for B in (1, 7)]


@pytest.mark.parametrize(("cell", "B", "halved"), [*SHARED, ("lstm_peephole", 7, False), ("gru", 7, False)])
def test_threads_change_no_bit(monkeypatch, cell, B, halved):
    """Three panels of units in every product, the last ones narrower: so that each of three threads has one.

    Gradients of weights are summed over both halves of a batch apart, or over all of it at once.
    """
    T, I, H = 43, 11, 19 * V - 3
    net, params = random_network(cell, I, H, scale=H**-0.5, seed=1)
    rng = np.random.default_rng(B)
    x, d_output = rng.normal(size=(T, B, I)), rng.normal(size=(T, B, H))
    state, d_final = random_state(rng, net, B), random_state(rng, net, B)
    lengths = None if B == 1 else [T, 1, 40, T, 5, T, 17]
    # Two chunks of one sequence, nine of seven: the last one shorter.
    monkeypatch.setattr(cpu, "chunk_steps", lambda cell, B, H: 40 // B)
    monkeypatch.setattr(cpu, "CACHE", 2**30 if halved else 0)

    def results():
        trace = net.forward(x, state, lengths)
        gradients = net.backward(trace, d_output, d_final)
        lean = net.forward(x, state, lengths, keep=False)
        (scaled,), dx, exponent = net.backpropagate(trace, d_output, d_final, scaled=True)
        return {
            "output": trace.output,
            "states": trace.layers[0].state,
            "final": np.stack(parts_of(trace.final)),
            "output without keeping": lean.output,
            "states without keeping": lean.layers[0].state,
            "dx": gradients.x,
            "dh": gradients.h[0],
            "dc": np.array(gradients.c),
            "dstate": np.stack(parts_of(gradients.state)),
            **{f"d {name}": values for name, values in gradients.params.items()},
            "scaled dstates": scaled.state,
            "scaled dx": dx,
            "exponents": exponent,
        }

    force(monkeypatch, 1, False)
    alone = results()
    textbook = naive.forward(cell, params, x, state, lengths)
    exact = naive.backward(textbook, d_output, d_final)
    assert relative_error(alone["output"], textbook.output) <= TOLERANCE
    assert relative_error(alone["dh"], exact.h[0]) <= TOLERANCE
    for name, want in exact.params.items():
        assert relative_error(alone[f"d {name}"], want) <= TOLERANCE
    for parties, by_units in [(2, True), (3, True)] + ([(2, False), (3, False)] if B > 1 else []):
        force(monkeypatch, parties, by_units)
        together = results()
        for name, want in alone.items():
            np.testing.assert_array_equal(together[name], want, err_msg=f"{name}, {parties} threads, {by_units=}")


@pytest.mark.parametrize("cell", ["lstm_peephole", "gru_reset_before"])
def test_a_batch_stays_shared_when_there_are_fewer_threads(monkeypatch, cell):
    """What three threads saved, two and one take back: with groups of their sequences, to the same bits."""
    net, _ = random_network(cell, 5, 2 * V + 3, scale=0.4, seed=2)
    rng = np.random.default_rng(3)
    x, d_output = rng.normal(size=(9, 7, 5)), rng.normal(size=(9, 7, net.hidden_size))
    force(monkeypatch, 3, False)
    trace = net.forward(x)
    saved = trace.layers[0]
    assert saved.saved.shape[0::3][:2] == (3, 3)  # the last group has one sequence
    want = net.backward(trace, d_output)
    for parties in (2, 1):
        monkeypatch.setattr(cpu, "threads", lambda parties=parties: parties)
        found = net.backward(trace, d_output)
        np.testing.assert_array_equal(found.params.flat, want.params.flat)
        np.testing.assert_array_equal(found.x, want.x)
    force(monkeypatch, 1, False)
    alone = net.forward(x)
    np.testing.assert_array_equal(saved.saved_of(2, 5)[..., :1], alone.layers[0].saved_of(2, 5)[..., :1])
    direct = [cpu.direct(net.cell, of.layers[0], net.weights(0), d_output) for of in (trace, alone)]
    np.testing.assert_array_equal(direct[0].state, direct[1].state)


#: What `threading.get_ident` returns, for compiled code.
_windows = sys.platform == "win32"
_library = ctypes.WinDLL("kernel32") if _windows else ctypes.CDLL(None)  # type: ignore[attr-defined]
thread_id = ctypes.CFUNCTYPE(ctypes.c_ulong)(("GetCurrentThreadId" if _windows else "pthread_self", _library))


@njit(nogil=True)
def record(arguments, counter, mails, parties, by_units, rank):
    """A kernel whose every part notes what it was called with, and how many had come before it went on."""
    team.post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
    notes, number = arguments
    if parties > 1:
        team.wait_for_all(counter, parties)
    for k, note in enumerate((number, parties, np.int64(by_units), counter[0], np.int64(thread_id()))):
        notes[rank, k] = note
    team.wait_until_done(mails, parties, rank)


def notes_of(parties, by_units, number=7):
    notes = np.full((4, 5), -1)
    team.run_together(record, (notes, number), parties, by_units)
    return notes


@pytest.mark.parametrize("by_units", [False, True])
@pytest.mark.parametrize("parties", [1, 2, 3])
def test_every_party_runs_once_in_a_thread_of_its_own(parties, by_units):
    for number in range(50):
        notes = notes_of(parties, by_units, number)
        want = [number, parties, by_units and parties > 1, parties if parties > 1 else 0]
        np.testing.assert_array_equal(notes[:parties, :4], np.array([want] * parties))
        assert (notes[parties:] == -1).all()
        assert notes[0, 4] == threading.get_ident()
        assert len(set(notes[:parties, 4])) == parties
        assert not team._busy.locked()


def test_threads_sleep_when_no_job_comes_and_wake_for_the_next():
    """Asleep they take no time of a processor."""
    for pause in (0, 0.001, 0.1, 0.002, 0.3):
        assert (notes_of(3, True)[:3, 0] == 7).all()
        time.sleep(pause)
    assert len(team._workers) >= 2
    assert all(worker.asleep for worker in team._workers)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05  # two that kept looking would take 0.2 s or more


def test_an_error_of_the_caller_frees_the_team():
    def fails(arguments, counter, mails, parties, by_units, rank):
        raise RuntimeError("before it was posted")

    with pytest.raises(RuntimeError, match="before it was posted"):
        team.run_together(fails, (), 2, False)
    assert not team._busy.locked()
    assert (notes_of(2, False)[:2, 0] == 7).all()


FORK = """
import os
import numpy as np
import rnnlab
from rnnlab.kernels import cpu

cpu.plan = lambda *sizes: (2, False)
net, x = rnnlab.RNN(3, 4, seed=0), np.ones((5, 2, 3), "float32")
want = net.forward(x).output
child = os.fork()
if child == 0:
    os._exit(0 if (net.forward(x).output == want).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    """Those of its parent do not come along: it would wait for them for ever."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "0\n"


def test_while_another_call_has_the_threads_one_party_does_it_all(monkeypatch):
    """Two calls whose threads wait for each other on too few cores would never end."""
    net, _ = random_network("lstm", 5, 3 * V, seed=2)
    x = np.random.default_rng(3).normal(size=(6, 4, 5))
    force(monkeypatch, 2, True)
    want = net.forward(x).output
    with team._busy:
        notes = notes_of(2, True)
        got = net.forward(x).output
    np.testing.assert_array_equal(notes[:, :4], [[7, 1, 0, 0]] + [[-1] * 4] * 3)
    np.testing.assert_array_equal(got, want)
    assert (notes_of(2, True)[:2, 1] == 2).all()


def test_callers_in_many_threads_get_their_own_results(monkeypatch):
    """Some find the team free and some do not; memory goes from one to another."""
    net, _ = random_network("lstm", 5, 3 * V, seed=4)
    inputs = np.random.default_rng(5).normal(size=(4, 90, 30, 5))  # large enough for memory that is used again
    d_output = np.ones((90, 30, 3 * V))

    def result(x):
        trace = net.forward(x)
        return [trace.output, net.backward(trace, d_output).params.flat]

    force(monkeypatch, 1, False)
    want = [result(x) for x in inputs]
    force(monkeypatch, 2, True)
    got = [[] for _ in inputs]

    def caller(k):
        for _ in range(5):
            got[k].append(result(inputs[k]))

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(len(inputs))]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for mine, exact in zip(got, want, strict=True):
        assert len(mine) == 5
        for one in mine:
            for array, right in zip(one, exact, strict=True):
                np.testing.assert_array_equal(array, right)


@njit
def _draw_and_add(rng, scale, pair, target):
    target += scale * rng.normal(0, 1, len(target)) + pair[0] + pair[1][0]


@njit
def _twice(call):
    perform(call)
    perform(call)


def test_a_bound_call_keeps_what_it_was_given():
    """Its arguments are unpacked once: numbers as they were, arrays and generators as they are at each call."""
    target, offset = np.zeros((7, 2))[:, 0], np.ones(1)
    call = bind(_draw_and_add, np.random.default_rng(0), 2.0, (3, offset), target)
    offset[:] = 10
    junk = [bind(_draw_and_add, np.random.default_rng(k), 1.0, (0, offset), np.zeros(14)[::2]) for k in range(20)]
    gc.collect()  # of these views and generators nobody else knows
    counts = sys.getrefcount(target), sys.getrefcount(offset)
    _twice(call.call)
    want = 2 * np.random.default_rng(0).normal(0, 1, (2, 7)).sum(0) + 26
    np.testing.assert_allclose(target, want, rtol=1e-14)  # six roundings of numbers of that size
    for other in junk:
        _twice(other.call)
    assert (sys.getrefcount(target), sys.getrefcount(offset)) == counts
    _twice(Bound().call)  # nothing to do


# Bounds ---------------------------------------------------------------------------------------------------------------

CANARY = 12345
_EDGE = 1024


class GuardedMemory:
    """Allocates arrays between canaries: `empty` ones are full of NaN."""

    def __init__(self):
        self._given = []

    def full(self, shape, dtype, fill):
        size = int(np.prod(shape))
        memory = np.full(size + 2 * _EDGE, CANARY, dtype)
        array = memory[_EDGE : _EDGE + size].reshape(shape)
        array[...] = fill
        self._given.append((memory, array.shape))
        return array

    def empty(self, shape, dtype):
        return self.full(shape, dtype, np.nan)

    def zeros(self, shape, dtype=float):
        return self.full(shape, dtype, 0)

    def broken(self):
        """The shapes of the arrays around which something was written."""
        edges = [(np.concatenate([memory[:_EDGE], memory[-_EDGE:]]), shape) for memory, shape in self._given]
        return [shape for edge, shape in edges if (edge != CANARY).any()]


def amid_nan(a):
    """A copy of `a` with NaN before and behind it: what is read there spoils a result."""
    memory = np.full(a.size + 2 * _EDGE, np.nan, a.dtype)
    memory[_EDGE : _EDGE + a.size] = a.reshape(-1)
    return memory[_EDGE : _EDGE + a.size].reshape(a.shape)


def layer_results(cell, arrays, exponent):
    x, weights, state, lengths, d_output, d_final = arrays
    trace = cpu.forward(cell, x, weights, state, lengths)
    lean = cpu.forward(cell, x, weights, state, lengths, False)
    plain = cpu.backward(cell, trace, weights, d_output, d_final)
    scaled = cpu.backward(cell, trace, weights, d_output, d_final, exponent)
    saved = trace.saved_of(0, len(x)).transpose(0, 2, 3, 1, 4)
    saved = saved.reshape(*x.shape[:2], saved.shape[2], -1)
    kept = [
        trace.state,
        saved[..., : d_output.shape[2]],
        trace.reset_h,
        lean.state,
    ]  # lanes past the last unit are free
    return [*kept, plain.state, plain.x, *plain.weights, scaled.state, scaled.x, scaled.exponent]


BOUNDS = [(cell, "float64") for cell in CELLS] + [("rnn_tanh", "float32"), ("lstm", "float32")]


@pytest.mark.parametrize(("cell", "dtype"), BOUNDS)
def test_kernels_stay_in_bounds_and_read_nothing_unset(monkeypatch, cell, dtype):
    """Canaries around all that is written, NaN around all that is read and in all memory that is not yet written."""
    cell, dtype = CELLS[cell], np.dtype(dtype)
    G, S, P = len(cell.gates), len(cell.states), len(cell.peepholes)
    shapes = [(1, 1, 1, 1), (5, 2, 4, 17), (9, 7, 3, 50), (4, 1, 70, 70), (3, 30, 2, 33), (300, 1, 2, 17)]
    shapes += [(40, 7, 2, 1)]  # as the one before it: three chunks of steps
    monkeypatch.setattr(cpu, "chunk_steps", lambda cell, B, H: 100 // B)
    for T, B, I, H in shapes:
        rng = np.random.default_rng(T)
        sizes = ((G * H, I), (G * H, H), (G * H,), (G * H,), (P * H,))
        weights = LayerWeights(*(amid_nan(rng.normal(0, H**-0.5, size).astype(dtype)) for size in sizes))
        x, state, d_output, d_final = (
            amid_nan(rng.normal(size=size).astype(dtype)) for size in ((T, B, I), (S, B, H), (T, B, H), (S, B, H))
        )
        lengths, exponent = rng.integers(1, T + 1, B), rng.integers(-9, 9, (T, B))
        arrays = x, weights, state, lengths, d_output, d_final
        with monkeypatch.context() as patch:
            force(patch, 1, False)
            want = layer_results(cell, arrays, exponent)
        for parties, by_units in [(1, False), (2, True), (3, True)] + ([(2, False)] if B > 1 else []):
            memory = GuardedMemory()
            with monkeypatch.context() as patch:
                force(patch, parties, by_units)
                patch.setattr(cpu, "empty", memory.empty)
                # The kernels are compiled by now: this is read by no function but those in Python.
                patch.setattr(cpu, "np", SimpleNamespace(**{**vars(np), "zeros": memory.zeros}))
                got = layer_results(cell, arrays, exponent)
            assert memory.broken() == []
            for mine, right in zip(got, want, strict=True):
                assert np.isfinite(mine).all()
                np.testing.assert_array_equal(mine, right)


def test_borrowed_arrays_are_the_same_memory_and_leave_no_reference():
    @njit
    def write(arguments, value):
        number, (array, _) = borrow(arguments)
        part = array[1:]
        part[0] = value
        return number

    array = np.zeros(3)
    before = sys.getrefcount(array)
    for value in range(5):
        assert write((7, (array, 1.5)), value) == 7
    assert array.tolist() == [0, 4, 0]
    assert sys.getrefcount(array) == before


# Two processes and one cache ------------------------------------------------------------------------------------------

PRODUCTS = """
import sys
import numpy as np
from rnnlab.kernels.compiling import cached
from rnnlab.kernels.products import multiply
from rnnlab.kernels.simd import VECTOR_BYTES, address

dtype = np.dtype("float32")

def kernel(group):
    times, row = multiply(group, dtype), group * VECTOR_BYTES // 4

    @cached(f"group-{group}")
    def product(out, start, a, packed, rows, depth):
        places = address(out, 0), row, address(start, 0), 0, address(a, 0), depth, address(packed, 0)
        times(*places, depth, rows, 0, 1, 1)

    return product, row

for group in map(int, sys.argv[1:]):
    product, row = kernel(group)
    a, packed = np.arange(15, dtype=dtype), np.ones(5 * row, dtype)
    out = np.zeros(3 * row + 512, dtype)
    product(out, np.zeros(row, dtype), a, packed, 3, 5)
    print(sum(product.stats.cache_hits.values()), *np.flatnonzero(np.diff(out)), *np.unique(out))
"""


def test_kernels_from_the_cache_compute_what_they_did_in_the_process_that_compiled_them(tmp_path):
    """A kernel from the cache brings functions with it; none may bear the name of another one in this process."""
    program = tmp_path / "products.py"
    program.write_text(PRODUCTS)

    def output(*groups):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, str(program), *groups]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    compiled, loaded = output("1"), output("4", "1")  # functions get the same numbers from Numba in both processes
    width = VECTOR_BYTES // 4
    assert compiled == [f"0 {width - 1} {2 * width - 1} {3 * width - 1} 0.0 10.0 35.0 60.0"]
    assert loaded[1] == "1" + compiled[0][1:]


def test_two_types_of_one_kernel_are_kept_in_files_of_their_own(tmp_path):
    """Processes that compile for two types at once must not take one file for both: its name says what it holds."""
    files = [_Files(str(tmp_path), "kernel", stamp) for stamp in ("old", "new", "new")]
    files[0].save("float32", "old code")
    files[1].save("float32", "float32 code")
    files[2]._load_index = dict  # what a process sees that looked before the other one wrote
    files[2].save("float64", "float64 code")
    del files[2]._load_index
    assert files[2].load("float64") == "float64 code"
    assert files[1].load("float32") is None  # to be compiled again, and never another one's
    files[1].save("float32", "float32 code")
    assert [files[0].load("float32"), files[1].load("float32"), files[2].load("float64")] == [
        None,
        "float32 code",
        "float64 code",
    ]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_kept(monkeypatch):
    """No memory is kept from other tests."""
    gc.collect()
    monkeypatch.setattr(team, "_free", {})
    return team._free


LARGE = (1 << 15,)  # numbers of float64: 256 KiB


def start(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 5), (1 << 13,), (3, 5, 1 << 13), (1 << 16, 3)])
def test_empty_gives_aligned_arrays_that_do_not_overlap(shape, dtype):
    arrays = [team.empty(shape, np.dtype(dtype)) for _ in range(4)]
    for k, array in enumerate(arrays):
        assert (array.shape, array.dtype) == (shape, np.dtype(dtype))
        assert start(array) % 64 == 0 or array.size == 0
        assert array.flags.c_contiguous
        assert array.flags.aligned
        assert array.flags.writeable
        array[...] = k
    assert all((array == k).all() for k, array in enumerate(arrays))


def test_memory_of_a_large_array_is_used_again(nothing_kept):
    dtype = np.dtype(np.float64)
    first = team.empty(LARGE, dtype)
    where = start(first)
    second = team.empty(LARGE, dtype)
    assert start(second) != where
    del first
    gc.collect()
    again = team.empty(LARGE, dtype)
    assert start(again) == where
    other = team.empty(LARGE, dtype)
    assert start(other) not in (where, start(second))


@pytest.mark.parametrize(
    "view", [lambda a: a[5:9], lambda a: a.reshape(2, -1)[1], lambda a: a.view(np.int64)[3:], lambda a: memoryview(a)]
)
def test_a_view_keeps_its_memory(nothing_kept, view):
    dtype = np.dtype(np.float64)
    whole = team.empty(LARGE, dtype)
    whole[...] = 3
    where, part = start(whole), view(whole)
    part[0] = 7
    want = np.array(part)
    del whole
    gc.collect()
    assert nothing_kept == {}
    others = [team.empty(LARGE, dtype) for _ in range(3)]
    for other in others:
        assert start(other) != where
        other[...] = 0
    np.testing.assert_array_equal(part, want)
    del part
    gc.collect()
    assert start(team.empty(LARGE, dtype)) == where


def test_no_more_memory_is_kept_than_the_limit(nothing_kept, monkeypatch):
    dtype = np.dtype(np.float64)
    size = team.empty(LARGE, dtype).nbytes
    gc.collect()
    nothing_kept.clear()
    monkeypatch.setattr(team, "_KEPT", 5 * size)
    arrays = [team.empty(LARGE, dtype) for _ in range(9)] + [team.empty((2 * LARGE[0],), dtype) for _ in range(3)]
    del arrays[:]
    gc.collect()
    kept = sum(memory.nbytes for memories in nothing_kept.values() for memory in memories)
    assert 4 * size < kept <= 5 * size


def test_an_array_that_outlives_the_package_ends_in_silence():
    """A module that was there before is taken down after it."""
    code = (
        "import logging, numpy as np; from rnnlab.kernels.team import empty; logging.kept = empty({}, np.dtype('f8'))"
    )
    ended = subprocess.run([sys.executable, "-c", code.format(LARGE)], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_small_arrays_are_not_kept(nothing_kept):
    for _ in range(10):
        team.empty((100,), np.dtype(np.float64))
    gc.collect()
    assert nothing_kept == {}


@pytest.mark.skipif(usable_cores() < 2, reason="two threads on one core show nothing")
@pytest.mark.parametrize("shape", [(100, 1, 32), (100, 1, 256), (100, 20, 50), (60, 32, 128)])
def test_the_plan_is_about_as_fast_as_the_fastest(monkeypatch, shape):
    """The best times of each plan: the one that the cost model takes needs no more than half as much again.

    They take turns until that shows, for some seconds: what else runs may have one of two cores meanwhile.
    """
    T, B, H = shape
    monkeypatch.setattr(team, "threads", lambda: 2)
    net, _ = random_network("lstm", H, H, dtype="float32")
    x = np.zeros((T, B, H), np.float32)
    chosen = team.plan(net.cell, T, B, H, H, net.dtype)
    assert chosen == min(
        [(1, False), (2, True), *([(2, False)] if B > 1 else [])],
        key=lambda plan: team.predicted_seconds(net.cell, T, B, H, H, net.dtype, *plan),
    )
    best, end = {chosen: np.inf}, time.monotonic() + 10
    while best[chosen] > 1.5 * min(best.values()) or len(best) < 2:
        for parties, by_units in [(1, False), (2, True), *([(2, False)] if B > 1 else [])]:
            force(monkeypatch, parties, by_units)
            net.forward(x)
            took = min(timeit.repeat(lambda: net.forward(x), number=1, repeat=15))
            best[parties, by_units] = min(took, best.get((parties, by_units), np.inf))
        if time.monotonic() > end:
            break
    assert best[chosen] <= 1.5 * min(best.values()), best


def test_memory_of_sizes_that_nobody_asks_for_makes_room(monkeypatch):
    """Work on other shapes must not find what is kept full of those before: fresh pages cost more than arithmetic."""
    gc.collect()  # what earlier tests have left
    monkeypatch.setattr(team, "_free", {})
    monkeypatch.setattr(team, "_KEPT", 8 << 20)
    before = [team.empty((3 << 20,), np.dtype(np.uint8)) for _ in range(2)]
    del before
    assert {size: len(kept) for size, kept in team._free.items()} == {3 << 20: 2}
    first = team.empty((4 << 20,), np.dtype(np.uint8))
    place = first.ctypes.data
    del first
    assert {size: len(kept) for size, kept in team._free.items()} == {3 << 20: 1, 4 << 20: 1}
    second = team.empty((4 << 20,), np.dtype(np.uint8))
    assert second.ctypes.data == place
    larger = team.empty((9 << 20,), np.dtype(np.uint8))  # than all that may be kept
    del second, larger
    assert {size: len(kept) for size, kept in team._free.items()} == {3 << 20: 1, 4 << 20: 1}
