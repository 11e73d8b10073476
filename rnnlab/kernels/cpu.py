"""Sequence kernels for the CPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)    weight_ih (G·H, I), weight_hh (G·H, H)    state, d_state (S, T+1, B, H), slot 0 is the initial one

V units fill one vector register; U such vectors hold all H, the last one padded. What stays inside is kept in that
order: ax is (N, T, M, U, G, V), `saved` is (N, T, U, M, K, V), for N groups of M sequences, one a thread that shares
the batch; dax and dah are (T, B, U, G, V) without the padding, for each half of the batch by itself. Where the gates of
the last unit fit into fewer than G vectors, they share them in ax, biases and packed weights.

Each kernel is made once from a cell's `step` and `step_backward`, and runs the whole sequence. A tile of the product
with W_hh leaves the sums of all gates of a few sequences and units in a panel, where the cell takes them up at once;
going back, what the tile makes of dL/dah is added to the states' adjoint, which `step_backward` takes up. Products that
need no recurrence (with the inputs, dL/dx, the gradients of weights) are taken for a chunk of steps at a time, while
the chunk is in cache.
"""

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

from ..cells import CELLS, Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights, threads
from .calls import borrow, job
from .clip import clamp, shrinkage, squares
from .compiling import cached, part
from .panels import (
    backward_panel,
    backward_reset,
    backward_step,
    bring,
    forward_panel,
    forward_reset,
    forward_step,
    moves,
    numbers_saved,
    put_numbers,
    regions,
    spread_gates,
    store_gates,
    take_numbers,
    tile_product,
)
from .products import (
    PANEL,
    add_narrow,
    add_sums,
    add_transposed,
    list_tiles,
    multiply,
    multiply_columns,
    pack_columns,
    pack_gates,
    pack_shared,
    panel_units,
    scratch_size,
    share,
    shared_vectors,
    whole_units,
)
from .simd import VECTOR_BYTES, address
from .subnormals import flush_subnormals, keep_subnormals
from .team import CACHE, empty, plan, post, run_together, wait_for_all, wait_until_done

__all__ = ["Call", "Diagonals", "backward", "chunk_steps", "diagonals", "direct", "forward", "jacobian"]
__all__ += ["prepare_backward", "prepare_forward", "repeat", "warmup"]

#: Rows (steps times batch) in a chunk: as many as have so many gates, but no fewer and no more than these, and no part
#: of a step.
_GATES, _ROWS, _MOST_ROWS = 2**17, 256, 512

#: Numbers between what two threads write over and over: at least a page, beyond which no core fetches ahead. Closer,
#: each would fetch lines that the other is about to write, and both would wait for them at every step.
_APART = 1024


@njit
def _tile(table, k):
    return table[k, 0], table[k, 1], table[k, 2], table[k, 3], table[k, 4]


@njit
def _chunk_rows(t, chunk, B, middle, span):
    """Return which row of dax is that of sequence b at step t, less b: for b below `middle`, and for the others.

    A half of the batch has its rows together, step after step, in `span` rows. There are two of each: threads may still
    read one chunk while the next is written.
    """
    halves, turn, step = 1 if middle == B else 2, t // chunk % 2, t % chunk
    return turn * halves * span + step * middle, (turn * halves + 1) * span + step * (B - middle) - middle


@njit
def _shares_of_half(count, half, halves, rank, parties, by_units):
    """Return which of `count` things of a half are for a thread: both halves are dealt out as one, or by units each."""
    if by_units:
        return _shares(count, 1, rank, parties)
    first, last = _shares(count * halves, 1, rank, parties)
    return max(0, min(count, first - half * count)), max(0, min(count, last - half * count))


@njit
def _flat(weights):
    """Return the arrays of a `LayerWeights`, each as one row of numbers."""
    return weights[0].reshape(-1), weights[1].reshape(-1), weights[2], weights[3], weights[4]


@njit
def _groups_of(B, M, rank, parties, by_units):
    """Return which of the groups of M sequences are for thread `rank` of `parties`."""
    groups = (B + M - 1) // M
    return range(groups) if by_units else range(groups * rank // parties, groups * (rank + 1) // parties)


@njit
def _shares(count, most, rank, parties):
    return share(count, most, rank, parties), share(count, most, rank + 1, parties)


@njit
def _tiles(units, M, R, V):
    """Return how many tiles so many units of M sequences have at the most, with regions of R numbers in a panel."""
    rows = R // V // PANEL
    return units * ((M + rows - 1) // rows + 1)  # one more, for both halves of the batch have theirs


# Forward ------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _forward_work(cell: Cell, V: int, I: int, H: int, chunk: int, M: int, N: int) -> tuple[int, ...]:
    """Regions of the work space: packed weights, biases, peepholes, for a reset W_hn; what each group has of its own.

    That is ax of a chunk, states tile by tile, and for a reset sums; see `_grouped`.
    """
    G, P, RESET, R = len(cell.gates), len(cell.peepholes), int(cell.reset is not None), forward_panel(cell, V)[0]
    row = -(-H // V) * V
    weights = G * row * I, G * row * H, G * row, G * row, P * row, RESET * H * row
    own = chunk * M * G * row, _tiles(-(-H // V), M, R, V) * len(cell.states) * R, RESET * M * G * row, RESET * M * row
    return _grouped(weights, own, N)


def _grouped(common: tuple[int, ...], own: tuple[int, ...], N: int) -> tuple[int, ...]:
    """Return where each region begins, those of the first group last; how far groups lie apart; where all end."""
    *places, end = regions(*common, *own)
    begin, apart = places[len(common)], end - places[len(common)] + _APART
    return *places, apart, begin + N * apart


@cache
def _forward_kernel(cell: Cell, dtype, keep: bool):
    G, RESET = len(cell.gates), cell.reset is not None
    SINGLE, MANY, LAST_G = panel_units(G, one_row=True), panel_units(G), 1 if RESET else G
    SINGLE_LAST, MANY_LAST = panel_units(LAST_G, one_row=True), panel_units(LAST_G)
    pack, run = _forward_pack(cell, dtype), _forward_steps(cell, dtype, keep)

    @cached(f"{cell.name}-{dtype}-{'keep' if keep else 'infer'}", cell.whole_step, *(cell.reset or ()))
    def forward(arguments, counter, mails, parties, by_units, rank):
        """Fill state[:, 1:], saved and reset_h: the part of thread `rank` of `parties`, in units or in sequences."""
        arguments, counter, mails = borrow((arguments, counter, mails))
        post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
        B, (M, packed) = arguments[0].shape[1], arguments[-2:]
        most, most_last = (SINGLE, SINGLE_LAST) if B == 1 else (MANY, MANY_LAST)
        if not packed:
            pack(arguments, most, most_last, rank, parties)
            if parties > 1:
                wait_for_all(counter, parties)
        for group in _groups_of(B, M, rank, parties, by_units):
            run(arguments, counter, group, most, most_last, parties, by_units, rank)
        wait_until_done(mails, parties, rank)

    return forward


@cache
def _forward_steps(cell: Cell, dtype, keep: bool):
    """Build all steps of one group of sequences, or of some of its units."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (SUM, _, PEEPHOLE, SAVED, OLD, NEW, _) = forward_panel(cell, V)
    VECTORS, RESET, KEEP = R // V, cell.reset is not None, keep
    input_sums, tile_sums = _forward_sums(cell, dtype)
    gate_sums, last_sums = tile_product(G, dtype, V, R), tile_product(1, dtype, V, R)
    (load, store), (load_rows, store_rows) = moves(V, True), moves(V, False)
    step_panel = forward_step(cell, dtype, V, keep)
    reset_panel = forward_reset(cell, dtype, V) if RESET else None

    @part(cell.name, dtype, keep, forceinline=True)
    def run(arguments, counter, group, most, most_last, parties, by_units, rank):
        x, _, _, _, _, _, lengths, state, saved, reset_h, work, places, panels, tables, chunk, M, _ = arguments
        _, PACKED_HH, _, _, PEEPHOLES, PACKED_LAST, CHUNK_AX, STATES, SUMS, LAST_SUM, APART, _ = places
        T, B, H = x.shape[0], x.shape[1], state.shape[3]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        row, one, first, last = units * G * V, units * V, group * M, min(B, group * M + M)
        panel, flat_state = panels[rank], state.reshape(-1)
        flat_saved, flat_reset = saved.reshape(-1), reset_h.reshape(-1)
        slot, lean = (T + 1) * B * H, len(state) < S
        of_state, of_saved = (slot, H, V), (V, KS * V, M * KS * V)
        of_gates, of_peepholes, of_sum = (V, row, G * V), (one, 0, V), (0, one, V)
        # Where the rows of sequence 0 would lie, if the group began with it.
        CHUNK_AX, SUMS = CHUNK_AX + group * APART - first * row, SUMS + group * APART - first * row
        LAST_SUM += group * APART - first * one
        first_saved = group * M * (T * units - 1) * KS * V  # where sequence 0 would lie, as above

        u0, w0, u1, w1 = 0, 0, units, units
        if by_units:
            u0, u1 = _shares(units, most, rank, parties)
            w0, w1 = _shares(units, most_last, rank, parties)
        shortest = lengths.min()
        first_tiles, last_tiles = tables[rank, 0], tables[rank, 1]
        first_count = list_tiles(first_tiles, first, last, u0, u1, units, most, VECTORS, V)
        last_count = list_tiles(last_tiles, first, last, w0, min(w1, whole), whole, most_last, VECTORS, V)
        # The cell takes a last unit that fills no vector as dense as its gates lie, if no sequence ends before others.
        dense = H % V if shortest >= T else V
        last_count += list_tiles(last_tiles[last_count:], first, last, max(w0, whole), w1, units, 1, VECTORS, dense)
        STATES += group * APART + _tiles(w0, M, R, V) * S * R
        for k in range(last_count):
            load_rows(work, STATES + k * S * R, R, flat_state, 0, S, of_state, _tile(last_tiles, k), H)

        for t0 in range(0, T, chunk):
            steps = min(chunk, T - t0)
            input_sums(arguments, CHUNK_AX, t0, steps, first, last, u0, u1)
            for t in range(t0, t0 + steps):
                old, kept = t * B * H, first_saved + t * units * M * KS * V
                ax = CHUNK_AX + (t - t0) * (last - first) * row
                after, reset_at = (t + 1) * B * H, t * B * H if KEEP else 0
                if by_units:
                    wait_for_all(counter, parties)
                if RESET:
                    for k in range(first_count):  # with a reset: all that comes before the product with r ∘ h
                        tile = _tile(first_tiles, k)
                        begin = ax + tile[2] * row + tile[0] * G * V
                        gate_sums(panel, SUM, work, begin, row, flat_state, old, H, work, PACKED_HH, H, tile)
                        load_rows(panel, OLD, R, flat_state, old, 1, of_state, tile, H)
                        reset_panel(panel, panel, tile, t, lengths, shortest)
                        store_rows(panel, NEW, R, flat_reset, reset_at, 1, of_state, tile, H)
                        if KEEP:
                            store(panel, SAVED, R, flat_saved, kept + K * V, 2, of_saved, tile, H)
                        store(panel, SUM, R, work, SUMS, G - 1, of_gates, tile, H)
                        store(panel, SUM + (G - 1) * R, R, work, LAST_SUM, 1, of_sum, tile, H)
                    if by_units:
                        wait_for_all(counter, parties)
                for k in range(last_count):
                    tile, states = _tile(last_tiles, k), STATES + k * S * R
                    if KEEP:
                        bring(flat_saved, kept, K, of_saved, tile)
                    if RESET:
                        begin = LAST_SUM + tile[2] * one + tile[0] * V
                        last_sums(
                            panel, SUM + (G - 1) * R, work, begin, one,
                            flat_reset, reset_at, H, work, PACKED_LAST, H, tile,
                        )  # fmt: skip
                        load(panel, SUM, R, work, SUMS, G - 1, of_gates, tile, H)
                    else:
                        tile_sums(panel, work, places, ax, flat_state, old, H, tile)
                    load(panel, PEEPHOLE, R, work, PEEPHOLES, P, of_peepholes, tile, H)
                    step_panel(panel, work[states:], tile, t, lengths, shortest)
                    store_rows(work, states, R, flat_state, after, 1, of_state, tile, H)
                    if not lean:
                        store_rows(work, states + R, R, flat_state, after + slot, S - 1, of_state, tile, H)
                    if KEEP:
                        store(panel, SAVED, R, flat_saved, kept, K, of_saved, tile, H)
        for k in range(last_count if lean else 0):  # all but h lie behind its T + 1 slots
            store_rows(work, STATES + k * S * R + R, R, flat_state, slot, S - 1, of_state, _tile(last_tiles, k), H)

    return run


@cache
def _forward_sums(cell: Cell, dtype):
    """Build what sums up in the gates: products with the inputs of a chunk of steps, and with the state for a tile."""
    G, JOINT, RESET, V = len(cell.gates), cell.joint, cell.reset is not None, VECTOR_BYTES // dtype.itemsize
    R, (SUM, AX, _, SAVED, *_) = forward_panel(cell, V)
    of_whole_units, of_shared_vectors, of_tile = multiply(G, dtype), multiply(1, dtype), tile_product(G, dtype, V, R)
    load, spread = moves(V, True)[0], spread_gates(G, V)

    @part(cell.name, dtype)
    def input_sums(arguments, chunk_ax, t0, steps, first, last, u0, u1):
        """Set ax of a chunk, for sequences first…last and units u0…u1."""
        (x, weight_ih), (work, places) = arguments[:2], arguments[10:12]
        PACKED_IH, _, BIAS_IH = places[:3]
        B, I, H = x.shape[1], x.shape[2], len(weight_ih) // G
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        shared, row, end = shared_vectors(H, V, G), units * G * V, whole * G * V
        pieces, rows = (1, steps * B) if last - first == B else (steps, last - first)
        for k in range(pieces):
            ax = chunk_ax + (k * rows + first) * row
            source = address(x.reshape(-1), ((t0 + k) * B + first) * I)
            of_whole_units(
                address(work, ax), row, address(work, BIAS_IH), 0, source, I,
                address(work, PACKED_IH), I, rows, u0, min(u1, whole), whole,
            )  # fmt: skip
            if u1 > whole:
                of_shared_vectors(
                    address(work, ax + end), row, address(work, BIAS_IH + end), 0, source, I,
                    address(work, PACKED_IH + end * I), I, rows, 0, shared, shared,
                )  # fmt: skip

    @part(cell.name, dtype, forceinline=True)
    def tile_sums(panel, work, places, ax, flat_state, old, H, tile):
        """Leave the gate sums of a tile in its panel, ax among them or, where it counts apart, beside them.

        Gates that share vectors are summed up where `saved` comes to lie, which has more numbers than they have.
        """
        _, PACKED_HH, _, BIAS_HH = places[:4]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        row, end, lanes, first = units * G * V, whole * G * V, H - whole * V, tile[2]
        begin, stride = (ax, row) if JOINT else (BIAS_HH, 0)
        if tile[0] < whole:
            begin += first * stride + tile[0] * G * V
            of_tile(panel, SUM, work, begin, stride, flat_state, old, H, work, PACKED_HH, H, tile)
            load(panel, AX, R, work, ax, 0 if JOINT else G, (V, row, G * V), tile, H)
        else:
            shared = shared_vectors(H, V, G)
            of_shared_vectors(
                address(panel, SAVED), shared * V, address(work, begin + first * stride + end), stride,
                address(flat_state, old + first * H), H, address(work, PACKED_HH + end * H), H, tile[3],
                0, shared, shared,
            )  # fmt: skip
            spread(panel, SUM, R, panel, SAVED, shared * V, lanes, tile)
            if not JOINT:
                spread(panel, AX, R, work, ax + first * row + end, row, lanes, tile)

    return input_sums, tile_sums


@cache
def _forward_pack(cell: Cell, dtype):
    """Build the packing of weights and biases, the part of one thread. With a reset W_hn has a product of its own."""
    G, JOINT, RESET, HEAD = len(cell.gates), cell.joint, cell.reset is not None, len(cell.gates) - bool(cell.reset)
    MANY, V = panel_units(G), VECTOR_BYTES // dtype.itemsize

    @part(cell.name, dtype)
    def pack(arguments, most, most_last, rank, parties):
        _, weight_ih, weight_hh, bias_ih, bias_hh, peephole, _, _, _, _, work, places = arguments[:12]
        PACKED_IH, PACKED_HH, BIAS_IH, BIAS_HH, PEEPHOLES, PACKED_LAST = places[:6]
        H = weight_hh.shape[1]
        units, whole = (H + V - 1) // V, whole_units(H, V, G, RESET)
        u0, u1 = _shares(units, most, rank, parties)
        v0, v1 = _shares(units, MANY, rank, parties)
        pack_gates(work, PACKED_IH, weight_ih, G, G, MANY, v0, min(v1, whole), whole)
        pack_gates(work, PACKED_HH, weight_hh, G, HEAD, most, u0, min(u1, whole), whole)
        if whole < units and rank == parties - 1:
            pack_shared(work, PACKED_IH + whole * G * V * weight_ih.shape[1], weight_ih, G)
            pack_shared(work, PACKED_HH + whole * G * V * H, weight_hh, G)
        if RESET:
            last = _shares(units, most_last, rank, parties)
            pack_gates(work, PACKED_LAST, weight_hh[HEAD * H :], 1, 1, most_last, *last, units)
        if rank == 0:
            _pack_biases(work, BIAS_IH, BIAS_HH, bias_ih, bias_hh, G, JOINT, whole)
            _pack_peepholes(work, PEEPHOLES, peephole, H)

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


@njit
def _pack_peepholes(work, to, peephole, H):
    """Pack peephole weights, each row of H padded to whole units."""
    V = VECTOR_BYTES // work.itemsize
    row = (H + V - 1) // V * V
    for n in range(peephole.size // H * row):
        work[to + n] = peephole[n // row * H + n % row] if n % row < H else work.dtype.type(0)


# The log-scaled adjoint ---------------------------------------------------------------------------------------------


@njit
def _largest(values):
    """Return the exponent e of the largest magnitude, in [2^(e−1), 2^e), and whether there is one that is not zero."""
    largest = abs(values[0])
    for v in values:
        largest = max(largest, abs(v))
    return math.frexp(largest)[1], largest > 0


@njit
def _power_of_two(n, dtype):
    """Return 2ⁿ as two factors that are both normal numbers; n is cut off where the product with any number is."""
    limit = 2 * np.finfo(dtype).maxexp - 4
    n = max(min(n, limit), -limit)
    half = n // 2
    return math.ldexp(dtype.type(1), half), math.ldexp(dtype.type(1), n - half)


@njit
def _add_scaled(d_state, exponent, direct, direct_exponent):
    """d_state·2^exponent (S, H) plus direct·2^direct_exponent (H,) on h, both rescaled to largest entries below 1.

    Scaling by powers of two is exact. Returns the new exponent; entries 2^−126 below the largest may round.
    """
    S, H = d_state.shape
    top, found = direct_exponent, False
    for s in range(S):
        e, nonzero = _largest(d_state[s])
        if nonzero:
            top, found = max(top, exponent + e) if found else exponent + e, True
    e, nonzero = _largest(direct)
    if nonzero:
        top, found = max(top, direct_exponent + e) if found else direct_exponent + e, True
    if not found:
        return exponent
    low, high = _power_of_two(exponent - top, d_state.dtype)
    for s in range(S):
        for j in range(H):
            d_state[s, j] = d_state[s, j] * low * high
    low, high = _power_of_two(direct_exponent - top, d_state.dtype)
    for j in range(H):
        d_state[0, j] += direct[j] * low * high
    return top


# Clipping within BPTT -----------------------------------------------------------------------------------------------

#: What `backward` clips at every step: "states", the norm of a sequence's dL/dstate_t, h and c together, before the
#: step takes it back; "gates", each number of dL/dax and dL/dah, before they enter products with weights. With the
#: limit, and counts (threads, 8), to which each thread adds in a row of its own: how many were clipped, of how many
#: (what follows there is scratch).
Clip = tuple[str, float, NDArray[np.int64]]


@njit
def _add_clipped(d_state, direct, limit, counts):
    """Add direct (H,) to the h of d_state (S, H), and take the norm of it all to the limit if it is above."""
    S, H = d_state.shape
    square = 0.0
    for j in range(H):
        d_state[0, j] += direct[j]
    for s in range(S):
        square += squares(d_state[s])
    factor = shrinkage(square, limit)
    if factor != 1:
        for s in range(S):
            for j in range(H):
                d_state[s, j] *= d_state.dtype.type(factor)
    counts[0] += factor != 1
    counts[1] += 1


@njit
def _clamp_row(work, begin, count, limit, counts):
    """Clip `count` numbers, and count them."""
    clipped = 0
    for i in range(begin, begin + count):
        before = work[i]
        work[i] = clamp(before, work.dtype.type(limit))
        clipped += work[i] != before
    counts[0] += clipped


# Backward -----------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _backward_work(cell: Cell, V: int, I: int, H: int, rows: int, M: int, N: int) -> tuple[int, ...]:
    """Regions of the work space: packed weights; `rows` of dax, dah, d_peephole; what each group has of its own.

    That is dL/dstate as it is carried back, tile by tile, and for a reset dL/da of the last gate.
    """
    G, S, P, R = len(cell.gates), len(cell.states), len(cell.peepholes), backward_panel(cell, V)[0]
    RESET, BOTH = int(cell.reset is not None), int(not cell.joint)
    row, inputs = -(-H // V) * V, -(-I // V) * V
    weights = G * H * inputs, G * H * row, RESET * H * row, P * row, row + inputs
    gradients = BOTH * rows * G * row, rows * G * row, rows * P * row
    return _grouped((*weights, *gradients), (_tiles(-(-H // V), M, R, V) * S * R, RESET * M * row), N)


#: Modes in which all units of dL/dstate_t are looked at before any takes its step.
_WHOLE = "scaled", "states"


@cache
def _backward_kernel(cell: Cell, dtype, mode: str):
    SCALED, JOINT = mode == "scaled", cell.joint
    SINGLE, MANY = panel_units(1, one_row=True), panel_units(1)
    pack, finish_chunk = _backward_pack(cell, dtype), _chunk_gradients(cell, dtype, SCALED)
    run, finish = _backward_steps(cell, dtype, mode)

    @cached(f"{cell.name}-{dtype}-{mode}", cell.step_backward, *(cell.reset or ()))
    def backward(arguments, counter, mails, parties, by_units, rank):
        """Turn d_state[:, T] and d_output into d_state, dx and (unless scaled) d_weight…, the part of one thread.

        "scaled" has an exponent for every step, and rescales the adjoint at each, see `_add_scaled`; "states" and
        "gates" clip at each, see `Clip`; "plain" does neither.
        """
        arguments, counter, mails = borrow((arguments, counter, mails))
        post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
        (T, B, _), sums, (chunk, M, middle, _, apart) = arguments[1].shape, arguments[13], arguments[18:23]
        most, chunks = SINGLE if B == 1 else MANY, (T + chunk - 1) // chunk
        add = not SCALED and middle < B and not apart
        meet = parties > 1 and (by_units or parties > 2 or middle != M)  # or else each has a half of the batch
        if not SCALED:  # a rescaled adjoint keeps what is small
            control = flush_subnormals()
        pack(arguments, most, rank, parties)
        if add:
            for values in _flat(sums[1]):
                n0, n1 = _shares(len(values), 1, rank, parties)
                values[n0:n1] = 0
        if parties > 1:
            wait_for_all(counter, parties)
        for c in range(chunks - 1, -1, -1):
            for group in _groups_of(B, M, rank, parties, by_units):
                run(arguments, counter, c, group, most, parties, by_units, rank)
            if meet:
                wait_for_all(counter, parties)
            finish_chunk(arguments, c, rank, parties, by_units)
        for group in _groups_of(B, M, rank, parties, by_units):
            finish(arguments, group, most, parties, by_units, rank)
        if not SCALED:
            keep_subnormals(control)
        if add:
            if parties > 1:
                wait_for_all(counter, parties)
            for total, values in zip(_flat(sums[0]), _flat(sums[1])):  # noqa: B905 (Numba knows no strict)
                n0, n1 = _shares(len(values), 1, rank, parties)
                total[n0:n1] += values[n0:n1]
        wait_until_done(mails, parties, rank)
        if JOINT and rank == 0 and not SCALED:
            for half in sums:
                half[3][:] = half[2]  # d_bias_hh is d_bias_ih

    return backward


@cache
def _backward_steps(cell: Cell, dtype, mode: str):
    """Build the steps of a chunk, of one group of sequences or of some of its units; and what sets slot 0."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (ABOVE, SAVED, PEEPHOLE, DAX, DAH, DP, TOTAL, _) = backward_panel(cell, V)
    VECTORS, JOINT, RESET, GATES, WHOLE = R // V, cell.joint, cell.reset is not None, mode == "gates", mode in _WHOLE
    product, store_da = tile_product(1, dtype, V, R), store_gates(V)
    limit_whole = _limit_whole(mode) if WHOLE else None
    load, (load_rows, store_rows) = moves(V, True)[0], moves(V, False)
    _, step_panel = backward_step(cell, V, WHOLE)
    reset_panel = backward_reset(cell, V) if RESET else None

    @part(cell.name, dtype, mode, forceinline=True)
    def begin(arguments, group, most, parties, by_units, rank):
        """Return a thread's sequences and tiles, where its states are, and where dL/da of sequence 0 would lie."""
        d_output, (places, _, tables, _, M, middle) = arguments[1], arguments[15:21]
        (_, B, H), (STATES, DA_LAST, APART) = d_output.shape, places[8:11]
        units, first, last, tiles = (H + V - 1) // V, group * M, min(B, group * M + M), tables[rank, 0]
        u0, u1 = _shares(units, most, rank, parties) if by_units else (0, units)
        cut = max(first, min(middle, last))  # no tile has sequences of both halves
        count = list_tiles(tiles, first, cut, u0, u1, units, most, VECTORS, V)
        count += list_tiles(tiles[count:], cut, last, u0, u1, units, most, VECTORS, V)
        states, da_last = STATES + _tiles(u0, M, R, V) * S * R, DA_LAST - first * units * V
        return first, last, tiles, count, states + group * APART, da_last + group * APART

    @part(cell.name, dtype, mode, forceinline=True)
    def through_weights(work, states, dah, row, weights, depth, tile):
        """Add what comes back through W_hh to dL/dh of a tile."""
        product(work, states, work, states, tile[1] * V, work, dah, row, work, weights, depth, tile)

    @part(cell.name, dtype, mode, forceinline=True)
    def run(arguments, counter, c, group, most, parties, by_units, rank):
        _, d_output, _, _, _, _, lengths, _, saved, _, d_state = arguments[:11]
        work, places, panels, _, chunk, _, middle, span, _, limits, counts = arguments[14:]
        _, PACKED_HH, PACKED_LAST, PEEPHOLES, ZERO, CHUNK_DAX, CHUNK_DAH, CHUNK_DP = places[:8]
        T, B, H = d_output.shape
        limit = limits[0]  # in an array: a number would come as a float64
        units, depth, per_group = (H + V - 1) // V, G * H, saved.shape[3]
        row, one, panel, flat_saved = units * G * V, units * V, panels[rank], saved.reshape(-1)
        flat_d, flat_direct = d_state.reshape(-1), d_output.reshape(-1)
        first, last, tiles, count, STATES, da_last = begin(arguments, group, most, parties, by_units, rank)
        of_state, of_peepholes = ((T + 1) * B * H, H, V), (one, 0, V)
        # Where threads share units now or shared them then, there is one group, here or there.
        of_saved, before = (V, KS * V, per_group * KS * V), first // per_group * per_group
        first_saved = before * (T * units - 1) * KS * V

        shortest, t0 = lengths.min(), c * chunk
        for t in range(min(t0 + chunk, T) - 1, t0 - 1, -1):
            rows, rows_behind = _chunk_rows(t, chunk, B, middle, span), _chunk_rows(t + 1, chunk, B, middle, span)
            kept, here, there = first_saved + t * units * per_group * KS * V, t * B * H, (t + 1) * B * H
            if by_units and t < T - 1:
                wait_for_all(counter, parties)
            if WHOLE:
                for k in range(count if t < T - 1 else 0):
                    tile, states = _tile(tiles, k), STATES + k * S * R
                    dah = CHUNK_DAH + rows_behind[int(tile[2] >= middle)] * row
                    through_weights(work, states, dah, row, PACKED_HH, depth, tile)
                    store_rows(work, states, R, flat_d, there, S, of_state, tile, H)
                limit_whole(arguments, t, first, last, rank)
            for k in range(count):
                tile, states = _tile(tiles, k), STATES + k * S * R
                half = int(tile[2] >= middle)
                at, behind = rows[half], rows_behind[half]
                dax, dah, dp = CHUNK_DAX + at * row, CHUNK_DAH + at * row, CHUNK_DP + at * P * one
                bring(flat_saved, kept, K, of_saved, tile)
                if WHOLE or t == T - 1:
                    load_rows(work, states, R, flat_d, there, S, of_state, tile, H)
                else:
                    bring(flat_direct, here, 1, of_state, tile)
                    through_weights(work, states, CHUNK_DAH + behind * row, row, PACKED_HH, depth, tile)
                if not WHOLE:
                    load_rows(panel, ABOVE, R, flat_direct, here, 1, of_state, tile, H)
                load(panel, SAVED, R, flat_saved, kept, K, of_saved, tile, H)
                load(panel, PEEPHOLE, R, work, PEEPHOLES, P, of_peepholes, tile, H)
                step_panel(panel, work[states:], tile, t, lengths, shortest)
                store_da(panel, DAX, R, work, dax, G, row, tile, H)
                if not JOINT:
                    store_da(panel, DAH, R, work, dah, G, row, tile, H)
                store_da(panel, DP, R, work, dp, P, P * one, tile, H)
                if RESET:
                    store_da(panel, DAX + (G - 1) * R, R, work, da_last, 1, one, tile, H)
                store_rows(panel, TOTAL, R, flat_d, there, S, of_state, tile, H)
            if GATES:
                for b in range(first, last):
                    at = rows[int(b >= middle)] + b
                    _clamp_row(work, CHUNK_DAX + at * row, depth, limit, counts[rank])
                    if not JOINT:
                        _clamp_row(work, CHUNK_DAH + at * row, depth, limit, counts[rank])
                    if RESET:  # the last gate's copy for the product with W_hn, counted apart
                        _clamp_row(work, da_last + b * one, H, limit, counts[rank, 2:])
                    if t < lengths[b]:
                        counts[rank, 1] += depth if JOINT else 2 * depth
            if RESET:
                if by_units:
                    wait_for_all(counter, parties)
                for k in range(count):
                    tile = _tile(tiles, k)
                    product(panel, ABOVE, work, ZERO, 0, work, da_last, one, work, PACKED_LAST, H, tile)
                    load(panel, SAVED, R, flat_saved, kept + K * V, 2, of_saved, tile, H)
                    reset_panel(panel, work[STATES + k * S * R :], tile[1] * tile[3] * V)
                    dax = CHUNK_DAX + rows[int(tile[2] >= middle)] * row
                    store_rows(panel, DAX, R, work, dax, 1, (0, row, G * V), tile, H)
                if GATES:
                    for b in range(first, last):
                        at = rows[int(b >= middle)] + b
                        _clamp_row(work, CHUNK_DAX + at * row, depth, limit, counts[rank])

    @part(cell.name, dtype, mode, forceinline=True)
    def finish(arguments, group, most, parties, by_units, rank):
        """Set dL/dstate of slot 0: what comes back from step 0."""
        d_state, (work, places, _, _, chunk, _, middle, span) = arguments[10], arguments[14:22]
        _, slots, B, H = d_state.shape
        PACKED_HH, CHUNK_DAH, flat_d = places[1], places[6], d_state.reshape(-1)
        row, of_state, rows = (H + V - 1) // V * V * G, (slots * B * H, H, V), _chunk_rows(0, chunk, B, middle, span)
        _, _, tiles, count, STATES, _ = begin(arguments, group, most, parties, by_units, rank)
        for k in range(count):
            tile, states = _tile(tiles, k), STATES + k * S * R
            through_weights(work, states, CHUNK_DAH + rows[int(tile[2] >= middle)] * row, row, PACKED_HH, G * H, tile)
            store_rows(work, states, R, flat_d, 0, S, of_state, tile, H)

    return run, finish


@cache
def _limit_whole(mode: str):
    """Build what adds dL/dh_t from above to dL/dstate_t of some sequences, and rescales or clips it as a whole."""
    SCALED, STATES = mode == "scaled", mode == "states"

    @part(mode)
    def limit_whole(arguments, t, first, last, rank):
        (d_output, d_output_exponent), lengths, (d_state, exponent) = arguments[1:3], arguments[6], arguments[10:12]
        limits, counts = arguments[23:]
        for b in range(first, last):
            if STATES and t < lengths[b]:
                _add_clipped(d_state[:, t + 1, b], d_output[t, b], limits[0], counts[rank])
            if SCALED:
                exponent[t, b] = exponent[t + 1, b]
            if SCALED and t < lengths[b]:
                exponent[t, b] = exponent[t + 1, b] = _add_scaled(
                    d_state[:, t + 1, b], exponent[t + 1, b], d_output[t, b], d_output_exponent[t, b]
                )

    return limit_whole


@cache
def _backward_pack(cell: Cell, dtype):
    """Build the packing of weights, the part of one thread. With a reset W_hn has a product of its own."""
    G, RESET, HEAD = len(cell.gates), cell.reset is not None, len(cell.gates) - bool(cell.reset)
    MANY, V = panel_units(1), VECTOR_BYTES // dtype.itemsize

    @part(cell.name, dtype)
    def pack(arguments, most, rank, parties):
        (weight_ih, weight_hh, peephole), (work, places) = arguments[3:6], arguments[14:16]
        PACKED_IH, PACKED_HH, PACKED_LAST, PEEPHOLES, ZERO = places[:5]
        H = weight_hh.shape[1]
        units, inputs = (H + V - 1) // V, (weight_ih.shape[1] + V - 1) // V
        mine = _shares(units, most, rank, parties)
        pack_columns(work, PACKED_IH, weight_ih, G, G, MANY, *_shares(inputs, MANY, rank, parties))
        pack_columns(work, PACKED_HH, weight_hh, G, HEAD, most, *mine)
        if RESET:
            pack_columns(work, PACKED_LAST, weight_hh[HEAD * H :], 1, 1, most, *mine)
        if rank == 0:
            work[ZERO : ZERO + (units + inputs) * V] = 0
            _pack_peepholes(work, PEEPHOLES, peephole, H)

    return pack


@cache
def _chunk_gradients(cell: Cell, dtype, scaled: bool):
    """Build what follows a chunk of steps: dx, and (unless scaled) the gradients of weights, the part of one thread."""
    G, P, V = len(cell.gates), len(cell.peepholes), VECTOR_BYTES // dtype.itemsize
    HEAD = G - bool(cell.reset)
    JOINT, RESET, SCALED = cell.joint, cell.reset is not None, scaled
    dx_rows, add_product = multiply_columns(dtype), add_transposed(dtype)

    @part(cell.name, dtype, scaled)
    def finish_chunk(arguments, c, rank, parties, by_units):
        """The rows of a half lie together: a thread that has all strips of one half reads no row of another thread."""
        x, state, reset_h, (dx, sums) = arguments[0], arguments[7], arguments[9], arguments[12:14]
        work, places, panels, _, chunk, _, middle, span = arguments[14:22]
        PACKED_IH, _, _, _, ZERO, CHUNK_DAX, CHUNK_DAH, CHUNK_DP = places[:8]
        T, B, I, H, inputs = x.shape[0], x.shape[1], x.shape[2], state.shape[3], dx.shape[2]
        units, panel, t0, halves = (H + V - 1) // V, panels[rank], c * chunk, 1 if middle == B else 2
        row, one, steps = units * G * V, units * V, min(chunk, T - t0)
        for half in range(halves):
            d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_peephole = sums[half]
            first, count = (middle, B - middle) if half else (0, middle)
            at = _chunk_rows(t0, chunk, B, middle, span)[half] + first
            dax, dah, dp, rows = CHUNK_DAX + at * row, CHUNK_DAH + at * row, CHUNK_DP + at * P * one, steps * count
            # Rows of dx at even distances: all of them, or one by one those of a step or of a sequence.
            s0, s1 = _shares_of_half(rows if halves == 1 else steps, half, halves, rank, parties, by_units)
            into, of = (t0 * B + s0, s0) if halves == 1 else ((t0 + s0) * B + first, s0 * count)
            runs, length, to_next, apart = 1, s1 - s0, (0, 0), (1, 1)
            if halves == 2 and count > s1 - s0:
                runs, length, to_next = s1 - s0, count, (B, count)
            elif halves == 2:
                runs, to_next, apart = count, (1, 1), (B, count)
            for k in range(runs):
                dx_rows(
                    dx.reshape(-1), (into + k * to_next[0]) * inputs, apart[0] * inputs, inputs, address(work, ZERO),
                    address(work, dax + (of + k * to_next[1]) * row), apart[1] * row, address(work, PACKED_IH), G * H,
                    length, panel,
                )  # fmt: skip
            if not SCALED:
                strips = _shares_of_half(units * G, half, halves, rank, parties, by_units)
                begin_x, begin_h, flat_state = (t0 * B + first) * I, (t0 * B + first) * H, state.reshape(-1)
                runs_x, runs_h = (count, B * I), (count, B * H)
                add_sums(d_bias_ih, work, dax, row, G, rows, strips, panel)
                if 2 * I <= V:  # as columns they would fill less than half a vector
                    flat = d_weight_ih.reshape(-1)
                    add_narrow(flat, work, dax, row, G, x.reshape(-1), begin_x, runs_x, I, I, rows, strips, panel)
                else:
                    add_product(
                        d_weight_ih, work, dax, row, G, (0, G), x.reshape(-1), begin_x, runs_x, I, rows, strips, panel
                    )
                if not JOINT:
                    add_sums(d_bias_hh, work, dah, row, G, rows, strips, panel)
                add_product(
                    d_weight_hh, work, dah, row, G, (0, HEAD), flat_state, begin_h, runs_h, H, rows, strips, panel
                )
                if RESET:
                    flat_reset = reset_h.reshape(-1)
                    add_product(
                        d_weight_hh, work, dah, row, G, (HEAD, G), flat_reset, begin_h, runs_h, H, rows, strips, panel
                    )
                if P:
                    strips = _shares_of_half(units * P, half, halves, rank, parties, by_units)
                    add_sums(d_peephole, work, dp, P * one, P, rows, strips, panel)

    return finish_chunk


# Jacobian -----------------------------------------------------------------------------------------------------------


@cache
def _diagonals_kernel(cell: Cell, dtype):
    """Unit cotangents through `step_backward`: the diagonals of which the Jacobian is made."""
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    step_backward = cell.step_backward
    take_saved, take_peepholes, take_states = map(take_numbers, (K, P, S))
    put_gates, put_states = map(put_numbers, (G, S))

    @cached(f"{cell.name}-{dtype}", step_backward)
    def diagonals(saved, peephole, unit, d_ax, d_ah, d_old):
        """Fill d_ax, d_ah (S, B, G·H), d_old (S, S, B, H): row s is the cotangent of new state s; unit the identity."""
        B, H = d_old.shape[2:]
        row = np.empty(max(G, S), saved.dtype)
        for s in range(S):
            for b in range(B):
                for j in range(H):
                    da_x, da_h, _, _, old = step_backward(
                        take_saved(saved[b], j, H), take_peepholes(peephole, j, H), take_states(unit[s], 0, 1)
                    )
                    put_gates(d_ax[s, b], j, H, da_x)
                    put_gates(d_ah[s, b], j, H, da_h)
                    put_states(row, 0, 1, old)
                    for q in range(S):
                        d_old[s, q, b, j] = row[q]

    return diagonals


# What a layer calls -------------------------------------------------------------------------------------------------


def chunk_steps(cell: Cell, B: int, H: int) -> int:
    """Return the steps of a batch that kernels take at a time; sums over steps are cut there, and nowhere else."""
    rows = min(_MOST_ROWS, max(_ROWS, _GATES // (len(cell.gates) * H)))
    return max(1, rows // B)


def _middle(cell: Cell, B: int, H: int, dtype: np.dtype[Any]) -> int:
    """Return how many sequences are in the first half of a batch: gradients of weights are summed over each apart.

    Two threads then need no row of each other's. Where weights do not fit a core's cache it is all of them.
    """
    return B if len(cell.gates) * H * H * dtype.itemsize > CACHE else -(-B // 2)


def _groups(B: int, parties: int, by_units: bool) -> tuple[int, int, int]:
    """Return M and N, so many sequences for each of so many threads, or all for all by units; and how many threads."""
    M = B if by_units else -(-B // parties)
    N = -(-B // M)
    return M, N, parties if by_units else N


def _rooms(places: tuple[int, ...], parties: int, panel: int, B: int, H: int, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Return where a kernel works: memory, the places in it, a panel and two lists of tiles for each thread."""
    lanes = VECTOR_BYTES // dtype.itemsize
    first, panel = -(-places[-1] // lanes) * lanes, -(-panel // lanes) * lanes + _APART
    memory = empty((first + parties * panel,), dtype)
    tables = np.empty((parties, 2, -(-H // lanes) * B, 5), np.int64)
    return memory[:first], places, memory[first:].reshape(parties, panel), tables


class Call(NamedTuple):
    """A kernel with all that it takes, for `run_together`; what it computes goes into arrays among the arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    parties: int
    by_units: bool

    def on(self, *first: Array) -> "Call":
        """Return the call on other C-contiguous arrays of the same shapes: x, of `prepare_backward` d_output too."""
        return Call(self.kernel, (*first, *self.arguments[len(first) :]), *self[2:])


def forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool = True
) -> LayerTrace:
    """Run one layer in one direction over x (T, B, I) from state (S, B, H).

    With keep=False only the states are kept, which is all that inference needs. Arrays are C-contiguous, of one dtype
    and checked by the caller.
    """
    call, trace = prepare_forward(cell, x, weights, state, lengths, keep)
    run_together(*call)
    return trace


def prepare_forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool
) -> tuple[Call, LayerTrace]:
    """Return what `forward` runs, and the trace that it fills; from then on state is slot 0 of the trace's."""
    (T, B, I), H, S, dtype = x.shape, weights.weight_hh.shape[1], len(cell.states), x.dtype
    V = VECTOR_BYTES // dtype.itemsize
    states = empty((S, T + 1, B, H), dtype)
    states[:, 0] = state
    parties, by_units = plan(cell, T, B, I, H, dtype)
    M, N, parties = _groups(B, parties, by_units)
    saved = empty((N, T if keep else 0, -(-H // V), M, numbers_saved(cell), V), dtype)
    reset_h = empty(((T if keep else 1) if cell.reset else 0, B, H), dtype)
    chunk = min(T, chunk_steps(cell, B, H))
    places = _forward_work(cell, V, I, H, chunk, M, N)
    arguments = (
        x, *weights, lengths, states, saved, reset_h,
        *_rooms(places, parties, forward_panel(cell, V)[1][-1], B, H, dtype), chunk, M, False,
    )  # fmt: skip
    call = Call(_forward_kernel(cell, dtype, keep), arguments, parties, by_units)
    return call, LayerTrace(cell.name, x, states, saved, reset_h, lengths)


def repeat(call: Call, x: Array, states: Array) -> Call:
    """Return a call of `prepare_forward`, once it has run, on other inputs and states, its weights packed as they are.

    x (T, B, I) is of the same shape, states (S, T+1, B, H) with slot 0 given, or (1, T+S, B, H): h, slot 0 given, then
    the other states, given those that are first and left as those that are last. Both are C-contiguous.
    """
    return Call(call.kernel, (x, *call.arguments[1:7], states, *call.arguments[8:-1], True), *call[2:])


def backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None = None,
    into: LayerWeights | None = None,
    clip: Clip | None = None,
    second: LayerWeights | None = None,
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) and d_final (S, B, H) through one layer (BPTT: Werbos 1990).

    Given d_output_exponent (T, B), d_output stands for d_output·2^exponent, and the adjoint is rescaled by powers of
    two at every step, so that it neither under- nor overflows however long the sequence; weights get no gradient then.
    dL/d weights is added to `into`, if that is given (both biases of a joint cell must hold the same there). With
    `second` too, that of the second half of the batch (see `_middle`) is added there, and the caller adds up both:
    only so are sums over several calls those of one to the last bit. With `clip` the adjoint is clipped at every step.
    """
    call, gradients = prepare_backward(
        cell, trace, weights, d_output, d_final, d_output_exponent, into, clip=clip, second=second
    )
    run_together(*call)
    return gradients


def prepare_backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None,
    into: LayerWeights | None,
    inputs: bool = True,
    clip: Clip | None = None,
    second: LayerWeights | None = None,
) -> tuple[Call, LayerGradients]:
    """Return what `backward` runs, and the gradients that it fills; from then on d_final is slot T of their state.

    Without `inputs` there is no dL/dx: it has no columns.
    """
    (T, B, H), I, S, dtype = d_output.shape, trace.x.shape[2], len(cell.states), d_output.dtype
    V, scaled = VECTOR_BYTES // dtype.itemsize, d_output_exponent is not None
    d_state, dx = empty((S, T + 1, B, H), dtype), empty((T, B, I if inputs else 0), dtype)
    d_state[:, T] = d_final
    exponent = np.zeros((T + 1 if scaled else 0, B), np.int64)
    if into is None:
        into = LayerWeights(*(np.zeros((0,) * w.ndim if scaled else w.shape, dtype) for w in weights))
    chunk, middle = min(T, chunk_steps(cell, B, H)), _middle(cell, B, H, dtype)
    apart, halves = second is not None, 1 if middle == B else 2
    if second is None:
        second = into if scaled or halves == 1 else LayerWeights(*(empty(w.shape, dtype) for w in weights))
    span = chunk * middle - (-_APART // (-(-H // V) * V))
    parties, by_units = plan(cell, T, B, I, H, dtype, scaled or clip is not None)
    M, N, parties = _groups(B, parties, by_units)
    if len(trace.saved) > 1:  # the batch stays shared as it was
        M, N = trace.saved.shape[3], len(trace.saved)
        parties, by_units = min(N, threads()), False
    places = _backward_work(cell, V, I, H, 2 * halves * span, M, N)
    mode, limit, counts = clip or ("scaled" if scaled else "plain", 0.0, np.zeros((0, 8), np.int64))
    panels = max(backward_panel(cell, V)[1][-1], scratch_size(max(I, H), V))
    arguments = (
        trace.x, d_output, d_output_exponent if scaled else exponent, weights.weight_ih, weights.weight_hh,
        weights.peephole, trace.lengths, trace.state, trace.saved, trace.reset_h, d_state, exponent, dx,
        (tuple(into), tuple(second)), *_rooms(places, parties, panels, B, H, dtype), chunk, M, middle, span, apart,
        np.full(1, limit, dtype), counts,
    )  # fmt: skip
    call = Call(_backward_kernel(cell, dtype, mode), arguments, parties, by_units)
    if scaled:
        return call, LayerGradients(None, dx, d_state, d_output, exponent, d_output_exponent)
    return call, LayerGradients(into, dx, d_state, d_output, None, None)


def direct(
    cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array, through: Any = backward
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) through one step only: each step stands as a sequence of its own.

    `through` is the `backward` that does it. Returns gradients of T·B sequences of one step, scaled: state
    (S, 2, T·B, H), x (1, T·B, I), exponent (2, T·B).
    """
    T, B, H = d_output.shape

    def one_step(values: Array) -> Array:
        return values.reshape(1, T * B, -1) if values.size else values

    running = (np.arange(T)[:, None] < trace.lengths).reshape(-1).astype(np.int64)
    saved = trace.saved_of(0, T).swapaxes(0, 1)
    saved = np.ascontiguousarray(saved).reshape(1, 1, len(saved), T * B, *saved.shape[3:])
    alone = trace._replace(x=one_step(trace.x), saved=saved, reset_h=one_step(trace.reset_h), lengths=running)
    nothing = np.zeros((len(cell.states), T * B, H), d_output.dtype)
    gradients: LayerGradients = through(
        cell, alone, weights, one_step(d_output), nothing, np.zeros((1, T * B), np.int64)
    )
    return gradients


class Diagonals(NamedTuple):
    """What the Jacobians of N single steps are made of, besides weights: derivatives of the new states, unit by unit.

    ax, ah (S, N, G, H): of new state s by the pre-activations; old (S, S, N, H): of new state s by old state q, where
    it does not pass through W_hh; reset (2, N, H): of a cell that resets before the product r and ∂(r ∘ h)/∂a_r.
    """

    ax: Array
    ah: Array
    old: Array
    reset: Array


def diagonals(cell: Cell, trace: LayerTrace, weights: LayerWeights, start: int, stop: int) -> Diagonals:
    """Return the diagonals of steps start…stop − 1 of every sequence, in that order: N = (stop − start)·B."""
    (units, _, _, V), B, dtype = trace.saved.shape[2:], len(trace.lengths), trace.saved.dtype
    H, S, G, N = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), (stop - start) * B
    saved = trace.saved_of(start, stop).transpose(0, 2, 3, 1, 4).reshape(N, -1, units * V)[:, :, :H]
    numbers = np.ascontiguousarray(saved).reshape(N, -1)
    d_ax, d_ah, d_old = (np.empty((S, *shape), dtype) for shape in ((N, G * H), (N, G * H), (S, N, H)))
    _diagonals_kernel(cell, dtype)(numbers, weights.peephole, np.eye(S, dtype=dtype), d_ax, d_ah, d_old)
    gates = S, N, G, H
    return Diagonals(d_ax.reshape(gates), d_ah.reshape(gates), d_old, saved[:, cell.saved :].swapaxes(0, 1))


def jacobian(cell: Cell, trace: LayerTrace, weights: LayerWeights, t: int) -> Array:
    """Return d state_{t+1} / d state_t of every sequence, (B, S·H, S·H), the states stacked as [h; c].

    J = D_direct + Σ_g diag(D_g)·W_hh,g, the diagonals from `step_backward` with unit cotangents.
    """
    H, S, G, B = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), trace.x.shape[1]
    parts = diagonals(cell, trace, weights, t, t + 1)
    products = np.broadcast_to(weights.weight_hh.reshape(G, H, H), (B, G, H, H))
    if cell.reset:
        r, reset_r = parts.reset
        d_reset = reset_r[:, :, None] * products[:, 0] + r[:, :, None] * np.eye(H, dtype=r.dtype)
        products = np.stack([*products.swapaxes(0, 1)[:-1], products[:, -1] @ d_reset], axis=1)
    J = np.zeros((B, S, H, S, H), trace.x.dtype)
    J[:, :, :, 0] = np.einsum("sbgj,bgjk->bsjk", parts.ah, products)
    unit = np.arange(H)
    J[:, :, unit, :, unit] += parts.old.transpose(3, 2, 0, 1)
    J[t >= trace.lengths] = np.eye(S * H, dtype=J.dtype).reshape(S, H, S, H)
    return J.reshape(B, S * H, S * H)


def warmup(cell_name: str, dtype: DTypeLike) -> None:
    """Compile the kernels of a cell, or load them from Numba's cache on disk, by running them once."""
    cell, dtype = CELLS[cell_name], np.dtype(dtype)
    B = inputs = H = 2
    rows, states = len(cell.gates) * H, len(cell.states)
    shapes = ((rows, inputs), (rows, H), (rows,), (rows,), (len(cell.peepholes) * H,))
    weights = LayerWeights(*(np.zeros(shape, dtype) for shape in shapes))
    state, d_output = np.zeros((states, B, H), dtype), np.zeros((2, B, H), dtype)
    for keep in (False, True):
        trace = forward(cell, np.zeros((2, B, inputs), dtype), weights, state, np.full(B, 2), keep)
    for exponent in (None, np.zeros((2, B), np.int64)):
        backward(cell, trace, weights, d_output, state, exponent)
    jacobian(cell, trace, weights, 0)
