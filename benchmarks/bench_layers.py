"""Wall time of one layer: inference, as it comes and prepared, and training (forward and all gradients)."""

from rnnlab import Inference

from . import shapes


class Layers:
    version = "1"
    number = 5
    params = (shapes.CELLS, list(shapes.SHAPES), shapes.DEVICES, shapes.DTYPES)
    param_names = ("cell", "shape", "device", "dtype")

    def setup(self, cell, shape, device, dtype):
        self.net, self.x, self.d_output = shapes.problem(cell, shape, dtype, device)
        self.run = Inference(self.net, *self.x.shape[:2])

    def time_forward(self, cell, shape, device, dtype):
        self.net.forward(self.x, keep=False)

    def time_inference(self, cell, shape, device, dtype):
        self.run(self.x)

    def time_training(self, cell, shape, device, dtype):
        self.net.backward(self.net.forward(self.x), self.d_output)
