"""Backpropagation through time of one layer in one direction, in one kernel (Werbos 1990). Layout: see `cpu`.

Each kernel is made once from a cell's `step_backward`. A tile of the product of dL/dah_{t+1} with W_hh is added to the
adjoint of its states, which the cell takes up at once. dL/dx and the gradients of weights need no recurrence: they are
taken for a chunk of steps at a time, while the chunk is in cache.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..cells import Cell
from . import Array
from .adjoint import WHOLE, clamp_row, limit_whole
from .calls import borrow, job
from .compiling import cached, part
from .panels import (
    backward_panel,
    backward_reset,
    backward_step,
    bring,
    grouped,
    moves,
    numbers_saved,
    panels_at_most,
    store_gates,
    tile_product,
    tiles_at_most,
)
from .products import (
    add_narrow,
    add_sums,
    add_transposed,
    list_tiles,
    multiply_columns,
    pack_columns,
    pack_peepholes,
    panel_units,
    tile_at,
)
from .simd import VECTOR_BYTES, address
from .subnormals import flush_subnormals, keep_subnormals
from .team import Party, groups_of, post, shares, wait_for_all, wait_until_done

__all__ = ["BackwardArguments", "backward_kernel", "backward_places"]


class BackwardArguments(NamedTuple):
    """What a backward kernel takes: weights and a `LayerTrace`, what becomes a `LayerGradients`, and where it works.

    sums: a `LayerWeights` for each half of the batch, as tuples; `middle` sequences are in the first half, rows of a
    half and chunk in `span`. `apart` leaves both sums as they are: otherwise the second is added to the first. limit
    (1,) and counts: see `adjoint.Clip`. All else as in `forward.ForwardArguments`.
    """

    x: Array
    d_output: Array
    d_output_exponent: NDArray[np.int64]
    weight_ih: Array
    weight_hh: Array
    peephole: Array
    lengths: NDArray[np.int64]
    state: Array
    saved: Array
    reset_h: Array
    d_state: Array
    exponent: NDArray[np.int64]
    dx: Array
    sums: tuple[tuple[Array, ...], tuple[Array, ...]]
    work: Array
    places: tuple[int, ...]
    panels: Array
    tables: NDArray[np.int64]
    chunk: int
    M: int
    middle: int
    span: int
    apart: bool
    limit: Array
    counts: NDArray[np.int64]


class BackwardPlaces(NamedTuple):
    """Where in `work` each region begins, those that a group has of its own for the first one, the next `apart`.

    Packed weights, for a reset W_hn by itself; zeros; dax, dah, d_peephole of two chunks; dL/dstate as it is carried
    back, tile by tile, and for a reset dL/da of the last gate.
    """

    weight_ih: int
    weight_hh: int
    weight_last: int
    peephole: int
    zeros: int
    dax: int
    dah: int
    dp: int
    states: int
    da_last: int
    apart: int
    end: int


@lru_cache(1024)
def backward_places(cell: Cell, V: int, I: int, H: int, rows: int, M: int, N: int) -> BackwardPlaces:
    """Return the places of N groups of M sequences, with so many rows of dax in all."""
    G, S, P, R = len(cell.gates), len(cell.states), len(cell.peepholes), backward_panel(cell, V)[0]
    RESET, BOTH = int(cell.reset is not None), int(not cell.joint)
    row, inputs = -(-H // V) * V, -(-I // V) * V
    weights = G * H * inputs, G * H * row, RESET * H * row, P * row, row + inputs
    gradients = BOTH * rows * G * row, rows * G * row, rows * P * row
    most = panel_units(1, one_row=M * N == 1)
    own = tiles_at_most(panels_at_most(-(-H // V), most), most, M, R, V) * S * R, RESET * M * row
    return BackwardPlaces(*grouped((*weights, *gradients), own, N))


@njit(forceinline=True)
def _rows_of(a, t):
    """Return which row of dax is that of sequence b at step t, less b: for b below `middle`, and for the others.

    A half of the batch has its rows together, step after step, in `span` rows. There are two of each: threads may still
    read one chunk while the next is written.
    """
    B, turn, step = a.d_output.shape[1], t // a.chunk % 2, t % a.chunk
    halves = 1 if a.middle == B else 2
    first = turn * halves * a.span
    return first + step * a.middle, first + a.span + step * (B - a.middle) - a.middle


@njit
def _shares_of_half(count, half, halves, me):
    """Return which of `count` things of a half are for a thread: both halves are dealt out as one, or by units each."""
    if me.by_units:
        return shares(count, 1, me)
    first, last = shares(count * halves, 1, me)
    return max(0, min(count, first - half * count)), max(0, min(count, last - half * count))


@njit
def _flat(weights):
    """Return the arrays of a `LayerWeights`, each as one row of numbers."""
    return weights[0].reshape(-1), weights[1].reshape(-1), weights[2], weights[3], weights[4]


@cache
def backward_kernel(cell: Cell, dtype, mode: str):
    """Build the kernel that turns d_state[:, T] and d_output into d_state, dx and (unless scaled) d_weight….

    "scaled" has an exponent for every step, and rescales the adjoint at each; "states" and "gates" clip at each, see
    `adjoint.Clip`; "plain" does neither.
    """
    SCALED, JOINT = mode == "scaled", cell.joint
    SINGLE, MANY = panel_units(1, one_row=True), panel_units(1)
    pack, finish_chunk = _pack(cell, dtype), _chunk_gradients(cell, dtype, SCALED)
    run, finish = _steps(cell, dtype, mode)

    @cached(f"{cell.name}-{dtype}-{mode}", cell.step_backward, *(cell.reset or ()))
    def backward(arguments, counter, mails, parties, by_units, rank):
        """Do the part of thread `rank` of `parties`, in units or in sequences."""
        arguments, counter, mails = borrow((arguments, counter, mails))
        post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
        a, me = BackwardArguments(*arguments), Party(counter, parties, by_units, rank)
        at, (T, B, _) = BackwardPlaces(*a.places), a.d_output.shape
        most, chunks = SINGLE if B == 1 else MANY, (T + a.chunk - 1) // a.chunk
        add = not SCALED and a.middle < B and not a.apart
        meet = parties > 1 and (by_units or parties > 2 or a.middle != a.M)  # or else each has a half of the batch
        if not SCALED:  # a rescaled adjoint keeps what is small
            control = flush_subnormals()
        pack(a, at, most, me)
        if add:
            for values in _flat(a.sums[1]):
                n0, n1 = shares(len(values), 1, me)
                values[n0:n1] = 0
        if parties > 1:
            wait_for_all(counter, parties)
        for c in range(chunks - 1, -1, -1):
            for group in groups_of(B, a.M, me):
                run(a, at, c, group, most, me)
            if meet:
                wait_for_all(counter, parties)
            finish_chunk(a, at, c, me)
        for group in groups_of(B, a.M, me):
            finish(a, at, group, most, me)
        if not SCALED:
            keep_subnormals(control)
        if add:
            if parties > 1:
                wait_for_all(counter, parties)
            for total, values in zip(_flat(a.sums[0]), _flat(a.sums[1])):  # noqa: B905 (Numba knows no strict)
                n0, n1 = shares(len(values), 1, me)
                total[n0:n1] += values[n0:n1]
        wait_until_done(mails, parties, rank)
        if JOINT and rank == 0 and not SCALED:
            for half in a.sums:
                half[3][:] = half[2]  # d_bias_hh is d_bias_ih

    return backward


@cache
def _steps(cell: Cell, dtype, mode: str):
    """Build the steps of a chunk, of one group of sequences or of some of its units; and what sets slot 0."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (ABOVE, SAVED, PEEPHOLE, DAX, DAH, DP, TOTAL, _) = backward_panel(cell, V)
    VECTORS, JOINT, RESET, GATES = R // V, cell.joint, cell.reset is not None, mode == "gates"
    product, store_da = tile_product(1, dtype, V, R), store_gates(V)
    load, (load_rows, store_rows) = moves(V, True)[0], moves(V, False)
    IS_WHOLE = mode in WHOLE
    _, step_panel = backward_step(cell, V, IS_WHOLE)
    after_reset, clip_gates = _after_reset(cell, dtype) if RESET else None, _clip_gates(cell, V) if GATES else None
    limit = limit_whole(mode) if IS_WHOLE else None

    @part(cell.name, dtype, mode, forceinline=True)
    def begin(a, at, group, most, me):
        """Return a thread's sequences and tiles, where its states are, and where dL/da of sequence 0 would lie."""
        (_, B, H), tiles = a.d_output.shape, a.tables[me.rank, 0]
        units, first, last = (H + V - 1) // V, group * a.M, min(B, group * a.M + a.M)
        u0, u1 = shares(units, most, me) if me.by_units else (0, units)
        cut = max(first, min(a.middle, last))  # no tile has sequences of both halves
        count = list_tiles(tiles, first, cut, u0, u1, units, most, VECTORS, V)
        count += list_tiles(tiles[count:], cut, last, u0, u1, units, most, VECTORS, V)
        states = at.states + group * at.apart + tiles_at_most(u0 // most, most, a.M, R, V) * S * R
        return first, last, tiles, count, states, at.da_last + group * at.apart - first * units * V

    @part(cell.name, dtype, mode, forceinline=True)
    def through_weights(a, at, states, rows, tile):
        """Add to dL/dh of a tile what comes back through W_hh from those rows of dah."""
        work, H = a.work, a.d_output.shape[2]
        row = (H + V - 1) // V * V * G
        dah = at.dah + rows[int(tile[2] >= a.middle)] * row
        product(work, states, work, states, tile[1] * V, work, dah, row, work, at.weight_hh, G * H, tile)

    @part(cell.name, dtype, mode, forceinline=True)
    def run(a, at, c, group, most, me):
        (T, B, H), M, work, panel = a.d_output.shape, a.saved.shape[3], a.work, a.panels[me.rank]
        units, saved = (H + V - 1) // V, a.saved.reshape(-1)
        row, one = units * G * V, units * V
        d_state, d_output = a.d_state.reshape(-1), a.d_output.reshape(-1)
        first, last, tiles, count, first_states, da_last = begin(a, at, group, most, me)
        of_state, of_peepholes = ((T + 1) * B * H, H, V), (one, 0, V)
        # Where threads share units now or shared them then, there is one group, here or there.
        of_saved, before = (V, KS * V, M * KS * V), first // M * M
        first_saved = before * (T * units - 1) * KS * V

        shortest, t0 = a.lengths.min(), c * a.chunk
        for t in range(min(t0 + a.chunk, T) - 1, t0 - 1, -1):
            rows, rows_behind = _rows_of(a, t), _rows_of(a, t + 1)
            kept, here, there = first_saved + t * units * M * KS * V, t * B * H, (t + 1) * B * H
            if me.by_units and t < T - 1:
                wait_for_all(me.counter, me.parties)
            if IS_WHOLE:
                for k in range(count if t < T - 1 else 0):
                    tile, states = tile_at(tiles, k), first_states + k * S * R
                    through_weights(a, at, states, rows_behind, tile)
                    store_rows(work, states, R, d_state, there, S, of_state, tile, H)
                limit(a, t, first, last, me.rank)
            for k in range(count):
                tile, states = tile_at(tiles, k), first_states + k * S * R
                start = rows[int(tile[2] >= a.middle)]
                dax, dah, dp = at.dax + start * row, at.dah + start * row, at.dp + start * P * one
                bring(saved, kept, K, of_saved, tile)
                if IS_WHOLE or t == T - 1:
                    load_rows(work, states, R, d_state, there, S, of_state, tile, H)
                else:
                    bring(d_output, here, 1, of_state, tile)
                    through_weights(a, at, states, rows_behind, tile)
                if not IS_WHOLE:
                    load_rows(panel, ABOVE, R, d_output, here, 1, of_state, tile, H)
                load(panel, SAVED, R, saved, kept, K, of_saved, tile, H)
                load(panel, PEEPHOLE, R, work, at.peephole, P, of_peepholes, tile, H)
                step_panel(panel, work[states:], tile, t, a.lengths, shortest)
                store_da(panel, DAX, R, work, dax, G, row, tile, H)
                if not JOINT:
                    store_da(panel, DAH, R, work, dah, G, row, tile, H)
                store_da(panel, DP, R, work, dp, P, P * one, tile, H)
                if RESET:
                    store_da(panel, DAX + (G - 1) * R, R, work, da_last, 1, one, tile, H)
                store_rows(panel, TOTAL, R, d_state, there, S, of_state, tile, H)
            if GATES:
                clip_gates(a, at, t, rows, da_last, first, last, me.rank)
            if RESET:
                if me.by_units:
                    wait_for_all(me.counter, me.parties)
                after_reset(a, at, panel, rows, da_last, kept, first_states, tiles[:count])
                if GATES:
                    for b in range(first, last):
                        start = (rows[int(b >= a.middle)] + b) * row
                        clamp_row(work, at.dax + start, G * H, a.limit[0], a.counts[me.rank])

    @part(cell.name, dtype, mode, forceinline=True)
    def finish(a, at, group, most, me):
        """Set dL/dstate of slot 0: what comes back from step 0."""
        _, slots, B, H = a.d_state.shape
        _, _, tiles, count, first_states, _ = begin(a, at, group, most, me)
        for k in range(count):
            tile, states = tile_at(tiles, k), first_states + k * S * R
            through_weights(a, at, states, _rows_of(a, 0), tile)
            store_rows(a.work, states, R, a.d_state.reshape(-1), 0, S, (slots * B * H, H, V), tile, H)

    return run, finish


@cache
def _after_reset(cell: Cell, dtype):
    """Build what follows dL/da of the last gate: dL/d(r ∘ h), and from it gate r and its part of dL/dh."""
    G, S, K, KS, V = len(cell.gates), len(cell.states), cell.saved, numbers_saved(cell), VECTOR_BYTES // dtype.itemsize
    R, (ABOVE, SAVED, _, DAX, *_) = backward_panel(cell, V)
    product, load, store_rows = tile_product(1, dtype, V, R), moves(V, True)[0], moves(V, False)[1]
    reset_panel = backward_reset(cell, V)

    @part(cell.name, dtype, forceinline=True)
    def after_reset(a, at, panel, rows, da_last, kept, first_states, tiles):
        H, M, work, saved = a.d_output.shape[2], a.saved.shape[3], a.work, a.saved.reshape(-1)
        one = (H + V - 1) // V * V
        for k in range(len(tiles)):
            tile = tile_at(tiles, k)
            product(panel, ABOVE, work, at.zeros, 0, work, da_last, one, work, at.weight_last, H, tile)
            load(panel, SAVED, R, saved, kept + K * V, 2, (V, KS * V, M * KS * V), tile, H)
            reset_panel(panel, work[first_states + k * S * R :], tile[1] * tile[3] * V)
            dax = at.dax + rows[int(tile[2] >= a.middle)] * G * one
            store_rows(panel, DAX, R, work, dax, 1, (0, G * one, G * V), tile, H)

    return after_reset


@cache
def _clip_gates(cell: Cell, V: int):
    """Build the clipping of dL/da of a step, for sequences first…last, which counts as `adjoint.Clip` says."""
    G, JOINT, RESET = len(cell.gates), cell.joint, cell.reset is not None

    @part(cell.name, V, forceinline=True)
    def clip_gates(a, at, t, rows, da_last, first, last, rank):
        H, work, counts = a.d_output.shape[2], a.work, a.counts[rank]
        one, depth = (H + V - 1) // V * V, G * H
        for b in range(first, last):
            start = (rows[int(b >= a.middle)] + b) * G * one
            clamp_row(work, at.dax + start, depth, a.limit[0], counts)
            if not JOINT:
                clamp_row(work, at.dah + start, depth, a.limit[0], counts)
            if RESET:  # the last gate's copy for the product with W_hn, counted apart
                clamp_row(work, da_last + b * one, H, a.limit[0], counts[2:])
            if t < a.lengths[b]:
                counts[1] += depth if JOINT else 2 * depth

    return clip_gates


@cache
def _pack(cell: Cell, dtype):
    """Build the packing of weights, the part of one thread. With a reset W_hn has a product of its own."""
    G, RESET, HEAD = len(cell.gates), cell.reset is not None, len(cell.gates) - bool(cell.reset)
    MANY, V = panel_units(1), VECTOR_BYTES // dtype.itemsize

    @part(cell.name, dtype)
    def pack(a, at, most, me):
        work, H = a.work, a.weight_hh.shape[1]
        units, inputs = (H + V - 1) // V, (a.weight_ih.shape[1] + V - 1) // V
        (u0, u1), (i0, i1) = shares(units, most, me), shares(inputs, MANY, me)
        pack_columns(work, at.weight_ih, a.weight_ih, G, G, MANY, i0, i1)
        pack_columns(work, at.weight_hh, a.weight_hh, G, HEAD, most, u0, u1)
        if RESET:
            pack_columns(work, at.weight_last, a.weight_hh[HEAD * H :], 1, 1, most, u0, u1)
        if me.rank == 0:
            work[at.zeros : at.zeros + (units + inputs) * V] = 0
            pack_peepholes(work, at.peephole, a.peephole, H)

    return pack


@cache
def _chunk_gradients(cell: Cell, dtype, scaled: bool):
    """Build what follows a chunk of steps: dx, and (unless scaled) the gradients of weights, the part of one thread."""
    G, P, V = len(cell.gates), len(cell.peepholes), VECTOR_BYTES // dtype.itemsize
    HEAD = G - bool(cell.reset)
    JOINT, RESET, SCALED = cell.joint, cell.reset is not None, scaled
    dx_rows, add_product = multiply_columns(dtype), add_transposed(dtype)

    @part(cell.name, dtype, scaled)
    def finish_chunk(a, at, c, me):
        """The rows of a half lie together: a thread that has all strips of one half reads no row of another thread."""
        (T, B, I), H, inputs, work, panel = a.x.shape, a.state.shape[3], a.dx.shape[2], a.work, a.panels[me.rank]
        units, t0, halves = (H + V - 1) // V, c * a.chunk, 1 if a.middle == B else 2
        row, one, steps, x, state = units * G * V, units * V, min(a.chunk, T - t0), a.x.reshape(-1), a.state.reshape(-1)
        for half in range(halves):
            d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_peephole = a.sums[half]
            first, count = (a.middle, B - a.middle) if half else (0, a.middle)
            start, rows = _rows_of(a, t0)[half] + first, steps * count
            dax, dah, dp = at.dax + start * row, at.dah + start * row, at.dp + start * P * one
            # Rows of dx at even distances: all of them, or one by one those of a step or of a sequence.
            s0, s1 = _shares_of_half(rows if halves == 1 else steps, half, halves, me)
            into, of = (t0 * B + s0, s0) if halves == 1 else ((t0 + s0) * B + first, s0 * count)
            runs, length, to_next, distances = 1, s1 - s0, (0, 0), (1, 1)
            if halves == 2 and count > s1 - s0:
                runs, length, to_next = s1 - s0, count, (B, count)
            elif halves == 2:
                runs, to_next, distances = count, (1, 1), (B, count)
            for k in range(runs):
                dx_rows(
                    a.dx.reshape(-1), (into + k * to_next[0]) * inputs, distances[0] * inputs, inputs,
                    address(work, at.zeros), address(work, dax + (of + k * to_next[1]) * row), distances[1] * row,
                    address(work, at.weight_ih), G * H, length, panel,
                )  # fmt: skip
            if not SCALED:
                strips = _shares_of_half(units * G, half, halves, me)
                x0, x_runs, h0, h_runs = (t0 * B + first) * I, (count, B * I), (t0 * B + first) * H, (count, B * H)
                add_sums(d_bias_ih, work, dax, row, G, rows, strips, panel)
                if 2 * I <= V:  # as columns they would fill less than half a vector
                    flat = d_weight_ih.reshape(-1)
                    add_narrow(flat, work, dax, row, G, x, x0, x_runs, I, I, rows, strips, panel)
                else:
                    add_product(d_weight_ih, work, dax, row, G, (0, G), x, x0, x_runs, I, rows, strips, panel)
                if not JOINT:
                    add_sums(d_bias_hh, work, dah, row, G, rows, strips, panel)
                add_product(d_weight_hh, work, dah, row, G, (0, HEAD), state, h0, h_runs, H, rows, strips, panel)
                if RESET:
                    r_h = a.reset_h.reshape(-1)
                    add_product(d_weight_hh, work, dah, row, G, (HEAD, G), r_h, h0, h_runs, H, rows, strips, panel)
                if P:
                    strips = _shares_of_half(units * P, half, halves, me)
                    add_sums(d_peephole, work, dp, P * one, P, rows, strips, panel)

    return finish_chunk
