"""Gradient flow: log-norms against plain gradients, closed forms, and what the fits report."""

import math

import numpy as np
import pytest

import rnnlab
from rnnlab.gradients import decay, lag_profile, log_norm

#: Of ln ‖gradient‖ in float64, rescaled at every step or not: some hundred roundings of sums of some hundred terms.
LOGARITHM = 1e-11


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
                np.testing.assert_allclose(measured[: length + 1, b][~zero], expected[~zero], rtol=0, atol=LOGARITHM)
                assert np.isnan(measured[length + 1 :, b]).all()
    for b, length in enumerate(lengths):
        expected = np.log(np.linalg.norm(3 * plain.x[:length, b], axis=1))
        np.testing.assert_allclose(flow.x[:length, b], expected, rtol=0, atol=LOGARITHM)


def test_direct_part_is_the_last_step_only_or_every_step():
    rng = np.random.default_rng(0)
    model, x = build("gru"), rng.normal(size=(5, 2, 3))
    last = rnnlab.gradient_flow(model, x, rng.normal(size=(2, 2)))
    assert np.isneginf(last.direct_h[0][:5]).all()
    np.testing.assert_allclose(last.direct_h[0][5], last.h[0][5], rtol=0, atol=LOGARITHM)
    every = rnnlab.gradient_flow(model, x, rng.normal(size=(5, 2, 2)), "every")
    assert np.isneginf(every.direct_h[0][0]).all()
    assert np.isfinite(every.direct_h[0][1:]).all()
    assert not np.allclose(every.direct_h[0][1:5], every.h[0][1:5])


@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_direct_part_passes_through_no_later_step(cell):
    """Cut after step t, and a loss of that step alone, give the direct part of dL/dh_t, dL/dc_t and dL/dx_t."""
    rng = np.random.default_rng(5)
    model = build(cell, "many_to_many", bidirectional=False)
    x, targets = rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 2))
    flow = rnnlab.gradient_flow(model, x, targets, "every")
    trace = model.rnn.forward(x)
    for t in range(4):
        state = tuple(np.stack([part[0][t]]) for part in ((trace.h, trace.c) if trace.c else (trace.h,)))
        state = state if trace.c else state[0]
        one = model.loss_and_gradients(x[t : t + 1], targets[t : t + 1], state=state)
        gradients, count = one.recurrent["rnn"], 2  # the mean over two sequences
        pairs = [(flow.direct_h[0], gradients.h[0][1]), (flow.direct_x[None, t][[0] * (t + 2)], gradients.x[0])]
        if trace.c:
            pairs.append((flow.direct_c[0], gradients.c[0][1]))
        for measured, plain in pairs:
            np.testing.assert_allclose(
                measured[t + 1], np.log(np.linalg.norm(count * plain, axis=1)), rtol=0, atol=LOGARITHM
            )


def test_constant_error_carousel_to_the_last_bit():
    """lstm_no_forget with W_hh = 0 and a loss at the last of 1,000 steps: dL/dc is the same number at every slot."""
    for dtype in ("float32", "float64"):
        net = rnnlab.Recurrent("lstm_no_forget", 3, 8, dtype=dtype, seed=0)
        net.initialise("zeros", "uniform", "zeros", seed=1)
        model = rnnlab.SequenceModel(net, 2, "many_to_one", "mse", seed=2)
        rng = np.random.default_rng(3)
        x, targets = rng.normal(size=(1000, 4, 3)).astype(dtype), rng.normal(size=(4, 2)).astype(dtype)
        dc = model.loss_and_gradients(x, targets).recurrent["rnn"].c[0]
        assert (dc != 0).all()
        np.testing.assert_array_equal(dc, np.broadcast_to(dc[1000], dc.shape))
        assert np.ptp(rnnlab.gradient_flow(model, x, targets).c[0], axis=0).max() < LOGARITHM


def test_saturation_beyond_the_dtype_is_reported():
    """At a pre-activation of 45 the slope of tanh is 4e−90 = 3e-39, below float32's smallest normal number."""
    for dtype in ("float32", "float64"):
        net = rnnlab.RNN(1, 4, dtype=dtype, seed=0)
        net.params["bias_ih_l0"] = np.full(4, 45, dtype)
        model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
        arguments = model, np.zeros((3, 1, 1), dtype), np.full((1, 1), 3, dtype)
        if dtype == "float32":
            with pytest.warns(RuntimeWarning, match="slopes of saturated units lose digits in float32"):
                rnnlab.gradient_flow(*arguments)
        else:
            assert np.isfinite(rnnlab.gradient_flow(*arguments).h[0]).all()


def test_loss_at_every_step_sums_the_losses():
    rng = np.random.default_rng(3)
    model = build("lstm", "many_to_many")
    x, targets = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 2))
    flow = rnnlab.gradient_flow(model, x, targets, "every")
    plain = model.loss_and_gradients(x, targets).recurrent["rnn"].h[0] * targets[..., 0].size
    np.testing.assert_allclose(flow.h[0][1:], np.log(np.linalg.norm(plain, axis=2))[1:], rtol=0, atol=LOGARITHM)


def test_hundred_thousand_steps_in_float32():
    """A tanh RNN at rest with W_hh = e^−½·Q loses exactly half a nat a step."""
    steps = 100_000
    net = rnnlab.RNN(1, 32, dtype="float32", seed=0)
    net.initialise("orthogonal", gain=math.exp(-0.5), seed=1)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    flow = rnnlab.gradient_flow(model, np.zeros((steps, 1, 1), np.float32), np.ones((1, 1), np.float32))
    norms = flow.by_lag("h")[0]
    expected = norms[0] - 0.5 * np.arange(steps + 1)
    # W_hh in float32 has singular values to 1e-7 of theirs, as has the product of a step: 4e-7 of its half nat.
    np.testing.assert_allclose(norms[1:], expected[1:], rtol=1e-6)
    assert flow.decay("h").rate == pytest.approx(-0.5, rel=1e-6)


def test_growth_does_not_overflow_in_float32():
    net = rnnlab.RNN(1, 16, nonlinearity="relu", dtype="float32", seed=0)
    net.initialise("identity", "zeros", gain=2.0, seed=0)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    state = np.full((1, 1, 16), 1e-30, np.float32)  # keeps every unit on its linear side
    flow = rnnlab.gradient_flow(model, np.zeros((200, 1, 1), np.float32), np.ones((1, 1), np.float32), state=state)
    np.testing.assert_allclose(np.diff(flow.by_lag("h")[0]), math.log(2), rtol=0, atol=1e-6)  # exact powers of two


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
    row = fit.to_row()
    assert row["half_life_low_steps"] < row["half_life_steps"] == fit.half_life < row["half_life_high_steps"]
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
    profile = lag_profile(curves, low=0, high=1)
    assert profile["lag_steps"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(profile["norm_decades"], [0, -2, -4], rtol=0, atol=1e-12)
    np.testing.assert_allclose(profile["norm_low_decades"], [0, -3, -6], rtol=0, atol=1e-12)
    np.testing.assert_allclose(profile["norm_high_decades"], [0, -1, -2], rtol=0, atol=1e-12)


def test_profile_and_decay_of_sequences_of_unequal_length():
    """Seven sequences of 200 steps, one of 30, and one that is predicted perfectly and has no gradient at all."""
    curves = np.tile(-0.1 * np.arange(201.0), (9, 1))
    curves[7, 31:] = np.nan
    curves[8] = -np.inf
    fit, profile = decay(curves), lag_profile(curves)
    assert fit.rate == pytest.approx(-0.1, rel=1e-12)
    assert fit.rate_low == pytest.approx(-0.1, rel=1e-12)
    np.testing.assert_allclose(profile["norm_decades"], -0.1 * np.arange(201) / np.log(10), rtol=0, atol=1e-12)
    short = decay(np.where(np.arange(201) > 60, np.nan, curves[:7]))
    assert short.rate == pytest.approx(-0.1, rel=1e-12)


def test_quantiles_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(11, 5))
    profile = lag_profile(values, low=0.2, high=0.77)
    relative = (values - values[:, :1]) / np.log(10)
    np.testing.assert_allclose(profile["norm_low_decades"], np.quantile(relative, 0.2, axis=0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(profile["norm_high_decades"], np.quantile(relative, 0.77, axis=0), rtol=0, atol=1e-13)


def test_one_sample_has_no_interval():
    fit = decay(-0.1 * np.arange(50.0)[None])
    assert fit.rate == pytest.approx(-0.1)
    assert math.isnan(fit.rate_low)
    assert math.isnan(fit.rate_high)


def test_horizon_beyond_the_sequence_is_infinite():
    assert decay(np.zeros((2, 10))).horizon == math.inf
    short = np.where(np.arange(201) > 60, np.nan, np.zeros((7, 201)))  # most sequences end at lag 60
    assert decay(short).horizon == math.inf


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("c",), "quantity must be one of h, got 'c'"), (("h", 1), "k must be an integer in 0…0, got 1")],
)
def test_what_the_network_does_not_have_is_named(arguments, message):
    flow = rnnlab.gradient_flow(build("gru"), np.zeros((4, 2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=message):
        flow.by_lag(*arguments)


def test_topologies_that_read_their_outputs_are_refused():
    with pytest.raises(ValueError, match="many_to_many, got encoder_decoder"):
        rnnlab.gradient_flow(build("gru", "encoder_decoder"), np.zeros((4, 2, 3)), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transient": 10}, "transient must be an integer in 0…9, got 10"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_bad_fit_options_are_named(options, message):
    for samples in (1, 2):
        with pytest.raises(ValueError, match=message):
            decay(np.zeros((samples, 10)), **options)
    for read in (decay, lag_profile):
        with pytest.raises(ValueError, match="log_norms must have shape"):
            read(np.zeros(10))


def test_quantiles_of_a_profile_are_named():
    with pytest.raises(ValueError, match=r"low and high must lie in 0 ≤ low ≤ high ≤ 1, got 0\.1 and 1\.5"):
        lag_profile(np.zeros((2, 10)), high=1.5)
