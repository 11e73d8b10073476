"""Whole training steps in one compiled call, against `loss_and_gradients` and an update in NumPy."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from rnnlab import CELLS, Recurrent, SequenceModel, TrainingStep
from rnnlab.losses import LOSSES

T, B, I, H, O = 7, 4, 3, 11, 5
LENGTHS = [7, 3, 1, 5]


def problem(cell="lstm", topology="many_to_one", loss="cross_entropy", dtype="float64", *, seed=0, **options):
    """A model, and x and targets for it."""
    model = SequenceModel(Recurrent(cell, I, H, dtype=dtype, seed=seed, **options), O, topology, loss, seed=seed)
    rng = np.random.default_rng(seed)
    shape = (T, B) if topology == "many_to_many" else (B,)
    targets = rng.integers(O, size=shape) if loss == "cross_entropy" else rng.random((*shape, O)).astype(dtype)
    return model, rng.normal(size=(T, B, I)).astype(dtype), targets


def updated(model, x, targets, lengths, rate, threshold):
    """Take the step in NumPy; return the loss and the gradient's norm."""
    result = model.loss_and_gradients(x, targets, lengths)
    norm = np.linalg.norm(result.params.flat)
    model.params.flat[...] -= rate * min(1, threshold / norm) * result.params.flat
    return result.loss, norm


def assert_steps_agree(model, other, x, targets, lengths=None, rate=0.3, threshold=0.05):
    take = TrainingStep(model, T, B, learning_rate=rate, clip_norm=threshold)
    for _ in range(3):
        got = take(x, targets, lengths)
        loss, norm = updated(other, x, targets, lengths, rate, threshold)
        # The same sums but for their order: a few roundings of numbers up to about one.
        assert got.loss == pytest.approx(loss, abs=1e-13)
        assert got.norm == pytest.approx(norm, rel=1e-13)
        assert got.moved
        np.testing.assert_allclose(model.params.flat, other.params.flat, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_step_of_every_cell_is_that_of_its_gradients(cell, lengths):
    (model, x, targets), (other, _, _) = problem(cell), problem(cell)
    assert_steps_agree(model, other, x, targets, lengths)


@pytest.mark.parametrize(
    ("cell", "batch", "dtype"), [("lstm_peephole", 1, "float64"), ("gru_reset_before", 5, "float32")]
)
def test_step_of_many_steps_units_and_outputs(cell, batch, dtype):
    """More than one chunk of steps, and than one vector of units and of outputs."""
    steps, outputs = 150, 19
    rng = np.random.default_rng(3)
    x, targets = rng.normal(size=(steps, batch, I)).astype(dtype), rng.integers(outputs, size=(steps, batch))
    lengths = [150, 1, 40, 149, 77][:batch]
    models = [
        SequenceModel(Recurrent(cell, I, 67, dtype=dtype, seed=4), outputs, "many_to_many", seed=4) for _ in range(2)
    ]
    got = TrainingStep(models[0], steps, batch, learning_rate=0.5)(x, targets, lengths)
    loss, norm = updated(models[1], x, targets, lengths, 0.5, np.inf)
    u = float(np.finfo(dtype).eps)
    assert got.loss == pytest.approx(loss, rel=20 * u)  # sums of up to 1,500 terms, in two orders
    assert got.norm == pytest.approx(norm, rel=20 * u)
    np.testing.assert_allclose(models[0].params.flat, models[1].params.flat, rtol=0, atol=20 * u)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("topology", ["many_to_one", "many_to_many"])
@pytest.mark.parametrize("threshold", [0.05, np.inf])
def test_step_of_every_loss_and_topology(topology, loss, threshold):
    (model, x, targets), (other, _, _) = problem("gru", topology, loss), problem("gru", topology, loss)
    assert_steps_agree(model, other, x, targets, LENGTHS, threshold=threshold)


def test_step_without_biases_and_of_one_step():
    (model, x, targets), (other, _, _) = problem(bias=False), problem(bias=False)
    assert_steps_agree(model, other, x, targets)
    model, x, targets = problem(topology="one_to_one")
    other, _, _ = problem(topology="one_to_one")
    take = TrainingStep(model, 1, B, learning_rate=0.1)
    assert take(x[:1], targets).loss == pytest.approx(updated(other, x[:1], targets, None, 0.1, np.inf)[0], rel=1e-13)
    np.testing.assert_allclose(model.params.flat, other.params.flat, rtol=0, atol=1e-14)


def test_one_step_after_another_sees_its_own_arguments():
    """Nothing stays of a call: not the sequences, their lengths, or what lay past the end of shorter ones."""
    (model, x, targets), (other, _, _) = problem(topology="many_to_many"), problem(topology="many_to_many")
    take = TrainingStep(model, T, B, learning_rate=0.2)
    rng = np.random.default_rng(1)
    for lengths in (None, LENGTHS, [1, 7, 2, 2], None):
        x, targets = rng.normal(size=x.shape), rng.integers(O, size=(T, B))
        if lengths is not None:
            x[np.arange(T)[:, None] >= lengths], targets[np.arange(T)[:, None] >= lengths] = np.nan, -1
        got = take(x, targets, lengths)
        loss, _ = updated(other, x, targets, lengths, 0.2, np.inf)
        assert got.loss == pytest.approx(loss, rel=1e-13)
        np.testing.assert_allclose(model.params.flat, other.params.flat, rtol=0, atol=1e-13)


def test_training_learns():
    """Which of five classes was shown first: from a loss of log 5 to under a tenth of it."""
    model, _, _ = problem(dtype="float32")
    take, rng = TrainingStep(model, T, 32, learning_rate=1.0, clip_norm=1.0), np.random.default_rng(2)
    losses = []
    for _ in range(1500):
        x, labels = rng.normal(size=(T, 32, I)).astype("float32"), rng.integers(O, size=32)
        x[0, :, 0] = labels - 2
        losses.append(take(x, labels).loss)
    assert losses[0] == pytest.approx(np.log(5), rel=0.3)
    assert np.mean(losses[-100:]) < 0.1 * np.log(5)


def test_a_gradient_that_is_not_finite_moves_nothing():
    net = Recurrent("rnn_relu", I, H, dtype="float32", seed=0)
    net.initialise("identity", gain=1e30, seed=0)
    net.params["weight_ih_l0"][...] = 0.5
    model = SequenceModel(net, O, "many_to_one", "mse", seed=0)
    before = model.params.flat.copy()
    result = TrainingStep(model, T, B, learning_rate=0.1)(np.ones((T, B, I), "float32"), np.zeros((B, O), "float32"))
    assert not np.isfinite(result.norm)
    assert not result.moved
    np.testing.assert_array_equal(model.params.flat, before)


def test_models_train_side_by_side_to_the_same_bits():
    def train(seed, results):
        model, x, targets = problem("gru", dtype="float32", seed=seed)
        take = TrainingStep(model, T, B, learning_rate=0.1)
        results[seed] = [take(x, targets).loss for _ in range(50)], model.params.flat.copy()

    alone, together = {}, {}
    for seed in range(4):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert together[seed][0] == alone[seed][0]
        np.testing.assert_array_equal(together[seed][1], alone[seed][1])


def test_a_step_from_the_cache_calls_kernels_from_the_cache(tmp_path):
    program = """
import numpy as np
from rnnlab import Recurrent, SequenceModel, TrainingStep
model = SequenceModel(Recurrent("rnn_tanh", 3, 11, seed=0), 5, seed=0)
take = TrainingStep(model, 7, 4, learning_rate=0.1)
print([take(np.ones((7, 4, 3), "float32"), np.arange(4)).loss for _ in range(3)])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert "compiles step" in runs[0].stderr
    assert "compiles" not in runs[1].stderr
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2}, "model must have one layer"),
        ({"bidirectional": True}, "model must have one layer"),
        ({"dropout": 0.5}, "model must have one layer"),
    ],
)
def test_models_that_it_cannot_take_are_refused(options, message):
    model, _, _ = problem(**options)
    with pytest.raises(ValueError, match=message):
        TrainingStep(model, T, B, learning_rate=0.1)


def test_bad_arguments_are_named_and_nothing_moves():
    model, x, targets = problem()
    for arguments, message in (
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"learning_rate": -1}, r"learning_rate must be a finite number in \[0, inf\), got -1"),
        ({"clip_norm": float("nan")}, "clip_norm must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingStep(model, **({"steps": T, "batch": B, "learning_rate": 0.1} | arguments))
    generating = SequenceModel(Recurrent("lstm", O, H, seed=0), O, "one_to_many", seed=0)
    with pytest.raises(
        ValueError,
        match="model must have one layer in one direction, no dropout and inputs that are given, got one_to_many",
    ):
        TrainingStep(generating, T, B, learning_rate=0.1)
    one, _, _ = problem(topology="one_to_one")
    with pytest.raises(ValueError, match="steps must be 1 for topology one_to_one, got 7"):
        TrainingStep(one, T, B, learning_rate=0.1)
    before, take = model.params.flat.copy(), TrainingStep(model, T, B, learning_rate=0.1)
    for bad, message in (
        ((x[:-1], targets), r"x must have shape \(7, 4, 3\)"),
        ((x, targets[:-1]), r"targets must be an integer array of shape \(4,\)"),
        ((x, targets + O), "targets must lie in 0…4"),
        ((x, targets, [7, 3, 1, 8]), "lengths must lie in 1…7"),
        ((x * np.nan, targets), "x must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            take(*bad)
    with pytest.raises(TypeError, match="x must have dtype float64, got float32"):
        take(x.astype("float32"), targets)
    np.testing.assert_array_equal(model.params.flat, before)
