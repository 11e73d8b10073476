"""Does mean field theory predict how fast the gradient of a driven random RNN decays?

h_t = tanh(W_hh h_{t−1} + u_t) with W_hh from N(0, g²/N) and noise u_t of variance v at every unit. Theory for N → ∞
(Sompolinsky, Crisanti & Sommers 1988; Molgedey, Schuchhardt & Schuster 1992): ‖dL/dh_t‖ goes as χ^(lag/2) with
χ = g² E tanh'²(√q z) and q = g² E tanh²(√q z) + v; the rate is ½ ln χ. What to look for:

- left: every measured rate lies on the line, from strong decay to growth, which is chaos. More drive, more saturation,
  faster decay: noise suppresses the chaos that the same weights show when they are left alone;
- right: measured less theory, with the 95 % bootstrap interval over networks. A median log-norm of N units lies below
  mean field by some 1/N a step, more where few units carry the gradient (large g), so that theory for N → ∞ is to be
  judged at the larger size, where that is less than the interval; and one interval in 20 misses by chance.

The rate is fitted to the median log-norm over sequences and networks after the first fifth of the lags, loss at the
last step. Networks are untrained: as training makes W_hh anything but random, this theory ends.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnnlab import RNN, SequenceModel, gradient_flow
from rnnlab.gradients import decay
from rnnlab.plots import caption, panels, ranges
from rnnlab.study import Study
from rnnlab.theory import tanh_rate

GAINS = (0.5, 1.0, 1.5, 2.5)
VARIANCES = (0.1, 1.0)


def grid(quick: bool) -> list[dict[str, Any]]:
    size = {"batch": 8, "length": 100, "networks": 5 if quick else 10}
    sizes = (128, 256) if quick else (512, 2048)
    return [{"gain": g, "input_variance": v, "hidden_size": N} | size for g in GAINS for v in VARIANCES for N in sizes]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    norms = np.stack([measure(point, 1000 * point["seed"] + network) for network in range(point["networks"])])
    fit = decay(norms, seed=point["seed"]).to_row()
    theory = tanh_rate(point["gain"], point["input_variance"])
    names = {"rate": "rate", "lowest": "rate_low", "highest": "rate_high"}
    rates = {name: fit[f"{column}_nats_per_step"] for name, column in names.items()}
    theory_row = {"theory_nats_per_step": theory}
    return [
        {"kind": "rate", **rates, **theory_row},
        {"kind": "rate less theory", **{name: rate - theory for name, rate in rates.items()}, **theory_row},
    ]


def measure(point: dict[str, Any], seed: int) -> Any:
    """Return the median log-norm of dL/dh_t over the sequences by lag, (T+1,)."""
    N, shape = point["hidden_size"], (point["length"], point["batch"], point["hidden_size"])
    net = RNN(N, N, dtype=point["dtype"], device=point["device"], seed=seed)
    net.initialise("gaussian", "gaussian", "zeros", gain=point["gain"], seed=seed)
    model = SequenceModel(net, 1, "many_to_one", "mse", seed=seed)
    rng = np.random.default_rng(seed)
    x = rng.normal(0, np.sqrt(point["input_variance"]), shape).astype(net.dtype)  # W_ih from N(0, 1/N) keeps v
    flow = gradient_flow(model, x, rng.normal(size=(point["batch"], 1)).astype(net.dtype))
    return np.median(flow.by_lag("h"), axis=0)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(1, 2, (13, 5.5))
    band = {"y": "rate", "low": "lowest", "high": "highest", "hue": "hidden_size", "style": "input_variance"}
    for ax, (kind, part) in zip(axes, frame.groupby("kind", sort=False), strict=True):
        ranges(ax, part, x="theory_nats_per_step", **band)
        ax.set(xlabel="mean field ½ ln χ [nats per step]", ylabel=f"{kind} [nats per step of lag]")
    axes[0].axline((0, 0), slope=1, color="k", linewidth=1, linestyle="--")
    setting = (
        "tanh RNN, gains {gains}, noise at every unit; {networks} networks × {batch} sequences of {length} steps, 95 % "
        "bootstrap interval over networks; {dtype}, seed {seed}"
    ).format(gains=", ".join(map(str, GAINS)), **frame.iloc[0])
    caption(figure, "Decay of dL/dh_t in driven random networks against mean field", setting)
    return figure


study = Study("mean_field", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
