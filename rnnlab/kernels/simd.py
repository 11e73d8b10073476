"""Vector registers of the host: their width, and moves of whole registers (the only LLVM IR of the project)."""

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["VECTOR_BYTES", "move_vector"]


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
