"""Sequence kernels: one file a device, the same few functions in each.

`backend(device)` returns the module that computes there: `kernels.cpu` (Numba `@njit`).
"""

from types import ModuleType

__all__ = ["DEVICES", "DeviceNotAvailable", "backend"]

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
        raise DeviceNotAvailable("device 'cuda' cannot be used: this version of rnnlab has kernels for the CPU only")
    raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
