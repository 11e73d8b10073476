"""What a recurrent network costs before it is run: parameters, FLOPs, bytes, memory, and the roofline's bound.

Shapes as everywhere: T steps, B batch, I inputs, H hidden units, G gates, L layers, D directions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from .cells import CELLS, Cell
from .checks import check_choice, check_positive

__all__ = ["SCOPES", "Bytes", "Shape", "arithmetic", "memory", "parameters", "roofline_seconds", "traffic"]

#: What is computed: inference, or forward and BPTT with all gradients.
SCOPES = ("forward", "training")


@dataclass(frozen=True)
class Shape:
    """The size of a problem. Raises ValueError for a size below 1 and an unknown cell."""

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False

    def __post_init__(self) -> None:
        check_choice("cell", self.cell, CELLS)
        for name in ("steps", "batch", "input_size", "hidden_size", "num_layers"):
            check_positive(name, getattr(self, name))

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


def parameters(shape: Shape, biases: Literal[0, 1, 2] = 2) -> int:
    """Return the exact number of parameters.

    `biases` is the convention: 2 as PyTorch and cuDNN (one beside W_ih, one beside W_hh), 1 as most textbooks, Flax and
    Keras (whose GRU with reset_after counts 2), 0 for none.
    """
    H = shape.hidden_size
    return sum(len(cell.gates) * H * (inputs + H + biases) + len(cell.peepholes) * H for cell, inputs in shape.layers)


def arithmetic(shape: Shape, scope: str = "training") -> int:
    """Return the FLOPs of the matrix products, a multiply-add counting 2; the cells' elementwise work is not counted.

    Forward: 2·T·B·G·H·(I + H) a layer and direction. Training adds twice that: dL/dx and dL/dh on one side, dL/dW_ih
    and dL/dW_hh on the other.
    """
    check_choice("scope", scope, SCOPES)
    H = shape.hidden_size
    forward = sum(2 * shape.steps * shape.batch * len(cell.gates) * H * (inputs + H) for cell, inputs in shape.layers)
    return forward * (3 if scope == "training" else 1)


def traffic(shape: Shape, scope: str = "training", dtype: DTypeLike = "float32") -> int:
    """Return the bytes that have to move at least: every input read once, every result written once.

    Forward: the weights and x in, the output out. Training: x and the weights are read twice, dL/doutput once; what the
    backward needs (the states and `Cell.saved` numbers a unit and step) is written and read; all gradients are written.
    """
    check_choice("scope", scope, SCOPES)
    rows, H = shape.steps * shape.batch, shape.hidden_size
    numbers = 0
    for cell, inputs in shape.layers:
        weights = len(cell.gates) * H * (inputs + H + 2) + len(cell.peepholes) * H
        if scope == "forward":
            numbers += weights + rows * (inputs + H)
        else:
            kept = rows * H * (len(cell.states) + cell.saved)
            numbers += 3 * weights + rows * (3 * inputs + 2 * H) + 2 * kept
    return numbers * np.dtype(dtype).itemsize


@dataclass(frozen=True)
class Bytes:
    """Memory of one forward and backward: the parameters and their gradients, and what BPTT keeps beside them."""

    parameters: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.kept


def memory(shape: Shape, dtype: DTypeLike = "float32", checkpoint: int | Literal["sqrt"] | None = None) -> Bytes:
    """Return the bytes that BPTT keeps: the states and saved numbers of every step, or with checkpoints of some.

    With a checkpoint every k steps only the states of those T/k steps stay, and k steps are kept while their segment is
    recomputed; "sqrt" is k = ⌈√T⌉ (Chen et al. 2016, sec. 3). Counts what grows with T, not inputs and outputs.
    """
    T, B, H = shape.steps, shape.batch, shape.hidden_size
    every = T if checkpoint is None else math.isqrt(T - 1) + 1 if checkpoint == "sqrt" else checkpoint
    check_positive("checkpoint", every)
    segments = -(-T // every)
    kept = 0
    for cell, _ in shape.layers:
        states = len(cell.states) * B * H
        kept += min(every, T) * (states + cell.saved * B * H) + (segments * states if checkpoint else states)
    item = np.dtype(dtype).itemsize
    return Bytes(2 * parameters(shape) * item, kept * item)


def roofline_seconds(flops: float, moved: float, peak_flops: float, bandwidth: float) -> float:
    """Return the least time that a machine can take: max(FLOPs / peak, bytes / bandwidth).

    Williams, Waterman & Patterson (2009). peak_flops in FLOP/s, bandwidth in bytes/s.
    """
    return max(flops / peak_flops, moved / bandwidth)
