"""When does a GPU begin to pay for a recurrent network, and how far is either device from what it could do?

A recurrent network is a chain of small products: step t waits for step t − 1. Each curve is the time of one step
against the hidden size, the batch or the number of steps, everything else fixed; both axes are logarithmic. What to
look for:

- where a curve is flat, the device is waiting (for launches, barriers, memory latency) and more work costs nothing;
- where it rises with the work it has, the device is busy: quadratically in the hidden size, linearly in the batch;
- where the curves of two devices cross, the GPU begins to pay: such crossings are rows of the table and stars here;
- against the number of steps the time of a step must be constant: what is left is the cost of a call;
- the roofline says what is possible: the product's FLOPs at the measured peak, the bytes that must move at the measured
  bandwidth. Points below it are bound by something else, which is what a kernel's author wants to know.

Both devices are measured, each with inputs and results in its own memory; without a GPU the figure shows the CPU alone.
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from rnnlab.compare import compare, crossing
from rnnlab.costs import SCOPES, Shape
from rnnlab.kernels import available
from rnnlab.peers import Problem
from rnnlab.plots import caption, curves, panels, roofline
from rnnlab.study import Study, records

CELLS = ("rnn_tanh", "lstm", "gru")
BASE = {"steps": 100, "batch": 32, "hidden_size": 128}
SWEEPS = {
    "hidden_size": [16, 32, 64, 128, 256, 512, 1024],
    "batch": [1, 2, 4, 8, 16, 32, 64, 128, 256],
    "steps": [1, 10, 100, 1000],
}


def grid(quick: bool) -> list[dict[str, Any]]:
    seconds = 0.2 if quick else 1.0
    return [
        {"cell": cell, "sweep": sweep, "sizes": sizes[:5] if quick else sizes, "scope": scope, "seconds": seconds}
        for cell in CELLS
        for sweep, sizes in SWEEPS.items()
        for scope in SCOPES
    ]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    problems = []
    for size in point["sizes"]:
        sized = BASE | {point["sweep"]: size}
        shape = Shape(point["cell"], sized["steps"], sized["batch"], sized["hidden_size"], sized["hidden_size"])
        problems += [
            Problem(shape, point["scope"], point["dtype"], device, point["seed"])
            for device in ("cpu", "cuda")
            if available(device) is None
        ]
    frame = compare(problems, (), seconds=point["seconds"])
    frame["size"] = frame[point["sweep"]]
    frame["kind"] = "time"
    for name in ("", "low_", "high_"):
        frame[f"{name}step_microseconds"] = 1e3 * frame[f"{name}milliseconds"] / frame["steps"]
    wanted = ["kind", "size", "step_microseconds", "low_step_microseconds", "high_step_microseconds", "flops_per_byte"]
    wanted += ["gflops_per_second", "peak_gflops_per_second", "bandwidth_gbytes_per_second", "roofline_share"]
    rows = records(frame.rename(columns={"device": "measured_on"})[["measured_on", *wanted]])
    times = frame.pivot(index="size", columns="device", values="step_microseconds")
    if "cuda" in times:
        size, step = crossing(times.index, times["cpu"], times["cuda"])
        rows.append({"measured_on": "both", "kind": "crossing", "size": size, "step_microseconds": step})
    return rows


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 4, (19, 9))
    times, crossings = frame[frame["kind"] == "time"], frame[frame["kind"] == "crossing"]
    for row, scope in enumerate(SCOPES):
        for column, sweep in enumerate(SWEEPS):
            ax = axes[4 * row + column]
            here = (times["scope"] == scope) & (times["sweep"] == sweep)
            curves(ax, times[here], x="size", y="step_microseconds", hue="cell", style="measured_on")
            stars = crossings[(crossings["scope"] == scope) & (crossings["sweep"] == sweep)]
            ax.plot(stars["size"], stars["step_microseconds"], "k*", markersize=10)
            ax.set(xlabel=sweep.replace("_", " "), ylabel="time of a step [µs]", title=scope)
        roofline(axes[4 * row + 3], times[times["scope"] == scope], hue="measured_on", device="measured_on")
    devices = "CPU and GPU" if "cuda" in set(times["measured_on"]) else "no GPU on this machine: the CPU alone"
    fixed = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in BASE.items())
    text = f"{devices}; where not swept: {fixed}, as many inputs; {frame['dtype'].iloc[0]}; medians, bands: quartiles"
    caption(figure, "Time of one step on each device", text)
    return figure


study = Study("cpu_vs_gpu", question=__doc__, grid=grid, run=run, plot=plot, timed=True)

if __name__ == "__main__":
    study.main()
