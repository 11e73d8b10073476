"""Wall time of gradient flow, with its log-scaled adjoint."""

from functools import cache

import rnnlab
from rnnlab.datasets import sample

from . import shapes


@cache
def _warm(cell, steps):
    rnn = rnnlab.Recurrent(cell, 1, 64, seed=0)
    model = rnnlab.SequenceModel(rnn, 1, "many_to_one", "mse", seed=0)
    x, targets = sample("white_noise", steps, 16, seed=0)
    rnnlab.gradient_flow(model, x, targets)
    return model, x, targets


class GradientFlow:
    version = "1"
    params = (shapes.CELLS, [100, 1000])
    param_names = ("cell", "steps")

    def setup(self, cell, steps):
        self.arguments = _warm(cell, steps)

    def time_gradient_flow(self, cell, steps):
        rnnlab.gradient_flow(*self.arguments)
