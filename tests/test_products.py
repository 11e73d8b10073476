"""Products from register tiles: every remainder, against NumPy in higher precision, and bit for bit in parts."""

import numpy as np
import pytest
from conftest import relative_error

from rnnlab.kernels import cpu, products
from rnnlab.kernels.simd import VECTOR_BYTES


def problem(dtype, rows, depth, columns):
    rng = np.random.default_rng(rows * 10_000 + depth * 100 + columns)
    return rng.normal(size=(rows, depth)).astype(dtype), rng.normal(size=(depth, columns)).astype(dtype)


def bound(dtype, depth):
    """Rounding errors of a sum of `depth` terms add up as a random walk; 4 for terms larger than their sum."""
    return 4 * np.finfo(dtype).eps * np.sqrt(depth)


N32 = products.COLUMNS * VECTOR_BYTES // 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 13, 95, 96, 97, 200])
@pytest.mark.parametrize("columns", [1, N32 - 1, N32, N32 + 1, 3 * N32 + 7])
def test_product_with_every_remainder(dtype, rows, columns):
    for depth in (1, 2, 33):
        a, b = problem(dtype, rows, depth, columns)
        want = a.astype(np.longdouble) @ b.astype(np.longdouble)
        for packed in (products.pack(b), products.pack_transposed(np.ascontiguousarray(b.T))):
            out = np.full((rows, columns), np.nan, dtype)
            products.product(out, a, packed, 0, rows)
            assert relative_error(out, want) <= bound(dtype, depth)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("depth", [1, 255, 256, 257, 600])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, N32), (15, N32 + 1), (17, 5), (50, 2 * N32 - 1)])
def test_transposed_product_with_every_remainder(dtype, depth, rows, columns):
    b, a = problem(dtype, depth, columns, 1)[0], problem(dtype, depth, rows, 1)[0]
    out = np.ones((rows, columns), dtype)  # the product is added
    products.add_transposed(out, a, b, 0, rows)
    want = 1 + a.T.astype(np.longdouble) @ b.astype(np.longdouble)
    assert relative_error(out, want) <= bound(dtype, depth)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_give_the_same_bits(dtype):
    a, b = problem(dtype, 41, 70, N32 + 3)
    whole, parts, packed = np.empty((41, N32 + 3), dtype), np.empty((41, N32 + 3), dtype), products.pack(b)
    products.product(whole, a, packed, 0, 41)
    for first, last in [(0, 1), (1, 8), (8, 31), (31, 41)]:
        products.product(parts, a, packed, first, last)
    np.testing.assert_array_equal(parts, whole)
    whole, parts = np.zeros((70, 41), dtype), np.zeros((70, 41), dtype)
    left, right = np.ascontiguousarray(a), problem(dtype, 41, 41, 1)[0]
    products.add_transposed(whole, left, right, 0, 70)
    for first, last in [(0, 3), (3, 16), (16, 70)]:
        products.add_transposed(parts, left, right, first, last)
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_all_rows_and_change_no_bit(monkeypatch, threads):
    monkeypatch.setattr(cpu, "threads", lambda: threads)
    parts = []
    cpu._share(lambda first, last: parts.append((first, last)), 10, 1e12)
    assert len(parts) == threads
    assert sorted(row for first, last in parts for row in range(first, last)) == list(range(10))
    parts.clear()
    cpu._share(lambda first, last: parts.append((first, last)), 10, 1e6)  # not worth a second thread
    assert parts == [(0, 10)]


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_threads_change_no_bit_of_a_network(monkeypatch, cell):
    from rnnlab import Recurrent

    net = Recurrent(cell, 5, 33, seed=0)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(9, 7, 5)).astype(np.float32)
    d_output = rng.normal(size=(9, 7, 33)).astype(np.float32)
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1.0)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu, "threads", lambda threads=threads: threads)
        trace = net.forward(x)
        gradients = net.backward(trace, d_output)
        results.append([trace.output, gradients.x, gradients.params.flat, gradients.h[0]])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)
