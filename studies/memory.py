"""What keeps a memory alive in an LSTM and a GRU: c or h, and which bias of the gate?

The gate that keeps the memory (f, z of a GRU) starts at σ(b): b = 0 forgets by half a step, b = 1 is the usual advice
(Jozefowicz, Zaremba & Sutskever 2015), "chrono" draws b so that the units' time scales spread up to the length of the
sequence (Tallec & Ollivier 2018). What to look for:

- survival: what is left of a perturbation of c (solid) or of h (dashed; GRU: solid) in the same state, a lag later:
  root mean square over directions, median and 10–90 % over networks and sequences. Dashed black is ln σ(b) a step, the
  gate's own forgetting, and theory for W_hh = 0; dots are theory for a random W_hh at rest (of dL/dc, its mirror
  image). What lies above the dashed line lives on recurrent weights, and what rises is unstable (dots far above: at
  rest it would be more so, but the network leaves rest and saturates). c and h have different units: in the LSTM both
  end up parallel, for what is left of either lives in c; with "chrono" slow units take over from fast ones;
- time scale −1/⟨ln f⟩ of every unit: dots where theory is −1/ln σ(b). The input moves the pre-activation to both
  sides, and closing costs more than opening gains (ln σ is concave): units lie below the theory;
- share along the memory: ⟨part, total⟩ / ‖total‖² of dL/dc (GRU: dL/dh) for a loss at the last step, where the part
  never passed through W_hh. At 1 the gate does it all, as the textbook's ∏ f has it; at 0 what is left of the gradient
  came through the recurrent weights, and ∏ f explains nothing; above 1 the two cancel;
- saturated gates (σ' < 0.01) pass no gradient to their own weights: b = 5 keeps the memory and cannot learn to forget.

Inputs are white noise; W_hh is orthogonal, W_ih Glorot's, other biases 0; the networks are untrained.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnnlab import Recurrent, SequenceModel
from rnnlab.datasets import sample
from rnnlab.gradients import lag_profile
from rnnlab.memory import gate_statistics, memory_path, survival
from rnnlab.plots import PALETTE, banded_lines, caption, decades, dots, panels
from rnnlab.study import Study, records
from rnnlab.theory import forget_gate_rate, resting_gradient

CELLS = {"lstm": "f", "gru": "z"}
BIASES = ("0", "1", "2", "5", "chrono")


def grid(quick: bool) -> list[dict[str, Any]]:
    size = {"length": 200, "hidden_size": 64, "batch": 8, "networks": 5 if quick else 20}
    return [{"cell": cell, "bias": bias} | size for cell in CELLS for bias in BIASES]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    length, survived, shares, statistics = point["length"], [], [], []
    for network in range(point["networks"]):
        seed = 1000 * point["seed"] + network
        rnn = Recurrent(point["cell"], 1, point["hidden_size"], dtype=point["dtype"], device=point["device"])
        chrono = point["bias"] == "chrono"
        bias = {"chrono": length} if chrono else {"forget_bias": float(point["bias"])}
        rnn.initialise("orthogonal", "glorot", "zeros", **bias, seed=seed)
        model = SequenceModel(rnn, 1, "many_to_one", "mse", seed=seed)
        x, targets = sample("white_noise", length, point["batch"], seed=seed, dtype=point["dtype"])
        survived.append(survival(rnn, x, seed=seed)[0])
        shares.append(memory_path(model, x, targets).by_lag())
        statistics.append(gate_statistics(rnn, x).assign(network=network))
    rows: list[pd.DataFrame] = []
    for state in rnn.cell.states:
        profile = lag_profile(np.concatenate([one[state, state] for one in survived]))
        rows.append(profile.assign(kind="survival", state=state))
    low, median, high = np.quantile(np.concatenate(shares), [0.1, 0.5, 0.9], axis=0)
    lags = np.arange(length + 1)
    rows.append(
        pd.DataFrame({"kind": "share", "lag_steps": lags, "share": median, "share_low": low, "share_high": high})
    )
    rows.append(pd.concat(statistics).drop(columns=["layer", "direction"]).assign(kind="gate"))
    frame = pd.concat(rows, ignore_index=True)
    if not chrono:
        rate = forget_gate_rate(float(point["bias"]))
        frame["gate_decades"], frame["theory_steps"] = frame["lag_steps"] * rate / np.log(10), -1 / rate
        resting = resting_gradient(point["cell"], 1.0, length, float(point["bias"])) / np.log(10)
        frame["theory_decades"] = frame["lag_steps"].map(dict(enumerate(resting)))
    return records(frame)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 4, (20, 9.5))
    for row, (cell, gate) in enumerate(CELLS.items()):
        here, name = frame[frame["cell"] == cell], cell.upper()
        lines, gates = here[here["kind"] == "survival"], here[here["kind"] == "gate"]
        hue: dict[str, Any] = {"x": "lag_steps", "hue": "bias", "hue_order": BIASES, "title": "bias of the gate"}
        dashes = {"c": "-", "h": "--"} if cell == "lstm" else {"h": "-"}
        band = {"y": "norm_decades", "low": "norm_low_decades", "high": "norm_high_decades"}
        survived, times, share, saturation = axes[4 * row : 4 * row + 4]
        banded_lines(survived, lines, style="state", dashes=dashes, **hue, **band)
        memories = lines[lines["state"] == next(iter(dashes))]
        theory = memories.pivot_table(index="lag_steps", columns="bias", values="gate_decades")
        survived.plot(theory.index, theory, "k--", linewidth=0.8)
        some = memories[memories["lag_steps"] % (memories["length"] // 10) == 0]
        dots(survived, some, x="lag_steps", y="theory_decades", hue="bias", hue_order=BIASES)
        decades(survived, "lag [steps]", "what is left of a perturbation")
        survived.set(title=f"{name}: survival (dots, dashed: theory)")
        banded_lines(
            share, here[here["kind"] == "share"], style="cell", dashes={cell: "-"}, **hue,
            y="share", low="share_low", high="share_high",
        )  # fmt: skip
        share.set(title=f"{name}: share along the memory", xlabel="lag [steps back from the loss]", ylabel="share")
        share.set(ylim=(-0.5, 1.5), xscale="symlog", xlim=(0, here["length"].iloc[0]))
        keeps = gates[gates["gate"] == gate]
        for k, (colour, bias) in enumerate(zip(PALETTE, BIASES, strict=False)):
            units = keeps[keeps["bias"] == bias]
            times.plot(np.sort(units["time_scale_steps"]), np.linspace(0, 1, len(units)), color=colour, label=bias)
            times.plot(units["theory_steps"].iloc[:1], [0.5], "o", color=colour)
            of_gates = gates[gates["bias"] == bias].groupby("gate")[["closed", "open"]].mean()
            place = np.arange(len(of_gates)) + 0.16 * (k - 2)
            saturation.bar(place, of_gates["open"], 0.15, color=colour, label=bias)
            saturation.bar(place, -of_gates["closed"], 0.15, color=colour, alpha=0.5)
        times.set(title=f"{name}: time scales of units (dots: theory)", xscale="log")
        times.set(xlabel=f"−1/⟨ln {gate}⟩ [steps]", ylabel="share of units below")
        saturation.set_xticks(np.arange(len(of_gates)), of_gates.index)
        saturation.set(title=f"{name}: saturated gates", ylabel="share of steps: at 1 (up), at 0 (down)", ylim=(-1, 1))
        saturation.legend(title="bias of the gate", fontsize=8, title_fontsize=8)
    text = (
        "untrained networks, H = {hidden_size}, T = {length}, white noise; median and 10–90 % band over {networks} "
        "networks × {batch} sequences; {dtype}, seed {seed}"
    ).format(**frame.iloc[0])
    caption(figure, "How long a memory lasts, and on which path", text)
    return figure


study = Study("memory", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
