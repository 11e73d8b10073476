"""Wall time of one layer: inference, and training (forward and all gradients)."""

from functools import cache

from . import shapes


@cache
def _warm(cell, shape, dtype):
    # asv calls setup before every sample: building and compiling belong to none of them
    net, x, d_output = shapes.problem(cell, shape, dtype)
    net.backward(net.forward(x), d_output)
    return net, x, d_output


class Layers:
    version = "1"
    number = 5
    params = (shapes.CELLS, list(shapes.SHAPES), shapes.DTYPES)
    param_names = ("cell", "shape", "dtype")

    def setup(self, cell, shape, dtype):
        self.net, self.x, self.d_output = _warm(cell, shape, dtype)

    def time_forward(self, cell, shape, dtype):
        self.net.forward(self.x, keep=False)

    def time_training(self, cell, shape, dtype):
        self.net.backward(self.net.forward(self.x), self.d_output)
