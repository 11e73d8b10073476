"""What is done at every step of BPTT to the adjoint as a whole: it is rescaled, or clipped."""

import math
from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .clip import clamp, shrinkage, squares
from .compiling import part

__all__ = ["WHOLE", "Clip", "clamp_row", "limit_whole"]

#: What `backward` clips at every step: "states", the norm of a sequence's dL/dstate_t, h and c together, before the
#: step takes it back; "gates", each number of dL/dax and dL/dah, before they enter products with weights. With the
#: limit, and counts (threads, 8), to which each thread adds in a row of its own: how many were clipped, of how many
#: (what follows there is scratch).
Clip = tuple[str, float, NDArray[np.int64]]

#: Modes of BPTT in which all units of dL/dstate_t are looked at before any takes its step.
WHOLE = "scaled", "states"


@cache
def limit_whole(mode: str):
    """Build what adds dL/dh_t from above to dL/dstate_t of some sequences, and rescales or clips it as a whole.

    Its first argument is `backward.BackwardArguments`.
    """
    SCALED, STATES = mode == "scaled", mode == "states"

    @part(mode)
    def limit_whole(a, t, first, last, rank):
        d_state, d_output, exponent = a.d_state, a.d_output, a.exponent
        for b in range(first, last):
            if STATES and t < a.lengths[b]:
                _add_clipped(d_state[:, t + 1, b], d_output[t, b], a.limit[0], a.counts[rank])
            if SCALED:
                exponent[t, b] = exponent[t + 1, b]
            if SCALED and t < a.lengths[b]:
                exponent[t, b] = exponent[t + 1, b] = _add_scaled(
                    d_state[:, t + 1, b], exponent[t + 1, b], d_output[t, b], a.d_output_exponent[t, b]
                )

    return limit_whole


# Rescaled by powers of two ------------------------------------------------------------------------------------------


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


# Clipped ------------------------------------------------------------------------------------------------------------


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
def clamp_row(work, begin, count, limit, counts):
    """Clip `count` numbers, and count them."""
    clipped = 0
    for i in range(begin, begin + count):
        before = work[i]
        work[i] = clamp(before, work.dtype.type(limit))
        clipped += work[i] != before
    counts[0] += clipped
