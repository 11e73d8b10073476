"""How fast does the gradient decay over sequence length in an RNN, an LSTM and a GRU?

Each curve is ‖dL/dh_t‖ (for the LSTM's memory ‖dL/dc_t‖), with the loss at the last step only, against the lag: how
many steps t lies back from that last step. On the logarithmic axis a straight line is exponential decay, and its slope
the rate. What to look for:

- a curve is a median over sequences and networks, its band their 10–90 % range. Log-norms of products of Jacobians are
  near Gaussian, norms are heavy-tailed, so a mean of norms would show the outliers only;
- the first lags are a transient: a random W_hh is not normal, and its largest singular value is about twice its
  spectral radius. Rates and half-lives are fitted after the first fifth, with a bootstrap interval over networks;
- dots mark the initial state of shorter sequences: they lie on the curve, for the lag matters and not the length;
- inputs drive the units into saturation and the gates off their bias. PyTorch's default scales W_ih by the hidden size,
  so that one input hardly drives anything and the three lie upon each other; with a Glorot W_ih the slow swing of the
  temperatures saturates less than noise does, and an orthogonal RNN remembers half as long again;
- ‖dc‖ and ‖dh‖ have different units: compare their slopes, not their heights;
- "forget bias": with all weights zero the LSTM's memory decays by ln σ(b_f) a step (dashed: theory; dots: measured).
  With random weights the gradient also takes the paths through h: it decays more slowly, and with b_f = 5 it grows.

"uniform" is PyTorch's default for all weights; "orthogonal" is an orthogonal W_hh and a Glorot W_ih for each gate, and
no bias. The networks are untrained: training moves these rates by orders of magnitude.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnnlab import GradientFlow, Recurrent, SequenceModel, gradient_flow
from rnnlab.datasets import SAMPLERS, sample
from rnnlab.gradients import decay, lag_profile
from rnnlab.plots import banded_lines, caption, decades, dots, half_lives, panels
from rnnlab.study import Study
from rnnlab.theory import forget_gate_rate

CELLS = ("rnn_tanh", "gru", "lstm")
#: W_hh, W_ih and biases of each named initialisation, and its line in the figure.
INITIALISERS = {
    "uniform": (("uniform", "uniform", "uniform"), "-"),
    "orthogonal": (("orthogonal", "glorot", "zeros"), "--"),
    "zeros": (("zeros", "zeros", "zeros"), ":"),
}
FORGET_BIASES = (0.0, 1.0, 2.0, 5.0)
PANELS = {
    ("rnn_tanh", "h"): "RNN: dL/dh",
    ("gru", "h"): "GRU: dL/dh",
    ("lstm", "h"): "LSTM: dL/dh",
    ("lstm", "c"): "LSTM: dL/dc",
}


def grid(quick: bool) -> list[dict[str, Any]]:
    lengths = [50, 100, 200] if quick else [50, 100, 200, 500, 1000]
    size = {"hidden_size": 64, "batch": 16, "networks": 5 if quick else 20}
    decays = [(c, t, x, w, None) for c in CELLS for t in lengths for x in SAMPLERS for w in ("uniform", "orthogonal")]
    biases = [("lstm", lengths[-1], "white_noise", w, bias) for w in ("uniform", "zeros") for bias in FORGET_BIASES]
    names = ("cell", "length", "input", "initialiser", "forget_bias")
    return [dict(zip(names, point, strict=True)) | size for point in decays + biases]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    flows = [measure(point, 1000 * point["seed"] + network) for network in range(point["networks"])]
    rows: list[dict[str, Any]] = []
    for state in ("h", "c") if flows[0].c else ("h",):
        norms = np.stack([flow.by_lag(state) for flow in flows])
        fit = decay(np.median(norms, axis=1), seed=point["seed"])
        rows.append({"state": state, "kind": "decay", **fit.to_row()})
        profile = lag_profile(np.concatenate(norms))
        if point["forget_bias"] is not None:
            lag = profile["lag_steps"] - profile["lag_steps"][0]
            profile["theory_decades"] = lag * forget_gate_rate(point["forget_bias"]) / np.log(10)
        records: Any = profile.to_dict("records")
        rows += [{"state": state, "kind": "curve", **record} for record in records]
    return rows


def measure(point: dict[str, Any], seed: int) -> GradientFlow:
    _, outputs, loss = SAMPLERS[point["input"]]
    rnn = Recurrent(point["cell"], 1, point["hidden_size"], dtype=point["dtype"])
    rnn.initialise(*INITIALISERS[point["initialiser"]][0], forget_bias=point["forget_bias"], seed=seed)
    model = SequenceModel(rnn, outputs, "many_to_one", loss, seed=seed)
    x, targets = sample(point["input"], point["length"], point["batch"], seed=seed, dtype=point["dtype"])
    return gradient_flow(model, x, targets)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 3, (15, 9.5))
    longest = frame["length"].max()
    plain, biased = frame[frame["forget_bias"].isna()], frame[frame["forget_bias"].notna()]
    for ax, ((cell, state), title) in zip(axes, PANELS.items(), strict=False):
        curves = plain[(plain["cell"] == cell) & (plain["state"] == state) & (plain["kind"] == "curve")]
        ends = curves[(curves["lag_steps"] == curves["length"]) & (curves["length"] < longest)]
        draw(ax, curves[curves["length"] == longest], ends, "input", list(SAMPLERS), ("uniform", "orthogonal"))
        ax.set_title(title)
        ax.sharey(axes[0])
    curves = biased[(biased["state"] == "c") & (biased["kind"] == "curve")]
    exact = curves[curves["initialiser"] == "zeros"]
    draw(axes[4], curves, exact[exact["lag_steps"] % (longest // 8) == 0], "forget_bias", FORGET_BIASES, ("uniform",))
    theory = exact.pivot(index="lag_steps", columns="forget_bias", values="theory_decades")
    axes[4].plot(theory.index, theory, "k--", linewidth=0.8)
    axes[4].set_title("LSTM: dL/dc by forget bias, white noise\n(dots: all weights zero; dashed: theory for that)")
    fits = plain[(plain["kind"] == "decay") & (plain["length"] == longest)]
    half_lives(axes[5], fits, rows=PANELS, columns=list(SAMPLERS), lines=("uniform", "orthogonal"))
    setting = (
        "untrained networks, H = {hidden_size}, loss at the last of T = {longest} steps; median and 10–90 % band over "
        "{networks} networks × {batch} sequences; {dtype}, seed {seed}"
    ).format(longest=longest, **frame.iloc[0])
    caption(figure, "How fast the gradient decays with the lag", setting)
    return figure


def draw(
    ax: Axes, curves: pd.DataFrame, marks: pd.DataFrame, hue: str, order: Sequence[Any], lines: Sequence[str]
) -> None:
    axis: dict[str, Any] = {"x": "lag_steps", "y": "norm_decades", "hue": hue, "hue_order": order}
    band = {"low": "norm_low_decades", "high": "norm_high_decades", "title": f"{hue}, initialiser".replace("_", " ")}
    banded_lines(
        ax, curves, style="initialiser", dashes={name: INITIALISERS[name][1] for name in lines}, **axis, **band
    )
    dots(ax, marks, **axis)
    decades(ax, "lag [steps back from the loss]", "norm relative to the first lag")


study = Study("gradient_decay", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
