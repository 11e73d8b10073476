"""Real inputs: origin, hash, and what `sample` draws."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from rnnlab import datasets


@pytest.mark.parametrize(
    ("load", "shape"), [(datasets.hourly_temperatures, (8759,)), (datasets.digit_images, (1797, 64))]
)
def test_data_set_names_its_origin(load, shape):
    data = load()
    assert (data[0] if isinstance(data, tuple) else data).shape == shape
    origin = datasets.ORIGINS[load.__name__]
    assert all([origin.package, origin.licence, origin.description])


@pytest.mark.parametrize("name", datasets.SAMPLERS)
def test_samples_are_standardised_and_seeded(name):
    x, targets = datasets.sample(name, 128, 400, seed=0, dtype="float64")
    assert x.shape == (128, 400, 1)
    # 400 windows of a year of temperatures are as many dependent draws: a few percent around 0 and 1
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1
    again = datasets.sample(name, 128, 400, seed=0, dtype="float64")
    other = datasets.sample(name, 128, 400, seed=1, dtype="float64")
    np.testing.assert_array_equal(x, again[0])
    np.testing.assert_array_equal(targets, again[1])
    assert not np.array_equal(x, other[0])
    assert datasets.sample(name, 5, 2, seed=0)[0].dtype == np.float32


def test_digit_stream_ends_with_the_digit_of_its_label():
    images, of_images = datasets.digit_images()
    pixels = (images - images.mean()) / images.std()
    x, labels = datasets.sample("digit_pixels", 100, 20, seed=0, dtype="float64")
    for b in range(20):
        same = np.flatnonzero((pixels == x[36:, b, 0]).all(axis=1))
        assert labels[b] in of_images[same]


def test_temperature_target_is_the_next_hour():
    values = datasets.hourly_temperatures()
    values = (values - values.mean()) / values.std()
    x, targets = datasets.sample("hourly_temperatures", 48, 5, seed=0, dtype="float64")
    for b in range(5):
        windows = np.lib.stride_tricks.sliding_window_view(values, 49)
        assert (windows == np.append(x[:, b, 0], targets[b])).all(axis=1).any()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="name must be one of white_noise, hourly_temperatures, digit_pixels, got 'x'"):
        datasets.sample("x", 5, 2)
    with pytest.raises(ValueError, match="steps must be below 8759 for hourly_temperatures, got 9000"):
        datasets.sample("hourly_temperatures", 9000, 2)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        datasets.sample("white_noise", 5, 0)


def test_missing_package_says_what_to_install(monkeypatch):
    def none(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    with pytest.raises(ImportError, match=r'needs the package vega_datasets: pip install "rnnlab\[data\]"'):
        datasets.shipped("hourly_temperatures")
    with pytest.raises(ImportError, match=r'tunes needs the package music21: pip install "rnnlab\[datasets\]"'):
        datasets.shipped("tunes")


def test_other_data_than_expected_is_refused(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    with pytest.raises(ValueError, match=r"digit_images is not the data .* scikit-learn .* hash is d9298a10d1b07358, "):
        datasets.shipped("digit_images")
    with pytest.raises(ValueError, match=r"name must be one of hourly_temperatures, .* got 'x'"):
        datasets.shipped("x")
