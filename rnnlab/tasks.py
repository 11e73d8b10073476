"""Synthetic memory tasks, each with its trivial baseline and its source; and sequences of one's own as a task.

Generators are compiled, draw from a NumPy generator and fill arrays in place, so that the training loop calls them
between two updates. A time step is the first axis; targets have one row a prediction, (N, 1) classes or (N, O) numbers,
where N = B, or T·B with a prediction at every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .checks import check_array, check_choice, check_dtype, check_integer, check_lengths, generator
from .kernels import Array
from .kernels.compiling import cached
from .losses import LOSSES
from .model import GENERATING, LAST, TOPOLOGIES, SequenceModel
from .rnn import Recurrent, past_end

__all__ = ["TASKS", "Task", "dataset", "sample_task"]


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    generate: compiled (rng, x, targets, lengths, order, arrays) → None; it fills x (T, B, I) and targets of sequences
    of `lengths` (B,) steps, zero past their end. A data set sets the lengths itself (of a generating topology (2·B,),
    those of the inputs and then those of the targets), takes its sequences from `arrays`, which are all x, targets and
    lengths, and remembers in `order` which are still to come in this epoch. baseline: length ↦ the loss of the best
    prediction that has no memory; source: who posed it. A prediction is right within `tolerance`, or where its class is
    the likeliest; a task is solved once under `wrong_allowed` of fresh sequences have a wrong one. `extra_steps` are
    added to the length, which is `least` or more.
    """

    name: str
    input_size: int
    output_size: int
    topology: str
    loss: str
    generate: Callable[..., None]
    baseline: Callable[[int], float]
    source: str
    tolerance: float = 0.0
    wrong_allowed: float = 0.01
    extra_steps: int = 0
    least: int = 10
    arrays: tuple[Array, ...] = ()

    def model(
        self, cell: str, hidden_size: int, *, dtype: DTypeLike = "float32", seed: int | None = None, **options: Any
    ) -> SequenceModel:
        """Return an untrained model that fits, `options` being those of `Recurrent`.

        A topology that reads its own outputs is told the right ones in training. Raises as `Recurrent`.
        """
        net = Recurrent(cell, self.input_size, hidden_size, dtype=dtype, seed=seed, **options)
        forced = self.topology in GENERATING
        return SequenceModel(net, self.output_size, self.topology, self.loss, teacher_forcing=forced, seed=seed)

    def right(self, outputs: Array, targets: Array) -> NDArray[np.bool_]:
        """Return (B,): the sequences of which every prediction is right, given g(y) of the model and targets."""
        if self.loss == "cross_entropy":
            right = (outputs.argmax(axis=-1) == targets) & np.isfinite(outputs).all(axis=-1)
        else:
            right = (np.abs(outputs - targets) < self.tolerance).all(axis=-1)
        found: NDArray[np.bool_] = right.all(axis=0) if right.ndim == 2 else right
        return found


def sample_task(
    task: str | Task,
    length: int,
    batch: int,
    seed: int | np.random.Generator | None = None,
    dtype: DTypeLike = "float32",
) -> tuple[Array, Array]:
    """Draw sequences x (T, B, I) of a synthetic task, one of `TASKS` by name or like them, and their targets.

    They are shaped as `SequenceModel` takes them; T is `length` and the task's extra steps. Raises ValueError for an
    unknown name, a task of given arrays and sizes out of range.
    """
    task = synthetic(task)
    T, B = check_steps(task, length), check_integer("batch", batch)
    rng = seed if isinstance(seed, np.random.Generator) else generator(seed, task.name)
    x, targets = np.empty((T, B, task.input_size), check_dtype("dtype", dtype)), target_rows(task, T, B, dtype)
    task.generate(rng, x, targets, np.full(B, T), np.zeros(1, np.int64), ())
    shape = (T, B) if task.topology == "many_to_many" else (B,)
    return x, targets.reshape(shape if task.loss == "cross_entropy" else (*shape, task.output_size))


def find_task(task: str | Task) -> Task:
    """Return a task, one of `TASKS` by name or itself. Raises ValueError for another name, TypeError for neither."""
    if not isinstance(task, str | Task):
        raise TypeError(f"task must be a Task or the name of one, got {type(task).__name__}")
    return TASKS[check_choice("task", task, TASKS)] if isinstance(task, str) else task


def synthetic(task: str | Task) -> Task:
    """Return a task as `find_task` does. Raises ValueError for one of given arrays too."""
    task = find_task(task)
    if task.arrays:
        raise ValueError(f"task must be synthetic, got the given arrays of {task.name}")
    return task


def check_steps(task: Task, length: Any) -> int:
    """Return the steps of a sequence of this length of a synthetic task."""
    if check_integer("length", length) < task.least:
        raise ValueError(f"length must be at least {task.least} for {task.name}, got {length}")
    return int(length) + task.extra_steps


def target_rows(task: Task, steps: int, batch: int, dtype: DTypeLike) -> Array:
    """Return room for the targets of a batch, one row a prediction."""
    classes = task.loss == "cross_entropy"
    if task.topology in GENERATING:
        steps = len(task.arrays[1]) // task.arrays[0].shape[1]
    rows = batch if task.topology in LAST else steps * batch
    return np.zeros((rows, 1 if classes else task.output_size), np.int64 if classes else dtype)


# Generators ---------------------------------------------------------------------------------------------------------


def _two_marked(name: str, product: bool) -> Any:
    """Values from U(0, 1), of which one in each half is marked with a 1: Arjovsky, Shah & Bengio (2016), sec. 4.2."""

    @cached(name)
    def generate(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
        x[:] = 0
        for b in range(x.shape[1]):
            T = lengths[b]
            for t in range(T):
                x[t, b, 0] = rng.random()
            first, second = rng.integers(0, T // 2), rng.integers(T // 2, T)
            x[first, b, 1] = x[second, b, 1] = 1
            one, other = x[first, b, 0], x[second, b, 0]
            targets[b, 0] = one * other if product else one + other

    return generate


@cached("adding_1997")
def _adding_1997(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
    """Hochreiter & Schmidhuber (1997), sec. 5.4: marked are one of the first ten and one of the first half."""
    x[:] = 0
    for b in range(x.shape[1]):
        T = lengths[b]
        for t in range(T):
            x[t, b, 0] = 2 * rng.random() - 1
        first, second = rng.integers(0, 10), rng.integers(0, T // 2 - 1)
        second += second >= first
        x[0, b, 1] = x[T - 1, b, 1] = -1
        x[first, b, 1] = x[second, b, 1] = 1
        if first == 0 or second == 0:
            x[0, b, 0] = 0
        targets[b, 0] = 0.5 + (x[first, b, 0] + x[second, b, 0]) / 4


@cached("copying")
def _copying(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
    """Ten of eight symbols, blanks (8), a delimiter (9) and blanks, while the symbols are to be repeated."""
    x[:], targets[:] = 0, 0
    B = x.shape[1]
    for b in range(B):
        last = lengths[b] - 10
        for t in range(lengths[b]):
            symbol = rng.integers(0, 8) if t < 10 else 9 if t == last - 1 else 8
            x[t, b, symbol] = 1
            if t < last:
                targets[t * B + b, 0] = 8
            if t < 10:
                targets[(last + t) * B + b, 0] = symbol


def _temporal_order(name: str, starts: tuple[float, ...]) -> Any:
    """Distractors, and a relevant symbol within a tenth of the length from each of `starts`, in parts of the length."""

    @cached(name)
    def generate(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
        x[:] = 0
        for b in range(x.shape[1]):
            T, kind = lengths[b], 0
            for t in range(T):
                x[t, b, rng.integers(2, 6)] = 1
            for k in range(len(starts)):
                t, symbol = int(T * starts[k]) + rng.integers(0, int(T * 0.1)), rng.integers(0, 2)
                x[t, b] = 0
                x[t, b, symbol] = 1
                kind += symbol << k
            targets[b, 0] = kind

    return generate


@cached("parity")
def _parity(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
    """Bits as ±1: whether the number of +1 is odd."""
    x[:] = 0
    for b in range(x.shape[1]):
        odd = 0
        for t in range(lengths[b]):
            bit = rng.integers(0, 2)
            x[t, b, 0], odd = 2 * bit - 1, odd ^ bit
        targets[b, 0] = odd


@cached("noisy_recall")
def _noisy_recall(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
    """The class as ±1 in the first three steps, then noise of variance 0.2 in the same input."""
    x[:] = 0
    for b in range(x.shape[1]):
        kind = rng.integers(0, 2)
        for t in range(lengths[b]):
            x[t, b, 0] = 2 * kind - 1 if t < 3 else math.sqrt(0.2) * rng.standard_normal()
        targets[b, 0] = kind


@cached("dataset")
def _from_arrays(rng: Any, x: Array, targets: Array, lengths: Array, order: Array, arrays: Any) -> None:
    """Draw without replacement within an epoch; order[0] sequences are left of it, the last ones of order[1:]."""
    all_x, all_targets, all_lengths = arrays
    B, count = x.shape[1], all_x.shape[1]
    for b in range(B):
        if order[0] == 0:
            order[0], order[1:] = count, rng.permutation(count)
        n = order[order[0]]
        order[0] -= 1
        x[:, b] = all_x[:, n]
        for k in range(len(lengths) // B):
            lengths[k * B + b] = all_lengths[k * count + n]
        for t in range(len(targets) // B):
            targets[t * B + b] = all_targets[t * count + n]


def dataset(
    x: Array,
    targets: Array,
    lengths: Any = None,
    *,
    topology: str = "many_to_one",
    loss: str = "cross_entropy",
    target_lengths: Any = None,
    output_size: int | None = None,
    name: str = "dataset",
) -> Task:
    """Return sequences x (T, N, I) with targets as a task: minibatches without replacement within each epoch.

    Arguments are those of `SequenceModel.loss_and_gradients` for all N sequences at once; `output_size` is by default
    the number of classes seen, or of the targets' numbers. Raises TypeError and ValueError as that does.
    """
    check_choice("loss", loss, LOSSES)
    generates = check_choice("topology", topology, TOPOLOGIES) in GENERATING
    if not isinstance(x, np.ndarray) or not isinstance(targets, np.ndarray):
        raise TypeError(f"x and targets must be numpy arrays, got {type(x).__name__} and {type(targets).__name__}")
    past = None if lengths is None or x.ndim != 3 else lambda x: past_end(lengths, x)
    size_of = (1 if topology.startswith("one") else "T", "N", "I")
    x = check_array("x", x, size_of, check_dtype("dtype of x", x.dtype), past=past)
    T, N, I = x.shape
    if target_lengths is not None and not generates:
        raise ValueError(f"target_lengths belongs to one_to_many and encoder_decoder, got it for {topology}")
    steps = targets.shape[0] if generates and targets.ndim > 1 else T
    ends = [check_lengths("lengths", lengths, N, T)]
    ends += [check_lengths("target_lengths", target_lengths, N, steps)] if generates else []
    shape = (N,) if topology in LAST else (steps, N)
    if topology not in LAST and targets.shape[:2] == shape:  # what lies past the end is nobody's business
        unscored = (np.arange(steps)[:, None] >= ends[-1]).reshape(steps, N, *[1] * (targets.ndim - 2))
        targets = np.where(unscored, targets.dtype.type(0), targets)
    if loss == "cross_entropy":
        if targets.dtype.kind not in "iu" or targets.shape != shape or targets.min() < 0:
            raise ValueError(f"targets must be integers from 0 of shape {shape}, got {targets.dtype} {targets.shape}")
        rows, outputs = targets.astype(np.int64).reshape(-1, 1), int(targets.max()) + 1
    else:
        rows = check_array("targets", targets, (*shape, "O"), x.dtype).reshape(math.prod(shape), -1)
        outputs = rows.shape[1]
        if loss == "bce" and (rows.min() < 0 or rows.max() > 1):
            raise ValueError(f"targets must lie in [0, 1] for bce, got {rows.min()}…{rows.max()}")
    size = outputs if output_size is None else check_integer("output_size", output_size)
    if size < outputs or (size > outputs and loss != "cross_entropy"):
        least = "at least " if loss == "cross_entropy" else ""
        raise ValueError(f"output_size must be {least}{outputs} for these targets, got {size}")
    arrays = x, rows, np.concatenate(ends)
    return Task(name, I, size, topology, loss, _from_arrays, lambda length: math.nan, "given arrays", arrays=arrays)


# The tasks ----------------------------------------------------------------------------------------------------------


def _adding_1997_baseline(length: int) -> float:
    """The variance of the target: a first pair that is marked, by either draw, counts as 0."""
    first, second = 1 / 10, 9 / 10 / (length // 2 - 1)
    return (2 - first - second) / 3 / 16


def _numbers(name: str, generate: Any, baseline: Callable[[int], float], source: str, **options: Any) -> Task:
    return Task(name, 2, 1, "many_to_one", "mse", generate, baseline, source, **options)


def _classes(name: str, inputs: int, classes: int, generate: Any, source: str, least: int) -> Task:
    kind = "many_to_one", "cross_entropy"
    return Task(name, inputs, classes, *kind, generate, lambda length: math.log(classes), source, least=least)


def _order(name: str, starts: tuple[float, ...], source: str) -> Task:
    return _classes(name, 6, 2 ** len(starts), _temporal_order(name, starts), source, 10)


_HS, _BSF = "Hochreiter & Schmidhuber (1997)", "Bengio, Simard & Frasconi (1994)"
_ASB, _PMB = "Arjovsky, Shah & Bengio (2016)", "Pascanu, Mikolov & Bengio (2013)"

#: Tasks by name.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        # 0.08 is the 0.04 of 1997, where the sum is halved.
        _numbers("adding", _two_marked("adding", False), lambda length: 1 / 6, f"{_ASB}, sec. 4.2", tolerance=0.08),
        _numbers("adding_1997", _adding_1997, _adding_1997_baseline, f"{_HS}, sec. 5.4", tolerance=0.04, least=22),
        _numbers(
            "multiplication",
            _two_marked("multiplication", True),
            lambda length: 1 / 9 - 1 / 16,
            f"{_HS}, sec. 5.5, marked as `adding`",
            tolerance=0.04,
        ),
        Task(
            "copying",
            10,
            9,
            "many_to_many",
            "cross_entropy",
            _copying,
            lambda length: 10 * math.log(8) / (length + 20),
            f"{_ASB}, sec. 4.1",
            extra_steps=20,
            least=1,
        ),
        _order("temporal_order", (0.1, 0.5), f"{_HS}, task 6a; {_PMB}, sec. 4.1"),
        _order("temporal_order_3", (0.1, 0.3, 0.6), f"{_HS}, task 6b, with the positions of the program of {_PMB}"),
        _order("temporal_order_4", (0.1, 0.3, 0.5, 0.7), f"{_HS}, task 6b, with one more symbol"),
        _classes("parity", 1, 2, _parity, _BSF, 1),
        _classes("noisy_recall", 1, 2, _noisy_recall, f"{_HS}, task 3a, the 2-sequence problem of {_BSF}", 4),
    )
}
