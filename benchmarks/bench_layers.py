"""Wall time of one layer: inference, as it comes and prepared, and training (forward and all gradients)."""

from rnnlab import Inference

from . import shapes


def on_the_cpu(cell, shape, device, dtype):
    if device != "cpu":
        raise NotImplementedError("a prepared inference runs on the CPU")


class Layers:
    version = "1"
    number = 5
    params = (shapes.CELLS, list(shapes.SHAPES), shapes.DEVICES, shapes.DTYPES)
    param_names = ("cell", "shape", "device", "dtype")

    def setup(self, cell, shape, device, dtype):
        self.net, self.x, self.d_output = shapes.problem(cell, shape, dtype, device)
        self.run = Inference(self.net, *self.x.shape[:2]) if device == "cpu" else None

    def time_forward(self, cell, shape, device, dtype):
        self.net.forward(self.x, keep=False)

    def time_inference(self, cell, shape, device, dtype):
        self.run(self.x)

    time_inference.setup = on_the_cpu

    def time_training(self, cell, shape, device, dtype):
        self.net.backward(self.net.forward(self.x), self.d_output)
