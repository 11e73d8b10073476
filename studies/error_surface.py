"""Why does a recurrent network's error have walls, and what does clipping do at one?

Pascanu, Mikolov & Bengio (2013), Fig. 6: one sigmoid unit without input, x_t = w σ(x_{t−1}) + b from x_0 = 0.5 over 50
steps, and the error (σ(x_50) − 0.7)². With h_t = σ(x_t) that is the cell `rnn_sigmoid` from h_0 = σ(0.5). A network of
n units with a diagonal W_hh is n such networks, and its BPTT the gradient of each. What to look for:

- for w > 1/σ'(0.5) ≈ 4.26 the unit can have two stable states, and the wall (dotted) is where h_0 lies on their border,
  b = 0.5 − w σ(0.5): on it x_t stays 0.5, every step multiplies dh by w σ'(0.5), and the gradient grows exponentially
  with the 50 steps, while two points away from it, it is small;
- so the largest gradient on any grid says little: the wall is thinner than the grid. It is measured on the wall itself
  and must lie on the closed form;
- the plain path slides to the wall and is thrown out of the picture by one step of a length that depends on the luck of
  where it landed; the clipped path, from the same start, bounces along the wall down to the valley;
- "solved" counts many starts: at each learning rate thresholds over a decade or two help;
  above it clipping never acts, below it the steps are too short for the number of them.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import expit

from rnnlab import Recurrent
from rnnlab.clipping import ByNorm
from rnnlab.params import Params
from rnnlab.plots import PALETTE, caption, panels, plane, relief, shares
from rnnlab.statistics import columns, wilson
from rnnlab.study import Study, records

Floats = NDArray[Any]

STEPS, START, TARGET = 50, float(expit(0.5)), 0.7
SLOPE = START * (1 - START)
#: Where paths begin, (w, b), and the ranges that are drawn and from which starts are drawn.
PATHS = ((6.0, -2.5), (5.5, -2.0))
WEIGHTS, BIASES = (3.0, 7.0), (-4.0, 0.0)
THRESHOLDS = (None, 100.0, 10.0, 1.0, 0.1, 0.01)


def surface(weight: Floats, bias: Floats, dtype: str) -> tuple[Floats, Floats, Floats]:
    """Return the error at points (w, b), arrays (n,), and its derivatives by w and b: one network of n lone units."""
    n = len(weight)
    net = Recurrent("rnn_sigmoid", 1, n, dtype=dtype)
    net.initialise("zeros", "zeros", "zeros")
    net.params["weight_hh_l0"] = np.diag(weight).astype(net.dtype)
    net.params["bias_hh_l0"] = np.asarray(bias, net.dtype)
    trace = net.forward(np.zeros((STEPS, 1, 1), net.dtype), np.full((1, 1, n), START, net.dtype))
    miss = trace.output[-1, 0] - net.dtype.type(TARGET)
    gradients = net.backward(trace, np.zeros_like(trace.output), (2 * miss)[None, None])
    return miss**2, np.diag(gradients.params["weight_hh_l0"]), gradients.params["bias_hh_l0"]


def wall(weight: Floats) -> tuple[Floats, Floats]:
    """Return the bias at which x_t = 0.5 for ever, and the gradient's norm there: dh_t = σ'(0.5) (h + w dh)."""
    growth = weight * SLOPE
    sums = SLOPE * (growth**STEPS - 1) / (growth - 1)
    return 0.5 - weight * START, 2 * abs(START - TARGET) * sums * np.hypot(START, 1)


def descend(
    weight: Floats, bias: Floats, learning_rate: float, threshold: float | None, steps: int, dtype: str
) -> pd.DataFrame:
    """Take steps of gradient descent from each start; one row a step and start, before the step is taken."""
    n, parts = len(weight), []
    gradient = Params({f"start {k}": (2,) for k in range(n)}, np.dtype(dtype))
    for step in range(steps + 1):
        loss, d_weight, d_bias = surface(weight, bias, dtype)
        gradient.flat[0::2], gradient.flat[1::2] = d_weight, d_bias
        clipped = gradient if threshold is None else ByNorm(threshold)(gradient).gradient
        moves = -learning_rate * clipped.flat.reshape(n, 2).T
        row = {"weight": weight, "bias": bias, "loss": loss, "step_length": np.hypot(*moves)}
        parts.append(pd.DataFrame({"step": step, "path": np.arange(n)} | row))
        weight, bias = weight + moves[0], bias + moves[1]
    return pd.concat(parts, ignore_index=True)


def ground(size: int, dtype: str) -> pd.DataFrame:
    """Return the surface over the rectangle that is drawn, and the direction downhill, one network a row of it."""
    weight, parts = np.linspace(*WEIGHTS, size), []
    for bias in np.linspace(*BIASES, size):
        loss, d_weight, d_bias = surface(weight, np.full(size, bias), dtype)
        norm = np.hypot(d_weight, d_bias)
        heights = {"loss": loss, "loss_decades": np.log10(loss), "norm_decades": np.log10(norm)}
        downhill = {"down_weight": -d_weight / norm, "down_bias": -d_bias / norm}
        parts.append(pd.DataFrame({"weight": weight, "bias": bias} | heights | downhill))
    return pd.concat(parts, ignore_index=True)


def grid(quick: bool) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{"part": "surface", "size": 61 if quick else 161}, {"part": "wall", "size": 12}]
    points += [{"part": "path", "steps": 200, "learning_rate": 0.5, "threshold": top} for top in (None, 1.0)]
    starts: dict[str, Any] = {"part": "starts", "size": 64 if quick else 256, "steps": 200 if quick else 400}
    rates = (0.5,) if quick else (0.1, 0.5, 2.0)
    return points + [starts | {"learning_rate": rate, "threshold": top} for rate in rates for top in THRESHOLDS]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    part, dtype = point["part"], point["dtype"]
    if part == "surface":
        frame = ground(point["size"], dtype)
    elif part == "wall":
        weight = np.linspace(4.5, WEIGHTS[1], point["size"])
        bias, theory = wall(weight)
        _, d_weight, d_bias = surface(weight, bias, dtype)
        frame = pd.DataFrame({"weight": weight, "bias": bias, "norm": np.hypot(d_weight, d_bias), "theory": theory})
    else:
        how = point["learning_rate"], point["threshold"], point["steps"], dtype
        if part == "path":
            weight, bias = np.array(PATHS).T
            frame = descend(weight, bias, *how)
        else:
            rng, n = np.random.default_rng(point["seed"]), point["size"]
            paths = descend(rng.uniform(4.3, WEIGHTS[1], n), rng.uniform(BIASES[0], -1.0, n), *how)
            solved = paths["loss"][paths["step"] == point["steps"]] < 0.04**2
            frame = pd.DataFrame([columns("success", wilson(int(solved.sum()), n))])
    return records(frame)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 3, (18, 10))
    parts = {part: rows.dropna(axis="columns", how="all") for part, rows in frame.groupby("part", sort=False)}
    hills, edge, starts, paths = (parts[name] for name in ("surface", "wall", "starts", "path"))
    threshold = paths["threshold"].max()
    where = {"x": "weight", "y": "bias"}
    plane(axes[0], hills, **where, colour="loss_decades", label="log10 of the error")
    plane(axes[2], hills, **where, colour="norm_decades", label="log10 of the gradient's norm")
    solid = relief(axes[1], hills, **where, height="loss")
    some = [sorted(hills[name].unique())[5::10] for name in ("weight", "bias")]
    arrows = hills[hills["weight"].isin(some[0]) & hills["bias"].isin(some[1])]
    axes[0].quiver(*(arrows[name] for name in ("weight", "bias", "down_weight", "down_bias")), color="w", width=0.002)
    for (free, number), line in paths.groupby([paths["threshold"].isna(), "path"]):
        look: Any = {"color": PALETTE[3] if free else "k", "linewidth": 0.8, "marker": ".", "markersize": 3}
        name = None if number else "not clipped" if free else f"clipped at {threshold:g}"
        inside = line[line["weight"].between(*WEIGHTS) & line["bias"].between(*BIASES)]
        axes[0].plot(line["weight"], line["bias"], label=name, **look)
        if number == 0:
            solid.plot(inside["weight"], inside["bias"], inside["loss"], zorder=5, **look)
            axes[4].plot(line["step"], line["step_length"], label=name, **look)
    for ax in (axes[0], axes[2]):
        ax.plot(edge["weight"], edge["bias"], "w:", linewidth=1.5)
        ax.set(xlim=WEIGHTS, ylim=BIASES)
    axes[3].plot(edge["weight"], edge["theory"], "k-", linewidth=1, label="closed form")
    axes[3].plot(edge["weight"], edge["norm"], "o", color=PALETTE[0], label="measured")
    axes[3].set(xlabel="weight, on the wall", ylabel="gradient's norm", yscale="log")
    axes[4].set(xlabel="step of descent", ylabel="length of the step", yscale="log")
    shares(axes[5], starts, x="threshold", y="success", hue="learning_rate", order=sorted(set(starts["learning_rate"])))
    axes[5].set_ylabel("share of starts that come within 0.04 of the target")
    titles = "error, downhill direction and paths", "error", "gradient's norm", "on the wall", "what clipping does"
    for ax, title in zip((axes[0], solid, *axes[2:]), (*titles, "solved"), strict=True):
        ax.set_title(title)
    for ax in (axes[0], axes[3], axes[4]):
        ax.legend(fontsize=8)
    setting = (
        f"one sigmoid unit, T = {STEPS}, x₀ = 0.5, target {TARGET}; paths: learning rate "
        f"{paths['learning_rate'].iloc[0]:g}, {paths['steps'].iloc[0]:.0f} steps; solved: {starts['size'].iloc[0]:.0f} "
        f"random starts, {starts['steps'].iloc[0]:.0f} steps, 95 % Wilson intervals; {frame['dtype'].iloc[0]}, "
        f"seed {frame['seed'].iloc[0]}"
    )
    caption(figure, "The walls of a recurrent network's error, and clipping", setting)
    return figure


study = Study("error_surface", question=__doc__, grid=grid, run=run, plot=plot, devices=("cpu",))

if __name__ == "__main__":
    study.main()
