"""Matrix products from register tiles: the same code inside the time loop and for all steps at once.

The right factor is packed into panels of N = 4·V columns, (ceil(columns / N), K, N), padded with zeros: the tile reads
it from front to back. Rows of the left factor are taken 6 at a time, the rest 4, 2 and 1. Every number is a sum over k
in order, so that results depend neither on how rows are cut into tiles nor on how threads share them.
"""

import numpy as np
from numba import njit

from .compiling import kernel
from .simd import VECTOR_BYTES, move_vector, tile

__all__ = ["COLUMNS", "add_transposed", "columns_of", "multiply", "pack", "pack_transposed", "product"]

#: Vectors in a panel.
COLUMNS = 4

#: Rows of the long dimension that `add_transposed` packs at a time: both packed blocks stay in the second-level cache.
_DEPTH = 256

#: Rows of the left factor that `product` takes through all panels before the next: they stay in cache.
_BLOCK = 96

_TILES = {(rows, add): tile(rows, COLUMNS, add) for rows in (6, 4, 2, 1) for add in (False, True)}
_tile6, _tile4, _tile2, _tile1 = (_TILES[rows, False] for rows in (6, 4, 2, 1))
_add6, _add4, _add2, _add1 = (_TILES[rows, True] for rows in (6, 4, 2, 1))


@njit(forceinline=True)
def columns_of(a):
    """Return N, the columns in a panel of the type of `a`."""
    return COLUMNS * (VECTOR_BYTES // a.itemsize)


@kernel("products")
def pack(b):
    """Pack b (K, columns) into panels (ceil(columns / N), K, N)."""
    N = columns_of(b)
    packed = np.zeros(((b.shape[1] + N - 1) // N, b.shape[0], N), b.dtype)
    _pack_rows(packed.reshape(-1), b, 0, b.shape[0])
    return packed


@njit
def _pack_rows(target, b, first, last):
    """Pack rows first…last of b into flat panels whose padding is zero already."""
    V, N, columns, depth = VECTOR_BYTES // b.itemsize, columns_of(b), b.shape[1], last - first
    source = b.reshape(-1)
    for p in range((columns + N - 1) // N):
        width = min(N, columns - p * N)
        for k in range(depth):
            at, to = (first + k) * columns + p * N, (p * depth + k) * N
            for n in range(0, width - V + 1, V):
                move_vector(target, to + n, source, at + n)
            for n in range(width - width % V, width):
                target[to + n] = source[at + n]


@kernel("products")
def pack_transposed(b):
    """Pack the transpose of b (columns, K) into panels (ceil(columns / N), K, N)."""
    N, columns, depth = columns_of(b), b.shape[0], b.shape[1]
    packed = np.zeros(((columns + N - 1) // N, depth, N), b.dtype)
    for n in range(columns):
        p, lane = n // N, n % N
        for k in range(depth):
            packed[p, k, lane] = b[n, k]
    return packed


@njit
def _rows(out, o, o_row, a, a0, a_row, a_k, b, b0, depth, rows):
    """out rows = a rows · one panel, for any number of rows."""
    r = 0
    while r + 6 <= rows:
        _tile6(out, o + r * o_row, o_row, a, a0 + r * a_row, a_row, a_k, b, b0, depth)
        r += 6
    if r + 4 <= rows:
        _tile4(out, o + r * o_row, o_row, a, a0 + r * a_row, a_row, a_k, b, b0, depth)
        r += 4
    if r + 2 <= rows:
        _tile2(out, o + r * o_row, o_row, a, a0 + r * a_row, a_row, a_k, b, b0, depth)
        r += 2
    if r < rows:
        _tile1(out, o + r * o_row, o_row, a, a0 + r * a_row, a_row, a_k, b, b0, depth)


@njit
def multiply(out, o, a, a0, packed, rows, columns, scratch):
    """out = a·B for `rows` rows of `columns` and K numbers from flat offsets o and a0; scratch takes rows·N numbers."""
    depth, N = packed.shape[1], packed.shape[2]
    b = packed.reshape(-1)
    for p in range(packed.shape[0]):
        width = min(N, columns - p * N)
        if width == N:
            _rows(out, o + p * N, columns, a, a0, depth, 1, b, p * depth * N, depth, rows)
        else:
            _rows(scratch, 0, N, a, a0, depth, 1, b, p * depth * N, depth, rows)
            for r in range(rows):
                for n in range(width):
                    out[o + r * columns + p * N + n] = scratch[r * N + n]


@kernel("products")
def product(out, a, packed, first, last):
    """out[first:last] = a[first:last]·B for out (rows, columns) and a (rows, K), both contiguous."""
    columns, depth = out.shape[1], a.shape[1]
    flat_out, flat_a = out.reshape(-1), a.reshape(-1)
    scratch = np.empty(_BLOCK * columns_of(a), a.dtype)
    for r in range(first, last, _BLOCK):
        multiply(flat_out, r * columns, flat_a, r * depth, packed, min(_BLOCK, last - r), columns, scratch)


@kernel("products")
def add_transposed(out, a, b, first, last):
    """out[first:last] += (aᵀ·b)[first:last] for a (K, rows), b (K, columns) and a contiguous out (rows, columns)."""
    depth, rows, columns = a.shape[0], last - first, b.shape[1]
    V, N = VECTOR_BYTES // a.itemsize, columns_of(a)
    flat_out, flat_a = out.reshape(-1), a.reshape(-1)
    strips = (rows + V - 1) // V
    left, block = np.zeros(strips * _DEPTH * V, a.dtype), np.zeros(V * N, a.dtype)
    panels = (columns + N - 1) // N
    right = np.zeros(panels * _DEPTH * N, a.dtype)
    for k0 in range(0, depth, _DEPTH):
        count = min(_DEPTH, depth - k0)
        _pack_rows(right, b, k0, k0 + count)
        for s in range(strips):
            width = min(V, rows - s * V)
            for k in range(count):
                source, target = (k0 + k) * a.shape[1] + first + s * V, (s * _DEPTH + k) * V
                if width == V:
                    move_vector(left, target, flat_a, source)
                else:
                    for r in range(width):
                        left[target + r] = flat_a[source + r]
        for p in range(panels):
            full = columns - p * N >= N
            for s in range(strips):
                r = 0
                while r < min(V, rows - s * V):
                    # Tiles of 4 rows; the last ones and narrow panels go through a block of their own.
                    some, at = min(4, rows - s * V - r), (first + s * V + r) * columns + p * N
                    if full and some == 4:
                        _add4(flat_out, at, columns, left, s * _DEPTH * V + r, 1, V, right, p * count * N, count)
                    else:
                        _tile4(block, 0, N, left, s * _DEPTH * V + r, 1, V, right, p * count * N, count)
                        for i in range(some):
                            for n in range(min(N, columns - p * N)):
                                flat_out[at + i * columns + n] += block[i * N + n]
                    r += 4
