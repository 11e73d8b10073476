"""The (t, k) matrix against one textbook BPTT a loss step, whose every contribution is formed."""

import math

import naive
import numpy as np
import pytest
from conftest import TOLERANCE, random_network, relative_error

import rnnlab
from rnnlab import kernels
from rnnlab.contributions import contribution_matrix


def random_model(cell, *, hidden_size=5, layers=1, dtype="float64", scale=0.5, topology="many_to_many", bias=True):
    net, _ = random_network(cell, 3, hidden_size, layers, dtype=dtype, scale=scale, bias=bias, seed=4)
    return rnnlab.SequenceModel(net, 2, topology, "mse", seed=2)


def random_data(model, steps, batch, every=True):
    rng = np.random.default_rng(7)
    targets = rng.normal(size=(steps, batch, 2) if every else (batch, 2))
    return rng.normal(size=(steps, batch, 3)).astype(model.rnn.dtype), targets.astype(model.rnn.dtype)


def slow(model, x, targets, lengths):
    """Every C[t, k] of the last layer, by the name of its parameter: (T, T, …), of the mean squared error."""
    net, T = model.rnn, len(x)
    params = {name: values.astype(np.float64) for name, values in net.params.items()}
    trace = naive.forward(net.cell.name, params, x, lengths=lengths, num_layers=net.num_layers)
    last = net.num_layers - 1
    weights = naive.layer_params(params, last, 1)
    W, b = (model.params[f"readout.{name}"].astype(np.float64) for name in ("weight", "bias"))
    scored = np.arange(T)[:, None] < trace.lengths
    d_output = (trace.output @ W.T + b - targets) @ W * scored[..., None] / scored.sum()  # 2 outputs: 2 / 2
    found = {f"{name}_l{last}": np.zeros((T, T, *values.shape)) for name, values in weights.items()}
    for t in range(T):
        d_state = np.zeros((naive.CELLS[net.cell.name].states, *trace.h[last].shape[1:]))
        d_state[0] = d_output[t]
        for k in range(t, -1, -1):
            rows, _ = naive.running(trace.lengths, k, reverse=False)
            step_backward = naive.CELLS[net.cell.name].step_backward
            _, d_old, _, grads = step_backward(weights, *trace.saved[last][k], *d_state[:, rows])
            d_state[:, rows] = d_old
            for name in weights:
                found[f"{name}_l{last}"][t, k] = grads[name]
    return found


def assert_equals_textbook(model, x, targets, lengths=None, tolerance=TOLERANCE):
    expected = slow(model, x, targets, lengths)
    got = contribution_matrix(model, x, targets, lengths=lengths)
    gradients = model.loss_and_gradients(x, targets, lengths).params
    squares = dots = 0
    for name, every in expected.items():
        total = every.sum(axis=(0, 1))
        # What the oracle adds up is dL/dW: eq. 3–5 of Pascanu, Mikolov & Bengio (2013).
        assert relative_error(gradients[f"rnn.{name}"], total) < tolerance
        axes = tuple(range(2, every.ndim))
        norms, dot = np.sqrt(np.square(every).sum(axis=axes)), (every * total).sum(axis=axes)
        assert relative_error(np.exp(got.log_norms[name]), norms) < tolerance
        assert relative_error(got.shares[name] * np.square(total).sum(), dot) < tolerance
        # Every entry to its own precision, however small.
        np.testing.assert_allclose(np.exp(got.log_norms[name]), norms, rtol=tolerance * 1e3)
        squares, dots = squares + norms**2, dots + dot
    assert set(got.shares) == {*expected, "all"}
    assert relative_error(np.exp(got.log_norms["all"]), np.sqrt(squares)) < tolerance
    assert relative_error(got.shares["all"] * dots.sum(), dots) < tolerance
    for share in got.shares.values():
        assert share.sum() == pytest.approx(1, abs=100 * tolerance)
        assert (share[np.triu_indices(len(x), 1)] == 0).all()


@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_every_contribution_is_that_of_the_textbook(cell):
    model = random_model(cell)
    assert_equals_textbook(model, *random_data(model, 6, 3), lengths=[6, 2, 5])


@pytest.mark.parametrize("cell", ["lstm_peephole", "gru", "gru_reset_before"])
def test_many_loss_steps_units_and_sequences(cell):
    """More loss steps than go back together, more units than a vector has, more sequences than units."""
    model = random_model(cell, hidden_size=21, scale=0.2)
    assert_equals_textbook(model, *random_data(model, 20, 23))


def test_last_layer_of_a_stack_without_biases():
    model = random_model("lstm", layers=2, bias=False)
    assert_equals_textbook(model, *random_data(model, 5, 2))


def test_float32():
    """An adjoint sums 20 products a step over 8 steps, each rounded to 6e-8: 1e-5 if all err one way. Found: 2e-7."""
    model = random_model("lstm", dtype="float32")
    assert_equals_textbook(model, *random_data(model, 8, 3), tolerance=1e-5)


def test_loss_at_the_last_step_has_one_contribution_a_lag():
    model = random_model("gru", topology="many_to_one")
    x, targets = random_data(model, 6, 3, every=False)
    got = contribution_matrix(model, x, targets, "last")
    assert np.isneginf(got.log_norms["all"][:5]).all()
    by_lag = got.by_lag()
    np.testing.assert_array_equal(by_lag["lag_steps"], np.arange(6))
    np.testing.assert_allclose(by_lag["log_norm_nats"], got.log_norms["all"][5, ::-1], rtol=1e-14)
    np.testing.assert_array_equal(by_lag["share"], got.shares["all"][5, ::-1])
    # Truncated BPTT over three steps leaves out exactly what lags of 3 and more contribute.
    gradients = model.loss_and_gradients(x, targets).params
    state = model.rnn.forward(x[:3]).final
    short = model.loss_and_gradients(x[3:], targets, state=state).params
    kept = sum((short[name] * gradients[name]).sum() for name in gradients if name.startswith("rnn"))
    whole = sum(np.square(gradients[name]).sum() for name in gradients if name.startswith("rnn"))
    assert by_lag["share"][:3].sum() == pytest.approx(kept / whole, rel=1e-12)


def test_lags_add_up_by_energy_and_by_share():
    model = random_model("lstm")
    got = contribution_matrix(model, *random_data(model, 5, 2))
    by_lag = got.by_lag("weight_hh_l0")
    energy = np.exp(2 * got.log_norms["weight_hh_l0"])
    expected = [sum(energy[t, t - lag] for t in range(lag, 5)) for lag in range(5)]
    np.testing.assert_allclose(np.exp(2 * by_lag["log_norm_nats"]), expected, rtol=1e-13)
    assert by_lag["share"].sum() == pytest.approx(1, abs=1e-13)


def test_long_lags_do_not_underflow_in_float32():
    """A linear network with W_hh = e^−½·Q loses exactly half a nat a lag: e^−200, of which the square is e^−400."""
    steps = 400
    net = rnnlab.RNN(1, 8, nonlinearity="relu", dtype="float32", seed=0)
    net.initialise("identity", "zeros", "zeros", gain=math.exp(-0.5))
    net.params["bias_ih_l0"] = np.ones(8, np.float32)  # keeps every unit on its linear side
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    x, targets = np.zeros((steps, 2, 1), np.float32), np.ones((2, 1), np.float32)
    norms = contribution_matrix(model, x, targets, "last").log_norms["bias_ih_l0"][-1]
    # 400 products, each rounded to 6e-8
    np.testing.assert_allclose(norms[-1] - norms[::-1], 0.5 * np.arange(steps), rtol=0, atol=400 * 6e-8)


def test_threads_change_no_bit():
    model = random_model("lstm", dtype="float32")
    data, before = random_data(model, 300, 2), kernels.threads()
    try:
        results = []
        for count in (1, 3):
            kernels.set_threads(count)
            results.append(contribution_matrix(model, *data))
    finally:
        kernels.set_threads(before)
    for name, norms in results[0].log_norms.items():
        np.testing.assert_array_equal(norms, results[1].log_norms[name])
        np.testing.assert_array_equal(results[0].shares[name], results[1].shares[name])


def test_a_gradient_of_zero_has_no_shares():
    model = random_model("rnn_tanh", topology="many_to_one")
    model.params["readout.weight"][...] = 0
    got = contribution_matrix(model, *random_data(model, 3, 2, every=False), "last")
    assert np.isnan(got.shares["all"]).all()
    assert np.isneginf(got.log_norms["all"]).all()


def test_what_cannot_be_measured_is_refused():
    data = np.zeros((3, 2, 3)), np.zeros((2, 2))
    both = rnnlab.SequenceModel(rnnlab.Recurrent("gru", 3, 4, bidirectional=True, dtype="float64"), 2, loss="mse")
    with pytest.raises(ValueError, match="model must have one direction"):
        contribution_matrix(both, *data, "last")
    with pytest.raises(ValueError, match="many_to_many, got encoder_decoder"):
        contribution_matrix(random_model("gru", topology="encoder_decoder"), *data)
    got = contribution_matrix(random_model("gru", topology="many_to_one"), *data, "last")
    with pytest.raises(ValueError, match=r"parameter must be one of .*, all, got 'weight_hh'"):
        got.by_lag("weight_hh")
    net = rnnlab.RNN(1, 4, nonlinearity="relu", seed=0)
    net.initialise("identity", "zeros", gain=100.0, seed=0)
    model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    with pytest.raises(ValueError, match="overflow float32"):
        contribution_matrix(
            model,
            np.zeros((50, 1, 1), np.float32),
            np.ones((1, 1), np.float32),
            "last",
            state=np.ones((1, 1, 4), np.float32),
        )
