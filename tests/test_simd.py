"""Moves of a vector register, and the barrier of threads."""

import threading

import numpy as np
import pytest
from numba import njit

from rnnlab.kernels.simd import VECTOR_BYTES, address, move
from rnnlab.kernels.team import wait_for_all


@njit
def moved(target, to, source, start, count):
    move(target, to, source, start, count)


@njit
def place(array, index):
    return address(array, index)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_move_copies_so_many_numbers_and_touches_no_other(dtype):
    """At any alignment and beside any neighbour; a count above V is one register."""
    V = VECTOR_BYTES // np.dtype(dtype).itemsize
    source = np.arange(1, 4 * V + 1).astype(dtype)
    for count in range(V + 4):
        n = min(count, V)
        for to, start in ((0, 0), (1, 2), (V - 1, V), (3 * V - n, 4 * V - n)):
            target, want = np.full(3 * V, -1, dtype), np.full(3 * V, -1, dtype)
            want[to : to + n] = source[start : start + n]
            moved(target, to, source, start, count)
            np.testing.assert_array_equal(target, want)
    np.testing.assert_array_equal(source, np.arange(1, 4 * V + 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_move_reads_nothing_past_its_count(dtype):
    """Also within one array, from one half to the other; a NaN next to the numbers stays where it is."""
    V = VECTOR_BYTES // np.dtype(dtype).itemsize
    for count in range(V + 1):
        array = np.full(2 * V, np.nan, dtype)
        array[:count] = np.arange(count)
        moved(array, V, array, 0, count)
        np.testing.assert_array_equal(array[V : V + count], np.arange(count))
        assert np.isnan(array[V + count :]).all()


def test_address_is_that_of_the_number():
    array = np.zeros(9, np.float32)
    assert [place(array, i) for i in (0, 1, 8)] == [array.ctypes.data + 4 * i for i in (0, 1, 8)]
    assert place(array[3:], 2) == array.ctypes.data + 20


@njit(nogil=True)
def rounds_together(counter, cells, rank, rounds):
    """Count how often another thread's cell did not hold the round that all have finished."""
    parties, wrong = cells.shape[1], 0
    for n in range(rounds):
        cells[n % 2, rank] = n  # two rows: who is ahead writes where nobody reads
        wait_for_all(counter, parties)
        for k in range(parties):
            wrong += cells[n % 2, k] != n
    return wrong


@pytest.mark.parametrize(("parties", "rounds"), [(1, 1000), (2, 20_000), (3, 2_000)])
def test_barrier_holds_until_all_have_come(parties, rounds):
    """Every thread sees what every other wrote before it came, in every round, though some run ahead."""
    counter, cells = np.zeros(1, np.int64), np.full((2, parties), -1, np.int64)
    rounds_together(np.zeros(1, np.int64), np.zeros((2, 1), np.int64), 0, 1)  # compiled before threads start
    wrong = [None] * parties

    def run(rank):
        wrong[rank] = rounds_together(counter, cells, rank, rounds)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * parties
    assert counter[0] == parties * rounds
