"""Real sequences that ship inside well-kept packages; nothing is downloaded."""

import hashlib
import importlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .checks import check_dtype, check_positive, generator

__all__ = ["SAMPLERS", "Dataset", "digit_images", "hourly_temperatures", "sample"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Arrays with their origin: package and version that hold them, licence, and what they are."""

    name: str
    package: str
    version: str
    licence: str
    description: str
    values: Array
    labels: Array | None = None


def _require(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this data set needs the package {package}: pip install "rnnlab[data]"') from error


def _check_hash(name: str, values: Array, expected: str) -> None:
    got = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]
    if got != expected:
        raise ValueError(f"{name} is not the data that rnnlab was written for: its hash is {got}, expected {expected}")


@cache
def hourly_temperatures() -> Dataset:
    """Hourly temperature normals of Seattle over one year: values (8759,), °F.

    Raises ImportError without the package vega_datasets, ValueError for other data than expected.
    """
    package = _require("vega_datasets", "vega_datasets")
    values = package.local_data.seattle_temps()["temp"].to_numpy(np.float64)
    _check_hash("hourly_temperatures", values, "9693ea921834ed62")
    return Dataset(
        "hourly_temperatures",
        "vega_datasets",
        package.__version__,
        "MIT (package); U.S. National Oceanic and Atmospheric Administration (data)",
        "hourly temperature normals of Seattle, 8759 hours, degrees Fahrenheit",
        values,
    )


@cache
def digit_images() -> Dataset:
    """Handwritten digits of 8 × 8 pixels: values (1797, 64) from 0 to 16, row by row; labels (1797,) from 0 to 9.

    Alpaydin & Kaynak (1998), UCI machine learning repository. Raises as `hourly_temperatures`, for scikit-learn.
    """
    digits = _require("sklearn.datasets", "scikit-learn").load_digits()
    _check_hash("digit_images", digits.data, "20def7f70a702f0a")
    return Dataset(
        "digit_images",
        "scikit-learn",
        importlib.metadata.version("scikit-learn"),
        "BSD-3-Clause (package); CC BY 4.0 (data)",
        "handwritten digits, 1797 images of 8 × 8 pixels",
        digits.data,
        digits.target,
    )


def _white_noise(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(steps, batch, 1)), rng.normal(size=(batch, 1))


def _temperature_windows(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    values = hourly_temperatures().values
    values = (values - values.mean()) / values.std()
    window = rng.integers(len(values) - steps, size=batch) + np.arange(steps + 1)[:, None]
    series = values[window][:, :, None]
    return series[:-1], series[-1]


def _digit_streams(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    images = digit_images()
    assert images.labels is not None
    pixels = (images.values - images.values.mean()) / images.values.std()
    count = -(-steps // pixels.shape[1])
    picked = rng.integers(len(pixels), size=(batch, count))
    stream = pixels[picked].reshape(batch, -1)[:, -steps:]
    return stream.T[:, :, None], images.labels[picked[:, -1]]


#: Inputs by name: what `sample` draws, and the number of outputs and the loss that belong to them.
SAMPLERS = {
    "white_noise": (_white_noise, 1, "mse"),
    "hourly_temperatures": (_temperature_windows, 1, "mse"),
    "digit_pixels": (_digit_streams, 10, "cross_entropy"),
}


def sample(
    name: str, steps: int, batch: int, *, seed: int | None = None, dtype: DTypeLike = "float32"
) -> tuple[Array, Array]:
    """Draw sequences x (T, B, 1) of mean 0 and variance 1 over the data set, and what is to be told at their end.

    white_noise: N(0, 1) with a target (B, 1) from N(0, 1); hourly_temperatures: windows of the year with the next
    hour's temperature, (B, 1); digit_pixels: digits read pixel by pixel, one after the other, of which the last is
    complete, with its label, (B,). Raises ValueError for an unknown name or sizes out of range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"name must be one of {', '.join(SAMPLERS)}, got {name!r}")
    steps, batch = check_positive("steps", steps), check_positive("batch", batch)
    if name == "hourly_temperatures" and steps >= len(hourly_temperatures().values):
        raise ValueError(f"steps must be below {len(hourly_temperatures().values)} for {name}, got {steps}")
    dtype = check_dtype("dtype", dtype)
    x, targets = SAMPLERS[name][0](steps, batch, generator(seed, name))
    return np.ascontiguousarray(x, dtype), targets.astype(dtype) if targets.dtype.kind == "f" else targets
