"""Networks against PyTorch; dropout, seeds, and what they say to arguments that make no sense."""

import copy

import numpy as np
import pytest
from conftest import (
    DIFFERENCE_TOLERANCE,
    TOLERANCE,
    as_state,
    directional_difference,
    parts_of,
    random_direction,
    random_network,
    random_state,
    relative_error,
)

from rnnlab import GRU, LSTM, RNN, Recurrent
from rnnlab.kernels import finite
from rnnlab.kernels.team import run_together

# PyTorch --------------------------------------------------------------------------------------------------------------

TWINS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def twin(torch, net):
    """PyTorch's network of the same kind, with copies of the parameters; they must have the same names in order."""
    kind, options = TWINS[net.cell.name]
    model = getattr(torch.nn, kind)(
        net.input_size,
        net.hidden_size,
        net.num_layers,
        bias=net.bias,
        bidirectional=net.bidirectional,
        dtype=torch.float64,
        **options,
    )
    named = dict(model.named_parameters())
    assert [(name, tuple(value.shape)) for name, value in named.items()] == [
        (name, value.shape) for name, value in net.params.items()
    ]
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(torch.from_numpy(net.params[name]))
    return model


def run_torch(torch, net, x, state, lengths, d_output, d_final):
    """(output, final parts, gradients by name, dx, dstate parts) by PyTorch's autograd."""
    model, leaves = twin(torch, net), [torch.tensor(part, requires_grad=True) for part in parts_of(state)]
    source = torch.tensor(x, requires_grad=True)
    packed = source
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(source, torch.tensor(lengths), enforce_sorted=False)
    output, final = model(packed, as_state(leaves))
    if lengths is not None:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=len(x))
    loss = (output * torch.from_numpy(d_output)).sum()
    for part, d_part in zip(parts_of(final), parts_of(d_final), strict=True):
        loss = loss + (part * torch.from_numpy(d_part)).sum()
    loss.backward()
    return (
        output.detach().numpy(),
        [part.detach().numpy() for part in parts_of(final)],
        {name: value.grad.numpy() for name, value in model.named_parameters()},
        source.grad.numpy(),
        [leaf.grad.numpy() for leaf in leaves],
    )


@pytest.mark.parametrize("lengths", [None, [3, 6, 1, 5]], ids=["equal", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("cell", TWINS)
def test_equals_torch(torch, cell, num_layers, bidirectional, lengths):
    T, B, I, H = 6, 4, 3, 5
    net, _ = random_network(cell, I, H, num_layers, bidirectional=bidirectional, seed=num_layers)
    rng = np.random.default_rng(23)
    x, state = rng.normal(size=(T, B, I)), random_state(rng, net, B)
    d_output, d_final = rng.normal(size=(T, B, net.directions * H)), random_state(rng, net, B)
    trace = net.forward(x, state, lengths)
    gradients = net.backward(trace, d_output, d_final)
    output, final, d_params, dx, d_state = run_torch(torch, net, x, state, lengths, d_output, d_final)
    assert relative_error(trace.output, output) <= TOLERANCE
    assert relative_error(parts_of(trace.final), final) <= TOLERANCE
    assert relative_error(gradients.x, dx) <= TOLERANCE
    assert relative_error(parts_of(gradients.state), d_state) <= TOLERANCE
    for name in d_params:
        assert relative_error(gradients.params[name], d_params[name]) <= TOLERANCE


def test_total_derivatives_of_every_state_are_those_of_autograd(torch):
    """dL/dh_t and dL/dc_t of an LSTM, unrolled cell by cell, with a loss at every step and on the final state."""
    net, _ = random_network("lstm", 3, 5, seed=40)
    rng = np.random.default_rng(41)
    x, d_output = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 5))
    state, d_final = random_state(rng, net, 2), random_state(rng, net, 2)
    cell = torch.nn.LSTMCell(3, 5, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(value) for name, value in net.params.items()})
    slots = [tuple(torch.tensor(part[0], requires_grad=True) for part in state)]
    for row in x:
        slots.append(cell(torch.from_numpy(row), slots[-1]))
        for part in slots[-1]:
            part.retain_grad()
    loss = sum((h * torch.from_numpy(d)).sum() for (h, _), d in zip(slots[1:], d_output, strict=True))
    loss += sum((part * torch.from_numpy(d[0])).sum() for part, d in zip(slots[-1], d_final, strict=True))
    loss.backward()
    gradients = net.backward(net.forward(x, state), d_output, d_final)
    for got, part in ((gradients.h[0], 0), (gradients.c[0], 1)):
        want = np.stack([slot[part].grad.numpy() for slot in slots])
        assert relative_error(got, want) <= TOLERANCE


@pytest.mark.parametrize("cell", TWINS)
def test_equals_torch_without_bias(torch, cell):
    net, _ = random_network(cell, 3, 5, 2, bias=False, seed=1)
    assert not any("bias" in name for name in net.params)
    rng = np.random.default_rng(2)
    x, state, d_final = rng.normal(size=(6, 4, 3)), random_state(rng, net, 4), random_state(rng, net, 4)
    d_output = rng.normal(size=(6, 4, 5))
    trace = net.forward(x, state)
    output, _, d_params, dx, _ = run_torch(torch, net, x, state, None, d_output, d_final)
    gradients = net.backward(trace, d_output, d_final)
    assert relative_error(trace.output, output) <= TOLERANCE
    assert relative_error(gradients.x, dx) <= TOLERANCE
    for name in d_params:
        assert relative_error(gradients.params[name], d_params[name]) <= TOLERANCE


@pytest.mark.parametrize(
    ("net", "cell"),
    [
        (RNN(2, 3), "rnn_tanh"),
        (RNN(2, 3, nonlinearity="relu"), "rnn_relu"),
        (RNN(2, 3, nonlinearity="sigmoid"), "rnn_sigmoid"),
        (LSTM(2, 3), "lstm"),
        (GRU(2, 3), "gru"),
        (GRU(2, 3, reset_after=False), "gru_reset_before"),
    ],
)
def test_named_networks(net, cell):
    assert net.cell.name == cell
    assert (net.input_size, net.hidden_size, net.num_layers, net.dtype) == (2, 3, 1, np.float32)


def test_repr_names_what_was_asked_for():
    net = Recurrent("gru", 2, 3, 4, bidirectional=True, dtype="float64")
    assert repr(net) == ("Recurrent('gru', 2, 3, 4, bias=True, bidirectional=True, dropout=0.0, dtype='float64')")


# Seeds ----------------------------------------------------------------------------------------------------------------


def test_seed_makes_the_parameters():
    first, again, other, unseeded = (Recurrent("gru", 3, 4, 2, seed=seed) for seed in (1, 1, 2, None))
    np.testing.assert_array_equal(first.params.flat, again.params.flat)
    for different in (other, unseeded):
        assert (first.params.flat == different.params.flat).mean() < 0.01
    other.initialise(seed=1)
    np.testing.assert_array_equal(first.params.flat, other.params.flat)


def test_both_types_draw_the_same_parameters():
    single, double = (Recurrent("lstm", 3, 4, dtype=dtype, seed=3) for dtype in ("float32", "float64"))
    np.testing.assert_array_equal(single.params.flat, double.params.flat.astype(np.float32))


# Dropout --------------------------------------------------------------------------------------------------------------


def dropout_network(num_layers=3, dropout=0.4, seed=5):
    net, _ = random_network("rnn_tanh", 3, 6, num_layers, bidirectional=True, dropout=dropout, seed=seed)
    return net


def inputs(*shape, seed=6, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_dropout_acts_in_training_only():
    net, x = dropout_network(), inputs(5, 4, 3)
    plain = net.forward(x)
    assert plain.masks == [None, None, None]
    np.testing.assert_array_equal(plain.output, dropout_network(dropout=0.0).forward(x, training=True).output)
    assert relative_error(net.forward(x, training=True).output, plain.output) > 0.1


def test_dropout_acts_between_layers_only():
    """The input of the first layer and the output of the last are whole; one layer drops nothing."""
    x = inputs(5, 4, 3)
    masks = dropout_network().forward(x, training=True).masks
    assert masks[0] is None
    assert [mask.shape for mask in masks[1:]] == [(5, 4, 12)] * 2
    assert dropout_network(num_layers=1).forward(x, training=True).masks == [None]


def test_dropout_keeps_the_mean():
    """Each number is dropped with probability p, or else divided by 1 − p."""
    p = 0.3
    mask = dropout_network(2, p).forward(inputs(200, 100, 3), training=True).masks[1]
    assert set(np.unique(mask)) == {0, 1 / (1 - p)}
    # 240,000 draws: the standard error of the mean is √(p/(1−p)/n) = 0.0013.
    assert mask.mean() == pytest.approx(1, abs=5 * np.sqrt(p / (1 - p) / mask.size))


def test_dropout_is_seeded():
    x = inputs(5, 4, 3)
    first, again, other = dropout_network(), dropout_network(), dropout_network(seed=7)
    one, two = first.forward(x, training=True), first.forward(x, training=True)
    np.testing.assert_array_equal(one.masks[1:], again.forward(x, training=True).masks[1:])
    np.testing.assert_array_equal(two.masks[1:], again.forward(x, training=True).masks[1:])
    for trace in (two, other.forward(x, training=True)):
        assert (trace.masks[1] != one.masks[1]).mean() > 0.3  # 2p(1 − p) = 0.48 of independent masks


def test_dropout_gradient_equals_finite_differences():
    """Copies of one network draw the same mask, so that the loss is a function of its parameters and of x."""
    net, x, lengths = dropout_network(), inputs(5, 4, 3), [5, 2, 4, 1]
    d_output = inputs(5, 4, 12, seed=8)
    rng = np.random.default_rng(9)

    def loss():
        trace = copy.deepcopy(net).forward(x, lengths=lengths, training=True)
        return (d_output * trace.output).sum()

    trace = copy.deepcopy(net).forward(x, lengths=lengths, training=True)
    gradients = net.backward(trace, d_output)
    for array, gradient in ((net.params.flat, gradients.params.flat), (x, gradients.x)):
        direction = random_direction(rng, array)
        want = directional_difference(loss, array, direction)
        # The loss is a sum of 144 terms around 1.
        assert (gradient * direction).sum() == pytest.approx(want, abs=100 * DIFFERENCE_TOLERANCE)


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2, 4, 1]])
def test_layout_of_the_inputs_makes_no_difference(bidirectional, lengths):
    net, _ = random_network("lstm", 3, 6, 2, bidirectional=bidirectional, seed=10)
    rng = np.random.default_rng(11)
    state, d_final = random_state(rng, net, 4), random_state(rng, net, 4)
    x, d_output = inputs(5, 4, 3), inputs(5, 4, 6 * net.directions, seed=12)

    def results(change):
        changed = [as_state(map(change, parts_of(argument))) for argument in (x, state, d_output, d_final)]
        trace = net.forward(changed[0], changed[1], lengths)
        gradients = net.backward(trace, changed[2], changed[3])
        return [trace.output, *trace.final, gradients.x, gradients.params.flat, *gradients.state]

    want = results(np.array)
    wide = results(lambda a: np.repeat(a, 2, axis=-1)[..., ::2])
    reversed_steps = results(lambda a: np.ascontiguousarray(a[::-1])[::-1])
    for changed in (results(np.asfortranarray), wide, reversed_steps):
        for got, exact in zip(changed, want, strict=True):
            np.testing.assert_array_equal(got, exact)


def test_inputs_are_not_modified():
    net, _ = random_network("lstm", 3, 6, 2, bidirectional=True, dropout=0.5, seed=13)
    rng = np.random.default_rng(14)
    x, state, lengths, d_final = inputs(5, 4, 3), random_state(rng, net, 4), [5, 2, 4, 1], random_state(rng, net, 4)
    x[3:, 1] = np.nan
    d_output = inputs(5, 4, 12)
    given = [x, *state, d_output, *d_final, net.params.flat]
    before = copy.deepcopy(given)
    trace = net.forward(x, state, lengths, training=True)
    kept = copy.deepcopy(trace)
    net.backward(trace, d_output, d_final)
    net.backpropagate(trace, d_output, d_final, scaled=True)
    net.jacobian(trace, 0)
    for got, want in zip(given, before, strict=True):
        np.testing.assert_array_equal(got, want)
    for name in ("output", "h", "c", "final"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(kept, name))


def test_arrays_that_cannot_be_written_will_do():
    net, _ = random_network("gru", 3, 6, seed=15)
    x, d_output = inputs(5, 4, 3), inputs(5, 4, 6)
    want = net.backward(net.forward(x), d_output)
    for array in (x, d_output):
        array.setflags(write=False)
    np.testing.assert_array_equal(net.backward(net.forward(x), d_output).params.flat, want.params.flat)


@pytest.mark.parametrize("lengths", [(5, 2, 4, 1), np.array([5, 2, 4, 1], np.uint8), np.array([5, 2, 4, 1])[::1]])
def test_lengths_may_be_any_integers(lengths):
    net, _ = random_network("gru", 3, 6)
    want = net.forward(inputs(5, 4, 3), lengths=[5, 2, 4, 1]).output
    np.testing.assert_array_equal(net.forward(inputs(5, 4, 3), lengths=lengths).output, want)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("elman", 2, 3), {}, ValueError, "cell must be one of rnn_tanh, .*, gru_reset_before, got 'elman'"),
        ((None, 2, 3), {}, ValueError, "cell must be one of .*, got None"),
        (("gru", 0, 3), {}, ValueError, "input_size must be an integer of at least 1, got 0"),
        (("gru", 2, -3), {}, ValueError, "hidden_size must be an integer of at least 1, got -3"),
        (("gru", 2, 3.0), {}, ValueError, r"hidden_size must be an integer of at least 1, got 3\.0"),
        (("gru", True, 3), {}, ValueError, "input_size must be an integer of at least 1, got True"),
        (("gru", 2, 3, 0), {}, ValueError, "num_layers must be an integer of at least 1, got 0"),
        (("gru", 2, "3"), {}, ValueError, "hidden_size must be an integer of at least 1, got '3'"),
        (("gru", 2, 3), {"dropout": 1.0}, ValueError, r"dropout must be a finite number in \[0, 1\), got 1\.0"),
        (("gru", 2, 3), {"dropout": -0.1}, ValueError, r"dropout must be a finite number in \[0, 1\), got -0\.1"),
        (("gru", 2, 3), {"dropout": np.nan}, ValueError, r"dropout must be a finite number in \[0, 1\), got nan"),
        (("gru", 2, 3), {"dtype": "float16"}, ValueError, "dtype must be one of float32, float64, got 'float16'"),
        (("gru", 2, 3), {"dtype": int}, ValueError, "dtype must be one of float32, float64, got <class 'int'>"),
        (("gru", 2, 3), {"batch_first": True}, TypeError, "batch_first"),
    ],
)
def test_constructor_names_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Recurrent(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "single precision"}, "dtype must be one of"), ({"dropout": "0.5"}, "dropout must")],
)
def test_constructor_names_what_has_no_number_or_type(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Recurrent("gru", 2, 3, **options)


def test_dtype_none_is_refused():
    with pytest.raises((TypeError, ValueError), match="dtype"):
        Recurrent("gru", 2, 3, dtype=None)


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="nonlinearity must be one of tanh, relu, sigmoid, got 'softsign'"):
        RNN(2, 3, nonlinearity="softsign")


GOOD = {"x": np.zeros((5, 4, 3)), "state": None, "lengths": None}


def poisoned(shape, value, index):
    array = np.zeros(shape)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [[[0.0]]]}, TypeError, "x must be a numpy array, got list"),
        ({"x": None}, TypeError, "x must be a numpy array, got NoneType"),
        ({"x": np.zeros((5, 4, 3), np.float32)}, TypeError, "x must have dtype float64, got float32"),
        ({"x": np.zeros((5, 4, 3), int)}, TypeError, "x must have dtype float64, got int64"),
        ({"x": np.zeros((5, 4, 3), ">f8")}, TypeError, "x must have dtype float64, got >f8"),
        ({"x": np.zeros((5, 3))}, ValueError, r"x must have shape \(T, B, 3\) .*, got \(5, 3\)"),
        ({"x": np.zeros((5, 4, 2))}, ValueError, r"x must have shape \(T, B, 3\) .*, got \(5, 4, 2\)"),
        ({"x": np.zeros((0, 4, 3))}, ValueError, r"x must have shape .* no empty dimension, got \(0, 4, 3\)"),
        ({"x": np.zeros((5, 0, 3))}, ValueError, r"x must have shape .* no empty dimension, got \(5, 0, 3\)"),
        ({"x": poisoned((5, 4, 3), np.nan, (2, 1, 0))}, ValueError, r"x must be finite, got nan at index \(2, 1, 0\)"),
        (
            {"x": poisoned((5, 4, 3), -np.inf, (0, 0, 2))},
            ValueError,
            r"x must be finite, got -inf at index \(0, 0, 2\)",
        ),
        (
            {"x": poisoned((5, 4, 3), np.nan, (2, 1, 0)), "lengths": [5, 3, 5, 5]},
            ValueError,
            r"x must be finite, got nan at index \(2, 1, 0\)",
        ),
        ({"lengths": [5, 4, 3]}, ValueError, r"lengths must be 4 integers, one a sequence, got int64 of shape \(3,\)"),
        ({"lengths": 5}, ValueError, r"lengths must be 4 integers, one a sequence, got int64 of shape \(\)"),
        ({"lengths": [5.0, 4.0, 3.0, 2.0]}, ValueError, "lengths must be 4 integers, one a sequence, got float64"),
        ({"lengths": [True] * 4}, ValueError, "lengths must be 4 integers, one a sequence, got bool"),
        ({"lengths": "5432"}, ValueError, "lengths must be 4 integers, one a sequence, got <U4"),
        ({"lengths": [5, 4, 0, 2]}, ValueError, "lengths must lie in 1…5, got 0…5"),
        ({"lengths": [5, 6, 1, 2]}, ValueError, "lengths must lie in 1…5, got 1…6"),
        ({"state": np.zeros((1, 4, 6))}, TypeError, r"state of lstm must be a tuple \(h, c\), got ndarray"),
        ({"state": [np.zeros((1, 4, 6))] * 2}, TypeError, r"state of lstm must be a tuple \(h, c\), got list"),
        ({"state": (np.zeros((1, 4, 6)),)}, TypeError, r"state of lstm must be a tuple \(h, c\), got 1 parts"),
        (
            {"state": (np.zeros((1, 4, 6)), np.zeros((2, 4, 6)))},
            ValueError,
            r"state c must have shape \(1, 4, 6\) .*, got \(2, 4, 6\)",
        ),
        (
            {"state": (np.zeros((1, 4, 6), np.float32), np.zeros((1, 4, 6)))},
            TypeError,
            "state h must have dtype float64, got float32",
        ),
        (
            {"state": (np.zeros((1, 4, 6)), poisoned((1, 4, 6), np.nan, (0, 3, 5)))},
            ValueError,
            r"state c must be finite, got nan at index \(0, 3, 5\)",
        ),
    ],
)
def test_forward_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        LSTM(3, 6, dtype="float64").forward(**(GOOD | changes))


@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        (np.zeros((5, 0, 3)), np.zeros(0, int), "x must have shape"),
        (np.zeros((0, 4, 3)), [1] * 4, "x must have shape"),
        (np.zeros((5, 4, 3)), [[5], [4, 3], [2], [1]], "lengths must be"),
    ],
)
def test_forward_names_what_is_wrong_with_lengths(x, lengths, message):
    with pytest.raises(ValueError, match=message):
        LSTM(3, 6, dtype="float64").forward(x, lengths=lengths)


def test_state_of_a_cell_without_c_is_one_array():
    state = np.zeros((1, 4, 6))
    with pytest.raises(TypeError, match="state must be a numpy array, got tuple"):
        GRU(3, 6, dtype="float64").forward(GOOD["x"], (state, state))


@pytest.mark.parametrize(
    ("d_output", "d_final", "error", "message"),
    [
        (np.zeros((5, 4, 5)), None, ValueError, r"d_output must have shape \(5, 4, 6\) .*, got \(5, 4, 5\)"),
        (np.zeros((4, 6)), None, ValueError, r"d_output must have shape \(5, 4, 6\) .*, got \(4, 6\)"),
        (np.zeros((5, 4, 6), np.float32), None, TypeError, "d_output must have dtype float64, got float32"),
        (0.0, None, TypeError, "d_output must be a numpy array, got float"),
        (poisoned((5, 4, 6), np.inf, (4, 3, 5)), None, ValueError, r"d_output must be finite, got inf at .*4, 3, 5"),
        (np.zeros((5, 4, 6)), np.zeros((1, 4, 6)), TypeError, r"d_final of lstm must be a tuple \(h, c\), got ndarray"),
        (np.zeros((5, 4, 6)), (np.zeros((1, 4, 6)), np.zeros((4, 6))), ValueError, "d_final c must have shape"),
    ],
)
def test_backward_names_what_is_wrong(d_output, d_final, error, message):
    net = LSTM(3, 6, dtype="float64")
    with pytest.raises(error, match=message):
        net.backward(net.forward(GOOD["x"]), d_output, d_final)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("parties", [1, 2, 3])
def test_one_number_that_is_not_finite_is_found_by_any_number_of_threads(monkeypatch, parties, dtype):
    teams = []

    def together(kernel, arguments, count, by_units):
        teams.append(count)
        run_together(kernel, arguments, count, by_units)

    monkeypatch.setattr(finite, "threads", lambda: parties)
    monkeypatch.setattr(finite, "run_together", together)
    x = np.full(parties * finite._SHARE // np.dtype(dtype).itemsize + 7, np.finfo(dtype).max)
    assert finite.all_finite(x)
    assert teams == ([parties] if parties > 1 else [])
    for i in {0, len(x) - 1} | {len(x) * k // parties + d for k in range(1, parties) for d in (-1, 0)}:
        for bad in (np.nan, np.inf, -np.inf):
            before, x[i] = x[i], bad
            assert not finite.all_finite(x)
            x[i] = before


def test_nothing_goes_back_through_a_trace_that_was_not_kept():
    net = LSTM(3, 6, dtype="float64")
    trace = net.forward(GOOD["x"], keep=False)
    stacked, both_ways = Recurrent("gru", 3, 3, 2), Recurrent("gru", 3, 3, bidirectional=True)
    with pytest.raises(
        ValueError, match=r"trace must be one of Recurrent\('gru', 3, 3, 1, bias=True, bidirectional=True"
    ):
        both_ways.backward(stacked.forward(np.zeros((2, 1, 3), np.float32)), np.zeros((2, 1, 6), np.float32))
    with pytest.raises(ValueError, match=r"trace must come from forward\(…, keep=True\), got one made with keep=False"):
        net.backward(trace, np.zeros((5, 4, 6)))


def test_no_jacobian_of_a_trace_that_was_not_kept():
    net = LSTM(3, 6, dtype="float64")
    with pytest.raises(ValueError, match="keep"):
        net.jacobian(net.forward(GOOD["x"], keep=False), 0)


@pytest.mark.parametrize(("cell", "num_layers"), [("lstm", 2), ("lstm_peephole", 1)])
def test_trace_of_another_network_is_refused(cell, num_layers):
    trace = Recurrent(cell, 3, 6, num_layers, dtype="float64").forward(GOOD["x"])
    with pytest.raises((TypeError, ValueError), match="trace"):
        LSTM(3, 6, dtype="float64").backward(trace, np.zeros((5, 4, 6)))


def test_gradient_past_the_end_is_ignored_whatever_it_is():
    net = LSTM(3, 6, dtype="float64")
    trace = net.forward(GOOD["x"], lengths=[5, 2, 4, 1])
    gradients = net.backward(trace, poisoned((5, 4, 6), np.nan, (4, 1, 0)))
    assert (gradients.x == 0).all()


@pytest.mark.parametrize(("t", "k"), [(-1, 0), (5, 0), (0, -1), (0, 2)])
def test_jacobian_names_the_steps_and_layers_there_are(t, k):
    net = LSTM(3, 6, 2, dtype="float64")
    trace = net.forward(GOOD["x"])
    message = f"t must be an integer in 0…4, got {t}" if t else f"k must be an integer in 0…1, got {k}"
    with pytest.raises(ValueError, match=message):
        net.jacobian(trace, t, k)
    np.testing.assert_array_equal(net.jacobian(trace, np.int64(1), np.int64(1)), net.jacobian(trace, 1, 1))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("bias_hh_l1", np.zeros(24), KeyError, "'bias_hh_l1' is no parameter of this network; it has weight_ih_l0, "),
        ("bias_hh_l0", np.zeros(6), ValueError, r"params\['bias_hh_l0'\] must have shape \(24,\) .*, got \(6,\)"),
        (
            "bias_hh_l0",
            np.zeros(24, np.float32),
            TypeError,
            r"params\['bias_hh_l0'\] must have dtype float64, got float32",
        ),
        ("bias_hh_l0", 0.0, TypeError, r"params\['bias_hh_l0'\] must be a numpy array, got float"),
        (
            "bias_hh_l0",
            np.full(24, np.nan),
            ValueError,
            r"params\['bias_hh_l0'\] must be finite, got nan at index \(0,\)",
        ),
    ],
)
def test_assigning_a_parameter_names_what_is_wrong(name, value, error, message):
    net = LSTM(3, 6, dtype="float64", seed=0)
    before = net.params.flat.copy()
    with pytest.raises(error, match=message):
        net.params[name] = value
    np.testing.assert_array_equal(net.params.flat, before)
