"""What theory predicts: against published values, mpmath, and measured gradients."""

import math

import mpmath
import numpy as np
import pytest

import rnnlab
from rnnlab.lyapunov import lyapunov_spectrum
from rnnlab.theory import (
    forget_gate_rate,
    gate_exponents,
    linear_exponents,
    resting_gradient,
    resting_rate,
    singular_value_bound,
    tanh_gradient,
    tanh_mean_exponent,
    tanh_rate,
    tanh_variance,
)


@pytest.mark.parametrize("bias", [-800.0, -1.0, 0.0, 1.0, 2.0, 5.0, 40.0, 800.0])
def test_forget_gate_rate_is_the_log_of_the_gate(bias):
    with mpmath.workdps(400):
        expected = float(mpmath.log(1 / (1 + mpmath.exp(-mpmath.mpf(bias)))))
    assert forget_gate_rate(bias) == pytest.approx(expected, rel=1e-14, abs=0)


@pytest.mark.parametrize(
    ("gain", "rate", "mean"), [(1.5, 0.0652, None), (2, 0.1547, -1.149), (3, 0.3103, -2.273), (5, 0.5324, None)]
)
def test_published_exponents(gain, rate, mean):
    assert tanh_rate(gain) == pytest.approx(rate, abs=1e-4)  # the last digit; 0.3103 is 0.31025
    if mean is not None:
        assert tanh_mean_exponent(gain) == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize(("gain", "variance"), [(0.5, 1e-6), (1.0, 0.3), (1.5, 0.0), (2.0, 4.0), (20.0, 0.0)])
def test_gaussian_means_equal_those_of_mpmath(gain, variance):
    q = tanh_variance(gain, variance)

    def mean(function):
        bounds = [-12, -3, -1, 0, 1, 3, 12]
        return mpmath.quad(lambda z: function(mpmath.sqrt(q) * z) * mpmath.npdf(z), bounds)

    squares, slopes = mean(lambda a: mpmath.tanh(a) ** 2), mean(lambda a: mpmath.sech(a) ** 4)
    # Means are good to 1e-15 on both sides, their logarithms and the root q to some ten times that; mpmath's, with 15
    # digits, are taken in six pieces.
    assert gain**2 * squares + variance == pytest.approx(q, rel=1e-12)
    assert tanh_rate(gain, variance) == pytest.approx(float(mpmath.log(gain**2 * slopes) / 2), rel=1e-11)
    log_slope = mean(lambda a: -2 * mpmath.log(mpmath.cosh(a)))
    assert tanh_mean_exponent(gain, variance) == pytest.approx(float(math.log(gain) - 0.5 + log_slope), rel=1e-12)


@pytest.mark.parametrize("gain", [2.0, 3.0])
def test_mean_exponent_is_the_log_determinant_of_large_networks(gain):
    """(1/N) ⟨ln |det diag(tanh') W|⟩ of four networks of 1,024 units; 0.02 is asked for."""
    means = []
    for seed in range(4):
        net = rnnlab.RNN(1, 1024, dtype="float64", seed=0)
        net.initialise("gaussian", "zeros", gain=gain, seed=seed)
        start = np.random.default_rng(seed).normal(size=(1, 4, 1024))
        weight = net.params["weight_hh_l0"]
        a = net.forward(np.zeros((60, 4, 1)), start).h[0][20:-1] @ weight.T
        slope = 2 * (math.log(2) - np.logaddexp(a, -a)).mean()
        means.append(np.linalg.slogdet(weight)[1] / 1024 + slope)
    assert np.mean(means) == pytest.approx(tanh_mean_exponent(gain), abs=0.02)


def test_networks_at_rest_are_linear():
    for gain in (0.3, 1.0):
        assert tanh_variance(gain) == 0
        assert tanh_rate(gain) == pytest.approx(math.log(gain), abs=1e-15)
    np.testing.assert_allclose(resting_gradient("rnn_tanh", 0.9, 50), np.arange(51) * math.log(0.9), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        resting_gradient("gru", 0.0, 50, 1.0), np.arange(51) * forget_gate_rate(1.0), rtol=0, atol=1e-12
    )
    assert tanh_rate(0.0, 1.0) == tanh_mean_exponent(0.0, 1.0) == -math.inf


@pytest.mark.parametrize(("gain", "variance"), [(0.8, 1.0), (2.0, 0.5)])
def test_curve_of_noise_is_the_steady_rate(gain, variance):
    """A curve over 4,000 units averages 40 × 4,000 slopes: their sd of about 0.5 leaves 1e-3 of the rate."""
    fields = np.random.default_rng(0).normal(0, math.sqrt(variance), (60, 4000))
    curve = tanh_gradient(gain, fields)
    assert len(curve) == 61
    assert curve[-1] == 0
    assert (curve[20] - curve[60]) / 40 == pytest.approx(tanh_rate(gain, variance), abs=5e-3)


def measured(net, x, seeds, quantity="h", **weights):
    """The median over networks and sequences of ln ‖dL/dh_t‖ − ln ‖dL/dh_T‖, loss at the last step."""
    model, curves = rnnlab.SequenceModel(net, 4, "many_to_one", "mse", seed=0), []
    for seed in seeds:
        net.initialise(**weights, seed=seed)
        targets = np.random.default_rng(seed).normal(size=(x.shape[1], 4)).astype(net.dtype)
        norms = getattr(rnnlab.gradient_flow(model, x, targets), quantity)[0]
        curves.append(norms - norms[-1])
    return np.median(np.concatenate(curves, axis=1), axis=1)


@pytest.mark.parametrize(("recurrent", "gain"), [("gaussian", 1.5), ("orthogonal", 1.0)])
def test_curve_of_a_correlated_input_is_that_of_measured_gradients(recurrent, gain):
    """One input for all units, a slow wave.

    A step scatters by about 1/√300, 60 of them by √60 times that, and the mean of ten networks by 0.14.
    """
    wave = 15 * np.sin(np.arange(60) / 4)[:, None, None].astype(np.float32)
    less = []
    for seed in range(10):
        net = rnnlab.RNN(1, 300, seed=0)
        curve = measured(net, wave, [seed], recurrent=recurrent, input="glorot", gain=gain)
        expected = tanh_gradient(gain, wave[:, 0] @ net.params["weight_ih_l0"].T)
        assert expected[0] < -4
        less.append(curve - expected)
    np.testing.assert_allclose(np.mean(less, axis=0), np.zeros(61), rtol=0, atol=0.42)


@pytest.mark.parametrize("recurrent", ["gaussian", "orthogonal"])
@pytest.mark.parametrize(("cell", "gain", "bias"), [("lstm", 1.5, 0.0), ("lstm", 0.6, 2.0), ("gru", 1.2, 0.0)])
def test_gated_cells_at_rest_decay_as_their_curve(cell, gain, bias, recurrent):
    """300 units leave about 1/√300 of what each power of W adds: 0.05 is found up to lag 12, later more."""
    net = rnnlab.Recurrent(cell, 1, 300, dtype="float64", seed=0)
    x = np.zeros((21, 1, 1))
    weights = {"recurrent": recurrent, "input": "zeros", "bias": "zeros", "gain": gain, "forget_bias": bias}
    curve = measured(net, x, range(5), "c" if cell == "lstm" else "h", **weights)[::-1]
    expected = resting_gradient(cell, gain, 21, bias)
    np.testing.assert_allclose(curve[:13], expected[:13], rtol=0, atol=0.1)
    assert expected[21] - expected[20] == pytest.approx(resting_rate(cell, gain, bias), abs=0.02)  # −1/(4·lag) is left


def test_resting_rate_is_the_largest_lyapunov_exponent():
    """Of 96 eigenvalues on a circle one lies within 2π/96 of its rightmost point, where the modulus is 1e-3 less."""
    for cell in ("rnn_tanh", "lstm", "lstm_coupled", "gru", "gru_reset_before"):
        net = rnnlab.Recurrent(cell, 1, 96, dtype="float64", seed=0)
        bias = {} if cell == "rnn_tanh" else {"forget_bias": 1.0}
        net.initialise("orthogonal", "zeros", "zeros", gain=0.9, **bias, seed=1)
        rest = np.zeros((1, 1, 96))
        state = (rest, rest) if len(net.cell.states) == 2 else rest
        spectrum = lyapunov_spectrum(net, steps=200, transient=200, exponents=1, state=state)
        assert spectrum.exponents[0] == pytest.approx(resting_rate(cell, 0.9, 1.0), abs=5e-3)


def test_gradients_stay_below_the_bound_of_the_largest_singular_value():
    net = rnnlab.RNN(2, 32, dtype="float64", seed=0)
    x = 0.1 * np.random.default_rng(0).normal(size=(40, 3, 2))
    curve = measured(net, x, [0], recurrent="gaussian", gain=0.9)
    bound = singular_value_bound(net.params["weight_hh_l0"])
    assert math.log(0.9) < bound < math.log(1.8)  # above the spectral radius, below its limit 2g for large N
    assert (-np.diff(curve) <= bound).all()
    assert singular_value_bound(np.diag([2.0, 3.0]), 0.25) == pytest.approx(math.log(0.75))
    assert singular_value_bound(np.zeros((2, 2))) == -math.inf


def test_linear_exponents_are_those_of_the_eigenvalues():
    weight = np.array([[0.5, 7, 1], [0, 0, 3], [0, 0, -2]])
    np.testing.assert_allclose(linear_exponents(weight)[:2], np.log([2, 0.5]), rtol=1e-12)
    assert linear_exponents(weight)[2] == -np.inf
    rotation = 0.3 * np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0]
    np.testing.assert_allclose(linear_exponents(rotation), np.full(9, math.log(0.3)), rtol=1e-12)


def test_rate_of_a_vanishing_gain_is_its_logarithm():
    assert tanh_rate(1e-170) == pytest.approx(-170 * math.log(10), rel=1e-15)  # whose square underflows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tanh_rate(-1.0), "gain must be a finite number"),
        (lambda: tanh_rate(1.0, math.inf), "input_variance must be a finite number"),
        (lambda: resting_rate("rnn_relu", 1.0), "cell must be one of rnn_tanh, lstm"),
        (lambda: resting_gradient("gru", 1.0, 0), "lags must be an integer of at least 1"),
        (lambda: gate_exponents(rnnlab.RNN(1, 2), np.zeros((3, 1, 1))), "the cell of net must be one of lstm"),
        (lambda: gate_exponents(rnnlab.LSTM(1, 2, 2), np.zeros((3, 1, 1))), "net must have one layer"),
        (lambda: singular_value_bound(np.eye(2), -1.0), "slope"),
        (lambda: singular_value_bound(np.ones(3)), r"weight must have shape \(rows, columns\)"),
        (lambda: linear_exponents(np.full((2, 2), np.nan)), "weight must be finite"),
        (lambda: linear_exponents(np.ones((2, 3))), r"weight must be square, got shape \(2, 3\)"),
        (lambda: tanh_gradient(1.0, np.full((3, 2), np.nan)), "fields must be finite"),
        (lambda: tanh_gradient(1.0, np.zeros((3, 2)), mean_square=-1), "mean_square must be a finite number"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
