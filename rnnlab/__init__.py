"""rnnlab: what happens to a gradient inside a recurrent network, exactly and fast."""

from .cells import CELLS
from .rnn import GRU, LSTM, RNN, Gradients, Recurrent, Trace

__all__ = ["CELLS", "GRU", "LSTM", "RNN", "Gradients", "Recurrent", "Trace"]
