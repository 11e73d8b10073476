"""Whole training steps in one compiled call, against `loss_and_gradients` and updates in NumPy; and whole runs."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import naive
import numpy as np
import pytest
from conftest import DIFFERENCE_TOLERANCE, directional_difference, random_direction

from rnnlab import CELLS, Recurrent, SequenceModel, TrainingStep, training
from rnnlab.checks import generator
from rnnlab.clipping import (
    Adaptive,
    AtPreActivations,
    ByGlobalNorm,
    ByNorm,
    ByPercentile,
    ByValue,
    PerTimeStep,
    clipped_gradients,
    new_history,
)
from rnnlab.losses import LOSSES
from rnnlab.optim import SGD, Adam, RMSprop
from rnnlab.tasks import TASKS, dataset, target_rows
from rnnlab.training import error_rate, train

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
    take = TrainingStep(model, T, B, SGD(rate), None if threshold == np.inf else ByGlobalNorm(threshold))
    for _ in range(3):
        got = take(x, targets, lengths)
        loss, norm = updated(other, x, targets, lengths, rate, threshold)
        # The same sums but for their order: a few roundings of numbers up to about one.
        assert got.loss == pytest.approx(loss, abs=1e-13)
        assert got.norm == pytest.approx(norm, rel=1e-13)
        assert got.clipped_norm == pytest.approx(min(norm, threshold), rel=1e-13)
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
    got = TrainingStep(models[0], steps, batch, SGD(0.5))(x, targets, lengths)
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
    take = TrainingStep(model, 1, B, SGD(0.1))
    assert take(x[:1], targets).loss == pytest.approx(updated(other, x[:1], targets, None, 0.1, np.inf)[0], rel=1e-13)
    np.testing.assert_allclose(model.params.flat, other.params.flat, rtol=0, atol=1e-14)


def test_one_step_after_another_sees_its_own_arguments():
    """Nothing stays of a call: not the sequences, their lengths, or what lay past the end of shorter ones."""
    (model, x, targets), (other, _, _) = problem(topology="many_to_many"), problem(topology="many_to_many")
    take = TrainingStep(model, T, B, SGD(0.2))
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
    take, rng = TrainingStep(model, T, 32, SGD(1.0), ByGlobalNorm(1.0)), np.random.default_rng(2)
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
    result = TrainingStep(model, T, B, SGD(0.1))(np.ones((T, B, I), "float32"), np.zeros((B, O), "float32"))
    assert not np.isfinite(result.norm)
    assert not result.moved
    np.testing.assert_array_equal(model.params.flat, before)


def test_models_train_side_by_side_to_the_same_bits():
    def train(seed, results):
        model, x, targets = problem("gru", dtype="float32", seed=seed)
        take = TrainingStep(model, T, B, SGD(0.1))
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
from rnnlab.optim import SGD
model = SequenceModel(Recurrent("rnn_tanh", 3, 11, seed=0), 5, seed=0)
take = TrainingStep(model, 7, 4, SGD(0.1))
print([take(np.ones((7, 4, 3), "float32"), np.arange(4)).loss for _ in range(3)])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert "compiles gradients" in runs[0].stderr
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
        TrainingStep(model, T, B, SGD(0.1))


def test_bad_arguments_are_named_and_nothing_moves():
    model, x, targets = problem()
    for arguments, kind, message in (
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"omega": -1}, ValueError, r"omega must be a finite number in \[0, inf\), got -1"),
        ({"omega": 1}, ValueError, "omega needs a cell rnn_… and no rule within BPTT, got lstm"),
        ({"clip": 1.0}, TypeError, "optimiser and clip must be an Optimiser and a ClippingRule"),
        ({"optimiser": 0.1}, TypeError, "optimiser and clip must be an Optimiser and a ClippingRule"),
    ):
        with pytest.raises(kind, match=message):
            TrainingStep(model, **({"steps": T, "batch": B, "optimiser": SGD(0.1)} | arguments))
    simple, _, _ = problem("rnn_tanh")
    with pytest.raises(ValueError, match="no rule within BPTT, got rnn_tanh, PerTimeStep"):
        TrainingStep(simple, T, B, SGD(0.1), PerTimeStep(1.0), omega=1.0)
    generating = SequenceModel(Recurrent("lstm", O, H, seed=0), O, "one_to_many", seed=0)
    with pytest.raises(
        ValueError,
        match="model must have one layer in one direction, no dropout and inputs that are given, got one_to_many",
    ):
        TrainingStep(generating, T, B, SGD(0.1))
    one, _, _ = problem(topology="one_to_one")
    with pytest.raises(ValueError, match="steps must be 1 for topology one_to_one, got 7"):
        TrainingStep(one, T, B, SGD(0.1))
    with pytest.raises(TypeError, match="model must be a SequenceModel, got Recurrent"):
        TrainingStep(model.rnn, T, B, SGD(0.1))
    before, take = model.params.flat.copy(), TrainingStep(model, T, B, SGD(0.1))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a TrainingStep is not copied: make one of the copied model"):
            copied(take)
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


# Optimisers, clipping rules and the regulariser within a step ---------------------------------------------------------

RULES = [
    None,
    ByValue(0.01),
    ByNorm(0.05),
    Adaptive(0.02),
    ByPercentile(50),
    PerTimeStep(0.02),
    AtPreActivations(0.003),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimiser", [SGD(0.1, momentum=0.9), RMSprop(0.01), Adam(0.01)])
def test_step_of_every_optimiser_and_rule(optimiser, rule):
    """The same compiled functions, called one by one: what differs is the order of the sums in the gradient."""
    (model, x, targets), (other, _, _) = problem("gru"), problem("gru")
    take, history = TrainingStep(model, T, B, optimiser, rule), new_history()
    state = np.zeros((optimiser.rows, other.params.flat.size))
    for step in (1, 2, 3):
        got = take(x, targets, LENGTHS)
        record = None
        if rule is None:
            gradient = other.loss_and_gradients(x, targets, LENGTHS).params
        else:
            gradient, record = clipped_gradients(other, x, targets, rule, LENGTHS, history)
        optimiser.update(other.params.flat, gradient.flat, state, step)
        # Adam and RMSprop divide by the root of a mean of squares: rounding of a small element becomes that of a step.
        np.testing.assert_allclose(model.params.flat, other.params.flat, rtol=0, atol=1e-11)
        if record is not None:
            assert got[1:5] == pytest.approx(record, rel=1e-9)
            assert record.fraction > 0 or isinstance(rule, ByPercentile)  # of norms that fall all are below theirs


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "rnn_sigmoid"])
def test_omega_adds_its_immediate_derivative(cell):
    """Against a finite difference of Ω as W_hh moves, with δ and the slopes of the textbook held."""
    model, x, targets = problem(cell)
    alpha, W, lengths = 0.7, model.rnn.params["weight_hh_l0"], np.array(LENGTHS)
    exact = model.loss_and_gradients(x, targets, LENGTHS)
    take = TrainingStep(model, T, B, SGD(0.0), omega=alpha)
    take(x, targets, LENGTHS)
    added = take.gradient.flat - exact.params.flat
    others = model.params.like()
    others["rnn.weight_hh_l0"][...] = 1
    assert np.abs(added[others.flat == 0]).max() < 1e-14
    trace = naive.forward(cell, dict(model.rnn.params.items()), x, None, LENGTHS)
    prime = {"rnn_tanh": naive.tanh_prime, "rnn_relu": naive.relu_prime, "rnn_sigmoid": naive.sigmoid_prime}[cell]
    slopes, delta = np.zeros((T, B, H)), np.zeros((T, B, H))
    for t, (_, _, a) in enumerate(trace.saved[0]):
        rows = t < lengths
        slopes[t, rows], delta[t, rows] = prime(a), exact.recurrent["rnn"].h[0][t + 1, rows] * prime(a)

    def omega():
        terms = []
        for b in range(B):
            for t in range(lengths[b] - 1):
                back = slopes[t, b] * (W.T @ delta[t + 1, b])
                terms.append((np.linalg.norm(back) / np.linalg.norm(delta[t + 1, b]) - 1) ** 2)
        return np.mean(terms)

    assert take.figures[training.steps_of.OMEGA] == pytest.approx(omega(), rel=1e-12)
    added = (take.gradient["rnn.weight_hh_l0"] - exact.params["rnn.weight_hh_l0"]) / alpha
    assert np.linalg.norm(added) > 0.01
    for seed in range(3):
        direction = random_direction(np.random.default_rng(seed), W)
        slope = directional_difference(omega, W, direction)
        assert (added * direction).sum() == pytest.approx(slope, abs=DIFFERENCE_TOLERANCE)


# Whole runs -----------------------------------------------------------------------------------------------------------

#: The shortest length of a task, to keep runs short.
LENGTH = 10


def learner(cell="rnn_tanh", task="temporal_order", hidden=12, dtype="float64", seed=0):
    row = TASKS[task]
    net = Recurrent(cell, row.input_size, hidden, dtype=dtype, seed=seed)
    return SequenceModel(net, row.output_size, row.topology, row.loss, seed=seed)


@pytest.mark.parametrize("length", [LENGTH, (LENGTH, 14)])
def test_a_run_is_its_steps_one_after_the_other(length):
    model, other, task = learner(), learner(), TASKS["temporal_order"]
    log = train(model, "temporal_order", Adam(0.01), length=length, batch=5, updates=30, clip=ByGlobalNorm(0.1), seed=3)
    low, high = length if isinstance(length, tuple) else (length, length)
    take, rng = TrainingStep(other, high, 5, Adam(0.01), ByGlobalNorm(0.1)), generator(3, "training")
    x, targets, lengths = np.empty((high, 5, 6)), target_rows(task, high, 5, "float64"), np.full(5, high)
    losses, drawn = [], set()
    for _ in range(30):
        if low < high:
            lengths[:] = rng.integers(low, high + 1)
        drawn.add(int(lengths[0]))
        task.generate(rng, x, targets, lengths, np.zeros(1, np.int64), ())
        losses.append(take(x, targets[:, 0], lengths))
    np.testing.assert_array_equal(model.params.flat, other.params.flat)
    assert drawn == set(range(low, high + 1))
    frame = log.to_frame()
    assert log.outcome == "finished"
    assert frame["update"].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 30]
    assert frame["sequences"].tolist() == (5 * frame["update"]).tolist()
    for before, row in zip(log.rows, log.rows[1:], strict=False):
        seen = losses[before["update"] : row["update"]]
        assert row["loss"] == pytest.approx(np.mean([one.loss for one in seen]), rel=1e-14)
        assert row["updates_clipped"] == np.mean([one.fraction > 0 for one in seen])
        assert (row["norm"], row["clipped_norm"], row["cosine"]) == seen[-1][1:3] + seen[-1][4:5]
    assert np.isnan(log.rows[0]["loss"])
    radius = np.abs(np.linalg.eigvals(model.rnn.params["weight_hh_l0"])).max()
    assert log.rows[-1]["spectral_radius"] == pytest.approx(radius, rel=1e-12)
    assert log.rows[-1]["skipped"] == 0
    assert log.rows[-1]["not_finite"] == ""


def test_a_run_within_bptt_logs_the_true_gradient():
    model = learner("gru")
    log = train(model, "temporal_order", SGD(0.1), length=LENGTH, batch=5, updates=4, clip=PerTimeStep(1e-3), seed=0)
    for row in log.rows[1:]:
        assert 0 < row["clipped_norm"] < row["norm"]
        assert 0 < row["cosine"] < 1
        assert row["elements_clipped"] > 0
    assert {"spectral_radius_r", "spectral_radius_z", "spectral_radius_n"} < set(log.rows[0])


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("kind", ["task", "data"])
def test_a_run_that_was_killed_ends_with_the_same_bits(kind, tmp_path, monkeypatch):
    """Killed between two rows, after a checkpoint there, and again at a row."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 11, 6)), rng.integers(4, size=11)
    task = dataset(x, labels, rng.integers(1, 7, size=11)) if kind == "data" else "temporal_order"
    arguments = {"batch": 4, "updates": 60, "clip": ByPercentile(30), "seed": 5}
    arguments |= {"length": (LENGTH, 12)} if kind == "task" else {}
    whole = learner()
    log = train(whole, task, Adam(0.02), **arguments, evaluation=lambda model: float(model.params.flat.sum()))
    assert log.rows[-1]["evaluation"] == whole.params.flat.sum()

    monkeypatch.setattr(training, "_KEEP", 0)
    monkeypatch.setattr(training, "_LOOK", 1e-9)
    run, left = TrainingStep.run, [37, 4, 1000]

    def dying(self, updates, patience=1):
        left[0] -= 1
        if left[0] < 0:
            left.pop(0)
            raise Killed
        run(self, updates, patience)

    monkeypatch.setattr(TrainingStep, "run", dying)
    file, attempts = tmp_path / "run.npz", 0
    while True:
        model = learner(seed=9)  # what it starts from does not matter, once there is a checkpoint
        if attempts == 0:
            model.params.flat[...] = learner().params.flat
        try:
            attempts += 1
            again = train(
                model,
                task,
                Adam(0.02),
                **arguments,
                checkpoint=file,
                evaluation=lambda model: float(model.params.flat.sum()),
            )
            break
        except Killed:
            assert [entry.name for entry in tmp_path.iterdir()] == ["run.npz"]
    assert attempts == 3
    np.testing.assert_array_equal(model.params.flat, whole.params.flat)
    np.testing.assert_equal(again.rows, log.rows)
    finished = train(learner(seed=8), task, Adam(0.02), **arguments, checkpoint=file)
    np.testing.assert_equal(finished.rows, log.rows)
    with pytest.raises(ValueError, match="checkpoint must be one of"):
        train(model, task, Adam(0.03), **arguments, checkpoint=file)


def test_runs_side_by_side_end_with_the_same_bits():
    def run(seed, results):
        model = learner(seed=seed)
        log = train(model, "temporal_order", SGD(0.1), length=LENGTH, batch=4, updates=50, seed=seed)
        results[seed] = model.params.flat.copy(), log.rows

    alone, together = {}, {}
    for seed in range(3):
        run(seed, alone)
    threads = [threading.Thread(target=run, args=(seed, together)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        np.testing.assert_array_equal(together[seed][0], alone[seed][0])
        np.testing.assert_equal(together[seed][1], alone[seed][1])
    assert not np.array_equal(alone[0][0], alone[1][0])


def test_a_task_is_learned_and_the_run_stops():
    """A class shown at the first three of twelve steps, under noise: chance is one half."""
    model = learner("rnn_tanh", "noisy_recall", seed=1)
    assert 0.3 < error_rate(model, "noisy_recall", 12, sequences=1000) < 0.7
    given = dataset(np.zeros((12, 3, 1), model.rnn.dtype), np.array([0, 1, 1]), name="recalled")
    with pytest.raises(ValueError, match="task must be synthetic, got the given arrays of recalled"):
        error_rate(model, given, None)
    log = train(
        model,
        "noisy_recall",
        Adam(0.01),
        length=12,
        batch=20,
        updates=20_000,
        clip=ByGlobalNorm(1.0),
        evaluation=lambda model: error_rate(model, "noisy_recall", 12, sequences=1000),
        evaluate_every=250,
        measure={"update_twice": lambda model: 2.0},
        stop=lambda row: row["evaluation"] < 0.01,
    )
    assert log.outcome == "stopped"
    last = log.rows[-1]
    assert last["update"] % 250 == 0
    assert last["update"] < 20_000
    assert last["evaluation"] < 0.01
    assert last["loss"] < 0.5 * TASKS["noisy_recall"].baseline(12)
    assert all(np.isnan(row["evaluation"]) == (row["update"] % 250 > 0) for row in log.rows)
    assert all(row["update_twice"] == 2 for row in log.rows)


def test_error_rate_of_a_constant_prediction():
    model = learner()
    model.params["readout.weight"][...] = 0
    # A share of n = 10,000 draws: its standard error is √(0.75·0.25/n) = 0.0043.
    assert error_rate(model, "temporal_order", LENGTH) == pytest.approx(0.75, abs=4 * 0.0043)
    model.params["readout.bias"][...] = np.nan
    assert error_rate(model, "temporal_order", LENGTH, sequences=50) == 1


def test_a_loss_that_is_nan_from_the_start_is_an_outcome(tmp_path):
    model = learner()
    model.params["rnn.weight_hh_l0"][3, 2] = np.nan
    for _ in range(2):  # the second time from the checkpoint
        log = train(
            model,
            "temporal_order",
            SGD(0.1),
            length=LENGTH,
            batch=2,
            updates=10**6,
            measure={"one": lambda model: 1.0},
            checkpoint=tmp_path / "nan.npz",
        )
        assert log.outcome == "diverged"
        last = log.rows[-1]
        assert (last["update"], last["skipped"], last["not_finite"]) == (100, 100, "rnn.weight_ih_l0")
        assert np.isnan([last["loss"], last["spectral_radius"], last["one"]]).all()


def test_the_parameter_that_is_not_finite_is_named():
    """A state of 1e25 whose weight is zero, and an error of 1e15: dL/dW_hh alone overflows float32."""
    net = Recurrent("rnn_relu", 1, 1, bias=False, seed=0)
    net.params["weight_ih_l0"][...], net.params["weight_hh_l0"][...] = 1e25, 0
    model = SequenceModel(net, 1, "many_to_one", "mse", seed=0)
    model.params["readout.weight"][...], model.params["readout.bias"][...] = 1e15, 0
    x = np.array([[[1.0], [1.0]], [[1e-25], [1e-25]]], "float32")
    data = dataset(x, np.zeros((2, 1), "float32"), loss="mse")
    before = model.params.flat.copy()
    log = train(model, data, SGD(0.1), batch=2, updates=7)
    assert log.outcome == "finished"
    assert (log.rows[-1]["skipped"], log.rows[-1]["not_finite"]) == (7, "rnn.weight_hh_l0")
    np.testing.assert_array_equal(model.params.flat, before)


def test_bad_arguments_of_a_run_are_named():
    model, data = learner(), dataset(np.zeros((5, 3, 6), "float32"), np.array([0, 1, 3]))
    good = {"length": LENGTH, "batch": 2, "updates": 3}
    for task, options, kind, message in (
        ("temporal", {}, ValueError, "task must be one of adding"),
        ("adding", {}, ValueError, "model must have input_size 2 for adding, got 6"),
        ("temporal_order_3", {}, ValueError, "model must have output_size 8 for temporal_order_3, got 4"),
        ("temporal_order", {"length": 9}, ValueError, "length must be at least 10"),
        ("temporal_order", {"length": None}, ValueError, "length must be an integer"),
        ("temporal_order", {"length": (12, 11)}, ValueError, "length must begin with the least one"),
        ("temporal_order", {"updates": 0}, ValueError, "updates must be an integer of at least 1"),
        ("temporal_order", {"evaluate_every": 0}, ValueError, "evaluate_every must be an integer of at least 1"),
        ("temporal_order", {"seed": -1}, ValueError, "seed must be None or an integer"),
        (data, {"length": None}, TypeError, "model must have dtype float32 of dataset, got float64"),
        (dataset(data.arrays[0].astype("float64"), np.array([0, 1, 3])), {}, ValueError, "length belongs to synthetic"),
    ):
        with pytest.raises(kind, match=message):
            train(model, task, SGD(0.1), **(good | options))
    with pytest.raises(ValueError, match="task must be synthetic, got the given arrays of dataset"):
        error_rate(model, data, LENGTH)


# Models that no compiled step takes ---------------------------------------------------------------------------------


def pairs(dtype="float64"):
    """Sequences to be answered by others, both of unequal length, as a task."""
    rng = np.random.default_rng(0)
    lengths, target_lengths = rng.integers(1, 6, size=9), rng.integers(1, 5, size=9)
    x = rng.normal(size=(5, 9, 3)) * (np.arange(5)[:, None] < lengths)[..., None]
    told = {"topology": "encoder_decoder", "target_lengths": target_lengths, "output_size": 4}
    return dataset(x.astype(dtype), rng.integers(4, size=(4, 9)), lengths, **told)


def stacked(dropout=0.0, seed=0):
    net = Recurrent("gru", 6, 5, 2, bidirectional=True, dropout=dropout, dtype="float64", seed=seed)
    return SequenceModel(net, 4, seed=seed)


def test_any_model_takes_the_steps_of_its_gradients():
    """Written out: draw, gradient, clipping, update; what is compiled apart gives the same numbers."""
    data, order = pairs(), "temporal_order"
    for task, model, twin, length in (
        (data, data.model("lstm", 5, dtype="float64", seed=0), data.model("lstm", 5, dtype="float64", seed=0), None),
        (TASKS[order], stacked(), stacked(), (LENGTH, 12)),
    ):
        log = train(model, task, Adam(0.02), batch=4, updates=7, length=length, clip=ByGlobalNorm(0.1), seed=3)
        T, B, generates = len(data.arrays[0]) if length is None else 12, 4, twin.generates
        rng, x = generator(3, "training"), np.zeros((T, B, task.input_size))
        targets, lengths = target_rows(task, T, B, "float64"), np.full(2 * B if generates else B, T)
        places, state = np.zeros(10, np.int64), np.zeros((2, twin.params.flat.size))
        for update in range(1, 8):
            if length:
                lengths[:] = rng.integers(length[0], length[1] + 1)
            task.generate(rng, x, targets, lengths, places, task.arrays)
            told = {"target_lengths": lengths[B:]} if generates else {}
            wanted = targets.reshape(-1, B) if generates else targets[:, 0]
            found = twin.loss_and_gradients(x, wanted, lengths[:B], **told)
            clipped = ByGlobalNorm(0.1)(found.params, twin.params)
            Adam(0.02).update(twin.params.flat, clipped.gradient.flat, state, update)
        assert log.rows[-1]["norm"] == clipped.record.norm
        assert log.rows[-1]["updates_clipped"] == 1
        np.testing.assert_array_equal(model.params.flat, twin.params.flat)


def test_any_model_learns_and_resumes_to_the_same_bits(tmp_path):
    data = pairs()
    arguments = {"batch": 3, "clip": ByGlobalNorm(1.0), "seed": 1}
    whole = data.model("gru", 16, dtype="float64", seed=0)
    log = train(whole, data, Adam(0.02), updates=150, **arguments)
    assert log.rows[-1]["loss"] < 0.1 * log.rows[1]["loss"]  # nine answers can be learned by heart
    again = data.model("gru", 16, dtype="float64", seed=0)
    for updates in (60, 150):
        file = tmp_path / "run.npz"
        log = train(again, data, Adam(0.02), updates=updates, checkpoint=file, **arguments)
    np.testing.assert_array_equal(again.params.flat, whole.params.flat)


def test_dropout_is_drawn_in_training_and_not_kept(tmp_path):
    models = [stacked(dropout) for dropout in (0.0, 0.5)]
    for model in models:
        train(model, "temporal_order", SGD(0.1), batch=4, updates=1, length=LENGTH)
    assert (models[0].params.flat != models[1].params.flat).any()
    with pytest.raises(ValueError, match="checkpoint takes no dropout"):
        train(models[1], "temporal_order", SGD(0.1), batch=4, updates=1, length=LENGTH, checkpoint=tmp_path / "x.npz")


def test_what_no_compiled_step_takes_clips_no_states():
    for options in ({"clip": PerTimeStep(1.0)}, {"clip": None, "omega": 1.0}):
        model = SequenceModel(Recurrent("rnn_tanh", 6, 5, 2, seed=0), 4, seed=0)
        with pytest.raises(ValueError, match=r"model must have one layer in one direction, .* for omega and rules"):
            train(model, "temporal_order", SGD(0.1), batch=4, updates=1, length=LENGTH, **options)


def test_a_general_model_that_diverges_is_an_outcome():
    data = pairs()
    model = data.model("rnn_relu", 5, dtype="float64", seed=0)
    for name in ("rnn.weight_hh_l0", "decoder.weight_hh_l0"):
        model.params[name] = np.full((5, 5), 1e200)
    before = model.params.flat.copy()
    with np.errstate(all="ignore"):
        log = train(model, data, SGD(0.1), batch=3, updates=200)
    assert log.outcome == "diverged"
    assert log.rows[-1]["skipped"] == 100
    np.testing.assert_array_equal(model.params.flat, before)


def test_a_checkpoint_knows_how_the_model_is_fed(tmp_path):
    data, file = pairs(), tmp_path / "run.npz"
    train(data.model("gru", 5, dtype="float64", seed=0), data, SGD(0.1), batch=3, updates=1, checkpoint=file)
    free = SequenceModel(Recurrent("gru", 3, 5, dtype="float64", seed=0), 4, "encoder_decoder", seed=0)
    with pytest.raises(ValueError, match="checkpoint must be one of"):
        train(free, data, SGD(0.1), batch=3, updates=2, checkpoint=file)
