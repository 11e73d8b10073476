"""Which cell, and how large, for a given kind of task and a budget: counted, and measured on this machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .checks import check_choice, check_dtype, check_integer, check_number, generator
from .costs import SCOPES, Shape, largest, layout, memory, parameters
from .kernels import DeviceNotAvailable, backend
from .kernels.simd import VECTOR_BYTES
from .model import GENERATING, LAST, SequenceModel
from .rnn import Recurrent
from .timing import interleave, wall_clock

__all__ = ["Job", "choose", "evidence", "words"]

#: What studies have found of quality at equal parameters, one row a topology and cell: `skill`, the share of the
#: baseline's error that training removed, its interval over networks `low_skill` to `high_skill`, and how many `tasks`.
EVIDENCE = Path(__file__).with_name("evidence.csv")

#: What is measured has at least twice so many steps, and as many as take so many seconds, if sequences are as long.
SHORTEST, LONG_ENOUGH = 32, 0.05


@dataclass(frozen=True)
class Job:
    """What a network is wanted for: a topology of `SequenceModel`, sizes, and "forward" (prediction) or "training".

    Training is the loss and all gradients of a batch. Raises ValueError for unknown names and sizes that do not fit,
    DeviceNotAvailable for a device that cannot be measured.
    """

    topology: str
    length: int
    input_size: int
    output_size: int = 1
    batch: int = 1
    num_layers: int = 1
    scope: str = "forward"
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        backend(self.device)
        if self.device != "cpu":
            raise DeviceNotAvailable(f"device {self.device!r} cannot be used: rnnlab chooses for the CPU only")
        check_choice("scope", self.scope, SCOPES)
        check_dtype("dtype", self.dtype)
        check_integer("output_size", self.output_size)
        self.shapes("lstm", 1)

    @property
    def steps(self) -> int:
        """The steps of a sequence: `length`, but 1 of one_to_one."""
        return 1 if self.topology == "one_to_one" else self.length

    def shapes(self, cell: str, hidden_size: int) -> tuple[Shape, ...]:
        """Return the networks of such a model."""
        sizes = (self.length, self.batch, self.input_size, hidden_size, self.output_size, self.num_layers)
        return layout(self.topology, cell, *sizes)

    def parameters(self, cell: str, hidden_size: int) -> int:
        """Return the parameters of such a model, its readout included."""
        return sum(map(parameters, self.shapes(cell, hidden_size)))

    def bytes(self, cell: str, hidden_size: int) -> int:
        """Return the memory of a run, see `costs.memory`."""
        return sum(memory(shape, self.dtype, scope=self.scope).total for shape in self.shapes(cell, hidden_size))

    def seconds(self, cell: str, hidden_size: int) -> float:
        """Return the time of a batch on this machine: measured, and where that would take long, of shorter sequences.

        Time is a constant and so much a step: two sequences, one half as long as the other, give the line to follow.
        Lower quartiles count, and the constant is between nothing and half of the longer one's time, whatever else the
        machine is doing.
        """
        length, model = self.steps, self.model(cell, hidden_size)
        first = min(SHORTEST, length)
        probe = self.call(model, first)
        probe()  # compiled, and its memory taken
        steps = min(length, max(2 * first, int(first * LONG_ENOUGH / wall_clock(probe))))
        calls = {str(n): self.call(model, n) for n in ((steps,) if steps == length else (steps // 2, steps))}
        less, *more = (float(np.quantile(times, 0.25)) for times in interleave(calls, seconds=0.2, pause=0).values())
        if not more:
            return less
        step = np.clip((more[0] - less) / (steps - steps // 2), 0.5 * more[0] / steps, more[0] / steps)
        return float(more[0] + step * (length - steps))

    def model(self, cell: str, hidden_size: int) -> SequenceModel:
        """Return such a model."""
        net = Recurrent(cell, self.input_size, hidden_size, self.num_layers, dtype=self.dtype, seed=0)
        forced = self.topology in GENERATING  # as `Task.model` trains it
        return SequenceModel(net, self.output_size, self.topology, "mse", teacher_forcing=forced, seed=0)

    def call(self, model: SequenceModel, steps: int) -> Callable[[], Any]:
        """Return what is timed, on random sequences of so many steps."""
        rng, B, O = generator(0, "choose"), self.batch, self.output_size
        given = 1 if self.topology in ("one_to_one", "one_to_many") else steps
        x = rng.normal(size=(given, B, self.input_size)).astype(self.dtype)
        if self.scope == "forward":
            return partial(model.predict, x, steps=steps if model.generates else None)
        shape = (B, O) if self.topology in LAST else (steps, B, O)
        return partial(model.loss_and_gradients, x, rng.normal(size=shape).astype(self.dtype))


def evidence(topology: str) -> pd.DataFrame:
    """Return what studies have found of the cells in tasks of a topology, by cell; empty where there is nothing yet."""
    columns = ["skill", "low_skill", "high_skill", "tasks"]
    if not EVIDENCE.exists():
        return pd.DataFrame(columns=columns)
    found = pd.read_csv(EVIDENCE)
    return found[found["topology"] == topology].set_index("cell")[columns]


def choose(
    job: Job, cells: tuple[str, ...], *, most_parameters: int | None = None, most_seconds: float | None = None
) -> pd.DataFrame:
    """Return the largest network of each cell within one of the two budgets, one row a cell, the best first.

    Columns: cell, hidden_size, parameters, milliseconds (a batch), megabytes, and of `evidence` skill, low_skill,
    high_skill and tasks. The order is by skill; without it by time at equal parameters, by parameters at equal time.
    Within a time, sizes are whole vector registers: units up to the next one cost nothing.

    Raises ValueError for no cells, for no budget or both, and for one that is below the smallest network of some cell.
    """
    if not cells:
        raise ValueError("cells must name at least one cell, got none")
    if (most_parameters is None) == (most_seconds is None):
        raise ValueError(f"choose takes most_parameters or most_seconds, got {most_parameters} and {most_seconds}")
    known, rows = evidence(job.topology), []
    for cell in cells:
        seconds = cache(partial(job.seconds, cell))  # what is chosen by is what is shown
        if most_seconds is None:
            budget = check_integer("most_parameters", most_parameters)
            size = largest(partial(job.parameters, cell), budget, name="most_parameters")
        else:
            most = check_number("most_seconds", most_seconds, 0, math.inf)
            size = largest(seconds, most, VECTOR_BYTES // np.dtype(job.dtype).itemsize, name="most_seconds")
        row = {
            "cell": cell,
            "hidden_size": size,
            "parameters": job.parameters(cell, size),
            "milliseconds": 1e3 * seconds(size),
            "megabytes": job.bytes(cell, size) / 1e6,
        }
        found = known.loc[cell] if cell in known.index else pd.Series(index=known.columns, dtype=float)
        rows.append(row | found.to_dict())
    order = ("milliseconds", True) if most_seconds is None else ("parameters", False)
    return pd.DataFrame(rows).sort_values(["skill", order[0]], ascending=[False, order[1]], ignore_index=True)


def words(job: Job, frame: pd.DataFrame) -> str:
    """Return the table of `choose` for a terminal, and what it says in plain words."""
    shown = frame[["cell", "hidden_size", "parameters"]].assign(
        milliseconds=frame["milliseconds"].map("{:.3g}".format), megabytes=frame["megabytes"].map("{:.3g}".format)
    )
    best = frame.iloc[0]
    work = "a prediction" if job.scope == "forward" else "a loss with its gradients"
    batch = "one sequence" if job.batch == 1 else f"{job.batch} sequences"
    quality = (
        "No study of rnnlab has measured yet which cell is better at such tasks: the order says nothing of quality."
        if frame["skill"].isna().all()
        else "\n".join(map(_said, frame.dropna(subset="skill").itertuples()))
    )
    return (
        f"{shown.to_string(index=False)}\n\nFirst comes {best['cell']} with {best['hidden_size']} hidden units: "
        f"{best['parameters']:,} parameters; {work} for {batch} of {job.steps} steps takes "
        f"{best['milliseconds']:.3g} ms on this machine.\n{quality}"
    )


def _said(row: Any) -> str:
    """Return the evidence for a cell as a sentence."""
    tasks = "one task" if row.tasks == 1 else f"{row.tasks:.0f} tasks"
    interval = f"{row.low_skill:.0%}–{row.high_skill:.0%}, other networks"
    return (
        f"In {tasks} of this kind, at equal parameters, {row.cell} removed {row.skill:.0%} ({interval}) of the "
        "baseline's error."
    )
