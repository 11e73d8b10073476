"""Wall time of one layer: inference and training (forward and all gradients), each as it comes and prepared."""

from functools import cache

from rnnlab import Backpropagation, Inference

from . import shapes


@cache
def prepared(cell, shape, dtype):
    """Return what runs and what trains a network, both warm, once: asv runs `setup` before every call."""
    net, x, d_output = shapes.problem(cell, shape, dtype)
    run, through = (kind(net, *x.shape[:2]) for kind in (Inference, Backpropagation))
    run(x)
    through.forward(x)
    through.backward(d_output)
    return run, through


def on_the_cpu(cell, shape, device, dtype):
    if device != "cpu":
        raise NotImplementedError("prepared networks run on the CPU")


class Layers:
    version = "1"
    number = 5
    params = (shapes.CELLS, list(shapes.SHAPES), shapes.DEVICES, shapes.DTYPES)
    param_names = ("cell", "shape", "device", "dtype")

    def setup(self, cell, shape, device, dtype):
        self.net, self.x, self.d_output = shapes.problem(cell, shape, dtype, device)
        if device == "cpu":
            self.run, self.through = prepared(cell, shape, dtype)

    def time_forward(self, cell, shape, device, dtype):
        self.net.forward(self.x, keep=False)

    def time_inference(self, cell, shape, device, dtype):
        self.run(self.x)

    time_inference.setup, time_inference.version = on_the_cpu, "2"

    def time_training(self, cell, shape, device, dtype):
        self.net.backward(self.net.forward(self.x), self.d_output)

    def time_backpropagation(self, cell, shape, device, dtype):
        self.through.forward(self.x)
        self.through.backward(self.d_output)

    time_backpropagation.setup, time_backpropagation.version = on_the_cpu, "2"
