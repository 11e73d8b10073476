"""Counts against networks as they are built, against what a run allocates, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rnnlab
from rnnlab.cells import CELLS
from rnnlab.costs import Shape, arithmetic, largest, layout, memory, parameters, roofline_seconds, traffic
from rnnlab.model import TOPOLOGIES

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


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_memory_is_what_a_trace_keeps(cell):
    shape = Shape(cell, 11, 3, 4, 16, **STACKED)  # 16: whole registers, none of it padding
    net = rnnlab.Recurrent(cell, 4, 16, dtype="float64", **STACKED)
    trace = net.forward(np.zeros((11, 3, 4)))
    kept = sum(layer.state.nbytes + layer.saved.nbytes + layer.reset_h.nbytes for layer in trace.layers)
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


#: Cell, inputs, units, layers, both directions, and what Keras 3.15.1 counts with Dense(10) behind.
KERAS = [
    ("rnn_tanh", 1, 32, 1, False, 1418),
    ("rnn_tanh", 12, 100, 2, False, 32410),
    ("rnn_tanh", 7, 33, 2, True, 9976),
    ("lstm", 1, 32, 1, False, 4682),
    ("lstm", 12, 100, 2, False, 126610),
    ("lstm", 7, 33, 2, True, 37894),
    ("gru", 1, 32, 1, False, 3690),
    ("gru", 12, 100, 2, False, 95810),
    ("gru", 7, 33, 2, True, 28984),
    ("gru_reset_before", 1, 32, 1, False, 3594),
    ("gru_reset_before", 12, 100, 2, False, 95210),
    ("gru_reset_before", 7, 33, 2, True, 28588),
]


@pytest.mark.parametrize(("cell", "inputs", "hidden", "layers", "both", "count"), KERAS)
def test_parameters_are_those_of_keras(cell, inputs, hidden, layers, both, count):
    shape = Shape(cell, 1, 1, inputs, hidden, layers, both, output_size=10)
    assert parameters(shape, biases=1) + (hidden * 3 * len(shape.layers) if cell == "gru" else 0) == count


#: The configurations that PyTorch has too, and three more.
PYTORCH = [row[:5] for row in KERAS[:9]] + [(cell, 3, 5, 3, True) for cell in ("rnn_tanh", "lstm", "gru")]


@pytest.mark.parametrize(("cell", "inputs", "hidden", "layers", "both"), PYTORCH)
def test_parameters_are_those_of_pytorch(cell, inputs, hidden, layers, both):
    torch = pytest.importorskip("torch")
    make = {"rnn_tanh": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
    net = make(inputs, hidden, layers, bidirectional=both), torch.nn.Linear(hidden * (1 + both), 10)
    count = sum(values.numel() for module in net for values in module.parameters())
    assert parameters(Shape(cell, 1, 1, inputs, hidden, layers, both, output_size=10)) == count


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_layout_is_that_of_the_model(topology):
    inputs, outputs = (3, 3) if topology == "one_to_many" else (4, 3)
    model = rnnlab.SequenceModel(rnnlab.GRU(inputs, 5, 2), outputs, topology)
    shapes = layout(topology, "gru", 7, 2, inputs, 5, outputs, 2)
    assert sum(map(parameters, shapes)) == model.params.flat.size
    predictions = {"one_to_one": 1, "many_to_one": 1}.get(topology, 7) * 2
    cells = sum(map(arithmetic, (Shape("gru", s.steps, 2, s.input_size, 5, 2) for s in shapes)))
    assert sum(map(arithmetic, shapes)) == cells + 3 * 2 * 3 * 5 * predictions
    assert shapes[0].steps == (1 if topology == "one_to_one" else 7)


def test_readout_by_hand():
    shape = Shape("rnn_tanh", 7, 3, 4, 5, output_size=2)
    plain, weights = Shape("rnn_tanh", 7, 3, 4, 5), 2 * (5 + 1)
    assert traffic(shape, "forward") - traffic(plain, "forward") == 4 * (weights + 3 * 2)
    assert traffic(shape) - traffic(plain) == 4 * (3 * weights + 2 * 3 * 2)
    forward = memory(plain, scope="forward")
    assert forward.parameters == 4 * parameters(plain)
    assert forward.kept == 4 * 8 * 3 * 5  # the states of all steps and the first
    with pytest.raises(ValueError, match="output_size must be an integer of at least 0, got -1"):
        Shape("lstm", 1, 1, 1, 1, output_size=-1)


@given(st.integers(1, 10**7), st.sampled_from(list(CELLS)), st.integers(1, 40), st.sampled_from([1, 16]))
def test_largest_meets_the_budget_or_is_next_below(budget, cell, inputs, step):
    def cost(hidden):
        return parameters(Shape(cell, 1, 1, inputs, hidden, 2, output_size=3))

    if cost(step) > budget:
        with pytest.raises(ValueError, match=f"budget must be at least .* of {step} hidden units, got"):
            largest(cost, budget, step)
    else:
        hidden = largest(cost, budget, step)
        assert hidden % step == 0
        assert cost(hidden) <= budget < cost(hidden + step)
        assert largest(cost, cost(hidden), step) == hidden


def test_largest_ends():
    assert largest(float, 100.5, most=100) == 100
    assert largest(float, 1e9, most=100) == 100
    assert largest(float, 1e9, step=16, most=100) == 96


def test_bad_flags_and_biases_are_named():
    with pytest.raises(TypeError, match="bidirectional must be True or False, got 'no'"):
        Shape("gru", 1, 1, 1, 1, bidirectional="no")
    for biases in (3, -1):
        with pytest.raises(ValueError, match=f"biases must be an integer in 0…2, got {biases}"):
            parameters(Shape("gru", 1, 1, 1, 1), biases)


def test_bad_layout_is_named():
    with pytest.raises(ValueError, match=r"topology must be one of one_to_one, .* got 'some'"):
        layout("some", "gru", 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="output_size must equal the input_size 2 for one_to_many, got 3"):
        layout("one_to_many", "gru", 1, 1, 2, 1, 3)
