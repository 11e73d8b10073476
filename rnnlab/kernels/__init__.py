"""Sequence kernels: one module a device, the same few functions in each.

`backend(device)` returns the module that computes there: `kernels.cpu` (Numba `@njit`), `kernels.cuda` (`@cuda.jit`).
"""

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import config
from numpy.typing import NDArray

__all__ = ["DEVICES", "DeviceNotAvailable", "LayerGradients", "LayerTrace", "LayerWeights", "available", "backend"]
__all__ += ["set_threads", "threads"]

if importlib.util.find_spec("numba_cuda") and not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # noqa: NPY201 (numba-cuda 0.30 looks for what NumPy 2.5 has no more)

Array = NDArray[Any]
Floats = NDArray[np.float64]

DEVICES = ("cpu", "cuda")


class DeviceNotAvailable(RuntimeError):
    """A device that was asked for and is not there; the message says why."""


def backend(device: str) -> ModuleType:
    """Return the module whose `forward`, `backward` and `jacobian` run on `device`.

    Raises ValueError for a name that is not in `DEVICES`, `DeviceNotAvailable` for a device that cannot be used here.
    """
    if device == "cpu":
        from . import cpu

        return cpu
    if device == "cuda":
        if reason := _no_cuda():
            raise DeviceNotAvailable(f"device 'cuda' cannot be used: {reason}")
        from . import cuda

        return cuda
    raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")


@cache
def _no_cuda() -> str | None:
    """Return why there are no kernels for the GPU here, or None. Numba's simulator needs neither GPU nor CuPy."""
    simulated = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
    needed = ("numba_cuda",) if simulated else ("numba_cuda", "cupy")
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        return f"{' and '.join(missing)} not installed, see pip install 'rnnlab[cuda]'"
    from numba import cuda

    return None if simulated or cuda.is_available() else "Numba finds no GPU or no driver"


def threads() -> int:
    """Return how many threads a kernel may use: NUMBA_NUM_THREADS of the environment, by default one a core.

    Numba's own thread pool is never started: its OpenMP would spin on the cores of PyTorch's, which is another.
    """
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def set_threads(count: int) -> None:
    """Set what `threads` returns, for this process."""
    config.NUMBA_NUM_THREADS = count  # type: ignore[attr-defined]


def available(device: str) -> str | None:
    """Return why `device` cannot be used here, or None if it can."""
    try:
        backend(device)
    except DeviceNotAvailable as error:
        return str(error)
    return None


class LayerWeights(NamedTuple):
    """Weights of one layer in one direction, named and shaped as PyTorch does; absent biases are zeros.

    weight_ih (G·H, I), weight_hh (G·H, H), bias_ih and bias_hh (G·H,), peephole (P·H,).
    """

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    peephole: Array


class LayerTrace(NamedTuple):
    """What one layer in one direction computed, in its own order of processing, and what its backward needs.

    cell: its name; x (T, B, I); state (S, T+1, B, H), slot 0 initial, held past the end of a sequence; saved
    (N, T, U, M, K, V), what `step` saved, for N groups of M sequences (the last may have fewer, the rest is anything)
    and U vectors of V units, zero past the end, anything in lanes past unit H; reset_h (T, B, H), r ∘ h_{t−1} of a cell
    that resets before the product, else empty; lengths (B,).
    """

    cell: str
    x: Array
    state: Array
    saved: Array
    reset_h: Array
    lengths: NDArray[np.int64]

    def saved_of(self, start: int, stop: int) -> Array:
        """Return what steps start…stop − 1 saved, of all sequences in one group: (T, U, B, K, V)."""
        if len(self.saved) == 1:
            return self.saved[0, start:stop]
        return np.concatenate([*self.saved[:, start:stop]], axis=2)[:, :, : len(self.lengths)]


class LayerGradients(NamedTuple):
    """Gradients of one layer in one direction.

    weights: dL/d each weight; None for a scaled adjoint, whose steps have different units. x (T, B, I); state
    (S, T+1, B, H), the total derivative at every slot; direct (T, B, H), the part of the total dL/dh_{t+1} that does
    not pass through the layer's next state. With a scaled adjoint the true values are state·2^exponent, exponent
    (T+1, B), x[t]·2^exponent[t+1] and direct·2^direct_exponent.
    """

    weights: LayerWeights | None
    x: Array
    state: Array
    direct: Array
    exponent: NDArray[np.int64] | None
    direct_exponent: NDArray[np.int64] | None
