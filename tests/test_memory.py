"""Paths, gates and survival against the textbook's own steps, closed forms and explicit Jacobians."""

import math

import naive
import numpy as np
import pytest
from conftest import random_network

import rnnlab
from rnnlab.memory import gate_statistics, gates, memory_path, survival

#: Logarithms, and shares around 1, of numbers that agree to a few hundred roundings of 1e-16.
ABSOLUTE = 1e-11


def random_model(cell, layers=1, bidirectional=False, topology="many_to_one"):
    net, params = random_network(cell, 3, 4, layers, bidirectional=bidirectional, seed=3)
    return rnnlab.SequenceModel(net, 2, topology, "mse", seed=2), params


@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_path_along_the_memory_is_bptt_without_the_recurrent_weights(cell):
    """The textbook's own step_backward with W_hh = 0, in an order of its own: cut in every step, and not in any."""
    model, params = random_model(cell)
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(6, 3, 3)), rng.normal(size=(3, 2))
    found = memory_path(model, x, targets)
    trace = naive.forward(cell, params, x)
    W, b = model.params["readout.weight"], model.params["readout.bias"]
    whole = np.zeros((naive.CELLS[cell].states, 3, 4))
    whole[0] = (trace.h[0][6] @ W.T + b - targets) @ W
    alone = whole.copy()
    weights = naive.layer_params(params, 0, 1)
    cut = weights | {"weight_hh": np.zeros_like(weights["weight_hh"])}
    for slot in range(6, -1, -1):
        if slot:  # the total derivative by c counts h of the same step
            _, whole_old, whole, _ = naive.CELLS[cell].step_backward(weights, *trace.saved[0][slot - 1], *whole)
            _, alone_old, alone, _ = naive.CELLS[cell].step_backward(cut, *trace.saved[0][slot - 1], *alone)
        total, part = np.linalg.norm(whole[-1], axis=1), np.linalg.norm(alone[-1], axis=1)
        np.testing.assert_allclose(found.total[0][slot], np.log(total), rtol=0, atol=ABSOLUTE)
        np.testing.assert_allclose(np.exp(found.alone[0][slot]), part, rtol=ABSOLUTE)
        shares = (whole[-1] * alone[-1]).sum(axis=1) / total**2
        np.testing.assert_allclose(found.shares[0][slot], shares, rtol=0, atol=ABSOLUTE)
        np.testing.assert_array_equal(found.by_lag()[:, 6 - slot], found.shares[0][slot])
        whole, alone = (whole_old, alone_old) if slot else (whole, alone)


def test_everything_travels_along_a_memory_without_recurrent_weights():
    for cell, share in (("lstm", 1.0), ("gru", 1.0), ("rnn_tanh", 0.0)):
        net = rnnlab.Recurrent(cell, 3, 4, dtype="float64", seed=0)
        net.initialise("zeros" if share else "orthogonal", "glorot", "zeros", seed=0)
        model = rnnlab.SequenceModel(net, 1, "many_to_one", "mse", seed=0)
        rng = np.random.default_rng(0)
        shares = memory_path(model, rng.normal(size=(5, 2, 3)), rng.normal(size=(2, 1)), lengths=[5, 3]).by_lag()
        assert shares[0, 1:] == pytest.approx([share] * 5, abs=1e-14)
        assert np.isnan(shares[1, 4:]).all()
        assert shares[:, 0] == pytest.approx([1, 1], abs=1e-14)  # the loss itself is at lag 0


def test_paths_of_stacked_and_bidirectional_networks():
    """In the last layer a loss at every step enters directly; in every layer totals are those of gradient_flow."""
    model, _ = random_model("lstm", 2, True, "many_to_many")
    rng = np.random.default_rng(0)
    arguments = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2, 2)), "every"
    found, flow = memory_path(model, *arguments), rnnlab.gradient_flow(model, *arguments)
    for k in range(4):
        np.testing.assert_array_equal(found.total[k], flow.c[k])
        assert found.shares[k][5] == pytest.approx([1, 1], abs=1e-14)  # a sum of a few terms


@pytest.mark.parametrize("cell", [name for name in rnnlab.CELLS if "rnn" not in name])
def test_gates_are_those_of_the_textbook(cell):
    net, params = random_network(cell, 3, 4, 2, bidirectional=True, seed=1)
    x, lengths = np.random.default_rng(0).normal(size=(5, 3, 3)), [5, 2, 4]
    every = gates(net, x, lengths=lengths)
    oracle = naive.forward(cell, params, x, lengths=lengths, num_layers=2, bidirectional=True)
    # Where the textbook keeps the pre-activation of each gate.
    place = {
        "lstm": {"i": 3, "f": 4, "o": 6},
        "lstm_peephole": {"i": 3, "f": 4, "o": 6},
        "lstm_no_forget": {"i": 2, "o": 4},
        "lstm_coupled": {"f": 3, "o": 5},
        "gru": {"r": 2, "z": 3},
        "gru_reset_before": {"r": 2, "z": 3},
    }[cell]
    assert len(every) == 4
    for k, found in enumerate(every):
        assert list(found) == list(place)
        for gate, at in place.items():
            for s in range(5):
                rows, _ = naive.running(oracle.lengths, s, reverse=False)
                np.testing.assert_allclose(found[gate][s, rows], oracle.saved[k][s][at], rtol=0, atol=ABSOLUTE)
                assert np.isnan(np.delete(found[gate][s], rows, axis=0)).all()


def test_statistics_of_gates_with_known_values():
    """Weights of zero hold every gate at its bias; one unit of four is saturated open, one closed."""
    net = rnnlab.LSTM(1, 4, dtype="float64", seed=0)
    net.initialise("zeros", "zeros", "zeros")
    bias = np.array([0.0, 2.0, 5.0, -5.0])
    net.params["bias_ih_l0"][4:8] = bias
    frame = gate_statistics(net, np.zeros((3, 2, 1)))
    forget = frame[frame["gate"] == "f"]
    expected = 1 / (1 + np.exp(-bias))
    for quantile in ("low", "median", "high"):
        np.testing.assert_allclose(forget[quantile], expected, rtol=1e-14)
    assert forget["open"].tolist() == [0, 0, 1, 0]  # σ'(5) = 0.0066, σ'(2) = 0.10
    assert forget["closed"].tolist() == [0, 0, 0, 1]
    # The number of steps of gradients.md, oracle 7.
    np.testing.assert_allclose(forget["time_scale_steps"], [1.44, 7.88, 149, 0.1997], rtol=2e-3)
    assert frame[frame["gate"] != "f"]["time_scale_steps"].isna().all()
    assert len(frame) == 3 * 4


def test_a_cell_without_gates_is_refused():
    net = rnnlab.RNN(1, 4)
    with pytest.raises(ValueError, match="net must have a cell with gates, got rnn_tanh"):
        gates(net, np.zeros((3, 2, 1), np.float32))


@pytest.mark.parametrize("cell", rnnlab.CELLS)
def test_survival_of_one_unit_is_the_product_of_jacobians(cell):
    """With H = 1 the only direction is ±1 and nothing is left to chance."""
    net, _ = random_network(cell, 3, 1, scale=0.8, seed=5)
    x = np.random.default_rng(1).normal(size=(4, 2, 3))
    trace, (found,) = net.forward(x), survival(net, x, probes=1, seed=0)
    product = np.eye(len(net.cell.states)) + np.zeros((2, 1, 1))
    for t in range(3, -1, -1):
        product = product @ net.jacobian(trace, t)
    for p, perturbed in enumerate(net.cell.states):
        for s, seen in enumerate(net.cell.states):
            np.testing.assert_allclose(np.exp(found[perturbed, seen][:, 4]), np.abs(product[:, s, p]), rtol=1e-12)


def test_survival_is_the_mean_over_directions():
    """From 4,000 probes: the squares vary by less than 1.5 times their mean, which is ±0.024, and the ln halves it."""
    net, _ = random_network("lstm", 3, 5, seed=5)
    x = np.random.default_rng(1).normal(size=(3, 1, 3))
    trace, (found,) = net.forward(x), survival(net, x, probes=4000, seed=0)
    J = net.jacobian(trace, 2) @ net.jacobian(trace, 1) @ net.jacobian(trace, 0)
    for (perturbed, seen), norms in found.items():
        block = J[0].reshape(2, 5, 2, 5)["hc".index(seen), :, "hc".index(perturbed)]
        assert norms[0, 3] == pytest.approx(math.log(np.linalg.norm(block) / math.sqrt(5)), abs=0.03)


def test_a_perturbation_of_an_open_memory_survives_in_float32():
    """W = 0 and f = σ(0) = ½: ln 2 a step over 300 steps, and nothing ever reaches c from h."""
    net = rnnlab.LSTM(1, 8, seed=0)
    net.initialise("zeros", "zeros", "zeros")
    (found,) = survival(net, np.zeros((300, 2, 1), np.float32), lengths=[300, 40], seed=0)
    assert np.isnan(found["c", "c"][1, 41:]).all()
    # A half is exact: what is left are the roundings of norms in float32.
    np.testing.assert_allclose(found["c", "c"][0], -math.log(2) * np.arange(301), rtol=1e-6, atol=1e-6)
    assert np.isneginf(found["h", "c"][0, 1:]).all()
