"""Vector registers of the host: their width, moves and multiply-adds (the only LLVM IR of the project)."""

from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["CHAINS", "VECTOR_BYTES", "move_vector", "run_chains"]


def _vector_bytes() -> int:
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


#: Bytes in one vector register of this CPU: 64 (AVX-512), 32 (AVX2) or 16 (NEON, SSE).
VECTOR_BYTES = _vector_bytes()


@intrinsic
def move_vector(typing_context, target, to, source, start):
    """Copy one register: target[to : to + V] = source[start : start + V], for contiguous arrays of one float type.

    Unlike a loop it needs no proof that the arrays are apart. There is no bounds check.
    """
    if not (target.dtype == source.dtype and "C" == target.layout == source.layout):
        return None

    def generate(context, builder, signature, arguments):
        element = context.get_data_type(target.dtype)
        bytes_each = context.get_abi_sizeof(element)
        vector = ir.VectorType(element, VECTOR_BYTES // bytes_each).as_pointer()

        def register(array_type, array, index):
            data = context.make_array(array_type)(context, builder, array).data
            return builder.bitcast(builder.gep(data, [index]), vector)

        value = builder.load(register(source, arguments[2], arguments[3]), align=bytes_each)
        builder.store(value, register(target, arguments[0], arguments[1]), align=bytes_each)
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp), generate


#: Independent multiply-add chains of `run_chains`: enough to fill two pipelines of four or five cycles' latency.
CHAINS = 12


@intrinsic
def _fma_chains(typing_context, x, count):

    def generate(context, builder, signature, arguments):
        element = context.get_data_type(x)
        lanes = VECTOR_BYTES // context.get_abi_sizeof(element)
        vector = ir.VectorType(element, lanes)
        name = f"llvm.fma.v{lanes}f{8 * context.get_abi_sizeof(element)}"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        start = ir.Constant(vector, ir.Undefined)
        for lane in range(lanes):
            start = builder.insert_element(start, arguments[0], ir.Constant(ir.IntType(32), lane))
        before, body, after = builder.block, builder.append_basic_block("fma"), builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(arguments[1].type)
        index.add_incoming(ir.Constant(index.type, 0), before)
        chains = [builder.phi(vector) for _ in range(CHAINS)]
        for chain in chains:
            chain.add_incoming(start, before)
            chain.add_incoming(builder.call(fma, [chain, start, start]), body)
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
