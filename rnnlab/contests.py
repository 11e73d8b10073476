"""Contests between cells on one task: what networks cost, what they reach within a budget, and who wins.

A point is what a study's `run` takes: task, cell, length (of a synthetic task), batch, updates, dtype and so on. Skill
is the share of the error of a prediction without learning that a network removes, see `applications.skill`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .applications import APPLICATIONS, Part, load, measure, skill
from .clipping import ByGlobalNorm
from .costs import Shape, layout, memory, parameters
from .gradients import gradient_flow
from .model import GENERATING, LAST, SequenceModel
from .optim import Adam
from .peers import NotApplicable, train_torch
from .statistics import columns, t_interval
from .tasks import TASKS, Task, sample_task
from .timing import interleave, ratio
from .training import train

__all__ = ["THRESHOLD", "Learned", "Setting", "averages", "beside_torch", "budgets_of", "evidence", "learn", "price"]
__all__ += ["search", "setting_of", "skills", "verdicts"]

#: Clipping by global norm; validations within the budget of updates, on so many sequences at most.
THRESHOLD, EVALUATIONS, HELD_OUT = 1.0, 8, 500

Point = dict[str, Any]
Snapshots = list[tuple[float, Any]]


@dataclass(frozen=True)
class Setting:
    """A task with what its networks are judged by.

    length: of a synthetic task; steps: those of the inputs, or of what is generated; metric: one of those of
    `applications.Application`, with what a prediction without learning reaches in it; validation and test parts.
    """

    task: Task
    length: int | None
    steps: int
    metric: str
    baseline: float
    validation: Part
    test: Part

    def shapes(self, cell: str, hidden: int, batch: int = 1) -> tuple[Shape, ...]:
        """Return the networks of a model, whose costs add up."""
        sizes = self.steps, batch, self.task.input_size, hidden, self.task.output_size
        return layout(self.task.topology, cell, *sizes)

    def parameters(self, cell: str, hidden: int) -> int:
        """Return the parameters of a model."""
        return sum(map(parameters, self.shapes(cell, hidden)))

    def skill(self, value: float) -> float:
        """Return the skill of a model that reaches `value` in the metric, −∞ where it has diverged."""
        found = skill(self.metric, value, self.baseline)
        return found if np.isfinite(found) else -np.inf


def setting_of(point: Point) -> Setting:
    """Return the setting of the application or synthetic task that a point names."""
    name, length, dtype = point["task"], point["length"], point["dtype"]
    if name in APPLICATIONS:
        data = load(name, dtype)
        kind = data.application
        steps = len(data.train.targets) if kind.topology == "one_to_many" else len(data.train.x)
        validation = _some(data.validation, HELD_OUT, kind.loss)
        return Setting(data.task(), None, steps, kind.metric, data.baseline, validation, data.test)
    parts = [Part(*sample_task(name, length, HELD_OUT, 1000 + k, dtype), None, None) for k in range(2)]
    task, steps = TASKS[name], len(parts[0].x)
    if task.loss == "cross_entropy" and task.topology in LAST:
        return Setting(task, length, steps, "accuracy", 1 / task.output_size, *parts)
    classes, baseline = task.loss == "cross_entropy", task.baseline(length)
    metric, error = ("bits a symbol", baseline / np.log(2)) if classes else ("squared error", baseline)
    return Setting(task, length, steps, metric, error, *parts)


def price(setting: Setting, point: Point, hidden: int) -> dict[str, Any]:
    """Return what networks cost, and each cost in proportion to the LSTM's, measured in turns with it.

    Milliseconds: of an update of a batch, and of the predictions for one sequence and for 64.
    """
    cell, dtype, task = point["cell"], point["dtype"], setting.task
    sizes = {cell: hidden, "lstm": point["hidden"]}
    models = {name: task.model(name, size, dtype=dtype, seed=0) for name, size in sizes.items()}
    given = 1 if task.topology == "one_to_many" else setting.steps
    asked = setting.steps if task.topology in GENERATING else None
    calls = {
        f"{name}, {B}": partial(model.predict, np.zeros((given, B, task.input_size), dtype), steps=asked)
        for name, model in models.items()
        for B in (1, 64)
    }
    times = interleave(calls, seconds=0.5, rounds=(7, 100), pause=0)
    count = {name: max(4, math.ceil(0.05 / _update_seconds(setting, point, models[name], 4))) for name in models}
    spent: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(8):
        for name in list(models)[:: 1 if turn % 2 else -1]:
            spent[name].append(_update_seconds(setting, point, models[name], count[name]))
    times |= {f"{name}, update": np.array(seconds) for name, seconds in spent.items()}
    found: dict[str, Any] = {"topology": task.topology, "hidden_size": hidden}
    for what, column in (("update", "update"), (1, "latency"), (64, "batch_of_64")):
        found[f"{column}_milliseconds"] = 1e3 * float(np.median(times[f"{cell}, {what}"]))
        paired = ratio(times[f"lstm, {what}"], times[f"{cell}, {what}"])
        found |= columns(f"{column}_ratio", (paired.median, paired.low, paired.high))
    for column, counted in (("parameters", parameters), ("bytes", lambda shape: memory(shape, dtype).total)):
        own, lstm = (sum(map(counted, setting.shapes(name, sizes[name], point["batch"]))) for name in (cell, "lstm"))
        found |= {column: own, f"{column}_ratio": own / lstm}
    return found


def _update_seconds(setting: Setting, point: Point, model: SequenceModel, updates: int) -> float:
    """Return the time of an update that moves nothing."""
    sizes: dict[str, Any] = {"batch": point["batch"], "length": setting.length, "updates": updates}
    return train(model, setting.task, Adam(0.0), clip=ByGlobalNorm(THRESHOLD), log=1, **sizes).seconds / updates


def budgets_of(point: Point, update_ratio: float) -> dict[str, int]:
    """Return the updates that a network takes in each contest, given the time of one beside the LSTM's.

    Networks of equal parameters (`sizes` of the point) are also in that of equal time, the LSTM is in all of them. So
    many updates are a multiple of the number of validations, the last of which is then at the end.
    """
    updates = point["updates"] // EVALUATIONS * EVALUATIONS
    if point["sizes"] == "units":
        return {"units": updates}
    in_time = EVALUATIONS * max(1, int(updates / update_ratio) // EVALUATIONS)
    return {"parameters": updates, "time": in_time} | ({"units": updates} if point["cell"] == "lstm" else {})


class Learned(NamedTuple):
    """A trained network: skill in validation by updates, parameters at each of them, and of each contest its test."""

    model: SequenceModel
    curve: list[tuple[int, float]]
    kept: Snapshots
    tests: dict[str, dict[str, float]]


def learn(setting: Setting, point: Point, hidden: int, budgets: dict[str, int], rate: float, seed: int) -> Learned:
    """Train one network, and test it for each budget of updates where its validation within that was best.

    Of the first budget's network the horizon is measured too.
    """
    network = _train(setting, point, hidden, budgets, rate, seed)
    for contest, budget in budgets.items():
        network.tests[contest] = _best_within(setting, *network[:3], budget)
        if contest == next(iter(budgets)) and not network.model.generates:
            network.tests[contest] |= _horizon(setting, network.model)
    return network


def search(setting: Setting, point: Point, hidden: int, updates: int, seed: int) -> dict[float, float]:
    """Return the best skill in validation within so many updates for each learning rate of the point, untested."""
    networks = {rate: _train(setting, point, hidden, {"": updates}, rate, seed) for rate in point["rates"]}
    return {rate: max(value for _, value in network.curve) for rate, network in networks.items()}


def _train(setting: Setting, point: Point, hidden: int, budgets: dict[str, int], rate: float, seed: int) -> Learned:
    """Train one network for the longest budget, with as many validations as it takes for each."""
    model = setting.task.model(point["cell"], hidden, dtype=point["dtype"], seed=seed)
    kept: Snapshots = []
    log = train(
        model,
        setting.task,
        Adam(rate),
        batch=point["batch"],
        updates=max(budgets.values()),
        length=setting.length,
        clip=ByGlobalNorm(THRESHOLD),
        seed=seed,
        log=1,
        evaluation=partial(_validate, setting, kept),
        evaluate_every=max(1, min(budgets.values()) // EVALUATIONS),
    )
    curve = [(row["update"], row["evaluation"]) for row in log.rows if not np.isnan(row["evaluation"])]
    return Learned(model, curve, kept, {})


def _validate(setting: Setting, kept: Snapshots, model: SequenceModel) -> float:
    """Keep a model's parameters with its skill in validation, and return that."""
    kept.append((setting.skill(measure(model, setting.metric, setting.validation)), model.params.flat.copy()))
    return kept[-1][0]


def _best_within(
    setting: Setting, model: SequenceModel, curve: list[tuple[int, float]], kept: Snapshots, budget: int
) -> dict[str, float]:
    """Set the parameters whose validation was best within a budget of updates, and return their test.

    The choice is among equally many in every contest: the last before each eighth of the budget, and the first of all.
    """
    updates = [update for update, _ in curve]
    turns = np.searchsorted(updates, [k * budget / EVALUATIONS for k in range(EVALUATIONS + 1)], side="right") - 1
    number = max(map(int, turns), key=lambda k: curve[k][1])
    model.params.flat[:] = kept[number][1]
    value = measure(model, setting.metric, setting.test)
    found = {"value": value, "skill": setting.skill(value)}
    return found | {"best_update": updates[number], "share_of_budget": updates[number] / budget}


def _horizon(setting: Setting, model: SequenceModel) -> dict[str, float]:
    """Return the horizon of dL/dh on 64 sequences of the test, the loss at their last step, also in lengths (≤ 1)."""
    part = _some(setting.test, 64, model.loss_name)
    targets, count = part.targets, part.x.shape[1]
    if model.topology not in LAST:
        targets = targets[(np.full(count, len(part.x)) if part.lengths is None else part.lengths) - 1, np.arange(count)]
    steps = gradient_flow(model, part.x, targets, lengths=part.lengths).decay("h", resamples=1).horizon
    return {"horizon_steps": steps, "horizon_in_lengths": float(np.minimum(1.0, steps / setting.steps))}


def _some(part: Part, count: int, loss: str) -> Part:
    """Return at most so many sequences of a part, at equal distances: its order may be alphabetical."""
    total = part.x.shape[1]
    pick = np.linspace(0, total - 1, min(count, total)).astype(np.int64)
    lengths, target_lengths = (None if ends is None else ends[pick] for ends in (part.lengths, part.target_lengths))
    targets = part.targets[..., pick] if loss == "cross_entropy" else part.targets[..., pick, :]
    return Part(part.x[:, pick].copy(), targets.copy(), lengths, target_lengths)


def beside_torch(setting: Setting, point: Point, hidden: int, rate: float, seeds: list[int]) -> list[dict[str, Any]]:
    """Train PyTorch's network of the same kind, size, learning rate and batches for as many updates; none if it cannot.

    Raises as `peers.train_torch`, but for NotApplicable.
    """
    rows: list[dict[str, Any]] = []
    for k, seed in enumerate(seeds):
        model = setting.task.model(point["cell"], hidden, dtype=point["dtype"], seed=seed)
        kept: Snapshots = []
        try:
            curve = train_torch(
                model,
                setting.task,
                rate,
                length=setting.length,
                batch=point["batch"],
                updates=point["updates"],
                every=max(1, point["updates"] // EVALUATIONS),
                threshold=THRESHOLD,
                seed=seed,
                evaluation=partial(_validate, setting, kept),
            )
        except NotApplicable:  # it has no such arrangement
            return []
        rows.append({"kind": "torch", "network": k, **_best_within(setting, model, curve, kept, point["updates"])})
    return rows


# What the runs of a study say together ------------------------------------------------------------------------------


def skills(frame: pd.DataFrame, rows: list[str], names: dict[str, pd.Series], column: str = "skill") -> pd.DataFrame:
    """Return one row for each combination of `rows`: the mean skill under every name and its t interval.

    `names` gives to each name which rows of the frame are its own; another `column` may be averaged.
    """
    table = []
    for key, part in frame.groupby(rows, sort=False):
        row: dict[str, Any] = dict(zip(rows, key, strict=True))
        for name, chosen in names.items():
            values = part.loc[chosen[part.index], column]
            row |= columns(name, t_interval(values) if len(values) else (np.nan,) * 3)
        table.append(row)
    return pd.DataFrame(table)


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a task and contest: the GRU's skill less the LSTM's, who wins, and the best of all cells.

    The interval is that of t over networks, paired by their batches: over other networks, not other tasks or test
    sequences. One verdict in twenty on cells that are equal names a winner. `as_good` are the cells whose distance to
    the best has an interval that holds 0.
    """
    rows = []
    for (task, contest), part in frame[frame["kind"] == "run"].groupby(["task", "contest"], sort=False):
        table = part.pivot(index="network", columns="cell", values="skill")
        if not {"lstm", "gru"} <= set(table):
            continue
        interval = t_interval(table["gru"] - table["lstm"])
        winner = "gru" if interval[1] > 0 else "lstm" if interval[2] < 0 else "no difference"
        best = str(table.mean().idxmax())
        behind = {cell: t_interval(table[best] - table[cell])[1] for cell in table if cell != best}
        as_good = " ".join(str(cell) for cell, low in behind.items() if not low > 0)
        row = {"task": task, "contest": contest, **columns("gru_less_lstm", interval), "winner": winner, "best": best}
        rows.append(row | {"best_skill": table[best].mean(), "as_good": as_good})
    return pd.DataFrame(rows)


def evidence(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what `rnnlab.choose` reads: skill at equal parameters of each cell, over the tasks of a topology.

    Of the tasks in which all cells took part; the interval is over networks.
    """
    topology = frame.dropna(subset="topology").drop_duplicates("task").set_index("task")["topology"]
    runs, rows = _tried_by_all(frame[frame["contest"] == "parameters"]), []
    for (kind, cell), part in runs.groupby([runs["task"].map(topology), "cell"], sort=False):
        over_tasks = part.groupby("network")["skill"].mean()
        interval = columns("skill", t_interval(over_tasks))
        rows.append({"topology": kind, "cell": cell, **interval, "tasks": part["task"].nunique()})
    return pd.DataFrame(rows)


def _tried_by_all(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of those tasks in which as many cells took part, in as many contests, as in any."""
    entered = runs.groupby("task")[["cell", "contest"]].apply(lambda part: len(part.drop_duplicates()))
    return runs[runs["task"].map(entered == entered.max())]


def averages(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a cell and contest: mean skill and geometric means of costs, over tasks in which all took part."""
    costs = frame[frame["kind"] == "cost"].set_index(["task", "cell", "sizes"])
    runs = _tried_by_all(frame[(frame["kind"] == "run") & (frame["contest"] != "time")])
    rows = []
    for (cell, contest), part in runs.groupby(["cell", "contest"], sort=False):
        own = costs.loc[[(task, cell, "parameters" if cell == "lstm" else contest) for task in part["task"].unique()]]
        ratios = own.filter(regex="^(?!low_|high_).*_ratio$").astype(float)
        row = {"cell": cell, "contest": contest, "skill": part.groupby("task")["skill"].mean().mean()}
        rows.append(row | np.exp(np.log(ratios).mean()).to_dict())
    return pd.DataFrame(rows)
