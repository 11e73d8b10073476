"""Inference: a network that runs sequences of one shape again and again."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_array, check_integer
from .kernels import cpu
from .kernels.team import empty, run_together
from .rnn import Recurrent, State

__all__ = ["Inference"]

Array = NDArray[Any]


class Inference:
    """A network prepared for sequences of `steps` steps in batches of `batch`: its weights are packed once, for all.

    Calling it with x (T, B, I) and a state (zeros where None) returns the output (T, B, D·H) and the last state, those
    of `Recurrent.forward(x, state, keep=False)` to the last bit. Weights are those at the time of preparation: changes
    of `net.params` show in another one. It works in memory that it keeps: one thread may call it at a time.

    Raises ValueError for sizes below 1 and a network on a GPU.
    """

    def __init__(self, net: Recurrent, steps: int, batch: int) -> None:
        if net.device != "cpu":
            raise ValueError(f"net must be on the CPU, got {net!r}")
        self.net, self.steps, self.batch = net, check_integer("steps", steps), check_integer("batch", batch)
        S, T, B, lengths = len(net.cell.states), self.steps, self.batch, np.full(self.batch, self.steps)
        start, self._calls = np.zeros((S, B, net.hidden_size), net.dtype), []
        for k in range(net.num_layers * net.directions):
            weights = net.weights(k)
            x = np.zeros((T, B, weights.weight_ih.shape[1]), net.dtype)
            call, _ = cpu.prepare_forward(net.cell, x, weights, start, lengths, False)
            run_together(*call)
            self._calls.append(cpu.repeat(call, x[:0].copy(), np.empty((1, 0, B, net.hidden_size), net.dtype)))

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Return (output, last state), see the class. Raises as `Recurrent.forward`."""
        net, T, B, S = self.net, self.steps, self.batch, len(self.net.cell.states)
        output = check_array("x", x, (T, B, net.input_size), net.dtype)
        initial = None if state is None else net.stack_state("state", state, B)
        last = np.empty((S, len(self._calls), B, net.hidden_size), net.dtype)
        for layer in range(net.num_layers):
            outputs = []
            for direction in range(net.directions):
                k = layer * net.directions + direction
                states = empty((1, T + S, B, net.hidden_size), net.dtype)
                states[0, 0], states[0, T + 1 :] = (0, 0) if initial is None else (initial[0, k], initial[1:, k])
                source = np.ascontiguousarray(output[::-1]) if direction else output
                run_together(*cpu.repeat(self._calls[k], source, states))
                outputs.append(states[0, T:0:-1] if direction else states[0, 1 : T + 1])
                last[:, k] = states[0, T : T + S]
            output = np.concatenate(outputs, axis=2) if net.bidirectional else outputs[0]
        return output, net.unstack_state(last)
