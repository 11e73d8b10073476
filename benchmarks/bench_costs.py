"""Exact counts: a change of these is a change of the network."""

from rnnlab.costs import arithmetic, parameters

from . import shapes


class Costs:
    version = "1"
    params = (shapes.CELLS, list(shapes.SHAPES))
    param_names = ("cell", "shape")

    def track_parameters(self, cell, shape):
        return parameters(shapes.size(cell, shape))

    def track_flops(self, cell, shape):
        return arithmetic(shapes.size(cell, shape), "training")


Costs.track_parameters.unit = "parameters"
Costs.track_flops.unit = "FLOPs"
