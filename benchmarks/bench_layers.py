"""Wall time of one layer: inference and training (forward and all gradients), each as it comes and prepared."""

from rnnlab import Backpropagation, Inference

from . import shapes


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
            self.run, self.through = (kind(self.net, *self.x.shape[:2]) for kind in (Inference, Backpropagation))

    def time_forward(self, cell, shape, device, dtype):
        self.net.forward(self.x, keep=False)

    def time_inference(self, cell, shape, device, dtype):
        self.run(self.x)

    time_inference.setup = on_the_cpu

    def time_training(self, cell, shape, device, dtype):
        self.net.backward(self.net.forward(self.x), self.d_output)

    def time_backpropagation(self, cell, shape, device, dtype):
        self.through.forward(self.x)
        self.through.backward(self.d_output)

    time_backpropagation.setup = on_the_cpu
