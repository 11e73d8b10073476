"""What is measured: cells and shapes. Append only: asv's history hangs on these names."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnlab

CELLS = ["rnn_tanh", "lstm", "gru"]
DTYPES = ["float32", "float64"]

#: Steps, batch, inputs and hidden units by name.
SHAPES = {
    "T100_B1_H32": (100, 1, 32, 32),
    "T100_B20_H50": (100, 20, 50, 50),
    "T100_B32_H128": (100, 32, 128, 128),
    "T100_B64_H256": (100, 64, 256, 256),
}


def problem(cell: str, shape: str, dtype: str) -> tuple[rnnlab.Recurrent, NDArray[Any], NDArray[Any]]:
    """Return a network, inputs x and an upstream gradient, all random."""
    steps, batch, inputs, hidden = SHAPES[shape]
    rng = np.random.default_rng(0)
    net = rnnlab.Recurrent(cell, inputs, hidden, dtype=dtype, seed=0)
    x = rng.normal(size=(steps, batch, inputs)).astype(dtype)
    return net, x, rng.normal(size=(steps, batch, hidden)).astype(dtype)
