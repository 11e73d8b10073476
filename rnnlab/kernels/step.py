"""Training in one call without the GIL: batch, forward pass, readout and loss, BPTT, clipping, update, and again."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import Array
from .calls import Bound, bind, perform
from .compiling import cached
from .cpu import Call
from .products import (
    add_sums,
    add_transposed,
    multiply,
    multiply_columns,
    pack_columns,
    pack_gates,
    panel_units,
    scratch_size,
)
from .simd import VECTOR_BYTES, address
from .team import empty

__all__ = ["Readout", "draw_length", "loop", "prepare_gradients", "prepare_omega"]


class Readout(NamedTuple):
    """What lies between the recurrent layer and the loss; N predictions of O outputs, for every step or the last.

    features and d_features (N, H): parts of the layer's states and of its gradients' arrays; targets (N, 1) or (N, O);
    lengths (B,): predictions past them do not count; weight (O, H), bias (O,) and their gradients.
    """

    features: Array
    d_features: Array
    targets: Array
    lengths: Array
    weight: Array
    bias: Array
    d_weight: Array
    d_bias: Array


@cache
def _gradients_kernel(name: str, row: Callable[..., Any], dtype: np.dtype[Any]) -> Any:
    V = VECTOR_BYTES // dtype.itemsize
    most, rows_times = panel_units(1), multiply(1, dtype)
    columns_times, add_product = multiply_columns(dtype), add_transposed(dtype)

    @cached(f"{name}-{dtype}", row)
    def gradients(forward, backward, readout, work, carried, gradient, figures):
        """Set the gradient of the mean loss by all parameters, and figures[0] to that loss."""
        features, d_features, targets, lengths, weight, bias, d_weight, d_bias = readout
        logits, packed, packed_columns, padded_bias, zero, scratch = work
        N, B, (O, H) = len(features), len(lengths), weight.shape
        units, columns = (O + V - 1) // V, (H + V - 1) // V

        perform(forward)
        pack_gates(packed, 0, weight, 1, 1, most, 0, units, units)
        padded_bias[:O] = bias
        rows_times(
            address(logits.reshape(-1), 0), units * V, address(padded_bias, 0), 0, address(features.reshape(-1), 0), H,
            address(packed, 0), H, N, 0, units, units,
        )  # fmt: skip
        loss, count = 0.0, 0
        for n in range(N):
            count += n // B < lengths[n % B]
        share = logits.dtype.type(1 / count)
        for n in range(N):
            scored = n // B < lengths[n % B]
            value = row(logits[n, :O], targets[n], logits[n, :O])
            loss += np.float64(value) if scored else 0.0
            for j in range(O):
                logits[n, j] = logits[n, j] * share if scored else logits.dtype.type(0)
        gradient[:] = 0
        carried[:] = 0
        pack_columns(packed_columns, 0, weight, 1, 1, most, 0, columns)
        columns_times(
            d_features.reshape(-1), 0, H, H, address(zero, 0), address(logits.reshape(-1), 0), units * V,
            address(packed_columns, 0), O, N, scratch,
        )  # fmt: skip
        strips = (0, units)
        add_sums(d_bias, logits.reshape(-1), 0, units * V, 1, N, strips, scratch)
        add_product(
            d_weight, logits.reshape(-1), 0, units * V, 1, (0, 1), features.reshape(-1), 0, (N, 0), H, N, strips,
            scratch,
        )  # fmt: skip
        perform(backward)
        figures[0] = loss / count

    return gradients


def prepare_gradients(
    name: str,
    row: Callable[..., Any],
    calls: tuple[Call, Call],
    readout: Readout,
    carried: Array,
    gradient: Array,
    figures: Array,
) -> Bound:
    """Return what sets `gradient`, of all parameters, and the loss figures[0], from the arrays as they are then.

    `row` is that of a `losses.Loss` of this name. `calls` are the layer's forward and backward pass, each in one
    thread; `carried` is the last slot of the gradients of states.
    """
    dtype, (O, H), N = gradient.dtype, readout.weight.shape, len(readout.features)
    V = VECTOR_BYTES // dtype.itemsize
    row_size, columns = -(-O // V) * V, -(-H // V) * V
    sizes = row_size * H, O * columns, row_size, columns, scratch_size(H, V)
    work = tuple(empty((size,), dtype) for size in sizes)
    work[2][:], work[3][:] = 0, 0
    parts = tuple(bind(one.kernel, one.arguments, *[np.zeros(0, np.int64)] * 2, 1, False, 0) for one in calls)
    rooms, passes = (empty((N, row_size), dtype), *work), (one.call for one in parts)
    bound = bind(_gradients_kernel(name, row, dtype), *passes, tuple(readout), rooms, carried, gradient, figures)
    return bound._replace(kept=(bound.kept, parts))


# The regulariser that keeps gradients from vanishing ----------------------------------------------------------------

#: Steps whose adjoint has a smaller norm do not count, as in the program of Pascanu, Mikolov & Bengio (2013).
_VANISHED = 1e-10


@cache
def _omega_kernel(dtype: np.dtype[Any]) -> Any:
    V = VECTOR_BYTES // dtype.itemsize
    most, columns_times, add_product = panel_units(1), multiply_columns(dtype), add_transposed(dtype)

    @cached(f"{dtype}")
    def omega(saved, d_h, lengths, weight, d_weight, work, alpha, figures):
        """Add α ∂⁺Ω/∂W_hh to d_weight, and set figures[0] to Ω; saved (N, T, U, M, 1, V) holds the slopes f'(a_t).

        Ω is the mean over all steps t and sequences of (‖δ_{t+1} ∂a_{t+1}/∂a_t‖ / ‖δ_{t+1}‖ − 1)², with δ_t = dL/da_t:
        Pascanu, Mikolov & Bengio (2013), eq. 9, and for the immediate derivative, δ and a held, eq. 10.
        """
        delta, back, norms, packed, zero, scratch = work
        units, M, B, H, rows = saved.shape[2], saved.shape[3], len(lengths), weight.shape[0], len(delta)
        left, right, row = delta.reshape(-1), back.reshape(-1), delta.shape[1]
        count, total = 0, 0.0
        for n in range(rows):  # δ_{t+1} of length 1, or of zeros where it does not count
            t, b, square = n // B, n % B, 0.0
            for j in range(H):
                delta[n, j] = d_h[t + 2, b, j] * saved[b // M, t + 1, j // V, b % M, 0, j % V]
                square += np.float64(delta[n, j]) ** 2
            counts = t + 1 < lengths[b] and np.sqrt(square) > _VANISHED
            norms[n], count = np.sqrt(square) if counts else 0.0, count + counts
            for j in range(H):
                delta[n, j] = delta[n, j] * dtype.type(1 / norms[n]) if counts else dtype.type(0)
        pack_columns(packed, 0, weight, 1, 1, most, 0, units)
        columns_times(right, 0, H, H, address(zero, 0), address(left, 0), row, address(packed, 0), H, rows, scratch)
        for n in range(rows):
            t, b, square = n // B, n % B, 0.0
            for j in range(H):
                back[n, j] *= saved[b // M, t, j // V, b % M, 0, j % V]
                square += np.float64(back[n, j]) ** 2
            ratio = np.sqrt(square)
            total += (ratio - 1) ** 2 if norms[n] > 0 else 0.0
            factor = dtype.type(2 * alpha * (ratio - 1) / (ratio * count)) if ratio > 0 else dtype.type(0)
            for j in range(H):
                back[n, j] *= factor * saved[b // M, t, j // V, b % M, 0, j % V]
        add_product(d_weight, left, 0, row, 1, (0, 1), right, 0, (rows, 0), H, rows, (0, units), scratch)
        figures[0] = total / count if count else 0.0

    return omega


def prepare_omega(
    saved: Array, d_h: Array, lengths: Array, weight: Array, d_weight: Array, alpha: float, figures: Array
) -> Bound:
    """Return what adds α ∂⁺Ω/∂W_hh to d_weight after BPTT: saved of the layer's trace, d_h (T+1, B, H) its gradient."""
    dtype, (_, T, units, _, _, V), H = weight.dtype, saved.shape, len(weight)
    rows, lanes = (T - 1) * len(lengths), units * V
    rooms = np.zeros((rows, lanes), dtype), empty((rows, H), dtype), np.zeros(rows), empty((H * lanes,), dtype)
    work = *rooms, np.zeros(lanes, dtype), empty((scratch_size(H, V),), dtype)
    return bind(_omega_kernel(dtype), saved, d_h, lengths, weight, d_weight, work, alpha, figures)


# The loop -----------------------------------------------------------------------------------------------------------

#: What `loop` counts: updates in all, those that moved the parameters, those skipped in a row, and the first parameter
#: whose gradient was not finite in the last one that was skipped (−1: only their norm).
DONE, MOVED, SKIPPED_IN_A_ROW, NOT_FINITE, COUNTS = range(5)

#: What `loop` sets, of the last update: loss, norm before and after clipping, share of elements that were clipped,
#: cosine with the true gradient, Ω; and sums over the updates that moved: their number, losses, how many were clipped,
#: shares that were clipped.
LOSS, NORM, CLIPPED_NORM, FRACTION, COSINE, OMEGA, COUNT, LOSSES, CLIPPED, FRACTIONS, FIGURES = range(11)


@cached("length")
def draw_length(rng, lengths, low, high):
    """Draw one length for all sequences of a batch, low to high: so does the program of Pascanu et al. (2013)."""
    lengths[:] = rng.integers(low, high + 1)


@cached("loop")
def loop(calls, clipped, gradient, counts, figures, updates, patience):
    """Take updates until `updates` are done or `patience` in a row were skipped because the gradient was not finite.

    `calls` are those of `Bound`: what draws a length and a batch, sets the gradient and its loss, adds that of Ω, clips
    it and updates. Those that are not there leave what is there. `clipped`: the counts of a rule that clips within BPTT
    (see `cpu.Clip`), if there is one; then the next calls set the exact gradient and compare both. They are done for
    the last update only: of the others the norm before clipping and the cosine are NaN.
    """
    length, batch, gradients, omega, clip, update, exact, compare = calls
    for n in range(updates):
        perform(length)
        perform(batch)
        clipped[:] = 0
        perform(gradients)
        perform(omega)
        perform(clip)
        if len(clipped) > 0:
            figures[NORM] = figures[COSINE] = np.nan
            figures[FRACTION] = clipped[0, 0] / clipped[0, 1]
            if n == updates - 1:
                perform(exact)
                perform(compare)
        counts[DONE] += 1
        if np.isfinite(figures[CLIPPED_NORM]):
            counts[MOVED] += 1
            counts[SKIPPED_IN_A_ROW] = 0
            perform(update)
            figures[COUNT] += 1
            figures[LOSSES] += figures[LOSS]
            figures[CLIPPED] += figures[FRACTION] > 0
            figures[FRACTIONS] += figures[FRACTION]
        else:
            counts[SKIPPED_IN_A_ROW] += 1
            counts[NOT_FINITE] = -1
            for i in range(len(gradient)):
                if not np.isfinite(gradient[i]):
                    counts[NOT_FINITE] = i
                    break
            if counts[SKIPPED_IN_A_ROW] >= patience:
                break
