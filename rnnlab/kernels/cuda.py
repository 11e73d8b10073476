"""Sequence kernels for the GPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)    weight_ih (G·H, I), weight_hh (G·H, H)    state, d_state (S, T+1, B, H), slot 0 is the initial one
    ax, dax, dah (T, B, G·H)    saved (1, T, 1, B, K, H): one vector of H units, see `LayerTrace`

Each kernel (`cuda_forward`, `cuda_backward`) is made once from a cell's `step` and `step_backward` and a `Plan`, of the
parts in `cuda_block`, and runs the whole sequence in one launch. The recurrent weights stay on the chip, packed in the
order in which threads read them, as far as they fit. At a step every block multiplies what it received, adds up the
sums of its units, lets one thread a unit and sequence run the cell, and sends the result to all blocks that need it;
then all of them wait for each other. Products that need no recurrence (with the inputs, dL/dx, the gradients of
weights) are cuBLAS's, on the same stream.

In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) the kernels run as Python, NumPy stands for CuPy, and the tests bring what
launches and multiplies there.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cells import Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights, cpu
from .cuda_backward import NO_EXPONENT, BackwardArguments, backward_kernel
from .cuda_block import kind_of, pack_kernel
from .cuda_forward import ForwardArguments, forward_kernel
from .cuda_launch import Launch, Matrix, chip, elementwise, limits, multiply, scan, xp
from .panels import numbers_saved
from .plan import Plan, plan

__all__ = ["backward", "capture", "chip", "chunk_steps", "direct", "forward", "jacobian", "limits", "on_host"]
__all__ += ["prepare_backward", "prepare_forward", "xp"]


def chunk_steps(cell: Cell, B: int, H: int) -> int:
    """Return the steps that kernels take at a time between which sums may be cut: any number."""
    return 1


def _on_device(array: Any) -> Array:
    """Return a C-contiguous device array: that of `__cuda_array_interface__` itself, a NumPy array copied."""
    return xp.ascontiguousarray(xp.asarray(array))  # CuPy stages large copies in pinned memory


def on_host(array: Array) -> Array:
    """Return a device array copied to pinned memory of the host."""
    if array.size == 0:
        return np.empty(array.shape, array.dtype)
    host = importlib.import_module("cupyx").empty_pinned(array.shape, array.dtype)
    return array.get(out=host)


def _like(result: Array, given: Any) -> Array:
    """Return a result where the input was, on the device or the host."""
    return on_host(result) if isinstance(given, np.ndarray) else result


def _packed(made: Plan, weight_hh: Array, dtype: Any) -> tuple[list[Array], list[Launch]]:
    """Return the packed weights of each product of a plan, and the launches that pack them."""
    packed, launches = [], []
    head = made.products[0].depth if made.backward else made.products[0].gates * made.hidden
    for index, product in enumerate(made.products):
        size = made.blocks * product.chunks * product.tiles * made.threads * 4
        packed.append(xp.empty(size, dtype))
        launches.append(elementwise(pack_kernel(made, index), weight_hh[head:] if index else weight_hh, packed[-1]))
    return packed, launches


def _exchange(made: Plan, B: int) -> tuple[Array, Array, Array]:
    """Return the memory through which blocks of a grid exchange numbers, as these and as words; counts of arrivals."""
    _, word, sent, _ = kind_of(made.dtype)
    size = B * (2 * made.products[0].row + sum(p.row for p in made.products[1:])) if made.tier != "A" else 4
    words = xp.zeros(size, word)
    return words.view(sent), words, xp.zeros(made.teams, np.int32)


Run = Callable[[], None]


def prepare_forward(
    cell: Cell, x: Any, weights: LayerWeights, state: Any, lengths: Any, keep: bool, arithmetic: str | None = None
) -> tuple[Run, LayerTrace]:
    """Return what `forward` runs and the trace that it fills, both on the device; as often as wanted.

    Device arrays among the arguments are read at every run; NumPy arrays are copied now, weights without `keep` too.
    """
    x, state, lengths, weights = *map(_on_device, (x, state, lengths)), LayerWeights(*map(_on_device, weights))
    (T, B, I), S, dtype = x.shape, len(cell.states), arithmetic or x.dtype.name
    made = plan(cell.name, dtype, B, weights.weight_hh.shape[1], False, chip())
    H, G, number = made.hidden, len(cell.gates), x.dtype
    states = xp.empty((S, T + 1, B, H), number)
    saved = xp.empty((1, T if keep else 0, 1, B, numbers_saved(cell), H), number)
    reset_h = xp.empty((T if keep and cell.reset else 0, B, H), number)
    ax, (exchange, words, arrived) = xp.empty((T * B, G * H), number), _exchange(made, B)
    packed, packing = _packed(made, weights.weight_hh, words.dtype)
    inputs, weight = Matrix(x.reshape(T * B, I), dtype), Matrix(weights.weight_ih, dtype)
    arguments = ForwardArguments(
        T, B, ax, weights.bias_ih, weights.bias_hh, weights.peephole, packed[0], packed[-1], lengths, states, saved,
        reset_h, exchange, words, arrived,
    )  # fmt: skip
    sequence = scan(forward_kernel(cell, made, keep), made, arguments)

    def pack() -> None:
        for launch in packing:
            launch()
        weight.refresh()

    if not keep:
        pack()

    def run() -> None:
        if keep:
            pack()
        inputs.refresh()
        multiply(inputs.values, weight.values, ax, dtype, tb=True)
        states[:, 0] = state
        arrived[...] = 0
        sequence()

    return run, LayerTrace(cell.name, x, states, saved, reset_h, lengths)


def forward(
    cell: Cell,
    x: Any,
    weights: LayerWeights,
    state: Any,
    lengths: Any,
    keep: bool = True,
    arithmetic: str | None = None,
) -> LayerTrace:
    """Run one layer in one direction over x (T, B, I) from state (S, B, H).

    With keep=False only the states are kept. `arithmetic` (tf32, bf16 or fp16; that of x where None) multiplies in
    tensor cores and adds up in float32. Arrays are of one dtype and checked by the caller; the trace of a NumPy x has
    x, state and lengths there, and what backward alone needs on the device.
    """
    run, trace = prepare_forward(cell, x, weights, state, lengths, keep, arithmetic)
    run()
    if isinstance(x, np.ndarray):
        return trace._replace(x=x, state=_like(trace.state, x), lengths=lengths)
    return trace


def prepare_backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Any,
    d_final: Any,
    d_output_exponent: Any = None,
    arithmetic: str | None = None,
) -> tuple[Run, LayerGradients]:
    """Return what `backward` runs and the gradients that it fills, both on the device; see `prepare_forward`."""
    d_output, d_final, weights = _on_device(d_output), _on_device(d_final), LayerWeights(*map(_on_device, weights))
    x, lengths = _on_device(trace.x), _on_device(trace.lengths)
    states = _on_device(trace.state) if d_output_exponent is None else None
    scaled, (T, B, H), I = d_output_exponent is not None, d_output.shape, x.shape[2]
    S, G, P, number = len(cell.states), len(cell.gates), len(cell.peepholes), d_output.dtype
    dtype = arithmetic or number.name
    made = plan(cell.name, dtype, B, H, True, chip())
    d_state, dx = xp.empty((S, T + 1, B, H), number), xp.empty((T, B, I), number)
    dax = xp.empty((T * B, G * H), number)
    dah, dp = dax if cell.joint else xp.empty_like(dax), xp.empty((T * B, P * H), number)
    given = _on_device(d_output_exponent) if scaled else xp.zeros(0, np.int64)
    exponent = xp.empty((T + 1 if scaled else 0, B), np.int64)
    exchange, words, arrived = _exchange(made, B)
    packed, packing = _packed(made, weights.weight_hh, words.dtype)
    into = None if scaled else LayerWeights(*(xp.empty(w.shape, number) for w in weights))
    arguments = BackwardArguments(
        T, B, d_output, given, weights.peephole, packed[0], packed[-1], lengths, trace.saved, d_state, dax, dah, dp,
        exponent, exchange, words, arrived,
    )  # fmt: skip
    sequence = scan(backward_kernel(cell, made, scaled), made, arguments)
    da, weight_ih = Matrix(dax, dtype), Matrix(weights.weight_ih, dtype)
    matrices = [da, weight_ih]
    if into is not None:
        sources = x.reshape(T * B, I), states[0, :T].reshape(T * B, H), trace.reset_h.reshape(-1, H)
        inputs, h, reset = (Matrix(source, dtype) for source in sources)
        da_h, last = da if cell.joint else Matrix(dah, dtype), G * H - H if cell.reset else G * H
        matrices += [inputs, h, reset] + ([] if cell.joint else [da_h])
        ones = xp.ones((1, T * B), number)

    def run() -> None:
        for launch in packing:
            launch()
        d_state[:, T] = d_final
        exponent[...] = NO_EXPONENT
        arrived[...] = 0
        sequence()
        if scaled:
            exponent[0] = exponent[1]
            exponent[...] = xp.where(exponent == NO_EXPONENT, 0, exponent)
        for matrix in matrices:
            matrix.refresh()
        multiply(da.values, weight_ih.values, dx.reshape(T * B, I), dtype)
        if into is not None:
            multiply(da.values, inputs.values, into.weight_ih, dtype, ta=True)
            multiply(da_h.values[:, :last], h.values, into.weight_hh[:last], dtype, ta=True)
            multiply(da_h.values[:, last:], reset.values, into.weight_hh[last:], dtype, ta=True)
            for sums, of in ((into.bias_ih, dax), (into.peephole, dp)):
                multiply(ones, of, sums[None], number.name)
            if cell.joint:
                into.bias_hh[...] = into.bias_ih
            else:
                multiply(ones, dah, into.bias_hh[None], number.name)

    return run, LayerGradients(into, dx, d_state, d_output, exponent if scaled else None, given if scaled else None)


def backward(
    cell: Cell,
    trace: LayerTrace,
    weights: LayerWeights,
    d_output: Any,
    d_final: Any,
    d_output_exponent: Any = None,
    into: LayerWeights | None = None,
    arithmetic: str | None = None,
    second: LayerWeights | None = None,
) -> LayerGradients:
    """Backpropagate d_output (T, B, H) and d_final (S, B, H) through one layer (BPTT: Werbos 1990).

    Given d_output_exponent (T, B), d_output stands for d_output·2^exponent, and the adjoint is rescaled by powers of
    two at every step; weights get no gradient then. dL/d weights is added to `into`, if that is given. Results are
    where d_output is; `arithmetic` is that of the forward pass. Nothing is added to `second`, see `cpu.backward`.
    """
    run, gradients = prepare_backward(cell, trace, weights, d_output, d_final, d_output_exponent, arithmetic)
    run()
    if gradients.weights is None:
        total = None
    else:
        found = [_like(gradient, d_output) for gradient in gradients.weights]
        total = into or LayerWeights(*found)
        for sums, gradient in zip(into or (), found, strict=False):
            sums += gradient
    exponent = None if gradients.exponent is None else _like(gradients.exponent, d_output)
    x, state = _like(gradients.x, d_output), _like(gradients.state, d_output)
    return LayerGradients(total, x, state, d_output, exponent, d_output_exponent)


def direct(cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array) -> LayerGradients:
    """Backpropagate d_output (T, B, H) through one step only, see `cpu.direct`."""
    return cpu.direct(cell, trace, weights, d_output, backward)


def jacobian(cell: Cell, trace: LayerTrace, weights: LayerWeights, t: int) -> Array:
    """Return d state_{t+1} / d state_t of every sequence, (B, S·H, S·H), put together on the host by `cpu.jacobian`."""
    one_step = trace._replace(saved=on_host(trace.saved[:, t : t + 1]), lengths=trace.lengths - t)
    return cpu.jacobian(cell, one_step, weights, 0)


def capture(run: Run) -> Run:
    """Return `run` as one CUDA graph: all its launches at once. What it needs must be allocated."""
    xp.cuda.Device().synchronize()  # what prepared it ran on another stream
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        run()
        stream.synchronize()
        stream.begin_capture()
        run()
        graph = stream.end_capture()

    def replay(kept: Run = run) -> None:  # a graph keeps no array alive: what `run` refers to must be
        graph.launch()

    return replay
