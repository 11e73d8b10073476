"""A whole training step as one call without the GIL: forward pass, readout and loss, BPTT, clipping, update."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from . import Array
from .calls import call, entry
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

__all__ = ["Readout", "prepare_step"]


class Readout(NamedTuple):
    """What lies between the recurrent layer and the loss; N predictions of O outputs.

    features and d_features (N, H): parts of the layer's states and of its gradients' arrays; targets (N, 1) or (N, O);
    scored (N,): whether a prediction counts; weight (O, H), bias (O,) and their gradients.
    """

    features: Array
    d_features: Array
    targets: Array
    scored: Array
    weight: Array
    bias: Array
    d_weight: Array
    d_bias: Array


@njit
def _squares(values):
    """Return Σ v² in float64."""
    sums, whole = np.zeros(16), len(values) // 16 * 16
    for i in range(0, whole, 16):
        for k in range(16):
            sums[k] += np.float64(values[i + k]) * np.float64(values[i + k])
    for i in range(whole, len(values)):
        sums[0] += np.float64(values[i]) * np.float64(values[i])
    return sums.sum()


@cache
def _step_kernel(name: str, row: Callable[..., Any], dtype: np.dtype[Any]) -> Any:
    V = VECTOR_BYTES // dtype.itemsize
    most, rows_times = panel_units(1), multiply(1, dtype)
    columns_times, add_product = multiply_columns(dtype), add_transposed(dtype)

    @cached(f"{name}-{dtype}", row)
    def step(codes, forward, backward, readout, work, carried, weights, gradient, rate, threshold):
        """Take one step down the gradient; return the mean loss, the gradient's norm and whether weights have moved."""
        features, d_features, targets, scored, weight, bias, d_weight, d_bias = readout
        logits, packed, packed_columns, padded_bias, zero, scratch = work
        N, (O, H) = len(features), weight.shape
        units, columns = (O + V - 1) // V, (H + V - 1) // V

        call(codes[0], forward)
        pack_gates(packed, 0, weight, 1, 1, most, 0, units)
        padded_bias[:O] = bias
        rows_times(
            address(logits.reshape(-1), 0), units * V, address(padded_bias, 0), 0, address(features.reshape(-1), 0), H,
            address(packed, 0), H, N, 0, units, units,
        )  # fmt: skip
        loss, count = 0.0, scored.sum()
        share = logits.dtype.type(1 / count)
        for n in range(N):
            value = row(logits[n, :O], targets[n], logits[n, :O])
            loss += np.float64(value) if scored[n] else 0.0
            for j in range(O):
                logits[n, j] = logits[n, j] * share if scored[n] else logits.dtype.type(0)
        gradient[:] = 0
        carried[:] = 0
        pack_columns(packed_columns, 0, weight, 1, 1, most, 0, columns)
        columns_times(
            d_features.reshape(-1), 0, H, address(zero, 0), address(logits.reshape(-1), 0), units * V,
            address(packed_columns, 0), O, N, scratch,
        )  # fmt: skip
        strips = (0, units)
        add_sums(d_bias, logits.reshape(-1), 0, units * V, 1, N, strips, scratch)
        add_product(
            d_weight, logits.reshape(-1), 0, units * V, 1, (0, 1), features.reshape(-1), 0, H, N, strips, scratch
        )
        call(codes[1], backward)

        norm = np.sqrt(_squares(gradient))
        moved = np.isfinite(norm)
        if moved:
            factor = weights.dtype.type(rate * min(1.0, threshold / max(norm, np.finfo(np.float64).tiny)))
            for i in range(len(weights)):
                weights[i] -= factor * gradient[i]
        return loss / count, norm, moved

    return step


def prepare_step(
    name: str,
    row: Callable[..., Any],
    calls: tuple[Call, Call],
    readout: Readout,
    carried: Array,
    weights: Array,
    gradient: Array,
) -> Callable[[float, float], tuple[float, float, bool]]:
    """Return (rate, threshold) ↦ (loss, norm, moved), which takes one step on the arrays as they are then.

    `row` is that of a `losses.Loss` of this name. `calls` are the layer's forward and backward pass, each in one
    thread; `carried` is the last slot of the gradients of states, `weights` holds all parameters and `gradient` theirs.
    The step is w −= rate·min(1, threshold / ‖g‖)·g, and none at all where ‖g‖ is not finite.
    """
    dtype, (O, H), N = weights.dtype, readout.weight.shape, len(readout.features)
    V = VECTOR_BYTES // dtype.itemsize
    row_size, columns = -(-O // V) * V, -(-H // V) * V
    sizes = row_size * H, O * columns, row_size, columns, scratch_size(H, V)
    work = tuple(empty((size,), dtype) for size in sizes)
    work[2][:], work[3][:] = 0, 0
    alone = np.zeros(0, np.int64)
    arguments = [(one.arguments, alone, alone, 1, False, 0) for one in calls]
    codes = tuple(entry(one.kernel, given) for one, given in zip(calls, arguments, strict=True))
    given = codes, *arguments, tuple(readout), (empty((N, row_size), dtype), *work), carried, weights, gradient
    kernel = _step_kernel(name, row, dtype)

    def step(rate: float, threshold: float, kept_alive: Any = calls) -> tuple[float, float, bool]:
        result: tuple[float, float, bool] = kernel(*given, rate, threshold)
        return result

    return step
