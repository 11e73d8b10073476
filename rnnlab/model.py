"""A recurrent network with a readout and a loss, in the five arrangements of inputs and outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .checks import check_array, check_choice, check_flag, check_integer, check_lengths, generator
from .kernels import Array
from .losses import LOSSES, Loss
from .params import Params
from .rnn import Checkpoints, Gradients, Recurrent, State, Trace

__all__ = ["GENERATING", "LAST", "TOPOLOGIES", "LossGradients", "SequenceModel"]

#: Arrangements of inputs and outputs (Karpathy 2015; Goodfellow, Bengio & Courville 2016, ch. 10).
TOPOLOGIES = ("one_to_one", "one_to_many", "many_to_one", "many_to_many", "encoder_decoder")
#: Those that read their own outputs, and those with one prediction, from the last state.
GENERATING, LAST = ("one_to_many", "encoder_decoder"), ("one_to_one", "many_to_one")


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
    `readout.weight` (O, D·H) and `readout.bias` (O,), in one flat buffer, into which the parameters of `rnn` move:
    arrays that were taken from `rnn.params` before are left behind. Readout and decoder are drawn from `seed`.

    Raises TypeError for what is no network; ValueError for unknown names, sizes that do not fit, an option that the
    topology would ignore, a bidirectional network that would read its outputs, and one that belongs to another model.
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
        if not isinstance(rnn, Recurrent):
            raise TypeError(f"rnn must be a Recurrent network, got {type(rnn).__name__}")
        self.rnn = rnn
        self.output_size = check_integer("output_size", output_size)
        self.topology = check_choice("topology", topology, TOPOLOGIES)
        self.loss_name = check_choice("loss", loss, LOSSES)
        self.teacher_forcing = check_flag("teacher_forcing", teacher_forcing)
        self.decoder: Recurrent | None = None
        self.generates = topology in GENERATING
        if self.generates and rnn.bidirectional:
            raise ValueError(f"topology {topology} reads its own outputs and takes no bidirectional rnn")
        if teacher_forcing and not self.generates:
            raise ValueError(f"teacher_forcing needs one_to_many or encoder_decoder, got topology {topology}")
        if loss == "cross_entropy" and output_size < 2:
            raise ValueError(f"output_size must be at least 2 classes for cross_entropy, got {output_size}")
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
                device=rnn.device,
                seed=int(generator(seed, "decoder").integers(2**63)),
            )
        features = rnn.hidden_size * rnn.directions
        self.readout = Params({"weight": (output_size, features), "bias": (output_size,)}, rnn.dtype)
        bound = 1 / np.sqrt(features)
        self.readout.flat[...] = generator(seed, "readout").uniform(-bound, bound, self.readout.flat.size)
        self._join()

    def _join(self) -> None:
        parts = {"rnn": self.rnn.params} | ({"decoder": self.decoder.params} if self.decoder else {})
        self.params = Params.join(parts | {"readout": self.readout})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join()  # the parts of a copy have buffers of their own

    @property
    def loss(self) -> Loss:
        """The loss and its output function."""
        return LOSSES[self.loss_name]

    # Forward and backward -------------------------------------------------------------------------------------------

    def predict(
        self, x: Array, lengths: Any = None, *, steps: int | None = None, state: State | None = None
    ) -> tuple[Array, State]:
        """Return the outputs g(y), shaped (B, O) or (T, B, O) as the topology has them, and the last state.

        `steps` is the number of outputs of one_to_many and encoder_decoder, and of them alone. Otherwise arguments and
        errors are those of `Recurrent.forward`.
        """
        if self.generates:
            start, _ = self._start(x, lengths, state, training=False, keep=False)
            run = self._generate(*start, check_integer("steps", steps), keep=False)
            return self.loss.activation(np.concatenate([self.read(part.output) for part in run])), run[-1].final
        if steps is not None:
            raise ValueError(f"steps belongs to one_to_many and encoder_decoder, got it for {self.topology}")
        trace = self.rnn.forward(x, state, lengths, keep=False)
        return self.loss.activation(self.read(self.features(trace, self.topology == "many_to_many"))), trace.final

    def mean_loss(self, x: Array, targets: Array, lengths: Any = None) -> float:
        """Return the loss of `loss_and_gradients` without its gradients.

        Raises as that does, and ValueError for a topology that reads its own outputs.
        """
        if self.generates:
            raise ValueError(f"mean_loss needs inputs that are given, got topology {self.topology}")
        every, run = self.topology == "many_to_many", self.rnn.forward(x, None, lengths, keep=False)
        scored = self.scored(run.lengths, len(x), every)
        return self._mean(self.read(self.features(run, every)), self.check_targets(targets, scored), scored)[0]

    def loss_and_gradients(
        self,
        x: Array,
        targets: Array,
        lengths: Any = None,
        *,
        target_lengths: Any = None,
        state: State | None = None,
        training: bool = False,
        checkpoint: int | Literal["sqrt"] | None = None,
        clip: Any = None,
    ) -> LossGradients:
        """Return the mean loss over all scored predictions and its exact gradients.

        `lengths` (B,) are the lengths of the inputs; in many_to_many predictions past them are not scored.
        `target_lengths` (B,) are the lengths of the targets of a generating topology. `state` is carried in (zeros
        where None). The loss and gradients of a network that has diverged are not finite. With `checkpoint` (a number
        of steps, or "sqrt") only the states of some steps are kept and the others computed again, to the last bit the
        same: memory grows with √T instead of T, but for what many_to_many itself returns, and `recurrent` is empty.
        `clip` is a `kernels.cpu.Clip`, for `clipping`: the gradients are then not those of the loss.

        Raises as `Recurrent.forward` and `Recurrent.checkpoint`, and ValueError for targets that do not fit, and for
        checkpoints of a generating topology or with dropout.
        """
        if clip is not None and self.generates:
            raise ValueError(f"clipping within BPTT needs inputs that are given, got topology {self.topology}")
        if checkpoint is not None and (self.generates or (training and self.rnn.dropout)):
            got = f"{self.topology} of {self.rnn!r}"
            raise ValueError(f"checkpoint needs inputs that are given and no dropout, got {got}")
        if self.generates:
            return self._generating_gradients(x, targets, lengths, target_lengths, state, training)
        if target_lengths is not None:
            raise ValueError(f"target_lengths belongs to one_to_many and encoder_decoder, got it for {self.topology}")
        every = self.topology == "many_to_many"
        run: Trace | Checkpoints
        if checkpoint is None:
            run = self.rnn.forward(x, state, lengths, training=training)
            features = self.features(run, every)
        else:
            run = self.rnn.checkpoint(x, state, lengths, every=checkpoint, outputs=every)
            features = self._last_state(run) if run.output is None else run.output
        scored = self.scored(run.lengths, len(x), every)
        logits = self.read(features)
        loss, d_logits = self._mean(logits, self.check_targets(targets, scored), scored)
        d_features = d_logits @ self.readout["weight"]
        if isinstance(run, Trace):
            gradients = self.rnn.gradients(run, self.spread(d_features, run, every), clip=clip)
        elif every:
            gradients = self.rnn.gradients(run, d_features, clip=clip)
        else:
            d_final = self.rnn.stack_state("d_final", None, len(run.lengths))
            d_final[0, -1] = d_features
            gradients = self.rnn.gradients(run, None, self.rnn.unstack_state(d_final), clip)
        params = self.params.like()
        self._put(params, "rnn", gradients.params)
        self._put_readout(params, features, d_logits)
        recurrent = {"rnn": gradients} if checkpoint is None else {}
        return LossGradients(loss, self.loss.activation(logits), params, gradients.x, recurrent, run.final)

    def _last_state(self, kept: Checkpoints) -> Array:
        """Return what `features` would be of a trace."""
        if self.topology == "one_to_one" and len(kept.x) != 1:
            raise ValueError(f"x must have one step for topology one_to_one, got {len(kept.x)}")
        last: Array = kept.final[-1] if isinstance(kept.final, np.ndarray) else kept.final[0][-1]
        return last

    def truncated(self, x: Array, targets: Array, window: int, state: State | None = None) -> Iterator[LossGradients]:
        """Truncated BPTT: return the loss and gradients of one window of steps after the other.

        The state is carried from window to window, the gradient is cut between them (Williams & Peng 1990). Parameters
        may be updated between windows. For many_to_many, one direction, and sequences of equal length: raises
        ValueError for others, before the first window.
        """
        if self.topology != "many_to_many":
            raise ValueError(f"truncated needs topology many_to_many, got {self.topology}")
        if self.rnn.bidirectional:
            raise ValueError("truncated needs states that are carried forward, got a bidirectional rnn")
        x = check_array("x", x, ("T", "B", self.rnn.input_size), self.rnn.dtype)
        targets = self.check_targets(targets, np.ones(x.shape[:2], np.bool_))
        return self._windows(x, targets, check_integer("window", window), state)

    def _windows(self, x: Array, targets: Array, window: int, state: State | None) -> Iterator[LossGradients]:
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

    @staticmethod
    def scored(lengths: NDArray[np.int64], steps: int, every: bool) -> NDArray[np.bool_]:
        """Return which predictions count: (B,) all of them, or with `every` (T, B) those within their sequence."""
        return np.arange(steps)[:, None] < lengths if every else np.ones(len(lengths), np.bool_)

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
        past = ~scored[..., None]
        targets = check_array("targets", targets, (*shape, self.output_size), self.rnn.dtype, past=lambda _: past)
        if self.loss_name == "bce" and (targets.min() < 0 or targets.max() > 1):
            raise ValueError(f"targets must lie in [0, 1] for bce, got {targets.min()}…{targets.max()}")
        return targets

    def score(self, logits: Array, targets: Array, scored: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Return the loss of each prediction, 0 of those not scored, and the derivative of their sum by the logits."""
        values, slopes = self.loss.score(logits, targets)
        return np.where(scored, values, values.dtype.type(0)), slopes * scored[..., None]

    def _mean(self, logits: Array, targets: Array, scored: NDArray[np.bool_]) -> tuple[float, Array]:
        """Return the mean of all scored losses and its derivative by the logits."""
        count = logits.dtype.type(scored.sum())
        values, slopes = self.score(logits, targets, scored)
        return float(values.sum() / count), slopes / count

    def _put_readout(self, params: Params, features: Array, d_logits: Array) -> None:
        flat = d_logits.reshape(-1, self.output_size)
        params["readout.weight"][...] = flat.T @ features.reshape(len(flat), -1)
        params["readout.bias"][...] = flat.sum(axis=0)

    @staticmethod
    def _put(params: Params, part: str, gradients: Params) -> None:
        for name, gradient in gradients.items():
            params[f"{part}.{name}"][...] = gradient

    # Topologies that read their own outputs --------------------------------------------------------------------------

    def _start(
        self, x: Array, lengths: Any, state: State | None, *, training: bool, keep: bool = True
    ) -> tuple[tuple[Recurrent, Array, State | None], Trace | None]:
        """Return the network that generates, its first input and its first state; and the trace of an encoder."""
        if self.decoder is None:
            if isinstance(x, np.ndarray) and x.ndim == 3 and x.shape[0] != 1:
                raise ValueError(f"x must have one step for topology one_to_many, got {x.shape[0]}")
            x = check_array("x", x, (1, "B", self.rnn.input_size), self.rnn.dtype)
            if lengths is not None:
                raise ValueError("lengths belongs to topologies with several inputs, got it for one_to_many")
            self.rnn.stack_state("state", state, x.shape[1])
            return (self.rnn, x, state), None
        trace = self.rnn.forward(x, state, lengths, training=training, keep=keep)
        return (self.decoder, np.zeros((1, x.shape[1], self.output_size), self.rnn.dtype), trace.final), trace

    def _generate(
        self,
        network: Recurrent,
        source: Array,
        state: State | None,
        steps: int,
        *,
        training: bool = False,
        keep: bool = True,
    ) -> list[Trace]:
        """Run step by step, each reading the output of the one before; one trace a step."""
        run: list[Trace] = []
        for _ in range(steps):
            run.append(network.carry_on(source, state, training, keep))
            state = run[-1].final
            source = self.loss.activation(self.read(run[-1].output))
        return run

    def _generating_gradients(
        self, x: Array, targets: Array, lengths: Any, target_lengths: Any, state: State | None, training: bool
    ) -> LossGradients:
        (network, source, carried), trace = self._start(x, lengths, state, training=training)
        if not isinstance(targets, np.ndarray) or targets.ndim < 2 or targets.shape[0] < 1:
            raise ValueError(f"targets must have shape (T', {x.shape[1]}, …), got {_describe(targets)}")
        steps, B = targets.shape[0], x.shape[1]
        ends = check_lengths("target_lengths", target_lengths, B, steps)
        scored = np.arange(steps)[:, None] < ends
        targets = self.check_targets(targets, scored)
        if self.teacher_forcing:
            fed = targets[:-1]
            if self.loss_name == "cross_entropy":
                fed = np.eye(self.output_size, dtype=self.rnn.dtype)[fed]
            run = [network.carry_on(np.concatenate([source, fed]), carried, training)]
        else:
            run = self._generate(network, source, carried, steps, training=training)
        logits = np.concatenate([self.read(part.output) for part in run])
        loss, d_logits = self._mean(logits, targets, scored)
        parts: list[Gradients] = []
        d_final: State | None = None
        for piece in reversed(run):
            stop = steps - sum(len(part.x) for part in parts)
            if parts:  # the output was the next input
                d_logits[stop - 1] += self.loss.activation_backward(logits[stop - 1], parts[0].x[0])
            d_output = d_logits[stop - len(piece.output) : stop] @ self.readout["weight"]
            parts.insert(0, network.gradients(piece, d_output, d_final))
            d_final = parts[0].state
        name = "rnn" if trace is None else "decoder"
        recurrent = {name: _concatenate(parts)}
        if trace is not None:
            recurrent["rnn"] = self.rnn.gradients(trace, np.zeros_like(trace.output), d_final)
        params = self.params.like()
        for part, gradients in recurrent.items():
            self._put(params, part, gradients.params)
        self._put_readout(params, np.concatenate([piece.output for piece in run]), d_logits)
        dx = recurrent["rnn"].x[: len(x)]  # beyond are outputs or targets that were fed back
        final = _state_at(run, ends)
        return LossGradients(loss, self.loss.activation(logits), params, dx, recurrent, final)


def _state_at(run: list[Trace], ends: NDArray[np.int64]) -> State:
    """Return the state of each sequence after its last step, of traces that follow each other."""
    batch = np.arange(len(ends))

    def pick(kinds: list[list[Array]]) -> Array:
        slots = [np.concatenate([kinds[0][k], *(later[k][1:] for later in kinds[1:])]) for k in range(len(kinds[0]))]
        return np.stack([values[ends, batch] for values in slots])

    h = pick([trace.h for trace in run])
    return (h, pick([trace.c for trace in run])) if run[0].c else h


def _concatenate(parts: list[Gradients]) -> Gradients:
    """Join the gradients of consecutive pieces; slot 0 of a piece is the last of the one before, less its output."""
    params = parts[0].params.like()
    for part in parts:
        params.flat += part.params.flat

    def join(kind: str) -> list[Array]:
        slots = [getattr(part, kind) for part in parts]
        return [np.concatenate([slots[0][k][:1], *(slot[k][1:] for slot in slots)]) for k in range(len(slots[0]))]

    return Gradients(params, np.concatenate([part.x for part in parts]), join("h"), join("c"), parts[0].state)


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
