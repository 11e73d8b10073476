"""Optimisers as compiled elementwise updates, in PyTorch's definitions."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .checks import check_number
from .kernels import Array
from .kernels.compiling import cached

__all__ = ["SGD", "Adam", "Optimiser", "RMSprop"]


@cached("sgd")
def _sgd(weights: Array, gradient: Array, state: Array, step: Array, settings: Array) -> None:
    real = weights.dtype.type
    rate, momentum = real(settings[0]), real(settings[1])
    for i in range(len(weights)):
        state[0, i] = momentum * state[0, i] + gradient[i]
        weights[i] -= rate * state[0, i]


@cached("rmsprop")
def _rmsprop(weights: Array, gradient: Array, state: Array, step: Array, settings: Array) -> None:
    real = weights.dtype.type
    rate, decay, rest, epsilon = real(settings[0]), real(settings[1]), real(1 - settings[1]), real(settings[2])
    for i in range(len(weights)):
        state[0, i] = decay * state[0, i] + rest * gradient[i] * gradient[i]
        weights[i] -= rate * gradient[i] / (np.sqrt(state[0, i]) + epsilon)


@cached("adam")
def _adam(weights: Array, gradient: Array, state: Array, step: Array, settings: Array) -> None:
    real = weights.dtype.type
    rate, root = real(settings[0] / (1 - settings[1] ** step[0])), real(np.sqrt(1 - settings[2] ** step[0]))
    decay, rest = real(settings[2]), real(1 - settings[2])
    share, epsilon = real(1 - settings[1]), real(settings[3])
    for i in range(len(weights)):
        state[0, i] += share * (gradient[i] - state[0, i])
        state[1, i] = decay * state[1, i] + rest * gradient[i] * gradient[i]
        weights[i] -= rate * state[0, i] / (np.sqrt(state[1, i]) / root + epsilon)


@dataclass(frozen=True)
class Optimiser:
    """What all optimisers have in common: settings, rows of state as long as the parameters, a compiled kernel.

    Raises ValueError for a setting that is not a finite number of at least 0, and for a factor of 1 or more.
    """

    learning_rate: float

    rows: ClassVar[int] = 1
    kernel: ClassVar[Callable[..., None]]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # Those named here are factors of a running mean.
            high = 1 if field.name in ("momentum", "decay", "beta1", "beta2") else math.inf
            check_number(field.name, getattr(self, field.name), 0, high)

    @property
    def settings(self) -> NDArray[np.float64]:
        """The numbers that the kernel takes."""
        return np.array(dataclasses.astuple(self), np.float64)

    def update(self, weights: Array, gradient: Array, state: Array, step: int) -> None:
        """Take step number `step` (from 1) in place: weights and gradient (P,), state (rows, P), at first zeros."""
        type(self).kernel(weights, gradient, state, np.full(1, step), self.settings)


@dataclass(frozen=True)
class SGD(Optimiser):
    """v ← momentum·v + g, w −= learning_rate·v, as torch.optim.SGD; without momentum plain gradient descent."""

    momentum: float = 0.0

    kernel: ClassVar[Callable[..., None]] = _sgd


@dataclass(frozen=True)
class RMSprop(Optimiser):
    """s ← decay·s + (1 − decay)·g², w −= learning_rate·g / (√s + epsilon), as torch.optim.RMSprop (Hinton 2012)."""

    decay: float = 0.99
    epsilon: float = 1e-8

    kernel: ClassVar[Callable[..., None]] = _rmsprop


@dataclass(frozen=True)
class Adam(Optimiser):
    """Kingma & Ba (2015), algorithm 1, as torch.optim.Adam."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    rows: ClassVar[int] = 2
    kernel: ClassVar[Callable[..., None]] = _adam
