"""`python -m benchmarks.registers FILE`: registers and memory of the GPU kernels of some shapes, without a GPU.

Each kernel, forward with all that BPTT needs and BPTT, is compiled to PTX and assembled for the chip that its plan is
for; what the plan and the assembler say becomes a row.
"""

import re
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import pandas as pd
from numba import types
from numba.np.numpy_support import from_dtype

from rnnlab import compare
from rnnlab.cells import CELLS
from rnnlab.kernels.plan import ARITHMETIC, H200, Plan, plan

__all__ = ["assembled", "compiled", "kernel_of", "resources"]


def kernel_of(made: Plan, scaled: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """Return the kernel of a plan, forward with all that BPTT needs, and the types of its arguments."""
    from rnnlab.kernels.cuda_backward import backward_kernel
    from rnnlab.kernels.cuda_block import kind_of
    from rnnlab.kernels.cuda_forward import forward_kernel

    number, word, sent = (types.Array(from_dtype(np.dtype(one)), 1, "C") for one in kind_of(made.dtype)[:3])
    whole, small, size = types.Array(types.int64, 1, "C"), types.Array(types.int32, 1, "C"), types.int64
    tail, cell = (sent, word, small), CELLS[made.cell]
    if made.backward:
        kernel = backward_kernel(cell, made, scaled)
        return kernel, (size, size, number, whole, number, word, word, whole, *[number] * 5, whole, *tail)
    kernel = forward_kernel(cell, made, True)
    return kernel, (size, size, *[number] * 4, word, word, whole, *[number] * 3, *tail)


def compiled(kernel: Any, threads: int, capability: tuple[int, int], arguments: Sequence[Any]) -> str:
    """Return the PTX of a kernel, which needs no driver once the device is known."""
    from numba import cuda
    from numba.cuda import dispatcher

    device = SimpleNamespace(compute_capability=capability)
    with patch.object(dispatcher, "get_current_device", lambda: device):
        signature = types.void(*arguments)
        ptx: str = cuda.compile_ptx(kernel.py_func, signature, cc=capability, launch_bounds=(threads, 1))[0]
    return ptx


def assembled(ptx: str, capability: tuple[int, int]) -> str:
    """Return the report of ptxas, which is inside nvJitLink, on the machine code that it makes of PTX."""
    from cuda.bindings import nvjitlink

    handle = nvjitlink.create(2, [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose"])
    try:
        code = ptx.encode()
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(handle)
        log = bytearray(nvjitlink.get_info_log_size(handle))
        nvjitlink.get_info_log(handle, log)
    finally:
        nvjitlink.destroy(handle)
    return log.decode()


def resources(made: Plan) -> dict[str, Any]:
    """Return what the kernel of a plan takes of a multiprocessor: registers a thread, bytes of memory."""
    kernel, arguments = kernel_of(made)
    report = assembled(compiled(kernel, made.threads, H200.capability, arguments), H200.capability)

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise ValueError(f"the assembler's report must say '{pattern}', got {report!r}")
        return int(found[1])

    return {
        "cell": made.cell,
        "batch": made.batch,
        "hidden_size": made.hidden,
        "dtype": made.dtype,
        "direction": "backward" if made.backward else "forward",
        "tier": made.tier,
        "blocks": made.teams * made.blocks,
        "threads": made.threads,
        "registers": number(r"Used (\d+) registers"),
        "shared_bytes": made.shared,
        "local_bytes": number(r"(\d+) bytes stack frame"),
        "spilled_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "estimated_cycles": made.cycles,
    }


def _plans(names: Sequence[str], cells: Sequence[str], dtypes: Sequence[str]) -> Iterator[Plan]:
    """Yield the plans of shapes, in both directions; those that differ in T, I or which set they are from are one."""
    sizes = dict.fromkeys((shape.cell, shape.batch, shape.hidden_size) for shape in compare.shapes(names, cells))
    for cell, batch, hidden in sizes:
        for dtype in dtypes:
            for backward in (False, True):
                yield plan(cell, dtype, batch, hidden, backward)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--shapes", multiple=True, default=["reference"], show_default=True, help="Set or T,B,I,H; repeatable.")
@click.option("--cells", default="rnn_tanh,lstm,gru", show_default=True)
@click.option("--dtypes", default="float32,tf32,bf16,fp16", show_default=True, help=f"Of {', '.join(ARITHMETIC)}.")
@click.option("--jobs", default=1, show_default=True, help="Processes.")
def main(file: Path, shapes: tuple[str, ...], cells: str, dtypes: str, jobs: int) -> None:
    """Write a row a kernel to FILE, and say which have spilled or use local memory: exit code 1 if any."""
    plans = list(_plans(shapes, cells.split(","), dtypes.split(",")))
    with get_context("spawn").Pool(jobs) as pool:
        frame = pd.DataFrame(list(pool.imap(resources, plans)))
    frame.to_csv(file, index=False)
    bad = frame[(frame.local_bytes > 0) | (frame.spilled_bytes > 0)]
    click.echo(bad.to_string(index=False) if len(bad) else f"{len(frame)} kernels, none with local memory or spills")
    raise SystemExit(int(len(bad) > 0))


if __name__ == "__main__":
    main()
