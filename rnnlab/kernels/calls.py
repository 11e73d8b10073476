"""Calls of one kernel by another and by other threads, without Python and its GIL; and counters that threads share."""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, typeof
from numba.core import cgutils, types
from numba.extending import intrinsic

from .compiling import cached
from .simd import address

__all__ = ["Bound", "bind", "borrow", "draw_ticket", "invoke", "job", "perform", "tickets_drawn"]


def _counter(builder, values):
    return builder.inttoptr(values[0], values[0].type.as_pointer())


@intrinsic
def draw_ticket(typing_context, counter):
    """Add 1 to the int64 at an address and return it, atomically; see `tickets_drawn`."""

    def generate(context, builder, signature, values):
        one = ir.Constant(values[0].type, 1)
        return builder.add(builder.atomic_rmw("add", _counter(builder, values), one, "acq_rel"), one)

    return types.int64(types.intp), generate


@intrinsic
def tickets_drawn(typing_context, counter):
    """Return the int64 at an address; what other threads wrote before they drew their tickets is visible from then."""

    def generate(context, builder, signature, values):
        return builder.load_atomic(_counter(builder, values), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def borrow(typing_context, values):
    """Return a tuple as it is, but with arrays whose references are not counted; something else must keep them alive.

    The count of an array stands in one place: threads that share it would wait for each other at every function call.
    """

    def uncounted(context, builder, kind, value):
        if isinstance(kind, types.Array | types.NumPyRandomGeneratorType):
            counted = cgutils.create_struct_proxy(kind)(context, builder, value)
            counted.meminfo = ir.Constant(counted.meminfo.type, None)
            return counted._getvalue()
        if isinstance(kind, types.Tuple | types.UniTuple):
            items = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
            return context.make_tuple(builder, kind, [uncounted(context, builder, *item) for item in items])
        return value

    def generate(context, builder, signature, arguments):
        return uncounted(context, builder, values, arguments[0])

    return values(values), generate


def _thunk(context, builder, name, frame, kinds, take):
    """Return the address of a new function of (where a value of type `frame` lies, rank).

    It calls a kernel that takes `kinds`; `take(builder, value, rank)` gives that and its arguments.
    """
    number = context.get_value_type(types.intp)
    code = ir.Function(
        builder.module, ir.FunctionType(ir.VoidType(), [number, number]), f"{builder.function.name}.{name}"
    )
    code.linkage = "internal"
    inner = ir.IRBuilder(code.append_basic_block())
    kernel, given = take(inner, inner.load(inner.inttoptr(code.args[0], frame.as_pointer())), code.args[1])
    context.call_conv.call_function(inner, kernel, types.none, kinds, given)
    inner.ret_void()
    return builder.ptrtoint(code, number)


@intrinsic
def job(typing_context, arguments):
    """Return (code, frame): with them any thread can `invoke` the calling function while it runs.

    `arguments` are those of the calling function but for the last, a rank. It must not raise: it has no caller there.
    """

    def generate(context, builder, signature, values):
        def take(inner, value, rank):
            return builder.function, [*cgutils.unpack_tuple(inner, value), rank]

        frame, kinds = cgutils.alloca_once_value(builder, values[0]), [*arguments.types, types.intp]
        code = _thunk(context, builder, "job", values[0].type, kinds, take)
        return cgutils.pack_array(builder, [code, builder.ptrtoint(frame, code.type)])

    return types.UniTuple(types.intp, 2)(arguments), generate


@intrinsic
def invoke(typing_context, code, frame, rank):
    """Do a `job`, or with any rank what was put into a frame."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values[1:]])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def _size(typing_context, arguments):
    """Return the bytes that `_put` writes."""

    def generate(context, builder, signature, values):
        pair = ir.LiteralStructType([context.get_value_type(types.intp), values[0].type])
        return ir.Constant(pair.elements[0], context.get_abi_sizeof(pair))

    return types.intp(arguments), generate


@intrinsic
def _put(typing_context, frame, entry, arguments):
    """Write a call of the kernel at `entry` to the address `frame`, and return the code with which to `invoke` it."""

    def generate(context, builder, signature, values):
        kinds = list(arguments.types)
        kernel = context.call_conv.get_function_type(types.none, kinds).as_pointer()

        def take(inner, pair, rank):
            entry, given = cgutils.unpack_tuple(inner, pair)
            return inner.inttoptr(entry, kernel), cgutils.unpack_tuple(inner, given)

        pair = cgutils.pack_struct(builder, values[1:])
        builder.store(pair, builder.inttoptr(values[0], pair.type.as_pointer()))
        return _thunk(context, builder, "call", pair.type, kinds, take)

    return types.intp(types.intp, types.intp, arguments), generate


@cached("freeze")
def _freeze(entry, arguments):
    arguments = borrow(arguments)
    frame = np.empty(_size(arguments) // 8 + 1, np.int64)
    return frame, _put(address(frame, 0), entry, arguments)


class Bound(NamedTuple):
    """A compiled function with its arguments: (code, frame) for `invoke`, both 0 where there is none.

    `kept` is what must stay alive while it is called.
    """

    code: int = 0
    frame: int = 0
    kept: Any = None

    @property
    def call(self) -> tuple[int, int]:
        """What `perform` takes."""
        return self.code, self.frame


def bind(kernel: Any, *arguments: Any) -> Bound:
    """Return a compiled function with its arguments, unpacked once for many calls.

    It must return nothing, and not raise, which would go unseen.
    """
    signature = tuple(typeof(argument) for argument in arguments)
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    entry = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    frame, code = _freeze(entry, arguments)
    return Bound(code, frame.ctypes.data, (kernel, arguments, frame))


@njit
def perform(call):
    """Do the call of a `Bound`, if there is one."""
    if call[0] != 0:
        invoke(call[0], call[1], 0)
