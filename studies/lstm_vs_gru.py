"""LSTM or GRU? Which cell gets furthest on real tasks at equal units, at equal parameters and in equal time?

Ten tasks on real data and two synthetic ones, five cells, Adam and clipping by global norm, a few hundred updates
(1,200 where memory is longest): what a cell learns early, not where it ends. Three contests: equal units (as many as
the LSTM; the GRU then has three quarters of its parameters), equal parameters (other cells get more units until they
have as many numbers as the LSTM, or next below), and equal time (networks of equal parameters take as many updates as
fit into the seconds that the LSTM needs for its own; seconds an update are measured in turns with the LSTM's). Every
cell tries the same learning rates with one spare network, and trains all others at the one that was best in validation
at the LSTM's number of updates; what counts is the test part, at the best of nine validations, before training and
after each eighth of the budget.

Skill is the share of the error of a prediction without learning that a network removes: 0 is no better, 1 perfect (of
accuracies the error is the share of wrong answers, of symbols bits, of forecasts the squared error). What to look for:

- the first panel and the table: GRU less LSTM, paired network by network (the same batches), with the interval of t
  over networks; one that holds 0 is no difference. Greff et al. (2017) found none of eight variants better than the
  LSTM;
- all begin with PyTorch's weights, in which the LSTM's forget gate lets go within two steps. A forget bias of 1 closes
  much of its distance to the GRU (Jozefowicz, Zaremba & Sutskever 2015): it is a choice, and none is made here. Adding
  at T = 600 is where Bai, Kolter & Koltun (2018, Table 1) found a GRU at 5e-5 and an LSTM at the baseline;
- a network that is best at equal units may lose at equal parameters: count, and then time, before you choose;
- quality against cost: up and to the left is better; a cell above another at the same cost dominates it;
- the horizon is the lag from which on all lags together hold under 1 % of the summed norms of dL/dh in the trained
  network, here in lengths of the task's sequences (1: there is none): a long one is no promise of skill;
- PyTorch beside ours: networks of the same size, learning rate, batches and number of updates, from weights of its own.
  They differ as two sets of our own networks do; that both take the same steps is for a test to show.
"""

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnnlab.contests import (
    THRESHOLD,
    averages,
    beside_torch,
    budgets_of,
    evidence,
    learn,
    price,
    search,
    setting_of,
    skills,
    verdicts,
)
from rnnlab.costs import largest
from rnnlab.peers import PEERS
from rnnlab.plots import PALETTE, banded_lines, bars, caption, intervals, panels, text_table
from rnnlab.study import Study

CELLS = ("rnn_tanh", "lstm", "lstm_coupled", "gru", "gru_reset_before")
CONTESTS = {"units": "equal units", "parameters": "equal parameters", "time": "equal time"}
RATES = [0.003, 0.01, 0.03, 0.1]
#: Cells that are trained with PyTorch too.
PEER = ("lstm", "gru")
#: Hidden units of the LSTM and its updates.
SIZES = {
    "character_model": (64, 400),
    "sentiment": (64, 400),
    "translation": (64, 400),
    "weather": (32, 400),
    "stocks": (32, 400),
    "speech": (64, 400),
    "music": (32, 320),
    "captions": (64, 400),
    "moving_images": (64, 320),
    "pixel_digits": (64, 800),
    "temporal_order": (64, 400),
    "adding": (64, 1200),
}
#: Lengths of synthetic tasks, and in quick runs.
LENGTHS = {"temporal_order": (50, 10), "adding": (600, 50)}
#: Cells in the contest at T = 600, where an update takes longest.
BAI = ("rnn_tanh", "lstm", "gru")


def grid(quick: bool) -> list[dict[str, Any]]:
    points = []
    for task, (hidden, updates) in SIZES.items():
        length = LENGTHS[task][quick] if task in LENGTHS else None
        size = {"runs": 2, "updates": 64, "rates": [0.01]} if quick else {"runs": 5, "updates": updates, "rates": RATES}
        kinds = [("parameters", cell) for cell in (BAI if task == "adding" else CELLS)]
        kinds += [("units", cell) for cell in CELLS if cell != "lstm" and task != "adding"]  # the LSTM's are the same
        for sizes, cell in kinds:
            point = {"task": task, "cell": cell, "sizes": sizes, "hidden": hidden, "length": length, "batch": 32}
            points.append(point | size)
    return points


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    setting, updates, hidden = setting_of(point), point["updates"], point["hidden"]
    if point["sizes"] == "parameters":
        hidden = largest(partial(setting.parameters, point["cell"]), setting.parameters("lstm", hidden))
    costs = price(setting, point, hidden)
    budgets = budgets_of(point, costs["update_ratio"])
    *seeds, spare = (1000 * point["seed"] + k for k in range(point["runs"] + 1))
    tried = search(setting, point, hidden, updates, spare)  # by a network that is none of those that count
    best = max(tried, key=lambda rate: tried[rate])
    networks = [learn(setting, point, hidden, budgets, best, seed) for seed in seeds]
    rows = [{"kind": "search", "learning_rate": rate, "skill": value} for rate, value in tried.items()]
    rows.append({"kind": "cost", "learning_rate": best, "updates_in_time": budgets.get("time"), **costs})
    for k, network in enumerate(networks):
        rows += [{"kind": "run", "contest": contest, "network": k, **network.tests[contest]} for contest in budgets]
    curves = pd.DataFrame([pair for network in networks for pair in network.curve], columns=["update", "skill"])
    for update, values in curves.groupby("update")["skill"]:
        spread = {"skill": values.median(), "low_skill": values.min(), "high_skill": values.max()}
        seconds = update * costs["update_milliseconds"] / 1e3
        rows.append({"kind": "curve", "update": update, "seconds": seconds, **spread})
    if (
        point["sizes"] == "parameters"
        and point["cell"] in PEER
        and point["task"] != "adding"
        and not PEERS["torch"].missing()
    ):
        rows += beside_torch(setting, point, hidden, best, seeds)
    return rows


def tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    both, names = beside(frame)
    values = {"values": skills(both, ["task", "cell"], names, "value")} if len(both) else {}
    return {"verdicts": verdicts(frame), "evidence": evidence(frame), **values}


def beside(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pd.Series]]:
    """Return our networks and PyTorch's of the same kind and size, and which are whose."""
    ours, theirs = (frame["kind"] == "run") & (frame["contest"] == "parameters"), frame["kind"] == "torch"
    pairs = frame.loc[theirs, ["task", "cell"]].drop_duplicates()
    both = frame[ours | theirs].merge(pairs)
    return both, {"rnnlab": both["kind"] == "run", "PyTorch": both["kind"] == "torch"}


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(3, 4, (25, 18))
    runs, mean = frame[(frame["kind"] == "run") & (frame["contest"] == "parameters")], averages(frame)
    draw_verdicts(axes[0], axes[11], verdicts(frame))
    intervals(
        axes[1], skills(runs, ["task"], {cell: runs["cell"] == cell for cell in CELLS}), rows=("task",), values=CELLS
    )
    axes[1].set(title="every cell at equal parameters", xlabel="skill: share of the baseline's error removed")
    curves = frame[(frame["kind"] == "curve") & (frame["sizes"] == "parameters")]
    band: dict[str, Any] = {"y": "skill", "low": "low_skill", "high": "high_skill", "title": "cell, task"}
    for row, task in ((0, "character_model"), (1, "adding")):
        for column, x in ((2, "update"), (3, "seconds")):
            ax, part = axes[4 * row + column], curves[curves["task"] == task]
            banded_lines(ax, part, x=x, hue="cell", hue_order=CELLS, style="task", dashes={task: "-"}, **band)
            label = "updates" if x == "update" else "training time [s]"
            ax.set(title=f"{task}, equal parameters", xlabel=label, ylabel="skill in validation")
            ax.set_ylim(-0.1, max(0.1, 1.1 * part["high_skill"].max()))
    draw_costs(axes[4], axes[5], axes[8], mean)
    for colour, cell in zip(PALETTE, CELLS, strict=False):
        part = runs[runs["cell"] == cell]
        axes[9].plot(part["horizon_in_lengths"], part["skill"], "o", color=colour, alpha=0.6, markersize=4, label=cell)
    axes[9].set(
        xlabel="horizon of dL/dh [lengths of a sequence]", ylabel="skill", title="trained networks of all tasks"
    )
    axes[9].legend(fontsize=8)
    both, names = beside(frame)
    if both.empty:
        axes[10].set_title("PyTorch is not installed: nothing to compare with")
    else:
        intervals(axes[10], skills(both, ["task", "cell"], names), rows=("task", "cell"), values=tuple(names))
        axes[10].set(title="the same networks in PyTorch", xlabel="skill")
    text = (
        "Adam, clipping at {top:g}, batches of {batch}; learning rates {rates}, for each cell the best in validation; "
        "{runs} networks a point; 95 % t intervals over networks, bands: all networks; {dtype}, seed {seed}"
    ).format(top=THRESHOLD, **frame.iloc[0])
    caption(figure, "LSTM or GRU?", text)
    return figure


def draw_verdicts(ax: Axes, table: Axes, said: pd.DataFrame) -> None:
    tasks, name = list(said["task"].unique()), "gru_less_lstm"
    ends = [f"{end}{name}" for end in ("", "low_", "high_")]
    wide = said.pivot(index="task", columns="contest", values=ends).loc[tasks]
    by = said["winner"] + " by " + said[name].abs().map("{:.3f}".format)
    cells = said.assign(text=said["winner"].where(said["winner"] == "no difference", by))
    wide.columns = pd.Index([f"{key[0].removesuffix(name)}{CONTESTS[key[1]]}" for key in wide.columns])
    intervals(ax, wide.reset_index(), rows=("task",), values=tuple(CONTESTS.values()))
    ax.axvline(0, color="k", linewidth=1)
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set(title="GRU against LSTM", xlabel="skill of the GRU less the LSTM's (linear within ±0.1)")
    cells = cells.pivot(index="task", columns="contest", values="text").loc[tasks, list(CONTESTS)].fillna("not tried")
    text_table(table, "who wins, and by how much skill", cells.to_numpy().tolist(), tasks, list(CONTESTS.values()))


def draw_costs(time: Axes, size: Axes, ax: Axes, mean: pd.DataFrame) -> None:
    for pareto, name, label in ((time, "update", "time of an update"), (size, "parameters", "parameters")):
        for colour, cell in zip(PALETTE, CELLS, strict=False):
            for mark, contest in zip("os", ("parameters", "units"), strict=True):
                part = mean[(mean["cell"] == cell) & (mean["contest"] == contest)]
                style: dict[str, Any] = {"color": colour, "label": f"{cell}, {CONTESTS[contest]}"}
                pareto.plot(part[f"{name}_ratio"], part["skill"], mark, **style)
        pareto.set(xlabel=f"{label} / the LSTM's", ylabel="mean skill over tasks", title=f"quality against {label}")
        pareto.legend(fontsize=8)
    kinds = {"latency_ratio": "latency of one", "batch_of_64_ratio": "time of 64", "update_ratio": "time of an update"}
    kinds |= {"bytes_ratio": "memory of training", "parameters_ratio": "parameters"}
    costs = mean[mean["contest"] == "parameters"].melt("cell", list(kinds), "cost", "ratio").replace({"cost": kinds})
    bars(ax, costs, y="cost", x="ratio", hue="cell", unit=1)
    ax.set(title="costs at equal parameters", xlabel="ratio to the LSTM's, geometric mean over tasks", ylabel="")
    ax.set_xlim(0, 2)


study = Study(
    "lstm_vs_gru",
    question=__doc__,
    grid=grid,
    run=run,
    plot=plot,
    devices=("cpu",),
    parallel=True,
    tables=tables,
    timed=True,
)

if __name__ == "__main__":
    study.main()
