"""Panels: where a tile of a product leaves its sums, and a cell's scalar functions take them up as vector code.

A panel is one small array of regions, each with the same number for all units of the tile: a gate sum, one of the
numbers that `step` saves. Only because all of them lie in one array, fixed ways apart, can LLVM prove that loads and
stores never overlap, and turn the loop over units into vector code. The states of a tile have such regions in an array
of their own, from step to step; that it lies apart LLVM is told.
"""

from functools import cache
from itertools import accumulate

import numpy as np
from numba import njit

from ..activations import ARITHMETIC, scalar
from ..cells import Cell
from .compiling import part, written
from .products import blocks
from .simd import VECTOR_BYTES, address, as_vector_code, move, prefetch

__all__ = ["APART", "backward_panel", "backward_reset", "backward_step", "bring", "forward_panel", "forward_reset"]
__all__ += ["forward_step", "grouped", "moves", "numbers_saved", "panels_at_most", "put_numbers", "spread_gates"]
__all__ += ["store_gates", "take_numbers", "tile_product", "tiles_at_most"]


#: Numbers between what two threads write over and over: at least a page, beyond which no core fetches ahead. Closer,
#: each would fetch lines that the other is about to write, and both would wait for them at every step.
APART = 1024

#: Bytes of a panel, which share the first-level cache with the weights of a tile; vectors of its regions at the least.
_PANEL_BYTES, _VECTORS = 24 * 2**10, 24


def grouped(common: tuple[int, ...], own: tuple[int, ...], N: int) -> tuple[int, ...]:
    """Return where each region of a work space begins, those that N groups have of their own for the first of them.

    After that how far groups lie apart, and where all end.
    """
    *places, end = accumulate((*common, *own), initial=0)
    begin, apart = places[len(common)], end - places[len(common)] + APART
    return *places, apart, begin + N * apart


@njit
def tiles_at_most(panels, most, M, R, V):
    """Return how many tiles so many panels of `most` units, or of fewer, have at the most for M sequences.

    R: numbers of a region of a panel.
    """
    rows = R // V // most
    return panels * ((M + rows - 1) // rows + 1)  # one more, for both halves of the batch have theirs


def panels_at_most(units: int, most: int) -> int:
    """Return how many panels so many units have at the most: a rest, and a last unit by itself, have narrower ones."""
    return units // most + most.bit_length() - 1


def numbers_saved(cell: Cell) -> int:
    """Return how many numbers are kept for each unit and step: with a reset, two of the first phase."""
    return cell.saved + (2 if cell.reset else 0)


@cache
def forward_panel(cell: Cell, V: int) -> tuple[int, tuple[int, ...]]:
    """Return the size of a region, and the regions: gate sums, ax where it is apart, peephole, saved; h and r ∘ h."""
    G, P, RESET = len(cell.gates), len(cell.peepholes), int(cell.reset is not None)
    return _panel(V, G, 0 if cell.joint else G, P, numbers_saved(cell), RESET, RESET)


@cache
def backward_panel(cell: Cell, V: int) -> tuple[int, tuple[int, ...]]:
    """Return the size of a region, and the regions: dL/dh from above, saved, peephole; what comes of them."""
    G, S, P = len(cell.gates), len(cell.states), len(cell.peepholes)
    return _panel(V, 1, numbers_saved(cell), P, G, 0 if cell.joint else G, P, S)


def _panel(V: int, *numbers: int) -> tuple[int, tuple[int, ...]]:
    """Return the size of a region and where each begins, given how many of the same kind follow each other."""
    vectors = max(1, _PANEL_BYTES // (VECTOR_BYTES * sum(numbers) * _VECTORS)) * _VECTORS
    return V * vectors, tuple(accumulate((V * vectors * n for n in numbers), initial=0))


# To and from memory -------------------------------------------------------------------------------------------------


def moves(V, whole):
    """Return (load, store) between a panel and memory: of `whole` vectors, or of rows that end after H numbers.

    Both move `count` numbers of every unit of a tile; strides lead to the next number, row and unit in memory. In the
    panel the k-th number begins at + k·region, and units follow each other `lanes` numbers apart: where these are fewer
    than V, the next unit lies over what a vector has behind them, and in memory anything comes to lie there.
    """
    return _moves(V, whole, True), _moves(V, whole, False)


@cache
def _moves(V, whole, loading):
    @part(V, whole, loading, forceinline=True)
    def moves(panel, at, region, memory, begin, count, strides, tile, H):
        unit, width, row, rows, lanes = tile
        i = at
        for r in range(row, row + rows):
            for u in range(unit, unit + width):
                here, n = begin + r * strides[1] + u * strides[2], V if whole else H - u * V
                for k in range(count):
                    if loading:
                        move(panel, i + k * region, memory, here + k * strides[0], n)
                    else:
                        move(memory, here + k * strides[0], panel, i + k * region, n)
                i += lanes

    return moves


@part(forceinline=True)
def bring(memory, begin, count, strides, tile):
    """Have the memory of a load or store brought near."""
    unit, width, row, rows, _ = tile
    for r in range(row, row + rows):
        for u in range(unit, unit + width):
            for k in range(count):
                prefetch(memory, begin + k * strides[0] + r * strides[1] + u * strides[2])


@cache
def store_gates(V):
    """Build the store of `count` numbers a unit into rows of unit, gate, lane, without padding between them.

    The k-th number begins at panel[at + k·region].
    """

    @part(V, forceinline=True)
    def store_gates(panel, at, region, target, to, count, stride, tile, H):
        unit, width, row, rows, lanes = tile
        i = at
        for r in range(row, row + rows):
            for u in range(unit, unit + width):
                here, n = to + r * stride + u * count * V, min(V, H - u * V)
                for k in range(count):
                    move(target, here + k * n, panel, i + k * region, n)
                i += lanes

    return store_gates


@cache
def spread_gates(gates, V):
    """Build the inverse of what gates share: `lanes` numbers a gate in `memory` become rows of a tile.

    Gate g of row i is read at begin + i·stride + g·lanes; behind its numbers lie others, over which the next row comes.
    """

    @part(gates, V, forceinline=True)
    def spread_gates(panel, to, region, memory, begin, stride, lanes, tile):
        for i in range(tile[3]):
            for g in range(gates):
                move(panel, to + g * region + i * tile[4], memory, begin + i * stride + g * lanes, V)

    return spread_gates


@cache
def tile_product(group, dtype, V, region):
    """Build the product of a tile of rows of `a` with packed panels of `group` gates, gate g at panel[to + g·region].

    It starts from what lies at start[s0:], in rows `s_row` apart. Arguments as `products.blocks`.
    """
    block = blocks(group, dtype)

    @part(group, dtype, region, forceinline=True)
    def product(panel, to, start, s0, s_row, a, a0, a_row, packed, b0, depth, tile):
        unit, width, row, rows, _ = tile
        block(
            width, address(panel, to), width * V, V, region, address(start, s0), s_row, address(a, a0 + row * a_row),
            a_row, 1, address(packed, b0 + unit * group * V * depth), depth, rows,
        )  # fmt: skip

    return product


# The cell -----------------------------------------------------------------------------------------------------------


def _written(name, arguments, *lines):
    """Return the compiled function of these lines of source.

    Indices are unsigned, because what Numba does for negative ones would keep LLVM from seeing that regions lie apart.
    """
    return scalar(written(name, arguments, list(lines), index=np.uintp))


@cache
def take_numbers(count):
    """Build (a, first, stride) ↦ the numbers a[first], a[first + stride], … as a tuple of `count`."""
    numbers = "".join(f"a[index(first + {k} * stride)], " for k in range(count))
    return _written(f"take_{count}", "a, first, stride", f"return ({numbers})")


@cache
def put_numbers(count):
    """Build the inverse of `take_numbers(count)`, which stores `values` where that one reads."""
    lines = [f"a[index(first + {k} * stride)] = values[{k}]" for k in range(count)]
    return _written(f"put_{count}", "a, first, stride, values", *lines, "return")


def _loop(*key):
    """Return the decorator of a loop over the units of a panel."""
    return part(*key, forceinline=True, **ARITHMETIC)


def _nothing(count, dtype):
    """Return `count` times −0, which changes no number that it is added to."""
    return (dtype.type(-0.0),) * count


def _by_length(step, hold, V, *key):
    """Build what takes the step of a tile at time t: `step` for sequences that go on, `hold` for those that ended.

    Both are loops over so many numbers of each region of a panel and of the tile's states, which are an array of their
    own and are written over; `shortest` is the least of `lengths`. They take whole vectors: sequences of which some may
    have ended must fill whole ones.
    """

    @part(*key, forceinline=True)
    def by_length(panel, states, tile, t, lengths, shortest):
        size, rows = tile[1] * tile[4], tile[3] if t < shortest else 1
        count = (rows * size + V - 1) // V * V
        for b in range(0, tile[3], rows):
            if t < lengths[tile[2] + b]:
                step(panel[b * size :], states[b * size :], count)
            else:
                hold(panel[b * size :], states[b * size :], count)

    return by_length


@cache
def forward_step(cell: Cell, dtype, V: int, keep: bool):
    """Build (panel, states, tile, t, lengths, shortest) ↦ the steps of a tile, see `_by_length`."""
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    R, (SUM, AX, PEEPHOLE, SAVED, *_) = forward_panel(cell, V)
    take_gates, take_peepholes, take_states, take = map(take_numbers, (G, P, S, 1))
    put_states, put, put_two, put_zeros = map(put_numbers, (S, 1, 2, K))
    step, output, JOINT, KEEP, OUTPUT = cell.step, cell.output, cell.joint, keep, cell.output is not None
    put_saved, FIRST = put_numbers(K - OUTPUT), SAVED + OUTPUT * R  # `output` makes two numbers of the first
    nothing, zero, zeros = _nothing(G, dtype), dtype.type(0), (dtype.type(0),) * K

    @_loop(cell.name, dtype, keep)
    def forward_step(panel, states, count):
        as_vector_code()
        for v in range(count):
            ax = take_gates(panel, v + (SUM if JOINT else AX), R)
            ah = nothing if JOINT else take_gates(panel, v + SUM, R)
            new, partials = step(ax, ah, take_peepholes(panel, v + PEEPHOLE, R), take_states(states, v, R))
            put_states(states, v, R, new)
            if KEEP:
                put_saved(panel, v + FIRST, R, partials)
        if OUTPUT:
            for v in range(count):
                o, c = take_states(states, v, R)
                h, partials = output(o, take(panel, v + FIRST, R)[0] if KEEP else zero, c)
                put(states, v, R, (h,))
                if KEEP:
                    put_two(panel, v + SAVED, R, partials)

    @_loop(cell.name, dtype, keep)
    def forward_hold(panel, states, count):
        as_vector_code()
        for v in range(count):
            put_zeros(panel, v + SAVED, R, zeros)

    return _by_length(forward_step, forward_hold, V, "forward", cell.name, dtype, keep)


@cache
def forward_reset(cell: Cell, dtype, V: int):
    """Build the same as `forward_step` for the first phase of a cell that resets h before the product of a gate."""
    R, (SUM, _, _, SAVED, OLD, NEW, _) = forward_panel(cell, V)
    reset, nothing, zero = cell.reset[0], dtype.type(-0.0), dtype.type(0)
    take, put, put_kept = take_numbers(1), put_numbers(1), put_numbers(2)

    @_loop(cell.name, dtype)
    def forward_reset(panel, states, count):
        as_vector_code()
        for v in range(count):
            new, partials = reset(take(panel, v + SUM, R)[0], nothing, take(panel, v + OLD, R)[0])
            put(panel, v + NEW, R, (new,))
            put_kept(panel, v + SAVED, R, partials)

    @_loop(cell.name, dtype)
    def reset_hold(panel, states, count):
        as_vector_code()
        for v in range(count):
            put(panel, v + NEW, R, (zero,))
            put_kept(panel, v + SAVED, R, (zero, zero))

    return _by_length(forward_reset, reset_hold, V, "reset", cell.name, dtype)


@cache
def backward_step(cell: Cell, V: int, whole: bool):
    """Build the loop of `step_backward` over a panel, and with it the same as `forward_step`.

    In place of dL/dstate_t comes that part of dL/dstate_{t−1} that does not pass through W_hh.

    Where dL/dstate is not whole, what comes from above is added. Where a sequence has ended the state was held: so is
    its adjoint, and no weight has a share.
    """
    S, P, K = len(cell.states), len(cell.peepholes), cell.saved
    R, (ABOVE, SAVED, PEEPHOLE, DAX, DAH, DP, TOTAL, _) = backward_panel(cell, V)
    take_saved, take_peepholes, take_h, take_states = map(take_numbers, (K, P, 1, S))
    put_gates, put_peepholes, put_states = map(put_numbers, (len(cell.gates), P, S))
    others = "".join(f", d[{s}]" for s in range(1, S))
    add_above = scalar(written("add_above", "d, above", [f"return (d[0] + above[0]{others},)"]))
    step_backward, JOINT, WHOLE = cell.step_backward, cell.joint, whole
    no_gates, no_peepholes = (0,) * len(cell.gates), (0,) * P

    @_loop(cell.name, V, whole)
    def backward_step(panel, states, count):
        as_vector_code()
        for v in range(count):
            d_state = take_states(states, v, R)
            if not WHOLE:
                d_state = add_above(d_state, take_h(panel, v + ABOVE, R))
            da_x, da_h, dp, total, d_old = step_backward(
                take_saved(panel, v + SAVED, R), take_peepholes(panel, v + PEEPHOLE, R), d_state
            )
            put_gates(panel, v + DAX, R, da_x)
            if not JOINT:
                put_gates(panel, v + DAH, R, da_h)
            put_peepholes(panel, v + DP, R, dp)
            put_states(panel, v + TOTAL, R, total)
            put_states(states, v, R, d_old)

    @_loop(cell.name, V, whole)
    def backward_hold(panel, states, count):
        as_vector_code()
        for v in range(count):
            put_gates(panel, v + DAX, R, no_gates)
            if not JOINT:
                put_gates(panel, v + DAH, R, no_gates)
            put_peepholes(panel, v + DP, R, no_peepholes)
            put_states(panel, v + TOTAL, R, take_states(states, v, R))

    return backward_step, _by_length(backward_step, backward_hold, V, "backward", cell.name, V, whole)


@cache
def backward_reset(cell: Cell, V: int):
    """Build the loop over a panel that takes dL/d(r ∘ h) to dL/da_r and adds its part to dL/dh.

    Where a sequence has ended nothing was saved: dL/da_r is 0 and dL/dh stays.
    """
    _, reset_backward = cell.reset
    R, (THROUGH, SAVED, _, DAX, *_) = backward_panel(cell, V)
    take, take_kept, put = take_numbers(1), take_numbers(2), put_numbers(1)

    @_loop(cell.name, V)
    def backward_reset(panel, states, count):
        as_vector_code()
        for v in range(count):
            da, dh = reset_backward(take_kept(panel, v + SAVED, R), take(panel, v + THROUGH, R)[0])
            put(panel, v + DAX, R, (da,))
            put(states, v, R, (take(states, v, R)[0] + dh,))

    return backward_reset
