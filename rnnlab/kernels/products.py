"""Matrix products from register tiles: the same code inside the time loop and for all steps at once.

Numbers of hidden units are counted in vectors of V, the last one padded with zeros: "unit" below means such a vector.
The right factor is packed into panels of a few units, (units / panel, K, panel·group·V), which the tile reads from
front to back; with a `group` of G gates a panel holds the same units of every gate, side by side. Every number is a sum
over k in order, so that results depend neither on how rows and columns are cut into tiles nor on who computes them.
"""

from functools import cache

import numpy as np
from numba import njit

from .compiling import part
from .simd import VECTOR_BYTES, address, move, tile

__all__ = [
    "ACCUMULATORS",
    "DEPTH",
    "STRIPS",
    "add_sums",
    "add_transposed",
    "blocks",
    "multiply",
    "pack_columns",
    "pack_gates",
    "panel_units",
    "scratch_size",
    "share",
    "width_at",
]

#: Rows that `add_transposed` packs at a time: a panel of them stays in the first-level cache,
DEPTH = 128
#: and so many strips of V rows of the result in the second-level cache.
STRIPS = 8

#: Accumulators of the largest tile; with the vectors of the right factor they fill 32 registers.
ACCUMULATORS = 24


def panel_units(group: int, one_row: bool = False) -> int:
    """Return how many units a panel holds: for one row twice as many, because one multiply-add waits for the last."""
    units = max(u for u in (1, 2, 4) if u == 1 or u * group <= 4)
    return 2 * units if one_row else units


@njit
def width_at(unit, units, most):
    """Return the units in the panel that begins at `unit`: `most`, or less at the end."""
    while most > units - unit:
        most //= 2
    return most


@njit
def share(count, most, rank, parties):
    """Return the first of `count` things, dealt out `most` at a time, that is for `rank` of `parties`."""
    panels = (count + most - 1) // most
    return min(count, panels * rank // parties * most)


# Tiles --------------------------------------------------------------------------------------------------------------


@cache
def _block(units, group, dtype, sizes):
    """Build the largest tile of `sizes` rows that fits; it returns how many rows that were. Arguments as `tile`."""
    size, one = sizes[0], tile(sizes[0], units, group, dtype)
    smaller = _block(units, group, dtype, sizes[1:]) if sizes[1:] else None
    even = 8 if size == 6 else -1  # 4 and 4 rows are faster than 6 and 2

    @part(size, units, group, dtype)
    def block(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows):
        if smaller is None or (rows >= size and rows != even):
            one(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth)
            return size
        return smaller(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows)

    return block


@cache
def blocks(group, dtype, width=None):
    """Build `block(width, …)`, which multiplies some rows by one panel of `width` units and returns how many rows."""
    width = width or panel_units(group, one_row=True)
    sizes = tuple(r for r in (8, 6, 4, 2, 1) if r * width * group <= ACCUMULATORS)
    one = _block(width, group, dtype, (1,) if width > panel_units(group) else sizes)
    narrower = blocks(group, dtype, width // 2) if width > 1 else None

    @part(width, group, dtype)
    def block(w, out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows):
        if narrower is None or w == width:
            return one(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows)
        return narrower(w, out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows)

    return block


@cache
def multiply(group, dtype):
    """Build the product of many rows with the panels first…last, into rows of padded units; all but sizes addresses.

    For r < rows: out[r·o_row + …] = start[r·s_row + …] + (row r of a)·B.
    """
    block, most, size, lanes = blocks(group, dtype), panel_units(group), dtype.itemsize, VECTOR_BYTES // dtype.itemsize

    @part(group, dtype)
    def multiply(out, o_row, start, s_row, a, a_row, packed, depth, rows, first, last, units):
        unit = first
        while unit < last:
            width, at = width_at(unit, units, most), unit * group * VECTOR_BYTES
            r = 0
            while r < rows:
                r += block(
                    width, out + at + r * o_row * size, o_row, group * lanes, lanes,
                    start + at + r * s_row * size, s_row, a + r * a_row * size, a_row, 1, packed + at * depth,
                    depth, rows - r,
                )  # fmt: skip
            unit += width

    return multiply


# Packing ------------------------------------------------------------------------------------------------------------

#: Numbers of a row that are packed at a time: what they are spread over stays in cache.
_SPREAD = 64


@njit
def pack_gates(target, at, weight, gates, most, first, last):
    """Pack units first…last of the transpose of `weight` (G·H, K) into panels that hold all gates of a unit."""
    V, H, K = VECTOR_BYTES // target.itemsize, weight.shape[0] // gates, weight.shape[1]
    source, units = weight.reshape(-1), (H + V - 1) // V
    unit = first
    while unit < last:
        width = width_at(unit, units, most)
        stride = width * gates * V
        for j in range(width):
            valid = min(V, H - (unit + j) * V)
            for g in range(gates):
                for k0 in range(0, K, _SPREAD):
                    to, row = at + unit * gates * V * K + k0 * stride + (j * gates + g) * V, g * H + (unit + j) * V
                    for v in range(valid):
                        for k in range(min(_SPREAD, K - k0)):
                            target[np.uintp(to + k * stride + v)] = source[np.uintp((row + v) * K + k0 + k)]
                    for k in range(min(_SPREAD, K - k0)):
                        for v in range(valid, V):
                            target[to + k * stride + v] = 0
        unit += width


@njit
def pack_columns(target, at, weight, gates, most, first, last):
    """Pack units first…last of the columns of `weight` (G·H, columns); its rows in the order unit, gate, lane."""
    V, H, columns = VECTOR_BYTES // target.itemsize, weight.shape[0] // gates, weight.shape[1]
    source, row_units, units = weight.reshape(-1), (H + V - 1) // V, (columns + V - 1) // V
    depth = row_units * gates * V
    unit = first
    while unit < last:
        width, to = width_at(unit, units, most), at + unit * V * depth
        for p in range(row_units):
            for g in range(gates):
                for v in range(V):
                    row = (g * H + p * V + v) * columns
                    for j in range(width):
                        valid = min(V, columns - (unit + j) * V)
                        if valid < V or p * V + v >= H:
                            target[to : to + V] = 0
                        if p * V + v < H:
                            move(target, to, source, row + (unit + j) * V, valid)
                        to += V
        unit += width


# Sums over rows -----------------------------------------------------------------------------------------------------


def scratch_size(columns: int, lanes: int) -> int:
    """Return the numbers of scratch that `add_transposed` takes for results of so many columns."""
    return ((-(-columns // lanes) + STRIPS) * DEPTH + ACCUMULATORS) * lanes


@cache
def add_transposed(dtype):
    """Build (out, a, a0, gates, first_gate, last_gate, b, b0, columns, rows, first, last, scratch) ↦ out += aᵀ·b.

    The sum is over `rows` rows of a (unit, gate, lane) and of b (columns,). A strip is one gate of one unit: V rows of
    out (G·H, columns), which has the order of weights: gate, unit. Strips first…last are added, but for those of gates
    outside first_gate…last_gate. `scratch` takes `scratch_size(columns)` numbers.
    """
    block, most, V = blocks(1, dtype), panel_units(1), VECTOR_BYTES // dtype.itemsize

    @part(dtype)
    def add_transposed(out, a, a0, gates, first_gate, last_gate, b, b0, columns, rows, first, last, scratch):
        H, flat, units = out.shape[0] // gates, out.reshape(-1), (columns + V - 1) // V
        strips = (H + V - 1) // V * gates
        left, corner = units * DEPTH * V, (units + STRIPS) * DEPTH * V
        for k0 in range(0, rows, DEPTH):
            depth = min(DEPTH, rows - k0)
            unit = 0
            while unit < units:
                width = width_at(unit, units, most)
                for k in range(depth):
                    to, at = unit * V * depth + k * width * V, b0 + (k0 + k) * columns + unit * V
                    for j in range(width):
                        move(scratch, to + j * V, b, at + j * V, columns - (unit + j) * V)
                unit += width
            for s0 in range(first, last, STRIPS):
                count = min(STRIPS, last - s0)
                for k in range(depth):
                    at = a0 + (k0 + k) * strips * V + s0 * V
                    for s in range(count):
                        move(scratch, left + (s * DEPTH + k) * V, a, at + s * V, V)
                unit = 0
                while unit < units:
                    width = width_at(unit, units, most)
                    panel, whole = address(scratch, unit * V * depth), columns - unit * V >= width * V
                    for s in range(count):
                        p, g = (s0 + s) // gates, (s0 + s) % gates
                        r, valid, at = 0, min(V, H - p * V), (g * H + p * V) * columns + unit * V
                        while first_gate <= g < last_gate and r < valid:
                            source, to = address(scratch, left + s * DEPTH * V + r), at + r * columns
                            if whole:
                                place = address(flat, to)
                                r += block(
                                    width, place, columns, V, 0, place, columns, source, 1, V, panel, depth, valid - r
                                )  # fmt: skip
                                continue
                            # The last columns are fewer than a panel: added to a copy.
                            n, place = min(valid - r, ACCUMULATORS // width), address(scratch, corner)
                            for i in range(n * width):
                                lanes = columns - (unit + i % width) * V
                                move(scratch, corner + i * V, flat, to + i // width * columns + i % width * V, lanes)
                            n = block(width, place, width * V, V, 0, place, width * V, source, 1, V, panel, depth, n)
                            for i in range(n * width):
                                lanes = columns - (unit + i % width) * V
                                move(flat, to + i // width * columns + i % width * V, scratch, corner + i * V, lanes)
                            r += n
                    unit += width

    return add_transposed


@njit
def add_sums(out, a, a0, gates, rows, first, last, scratch):
    """out (G·H,) += Σ a over `rows` rows of a (unit, gate, lane), for strips first…last; see `add_transposed`."""
    V, H = VECTOR_BYTES // out.itemsize, out.shape[0] // gates
    stride = (H + V - 1) // V * gates * V
    for s0 in range(first, last, STRIPS):
        count = min(STRIPS, last - s0)
        for n in range(count * V):
            scratch[n] = 0
        for k in range(rows):
            at = a0 + k * stride + s0 * V
            for n in range(count * V):
                scratch[np.uintp(n)] += a[np.uintp(at + n)]
        for s in range(s0, s0 + count):
            p, g = s // gates, s % gates
            for v in range(min(V, H - p * V)):
                out[g * H + p * V + v] += scratch[(s - s0) * V + v]
