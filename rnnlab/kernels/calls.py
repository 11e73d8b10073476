"""Calls of one kernel by another and by other threads, without Python and its GIL; and counters that threads share."""

from typing import Any

from llvmlite import ir
from numba import typeof
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["borrow", "call", "draw_ticket", "entry", "invoke", "job", "tickets_drawn"]


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
        if isinstance(kind, types.Array):
            array = context.make_array(kind)(context, builder, value)
            array.meminfo = ir.Constant(array.meminfo.type, None)
            return array._getvalue()
        if isinstance(kind, types.Tuple | types.UniTuple):
            items = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
            return context.make_tuple(builder, kind, [uncounted(context, builder, *item) for item in items])
        return value

    def generate(context, builder, signature, arguments):
        return uncounted(context, builder, values, arguments[0])

    return values(values), generate


@intrinsic
def job(typing_context, arguments):
    """Return (code, frame): with them any thread can `invoke` the calling function while it runs.

    `arguments` are those of the calling function but for the last, a rank. It must not raise: it has no caller there.
    """

    def generate(context, builder, signature, values):
        frame, number = cgutils.alloca_once_value(builder, values[0]), context.get_value_type(types.intp)
        kind = ir.FunctionType(ir.VoidType(), [number, number])
        code = ir.Function(builder.module, kind, f"{builder.function.name}.job")
        code.linkage = "internal"
        inner = ir.IRBuilder(code.append_basic_block())
        given = cgutils.unpack_tuple(inner, inner.load(inner.inttoptr(code.args[0], frame.type)))
        kinds = [*arguments.types, types.intp]
        context.call_conv.call_function(inner, builder.function, types.none, kinds, [*given, code.args[1]])
        inner.ret_void()
        return cgutils.pack_array(builder, [builder.ptrtoint(pointer, number) for pointer in (code, frame)])

    return types.UniTuple(types.intp, 2)(arguments), generate


@intrinsic
def invoke(typing_context, code, frame, rank):
    """Do a `job`."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values[1:]])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def call(typing_context, code, arguments):
    """Call the kernel whose `entry` is `code` with the items of `arguments`, of the types that `entry` was given.

    It must not raise, which would go unseen, and must be kept alive.
    """

    def generate(context, builder, signature, values):
        kinds = list(arguments.types)
        pointer = context.call_conv.get_function_type(types.none, kinds).as_pointer()
        function = builder.inttoptr(values[0], pointer)
        context.call_conv.call_function(builder, function, types.none, kinds, cgutils.unpack_tuple(builder, values[1]))
        return context.get_dummy_value()

    return types.void(types.intp, arguments), generate


def entry(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """Return where the machine code of a compiled function begins that takes these arguments, see `call`."""
    signature = tuple(typeof(argument) for argument in arguments)
    kernel.compile(signature)
    compiled = kernel.overloads[signature]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
