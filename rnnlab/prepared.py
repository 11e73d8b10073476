"""A network prepared for sequences of one shape, which it runs again and again in memory that it keeps.

What does not change from call to call is done once; numbers are those of `Recurrent` to the last bit. One thread may
use such an object at a time, on the CPU.
"""

from typing import Any

import numpy as np

from .checks import check_array, check_integer
from .kernels import Array, cpu
from .kernels.team import empty, run_together
from .params import Params
from .rnn import Gradients, Recurrent, State, of_layers

__all__ = ["Backpropagation", "Inference"]


def _shape_of(net: Recurrent, steps: int, batch: int) -> tuple[int, int, int]:
    """Return the shape (T, B, I) of inputs; raise ValueError for sizes below 1 and a network on a GPU."""
    if not isinstance(net, Recurrent):
        raise TypeError(f"net must be a Recurrent network, got {type(net).__name__}")
    if net.device != "cpu":
        raise ValueError(f"net must be on the CPU, got {net!r}")
    return check_integer("steps", steps), check_integer("batch", batch), net.input_size


class Inference:
    """A network prepared to run: its weights are packed once, for all.

    Calling it with x (T, B, I) and a state (zeros where None) returns the output (T, B, D·H) and the last state, those
    of `Recurrent.forward(x, state, keep=False)`. Weights are those at the time of preparation: changes of `net.params`
    show in another one.

    Raises ValueError for sizes below 1 and a network on a GPU, TypeError for what is no network.
    """

    def __init__(self, net: Recurrent, steps: int, batch: int) -> None:
        self.net, self.shape = net, _shape_of(net, steps, batch)
        S, H, lengths = len(net.cell.states), net.hidden_size, np.full(batch, steps)
        start, self._calls = np.zeros((S, batch, H), net.dtype), []
        for k in range(net.num_layers * net.directions):
            weights = net.weights(k)
            x = np.zeros((steps, batch, weights.weight_ih.shape[1]), net.dtype)
            call, _ = cpu.prepare_forward(net.cell, x, weights, start, lengths, False)
            run_together(*call)
            self._calls.append(cpu.repeat(call, x[:0].copy(), np.empty((1, 0, batch, H), net.dtype)))

    def __call__(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Return (output, last state), see the class. Raises as `Recurrent.forward`."""
        net, (T, B, _) = self.net, self.shape
        output = check_array("x", x, self.shape, net.dtype)
        initial = None if state is None else net.stack_state("state", state, B)
        last, slots = [], (1, T + len(net.cell.states), B, net.hidden_size)
        for layer in range(net.num_layers):
            outputs = []
            for k in range(layer * net.directions, (layer + 1) * net.directions):
                states, reverse = empty(slots, net.dtype), k % net.directions
                states[0, :: T + 1] = 0 if initial is None else initial[:, k]
                source = np.ascontiguousarray(output[::-1]) if reverse else output
                run_together(*cpu.repeat(self._calls[k], source, states))
                outputs.append(states[0, T:0:-1] if reverse else states[0, 1 : T + 1])
                last.append(states[0, T:])
            output = np.concatenate(outputs, axis=2) if net.bidirectional else outputs[0]
        return output, net.unstack_state(of_layers(last))


class _Layer:
    """One layer in one direction, its calls with what they fill: state and d_state (S, T+1, B, H), dx (T, B, I)."""

    def __init__(self, net: Recurrent, k: int, steps: int, batch: int, gradients: Params) -> None:
        self.k, self.reverse, H = k, k % net.directions == 1, net.hidden_size
        weights, into, lengths = net.weights(k), net.weights(k, gradients), np.full(batch, steps)
        zero = np.zeros((len(net.cell.states), batch, H), net.dtype)
        x, d_output = (np.empty((steps, batch, n), net.dtype) for n in (weights.weight_ih.shape[1], H))
        self._forward, trace = cpu.prepare_forward(net.cell, x, weights, zero, lengths, True)
        self._backward, given = cpu.prepare_backward(net.cell, trace, weights, d_output, zero, None, into)
        self._x, self.state, self.d_state, self.dx = x, trace.state, given.state, given.x

    def forward(self, x: Array, initial: Array | float) -> None:
        self._x = np.ascontiguousarray(x[::-1]) if self.reverse else x
        self.state[:, 0] = initial
        run_together(*self._forward.on(self._x))

    def backward(self, d_output: Array, d_final: Array | float) -> None:
        self.d_state[:, -1] = d_final
        run_together(*self._backward.on(self._x, np.ascontiguousarray(d_output[::-1] if self.reverse else d_output)))


class Backpropagation:
    """A network prepared to be trained: forward pass and BPTT, with the weights that it has when it is called.

    Results are written over by the next call: copy what is to last. Between `forward` and `backward` change neither x
    nor weights; the output is read-only where `backward` reads it. There is no dropout, as in `Recurrent.forward`
    without `training`.

    Raises ValueError for sizes below 1 and a network on a GPU, TypeError for what is no network.
    """

    def __init__(self, net: Recurrent, steps: int, batch: int) -> None:
        self.net, self.shape = net, _shape_of(net, steps, batch)
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.net, *self.shape[:2])  # a copy is prepared anew

    def _prepare(self) -> None:
        net, numbers = self.net, range(self.net.num_layers * self.net.directions)
        self._gradients, self._ready = net.params.like(), False
        self._parts = [_Layer(net, k, *self.shape[:2], self._gradients) for k in numbers]
        self._layers = [self._parts[k : k + net.directions] for k in numbers[:: net.directions]]
        self._weights = net.params.flat

    def _not_kept(self, given: Array) -> Array:
        """Return an array, a copy where it is a result of an earlier call: that is written over."""
        kept = (result for part in self._parts for result in (part.state, part.d_state, part.dx))
        return given.copy() if any(np.may_share_memory(given, result) for result in kept) else given

    def forward(self, x: Array, state: State | None = None) -> tuple[Array, State]:
        """Return the output (T, B, D·H) for x (T, B, I) and the last state. Raises as `Recurrent.forward`."""
        net = self.net
        output = self._not_kept(check_array("x", x, self.shape, net.dtype))
        initial = None if state is None else net.stack_state("state", state, self.shape[1])
        if self._weights is not net.params.flat:  # they have moved into those of a model
            self._prepare()
        self._ready = False
        for layer in self._layers:
            for part in layer:
                part.forward(output, 0 if initial is None else initial[:, part.k])
            outputs = [part.state[0, :0:-1] if part.reverse else part.state[0, 1:] for part in layer]
            output = np.concatenate(outputs, axis=2) if net.bidirectional else outputs[0]
        self._ready, output.flags.writeable = True, net.bidirectional
        return output, net.unstack_state(of_layers([part.state[:, -1] for part in self._parts]))

    def backward(self, d_output: Array, d_final: State | None = None) -> Gradients:
        """Return the gradients of the last `forward`, those of `Recurrent.backward`, and raise as that does.

        Raises RuntimeError where there was none.
        """
        if not self._ready:
            raise RuntimeError("backward needs a forward pass before it, got none")
        net, (T, B, _), H = self.net, self.shape, self.net.hidden_size
        dx = self._not_kept(check_array("d_output", d_output, (T, B, net.directions * H), net.dtype))
        last = None if d_final is None else self._not_kept(net.stack_state("d_final", d_final, B))
        self._gradients.flat[:] = 0
        for layer in reversed(self._layers):
            for part in layer:
                upstream = dx[:, :, H * part.reverse :][:, :, :H] if net.bidirectional else dx
                part.backward(upstream, 0 if last is None else last[:, part.k])
            dx = layer[0].dx + layer[1].dx[::-1] if net.bidirectional else layer[0].dx
        h, *c = ([part.d_state[s] for part in self._parts] for s in range(len(net.cell.states)))
        first = net.unstack_state(of_layers([part.d_state[:, 0] for part in self._parts]))
        return Gradients(self._gradients, dx, h, c[0] if c else [], first)
