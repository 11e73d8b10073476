"""Vector registers of the host: width, moves, multiply-adds; a barrier of threads (the only LLVM IR of the project).

A register tile of 6 rows × 4 vectors reaches 95 % of the FMA peak of `timing.peak_flops` from 64 multiply-adds deep.
"""

import sys
from functools import cache

from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

__all__ = ["CHAINS", "CPU", "VECTOR_BYTES", "address", "move", "prefetch", "run_chains", "tile", "wait_for_all"]


def _vector_bytes() -> int:
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


#: LLVM's name of this CPU.
CPU = binding.get_host_cpu_name()

#: Bytes in one vector register of this CPU: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
VECTOR_BYTES = _vector_bytes()


@intrinsic
def move(typing_context, target, to, source, start, count):
    """Copy target[to : to + n] = source[start : start + n], n the least of `count` and V, of flat float arrays.

    Unlike a loop it needs no proof that the arrays are apart. There is no bounds check.
    """

    def generate(context, builder, signature, arguments):
        target_, to_, source_, start_, count_ = arguments
        vectors = _Vectors(context, builder, target.dtype)
        source_, target_ = vectors.address(source, source_, start_), vectors.address(target, target_, to_)
        whole = builder.icmp_signed(">=", count_, ir.Constant(count_.type, vectors.lanes))
        with builder.if_else(whole, likely=True) as (one, other):
            with one:
                vectors.store(vectors.load(source_), target_)
            with other:
                mask = vectors.mask(count_)
                vectors.masked_store(vectors.masked_load(source_, mask), target_, mask)
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


class _Vectors:
    """Vectors of one element type in the function that is being generated."""

    def __init__(self, context, builder, dtype):
        self.context, self.builder = context, builder
        self.element = context.get_data_type(dtype)
        self.size = context.get_abi_sizeof(self.element)
        self.lanes = VECTOR_BYTES // self.size
        self.type = ir.VectorType(self.element, self.lanes)
        self._alignment = ir.Constant(ir.IntType(32), self.size)
        name = f"llvm.fma.v{self.lanes}f{8 * self.size}"
        function = ir.FunctionType(self.type, [self.type] * 3)
        self.fma = cgutils.get_or_insert_function(builder.module, function, name)

    def address(self, array_type, array, *offsets):
        """Return a pointer to the element of a flat array at the sum of the offsets."""
        pointer = self.context.make_array(array_type)(self.context, self.builder, array).data
        for offset in offsets:
            pointer = self.builder.gep(pointer, [offset])
        return pointer

    def load(self, pointer):
        return self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()), align=self.size)

    def store(self, value, pointer):
        self.builder.store(value, self.builder.bitcast(pointer, self.type.as_pointer()), align=self.size)

    def prefetch(self, pointer):
        read, soon, data = (ir.Constant(ir.IntType(32), i) for i in (0, 3, 1))
        kinds = [argument.type for argument in (pointer, read, soon, data)]
        function = ir.FunctionType(ir.VoidType(), kinds)
        prefetch = cgutils.get_or_insert_function(self.builder.module, function, "llvm.prefetch.p0")
        self.builder.call(prefetch, [pointer, read, soon, data])

    def mask(self, count):
        """Return which lanes come before `count`."""
        lanes = ir.Constant(
            ir.VectorType(count.type, self.lanes), [ir.Constant(count.type, i) for i in range(self.lanes)]
        )
        return self.builder.icmp_signed("<", lanes, self.broadcast(count))

    def masked_load(self, pointer, mask):
        return self._masked("load", self.type, [pointer, self._alignment, mask, ir.Constant(self.type, None)])

    def masked_store(self, value, pointer, mask):
        self._masked("store", ir.VoidType(), [value, pointer, self._alignment, mask])

    def _masked(self, operation, result, arguments):
        name = f"llvm.masked.{operation}.v{self.lanes}f{8 * self.size}.p0"
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, function, name), arguments)

    def broadcast(self, value):
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        )


@intrinsic
def address(typing_context, array, index):
    """Return where array[index] of a flat array lies in memory."""

    def generate(context, builder, signature, arguments):
        pointer = context.make_array(array)(context, builder, arguments[0]).data
        return builder.ptrtoint(builder.gep(pointer, [arguments[1]]), arguments[1].type)

    return types.intp(array, types.intp), generate


@cache
def tile(rows, units, group, dtype):
    """Build the product of a tile that stays in registers: `rows` × C vectors of V numbers, C = units·group.

    tile(out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, count): for r < rows, u < units, g < group and
    v < V, with m = (u·group + g)·V + v,

        out[r·o_row + u·o_unit + g·o_gate + v] = start[r·s_row + m] + Σ_k a[r·a_row + k·a_k] · b[k·C·V + m],  k < count

    where out, start, a and b are addresses of numbers of `dtype`. No bounds are checked. Each number sums its k in
    order, whatever the tile: results do not depend on how rows and columns are cut into tiles.
    """
    columns = units * group

    @intrinsic
    def product(typing_context, out, o_row, o_unit, o_gate, start, s_row, a, a_row, a_k, b, count):
        def generate(context, builder, signature, arguments):
            vectors = _Vectors(context, builder, from_dtype(dtype))
            integer = arguments[0].type
            pointers = [builder.inttoptr(arguments[i], vectors.element.as_pointer()) for i in (0, 4, 6, 9)]
            out_, start_, a_, right = pointers
            o_row_, o_unit_, o_gate_, s_row_, a_row_, a_k_, count_ = (arguments[i] for i in (1, 2, 3, 5, 7, 8, 10))
            width = columns * vectors.lanes

            def constant(number):
                return ir.Constant(integer, number)

            def offset(pointer, *steps):
                for step, number in steps:
                    pointer = builder.gep(pointer, [builder.mul(step, constant(number))])
                return pointer

            one = constant(vectors.lanes)
            cells = [(r, *divmod(c, group)) for r in range(rows) for c in range(columns)]
            for r, u, g in cells:
                vectors.prefetch(offset(start_, (s_row_, r), (one, u * group + g)))
            left = [offset(a_, (a_row_, r)) for r in range(rows)]
            before, body, after = builder.block, builder.append_basic_block("tile"), builder.append_basic_block("done")
            builder.branch(body)
            builder.position_at_end(body)
            k = builder.phi(integer)
            k.add_incoming(constant(0), before)
            sums = [builder.phi(vectors.type) for _ in cells]
            row_of_b = builder.gep(right, [builder.mul(k, constant(width))])
            b_vectors = [vectors.load(builder.gep(row_of_b, [constant(c * vectors.lanes)])) for c in range(columns)]
            step = builder.mul(k, a_k_)
            new = []
            for r in range(rows):
                factor = vectors.broadcast(builder.load(builder.gep(left[r], [step])))
                for c in range(columns):
                    new.append(builder.call(vectors.fma, [factor, b_vectors[c], sums[r * columns + c]]))
            following = builder.add(k, constant(1))
            k.add_incoming(following, body)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(ir.Constant(vectors.type, None), before)
                phi.add_incoming(value, body)
            builder.cbranch(builder.icmp_signed("<", following, count_), body, after)
            builder.position_at_end(after)
            for value, (r, u, g) in zip(new, cells, strict=True):
                place = offset(start_, (s_row_, r), (one, u * group + g))
                value = builder.fadd(vectors.load(place), value)
                vectors.store(value, offset(out_, (o_row_, r), (o_unit_, u), (o_gate_, g)))
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
        before, body, after = builder.block, builder.append_basic_block("fma"), builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(arguments[1].type)
        index.add_incoming(ir.Constant(index.type, 0), before)
        chains = [builder.phi(vectors.type) for _ in range(CHAINS)]
        for chain in chains:
            chain.add_incoming(start, before)
            chain.add_incoming(builder.call(vectors.fma, [chain, start, start]), body)
        next_index = builder.add(index, ir.Constant(index.type, 1))
        index.add_incoming(next_index, body)
        builder.cbranch(builder.icmp_signed("<", next_index, arguments[1]), body, after)
        builder.position_at_end(after)
        total = chains[0]
        for chain in chains[1:]:
            total = builder.fadd(total, chain)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return x(x, count), generate


@njit(nogil=True)
def run_chains(x, count):
    """Return a number that took CHAINS·V·count fused multiply-adds in registers: the measure of a core's peak."""
    return _fma_chains(x, count)


# A barrier of threads ------------------------------------------------------------------------------------------------


@intrinsic
def _draw_ticket(typing_context, counter):
    """counter[0] += 1, atomically; return the new number."""

    def generate(context, builder, signature, arguments):
        pointer = context.make_array(counter)(context, builder, arguments[0]).data
        one = ir.Constant(context.get_value_type(types.int64), 1)
        return builder.add(builder.atomic_rmw("add", pointer, one, "acq_rel"), one)

    return types.int64(counter), generate


@intrinsic
def _drawn(typing_context, counter):
    """Return counter[0], with all that other threads wrote before they drew."""

    def generate(context, builder, signature, arguments):
        pointer = context.make_array(counter)(context, builder, arguments[0]).data
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(counter), generate


_let_others_run = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

#: How often a thread looks before it lets another run on its core: some tens of microseconds.
_LOOKS = 20_000


@njit(nogil=True)
def wait_for_all(counter, parties):
    """Return once `parties` threads have called this with the same `counter` (one int64, 0 at first)."""
    ticket = _draw_ticket(counter)
    last = (ticket + parties - 1) // parties * parties
    looks = 0
    while _drawn(counter) < last:
        looks += 1
        if looks > _LOOKS:
            _let_others_run()
