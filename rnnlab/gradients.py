"""Gradient flow: how large dL/dh_t, dL/dc_t and dL/dx_t are at every step, and how fast they decay with the lag."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .checks import check_choice, check_integer, check_number
from .kernels import Array, Floats, LayerGradients
from .model import SequenceModel
from .rnn import Recurrent, State, Trace

__all__ = ["Decay", "GradientFlow", "align", "check_adjoint", "check_finite", "decay", "gradient_flow", "lag_profile"]
__all__ += ["log_norm", "run_to_loss"]


@dataclass(frozen=True)
class Decay:
    """How log-norms fall with the lag.

    rate: nats per step, the slope of the median log-norm after the transient, with the ends of its bootstrap interval;
    horizon: the first lag from which on all lags together hold under 1 % of the summed norms, infinite where there is
    none (close to the last lag it is a lower bound). All are NaN where fewer than three lags can be fitted.
    """

    rate: float
    rate_low: float
    rate_high: float
    horizon: float

    @property
    def half_life(self) -> float:
        """Steps in which the norm halves, ln 2 / −rate; infinite where nothing decays."""
        return _half_life(self.rate)

    def to_row(self) -> dict[str, float]:
        """Return all numbers with their units in the names, as one row of a tidy table."""
        rates = {"": self.rate, "low_": self.rate_low, "high_": self.rate_high}
        row = {f"rate_{end}nats_per_step": rate for end, rate in rates.items()}
        row |= {f"half_life_{end}steps": _half_life(rate) for end, rate in rates.items()}
        return row | {"horizon_steps": self.horizon}


@dataclass(frozen=True)
class GradientFlow:
    """Natural logarithms of gradient norms, one number a step and sequence.

    h[k], c[k] (T+1, B): total derivatives dL/dh_t, dL/dc_t of layer-direction k, in the slots of `rnn.Trace`; x (T, B):
    dL/dx_t. direct_h, direct_c, direct_x: the direct part of each, which passes through no later step of the same layer
    (−inf at slot 0). −inf is a gradient of zero, or one that a single step took out of the range of the dtype; NaN lies
    past the end of a sequence. lengths (B,).
    """

    h: list[Floats]
    c: list[Floats]
    x: Floats
    direct_h: list[Floats]
    direct_c: list[Floats]
    direct_x: Floats
    lengths: NDArray[np.int64]
    directions: int

    def by_lag(self, quantity: Literal["h", "c"] = "h", k: int = 0) -> Floats:
        """Return (B, T+1): each sequence's log-norms by lag, the number of steps back from its last state.

        NaN where the lag is longer than the sequence. Raises ValueError for a quantity or k that there is not.
        """
        values = {"h": self.h, "c": self.c}[check_choice("quantity", quantity, ("h", "c") if self.c else ("h",))]
        return align(values[check_integer("k", k, 0, len(values) - 1)], self.lengths)

    def decay(self, quantity: Literal["h", "c"] = "h", k: int = 0, **options: Any) -> Decay:
        """Return the decay over the lag; the sequences are the samples. Options as in the function `decay`."""
        return decay(self.by_lag(quantity, k), **options)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a step and sequence.

        Columns: layer, direction, quantity ("h", "c" or "x"; layer −1 for x), sequence, step (0 is the initial state),
        lag_steps, log_norm_total_nats, log_norm_direct_nats.
        """
        parts = []
        for quantity, totals, directs in (("h", self.h, self.direct_h), ("c", self.c, self.direct_c)):
            for k, (total, direct) in enumerate(zip(totals, directs, strict=True)):
                parts.append(self._frame(*divmod(k, self.directions), quantity, total, direct))
        missing = np.full((1, self.x.shape[1]), np.nan)  # there is no input at slot 0
        x, direct_x = np.concatenate([missing, self.x]), np.concatenate([missing, self.direct_x])
        parts.append(self._frame(-1, 0, "x", x, direct_x))
        frame: pd.DataFrame = pd.concat(parts, ignore_index=True)
        return frame

    def _frame(self, layer: int, direction: int, quantity: str, total: Floats, direct: Floats) -> pd.DataFrame:
        step, sequence = np.indices(total.shape).reshape(2, -1)
        frame = pd.DataFrame(
            {
                "layer": layer,
                "direction": direction,
                "quantity": quantity,
                "sequence": sequence,
                "step": step,
                "lag_steps": self.lengths[sequence] - step,
                "log_norm_total_nats": total.ravel(),
                "log_norm_direct_nats": direct.ravel(),
            }
        )
        return frame.dropna(subset=["log_norm_total_nats"])


def gradient_flow(
    model: SequenceModel,
    x: Array,
    targets: Array,
    loss_at: Literal["last", "every"] = "last",
    *,
    lengths: Any = None,
    state: State | None = None,
) -> GradientFlow:
    """Measure the gradient of each sequence's own loss at every step by one pass of BPTT.

    loss_at="last" scores the last step of each sequence, targets (B, …); this shows decay. loss_at="every" sums the
    losses of all steps, targets (T, B, …), which adds a direct term at each step and hides decay (the recursion is
    that of Pascanu, Mikolov & Bengio 2013, eq. 3–5).

    The adjoint is rescaled by powers of two as it goes back, so that 100 000 steps neither under- nor overflow in
    float32. Within one step the range of the dtype remains: a RuntimeWarning says when the slopes of saturated units
    took the adjoint to its edge, where digits are lost; use dtype float64 then. Arguments and errors otherwise as
    `SequenceModel.loss_and_gradients`; ValueError for a topology that reads its own outputs, and for a
    network whose states or adjoint overflow.
    """
    net = model.rnn
    trace, d_output, _ = run_to_loss(model, x, targets, loss_at, lengths, state)
    layers, dx, dx_exponent = net.backpropagate(trace, d_output, scaled=True)
    single, direct_dx, direct_dx_exponent = net.direct(trace, layers)
    check_adjoint(net, *layers)
    T, B, _ = trace.output.shape
    past = np.arange(T + 1)[:, None] > trace.lengths

    def slots(values: Array, exponent: NDArray[np.int64] | None, direct: bool) -> Floats:
        norms = log_norm(values, exponent)
        if direct:  # of single steps, whose slots 1 are the slots 1…T
            norms = np.concatenate([np.full((1, B), -np.inf), norms[1].reshape(T, B)])
        return np.where(past, np.nan, norms)

    def h_and_c(found: list[LayerGradients], direct: bool) -> tuple[list[Floats], list[Floats]]:
        parts = [[slots(part, layer.exponent, direct) for part in layer.state] for layer in found]
        return [part[0] for part in parts], [norms for part in parts for norms in part[1:]]

    ends = (dx, dx_exponent), (direct_dx, direct_dx_exponent)
    of_x, direct_x = (np.where(past[1:], np.nan, log_norm(*end)) for end in ends)
    total, direct = h_and_c(layers, False), h_and_c(single, True)
    return GradientFlow(*total, of_x, *direct, direct_x, trace.lengths, net.directions)


def run_to_loss(
    model: SequenceModel, x: Array, targets: Array, loss_at: str, lengths: Any, state: State | None
) -> tuple[Trace, Array, int]:
    """Run the network; return its trace, the direct derivative of the summed losses by its output, and their number.

    Arguments and errors as `gradient_flow`.
    """
    every = check_choice("loss_at", loss_at, ("last", "every")) == "every"
    if model.generates:
        raise ValueError(f"model must have topology one_to_one, many_to_one or many_to_many, got {model.topology}")
    trace = model.rnn.forward(x, state, lengths)
    scored = model.scored(trace.lengths, len(trace.output), every)
    logits = model.read(model.features(trace, every))
    _, d_logits = model.score(logits, model.check_targets(targets, scored), scored)
    d_output = model.spread(d_logits @ model.readout["weight"], trace, every)
    check_finite(model.rnn, trace.output, d_output)
    return trace, d_output, int(scored.sum())


def check_finite(net: Recurrent, *arrays: Array) -> None:
    """Raise ValueError for states or gradients that are not finite."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"model must have finite states and gradients, those of {net!r} overflow {net.dtype}")


def check_adjoint(net: Recurrent, *layers: LayerGradients) -> None:
    """Raise ValueError for scaled adjoints that are not finite; a RuntimeWarning says where a step lost digits."""
    check_finite(net, *(layer.state for layer in layers))
    if any(map(_loses_digits, layers)):
        warnings.warn(f"slopes of saturated units lose digits in {net.dtype}", RuntimeWarning, stacklevel=3)


def align(values: Floats, lengths: NDArray[np.int64]) -> Floats:
    """Return (B, T+1): numbers of slots (T+1, B) by lag, the number of steps back from each sequence's last state.

    NaN where the lag is longer than the sequence.
    """
    slot = lengths - np.arange(len(values))[:, None]
    shifted: Floats = np.where(slot >= 0, np.take_along_axis(values, np.maximum(slot, 0), axis=0), np.nan)
    return shifted.T


def _loses_digits(layer: LayerGradients) -> bool:
    """Return whether a step shrank the adjoint, or left its part in h or c, so small that digits fell off the dtype."""
    assert layer.exponent is not None
    information = np.finfo(layer.state.dtype)
    largest = np.abs(layer.state).max(axis=-1)
    shrunk = np.diff(layer.exponent, axis=0)[largest.max(axis=0)[:-1] > 0]  # from slot t+1 to slot t
    few = (largest > 0) & (largest < information.tiny / information.eps)
    return bool(few.any() or (shrunk > -information.minexp - information.nmant).any())


def log_norm(values: Array, exponent: NDArray[np.int64] | None = None) -> Floats:
    """Return ln ‖values·2^exponent‖₂ over the last axis; −inf for zero. No square under- or overflows."""
    magnitude = np.abs(values).astype(np.float64)
    largest = magnitude.max(axis=-1, keepdims=True)
    squares = np.square(magnitude / np.where(largest > 0, largest, 1)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        norms: Floats = np.log(largest[..., 0]) + 0.5 * np.log(squares)
    return norms if exponent is None else norms + exponent * np.log(2)


def lag_profile(log_norms: Floats, low: float = 0.1, high: float = 0.9) -> pd.DataFrame:
    """Return quantiles over the samples of log-norms (samples, lags), each relative to its own at the first lag.

    The first lag is that from which most samples have a gradient. Columns: lag_steps, norm_decades (the median, log10),
    norm_low_decades and norm_high_decades; over the samples that reach a lag, at least half of them, else NaN. Raises
    ValueError for an array that is not two-dimensional and for quantiles outside 0 ≤ low ≤ high ≤ 1.
    """
    log_norms = _samples_by_lag(log_norms)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must lie in 0 ≤ low ≤ high ≤ 1, got {low!r} and {high!r}")
    first = int((np.isfinite(log_norms).mean(axis=0) >= 0.5).argmax())
    reference = log_norms[:, first : first + 1]
    relative = (log_norms[:, first:] - np.where(np.isfinite(reference), reference, np.nan)) / np.log(10)
    return pd.DataFrame(
        {
            "lag_steps": np.arange(first, log_norms.shape[1]),
            "norm_decades": _quantile(relative, 0.5),
            "norm_low_decades": _quantile(relative, low),
            "norm_high_decades": _quantile(relative, high),
        }
    )


def decay(
    log_norms: Floats,
    *,
    transient: int | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Decay:
    """Fit the decay of log-norms (samples, lags), lag 0 first, and bootstrap its interval over the samples.

    The fit is least squares through the median over the samples, from lag `transient` on (default: the first fifth of
    the lags is left out: a non-normal W_hh grows before it decays). NaN stands for a lag that a sample does not have;
    lags that fewer than half of the samples have, or whose median is not finite, are left out. The interval of a single
    sample is NaN. Raises ValueError for an array that is not two-dimensional and for options out of range.
    """
    log_norms = _samples_by_lag(log_norms)
    samples, lags = log_norms.shape
    if transient is not None:
        check_integer("transient", transient, 0, lags - 1)
    check_number("confidence", confidence, 0, 1, above=True)
    check_integer("resamples", resamples)
    median = _quantile(log_norms, 0.5)
    usable = np.flatnonzero(np.isfinite(median))
    start = transient if transient is not None else (int(usable[-1]) + 1) // 5 if usable.size else 0
    rate = _slope(median[start:])
    low = high = float("nan")
    if samples > 1 and np.isfinite(rate):
        rng = np.random.default_rng(seed)
        picks = rng.integers(samples, size=(resamples, samples))
        slopes = [_slope(_quantile(log_norms[pick, start:], 0.5)) for pick in picks]
        low, high = np.nanquantile(slopes, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Decay(rate, low, high, _horizon(median) if np.isfinite(rate) else float("nan"))


def _samples_by_lag(log_norms: Floats) -> Floats:
    log_norms = np.asarray(log_norms, np.float64)
    if log_norms.ndim != 2 or 0 in log_norms.shape:
        raise ValueError(f"log_norms must have shape (samples, lags), got {log_norms.shape}")
    return log_norms


def _quantile(values: Floats, q: float) -> Floats:
    """Return the quantile over axis 0 of what is not NaN; NaN where that is less than half. Takes −inf as a number."""
    ordered = np.sort(values, axis=0)  # NaN last
    count = (~np.isnan(ordered)).sum(axis=0)
    position = q * np.maximum(count - 1, 0)
    columns, below = np.arange(values.shape[1]), np.floor(position).astype(np.int64)
    a, b = ordered[below, columns], ordered[np.ceil(position).astype(np.int64), columns]
    with np.errstate(invalid="ignore"):
        between = np.where(a == b, a, a + (position - below) * (b - a))
    result: Floats = np.where(2 * count >= len(values), between, np.nan)
    return result


def _half_life(rate: float) -> float:
    return math.inf if rate >= 0 else math.log(2) / -rate


def _slope(values: Floats) -> float:
    finite = np.isfinite(values)
    if finite.sum() < 3:
        return float("nan")
    lag = np.flatnonzero(finite).astype(np.float64)
    lag -= lag.mean()
    return float(lag @ values[finite] / (lag @ lag))


def _horizon(values: Floats) -> float:
    values = values[: int(np.flatnonzero(~np.isnan(values))[-1]) + 1]  # as far as half of the samples reach
    values = np.where(np.isfinite(values), values, -np.inf)
    share = np.exp(values - values.max())
    remaining = share[::-1].cumsum()[::-1] / share.sum()
    horizon = int((remaining >= 0.01).sum())
    return float(horizon) if horizon < len(values) else math.inf
