"""The forward pass of one layer in one direction: all steps of a sequence in one kernel. Shapes and layout: see `cpu`.

Each kernel is made once from a cell's `step`. A tile of the product with W_hh leaves the sums of all gates of a few
sequences and units in a panel, where the cell takes them up at once. Products with the inputs need no recurrence: they
are taken for a chunk of steps at a time, while the chunk is in cache.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..cells import Cell
from . import Array
from .calls import borrow, job
from .compiling import cached, part
from .panels import (
    bring,
    forward_panel,
    forward_reset,
    forward_step,
    grouped,
    moves,
    numbers_saved,
    panels_at_most,
    spread_gates,
    tile_product,
    tiles_at_most,
)
from .products import (
    list_tiles,
    multiply,
    pack_gates,
    pack_peepholes,
    pack_shared,
    panel_units,
    shared_vectors,
    tile_at,
    whole_units,
)
from .simd import VECTOR_BYTES, address
from .team import Party, groups_of, post, shares, wait_for_all, wait_until_done

__all__ = ["ForwardArguments", "forward_kernel", "forward_places"]


class ForwardArguments(NamedTuple):
    """What a forward kernel takes: a `LayerWeights`, what becomes a `LayerTrace`, and where it works.

    Each thread has a panel, and two lists of tiles in `tables`. `chunk` steps are taken at a time, M sequences form a
    group; `packed` says that weights lie packed in `work` already.
    """

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    peephole: Array
    lengths: NDArray[np.int64]
    state: Array
    saved: Array
    reset_h: Array
    work: Array
    places: tuple[int, ...]
    panels: Array
    tables: NDArray[np.int64]
    chunk: int
    M: int
    packed: bool


class ForwardPlaces(NamedTuple):
    """Where in `work` each region begins, those that a group has of its own for the first one, the next `apart`.

    Packed weights, for a reset W_hn by itself; ax of a chunk, states tile by tile, and for a reset sums of its gates.
    """

    weight_ih: int
    weight_hh: int
    bias_ih: int
    bias_hh: int
    peephole: int
    weight_last: int
    ax: int
    states: int
    sums: int
    last_sum: int
    apart: int
    end: int


@lru_cache(1024)
def forward_places(cell: Cell, V: int, I: int, H: int, chunk: int, M: int, N: int) -> ForwardPlaces:
    """Return the places of N groups of M sequences, `chunk` steps at a time."""
    G, P, RESET, R = len(cell.gates), len(cell.peepholes), int(cell.reset is not None), forward_panel(cell, V)[0]
    row = -(-H // V) * V
    weights = G * row * I, G * row * H, G * row, G * row, P * row, RESET * H * row
    most = panel_units(1 if RESET else G, one_row=M * N == 1)
    states = tiles_at_most(panels_at_most(-(-H // V), most), most, M, R, V) * len(cell.states) * R
    return ForwardPlaces(*grouped(weights, (chunk * M * G * row, states, RESET * M * G * row, RESET * M * row), N))


@cache
def forward_kernel(cell: Cell, dtype, keep: bool):
    """Build the kernel that fills state[:, 1:] and, with `keep`, saved and reset_h."""
    G, RESET = len(cell.gates), cell.reset is not None
    SINGLE, MANY, LAST_G = panel_units(G, one_row=True), panel_units(G), 1 if RESET else G
    SINGLE_LAST, MANY_LAST = panel_units(LAST_G, one_row=True), panel_units(LAST_G)
    pack, run = _pack(cell, dtype), _steps(cell, dtype, keep)

    @cached(f"{cell.name}-{dtype}-{'keep' if keep else 'infer'}", cell.whole_step, *(cell.reset or ()))
    def forward(arguments, counter, mails, parties, by_units, rank):
        """Do the part of thread `rank` of `parties`, in units or in sequences."""
        arguments, counter, mails = borrow((arguments, counter, mails))
        post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
        a, me = ForwardArguments(*arguments), Party(counter, parties, by_units, rank)
        most, most_last = (SINGLE, SINGLE_LAST) if a.x.shape[1] == 1 else (MANY, MANY_LAST)
        if not a.packed:
            pack(a, ForwardPlaces(*a.places), most, most_last, me)
            if parties > 1:
                wait_for_all(counter, parties)
        for group in groups_of(a.x.shape[1], a.M, me):
            run(a, ForwardPlaces(*a.places), group, most, most_last, me)
        wait_until_done(mails, parties, rank)

    return forward


@cache
def _steps(cell: Cell, dtype, keep: bool):
    """Build all steps of one group of sequences, or of some of its units."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (SUM, _, PEEPHOLE, SAVED, *_) = forward_panel(cell, V)
    VECTORS, RESET, KEEP = R // V, cell.reset is not None, keep
    (input_sums, tile_sums), last_sums = _sums(cell, dtype), tile_product(1, dtype, V, R)
    (load, store), (load_rows, store_rows) = moves(V, True), moves(V, False)
    step_panel = forward_step(cell, dtype, V, keep)
    until_reset = _until_reset(cell, dtype, keep) if RESET else None

    @part(cell.name, dtype, keep, forceinline=True)
    def run(a, at, group, most, most_last, me):
        (T, B, _), H, work, panel = a.x.shape, a.state.shape[3], a.work, a.panels[me.rank]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        row, one, first, last = units * G * V, units * V, group * a.M, min(B, group * a.M + a.M)
        state, saved, reset_h = a.state.reshape(-1), a.saved.reshape(-1), a.reset_h.reshape(-1)
        slot, lean = (T + 1) * B * H, len(a.state) < S
        of_state, of_saved = (slot, H, V), (V, KS * V, a.M * KS * V)
        of_gates, of_peepholes = (V, row, G * V), (one, 0, V)
        # Where the rows of sequence 0 would lie, if the group began with it.
        first_ax, sums = at.ax + group * at.apart - first * row, at.sums + group * at.apart - first * row
        last_sum = at.last_sum + group * at.apart - first * one
        first_saved = group * a.M * (T * units - 1) * KS * V

        u0, w0, u1, w1 = 0, 0, units, units
        if me.by_units:
            u0, u1 = shares(units, most, me)
            w0, w1 = shares(units, most_last, me)
        shortest = a.lengths.min()
        first_tiles, last_tiles = a.tables[me.rank, 0], a.tables[me.rank, 1]
        first_count = list_tiles(first_tiles, first, last, u0, u1, units, most, VECTORS, V)
        last_count = list_tiles(last_tiles, first, last, w0, min(w1, whole), whole, most_last, VECTORS, V)
        # The cell takes a last unit that fills no vector as dense as its gates lie, if no sequence ends before others.
        dense = H % V if shortest >= T else V
        last_count += list_tiles(last_tiles[last_count:], first, last, max(w0, whole), w1, units, 1, VECTORS, dense)
        first_states = at.states + group * at.apart + tiles_at_most(w0 // most_last, most_last, a.M, R, V) * S * R
        for k in range(last_count):
            load_rows(work, first_states + k * S * R, R, state, 0, S, of_state, tile_at(last_tiles, k), H)

        for t0 in range(0, T, a.chunk):
            steps = min(a.chunk, T - t0)
            input_sums(a, at, first_ax, t0, steps, first, last, u0, u1)
            for t in range(t0, t0 + steps):
                old, kept = t * B * H, first_saved + t * units * a.M * KS * V
                ax = first_ax + (t - t0) * (last - first) * row
                after, reset_at = (t + 1) * B * H, t * B * H if KEEP else 0
                if me.by_units:
                    wait_for_all(me.counter, me.parties)
                if RESET:
                    until_reset(a, at, panel, ax, kept, sums, last_sum, first_tiles[:first_count], t, shortest)
                    if me.by_units:
                        wait_for_all(me.counter, me.parties)
                for k in range(last_count):
                    tile, states = tile_at(last_tiles, k), first_states + k * S * R
                    if KEEP:
                        bring(saved, kept, K, of_saved, tile)
                    if RESET:
                        to, begin = SUM + (G - 1) * R, last_sum + tile[2] * one + tile[0] * V
                        last_sums(panel, to, work, begin, one, reset_h, reset_at, H, work, at.weight_last, H, tile)
                        load(panel, SUM, R, work, sums, G - 1, of_gates, tile, H)
                    else:
                        tile_sums(a, at, panel, ax, state, old, tile)
                    load(panel, PEEPHOLE, R, work, at.peephole, P, of_peepholes, tile, H)
                    step_panel(panel, work[states:], tile, t, a.lengths, shortest)
                    store_rows(work, states, R, state, after, 1, of_state, tile, H)
                    if not lean:
                        store_rows(work, states + R, R, state, after + slot, S - 1, of_state, tile, H)
                    if KEEP:
                        store(panel, SAVED, R, saved, kept, K, of_saved, tile, H)
        for k in range(last_count if lean else 0):  # all but h lie behind its T + 1 slots
            states, tile = first_states + k * S * R, tile_at(last_tiles, k)
            store_rows(work, states + R, R, state, slot, S - 1, of_state, tile, H)

    return run


@cache
def _until_reset(cell: Cell, dtype, keep: bool):
    """Build all of a step before the product with r ∘ h: that, sums of the gates, of the last what it starts from."""
    G, K, KS, KEEP, V = len(cell.gates), cell.saved, numbers_saved(cell), keep, VECTOR_BYTES // dtype.itemsize
    R, (SUM, _, _, SAVED, OLD, NEW, _) = forward_panel(cell, V)
    gate_sums, reset_panel = tile_product(G, dtype, V, R), forward_reset(cell, dtype, V)
    store, (load_rows, store_rows) = moves(V, True)[1], moves(V, False)

    @part(cell.name, dtype, keep, forceinline=True)
    def until_reset(a, at, panel, ax, kept, sums, last_sum, tiles, t, shortest):
        B, H, work, state, reset_h = a.x.shape[1], a.state.shape[3], a.work, a.state.reshape(-1), a.reset_h.reshape(-1)
        units, old = (H + V - 1) // V, t * B * H
        row, of_state, of_sum, reset_at = units * G * V, (0, H, V), (0, units * V, V), old if KEEP else 0
        for k in range(len(tiles)):
            tile = tile_at(tiles, k)
            begin = ax + tile[2] * row + tile[0] * G * V
            gate_sums(panel, SUM, work, begin, row, state, old, H, work, at.weight_hh, H, tile)
            load_rows(panel, OLD, R, state, old, 1, of_state, tile, H)
            reset_panel(panel, panel, tile, t, a.lengths, shortest)
            store_rows(panel, NEW, R, reset_h, reset_at, 1, of_state, tile, H)
            if KEEP:
                store(panel, SAVED, R, a.saved.reshape(-1), kept + K * V, 2, (V, KS * V, a.M * KS * V), tile, H)
            store(panel, SUM, R, work, sums, G - 1, (V, row, G * V), tile, H)
            store(panel, SUM + (G - 1) * R, R, work, last_sum, 1, of_sum, tile, H)

    return until_reset


@cache
def _sums(cell: Cell, dtype):
    """Build what sums up in the gates: products with the inputs of a chunk of steps, and with the state for a tile."""
    G, JOINT, RESET, V = len(cell.gates), cell.joint, cell.reset is not None, VECTOR_BYTES // dtype.itemsize
    R, (SUM, AX, _, SAVED, *_) = forward_panel(cell, V)
    of_whole_units, of_shared_vectors, of_tile = multiply(G, dtype), multiply(1, dtype), tile_product(G, dtype, V, R)
    load, spread = moves(V, True)[0], spread_gates(G, V)

    @part(cell.name, dtype)
    def input_sums(a, at, first_ax, t0, steps, first, last, u0, u1):
        """Set ax of a chunk, for sequences first…last and units u0…u1."""
        (_, B, I), H, x, work = a.x.shape, a.state.shape[3], a.x.reshape(-1), a.work
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        shared, row, end = shared_vectors(H, V, G), units * G * V, whole * G * V
        pieces, rows = (1, steps * B) if last - first == B else (steps, last - first)
        for k in range(pieces):
            ax, source = first_ax + (k * rows + first) * row, address(x, ((t0 + k) * B + first) * I)
            of_whole_units(
                address(work, ax), row, address(work, at.bias_ih), 0, source, I,
                address(work, at.weight_ih), I, rows, u0, min(u1, whole), whole,
            )  # fmt: skip
            if u1 > whole:
                of_shared_vectors(
                    address(work, ax + end), row, address(work, at.bias_ih + end), 0, source, I,
                    address(work, at.weight_ih + end * I), I, rows, 0, shared, shared,
                )  # fmt: skip

    @part(cell.name, dtype, forceinline=True)
    def tile_sums(a, at, panel, ax, state, old, tile):
        """Leave the gate sums of a tile in its panel, ax among them or, where it counts apart, beside them.

        Gates that share vectors are summed up where `saved` comes to lie, which has more numbers than they have.
        """
        work, H, first = a.work, a.state.shape[3], tile[2]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        row, end, lanes = units * G * V, whole * G * V, H - whole * V
        begin, stride = (ax, row) if JOINT else (at.bias_hh, 0)
        if tile[0] < whole:
            begin += first * stride + tile[0] * G * V
            of_tile(panel, SUM, work, begin, stride, state, old, H, work, at.weight_hh, H, tile)
            load(panel, AX, R, work, ax, 0 if JOINT else G, (V, row, G * V), tile, H)
        else:
            shared = shared_vectors(H, V, G)
            of_shared_vectors(
                address(panel, SAVED), shared * V, address(work, begin + first * stride + end), stride,
                address(state, old + first * H), H, address(work, at.weight_hh + end * H), H, tile[3],
                0, shared, shared,
            )  # fmt: skip
            spread(panel, SUM, R, panel, SAVED, shared * V, lanes, tile)
            if not JOINT:
                spread(panel, AX, R, work, ax + first * row + end, row, lanes, tile)

    return input_sums, tile_sums


@cache
def _pack(cell: Cell, dtype):
    """Build the packing of weights and biases, the part of one thread. With a reset W_hn has a product of its own."""
    G, JOINT, RESET, HEAD = len(cell.gates), cell.joint, cell.reset is not None, len(cell.gates) - bool(cell.reset)
    MANY, V = panel_units(G), VECTOR_BYTES // dtype.itemsize

    @part(cell.name, dtype)
    def pack(a, at, most, most_last, me):
        work, I, H = a.work, a.weight_ih.shape[1], a.weight_hh.shape[1]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        u0, u1 = shares(units, most, me)
        v0, v1 = shares(units, MANY, me)
        pack_gates(work, at.weight_ih, a.weight_ih, G, G, MANY, v0, min(v1, whole), whole)
        pack_gates(work, at.weight_hh, a.weight_hh, G, HEAD, most, u0, min(u1, whole), whole)
        if whole < units and me.rank == me.parties - 1:
            pack_shared(work, at.weight_ih + whole * G * V * I, a.weight_ih, G)
            pack_shared(work, at.weight_hh + whole * G * V * H, a.weight_hh, G)
        if RESET:
            w0, w1 = shares(units, most_last, me)
            pack_gates(work, at.weight_last, a.weight_hh[HEAD * H :], 1, 1, most_last, w0, w1, units)
        if me.rank == 0:
            _pack_biases(work, at.bias_ih, at.bias_hh, a.bias_ih, a.bias_hh, G, JOINT, whole)
            pack_peepholes(work, at.peephole, a.peephole, H)

    return pack


@njit
def _pack_biases(work, to_ih, to_hh, bias_ih, bias_hh, gates, joint, whole):
    """Pack the biases in the order unit, gate, lane; of a joint cell the sum of both, to where that of ax belongs."""
    V, H = VECTOR_BYTES // work.itemsize, bias_ih.shape[0] // gates
    row = (H + V - 1) // V * V * gates
    work[to_ih : to_ih + row] = work[to_hh : to_hh + row] = 0
    for g in range(gates):
        for j in range(H):
            u, v = j // V, j % V
            to = u * gates * V + g * (V if u < whole else H % V) + v
            work[to_ih + to] = bias_ih[g * H + j] + bias_hh[g * H + j] if joint else bias_ih[g * H + j]
            work[to_hh + to] = bias_hh[g * H + j]
