"""Which step does the gradient reach in each arrangement of inputs and outputs, and in stacked and two-way networks?

Each curve is ‖dL/dh_t‖ (LSTM: of h, not of c) of the mean loss against the time t at which h_t stands, of every layer
and in every direction. What to look for:

- one to one: no time passes, nothing decays: a feedforward network;
- one to many: the output is the next input. Fed back (solid) the gradient has a path through every output; with the
  targets in their place (teacher forcing, dashed) it has the recurrent one alone;
- many to one: one loss at the end; what reaches the first steps has decayed all the way;
- many to many: a loss at every step hides the decay behind the direct term of each (compare the slope of many to one);
- encoder and decoder: all that the encoder learns passes the one state between the two (dotted line), and decays from
  there as with a single loss;
- bidirectional: the reverse direction ends at t = 0, where it is read: each direction is short of the other's end, and
  together they favour both ends of the sequence over its middle;
- stacked: a lower layer (solid) receives what comes down at every step on its way, and each layer more makes paths
  more numerous: the curves lie higher and bend, and reach the slope of the top layer (dotted) late;
- dL/dx: what of it arrives at the inputs.

W_hh is orthogonal, W_ih Glorot's, biases 0 (LSTM: forget bias 1); inputs and targets are white noise; untrained.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnnlab import Recurrent, SequenceModel
from rnnlab.gradients import log_norm
from rnnlab.plots import banded_lines, caption, decades, panels
from rnnlab.study import Study, records

CELLS = ("rnn_tanh", "gru", "lstm")
#: Arrangements: topology, layers, both directions, targets fed back.
ARRANGEMENTS: dict[str, tuple[str, int, bool, bool]] = {
    "one to one": ("one_to_one", 1, False, False),
    "one to many": ("one_to_many", 1, False, False),
    "one to many, teacher": ("one_to_many", 1, False, True),
    "many to one": ("many_to_one", 1, False, False),
    "many to many": ("many_to_many", 1, False, False),
    "encoder and decoder": ("encoder_decoder", 1, False, False),
    "bidirectional, many to one": ("many_to_one", 1, True, False),
    "stacked, many to one": ("many_to_one", 3, False, False),
}
PANELS = [name for name in ARRANGEMENTS if "teacher" not in name]
#: How the curves of their parts are drawn.
DASHES = {"layer 1": "-", "layer 2": "--", "layer 3": ":", "forward": "-"}
DASHES |= dict.fromkeys(("reverse", "decoder", "teacher"), "--")


def grid(quick: bool) -> list[dict[str, Any]]:
    size = {"steps": 30, "hidden_size": 32, "batch": 16, "networks": 5 if quick else 20}
    return [{"arrangement": name, "cell": cell} | size for name in ARRANGEMENTS for cell in CELLS]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    topology, layers, both, teacher = ARRANGEMENTS[point["arrangement"]]
    samples: dict[tuple[str, str], list[Any]] = {}
    for network in range(point["networks"]):
        seed = 1000 * point["seed"] + network
        sizes, kind = (1, point["hidden_size"], layers), {"dtype": point["dtype"], "device": point["device"]}
        rnn = Recurrent(point["cell"], *sizes, bidirectional=both, **kind)
        forget_bias = 1.0 if point["cell"] == "lstm" else None
        rnn.initialise("orthogonal", "glorot", "zeros", forget_bias=forget_bias, seed=seed)
        model = SequenceModel(rnn, 1, topology, "mse", teacher_forcing=teacher, seed=seed)
        if model.decoder:
            model.decoder.initialise("orthogonal", "glorot", "zeros", forget_bias=forget_bias, seed=seed + 500)
        steps, B, rng = point["steps"], point["batch"], np.random.default_rng([seed, len(topology)])
        inputs = 1 if topology.startswith("one") else steps
        outputs = () if topology in ("one_to_one", "many_to_one") else (steps,)
        x, targets = (rng.normal(size=shape).astype(rnn.dtype) for shape in ((inputs, B, 1), (*outputs, B, 1)))
        gradients = model.loss_and_gradients(x, targets)
        for part, found in gradients.recurrent.items():
            for k, dh in enumerate(found.h):
                layer, reverse = divmod(k, rnn.directions)
                curve = "decoder" if part == "decoder" else "teacher" if teacher else f"layer {layer + 1}"
                curve = ("forward", "reverse")[reverse] if both else curve
                # In slot s a reverse direction has read the last s elements.
                samples.setdefault(("h", curve), []).append(log_norm(dh)[::-1] if reverse else log_norm(dh))
        samples.setdefault(("x", "layer 1"), []).append(log_norm(gradients.x))
    rows = []
    for (quantity, curve), columns in samples.items():
        low, median, high = np.quantile(np.concatenate(columns, axis=1), [0.1, 0.5, 0.9], axis=1) / np.log(10)
        start = point["steps"] if curve == "decoder" else 1 if quantity == "x" else 0
        values = {"norm_decades": median, "norm_low_decades": low, "norm_high_decades": high}
        frame = pd.DataFrame({"quantity": quantity, "curve": curve, "step": start + np.arange(len(median)), **values})
        rows.append(frame)
    return records(pd.concat(rows))


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 4, (20, 9.5))
    axis: dict[str, Any] = {"x": "step", "y": "norm_decades", "low": "norm_low_decades", "high": "norm_high_decades"}
    axis |= {"hue": "cell", "hue_order": CELLS}
    for ax, name in zip(axes, PANELS, strict=False):
        here = frame[frame["arrangement"].str.startswith(name) & (frame["quantity"] == "h")]
        dashes = {curve: dash for curve, dash in DASHES.items() if curve in set(here["curve"])}
        banded_lines(ax, here, style="curve", dashes=dashes, title="cell, part", **axis)
        decades(ax, "time t [steps]", "norm of dL/dh")
        ax.sharey(axes[0])
        ax.set_title(name)
    axes[PANELS.index("encoder and decoder")].axvline(frame["steps"].iloc[0], color="k", linestyle=":", linewidth=1)
    inputs = frame[(frame["quantity"] == "x") & (frame["cell"] == "lstm") & (frame["step"] > 0)]
    banded_lines(
        axes[7], inputs, style="cell", dashes={"lstm": "-"}, title="arrangement, cell",
        **axis | {"hue": "arrangement", "hue_order": PANELS[2:]},
    )  # fmt: skip
    decades(axes[7], "time t [steps]", "norm of dL/dx")
    axes[7].sharey(axes[0])
    axes[7].set_title("what reaches the inputs (LSTM)")
    text = (
        "untrained networks, H = {hidden_size}, {steps} inputs and outputs where there are many, white noise; mean "
        "squared error; median and 10–90 % band over {networks} networks × {batch} sequences; {dtype}, seed {seed}"
    ).format(**frame.iloc[0])
    caption(figure, "What reaches which step", text)
    return figure


study = Study("topologies", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
