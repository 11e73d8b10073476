"""What the GPU kernels are made of: how a block multiplies at a step, and how blocks exchange what they computed.

A thread meets its block as a `Block`. The parts of a product are made from a `Plan`; everything is inlined, and what
is written out as source has a register for every number.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .compiling import written
from .panels import put_numbers, take_numbers
from .plan import ARITHMETIC, Plan, Product
from .ptx import MMA, NARROW, SIMULATED, cluster_barrier, copy16, copy_wait, device, grid_barrier, load4, store_remote

__all__ = ["barrier_of", "block_of", "device_function", "kind_of", "narrow_kernel", "pack_kernel", "parts_of", "plus"]
__all__ += ["put", "sequence", "sequence_kernel", "take"]

#: (array, at, stride) ↦ so many numbers as a tuple, and its inverse, see `panels.take_numbers`.
take = cache(lambda count: device(take_numbers(count).py_func))
put = cache(lambda count: device(put_numbers(count).py_func))


def device_function(name, arguments, lines, **names):
    """Return the device function of these lines of source."""
    return device(written(name, arguments, lines, **names))


@cache
def plus(count: int):
    """Build the sum of two tuples."""
    return device_function("plus", "a, b", [f"return ({''.join(f'a[{k}] + b[{k}], ' for k in range(count))})"])


class Kind(NamedTuple):
    """The types of a kernel: of states and sums, of a word of weights, of a number that is sent; numbers in a word."""

    number: Any
    word: Any
    sent: Any
    per_word: int


def kind_of(dtype: str) -> Kind:
    """Return the types of an arithmetic."""
    number = np.float64 if dtype == "float64" else np.float32
    if ARITHMETIC[dtype].rows == 1:
        return Kind(number, number, number, 1)
    per_word = 4 // ARITHMETIC[dtype].item
    return Kind(number, np.int32, np.int32 if per_word == 1 else np.int16, per_word)


def sequence_kernel(made: Plan, body, arguments):
    """Return the kernel that takes the fields of the class `arguments` one by one, and hands them to `body` as one.

    It has the threads of a plan, and is alone on its multiprocessor.
    """
    names, name = ", ".join(arguments._fields), body.__name__
    kernel = written(name, names, [f"body(pack({names}))"], body=body, pack=arguments)
    return cuda.jit(kernel) if SIMULATED else cuda.jit(launch_bounds=(made.threads, 1))(kernel)


# A thread in its block ----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of a kernel, as one of its threads sees it.

    words, numbers and stored: shared memory, one region in three views, with barriers between them; exchange and
    exchange_words: memory for blocks that are no cluster, in two views; arrived: how many came to a barrier, by team.
    team: which one, of B sequences it has so many `sequences` from `first` on; rank: the block in its team; tid: the
    thread in its block. The thread runs the cell of unit `u` of the block, `unit` of the network, in row `row` of each
    tile, where `mine` says that there are such a unit and row; for loads `unit_read` is a unit that exists.
    """

    words: Any
    numbers: Any
    stored: Any
    exchange: Any
    exchange_words: Any
    arrived: Any
    B: int
    tid: int
    rank: int
    team: int
    first: int
    sequences: int
    u: int
    row: int
    unit: int
    unit_read: int
    mine: bool


@cache
def block_of(made: Plan):
    """Build arguments ↦ the `Block` of a thread; it sets the vectors in shared memory to zero."""
    number, word, sent, _ = kind_of(made.dtype)
    BLOCKS, THREADS, UNITS, SLICE, TILE = made.blocks, made.threads, made.units, made.slice, made.tile
    VECTORS_END, H = made.regions[2], made.hidden

    @device
    def block_of(a):
        words, numbers = cuda.shared.array(0, word, alignment=16), cuda.shared.array(0, number, alignment=16)
        stored = cuda.shared.array(0, sent, alignment=16)
        tid, rank, team = cuda.threadIdx.x, cuda.blockIdx.x % BLOCKS, cuda.blockIdx.x // BLOCKS
        first = team * SLICE
        u, row = tid % UNITS, tid // UNITS
        unit = rank * UNITS + u
        for i in range(tid, VECTORS_END, THREADS):
            words[i] = 0
        return Block(
            words, numbers, stored, a.exchange, a.exchange_words, a.arrived, a.B, tid, rank, team, first,
            min(SLICE, a.B - first), u, row, unit, min(unit, H - 1), row < TILE and unit < H,
        )  # fmt: skip

    return block_of


@device
def sequence(block, b0):
    """Return whether the thread has a sequence in the tile from b0 on, and which; if not, one that exists."""
    return block.mine and b0 + block.row < block.sequences, block.first + min(b0 + block.row, block.sequences - 1)


@cache
def barrier_of(made: Plan):
    """Build (block, passed) ↦ passed, after a barrier of the team; `passed` counts its blocks so far."""
    CLUSTER, BLOCKS = made.tier == "A", made.blocks

    @device
    def barrier(block, passed):
        if CLUSTER:
            if BLOCKS == 1:
                cuda.syncthreads()
            else:
                cluster_barrier()
        else:
            grid_barrier(block.arrived, block.team, passed + BLOCKS)
        return passed + BLOCKS

    return barrier


# Products -----------------------------------------------------------------------------------------------------------


@cache
def _load_tiles(tiles: int, threads: int):
    """Build (packed, at) ↦ a thread's weights of one chunk of all its tiles, four words each."""
    loads = "".join(f"load4(packed, at + {4 * n * threads}), " for n in range(tiles))
    return device_function("load_tiles", "packed, at", [f"return ({loads})"], load4=load4)


@cache
def _load_weights(product: Product, threads: int):
    """Build (packed, at) ↦ the weights that a thread keeps in registers, chunk by chunk."""
    chunks = "".join(f"load(packed, at + {4 * c * product.tiles * threads}), " for c in range(product.registers))
    load = _load_tiles(product.tiles, threads)
    return device_function("load_weights", "packed, at", [f"return ({chunks})"], load=load)


@device
def _load_pair(vector, at):
    return vector[at], vector[at + 4]


@device
def _multiply_add(sum_, weights, x):
    return sum_ + weights[0] * x[0] + weights[1] * x[1] + weights[2] * x[2] + weights[3] * x[3]


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
    kind, number, tensor = ARITHMETIC[made.dtype], kind_of(made.dtype).number, ARITHMETIC[made.dtype].rows > 1
    tiles, columns = range(product.tiles), range(0, made.inner, 8 if tensor else 1)
    add = _tensor_add(made.dtype) if tensor else _multiply_add
    multiply = [f"return ({''.join(f'add(a[{n}], w[{n}], x), ' for n in tiles)})"]
    join = [f"return ({''.join(f'plus(a[{n}], e[{n}]), ' for n in tiles)})"]
    names = {
        "load_x": _load_pair if tensor else load4,
        "load_tiles": _load_tiles(product.tiles, made.threads),
        "multiply": device_function("multiply", "a, w, x", multiply, add=add),
        "join": device_function("join", "a, e", join, plus=plus(4)),
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
    return device_function("product", arguments, [*lines, "return"], **names)


@cache
def _gather(made: Plan, product: Product):
    """Build (sums, at, start) ↦ start plus the sums over all slices, a number for each gate of a unit."""
    gates, slice_ = range(product.gates), made.rows * product.sums
    lines = [f"a{g} = start[{g}]" for g in gates] + [f"for s in range({product.slices}):"]
    lines += [f"    a{g} = a{g} + sums[at + s * {slice_} + {g * made.units}]" for g in gates]
    return device_function("gather", "sums, at, start", [*lines, f"return ({''.join(f'a{g}, ' for g in gates)})"])


class Parts(NamedTuple):
    """A product as a kernel uses it.

    start(block, packed) ↦ the weights in registers, those of shared memory put there; multiply(block, weights, packed,
    slot, b0): the sums of the tile from b0 on, of the vectors in `slot`; gather(block, begin) ↦ a tuple, what has been
    multiplied added to it; send(block, slot, b0, k, value): number k of a vector of this thread's row, to all blocks.
    """

    start: Any
    multiply: Any
    gather: Any
    send: Any


@cache
def parts_of(made: Plan, index: int) -> Parts:
    """Build the parts of product `index`, 0 or −1; with a reset the last has a vector, weights and sums of its own."""
    if index < 0:
        return parts_of(made, len(made.products) - 1)
    product, kind, PER = made.products[index], ARITHMETIC[made.dtype], kind_of(made.dtype).per_word
    CLUSTER, BLOCKS, THREADS, LANES, TILE = made.tier == "A", made.blocks, made.threads, kind.lanes, made.tile
    SEVERAL, LAST = made.slice > made.tile, min(made.tile, 8) - 1
    VECTOR, SUMS, KEPT = made.regions[index if made.tier == "A" else 0], made.regions[2], made.regions[3 + index]
    ROW, VECTORS, BASE = product.row, made.vectors, 2 * made.products[0].row * index
    CHUNKS, REGISTERS, IN_SHARED = (n * product.tiles for n in (product.chunks, product.registers, product.kept))
    SLICES, GROUPS, WORDS, SUM_ROW, TENSOR = product.slices, product.groups, kind.words, product.sums, kind.rows > 1
    SLICE_SUMS, FOUR, narrow = made.rows * product.sums, 16 // kind.word, NARROW[made.dtype]
    load_weights, product_of, sums_of = _load_weights(product, THREADS), _product(made, product), _gather(made, product)

    @device
    def start(block, packed):
        begin = (block.rank * CHUNKS * THREADS + block.tid) * 4
        for c in range(IN_SHARED):
            for i in range(4):
                to = KEPT + (c * THREADS + block.tid) * 4 + i
                block.words[to] = packed[begin + (REGISTERS + c) * THREADS * 4 + i]
        return load_weights(packed, begin)

    @device
    def bring(block, slot, b0):
        """Copy the vectors of a tile from where all blocks put them, unless they are here already."""
        if not CLUSTER:
            begin = BASE * block.B + (slot * block.B + block.first + b0) * ROW
            for i in range(block.tid * FOUR, min(TILE, block.sequences - b0) * ROW, THREADS * FOUR):
                copy16(block.words, VECTOR + i, block.exchange_words, begin + i)
            copy_wait()
        if SEVERAL or not CLUSTER:
            cuda.syncthreads()

    @device
    def multiply(block, weights, packed, slot, b0):
        bring(block, slot, b0)
        worker, lane = block.tid // LANES, block.tid % LANES
        part, group = worker // GROUPS, worker % GROUPS
        if part < SLICES:
            vector_at = VECTOR + ((slot * VECTORS + b0) * ROW if CLUSTER else 0) + part * WORDS
            sums_at = SUMS + part * SLICE_SUMS + group
            if TENSOR:
                vector_at += min(lane // 4, LAST) * ROW + lane % 4
                sums_at += 15 * group + 2 * (lane % 4) * SUM_ROW + lane // 4
            streamed_at = ((block.rank * CHUNKS + REGISTERS + IN_SHARED) * THREADS + block.tid) * 4
            product_of(
                weights, block.words, KEPT + block.tid * 4, packed, streamed_at, block.words, vector_at, block.numbers,
                sums_at,
            )  # fmt: skip
        cuda.syncthreads()

    @device
    def gather(block, begin):
        return sums_of(block.numbers, SUMS + block.row * SUM_ROW + block.u, begin)

    @device
    def send(block, slot, b0, k, value):
        narrowed, row = narrow(value), b0 + block.row
        if CLUSTER:
            at = (VECTOR + (slot * VECTORS + row) * ROW) * PER + k
            if BLOCKS == 1:
                block.stored[at] = narrowed
            else:
                for r in range(BLOCKS):
                    store_remote(block.stored, at, np.int32(r), narrowed)
        else:
            block.exchange[(BASE * block.B + (slot * block.B + block.first + row) * ROW) * PER + k] = narrowed

    return Parts(start, multiply, gather, send)


# Weights and numbers of lower precision -----------------------------------------------------------------------------


@cache
def pack_kernel(made: Plan, index: int):
    """Build the kernel that puts weights in the order in which threads read them, 0 where there are none."""
    product, kind, PER = made.products[index], ARITHMETIC[made.dtype], kind_of(made.dtype).per_word
    narrow, zero = NARROW[made.dtype], kind_of(made.dtype).number(0)
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
def narrow_kernel(dtype: str):
    """Build the kernel that rounds an array to 16 bits."""
    narrow = NARROW[dtype]

    def narrow_all(source, target):
        for i in range(cuda.grid(1), target.size, cuda.gridsize(1)):
            target[i] = narrow(source[i])

    return cuda.jit(narrow_all)
