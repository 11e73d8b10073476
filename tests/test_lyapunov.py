"""Lyapunov spectra against closed forms, products of Jacobians from the adjoint, and mpmath."""

import math

import mpmath
import naive
import numpy as np
import pandas as pd
import pytest
from conftest import as_state, parts_of, random_network, random_state

import rnnlab
from rnnlab.checks import generator
from rnnlab.lyapunov import _dimension, _entropy, lyapunov_spectrum
from rnnlab.theory import gate_exponents, linear_exponents, tanh_mean_exponent, tanh_rate
from studies import lyapunov

#: float64 against another way to the same product of some hundred Jacobians: logarithms of volumes that each QR leaves
#: with a relative error of about 1e-14, more where rows nearly cancel. Found: 4e-13.
TOLERANCE = 1e-10


def start(count, size, seed=0):
    """The tangent vectors with which `lyapunov_spectrum` starts, before they are orthonormal."""
    return generator(seed, "tangents").normal(size=(count, size)).T


def whole_jacobian(net, x_t, state):
    """∂(all states)/∂(all states) of one step, (L·S·H, L·S·H), by BPTT of all unit cotangents at once, and the state.

    States are stacked layer by layer, [h; c] within a layer, as `lyapunov_spectrum` stacks its tangent vectors.
    """
    L, S, H = net.num_layers, len(net.cell.states), net.hidden_size
    many = as_state(np.repeat(part, L * S * H, axis=1) for part in parts_of(state))
    trace = net.forward(np.repeat(x_t[None], L * S * H, axis=1), many)
    unit = np.eye(L * S * H).reshape(L * S * H, L, S, H).transpose(2, 1, 0, 3)
    rows = net.backward(trace, np.zeros_like(trace.output), as_state(np.ascontiguousarray(unit))).state
    J = np.stack(parts_of(rows)).transpose(2, 1, 0, 3).reshape(L * S * H, L * S * H)
    return J, as_state(part[:, :1].copy() for part in parts_of(trace.final))


def exponents_of(jacobians, frame):
    """(1/T) ln |diag R|, R the product of those of QR decompositions step by step, descending."""
    total = -np.log(np.abs(np.diagonal(np.linalg.qr(frame)[1])))
    for J in [np.eye(len(frame)), *jacobians]:
        frame, r = np.linalg.qr(J @ frame)
        total += np.log(np.abs(np.diagonal(r)))
    return np.sort(total / len(jacobians))[::-1]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_spectrum_is_that_of_the_whole_networks_jacobians(cell, layers):
    net, _ = random_network(cell, 2, 3, layers, scale=0.8)
    rng = np.random.default_rng(1)
    x, state = rng.normal(size=(20, 1, 2)), random_state(rng, net, 1)
    spectrum = lyapunov_spectrum(net, x, steps=20, transient=0, interval=1, state=state)
    jacobians, now = [], state
    for x_t in x:
        J, now = whole_jacobian(net, x_t, now)
        jacobians.append(J)
    if cell == "rnn_relu":  # a dead unit: J is singular, and the count of exponents is what its rank leaves
        alive = min(np.linalg.matrix_rank(J) for J in jacobians)
        assert np.isfinite(spectrum.exponents).sum() == alive < len(spectrum.exponents)
        return
    expected = exponents_of(jacobians, start(len(J), len(J)))
    np.testing.assert_allclose(spectrum.exponents, expected, rtol=0, atol=TOLERANCE)


def test_driven_lstm_equals_the_product_of_jacobians_in_mpmath():
    """200 steps: one QR, in 600 digits, of the explicit product of the Jacobians that the textbook gives."""
    net, params = random_network("lstm", 2, 4, scale=1.0)
    rng = np.random.default_rng(2)
    x, state = rng.normal(size=(200, 1, 2)), random_state(rng, net, 1)
    trace = naive.forward("lstm", params, x, state)
    one = {name.removesuffix("_l0"): value for name, value in params.items()}
    with mpmath.workdps(600):
        product = first = mpmath.matrix(start(8, 8).tolist())
        for t in range(200):
            product = mpmath.matrix(naive.jacobian("lstm", one, x[t, 0], trace.h[0][t, 0], trace.c[0][t, 0])) * product
        whole, begin = mpmath.qr(product)[1], mpmath.qr(first)[1]
        expected = [float(mpmath.log(abs(whole[i, i] / begin[i, i])) / 200) for i in range(8)]
    for interval in (1, 5, None):
        spectrum = lyapunov_spectrum(net, x, steps=200, transient=0, interval=interval, state=state)
        np.testing.assert_allclose(spectrum.exponents, sorted(expected, reverse=True), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cell", ["lstm", "lstm_coupled", "gru", "gru_reset_before"])
@pytest.mark.parametrize("drive", [0.0, 0.5])
def test_without_recurrent_weights_the_gates_are_the_spectrum(cell, drive):
    """⟨ln σ(a_f)⟩, of an update gate ⟨ln z⟩, for every unit; −∞ for what of the state only reads c.

    From rest or over whole periods of the input, so that h, which is part of the state, is at the end what it was.
    """
    net = rnnlab.Recurrent(cell, 1, 4, dtype="float64", seed=0)
    net.initialise("zeros", "zeros", "zeros")
    gate = slice(4 * next(k for k, name in enumerate(net.cell.gates) if name in "fz"), None)
    net.params["bias_ih_l0"][gate][:4] = [0, 1, 2, -1 if drive else 5]
    net.params["weight_ih_l0"][...] = drive
    x = np.tile(np.random.default_rng(0).normal(size=(50, 1, 1)), (18, 1, 1))
    rest = as_state(np.zeros((1, 1, 4)) for _ in net.cell.states)
    spectrum = lyapunov_spectrum(net, x, steps=600, transient=300, state=rest)
    # the slowest, e^−0.13 a step, and directions that lie e^0.18 a step apart leave e^−39 of the first 300 steps
    np.testing.assert_allclose(spectrum.exponents, gate_exponents(net, x), rtol=0, atol=TOLERANCE)
    assert np.isneginf(spectrum.exponents[4:]).all()
    assert (spectrum.error[4:] == 0).all()
    if not drive:
        np.testing.assert_allclose(spectrum.exponents[:4], [-0.00672, -0.127, -0.313, -0.693], rtol=2e-3)


def test_fixed_linear_network_has_the_logarithms_of_its_eigenvalues():
    """Positive weights and states keep a relu on its linear side; symmetric, so that no eigenvalue is complex."""
    net = rnnlab.RNN(1, 5, nonlinearity="relu", dtype="float64", seed=0)
    rng = np.random.default_rng(3)
    weight = rng.uniform(0, 1, (5, 5))
    weight = weight + weight.T
    net.initialise("zeros", "zeros", "zeros")
    net.params["weight_hh_l0"] = weight / np.linalg.norm(weight, 2)
    spectrum = lyapunov_spectrum(net, steps=100, transient=400, state=np.ones((1, 1, 5)))
    np.testing.assert_allclose(spectrum.exponents, linear_exponents(net.params["weight_hh_l0"]), rtol=0, atol=TOLERANCE)
    assert spectrum.exponents[0] == pytest.approx(0, abs=TOLERANCE)


@pytest.mark.parametrize("interval", [1, 7, None])
def test_orthogonal_network_near_rest_has_one_exponent(interval):
    """tanh' is 1 to the last bit at 1e-9; every exponent is ln g from the first step on."""
    net = rnnlab.RNN(1, 16, dtype="float64", seed=0)
    net.initialise("orthogonal", "zeros", gain=0.9, seed=1)
    options = {"steps": 50, "transient": 20, "interval": interval, "state": np.full((1, 1, 16), 1e-9)}
    spectrum = lyapunov_spectrum(net, **options)
    np.testing.assert_allclose(spectrum.exponents, np.full(16, math.log(0.9)), rtol=1e-12)
    assert spectrum.dimension == 0
    assert spectrum.entropy == 0
    assert spectrum.error.max() < 1e-13


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_exponents_sum_to_the_mean_log_determinant(cell):
    net, _ = random_network(cell, 2, 12, scale=0.7)
    rng = np.random.default_rng(4)
    x, state = rng.normal(size=(60, 1, 2)), random_state(rng, net, 1)
    trace = net.forward(x, state)
    expected = np.mean([np.linalg.slogdet(net.jacobian(trace, t)[0])[1] for t in range(10, 60)])
    spectrum = lyapunov_spectrum(net, x, steps=50, transient=10, state=state)
    assert spectrum.exponents.sum() == pytest.approx(expected, abs=12 * TOLERANCE)


def test_saturated_units_have_finite_exponents():
    """tanh' = 4e−2a: 3e-19 and 3e-52 beside 1. No double next to 1 shows them, their logarithms are exact."""
    net, params = random_network("rnn_tanh", 1, 6, scale=0.3)
    params["bias_ih_l0"][:2] += [22, 60]
    net.params["bias_ih_l0"] = params["bias_ih_l0"]
    x = np.random.default_rng(5).normal(size=(40, 1, 1))
    trace = net.forward(x)
    a = x[:, 0] @ params["weight_ih_l0"].T + trace.h[0][:-1, 0] @ params["weight_hh_l0"].T
    a += params["bias_ih_l0"] + params["bias_hh_l0"]
    slopes = 2 * (math.log(2) - np.logaddexp(a, -a))
    expected = slopes.sum(axis=1).mean() + np.linalg.slogdet(params["weight_hh_l0"])[1]
    for interval in (1, None, 20):  # 20 is too long for float64 and is halved where it must be
        spectrum = lyapunov_spectrum(net, x, steps=40, transient=0, interval=interval, state=np.zeros((1, 1, 6)))
        assert spectrum.exponents.sum() == pytest.approx(expected, rel=1e-9)
        assert spectrum.exponents[-1] < -100


def test_interval_does_not_matter_even_where_it_is_too_long():
    net, _ = random_network("rnn_tanh", 1, 24, scale=0.5)
    runs = {m: lyapunov_spectrum(net, steps=120, transient=40, interval=m, seed=1) for m in (1, 3, 40, None)}
    spread = np.ptp(runs[1].exponents)
    assert 40 * spread > 37  # which is ln 1/eps: 40 steps at once lose the smallest
    for run in runs.values():
        # a QR after halving may have lost up to 2/3 of the 16 digits
        np.testing.assert_allclose(run.exponents, runs[1].exponents, rtol=0, atol=1e-6)
    assert 1 <= runs[None].interval <= 37 / spread


def test_leading_exponents_are_those_of_the_whole_spectrum():
    net, _ = random_network("lstm", 1, 10, 2, scale=0.6)
    options = {"x": np.random.default_rng(6).normal(size=(150, 1, 1)), "steps": 100, "transient": 50, "interval": 2}
    whole, leading = lyapunov_spectrum(net, **options), lyapunov_spectrum(net, exponents=5, **options)
    assert len(whole.exponents) == 40
    np.testing.assert_allclose(np.sort(leading.exponents), np.sort(whole.exponents[:5]), rtol=0, atol=0.01)


@pytest.mark.parametrize("gain", [2.0, 3.0])
def test_random_tanh_networks_are_as_mean_field_says(gain):
    """Four networks of 96 units, small enough for BLAS to stay in one thread: each is off by about 2/96."""
    largest = []
    for seed in range(4):
        net = rnnlab.RNN(1, 96, dtype="float64", seed=0)
        net.initialise("gaussian", "zeros", gain=gain, seed=seed)
        largest.append(lyapunov_spectrum(net, steps=1000, transient=100, exponents=1, seed=seed).exponents[0])
    assert np.mean(largest) == pytest.approx(tanh_rate(gain), abs=0.03)
    whole = lyapunov_spectrum(net, steps=40, transient=40)
    positive = whole.exponents > 0
    assert positive.sum() < whole.dimension < 96
    assert whole.entropy == pytest.approx(whole.exponents[positive].sum())


def test_dimension_and_entropy():
    lorenz = np.array([0.906, 0.0, -14.572])  # Sprott (2003), whose dimension is 2.062
    assert _dimension(lorenz, 3) == pytest.approx(2.062, abs=1e-3)
    assert _entropy(lorenz, 3) == 0.906
    assert _dimension(np.array([0.5, -np.inf, -np.inf]), 3) == 1
    assert _dimension(np.array([-0.1, -0.2]), 2) == 0
    assert _dimension(np.array([0.2, 0.1]), 2) == 2
    assert math.isnan(_dimension(np.array([0.2, 0.1]), 3))
    assert math.isnan(_entropy(np.array([0.2, 0.1]), 3))
    assert _entropy(np.array([0.2, -0.1]), 3) == 0.2


def test_error_is_half_the_difference_of_the_halves():
    net, _ = random_network("gru", 1, 4, scale=0.5)
    x = np.random.default_rng(7).normal(size=(40, 1, 1))
    whole = lyapunov_spectrum(net, x, steps=40, transient=0, interval=1, exponents=1, state=np.zeros((1, 1, 4)))
    first = lyapunov_spectrum(net, x, steps=20, transient=0, interval=1, exponents=1, state=np.zeros((1, 1, 4)))
    # the mean is between the halves, as far from either as their half difference
    assert whole.error[0] == pytest.approx(abs(first.exponents[0] - whole.exponents[0]), rel=1e-9)
    frame = whole.to_frame()
    assert frame.columns.tolist() == ["index", "exponent_nats_per_step", "error_nats_per_step"]
    assert frame["exponent_nats_per_step"].item() == whole.exponents[0]


def test_diverging_network_is_named():
    net = rnnlab.RNN(1, 8, nonlinearity="relu", dtype="float32", seed=0)
    net.initialise("identity", "zeros", gain=3.0)
    with pytest.raises(ValueError, match=r"net must have finite states, those of Rec.* overflow within 128"):
        lyapunov_spectrum(net, steps=500, transient=10, state=np.ones((1, 1, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"transient": -1}, ValueError, "transient must be an integer of at least 0, got -1"),
        ({"interval": 0}, ValueError, "interval"),
        ({"exponents": 5}, ValueError, "exponents must be at most the size of the state, 4, got 5"),
        ({"x": np.zeros((9, 1, 2))}, ValueError, r"x must have at least transient \+ steps = 15 steps, got 9"),
        ({"x": np.zeros((15, 2, 2))}, ValueError, r"x must have shape \(T, 1, 2\)"),
        ({"x": np.zeros((15, 1, 2), np.float32)}, TypeError, "x must have dtype float64"),
        ({"x": np.full((15, 1, 2), np.nan)}, ValueError, "x must be finite"),
        ({"state": np.zeros((1, 2, 4))}, ValueError, r"state must have shape \(1, 1, 4\)"),
        ({"seed": -1}, ValueError, "seed"),
        ({"net": rnnlab.GRU(2, 4, bidirectional=True)}, ValueError, "net must run in one direction"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"net": rnnlab.GRU(2, 4, dtype="float64", seed=0), "steps": 10, "transient": 5} | change
    with pytest.raises(error, match=message):
        lyapunov_spectrum(**arguments)


# The study ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame():
    rows = []
    for point in lyapunov.grid(quick=True):
        small = point | {"hidden_size": 8, "steps": 30, "transient": 10, "seed": 0, "device": "cpu", "dtype": "float32"}
        if point["hidden_size"] != 64:
            rows += [small | row for row in lyapunov.run(small)]
    return pd.DataFrame(rows)


def test_study_covers_gains_cells_biases_and_inputs(frame):
    spectra = frame[frame["kind"] == "spectrum"].groupby(["cell", "gain", "forget_bias", "input"], dropna=False)
    assert spectra.ngroups == 4 + 2 * 4 * 2
    assert (spectra.size() == spectra["cell"].first().map({"rnn_tanh": 8, "gru": 8, "lstm": 16})).all()
    assert (frame["lowest"] <= frame["nats_per_step"]).all()
    assert (frame["nats_per_step"] <= frame["highest"]).all()
    theory = frame[frame["kind"] == "mean less theory"].set_index("gain")["theory_nats_per_step"]
    assert theory.to_dict() == {gain: tanh_mean_exponent(gain) for gain in lyapunov.GAINS}


def test_study_measures_each_network_on_its_own():
    point = {"cell": "rnn_tanh", "gain": 2.0, "forget_bias": None, "input": None, "hidden_size": 8, "steps": 30}
    point |= {"exponents": None, "transient": 10, "networks": 2, "seed": 3, "dtype": "float64"}
    rows = {row["kind"]: row for row in reversed(lyapunov.run(point))}  # the first spectrum row is the largest exponent
    largest = [lyapunov.random(point, seed)[0] for seed in (3000, 3001)]
    assert rows["spectrum"]["nats_per_step"] == pytest.approx(np.mean(largest), rel=1e-12)
    assert rows["spectrum"]["lowest"] == min(largest) < max(largest) == rows["spectrum"]["highest"]
    assert rows["largest less theory"]["lowest"] == pytest.approx(min(largest) - tanh_rate(2.0), rel=1e-12)


def test_study_draws_spectra_and_what_theory_leaves(frame):
    figure = lyapunov.plot(frame)
    assert [len(ax.get_lines()) > 3 for ax in figure.axes] == [True] * 4
    assert all("nats per step" in ax.get_ylabel() for ax in figure.axes)
    assert "2 untrained networks" in figure.get_supxlabel()
