"""Checkpointed BPTT: bit for bit the gradients of plain BPTT, in memory that grows with √T."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rnnlab import CELLS, Recurrent, SequenceModel
from rnnlab.kernels import cpu


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Checkpoints lie whole chunks apart: short ones make several segments of one and of more chunks."""
    monkeypatch.setattr(cpu, "chunk_steps", lambda cell, B, H: 100 // B)


def problem(cell, topology, *, T=300, B=3, layers=1, loss="cross_entropy", **options):
    model = SequenceModel(Recurrent(cell, 4, 19, layers, seed=0, **options), 3, topology, loss, seed=1)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(T, B, 4)).astype(model.rnn.dtype)
    return model, x, rng.integers(3, size=(T, B) if topology == "many_to_many" else (B,))


def assert_same(one, other):
    assert one.loss == other.loss
    for name in ("outputs", "x", "final"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.params.flat, other.params.flat)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_every_cell_are_the_same_bits(cell):
    model, x, targets = problem(cell, "many_to_one")
    assert_same(model.loss_and_gradients(x, targets, checkpoint="sqrt"), model.loss_and_gradients(x, targets))


@pytest.mark.parametrize("topology", ["many_to_one", "many_to_many"])
@pytest.mark.parametrize("lengths", [None, [300, 180, 2], [250, 90, 249]])
@pytest.mark.parametrize("every", ["sqrt", 1, 100, 299, 300, 1000])
def test_gradients_are_the_same_bits_for_any_distance(topology, lengths, every):
    """Two layers, unequal lengths (whole segments past the end of a sequence), segments longer than the sequence."""
    model, x, targets = problem("lstm", topology, layers=2)
    kept = model.loss_and_gradients(x, targets, lengths, checkpoint=every)
    assert_same(kept, model.loss_and_gradients(x, targets, lengths))
    assert kept.recurrent == {}


def test_4096_steps_are_the_same_bits():
    model, x, targets = problem("lstm", "many_to_one", T=4096, B=1)
    assert_same(model.loss_and_gradients(x, targets, checkpoint="sqrt"), model.loss_and_gradients(x, targets))


def test_gradients_between_checkpoints_are_those_of_backward():
    net = Recurrent("gru", 4, 19, 2, seed=3)
    rng = np.random.default_rng(4)
    x, d_output = (rng.normal(size=(200, 2, size)).astype(np.float32) for size in (4, 19))
    state, d_final = (rng.normal(size=(2, 2, 19)).astype(np.float32) for _ in range(2))
    trace, kept = net.forward(x, state), net.checkpoint(x, state, every=100)
    np.testing.assert_array_equal(kept.output, trace.output)
    plain, sparse = net.backward(trace, d_output, d_final), net.gradients(kept, d_output, d_final)
    for name in ("x", "state"):
        np.testing.assert_array_equal(getattr(sparse, name), getattr(plain, name))
    np.testing.assert_array_equal(sparse.params.flat, plain.params.flat)
    assert len(kept.states) == 1 + -(-200 // kept.every)


def test_what_checkpoints_do_not_reach_is_refused():
    model, x, targets = problem("gru", "many_to_one", bidirectional=True)
    with pytest.raises(
        ValueError, match="checkpoint needs states that are carried forward, got a bidirectional network"
    ):
        model.loss_and_gradients(x, targets, checkpoint="sqrt")
    model, x, targets = problem("gru", "many_to_one", layers=2, dropout=0.5)
    with pytest.raises(ValueError, match="checkpoint needs inputs that are given and no dropout"):
        model.loss_and_gradients(x, targets, training=True, checkpoint=10)
    with pytest.raises(ValueError, match="every must"):
        model.loss_and_gradients(x, targets, checkpoint=0)


MILLION = """
import re, numpy as np
from rnnlab import Recurrent, SequenceModel
T = 1_000_000
model = SequenceModel(Recurrent("lstm", 8, 128, seed=0), 3, "many_to_one", seed=1)
x = np.random.default_rng(0).normal(size=(T, 1, 8)).astype(np.float32)
result = model.loss_and_gradients(x, np.zeros(1, int), checkpoint="sqrt")
assert all(np.isfinite(array).all() and array.any() for array in result.params.values())
status = open("/proc/self/status").read()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the largest memory of a process is read from /proc")
def test_a_million_steps_fit_into_a_gibibyte():
    """The peak of the process itself (ru_maxrss would begin with that of the parent)."""
    alone = os.environ | {"NUMBA_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MILLION], env=alone, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**30
