"""Gradient flow: log-norms against plain gradients, closed forms, and what the fits report."""

import math

import numpy as np
import pytest

import rnnlab
from rnnlab.gradients import decay, lag_profile, log_norm


def build(
    cell="lstm", topology="many_to_one", loss="mse", *, dtype="float64", layers=1, bidirectional=False, outputs=2
):
    net = rnnlab.Recurrent(cell, 3, 6, layers, bidirectional=bidirectional, dtype=dtype, seed=1)
    return rnnlab.SequenceModel(net, outputs, topology, loss, seed=2)


@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_flow_is_the_log_norm_of_the_plain_gradient(cell):
    rng = np.random.default_rng(0)
    model = build(cell, layers=2, bidirectional=True)
    x, targets, lengths = rng.normal(size=(7, 3, 3)), rng.normal(size=(3, 2)), [7, 2, 5]
    flow = rnnlab.gradient_flow(model, x, targets, lengths=lengths)
    # The model's loss is the mean over sequences, the flow that of each sequence's own loss.
    plain = model.loss_and_gradients(x, targets, lengths).recurrent["rnn"]
    for k in range(4):
        for measured, gradient in [(flow.h[k], plain.h[k]), *([(flow.c[k], plain.c[k])] if plain.c else [])]:
            for b, length in enumerate(lengths):
                expected = np.log(np.maximum(np.linalg.norm(3 * gradient[: length + 1, b], axis=1), 1e-300))
                zero = expected < -600
                assert np.isneginf(measured[: length + 1, b][zero]).all()
                np.testing.assert_allclose(measured[: length + 1, b][~zero], expected[~zero], rtol=0, atol=1e-11)
                assert np.isnan(measured[length + 1 :, b]).all()
    for b, length in enumerate(lengths):
        expected = np.log(np.linalg.norm(3 * plain.x[:length, b], axis=1))
        np.testing.assert_allclose(flow.x[:length, b], expected, rtol=0, atol=1e-11)


def test_direct_part_is_the_last_step_only_or_every_step():
    rng = np.random.default_rng(0)
    model, x = build("gru"), rng.normal(size=(5, 2, 3))
    last = rnnlab.gradient_flow(model, x, rng.normal(size=(2, 2)))
    assert np.isneginf(last.direct[0][:5]).all()
    np.testing.assert_allclose(last.direct[0][5], last.h[0][5], rtol=0, atol=1e-12)
    every = rnnlab.gradient_flow(model, x, rng.normal(size=(5, 2, 2)), "every")
    assert np.isneginf(every.direct[0][0]).all()
    assert np.isfinite(every.direct[0][1:]).all()
    assert not np.allclose(every.direct[0][1:5], every.h[0][1:5])


def test_loss_at_every_step_sums_the_losses():
    rng = np.random.default_rng(3)
    model = build("lstm", "many_to_many")
    x, targets = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 2))
    flow = rnnlab.gradient_flow(model, x, targets, "every")
    plain = model.loss_and_gradients(x, targets).recurrent["rnn"].h[0] * targets[..., 0].size
    np.testing.assert_allclose(flow.h[0][1:], np.log(np.linalg.norm(plain, axis=2))[1:], rtol=0, atol=1e-11)


def test_hundred_thousand_steps_in_float32():
    """A tanh RNN at rest with W_hh = e^−½·Q loses exactly half a nat a step."""
    steps = 100_000
    net = rnnlab.RNN(1, 32, dtype="float32", seed=0)
    net.initialise("orthogonal", gain=math.exp(-0.5), seed=1)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    flow = rnnlab.gradient_flow(model, np.zeros((steps, 1, 1), np.float32), np.ones((1, 1), np.float32))
    norms = flow.by_lag("h")[0]
    expected = norms[0] - 0.5 * np.arange(steps + 1)
    np.testing.assert_allclose(norms[1:], expected[1:], rtol=1e-4)
    assert flow.decay("h").rate == pytest.approx(-0.5, rel=1e-5)


def test_growth_does_not_overflow_in_float32():
    net = rnnlab.RNN(1, 16, nonlinearity="relu", dtype="float32", seed=0)
    net.initialise("identity", "zeros", gain=2.0, seed=0)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    state = np.full((1, 1, 16), 1e-30, np.float32)  # keeps every unit on its linear side
    flow = rnnlab.gradient_flow(model, np.zeros((200, 1, 1), np.float32), np.ones((1, 1), np.float32), state=state)
    np.testing.assert_allclose(np.diff(flow.by_lag("h")[0]), math.log(2), atol=1e-6)  # exact powers of two


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.0, 5.0])
def test_lstm_memory_decays_by_its_forget_bias(forget_bias):
    net = rnnlab.LSTM(1, 8, dtype="float64", seed=0)
    net.initialise("zeros", "zeros", "zeros", forget_bias=forget_bias)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    x = np.random.default_rng(0).normal(size=(100, 4, 1))
    rate = rnnlab.gradient_flow(model, x, np.ones((4, 1))).decay("c").rate
    assert rate == pytest.approx({0: -0.6931, 1: -0.3133, 2: -0.1269, 5: -0.00672}[forget_bias], abs=5e-5)


def test_frame_is_tidy():
    rng = np.random.default_rng(0)
    model = build("lstm", layers=2, bidirectional=True)
    frame = rnnlab.gradient_flow(model, rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 2)), lengths=[4, 2]).to_frame()
    assert len(frame) == 4 * 2 * (5 + 3) + (4 + 2)  # (layers × directions) × (h, c) × slots, and x
    assert not frame.duplicated(["layer", "direction", "quantity", "sequence", "step"]).any()
    assert (frame["lag_steps"] == frame["sequence"].map({0: 4, 1: 2}) - frame["step"]).all()


def test_log_norm_beyond_the_range_of_squares():
    values = np.array([[3e-30, 4e-30], [3e30, 4e30], [0, 0]], np.float32)
    # rtol: the float32 inputs are decimal fractions, rounded
    np.testing.assert_allclose(log_norm(values)[:2], np.log([5e-30, 5e30]), rtol=1e-8)
    assert log_norm(values)[2] == -np.inf
    np.testing.assert_allclose(
        log_norm(values, np.array([10, -10, 0]))[:2], np.log([5e-30 * 1024, 5e30 / 1024]), rtol=1e-8
    )


def test_decay_recovers_a_slope_after_its_transient():
    rng = np.random.default_rng(0)
    lag = np.arange(200)
    curves = -0.2 * lag + 5 * np.exp(-lag / 5) + rng.normal(scale=0.1, size=(40, 200))
    fit = decay(curves)
    assert fit.rate_low < fit.rate < fit.rate_high
    assert fit.rate == pytest.approx(-0.2, abs=1e-3)  # the transient has died out, noise of 0.1 over 160 lags remains
    assert fit.half_life == pytest.approx(math.log(2) / -fit.rate)
    assert fit.half_life_low < fit.half_life < fit.half_life_high
    assert decay(curves, transient=0).rate < fit.rate
    assert decay(curves, seed=1).rate_low == pytest.approx(fit.rate_low, abs=1e-3)


def test_bootstrap_interval_covers_the_true_rate():
    """Of 200 intervals at 90 %, of samples with slopes around −0.1, about 180 hold −0.1 (binomial sd 4.2)."""
    rng = np.random.default_rng(0)
    lag = np.arange(30)
    fits = [
        decay(rng.normal(-0.1, 0.01, size=(40, 1)) * lag, confidence=0.9, resamples=200, seed=k) for k in range(200)
    ]
    covered = sum(fit.rate_low <= -0.1 <= fit.rate_high for fit in fits)
    assert 160 <= covered <= 198


def test_horizon_holds_all_but_a_hundredth():
    curves = -0.1 * np.arange(300.0)[None]
    fit = decay(curves)
    norms = np.exp(curves[0])
    horizon = int(fit.horizon)
    assert norms[horizon:].sum() < 0.01 * norms.sum() <= norms[horizon - 1 :].sum()


def test_decay_of_what_cannot_be_fitted_is_nan():
    fit = decay(np.full((3, 10), -np.inf))
    assert all(math.isnan(value) for value in fit.to_row().values())
    assert decay(np.zeros((1, 10))).half_life == math.inf


def test_profile_is_relative_to_the_first_lag_with_a_gradient():
    curves = np.log(10) * np.array([[-np.inf, 1, 0, -1], [-np.inf, 2, 0, -2], [-np.inf, 3, 0, -3]])
    profile = lag_profile(curves)
    assert profile["lag_steps"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(profile["norm_decades"], [0, -2, -4], atol=1e-12)
    np.testing.assert_allclose(profile["norm_low_decades"], [0, -3, -6], atol=1e-12)
    np.testing.assert_allclose(profile["norm_high_decades"], [0, -1, -2], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_at": "first"}, "loss_at must be one of last, every, got 'first'"),
        ({"targets": np.zeros((3, 2))}, r"targets must have shape \(2, 2\), got float64 of shape \(3, 2\)"),
        ({"targets": np.full((2, 2), np.nan)}, "targets must be finite"),
        ({"x": np.zeros((4, 2, 5))}, r"x must have shape \(T, B, 3\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": np.zeros((4, 2, 3)), "targets": np.zeros((2, 2)), "loss_at": "last"} | change
    with pytest.raises(ValueError, match=message):
        rnnlab.gradient_flow(build(), **arguments)


def test_topologies_that_read_their_outputs_are_refused():
    with pytest.raises(ValueError, match="many_to_many, got encoder_decoder"):
        rnnlab.gradient_flow(build("gru", "encoder_decoder"), np.zeros((4, 2, 3)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transient": 10}, "transient must lie in 0…9, got 10"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_bad_fit_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        decay(np.zeros((2, 10)), **options)
    with pytest.raises(ValueError, match="log_norms must have shape"):
        decay(np.zeros(10))
