"""Backpropagation through time of one layer in one direction on the GPU, in one launch. See `cuda` for shapes."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from ..cells import Cell
from .cuda_block import barrier_of, block_of, device_function, kind_of, parts_of, put, sequence, sequence_kernel, take
from .panels import numbers_saved
from .plan import Plan
from .ptx import SIMULATED, device

__all__ = ["NO_EXPONENT", "BackwardArguments", "backward_kernel"]

#: The exponent of a step at which all is zero so far.
NO_EXPONENT = -(2**40)


class BackwardArguments(NamedTuple):
    """What the kernel takes: sizes, upstream gradients, packed weights, part of a `LayerTrace`, results, exchange.

    With a reset `packed_last` are the weights of the last gate, `packed` those of the others; else both are all.
    """

    T: int
    B: int
    d_output: Any
    d_output_exponent: Any
    peephole: Any
    packed: Any
    packed_last: Any
    lengths: Any
    saved: Any
    d_state: Any
    dax: Any
    dah: Any
    dp: Any
    exponent: Any
    exchange: Any
    exchange_words: Any
    arrived: Any


@device
def _highest(exponent, at, value, base):
    """Raise exponent[at] to that of |value|·2^base, the e of [2^(e−1), 2^e); zero has none."""
    if value != 0:
        cuda.atomic.max(exponent, at, base + math.frexp(value)[1])


@device
def _exponent_at(exponent, at, known):
    """Return exponent[at] as all blocks left it, 0 where it is not `known` or nothing has one."""
    found = cuda.atomic.max(exponent, at, NO_EXPONENT) if known else NO_EXPONENT
    return 0 if found == NO_EXPONENT else found


_ldexp = (lambda value, n: math.ldexp(value, int(n))) if SIMULATED else math.ldexp


@device
def _scale(value, n):
    """Return value·2ⁿ."""
    return _ldexp(value, np.int32(max(-2000, min(2000, n))))


@cache
def backward_kernel(cell: Cell, made: Plan, scaled: bool):
    """Build the kernel that turns d_state[:, T] and d_output into d_state, dax, dah and dp.

    With `scaled` each step has an exponent, the largest over the units of a sequence, `NO_EXPONENT` where all are zero.
    """
    P, RESET, SCALED, H, TILE = len(cell.peepholes), cell.reset is not None, scaled, made.hidden, made.tile
    product, start_last, this_block = parts_of(made, 0), parts_of(made, -1).start, block_of(made)
    start, multiply, gather, barrier, take_peepholes = *product[:3], barrier_of(made), take(P)
    receive, rescale = _receive(cell, made, scaled), _rescale(cell, made) if scaled else None
    after_reset, none = _after_reset(cell, made) if RESET else None, (kind_of(made.dtype).number(0),)

    @device
    def backward(a):
        block = this_block(a)
        weights, own = start(block, a.packed), take_peepholes(a.peephole, block.unit_read, H)
        if RESET:
            weights_last = start_last(block, a.packed_last)
        passed = barrier(block, 0)

        for t in range(a.T - 1, -1, -1):
            for b0 in range(0, block.sequences, TILE):
                receive(block, a, weights, own, t, b0)
            if SCALED:
                passed = barrier(block, passed)
                for b0 in range(0, block.sequences, TILE):
                    rescale(block, a, own, t, b0)
            if RESET:
                passed = barrier(block, passed)
                for b0 in range(0, block.sequences, TILE):
                    after_reset(block, a, weights_last, t, b0)
            passed = barrier(block, passed)

        for b0 in range(0, block.sequences, TILE):  # dL/dstate of slot 0
            multiply(block, weights, a.packed, 0, b0)
            active, b = sequence(block, b0)
            if active:
                a.d_state[b * H + block.unit] += gather(block, none)[0]

    return sequence_kernel(made, backward, BackwardArguments)


@cache
def _first_state(S: int):
    """Build (states, h) ↦ the states, with h in the place of the first."""
    lines = [f"return (h, {''.join(f'states[{s}], ' for s in range(1, S))})"]
    return device_function("first_state", "states, h", lines)


@cache
def _receive(cell: Cell, made: Plan, scaled: bool):
    """Build the first part of a step and tile: dL/dstate as step t+1 left it, what came through W_hh added; the cell.

    With `scaled`, instead of the cell: it is stored with the exponent of step t+1, those of its summands are noted.
    """
    S, SCALED, H, product = len(cell.states), scaled, made.hidden, parts_of(made, 0)
    multiply, gather, take_states, put_states = product.multiply, product.gather, take(S), put(S)
    first_state, finish, none = _first_state(S), _finish(cell, made), (kind_of(made.dtype).number(0),)
    lines = [f"highest(exponent, at, v[{s}], base)" for s in range(S)]
    note = device_function("note", "exponent, at, v, base", lines, highest=_highest)

    @device
    def receive(block, a, weights, own, t, b0):
        (active, b), states = sequence(block, b0), (a.T + 1) * a.B * H
        at = t * a.B + b
        direct, running = a.d_output[at * H + block.unit_read], t < a.lengths[b]
        if t < a.T - 1:
            multiply(block, weights, a.packed, (t + 1) % 2, b0)
        if active:
            after = at + a.B
            d = take_states(a.d_state, after * H + block.unit, states)
            if t < a.T - 1:
                d = first_state(d, d[0] + gather(block, none)[0])
            if SCALED:
                put_states(a.d_state, after * H + block.unit, states, d)
                before = _exponent_at(a.exponent, after + a.B, t < a.T - 1)
                if running:
                    note(a.exponent, after, d, before)
                    _highest(a.exponent, after, direct, a.d_output_exponent[at])
                else:
                    cuda.atomic.max(a.exponent, after, before)
            else:
                if running:
                    d = first_state(d, d[0] + direct)
                finish(block, a, own, t, b0, b, running, d)

    return receive


@cache
def _rescale(cell: Cell, made: Plan):
    """Build the rest of a scaled step and tile, when all exponents are noted: dL/dstate with the highest; the cell."""
    S, H, finish = len(cell.states), made.hidden, _finish(cell, made)
    first_state, take_states = _first_state(S), take(S)
    lines = [f"return ({''.join(f'scale(v[{s}], n), ' for s in range(S))})"]
    scale_states = device_function("scale_states", "v, n", lines, scale=_scale)

    @device
    def rescale(block, a, own, t, b0):
        active, b = sequence(block, b0)
        if active:
            at, unit, states, running = t * a.B + b, block.unit, (a.T + 1) * a.B * H, t < a.lengths[b]
            d = take_states(a.d_state, (at + a.B) * H + unit, states)
            top = _exponent_at(a.exponent, at + a.B, True)
            if running:
                d = scale_states(d, _exponent_at(a.exponent, at + 2 * a.B, t < a.T - 1) - top)
                d = first_state(d, d[0] + _scale(a.d_output[at * H + unit], a.d_output_exponent[at] - top))
            finish(block, a, own, t, b0, b, running, d)

    return rescale


@cache
def _finish(cell: Cell, made: Plan):
    """Build the cell's step back from the total dL/dstate `d`: results are stored, dL/dah is sent to all blocks."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    JOINT, RESET, H, HEAD, number = cell.joint, cell.reset is not None, made.hidden, G - 1, kind_of(made.dtype).number
    take_saved, put_gates, put_peepholes, put_states = take(K), put(G), put(P), put(S)
    step_backward, no_gates, no_peepholes = cell.step_backward, (number(0),) * G, (number(0),) * P
    # With a reset the last gate goes through weights of its own, and gate r follows when that has come back.
    gates, send_last = range(1, HEAD) if RESET else range(G), parts_of(made, -1).send
    lines = [f"send(block, slot, b0, {g * H} + block.unit, da[{g}])" for g in gates]
    send_gates = device_function("send_gates", "block, slot, b0, da", lines, send=parts_of(made, 0).send)

    @device
    def finish(block, a, own, t, b0, b, running, d):
        at, unit, states = t * a.B + b, block.unit, (a.T + 1) * a.B * H
        if running:
            da_x, da_h, d_own, total, old = step_backward(take_saved(a.saved, at * KS * H + unit, H), own, d)
        else:  # the state was held: so is its adjoint, and no weight has a share
            da_x, da_h, d_own, total, old = no_gates, no_gates, no_peepholes, d, d
        put_gates(a.dax, at * G * H + unit, H, da_x)
        if not JOINT:
            put_gates(a.dah, at * G * H + unit, H, da_h)
        put_peepholes(a.dp, at * P * H + unit, H, d_own)
        put_states(a.d_state, (at + a.B) * H + unit, states, total)
        put_states(a.d_state, at * H + unit, states, old)
        send_gates(block, t % 2, b0, da_h)
        if RESET:
            send_last(block, 0, b0, unit, da_h[HEAD])

    return finish


@cache
def _after_reset(cell: Cell, made: Plan):
    """Build what follows when dL/d(r ∘ h) has come back: gate r, and its part of dL/dh."""
    G, K, KS, H, zero = len(cell.gates), cell.saved, numbers_saved(cell), made.hidden, kind_of(made.dtype).number(0)
    product, send, take_two = parts_of(made, -1), parts_of(made, 0).send, take(2)
    multiply, gather, reset_backward, none = product.multiply, product.gather, cell.reset[1], (zero,)

    @device
    def after_reset(block, a, weights, t, b0):
        (active, b), unit = sequence(block, b0), block.unit
        at = t * a.B + b
        kept, running = take_two(a.saved, (at * KS + K) * H + block.unit_read, H), t < a.lengths[b]
        multiply(block, weights, a.packed_last, 0, b0)
        if active:
            d_reset = gather(block, none)[0]
            da, dh = reset_backward(kept, d_reset if running else zero)
            a.dax[at * G * H + unit] = da
            a.d_state[at * H + unit] += dh
            send(block, t % 2, b0, unit, da)

    return after_reset
