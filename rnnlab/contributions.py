"""Which step's loss reaches the weights through which step: the (t, k) matrix, and the share of every lag in dL/dW."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from .gradients import check_finite, run_to_loss
from .kernels import Array, Floats
from .kernels.contributions import contributions as measure
from .model import SequenceModel
from .rnn import State

__all__ = ["Contributions", "contribution_matrix"]


@dataclass(frozen=True)
class Contributions:
    """What the loss after step t contributes to dL/dW through step k: C[t, k], with Σ_{t,k} C[t, k] = dL/dW.

    By the name of each parameter W, and "all" for all of them as one vector, (T, T), steps counted from 0:
    log_norms ln ‖C[t, k]‖₂; shares ⟨C[t, k], dL/dW⟩ / ‖dL/dW‖², which are signed and sum to 1 (NaN where dL/dW = 0).
    """

    log_norms: dict[str, Floats]
    shares: dict[str, Floats]

    def by_lag(self, parameter: str = "all") -> pd.DataFrame:
        """Return one row a lag t − k: lag_steps, log_norm_nats = ½ ln Σ_t ‖C[t, t − lag]‖², and the share, Σ_t of them.

        Raises ValueError for a parameter that there is not.
        """
        if parameter not in self.shares:
            raise ValueError(f"parameter must be one of {', '.join(self.shares)}, got {parameter!r}")
        norms, shares = self.log_norms[parameter], self.shares[parameter]
        lags = np.arange(len(norms))
        energy = [np.logaddexp.reduce(2 * np.diagonal(norms, -lag)) for lag in lags]
        share = [np.diagonal(shares, -lag).sum() for lag in lags]
        return pd.DataFrame({"lag_steps": lags, "log_norm_nats": 0.5 * np.array(energy), "share": share})


def contribution_matrix(
    model: SequenceModel,
    x: Array,
    targets: Array,
    loss_at: Literal["last", "every"] = "every",
    *,
    lengths: Any = None,
    state: State | None = None,
) -> Contributions:
    """Measure what the loss after every step t contributes through every step k to dL/dW, L the mean loss of the batch.

    C[t, k] = Σ_b (∂L_t/∂s_t)(∂s_t/∂s_k)(∂⁺s_k/∂W), s the state of sequence b and ∂⁺ the derivative within step k alone
    (Pascanu, Mikolov & Bengio 2013, eq. 3–5), W the parameters of the last layer. Every t has an adjoint of its own, in
    powers of two, so that nothing underflows at any lag: T·(T + 1)/2 steps of BPTT, in memory that grows with T but for
    the results. Within one step the range of the dtype remains: `gradient_flow` says where that loses digits. Arguments
    and errors otherwise as there, and ValueError for a bidirectional network or one on a GPU.
    """
    net = model.rnn
    if net.bidirectional or net.device != "cpu":
        raise ValueError(f"model must have one direction and be on the CPU, got {net!r}")
    trace, d_output, count = run_to_loss(model, x, targets, loss_at, lengths, state)
    d_output /= d_output.dtype.type(count)
    last = net.num_layers - 1
    gradients = net.gradients(trace, d_output).params
    check_finite(net, gradients.flat)
    layer = net.weights(last, gradients)
    found = measure(net.cell, trace.layers[last], net.weights(last), d_output, layer)
    names = {f"{name}_l{last}": name for name in found if f"{name}_l{last}" in net.params}
    squares = {full: float(np.square(gradients[full], dtype=np.float64).sum()) for full in names}
    norms, products = ({full: found[name][i] for full, name in names.items()} for i in (0, 1))
    norms["all"] = 0.5 * np.logaddexp.reduce([2 * norm for norm in norms.values()])
    products["all"], squares["all"] = np.sum(list(products.values()), axis=0), sum(squares.values())
    with np.errstate(invalid="ignore", divide="ignore"):
        return Contributions(norms, {name: product / squares[name] for name, product in products.items()})
