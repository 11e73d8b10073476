"""Sequence kernels for the GPU: forward and backpropagation through time of one layer in one direction.

Shapes: T steps, B batch, I inputs, H hidden units, G gates, S states (h, or h and c), P peepholes, K numbers saved.

    x (T, B, I)    weight_ih (G·H, I), weight_hh (G·H, H)    state, d_state (S, T+1, B, H), slot 0 is the initial one
    ax, dax, dah (T, B, G·H)    saved (1, T, 1, B, K, H): one vector of H units, see `LayerTrace`

Each kernel is made once from a cell's `step` and `step_backward` and a `Plan`, and runs the whole sequence in one
launch. The recurrent weights stay on the chip, packed in the order in which threads read them, as far as they fit. At a
step every block multiplies what it received, adds up the sums of its units, lets one thread a unit and sequence run the
cell, and sends the result to all blocks that need it; then all of them wait for each other. Products that need no
recurrence (with the inputs, dL/dx, the gradients of weights) are cuBLAS's, on the same stream.

In Numba's simulator (NUMBA_ENABLE_CUDASIM=1) the kernels run as Python, NumPy stands for CuPy, and the tests bring what
launches and multiplies there.
"""

import ctypes
import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, types
from numba.np.numpy_support import from_dtype

from ..cells import Cell
from . import Array, LayerGradients, LayerTrace, LayerWeights, cpu
from .compiling import written
from .panels import numbers_saved, put_numbers, take_numbers
from .plan import ARITHMETIC, Chip, Plan, Product, plan
from .ptx import MMA, NARROW, SIMULATED, cluster_barrier, copy16, copy_wait, device, grid_barrier, load4, store_remote

#: CuPy; where there is none kernels can still be compiled, and that is all, see `kernels.backend`.
xp: Any = np if SIMULATED or importlib.util.find_spec("cupy") is None else importlib.import_module("cupy")

__all__ = ["Launch", "backward", "capture", "chip", "chunk_steps", "direct", "forward", "jacobian", "limits", "on_host"]
__all__ += ["prepare_backward", "prepare_forward"]

#: The exponent of a step at which all is zero so far.
_NONE = -(2**40)

_take = cache(lambda count: device(take_numbers(count).py_func))
_put = cache(lambda count: device(put_numbers(count).py_func))


def _written(name, arguments, lines, **names):
    """Return the device function of these lines of source: written out, so that every number has a register."""
    return device(written(name, arguments, lines, **names))


# Products -----------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """The types of a kernel: of states and sums, of a word of weights, of a number that is sent; numbers in a word."""

    number: Any
    word: Any
    sent: Any
    per_word: int


def _kind(dtype: str) -> _Kind:
    number = np.float64 if dtype == "float64" else np.float32
    if ARITHMETIC[dtype].rows == 1:
        return _Kind(number, number, number, 1)
    per_word = 4 // ARITHMETIC[dtype].item
    return _Kind(number, np.int32, np.int32 if per_word == 1 else np.int16, per_word)


@cache
def _load_tiles(tiles: int, threads: int):
    """Build (packed, at) ↦ a thread's weights of one chunk of all its tiles, four words each."""
    loads = "".join(f"load4(packed, at + {4 * n * threads}), " for n in range(tiles))
    return _written("load_tiles", "packed, at", [f"return ({loads})"], load4=load4)


@cache
def _load_weights(product: Product, threads: int):
    """Build (packed, at) ↦ the weights that a thread keeps in registers, chunk by chunk."""
    chunks = "".join(f"load(packed, at + {4 * c * product.tiles * threads}), " for c in range(product.registers))
    return _written("load_weights", "packed, at", [f"return ({chunks})"], load=_load_tiles(product.tiles, threads))


@device
def _load_pair(vector, at):
    return vector[at], vector[at + 4]


@device
def _multiply_add(sum_, weights, x):
    return sum_ + weights[0] * x[0] + weights[1] * x[1] + weights[2] * x[2] + weights[3] * x[3]


@cache
def _plus(count: int):
    """Build the sum of two tuples."""
    return _written("plus", "a, b", [f"return ({''.join(f'a[{k}] + b[{k}], ' for k in range(count))})"])


@cache
def _tensor_add(dtype: str):
    mma = MMA[dtype]

    @device
    def add(sums, w, x):
        return mma(w[0], w[1], w[2], w[3], x[0], x[1], sums[0], sums[1], sums[2], sums[3])

    return add


@cache
def _product(made: Plan, product: Product):
    """Build the product of a worker: its outputs of all rows of a tile, each summed over the depth of its slice.

    Weights come from registers, then from shared memory, then from L2; `*_at` is where this thread's begin. What is
    written out are calls, because Numba's time of compilation grows with the square of a function's length.
    """
    kind, number, tensor = ARITHMETIC[made.dtype], _kind(made.dtype).number, ARITHMETIC[made.dtype].rows > 1
    tiles, columns = range(product.tiles), range(0, made.inner, 8 if tensor else 1)
    add = _tensor_add(made.dtype) if tensor else _multiply_add
    lines = [f"return ({''.join(f'add(a[{n}], w[{n}], x), ' for n in tiles)})"]
    names = {
        "load_x": _load_pair if tensor else load4,
        "load_tiles": _load_tiles(product.tiles, made.threads),
        "multiply": _written("multiply", "a, w, x", lines, add=add),
        "join": _written(
            "join", "a, e", [f"return ({''.join(f'plus(a[{n}], e[{n}]), ' for n in tiles)})"], plus=_plus(4)
        ),
        "zero": ((number(0),) * 4 if tensor else number(0),) * product.tiles,
    }
    step, chunk = product.slices * kind.words, 4 * product.tiles * made.threads
    lines = [f"for b in range(0, {made.rows}, {made.inner}):"]
    # A product in tensor cores waits some 30 cycles for the one before: odd chunks have sums of their own.
    odd = "e" if tensor and product.registers > 1 else "a"
    for i in columns:
        lines += [f"    a{i} = {odd}{i} = zero", f"    x{i} = vector_at + (b + {i}) * {product.row}"]
    for c in range(product.registers):
        to = odd if c % 2 else "a"
        lines += [f"    {to}{i} = multiply({to}{i}, weights[{c}], load_x(vector, x{i} + {c * step}))" for i in columns]
    if odd == "e":
        lines += [f"    a{i} = join(a{i}, e{i})" for i in columns]
    for count, before, source in ((product.kept, 0, "kept"), (product.streamed, product.kept, "streamed")):
        if count:
            lines += [f"    for c in range({count}):", f"        w = load_tiles({source}, {source}_at + c * {chunk})"]
            at = f"(c + {product.registers + before}) * {step}"
            lines += [f"        a{i} = multiply(a{i}, w, load_x(vector, x{i} + {at}))" for i in columns]
    for i in columns:
        for n in tiles:
            to = f"sums[sums_at + (b + {i}) * {product.sums} + {n * product.groups * kind.rows}"
            if tensor:
                offsets = enumerate((0, product.sums, 8, product.sums + 8))
                lines += [f"    {to} + {offset}] = a{i}[{n}][{j}]" for j, offset in offsets]
            else:
                lines.append(f"    {to}] = a{i}[{n}]")
    arguments = "weights, kept, kept_at, streamed, streamed_at, vector, vector_at, sums, sums_at"
    return _written("product", arguments, [*lines, "return"], **names)


@cache
def _gather(made: Plan, product: Product):
    """Build (sums, at, start) ↦ start plus the sums over all slices, a number for each gate of a unit."""
    gates, slice_ = range(product.gates), made.rows * product.sums
    lines = [f"a{g} = start[{g}]" for g in gates] + [f"for s in range({product.slices}):"]
    lines += [f"    a{g} = a{g} + sums[at + s * {slice_} + {g * made.units}]" for g in gates]
    return _written("gather", "sums, at, start", [*lines, f"return ({''.join(f'a{g}, ' for g in gates)})"])


class _Parts(NamedTuple):
    """A product as a kernel uses it: start loads and places weights; run multiplies a tile; send, bring and gather."""

    start: Any
    run: Any
    gather: Any
    send: Any
    bring: Any


@cache
def _parts(made: Plan, index: int) -> _Parts:
    """Build the parts of product `index`; with a reset the second one has a vector, weights and sums of its own."""
    product, kind, PER = made.products[index], ARITHMETIC[made.dtype], _kind(made.dtype).per_word
    CLUSTER, BLOCKS, THREADS, LANES = made.tier == "A", made.blocks, made.threads, kind.lanes
    SEVERAL, LAST = made.slice > made.tile, min(made.tile, 8) - 1
    VECTOR, SUMS, KEPT = made.regions[index if made.tier == "A" else 0], made.regions[2], made.regions[3 + index]
    ROW, VECTORS, BASE = product.row, made.vectors, 2 * made.products[0].row * index
    CHUNKS, REGISTERS, IN_SHARED = (n * product.tiles for n in (product.chunks, product.registers, product.kept))
    SLICES, GROUPS, WORDS, SUM_ROW, TENSOR = product.slices, product.groups, kind.words, product.sums, kind.rows > 1
    SLICE_SUMS, FOUR, narrow = made.rows * product.sums, 16 // kind.word, NARROW[made.dtype]
    load_weights, product_of = _load_weights(product, THREADS), _product(made, product)

    @device
    def start(words, packed, rank, tid):
        begin = (rank * CHUNKS * THREADS + tid) * 4
        for c in range(IN_SHARED):
            for i in range(4):
                words[KEPT + (c * THREADS + tid) * 4 + i] = packed[begin + (REGISTERS + c) * THREADS * 4 + i]
        return load_weights(packed, begin)

    @device
    def run(weights, words, numbers, packed, rank, tid, slot, b0):
        worker, lane = tid // LANES, tid % LANES
        part, group = worker // GROUPS, worker % GROUPS
        if part < SLICES:
            vector_at = VECTOR + ((slot * VECTORS + b0) * ROW if CLUSTER else 0) + part * WORDS
            sums_at = SUMS + part * SLICE_SUMS + group
            if TENSOR:
                vector_at += min(lane // 4, LAST) * ROW + lane % 4
                sums_at += 15 * group + 2 * (lane % 4) * SUM_ROW + lane // 4
            streamed_at = ((rank * CHUNKS + REGISTERS + IN_SHARED) * THREADS + tid) * 4
            product_of(weights, words, KEPT + tid * 4, packed, streamed_at, words, vector_at, numbers, sums_at)

    @device
    def send(stored, exchange, slot, row, b, B, k, value):
        """Give a number of sequence b, `row` of the slice, to all blocks of the team."""
        narrowed = narrow(value)
        if CLUSTER:
            at = (VECTOR + (slot * VECTORS + row) * ROW) * PER + k
            if BLOCKS == 1:
                stored[at] = narrowed
            else:
                for r in range(BLOCKS):
                    store_remote(stored, at, np.int32(r), narrowed)
        else:
            exchange[(BASE * B + (slot * B + b) * ROW) * PER + k] = narrowed

    @device
    def bring(words, exchange_words, slot, b, B, rows, tid):
        """Copy the vectors of a tile from where all blocks put them, unless they are here already."""
        if not CLUSTER:
            begin = BASE * B + (slot * B + b) * ROW
            for i in range(tid * FOUR, rows * ROW, THREADS * FOUR):
                copy16(words, VECTOR + i, exchange_words, begin + i)
            copy_wait()
        if SEVERAL or not CLUSTER:
            cuda.syncthreads()

    return _Parts(start, run, _gather(made, product), send, bring)


@cache
def _barrier(made: Plan):
    """Build (arrived, team, passed) ↦ passed, after a barrier of the team; `passed` counts its blocks so far."""
    CLUSTER, BLOCKS = made.tier == "A", made.blocks

    @device
    def barrier(arrived, team, passed):
        if CLUSTER:
            if BLOCKS == 1:
                cuda.syncthreads()
            else:
                cluster_barrier()
        else:
            grid_barrier(arrived, team, passed + BLOCKS)
        return passed + BLOCKS

    return barrier


# Forward ------------------------------------------------------------------------------------------------------------


@cache
def _forward_kernel(cell: Cell, made: Plan, keep: bool):
    """Build the kernel that fills state[:, 1:] and, with `keep`, saved and reset_h."""
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    JOINT, RESET, KEEP, H, HEAD = cell.joint, cell.reset is not None, keep, made.hidden, len(cell.gates) - 1
    number, word, sent, _ = _kind(made.dtype)
    BLOCKS, THREADS, UNITS, SLICE, TILE = made.blocks, made.threads, made.units, made.slice, made.tile
    VECTORS_END, SUMS, LAST = made.regions[2], made.regions[2], 1 if RESET else 0
    start, run, gather, send, bring = _parts(made, LAST)
    start_head, run_head, gather_head, send_head, bring_head = _parts(made, 0)
    SUM_ROW, HEAD_ROW, barrier = made.products[LAST].sums, made.products[0].sums, _barrier(made)
    take_gates, take_peepholes, take_states = map(_take, (G, P, S))
    take_head = _written("take_head", "a", [f"return ({''.join(f'a[{g}], ' for g in range(HEAD))})"])
    put_states, put_saved, put_head, put_two, plus = _put(S), _put(K), _put(HEAD), _put(2), _plus(G)
    step, reset = cell.whole_step, cell.reset[0] if cell.reset else None
    nothing, zeros, zero = (number(-0.0),) * G, (number(0),) * K, number(0)

    def forward(
        T, B, ax, bias_ih, bias_hh, peephole, packed_head, packed, lengths, state, saved, reset_h,
        exchange, exchange_words, arrived,
    ):  # fmt: skip
        words, numbers = cuda.shared.array(0, word, alignment=16), cuda.shared.array(0, number, alignment=16)
        stored = cuda.shared.array(0, sent, alignment=16)  # three views of the same memory, with barriers between them
        tid, rank, team = cuda.threadIdx.x, cuda.blockIdx.x % BLOCKS, cuda.blockIdx.x // BLOCKS
        first = team * SLICE
        count = min(SLICE, B - first)
        u, row = tid % UNITS, tid // UNITS
        unit = rank * UNITS + u
        j, mine, states = min(unit, H - 1), row < TILE and unit < H, (T + 1) * B * H
        for i in range(tid, VECTORS_END, THREADS):
            words[i] = 0
        weights = start(words, packed, rank, tid)
        bias, bias_h, own = take_gates(bias_ih, j, H), take_gates(bias_hh, j, H), take_peepholes(peephole, j, H)
        if JOINT:
            bias = plus(bias, bias_h)
        if RESET:
            weights_head = start_head(words, packed_head, rank, tid)
        passed = barrier(arrived, team, 0)
        for b0 in range(0, count, TILE):
            if mine and b0 + row < count:
                b = first + b0 + row
                send_head(stored, exchange, 0, b0 + row, b, B, unit, state[b * H + unit])
        passed = barrier(arrived, team, passed)

        for t in range(T):
            if RESET:
                for b0 in range(0, count, TILE):  # all that comes before the product with r ∘ h
                    active, b = mine and b0 + row < count, first + min(b0 + row, count - 1)
                    at = t * B + b
                    inputs, h_old = take_gates(ax, at * G * H + j, H), state[at * H + j]
                    bring_head(words, exchange_words, t % 2, first + b0, B, min(TILE, count - b0), tid)
                    run_head(weights_head, words, numbers, packed_head, rank, tid, t % 2, b0)
                    cuda.syncthreads()
                    if active:
                        sums = gather_head(numbers, SUMS + row * HEAD_ROW + u, plus(inputs, bias))
                        h_reset, partials = reset(sums[0], nothing[0], h_old)
                        put_head(ax, at * G * H + unit, H, sums)
                        if KEEP:
                            reset_h[at * H + unit] = h_reset
                            put_two(saved, (at * KS + K) * H + unit, H, partials)
                        send(stored, exchange, 0, b0 + row, b, B, unit, h_reset)
                passed = barrier(arrived, team, passed)
            for b0 in range(0, count, TILE):
                active, b = mine and b0 + row < count, first + min(b0 + row, count - 1)
                at = t * B + b
                inputs, old = take_gates(ax, at * G * H + j, H), take_states(state, at * H + j, states)
                running = t < lengths[b]
                slot = 0 if RESET else t % 2
                bring(words, exchange_words, slot, first + b0, B, min(TILE, count - b0), tid)
                run(weights, words, numbers, packed, rank, tid, slot, b0)
                cuda.syncthreads()
                if active:
                    sums_at = SUMS + row * SUM_ROW + u
                    if RESET:
                        last = gather(numbers, sums_at, (inputs[HEAD] + bias[HEAD],))
                        new, partials = step(take_head(inputs) + last, nothing, own, old)
                    elif JOINT:
                        new, partials = step(gather(numbers, sums_at, plus(inputs, bias)), nothing, own, old)
                    else:
                        new, partials = step(plus(inputs, bias), gather(numbers, sums_at, bias_h), own, old)
                    h = new[0] if running else old[0]
                    if running:
                        put_states(state, (at + B) * H + unit, states, new)
                    else:  # past the end of a sequence its state is held
                        put_states(state, (at + B) * H + unit, states, old)
                        partials = zeros
                        if KEEP and RESET:
                            put_two(saved, (at * KS + K) * H + unit, H, (zero, zero))
                    if KEEP:
                        put_saved(saved, at * KS * H + unit, H, partials)
                    send_head(stored, exchange, (t + 1) % 2, b0 + row, b, B, unit, h)
            passed = barrier(arrived, team, passed)

    return _kernel(made)(forward)


def _kernel(made: Plan):
    """Return the decorator of a kernel that is launched with the threads of a plan, alone on its multiprocessor."""
    return cuda.jit if SIMULATED else cuda.jit(launch_bounds=(made.threads, 1))


# Backward -----------------------------------------------------------------------------------------------------------


@device
def _highest(exponent, at, value, base):
    """Raise exponent[at] to that of |value|·2^base, the e of [2^(e−1), 2^e); zero has none."""
    if value != 0:
        cuda.atomic.max(exponent, at, base + math.frexp(value)[1])


@device
def _exponent_at(exponent, at, known):
    """Return exponent[at] as all blocks left it, 0 where it is not `known` or nothing has one."""
    found = cuda.atomic.max(exponent, at, _NONE) if known else _NONE
    return 0 if found == _NONE else found


_ldexp = (lambda value, n: math.ldexp(value, int(n))) if SIMULATED else math.ldexp


@device
def _scale(value, n):
    """Return value·2ⁿ."""
    return _ldexp(value, np.int32(max(-2000, min(2000, n))))


@cache
def _backward_kernel(cell: Cell, made: Plan, scaled: bool):
    """Build the kernel that turns d_state[:, T] and d_output into d_state, dax, dah and dp.

    With `scaled` each step has an exponent, the largest over the units of a sequence, `_NONE` where all are zero.
    """
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    JOINT, RESET, SCALED, H, HEAD = cell.joint, cell.reset is not None, scaled, made.hidden, len(cell.gates) - 1
    number, word, sent, _ = _kind(made.dtype)
    BLOCKS, THREADS, UNITS, SLICE, TILE = made.blocks, made.threads, made.units, made.slice, made.tile
    VECTORS_END, SUMS = made.regions[2], made.regions[2]
    start, run, gather, send, bring = _parts(made, 0)
    start_last, run_last, gather_last, send_last, bring_last = _parts(made, 1 if RESET else 0)
    SUM_ROW, LAST_ROW, barrier = made.products[0].sums, made.products[-1].sums, _barrier(made)
    take_saved, take_two, take_peepholes, take_states = map(_take, (K, 2, P, S))
    put_gates, put_peepholes, put_states = map(_put, (G, P, S))
    step_backward, reset_backward = cell.step_backward, cell.reset[1] if cell.reset else None
    no_gates, no_peepholes, zero, none = (number(0),) * G, (number(0),) * P, number(0), (number(0),)
    first_state = _written(
        "first_state", "states, h", [f"return (h, {''.join(f'states[{s}], ' for s in range(1, S))})"]
    )
    scale_states = _written(
        "scale_states", "v, n", [f"return ({''.join(f'scale(v[{s}], n), ' for s in range(S))})"], scale=_scale
    )
    note = _written(
        "note", "exponent, at, v, base", [f"highest(exponent, at, v[{s}], base)" for s in range(S)], highest=_highest
    )

    # With a reset the last gate goes through weights of its own, and gate r follows when that has come back.
    gates = range(1, HEAD) if RESET else range(G)
    lines = [f"send(stored, exchange, slot, row, b, B, {g * H} + unit, da[{g}])" for g in gates]
    send_gates = _written("send_gates", "stored, exchange, slot, row, b, B, unit, da", lines, send=send)

    @device
    def received(numbers, row, u, d_state, at, states, multiplied):
        """dL/dstate as the step behind left it, with what came through W_hh."""
        base = take_states(d_state, at, states)
        return first_state(base, base[0] + gather(numbers, SUMS + row * SUM_ROW + u, none)[0]) if multiplied else base

    @device
    def finish(stored, exchange, t, T, B, row, b, unit, running, states, own, saved, d, d_state, dax, dah, dp):
        at = t * B + b
        if running:
            da_x, da_h, d_own, total, old = step_backward(take_saved(saved, at * KS * H + unit, H), own, d)
        else:  # the state was held: so is its adjoint, and no weight has a share
            da_x, da_h, d_own, total, old = no_gates, no_gates, no_peepholes, d, d
        put_gates(dax, at * G * H + unit, H, da_x)
        if not JOINT:
            put_gates(dah, at * G * H + unit, H, da_h)
        put_peepholes(dp, at * P * H + unit, H, d_own)
        put_states(d_state, (at + B) * H + unit, states, total)
        put_states(d_state, at * H + unit, states, old)
        send_gates(stored, exchange, t % 2, row, b, B, unit, da_h)
        if RESET:
            send_last(stored, exchange, 0, row, b, B, unit, da_h[HEAD])

    def backward(
        T, B, d_output, d_output_exponent, peephole, packed, packed_last, lengths, saved, d_state, dax, dah, dp,
        exponent, exchange, exchange_words, arrived,
    ):  # fmt: skip
        words, numbers = cuda.shared.array(0, word, alignment=16), cuda.shared.array(0, number, alignment=16)
        stored = cuda.shared.array(0, sent, alignment=16)  # three views of the same memory, with barriers between them
        tid, rank, team = cuda.threadIdx.x, cuda.blockIdx.x % BLOCKS, cuda.blockIdx.x // BLOCKS
        begin = team * SLICE
        count = min(SLICE, B - begin)
        u, row = tid % UNITS, tid // UNITS
        unit = rank * UNITS + u
        j, mine, states = min(unit, H - 1), row < TILE and unit < H, (T + 1) * B * H
        for i in range(tid, VECTORS_END, THREADS):
            words[i] = 0
        weights, own = start(words, packed, rank, tid), take_peepholes(peephole, j, H)
        if RESET:
            weights_last = start_last(words, packed_last, rank, tid)
        passed = barrier(arrived, team, 0)

        for t in range(T - 1, -1, -1):
            for b0 in range(0, count, TILE):
                active, b = mine and b0 + row < count, begin + min(b0 + row, count - 1)
                at = t * B + b
                direct, running = d_output[at * H + j], t < lengths[b]
                if t < T - 1:
                    bring(words, exchange_words, (t + 1) % 2, begin + b0, B, min(TILE, count - b0), tid)
                    run(weights, words, numbers, packed, rank, tid, (t + 1) % 2, b0)
                    cuda.syncthreads()
                if active:
                    d = received(numbers, row, u, d_state, (at + B) * H + unit, states, t < T - 1)
                    if SCALED:
                        put_states(d_state, (at + B) * H + unit, states, d)
                        before = _exponent_at(exponent, at + 2 * B, t < T - 1)
                        if running:
                            note(exponent, at + B, d, before)
                            _highest(exponent, at + B, direct, d_output_exponent[at])
                        else:
                            cuda.atomic.max(exponent, at + B, before)
                    else:
                        if running:
                            d = first_state(d, d[0] + direct)
                        finish(
                            stored, exchange, t, T, B, b0 + row, b, unit, running, states, own, saved, d, d_state,
                            dax, dah, dp,
                        )  # fmt: skip
            if SCALED:
                passed = barrier(arrived, team, passed)
                for b0 in range(0, count, TILE):
                    if mine and b0 + row < count:
                        b = begin + b0 + row
                        at, running = t * B + b, t < lengths[b]
                        d = take_states(d_state, (at + B) * H + unit, states)
                        top = _exponent_at(exponent, at + B, True)
                        if running:
                            d = scale_states(d, _exponent_at(exponent, at + 2 * B, t < T - 1) - top)
                            d = first_state(d, d[0] + _scale(d_output[at * H + unit], d_output_exponent[at] - top))
                        finish(
                            stored, exchange, t, T, B, b0 + row, b, unit, running, states, own, saved, d, d_state,
                            dax, dah, dp,
                        )  # fmt: skip
            if RESET:
                passed = barrier(arrived, team, passed)
                for b0 in range(0, count, TILE):
                    active, b = mine and b0 + row < count, begin + min(b0 + row, count - 1)
                    at = t * B + b
                    kept, running = take_two(saved, (at * KS + K) * H + j, H), t < lengths[b]
                    bring_last(words, exchange_words, 0, begin + b0, B, min(TILE, count - b0), tid)
                    run_last(weights_last, words, numbers, packed_last, rank, tid, 0, b0)
                    cuda.syncthreads()
                    if active:
                        d_reset = gather_last(numbers, SUMS + row * LAST_ROW + u, none)[0]
                        da, dh = reset_backward(kept, d_reset if running else zero)
                        dax[at * G * H + unit] = da
                        d_state[at * H + unit] += dh
                        send(stored, exchange, t % 2, b0 + row, b, B, unit, da)
            passed = barrier(arrived, team, passed)

        # dL/dstate of slot 0.
        for b0 in range(0, count, TILE):
            bring(words, exchange_words, 0, begin + b0, B, min(TILE, count - b0), tid)
            run(weights, words, numbers, packed, rank, tid, 0, b0)
            cuda.syncthreads()
            if mine and b0 + row < count:
                at = (begin + b0 + row) * H + unit
                d_state[at] += gather(numbers, SUMS + row * SUM_ROW + u, none)[0]

    return _kernel(made)(backward)


# Weights and numbers of lower precision -----------------------------------------------------------------------------


@cache
def _pack_kernel(made: Plan, index: int):
    """Build the kernel that puts weights in the order in which threads read them, 0 where there are none."""
    product, kind, PER = made.products[index], ARITHMETIC[made.dtype], _kind(made.dtype).per_word
    narrow, zero = NARROW[made.dtype], _kind(made.dtype).number(0)
    GATES, DEPTH, TILES, GROUPS, SLICES, CHUNKS = product[:6]
    THREADS, UNITS, LANES, WORDS, H = made.threads, made.units, kind.lanes, kind.words, made.hidden
    TENSOR, BACKWARD, ROWS = kind.rows > 1, made.backward, kind.rows

    @device
    def weight_at(weight, output, unit, k):
        if output >= GATES * UNITS or unit >= H or k >= DEPTH:
            return narrow(zero)
        return narrow(weight[k * H + unit] if BACKWARD else weight[(output // UNITS * H + unit) * H + k])

    def pack(weight, packed):
        for i in range(cuda.grid(1), packed.size, cuda.gridsize(1)):
            place, tid, chunk = i % 4, i // 4 % THREADS, i // (4 * THREADS) % (CHUNKS * TILES)
            rank, worker, lane = i // (4 * THREADS * CHUNKS * TILES), tid // LANES, tid % LANES
            part, group = worker // GROUPS, worker % GROUPS
            output = ROWS * (group + GROUPS * (chunk % TILES))
            k = (part + SLICES * (chunk // TILES)) * WORDS
            if TENSOR:
                output, k = output + lane // 4 + place % 2 * 8, (k + lane % 4 + place // 2 * 4) * PER
            else:
                k += place
            if part >= SLICES:
                k = DEPTH
            unit = rank * UNITS + output % UNITS
            if PER == 1:
                packed[i] = weight_at(weight, output, unit, k)
            else:
                high = np.int32(weight_at(weight, output, unit, k + 1)) << 16
                packed[i] = high | (np.int32(weight_at(weight, output, unit, k)) & 0xFFFF)

    return cuda.jit(pack)


@cache
def _narrow_kernel(dtype: str):
    narrow = NARROW[dtype]

    def narrow_all(source, target):
        for i in range(cuda.grid(1), target.size, cuda.gridsize(1)):
            target[i] = narrow(source[i])

    return cuda.jit(narrow_all)


# Launches -----------------------------------------------------------------------------------------------------------


@cache
def chip() -> Chip:
    """Return what plans need to know of the current GPU."""
    found = xp.cuda.Device()
    major, minor = divmod(int(found.compute_capability), 10)
    processors, shared = (found.attributes[name] for name in ("MultiProcessorCount", "MaxSharedMemoryPerBlockOptin"))
    return Chip((major, minor), processors, shared, clusters=_clusters(shared) if major >= 9 else ())


def _clusters(shared: int) -> tuple[tuple[int, int], ...]:
    """Return how many clusters of blocks, each with so much shared memory, the driver runs at once, by their size."""
    from cuda.core import LEGACY_DEFAULT_STREAM, Device, LaunchConfig

    def nothing(values):
        values[0] = 0

    Device(xp.cuda.Device().id).set_current()
    kernel = _compiled(cuda.jit(nothing), (types.Array(types.float32, 1, "C"),), shared, True)
    configs = {n: LaunchConfig(grid=1, cluster=n, block=256, shmem_size=shared) for n in (2, 4, 8, 16)}
    count = kernel.occupancy.max_active_clusters
    return tuple((n, count(config, stream=LEGACY_DEFAULT_STREAM)) for n, config in configs.items())


def limits(dtype: str) -> tuple[float, float]:
    """Return the FLOP/s of this arithmetic and the bytes/s from memory for which the GPU is built."""
    found = xp.cuda.Device().attributes
    flops = 2e3 * ARITHMETIC[dtype].rate * chip().processors * found["ClockRate"]
    return flops, 2e3 * found["MemoryClockRate"] * found["GlobalMemoryBusWidth"] / 8


@cache
def _compiled(kernel: Any, signature: tuple[Any, ...], shared: int, cluster: bool) -> Any:
    """Return the loaded kernel for these types, with so much shared memory allowed."""
    from cuda.bindings import driver

    loaded = kernel.compile(signature)._codelibrary.get_cufunc().kernel
    attribute = driver.CUfunction_attribute
    wanted = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared}
    if cluster:
        wanted[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    for name, value in wanted.items():
        (status,) = driver.cuKernelSetAttribute(name, value, loaded.handle, xp.cuda.Device().id)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver refuses {name.name} = {value}: {status.name}")
    return loaded


class Launch:
    """A kernel with its arguments, prepared once; calling it puts it on CuPy's current stream.

    Kernels see arrays as flat ones, whatever their shape. Blocks of a grid that wait for each other are launched
    together or not at all.
    """

    def __init__(
        self, kernel: Any, arguments: tuple[Any, ...], blocks: int, threads: int, *, shared: int = 0, cluster: int = 1,
        together: bool = False,
    ) -> None:  # fmt: skip
        from cuda.core import Device, LaunchConfig

        Device(xp.cuda.Device().id).set_current()
        self._kept = arguments
        kinds = (types.int64 if isinstance(a, int) else types.Array(from_dtype(a.dtype), 1, "C") for a in arguments)
        self._kernel = _compiled(kernel, tuple(kinds), shared, cluster > 1)
        options: dict[str, Any] = {"cluster": cluster} if cluster > 1 else {"is_cooperative": together}
        self._config = LaunchConfig(grid=blocks // cluster, block=threads, shmem_size=shared, **options)
        # As Numba passes an array: two empty references, size, bytes of an item, address, shape, strides.
        self._arguments: list[int] = []
        for a in arguments:
            flat = (a,) if isinstance(a, int) else (0, 0, a.size, a.itemsize, a.data.ptr, a.size, a.itemsize)
            self._arguments += flat

    def __call__(self) -> None:
        from cuda.core import launch

        launch(_stream(xp.cuda.get_current_stream().ptr), self._config, self._kernel, *self._arguments)


@cache
def _stream(pointer: int) -> Any:
    """Return a stream of CuPy's as one of cuda-core's, which asks for its device once: not while it is captured."""
    from cuda.core import Stream

    return Stream.from_handle(pointer or 1)  # the driver's name for the legacy default stream, which CuPy calls 0


def _elementwise(kernel: Any, *arrays: Array) -> Launch:
    return Launch(kernel, arrays, min(1024, -(-arrays[-1].size // 256)), 256)


def _scan(kernel: Any, made: Plan, arguments: tuple[Any, ...]) -> Launch:
    cluster = made.blocks if made.tier == "A" else 1
    if made.tier != "A" and 2 * (arguments[0] + 1) * made.blocks >= 2**31:  # two barriers a step, counted in 32 bits
        raise ValueError(f"x must have fewer than {2**30 // made.blocks - 1} steps, got {arguments[0]}")
    blocks, together = made.teams * made.blocks, made.tier != "A"
    return Launch(kernel, arguments, blocks, made.threads, shared=made.shared, cluster=cluster, together=together)


#: cuBLAS's names (cudaDataType_t and cublasComputeType_t) of the types that are multiplied, and of how.
_CUBLAS = {"float32": (0, 68), "float64": (1, 70), "tf32": (0, 77), "bf16": (14, 68), "fp16": (2, 68)}


@cache
def _cublas() -> Any:
    """Return the cuBLAS that CuPy has loaded; CuPy's own calls of it refuse a stream that is being captured."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    factor, out = (pointer, number, number), (pointer, pointer, number, number, number, number)
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasGemmEx.argtypes = [pointer, *[number] * 5, pointer, *factor, *factor, *out]
    return library


def _multiply(a: Array, b: Array, out: Array, dtype: str, *, ta: bool = False, tb: bool = False) -> None:
    """Set out = a b, of matrices, transposed where `ta` and `tb` say so, in the arithmetic of `dtype`."""
    if out.size == 0:
        return
    (m, k), n = a.shape[::-1] if ta else a.shape, b.shape[0] if tb else b.shape[1]
    kind, computing = _CUBLAS[dtype]
    result = 1 if dtype == "float64" else 0
    one, nil = np.ones(1, out.dtype), np.zeros(1, out.dtype)
    # cuBLAS counts columns first: it sees every matrix transposed, and computes outᵀ = bᵀ aᵀ.
    theirs, ours = ((v.data.ptr, kind, v.strides[0] // v.itemsize) for v in (b, a))
    shape, handle = (int(tb), int(ta), n, m, k), xp.cuda.device.get_cublas_handle()
    scales, library = (one.ctypes.data, nil.ctypes.data), _cublas()
    status = library.cublasSetStream_v2(handle, xp.cuda.get_current_stream().ptr) or library.cublasGemmEx(
        handle, *shape, scales[0], *theirs, *ours, scales[1], out.data.ptr, result, n, computing, -1
    )
    if status != 0:
        raise RuntimeError(f"cuBLAS refuses {dtype} of {a.shape} and {b.shape}: status {status}")


class _Matrix:
    """A matrix for `_multiply`: itself, or a copy in 16 bits, which `refresh` makes anew."""

    def __init__(self, values: Array, dtype: str) -> None:
        self.values, self._narrow = values, None
        if ARITHMETIC[dtype].item == 2 and values.size:
            self.values = xp.empty(values.shape, np.int16)
            self._narrow = _elementwise(_narrow_kernel(dtype), values, self.values)

    def refresh(self) -> None:
        if self._narrow is not None:
            self._narrow()


# What a layer calls -------------------------------------------------------------------------------------------------


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
        launches.append(_elementwise(_pack_kernel(made, index), weight_hh[head:] if index else weight_hh, packed[-1]))
    return packed, launches


def _exchange(made: Plan, B: int) -> tuple[Array, Array, Array]:
    """Return the memory through which blocks of a grid exchange numbers, as these and as words; counts of arrivals."""
    _, word, sent, _ = _kind(made.dtype)
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
    inputs, weight = _Matrix(x.reshape(T * B, I), dtype), _Matrix(weights.weight_ih, dtype)
    scan = _scan(
        _forward_kernel(cell, made, keep), made,
        (T, B, ax, weights.bias_ih, weights.bias_hh, weights.peephole, packed[0], packed[-1], lengths, states, saved,
         reset_h, exchange, words, arrived),
    )  # fmt: skip

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
        _multiply(inputs.values, weight.values, ax, dtype, tb=True)
        states[:, 0] = state
        arrived[...] = 0
        scan()

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
    scan = _scan(
        _backward_kernel(cell, made, scaled), made,
        (T, B, d_output, given, weights.peephole, packed[0], packed[-1], lengths, trace.saved, d_state, dax, dah, dp,
         exponent, exchange, words, arrived),
    )  # fmt: skip
    da, weight_ih = _Matrix(dax, dtype), _Matrix(weights.weight_ih, dtype)
    matrices = [da, weight_ih]
    if into is not None:
        sources = x.reshape(T * B, I), states[0, :T].reshape(T * B, H), trace.reset_h.reshape(-1, H)
        inputs, h, reset = (_Matrix(source, dtype) for source in sources)
        da_h, last = da if cell.joint else _Matrix(dah, dtype), G * H - H if cell.reset else G * H
        matrices += [inputs, h, reset] + ([] if cell.joint else [da_h])
        ones = xp.ones((1, T * B), number)

    def run() -> None:
        for launch in packing:
            launch()
        d_state[:, T] = d_final
        exponent[...] = _NONE
        arrived[...] = 0
        scan()
        if scaled:
            exponent[0] = exponent[1]
            exponent[...] = xp.where(exponent == _NONE, 0, exponent)
        for matrix in matrices:
            matrix.refresh()
        _multiply(da.values, weight_ih.values, dx.reshape(T * B, I), dtype)
        if into is not None:
            _multiply(da.values, inputs.values, into.weight_ih, dtype, ta=True)
            _multiply(da_h.values[:, :last], h.values, into.weight_hh[:last], dtype, ta=True)
            _multiply(da_h.values[:, last:], reset.values, into.weight_hh[last:], dtype, ta=True)
            for sums, of in ((into.bias_ih, dax), (into.peephole, dp)):
                _multiply(ones, of, sums[None], number.name)
            if cell.joint:
                into.bias_hh[...] = into.bias_ih
            else:
                _multiply(ones, dah, into.bias_hh[None], number.name)

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
