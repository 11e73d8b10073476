"""Vector registers of the host: width, moves, multiply-adds. Other LLVM IR: `calls.py`, `subnormals.py`, and `ptx.py`.

A register tile of 6 rows × 4 vectors reaches 95 % of the FMA peak of `timing.peak_flops` from 50 multiply-adds deep; on
CPUs with 16 vector registers (AVX2) in two passes over two vectors each, 90 to 95 %.
"""

import platform
from functools import cache, partial, reduce

from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

__all__ = ["CHAINS", "CPU", "REGISTERS", "VECTOR_BYTES", "address", "columns_at_once", "move", "prefetch", "run_chains"]
__all__ += ["as_vector_code", "tile"]

#: LLVM's name of this CPU.
CPU = binding.get_host_cpu_name()
_features = binding.get_host_cpu_features()

#: Bytes in one vector register of this CPU: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
VECTOR_BYTES = 64 if _features.get("avx512f") else 32 if _features.get("avx2") else 16

#: Vector registers: 32 with AVX-512 and NEON, else 16.
REGISTERS = 32 if _features.get("avx512f") or platform.machine() in ("aarch64", "arm64") else 16


class _Vectors:
    """Vectors of one element type in the function that is being generated."""

    def __init__(self, context, builder, dtype):
        self.context, self.builder = context, builder
        self.element = context.get_data_type(dtype)
        size = context.get_abi_sizeof(self.element)
        self.size, self.lanes = ir.Constant(ir.IntType(32), size), VECTOR_BYTES // size
        self.type = ir.VectorType(self.element, self.lanes)
        self.suffix, self.zero = f"v{self.lanes}f{8 * size}", ir.Constant(self.type, None)

    def address(self, array_type, array, offset):
        """Return a pointer to the element of a flat array."""
        return self.builder.gep(self.context.make_array(array_type)(self.context, self.builder, array).data, [offset])

    def load(self, pointer):
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=self.size.constant)

    def store(self, value, pointer):
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.size.constant)

    def broadcast(self, value):
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def call(self, name, result, *arguments):
        """Call an intrinsic of LLVM."""
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)

    def fma(self, a, b, c):
        return self.call(f"llvm.fma.{self.suffix}", self.type, a, b, c)

    def prefetch(self, pointer):
        read, soon, data = (ir.Constant(ir.IntType(32), i) for i in (0, 3, 1))
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, read, soon, data)

    def move_part(self, target, source, count):
        """Copy the first `count` lanes, and neither read nor write what lies behind them."""
        lanes = ir.VectorType(count.type, self.lanes)
        numbers = ir.Constant(lanes, [ir.Constant(count.type, i) for i in range(self.lanes)])
        mask = self.builder.icmp_signed("<", numbers, self.broadcast(count))
        value = self.call(f"llvm.masked.load.{self.suffix}.p0", self.type, source, self.size, mask, self.zero)
        self.call(f"llvm.masked.store.{self.suffix}.p0", ir.VoidType(), value, target, self.size, mask)

    def loop(self, count, start, body):
        """Return the vectors that count ≥ 1 rounds of body(k, vectors) → vectors make of `start`."""
        builder = self.builder
        before, inside, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(inside)
        builder.position_at_end(inside)
        k, vectors = builder.phi(count.type), [builder.phi(self.type) for _ in start]
        new = body(k, vectors)
        following = builder.add(k, ir.Constant(count.type, 1))
        begun, ended = [ir.Constant(count.type, 0), *start], [following, *new]
        for phi, first, value in zip([k, *vectors], begun, ended, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(value, inside)
        again = builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        if REGISTERS == 32:  # unrolled, loads skip lines, which is not foreseen; with fewer sums counting costs more
            once = builder.module.add_metadata([builder.module.add_metadata(["llvm.loop.unroll.disable"])])
            once.operands = once, *once.operands  # LLVM wants a node that holds itself
            again.set_metadata("llvm.loop", once)
        builder.position_at_end(after)
        return new


# Memory -------------------------------------------------------------------------------------------------------------


@intrinsic
def move(typing_context, target, to, source, start, count):
    """Copy target[to : to + n] = source[start : start + n], n the least of `count` and V, of flat float arrays.

    Unlike a loop it needs no proof that the arrays are apart. There is no bounds check.
    """

    def generate(context, builder, signature, arguments):
        vectors = _Vectors(context, builder, target.dtype)
        there, here = vectors.address(target, *arguments[:2]), vectors.address(source, *arguments[2:4])
        whole = builder.icmp_signed(">=", arguments[4], ir.Constant(arguments[4].type, vectors.lanes))
        with builder.if_else(whole, likely=True) as (all_of_it, a_part):
            with all_of_it:
                vectors.store(vectors.load(here), there)
            with a_part:
                vectors.move_part(there, here, arguments[4])
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Have the cache line of array[index] brought near."""

    def generate(context, builder, signature, arguments):
        vectors = _Vectors(context, builder, array.dtype)
        vectors.prefetch(vectors.address(array, *arguments))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def address(typing_context, array, index):
    """Return where array[index] of a flat array lies in memory."""

    def generate(context, builder, signature, arguments):
        pointer = _Vectors(context, builder, array.dtype).address(array, *arguments)
        return builder.ptrtoint(pointer, arguments[1].type)

    return types.intp(array, types.intp), generate


@intrinsic
def as_vector_code(typing_context):
    """Have LLVM fill whole registers in the loops of the calling function, whose arrays lie apart where it writes."""

    def generate(context, builder, signature, arguments):
        # For some CPUs LLVM prefers halves; llvmlite knows no attributes with values.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{8 * VECTOR_BYTES}"')
        for argument in (a for a in builder.function.args if isinstance(a.type, ir.PointerType)):
            argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), generate


# Multiply-adds ------------------------------------------------------------------------------------------------------


def columns_at_once(rows: int, columns: int) -> int:
    """Return how many of a tile's columns of vectors to sum up at once, so that registers hold sums and factors."""
    passes = 1
    while rows > 1 and passes < columns and (rows + 1) * -(-columns // passes) + 1 >= REGISTERS:
        passes += 1
    return -(-columns // passes)


@cache
def tile(rows, units, group, dtype):
    """Build the product of a tile that stays in registers: `rows` × C vectors of V numbers, C = units·group.

    tile(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, count): for r < rows, u < units, g < group and
    v < V, with m = (u·group + g)·V + v,

        out[r·o_row + u·o_unit + g·o_gate + v] = start[r·s_row + m] + Σ_k a[r·a_row + k·a_k] · b[k·C·V + m],  k < count

    where out, start, a and b are addresses of numbers of `dtype`, count ≥ 1. No bounds are checked. Each number
    sums its k in order, whatever the tile: results do not depend on how rows and columns are cut into tiles.
    """
    columns, most = units * group, columns_at_once(rows, units * group)

    @intrinsic
    def product(typing_context, out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, count):
        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, from_dtype(dtype))
            out_, start_, a_, b_ = (builder.inttoptr(arguments[i], vectors.element.as_pointer()) for i in (0, 4, 6, 9))
            o_row_, o_unit_, o_gate_, s_row_, a_row_, a_k_, count_ = (arguments[i] for i in (1, 2, 3, 5, 7, 8, 10))
            constant = partial(ir.Constant, count_.type)

            def offset(pointer, *steps):
                for step, n in steps:
                    pointer = builder.gep(pointer, [builder.mul(step, constant(n) if isinstance(n, int) else n)])
                return pointer

            def begin(r, c):
                return offset(start_, (s_row_, r), (constant(vectors.lanes), c))

            def sum_up(these):
                cells = [(r, c) for r in range(rows) for c in these]

                def multiply_add(k, sums):
                    row = builder.gep(b_, [builder.mul(k, constant(columns * vectors.lanes))])
                    right = {c: vectors.load(offset(row, (constant(vectors.lanes), c))) for c in these}
                    if REGISTERS == 32 and group == 1 and rows > 1:  # sums may lie far, and not all at once are brought
                        c = builder.and_(builder.lshr(k, constant(3)), constant(columns - 1))
                        vectors.prefetch(begin(builder.and_(k, constant(7)), c))
                    step = builder.mul(k, a_k_)
                    factors = [vectors.broadcast(builder.load(builder.gep(pointer, [step]))) for pointer in left]
                    return [vectors.fma(factors[r], right[c], total) for (r, c), total in zip(cells, sums, strict=True)]

                for cell in cells if REGISTERS < 32 else ():
                    vectors.prefetch(begin(*cell))
                sums = vectors.loop(count_, [vectors.zero] * len(cells), multiply_add)
                for total, (r, c) in zip(sums, cells, strict=True):
                    value = builder.fadd(vectors.load(begin(r, c)), total)
                    vectors.store(value, offset(out_, (o_row_, r), (o_unit_, c // group), (o_gate_, c % group)))

            left = [offset(a_, (a_row_, r)) for r in range(rows)]
            for first in range(0, columns, most):
                sum_up(range(first, min(columns, first + most)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 11), generate

    return product


#: Independent multiply-add chains of `run_chains`: enough to fill two pipelines of four or five cycles' latency.
CHAINS = 12


@intrinsic
def _fma_chains(typing_context, x, count):
    def generate(context, builder, signature, arguments):
        vectors = _Vectors(context, builder, x)
        start = vectors.broadcast(arguments[0])
        chains = vectors.loop(arguments[1], [start] * CHAINS, lambda k, c: [vectors.fma(v, start, start) for v in c])
        return builder.extract_element(reduce(builder.fadd, chains), ir.Constant(ir.IntType(32), 0))

    return x(x, count), generate


@njit(nogil=True)
def run_chains(x, count):
    """Return a number that took CHAINS·V·count fused multiply-adds in registers: the measure of a core's peak."""
    return _fma_chains(x, count)
