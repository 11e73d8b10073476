"""Moves of a vector register, tiles of a product, and the barrier of threads."""

import threading

import numpy as np
import pytest
from numba import njit

from rnnlab.kernels.simd import REGISTERS, VECTOR_BYTES, address, columns_at_once, move, tile
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


def tile_sums(rows, units, group, dtype, a, b, start):
    """start + a·b of one tile: rows of a one by one, or all at once."""
    V, (count, depth), columns = VECTOR_BYTES // np.dtype(dtype).itemsize, a.shape, units * group
    product = tile(rows, units, group, np.dtype(dtype))

    @njit
    def run(out, start, a, b):
        width = columns * V
        for r in range(0, count, rows):
            product(
                address(out, r * width), width, group * V, V, address(start, r * width), width,
                address(a, r * depth), depth, 1, address(b, 0), depth,
            )  # fmt: skip

    out = np.full(start.shape, np.nan, dtype)
    run(out.reshape(-1), start.reshape(-1), a.reshape(-1), b.reshape(-1))
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "units", "group"), [(6, 1, 4), (3, 1, 3), (12, 4, 2), (8, 8, 1), (2, 40, 1)])
def test_columns_that_registers_do_not_hold_at_once_give_the_same_bits(dtype, rows, units, group):
    """The last three take several passes on any CPU: the sums of 96, 64 and 80 vectors."""
    columns, depth = units * group, 37
    rng = np.random.default_rng(rows)
    numbers = columns * VECTOR_BYTES // np.dtype(dtype).itemsize
    a, b, start = (rng.normal(size=n).astype(dtype) for n in ((rows, depth), (depth, numbers), (rows, numbers)))
    at_once = columns_at_once(rows, columns)
    assert (rows + 1) * at_once < REGISTERS
    assert rows * columns < 64 or at_once < columns
    sums = tile_sums(rows, units, group, dtype, a, b, start)
    np.testing.assert_array_equal(sums, tile_sums(1, units, group, dtype, a, b, start))
    exact, size = start + a.astype(float) @ b.astype(float), np.abs(start) + np.abs(a) @ np.abs(b)
    # `depth` roundings, each of half a unit in the last place of a partial sum no larger than `size`.
    assert (np.abs(sums - exact) <= depth * np.finfo(dtype).eps * size).all()


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
