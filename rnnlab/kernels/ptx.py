"""The PTX instructions that kernels need and Numba has no name for, each with its section of the PTX ISA (version 9.0).

A function below is one instruction; its Python body says what that means, and is what runs in Numba's simulator.
There a thread of `threading` is a thread of the GPU, and offers what the bodies ask `current_thread()` for. An array
and the index behind it are one address.
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, cuda, types

__all__ = ["MMA", "NARROW", "SIMULATED", "cluster_barrier", "copy16", "copy_wait", "device", "grid_barrier", "load4"]
__all__ += ["store_remote"]

#: Whether kernels run as Python, see NUMBA_ENABLE_CUDASIM.
SIMULATED = bool(config.ENABLE_CUDASIM)

#: The decorator of functions that kernels call: inlined, so that tuples and arrays stay in registers.
device: Callable[[Any], Any] = (lambda function: function) if SIMULATED else cuda.jit(device=True, forceinline=True)

_FOUR_FLOATS, _LETTERS = types.UniTuple(types.float32, 4), {16: "h", 32: "r", 64: "l"}


def _instruction(result, emit):
    """Return the decorator that makes an instruction of its meaning: `emit(builder, values)`, arrays as pointers."""

    def decorate(meaning):
        if SIMULATED:
            return meaning
        from numba.cuda.extending import intrinsic

        def typed(*kinds):
            returned = result if isinstance(result, types.Type) else result(*kinds)

            def generate(context, builder, signature, values):
                operands, given = [], iter(zip(signature.args, values, strict=True))
                for kind, value in given:
                    if isinstance(kind, types.Array):
                        at_kind, at = next(given)
                        at = context.cast(builder, at, at_kind, types.intp)
                        value = builder.gep(context.make_array(kind)(context, builder, value).data, [at])
                    operands.append(value)
                made = emit(builder, operands)
                if not isinstance(returned, types.UniTuple):
                    return context.get_dummy_value() if returned is types.void else made
                return context.make_tuple(builder, returned, [builder.extract_value(made, i) for i in range(4)])

            return returned(*kinds), generate

        names = ", ".join(inspect.signature(meaning).parameters)
        function = eval(f"lambda typing_context, {names}: typed({names})", {"typed": typed})
        function.__name__ = meaning.__name__
        return intrinsic(function)

    return decorate


def _asm(text, constraints, result=None, count=1):
    """Return the emission of inline PTX: its text, LLVM's constraints, the type of its `count` results.

    BITS and R in the text and in constraints become the size and the register of the last operand.
    """

    def emit(builder, values):
        last = values[-1].type if values else ir.VoidType()
        bits = {"half": 16, "float": 32, "double": 64}.get(str(last), getattr(last, "width", 0))
        letter = {"float": "f", "double": "d"}.get(str(last), _LETTERS.get(bits, ""))
        single = ir.VoidType() if result is None else result
        kind = ir.FunctionType(
            ir.LiteralStructType([single] * count) if count > 1 else single, [v.type for v in values]
        )
        asm = ir.InlineAsm(kind, text.replace("BITS", str(bits)), constraints.replace("R", letter), side_effect=True)
        return builder.call(asm, values, attrs=("convergent", "nounwind"))

    return emit


# Memory -------------------------------------------------------------------------------------------------------------


def _vector(builder, values):
    """A load of four numbers at an aligned address; NVVM finds out which memory it is in (9.7.9.8, ld)."""
    kind = ir.VectorType(values[0].type.pointee, 4)
    loaded = builder.load(builder.bitcast(values[0], kind.as_pointer()), align=16)
    made = ir.Constant(ir.ArrayType(kind.element, 4), ir.Undefined)
    for i in range(4):
        made = builder.insert_value(made, builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)), i)
    return made


@_instruction(lambda array, index: types.UniTuple(array.dtype, 4), _vector)
def load4(array, index):
    """Return four numbers from an address that is a multiple of 16 bytes."""
    return array[index], array[index + 1], array[index + 2], array[index + 3]


_SHARED = "{.reg .u64 p; .reg .u32 q; cvta.to.shared.u64 p, $0; cvt.u32.u64 q, p; "


@_instruction(types.void, _asm(_SHARED + "cp.async.cg.shared.global [q], [$1], 16;}", "l,l,~{memory}"))
def copy16(to, at, source, begin):
    """Begin to copy 16 bytes from global memory, through L2 alone, to shared memory (9.7.9.25.3.1, cp.async)."""
    count = 16 // to.itemsize
    to[at : at + count] = source[begin : begin + count]


@_instruction(types.void, _asm("cp.async.wait_all;", "~{memory}"))
def copy_wait():
    """Wait until what this thread has begun to copy has arrived (9.7.9.25.3.3)."""


_REMOTE = _SHARED + "mapa.shared::cluster.u32 q, q, $1; st.shared::cluster.bBITS [q], $2;}"


@_instruction(types.void, _asm(_REMOTE, "l,r,R,~{memory}"))
def store_remote(array, index, rank, value):
    """Store into the shared memory of block `rank` (int32) of the cluster (9.7.9.23 mapa, 9.7.9.11 st)."""
    threading.current_thread().shared_of(rank, array)[index] = value


# Barriers -----------------------------------------------------------------------------------------------------------


@_instruction(types.void, _asm("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", "~{memory}"))
def cluster_barrier():
    """Wait for all threads of the cluster and see what they wrote (9.7.13.4)."""
    threading.current_thread().cluster_barrier()


@_instruction(types.void, _asm("red.release.gpu.global.add.s32 [$0], $1;", "l,r,~{memory}"))
def _add_release(array, index, value):
    """Add an int32, after all that this thread has seen and written (9.7.13.7, red)."""
    cuda.atomic.add(array, index, value)


@_instruction(types.int32, _asm("ld.acquire.gpu.global.s32 $0, [$1];", "=r,l,~{memory}", ir.IntType(32)))
def _load_acquire(array, index):
    """Load an int32, before all that this thread will see (9.7.9.8, ld)."""
    threading.current_thread().check()
    return array[index]


@device
def grid_barrier(arrived, team, count):
    """Wait until `count` blocks have come here since the launch, one add each, and see what they wrote."""
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        _add_release(arrived, team, np.int32(1))
        while _load_acquire(arrived, team) < count:
            pass
    cuda.syncthreads()


# Numbers ------------------------------------------------------------------------------------------------------------


@_instruction(types.int32, _asm("cvt.rna.tf32.f32 $0, $1;", "=r,f", ir.IntType(32)))
def _to_tf32(value):
    """Round to 10 bits of mantissa, ties away from zero (9.7.9.21, cvt)."""
    return (np.float32(value).view(np.int32) + np.int32(0x1000)) & np.int32(-0x2000)


@_instruction(types.int16, _asm("cvt.rn.bf16.f32 $0, $1;", "=h,f", ir.IntType(16)))
def _to_bf16(value):
    """Round to 7 bits of mantissa, ties to even (9.7.9.21, cvt)."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF).view(np.int16)


@_instruction(types.int16, _asm("cvt.rn.f16.f32 $0, $1;", "=h,f", ir.IntType(16)))
def _to_fp16(value):
    """Round to half precision (9.7.9.21, cvt)."""
    return np.float16(value).view(np.int16)


@device
def _as_it_is(value):
    return value


#: The number as the product takes it, by dtype.
NARROW = {"float32": _as_it_is, "float64": _as_it_is, "tf32": _to_tf32, "bf16": _to_bf16, "fp16": _to_fp16}


def _mma(shape, name):
    """Build D = A·B + C of a warp, A of 16 rows, B of 8 columns, A and B `name`, C and D float32 (9.7.14.5, mma)."""
    text = f"mma.sync.aligned.{shape}.row.col.f32.{name}.{name}.f32 "
    text += "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"

    @_instruction(_FOUR_FLOATS, _asm(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", ir.FloatType(), 4))
    def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        return threading.current_thread().mma(name, (a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3))

    return mma


#: Products in tensor cores: with group = lane // 4 and place = lane % 4, words a0…a3 hold rows group and group + 8 at
#: word `place` of the depth, then at place + 4; b0 and b1 column group at these two; c0…c3 rows group and group + 8
#: (c2, c3) of columns 2·place and 2·place + 1.
MMA = {"tf32": _mma("m16n8k8", "tf32"), "bf16": _mma("m16n8k16", "bf16"), "fp16": _mma("m16n8k16", "f16")}
