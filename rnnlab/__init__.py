"""rnnlab: what happens to a gradient inside a recurrent network, exactly and fast."""

from .cells import CELLS
from .gradients import Decay, GradientFlow, gradient_flow
from .inference import Inference
from .model import LossGradients, SequenceModel
from .rnn import GRU, LSTM, RNN, Gradients, Recurrent, Trace
from .training import StepResult, TrainingStep

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Decay",
    "GradientFlow",
    "Gradients",
    "Inference",
    "LossGradients",
    "Recurrent",
    "SequenceModel",
    "StepResult",
    "Trace",
    "TrainingStep",
    "gradient_flow",
]
