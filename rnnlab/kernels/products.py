"""Matrix products from register tiles: the same code inside the time loop and for all steps at once.

Numbers of hidden units are counted in vectors of V, the last one padded with zeros: "unit" below means such a vector.
The right factor is packed into panels of a few units, (units / panel, K, panel·group·V), which the tile reads from
front to back; with a `group` of G gates a panel holds the same units of every gate, side by side. Every number is a sum
over k in order, so that results depend neither on how rows and columns are cut into tiles nor on who computes them.
"""

from functools import cache

import numpy as np
from numba import njit

from ..activations import ARITHMETIC
from .compiling import part, written
from .simd import REGISTERS, VECTOR_BYTES, address, move, tile

__all__ = ["DEPTH", "PANEL", "STRIPS", "add_narrow", "add_sums", "add_transposed", "blocks", "list_tiles", "multiply"]
__all__ += ["multiply_columns", "pack_columns", "pack_gates", "pack_peepholes", "pack_shared", "panel_units", "rows_at"]
__all__ += ["scratch_size", "share", "shared_vectors", "tile_at", "tile_rows", "whole_units", "width_at"]

#: Rows that `add_transposed` packs at a time: a strip of them and part of a panel stay in the first-level cache, or all
#: of the panel, where tiles pass over it twice,
DEPTH = 256 if REGISTERS == 32 else 128
#: and so many strips of V rows of the result in the second-level cache.
STRIPS = 8

#: Bytes between rows up to which a strip is read where it lies, for so many panels at the most: rows that are farther
#: apart would be in too many pages, and with more panels packing pays.
_NEAR, _FEW_PANELS = 2048, 2


def tile_rows(columns: int) -> tuple[int, ...]:
    """Return how many rows the tiles of so many columns of vectors have, the most first.

    Measured: of 32 registers 24 hold sums. Of 16 registers 12 do, in two passes over four columns; where three columns
    need two passes, one of them is too narrow to keep the pipelines busy, and eight rows have too many addresses.
    """
    if columns > 4:  # a panel for one row
        return (1,)
    if REGISTERS == 32:
        return tuple(rows for rows in (8, 6, 4, 2, 1) if rows * columns <= 24)
    return (3, 2, 1) if columns == 3 else (6, 4, 2, 1)


def _next_tile(columns: int, rows: int) -> int:
    """Return the rows of the first tile of `rows`: the most; but 8 are 4 and 4, which is faster than 6 and 2."""
    return next(size for size in tile_rows(columns) if size <= rows and not (size == 6 and rows == 8))


#: `_next_tile` of every number of columns, and of rows up to those from which on it is the same.
_NEXT_TILE = np.array([[0, *(_next_tile(columns, rows) for rows in range(1, 10))] for columns in range(9)])


def panel_units(group: int, one_row: bool = False) -> int:
    """Return how many units a panel holds: for one row twice as many, because one multiply-add waits for the last."""
    units = max(u for u in (1, 2, 4) if u == 1 or u * group <= 4)
    return 2 * units if one_row else units


#: Units of a panel of one gate, for compiled code.
PANEL = panel_units(1)


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


@njit
def rows_at(width, group, rows):
    """Return the rows of the next tile of `width` units: as many of `rows` as stay in registers."""
    return _NEXT_TILE[width * group, min(rows, len(_NEXT_TILE[0]) - 1)]


@njit
def list_tiles(table, first, last, first_unit, last_unit, units, most, vectors, lanes):
    """Write tiles of rows first…last and units first_unit…last_unit: unit, width, row, rows, lanes; return how many.

    `lanes` is how far units lie apart in a panel. A tile has `vectors` vectors of a gate at the most: the product fills
    them by as many tiles as registers hold.
    """
    n, unit = 0, first_unit
    while unit < last_unit:
        width, row = width_at(unit, units, most), first
        while row < last:
            rows = min(last - row, vectors // width)
            table[n, 0], table[n, 1], table[n, 2], table[n, 3], table[n, 4] = unit, width, row, rows, lanes
            n, row = n + 1, row + rows
        unit += width
    return n


@njit
def tile_at(table, k):
    """Return the tile in a row of `list_tiles`."""
    return table[k, 0], table[k, 1], table[k, 2], table[k, 3], table[k, 4]


@cache
def blocks(group, dtype):
    """Build the product of many rows with one panel, tile by tile: block(width, …, rows), else as `tile`.

    One function holds all tiles: a call for each, with a dozen numbers to hand on, took a tenth of a small product.
    """
    widths = sorted({panel_units(group) >> k for k in range(3)} - {0}, reverse=True)
    shapes = [(w, r) for w in widths for r in tile_rows(w * group)]
    shapes.append((panel_units(group, one_row=True), 1))
    names = {f"tile_{w}_{r}": tile(r, w, group, dtype) for w, r in shapes}
    numbers = "out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth"
    lines = [
        "while rows > 0:",
        f"    count = rows_at(width, {group}, rows)",
        *(f"    if width == {w} and count == {r}: tile_{w}_{r}({numbers})" for w, r in shapes),
        *(f"    {name} += count * {name[0]}_row * {dtype.itemsize}" for name in ("out", "start", "a")),
        "    rows -= count",
    ]
    tiles = part(group, dtype)(written("tiles", f"width, {numbers}, rows", lines, rows_at=rows_at, **names))
    number = np.int64  # a constant is a type of its own to Numba, which would compile all tiles anew for each

    @part(group, dtype, forceinline=True)
    def blocks(width, out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, depth, rows):
        strides = number(o_row), number(o_unit), number(o_gate), number(s_row), number(a_row), number(a_k)
        tiles(width, out, *strides[:3], start, strides[3], a, *strides[4:], b, depth, rows)

    return blocks


@cache
def multiply(group, dtype):
    """Build the product of many rows with the panels first…last, into rows of padded units; all but sizes addresses.

    For r < rows: out[r·o_row + …] = start[r·s_row + …] + (row r of a)·B.
    """
    block, most, lanes = blocks(group, dtype), panel_units(group), VECTOR_BYTES // dtype.itemsize

    @part(group, dtype)
    def multiply(out, o_row, start, s_row, a, a_row, packed, depth, rows, first, last, units):
        unit = first
        while unit < last:
            width, at = width_at(unit, units, most), unit * group * VECTOR_BYTES
            block(
                width, out + at, o_row, group * lanes, lanes, start + at, s_row, a, a_row, 1, packed + at * depth,
                depth, rows,
            )  # fmt: skip
            unit += width

    return multiply


@cache
def _copies(V):
    """Build copies of a tile between `scratch` and rows of a matrix that end within it, after `lanes` numbers."""

    @part(V, forceinline=True)
    def copy_in(scratch, to, source, at, columns, width, rows, lanes):
        for i in range(rows * width):
            j = i % width * V
            move(scratch, to + i * V, source, at + i // width * columns + j, lanes - j)

    @part(V, forceinline=True)
    def copy_out(target, to, columns, scratch, at, width, rows, lanes):
        for i in range(rows * width):
            j = i % width * V
            move(target, to + i // width * columns + j, scratch, at + i * V, lanes - j)

    return copy_in, copy_out


@cache
def multiply_columns(dtype):
    """Build the product of rows of `a` with all panels, into rows of out[to:], `columns` long, `stride` apart.

    Addresses: a, packed, and `zeros`, as many as a tile has in a row.
    """
    block, most, size, V = blocks(1, dtype), panel_units(1), dtype.itemsize, VECTOR_BYTES // dtype.itemsize
    _, copy_out = _copies(V)

    @part(dtype)
    def multiply_columns(out, to, stride, columns, zeros, a, a_row, packed, depth, rows, scratch):
        units, unit = (columns + V - 1) // V, 0
        while unit < units:
            width, r = width_at(unit, units, most), 0
            b, whole = packed + unit * VECTOR_BYTES * depth, columns - unit * V >= width * V
            while r < rows:
                at, source, count = (
                    to + r * stride + unit * V,
                    a + r * a_row * size,
                    rows if whole else min(V, rows - r),
                )
                if whole:
                    block(width, address(out, at), stride, V, 0, zeros, 0, source, a_row, 1, b, depth, count)
                else:
                    block(width, address(scratch, 0), width * V, V, 0, zeros, 0, source, a_row, 1, b, depth, count)
                    copy_out(out, at, stride, scratch, 0, width, count, columns - unit * V)
                r += count
            unit += width

    return multiply_columns


# Packing ------------------------------------------------------------------------------------------------------------

#: Numbers of a row that are packed at a time: what they are spread over stays in cache.
_SPREAD = 64


@njit
def pack_gates(target, at, weight, gates, kept, most, first, last, units):
    """Pack units first…last of `units` of the transpose of `weight` (G·H, K) into panels that hold all gates of a unit.

    Gates from the one numbered `kept` on count as zero.
    """
    V, H, K = VECTOR_BYTES // target.itemsize, weight.shape[0] // gates, weight.shape[1]
    source, unit = weight.reshape(-1), first
    while unit < last:
        width = width_at(unit, units, most)
        stride = width * gates * V
        for j in range(width):
            for g in range(gates):
                valid = min(V, H - (unit + j) * V) if g < kept else 0
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
def shared_vectors(H, V, gates):
    """Return how many vectors the gates of a last unit of H mod V numbers share."""
    return (H % V * gates + V - 1) // V


@njit
def whole_units(H, V, gates, apart):
    """Return the units whose gates have vectors of their own: all, where sharing saves none or gates stay `apart`."""
    units = (H + V - 1) // V
    return units if apart or H % V == 0 or shared_vectors(H, V, gates) == gates else units - 1


@njit
def pack_shared(target, at, weight, gates):
    """Pack the transpose of those rows of `weight` (G·H, K) that fill no vector of H: gate after gate, as panels."""
    V, H, K = VECTOR_BYTES // target.itemsize, weight.shape[0] // gates, weight.shape[1]
    lanes, units, unit = H % V, shared_vectors(H, V, gates), 0
    while unit < units:
        width = width_at(unit, units, PANEL)
        for n in range(width * V):
            g, v = divmod(unit * V + n, lanes)
            for k in range(K):
                target[at + unit * V * K + k * width * V + n] = weight[g * H + H - lanes + v, k] if g < gates else 0
        unit += width


@njit
def pack_columns(target, at, weight, gates, kept, most, first, last):
    """Pack units first…last of the columns of `weight` (G·H, columns), its rows in the order unit, gate, lane.

    Gates from the one numbered `kept` on count as zero.
    """
    V, H, columns = VECTOR_BYTES // target.itemsize, weight.shape[0] // gates, weight.shape[1]
    source, units = weight.reshape(-1), (columns + V - 1) // V
    unit = first
    while unit < last:
        width, to = width_at(unit, units, most), at + unit * V * weight.shape[0]
        for p in range(0, H, V):
            for g in range(gates):
                for row in range(g * H + p, g * H + min(p + V, H)):
                    for j in range(width):
                        valid = min(V, columns - (unit + j) * V) if g < kept else 0
                        if valid < V:
                            target[to : to + V] = 0
                        move(target, to, source, row * columns + (unit + j) * V, valid)
                        to += V
        unit += width


@njit
def pack_peepholes(target, at, peephole, H):
    """Pack peephole weights (P·H,), each row of H padded to whole units."""
    V = VECTOR_BYTES // target.itemsize
    row = (H + V - 1) // V * V
    for n in range(peephole.size // H * row):
        target[at + n] = peephole[n // row * H + n % row] if n % row < H else target.dtype.type(0)


# Sums over rows -----------------------------------------------------------------------------------------------------


def scratch_size(columns: int, lanes: int) -> int:
    """Return the numbers of scratch that `add_transposed` takes for results of so many columns."""
    return ((-(-columns // lanes) + STRIPS) * DEPTH + lanes * PANEL) * lanes


@njit
def strip_at(strip, H, V, gates):
    """Return where a strip, one gate of one unit, begins in a row: every V numbers, in the last unit every H mod V."""
    whole = H // V * gates
    return strip * V if strip <= whole else whole * V + (strip - whole) * (H % V)


@cache
def add_transposed(dtype):
    """Build (out, a, a0, stride, gates, which, b, b0, runs, columns, rows, strips, scratch) ↦ out += aᵀ·b.

    The sum is over `rows` rows of a, G·H numbers in the order unit, gate, lane, `stride` apart, and of b (columns,), of
    which runs[0] follow each other and so many begin runs[1] apart. A strip is up to V rows of out (G·H, columns),
    which has the order of weights: gate, unit. Strips from strips[0] to strips[1] are added, those of gates from
    which[0] to which[1]. `scratch` takes `scratch_size(columns)` numbers.
    """
    block, most, SIZE, V = blocks(1, dtype), panel_units(1), dtype.itemsize, VECTOR_BYTES // dtype.itemsize
    copy_in, copy_out = _copies(V)

    @part(dtype)
    def add_transposed(out, a, a0, stride, gates, which, b, b0, runs, columns, rows, strips, scratch):
        H, flat, units = out.shape[0] // gates, out.reshape(-1), (columns + V - 1) // V
        left, corner = units * DEPTH * V, (units + STRIPS) * DEPTH * V
        near = stride * SIZE <= _NEAR and units <= _FEW_PANELS * most
        for k0 in range(0, rows, DEPTH):
            depth = min(DEPTH, rows - k0)
            unit = 0
            while unit < units:
                width = width_at(unit, units, most)
                to, run, row = unit * V * depth, k0 // runs[0], k0 % runs[0]
                for _ in range(depth):
                    at = b0 + run * runs[1] + row * columns + unit * V
                    for j in range(width):
                        move(scratch, to + j * V, b, at + j * V, columns - (unit + j) * V)
                    to, row = to + width * V, row + 1
                    if row == runs[0]:
                        run, row = run + 1, 0
                unit += width
            for s0 in range(strips[0], strips[1], STRIPS):
                count = min(STRIPS, strips[1] - s0)
                for k in range(0 if near else depth):
                    at = a0 + (k0 + k) * stride
                    for s in range(count):
                        move(scratch, left + (s * DEPTH + k) * V, a, at + strip_at(s0 + s, H, V, gates), V)
                unit = 0
                while unit < units:
                    width = width_at(unit, units, most)
                    panel, lanes = address(scratch, unit * V * depth), columns - unit * V
                    for s in range(count):
                        p, g = (s0 + s) // gates, (s0 + s) % gates
                        if not which[0] <= g < which[1]:
                            continue
                        source, a_k = address(scratch, left + s * DEPTH * V), V
                        if near:
                            source, a_k = address(a, a0 + k0 * stride + strip_at(s0 + s, H, V, gates)), stride
                        valid = min(V, H - p * V)
                        to = (g * H + p * V) * columns + unit * V
                        if lanes >= width * V:
                            place = address(flat, to)
                            block(width, place, columns, V, 0, place, columns, source, 1, a_k, panel, depth, valid)
                        else:  # the last columns are fewer than a panel: added to a copy
                            place = address(scratch, corner)
                            copy_in(scratch, corner, flat, to, columns, width, valid, lanes)
                            block(width, place, width * V, V, 0, place, width * V, source, 1, a_k, panel, depth, valid)
                            copy_out(flat, to, columns, scratch, corner, width, valid, lanes)
                    unit += width

    return add_transposed


@njit(**ARITHMETIC)
def add_narrow(out, a, a0, stride, gates, b, b0, runs, b_row, columns, rows, strips, scratch):
    """out (G·H·columns,) += aᵀ·b as `add_transposed`, for few columns: they take turns, and rows of a fill the vectors.

    Rows of b that follow each other are `b_row` apart.
    """
    V, H = VECTOR_BYTES // out.itemsize, len(out) // (gates * columns)
    for s0 in range(strips[0], strips[1], STRIPS):
        last = min(s0 + STRIPS, strips[1])
        begin = strip_at(s0, H, V, gates)
        count = strip_at(last, H, V, gates) - begin
        for j in range(columns):
            for n in range(count):
                scratch[n] = 0
            for k0 in range(0, rows, runs[0]):
                for k in range(k0, min(k0 + runs[0], rows)):
                    factor = b[b0 + k0 // runs[0] * runs[1] + (k - k0) * b_row + j]
                    for n in range(count):
                        scratch[np.uintp(n)] += a[np.uintp(a0 + k * stride + begin + n)] * factor
            for s in range(s0, last):
                p, g = s // gates, s % gates
                for v in range(min(V, H - p * V)):
                    out[(g * H + p * V + v) * columns + j] += scratch[strip_at(s, H, V, gates) - begin + v]


@njit
def add_sums(out, a, a0, stride, gates, rows, strips, scratch):
    """out (G·H,) += Σ a over `rows` rows of a, `stride` apart, for the strips of `add_transposed`."""
    add_narrow(out, a, a0, stride, gates, (out.dtype.type(1),), 0, (rows, 0), 0, 1, rows, strips, scratch)
