"""Prepared networks: the numbers of `Recurrent`, what is kept from call to call, and what they refuse."""

import copy
import math
import pickle

import numpy as np
import pytest
from conftest import parts_of, random_network, random_state

from rnnlab import CELLS, LSTM, Backpropagation, Inference, SequenceModel, prepared
from rnnlab.kernels import cpu

NETWORKS = pytest.mark.parametrize(("T", "B", "layers", "bidirectional"), [(7, 1, 1, False), (5, 4, 2, True)])


@pytest.mark.parametrize("cell", CELLS)
@NETWORKS
def test_outputs_are_those_of_forward(cell, T, B, layers, bidirectional):
    net, _ = random_network(cell, 3, 21, layers, bidirectional=bidirectional, dtype="float32")
    run, rng, state = Inference(net, T, B), np.random.default_rng(0), None
    for _ in range(3):
        x = rng.normal(size=(T, B, 3)).astype("float32")
        want = net.forward(x, state, keep=False)
        output, state = run(x, state)
        np.testing.assert_array_equal(output, want.output)
        for mine, right in zip(parts_of(state), parts_of(want.final), strict=True):
            np.testing.assert_array_equal(mine, right)


def test_weights_and_earlier_outputs_stay_as_they_were():
    net = LSTM(3, 20, seed=0)
    run, x = Inference(net, 6, 2), np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
    first = run(x)[0]
    before = first.copy()
    net.params.flat[...] *= 2
    np.testing.assert_array_equal(run(x)[0], before)
    run(-x)
    np.testing.assert_array_equal(first, before)
    assert (Inference(net, 6, 2)(x)[0] != before).any()


def test_what_is_kept_does_not_grow_with_the_steps():
    net = LSTM(3, 20, seed=0)
    runs = [Inference(net, steps, 2) for steps in (1000, 2000)]
    short, long = ([array.nbytes for array in run._calls[0].arguments if hasattr(array, "nbytes")] for run in runs)
    assert short == long


def test_bad_arguments_are_named():
    net = LSTM(3, 4, seed=0)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        Inference(net, 0, 2)
    run, x = Inference(net, 6, 2), np.zeros((6, 2, 3), "float32")
    with pytest.raises(ValueError, match=r"x must have shape \(6, 2, 3\).*got \(5, 2, 3\)"):
        run(x[1:])
    with pytest.raises(TypeError, match="x must have dtype float32, got float64"):
        run(x.astype(float))
    with pytest.raises(ValueError, match="x must be finite"):
        run(np.full_like(x, np.nan))
    with pytest.raises(TypeError, match=r"state of lstm must be a tuple \(h, c\)"):
        run(x, random_state(np.random.default_rng(0), net, 2)[0])


@pytest.mark.parametrize("plan", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_states_are_written_and_nothing_behind_them(monkeypatch, cell, plan):
    """Memory full of NaN between canaries: h of every step, of the cell state only the last. In any threads."""
    given = []
    monkeypatch.setattr(cpu, "plan", lambda *_: plan)

    def guarded(shape, dtype):
        memory = np.full(math.prod(shape) + 64, 12345, dtype)
        given.append(memory)
        array = memory[32:-32].reshape(shape)
        array[...] = np.nan
        return array

    net, _ = random_network(cell, 3, 70, dtype="float32")
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(9, 5, 3)).astype(np.float32), random_state(rng, net, 5)
    want = net.forward(x, state)
    run = Inference(net, 9, 5)
    monkeypatch.setattr(prepared, "empty", guarded)
    output, last = run(x, state)
    np.testing.assert_array_equal(output, want.output)
    for got, exact in zip(parts_of(last), parts_of(want.final), strict=True):
        np.testing.assert_array_equal(got, exact)
    for memory in given:
        assert (memory[:32] == 12345).all()
        assert (memory[-32:] == 12345).all()
        assert np.isfinite(memory).all()


# Backpropagation ------------------------------------------------------------------------------------------------------


def assert_same_gradients(net, T, B):
    """Three calls with weights that change, with states and their gradients and without; each goes back twice."""
    run, rng, state, d_final = Backpropagation(net, T, B), np.random.default_rng(0), None, None
    for _ in range(3):
        x, d_output = (rng.normal(size=(T, B, n)).astype(net.dtype) for n in (3, 21 * net.directions))
        trace = net.forward(x, state)
        want = net.backward(trace, d_output, d_final)
        output, last = run.forward(x, state)
        right = [trace.output, *parts_of(trace.final), want.x, want.params.flat, *want.h, *want.c]
        for _ in range(2):
            got = run.backward(d_output, d_final)
            mine = [output, *parts_of(last), got.x, got.params.flat, *got.h, *got.c, *parts_of(got.state)]
            for number, exact in zip(mine, [*right, *parts_of(want.state)], strict=True):
                np.testing.assert_array_equal(number, exact)
        net.params.flat[...] *= 0.5
        state, d_final = last, random_state(rng, net, B)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@NETWORKS
def test_gradients_are_those_of_backward(cell, bias, T, B, layers, bidirectional):
    net, _ = random_network(cell, 3, 21, layers, bidirectional=bidirectional, bias=bias, dtype="float32")
    assert_same_gradients(net, T, B)


@pytest.mark.parametrize("plan", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_many_chunks_and_an_odd_batch(monkeypatch, dtype, plan):
    monkeypatch.setattr(cpu, "plan", lambda *_: plan)
    assert_same_gradients(random_network("lstm", 3, 21, 2, bidirectional=True, dtype=dtype, scale=0.3)[0], 300, 5)


def test_a_gradient_is_written_over_by_the_next():
    net = LSTM(3, 20, seed=0)
    run, x = Backpropagation(net, 6, 2), np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
    output, _ = run.forward(x)
    first = run.backward(np.ones_like(output))
    before = first.params.flat.copy()
    run.forward(-x)
    second = run.backward(np.ones_like(output))
    assert second.params is first.params
    assert (first.params.flat != before).any()


@pytest.mark.parametrize("layers", [1, 2])
def test_results_may_be_given_back(layers):
    """As x, as dL/doutput, as dL/d last state: each lies where the next call writes."""
    net, _ = random_network("gru", 5, 5, layers, dtype="float32")
    run, x = Backpropagation(net, 600, 2), np.random.default_rng(0).normal(size=(600, 2, 5)).astype("float32")
    output, _ = run.forward(x)
    got = run.backward(np.ones_like(output))
    for x, d_output, d_final in ((output, got.x, None), (got.x, got.h[-1][1:], got.h[0][:layers])):
        want = net.backward(net.forward(x.copy()), d_output.copy(), None if d_final is None else d_final.copy())
        run.forward(x)
        got = run.backward(d_output, d_final)
        np.testing.assert_array_equal(got.params.flat, want.params.flat)
        np.testing.assert_array_equal(got.x, want.x)


def test_weights_are_found_where_they_have_moved_to():
    net = LSTM(3, 5, seed=0)
    run, x = Backpropagation(net, 6, 2), np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
    model = SequenceModel(net, 2, seed=0)
    model.params.flat[...] *= 2
    output, _ = run.forward(x)
    trace = net.forward(x)
    np.testing.assert_array_equal(output, trace.output)
    want = net.backward(trace, np.ones_like(output))
    np.testing.assert_array_equal(run.backward(np.ones_like(output)).params.flat, want.params.flat)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_has_results_of_its_own(duplicate):
    net = LSTM(3, 5, seed=0)
    run, x = Backpropagation(net, 6, 2), np.random.default_rng(0).normal(size=(6, 2, 3)).astype("float32")
    ones = np.ones((6, 2, 5), "float32")
    other = duplicate(run)
    run.forward(x)
    other.forward(-x)
    got, want = other.backward(ones), net.backward(net.forward(-x), ones)
    run.backward(ones)
    np.testing.assert_array_equal(got.params.flat, want.params.flat)
    np.testing.assert_array_equal(got.x, want.x)


def test_what_backpropagation_refuses():
    net = LSTM(3, 4, seed=0)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1, got 0"):
        Backpropagation(net, 6, 0)
    elsewhere = LSTM(3, 4)
    elsewhere.device = "cuda"
    for kind in (Backpropagation, Inference):
        with pytest.raises(ValueError, match="net must be on the CPU, got Recurrent"):
            kind(elsewhere, 6, 2)
    run, x, ones = Backpropagation(net, 6, 2), np.zeros((6, 2, 3), "float32"), np.ones((6, 2, 4), "float32")
    with pytest.raises(RuntimeError, match="backward needs a forward pass before it"):
        run.backward(ones)
    with pytest.raises(ValueError, match=r"x must have shape \(6, 2, 3\).*got \(5, 2, 3\)"):
        run.forward(x[1:])
    with pytest.raises(TypeError, match=r"state of lstm must be a tuple \(h, c\)"):
        run.forward(x, np.zeros((1, 2, 4), "float32"))
    output, _ = run.forward(x)
    with pytest.raises(ValueError, match="read-only"):
        output -= 1  # backward reads it
    with pytest.raises(ValueError, match=r"d_output must have shape \(6, 2, 4\).*got \(6, 1, 4\)"):
        run.backward(ones[:, :1])
    with pytest.raises(ValueError, match="d_output must be finite"):
        run.backward(np.full_like(ones, np.inf))
    with pytest.raises(TypeError, match=r"d_final of lstm must be a tuple \(h, c\)"):
        run.backward(ones, np.zeros((1, 2, 4), "float32"))
