"""Sequence kernels for the CPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)    weight_ih (G·H, I), weight_hh (G·H, H)    state, d_state (S, T+1, B, H), slot 0 is the initial one

V units fill one vector register; U such vectors hold all H, the last one padded. What stays inside is kept in that
order: ax is (N, T, M, U, G, V), `saved` is (N, T, U, M, K, V), for N groups of M sequences, one a thread that shares
the batch; dax and dah are (T, B, U, G, V) without the padding, for each half of the batch by itself. Where the gates of
the last unit fit into fewer than G vectors, they share them in ax, biases and packed weights.

What is here prepares the arrays and the plan of a call. The kernels, made once for each cell from its pair of scalar
functions, are in `forward` and `backward`; single steps are in `jacobian`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..cells import CELLS, Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights, threads
from .adjoint import Clip
from .backward import BackwardArguments, backward_kernel, backward_places
from .forward import ForwardArguments, forward_kernel, forward_places
from .jacobian import Diagonals, diagonals, jacobian
from .panels import APART, backward_panel, forward_panel, numbers_saved
from .products import scratch_size
from .simd import VECTOR_BYTES
from .team import CACHE, empty, plan, run_together

__all__ = ["Call", "Clip", "Diagonals", "backward", "chunk_steps", "diagonals", "direct", "forward", "jacobian"]
__all__ += ["prepare_backward", "prepare_forward", "repeat", "warmup"]

#: Rows (steps times batch) in a chunk: as many as have so many gates, but no fewer and no more than these, and no part
#: of a step.
_GATES, _ROWS, _MOST_ROWS = 2**17, 256, 512

_STATE = ForwardArguments._fields.index("state")


def chunk_steps(cell: Cell, B: int, H: int) -> int:
    """Return the steps of a batch that kernels take at a time; sums over steps are cut there, and nowhere else."""
    rows = min(_MOST_ROWS, max(_ROWS, _GATES // (len(cell.gates) * H)))
    return max(1, rows // B)


def _middle(cell: Cell, B: int, H: int, dtype: np.dtype[Any]) -> int:
    """Return how many sequences are in the first half of a batch: gradients of weights are summed over each apart.

    Two threads then need no row of each other's. Where weights do not fit a core's cache it is all of them.
    """
    return B if len(cell.gates) * H * H * dtype.itemsize > CACHE else -(-B // 2)


def _groups(B: int, parties: int, by_units: bool) -> tuple[int, int, int]:
    """Return M and N, so many sequences for each of so many threads, or all for all by units; and how many threads."""
    M = B if by_units else -(-B // parties)
    N = -(-B // M)
    return M, N, parties if by_units else N


def _rooms(places: tuple[int, ...], parties: int, panel: int, B: int, H: int, dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """Return where a kernel works: memory, the places in it, a panel and two lists of tiles for each thread."""
    lanes = VECTOR_BYTES // dtype.itemsize
    first, panel = -(-places[-1] // lanes) * lanes, -(-panel // lanes) * lanes + APART
    memory = empty((first + parties * panel,), dtype)
    tables = np.empty((parties, 2, -(-H // lanes) * B, 5), np.int64)
    return memory[:first], tuple(places), memory[first:].reshape(parties, panel), tables


class Call(NamedTuple):
    """A kernel with all that it takes, for `run_together`; what it computes goes into arrays among the arguments."""

    kernel: Any
    arguments: tuple[Any, ...]
    parties: int
    by_units: bool

    def on(self, *first: Array) -> "Call":
        """Return the call on other C-contiguous arrays of the same shapes: x, of `prepare_backward` d_output too."""
        return Call(self.kernel, (*first, *self.arguments[len(first) :]), *self[2:])


def forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool = True
) -> LayerTrace:
    """Run one layer in one direction over x (T, B, I) from state (S, B, H).

    With keep=False only the states are kept, which is all that inference needs. Arrays are C-contiguous, of one dtype
    and checked by the caller.
    """
    call, trace = prepare_forward(cell, x, weights, state, lengths, keep)
    run_together(*call)
    return trace


def prepare_forward(
    cell: Cell, x: Array, weights: LayerWeights, state: Array, lengths: NDArray[np.int64], keep: bool
) -> tuple[Call, LayerTrace]:
    """Return what `forward` runs, and the trace that it fills; from then on state is slot 0 of the trace's."""
    (T, B, I), H, S, dtype = x.shape, weights.weight_hh.shape[1], len(cell.states), x.dtype
    V = VECTOR_BYTES // dtype.itemsize
    states = empty((S, T + 1, B, H), dtype)
    states[:, 0] = state
    parties, by_units = plan(cell, T, B, I, H, dtype)
    M, N, parties = _groups(B, parties, by_units)
    saved = empty((N, T if keep else 0, -(-H // V), M, numbers_saved(cell), V), dtype)
    reset_h = empty(((T if keep else 1) if cell.reset else 0, B, H), dtype)
    chunk = min(T, chunk_steps(cell, B, H))
    rooms = _rooms(forward_places(cell, V, I, H, chunk, M, N), parties, forward_panel(cell, V)[1][-1], B, H, dtype)
    arguments = ForwardArguments(x, *weights, lengths, states, saved, reset_h, *rooms, chunk, M, packed=False)
    call = Call(forward_kernel(cell, dtype, keep), tuple(arguments), parties, by_units)
    return call, LayerTrace(cell.name, x, states, saved, reset_h, lengths)


def repeat(call: Call, x: Array, states: Array) -> Call:
    """Return a call of `prepare_forward`, once it has run, on other inputs and states, its weights packed as they are.

    x (T, B, I) is of the same shape, states (S, T+1, B, H) with slot 0 given, or (1, T+S, B, H): h, slot 0 given, then
    the other states, given those that are first and left as those that are last. Both are C-contiguous.
    """
    given = call.arguments
    return Call(call.kernel, (x, *given[1:_STATE], states, *given[_STATE + 1 : -1], True), *call[2:])


def backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None = None,
    into: LayerWeights | None = None,
    clip: Clip | None = None,
    second: LayerWeights | None = None,
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) and d_final (S, B, H) through one layer (BPTT: Werbos 1990).

    Given d_output_exponent (T, B), d_output stands for d_output·2^exponent, and the adjoint is rescaled by powers of
    two at every step, so that it neither under- nor overflows however long the sequence; weights get no gradient then.
    dL/d weights is added to `into`, if that is given (both biases of a joint cell must hold the same there). With
    `second` too, that of the second half of the batch (see `_middle`) is added there, and the caller adds up both:
    only so are sums over several calls those of one to the last bit. With `clip` the adjoint is clipped at every step.
    """
    call, gradients = prepare_backward(
        cell, trace, weights, d_output, d_final, d_output_exponent, into, clip=clip, second=second
    )
    run_together(*call)
    return gradients


def prepare_backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Array,
    d_final: Array,
    d_output_exponent: NDArray[np.int64] | None,
    into: LayerWeights | None,
    inputs: bool = True,
    clip: Clip | None = None,
    second: LayerWeights | None = None,
) -> tuple[Call, LayerGradients]:
    """Return what `backward` runs, and the gradients that it fills; from then on d_final is slot T of their state.

    Without `inputs` there is no dL/dx: it has no columns.
    """
    (T, B, H), I, S, dtype = d_output.shape, trace.x.shape[2], len(cell.states), d_output.dtype
    V, scaled = VECTOR_BYTES // dtype.itemsize, d_output_exponent is not None
    d_state, dx = empty((S, T + 1, B, H), dtype), empty((T, B, I if inputs else 0), dtype)
    d_state[:, T] = d_final
    exponent = np.zeros((T + 1 if scaled else 0, B), np.int64)
    if into is None:
        into = LayerWeights(*(np.zeros((0,) * w.ndim if scaled else w.shape, dtype) for w in weights))
    chunk, middle = min(T, chunk_steps(cell, B, H)), _middle(cell, B, H, dtype)
    apart, halves = second is not None, 1 if middle == B else 2
    if second is None:
        second = into if scaled or halves == 1 else LayerWeights(*(empty(w.shape, dtype) for w in weights))
    span = chunk * middle - (-APART // (-(-H // V) * V))
    parties, by_units = plan(cell, T, B, I, H, dtype, scaled or clip is not None)
    M, N, parties = _groups(B, parties, by_units)
    if len(trace.saved) > 1:  # the batch stays shared as it was
        M, N = trace.saved.shape[3], len(trace.saved)
        parties, by_units = min(N, threads()), False
    mode, limit, counts = clip or ("scaled" if scaled else "plain", 0.0, np.zeros((0, 8), np.int64))
    panels = max(backward_panel(cell, V)[1][-1], scratch_size(max(I, H), V))
    rooms = _rooms(backward_places(cell, V, I, H, 2 * halves * span, M, N), parties, panels, B, H, dtype)
    arguments = BackwardArguments(
        trace.x, d_output, exponent if d_output_exponent is None else d_output_exponent, weights.weight_ih,
        weights.weight_hh, weights.peephole, trace.lengths, trace.state, trace.saved, trace.reset_h, d_state, exponent,
        dx, (tuple(into), tuple(second)), *rooms, chunk, M, middle, span, apart, np.full(1, limit, dtype), counts,
    )  # fmt: skip
    call = Call(backward_kernel(cell, dtype, mode), tuple(arguments), parties, by_units)
    if scaled:
        return call, LayerGradients(None, dx, d_state, d_output, exponent, d_output_exponent)
    return call, LayerGradients(into, dx, d_state, d_output, None, None)


def direct(
    cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array, through: Any = backward
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) through one step only: each step stands as a sequence of its own.

    `through` is the `backward` that does it. Returns gradients of T·B sequences of one step, scaled: state
    (S, 2, T·B, H), x (1, T·B, I), exponent (2, T·B).
    """
    T, B, H = d_output.shape

    def one_step(values: Array) -> Array:
        return values.reshape(1, T * B, -1) if values.size else values

    running = (np.arange(T)[:, None] < trace.lengths).reshape(-1).astype(np.int64)
    saved = trace.saved_of(0, T).swapaxes(0, 1)
    saved = np.ascontiguousarray(saved).reshape(1, 1, len(saved), T * B, *saved.shape[3:])
    alone = trace._replace(x=one_step(trace.x), saved=saved, reset_h=one_step(trace.reset_h), lengths=running)
    nothing = np.zeros((len(cell.states), T * B, H), d_output.dtype)
    gradients: LayerGradients = through(
        cell, alone, weights, one_step(d_output), nothing, np.zeros((1, T * B), np.int64)
    )
    return gradients


def warmup(cell_name: str, dtype: DTypeLike) -> None:
    """Compile the kernels of a cell, or load them from Numba's cache on disk, by running them once."""
    cell, dtype = CELLS[cell_name], np.dtype(dtype)
    B = inputs = H = 2
    rows, states = len(cell.gates) * H, len(cell.states)
    shapes = ((rows, inputs), (rows, H), (rows,), (rows,), (len(cell.peepholes) * H,))
    weights = LayerWeights(*(np.zeros(shape, dtype) for shape in shapes))
    state, d_output = np.zeros((states, B, H), dtype), np.zeros((2, B, H), dtype)
    for keep in (False, True):
        trace = forward(cell, np.zeros((2, B, inputs), dtype), weights, state, np.full(B, 2), keep)
    for exponent in (None, np.zeros((2, B), np.int64)):
        backward(cell, trace, weights, d_output, state, exponent)
    jacobian(cell, trace, weights, 0)
