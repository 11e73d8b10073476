"""rnnlab: what happens to a gradient inside a recurrent network, exactly and fast."""

from .cells import CELLS
from .contributions import Contributions, contribution_matrix
from .gradients import Decay, GradientFlow, gradient_flow
from .lyapunov import Lyapunov, lyapunov_spectrum
from .model import LossGradients, SequenceModel
from .prepared import Backpropagation, Inference
from .rnn import GRU, LSTM, RNN, Gradients, Recurrent, Trace
from .training import StepResult, TrainingLog, TrainingStep, train

__all__ = [
    "CELLS",
    "GRU",
    "LSTM",
    "RNN",
    "Backpropagation",
    "Contributions",
    "Decay",
    "GradientFlow",
    "Gradients",
    "Inference",
    "LossGradients",
    "Lyapunov",
    "Recurrent",
    "SequenceModel",
    "StepResult",
    "Trace",
    "TrainingLog",
    "TrainingStep",
    "contribution_matrix",
    "gradient_flow",
    "lyapunov_spectrum",
    "train",
]
