"""What keeps a gradient alive: the path along the memory, the gates on it, and how long a perturbation survives."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from .checks import check_integer, generator
from .gradients import align, check_adjoint, log_norm, run_to_loss
from .kernels import Array, Floats, backend
from .model import SequenceModel
from .rnn import Recurrent, State

__all__ = ["MemoryPath", "gate_statistics", "gates", "memory_path", "survival"]


@dataclass(frozen=True)
class MemoryPath:
    """How much of dL/dm_t came along the memory m: c of a cell that has one, else h.

    For layer-direction k, in the slots of `rnn.Trace`, (T+1, B): total[k], ln ‖dL/dm_t‖; alone[k], ln ‖·‖ of its part
    along the memory alone; shares[k], ⟨part, total⟩ / ‖total‖². The rest, 1 − share, passed through W_hh at least once.
    Shares lie outside [0, 1] where paths cancel. NaN lies past the end of a sequence. lengths (B,).
    """

    total: list[Floats]
    alone: list[Floats]
    shares: list[Floats]
    lengths: NDArray[np.int64]

    def by_lag(self, k: int = 0) -> Floats:
        """Return the shares (B, T+1) by lag, as `GradientFlow.by_lag` does. Raises ValueError for k as that does."""
        return align(self.shares[check_integer("k", k, 0, len(self.shares) - 1)], self.lengths)


def memory_path(
    model: SequenceModel,
    x: Array,
    targets: Array,
    loss_at: Literal["last", "every"] = "last",
    *,
    lengths: Any = None,
    state: State | None = None,
) -> MemoryPath:
    """Divide dL/dm_t, m being c or else h, into what came along the memory alone and what passed through W_hh.

    Along the memory a step multiplies by what its `step_backward` gives for dL/dm_{t−1} besides W_hh: f of an LSTM
    (Gers, Schmidhuber & Cummins 2000), and its peepholes if it has any; z of a GRU; 1 of `lstm_no_forget`; 0 of an RNN.
    Paths through the gates and the candidate take h_{t−1}, and with it W_hh. What a layer receives from the layers
    above counts as the loss's direct part. Arguments and errors as `gradient_flow`.
    """
    net = model.rnn
    trace, d_output, _ = run_to_loss(model, x, targets, loss_at, lengths, state)
    layers, _, _ = net.backpropagate(trace, d_output, scaled=True)
    past = np.arange(len(trace.output) + 1)[:, None] > trace.lengths
    found = MemoryPath([], [], [], trace.lengths)
    for k, layer in enumerate(layers):
        cut = net.weights(k)._replace(weight_hh=np.zeros_like(net.weights(k).weight_hh))
        nothing = np.zeros_like(layer.state[:, 0])
        part = backend(net.device).backward(
            net.cell, trace.layers[k], cut, layer.direct, nothing, layer.direct_exponent
        )
        check_adjoint(net, layer, part)
        total, alone = log_norm(layer.state[-1], layer.exponent), log_norm(part.state[-1], part.exponent)
        with np.errstate(invalid="ignore"):
            share = (_unit(part.state[-1]) * _unit(layer.state[-1])).sum(axis=-1) * np.exp(alone - total)
        for kind, values in ((found.total, total), (found.alone, alone), (found.shares, share)):
            kind.append(np.where(past, np.nan, values))
    return found


def _unit(values: Array) -> Floats:
    """Return vectors of length 1 in the direction of those on the last axis; zero stays zero."""
    wide = values.astype(np.float64)
    largest = np.abs(wide).max(axis=-1, keepdims=True)
    wide /= np.where(largest > 0, largest, 1)
    unit: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1)
    return unit


def gates(net: Recurrent, x: Array, *, lengths: Any = None, state: State | None = None) -> list[dict[str, Array]]:
    """Return for every layer-direction the pre-activations (T, B, H) of its sigmoid gates, by name; NaN past the end.

    a = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh, of a peephole gate + p∘c that it looks at; the gate's value is σ(a). In
    the order of processing. Arguments and errors as `Recurrent.forward`, and ValueError for a cell without gates.
    """
    H, names = net.hidden_size, [gate for gate in net.cell.gates if gate in ("i", "f", "o", "r", "z")]
    if not names:
        raise ValueError(f"net must have a cell with gates, got {net.cell.name}")
    trace = net.forward(x, state, lengths)
    past = np.arange(len(x))[:, None] >= trace.lengths
    found: list[dict[str, Array]] = []
    for k, layer in enumerate(trace.layers):
        weights = net.weights(k)
        found.append({})
        for gate in names:
            rows = slice(net.cell.gates.index(gate) * H, (net.cell.gates.index(gate) + 1) * H)
            a = layer.x @ weights.weight_ih[rows].T + weights.bias_ih[rows]
            a += layer.state[0, :-1] @ weights.weight_hh[rows].T + weights.bias_hh[rows]
            if gate in net.cell.peepholes:
                peephole = weights.peephole.reshape(-1, H)[net.cell.peepholes.index(gate)]
                a += peephole * (layer.state[1, 1:] if gate == "o" else layer.state[1, :-1])
            a[past] = np.nan
            found[k][gate] = a
    return found


def gate_statistics(net: Recurrent, x: Array, *, lengths: Any = None, state: State | None = None) -> pd.DataFrame:
    """Return one row a gate and unit, over all steps and sequences.

    Columns: layer, direction, gate, unit; low, median, high, the 10, 50 and 90 % quantiles of the gate's value; closed
    and open, the shares of steps in which it is saturated, σ' < 0.01, at 0 and at 1; time_scale_steps, −1 / ⟨ln σ(a)⟩
    of the gate that keeps the memory (f, z of a GRU), in which that falls to 1/e, NaN of others. Otherwise as `gates`.
    """
    frames = []
    for k, of_layer in enumerate(gates(net, x, lengths=lengths, state=state)):
        for gate, all_steps in of_layer.items():
            a = all_steps[~np.isnan(all_steps).all(axis=-1)].astype(np.float64)
            low, median, high = np.quantile(expit(a), [0.1, 0.5, 0.9], axis=0)
            saturated = expit(a) * expit(-a) < 0.01
            with np.errstate(divide="ignore"):
                scale = -1 / log_expit(a).mean(axis=0) if gate in ("f", "z") else np.nan
            columns = {
                "layer": k // net.directions,
                "direction": k % net.directions,
                "gate": gate,
                "unit": np.arange(net.hidden_size),
                "low": low,
                "median": median,
                "high": high,
                "closed": (saturated & (a < 0)).mean(axis=0),
                "open": (saturated & (a > 0)).mean(axis=0),
                "time_scale_steps": scale,
            }
            frames.append(pd.DataFrame(columns))
    frame: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return frame


def survival(
    net: Recurrent,
    x: Array,
    *,
    lengths: Any = None,
    state: State | None = None,
    probes: int = 8,
    seed: int | None = None,
) -> list[dict[tuple[str, str], Floats]]:
    """Return for every layer-direction ln of what is left of a perturbation, by lag: (B, T+1) by (perturbed, seen).

    With J = ∂seen_T / ∂perturbed_{T−lag}, each of them h or c, it is ln (‖J‖_F / √H): the response to a perturbation
    of length 1, root mean square over its directions, within the layer. A perturbation of c_t moves h_t with it.
    Measured the other way round, by scaled BPTT: E ‖Jᵀv‖² = ‖J‖_F² / H over random v of length 1 (Hutchinson 1990),
    `probes` of them a sequence. NaN where the lag is longer than the sequence. Arguments and errors otherwise as
    `Recurrent.forward`, and ValueError for a network that overflows.
    """
    trace = net.forward(x, state, lengths)
    (T, B, _), H, S = trace.output.shape, net.hidden_size, len(net.cell.states)
    rng, count = generator(seed, "survival"), check_integer("probes", probes)
    nothing, exponent = np.zeros((T, B, H), net.dtype), np.zeros((T, B), np.int64)
    found: list[dict[tuple[str, str], Floats]] = []
    for k, layer in enumerate(trace.layers):
        found.append({})
        for s, seen in enumerate(net.cell.states):
            total = np.full((S, T + 1, B), -np.inf)
            for _ in range(count):
                d_final = np.zeros((S, B, H), net.dtype)
                d_final[s] = _unit(rng.normal(size=(B, H)))
                back = backend(net.device).backward(net.cell, layer, net.weights(k), nothing, d_final, exponent)
                check_adjoint(net, back)
                total = np.logaddexp(total, 2 * log_norm(back.state, back.exponent))
            for perturbed, squares in zip(net.cell.states, total, strict=True):
                found[k][perturbed, seen] = align(0.5 * (squares - np.log(count)), trace.lengths)
    return found
