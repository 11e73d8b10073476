"""Losses with the output functions that belong to them; no value and no slope cancels in its tails."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, softmax

from .activations import exp, scalar, sigmoid
from .kernels import Array
from .kernels.compiling import cached

__all__ = ["LOSSES", "Loss"]


class Loss(NamedTuple):
    """A loss of predictions with O outputs, the last axis of logits.

    activation: logits → outputs g(y); activation_backward: (logits, dL/doutputs) → dL/dlogits; row: compiled, (logits
    (O,), target, slope (O,)) ↦ the loss of one prediction, which leaves its derivative by the logits in `slope`; that
    may be `logits` itself. A target is one class number or O numbers.
    """

    name: str
    activation: Callable[[Array], Array]
    activation_backward: Callable[[Array, Array], Array]
    row: Callable[..., Any]

    def score(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Return the loss of each prediction (…), and its derivative by the logits (…, O)."""
        O = logits.shape[-1]
        values, slopes = np.empty(logits.shape[:-1], logits.dtype), np.empty_like(logits, order="C")
        targets = np.ascontiguousarray(targets).reshape(values.size, -1)
        _rows(self)(np.ascontiguousarray(logits).reshape(-1, O), targets, values.reshape(-1), slopes.reshape(-1, O))
        return values, slopes


@cache
def _rows(loss: Loss) -> Any:
    row = loss.row

    @cached(loss.name, row)
    def score(logits: Array, targets: Array, values: Array, slopes: Array) -> None:
        for i in range(len(values)):
            values[i] = row(logits[i], targets[i], slopes[i])

    return score


@scalar
def _cross_entropy(logits: Array, target: Array, slope: Array) -> Any:
    """−log p of a class, p the softmax: log(1 + Σ of the others) where that class leads."""
    kind, at, top = logits.dtype.type, target[0], logits[0]
    for y in logits:
        top = y if y > top else top
    own, others = exp(logits[at] - top), kind(0)
    loss = top - logits[at]
    for j in range(len(logits)):
        e = exp(logits[j] - top)
        others += e if j != at else kind(0)
        slope[j] = e
    total = own + others
    for j in range(len(logits)):
        slope[j] = slope[j] / total if j != at else -others / total
    return math.log1p(others) if loss == kind(0) else math.log(total) + loss


@scalar
def _mse(logits: Array, target: Array, slope: Array) -> Any:
    """The mean of squares, as PyTorch's."""
    kind = logits.dtype.type
    share, loss = kind(1) / kind(len(logits)), kind(0)
    for j in range(len(logits)):
        error = logits[j] - target[j]
        loss += error * error
        slope[j] = error * (share + share)
    return loss * share


@scalar
def _bce(logits: Array, target: Array, slope: Array) -> Any:
    """The mean of −t·log σ(y) − (1 − t)·log σ(−y), as PyTorch's with logits."""
    kind = logits.dtype.type
    one, share, loss = kind(1), kind(1) / kind(len(logits)), kind(0)
    for j in range(len(logits)):
        y, t = logits[j], target[j]
        tail = math.log1p(exp(-abs(y)))
        loss += t * (tail if y > 0 else tail - y) + (one - t) * (tail + y if y > 0 else tail)
        slope[j] = ((one - t) * sigmoid(y)[0] - t * sigmoid(-y)[0]) * share
    return loss * share


def _softmax_backward(logits: Array, d_outputs: Array) -> Array:
    p: Array = softmax(logits, axis=-1)
    d_logits: Array = p * (d_outputs - (p * d_outputs).sum(axis=-1, keepdims=True))
    return d_logits


#: Losses by name.
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", partial(softmax, axis=-1), _softmax_backward, _cross_entropy),
        Loss("mse", lambda y: y, lambda y, dy: dy, _mse),
        Loss("bce", lambda y: expit(y), lambda y, dp: expit(y) * expit(-y) * dp, _bce),
    )
}
