"""Lyapunov spectra: how fast small perturbations of a network's state grow or shrink in every direction."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .cells import Cell
from .checks import check_array, check_integer, generator
from .kernels import Array, Floats, LayerWeights, backend
from .kernels.jacobian import Diagonals
from .rnn import Recurrent, State

__all__ = ["Lyapunov", "lyapunov_spectrum"]

#: Steps whose trajectory is computed at a time, and the longest interval.
_CHUNK = 64
#: Between two QR decompositions directions may grow apart by this factor, which leaves half of float64's digits.
_SPREAD = 1e8


@dataclass(frozen=True)
class Lyapunov:
    """A Lyapunov spectrum.

    exponents (k,): nats per step, descending; −∞ where J is singular to float64's precision. error (k,): half the
    difference of the averages over the first and the second half of the intervals. dimension: Kaplan & Yorke (1979).
    entropy: the sum of the positive exponents, nats per step, an upper bound on the entropy rate (Ruelle 1978). Both
    are NaN where the k leading exponents do not settle them. interval: steps from one QR decomposition to the next.
    """

    exponents: Floats
    error: Floats
    dimension: float
    entropy: float
    interval: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row an exponent: index (from 1), exponent_nats_per_step, error_nats_per_step."""
        index = np.arange(1, len(self.exponents) + 1)
        columns = {"index": index, "exponent_nats_per_step": self.exponents, "error_nats_per_step": self.error}
        return pd.DataFrame(columns)


def lyapunov_spectrum(
    net: Recurrent,
    x: Array | None = None,
    *,
    steps: int,
    transient: int,
    interval: int | None = None,
    exponents: int | None = None,
    state: State | None = None,
    seed: int = 0,
) -> Lyapunov:
    """Return the Lyapunov spectrum of a network along x (T, 1, I), or without any input where x is None.

    The tangent vectors of the whole state, L·S·H (all layers; h and c), are orthonormalised by QR every `interval`
    steps (Benettin et al. 1980; for RNNs Engelken, Wolf & Abbott 2023): None takes as many as their measured spread
    allows; it is cut to half of `steps`, and one over which float64 would lose the smallest is halved. They run along
    for `transient` steps, then for `steps` that count; T must be at least the sum. `exponents` asks for so many leading
    ones (None: all). `state` is the first one, in the form of `Trace.final` with B = 1; None draws it from N(0, 1), as
    a network at rest may stay there. The tangent vectors are float64 whatever the network's dtype.

    Raises TypeError and ValueError for arguments that do not fit, ValueError for a bidirectional network, which has no
    state that goes forward, for one on a GPU, and for one whose states or perturbations overflow.
    """
    if net.bidirectional or net.device != "cpu":
        raise ValueError(f"net must run in one direction on the CPU, got {net!r}")
    total = check_integer("steps", steps) + check_integer("transient", transient, least=0)
    x = np.zeros((total, 1, net.input_size), net.dtype) if x is None else x
    x = check_array("x", x, ("T", 1, net.input_size), net.dtype)
    if len(x) < total:
        raise ValueError(f"x must have at least transient + steps = {total} steps, got {len(x)}")
    shape = net.num_layers, len(net.cell.states), net.hidden_size
    size = math.prod(shape)
    count = size if exponents is None else check_integer("exponents", exponents)
    if count > size:
        raise ValueError(f"exponents must be at most the size of the state, {size}, got {exponents!r}")
    if interval is not None:
        check_integer("interval", interval)
    if state is None:
        drawn = generator(seed, "state").normal(size=(shape[1], shape[0], 1, shape[2])).astype(net.dtype)
        state = net.unstack_state(drawn)
    # Each vector has its own draws, so that the first ones do not depend on how many are asked for.
    frame, _, _ = _orthonormalise(generator(seed, "tangents").normal(size=(count, size)).T)
    stream = _linearise(net, x[:total], state)
    layers = [LayerWeights(*(w.astype(np.float64) for w in net.weights(k))) for k in range(net.num_layers)]
    frame, settling = _run(net.cell, layers, stream, frame, shape, transient, 1 if interval is None else interval)
    if interval is None:
        interval = _longest(settling)
    interval = min(interval, max(1, steps // 2))  # two halves to compare
    _, logs = _run(net.cell, layers, stream, frame, shape, steps, interval)
    return _summarise(logs, size, interval)


def _linearise(net: Recurrent, x: Array, state: State) -> Iterator[list[Any]]:
    """Yield of every step what the Jacobian of each layer is made of: `kernels.cpu.Diagonals` with N = 1."""
    for start in range(0, len(x), _CHUNK):
        trace = net.forward(x[start : start + _CHUNK], state)
        state, T = trace.final, len(trace.output)
        if not all(np.isfinite(part).all() for part in (trace.output, *(layer.state[:, T] for layer in trace.layers))):
            raise ValueError(f"net must have finite states, those of {net!r} overflow within {start + T} steps")
        parts = [
            backend("cpu").diagonals(net.cell, layer, net.weights(k), 0, T) for k, layer in enumerate(trace.layers)
        ]
        for t in range(T):
            of_step = ((part.ax[:, t], part.ah[:, t], part.old[:, :, t], part.reset[:, t]) for part in parts)
            yield [Diagonals(*(values.astype(np.float64) for values in numbers)) for numbers in of_step]


def _run(
    cell: Cell,
    layers: list[LayerWeights],
    stream: Iterator[list[Any]],
    frame: Floats,
    shape: tuple[int, int, int],
    steps: int,
    interval: int,
) -> tuple[Floats, list[tuple[int, Floats]]]:
    """Carry the orthonormal frame (n, k) on; return it and of every interval its steps and the logarithms of growth."""
    logs = []
    for start in range(0, steps, interval):
        block = list(itertools.islice(stream, min(interval, steps - start)))
        frame, growth = _advance(cell, layers, block, frame, shape)
        logs.append((len(block), growth))
    return frame, logs


def _advance(
    cell: Cell, layers: list[LayerWeights], block: list[Any], frame: Floats, shape: tuple[int, int, int]
) -> tuple[Floats, Floats]:
    """Return the frame after a block of steps, and ln of the growth (k,); in two halves if digits would be lost."""
    tangents = frame
    with np.errstate(over="ignore", invalid="ignore"):
        for step in block:
            tangents = _tangents(cell, layers, step, tangents.reshape(*shape, -1)).reshape(frame.shape)
    finite, single = np.isfinite(tangents).all(), len(block) == 1
    if finite:
        new, volumes, precision = _orthonormalise(tangents)
        if single or (volumes > _SPREAD * precision).all():
            with np.errstate(divide="ignore"):  # below its precision a volume is 0: J is singular
                return new, np.log(np.where(volumes > precision, volumes, 0.0))
    elif single:
        raise ValueError("net must have finite derivatives, a perturbation overflows float64 in one step")
    middle = len(block) // 2
    frame, first = _advance(cell, layers, block[:middle], frame, shape)
    frame, second = _advance(cell, layers, block[middle:], frame, shape)
    return frame, first + second


def _tangents(cell: Cell, layers: list[LayerWeights], step: list[Any], old: Floats) -> Floats:
    """Return J·old for tangent vectors (L, S, H, k), without forming J.

    new_s = Σ_g ah_sg ∘ (W_hh,g h) + Σ_q old_sq ∘ old_q, and from the second layer on + Σ_g ax_sg ∘ (W_ih,g h_below).
    """
    new = np.empty_like(old)
    _, _, H, k = old.shape
    for layer, (weights, part) in enumerate(zip(layers, step, strict=True)):
        ah = (weights.weight_hh @ old[layer, 0]).reshape(-1, H, k)
        ax = (weights.weight_ih @ new[layer - 1, 0]).reshape(-1, H, k) if layer else np.zeros_like(ah)
        if cell.reset:
            r, reset_r = part.reset[:, :, None]
            ah[-1] = weights.weight_hh[-H:] @ (r * old[layer, 0] + reset_r * (ah[0] + ax[0]))
        new[layer] = np.einsum("sgj,gjk->sjk", part.ah, ah) + np.einsum("sqj,qjk->sjk", part.old, old[layer])
        if layer:
            new[layer] += np.einsum("sgj,gjk->sjk", part.ax, ax)
    return new


def _orthonormalise(tangents: Floats) -> tuple[Floats, Floats, Floats]:
    """Return an orthonormal frame of the columns, the volumes that they add one by one, and how exact each volume is.

    With its rows in descending order Householder's QR keeps small rows, those of saturated units, to their own
    precision (Cox & Higham 1998).
    """
    size = np.abs(tangents).max(axis=1)
    order = np.argsort(-size, kind="stable")
    q, r = np.linalg.qr(tangents[order])  # NumPy's, as are the products: SciPy brings a second pool of BLAS threads
    frame = np.empty_like(tangents)
    frame[order] = q
    precision = len(tangents) * np.finfo(np.float64).eps * size[order][: q.shape[1]]
    return frame, np.abs(np.diagonal(r)), precision


def _longest(settling: list[tuple[int, Floats]]) -> int:
    """Return over how many steps growth apart, as measured step by step, stays within `_SPREAD`."""
    if not settling:
        return 1
    growth = np.stack([logs for _, logs in settling])
    finite = np.where(np.isfinite(growth), growth, 0.0).mean(axis=0)
    spread = max(0.0, finite.max()) - min(0.0, finite.min())
    return int(np.clip(math.log(_SPREAD) / max(spread, 1e-9), 1, _CHUNK))


def _summarise(logs: list[tuple[int, Floats]], size: int, interval: int) -> Lyapunov:
    lengths, growth = np.array([length for length, _ in logs]), np.stack([values for _, values in logs])
    means = growth.sum(axis=0) / lengths.sum()
    half = max(1, len(logs) // 2)
    first = growth[:half].sum(axis=0) / lengths[:half].sum()
    second = growth[half:].sum(axis=0) / lengths[half:].sum() if len(logs) > 1 else np.full_like(first, np.nan)
    with np.errstate(invalid="ignore"):
        error = np.where(first == second, 0.0, np.abs(first - second) / 2)
    order = np.argsort(-means, kind="stable")
    exponents = means[order]
    return Lyapunov(exponents, error[order], _dimension(exponents, size), _entropy(exponents, size), interval)


def _dimension(exponents: Floats, size: int) -> float:
    """Return j + Σ_{i≤j} λ_i / |λ_{j+1}| with the largest j whose sum is not negative (Kaplan & Yorke 1979)."""
    sums = np.cumsum(exponents)
    j = int((sums >= 0).sum())
    if j == len(exponents):
        return float(j) if j == size else math.nan
    return j + (float(sums[j - 1] / -exponents[j]) if j else 0.0)


def _entropy(exponents: Floats, size: int) -> float:
    return float(exponents[exponents > 0].sum()) if exponents[-1] <= 0 or len(exponents) == size else math.nan
