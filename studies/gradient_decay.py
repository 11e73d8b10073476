"""How fast does the gradient decay over sequence length in an RNN, an LSTM and a GRU?

Each curve is ‖dL/dh_t‖ (for the LSTM's memory ‖dL/dc_t‖), with the loss at the last step only, against the lag: how
many steps t lies back from that last step. On the logarithmic axis a straight line is exponential decay, and its slope
the rate. What to look for:

- a curve is a median over sequences and networks, its band their 10–90 % range. Log-norms of products of Jacobians are
  near Gaussian, norms are heavy-tailed, so a mean of norms would show the outliers only;
- the first lags are a transient: a random W_hh is not normal, and its largest singular value is about twice its
  spectral radius. Rates and half-lives are fitted after the first fifth, with a bootstrap interval over networks;
- thin black: theory. For the RNN the mean field of a random W_hh driven by these very inputs (`tanh_gradient`), for GRU
  and LSTM a random W_hh at rest (`resting_gradient`), as good as inputs are weak. What both leave out is of order 1/√H:
  the band, and that long lags follow the largest eigenvalue that this very W_hh has;
- dots mark the initial state of shorter sequences: they lie on the curve, for the lag matters and not the length;
- inputs drive the units into saturation and the gates off their bias. PyTorch's default scales W_ih by the hidden size,
  so that one input hardly drives anything and the three lie upon each other; with a Glorot W_ih the slow swing of the
  temperatures saturates less than noise does, and an orthogonal RNN remembers half as long again;
- ‖dc‖ and ‖dh‖ have different units: compare their slopes, not their heights;
- "forget bias": with all weights zero the LSTM's memory decays by ln σ(b_f) a step (dashed: theory; dots: measured).
  With random weights the gradient also takes the paths through h: it decays more slowly, and with b_f = 5 it grows,
  though less than theory at rest has it: a network that is unstable at rest leaves it and saturates;
- "trained": after Adam has learned digits, pixel by pixel. That moves rates by more than any initialisation does;
- horizon: the lag from which on all lags together hold under 1 % of the summed norms, and no say in an update.

"uniform" is PyTorch's default for all weights; "orthogonal" is an orthogonal W_hh and a Glorot W_ih for each gate, and
no bias.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnnlab import Recurrent, SequenceModel, gradient_flow
from rnnlab.datasets import SAMPLERS, sample
from rnnlab.gradients import decay, lag_profile
from rnnlab.optim import Adam
from rnnlab.plots import banded_lines, caption, decades, dots, fit_table, panels
from rnnlab.study import Study, records
from rnnlab.tasks import dataset
from rnnlab.theory import resting_gradient, tanh_gradient
from rnnlab.training import train

CELLS = ("rnn_tanh", "gru", "lstm")
#: W_hh, W_ih and biases of each named initialisation, and its line in the figure.
INITIALISERS = {
    "uniform": (("uniform", "uniform", "uniform"), "-"),
    "orthogonal": (("orthogonal", "glorot", "zeros"), "--"),
    "zeros": (("zeros", "zeros", "zeros"), ":"),
    "trained": (("uniform", "uniform", "uniform"), "-."),
}
FORGET_BIASES = (0.0, 1.0, 2.0, 5.0)
PANELS = {
    ("rnn_tanh", "h"): "RNN: dL/dh",
    ("gru", "h"): "GRU: dL/dh",
    ("lstm", "h"): "LSTM: dL/dh",
    ("lstm", "c"): "LSTM: dL/dc",
}
#: Networks are trained on streams of the pixels of one digit.
STREAMS, STEPS, BATCH, LEARNING_RATE = 2000, 64, 32, 0.003


def grid(quick: bool) -> list[dict[str, Any]]:
    lengths = [50, 100, 200] if quick else [50, 100, 200, 500, 1000]
    size = {"hidden_size": 64, "batch": 16, "networks": 5 if quick else 20, "updates": 300 if quick else 1000}
    points: list[tuple[Any, ...]] = [
        (c, t, x, w, None) for c in CELLS for t in lengths for x in SAMPLERS for w in ("uniform", "orthogonal")
    ]
    points += [("lstm", lengths[-1], "white_noise", w, bias) for w in ("uniform", "zeros") for bias in FORGET_BIASES]
    # The loop of training is compiled for each cell.
    points += [(c, lengths[-1], "digit_pixels", "trained", None) for c in (CELLS[-1:] if quick else CELLS)]
    names = ("cell", "length", "input", "initialiser", "forget_bias")
    return [dict(zip(names, point, strict=True)) | size for point in points]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    flows, theories = [], []
    for seed in range(1000 * point["seed"], 1000 * point["seed"] + point["networks"]):
        model = build(point, seed)
        x, targets = sample(point["input"], point["length"], point["batch"], seed=seed, dtype=point["dtype"])
        flows.append(gradient_flow(model, x, targets))
        theories.append(theory(model.rnn, x, point["forget_bias"]))
    rows: list[dict[str, Any]] = []
    state: Any
    for state in model.rnn.cell.states:
        norms = np.stack([flow.by_lag(state) for flow in flows])
        fit = decay(np.median(norms, axis=1), seed=point["seed"])
        rows.append({"state": state, "kind": "decay", **fit.to_row()})
        profile = lag_profile(np.concatenate(norms))
        if state == model.rnn.cell.states[-1] and point["initialiser"] != "trained":
            profile["theory_decades"] = np.median(theories, axis=0)[profile["lag_steps"]] / np.log(10)
        rows += [{"state": state, "kind": "curve", **row} for row in records(profile)]
    return rows


def build(point: dict[str, Any], seed: int) -> SequenceModel:
    _, outputs, loss = SAMPLERS[point["input"]]
    rnn = Recurrent(point["cell"], 1, point["hidden_size"], dtype=point["dtype"], device=point["device"])
    rnn.initialise(*INITIALISERS[point["initialiser"]][0], forget_bias=point["forget_bias"], seed=seed)
    model = SequenceModel(rnn, outputs, "many_to_one", loss, seed=seed)
    if point["initialiser"] == "trained" and point["device"] != "cpu":
        model.params.flat[:] = build(point | {"device": "cpu"}, seed).params.flat  # networks are trained on the CPU
    elif point["initialiser"] == "trained":
        x, targets = sample(point["input"], STEPS, STREAMS, seed=seed, dtype=point["dtype"])
        digits = dataset(x, targets, output_size=outputs)
        train(model, digits, Adam(LEARNING_RATE), batch=BATCH, updates=point["updates"], seed=seed)
    return model


def theory(rnn: Recurrent, x: Any, forget_bias: float | None) -> Any:
    """Return ln of the norm of the memory's gradient by lag (T+1,), of any random W_hh of the same deviation g/√H."""
    weights = rnn.weights(0)
    gain = rnn.hidden_size**0.5 * float(weights.weight_hh.std())
    if rnn.cell.name != "rnn_tanh":
        return resting_gradient(rnn.cell.name, gain, len(x), forget_bias or 0.0)
    fields = x[:, 0] @ weights.weight_ih.T + weights.bias_ih + weights.bias_hh
    return tanh_gradient(gain, fields.astype(np.float64))[::-1]


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 4, (20, 9.5))
    longest, both, inputs = frame["length"].max(), ("uniform", "orthogonal"), list(SAMPLERS)
    plain, biased = frame[frame["forget_bias"].isna()], frame[frame["forget_bias"].notna()]
    curves = plain[plain["kind"] == "curve"]
    for ax, ((cell, state), title) in zip(axes, PANELS.items(), strict=False):
        lines = curves[(curves["cell"] == cell) & (curves["state"] == state)]
        ends = lines[(lines["lag_steps"] == lines["length"]) & (lines["length"] < longest)]
        draw(ax, title, lines[lines["length"] == longest], ends, "input", inputs, both)
        ax.sharey(axes[0])
    memory = biased[(biased["state"] == "c") & (biased["kind"] == "curve")]
    exact = memory[(memory["initialiser"] == "zeros") & (memory["lag_steps"] % (longest // 8) == 0)]
    title = "LSTM: dL/dc by forget bias, white noise\n(dots, dashed: all weights zero, theory for that)"
    draw(axes[4], title, memory, exact, "forget_bias", FORGET_BIASES, ("uniform",))
    digits = curves[(curves["length"] == longest) & (curves["input"] == "digit_pixels") & (curves["state"] == "h")]
    digits = digits[digits["initialiser"] != "orthogonal"]
    title = f"dL/dh on digits, before and after {frame['updates'].iloc[0]} updates"
    draw(axes[5], title, digits, digits[:0], "cell", CELLS, ("uniform", "trained"))
    fits = plain[(plain["kind"] == "decay") & (plain["length"] == longest)]
    half_life = [f"half_life_{end}steps" for end in ("", "low_", "high_")]
    table: dict[str, Any] = {"rows": PANELS, "columns": inputs, "lines": both}
    fit_table(axes[6], fits, "Half-life in steps (95 % bootstrap interval over networks)", values=half_life, **table)
    fit_table(axes[7], fits, "Horizon in steps", values=["horizon_steps"], **table)
    setting = (
        "untrained networks (but one panel), H = {hidden_size}, loss at the last of T = {longest} steps; median and "
        "10–90 % band over {networks} networks × {batch} sequences; {dtype}, seed {seed}"
    ).format(longest=longest, **frame.iloc[0])
    caption(figure, "How fast the gradient decays with the lag", setting)
    return figure


def draw(
    ax: Axes,
    title: str,
    curves: pd.DataFrame,
    marks: pd.DataFrame,
    hue: str,
    order: Sequence[Any],
    lines: Sequence[str],
) -> None:
    axis: dict[str, Any] = {"x": "lag_steps", "y": "norm_decades", "hue": hue, "hue_order": order}
    band = {"low": "norm_low_decades", "high": "norm_high_decades", "title": f"{hue}, initialiser".replace("_", " ")}
    banded_lines(
        ax, curves, style="initialiser", dashes={name: INITIALISERS[name][1] for name in lines}, **axis, **band
    )
    dots(ax, marks, **axis)
    for (name, _), line in curves.dropna(subset=["theory_decades"]).groupby(["initialiser", hue]):
        ax.plot(line["lag_steps"], line["theory_decades"], "k--" if name == "zeros" else "k-", linewidth=0.6)
    decades(ax, "lag [steps back from the loss]", "norm relative to the first lag")
    ax.set_title(title)


study = Study("gradient_decay", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
