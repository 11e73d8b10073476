"""What does each clipping rule do to a gradient, and at which learning rates does it help?

A tanh network learns the order of two symbols (temporal order, four classes); when it finds them its gradient grows by
orders of magnitude. Every rule is swept over thresholds and learning rates, for SGD and for Adam. What to look for:

- solved: a rule that shortens every gradient is a smaller learning rate, so compare a rule at its best learning rate
  with no clipping at *its* best (with SGD there is none over three decades), and read diagonals (threshold times
  learning rate), not rows. Under Adam a constant factor cancels: rules for the whole gradient change nothing at the
  learning rate that works, and save some networks at ten times that. A network that diverges has not solved the task;
- turned: by global norm the cosine is 1 for each batch. But descent follows the mean over batches, and a rule that
  shortens long gradients more than short ones turns that mean too (bias), if little; rules within BPTT turn it most;
- norms: the median before and after, on the same batches of the same half-trained networks: apart where a rule clips;
- what is removed of the energy of each lag's share of dL/dW_ih and dL/db_ih: rules for the whole gradient take nearly
  the same from every lag; per time step and at pre-activations they take what grew on its way back, and more of it the
  longer the lag.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rnnlab import Recurrent, SequenceModel
from rnnlab import clipping as rules
from rnnlab.optim import SGD, Adam
from rnnlab.plots import PALETTE, caption, intervals, panels, tiles
from rnnlab.statistics import bootstrap, columns, wilson
from rnnlab.study import Study, side_by_side
from rnnlab.tasks import TASKS, sample_task
from rnnlab.training import train, until_solved

#: Each rule and its thresholds, from one that acts often to one that seldom does.
RULES: dict[str, tuple[type[rules.ClippingRule], tuple[float, ...]]] = {
    "global norm": (rules.ByGlobalNorm, (0.1, 1.0, 10.0)),
    "norm of tensors": (rules.ByNorm, (0.1, 1.0, 10.0)),
    "value": (rules.ByValue, (0.01, 0.1, 1.0)),
    "adaptive": (rules.Adaptive, (0.01, 0.1, 1.0)),
    "percentile": (rules.ByPercentile, (10.0, 50.0, 90.0)),
    "time step": (rules.PerTimeStep, (0.001, 0.01, 0.1)),
    "pre-activations": (rules.AtPreActivations, (0.0001, 0.001, 0.01)),
}
OPTIMISERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "SGD": (SGD, (0.003, 0.03, 0.3, 3.0)),
    "Adam": (Adam, (0.001, 0.01, 0.1)),
}
TASK, HIDDEN, BATCH = TASKS["temporal_order"], 50, 20


def grid(quick: bool) -> list[dict[str, Any]]:
    size: dict[str, Any] = {"length": 10, "runs": 3} if quick else {"length": 30, "runs": 5}
    ways = [("none", None), *((name, top) for name, (_, tops) in RULES.items() for top in tops)]
    sweep: list[dict[str, Any]] = [
        {"part": "solved", "optimiser": name, "learning_rate": rate, "rule": rule, "threshold": top}
        for name, (_, rates) in OPTIMISERS.items()
        for rate in (rates[-2:-1] if quick else rates)
        for rule, top in (ways[::3] if quick else ways)
    ]
    points = [point | {"updates": 300 if quick else 3_000} for point in sweep]
    return [point | size for point in [*points, {"part": "effect", "batches": 5 if quick else 30}]]


def network(point: dict[str, Any], seed: int) -> SequenceModel:
    net = Recurrent("rnn_tanh", TASK.input_size, HIDDEN, dtype=point["dtype"])
    net.initialise("gaussian", "glorot", "zeros", gain=0.7, seed=seed)
    return SequenceModel(net, TASK.output_size, seed=seed)


def learn(point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one network until it solves the task or the updates are spent, and return what became of it."""
    model, length, rule = network(point, seed), point["length"], point["rule"]

    optimiser = OPTIMISERS[point["optimiser"]][0](point["learning_rate"])
    clip = None if rule == "none" else RULES[rule][0](point["threshold"])
    given: Any = {"length": length, "batch": BATCH, "updates": point["updates"], "seed": seed}
    solved = until_solved(model, TASK, length, seed=seed)
    log = train(model, TASK, optimiser, clip=clip, evaluate_every=250, stop=solved, **given)
    last, rows = log.rows[-1], log.to_frame()
    moved = (rows["update"] - rows["skipped"]).diff()
    clipped = (rows["updates_clipped"] * moved).sum() / moved.sum() if moved.sum() else None
    end = {"updates_taken": last["update"], "loss": last["loss"], "skipped": last["skipped"]}
    return {"kind": "run", "solved": log.outcome == "stopped", "outcome": log.outcome, "clipped": clipped, **end}


def effects(point: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Clip the gradients of the same batches of one half-trained network by every rule; one row a rule and threshold.

    bias: the cosine of the mean clipped and the mean true gradient; removed: by `clipping.energy_removed`, the mean.
    """
    model, length, rows = network(point, seed), point["length"], []
    given: Any = {"length": length, "batch": BATCH, "updates": 3_000, "clip": rules.ByGlobalNorm(1.0), "seed": seed}
    train(
        model, TASK, SGD(0.3), evaluate_every=25, stop=lambda row: row["loss"] < 0.75 * TASK.baseline(length), **given
    )
    rng = np.random.default_rng(seed)
    batches = [sample_task(TASK.name, length, BATCH, rng, point["dtype"]) for _ in range(point["batches"])]
    true = np.mean([model.loss_and_gradients(*batch).params.flat for batch in batches], axis=0, dtype=np.float64)
    for name, (rule, tops) in RULES.items():
        for top in tops:
            kept, again = rules.new_history(), rules.new_history()  # of the same norms, each seen once
            found = [rules.clipped_gradients(model, *batch, rule(top), history=kept) for batch in batches]
            removed = [rules.energy_removed(model, *batch, rule(top), history=again) for batch in batches]
            mean = np.mean([one.gradient.flat for one in found], axis=0, dtype=np.float64)
            records = pd.DataFrame([one.record for one in found])
            row = {"rule": name, "threshold": top, **records[["norm", "clipped_norm"]].median()}
            row |= {
                "cosine": records["cosine"].mean(),
                "bias": (mean * true).sum() / np.linalg.norm(mean) / np.linalg.norm(true),
            }
            rows.append(row | {"removed": np.nanmean(removed, axis=0)})
    return rows


def run(point: dict[str, Any]) -> list[dict[str, Any]]:
    if point["part"] == "solved":
        ends = side_by_side(learn, point)
        return [*ends, {"kind": "share", **columns("success", wilson(sum(end["solved"] for end in ends), len(ends)))}]
    rows: list[dict[str, Any]] = []
    for same in zip(*side_by_side(effects, point), strict=True):
        name = {key: same[0][key] for key in ("rule", "threshold")}
        row = {"kind": "rule", **name}
        for key in ("norm", "clipped_norm", "cosine", "bias"):
            row |= columns(key, bootstrap([one[key] for one in same], np.median))
        removed = np.mean([one["removed"] for one in same], axis=0)[::-1]
        rows += [
            row,
            *({"kind": "lag", **name, "lag_steps": lag, "removed": share} for lag, share in enumerate(removed)),
        ]
    return rows


def plot(frame: pd.DataFrame) -> Figure:
    figure, axes = panels(2, 3, (18, 13))
    shares, effect = frame[frame["kind"] == "share"], frame[frame["part"] == "effect"]
    for ax, name in zip(axes, OPTIMISERS, strict=False):
        tiles(
            ax, shares[shares["optimiser"] == name], rows=("rule", "threshold"), column="learning_rate", value="success"
        )
        ax.set_title(f"{name}: share of networks that solve it")
    by_rule, lags = effect[effect["kind"] == "rule"], effect[effect["kind"] == "lag"]
    intervals(axes[2], by_rule, rows=("rule", "threshold"), values=("cosine", "bias"))
    axes[2].set(
        title="turned", xlabel="cosine with the true gradient: of a batch, and of the means over batches (bias)"
    )
    intervals(axes[3], by_rule, rows=("rule", "threshold"), values=("clipped_norm", "norm"))
    axes[3].set(title="norms", xlabel="median norm of the gradient", xscale="log")
    for ax, place in zip(axes[4:], (0, 1), strict=True):
        for colour, (name, (_, tops)) in zip(PALETTE, RULES.items(), strict=False):
            line = lags[(lags["rule"] == name) & (lags["threshold"] == tops[place])]
            ax.plot(line["lag_steps"], line["removed"], color=colour, label=f"{name} {tops[place]:g}")
        title = f"removed, at the {('lowest', 'middle')[place]} threshold"
        ax.set(title=title, xlabel="lag [steps back from the loss]", ylabel="share of energy removed")
        ax.legend(fontsize=8)
    updates = int(shares["updates"].iloc[0])
    setting = (
        "temporal order, T = {length}, tanh, H = {H}, batches of {B}; {runs} networks, at most {updates} updates; "
        "95 % intervals: shares Wilson; norms, cosines: medians over networks, bootstrap; {dtype}, seed {seed}"
    ).format(H=HIDDEN, B=BATCH, **(dict(frame.iloc[0]) | {"updates": updates}))
    caption(figure, "Clipping rules: what they do, and where they help", setting)
    return figure


study = Study("clipping", question=__doc__, grid=grid, run=run, plot=plot, devices=("cpu",))

if __name__ == "__main__":
    study.main()
