"""The fastest peer's time over ours, interleaved in one process: above 1 we are faster. n/a without any peer."""

from rnnlab.compare import compare, worst_ratio
from rnnlab.peers import PEERS, Problem

from . import shapes


class Peers:
    version = "1"
    params = (shapes.CELLS, list(shapes.SHAPES))
    param_names = ("cell", "shape")
    timeout = 120

    def setup(self, cell, shape):
        if not any(peer.missing() is None for peer in PEERS.values()):
            raise NotImplementedError("no peer is installed")

    def track_ratio_forward(self, cell, shape):
        return self._ratio(cell, shape, "forward")

    def track_ratio_training(self, cell, shape):
        return self._ratio(cell, shape, "training")

    def _ratio(self, cell, shape, scope):
        problem = Problem(shapes.size(cell, shape), scope)
        return worst_ratio(compare([problem], list(PEERS), seconds=1.0))


for _track in (Peers.track_ratio_forward, Peers.track_ratio_training):
    _track.unit = "peer's time / ours"
