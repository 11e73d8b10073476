"""Sequence kernels for the CPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)    weight_ih (G·H, I), weight_hh (G·H, H)    state, d_state (S, T+1, B, H), slot 0 is the initial one

V units fill one vector register; U such vectors hold all H, the last one padded. What stays inside is kept in that
order: ax, dax and dah are (T, B, U, G, V), `saved` is (T, U, B, K, V).

Each kernel is made once from a cell's `step` and `step_backward`, and runs the whole sequence. A tile of the product
with W_hh leaves the sums of all gates of a few sequences and units in a small panel, where the cell takes them up at
once; going back, dL/dh leaves the tile for `step_backward` in the same way. Products that need no recurrence (with the
inputs, dL/dx, the gradients of weights) are taken for a chunk of steps at a time, while the chunk is in cache.

The arguments and results of `step` lie in one small array, because only then can LLVM prove that loads and stores never
overlap, and turn the loop over V units into vector code.
"""

import math
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

from ..activations import scalar
from ..cells import CELLS, Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights
from .compiling import kernel, part
from .products import (
    ACCUMULATORS,
    add_sums,
    add_transposed,
    blocks,
    multiply,
    pack_columns,
    pack_gates,
    panel_units,
    scratch_size,
    share,
    width_at,
)
from .simd import VECTOR_BYTES, address, move, prefetch
from .team import empty, plan, run_together, wait_for_all

__all__ = ["backward", "direct", "forward", "jacobian", "warmup"]

#: Rows (steps times batch) in a chunk.
_CHUNK = 256


# Panels: V units side by side ---------------------------------------------------------------------------------------


def _regions(*sizes):
    """Return where each of the regions begins that follow each other, and where the last one ends."""
    return [sum(sizes[:k]) for k in range(len(sizes) + 1)]


# Indices are unsigned, because what Numba does for negative ones would keep LLVM from seeing that panels lie apart.
_index = np.uintp


@cache
def _take(count):
    """Build (a, first, stride) ↦ the numbers a[first], a[first + stride], … as a tuple of `count`."""
    if count == 0:
        return scalar(lambda a, first, stride: ())
    rest, last = _take(count - 1), count - 1
    return scalar(lambda a, first, stride: (*rest(a, first, stride), a[_index(first + last * stride)]))


@cache
def _put(count, add=False):
    """Build the inverse of `_take(count)`, which stores (or adds) `values` where that one reads."""
    if count == 0:
        return scalar(lambda a, first, stride, values: None)
    rest, last = _put(count - 1, add), count - 1

    @scalar
    def put(a, first, stride, values):
        rest(a, first, stride, values)
        i = _index(first + last * stride)
        a[i] = a[i] + values[last] if add else values[last]

    return put


def _panel_loop(*key):
    """Return the decorator of a loop over the units of a panel."""
    return part(*key, error_model="numpy", fastmath={"contract"}, forceinline=True)


@cache
def _nothing(count, dtype):
    """Return `count` times −0, which changes no number that it is added to."""
    return (dtype.type(-0.0),) * count


# Forward ------------------------------------------------------------------------------------------------------------


@cache
def _forward_panel(cell: Cell, V: int):
    """Regions of the panel: gate sums, ax where it is apart, peephole, old and new state, saved."""
    G, S, P = len(cell.gates), len(cell.states), len(cell.peepholes)
    size = V * (ACCUMULATORS // (1 if cell.reset else G))
    return size, _regions(*(size * n for n in (G, 0 if cell.joint else G, P, S, S, _saved(cell))))


def _saved(cell: Cell) -> int:
    return cell.saved + (2 if cell.reset else 0)


@cache
def _forward_work(cell: Cell, V: int):
    """Build (I, H, rows of a chunk, B) ↦ where the regions of the kernel's work space begin, and its size."""
    G, P, RESET = len(cell.gates), len(cell.peepholes), int(cell.reset is not None)

    @part(cell.name, V)
    def regions(I, H, rows, B):
        row = (H + V - 1) // V * V
        packed_ih, packed_hh, bias_ih = 0, G * row * I, G * row * (I + H)
        bias_hh, peephole = bias_ih + G * row, bias_ih + 2 * G * row
        ax = peephole + P * row
        packed_last = ax + rows * G * row
        sums = packed_last + RESET * H * row
        last_sum = sums + RESET * B * G * row
        return (
            packed_ih,
            packed_hh,
            bias_ih,
            bias_hh,
            peephole,
            ax,
            packed_last,
            sums,
            last_sum,
            last_sum + RESET * B * row,
        )

    return regions


@cache
def _forward_kernel(cell: Cell, dtype, keep: bool):
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, _saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (SUM, AX_, PEEPHOLE_, OLD, NEW, SAVED, _) = _forward_panel(cell, V)
    JOINT, RESET, KEEP = cell.joint, cell.reset is not None, keep
    STEP_G = 1 if RESET else G  # gates whose product is taken last
    SINGLE, MANY = panel_units(G, one_row=True), panel_units(G)
    SINGLE_LAST, MANY_LAST = panel_units(STEP_G, one_row=True), panel_units(STEP_G)
    cell_panel, reset_panel = _cell_forward(cell, dtype, keep), _reset_forward(cell, dtype) if RESET else None
    regions, all_steps, all_gates, last_gates = (
        _forward_work(cell, V),
        multiply(G, dtype),
        blocks(G, dtype),
        blocks(STEP_G, dtype),
    )

    @kernel(f"{cell.name}-{dtype}-{'keep' if keep else 'infer'}", cell.step)
    def forward(
        x, weight_ih, weight_hh, weight_last, bias_ih, bias_hh, peephole, lengths, state, saved, reset_h,
        work, scratches, chunk, counter, rank, parties, by_units,
    ):  # fmt: skip
        """Fill state[:, 1:], saved and reset_h: the part of thread `rank` of `parties`, in units or in sequences."""
        T, B, I, H = x.shape[0], x.shape[1], x.shape[2], state.shape[3]
        units = (H + V - 1) // V
        row = units * G * V
        most, most_last = (SINGLE, SINGLE_LAST) if B == 1 else (MANY, MANY_LAST)
        PACKED_IH, PACKED_HH, BIAS_IH, BIAS_HH, PEEPHOLE, AX, PACKED_LAST, SUMS, LAST_SUM, _ = regions(
            I, H, chunk * B, B
        )
        panel, flat_x, flat_state, flat_saved = scratches[rank], x.reshape(-1), state.reshape(-1), saved.reshape(-1)
        flat_reset = reset_h.reshape(-1)
        slot = (T + 1) * B * H  # from one state to the next

        panel[:] = 0  # lanes past the last unit stay finite, and meet weights of 0
        u0, u1 = share(units, most, rank, parties), share(units, most, rank + 1, parties)
        pack_gates(work, PACKED_HH, weight_hh, G, most, u0, u1)
        v0, v1 = share(units, MANY, rank, parties), share(units, MANY, rank + 1, parties)
        pack_gates(work, PACKED_IH, weight_ih, G, MANY, v0, v1)
        if RESET:
            w0, w1 = share(units, most_last, rank, parties), share(units, most_last, rank + 1, parties)
            pack_gates(work, PACKED_LAST, weight_last, 1, most_last, w0, w1)
        if rank == 0:
            _pack_biases(work, BIAS_IH, BIAS_HH, bias_ih, bias_hh, G, JOINT)
            for p in range(P):
                for n in range(units * V):
                    work[PEEPHOLE + p * units * V + n] = peephole[p * H + n] if n < H else work.dtype.type(0)
        if parties > 1:
            wait_for_all(counter, parties)
        if by_units:
            first, last = 0, B
            if most != MANY:  # the units of a panel of one row are two of the others'
                v0, v1 = u0, u1
        else:
            first, last = B * rank // parties, B * (rank + 1) // parties
            u0, v0, u1, v1 = 0, 0, units, units

        for t0 in range(0, T, chunk):
            steps = min(chunk, T - t0)
            blocks_of_rows, rows = (1, steps * B) if last - first == B else (steps, last - first)
            for k in range(blocks_of_rows):
                at = k * B + first
                all_steps(
                    address(work, AX + at * row), row, address(work, BIAS_IH), 0, address(flat_x, (t0 * B + at) * I), I,
                    address(work, PACKED_IH), I, rows, v0, v1, units,
                )  # fmt: skip
            for t in range(t0, t0 + steps):
                old, ax = t * B * H, AX + (t - t0) * B * row
                if by_units and t > 0:
                    wait_for_all(counter, parties)
                if RESET:
                    unit = u0
                    while unit < u1:
                        width = width_at(unit, units, most)
                        b = first
                        while b < last:
                            count = all_gates(
                                width, address(panel, SUM), width * V, V, R,
                                address(work, ax + b * row + unit * G * V), row, address(flat_state, old + b * H), H, 1,
                                address(work, PACKED_HH + unit * G * V * H), H, last - b,
                            )  # fmt: skip
                            for r in range(b, b + count):
                                for u in range(unit, unit + width):
                                    i = (r - b) * width + u - unit
                                    move(panel, OLD + i * V, flat_state, old + r * H + u * V, H - u * V)
                            reset_panel(panel, count * width * V)
                            for r in range(b, b + count):
                                for u in range(unit, unit + width):
                                    i = (r - b) * width + u - unit
                                    to = ((t if KEEP else 0) * B + r) * H + u * V
                                    move(flat_reset, to, panel, NEW + i * V, H - u * V)
                                    if KEEP:
                                        to = (((t * units + u) * B + r) * KS + K) * V
                                        move(flat_saved, to, panel, SAVED + i * V, V)
                                        move(flat_saved, to + V, panel, SAVED + R + i * V, V)
                                    for g in range(G - 1):
                                        move(work, SUMS + ((r * units + u) * G + g) * V, panel, SUM + g * R + i * V, V)
                                    move(work, LAST_SUM + (r * units + u) * V, panel, SUM + (G - 1) * R + i * V, V)
                            b += count
                        unit += width
                    if by_units:
                        wait_for_all(counter, parties)
                unit, end = (w0, w1) if RESET and by_units else (u0, u1)
                while unit < end:
                    width = width_at(unit, units, most_last)
                    b = first
                    while b < last:
                        if RESET:
                            count = last_gates(
                                width, address(panel, SUM + (G - 1) * R), width * V, V, R,
                                address(work, LAST_SUM + (b * units + unit) * V), units * V,
                                address(flat_reset, ((t if KEEP else 0) * B + b) * H), H, 1,
                                address(work, PACKED_LAST + unit * V * H), H, last - b,
                            )  # fmt: skip
                        else:
                            count = last_gates(
                                width, address(panel, SUM), width * V, V, R,
                                address(work, (ax + b * row if JOINT else BIAS_HH) + unit * G * V), row if JOINT else 0,
                                address(flat_state, old + b * H), H, 1,
                                address(work, PACKED_HH + unit * G * V * H), H, last - b,
                            )  # fmt: skip
                        for r in range(b, b + count):
                            for u in range(unit, unit + width):
                                i = (r - b) * width + u - unit
                                for g in range(G - 1 if RESET else 0):
                                    move(panel, SUM + g * R + i * V, work, SUMS + ((r * units + u) * G + g) * V, V)
                                for g in range(0 if JOINT else G):
                                    move(panel, AX_ + g * R + i * V, work, ax + r * row + (u * G + g) * V, V)
                                for p in range(P):
                                    move(panel, PEEPHOLE_ + p * R + i * V, work, PEEPHOLE + (p * units + u) * V, V)
                                for s in range(S):
                                    move(
                                        panel,
                                        OLD + s * R + i * V,
                                        flat_state,
                                        s * slot + old + r * H + u * V,
                                        H - u * V,
                                    )
                        cell_panel(panel, count * width * V)
                        for r in range(b, b + count):
                            for u in range(unit, unit + width):
                                i = (r - b) * width + u - unit
                                to, n, kept = old + (B + r) * H + u * V, H - u * V, ((t * units + u) * B + r) * KS * V
                                if t < lengths[r]:
                                    for s in range(S):
                                        move(flat_state, s * slot + to, panel, NEW + s * R + i * V, n)
                                    for k in range(K if KEEP else 0):
                                        move(flat_saved, kept + k * V, panel, SAVED + k * R + i * V, V)
                                else:  # past the end of a sequence its state is held
                                    for s in range(S):
                                        move(flat_state, s * slot + to, flat_state, s * slot + to - B * H, n)
                                    for k in range(K * V if KEEP else 0):
                                        flat_saved[kept + k] = 0
                        b += count
                    unit += width

    return forward


@cache
def _cell_forward(cell: Cell, dtype, keep: bool):
    """Build the loop of `step` over a panel."""
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    V = VECTOR_BYTES // dtype.itemsize
    R, (SUM, AX, PEEPHOLE, OLD, NEW, SAVED, _) = _forward_panel(cell, V)
    take_gates, take_peepholes, take_states, put_states, put_saved = _take(G), _take(P), _take(S), _put(S), _put(K)
    step, JOINT, KEEP, nothing = cell.step, cell.joint, keep, _nothing(G, dtype)

    @_panel_loop(cell.name, dtype, keep)
    def cell_forward(panel, count):
        for v in range(count):
            ax = take_gates(panel, v + (SUM if JOINT else AX), R)
            ah = nothing if JOINT else take_gates(panel, v + SUM, R)
            new, partials = step(ax, ah, take_peepholes(panel, v + PEEPHOLE, R), take_states(panel, v + OLD, R))
            put_states(panel, v + NEW, R, new)
            if KEEP:
                put_saved(panel, v + SAVED, R, partials)

    return cell_forward


@cache
def _reset_forward(cell: Cell, dtype):
    """Build the loop over a panel of the first phase of a cell that resets h before the product of its last gate."""
    V = VECTOR_BYTES // dtype.itemsize
    R, (SUM, _, _, OLD, NEW, SAVED, _) = _forward_panel(cell, V)
    reset, nothing, take, put, keep = cell.reset[0], dtype.type(-0.0), _take(1), _put(1), _put(2)

    @_panel_loop(cell.name, dtype)
    def reset_forward(panel, count):
        for v in range(count):
            new, kept = reset(take(panel, v + SUM, R)[0], nothing, take(panel, v + OLD, R)[0])
            put(panel, v + NEW, R, (new,))
            keep(panel, v + SAVED, R, kept)

    return reset_forward


@njit
def _pack_biases(work, to_ih, to_hh, bias_ih, bias_hh, gates, joint):
    """Pack the biases in the order unit, gate, lane; of a joint cell the sum of both, to where that of ax belongs."""
    V, H = VECTOR_BYTES // work.itemsize, bias_ih.shape[0] // gates
    for u in range((H + V - 1) // V):
        for g in range(gates):
            for v in range(V):
                to, j = (u * gates + g) * V + v, g * H + u * V + v
                work[to_ih + to] = work[to_hh + to] = 0
                if u * V + v < H:
                    work[to_ih + to] = bias_ih[j] + bias_hh[j] if joint else bias_ih[j]
                    work[to_hh + to] = bias_hh[j]


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
    """d_state·2^exponent (S, H) plus direct·2^direct_exponent (H,) on h, rescaled to a largest entry in [½, 1).

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


# Backward -----------------------------------------------------------------------------------------------------------


@cache
def _backward_panel(cell: Cell, V: int):
    """Regions of the panel: dL/dstate as it comes, direct part, saved, peephole; dL/d of what `step` took."""
    G, S, P = len(cell.gates), len(cell.states), len(cell.peepholes)
    return V * ACCUMULATORS, _regions(*(V * ACCUMULATORS * n for n in (S, 1, _saved(cell), P, G, G, P, S, S)))


@cache
def _backward_work(cell: Cell, V: int):
    """Build (I, H, rows of a chunk, B) ↦ where the regions of the kernel's work space begin, and its size."""
    G, S, P = len(cell.gates), len(cell.states), len(cell.peepholes)
    RESET, APART = int(cell.reset is not None), 0 if cell.joint else 1

    @part(cell.name, V)
    def regions(I, H, rows, B):
        units, inputs = (H + V - 1) // V * V, (I + V - 1) // V * V
        packed_ih, packed_hh = 0, G * units * inputs
        dax = packed_hh + G * units * units
        dah = dax + APART * 2 * rows * G * units  # two chunks, one to write while the other is read
        carry = dah + 2 * rows * G * units
        dh = carry + S * B * units
        zero = dh + B * units
        peephole = zero + units + inputs
        packed_last = peephole + P * units
        da_last = packed_last + RESET * units * units
        return (
            packed_ih,
            packed_hh,
            dax,
            dah,
            carry,
            dh,
            zero,
            peephole,
            packed_last,
            da_last,
            da_last + RESET * B * units,
        )

    return regions


@cache
def _backward_kernel(cell: Cell, dtype, scaled: bool):
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, _saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (NEW, DIRECT, SAVED, PEEPHOLE_, DAX_, DAH_, DP, TOTAL, OLD, SIZE) = _backward_panel(cell, V)
    JOINT, RESET, SCALED = cell.joint, cell.reset is not None, scaled
    SINGLE, MANY = panel_units(1, one_row=True), panel_units(1)
    cell_back = _cell_backward(cell, V, scaled)
    reset_back = _reset_backward(cell, V) if RESET else None
    regions, block, many = _backward_work(cell, V), blocks(1, dtype), multiply(1, dtype)
    add_product, input_gradient = add_transposed(dtype), _input_gradient(dtype)

    @kernel(f"{cell.name}-{dtype}-{'scaled' if scaled else 'plain'}", cell.step_backward)
    def backward(
        x, d_output, d_output_exponent, weight_ih, weight_hh, weight_last, peephole, lengths, state, saved, reset_h,
        d_state, exponent, dx, d_weight_ih, d_weight_hh, d_bias_ih, d_bias_hh, d_peephole, d_peepholes,
        work, scratches, chunk, counter, rank, parties, by_units,
    ):  # fmt: skip
        """Turn d_state[:, T] and d_output into d_state, dx and (unless scaled) d_weight…, the part of one thread.

        `scaled` has an exponent for every step, and rescales the adjoint at each, see `_add_scaled`.
        """
        T, B, I, H = x.shape[0], x.shape[1], x.shape[2], d_state.shape[3]
        units, inputs = (H + V - 1) // V, (I + V - 1) // V
        row, depth, most, slot = units * G * V, units * G * V, SINGLE if B == 1 else MANY, (T + 1) * B * H
        PACKED_IH, PACKED_HH, DAX, DAH, CARRY, DH, ZERO, PEEPHOLE, PACKED_LAST, DA_LAST, _ = regions(I, H, chunk * B, B)
        panel, flat_x, flat_state, flat_saved = scratches[rank], x.reshape(-1), state.reshape(-1), saved.reshape(-1)
        flat_d, flat_direct, flat_dx, flat_dp = (
            d_state.reshape(-1),
            d_output.reshape(-1),
            dx.reshape(-1),
            d_peepholes.reshape(-1),
        )

        panel[:SIZE] = 0  # lanes past the last unit stay finite, and meet weights of 0
        u0, u1 = share(units, most, rank, parties), share(units, most, rank + 1, parties)
        pack_columns(work, PACKED_HH, weight_hh, G, most, u0, u1)
        i0, i1 = share(inputs, MANY, rank, parties), share(inputs, MANY, rank + 1, parties)
        pack_columns(work, PACKED_IH, weight_ih, G, MANY, i0, i1)
        if RESET:
            pack_columns(work, PACKED_LAST, weight_last, 1, most, u0, u1)
        if rank == 0:
            for n in range((units + inputs) * V):
                work[ZERO + n] = 0
            for n in range(S * B * units * V):
                work[CARRY + n] = 0
            if H % V:  # lanes past the last unit meet weights of 0, which an adjoint of ∞ would make NaN
                for n in range(DAX, CARRY):
                    work[n] = 0
                for n in range(B * units * V if RESET else 0):
                    work[DA_LAST + n] = 0
            for b in range(B):
                for u in range(units):
                    for s in range(S):
                        to, n = CARRY + ((s * B + b) * units + u) * V, min(V, H - u * V)
                        move(work, to, flat_d, s * slot + (T * B + b) * H + u * V, n)
            for p in range(P):
                for n in range(units * V):
                    work[PEEPHOLE + p * units * V + n] = peephole[p * H + n] if n < H else work.dtype.type(0)
        if parties > 1:
            wait_for_all(counter, parties)
        first, last = B * rank // parties, B * (rank + 1) // parties
        if by_units:
            first, last = 0, B
        else:
            u0, u1 = 0, units
        strips, half = units * G, chunk * B * row
        s0, s1 = share(strips, 1, rank, parties), share(strips, 1, rank + 1, parties)

        after, apart = 0, DAH - DAX
        chunks = (T + chunk - 1) // chunk
        for c in range(chunks - 1, -1, -1):
            t0, here = c * chunk, DAX + c % 2 * half
            steps = min(chunk, T - t0)
            for t in range(t0 + steps - 1, t0 - 1, -1):
                if by_units and t < T - 1:
                    wait_for_all(counter, parties)
                dax = here + (t - t0) * B * row
                if SCALED:
                    if t < T - 1:
                        many(
                            address(work, DH + first * units * V), units * V,
                            address(work, CARRY + first * units * V), units * V,
                            address(work, after + apart + first * row), row,
                            address(work, PACKED_HH), depth, last - first, 0, units, units,
                        )  # fmt: skip
                    for b in range(first, last):
                        for u in range(units):
                            for s in range(S):
                                at = (DH if s == 0 and t < T - 1 else CARRY + s * B * units * V) + (b * units + u) * V
                                to, n = s * slot + ((t + 1) * B + b) * H + u * V, min(V, H - u * V)
                                move(flat_d, to, work, at, n)
                        if t < lengths[b]:
                            top = _add_scaled(
                                d_state[:, t + 1, b], exponent[t + 1, b], d_output[t, b], d_output_exponent[t, b]
                            )
                            exponent[t + 1, b] = top
                        exponent[t, b] = exponent[t + 1, b]
                unit = u0
                while unit < u1:
                    width = width_at(unit, units, most)
                    b = first
                    while b < last:
                        count = min(max(1, ACCUMULATORS // width), last - b)
                        for r in range(b, b + count):
                            for u in range(unit, unit + width):
                                i = (r - b) * width + u - unit
                                prefetch(flat_direct, (t * B + r) * H + u * V)
                                for k in range(K):
                                    prefetch(flat_saved, (((t * units + u) * B + r) * KS + k) * V)
                        if not SCALED and t < T - 1:
                            count = block(
                                width, address(panel, NEW), width * V, V, 0,
                                address(work, CARRY + (b * units + unit) * V), units * V,
                                address(work, after + apart + b * row), row, 1,
                                address(work, PACKED_HH + unit * V * depth), depth, last - b,
                            )  # fmt: skip
                        for r in range(b, b + count):
                            for u in range(unit, unit + width):
                                i = (r - b) * width + u - unit
                                n, at, kept = H - u * V, (r * units + u) * V, ((t * units + u) * B + r) * KS * V
                                if SCALED:
                                    for s in range(S):
                                        if n < V:
                                            move(panel, NEW + s * R + i * V, work, ZERO, V)
                                        to = s * slot + ((t + 1) * B + r) * H + u * V
                                        move(panel, NEW + s * R + i * V, flat_d, to, n)
                                else:
                                    for s in range(0 if t == T - 1 else 1, S):
                                        move(panel, NEW + s * R + i * V, work, CARRY + s * B * units * V + at, V)
                                    if n < V or t >= lengths[r]:
                                        move(panel, DIRECT + i * V, work, ZERO, V)
                                    if t < lengths[r]:
                                        move(panel, DIRECT + i * V, flat_direct, (t * B + r) * H + u * V, n)
                                for k in range(K):
                                    move(panel, SAVED + k * R + i * V, flat_saved, kept + k * V, V)
                                for p in range(P):
                                    move(panel, PEEPHOLE_ + p * R + i * V, work, PEEPHOLE + (p * units + u) * V, V)
                                    move(
                                        panel,
                                        DP + p * R + i * V,
                                        flat_dp,
                                        (((c % 2 * B + r) * P + p) * units + u) * V,
                                        V,
                                    )
                        cell_back(panel, count * width * V)
                        for r in range(b, b + count):
                            for u in range(unit, unit + width):
                                i = (r - b) * width + u - unit
                                n, at, da = H - u * V, (r * units + u) * V, dax + (r * units + u) * G * V
                                if t >= lengths[r]:  # the state was held: so is its adjoint, and no weight has a share
                                    for s in range(S):
                                        to = s * slot + ((t + 1) * B + r) * H + u * V
                                        move(flat_d, to, panel, NEW + s * R + i * V, n)
                                        move(work, CARRY + s * B * units * V + at, panel, NEW + s * R + i * V, V)
                                    for g in range(G):
                                        move(work, da + g * V, work, ZERO, V)
                                        if not JOINT:
                                            move(work, da + apart + g * V, work, ZERO, V)
                                    if RESET:
                                        move(work, DA_LAST + at, work, ZERO, V)
                                    continue
                                for g in range(G):
                                    move(work, da + g * V, panel, DAX_ + g * R + i * V, n)
                                    if not JOINT:
                                        move(work, da + apart + g * V, panel, DAH_ + g * R + i * V, n)
                                for p in range(P):
                                    move(
                                        flat_dp,
                                        (((c % 2 * B + r) * P + p) * units + u) * V,
                                        panel,
                                        DP + p * R + i * V,
                                        V,
                                    )
                                for s in range(S):
                                    if not (SCALED and s == 0):
                                        to = s * slot + ((t + 1) * B + r) * H + u * V
                                        move(flat_d, to, panel, TOTAL + s * R + i * V, n)
                                    move(work, CARRY + s * B * units * V + at, panel, OLD + s * R + i * V, V)
                                if RESET:
                                    move(work, DA_LAST + at, panel, DAX_ + (G - 1) * R + i * V, n)
                        b += count
                    unit += width
                if RESET:
                    if by_units:
                        wait_for_all(counter, parties)
                    unit = u0
                    while unit < u1:
                        width = width_at(unit, units, most)
                        b = first
                        while b < last:
                            count = block(
                                width, address(panel, NEW), width * V, V, 0, address(work, ZERO), 0,
                                address(work, DA_LAST + b * units * V), units * V, 1,
                                address(work, PACKED_LAST + unit * V * units * V), units * V, last - b,
                            )  # fmt: skip
                            for r in range(b, b + count):
                                for u in range(unit, unit + width):
                                    i = (r - b) * width + u - unit
                                    kept = (((t * units + u) * B + r) * KS + K) * V
                                    move(panel, SAVED + i * V, flat_saved, kept, V)
                                    move(panel, SAVED + R + i * V, flat_saved, kept + V, V)
                                    move(panel, OLD + i * V, work, CARRY + (r * units + u) * V, V)
                            reset_back(panel, count * width * V)
                            for r in range(b, b + count):
                                for u in range(unit, unit + width):
                                    i = (r - b) * width + u - unit
                                    if t < lengths[r]:
                                        move(work, dax + (r * units + u) * G * V, panel, DAX_ + i * V, H - u * V)
                                        move(work, CARRY + (r * units + u) * V, panel, OLD + i * V, V)
                            b += count
                        unit += width
                after = dax

            if parties > 1:
                wait_for_all(counter, parties)
            rows = steps * B
            r0, r1 = rows * rank // parties, rows * (rank + 1) // parties
            input_gradient(
                flat_dx, (t0 * B + r0) * I, I, work, here + r0 * row, row, PACKED_IH, depth, r1 - r0, ZERO, panel
            )
            if not SCALED:
                for p in range(P if rank == 0 else 0):
                    for j in range(H):
                        for b in range(B):
                            d_peephole[p * H + j] += d_peepholes[c % 2, b, p, j]
                            d_peepholes[c % 2, b, p, j] = 0
                from_h = here + apart
                add_sums(d_bias_ih, work, here, G, rows, s0, s1, panel)
                add_product(d_weight_ih, work, here, G, 0, G, flat_x, t0 * B * I, I, rows, s0, s1, panel)
                if not JOINT:
                    add_sums(d_bias_hh, work, from_h, G, rows, s0, s1, panel)
                split = G - 1 if RESET else G
                add_product(d_weight_hh, work, from_h, G, 0, split, flat_state, t0 * B * H, H, rows, s0, s1, panel)
                if RESET:
                    add_product(
                        d_weight_hh, work, from_h, G, split, G, reset_h.reshape(-1), t0 * B * H, H, rows, s0, s1, panel
                    )  # fmt: skip

        # dL/dstate of slot 0.
        if by_units:
            wait_for_all(counter, parties)
        unit = u0
        while unit < u1:
            width = width_at(unit, units, most)
            b = first
            while b < last:
                count = block(
                    width, address(panel, NEW), width * V, V, 0,
                    address(work, CARRY + (b * units + unit) * V), units * V,
                    address(work, after + apart + b * row), row, 1,
                    address(work, PACKED_HH + unit * V * depth), depth, last - b,
                )  # fmt: skip
                for r in range(b, b + count):
                    for u in range(unit, unit + width):
                        i = (r - b) * width + u - unit
                        move(flat_d, r * H + u * V, panel, NEW + i * V, H - u * V)
                        for s in range(1, S):
                            move(
                                flat_d, s * slot + r * H + u * V, work, CARRY + ((s * B + r) * units + u) * V, H - u * V
                            )
                b += count
            unit += width

    return backward


@cache
def _cell_backward(cell: Cell, V: int, scaled: bool):
    """Build the loop of `step_backward` over a panel."""
    S, P, K = len(cell.states), len(cell.peepholes), cell.saved
    R, (NEW, DIRECT, SAVED, PEEPHOLE, DAX, DAH, DP, TOTAL, OLD, _) = _backward_panel(cell, V)
    take_saved, take_peepholes, take_states, take_direct = _take(K), _take(P), _take(S), _take(1)
    put_gates, add_peepholes, put_states = _put(len(cell.gates)), _put(P, add=True), _put(S)
    step_backward, add_direct, JOINT, SCALED = cell.step_backward, _put(1, add=True), cell.joint, scaled

    @_panel_loop(cell.name, V, scaled)
    def cell_backward(panel, count):
        for v in range(count):
            if not SCALED:
                add_direct(panel, v + NEW, R, take_direct(panel, v + DIRECT, R))
            da_x, da_h, dp, total, d_old = step_backward(
                take_saved(panel, v + SAVED, R),
                take_peepholes(panel, v + PEEPHOLE, R),
                take_states(panel, v + NEW, R),
            )
            put_gates(panel, v + DAX, R, da_x)
            if not JOINT:
                put_gates(panel, v + DAH, R, da_h)
            add_peepholes(panel, v + DP, R, dp)
            put_states(panel, v + TOTAL, R, total)
            put_states(panel, v + OLD, R, d_old)

    return cell_backward


@cache
def _reset_backward(cell: Cell, V: int):
    """Build the loop over a panel that takes dL/d(r ∘ h) to dL/da_r and adds its part to dL/dh."""
    _, reset_backward = cell.reset
    R, (NEW, _, SAVED, _, DAX, _, _, _, OLD, _) = _backward_panel(cell, V)
    take, take_kept, put = _take(1), _take(2), _put(1)

    @_panel_loop(cell.name, V)
    def reset_panel(panel, count):
        for v in range(count):
            da, dh = reset_backward(take_kept(panel, v + SAVED, R), take(panel, v + NEW, R)[0])
            put(panel, v + DAX, R, (da,))
            put(panel, v + OLD, R, (take(panel, v + OLD, R)[0] + dh,))

    return reset_panel


@cache
def _input_gradient(dtype):
    """Build the product dx = dax·W_ih of `rows` rows of dx (I numbers each)."""
    block, most, V = blocks(1, dtype), panel_units(1), VECTOR_BYTES // dtype.itemsize

    @part(dtype)
    def input_gradient(dx, to, I, work, dax, row, packed, depth, rows, zero, scratch):
        units, unit, start = (I + V - 1) // V, 0, address(work, zero)
        while unit < units:
            width = width_at(unit, units, most)
            b, whole, r = address(work, packed + unit * V * depth), I - unit * V >= width * V, 0
            while r < rows:
                at, a = to + r * I + unit * V, address(work, dax + r * row)
                if whole:
                    r += block(width, address(dx, at), I, V, 0, start, 0, a, row, 1, b, depth, rows - r)
                    continue
                count = block(width, address(scratch, 0), width * V, V, 0, start, 0, a, row, 1, b, depth, rows - r)
                for i in range(count * width):
                    move(dx, at + i // width * I + i % width * V, scratch, i * V, I - (unit + i % width) * V)
                r += count
            unit += width

    return input_gradient


# Jacobian -----------------------------------------------------------------------------------------------------------


@cache
def _diagonals_kernel(cell: Cell, dtype):
    """Unit cotangents through `step_backward`: the diagonals of which the Jacobian is made."""
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    step_backward = cell.step_backward
    take_saved, take_peepholes, take_states, put_gates, put_states = _take(K), _take(P), _take(S), _put(G), _put(S)

    @kernel(f"{cell.name}-{dtype}", step_backward)
    def diagonals(saved, peephole, unit, d_ah, d_old):
        """Fill d_ah (S, B, G·H) and d_old (S, S, B, H): row s is the cotangent of new state s; unit is the identity."""
        B, H = d_old.shape[2:]
        row = np.empty(max(G, S), saved.dtype)
        for s in range(S):
            for b in range(B):
                for j in range(H):
                    _, da_h, _, _, old = step_backward(
                        take_saved(saved[b], j, H), take_peepholes(peephole, j, H), take_states(unit[s], 0, 1)
                    )
                    put_gates(d_ah[s, b], j, H, da_h)
                    put_states(row, 0, 1, old)
                    for q in range(S):
                        d_old[s, q, b, j] = row[q]

    return diagonals


# What a layer calls -------------------------------------------------------------------------------------------------


def chunk_steps(B: int) -> int:
    """Return the steps of a batch that kernels take at a time; sums over steps are cut there, and nowhere else."""
    return max(1, _CHUNK // B)


def _parts(cell: Cell, weight_hh: Array) -> tuple[Array, Array]:
    """Return W_hh as the first product of a step takes it, and W_hn of a cell that resets h before that product."""
    if not cell.reset:
        return weight_hh, weight_hh[:0]
    H = weight_hh.shape[1]
    head = weight_hh.copy()
    head[-H:] = 0
    return head, weight_hh[-H:]


def forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool = True
) -> LayerTrace:
    """Run one layer in one direction over x (T, B, I) from state (S, B, H).

    With keep=False only the states are kept, which is all that inference needs. Arrays are C-contiguous, of one dtype
    and checked by the caller.
    """
    (T, B, I), H, S, dtype = x.shape, weights.weight_hh.shape[1], len(cell.states), x.dtype
    V = VECTOR_BYTES // dtype.itemsize
    states = empty((S, T + 1, B, H), dtype)
    states[:, 0] = state
    saved = empty((T if keep else 0, -(-H // V), B, _saved(cell), V), dtype)
    reset_h = empty(((T if keep else 1) if cell.reset else 0, B, H), dtype)
    chunk = min(T, chunk_steps(B))
    size = _forward_work(cell, V)(I, H, chunk * B, B)[-1]
    parties, by_units = plan(cell, T, B, I, H, dtype)
    panels = _forward_panel(cell, V)[1][-1]
    arguments = (
        x, weights.weight_ih, *_parts(cell, weights.weight_hh), weights.bias_ih, weights.bias_hh, weights.peephole,
        lengths, states, saved, reset_h, empty((size,), dtype), empty((parties, panels), dtype), chunk,
    )  # fmt: skip
    run_together(_forward_kernel(cell, dtype, keep), arguments, parties, by_units)
    return LayerTrace(cell.name, x, states, saved, reset_h, lengths)


def backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None = None,
    into: LayerWeights | None = None,
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) and d_final (S, B, H) through one layer (BPTT: Werbos 1990).

    Given d_output_exponent (T, B), d_output stands for d_output·2^exponent, and the adjoint is rescaled by powers of
    two at every step, so that it neither under- nor overflows however long the sequence; weights get no gradient then.
    dL/d weights is added to `into`, if that is given.
    """
    (T, B, H), I, S, dtype = d_output.shape, trace.x.shape[2], len(cell.states), d_output.dtype
    V, scaled = VECTOR_BYTES // dtype.itemsize, d_output_exponent is not None
    d_state, dx = empty((S, T + 1, B, H), dtype), empty((T, B, I), dtype)
    d_state[:, T] = d_final
    exponent = np.zeros((T + 1 if scaled else 0, B), np.int64)
    if into is None:
        into = LayerWeights(*(np.zeros((0,) * w.ndim if scaled else w.shape, dtype) for w in weights))
    chunk = min(T, chunk_steps(B))
    size = _backward_work(cell, V)(I, H, chunk * B, B)[-1]
    parties, by_units = plan(cell, T, B, I, H, dtype, scaled)
    panels = max(_backward_panel(cell, V)[1][-1], scratch_size(max(I, H), V))
    d_peepholes = np.zeros((2, B, len(cell.peepholes), -(-H // V) * V), dtype)  # of two chunks
    arguments = (
        trace.x, d_output, d_output_exponent if scaled else exponent, weights.weight_ih,
        *_parts(cell, weights.weight_hh), weights.peephole, trace.lengths, trace.state, trace.saved, trace.reset_h,
        d_state, exponent, dx, *into, d_peepholes, empty((size,), dtype), empty((parties, panels), dtype), chunk,
    )  # fmt: skip
    run_together(_backward_kernel(cell, dtype, scaled), arguments, parties, by_units)
    if scaled:
        return LayerGradients(None, dx, d_state, d_output, exponent, d_output_exponent)
    if cell.joint:
        into.bias_hh[...] = into.bias_ih
    return LayerGradients(into, dx, d_state, d_output, None, None)


def direct(cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array) -> LayerGradients:
    """Backpropagate d_output (T, B, H) through one step only: each step stands as a sequence of its own.

    Returns gradients of T·B sequences of one step, scaled: state (S, 2, T·B, H), x (1, T·B, I), exponent (2, T·B).
    """
    T, B, H = d_output.shape

    def one_step(values: Array) -> Array:
        return values.reshape(1, T * B, -1) if values.size else values

    running = (np.arange(T)[:, None] < trace.lengths).reshape(-1).astype(np.int64)
    saved = trace.saved.swapaxes(0, 1)
    saved = np.ascontiguousarray(saved).reshape(1, saved.shape[0], T * B, *saved.shape[3:])
    alone = trace._replace(x=one_step(trace.x), saved=saved, reset_h=one_step(trace.reset_h), lengths=running)
    nothing = np.zeros((len(cell.states), T * B, H), d_output.dtype)
    return backward(cell, alone, weights, one_step(d_output), nothing, np.zeros((1, T * B), np.int64))


def jacobian(cell: Cell, trace: LayerTrace, weights: LayerWeights, t: int) -> Array:
    """Return d state_{t+1} / d state_t of every sequence, (B, S·H, S·H), the states stacked as [h; c].

    J = D_direct + Σ_g diag(D_g)·W_hh,g, the diagonals from `step_backward` with unit cotangents.
    """
    H, S, G, B = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), trace.x.shape[1]
    dtype = trace.x.dtype
    d_ah, d_old = np.empty((S, B, G * H), dtype), np.empty((S, S, B, H), dtype)
    units, _, K, V = trace.saved.shape[1:]
    saved = np.ascontiguousarray(trace.saved[t].transpose(1, 2, 0, 3).reshape(B, K, units * V)[:, :, :H]).reshape(B, -1)
    _diagonals_kernel(cell, dtype)(saved, weights.peephole, np.eye(S, dtype=dtype), d_ah, d_old)
    products = np.broadcast_to(weights.weight_hh.reshape(G, H, H), (B, G, H, H))
    if cell.reset:
        r, reset_r = saved.reshape(B, -1, H)[:, cell.saved :].swapaxes(0, 1)
        d_reset = reset_r[:, :, None] * products[:, 0] + r[:, :, None] * np.eye(H, dtype=dtype)
        products = np.stack([*products.swapaxes(0, 1)[:-1], products[:, -1] @ d_reset], axis=1)
    J = np.zeros((B, S, H, S, H), dtype)
    J[:, :, :, 0] = np.einsum("sbgj,bgjk->bsjk", d_ah.reshape(S, B, G, H), products)
    unit = np.arange(H)
    J[:, :, unit, :, unit] += d_old.transpose(3, 2, 0, 1)
    J[t >= trace.lengths] = np.eye(S * H, dtype=dtype).reshape(S, H, S, H)
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
