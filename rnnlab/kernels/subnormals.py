"""Numbers below the smallest normal one, which Intel's cores compute with by microcode.

An adjoint that vanishes passes through them, and one operation takes a hundred cycles where it took a half: a pass over
100 steps took up to twenty times as long. XLA counts them as 0, and so does BPTT here on x86, but for the adjoint that
is rescaled, which keeps them as far as they are in its range.
"""

from functools import cache

import numpy as np
from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from .simd import address

__all__ = ["flush_subnormals", "keep_subnormals"]

#: Bits of x86's control register MXCSR: subnormal results become 0, and subnormal operands count as 0.
_FLUSH = 0x8040


@cache
def _control(name):
    """Build the move of this thread's MXCSR to ("st") or from ("ld") an address; it does nothing on other CPUs."""

    @intrinsic
    def move_control(typing_context, place):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [pointer.type])
            if binding.get_host_cpu_features().get("sse"):
                full = f"llvm.x86.sse.{name}mxcsr"
                builder.call(cgutils.get_or_insert_function(builder.module, kind, full), [pointer])
            return context.get_dummy_value()

        return types.void(types.intp), generate

    return move_control


_store_control, _load_control = _control("st"), _control("ld")


@njit
def flush_subnormals():
    """Have subnormal numbers count as 0 in this thread, until `keep_subnormals` of what this returns."""
    words = np.zeros(2, np.uint32)
    _store_control(address(words, 0))
    words[1] = words[0] | np.uint32(_FLUSH)
    _load_control(address(words, 1))
    return words


@njit
def keep_subnormals(words):
    """Put this thread's control register back to what it was before `flush_subnormals`."""
    _load_control(address(words, 0))
