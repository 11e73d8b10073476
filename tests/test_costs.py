"""Counts against networks as they are built, against what a run allocates, and by hand."""

import numpy as np
import pytest

import rnnlab
from rnnlab.cells import CELLS
from rnnlab.costs import Shape, arithmetic, memory, parameters, roofline_seconds, traffic

STACKED = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", [{}, STACKED])
def test_parameters_are_those_of_the_network(cell, layout):
    net = rnnlab.Recurrent(cell, 3, 5, **layout)
    assert parameters(Shape(cell, 1, 1, 3, 5, **layout)) == net.params.flat.size
    without = rnnlab.Recurrent(cell, 3, 5, bias=False, **layout)
    assert parameters(Shape(cell, 1, 1, 3, 5, **layout), biases=0) == without.params.flat.size


def test_parameters_by_hand():
    assert parameters(Shape("lstm", 1, 1, 10, 20)) == 4 * 20 * (10 + 20 + 2)
    assert parameters(Shape("lstm", 1, 1, 10, 20), biases=1) == 2480  # Keras: LSTM(20) on 10 inputs
    assert parameters(Shape("gru", 1, 1, 10, 20)) == 1920  # Keras: GRU(20), reset_after
    assert parameters(Shape("lstm_peephole", 1, 1, 10, 20)) == 4 * 20 * 32 + 3 * 20
    ratio = parameters(Shape("gru", 1, 1, 64, 64)) / parameters(Shape("lstm", 1, 1, 64, 64))
    assert ratio == 3 / 4


def test_arithmetic_by_hand():
    shape = Shape("gru", 7, 3, 4, 5, num_layers=2, bidirectional=True)
    forward = 2 * 7 * 3 * 3 * 5 * (2 * (4 + 5) + 2 * (10 + 5))
    assert arithmetic(shape, "forward") == forward
    assert arithmetic(shape, "training") == 3 * forward


def test_traffic_by_hand():
    shape = Shape("rnn_tanh", 7, 3, 4, 5)
    weights = 5 * (4 + 5 + 2)
    assert traffic(shape, "forward") == 4 * (weights + 21 * (4 + 5))
    # x twice and dx; output and dL/doutput; one state and one saved number a unit, written and read
    assert traffic(shape, "training", "float64") == 8 * (3 * weights + 21 * (3 * 4 + 2 * 5) + 2 * 21 * 5 * 2)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_memory_is_what_a_trace_keeps(cell):
    shape = Shape(cell, 11, 3, 4, 16, **STACKED)  # 16: whole registers, none of it padding
    net = rnnlab.Recurrent(cell, 4, 16, dtype="float64", **STACKED)
    trace = net.forward(np.zeros((11, 3, 4)))
    kept = sum(layer.state.nbytes + layer.saved.nbytes for layer in trace.layers)
    assert memory(shape, "float64").kept == kept
    assert memory(shape, "float64").parameters == 2 * net.params.flat.nbytes


def test_checkpoints_keep_the_square_root():
    shape = Shape("lstm", 10_000, 2, 8, 16)
    full, sparse = memory(shape), memory(shape, checkpoint="sqrt")
    assert sparse.kept == 4 * 2 * 16 * (100 * (2 + 6) + 100 * 2)
    assert full.kept > 80 * sparse.kept
    assert memory(shape, checkpoint=10).kept == 4 * 2 * 16 * (10 * 8 + 1000 * 2)
    assert sparse.total == sparse.kept + sparse.parameters


def test_roofline_takes_the_slower_of_arithmetic_and_memory():
    assert roofline_seconds(1e9, 1.0, 1e9, 1e9) == 1.0
    assert roofline_seconds(1.0, 2e9, 1e9, 1e9) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "elman"}, "cell must be one of rnn_tanh, .* got 'elman'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"hidden_size": 2.0}, "hidden_size must be an integer of at least 1, got 2.0"),
    ],
)
def test_bad_shape_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Shape(**({"cell": "lstm", "steps": 1, "batch": 1, "input_size": 1, "hidden_size": 1} | change))
    with pytest.raises(ValueError, match="scope must be one of forward, training, got 'both'"):
        arithmetic(Shape("lstm", 1, 1, 1, 1), "both")
