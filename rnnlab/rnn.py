"""Recurrent networks: any cell of `CELLS`, stacked, in one or both directions, over sequences of unequal length."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import params as parameters
from .cells import CELLS
from .checks import (
    check_array,
    check_choice,
    check_dtype,
    check_flag,
    check_integer,
    check_lengths,
    check_number,
    generator,
)
from .kernels import DEVICES, Array, LayerGradients, LayerTrace, LayerWeights, backend
from .params import Params

__all__ = ["GRU", "LSTM", "RNN", "Checkpoints", "Gradients", "Recurrent", "Trace"]

State = Array | tuple[Array, Array]


class Trace(NamedTuple):
    """What `Recurrent.forward` computed; layer-direction k is layer·D + direction, D being 1 or 2 directions.

    output (T, B, D·H), zero past the end of a sequence; h[k], and c[k] for cells with a cell state, (T+1, B, H): slot 0
    the initial state, slot s the state after s processed steps (a reverse direction begins with the last element of
    each sequence), held past its end; final: the last state, (L·D, B, H), or the pair (h, c) of them. `backward` reads
    the trace, x and the parameters: change none of them in between.
    """

    output: Array
    h: list[Array]
    c: list[Array]
    final: State
    layers: list[LayerTrace]
    lengths: NDArray[np.int64]
    masks: list[Array | None]
    kept: bool


class Checkpoints(NamedTuple):
    """What `Recurrent.checkpoint` kept: states (S, L, B, H) once in `every` steps, output if asked, the last state."""

    x: Array
    lengths: NDArray[np.int64]
    every: int
    states: list[Array]
    output: Array | None
    final: State


class Gradients(NamedTuple):
    """What `Recurrent.backward` computed.

    params: dL/d each parameter, by name; x (T, B, I); h[k] and c[k] (T+1, B, H): the total derivatives dL/dh_t and
    dL/dc_t, in the slots of `Trace.h`; state: of the initial state, in the form of `Trace.final`.
    """

    params: Params
    x: Array
    h: list[Array]
    c: list[Array]
    state: State


class Recurrent:
    """A recurrent network of any cell of `CELLS`.

    Arguments mean what they mean in PyTorch: `dropout` is the probability with which outputs of all layers but the last
    are dropped in training. `params` maps PyTorch's names (`weight_ih_l0`, `bias_hh_l1_reverse`, …; `peephole_l0` for
    the peephole LSTM) to arrays. Weights start from PyTorch's uniform distribution, drawn from `seed`.

    `device` is where it is computed; parameters, inputs and results are NumPy arrays on either.

    Raises ValueError for an unknown cell, dtype or device, a size below 1 or a dropout outside [0, 1), and
    `kernels.DeviceNotAvailable` for a device that cannot be used here.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dtype: DTypeLike = "float32",
        device: str = "cpu",
        seed: int | None = None,
    ) -> None:
        self.cell = CELLS[check_choice("cell", cell, CELLS)]
        self.input_size = check_integer("input_size", input_size)
        self.hidden_size = check_integer("hidden_size", hidden_size)
        self.num_layers = check_integer("num_layers", num_layers)
        self.bias, self.bidirectional = check_flag("bias", bias), check_flag("bidirectional", bidirectional)
        self.dropout = check_number("dropout", dropout, 0, 1)
        self.dtype = check_dtype("dtype", dtype)
        self.device = check_choice("device", device, DEVICES)
        backend(device)
        self.directions = 2 if bidirectional else 1
        self._names: list[dict[str, str]] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for k in range(self.num_layers * self.directions):
            layer, direction = divmod(k, self.directions)
            features = self.input_size if layer == 0 else self.directions * self.hidden_size
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            one = parameters.layer_shapes(self.cell, features, self.hidden_size, self.bias)
            self._names.append({name: name + suffix for name in one})
            shapes |= {name + suffix: shape for name, shape in one.items()}
        self.params = Params(shapes, self.dtype)
        self._dropout_rng = generator(seed, "dropout")
        self.initialise(seed=seed)

    def __repr__(self) -> str:
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return (
            f"Recurrent({self.cell.name!r}, {self.input_size}, {self.hidden_size}, {self.num_layers}, "
            f"bias={self.bias}, bidirectional={self.bidirectional}, dropout={self.dropout}, "
            f"dtype={self.dtype.name!r}{device})"
        )

    def initialise(
        self,
        recurrent: str = "uniform",
        input: str = "uniform",
        bias: str | None = None,
        *,
        gain: float = 1.0,
        forget_bias: float | None = None,
        chrono: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Draw all weights anew, gate by gate.

        `recurrent` and `input` name initialisers of `params.INITIALISERS` (uniform, glorot, orthogonal, identity,
        gaussian, sparse, zeros) for W_hh, which is then multiplied by `gain`, and W_ih. `bias` is "uniform" (the
        default where `recurrent` is) or "zeros". `forget_bias` sets the summed bias of the gate that keeps the state
        (f, or z of a GRU); `chrono` draws that bias for dependencies of up to so many steps (Tallec & Ollivier 2018).
        """
        if bias is None:
            bias = "uniform" if recurrent == "uniform" else "zeros"
        layers = [{name: self.params[full] for name, full in names.items()} for names in self._names]
        parameters.initialise(
            layers,
            self.cell,
            recurrent=recurrent,
            input=input,
            bias=bias,
            gain=gain,
            forget_bias=forget_bias,
            chrono=chrono,
            rng=generator(seed, "weights"),
        )

    def forward(
        self,
        x: Array,
        state: State | None = None,
        lengths: Any = None,
        *,
        training: bool = False,
        keep: bool = True,
    ) -> Trace:
        """Run the network over x (T, B, I) from `state` (zeros where None; the form of `Trace.final`).

        `lengths` (B,) are the sequences' lengths, in any order, as in PyTorch's packed sequences. `training` applies
        dropout. keep=False keeps only what the trace shows, for inference; such a trace has no backward.

        Raises TypeError for another dtype; ValueError for another shape, an empty sequence or numbers not finite.
        """
        return self._run(*self._check_inputs(x, state, lengths), training, keep)

    def _check_inputs(self, x: Array, state: State | None, lengths: Any) -> tuple[Array, Array, NDArray[np.int64]]:
        """Return x, 0 past the end of sequences, the stacked state and lengths (B,); raise as `forward` says."""
        past = None if lengths is None else lambda x: past_end(lengths, x)
        x = check_array("x", x, ("T", "B", self.input_size), self.dtype, past=past)
        steps = check_lengths("lengths", lengths, x.shape[1], x.shape[0])
        return x, self.stack_state("state", state, x.shape[1]), steps

    def carry_on(self, x: Array, state: State | None, training: bool = False, keep: bool = True) -> Trace:
        """Do what `forward` does, unchecked: from a state that has diverged come NaN."""
        initial = self.stack_state("state", None, x.shape[1]) if state is None else _stack(state)
        return self._run(x, initial, np.full(x.shape[1], len(x)), training, keep)

    def _run(self, x: Array, initial: Array, steps: NDArray[np.int64], training: bool, keep: bool) -> Trace:
        """Do what `forward` does from a stacked state (S, L·D, B, H), unchecked; a sequence may be empty here."""
        T = x.shape[0]
        layers: list[LayerTrace] = []
        masks: list[Array | None] = []
        output = x
        for layer in range(self.num_layers):
            mask = None
            if layer and training and self.dropout:
                keep_probability = 1 - self.dropout
                mask = (self._dropout_rng.random(output.shape) < keep_probability).astype(self.dtype)
                mask /= self.dtype.type(keep_probability)
                output = output * mask
            masks.append(mask)
            outputs = []
            for direction in range(self.directions):
                k = layer * self.directions + direction
                source = _reverse(output, steps) if direction else output
                weights = self.weights(k)
                trace = backend(self.device).forward(self.cell, source, weights, initial[:, k], steps, keep)
                layers.append(trace)
                h = trace.state[0, 1:]
                if steps.min() < T:
                    h = np.where((np.arange(T)[:, None] >= steps)[:, :, None], self.dtype.type(0), h)
                outputs.append(_reverse(h, steps) if direction else h)
            output = np.concatenate(outputs, axis=2) if self.bidirectional else outputs[0]
        states = [[trace.state[s] for trace in layers] for s in range(len(self.cell.states))]
        final = self.unstack_state(of_layers([trace.state[:, T] for trace in layers]))
        return Trace(output, states[0], states[1] if len(states) > 1 else [], final, layers, steps, masks, keep)

    def backward(self, trace: Trace, d_output: Array, d_final: State | None = None) -> Gradients:
        """Backpropagate through time from dL/doutput (T, B, D·H) and dL/dfinal (zeros where None).

        `d_output` past the end of a sequence is ignored. An x86 CPU sets gradients below the smallest normal number,
        1.2e-38 in float32, to 0, as with XLA; `gradient_flow` loses none. Raises as `forward`; ValueError for a trace
        made with keep=False.
        """
        self._check_trace(trace)
        shape = (*trace.output.shape[:2], self.directions * self.hidden_size)
        past = (lambda d: past_end(trace.lengths, d)) if trace.lengths.min() < shape[0] else None
        d_output = check_array("d_output", d_output, shape, self.dtype, past=past)
        if d_final is not None:
            self.stack_state("d_final", d_final, shape[1])
        return self.gradients(trace, d_output, d_final)

    def gradients(
        self, run: Trace | Checkpoints, d_output: Array | None, d_final: State | None = None, clip: Any = None
    ) -> Gradients:
        """Do what `backward` does, unchecked: a network that has diverged has NaN. `clip` is that of `backpropagate`.

        Between checkpoints states are computed again: gradients are the same to the last bit, but `h` and `c`, which
        would take as much memory, are empty.
        """
        if isinstance(run, Checkpoints):
            return self._gradients_between(run, d_output, d_final, clip)
        gradients = self.params.like()
        into = [self.weights(k, gradients) for k in range(len(self._names))]
        d_output = np.zeros_like(run.output) if d_output is None else d_output
        layers, dx, _ = self.backpropagate(run, d_output, d_final, into=into, clip=clip)
        states = [[layer.state[s] for layer in layers] for s in range(len(self.cell.states))]
        initial = self.unstack_state(of_layers([layer.state[:, 0] for layer in layers]))
        return Gradients(gradients, dx, states[0], states[1] if len(states) > 1 else [], initial)

    def backpropagate(
        self,
        trace: Trace,
        d_output: Array,
        d_final: State | None = None,
        *,
        scaled: bool = False,
        into: list[LayerWeights] | None = None,
        second: list[LayerWeights] | None = None,
        clip: Any = None,
    ) -> tuple[list[LayerGradients], Array, NDArray[np.int64] | None]:
        """Return the gradients of every layer-direction, dL/dx, and with `scaled` the exponents (T, B) of dL/dx.

        With `scaled` the adjoint is rescaled by powers of two as it goes back (see `kernels.LayerGradients`). `into`
        are arrays of zeros for dL/d weights, `second` others, see `kernels.cpu.backward`. `clip` is a
        `kernels.cpu.Clip`, which clips the adjoint at every step. Nothing is checked: `gradients` and gradient analysis
        stand on this.
        """
        if clip and self.device != "cpu":
            raise ValueError(f"clipping within BPTT needs a network on the CPU, got {self!r}")
        T, B, _ = trace.output.shape
        d_last = self.stack_state("d_final", None, B) if d_final is None else _stack(d_final)
        exponent = np.zeros((T, B), np.int64) if scaled else None
        H = self.hidden_size
        gradients: list[LayerGradients] = []
        for layer in reversed(range(self.num_layers)):
            pair = []
            for direction in range(self.directions):
                k = layer * self.directions + direction
                upstream = np.ascontiguousarray(d_output[:, :, direction * H : (direction + 1) * H])
                upstream_exponent = exponent
                if direction:
                    upstream = _reverse(upstream, trace.lengths)
                    upstream_exponent = None if exponent is None else _reverse(exponent, trace.lengths)
                received = upstream, d_last[:, k], upstream_exponent, into[k] if into else None
                options = {"clip": clip} if clip else {}
                options |= {"second": second[k]} if second else {}
                layer_of = self.cell, trace.layers[k], self.weights(k)
                pair.append(backend(self.device).backward(*layer_of, *received, **options))
            gradients[:0] = pair
            d_output, exponent = _sum_directions(pair, trace.lengths)
            mask = trace.masks[layer]
            if mask is not None:
                d_output = d_output * mask
        return gradients, d_output, exponent

    def checkpoint(
        self,
        x: Array,
        state: State | None = None,
        lengths: Any = None,
        *,
        every: int | Literal["sqrt"] = "sqrt",
        outputs: bool = True,
    ) -> Checkpoints:
        """Run the network as `forward` does, keeping the states of every so many steps only, for `gradients`.

        `every` is that number of steps, "sqrt" for ⌈√T⌉ (Chen et al. 2016, sec. 3); it is rounded up to what the
        kernels take at a time, so that gradients are those of `backward` to the last bit (on a GPU, which
        sums over all steps at once, to rounding). `outputs` are kept or not.

        Raises as `forward`, and ValueError for a bidirectional network, whose reverse direction begins at the end.
        """
        if self.bidirectional:
            raise ValueError("checkpoint needs states that are carried forward, got a bidirectional network")
        x, initial, steps = self._check_inputs(x, state, lengths)
        T, B, _ = x.shape
        wanted = math.isqrt(T - 1) + 1 if every == "sqrt" else check_integer("every", every)
        chunk = backend(self.device).chunk_steps(self.cell, B, self.hidden_size)
        stride = -(-wanted // chunk) * chunk
        states, output = [initial], np.empty((T if outputs else 0, B, self.hidden_size), x.dtype)
        for start in range(0, T, stride):
            part = slice(start, start + stride)
            trace = self._run(x[part], states[-1], _remaining(steps, start, x[part]), False, False)
            states.append(_stack(trace.final))
            if outputs:
                output[part] = trace.output
        return Checkpoints(x, steps, stride, states, output if outputs else None, self.unstack_state(states[-1]))

    def _gradients_between(
        self, run: Checkpoints, d_output: Array | None, d_final: State | None, clip: Any
    ) -> Gradients:
        gradients, others, dx = self.params.like(), self.params.like(), np.empty_like(run.x)
        into, second = ([self.weights(k, of) for k in range(len(self._names))] for of in (gradients, others))
        for start, state in reversed(list(zip(range(0, len(run.x), run.every), run.states, strict=False))):
            part = slice(start, start + run.every)
            trace = self._run(run.x[part], state, _remaining(run.lengths, start, run.x[part]), False, True)
            received = np.zeros_like(trace.output) if d_output is None else d_output[part]
            layers, dx[part], _ = self.backpropagate(trace, received, d_final, into=into, second=second, clip=clip)
            d_final = self.unstack_state(of_layers([layer.state[:, 0] for layer in layers]))
        assert d_final is not None
        gradients.flat += others.flat
        return Gradients(gradients, dx, [], [], d_final)

    def direct(
        self, trace: Trace, layers: list[LayerGradients]
    ) -> tuple[list[LayerGradients], Array, NDArray[np.int64]]:
        """Return the direct part of what `backpropagate(…, scaled=True)` gave: through no later step of the same layer.

        For each layer-direction the gradients of single steps (see `kernels.cpu.direct`); dL/dx (T, B, I) of the first
        layer and its exponents (T, B).
        """
        T, B, _ = trace.output.shape
        single = []
        for k, layer in enumerate(layers):
            one = backend(self.device).direct(self.cell, trace.layers[k], self.weights(k), layer.direct)
            assert layer.direct_exponent is not None
            single.append(one._replace(exponent=one.exponent + layer.direct_exponent.reshape(-1)))
        # Slot 0 of the exponents is not read: dL/dx of step t has that of slot t + 1.
        slots = [np.concatenate([one.exponent[:1, :B], one.exponent[1].reshape(T, B)]) for one in single]
        first = [
            one._replace(x=one.x.reshape(T, B, -1), exponent=exponent)
            for one, exponent in zip(single[: self.directions], slots, strict=False)
        ]
        dx, exponent = _sum_directions(first, trace.lengths)
        assert exponent is not None
        return single, dx, exponent

    def jacobian(self, trace: Trace, t: int, k: int = 0) -> Array:
        """Return ∂state_{t+1}/∂state_t of layer-direction k for every sequence: (B, S·H, S·H), states stacked [h; c].

        Slots count as in `Trace.h`. Raises ValueError for a step or layer-direction that the trace does not have.
        """
        self._check_trace(trace)
        t = check_integer("t", t, 0, len(trace.output) - 1)
        k = check_integer("k", k, 0, len(trace.layers) - 1)
        jacobian: Array = backend(self.device).jacobian(self.cell, trace.layers[k], self.weights(k), t)
        return jacobian

    def _check_trace(self, trace: Trace) -> None:
        for layer, kept in zip(self._names, trace.layers, strict=False):
            inputs = self.params[layer["weight_ih"]].shape[1]
            if kept.cell != self.cell.name or kept.state.shape[3] != self.hidden_size or kept.x.shape[2] != inputs:
                raise ValueError(f"trace must be one of {self!r}, got one of {kept.cell} with state {kept.state.shape}")
        width = self.directions * self.hidden_size
        if len(trace.layers) != len(self._names) or trace.output.dtype != self.dtype or trace.output.shape[2] != width:
            got = f"{len(trace.layers)} layers of {trace.output.dtype}, with output {trace.output.shape}"
            raise ValueError(f"trace must be one of {self!r}, got {got}")
        if not trace.kept:
            raise ValueError("trace must come from forward(…, keep=True), got one made with keep=False")

    def weights(self, k: int, params: Params | None = None) -> LayerWeights:
        """Return the weights of layer-direction k in `params` (the network's own where None); absent ones are zeros."""
        params = self.params if params is None else params
        weights = [params[full] for full in self._names[k].values()]
        if not self.bias:
            weights[2:2] = [np.zeros(len(weights[0]), self.dtype)] * 2
        if not self.cell.peepholes:
            weights.append(np.zeros(0, self.dtype))
        return LayerWeights(*weights)

    def stack_state(self, name: str, state: State | None, batch: int) -> Array:
        """Return a state or its gradient as (S, L·D, B, H)."""
        S, shape = len(self.cell.states), (self.num_layers * self.directions, batch, self.hidden_size)
        if state is None:
            return np.zeros((S, *shape), self.dtype)
        if S == 1:
            return check_array(name, state, shape, self.dtype)[None]
        if not isinstance(state, tuple) or len(state) != S:
            got = f"{len(state)} parts" if isinstance(state, tuple) else type(state).__name__
            raise TypeError(f"{name} of {self.cell.name} must be a tuple (h, c), got {got}")
        pairs = zip(self.cell.states, state, strict=True)
        return np.stack([check_array(f"{name} {part}", value, shape, self.dtype) for part, value in pairs])

    def unstack_state(self, stacked: Array) -> State:
        """Return the state, in the form of `Trace.final`, that `stack_state` stacks."""
        return stacked[0] if len(stacked) == 1 else (stacked[0], stacked[1])


def _stack(state: State) -> Array:
    """Return a state or its gradient, unchecked, as (S, L·D, B, H)."""
    return state[None] if isinstance(state, np.ndarray) else np.stack(state)


def of_layers(states: list[Array]) -> Array:
    """Return the states (S, B, H) of every layer-direction as (S, L·D, B, H), a copy."""
    return states[0][:, None].copy() if len(states) == 1 else np.stack(states, axis=1)


def _remaining(lengths: NDArray[np.int64], start: int, part: Array) -> NDArray[np.int64]:
    """Return the lengths that are left from step `start` on, within `part`."""
    return np.clip(lengths - start, 0, len(part))


def _reverse(values: Array, lengths: NDArray[np.int64]) -> Array:
    """Reverse every sequence of (T, B, …) within its own length; what lies past the end stays there."""
    t = np.arange(values.shape[0])[:, None]
    index = np.where(t < lengths, lengths - 1 - t, t)
    return values[index, np.arange(values.shape[1])]


def past_end(lengths: Any, values: Array) -> NDArray[np.bool_]:
    """Return (T, B, 1): where `values` (T, B, …) lies past the end of its sequence."""
    steps = check_lengths("lengths", lengths, values.shape[1], values.shape[0])
    past: NDArray[np.bool_] = (np.arange(values.shape[0])[:, None] >= steps)[:, :, None]
    return past


def _sum_directions(pair: list[LayerGradients], lengths: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64] | None]:
    """Add up dL/dx of the directions, with their common exponent if they are scaled."""
    exponents = [layer.exponent[1:] for layer in pair if layer.exponent is not None]
    if len(pair) == 1:
        return pair[0].x, exponents[0] if exponents else None
    dx = [pair[0].x, _reverse(pair[1].x, lengths)]
    if not exponents:
        return dx[0] + dx[1], None
    exponents[1] = _reverse(exponents[1], lengths)
    # A gradient of zero has no say in the common exponent.
    top = np.maximum(*(np.where(d.any(axis=2), e, -(2**30)) for d, e in zip(dx, exponents, strict=True)))
    aligned = [np.ldexp(d, (e - top)[:, :, None]) for d, e in zip(dx, exponents, strict=True)]
    return aligned[0] + aligned[1], top


class RNN(Recurrent):
    """The vanilla RNN, h_t = f(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh) (Elman 1990); f is tanh, relu or sigmoid."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: Literal["tanh", "relu", "sigmoid"] = "tanh",
        bias: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dtype: DTypeLike = "float32",
        device: str = "cpu",
        seed: int | None = None,
    ) -> None:
        cell = "rnn_" + check_choice("nonlinearity", nonlinearity, ("tanh", "relu", "sigmoid"))
        options: dict[str, Any] = {"bias": bias, "bidirectional": bidirectional, "dropout": dropout}
        super().__init__(cell, input_size, hidden_size, num_layers, **options, dtype=dtype, device=device, seed=seed)


class LSTM(Recurrent):
    """The LSTM with forget gate (Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000): i, f, g, o."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        dtype: DTypeLike = "float32",
        device: str = "cpu",
        seed: int | None = None,
    ) -> None:
        options: dict[str, Any] = {"bias": bias, "bidirectional": bidirectional, "dropout": dropout}
        super().__init__("lstm", input_size, hidden_size, num_layers, **options, dtype=dtype, device=device, seed=seed)


class GRU(Recurrent):
    """The GRU (Cho et al. 2014), gates r, z, n, h' = (1 − z)∘n + z∘h.

    reset_after=True resets after the product W_hn h, as PyTorch, cuDNN and Keras do; False before it, as the paper.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        bidirectional: bool = False,
        reset_after: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike = "float32",
        device: str = "cpu",
        seed: int | None = None,
    ) -> None:
        cell = "gru" if check_flag("reset_after", reset_after) else "gru_reset_before"
        options: dict[str, Any] = {"bias": bias, "bidirectional": bidirectional, "dropout": dropout}
        super().__init__(cell, input_size, hidden_size, num_layers, **options, dtype=dtype, device=device, seed=seed)
