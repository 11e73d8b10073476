"""Clipping of gradients: every rule, what it did to a gradient, and what it took from the share of each time step."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checks import check_number
from .kernels import Array, threads
from .kernels.clip import ADAPTIVE, NORM, PERCENTILE, VALUE, clip, compare
from .model import SequenceModel
from .params import Params
from .rnn import Recurrent, past_end

__all__ = ["Adaptive", "AtPreActivations", "ByGlobalNorm", "ByNorm", "ByPercentile", "ByValue", "Clipped"]
__all__ += ["ClippingRule", "PerTimeStep", "Record", "clipped_gradients", "energy_removed", "new_history"]


class Record(NamedTuple):
    """What clipping did: the gradient's norm before and after, the share of numbers clipped, the cosine of both.

    The share counts elements of the gradient; within BPTT, adjoints of a step and sequence, or their elements. The
    cosine of a gradient of zero is NaN.
    """

    norm: float
    clipped_norm: float
    fraction: float
    cosine: float


class Clipped(NamedTuple):
    """A clipped gradient, a copy, and what was done to it."""

    gradient: Params
    record: Record


@dataclass(frozen=True)
class ClippingRule:
    """A rule with its threshold, a finite number above 0; raises ValueError for another.

    A rule for the whole gradient is called with it, a `Params`, with the parameters, which `Adaptive` reads, and with a
    history, which `ByPercentile` keeps. A gradient that is not finite stays so.
    """

    threshold: float

    kind: ClassVar[int] = NORM
    #: Where a rule acts within BPTT, see `kernels.cpu.Clip`; it then takes no whole gradient.
    within: ClassVar[str] = ""
    highest: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0, self.highest, above=True)

    def ends(self, params: Params) -> NDArray[np.int64]:
        """Return where the parts of the flat gradient begin, and the last one ends, that are clipped on their own."""
        return np.array([0, params.flat.size])

    def __call__(self, gradient: Params, weights: Params | None = None, history: Array | None = None) -> Clipped:
        """Return the clipped gradient. Raises ValueError for a rule that acts within BPTT."""
        if self.within:
            raise ValueError(f"{type(self).__name__} acts within BPTT: see clipped_gradients")
        if weights is None and self.kind == ADAPTIVE:
            raise ValueError("weights must be the parameters for Adaptive, got None")
        if weights is not None and weights.shapes != gradient.shapes:
            raise ValueError(f"weights must be those of the gradient, {gradient!r}, got {weights!r}")
        result, figures = gradient.like(), np.zeros(4)
        result.flat[...] = gradient.flat
        given = (gradient if weights is None else weights).flat, self.ends(gradient), self.kind, float(self.threshold)
        clip(result.flat, *given, new_history() if history is None else history, figures)
        return Clipped(result, Record(*figures.tolist()))


class ByValue(ClippingRule):
    """Each element into [−θ, θ] (Mikolov 2012, sec. 3.2.2)."""

    kind = VALUE


class ByGlobalNorm(ClippingRule):
    """g ← g·θ/‖g‖ where ‖g‖ > θ, over all parameters: Pascanu, Mikolov & Bengio (2013), algorithm 1."""


class ByNorm(ClippingRule):
    """As `ByGlobalNorm`, for each parameter tensor on its own."""

    def ends(self, params: Params) -> NDArray[np.int64]:
        return np.cumsum([0, *(array.size for array in params.values())])


class Adaptive(ClippingRule):
    """AGC: each unit's ‖g‖ to at most θ·max(‖w‖, 10⁻³): Brock, De, Smith & Simonyan (2021), eq. 3.

    A unit is a row of a matrix; a vector is one unit, as in the authors' program.
    """

    kind = ADAPTIVE

    def ends(self, params: Params) -> NDArray[np.int64]:
        sizes = [size for array in params.values() for size in ([array.shape[-1]] * (array.size // array.shape[-1]))]
        return np.cumsum([0, *sizes])


class ByPercentile(ClippingRule):
    """AutoClip: ‖g‖ to at most the θ-th percentile of all norms so far: Seetharaman et al. (2020), algorithm 1.

    The first 2²⁰ norms make the history.
    """

    kind = PERCENTILE
    highest = 100 + 1e-9


class PerTimeStep(ClippingRule):
    """Within BPTT: dL/dstate_t of each sequence, h and c together, to a norm of at most θ before it goes back a step.

    What the clipped δ_t passes on is clipped again, so that nothing explodes; dL/dW is no longer a rescaled gradient.
    """

    within = "states"


class AtPreActivations(ClippingRule):
    """Within BPTT: each element of dL/dax and dL/dah into [−θ, θ]: Graves (2013), arXiv:1308.0850, sec. 2.1.

    What a cell passes on apart from its affine maps (along c, and through peepholes) is not clipped.
    """

    within = "gates"


def new_history() -> NDArray[np.float64]:
    """Return room for the norms that `ByPercentile` keeps: their number, then the norms in order."""
    return np.zeros(1 + 2**20)


def clipped_gradients(
    model: SequenceModel,
    x: Array,
    targets: Array,
    rule: ClippingRule,
    lengths: Any = None,
    history: Array | None = None,
) -> Clipped:
    """Return the gradient of the mean loss by all parameters, clipped by any rule, and what was done to it.

    Arguments and errors otherwise as `SequenceModel.loss_and_gradients`; a rule within BPTT takes no topology that
    reads its own outputs.
    """
    if not rule.within:
        return rule(model.loss_and_gradients(x, targets, lengths).params, model.params, history)
    counts, figures = np.zeros((threads(), 8), np.int64), np.zeros(4)
    gradient = model.loss_and_gradients(x, targets, lengths, clip=(rule.within, rule.threshold, counts)).params
    compare(model.loss_and_gradients(x, targets, lengths).params.flat, gradient.flat, figures)
    clipped, seen = counts[:, :2].sum(axis=0).tolist()
    figures[2] = clipped / seen
    return Clipped(gradient, Record(*figures.tolist()))


def energy_removed(
    model: SequenceModel,
    x: Array,
    targets: Array,
    rule: ClippingRule,
    lengths: Any = None,
    history: Array | None = None,
) -> NDArray[np.float64]:
    """Return (T,): the share of energy that a rule takes from what each time step adds to dL/dW_ih and dL/db_ih.

    Step k adds C_k = Σ_b dL/da_k [x_k, 1]ᵀ to the gradients of the first layer; the share is 1 − ‖C'_k‖² / ‖C_k‖², C'_k
    being what it adds with the rule (a rule for the whole gradient scales each element of every C_k as it scales that
    of their sum). NaN where C_k is zero; negative where clipping a later step made an earlier one grow. For networks
    with biases in one direction whose inputs are given; raises ValueError for others.
    """
    if model.generates or model.rnn.bidirectional or not model.rnn.bias:
        got = f"{model.topology} of {model.rnn!r}"
        raise ValueError(f"model must have biases, one direction and inputs that are given, got {got}")
    before = model.loss_and_gradients(x, targets, lengths).params
    x = x if lengths is None else np.where(past_end(lengths, x), x.dtype.type(0), x)
    # A network that reads W_ih x in place of x, through the identity: its dL/dx is dL/da.
    net, name = model.rnn, "rnn.weight_ih_l0"
    rows = len(net.params["weight_ih_l0"])
    inner = Recurrent(net.cell.name, rows, net.hidden_size, net.num_layers, dtype=net.dtype)
    twin = SequenceModel(inner, model.output_size, model.topology, model.loss_name)
    for key, array in model.params.items():
        twin.params[key] = np.eye(rows, dtype=net.dtype) if key == name else array
    inputs = x @ net.params["weight_ih_l0"].T
    exact = twin.loss_and_gradients(inputs, targets, lengths)
    with_one = np.concatenate([x, np.ones_like(x[..., :1])], axis=2).astype(np.float64)
    if rule.within:
        counts = np.zeros((threads(), 8), np.int64)
        found = twin.loss_and_gradients(inputs, targets, lengths, clip=(rule.within, rule.threshold, counts))
        factor, after = np.ones(1), found.x
    else:
        clipped = rule(before, model.params, history).gradient
        factor, after = np.ones((rows, x.shape[2] + 1)), exact.x
        for key, columns in ((name, slice(None, -1)), ("rnn.bias_ih_l0", slice(-1, None))):
            old, new = (part[key].astype(np.float64).reshape(rows, -1) for part in (before, clipped))
            np.divide(new, old, out=factor[:, columns], where=old != 0)
    removed = np.full(len(x), np.nan)
    for k in range(len(x)):
        energy = np.square(exact.x[k].T @ with_one[k]).sum()
        if energy > 0:
            removed[k] = 1 - np.square(factor * (after[k].T @ with_one[k])).sum() / energy
    return removed
