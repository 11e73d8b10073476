"""Training: whole steps of small networks in one compiled call, and runs of many of them with their log."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from .checks import check_array, check_integer, check_lengths, check_number, generator
from .clipping import ByPercentile, ClippingRule, new_history
from .kernels import Array, cpu
from .kernels import step as steps_of
from .kernels.calls import Bound, bind
from .kernels.clip import NORM, compare
from .kernels.clip import clip as clip_kernel
from .kernels.step import Readout, draw_length, loop, prepare_gradients, prepare_omega
from .model import LAST, SequenceModel
from .optim import Optimiser
from .params import Params
from .rnn import past_end
from .tasks import Task, check_steps, find_task, sample_task, synthetic, target_rows

__all__ = ["StepResult", "TrainingLog", "TrainingStep", "error_rate", "train", "until_solved"]

Row = dict[str, Any]


class StepResult(NamedTuple):
    """What a step saw: the mean loss and what clipping did to its gradient, and whether it moved the parameters.

    norm and clipped_norm: of the gradient before and after clipping; fraction: the share of numbers clipped; cosine: of
    the clipped with the true gradient (see `clipping.Record`).
    """

    loss: float
    norm: float
    clipped_norm: float
    fraction: float
    cosine: float
    moved: bool


class TrainingStep:
    """One step of an optimiser as one compiled call, which holds no GIL and uses one thread.

    Calling it with x (T, B, I), targets and lengths as in `SequenceModel.loss_and_gradients` takes a step along the
    gradient of the mean loss by all parameters of `model`, clipped by the rule `clip` (none where None). `omega` is the
    weight α of the regulariser Ω of Pascanu, Mikolov & Bengio (2013), eq. 9–10, averaged over steps and sequences as in
    their program, whose immediate derivative by W_hh is added before clipping; it is defined for cells rnn_…. Where the
    gradient is not finite nothing moves. All memory is taken once, for `steps` steps of a batch of `batch`; several of
    these, each with a model of its own, run side by side in threads.

    Raises ValueError for a model of several layers, of both directions, with dropout, on a GPU or of a topology that
    reads its own outputs, and for `omega` with another cell or with a rule that acts within BPTT; TypeError for what is
    no model, optimiser or rule. It is not copied: addresses of its memory are bound into it.
    """

    def __init__(
        self,
        model: SequenceModel,
        steps: int,
        batch: int,
        optimiser: Optimiser,
        clip: ClippingRule | None = None,
        *,
        omega: float = 0.0,
    ) -> None:
        net = _checked(model).rnn
        if net.device != "cpu":
            raise ValueError(f"model must be on the CPU, got {net!r}")
        self.steps, self.batch = check_integer("steps", steps), check_integer("batch", batch)
        if model.topology == "one_to_one" and steps != 1:
            raise ValueError(f"steps must be 1 for topology one_to_one, got {steps}")
        if not isinstance(optimiser, Optimiser) or not isinstance(clip, ClippingRule | None):
            raise TypeError(f"optimiser and clip must be an Optimiser and a ClippingRule, got {optimiser!r}, {clip!r}")
        within = clip is not None and bool(clip.within)
        if check_number("omega", omega, 0, math.inf) and (not net.cell.name.startswith("rnn_") or within):
            raise ValueError(f"omega needs a cell rnn_… and no rule within BPTT, got {net.cell.name}, {clip!r}")
        self.model, self.optimiser, self.clip = model, optimiser, clip
        self._check(within or omega > 0)
        T, B, classes = self.steps, self.batch, model.loss_name == "cross_entropy"
        N = T * B if model.topology == "many_to_many" else B
        self._x, self._lengths = np.zeros((T, B, net.input_size), net.dtype), np.full(B, T)
        self._targets = np.zeros((N, 1 if classes else model.output_size), np.int64 if classes else net.dtype)
        size, weights = model.params.flat.size, model.params.flat
        self.figures, self.counts = np.zeros(steps_of.FIGURES), np.zeros(steps_of.COUNTS, np.int64)
        self.figures[: steps_of.COUNT] = np.nan
        self.state = np.zeros((optimiser.rows, size), net.dtype)
        self.history = new_history() if isinstance(clip, ByPercentile) else np.zeros(1)
        clipped = np.zeros((1 if within else 0, 8), np.int64)
        self.gradient, gradients, regularise = self._gradients(clip if within else None, clipped, omega, self.figures)
        figures, flat = self.figures[steps_of.NORM :], self.gradient.flat
        exact, comparison = Bound(), Bound()
        if within:
            true_gradient, exact, _ = self._gradients(None, clipped, 0.0, np.zeros(1))
            comparison = bind(compare, true_gradient.flat, flat, figures)
        ends, kind, threshold = np.array([0, size]), NORM, math.inf
        if clip is not None and not within:
            ends, kind, threshold = clip.ends(model.params), clip.kind, float(clip.threshold)
        clipping = bind(clip_kernel, flat, weights, ends, kind, threshold, self.history, figures)
        moved = self.counts[steps_of.MOVED : steps_of.MOVED + 1]
        update = bind(optimiser.kernel, weights, flat, self.state, moved, optimiser.settings)
        self._batch = Bound(), Bound()
        self._parts, self._clipped = (gradients, regularise, clipping, update, exact, comparison), clipped

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not copied: make one of the copied model")

    def _check(self, inside: bool) -> None:
        """Raise ValueError for a model that it cannot take; `inside`: with a rule or regulariser within BPTT."""
        if not _compiles(self.model):
            raise ValueError(
                f"model must have one layer in one direction, no dropout and inputs that are given, "
                f"got {self.model.topology} of {self.model.rnn!r}"
            )

    def _gradients(
        self, clip: ClippingRule | None, clipped: Array, omega: float, figures: Array
    ) -> tuple[Params, Bound, Bound]:
        """Return a gradient, what computes it from the batch, and what adds that of Ω."""
        model, net, (T, B, _) = self.model, self.model.rnn, self._x.shape
        H, every = net.hidden_size, model.topology == "many_to_many"
        parts = {"rnn": net.params.like(), "readout": model.readout.like()}
        gradient = Params.join(parts)
        zero, d_output = np.zeros((len(net.cell.states), B, H), net.dtype), np.zeros((T, B, H), net.dtype)
        # Gradients of biases that a network does not have go to arrays that nobody reads.
        weights, into = net.weights(0), net.weights(0, parts["rnn"])
        forward, trace = cpu.prepare_forward(net.cell, self._x, weights, zero, self._lengths, True)
        limit = None if clip is None else (clip.within, float(clip.threshold), clipped)
        backward, gradients = cpu.prepare_backward(
            net.cell, trace, weights, d_output, zero, None, into, inputs=False, clip=limit
        )
        # Without a loss at every step the last state of a sequence is read: it is held until slot T.
        features, d_features = (trace.state[0, 1:], d_output) if every else (trace.state[0, T], gradients.state[0, T])
        N = features.size // H
        readout = Readout(
            features.reshape(N, H),
            d_features.reshape(N, H),
            self._targets,
            self._lengths,
            *(params[f"readout.{name}"] for params in (model.params, gradient) for name in ("weight", "bias")),
        )
        bound = prepare_gradients(
            model.loss.name, model.loss.row, (forward, backward), readout, gradients.state[:, T], gradient.flat, figures
        )
        if not omega:
            return gradient, bound, Bound()
        given = trace.saved, gradients.state[0], self._lengths, weights.weight_hh, into.weight_hh
        return gradient, bound, prepare_omega(*given, float(omega), figures[steps_of.OMEGA :])

    def __call__(self, x: Array, targets: Array, lengths: Any = None) -> StepResult:
        """Take one step, see the class. Raises as `SequenceModel.loss_and_gradients`, before anything moves."""
        net = self.model.rnn
        past = None if lengths is None else lambda x: past_end(lengths, x)
        x = check_array("x", x, (self.steps, self.batch, net.input_size), net.dtype, past=past)
        steps = check_lengths("lengths", lengths, self.batch, self.steps)
        scored = self.model.scored(steps, self.steps, self.model.topology == "many_to_many")
        self._targets[:] = self.model.check_targets(targets, scored).reshape(self._targets.shape)
        self._batch = Bound(), Bound()  # nothing is drawn over what is given
        self._x[:], self._lengths[:] = x, steps
        before = self.counts[steps_of.MOVED]
        self.run(1)
        loss, norm, clipped_norm, fraction, cosine = self.figures[: steps_of.OMEGA].tolist()
        return StepResult(loss, norm, clipped_norm, fraction, cosine, bool(self.counts[steps_of.MOVED] > before))

    def feed(self, task: Task, rng: np.random.Generator, order: Array, span: tuple[int, int]) -> None:
        """Have every update draw a batch of a task, of sequences of as many steps as lie between the ends of `span`."""
        arrays = self._x, self._targets, self._lengths, order, task.arrays
        length = bind(draw_length, rng, self._lengths, *span) if span[0] < span[1] else Bound()
        self._batch = length, bind(task.generate, rng, *arrays)

    def run(self, updates: int, patience: int = 1) -> None:
        """Take so many updates, fewer where `patience` in a row are skipped because the gradient is not finite."""
        calls = tuple(part.call for part in (*self._batch, *self._parts))
        loop(calls, self._clipped, self.gradient.flat, self.counts, self.figures, updates, patience)


def _compiles(model: SequenceModel) -> bool:
    """Return whether whole steps of a model are one compiled call."""
    return not (model.generates or model.rnn.num_layers > 1 or model.rnn.bidirectional or model.rnn.dropout)


class _GeneralStep(TrainingStep):
    """A step of any model on a task: the gradient is that of `loss_and_gradients`, all else as in `TrainingStep`."""

    def _check(self, inside: bool) -> None:
        if inside:
            raise ValueError(
                "model must have one layer in one direction, no dropout and inputs that are given for omega and rules "
                f"within BPTT, got {self.model.topology} of {self.model.rnn!r}"
            )

    def _gradients(
        self, clip: ClippingRule | None, clipped: Array, omega: float, figures: Array
    ) -> tuple[Params, Bound, Bound]:
        return self.model.params.like(), Bound(), Bound()

    def feed(self, task: Task, rng: np.random.Generator, order: Array, span: tuple[int, int]) -> None:
        kinds, B = 2 if self.model.generates else 1, self.batch
        self._lengths = np.full(kinds * B, self.steps)
        self._targets = target_rows(task, self.steps, B, self.model.rnn.dtype)
        self._lengths[B:] = len(self._targets) // B
        self._span, self._rng = span, rng
        self._draw = partial(task.generate, rng, self._x, self._targets, self._lengths, order, task.arrays)

    def run(self, updates: int, patience: int = 1) -> None:
        model, B, O = self.model, self.batch, self._targets.shape[1]
        shape = (B,) if model.topology in LAST else (-1, B)
        targets = self._targets.reshape(shape if model.loss_name == "cross_entropy" else (*shape, O))
        ends: dict[str, Any] = {"target_lengths": self._lengths[B:]} if model.generates else {}
        lengths = None if model.topology == "one_to_many" else self._lengths[:B]
        if updates == 0:  # compiles what the others call
            model.loss_and_gradients(self._x, targets, lengths, **ends)
            super().run(0, patience)
        for _ in range(updates):
            if self._span[0] < self._span[1]:
                self._lengths[:] = self._rng.integers(self._span[0], self._span[1] + 1)
            self._draw()
            found = model.loss_and_gradients(self._x, targets, lengths, **ends, training=True)
            self.gradient.flat[:], self.figures[steps_of.LOSS] = found.params.flat, found.loss
            super().run(1, patience)
            if self.counts[steps_of.SKIPPED_IN_A_ROW] >= patience:
                break


# Whole runs ---------------------------------------------------------------------------------------------------------

#: So many updates skipped in a row end a run: nothing has moved, and hardly will.
_PATIENCE = 100

#: Seconds of updates between two looks at an interrupt, and between two checkpoints.
_LOOK, _KEEP = 0.5, 10.0


@dataclass
class TrainingLog:
    """What became of a run.

    rows: what was measured, see `to_frame`; outcome: "finished" all updates, "stopped" by `stop`, or "diverged", when
    100 updates in a row were skipped because their gradient was not finite; seconds: time of the updates.
    """

    rows: list[Row] = field(default_factory=list)
    outcome: str = "finished"
    seconds: float = 0.0

    def to_frame(self) -> pd.DataFrame:
        """Return one row a measurement, the first before any update.

        Columns: update and sequences (so many were seen); loss, the mean over those since the last row that moved;
        norm, clipped_norm, cosine and omega of the last update (Ω, NaN where it is not asked for; within BPTT the first
        and third cost a second backward pass); updates_clipped and elements_clipped, shares since the last row;
        skipped, updates that moved nothing so far, and not_finite, the first parameter whose gradient was not finite in
        the last of them ("norm": only their norm); spectral_radius of the first layer's W_hh, of each gate's block
        where there are several; evaluation; and what `measure` names.
        """
        return pd.DataFrame(self.rows)


def train(
    model: SequenceModel,
    task: str | Task,
    optimiser: Optimiser,
    *,
    batch: int,
    updates: int,
    length: int | tuple[int, int] | None = None,
    clip: ClippingRule | None = None,
    omega: float = 0.0,
    seed: int | None = 0,
    log: int = 10,
    measure: dict[str, Callable[[SequenceModel], float]] | None = None,
    evaluation: Callable[[SequenceModel], float] | None = None,
    evaluate_every: int | None = None,
    stop: Callable[[Row], bool] | None = None,
    checkpoint: str | Path | None = None,
) -> TrainingLog:
    """Train `model` in place on batches of a task, by name or as `tasks.dataset` makes it, and return the log.

    Batches, forward pass, BPTT, clipping and update are one compiled loop without the GIL, in one thread (see
    `TrainingStep`, also for `clip` and `omega`): run several in threads. Models of several layers, of both directions,
    with dropout or of a topology that reads its own outputs take each gradient from `loss_and_gradients` instead, in
    as many threads as pay, and neither `omega` nor a rule within BPTT. `length` is that of the sequences, or the
    least and largest of a length drawn for each batch; a data set has its own. `log` rows are taken a decade of
    updates, and one at every multiple of `evaluate_every`. `measure` maps names of columns to functions of the model,
    called for each row; `evaluation` is called for each row, or every so many updates; both give NaN once a parameter
    is not finite. `stop`, given a row, ends the run. `checkpoint` is a file from which the same call resumes, and ends
    with the same bits.

    A network that diverges is an outcome of the log. Raises ValueError for a model that does not fit the task, a
    checkpoint of other settings or with dropout and sizes out of range; TypeError for a data set of another dtype and
    for what is no model or task.
    """
    task = find_task(task)
    span = _check_task(model, task, length)
    points = _points(check_integer("updates", updates), check_integer("log", log), evaluate_every)
    if checkpoint is not None and model.rnn.dropout:
        raise ValueError(f"checkpoint takes no dropout, whose draws it does not keep, got {model.rnn!r}")
    kind = TrainingStep if _compiles(model) else _GeneralStep
    step = kind(model, span[1], batch, optimiser, clip, omega=omega)
    fed = model.topology, model.loss_name, model.output_size, model.teacher_forcing
    data = [hashlib.sha256(array.tobytes()).hexdigest() for array in (task.arrays if checkpoint is not None else ())]
    setting = (task.name, *data, optimiser, clip, omega, length, batch, seed, model.rnn, *fed)
    run = _Run(step, task, span, seed, repr(setting))
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None and file.exists():
        run.load(file)
    result, size, kept = run.log, 1, time.perf_counter()
    for point in points if result.outcome == "finished" else []:
        if result.rows and point <= result.rows[-1]["update"]:
            continue
        while run.done < point and result.outcome == "finished":
            count, start = min(size, point - run.done), time.perf_counter()
            step.run(count, _PATIENCE)
            took = time.perf_counter() - start
            result.seconds += took
            size = max(1, int(_LOOK * count / took))
            if step.counts[steps_of.SKIPPED_IN_A_ROW] >= _PATIENCE:
                result.outcome = "diverged"
            elif file is not None and run.done < point and time.perf_counter() - kept > _KEEP:
                run.save(file)
                kept = time.perf_counter()
        due = evaluate_every is None or run.done % evaluate_every == 0 or run.done == updates
        result.rows.append(run.row(measure or {}, evaluation if due else None))
        if stop is not None and result.outcome == "finished" and stop(result.rows[-1]):
            result.outcome = "stopped"
        if file is not None:
            run.save(file)
            kept = time.perf_counter()
        if result.outcome != "finished":
            break
    return result


def error_rate(model: SequenceModel, task: str | Task, length: int, *, sequences: int = 10_000, seed: int = 0) -> float:
    """Return the share of fresh sequences of a synthetic task of which not every prediction is right."""
    task = synthetic(task)
    _check_task(model, task, length)
    rng, wrong, batch = generator(seed, "evaluation"), 0, 500
    for start in range(0, check_integer("sequences", sequences), batch):
        x, targets = sample_task(task, length, min(batch, sequences - start), rng, model.rnn.dtype)
        outputs, _ = model.predict(x)
        wrong += int((~task.right(outputs, targets)).sum())
    return wrong / sequences


def until_solved(model: SequenceModel, task: str | Task, length: int, *, seed: int = 0) -> Callable[[Row], bool]:
    """Return a `stop` of `train`: whether so few fresh sequences of a synthetic task are wrong that it is solved.

    That is measured where the loss is under half of that without learning.
    """
    task = synthetic(task)

    def solved(row: Row) -> bool:
        learned = row["loss"] < task.baseline(length) / 2
        return learned and error_rate(model, task, length, seed=seed) < task.wrong_allowed

    return solved


def _checked(model: Any) -> SequenceModel:
    if not isinstance(model, SequenceModel):
        raise TypeError(f"model must be a SequenceModel, got {type(model).__name__}")
    return model


def _check_task(model: SequenceModel, task: Task, length: Any) -> tuple[int, int]:
    """Return the least and largest number of steps."""
    _checked(model)
    for name, got, wanted in (
        ("input_size", model.rnn.input_size, task.input_size),
        ("output_size", model.output_size, task.output_size),
        ("topology", model.topology, task.topology),
        ("loss", model.loss_name, task.loss),
    ):
        if got != wanted:
            raise ValueError(f"model must have {name} {wanted} for {task.name}, got {got}")
    if task.arrays:
        if task.arrays[0].dtype != model.rnn.dtype:
            raise TypeError(f"model must have dtype {task.arrays[0].dtype} of {task.name}, got {model.rnn.dtype}")
        if length is not None:
            raise ValueError(f"length belongs to synthetic tasks, got {length!r} for {task.name}")
        return len(task.arrays[0]), len(task.arrays[0])
    low, high = length if isinstance(length, tuple) and len(length) == 2 else (length, length)
    span = check_steps(task, low), check_steps(task, high)
    if span[0] > span[1]:
        raise ValueError(f"length must begin with the least one, got {length!r}")
    return span


def _points(updates: int, log: int, every: int | None) -> list[int]:
    """Return the updates after which rows are taken: 0, `log` a decade, multiples of `every`, the last."""
    decades = 10 ** (np.arange(math.ceil(log * math.log10(updates))) / log)
    points = {0, updates, *np.round(decades).astype(int).tolist()}
    if every is not None:
        points |= set(range(0, updates, check_integer("evaluate_every", every)))
    return sorted(points)


class _Run:
    """All that changes in a run, to be kept and taken up again."""

    def __init__(self, step: TrainingStep, task: Task, span: tuple[int, int], seed: int | None, setting: str) -> None:
        self.step, self.setting, self.log = step, setting, TrainingLog()
        self.rng = generator(seed, "training")
        self.order = np.zeros(1 + (task.arrays[0].shape[1] if task.arrays else 0), np.int64)
        step.feed(task, self.rng, self.order, span)
        step.run(0)  # compiled before it is timed

    @property
    def done(self) -> int:
        return int(self.step.counts[steps_of.DONE])

    def row(
        self,
        measure: dict[str, Callable[[SequenceModel], float]],
        evaluation: Callable[[SequenceModel], float] | None,
    ) -> Row:
        """Return what is to be logged, and begin new sums."""
        step, model = self.step, self.step.model
        figures, (done, moved, _, first) = step.figures, step.counts.tolist()
        count = figures[steps_of.COUNT]
        means = (figures[steps_of.LOSSES :] / count if count else np.full(3, np.nan)).tolist()
        row: Row = {"update": done, "sequences": done * step.batch, "loss": means[0]}
        for name in ("norm", "clipped_norm", "cosine", "omega"):
            row[name] = float(figures[getattr(steps_of, name.upper())])
        row |= {"updates_clipped": means[1], "elements_clipped": means[2], "skipped": done - moved}
        ends = np.cumsum([array.size for array in model.params.values()])
        names = [*model.params, ""] if done == moved else [*model.params, "norm"]
        row["not_finite"] = names[int(np.searchsorted(ends, first, "right")) if done > moved and first >= 0 else -1]
        gates, finite = model.rnn.cell.gates, bool(np.isfinite(model.params.flat).all())
        for gate, block in zip(gates, model.rnn.params["weight_hh_l0"].reshape(len(gates), -1), strict=True):
            name = "spectral_radius" if len(gates) == 1 else f"spectral_radius_{gate}"
            square = block.reshape(model.rnn.hidden_size, -1)
            row[name] = float(np.abs(np.linalg.eigvals(square)).max()) if finite else math.nan
        row |= {name: float(function(model)) if finite else math.nan for name, function in measure.items()}
        row["evaluation"] = float(evaluation(model)) if evaluation is not None and finite else math.nan
        figures[steps_of.COUNT :] = 0
        return row

    def _arrays(self) -> dict[str, Array]:
        step = self.step
        changing = {"weights": step.model.params.flat, "state": step.state, "figures": step.figures}
        return changing | {"counts": step.counts, "order": self.order, "history": step.history}

    def save(self, file: Path) -> None:
        """Write a checkpoint beside the file and move it there, so that there is a whole one at any moment."""
        about = {"setting": self.setting, "rng": self.rng.bit_generator.state, **vars(self.log)}
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, about=np.array(json.dumps(about)), **self._arrays())
        temporary.replace(file)

    def load(self, file: Path) -> None:
        """Take a checkpoint up. Raises ValueError for one of other settings."""
        with np.load(file, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            if about["setting"] != self.setting:
                raise ValueError(f"checkpoint must be one of {self.setting}, {file} is one of {about['setting']}")
            for name, array in self._arrays().items():
                array[...] = kept[name]
        self.rng.bit_generator.state = about["rng"]
        self.log = TrainingLog(about["rows"], about["outcome"], about["seconds"])
