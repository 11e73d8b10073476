"""Peak memory of a process that trains, against the number of steps, beside one that only holds the inputs."""

import numpy as np

import rnnlab

from . import shapes


class Memory:
    version = "2"
    params = (shapes.CELLS, [100, 1000])
    param_names = ("cell", "steps")

    def setup(self, cell, steps):
        _, batch, inputs, hidden = shapes.SHAPES["T100_B32_H128"]
        self.net, rng = rnnlab.Recurrent(cell, inputs, hidden, seed=0), np.random.default_rng(0)
        self.x, self.d_output = (rng.normal(size=(steps, batch, n)).astype("float32") for n in (inputs, hidden))
        self.net.backward(self.net.forward(self.x[:1, :1]), self.d_output[:1, :1])  # compiled, and no more

    def peakmem_empty(self, cell, steps):
        return self.x, self.d_output

    def peakmem_training(self, cell, steps):
        return self.net.backward(self.net.forward(self.x), self.d_output)
