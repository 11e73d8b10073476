"""What runs on the GPU besides the kernels themselves: the chip that it is, launches, and products by cuBLAS."""

import ctypes
import importlib
import importlib.util
from functools import cache
from typing import Any

import numpy as np
from numba import cuda, types
from numba.np.numpy_support import from_dtype

from . import Array
from .cuda_block import narrow_kernel
from .plan import ARITHMETIC, Chip, Plan
from .ptx import SIMULATED

__all__ = ["Launch", "Matrix", "chip", "elementwise", "limits", "multiply", "scan", "xp"]

#: CuPy; where there is none kernels can still be compiled, and that is all, see `kernels.backend`.
xp: Any = np if SIMULATED or importlib.util.find_spec("cupy") is None else importlib.import_module("cupy")


@cache
def chip() -> Chip:
    """Return what plans need to know of the current GPU."""
    found = xp.cuda.Device()
    major, minor = divmod(int(found.compute_capability), 10)
    processors, shared = (found.attributes[name] for name in ("MultiProcessorCount", "MaxSharedMemoryPerBlockOptin"))
    return Chip((major, minor), processors, shared, clusters=_clusters(shared) if major >= 9 else ())


def _clusters(shared: int) -> tuple[tuple[int, int], ...]:
    """Return how many clusters of blocks, each with so much shared memory, the driver runs at once, by their size."""
    from cuda.core import LEGACY_DEFAULT_STREAM, Device, LaunchConfig

    def nothing(values):
        values[0] = 0

    Device(xp.cuda.Device().id).set_current()
    kernel = _compiled(cuda.jit(nothing), (types.Array(types.float32, 1, "C"),), shared, True)
    configs = {n: LaunchConfig(grid=1, cluster=n, block=256, shmem_size=shared) for n in (2, 4, 8, 16)}
    count = kernel.occupancy.max_active_clusters
    return tuple((n, count(config, stream=LEGACY_DEFAULT_STREAM)) for n, config in configs.items())


def limits(dtype: str) -> tuple[float, float]:
    """Return the FLOP/s of this arithmetic and the bytes/s from memory for which the GPU is built."""
    found = xp.cuda.Device().attributes
    flops = 2e3 * ARITHMETIC[dtype].rate * chip().processors * found["ClockRate"]
    return flops, 2e3 * found["MemoryClockRate"] * found["GlobalMemoryBusWidth"] / 8


@cache
def _compiled(kernel: Any, signature: tuple[Any, ...], shared: int, cluster: bool) -> Any:
    """Return the loaded kernel for these types, with so much shared memory allowed."""
    from cuda.bindings import driver

    loaded = kernel.compile(signature)._codelibrary.get_cufunc().kernel
    attribute = driver.CUfunction_attribute
    wanted = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared}
    if cluster:
        wanted[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    for name, value in wanted.items():
        (status,) = driver.cuKernelSetAttribute(name, value, loaded.handle, xp.cuda.Device().id)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver refuses {name.name} = {value}: {status.name}")
    return loaded


class Launch:
    """A kernel with its arguments, prepared once; calling it puts it on CuPy's current stream.

    Kernels see arrays as flat ones, whatever their shape. Blocks of a grid that wait for each other are launched
    together or not at all.
    """

    def __init__(
        self, kernel: Any, arguments: tuple[Any, ...], blocks: int, threads: int, *, shared: int = 0, cluster: int = 1,
        together: bool = False,
    ) -> None:  # fmt: skip
        from cuda.core import Device, LaunchConfig

        Device(xp.cuda.Device().id).set_current()
        self._kept = arguments
        kinds = (types.int64 if isinstance(a, int) else types.Array(from_dtype(a.dtype), 1, "C") for a in arguments)
        self._kernel = _compiled(kernel, tuple(kinds), shared, cluster > 1)
        options: dict[str, Any] = {"cluster": cluster} if cluster > 1 else {"is_cooperative": together}
        self._config = LaunchConfig(grid=blocks // cluster, block=threads, shmem_size=shared, **options)
        # As Numba passes an array: two empty references, size, bytes of an item, address, shape, strides.
        self._arguments: list[int] = []
        for a in arguments:
            flat = (a,) if isinstance(a, int) else (0, 0, a.size, a.itemsize, a.data.ptr, a.size, a.itemsize)
            self._arguments += flat

    def __call__(self) -> None:
        from cuda.core import launch

        launch(_stream(xp.cuda.get_current_stream().ptr), self._config, self._kernel, *self._arguments)


@cache
def _stream(pointer: int) -> Any:
    """Return a stream of CuPy's as one of cuda-core's, which asks for its device once: not while it is captured."""
    from cuda.core import Stream

    return Stream.from_handle(pointer or 1)  # the driver's name for the legacy default stream, which CuPy calls 0


def elementwise(kernel: Any, *arrays: Array) -> Launch:
    """Return the launch of a kernel with a thread for each number of the last array, or for several."""
    return Launch(kernel, arrays, min(1024, -(-arrays[-1].size // 256)), 256)


def scan(kernel: Any, made: Plan, arguments: Any) -> Launch:
    """Return the launch of a sequence kernel with its `ForwardArguments` or `BackwardArguments`."""
    cluster = made.blocks if made.tier == "A" else 1
    if made.tier != "A" and 2 * (arguments.T + 1) * made.blocks >= 2**31:  # two barriers a step, counted in 32 bits
        raise ValueError(f"x must have fewer than {2**30 // made.blocks - 1} steps, got {arguments.T}")
    blocks, together = made.teams * made.blocks, made.tier != "A"
    return Launch(kernel, arguments, blocks, made.threads, shared=made.shared, cluster=cluster, together=together)


#: cuBLAS's names (cudaDataType_t and cublasComputeType_t) of the types that are multiplied, and of how.
_CUBLAS = {"float32": (0, 68), "float64": (1, 70), "tf32": (0, 77), "bf16": (14, 68), "fp16": (2, 68)}


@cache
def _cublas() -> Any:
    """Return the cuBLAS that CuPy has loaded; CuPy's own calls of it refuse a stream that is being captured."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    factor, out = (pointer, number, number), (pointer, pointer, number, number, number, number)
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasGemmEx.argtypes = [pointer, *[number] * 5, pointer, *factor, *factor, *out]
    return library


def multiply(a: Array, b: Array, out: Array, dtype: str, *, ta: bool = False, tb: bool = False) -> None:
    """Set out = a b, of matrices, transposed where `ta` and `tb` say so, in the arithmetic of `dtype`."""
    if out.size == 0:
        return
    (m, k), n = a.shape[::-1] if ta else a.shape, b.shape[0] if tb else b.shape[1]
    kind, computing = _CUBLAS[dtype]
    result = 1 if dtype == "float64" else 0
    one, nil = np.ones(1, out.dtype), np.zeros(1, out.dtype)
    # cuBLAS counts columns first: it sees every matrix transposed, and computes outᵀ = bᵀ aᵀ.
    theirs, ours = ((v.data.ptr, kind, v.strides[0] // v.itemsize) for v in (b, a))
    shape, handle = (int(tb), int(ta), n, m, k), xp.cuda.device.get_cublas_handle()
    scales, library = (one.ctypes.data, nil.ctypes.data), _cublas()
    status = library.cublasSetStream_v2(handle, xp.cuda.get_current_stream().ptr) or library.cublasGemmEx(
        handle, *shape, scales[0], *theirs, *ours, scales[1], out.data.ptr, result, n, computing, -1
    )
    if status != 0:
        raise RuntimeError(f"cuBLAS refuses {dtype} of {a.shape} and {b.shape}: status {status}")


class Matrix:
    """A matrix for `multiply`: itself, or a copy in 16 bits, which `refresh` makes anew."""

    def __init__(self, values: Array, dtype: str) -> None:
        self.values, self._narrow = values, None
        if ARITHMETIC[dtype].item == 2 and values.size:
            self.values = xp.empty(values.shape, np.int16)
            self._narrow = elementwise(narrow_kernel(dtype), values, self.values)

    def refresh(self) -> None:
        if self._narrow is not None:
            self._narrow()
