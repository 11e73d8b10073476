"""The choice of a cell: sizes that budgets allow, times that follow a law, and what is said about it."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from rnnlab import choose
from rnnlab.applications import APPLICATIONS
from rnnlab.choose import Job
from rnnlab.cli import main
from rnnlab.costs import Shape, memory, parameters
from rnnlab.kernels.simd import VECTOR_BYTES

CELLS = ("rnn_tanh", "lstm", "gru")
JOB = Job("many_to_one", 200, 12, 3)
WORDS = ["choose", "--task-like", "many_to_one", "--length", "200", "--inputs", "12"]


@pytest.fixture
def law(monkeypatch, tmp_path):
    """Time as a law: 1 ms and 1 µs for each gate, unit and step; no evidence; sequences that were measured."""
    measured = []
    monkeypatch.setattr(choose, "EVIDENCE", tmp_path / "none.csv")

    def call(job, model, steps):
        measured.append(steps)
        return lambda: 1e-3 + 1e-6 * len(model.rnn.cell.gates) * model.rnn.hidden_size * steps

    monkeypatch.setattr(Job, "call", call)
    monkeypatch.setattr(choose, "wall_clock", lambda call: call())
    times = {"seconds": 0.2, "pause": 0}
    monkeypatch.setattr(
        choose, "interleave", lambda calls, **k: {n: np.full(7, c()) for n, c in calls.items() if k == times}
    )
    return measured


@pytest.mark.parametrize("length", [1, 20, 200, 5000])
def test_time_follows_the_line_through_two_sequences(law, length):
    job = Job("many_to_many", length, 4)
    # In float64: a few roundings
    assert job.seconds("lstm", 50) == pytest.approx(1e-3 + 1e-6 * 4 * 50 * length, rel=1e-12)
    assert max(law) <= max(64, 0.05 / (1e-6 * 4 * 50))  # no longer than needed


def test_one_step_is_one_step(law):
    assert Job("one_to_one", 500, 4).seconds("gru", 10) == pytest.approx(1e-3 + 1e-6 * 3 * 10, rel=1e-12)


def test_times_of_a_busy_machine_stay_times(monkeypatch):
    monkeypatch.setattr(Job, "call", lambda job, model, steps: lambda: steps)
    monkeypatch.setattr(choose, "wall_clock", lambda call: 1.0)
    for less, more, step in ((0.9, 0.8, 0.5 * 0.8 / 64), (0.1, 0.8, 0.8 / 64)):
        times = {"32": np.array([less]), "64": np.array([more])}
        monkeypatch.setattr(choose, "interleave", lambda calls, times=times, **_: times)
        assert Job("many_to_one", 164, 1).seconds("gru", 4) == pytest.approx(more + 100 * step, rel=1e-12)


@pytest.mark.parametrize("topology", ["one_to_one", "one_to_many", "many_to_one", "many_to_many", "encoder_decoder"])
@pytest.mark.parametrize("scope", ["forward", "training"])
def test_every_topology_is_measured(topology, scope):
    seconds = Job(topology, 3, 2, 2, batch=2, scope=scope).seconds("rnn_tanh", 4)
    assert 1e-6 < seconds < 1  # a call from Python, and three steps of four units


def test_budget_of_parameters_is_met_and_ranked_by_time(law):
    frame = choose.choose(JOB, CELLS, most_parameters=100_000)
    assert list(frame["cell"]) == ["rnn_tanh", "gru", "lstm"]  # G·H·T, with G·H² the same: √G
    for row in frame.itertuples():
        counts = [parameters(Shape(row.cell, 1, 1, 12, row.hidden_size + k, output_size=3)) for k in (0, 1)]
        assert row.parameters == counts[0] <= 100_000 < counts[1]
        shape = Shape(row.cell, 200, 1, 12, row.hidden_size, output_size=3)
        assert row.megabytes == memory(shape, scope="forward").total / 1e6
    assert frame["skill"].isna().all()


def test_budget_of_time_is_met_and_ranked_by_parameters(law):
    frame = choose.choose(JOB, CELLS, most_seconds=0.101)
    assert list(frame["cell"]) == ["rnn_tanh", "gru", "lstm"]
    lanes = VECTOR_BYTES // 4
    for row in frame.itertuples():
        units = 0.1 / (1e-6 * 200 * {"rnn_tanh": 1, "lstm": 4, "gru": 3}[row.cell])
        assert row.hidden_size == int(units) // lanes * lanes
        assert row.milliseconds <= 101


def test_one_to_one_is_of_one_step(law):
    job = dataclasses.replace(JOB, topology="one_to_one")
    assert "for one sequence of 1 steps takes" in choose.words(job, choose.choose(job, CELLS, most_parameters=1000))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, got 'foo'"):
        dataclasses.replace(JOB, dtype="foo")
    with pytest.raises(ValueError, match="cells must name at least one cell, got none"):
        choose.choose(JOB, (), most_parameters=100)


def test_evidence_ranks_and_speaks(law, tmp_path, monkeypatch):
    file = tmp_path / "evidence.csv"
    monkeypatch.setattr(choose, "EVIDENCE", file)
    columns = ("topology", "cell", "skill", "low_skill", "high_skill", "tasks")
    rows = [("many_to_one", "gru", 0.5, 0.4, 0.6, 4), ("many_to_one", "lstm", 0.7, 0.6, 0.8, 4)]
    pd.DataFrame([*rows, ("many_to_many", "gru", 0.9, 0.9, 0.9, 2)], columns=columns).to_csv(file, index=False)
    frame = choose.choose(JOB, CELLS, most_parameters=1000)
    assert list(frame["cell"]) == ["lstm", "gru", "rnn_tanh"]
    text = choose.words(JOB, frame)
    said = "In 4 tasks of this kind, at equal parameters, lstm removed 70% (60%–80%, other networks) of the baseline's"
    assert said in text
    assert "No study" not in text


def test_there_is_evidence_for_every_arrangement_that_has_tasks():
    found = pd.read_csv(choose.EVIDENCE)
    assert set(found["topology"]) == {kind.topology for kind in APPLICATIONS.values()}
    assert {"lstm", "gru"} <= set(found["cell"])
    assert (found["low_skill"] < found["skill"]).all()
    assert (found["skill"] < found["high_skill"]).all()


def test_command_prints_a_ranked_table(law):
    result = CliRunner().invoke(main, [*WORDS, "--params", "100000"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["cell", "hidden_size", "parameters", "milliseconds", "megabytes"]
    assert [line.split()[0] for line in lines[1:4]] == ["rnn_tanh", "gru", "lstm"]
    assert (
        "First comes rnn_tanh with 308 hidden units: 99,485 parameters; a prediction for one sequence" in result.stdout
    )
    assert "No study of rnnlab has measured yet which cell is better" in result.stdout
    found = json.loads(CliRunner().invoke(main, [*WORDS, "--budget-ms", "101", "--json"]).stdout)
    assert [row["cell"] for row in found["rows"]] == ["rnn_tanh", "gru", "lstm"]
    assert found["rows"][0]["skill"] is None
    assert found["environment"]["packages"]["rnnlab"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes most_parameters or most_seconds, got None and None"),
        (["--params", "9", "--budget-ms", "1"], "takes most_parameters or most_seconds, got 9 and 0.001"),
        (["--params", "9"], "most_parameters must be at least 17, the cost of 1 hidden units, got 9"),
        (["--params", "99", "--task-like", "some"], "topology must be one of one_to_one"),
        (["--params", "99", "--task-like", "one_to_many"], "output_size must equal the input_size 12"),
        (["--params", "99", "--cells", "gru,elman"], "'elman' is not one of rnn_tanh"),
        (["--params", "0"], "0 is not in the range x>=1"),
    ],
)
def test_usage_is_explained(law, words, message):
    result = CliRunner().invoke(main, [*WORDS, *words])
    assert result.exit_code == 2
    assert message in result.stderr


def test_device_that_is_not_there_exits_with_3():
    result = CliRunner().invoke(main, [*WORDS, "--params", "99", "--device", "cuda"])
    assert result.exit_code == 3
    assert "device 'cuda' cannot be used" in result.stderr
