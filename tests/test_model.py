"""Sequence models: exact gradients in every topology, losses as PyTorch's, and only what is scored counts."""

import copy
import pickle

import numpy as np
import pytest
from conftest import (
    DIFFERENCE_TOLERANCE,
    TOLERANCE,
    directional_difference,
    parts_of,
    random_direction,
    random_network,
    random_state,
    relative_error,
)

from rnnlab import Recurrent, SequenceModel, gradient_flow
from rnnlab.losses import LOSSES
from rnnlab.model import TOPOLOGIES

GENERATING = ("one_to_many", "encoder_decoder")

#: Every topology; those that read their own outputs also with the targets in their place.
ARRANGEMENTS = [(topology, False) for topology in TOPOLOGIES] + [(topology, True) for topology in GENERATING]

B, O = 4, 3


class Problem:
    """A model with random weights, and random x, targets, lengths and initial state that fit it."""

    def __init__(self, topology, loss, teacher_forcing=False, *, cell="lstm", bidirectional=False, seed=0, **options):
        rng = self.rng = np.random.default_rng(seed)
        rnn, _ = random_network(cell, O, 5, 2, bidirectional=bidirectional, seed=seed, **options)
        self.model = SequenceModel(rnn, O, topology, loss, teacher_forcing=teacher_forcing, seed=seed + 1)
        for name, values in self.model.params.items():
            if not name.startswith("rnn"):
                values[...] = rng.normal(0, 0.5, values.shape)
        self.x = rng.normal(size=(1 if topology in ("one_to_one", "one_to_many") else 6, B, O)).astype(rnn.dtype)
        self.state = random_state(rng, rnn, B)
        # In each case no sequence is as long as the array.
        self.lengths = None if len(self.x) == 1 else np.array([4, 1, 5, 2])
        self.target_lengths = np.array([3, 1, 4, 2]) if topology in GENERATING else None
        steps = {"many_to_many": (6,), "one_to_many": (5,), "encoder_decoder": (5,)}.get(topology, ())
        self.scored = np.ones((*steps, B), bool)
        if steps:
            limit = self.target_lengths if topology in GENERATING else self.lengths
            self.scored = np.arange(*steps)[:, None] < limit
        if loss == "cross_entropy":
            self.targets = rng.integers(0, O, (*steps, B))
        else:
            self.targets = rng.uniform(0, 1, (*steps, B, O)).astype(rnn.dtype)

    def gradients(self, **changes):
        arguments = {
            "x": self.x,
            "targets": self.targets,
            "lengths": self.lengths,
            "target_lengths": self.target_lengths,
            "state": self.state,
        }
        return self.model.loss_and_gradients(**(arguments | changes))

    def loss(self):
        return self.gradients().loss

    def assert_differences(self, array, gradient):
        """The slope along a random direction is that of differences of the loss."""
        direction = random_direction(self.rng, array)
        difference = directional_difference(self.loss, array, direction)
        assert (gradient * direction).sum() == pytest.approx(difference, abs=DIFFERENCE_TOLERANCE)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("topology", "teacher_forcing"), ARRANGEMENTS)
def test_gradients_equal_finite_differences(topology, teacher_forcing, loss):
    """Of every parameter, x and the initial state."""
    problem = Problem(topology, loss, teacher_forcing, seed=1)
    result = problem.gradients()
    for name, values in problem.model.params.items():
        problem.assert_differences(values, result.params[name])
    problem.assert_differences(problem.x, result.x)
    for part, gradient in zip(parts_of(problem.state), parts_of(result.recurrent["rnn"].state), strict=True):
        problem.assert_differences(part, gradient)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topology", ["one_to_one", "many_to_one", "many_to_many"])
def test_gradients_equal_finite_differences_in_both_directions(topology, loss):
    problem = Problem(topology, loss, bidirectional=True, cell="gru", seed=2)
    result = problem.gradients()
    problem.assert_differences(problem.model.params.flat, result.params.flat)
    problem.assert_differences(problem.x, result.x)


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_gradient_of_a_generating_models_state(teacher_forcing):
    """dL/dh at slot 0 counts all that the model makes of it, its later inputs too."""
    problem = Problem("one_to_many", "cross_entropy", teacher_forcing, cell="gru", seed=3)
    flow = problem.gradients().recurrent["rnn"]
    for k in range(2):
        problem.assert_differences(problem.state[k], flow.h[k][0])
        np.testing.assert_array_equal(flow.h[k][0], flow.state[k])


def test_gradient_of_the_state_between_encoder_and_decoder():
    """What leaves the decoder at its slot 0 enters the encoder at the last slot of each layer."""
    problem = Problem("encoder_decoder", "mse", cell="lstm", seed=4)
    recurrent = problem.gradients().recurrent
    assert recurrent.keys() == {"rnn", "decoder"}
    for kind in ("h", "c"):
        for encoder, decoder in zip(getattr(recurrent["rnn"], kind), getattr(recurrent["decoder"], kind), strict=True):
            assert decoder.shape == (6, B, 5)
            np.testing.assert_array_equal(encoder[-1], decoder[0])


def test_free_running_slots_are_total_derivatives():
    """The rest of a run, begun anew from the state and output after one step, has the same gradients."""
    problem = Problem("one_to_many", "mse", cell="gru", seed=5)
    problem.target_lengths = np.full(B, 5)
    result = problem.gradients()
    trace = problem.model.rnn.forward(problem.x, problem.state)
    rest = problem.gradients(
        x=result.outputs[:1], targets=problem.targets[1:], target_lengths=np.full(B, 4), state=trace.final
    )
    flow, later = result.recurrent["rnn"], rest.recurrent["rnn"]
    # The mean runs over 5 steps instead of 4.
    for slot in range(2, 6):
        for k in range(2):
            assert relative_error(flow.h[k][slot] * 5, later.h[k][slot - 1] * 4) <= TOLERANCE


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topology", ["many_to_one", "many_to_many"])
def test_loss_equals_torchs(topology, loss):
    """The value and, through autograd, its slope by the logits, which is that of the readout's bias."""
    torch = pytest.importorskip("torch")
    problem = Problem(topology, loss, seed=6)
    result = problem.gradients(lengths=None)
    trace = problem.model.rnn.forward(problem.x, problem.state)
    logits = torch.tensor(
        problem.model.read(problem.model.features(trace, topology == "many_to_many")), requires_grad=True
    )
    functional, targets = torch.nn.functional, torch.tensor(problem.targets)
    if loss == "cross_entropy":
        value = functional.cross_entropy(logits.reshape(-1, O), targets.reshape(-1))
        outputs = torch.softmax(logits, -1)
    elif loss == "mse":
        value, outputs = functional.mse_loss(logits, targets), logits
    else:
        value, outputs = functional.binary_cross_entropy_with_logits(logits, targets), torch.sigmoid(logits)
    value.backward()
    assert result.loss == pytest.approx(value.item(), rel=TOLERANCE)
    assert relative_error(result.outputs, outputs.detach().numpy()) <= TOLERANCE
    slope = logits.grad.numpy().reshape(-1, O).sum(axis=0)
    assert relative_error(result.params["readout.bias"], slope) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 80), ("float64", 700)])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_huge_logits_are_finite(loss, dtype, scale):
    logits = np.array([[scale, 0, -scale], [-scale, scale, 0]], dtype)
    targets = np.array([2, 0]) if loss == "cross_entropy" else np.array([[0, 1, 1], [1, 0, 1]], dtype)
    row = LOSSES[loss]
    value, slope = row.score(logits, targets)
    assert value.dtype == slope.dtype == dtype
    assert (value >= scale / 3).all()
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    assert np.isfinite(row.activation_backward(row.activation(logits), slope)).all()


def test_bce_keeps_its_tail():
    """A target of 1 and a logit of 30: loss and slope are e^−30 = 9.4e-14."""
    bce, y = LOSSES["bce"], np.array([[30.0]])
    tail = np.exp(-30)
    value, slope = bce.score(y, np.ones((1, 1)))
    np.testing.assert_allclose(value, [np.log1p(tail)], rtol=1e-14)  # a few roundings
    np.testing.assert_allclose(slope, [[-tail / (1 + tail)]], rtol=1e-14)
    np.testing.assert_allclose(bce.activation_backward(y, np.ones((1, 1))), [[tail / (1 + tail) ** 2]], rtol=1e-14)


# What is read, and what is scored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_many_to_one_reads_the_last_state_of_each_sequence(bidirectional):
    """Of the last layer, in both directions: the reverse one ends at the first element."""
    problem = Problem("many_to_one", "mse", bidirectional=bidirectional, seed=7)
    model = problem.model
    trace = model.rnn.forward(problem.x, problem.state, problem.lengths)
    h, _ = trace.final
    last = np.concatenate(list(h[-model.rnn.directions :]), axis=1)
    np.testing.assert_array_equal(model.features(trace, every=False), last)
    outputs, _ = model.predict(problem.x, problem.lengths, state=problem.state)
    weight, bias = model.params["readout.weight"], model.params["readout.bias"]
    assert relative_error(outputs, last @ weight.T + bias) <= TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("topology", "teacher_forcing"), [case for case in ARRANGEMENTS if case[0] in ("many_to_many", *GENERATING)]
)
def test_only_scored_positions_count(topology, teacher_forcing, loss):
    """Targets past the end may hold −1 or NaN, and x NaN; predictions there have no gradient."""
    problem = Problem(topology, loss, teacher_forcing, seed=8)
    want = problem.gradients()
    targets, x = problem.targets.copy(), problem.x.copy()
    targets[~problem.scored] = -1 if loss == "cross_entropy" else np.nan
    if problem.lengths is not None:
        x[np.arange(len(x))[:, None] >= problem.lengths] = np.nan
    got = problem.gradients(x=x, targets=targets)
    assert got.loss == want.loss
    np.testing.assert_array_equal(got.params.flat, want.params.flat)
    np.testing.assert_array_equal(got.x, want.x)
    # The mean over what is scored, each prediction alike.
    row = problem.model.loss
    if loss == "mse":
        values, _ = row.score(got.outputs, problem.targets)
        assert got.loss == pytest.approx(values[problem.scored].mean(), rel=TOLERANCE)


def test_outputs_are_fed_back():
    """Each step of one_to_many reads the output before it: one step after the other gives the same."""
    problem = Problem("one_to_many", "cross_entropy", seed=9)
    model = problem.model
    outputs, final = model.predict(problem.x, steps=4, state=problem.state)
    source, state = problem.x, problem.state
    for t in range(4):
        trace = model.rnn.forward(source, state)
        source, state = LOSSES["cross_entropy"].activation(model.read(trace.output)), trace.final
        np.testing.assert_array_equal(outputs[t], source[0])
    np.testing.assert_array_equal(final, state)
    np.testing.assert_array_equal(problem.gradients().outputs[:4], outputs)
    assert np.abs(outputs.sum(axis=-1) - 1).max() < 1e-15  # probabilities


@pytest.mark.parametrize("loss", LOSSES)
def test_teacher_forcing_feeds_the_targets_back(loss):
    """The decoder reads a zero input, then the targets; the last target is never read."""
    problem = Problem("encoder_decoder", loss, teacher_forcing=True, seed=10)
    model, targets = problem.model, problem.targets
    # Unscored targets are fed as zeros.
    targets = np.where(problem.scored if loss == "cross_entropy" else problem.scored[..., None], targets, 0)
    fed = np.eye(O)[targets] if loss == "cross_entropy" else targets
    encoded = model.rnn.forward(problem.x, problem.state, problem.lengths)
    trace = model.decoder.forward(np.concatenate([np.zeros((1, B, O)), fed[:-1]]), encoded.final)
    want = model.loss.activation(model.read(trace.output))
    np.testing.assert_array_equal(problem.gradients().outputs, want)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_predictions_are_those_that_are_scored(topology):
    problem = Problem(topology, "bce", seed=11)
    steps = 5 if topology in GENERATING else None
    outputs, final = problem.model.predict(problem.x, problem.lengths, steps=steps, state=problem.state)
    if steps:
        problem.target_lengths = np.full(B, steps)
    result = problem.gradients()
    np.testing.assert_array_equal(outputs, result.outputs)
    for part, want in zip(parts_of(final), parts_of(result.final), strict=True):
        np.testing.assert_array_equal(part, want)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_float32_stays_float32(topology):
    problem = Problem(topology, "mse", cell="gru", dtype="float32", seed=12)
    result = problem.gradients()
    for array in (result.outputs, result.x, result.params.flat, result.final, *result.recurrent["rnn"].h):
        assert array.dtype == np.float32
    double = Problem(topology, "mse", cell="gru", seed=12)
    double.model.params.flat[...] = problem.model.params.flat
    double.x, double.targets, double.state = (a.astype(float) for a in (problem.x, problem.targets, problem.state))
    exact = double.gradients().params.flat
    # 20: the roundings of two layers of gates, of at most 6 + 5 steps that follow each other.
    assert relative_error(result.params.flat, exact) <= 20 * np.finfo(np.float32).eps * np.sqrt(11)


def test_dropout_of_a_model_is_that_of_its_network():
    problem = Problem("many_to_many", "mse", dropout=0.5, seed=13)
    plain = problem.gradients()
    assert problem.gradients().loss == plain.loss
    assert problem.gradients(training=True).loss != pytest.approx(plain.loss, rel=1e-3)


# Truncated backpropagation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_one_window_of_full_length_is_the_full_gradient(loss):
    problem = Problem("many_to_many", loss, seed=14)
    for window in (6, 100):
        (part,) = problem.model.truncated(problem.x, problem.targets, window, problem.state)
        want = problem.gradients(lengths=None)
        assert part.loss == want.loss
        np.testing.assert_array_equal(part.params.flat, want.params.flat)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_windows_carry_the_state(window):
    """The losses of all windows, weighted with their steps, are the whole loss; the gradient is cut between them."""
    problem = Problem("many_to_many", "cross_entropy", seed=15)
    want = problem.gradients(lengths=None)
    parts = list(problem.model.truncated(problem.x, problem.targets, window, problem.state))
    steps = [len(part.outputs) for part in parts]
    assert steps == [window] * (6 // window) + [6 % window] * (6 % window > 0)
    assert np.dot(steps, [part.loss for part in parts]) / 6 == pytest.approx(want.loss, rel=TOLERANCE)
    assert relative_error(np.concatenate([part.outputs for part in parts]), want.outputs) <= TOLERANCE
    for part, exact in zip(parts_of(parts[-1].final), parts_of(want.final), strict=True):
        assert relative_error(part, exact) <= TOLERANCE
    # Each window alone, from the state that the one before left.
    state = problem.state
    for number, part in enumerate(parts):
        span = slice(number * window, number * window + steps[number])
        alone = problem.gradients(x=problem.x[span], targets=problem.targets[span], lengths=None, state=state)
        np.testing.assert_array_equal(part.params.flat, alone.params.flat)
        state = alone.final


def test_parameters_may_change_between_windows():
    problem = Problem("many_to_many", "mse", cell="gru", seed=16)
    losses = []
    for part in problem.model.truncated(problem.x, problem.targets, 3, problem.state):
        losses.append(part.loss)
        problem.model.params.flat[...] = 0
    np.testing.assert_allclose(losses[1], np.square(problem.targets[3:]).mean(), rtol=TOLERANCE)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ({}, {"topology": "many_to_few"}, "topology must be one of one_to_one, .*, encoder_decoder, got 'many_to_few'"),
        ({}, {"loss": "hinge"}, "loss must be one of cross_entropy, mse, bce, got 'hinge'"),
        ({}, {"output_size": 0}, "output_size must be an integer of at least 1, got 0"),
        ({}, {"output_size": 3.0}, r"output_size must be an integer of at least 1, got 3\.0"),
        ({}, {"output_size": 2, "topology": "one_to_many"}, "output_size must equal the rnn's input_size 3, got 2"),
        ({"bidirectional": True}, {"topology": "one_to_many"}, "one_to_many .* takes no bidirectional rnn"),
        ({"bidirectional": True}, {"topology": "encoder_decoder"}, "encoder_decoder .* takes no bidirectional rnn"),
    ],
)
def test_constructor_names_what_is_wrong(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceModel(Recurrent("gru", 3, 4, **network), **({"output_size": 3} | arguments))


def filled(shape, value, index=None):
    """Zeros but for one number; without an index, that number throughout."""
    array = np.zeros(shape, type(value))
    array[... if index is None else index] = value
    return array


@pytest.mark.parametrize(
    ("topology", "loss", "changes", "error", "message"),
    [
        (
            "many_to_one",
            "cross_entropy",
            {"targets": filled(3, 0)},
            ValueError,
            r"targets must be an integer array of shape \(4,\) for cross_entropy, got int64 of shape \(3,\)",
        ),
        (
            "many_to_one",
            "cross_entropy",
            {"targets": filled(4, 0.0)},
            ValueError,
            r"targets must be an integer array of shape \(4,\) for cross_entropy, got float64",
        ),
        (
            "many_to_one",
            "cross_entropy",
            {"targets": [0] * 4},
            ValueError,
            "targets must be an integer array .*, got list",
        ),
        ("many_to_one", "cross_entropy", {"targets": filled(4, 3, 1)}, ValueError, r"targets must lie in 0…2, got 0…3"),
        (
            "many_to_one",
            "cross_entropy",
            {"targets": filled(4, -1, 1)},
            ValueError,
            r"targets must lie in 0…2, got -1…0",
        ),
        (
            "many_to_many",
            "mse",
            {"targets": filled((4, 3), 0.0)},
            ValueError,
            r"targets must have shape \(6, 4, 3\), got float64 of shape \(4, 3\)",
        ),
        (
            "many_to_one",
            "mse",
            {"targets": filled((4, 3), 0.0).astype(np.float32)},
            TypeError,
            "targets must have dtype float64, got float32",
        ),
        ("many_to_one", "mse", {"targets": filled((4, 3), 0)}, TypeError, "targets must have dtype float64, got int64"),
        (
            "many_to_one",
            "mse",
            {"targets": filled((4, 3), np.nan, (1, 2))},
            ValueError,
            r"targets must be finite, got nan at index \(1, 2\)",
        ),
        (
            "many_to_many",
            "mse",
            {"targets": filled((6, 4, 3), np.inf, (0, 1, 2))},
            ValueError,
            r"targets must be finite, got inf at index \(0, 1, 2\)",
        ),
        (
            "many_to_one",
            "bce",
            {"targets": filled((4, 3), 1.5, (0, 0))},
            ValueError,
            r"targets must lie in \[0, 1\] for bce, got 0\.0…1\.5",
        ),
        (
            "many_to_one",
            "bce",
            {"target_lengths": [1] * 4},
            ValueError,
            "target_lengths belongs to one_to_many and encoder_decoder, got it for many_to_one",
        ),
        (
            "one_to_one",
            "mse",
            {"x": filled((2, 4, 3), 0.0)},
            ValueError,
            "x must have one step for topology one_to_one, got 2",
        ),
        (
            "one_to_many",
            "mse",
            {"x": filled((2, 4, 3), 0.0)},
            ValueError,
            "x must have one step for topology one_to_many, got 2",
        ),
        (
            "one_to_many",
            "mse",
            {"targets": filled(4, 0.0)},
            ValueError,
            r"targets must have shape \(T', 4, …\), got float64",
        ),
        (
            "one_to_many",
            "mse",
            {"targets": filled((5, 3, 3), 0.0)},
            ValueError,
            r"targets must have shape \(5, 4, 3\), got float64 of shape \(5, 3, 3\)",
        ),
        (
            "encoder_decoder",
            "cross_entropy",
            {"targets": filled((0, 4), 0)},
            ValueError,
            r"targets must have shape \(T', 4, …\), got int64 of shape \(0, 4\)",
        ),
        (
            "encoder_decoder",
            "cross_entropy",
            {"target_lengths": [1, 2, 6, 1]},
            ValueError,
            "target_lengths must lie in 1…5, got 1…6",
        ),
        (
            "encoder_decoder",
            "cross_entropy",
            {"target_lengths": [1, 2]},
            ValueError,
            r"target_lengths must be 4 integers, one a sequence, got int64 of shape \(2,\)",
        ),
        ("many_to_one", "mse", {"x": filled((6, 4, 2), 0.0)}, ValueError, r"x must have shape \(T, B, 3\)"),
        ("many_to_one", "mse", {"lengths": [7, 1, 1, 1]}, ValueError, "lengths must lie in 1…6, got 1…7"),
        ("many_to_one", "mse", {"state": np.zeros((2, 4, 5))}, TypeError, r"state of lstm must be a tuple \(h, c\)"),
    ],
)
def test_loss_and_gradients_names_what_is_wrong(topology, loss, changes, error, message):
    with pytest.raises(error, match=message):
        Problem(topology, loss, seed=17).gradients(**changes)


@pytest.mark.parametrize("topology", GENERATING)
@pytest.mark.parametrize("steps", [None, 0, 2.0])
def test_generating_predictions_need_a_number_of_steps(topology, steps):
    problem = Problem(topology, "mse", seed=18)
    with pytest.raises(ValueError, match=f"steps must be an integer of at least 1, got {steps}"):
        problem.model.predict(problem.x, steps=steps)


@pytest.mark.parametrize(
    ("topology", "window", "message"),
    [
        ("many_to_one", 2, "truncated needs topology many_to_many, got many_to_one"),
        ("many_to_many", 0, "window must be an integer of at least 1, got 0"),
    ],
)
def test_truncated_names_what_is_wrong(topology, window, message):
    problem = Problem(topology, "mse", seed=19)
    with pytest.raises(ValueError, match=message):
        list(problem.model.truncated(problem.x, problem.targets, window))


def test_truncated_refuses_targets_of_more_steps_than_x():
    problem = Problem("many_to_many", "mse", seed=20)
    with pytest.raises(ValueError, match="targets"):
        list(problem.model.truncated(problem.x[:4], problem.targets, 2))


def test_truncated_refuses_a_bidirectional_network():
    problem = Problem("many_to_many", "mse", bidirectional=True, seed=21)
    with pytest.raises(ValueError, match="bidirectional"):
        list(problem.model.truncated(problem.x, problem.targets, 2))


# Parameters -----------------------------------------------------------------------------------------------------------


def test_parameters_have_the_names_of_their_parts():
    problem = Problem("encoder_decoder", "mse", cell="gru", seed=22)
    model = problem.model
    want = [f"rnn.{name}" for name in model.rnn.params] + [f"decoder.{name}" for name in model.decoder.params]
    assert list(model.params) == [*want, "readout.weight", "readout.bias"]
    assert list(problem.gradients().params) == list(model.params)
    assert model.params["readout.weight"].shape == (O, 5)
    model.params.flat[...] = 3
    assert (model.rnn.params["weight_hh_l1"] == 3).all()
    assert (model.decoder.params["weight_hh_l1"] == 3).all()


def test_seed_makes_readout_and_decoder():
    def parameters(seed):
        return SequenceModel(Recurrent("gru", 3, 4, seed=1), 3, "encoder_decoder", seed=seed).params.flat

    np.testing.assert_array_equal(parameters(2), parameters(2))
    assert (parameters(2) != parameters(3)).mean() > 0.5


def test_parts_of_one_seed_are_independent():
    model = SequenceModel(Recurrent("gru", 3, 4, seed=1), 3, "encoder_decoder", seed=1)
    n = model.readout.flat.size
    assert (model.rnn.params.flat != model.decoder.params.flat).any()
    assert (model.readout.flat != model.decoder.params.flat[:n]).any()


# Options, copies, divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_final_state_is_that_of_each_sequence_own_last_step(teacher_forcing):
    """One sequence with two targets in a batch of longer ones ends where it ends alone."""
    rng = np.random.default_rng(30)
    model = SequenceModel(
        Recurrent("lstm", 3, 4, 2, dtype="float64", seed=1), 3, "one_to_many", "mse", teacher_forcing=teacher_forcing
    )
    x, targets = rng.normal(size=(1, 2, 3)), rng.normal(size=(4, 2, 3))
    both = model.loss_and_gradients(x, targets, target_lengths=[4, 2]).final
    alone = model.loss_and_gradients(x[:, 1:], targets[:2, 1:]).final
    for part, want in zip(both, alone, strict=True):
        np.testing.assert_allclose(part[:, 1:], want, rtol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_forcing": True}, "teacher_forcing needs one_to_many or encoder_decoder, got topology many_to_one"),
        (
            {"output_size": 1, "loss": "cross_entropy"},
            "output_size must be at least 2 classes .*, got 1",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceModel(Recurrent("gru", 3, 4), **({"output_size": 2, "loss": "mse"} | options))


def test_steps_belong_to_generating_topologies():
    model = SequenceModel(Recurrent("gru", 3, 4, dtype="float64"), 2, "many_to_one", "mse")
    with pytest.raises(ValueError, match="steps belongs to one_to_many and encoder_decoder, got it for many_to_one"):
        model.predict(np.zeros((2, 1, 3)), steps=17)
    with pytest.raises(TypeError, match="rnn must be a Recurrent network, got str"):
        SequenceModel("lstm", 2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(duplicate):
    problem = Problem("encoder_decoder", "mse", seed=31)
    other = duplicate(problem.model)
    np.testing.assert_array_equal(other.params.flat, problem.model.params.flat)
    other.params.flat[...] = 0
    assert (other.decoder.params["weight_hh_l0"] == 0).all()
    outputs, _ = other.predict(problem.x, problem.lengths, steps=2)
    assert (outputs == 0).all()
    assert (problem.model.params.flat != 0).any()


def test_a_diverged_network_has_a_loss_that_is_not_finite():
    net = Recurrent("rnn_relu", 2, 4, dtype="float64", seed=0)
    net.initialise("identity", gain=1e200, seed=0)
    net.params["weight_ih_l0"][...] = 0.5  # every unit is active, or nothing grows
    model = SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    for checkpoint in (None, 2):
        with np.errstate(all="ignore"):
            result = model.loss_and_gradients(np.ones((600, 1, 2)), np.zeros((1, 1)), checkpoint=checkpoint)
        assert not np.isfinite(result.loss)
        assert not np.isfinite(result.params.flat).all()
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="model must have finite states and gradients"):
        gradient_flow(model, np.ones((5, 1, 2)), np.zeros((1, 1)))


def test_saturated_cross_entropy_keeps_its_tail():
    """Logits (20, 0) and class 0: a loss of log(1 + e^−20), a slope of −e^−20 / (1 + e^−20) at the target."""
    value, slope = LOSSES["cross_entropy"].score(np.array([[20, 0]], np.float32), np.array([0]))
    tail = np.exp(-20) / (1 + np.exp(-20))
    np.testing.assert_allclose(slope, [[-tail, tail]], rtol=1e-6)  # a few roundings of 6e-8
    np.testing.assert_allclose(value, [np.log1p(np.exp(-20))], rtol=1e-6)


@pytest.mark.parametrize("topology", ["many_to_one", "many_to_many"])
def test_mean_loss_is_that_of_the_gradients(topology):
    rng, T, B = np.random.default_rng(0), 6, 3
    model = SequenceModel(Recurrent("lstm", 2, 4, seed=0, dtype="float64"), 3, topology, seed=0)
    x, lengths = rng.normal(size=(T, B, 2)), np.array([6, 2, 4])
    targets = rng.integers(3, size=(T, B) if topology == "many_to_many" else B)
    assert model.mean_loss(x, targets, lengths) == model.loss_and_gradients(x, targets, lengths).loss
    generating = SequenceModel(Recurrent("lstm", 3, 4, seed=0), 3, "one_to_many", seed=0)
    with pytest.raises(ValueError, match="mean_loss needs inputs that are given, got topology one_to_many"):
        generating.mean_loss(x, targets)
