"""Synthetic tasks: what their sequences hold, their baselines, and sequences of one's own."""

import numpy as np
import pytest

from rnnlab.tasks import TASKS, dataset, sample_task


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", TASKS)
def test_samples_fit_the_model_and_follow_their_seed(name, dtype):
    task = TASKS[name]
    x, targets = sample_task(name, 30, 4, 1, dtype)
    assert x.dtype == dtype
    assert x.shape == (30 + task.extra_steps, 4, task.input_size)
    shape = x.shape[:2] if task.topology == "many_to_many" else (4,)
    if task.loss == "cross_entropy":
        assert targets.shape == shape
        assert targets.dtype == np.int64
        assert targets.min() >= 0
        assert targets.max() < task.output_size
    else:
        assert targets.shape == (*shape, task.output_size)
        assert targets.dtype == dtype
    again, other = sample_task(name, 30, 4, 1, dtype), sample_task(name, 30, 4, 2, dtype)
    np.testing.assert_array_equal(again[0], x)
    np.testing.assert_array_equal(again[1], targets)
    assert not np.array_equal(other[0], x)


@pytest.mark.parametrize("name", TASKS)
def test_the_baseline_is_the_loss_of_the_best_constant(name):
    """A mean over n = 20,000 draws lies within 4/√n of its own spread, but for one draw in 16,000."""
    task, n = TASKS[name], 20_000
    _, targets = sample_task(name, 24, n, 0)
    if task.topology == "many_to_many":  # copying: at each step the best constant is the distribution of its class
        shares = np.stack([(targets == k).mean(axis=1) for k in range(task.output_size)], axis=1)
        loss = -np.log(np.maximum(shares, 1e-300), where=shares > 0, out=np.zeros_like(shares))
        spread, got = 1.0, (shares * loss).sum(axis=1).mean()
    elif task.loss == "cross_entropy":
        shares = np.bincount(targets, minlength=task.output_size) / n
        spread, got = 1.0, -(shares * np.log(shares)).sum()
    else:
        squares = (targets - targets.mean()) ** 2
        spread, got = squares.std(), squares.mean()
    assert got == pytest.approx(task.baseline(24), abs=4 / np.sqrt(n) * spread)


def test_two_marked_values():
    for name, combine in (("adding", np.sum), ("multiplication", np.prod)):
        x, targets = sample_task(name, 41, 200, 3, "float64")
        values, marks = x[..., 0], x[..., 1]
        assert (marks[:20].sum(axis=0) == 1).all()
        assert (marks[20:].sum(axis=0) == 1).all()
        assert values.min() >= 0
        assert values.max() < 1
        for b in range(200):
            assert targets[b, 0] == combine(values[marks[:, b] == 1, b])


def test_adding_as_in_1997():
    x, targets = sample_task("adding_1997", 40, 500, 3, "float64")
    values, marks = x[..., 0], x[..., 1]
    assert values.min() < -0.9
    assert ((marks == 1).sum(axis=0) == 2).all()
    assert ((marks[:10] == 1).sum(axis=0) >= 1).all()
    assert (marks[20:-1] == 0).all()
    assert (marks[-1] == -1).all()
    assert (values[0, marks[0] == 1] == 0).all()
    assert (marks[0] == 1).any()
    assert (marks[0, marks[0] != 1] == -1).all()
    for b in range(500):
        assert targets[b, 0] == 0.5 + values[marks[:, b] == 1, b].sum() / 4


def test_copying():
    for length in (1, 7, 30):
        x, targets = sample_task("copying", length, 20, 3)
        assert (x.sum(axis=2) == 1).all()
        symbols = x.argmax(axis=2)
        assert symbols[:10].max() < 8
        assert (symbols[length + 9] == 9).all()
        assert (np.delete(symbols[10:], length - 1, axis=0) == 8).all()
        np.testing.assert_array_equal(targets[-10:], symbols[:10])
        assert (targets[:-10] == 8).all()


@pytest.mark.parametrize(("name", "starts"), [("temporal_order", (4, 20)), ("temporal_order_3", (4, 12, 24))])
def test_temporal_order(name, starts):
    x, targets = sample_task(name, 40, 300, 3)
    assert (x.sum(axis=2) == 1).all()
    symbols = x.argmax(axis=2)
    expected = np.zeros(300, np.int64)
    for k, start in enumerate(starts):
        relevant = symbols[start : start + 4] < 2
        assert (relevant.sum(axis=0) == 1).all()
        assert relevant.any(axis=1).all()
        expected += np.where(relevant, symbols[start : start + 4], 0).sum(axis=0) << k
    assert ((symbols < 2).sum(axis=0) == len(starts)).all()
    np.testing.assert_array_equal(targets, expected)


def test_parity_and_noisy_recall():
    x, targets = sample_task("parity", 13, 100, 3)
    np.testing.assert_array_equal(targets, (x[..., 0] == 1).sum(axis=0) % 2)
    assert set(np.unique(x)) == {-1, 1}
    x, targets = sample_task("noisy_recall", 103, 200, 3)
    np.testing.assert_array_equal(x[:3, :, 0], np.broadcast_to(2 * targets - 1, (3, 200)))
    # 20,000 draws: the standard error of a variance v is v·√(2/n) = 0.002.
    assert x[3:].var() == pytest.approx(0.2, abs=0.008)


def test_shorter_sequences_are_zero_past_their_end():
    task = TASKS["copying"]
    x, targets, lengths = np.full((40, 3, 10), np.nan), np.full((120, 1), -1), np.array([40, 25, 33])
    task.generate(np.random.default_rng(0), x, targets, lengths, np.zeros(1, np.int64), ())
    for b, n in enumerate(lengths):
        assert (x[n:, b] == 0).all()
        np.testing.assert_array_equal(targets[b::3, 0][n - 10 : n], x[:10, b].argmax(axis=1))
        assert (targets[b::3, 0][n:] == 0).all()


def test_what_is_right():
    order, adding, copying = TASKS["temporal_order"], TASKS["adding"], TASKS["copying"]
    outputs = np.array([[0.1, 0.7, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [np.nan] * 4])
    np.testing.assert_array_equal(order.right(outputs, np.array([1, 1, 0])), [True, False, False])
    np.testing.assert_array_equal(adding.right(np.array([[1.07], [0.91], [np.nan]]), np.ones((3, 1))), [1, 0, 0])
    outputs = np.eye(9)[np.array([[1, 2], [3, 4]])]
    np.testing.assert_array_equal(copying.right(outputs, np.array([[1, 2], [3, 5]])), [True, False])


@pytest.mark.parametrize("every", [False, True])
def test_a_data_set_gives_each_sequence_once_an_epoch(every):
    rng = np.random.default_rng(0)
    N, T = 7, 5
    x = rng.normal(size=(T, N, 2))
    x[0, :, 0] = np.arange(N)
    targets = rng.integers(3, size=(T, N)) if every else np.arange(N) % 3
    past = np.arange(T)[:, None] > np.arange(N) % T
    task = dataset(x, targets, np.arange(N) % T + 1, topology="many_to_many" if every else "many_to_one")
    x, targets = np.where(past[..., None], 0, x), np.where(past, 0, targets) if every else targets
    assert (task.input_size, task.output_size, task.loss) == (2, 3, "cross_entropy")
    assert np.isnan(task.baseline(T))
    seen, order = [], np.zeros(1 + N, np.int64)
    batch, rows, lengths = np.empty((T, 4, 2)), np.empty((T * 4 if every else 4, 1), np.int64), np.zeros(4, np.int64)
    for _ in range(7):  # four epochs in batches that do not divide them
        task.generate(rng, batch, rows, lengths, order, task.arrays)
        numbers = batch[0, :, 0].astype(int)
        seen += list(numbers)
        np.testing.assert_array_equal(batch, x[:, numbers])
        np.testing.assert_array_equal(rows.reshape(-1, 4), np.atleast_2d(targets[..., numbers]))
        np.testing.assert_array_equal(lengths, numbers % T + 1)
    epochs = [tuple(seen[k : k + N]) for k in range(0, 4 * N, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_bad_arguments_are_named():
    for arguments, message in (
        (("addition", 30, 4), "task must be one of adding"),
        ((dataset(np.zeros((5, 3, 2)), np.zeros(3, int)), 5, 4), "task must be synthetic"),
        (("temporal_order", 9, 4), "length must be at least 10 for temporal_order, got 9"),
        (("adding", 30.0, 4), "length must be an integer"),
        (("adding", 30, 0), "batch must be an integer of at least 1"),
        (("adding", 30, 4, 0, "float16"), "dtype must be one of float32, float64"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_task(*arguments)
    x, labels = np.zeros((5, 3, 2)), np.array([0, 1, 2])
    for arguments, options, message in (
        ((x, labels[:2]), {}, r"targets must be integers from 0 of shape \(3,\)"),
        ((x, labels - 1), {}, "targets must be integers from 0"),
        ((x, labels), {"output_size": 2}, "output_size must be at least 3"),
        ((x, x[0]), {"loss": "mse", "output_size": 3}, "output_size must be 2 for these targets, got 3"),
        ((x, labels), {"topology": "many_to_many"}, r"of shape \(5, 3\)"),
        ((x, labels), {"topology": "one_to_one"}, r"x must have shape \(1, N, I\)"),
        ((x, labels), {"topology": "one_to_six"}, "topology must be one of one_to_one"),
        ((x, labels), {"target_lengths": [1, 1, 1]}, "target_lengths belongs to one_to_many and encoder_decoder"),
        ((x, x[:2, :, 0].astype(int), None), {"topology": "encoder_decoder", "target_lengths": [1, 3, 1]}, "1…2"),
        ((x, labels, [5, 6, 1]), {}, "lengths must lie in 1…5"),
        ((x, labels), {"loss": "hinge"}, "loss must be one of"),
        ((x * np.nan, labels), {}, "x must be finite"),
        ((x, np.zeros((2, 1))), {"loss": "mse"}, "targets must have shape"),
        ((x, np.full((3, 1), 5.0)), {"loss": "bce"}, r"targets must lie in \[0, 1\] for bce, got 5.0…5.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(*arguments, **options)
    with pytest.raises(TypeError, match="x and targets must be numpy arrays, got list and ndarray"):
        dataset([1.0], labels)


def test_what_lies_past_the_end_does_not_count():
    x, lengths = np.zeros((5, 3, 2)), np.array([5, 2, 1])
    past = np.arange(5)[:, None] >= lengths
    task = dataset(np.where(past[..., None], np.nan, x), np.where(past, 9, 1), lengths, topology="many_to_many")
    assert task.output_size == 2
    np.testing.assert_array_equal(task.arrays[1].reshape(5, 3), np.where(past, 0, 1))
    assert not task.arrays[0].any()
