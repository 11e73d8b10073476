"""What is measured: cells, shapes, devices, dtypes. Append only: asv's history hangs on these names."""

from functools import cache

import numpy as np

import rnnlab
from rnnlab.costs import Shape
from rnnlab.kernels import available

CELLS = ["rnn_tanh", "lstm", "gru"]
DEVICES = ["cpu", "cuda"]
DTYPES = ["float32", "float64"]

#: Steps, batch, inputs and hidden units by name.
SHAPES = {
    "T100_B1_H32": (100, 1, 32, 32),
    "T100_B20_H50": (100, 20, 50, 50),
    "T100_B32_H128": (100, 32, 128, 128),
    "T100_B64_H256": (100, 64, 256, 256),
}


def size(cell, shape):
    """Return the `Shape` of a name."""
    return Shape(cell, *SHAPES[shape])


@cache
def problem(cell, shape, dtype, device="cpu"):
    """Return a network that is compiled and warm, inputs x and an upstream gradient, all random.

    Cached, because asv runs `setup` before every sample. Raises NotImplementedError, asv's n/a, without the device.
    """
    if reason := available(device):
        raise NotImplementedError(reason)
    steps, batch, inputs, hidden = SHAPES[shape]
    rng = np.random.default_rng(0)
    net = rnnlab.Recurrent(cell, inputs, hidden, dtype=dtype, device=device, seed=0)
    x = rng.normal(size=(steps, batch, inputs)).astype(dtype)
    d_output = rng.normal(size=(steps, batch, hidden)).astype(dtype)
    net.backward(net.forward(x), d_output)
    return net, x, d_output
