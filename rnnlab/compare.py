"""Our kernels against the peers: the same problems, checked, interleaved, as one tidy table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from .checks import check_choice
from .costs import Shape, arithmetic, memory, roofline_seconds, traffic
from .kernels import backend, threads
from .peers import PEERS, NotApplicable, Problem, prepare_rnnlab, tolerance, worst_error
from .plots import bars, caption, panels, roofline
from .timing import Seconds, bandwidth, cuda_clock, interleave, peak_flops, ratio, wall_clock

__all__ = ["SHAPE_SETS", "compare", "crossing", "draw", "fastest", "problems", "shapes", "table", "worst_ratio"]

_SMALL = [(100, 1, 32), (100, 1, 128), (100, 20, 50), (100, 32, 64), (100, 32, 128)]
_MEDIUM = [(100, 64, 256), (500, 16, 128), (512, 16, 256), (512, 16, 512), (512, 64, 512)]
_LARGE = [(512, 16, 1024), (512, 64, 1024), (50, 64, 2048)]

#: Steps, batch and hidden units (as many inputs) by the name of a set; reference is small, medium and large.
SHAPE_SETS = {"small": _SMALL, "medium": _MEDIUM, "large": _LARGE, "reference": _SMALL + _MEDIUM + _LARGE}

#: Baidu's DeepBench, training: cell and (steps, batch, hidden units).
DEEPBENCH = {
    "rnn_relu": [(50, batch, hidden) for hidden in (1760, 2048, 2560) for batch in (16, 32, 64, 128)],
    "lstm": [(25, batch, hidden) for hidden in (512, 1024, 2048, 4096) for batch in (16, 32, 64, 128)],
    "gru": [(steps, 32, hidden) for hidden in (1536, 2048, 2560, 2816) for steps in (187, 375, 750, 1500)],
}

#: The columns that name a problem.
_PROBLEM = ("cell", "steps", "batch", "input_size", "hidden_size", "scope", "dtype", "device", "threads")

#: Columns of what was timed.
_TIME, _RATIO = ("milliseconds", "low_milliseconds", "high_milliseconds"), ("ratio", "low_ratio", "high_ratio")
_MEASURED = (*_TIME, "peak_share", *_RATIO)

#: Visits among which the rounds of a problem are split, and the bytes that problems may hold between them.
VISITS, GROUP_BYTES = 8, 2**30

Row = dict[str, Any]


def shapes(names: Sequence[str], cells: Sequence[str]) -> list[Shape]:
    """Return the shapes of sets (reference, small, medium, large, deepbench) and of single shapes T,B,I,H.

    DeepBench names its own cells (an RNN with relu, LSTM, GRU): those of `cells` that it has, all where it has none.
    Raises ValueError for anything else.
    """
    found: dict[Shape, None] = {}
    for name in names:
        if name in SHAPE_SETS:
            found |= dict.fromkeys(Shape(cell, T, B, H, H) for cell in cells for T, B, H in SHAPE_SETS[name])
        elif name == "deepbench":
            named = [cell for cell in DEEPBENCH if cell in cells] or list(DEEPBENCH)
            found |= dict.fromkeys(Shape(cell, T, B, H, H) for cell in named for T, B, H in DEEPBENCH[cell])
        else:
            parts = name.split(",")
            if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
                raise ValueError(f"shapes must be {', '.join(SHAPE_SETS)}, deepbench or T,B,I,H, got {name!r}")
            T, B, inputs, H = map(int, parts)
            found |= dict.fromkeys(Shape(cell, T, B, inputs, H) for cell in cells)
    return list(found)


def problems(
    cells: Sequence[str],
    names: Sequence[str],
    devices: Sequence[str],
    dtypes: Sequence[str],
    scope: str,
) -> list[Problem]:
    """Return every combination, dtype by dtype and shape by shape; tf32, bf16 and fp16 on a GPU only.

    Raises ValueError where nothing is left.
    """
    found = [
        Problem(shape, scope, dtype, device)
        for dtype in dtypes
        for shape in shapes(names, cells)
        for device in devices
        if device == "cuda" or dtype in ("float32", "float64")
    ]
    if not found:
        raise ValueError(f"dtypes must hold float32 or float64 on the CPU, got {', '.join(dtypes)}")
    return found


def compare(
    todo: Sequence[Problem],
    peers: Sequence[str],
    *,
    seconds: float = 2.0,
    progress: Callable[..., Any] | None = None,
    keep: Callable[[pd.DataFrame], object] | None = None,
) -> pd.DataFrame:
    """Measure rnnlab and `peers` on every problem and return one row a problem and implementation.

    Every implementation is first checked against our float64 result; one that is wrong is not timed. `seconds` is the
    time of the interleaved rounds of one problem. A machine is slower for seconds at a time: the rounds are split into
    visits, between which the other problems have their turn. `progress` makes a tqdm-like bar; `keep` is given the
    table whenever there is more of it.

    Columns: the problem (cell, steps, batch, input_size, hidden_size, scope, dtype, device, threads); implementation;
    status ("ok", or why there is no time); error (relative, against float64) and tolerance; milliseconds with
    quartiles; ratio (its time / ours, median over visits of their medians' ratio) with quartiles; flops_per_byte,
    gflops_per_second and the peak and bandwidth of the device (of a CPU as measured); peak_share and roofline_share (of
    the bound max(FLOPs / peak, bytes / bandwidth)).

    Raises ValueError for an unknown peer, DeviceNotAvailable without the device.
    """
    for name in peers:
        check_choice("peers", name, PEERS)
    limits: dict[tuple[str, str], tuple[float, float]] = {}
    rows: list[Row] = []
    frame = pd.DataFrame()
    with (progress or partial(tqdm, disable=True))(total=len(todo)) as bar:
        for group in _groups(todo):
            for key in dict.fromkeys((problem.device, problem.dtype) for problem in group):
                if key not in limits:
                    limits[key] = _limits(*key)
            checked = [_check(problem, peers) for problem in group]
            times: list[dict[str, list[Seconds]]] = [{name: [] for name in runs} for runs, _, _ in checked]
            for visit in range(VISITS):
                for problem, (runs, _, _), visits in zip(group, checked, times, strict=True):
                    clock = cuda_clock if problem.device == "cuda" else wall_clock
                    turned = runs if visit % 2 == 0 else dict(reversed(runs.items()))  # a visit may be a single round
                    now = interleave(turned, seconds=seconds / VISITS, rounds=(1, 200), clock=clock)
                    for name, spent in now.items():
                        visits[name].append(spent)
                    bar.update(visit == VISITS - 1)
            for problem, (_, status, errors), visits in zip(group, checked, times, strict=True):
                rows += _rows(problem, status, errors, visits, limits[problem.device, problem.dtype])
            frame = pd.DataFrame(rows)
            frame = frame.reindex(columns=frame.columns.union(list(_MEASURED), sort=False))  # where nothing was timed
            if keep is not None:
                keep(frame)
    return frame


def _limits(device: str, dtype: str) -> tuple[float, float]:
    """Return FLOP/s and bytes/s: measured on the CPU, on a GPU what it is built for."""
    if device == "cuda":
        built_for: tuple[float, float] = backend("cuda").limits(dtype)
        return built_for
    return peak_flops(dtype, threads()), bandwidth(threads())


def _groups(todo: Sequence[Problem]) -> Iterator[list[Problem]]:
    """Cut the problems into groups of one dtype, which PyTorch sets for all, that fit into memory together."""
    group: list[Problem] = []
    held = 0
    for problem in todo:
        size = memory(problem.shape, problem.storage).total
        if group and (held + size > GROUP_BYTES or problem.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(problem)
        held += size
    if group:
        yield group


def _check(
    problem: Problem, peers: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str], dict[str, float]]:
    """Return what can be timed, the status of every implementation, and the error of each that ran."""
    reference = prepare_rnnlab(replace(problem, dtype="float64", device="cpu")).result()
    runs: dict[str, Callable[[], Any]] = {}
    status: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name in ("rnnlab", *peers):
        peer = PEERS.get(name)
        if peer is not None and (problem.device not in peer.devices or peer.missing()):
            status[name] = peer.missing() or f"runs on {', '.join(peer.devices)}"
            continue
        try:
            run = (peer.prepare if peer else prepare_rnnlab)(problem)
            errors[name] = worst_error(run.result(), reference)
        except NotApplicable as reason:
            status[name] = str(reason)
            continue
        status[name] = "ok" if errors[name] <= tolerance(problem) else "wrong"
        if status[name] == "ok":
            runs[name] = run.call
    return runs, status, errors


def _rows(
    problem: Problem,
    status: dict[str, str],
    errors: dict[str, float],
    times: dict[str, list[Seconds]],
    limits: tuple[float, float],
) -> Iterator[Row]:
    shape, counted = problem.shape, "forward" if problem.scope == "forward" else "training"
    flops, moved = arithmetic(shape, counted), traffic(shape, counted, problem.storage)
    for name in status:
        sizes = shape.cell, shape.steps, shape.batch, shape.input_size, shape.hidden_size
        setting = *sizes, problem.scope, problem.dtype, problem.device, threads()
        row: Row = dict(zip(_PROBLEM, setting, strict=True))
        row |= {"implementation": name, "status": status[name]}
        row |= {"error": errors.get(name), "tolerance": tolerance(problem)}
        if name in times:
            spent = pd.Series(np.concatenate(times[name])).quantile([0.5, 0.25, 0.75]).tolist()
            row |= dict(zip(_TIME, (1e3 * s for s in spent), strict=True))
            row |= {
                "flops_per_byte": flops / moved,
                "gflops_per_second": flops / spent[0] * 1e-9,
                "peak_gflops_per_second": limits[0] * 1e-9,
                "bandwidth_gbytes_per_second": limits[1] * 1e-9,
                "peak_share": flops / spent[0] / limits[0],
                "roofline_share": roofline_seconds(flops, moved, *limits) / spent[0],
            }
        if name in times and "rnnlab" in times:
            paired = ratio(*(np.array([np.median(spent) for spent in times[who]]) for who in ("rnnlab", name)))
            row |= dict(zip(_RATIO, paired, strict=True))
        yield row


def fastest(frame: pd.DataFrame) -> pd.DataFrame:
    """Return our row of every problem with the fastest peer's name and ratio: peer, ratio, low_ratio, high_ratio.

    Problems without any timed peer have NaN there.
    """
    key = list(_PROBLEM)
    ours = frame[frame["implementation"] == "rnnlab"].drop(columns=list(_RATIO))
    others = frame[(frame["implementation"] != "rnnlab") & frame["ratio"].notna()]
    best = others.sort_values("ratio").drop_duplicates(key)[[*key, "implementation", *_RATIO]]
    return ours.merge(best.rename(columns={"implementation": "peer"}), on=key, how="left")


def crossing(sizes: Iterable[float], first: Iterable[float], second: Iterable[float]) -> tuple[float, float]:
    """Return where the curve of times `second` falls below `first` for good, as (size, time); NaN where it never does.

    Between two sizes both curves are taken as power laws, straight lines on logarithmic axes; (the smallest size, its
    time) where `second` is below from the start.
    """
    size, a, b = (np.log(np.fromiter(values, np.float64)) for values in (sizes, first, second))
    above = np.flatnonzero(b >= a)
    if above.size == 0:
        return float(np.exp(size[0])), float(np.exp(b[0]))
    k = int(above[-1])
    if k == size.size - 1:
        return float("nan"), float("nan")
    share = (b[k] - a[k]) / ((b[k] - a[k]) + (a[k + 1] - b[k + 1]))
    return float(np.exp(size[k] + share * (size[k + 1] - size[k]))), float(np.exp(a[k] + share * (a[k + 1] - a[k])))


def worst_ratio(frame: pd.DataFrame) -> float:
    """Return the smallest ratio of the fastest peer's time to ours; 0 where ours is wrong, NaN without a timed peer."""
    if (frame.loc[frame["implementation"] == "rnnlab", "status"] == "wrong").any():
        return 0.0
    return float(fastest(frame)["ratio"].min())


def table(frame: pd.DataFrame) -> str:
    """Return the comparison for a terminal: a line a problem; times in ms, the ratio with its quartiles."""
    shown = frame.assign(
        time=frame["milliseconds"].map("{:.3f}".format).where(frame["status"] == "ok", frame["status"].str[:9])
    )
    times = shown.pivot(index=list(_PROBLEM), columns="implementation", values="time").add_suffix(" ms")
    best = fastest(frame).set_index(list(_PROBLEM))
    lines = times[[f"{name} ms" for name in dict.fromkeys(frame["implementation"])]].loc[best.index]
    spread = zip(best["ratio"], best["low_ratio"], best["high_ratio"], strict=True)
    lines["fastest peer"] = best["peer"].fillna("-")
    lines["ratio"] = [
        "-" if np.isnan(middle) else f"{middle:.2f} ({low:.2f}–{high:.2f})" for middle, low, high in spread
    ]
    lines["of peak"] = best["peak_share"].map("{:.0%}".format)
    short = {"steps": "T", "batch": "B", "input_size": "I", "hidden_size": "H"}
    return lines.reset_index().rename(columns=short).to_string(index=False)


def draw(frame: pd.DataFrame) -> Figure:
    """Return the figure: bars of each peer's ratio to us, and every implementation under the machine's roofline."""
    label = [f"{cell} {T},{B},{I},{H}" for cell, T, B, I, H in frame[list(_PROBLEM[:5])].itertuples(index=False)]
    frame = frame.assign(problem=label, arithmetic=frame["device"] + " " + frame["dtype"])[frame["status"] == "ok"]
    if frame["arithmetic"].nunique() > 1:
        frame["problem"] += " " + frame["arithmetic"]
    figure, axes = panels(1, 2, (15, 2 + 0.28 * frame["problem"].nunique()))
    bars(axes[0], frame[frame["implementation"] != "rnnlab"], y="problem", x="ratio", hue="implementation", unit=1.0)
    axes[0].set(xlabel="peer's time / ours (above 1 we are faster)", ylabel="cell T,B,I,H", xscale="log")
    roofline(axes[1], frame, hue="implementation", device="arithmetic")
    kinds = "; ".join(frame["arithmetic"].unique())
    text = "{scope}; {kinds}; {threads} threads; medians of interleaved rounds".format(**frame.iloc[0], kinds=kinds)
    caption(figure, "rnnlab beside its peers", text)
    return figure
