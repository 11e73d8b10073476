"""Gradient flow: how large dL/dh_t, dL/dc_t and dL/dx_t are at every step, and how fast they decay with the lag."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .checks import check_choice
from .model import SequenceModel
from .rnn import State

__all__ = ["Decay", "GradientFlow", "decay", "gradient_flow", "lag_profile", "log_norm"]

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Decay:
    """How log-norms fall with the lag.

    rate: nats per step, the slope of the median log-norm after the transient, with the ends of its bootstrap interval;
    horizon: the first lag from which on all lags together hold under 1 % of the summed norms (close to the last lag it
    is a lower bound). All are NaN where fewer than three lags can be fitted.
    """

    rate: float
    rate_low: float
    rate_high: float
    horizon: float

    @property
    def half_life(self) -> float:
        """Steps in which the norm halves, ln 2 / −rate; infinite where nothing decays."""
        return _half_life(self.rate)

    @property
    def half_life_low(self) -> float:
        """The half-life at the lower end of the rate's interval."""
        return _half_life(self.rate_low)

    @property
    def half_life_high(self) -> float:
        """The half-life at the upper end of the rate's interval."""
        return _half_life(self.rate_high)

    def to_row(self) -> dict[str, float]:
        """Return all numbers with their units in the names, as one row of a tidy table."""
        return {
            "rate_nats_per_step": self.rate,
            "rate_low_nats_per_step": self.rate_low,
            "rate_high_nats_per_step": self.rate_high,
            "half_life_steps": self.half_life,
            "half_life_low_steps": self.half_life_low,
            "half_life_high_steps": self.half_life_high,
            "horizon_steps": self.horizon,
        }


@dataclass(frozen=True)
class GradientFlow:
    """Natural logarithms of gradient norms, one number a step and sequence.

    h[k], c[k] (T+1, B): total derivatives dL/dh_t, dL/dc_t of layer-direction k in the slots of `rnn.Trace`;
    direct[k] (T+1, B): the direct part of dL/dh_t, which does not pass through the layer's own next state; x (T, B):
    dL/dx_t. −inf is a gradient of exactly zero, NaN lies past the end of a sequence. lengths (B,).
    """

    h: list[Floats]
    c: list[Floats]
    direct: list[Floats]
    x: Floats
    lengths: NDArray[np.int64]
    directions: int

    def by_lag(self, quantity: Literal["h", "c"] = "h", k: int = 0) -> Floats:
        """Return (B, T+1): each sequence's log-norms by lag, the number of steps back from its last state."""
        values = {"h": self.h, "c": self.c}[check_choice("quantity", quantity, ("h", "c"))][k]
        lag = np.arange(len(values))[:, None]
        slot = self.lengths - lag
        shifted: Floats = np.where(slot >= 0, np.take_along_axis(values, np.maximum(slot, 0), axis=0), np.nan)
        return shifted.T

    def decay(self, quantity: Literal["h", "c"] = "h", k: int = 0, **options: Any) -> Decay:
        """Return the decay over the lag; the sequences are the samples. Options as in the function `decay`."""
        return decay(self.by_lag(quantity, k), **options)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a step and sequence.

        Columns: layer, direction, quantity ("h", "c" or "x"; layer −1 for x), sequence, step (0 is the initial state),
        lag_steps, log_norm_total_nats, log_norm_direct_nats (NaN for c and x).
        """
        parts = []
        for k in range(len(self.h)):
            layer, direction = divmod(k, self.directions)
            parts.append(self._frame(layer, direction, "h", self.h[k], self.direct[k]))
            if self.c:
                parts.append(self._frame(layer, direction, "c", self.c[k], np.full_like(self.c[k], np.nan)))
        x = np.concatenate([np.full((1, self.x.shape[1]), np.nan), self.x])
        parts.append(self._frame(-1, 0, "x", x, np.full_like(x, np.nan)))
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
    float32, as long as no single step changes it by more than 2^±100. Arguments and errors otherwise as
    `SequenceModel.loss_and_gradients`; ValueError for a topology that reads its own outputs.
    """
    every = check_choice("loss_at", loss_at, ("last", "every")) == "every"
    if model.topology in ("one_to_many", "encoder_decoder"):
        raise ValueError(f"model must have topology one_to_one, many_to_one or many_to_many, got {model.topology}")
    trace = model.rnn.forward(x, state, lengths)
    logits = model.read(model.features(trace, every))
    scored = model.scored(trace, every)
    targets = model.check_targets(targets, scored)
    d_logits = model.loss.slope(logits, targets) * scored[..., None]
    d_output = model.spread(d_logits @ model.readout["weight"], trace, every)
    layers, dx, dx_exponent = model.rnn.backpropagate(trace, d_output, scaled=True)
    past_slot = np.arange(len(d_output) + 1)[:, None] > trace.lengths
    past_step = past_slot[1:]
    h, c, direct = [], [], []
    for layer in layers:
        norms = [np.where(past_slot, np.nan, log_norm(part, layer.exponent)) for part in layer.state]
        h.append(norms[0])
        c.extend(norms[1:])
        norm = np.where(past_step, np.nan, log_norm(layer.direct, layer.direct_exponent))
        direct.append(np.concatenate([np.full((1, norm.shape[1]), -np.inf), norm]))
    x_norm = np.where(past_step, np.nan, log_norm(dx, dx_exponent))
    return GradientFlow(h, c, direct, x_norm, trace.lengths, model.rnn.directions)


def log_norm(values: Array, exponent: NDArray[np.int64] | None = None) -> Floats:
    """Return ln ‖values·2^exponent‖₂ over the last axis; −inf for zero. No square under- or overflows."""
    magnitude = np.abs(values).astype(np.float64)
    largest = magnitude.max(axis=-1, keepdims=True)
    squares = np.square(magnitude / np.where(largest > 0, largest, 1)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        norms: Floats = np.log(largest[..., 0]) + 0.5 * np.log(squares)
    return norms if exponent is None else norms + exponent * np.log(2)


def lag_profile(log_norms: Floats, low: float = 0.1, high: float = 0.9) -> pd.DataFrame:
    """Return quantiles over the samples of log-norms (samples, lags), relative to the first lag that has a gradient.

    Columns: lag_steps, norm_decades (the median, log10), norm_low_decades and norm_high_decades.
    """
    first = int(np.isfinite(log_norms).all(axis=0).argmax())
    relative = (log_norms[:, first:] - log_norms[:, first : first + 1]) / np.log(10)
    lows, median, highs = np.quantile(relative, [low, 0.5, high], axis=0, method="nearest")
    lags = np.arange(first, log_norms.shape[1])
    return pd.DataFrame(
        {"lag_steps": lags, "norm_decades": median, "norm_low_decades": lows, "norm_high_decades": highs}
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

    The fit is least squares through the median over the samples, from lag `transient` on (default: the first fifth is
    left out: a non-normal W_hh grows before it decays); lags whose median is not finite are left out. Raises ValueError
    for an array that is not two-dimensional and for options out of range.
    """
    log_norms = np.asarray(log_norms, np.float64)
    if log_norms.ndim != 2 or 0 in log_norms.shape:
        raise ValueError(f"log_norms must have shape (samples, lags), got {log_norms.shape}")
    samples, lags = log_norms.shape
    start = lags // 5 if transient is None else transient
    if not 0 <= start < lags:
        raise ValueError(f"transient must lie in 0…{lags - 1}, got {transient!r}")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence must lie in (0, 1) and resamples be at least 1, got {confidence}, {resamples}")
    median = np.median(log_norms, axis=0)
    rng = np.random.default_rng(seed)
    picks = rng.integers(samples, size=(resamples if samples > 1 else 1, samples))
    slopes = [_slope(np.median(log_norms[pick, start:], axis=0)) for pick in picks]
    tail = (1 - confidence) / 2
    low, high = np.quantile(slopes, [tail, 1 - tail])
    rate = _slope(median[start:])
    return Decay(rate, float(low), float(high), _horizon(median) if np.isfinite(rate) else float("nan"))


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
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return float("nan")
    share = np.exp(np.nan_to_num(values, nan=-np.inf) - finite.max())
    remaining = share[::-1].cumsum()[::-1] / share.sum()
    return float((remaining >= 0.01).sum())
