"""Numba's CUDA simulator, but all blocks at once: barriers of grids and clusters, memory of other blocks, tensor cores.

Each thread of a kernel is a thread of Python. `install` puts this in the place of `numba.cuda` in the modules of the
kernels; it needs NUMBA_ENABLE_CUDASIM=1, see `rnnlab.kernels.ptx` for what a thread is asked for.
"""

import threading
from functools import partial

import numpy as np
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule


class Shared:
    """Dynamic shared memory of a block, which begins with anything in it."""

    def __init__(self, size, seed):
        self.memory = np.random.default_rng(seed).integers(0, 256, size // 16 * 16, np.uint8)

    def array(self, shape, dtype, alignment=16):
        assert (shape, alignment) == (0, 16)
        return self.memory.view(dtype)


class Block:
    """What the threads of a block share; `cluster` are all blocks of its cluster."""

    def __init__(self, number, launch):
        self.number, self.launch = number, launch
        self.shared = Shared(launch.shared, number)
        self.barrier = threading.Barrier(launch.threads)
        warps = -(-launch.threads // 32)
        self.warps = [threading.Barrier(min(32, launch.threads)) for _ in range(warps)]
        self.fragments = [[None] * 32 for _ in range(warps)]


class Launch:
    """One kernel and its blocks."""

    def __init__(self, function, blocks, threads, cluster, shared, arguments):
        self.function, self.threads, self.shared, self.arguments = function, threads, shared, arguments
        self.grid, self.cluster = blocks, cluster or 1
        self.blocks = [Block(number, self) for number in range(blocks)]
        self.clusters = [threading.Barrier(self.cluster * threads) for _ in range(blocks // self.cluster)]
        self.failure = None

    def run(self):
        everyone = [Thread(block, tid) for block in self.blocks for tid in range(self.threads)]
        for thread in everyone:
            thread.start()
        for thread in everyone:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def fail(self, error):
        if self.failure is None:
            self.failure = error
        for barrier in (*self.clusters, *(b for block in self.blocks for b in (block.barrier, *block.warps))):
            barrier.abort()


class Thread(threading.Thread):
    """A thread of the GPU."""

    def __init__(self, block, tid):
        super().__init__(daemon=True)
        self.block, self.tid = block, tid
        self.threadIdx, self.blockIdx = Dim3(tid, 0, 0), Dim3(block.number, 0, 0)

    def run(self):
        try:
            with np.errstate(all="ignore"):
                self.block.launch.function(*self.block.launch.arguments)
        except Exception as error:
            self.block.launch.fail(error)

    def syncthreads(self):
        self.block.barrier.wait()

    def cluster_barrier(self):
        self.block.launch.clusters[self.block.number // self.block.launch.cluster].wait()

    def check(self):
        if self.block.launch.failure is not None:
            raise RuntimeError("another thread has failed")

    def shared_of(self, rank, array):
        launch = self.block.launch
        assert 0 <= rank < launch.cluster
        begin = self.block.number // launch.cluster * launch.cluster
        return launch.blocks[begin + rank].shared.array(0, array.dtype)

    def mma(self, name, a, b, c):
        """The product of a warp, from the layout of fragments in the PTX ISA (9.7.14.5.8, m16n8k16, and m16n8k8)."""
        warp, lane = divmod(self.tid, 32)
        fragments, barrier = self.block.fragments[warp], self.block.warps[warp]
        fragments[lane] = numbers(a, name), numbers(b, name)
        barrier.wait()
        if lane == 0:
            each = 1 if name == "tf32" else 2
            A, B = np.zeros((16, 8 * each), np.float32), np.zeros((8 * each, 8), np.float32)
            for other, (ours, theirs) in enumerate(fragments):
                group, place = divmod(other, 4)
                for i, value in enumerate(ours):
                    register, half = divmod(i, each)
                    A[group + 8 * (register % 2), (place + 4 * (register // 2)) * each + half] = value
                for i, value in enumerate(theirs):
                    register, half = divmod(i, each)
                    B[(place + 4 * register) * each + half, group] = value
            fragments.append(A @ B)
        barrier.wait()
        product, (group, place) = fragments[-1], divmod(lane, 4)
        barrier.wait()
        if lane == 0:
            fragments.pop()
        return tuple(c[i] + product[group + 8 * (i // 2), 2 * place + i % 2] for i in range(4))


def numbers(words, name):
    """The numbers in the 32-bit words of a fragment, the lower half of a word first."""
    bits = np.array(words, np.int32)
    if name == "tf32":
        return bits.view(np.float32)
    halves = bits.view(np.int16)
    return halves.view(np.float16) if name == "f16" else (halves.astype(np.int32) << 16).view(np.float32)


class Kernel:
    """A function that is launched as `kernel[blocks, threads, cluster, shared](…)`."""

    def __init__(self, function):
        self.py_func = function

    def __getitem__(self, grid):
        return partial(self._launch, grid)

    def _launch(self, grid, *arguments):
        blocks, threads, cluster, shared = grid
        Launch(self.py_func, blocks, threads, cluster, shared, arguments).run()


class Cuda(FakeCUDAModule):
    """The module `cuda` inside and around kernels."""

    jit = Kernel

    def __init__(self):
        super().__init__((1, 1, 1), (1, 1, 1), 0)

    @property
    def shared(self):
        return threading.current_thread().block.shared

    def grid(self, dimensions):
        thread = threading.current_thread()
        return thread.block.number * thread.block.launch.threads + thread.tid

    def gridsize(self, dimensions):
        launch = threading.current_thread().block.launch
        return launch.grid * launch.threads


class PreparedLaunch:
    """In the place of `kernels.cuda_launch.Launch`."""

    def __init__(self, kernel, arguments, blocks, threads, *, shared=0, cluster=1, together=False):
        flat = [a if isinstance(a, int) else a.reshape(-1) for a in arguments]
        for given, seen in zip(arguments, flat, strict=True):
            assert isinstance(given, int) or given.size == 0 or np.shares_memory(given, seen)
        self.launch = partial(kernel[blocks, threads, cluster, shared], *flat)

    def __call__(self):
        self.launch()


def multiply(a, b, out, dtype, *, ta=False, tb=False):
    """In the place of cuBLAS; 16-bit numbers come as their bits."""
    if a.dtype == np.int16:
        a, b = (v.view(np.float16) if dtype == "fp16" else v.astype(np.int32) << 16 for v in (a, b))
        a, b = (v.astype(np.float32) if dtype == "fp16" else v.view(np.float32) for v in (a, b))
    if out.size:
        out[...] = (a.T if ta else a) @ (b.T if tb else b)


def install():
    """Let the kernels run here, once for the process."""
    from rnnlab.kernels import cuda, cuda_backward, cuda_block, cuda_launch, ptx
    from rnnlab.kernels.plan import H200

    cuda_block.cuda = cuda_backward.cuda = ptx.cuda = Cuda()
    cuda_launch.Launch, cuda.multiply, cuda.chip = PreparedLaunch, multiply, lambda: H200
    cuda_launch.elementwise = cuda.elementwise = lambda kernel, *arrays: PreparedLaunch(kernel, arrays, 2, 1)
    cuda.capture = cuda.on_host = lambda given: given
