"""What are the Lyapunov spectra of random and of gated networks, and does theory predict them?

A Lyapunov exponent is the rate, in nats a step, at which perturbations of the state grow or shrink along one direction;
gradients grow and shrink at the same rates on their way back. What to look for:

- upper left: spectra of random tanh networks without input. Above gain 1 some exponents are positive: chaos, and
  gradients that explode. Most are far below 0, where gradients vanish: both happen in one network, which is why no gain
  alone cures it;
- upper right: the largest exponent and the mean of all, less what mean field theory predicts for N → ∞ (½ ln χ; and
  ln g − ½ + ⟨ln tanh'⟩), bars from the lowest to the highest network. What is left shrinks with N;
- below: LSTM and GRU, driven by noise and by hourly temperatures. Dots are what the gates alone would give, ⟨ln f⟩ or
  ⟨ln z⟩ with W_hh = 0, and at the left end ln ρ(J) of the network at rest: weak inputs change it little, but where it
  is above 0 the network does not rest, and its own activity saturates the gates. An LSTM has 2H exponents: the gates
  set the plateau of the first H, its memory; the other H, those of h, fall off a cliff. With a larger forget bias the
  plateau rises towards 0 and flattens: all units forget at one pace.

W_hh is gaussian of gain g (tanh), orthogonal for each gate with a Glorot W_ih (LSTM, GRU). The networks are untrained.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rnnlab import Recurrent
from rnnlab.datasets import sample
from rnnlab.lyapunov import lyapunov_spectrum
from rnnlab.plots import banded_lines, caption, dots, panels, ranges
from rnnlab.study import Study
from rnnlab.theory import gate_exponents, resting_rate, tanh_mean_exponent, tanh_rate

GAINS = (1.5, 2.0, 3.0, 5.0)
FORGET_BIASES = (0.0, 1.0, 2.0, 5.0)
INPUTS = {"white_noise": "-", "hourly_temperatures": "--"}
GATED = {"lstm": "LSTM, spectrum of (h, c)", "gru": "GRU"}


def grid(quick: bool) -> list[dict[str, Any]]:
    sizes = ((32, 100, None), (64, 100, None)) if quick else ((128, 300, None), (512, 300, None), (1024, 1000, 1))
    random = [("rnn_tanh", g, None, None, *size) for g in GAINS for size in sizes]
    size = (16, 200, None) if quick else (64, 2000, None)
    gated = [(cell, 1.0, bias, name, *size) for cell in GATED for bias in FORGET_BIASES for name in INPUTS]
    names = ("cell", "gain", "forget_bias", "input", "hidden_size", "steps", "exponents")
    shared = {"transient": 100, "networks": 2 if quick else 4}
    return [dict(zip(names, point, strict=True)) | shared for point in random + gated]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    seeds = range(1000 * point["seed"], 1000 * point["seed"] + point["networks"])
    if point["input"] is not None:
        measured, theory = (np.stack(part) for part in zip(*(gated(point, seed) for seed in seeds), strict=True))
        largest = np.array([resting_rate(point["cell"], point["gain"], point["forget_bias"])])
        rows = spread("spectrum", measured, np.median(theory, axis=0))
        return rows + spread("largest less theory", measured[:, :1] - largest, largest)
    spectra = np.stack([random(point, seed) for seed in seeds])
    largest, mean = np.array([tanh_rate(point["gain"])]), np.array([tanh_mean_exponent(point["gain"])])
    rows = spread("largest less theory", spectra[:, :1] - largest, largest)
    if point["exponents"] is None:
        rows += spread("mean less theory", spectra.mean(axis=1, keepdims=True) - mean, mean)
        rows += spread("spectrum", spectra, np.full(spectra.shape[1], np.nan))
    return rows


def random(point: dict[str, Any], seed: int) -> NDArray[np.float64]:
    net = Recurrent(point["cell"], 1, point["hidden_size"], dtype=point["dtype"])
    net.initialise("gaussian", "zeros", gain=point["gain"], seed=seed)
    options = {name: point[name] for name in ("steps", "transient", "exponents")}
    return lyapunov_spectrum(net, **options, seed=seed).exponents


def gated(point: dict[str, Any], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    net = Recurrent(point["cell"], 1, point["hidden_size"], dtype=point["dtype"])
    net.initialise("orthogonal", "glorot", "zeros", forget_bias=point["forget_bias"], seed=seed)
    steps, transient = point["steps"], point["transient"]
    x, _ = sample(point["input"], steps + transient, 1, seed=seed, dtype=point["dtype"])
    spectrum = lyapunov_spectrum(net, x, steps=steps, transient=transient, seed=seed)
    return spectrum.exponents, gate_exponents(net, x[transient:])


def spread(kind: str, values: NDArray[np.float64], theory: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return a row an exponent: mean, lowest and highest over networks, all in nats per step."""
    columns = {"nats_per_step": values.mean(axis=0), "lowest": values.min(axis=0), "highest": values.max(axis=0)}
    frame = pd.DataFrame({"kind": kind, **columns, "theory_nats_per_step": theory})
    frame["index_share"] = frame.index / len(frame)
    records: Any = frame.to_dict("records")
    return list(records)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 2, (13, 10))
    axis: dict[str, Any] = {"x": "index_share", "y": "nats_per_step"}
    band: dict[str, Any] = {"low": "lowest", "high": "highest"}
    spectra, largest = frame[frame["kind"] == "spectrum"], frame[frame["kind"] == "largest less theory"]
    tanh = spectra[spectra["cell"] == "rnn_tanh"]
    tanh = tanh[tanh["hidden_size"] == tanh["hidden_size"].max()]
    lines: dict[str, Any] = {"style": "cell", "dashes": {"rnn_tanh": "-"}, "title": "gain g"}
    hue: dict[str, Any] = {"hue": "gain", "hue_order": GAINS}
    theory = {"x": "index_share", "y": "theory_nats_per_step"}
    banded_lines(axes[0], tanh, **lines, **hue, **axis, **band)
    dots(axes[0], largest[largest["cell"] == "rnn_tanh"], **theory, **hue)
    title = f"random tanh networks without input, N = {tanh['hidden_size'].iloc[0]}\n(dots: mean field of the largest)"
    axes[0].set(title=title, ylim=(-8, 1))
    excess = frame[(frame["cell"] == "rnn_tanh") & (frame["kind"] != "spectrum")]
    ranges(axes[1], excess, x="gain", y="nats_per_step", hue="kind", style="hidden_size", **band)
    axes[1].set(title="random tanh networks", xlabel="gain g", ylabel="measured less mean field [nats per step]")
    for ax, (cell, title) in zip(axes[2:], GATED.items(), strict=True):
        lines = {"style": "input", "dashes": INPUTS, "title": "forget bias, input"}
        hue = {"hue": "forget_bias", "hue_order": FORGET_BIASES}
        banded_lines(ax, spectra[spectra["cell"] == cell], **lines, **hue, **axis, **band)
        gates = spectra[(spectra["cell"] == cell) & np.isfinite(spectra["theory_nats_per_step"])]
        dots(ax, gates[gates["input"] == "white_noise"][4::8], **theory, **hue)
        dots(ax, largest[largest["cell"] == cell], **theory, **hue)
        ax.set(title=f"{title}\n(dots: at rest, at the left end; gates alone, white noise)", ylim=(-6, 0.3))
    for ax in (axes[0], *axes[2:]):
        ax.set(xlabel="rank of the exponent / size of the state", ylabel="Lyapunov exponent [nats per step]")
    setting = (
        "mean and range over {networks} untrained networks; W_hh gaussian (tanh) or orthogonal (gated, H = "
        "{hidden_size}, {steps} steps); {transient} steps of transient; {dtype}, seed {seed}"
    ).format(**frame[frame["input"].notna()].iloc[0])
    caption(figure, "Lyapunov spectra against theory", setting)
    return figure


study = Study("lyapunov", question=__doc__, grid=grid, run=run, plot=plot, devices=("cpu",))

if __name__ == "__main__":
    study.main()
