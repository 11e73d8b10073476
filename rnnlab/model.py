"""A recurrent network with a readout and a loss, in the five arrangements of inputs and outputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax

from .checks import check_array, check_choice, check_lengths, check_positive
from .params import Params
from .rnn import Gradients, Recurrent, State, Trace

__all__ = ["LOSSES", "TOPOLOGIES", "Loss", "LossGradients", "SequenceModel"]

Array = NDArray[Any]

#: Arrangements of inputs and outputs (Karpathy 2015; Goodfellow, Bengio & Courville 2016, ch. 10).
TOPOLOGIES = ("one_to_one", "one_to_many", "many_to_one", "many_to_many", "encoder_decoder")


class Loss(NamedTuple):
    """A loss with the output function g that belongs to it; O outputs are the last axis.

    activation: logits → outputs; activation_backward: (outputs, dL/doutputs) → dL/dlogits; value: (logits, targets) →
    loss of each prediction; slope: (logits, targets) → its derivative by the logits.
    """

    activation: Callable[[Array], Array]
    activation_backward: Callable[[Array, Array], Array]
    value: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]


def _one_hot(targets: Array, size: int, dtype: np.dtype[Any]) -> Array:
    return np.eye(size, dtype=dtype)[targets]


def _cross_entropy(logits: Array, targets: Array) -> Array:
    log_probabilities: Array = log_softmax(logits, axis=-1)
    picked: Array = -np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return picked


def _softmax(logits: Array) -> Array:
    probabilities: Array = softmax(logits, axis=-1)
    return probabilities


def _sigmoid(logits: Array) -> Array:
    probabilities: Array = expit(logits)
    return probabilities


#: Losses by name; mse and bce are means over the O outputs, as PyTorch's.
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(
        _softmax,
        lambda p, dp: p * (dp - (p * dp).sum(axis=-1, keepdims=True)),
        _cross_entropy,
        lambda y, targets: _softmax(y) - _one_hot(targets, y.shape[-1], y.dtype),
    ),
    "mse": Loss(
        lambda y: y,
        lambda y, dy: dy,
        lambda y, targets: np.square(y - targets).mean(axis=-1),
        lambda y, targets: (y - targets) * y.dtype.type(2 / y.shape[-1]),
    ),
    "bce": Loss(
        _sigmoid,
        lambda p, dp: p * (1 - p) * dp,
        lambda y, targets: (np.logaddexp(0, y) - targets * y).mean(axis=-1),
        lambda y, targets: (_sigmoid(y) - targets) / y.dtype.type(y.shape[-1]),
    ),
}


@dataclass(frozen=True)
class LossGradients:
    """What `SequenceModel.loss_and_gradients` returns.

    loss: the mean over all scored predictions; outputs g(y), in the shape of the predictions; params: dL/d each
    parameter; x: dL/dx; recurrent: for "rnn" (and "decoder") dL/dh_t, dL/dc_t and the rest of `rnn.Gradients`; final:
    the state after the last input, to be carried on.
    """

    loss: float
    outputs: Array
    params: Params
    x: Array
    recurrent: dict[str, Gradients]
    final: State


class SequenceModel:
    """`rnn`, a linear readout y_t = W h_t + b with `output_size` outputs, and a loss.

    Topologies, with x (T, B, I) and targets of shape (…,) for cross_entropy (class numbers) or (…, O) for mse and bce:

    - one_to_one: T = 1, targets (B, …); many_to_one: targets (B, …), read from the last state of each sequence (of both
      directions); many_to_many: targets (T, B, …).
    - one_to_many: x (1, B, I), targets (T', B, …): the output g(y_t) is the next input, hence O = I.
    - encoder_decoder: a second network of the same cell starts from the last state of the first, with a zero input, and
      reads its own outputs: targets (T', B, …).

    `teacher_forcing` feeds the targets back in place of the outputs. `params` has the names `rnn.…`, `decoder.…`,
    `readout.weight` (O, D·H) and `readout.bias` (O,), in one flat buffer. Readout and decoder are drawn from `seed`.

    Raises ValueError for unknown names, sizes that do not fit and a bidirectional network that would read its outputs.
    """

    def __init__(
        self,
        rnn: Recurrent,
        output_size: int,
        topology: str = "many_to_one",
        loss: str = "cross_entropy",
        *,
        teacher_forcing: bool = False,
        seed: int | None = None,
    ) -> None:
        self.rnn = rnn
        self.output_size = check_positive("output_size", output_size)
        self.topology = check_choice("topology", topology, TOPOLOGIES)
        self.loss_name = check_choice("loss", loss, LOSSES)
        self.loss = LOSSES[loss]
        self.teacher_forcing = teacher_forcing
        self.decoder: Recurrent | None = None
        if topology in ("one_to_many", "encoder_decoder") and rnn.bidirectional:
            raise ValueError(f"topology {topology} reads its own outputs and takes no bidirectional rnn")
        if topology == "one_to_many" and rnn.input_size != output_size:
            raise ValueError(f"output_size must equal the rnn's input_size {rnn.input_size}, got {output_size}")
        if topology == "encoder_decoder":
            self.decoder = Recurrent(
                rnn.cell.name,
                output_size,
                rnn.hidden_size,
                rnn.num_layers,
                bias=rnn.bias,
                dropout=rnn.dropout,
                dtype=rnn.dtype,
                seed=seed,
            )
        features = rnn.hidden_size * rnn.directions
        self.readout = Params({"weight": (output_size, features), "bias": (output_size,)}, rnn.dtype)
        self.readout.flat[...] = np.random.default_rng(seed).uniform(-1, 1, self.readout.flat.size) / np.sqrt(features)
        parts = {"rnn": rnn.params} | ({"decoder": self.decoder.params} if self.decoder else {})
        self.params = Params.join(parts | {"readout": self.readout})

    # Forward and backward -------------------------------------------------------------------------------------------

    def predict(
        self, x: Array, lengths: Any = None, *, steps: int | None = None, state: State | None = None
    ) -> tuple[Array, State]:
        """Return the outputs g(y) and the last state; `steps` says how many outputs a generating topology makes."""
        trace = self.rnn.forward(x, state, lengths, keep=False)
        if self.topology in ("one_to_many", "encoder_decoder"):
            steps = check_positive("steps", steps)
            run = self._generate(x, trace, state, steps)
            return self.loss.activation(np.concatenate([self.read(part.output) for part in run])), run[-1].final
        return self.loss.activation(self.read(self.features(trace, self.topology == "many_to_many"))), trace.final

    def loss_and_gradients(
        self,
        x: Array,
        targets: Array,
        lengths: Any = None,
        *,
        target_lengths: Any = None,
        state: State | None = None,
        training: bool = False,
    ) -> LossGradients:
        """Return the mean loss over all scored predictions and its exact gradients.

        `lengths` (B,) are the lengths of the inputs; in many_to_many predictions past them are not scored.
        `target_lengths` (B,) are the lengths of the targets of a generating topology. `state` is carried in (zeros
        where None). Raises as `Recurrent.forward`, and ValueError for targets that do not fit.
        """
        if self.topology in ("one_to_many", "encoder_decoder"):
            return self._generating_gradients(x, targets, lengths, target_lengths, state, training)
        if target_lengths is not None:
            raise ValueError(f"target_lengths belongs to one_to_many and encoder_decoder, got it for {self.topology}")
        trace = self.rnn.forward(x, state, lengths, training=training)
        every = self.topology == "many_to_many"
        features = self.features(trace, every)
        logits = self.read(features)
        scored = self.scored(trace, every)
        targets = self.check_targets(targets, scored)
        weight = scored / scored.sum()
        loss = float((self.loss.value(logits, targets) * weight).sum())
        d_logits = self.loss.slope(logits, targets) * weight[..., None].astype(logits.dtype)
        d_output = self.spread(d_logits @ self.readout["weight"], trace, every)
        gradients = self.rnn.backward(trace, d_output)
        params = self.params.like()
        self._put(params, "rnn", gradients.params)
        self._add_readout(params, features, d_logits)
        outputs = self.loss.activation(logits)
        return LossGradients(loss, outputs, params, gradients.x, {"rnn": gradients}, trace.final)

    def truncated(self, x: Array, targets: Array, window: int, state: State | None = None) -> Iterator[LossGradients]:
        """Truncated BPTT: yield the loss and gradients of one window of steps after the other.

        The state is carried from window to window, the gradient is cut between them (Williams & Peng 1990). Parameters
        may be updated between windows. For many_to_many and sequences of equal length.
        """
        if self.topology != "many_to_many":
            raise ValueError(f"truncated needs topology many_to_many, got {self.topology}")
        window = check_positive("window", window)
        for start in range(0, len(x), window):
            part = self.loss_and_gradients(x[start : start + window], targets[start : start + window], state=state)
            state = part.final
            yield part

    # Pieces that gradient analysis uses too -------------------------------------------------------------------------

    def features(self, trace: Trace, every: bool) -> Array:
        """Return what the readout reads: every output, or the last of each sequence in each direction."""
        if self.topology == "one_to_one" and trace.output.shape[0] != 1:
            raise ValueError(f"x must have one step for topology one_to_one, got {trace.output.shape[0]}")
        if every:
            return trace.output
        h, H = trace.output, self.rnn.hidden_size
        last = h[trace.lengths - 1, np.arange(h.shape[1]), :H]
        return np.concatenate([last, h[0, :, H:]], axis=1)  # a reverse direction ends at the first element

    def scored(self, trace: Trace, every: bool) -> NDArray[np.bool_]:
        """Return which predictions count: (B,) all of them, or with `every` (T, B) those within their sequence."""
        T, B, _ = trace.output.shape
        return np.arange(T)[:, None] < trace.lengths if every else np.ones(B, np.bool_)

    def read(self, features: Array) -> Array:
        """Return the logits y = W h + b."""
        logits: Array = features @ self.readout["weight"].T + self.readout["bias"]
        return logits

    def spread(self, d_features: Array, trace: Trace, every: bool) -> Array:
        """Return dL/doutput (T, B, D·H) from the gradient of `features`."""
        if every:
            return d_features
        d_output, H = np.zeros_like(trace.output), self.rnn.hidden_size
        d_output[trace.lengths - 1, np.arange(d_output.shape[1]), :H] = d_features[:, :H]
        d_output[0, :, H:] = d_features[:, H:]
        return d_output

    def check_targets(self, targets: Array, scored: NDArray[np.bool_]) -> Array:
        """Return targets checked for the shape of `scored`; those not scored count as 0, whatever they hold."""
        shape = scored.shape
        if self.loss_name == "cross_entropy":
            if not isinstance(targets, np.ndarray) or targets.dtype.kind not in "iu" or targets.shape != shape:
                raise ValueError(
                    f"targets must be an integer array of shape {shape} for cross_entropy, got {_describe(targets)}"
                )
            targets = np.where(scored, targets, 0)
            if targets.min() < 0 or targets.max() >= self.output_size:
                raise ValueError(f"targets must lie in 0…{self.output_size - 1}, got {targets.min()}…{targets.max()}")
            return targets
        if not isinstance(targets, np.ndarray) or targets.shape != (*shape, self.output_size):
            raise ValueError(f"targets must have shape {(*shape, self.output_size)}, got {_describe(targets)}")
        targets = np.where(scored[..., None], targets, targets.dtype.type(0))
        targets = check_array("targets", targets, (*shape, self.output_size), self.rnn.dtype)
        if self.loss_name == "bce" and (targets.min() < 0 or targets.max() > 1):
            raise ValueError(f"targets must lie in [0, 1] for bce, got {targets.min()}…{targets.max()}")
        return targets

    def _add_readout(self, params: Params, features: Array, d_logits: Array) -> None:
        flat = d_logits.reshape(-1, self.output_size)
        params["readout.weight"][...] += flat.T @ features.reshape(len(flat), -1)
        params["readout.bias"][...] += flat.sum(axis=0)

    @staticmethod
    def _put(params: Params, part: str, gradients: Params) -> None:
        for name, gradient in gradients.items():
            params[f"{part}.{name}"][...] += gradient

    # Topologies that read their own outputs --------------------------------------------------------------------------

    def _generate(
        self,
        x: Array,
        trace: Trace,
        state: State | None,
        steps: int,
        targets: Array | None = None,
        training: bool = False,
    ) -> list[Trace]:
        """Run step by step, each reading the output of the one before, one trace a step; given targets, all in one."""
        B = x.shape[1]
        network, source, carried = self.rnn, x, state
        if self.decoder is not None:
            network, carried = self.decoder, trace.final
            source = np.zeros((1, B, self.output_size), self.rnn.dtype)
        elif x.shape[0] != 1:
            raise ValueError(f"x must have one step for topology one_to_many, got {x.shape[0]}")
        if targets is not None:
            fed = targets[:-1]
            if self.loss_name == "cross_entropy":
                fed = _one_hot(fed, self.output_size, self.rnn.dtype)
            return [network.forward(np.concatenate([source, fed]), carried, training=training)]
        run: list[Trace] = []
        for _ in range(steps):
            run.append(network.forward(source, carried, training=training))
            carried = run[-1].final
            source = self.loss.activation(self.read(run[-1].output))
        return run

    def _generating_gradients(
        self, x: Array, targets: Array, lengths: Any, target_lengths: Any, state: State | None, training: bool
    ) -> LossGradients:
        trace = self.rnn.forward(x, state, lengths, training=training)
        if not isinstance(targets, np.ndarray) or targets.ndim < 2 or targets.shape[0] < 1:
            raise ValueError(f"targets must have shape (T', {x.shape[1]}, …), got {_describe(targets)}")
        steps, B = targets.shape[0], x.shape[1]
        scored = np.arange(steps)[:, None] < check_lengths("target_lengths", target_lengths, B, steps)
        targets = self.check_targets(targets, scored)
        run = self._generate(x, trace, state, steps, targets if self.teacher_forcing else None, training)
        logits = np.concatenate([self.read(part.output) for part in run])
        outputs = self.loss.activation(logits)
        weight = scored / scored.sum()
        loss = float((self.loss.value(logits, targets) * weight).sum())
        d_logits = self.loss.slope(logits, targets) * weight[..., None].astype(logits.dtype)
        params, network, name = self.params.like(), self.decoder or self.rnn, "decoder" if self.decoder else "rnn"
        parts: list[Gradients] = []
        d_final: State | None = None
        for piece in reversed(run):
            stop = steps - sum(len(part.x) for part in parts)
            span = slice(stop - len(piece.output), stop)
            if parts:  # the output was the next input
                d_logits[stop - 1] += self.loss.activation_backward(outputs[stop - 1], parts[0].x[0])
            parts.insert(0, network.backward(piece, d_logits[span] @ self.readout["weight"], d_final))
            d_final = parts[0].state
            self._put(params, name, parts[0].params)
            self._add_readout(params, piece.output, d_logits[span])
        recurrent = {name: _concatenate(parts)}
        dx = parts[0].x[:1]
        if self.decoder is not None:
            recurrent["rnn"] = self.rnn.backward(trace, np.zeros_like(trace.output), d_final)
            self._put(params, "rnn", recurrent["rnn"].params)
            dx = recurrent["rnn"].x
        return LossGradients(loss, outputs, params, dx, recurrent, run[-1].final)


def _concatenate(steps: list[Gradients]) -> Gradients:
    """Join the gradients of consecutive pieces; slot 0 of a piece is the last of the one before, less its output."""
    params = steps[0].params.like()
    for step in steps:
        params.flat += step.params.flat

    def join(kind: str) -> list[Array]:
        slots = [getattr(step, kind) for step in steps]
        return [np.concatenate([slots[0][k][:1], *(slot[k][1:] for slot in slots)]) for k in range(len(slots[0]))]

    return Gradients(params, np.concatenate([step.x for step in steps]), join("h"), join("c"), steps[0].state)


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
