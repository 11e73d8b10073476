"""What a recurrent network costs before it is run: parameters, FLOPs, bytes, memory, and the roofline's bound.

Shapes as everywhere: T steps, B batch, I inputs, H hidden units, G gates, L layers, D directions.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from .cells import CELLS, Cell
from .checks import check_choice, check_flag, check_integer
from .model import TOPOLOGIES

__all__ = ["SCOPES", "Bytes", "Shape", "arithmetic", "largest", "layout", "memory", "parameters", "roofline_seconds"]
__all__ += ["traffic"]

#: What is computed: inference, or forward and BPTT with all gradients.
SCOPES = ("forward", "training")


@dataclass(frozen=True)
class Shape:
    """The size of a problem; with `output_size` a readout, read at the last step or at `every` one.

    Raises ValueError for a size below 1 (0 outputs are no readout) and an unknown cell, TypeError for other flags.
    """

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    output_size: int = 0
    every: bool = False

    def __post_init__(self) -> None:
        check_choice("cell", self.cell, CELLS)
        for name in ("steps", "batch", "input_size", "hidden_size", "num_layers"):
            check_integer(name, getattr(self, name))
        check_integer("output_size", self.output_size, 0)
        for name in ("bidirectional", "every"):
            check_flag(name, getattr(self, name))

    @property
    def readout(self) -> tuple[int, int]:
        """The features that the readout reads of a prediction, and how many predictions it makes."""
        return self.hidden_size * (2 if self.bidirectional else 1), self.batch * (self.steps if self.every else 1)

    @property
    def layers(self) -> list[tuple[Cell, int]]:
        """The cell and the number of inputs of every layer-direction."""
        directions = 2 if self.bidirectional else 1
        inner = directions * self.hidden_size
        return [
            (CELLS[self.cell], self.input_size if layer == 0 else inner)
            for layer in range(self.num_layers)
            for _ in range(directions)
        ]


def _saved(cell: Cell) -> int:
    """Return the numbers a unit and step that BPTT keeps: of a first phase also the two it saves, and r ∘ h."""
    return cell.saved + (3 if cell.reset else 0)


def parameters(shape: Shape, biases: Literal[0, 1, 2] = 2) -> int:
    """Return the exact number of parameters.

    `biases` is the convention: 2 as PyTorch and cuDNN (one beside W_ih, one beside W_hh), 1 as most textbooks, Flax and
    Keras (whose GRU with reset_after counts 2), 0 for none. A readout has one bias, or none. Raises ValueError for
    another number of biases.
    """
    check_integer("biases", biases, 0, 2)
    H, readout = shape.hidden_size, shape.output_size * (shape.readout[0] + min(biases, 1))
    return readout + sum(
        len(cell.gates) * H * (inputs + H + biases) + len(cell.peepholes) * H for cell, inputs in shape.layers
    )


def arithmetic(shape: Shape, scope: str = "training") -> int:
    """Return the FLOPs of the matrix products, a multiply-add counting 2; the cells' elementwise work is not counted.

    Forward: 2·T·B·G·H·(I + H) a layer and direction, 2·O·D·H a prediction. Training adds twice that: dL/dx and dL/dh on
    one side, dL/dW_ih and dL/dW_hh on the other.
    """
    check_choice("scope", scope, SCOPES)
    H = shape.hidden_size
    forward = 2 * shape.output_size * math.prod(shape.readout)
    forward += sum(2 * shape.steps * shape.batch * len(cell.gates) * H * (inputs + H) for cell, inputs in shape.layers)
    return forward * (3 if scope == "training" else 1)


def traffic(shape: Shape, scope: str = "training", dtype: DTypeLike = "float32") -> int:
    """Return the bytes that have to move at least: every input read once, every result written once.

    Forward: the weights and x in, the output (and predictions) out. Training: x and the weights are read twice,
    dL/doutput once; what the backward needs (the states and what a cell saves of a unit and step) is written and read;
    all gradients are written.
    """
    check_choice("scope", scope, SCOPES)
    rows, H = shape.steps * shape.batch, shape.hidden_size
    features, predictions = shape.readout
    numbers = shape.output_size * (
        features + 1 + predictions if scope == "forward" else 3 * (features + 1) + 2 * predictions
    )
    for cell, inputs in shape.layers:
        weights = len(cell.gates) * H * (inputs + H + 2) + len(cell.peepholes) * H
        if scope == "forward":
            numbers += weights + rows * (inputs + H)
        else:
            kept = rows * H * (len(cell.states) + _saved(cell))
            numbers += 3 * weights + rows * (3 * inputs + 2 * H) + 2 * kept
    return numbers * np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Bytes:
    """Memory of a run: the parameters (in training with their gradients), and what it keeps beside them."""

    parameters: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.kept


def memory(
    shape: Shape,
    dtype: DTypeLike = "float32",
    checkpoint: int | Literal["sqrt"] | None = None,
    scope: str = "training",
) -> Bytes:
    """Return the bytes kept: the states of every step, for BPTT also its saved numbers, or with checkpoints of some.

    With a checkpoint every k steps only the states of those T/k steps stay, and k steps are kept while their segment is
    recomputed; "sqrt" is k = ⌈√T⌉ (Chen et al. 2016, sec. 3). Counts what grows with T, not inputs and outputs.
    """
    check_choice("scope", scope, SCOPES)
    T, B, H, training = shape.steps, shape.batch, shape.hidden_size, scope == "training"
    every = T if checkpoint is None else math.isqrt(T - 1) + 1 if checkpoint == "sqrt" else checkpoint
    check_integer("checkpoint", every)
    segments = -(-T // every)
    kept = 0
    for cell, _ in shape.layers:
        states = len(cell.states) * B * H
        saved = _saved(cell) * B * H if training else 0
        kept += min(every, T) * (states + saved) + (segments * states if checkpoint else states)
    item = np.dtype(dtype).itemsize
    return Bytes((1 + training) * parameters(shape) * item, kept * item)


def roofline_seconds(flops: float, moved: float, peak_flops: float, bandwidth: float) -> float:
    """Return the least time that a machine can take: max(FLOPs / peak, bytes / bandwidth).

    Williams, Waterman & Patterson (2009). peak_flops in FLOP/s, bandwidth in bytes/s.
    """
    return max(flops / peak_flops, moved / bandwidth)


def layout(
    topology: str,
    cell: str,
    length: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    output_size: int,
    num_layers: int = 1,
) -> tuple[Shape, ...]:
    """Return the networks of a `SequenceModel`, whose costs add up: one, or an encoder and its decoder.

    `length` is that of the inputs, and of what is generated. Raises ValueError as `Shape`, for an unknown topology, and
    for one_to_many with other outputs than inputs.
    """
    check_choice("topology", topology, TOPOLOGIES)
    if topology == "one_to_many" and input_size != output_size:
        raise ValueError(f"output_size must equal the input_size {input_size} for one_to_many, got {output_size}")
    steps = 1 if topology == "one_to_one" else length
    if topology == "encoder_decoder":
        encoder = Shape(cell, steps, batch, input_size, hidden_size, num_layers)
        return encoder, Shape(cell, steps, batch, output_size, hidden_size, num_layers, False, output_size, True)
    every = topology in ("many_to_many", "one_to_many")
    return (Shape(cell, steps, batch, input_size, hidden_size, num_layers, False, output_size, every),)


def largest(cost: Callable[[int], float], budget: float, step: int = 1, most: int = 2**14, name: str = "budget") -> int:
    """Return the hidden size, a multiple of `step` up to `most`, whose cost is the budget, or the next below it.

    `cost` grows with the hidden size. Raises ValueError where even `step` units cost more, of the argument `name`.
    """
    if (least := cost(step)) > budget:
        raise ValueError(f"{name} must be at least {least:.6g}, the cost of {step} hidden units, got {budget:.6g}")
    fits = step
    while 2 * fits <= most and cost(2 * fits) <= budget:
        fits *= 2
    sizes = range(fits, min(2 * fits, most + 1), step)  # the first of them fits
    return sizes[bisect_right(sizes, budget, lo=1, key=cost) - 1]
