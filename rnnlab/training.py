"""Training: whole steps of small networks in one compiled call."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checks import check_array, check_lengths, check_number, check_positive
from .kernels import cpu
from .kernels.step import Readout, prepare_step
from .model import SequenceModel
from .params import Params
from .rnn import past_end

__all__ = ["StepResult", "TrainingStep"]

Array = NDArray[Any]


class StepResult(NamedTuple):
    """What a step saw: the mean loss and the gradient's norm before it, and whether it moved the parameters."""

    loss: float
    norm: float
    moved: bool


class TrainingStep:
    """One step of gradient descent with norm clipping as one compiled call, which holds no GIL and uses one thread.

    Calling it with x (T, B, I), targets and lengths as in `SequenceModel.loss_and_gradients` takes the step
    w −= learning_rate·min(1, clip_norm / ‖g‖)·g (Pascanu, Mikolov & Bengio 2013, algorithm 1), g the gradient of the
    mean loss by all parameters of `model`. Where ‖g‖ is not finite nothing moves. All memory is taken once, for `steps`
    steps of a batch of `batch`; several of these, each with a model of its own, run side by side in threads.

    Raises ValueError for a model of several layers, of both directions, with dropout or of a topology that reads its
    own outputs.
    """

    def __init__(
        self, model: SequenceModel, steps: int, batch: int, *, learning_rate: float, clip_norm: float = math.inf
    ) -> None:
        net = model.rnn
        if model.generates or net.num_layers > 1 or net.bidirectional or net.dropout:
            raise ValueError(
                f"model must have one layer in one direction, no dropout and inputs that are given, "
                f"got {model.topology} of {net!r}"
            )
        self.steps, self.batch = check_positive("steps", steps), check_positive("batch", batch)
        if model.topology == "one_to_one" and steps != 1:
            raise ValueError(f"steps must be 1 for topology one_to_one, got {steps}")
        self.model = model
        self.learning_rate = check_number("learning_rate", learning_rate, 0, math.inf)
        self.clip_norm = clip_norm if clip_norm == math.inf else check_number("clip_norm", clip_norm, 0, math.inf)
        T, B, H, every = self.steps, self.batch, net.hidden_size, model.topology == "many_to_many"
        parts = {"rnn": net.params.like(), "readout": model.readout.like()}
        self.gradient = Params.join(parts)
        self._x, self._lengths = np.zeros((T, B, net.input_size), net.dtype), np.full(B, T)
        zero, d_output = np.zeros((len(net.cell.states), B, H), net.dtype), np.zeros((T, B, H), net.dtype)
        # Gradients of biases that a network does not have go to arrays that nobody reads.
        weights, into = net.weights(0), net.weights(0, parts["rnn"])
        forward, trace = cpu.prepare_forward(net.cell, self._x, weights, zero, self._lengths, True)
        backward, gradients = cpu.prepare_backward(net.cell, trace, weights, d_output, zero, None, into, inputs=False)
        # Without a loss at every step the last state of a sequence is read: it is held until slot T.
        features, d_features = (trace.state[0, 1:], d_output) if every else (trace.state[0, T], gradients.state[0, T])
        N = features.size // H
        self._scored = np.ones((T, B) if every else B, np.bool_)
        classes = model.loss_name == "cross_entropy"
        self._targets = np.zeros((N, 1 if classes else model.output_size), np.int64 if classes else net.dtype)
        readout = Readout(
            features.reshape(N, H),
            d_features.reshape(N, H),
            self._targets,
            self._scored.reshape(-1),
            *(params[f"readout.{name}"] for params in (model.params, self.gradient) for name in ("weight", "bias")),
        )
        self._step = prepare_step(
            model.loss.name,
            model.loss.row,
            (forward, backward),
            readout,
            gradients.state[:, T],
            model.params.flat,
            self.gradient.flat,
        )

    def __call__(self, x: Array, targets: Array, lengths: Any = None) -> StepResult:
        """Take one step, see the class. Raises as `SequenceModel.loss_and_gradients`, before anything moves."""
        net = self.model.rnn
        past = None if lengths is None else lambda x: past_end(lengths, x)
        x = check_array("x", x, (self.steps, self.batch, net.input_size), net.dtype, past=past)
        self._lengths[:] = check_lengths("lengths", lengths, self.batch, self.steps)
        self._scored[:] = self.model.scored(self._lengths, self.steps, self._scored.ndim == 2)
        self._targets[:] = self.model.check_targets(targets, self._scored).reshape(self._targets.shape)
        self._x[:] = x
        return StepResult(*self._step(self.learning_rate, self.clip_norm))
