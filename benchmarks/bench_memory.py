"""Peak memory of a process that trains, against the number of steps, beside one that only holds the inputs."""

from . import shapes


class Memory:
    version = "1"
    params = (shapes.CELLS, [100, 1000])
    param_names = ("cell", "steps")

    def setup(self, cell, steps):
        self.net, x, d_output = shapes.problem(cell, "T100_B32_H128", "float32")
        self.x, self.d_output = (a.repeat(steps // len(a), axis=0) for a in (x, d_output))

    def peakmem_empty(self, cell, steps):
        return self.x, self.d_output

    def peakmem_training(self, cell, steps):
        return self.net.backward(self.net.forward(self.x), self.d_output)
