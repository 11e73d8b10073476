"""Clipping: the arithmetic that the rules of `clipping.py`, the training loop and the backward kernels share."""

import math

import numpy as np
from numba import njit

from ..activations import scalar
from .compiling import cached

__all__ = ["ADAPTIVE", "NORM", "PERCENTILE", "VALUE", "clamp", "clip", "compare", "shrinkage", "squares"]

#: Kinds of rules for a whole gradient: what the limit is, and of what.
VALUE, NORM, ADAPTIVE, PERCENTILE = range(4)

#: The least norm that the weights of a unit count with, so that zero weights can move (Brock et al. 2021, sec. 4.1).
_LEAST = 1e-3


@scalar
def clamp(value, limit):
    """Return the number in [−limit, limit] next to a finite value; NaN and infinity stay, for all to see."""
    return math.copysign(limit, value) if limit < abs(value) < math.inf else value


@scalar
def shrinkage(square, limit):
    """Return the factor that takes a vector of this squared norm to the norm `limit`, 1 if it is within."""
    norm = math.sqrt(square)
    return limit / norm if norm > limit else 1.0


@njit
def squares(values):
    """Return Σ v² in float64."""
    sums, whole = np.zeros(16), len(values) // 16 * 16
    for i in range(0, whole, 16):
        for k in range(16):
            sums[k] += np.float64(values[i + k]) * np.float64(values[i + k])
    for i in range(whole, len(values)):
        sums[0] += np.float64(values[i]) * np.float64(values[i])
    return sums.sum()


@njit
def _percentile(history, norm, percentile):
    """Take a finite norm up into history[1:], sorted, of which history[0] are there; return their percentile."""
    count = int(history[0])
    if np.isfinite(norm) and count + 1 < len(history):
        at = 1 + np.searchsorted(history[1 : 1 + count], norm)
        for i in range(count + 1, at, -1):
            history[i] = history[i - 1]
        history[at], count = norm, count + 1
        history[0] = count
    if count == 0:
        return math.inf
    position = percentile / 100 * (count - 1)
    low = int(position)
    high = min(low + 1, count - 1)
    return history[1 + low] + (position - low) * (history[1 + high] - history[1 + low])


@cached("clip")
def clip(gradient, weights, ends, kind, threshold, history, figures):
    """Clip a flat gradient in place, for a norm each part between two of `ends` on its own.

    figures: the norm before and after, the share of elements that changed, the cosine of both; NaN for that of zero.
    """
    before, after, product, changed, limit = squares(gradient), 0.0, 0.0, 0, threshold
    if kind == VALUE:
        for i in range(len(gradient)):
            value = np.float64(gradient[i])
            gradient[i] = clamp(gradient[i], gradient.dtype.type(limit))
            kept = np.float64(gradient[i])
            after += kept * kept
            product += kept * value
            changed += kept != value
    else:
        if kind == PERCENTILE:
            limit = _percentile(history, math.sqrt(before), threshold)
        for k in range(len(ends) - 1):
            part = gradient[ends[k] : ends[k + 1]]
            square = squares(part)
            if kind == ADAPTIVE:
                limit = threshold * max(math.sqrt(squares(weights[ends[k] : ends[k + 1]])), _LEAST)
            factor = shrinkage(square, limit)
            if factor != 1:
                changed += len(part)
                for i in range(len(part)):
                    part[i] *= gradient.dtype.type(factor)
            after += factor * factor * square
            product += factor * square
    norm, clipped = math.sqrt(before), math.sqrt(after)
    figures[0], figures[1], figures[2] = norm, clipped, changed / len(gradient)
    figures[3] = product / (norm * clipped)


@cached("compare")
def compare(exact, clipped, figures):
    """Set the norm before, that after and the cosine, given both gradients."""
    product = 0.0
    for i in range(len(exact)):
        product += np.float64(exact[i]) * np.float64(clipped[i])
    figures[0], figures[1] = math.sqrt(squares(exact)), math.sqrt(squares(clipped))
    figures[3] = product / (figures[0] * figures[1])
