"""Wall time of a whole training step of a small network: forward, loss, BPTT, clipping, update."""

from functools import cache

import numpy as np

from rnnlab import Recurrent, SequenceModel, TrainingStep
from rnnlab.clipping import ByGlobalNorm
from rnnlab.optim import SGD

from . import shapes


@cache
def prepared(cell, dtype):
    """Return a step and its arguments, warm, once: asv runs `setup` before every call."""
    rng = np.random.default_rng(0)
    model = SequenceModel(Recurrent(cell, 2, 50, dtype=dtype, seed=0), 10, seed=0)
    arguments = rng.normal(size=(100, 20, 2)).astype(dtype), rng.integers(10, size=20)
    step = TrainingStep(model, 100, 20, SGD(1e-3), ByGlobalNorm(1.0))
    step(*arguments)
    return step, arguments


class Steps:
    version = "2"
    number = 20
    params = (shapes.CELLS, shapes.DTYPES)
    param_names = ("cell", "dtype")

    def setup(self, cell, dtype):
        self.step, self.arguments = prepared(cell, dtype)

    def time_T100_B20_I2_H50(self, cell, dtype):
        self.step(*self.arguments)
