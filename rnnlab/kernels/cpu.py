"""Sequence kernels for the CPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)      ax, dax, dah (T, B, G·H)       state, d_state (S, T+1, B, H), slot 0 is the initial state
    ah (B, G·H)      weight_hh (G·H, H)             saved (T, B, K·H); block k holds number k of every unit

Each kernel is made once from a cell's `step` and `step_backward`. The product with the inputs of all steps is one large
product before the time loop, the weight gradients are large products after it; in the loop stay W_hh and the cell.

The cell works on panels of V units, V filling one vector register. The arguments and results of `step` are rows of one
small array, because only then can LLVM prove that loads and stores never overlap, and turn the loop into vector code.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import DTypeLike, NDArray

from ..activations import scalar
from ..cells import CELLS, Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights, threads
from .compiling import kernel
from .products import add_transposed, columns_of, multiply, pack, pack_transposed, product
from .simd import VECTOR_BYTES, move_vector

__all__ = ["backward", "direct", "forward", "jacobian", "warmup"]


# Panels: V units side by side ---------------------------------------------------------------------------------------


def _rows(V, *counts):
    """Return where each group of rows of a panel begins, and its size."""
    return [V * sum(counts[:k]) for k in range(len(counts) + 1)]


@cache
def _take(count):
    """Build (a, first, stride) ↦ the numbers a[first], a[first + stride], … as a tuple of `count`."""
    if count == 0:
        return scalar(lambda a, first, stride: ())
    rest, last = _take(count - 1), count - 1
    return scalar(lambda a, first, stride: (*rest(a, first, stride), a[first + last * stride]))


@cache
def _put(count, add=False):
    """Build the inverse of `_take(count)`, which stores (or adds) `values` where that one reads."""
    if count == 0:
        return scalar(lambda a, first, stride, values: None)
    rest, last = _put(count - 1, add), count - 1

    @scalar
    def put(a, first, stride, values):
        rest(a, first, stride, values)
        a[first + last * stride] = a[first + last * stride] + values[last] if add else values[last]

    return put


@njit(forceinline=True)
def _copy(target, to, source, start, count):
    """target[to : to + count] = source[start : start + count] for at most one panel: whole, but for a row's last."""
    if count == VECTOR_BYTES // target.itemsize:
        move_vector(target, to, source, start)
    else:
        for v in range(count):
            target[to + v] = source[start + v]


# Forward ------------------------------------------------------------------------------------------------------------


@cache
def _forward_kernel(cell: Cell, dtype):
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    V = VECTOR_BYTES // dtype.itemsize
    AX, AH, BIAS, PEEPHOLE, OLD, NEW, SAVED, SIZE = _rows(V, G, G, G, P, S, S, K)
    RESET = cell.reset is not None
    step, product_after_reset = cell.step, _reset_forward(cell) if RESET else None
    take_gates, take_peepholes, take_states, put_states, put_saved = _take(G), _take(P), _take(S), _put(S), _put(K)

    @kernel(f"{cell.name}-{dtype}", step)
    def forward(ax, packed, packed_last, bias_hh, peephole, lengths, state, saved, reset_h, first, last):
        """Fill state[:, 1:], saved and reset_h of sequences first…last; `saved` may be one step, then written anew."""
        T, B, H, rows = ax.shape[0], ax.shape[1], state.shape[3], last - first
        ah, panel = np.empty(rows * G * H, ax.dtype), np.zeros(SIZE, ax.dtype)
        scratch, work = (
            np.empty(rows * columns_of(ax), ax.dtype),
            np.empty(rows * (G - 1) * H if RESET else 0, ax.dtype),
        )
        flat_ax, flat_state, flat_saved = ax.reshape(-1), state.reshape(-1), saved.reshape(-1)
        for t in range(T):
            slot = t if saved.shape[0] == T else 0
            if RESET:
                rest = slice(first, last)
                product_after_reset(
                    packed,
                    packed_last,
                    bias_hh,
                    ax[t, rest],
                    state[0, t, rest],
                    ah,
                    saved[slot, rest],
                    reset_h[slot, rest],
                    scratch,
                    work,
                )
            else:
                multiply(ah, 0, flat_state, (t * B + first) * H, packed, rows, G * H, scratch)
            for b in range(first, last):
                if t >= lengths[b]:
                    state[:, t + 1, b] = state[:, t, b]
                    continue
                row, old, kept = (t * B + b) * G * H, (t * B + b) * H, (slot * B + b) * saved.shape[2]
                for j in range(0, H, V):
                    n = min(V, H - j)
                    for g in range(G):
                        _copy(panel, AX + g * V, flat_ax, row + g * H + j, n)
                        _copy(panel, AH + g * V, ah, (b - first) * G * H + g * H + j, n)
                        _copy(panel, BIAS + g * V, bias_hh, g * H + j, n)
                    for p in range(P):
                        _copy(panel, PEEPHOLE + p * V, peephole, p * H + j, n)
                    for s in range(S):
                        _copy(panel, OLD + s * V, flat_state, s * (T + 1) * B * H + old + j, n)
                    for v in range(G * V):
                        panel[AH + v] += panel[BIAS + v]
                    for v in range(V):
                        new, partials = step(
                            take_gates(panel, AX + v, V),
                            take_gates(panel, AH + v, V),
                            take_peepholes(panel, PEEPHOLE + v, V),
                            take_states(panel, OLD + v, V),
                        )
                        put_states(panel, NEW + v, V, new)
                        put_saved(panel, SAVED + v, V, partials)
                    for s in range(S):
                        _copy(flat_state, s * (T + 1) * B * H + old + B * H + j, panel, NEW + s * V, n)
                    for k in range(K):
                        _copy(flat_saved, kept + k * H + j, panel, SAVED + k * V, n)

    return forward


@cache
def _reset_forward(cell: Cell):
    """Build the two products of a cell that resets h before the product of its last gate."""
    G, K = len(cell.gates), cell.saved
    reset, _ = cell.reset

    @njit(error_model="numpy")
    def product_after_reset(packed, packed_last, bias_hh, ax, h, ah, saved, reset_h, scratch, part):
        """Fill ah (B, G·H): W_hh h for all gates but the last, W_hn (r ∘ h) for the last; keep r ∘ h in reset_h."""
        B, H = h.shape
        head = (G - 1) * H
        multiply(part, 0, h.reshape(-1), 0, packed, B, head, scratch)
        for b in range(B):
            for j in range(head):
                ah[b * G * H + j] = part[b * head + j]
            for j in range(H):
                reset_h[b, j], kept = reset(ax[b, j], part[b * head + j] + bias_hh[j], h[b, j])
                saved[b, K * H + j], saved[b, (K + 1) * H + j] = kept
        multiply(part, 0, reset_h.reshape(-1), 0, packed_last, B, H, scratch)
        for b in range(B):
            for j in range(H):
                ah[b * G * H + head + j] = part[b * H + j]

    return product_after_reset


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
def _backward_kernel(cell: Cell, dtype):
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    V = VECTOR_BYTES // dtype.itemsize
    SAVED, PEEPHOLE, NEW, DAX, DAH, DP, TOTAL, OLD, SIZE = _rows(V, K, P, S, G, G, P, S, S)
    RESET, JOINT = cell.reset is not None, cell.joint
    step_backward, product_before_reset = cell.step_backward, _reset_backward(cell) if RESET else None
    take_saved, take_peepholes, take_states = _take(K), _take(P), _take(S)
    put_gates, add_peepholes, put_states = _put(G), _put(P, add=True), _put(S)

    @kernel(f"{cell.name}-{dtype}", step_backward)
    def backward(
        d_output,
        d_output_exponent,
        packed,
        packed_last,
        peephole,
        lengths,
        saved,
        d_state,
        exponent,
        dax,
        dah,
        d_peephole,
        first,
        last,
    ):
        """Turn d_state[:, T] and d_output into d_state, dax, dah (the same array as dax if joint) and d_peephole.

        With an `exponent` of T+1 steps (instead of none) the adjoint is rescaled at every step, see `_add_scaled`.
        """
        T, B, H, rows = dax.shape[0], dax.shape[1], d_state.shape[3], last - first
        dh, panel = np.empty(rows * H, dax.dtype), np.zeros(SIZE, dax.dtype)
        scratch, work = np.empty(rows * columns_of(dax), dax.dtype), np.empty(rows * G * H if RESET else 0, dax.dtype)
        flat_state, flat_saved, flat_dax, flat_dah = (
            d_state.reshape(-1),
            saved.reshape(-1),
            dax.reshape(-1),
            dah.reshape(-1),
        )
        flat_dp = d_peephole.reshape(-1)
        for t in range(T - 1, -1, -1):
            for b in range(first, last):
                if t >= lengths[b]:
                    _pass_through(d_state, exponent, dax, dah, t, b)
                    continue
                _receive(d_state, exponent, d_output, d_output_exponent, t, b)
                row, old, kept = (t * B + b) * G * H, (t * B + b) * H, (t * B + b) * saved.shape[2]
                for j in range(0, H, V):
                    n = min(V, H - j)
                    for k in range(K):
                        _copy(panel, SAVED + k * V, flat_saved, kept + k * H + j, n)
                    for p in range(P):
                        _copy(panel, PEEPHOLE + p * V, peephole, p * H + j, n)
                        _copy(panel, DP + p * V, flat_dp, (b * P + p) * H + j, n)
                    for s in range(S):
                        _copy(panel, NEW + s * V, flat_state, s * (T + 1) * B * H + old + B * H + j, n)
                    for v in range(V):
                        da_x, da_h, dp, total, d_old = step_backward(
                            take_saved(panel, SAVED + v, V),
                            take_peepholes(panel, PEEPHOLE + v, V),
                            take_states(panel, NEW + v, V),
                        )
                        put_gates(panel, DAX + v, V, da_x)
                        put_gates(panel, DAH + v, V, da_h)
                        add_peepholes(panel, DP + v, V, dp)
                        put_states(panel, TOTAL + v, V, total)
                        put_states(panel, OLD + v, V, d_old)
                    for g in range(G):
                        _copy(flat_dax, row + g * H + j, panel, DAX + g * V, n)
                        if not JOINT:
                            _copy(flat_dah, row + g * H + j, panel, DAH + g * V, n)
                    for p in range(P):
                        _copy(flat_dp, (b * P + p) * H + j, panel, DP + p * V, n)
                    for s in range(S):
                        _copy(flat_state, s * (T + 1) * B * H + old + j, panel, OLD + s * V, n)
                    for s in range(1, S):
                        _copy(flat_state, s * (T + 1) * B * H + old + B * H + j, panel, TOTAL + s * V, n)
            if RESET:
                rest = slice(first, last)
                product_before_reset(packed, packed_last, saved[t, rest], dah[t, rest], dh, scratch, work)
            else:
                multiply(dh, 0, flat_dah, (t * B + first) * G * H, packed, rows, H, scratch)
            for b in range(first, last):
                for j in range(H):
                    d_state[0, t, b, j] += dh[(b - first) * H + j]

    return backward


@njit
def _pass_through(d_state, exponent, dax, dah, t, b):
    """Past the end of a sequence its state is held: the adjoint goes back as it is, and no weight has a share."""
    d_state[:, t, b] = d_state[:, t + 1, b]
    dax[t, b] = 0
    dah[t, b] = 0
    if exponent.shape[0] > 0:
        exponent[t, b] = exponent[t + 1, b]


@njit
def _receive(d_state, exponent, d_output, d_output_exponent, t, b):
    """Add the direct gradient of h_{t+1} to the adjoint at its slot."""
    if exponent.shape[0] > 0:
        top = _add_scaled(d_state[:, t + 1, b], exponent[t + 1, b], d_output[t, b], d_output_exponent[t, b])
        exponent[t, b] = exponent[t + 1, b] = top
    else:
        for j in range(d_output.shape[2]):
            d_state[0, t + 1, b, j] += d_output[t, b, j]


@cache
def _reset_backward(cell: Cell):
    """Build the backward of `_reset_forward`."""
    G, K = len(cell.gates), cell.saved
    _, reset_backward = cell.reset

    @njit(error_model="numpy")
    def product_before_reset(packed, packed_last, saved, da, dh, scratch, part):
        """Fill dh (B, H), dL/dh_{t−1} through both products, and the block of the reset gate in da (B, G·H)."""
        B, H = da.shape[0], da.shape[1] // G
        head = (G - 1) * H
        d_reset = B * head  # where dL/d(r ∘ h) begins in `part`
        for b in range(B):
            for j in range(H):
                part[b * H + j] = da[b, head + j]
        multiply(part, d_reset, part, 0, packed_last, B, H, scratch)
        for b in range(B):
            for j in range(H):
                kept = (saved[b, K * H + j], saved[b, (K + 1) * H + j])
                da[b, j], part[d_reset + b * H + j] = reset_backward(kept, part[d_reset + b * H + j])
            for j in range(head):
                part[b * head + j] = da[b, j]
        multiply(dh, 0, part, 0, packed, B, H, scratch)
        for j in range(B * H):
            dh[j] += part[d_reset + j]

    return product_before_reset


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


# Threads ------------------------------------------------------------------------------------------------------------

#: A second thread costs about as much as this many FLOPs take on one core.
_WORTH_A_THREAD = 2e7


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rnnlab")


def _share(work: Callable[[int, int], object], rows: int, flops: float) -> None:
    """Call work(first, last) on parts of `rows`, one a thread; kernels release the GIL.

    Every row is computed alike in whatever part it lies: the number of threads changes no bit.
    """
    count = max(1, min(threads(), rows, int(flops / _WORTH_A_THREAD)))
    edges = [rows * k // count for k in range(count + 1)]
    others = [_pool(count - 1).submit(work, *edges[k : k + 2]) for k in range(1, count)]
    work(*edges[:2])
    for other in others:
        other.result()


def _product(a: Array, packed: Array, columns: int) -> Array:
    """Return a·B of a (rows, K) and a packed B (K, columns)."""
    out = np.empty((a.shape[0], columns), a.dtype)
    _share(lambda first, last: product(out, a, packed, first, last), len(a), 2.0 * a.size * columns)
    return out


def _transposed_product(a: Array, b: Array) -> Array:
    """Return aᵀ·b of a (K, rows) and b (K, columns)."""
    out = np.zeros((a.shape[1], b.shape[1]), a.dtype)
    _share(lambda first, last: add_transposed(out, a, b, first, last), len(out), 2.0 * a.size * b.shape[1])
    return out


def _parts(cell: Cell, weights: LayerWeights) -> tuple[Array, Array]:
    """Return W_hh of all gates but the last of a cell that resets first, and of the last; else all, and none."""
    cut = (len(cell.gates) - (1 if cell.reset else 0)) * weights.weight_hh.shape[1]
    return weights.weight_hh[:cut], weights.weight_hh[cut:]


# What a layer calls -------------------------------------------------------------------------------------------------


def forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool = True
) -> LayerTrace:
    """Run one layer in one direction over x (T, B, I) from state (S, B, H).

    With keep=False only the states are kept, which is all that inference needs. Arrays are C-contiguous, of one dtype
    and checked by the caller.
    """
    T, B, _ = x.shape
    H, S, kept_steps = weights.weight_hh.shape[1], len(cell.states), T if keep else 1
    rows = len(weights.weight_ih)
    ax = _product(x.reshape(T * B, -1), pack_transposed(weights.weight_ih), rows)
    ax += weights.bias_ih
    states = np.empty((S, T + 1, B, H), x.dtype)
    states[:, 0] = state
    allocate = np.empty if lengths.min() == T else np.zeros  # past the end nothing is saved
    saved = allocate((kept_steps, B, (cell.saved + (2 if cell.reset else 0)) * H), x.dtype)
    reset_h = np.empty((kept_steps if cell.reset else 0, B, H), x.dtype)
    packed, packed_last = map(pack_transposed, _parts(cell, weights))
    run = _forward_kernel(cell, x.dtype)
    ax, biases = ax.reshape(T, B, -1), (weights.bias_hh, weights.peephole)

    def work(first: int, last: int) -> None:
        run(ax, packed, packed_last, *biases, lengths, states, saved, reset_h, first, last)

    _share(work, B, 2.0 * T * B * weights.weight_hh.size)
    return LayerTrace(cell.name, x, states, saved, reset_h, lengths)


def backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None = None,
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) and d_final (S, B, H) through one layer (BPTT: Werbos 1990).

    Given d_output_exponent (T, B), d_output stands for d_output·2^exponent, and the adjoint is rescaled by powers of
    two at every step, so that it neither under- nor overflows however long the sequence; weights get no gradient then.
    """
    T, B, _ = d_output.shape
    H, S, G = weights.weight_hh.shape[1], len(cell.states), len(cell.gates)
    scaled = d_output_exponent is not None
    d_state = np.empty((S, T + 1, B, H), d_output.dtype)
    d_state[:, T] = d_final
    exponent = np.zeros((T + 1 if scaled else 0, B), np.int64)
    dax = np.empty((T, B, G * H), d_output.dtype)
    dah = dax if cell.joint else np.empty_like(dax)
    d_peephole = np.zeros((B, weights.peephole.size), d_output.dtype)
    packed, packed_last = map(pack, _parts(cell, weights))
    run = _backward_kernel(cell, d_output.dtype)
    upstream = d_output, d_output_exponent if scaled else exponent
    results = d_state, exponent, dax, dah, d_peephole

    def work(first: int, last: int) -> None:
        run(*upstream, packed, packed_last, weights.peephole, trace.lengths, trace.saved, *results, first, last)

    _share(work, B, 2.0 * T * B * weights.weight_hh.size)
    dax, dah = dax.reshape(T * B, -1), dah.reshape(T * B, -1)
    dx = _product(dax, pack(weights.weight_ih), weights.weight_ih.shape[1]).reshape(T, B, -1)
    if scaled:
        return LayerGradients(None, dx, d_state, d_output, exponent, d_output_exponent)
    d_weight_hh = _transposed_product(dah, trace.state[0, :T].reshape(T * B, H))
    if cell.reset:
        last = slice((G - 1) * H, None)
        d_weight_hh[last] = _transposed_product(np.ascontiguousarray(dah[:, last]), trace.reset_h.reshape(T * B, H))
    d_weights = LayerWeights(
        _transposed_product(dax, trace.x.reshape(T * B, -1)),
        d_weight_hh,
        dax.sum(axis=0),
        dah.sum(axis=0),
        d_peephole.sum(axis=0),
    )
    return LayerGradients(d_weights, dx, d_state, d_output, None, None)


def direct(cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array) -> LayerGradients:
    """Backpropagate d_output (T, B, H) through one step only: each step stands as a sequence of its own.

    Returns gradients of T·B sequences of one step, scaled: state (S, 2, T·B, H), x (1, T·B, I), exponent (2, T·B).
    """
    T, B, H = d_output.shape

    def one_step(values: Array) -> Array:
        return values.reshape(1, T * B, -1) if values.size else values

    running = (np.arange(T)[:, None] < trace.lengths).reshape(-1).astype(np.int64)
    alone = trace._replace(x=one_step(trace.x), saved=one_step(trace.saved), lengths=running)
    nothing = np.zeros((len(cell.states), T * B, H), d_output.dtype)
    return backward(cell, alone, weights, one_step(d_output), nothing, np.zeros((1, T * B), np.int64))


def jacobian(cell: Cell, trace: LayerTrace, weights: LayerWeights, t: int) -> Array:
    """Return d state_{t+1} / d state_t of every sequence, (B, S·H, S·H), the states stacked as [h; c].

    J = D_direct + Σ_g diag(D_g)·W_hh,g, the diagonals from `step_backward` with unit cotangents.
    """
    H, S, G, B = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), trace.x.shape[1]
    dtype = trace.x.dtype
    d_ah, d_old = np.empty((S, B, G * H), dtype), np.empty((S, S, B, H), dtype)
    _diagonals_kernel(cell, dtype)(trace.saved[t], weights.peephole, np.eye(S, dtype=dtype), d_ah, d_old)
    products = np.broadcast_to(weights.weight_hh.reshape(G, H, H), (B, G, H, H))
    if cell.reset:
        r, reset_r = trace.saved[t].reshape(B, -1, H)[:, cell.saved :].swapaxes(0, 1)
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
    # No dimension is 1: the products are compiled for each memory layout, and a single row has several.
    B = inputs = H = 2
    rows, states = len(cell.gates) * H, len(cell.states)
    shapes = ((rows, inputs), (rows, H), (rows,), (rows,), (len(cell.peepholes) * H,))
    weights = LayerWeights(*(np.zeros(shape, dtype) for shape in shapes))
    state, d_output = np.zeros((states, B, H), dtype), np.zeros((2, B, H), dtype)
    trace = forward(cell, np.zeros((2, B, inputs), dtype), weights, state, np.full(B, 2))
    backward(cell, trace, weights, d_output, state)
    jacobian(cell, trace, weights, 0)
