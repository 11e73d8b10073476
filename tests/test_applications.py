"""Real tasks: their parts, their baselines against other ways to the same numbers, and what their sequences say."""

import importlib.metadata

import numpy as np
import pytest

from rnnlab.applications import APPLICATIONS, evaluate, load, skill
from rnnlab.clipping import ByGlobalNorm
from rnnlab.datasets import ORIGINS, digit_images
from rnnlab.optim import Adam
from rnnlab.training import train


def loaded(name, dtype="float32"):
    package = ORIGINS[APPLICATIONS[name].origin].package
    if package != "python":
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed")
    return load(name, dtype)


def untrained(data):
    """A model whose outputs are its readout's bias, all 0."""
    model = data.model("rnn_tanh", 2, seed=0)
    model.readout["weight"][:] = model.readout["bias"][:] = 0
    return model


#: Sequences in training, validation and test.
COUNTS = {
    "character_model": None,  # as many as this Python's manual has
    "sentiment": (4331, 1443, 1443),
    "translation": (294, 97, 97),
    "weather": (717, 365, 365),
    "stocks": (3499, 754, 755),
    "speech": (2000, 500, 500),
    "music": (1470, 183, 185),
    "captions": (750, 250, 250),
    "moving_images": (1198, 299, 300),
    "pixel_digits": (1198, 299, 300),
}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_parts_are_what_a_model_takes(name):
    data = loaded(name)
    parts = (data.train, data.validation, data.test)
    if COUNTS[name]:
        assert tuple(part.x.shape[1] for part in parts) == COUNTS[name]
    for part in parts:
        assert part.x.dtype == np.float32
        assert part.x.shape[2] == data.input_size
        assert np.isfinite(part.x).all()
        if part.lengths is not None:
            assert not part.x[np.arange(len(part.x))[:, None] >= part.lengths].any()
    origin = ORIGINS[data.application.origin]
    assert all([data.version, data.digest, origin.licence, data.application.preparation])
    # Of N equally likely classes, which a model without weights predicts, 1/N are right and each costs log₂ N bits.
    metric = evaluate(untrained(data), data, data.validation)
    if data.application.metric == "bits a symbol":
        assert metric == pytest.approx(np.log2(data.output_size), rel=1e-5)  # float32, the sum of thousands of losses
    elif data.application.metric == "accuracy":
        assert metric == np.mean(data.validation.targets == 0)
    else:
        assert metric == pytest.approx(np.mean(data.validation.targets.astype(np.float64) ** 2), rel=1e-5)


@pytest.mark.parametrize("name", ["translation", "captions", "music"])
def test_unigram_baseline_is_the_loss_of_a_bias(name):
    data = loaded(name)
    seen = data.train.targets
    lengths = data.train.lengths if data.train.target_lengths is None else data.train.target_lengths
    counts = np.ones(data.output_size)
    for n, length in enumerate(lengths):
        np.add.at(counts, seen[:length, n], 1)
    counts[max(seen.max(), data.test.targets.max()) + 1 :] = 1e-30  # symbols that no sequence has: captions' pixels
    model = untrained(data)
    model.readout["bias"][:] = np.log(counts / counts.sum())
    assert evaluate(model, data, data.test) == pytest.approx(data.baseline, rel=1e-5)  # float32, as above


def test_baselines_of_labels_and_forecasts():
    digits = loaded("pixel_digits")
    common = np.argmax([np.sum(digits.train.targets == k) for k in range(10)])
    assert digits.baseline == np.mean(digits.test.targets == common)
    weather = loaded("weather", "float64")
    days = weather.test.x[-1, :, 0]
    # Persistence is the mean square of differences of one series, of which the last is not among the inputs.
    errors = np.append(np.diff(days), weather.test.targets[-1])
    assert weather.baseline == pytest.approx(np.mean(errors**2), rel=1e-12)
    frames = loaded("moving_images", "float64")
    mean = frames.train.targets.mean(axis=1).mean(axis=0)
    assert frames.baseline == pytest.approx(np.mean((frames.test.targets - mean) ** 2), rel=1e-12)
    assert frames.baseline < np.mean((frames.test.targets[1:] - frames.test.targets[:-1]) ** 2)


def test_forecast_windows_follow_each_other():
    for name in ("weather", "stocks"):
        data = loaded(name, "float64")
        for part in (data.train, data.validation, data.test):
            np.testing.assert_array_equal(part.x[1:, :-1], part.x[:-1, 1:])
            np.testing.assert_array_equal(np.diff(part.x[-1, :, :1], axis=0), part.targets[:-1])
        step = data.validation.x[-1, 0, :1] - data.train.x[-1, -1, :1]
        np.testing.assert_array_equal(step, data.train.targets[-1])


def test_text_and_names_can_be_read_back():
    data = loaded("character_model")
    said = "".join(data.symbols[k] for k in data.train.targets[:, :40].T.ravel())
    assert "assert" in said  # the first topic in the alphabet
    np.testing.assert_array_equal(data.train.x[1:].argmax(axis=2), data.train.targets[:-1])
    glyphs = loaded("captions")
    first = glyphs.train.targets[: glyphs.train.target_lengths[0], 0]
    assert "".join(glyphs.symbols[k] for k in first) == "LATIN CAPITAL LETTER A\N{SYMBOL FOR END OF TEXT}"
    assert glyphs.train.x.max() <= 1
    assert glyphs.train.x[0].mean() > 0.03  # a letter's ink


def test_french_belongs_to_the_english():
    data = loaded("translation")
    names = [data.symbols[k] for k in data.train.targets[: data.train.target_lengths[0], 0]]
    assert "".join(names[:-1]).startswith("afrikaans")
    assert data.train.lengths[0] == len("afrikaans")


def test_digits_bounce_within_the_frame():
    data, images = loaded("moving_images", "float64"), digit_images()[0]
    frames = data.train.x * 1.0
    frames -= frames.min()
    frames = frames.reshape(20, -1, 12, 12)
    ink = frames.sum(axis=(2, 3))
    np.testing.assert_allclose(ink, np.broadcast_to(ink[:1], ink.shape), rtol=1e-12)
    np.testing.assert_allclose(ink[0] / ink[0, 0], images[: ink.shape[1]].sum(axis=1) / images[0].sum(), rtol=1e-12)
    rows = (frames.sum(axis=3) * np.arange(12)).sum(axis=2) / ink  # centres of mass move by one pixel a step
    np.testing.assert_allclose(np.abs(np.diff(rows, axis=0)), 1, rtol=1e-9)


def test_standards_come_from_the_training_part():
    speech = loaded("speech", "float64")
    steps = np.arange(len(speech.train.x))[:, None] < speech.train.lengths
    # Means of 40,000 numbers of size 1, in float64
    np.testing.assert_allclose(speech.train.x[steps].mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(speech.train.x[steps].std(axis=0), 1, rtol=1e-12)
    assert abs(speech.test.x.sum()) > 1
    music = loaded("music")
    assert "other" in music.symbols
    assert len(music.symbols) == music.output_size == 80


#: Updates, and the skill that a GRU of 32 units reaches at least: about half of what two networks of 150 or 300 did.
LEARNED = {
    "character_model": (150, 0.2),
    "sentiment": (300, 0.05),
    "translation": (150, 0.12),
    "weather": (150, 0.03),
    "stocks": (150, 0.1),
    "speech": (150, 0.85),
    "music": (150, 0.12),
    "captions": (150, 0.4),
    "moving_images": (150, 0.25),
    "pixel_digits": (300, 0.3),
}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_task_is_learned(name):
    data, (updates, least) = loaded(name), LEARNED[name]
    model = data.model("gru", 32, seed=0)
    log = train(model, data.task(), Adam(0.01), batch=32, updates=updates, clip=ByGlobalNorm(1.0), log=1)
    assert log.outcome == "finished"
    value = evaluate(model, data, data.test)
    assert skill(data.application.metric, value, data.baseline) > least
    assert value > data.baseline if data.application.metric == "accuracy" else value < data.baseline


def test_a_classifier_of_nan_is_right_nowhere():
    data = loaded("sentiment")
    model = data.model("gru", 2, seed=0)
    model.params["readout.bias"][:] = np.nan
    assert evaluate(model, data, data.test) == 0


def test_skill_is_the_share_of_the_error_that_is_gone():
    assert skill("accuracy", 0.75, 0.5) == 0.5
    assert skill("bits a symbol", 3.0, 4.0) == 0.25
    assert skill("squared error", 2.0, 1.0) == -1


def test_unknown_application_is_named():
    with pytest.raises(ValueError, match=r"name must be one of character_model, .* got 'chess'"):
        load("chess")
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, got 'int8'"):
        load("weather", "int8")
