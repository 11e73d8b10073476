"""The forward pass of one layer in one direction on the GPU, in one launch. See `cuda` for shapes."""

from functools import cache
from typing import Any, NamedTuple

from ..cells import Cell
from .cuda_block import (
    barrier_of,
    block_of,
    device_function,
    kind_of,
    parts_of,
    plus,
    put,
    sequence,
    sequence_kernel,
    take,
)
from .panels import numbers_saved
from .plan import Plan
from .ptx import device

__all__ = ["ForwardArguments", "forward_kernel"]


class ForwardArguments(NamedTuple):
    """What the kernel takes: sizes, products with the inputs, packed weights, what becomes a `LayerTrace`, exchange.

    With a reset `packed_head` are the weights of the gates before it, `packed` those of the last; else both are all.
    """

    T: int
    B: int
    ax: Any
    bias_ih: Any
    bias_hh: Any
    peephole: Any
    packed_head: Any
    packed: Any
    lengths: Any
    state: Any
    saved: Any
    reset_h: Any
    exchange: Any
    exchange_words: Any
    arrived: Any


@cache
def forward_kernel(cell: Cell, made: Plan, keep: bool):
    """Build the kernel that fills state[:, 1:] and, with `keep`, saved and reset_h."""
    G, P, RESET, H, TILE = len(cell.gates), len(cell.peepholes), cell.reset is not None, made.hidden, made.tile
    JOINT, head, start, barrier = cell.joint, parts_of(made, 0), parts_of(made, -1).start, barrier_of(made)
    start_head, send_head, this_block = head.start, head.send, block_of(made)
    take_gates, take_peepholes, join = take(G), take(P), plus(G)
    run_cell, until_reset = _run_cell(cell, made, keep), _until_reset(cell, made, keep) if RESET else None

    @device
    def forward(a):
        block = this_block(a)
        weights, j = start(block, a.packed), block.unit_read
        bias, bias_h = take_gates(a.bias_ih, j, H), take_gates(a.bias_hh, j, H)
        own = take_peepholes(a.peephole, j, H)
        if JOINT:
            bias = join(bias, bias_h)
        if RESET:
            weights_head = start_head(block, a.packed_head)
        passed = barrier(block, 0)
        for b0 in range(0, block.sequences, TILE):
            active, b = sequence(block, b0)
            if active:
                send_head(block, 0, b0, block.unit, a.state[b * H + block.unit])
        passed = barrier(block, passed)

        for t in range(a.T):
            if RESET:
                for b0 in range(0, block.sequences, TILE):
                    until_reset(block, a, weights_head, bias, t, b0)
                passed = barrier(block, passed)
            for b0 in range(0, block.sequences, TILE):
                run_cell(block, a, weights, bias, bias_h, own, t, b0)
            passed = barrier(block, passed)

    return sequence_kernel(made, forward, ForwardArguments)


@cache
def _until_reset(cell: Cell, made: Plan, keep: bool):
    """Build all of a step and tile that comes before the product with r ∘ h: gates but the last, as sums in ax."""
    G, K, KS, HEAD, H = len(cell.gates), cell.saved, numbers_saved(cell), len(cell.gates) - 1, made.hidden
    KEEP, product, send = keep, parts_of(made, 0), parts_of(made, -1).send
    multiply, gather, take_gates, join = product.multiply, product.gather, take(G), plus(G)
    put_head, put_two, reset, nothing = put(HEAD), put(2), cell.reset[0], kind_of(made.dtype).number(-0.0)

    @device
    def until_reset(block, a, weights, bias, t, b0):
        (active, b), j, unit = sequence(block, b0), block.unit_read, block.unit
        at = t * a.B + b
        inputs, h_old = take_gates(a.ax, at * G * H + j, H), a.state[at * H + j]
        multiply(block, weights, a.packed_head, t % 2, b0)
        if active:
            sums = gather(block, join(inputs, bias))
            h_reset, partials = reset(sums[0], nothing, h_old)
            put_head(a.ax, at * G * H + unit, H, sums)
            if KEEP:
                a.reset_h[at * H + unit] = h_reset
                put_two(a.saved, (at * KS + K) * H + unit, H, partials)
            send(block, 0, b0, unit, h_reset)

    return until_reset


@cache
def _run_cell(cell: Cell, made: Plan, keep: bool):
    """Build the rest of a step and tile: the product, the cell, and h sent to all blocks."""
    G, S, K, KS, HEAD = len(cell.gates), len(cell.states), cell.saved, numbers_saved(cell), len(cell.gates) - 1
    JOINT, RESET, KEEP, H, number = cell.joint, cell.reset is not None, keep, made.hidden, kind_of(made.dtype).number
    product, send = parts_of(made, -1), parts_of(made, 0).send
    multiply, gather, join, take_gates, take_states = product.multiply, product.gather, plus(G), take(G), take(S)
    take_head = device_function("take_head", "a", [f"return ({''.join(f'a[{g}], ' for g in range(HEAD))})"])
    put_states, put_saved, put_two, step = put(S), put(K), put(2), cell.whole_step
    nothing, zeros, zero = (number(-0.0),) * G, (number(0),) * K, number(0)

    @device
    def run_cell(block, a, weights, bias, bias_h, own, t, b0):
        (active, b), j, unit, states = sequence(block, b0), block.unit_read, block.unit, (a.T + 1) * a.B * H
        at = t * a.B + b
        inputs, old = take_gates(a.ax, at * G * H + j, H), take_states(a.state, at * H + j, states)
        running = t < a.lengths[b]
        multiply(block, weights, a.packed, 0 if RESET else t % 2, b0)
        if active:
            if RESET:
                sums = gather(block, (inputs[HEAD] + bias[HEAD],))
                new, partials = step(take_head(inputs) + sums, nothing, own, old)
            elif JOINT:
                new, partials = step(gather(block, join(inputs, bias)), nothing, own, old)
            else:
                new, partials = step(join(inputs, bias), gather(block, bias_h), own, old)
            h = new[0] if running else old[0]
            if running:
                put_states(a.state, (at + a.B) * H + unit, states, new)
            else:  # past the end of a sequence its state is held
                put_states(a.state, (at + a.B) * H + unit, states, old)
                partials = zeros
                if KEEP and RESET:
                    put_two(a.saved, (at * KS + K) * H + unit, H, (zero, zero))
            if KEEP:
                put_saved(a.saved, at * KS * H + unit, H, partials)
            send(block, (t + 1) % 2, b0, unit, h)

    return run_cell
