"""What does a gate cost? Parameters, FLOPs, memory and time of every cell, beside the LSTM's.

A GRU has three gate blocks where an LSTM has four: three quarters of its parameters and of its FLOPs, always. Whether
it takes three quarters of the time is measured here. All cells run in turns at each size, and a ratio pairs a cell with
the LSTM of the same turn; forward is inference, training is forward and BPTT with all gradients. What to look for:

- the upper panels are times: of a step over hidden size and length, of a sequence over the batch;
- below 1 a cell is faster than the LSTM of the same shape; the dashed line is 3/4, the ratio of the gate blocks;
- where the products of W with x and h take most of the time, ratios are those of the FLOPs: large hidden sizes and
  batches. Where a step is short, what is left shows: the elementwise functions of a unit, calls and packing;
- the GRU that resets before the product has a second, dependent product in every step: as many FLOPs, but more waiting;
- against the length every ratio is flat, for a step costs the same at any place: what bends is the cost of a call;
- memory is that of the parameters with their gradients and of what BPTT keeps of each step: six numbers a unit for the
  GRU and eight for the LSTM, three quarters again; one more where the GRU resets before the product.

All devices of the machine are measured. Ratios are to the LSTM with the same hidden size: at equal parameters a GRU has
more units, and this advantage is gone.
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from rnnlab.cells import CELLS
from rnnlab.costs import SCOPES, Shape, arithmetic, memory, parameters
from rnnlab.kernels import available
from rnnlab.peers import Problem, prepare_rnnlab
from rnnlab.plots import bars, caption, curves, panels
from rnnlab.study import Study
from rnnlab.timing import cuda_clock, interleave, ratio, wall_clock

BASE = {"steps": 100, "batch": 32, "hidden_size": 128}
INPUTS = 32
SWEEPS = {
    "hidden_size": [16, 32, 64, 128, 256, 512, 1024],
    "batch": [1, 2, 4, 8, 16, 32, 64, 128],
    "steps": [10, 30, 100, 300, 1000],
}
COUNTS = {"parameters": "parameters", "flops": "FLOPs of training", "bytes": "memory of training"}


def grid(quick: bool) -> list[dict[str, Any]]:
    return [
        {"sweep": sweep, "scope": scope, **BASE, sweep: size, "seconds": 0.5 if quick else 6.0}
        for sweep, sizes in SWEEPS.items()
        for size in (sizes[1:-1:2] if quick else sizes)
        for scope in SCOPES
    ]


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = (point["steps"], point["batch"], INPUTS, point["hidden_size"])
    shapes = {cell: Shape(cell, *sizes) for cell in CELLS}
    rows = []
    for device in filter(lambda device: available(device) is None, ("cpu", "cuda")):
        problems = {
            cell: Problem(shape, point["scope"], point["dtype"], device, point["seed"])
            for cell, shape in shapes.items()
        }
        calls = {cell: prepare_rnnlab(problem).call for cell, problem in problems.items()}
        clock = cuda_clock if device == "cuda" else wall_clock
        times = interleave(calls, seconds=point["seconds"], rounds=(3, 200), pause=0, clock=clock)
        rows += [
            {"measured_on": device, "cell": cell, **measures(times[cell], times["lstm"], shapes[cell], point["dtype"])}
            for cell in CELLS
        ]
    return rows


def measures(times: Any, lstm_times: Any, shape: Shape, dtype: str) -> dict[str, float]:
    """Return what a cell costs and its ratio to the LSTM, each with its quartiles where it was measured."""
    lstm = Shape("lstm", shape.steps, shape.batch, shape.input_size, shape.hidden_size)
    paired, own = ratio(lstm_times, times), pd.Series(times).quantile([0.25, 0.5, 0.75]) * 1e6
    found = {"ratio": paired.median, "low_ratio": paired.low, "high_ratio": paired.high}
    for name, quantile in zip(("low_", "", "high_"), own, strict=True):
        found[f"{name}step_microseconds"] = quantile / shape.steps
        found[f"{name}sequence_microseconds"] = quantile / shape.batch
    for name in COUNTS:
        found |= {
            name: count(name, shape, dtype),
            f"{name}_ratio": count(name, shape, dtype) / count(name, lstm, dtype),
        }
    return found


def count(name: str, shape: Shape, dtype: str) -> int:
    if name == "bytes":
        return memory(shape, dtype).total
    return parameters(shape) if name == "parameters" else arithmetic(shape)


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(3, 4, (19, 13))
    base = frame[(frame[list(BASE)] == pd.Series(BASE)).all(axis=1)].drop_duplicates("cell")
    for column, sweep in enumerate(SWEEPS):
        part = frame[frame["sweep"] == sweep]
        unit = "sequence" if sweep == "batch" else "step"
        views = [("training", f"{unit}_microseconds"), ("forward", "ratio"), ("training", "ratio")]
        for row, (scope, y) in enumerate(views):
            ax = axes[4 * row + column]
            curves(ax, part[part["scope"] == scope], x=sweep, y=y, hue="cell", style="measured_on")
            label = "time / LSTM's time" if row else f"time of a {unit} [µs]"
            ax.set(xlabel=sweep.replace("_", " "), ylabel=label, title=scope)
            if row:
                ax.set(yscale="linear", ylim=(0, None))
                ax.axhline(0.75, color="k", linestyle="--", linewidth=1)
            if (legend := ax.get_legend()) and (row or column):
                legend.remove()
    for row, (name, title) in enumerate(COUNTS.items()):
        ax = axes[4 * row + 3]
        bars(ax, base, y="cell", x=f"{name}_ratio", hue="cell", unit=0.75)
        ax.set(xlabel="ratio to the LSTM's", ylabel="", title=title)
    fixed = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in BASE.items())
    devices, (dtype, seed) = " and ".join(sorted(set(frame["measured_on"]))), frame[["dtype", "seed"]].iloc[0]
    text = (
        f"{devices}; where not swept: {fixed}; {INPUTS} inputs; {dtype}; medians, bands: quartiles; lines at 3/4, the "
        f"GRU's gates; seed {seed}"
    )
    caption(figure, "What a gate costs, beside the LSTM", text)
    return figure


study = Study("tradeoffs", question=__doc__, grid=grid, run=run, plot=plot, timed=True)

if __name__ == "__main__":
    study.main()
