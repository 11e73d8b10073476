"""Contests between cells: budgets, costs, what is learned and tested, and who is said to have won."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from rnnlab import contests, gradient_flow
from rnnlab.applications import Part, load, skill
from rnnlab.clipping import ByGlobalNorm
from rnnlab.contests import (
    averages,
    beside_torch,
    budgets_of,
    evidence,
    learn,
    price,
    search,
    setting_of,
    skills,
    verdicts,
)
from rnnlab.gradients import decay
from rnnlab.optim import Adam
from rnnlab.peers import NotApplicable, train_torch
from rnnlab.training import train

POINT = {"task": "temporal_order", "cell": "gru", "sizes": "parameters", "hidden": 8, "length": 10, "batch": 16}
POINT |= {"updates": 80, "dtype": "float32"}
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the package torch is not installed")


def test_budgets_end_with_a_validation():
    assert budgets_of(POINT, 1.25) == {"parameters": 80, "time": 64}
    assert budgets_of(POINT | {"updates": 83}, 0.5) == {"parameters": 80, "time": 160}
    assert budgets_of(POINT | {"sizes": "units"}, 0.5) == {"units": 80}
    assert budgets_of(POINT | {"cell": "lstm"}, 1.0) == {"parameters": 80, "time": 80, "units": 80}
    assert budgets_of(POINT, 100.0)["time"] == 8


def test_settings_have_their_baseline():
    order, adding = setting_of(POINT), setting_of(POINT | {"task": "adding", "length": 20})
    assert (order.metric, order.baseline, order.steps) == ("accuracy", 0.25, 10)
    assert (adding.metric, adding.baseline) == ("squared error", 1 / 6)
    assert (order.validation.x != order.test.x).any()
    copying = setting_of(POINT | {"task": "copying", "length": 10})
    assert copying.baseline == pytest.approx(10 * 3 / 30)  # ten symbols of three bits in 30 steps
    pixels = setting_of(POINT | {"task": "pixel_digits", "length": None})
    assert pixels.validation.x.shape[1] == 299
    assert pixels.parameters("lstm", 4) == 4 * 4 * (1 + 4 + 2) + 10 * 5
    data = load("captions")
    glyphs = setting_of(POINT | {"task": "captions", "length": None})
    assert glyphs.steps == len(data.train.targets)
    assert (glyphs.validation.x, glyphs.validation.targets) == (
        pytest.approx(data.validation.x),
        pytest.approx(data.validation.targets),
    )


def test_costs_are_in_proportion_to_those_of_the_lstm():
    lstm, gru = price(setting_of(POINT), POINT | {"cell": "lstm"}, 8), price(setting_of(POINT), POINT, 8)
    assert {lstm[name] for name in lstm if name.endswith("_ratio")} == {1}
    assert lstm["parameters"] == 4 * 8 * (6 + 8 + 2) + 4 * 9
    assert gru["parameters_ratio"] == (3 * 8 * 16 + 36) / lstm["parameters"]
    assert gru["bytes_ratio"] < 1
    assert all(0 < gru[f"{name}_milliseconds"] < 1e3 for name in ("update", "latency", "batch_of_64"))


def test_a_network_is_tested_where_its_validation_was_best():
    at, budgets = setting_of(POINT), {"parameters": 80, "time": 40}
    found = learn(at, POINT, 8, budgets, 0.02, 3)
    assert [update for update, _ in found.curve] == list(range(0, 81, 5))
    assert search(at, POINT | {"rates": [0.02]}, 8, 80, 3) == {0.02: max(value for _, value in found.curve[::2])}
    for contest, budget in budgets.items():
        update = found.tests[contest]["best_update"]
        model = at.task.model("gru", 8, seed=3)
        if update:
            train(model, at.task, Adam(0.02), batch=16, updates=update, length=10, clip=ByGlobalNorm(1.0), seed=3)
        right = model.predict(at.test.x)[0].argmax(axis=-1) == at.test.targets
        assert update <= budget
        assert found.tests[contest]["value"] == right.mean()
        assert found.tests[contest]["skill"] == pytest.approx(1 - (1 - right.mean()) / 0.75)
    assert "horizon_steps" in found.tests["parameters"]
    assert dict(found.curve)[update] == max(value for update, value in found.curve if update <= 40)


def test_a_network_that_diverges_has_a_result():
    """Of squared errors that overflow: the best was before."""
    point = POINT | {"task": "adding", "length": 12}
    with np.errstate(over="ignore", invalid="ignore"):
        found = learn(setting_of(point), point, 8, {"units": 16}, 1e30, 0)
    assert -np.inf in dict(found.curve).values()
    assert found.tests["units"]["best_update"] == 0
    assert np.isfinite(found.tests["units"]["skill"])


def test_horizon_reads_the_last_step_of_each_sequence():
    """Sequence by sequence, each cut to its length."""
    setting = setting_of(POINT | {"task": "music", "length": None})
    model, part = setting.task.model("gru", 8, seed=0), contests._some(setting.test, 64, "cross_entropy")
    norms = np.full((64, len(part.x) + 1), np.nan)
    for n, length in enumerate(part.lengths):
        flow = gradient_flow(model, part.x[:length, n : n + 1].copy(), part.targets[length - 1, n : n + 1])
        norms[n, : length + 1] = flow.by_lag("h")[0]
    found = contests._horizon(setting, model)
    assert found["horizon_steps"] == decay(norms).horizon
    assert found["horizon_in_lengths"] == found["horizon_steps"] / len(part.x)


def test_a_part_is_thinned_out_evenly():
    numbers = np.arange(10)
    part = Part(np.zeros((2, 10, 1)) + numbers[:, None], np.tile(numbers, (2, 1)), numbers + 1, None)
    few = contests._some(part, 4, "cross_entropy")
    np.testing.assert_array_equal(few.x[1, :, 0], [0, 3, 6, 9])
    np.testing.assert_array_equal(few.targets[1], [0, 3, 6, 9])
    np.testing.assert_array_equal(few.lengths, [1, 4, 7, 10])
    assert contests._some(part, 20, "cross_entropy").x.shape == (2, 10, 1)


@needs_torch
@pytest.mark.parametrize(
    ("task", "length"), [("temporal_order", 10), ("adding", 12), ("music", None), ("moving_images", None)]
)
def test_pytorch_takes_the_same_steps(task, length):
    """From the weights that PyTorch drew, on the same batches: Adam and clipping in two programs, in float64."""
    setting, starts = setting_of(POINT | {"task": task, "length": length, "dtype": "float64"}), []

    def keep(model):
        starts.append(model.params.flat.copy())
        return 0.0

    theirs, ours = (setting.task.model("gru", 8, dtype="float64", seed=0) for _ in range(2))
    given = {"length": length, "batch": 4, "updates": 6, "seed": 2}
    look = {"every": 3, "threshold": 0.05, "evaluation": keep}
    assert [update for update, _ in train_torch(theirs, setting.task, 0.01, **given, **look)] == [0, 3, 6]
    ours.params.flat[:] = starts[0]
    log = train(ours, setting.task, Adam(0.01), clip=ByGlobalNorm(0.05), log=1, **given)
    assert log.rows[-1]["updates_clipped"] == 1
    # PyTorch clips to θ / (‖g‖ + 1e-6), which moves a gradient of 0.05 by 2e-5 of itself, and Adam, which divides by
    # its size, hardly at all: steps of 0.01 went 0.06 far.
    np.testing.assert_allclose(ours.params.flat, theirs.params.flat, rtol=0, atol=1e-5)
    assert np.abs(theirs.params.flat - starts[0]).max() > 0.03


@needs_torch
def test_what_pytorch_cannot_be_trained_with_is_named():
    setting = setting_of(POINT)
    given = {"length": 10, "batch": 4, "updates": 6, "seed": 2, "every": 3, "threshold": 1.0, "evaluation": len}
    for model, said in (
        (setting.task.model("lstm_coupled", 8), "lstm_coupled"),
        (setting.task.model("lstm", 8, num_layers=2), "6, 8, 2, bias"),
        (setting.task.model("lstm", 8, bias=False), "bias=False"),
    ):
        with pytest.raises(NotApplicable, match=f"PyTorch is trained with one layer of RNN, LSTM or GRU.*{said}"):
            train_torch(model, setting.task, 0.01, **given)


@needs_torch
def test_beside_torch_is_tested_alike():
    at = setting_of(POINT)
    rows = beside_torch(at, POINT, 8, 0.02, [0, 1])
    assert [row["network"] for row in rows] == [0, 1]
    assert all(row["skill"] == pytest.approx(skill("accuracy", row["value"], 0.25)) for row in rows)
    assert beside_torch(setting_of(POINT | {"task": "captions", "length": None}), POINT, 8, 0.02, [0]) == []


@pytest.fixture(scope="module")
def frame():
    """Two tasks, on one of which the GRU wins by 0.2 in every network, and on the other by chance."""
    rows = []
    for task, noise in (("weather", 0.0), ("music", 0.5)):
        for cell, level in (("lstm", 0.3), ("gru", 0.5), ("rnn_tanh", 0.1)):
            about = {"task": task, "cell": cell, "sizes": "parameters"}
            topology = {"weather": "many_to_one", "music": "many_to_many"}[task]
            rows.append(about | {"kind": "cost", "topology": topology, "update_ratio": level, "parameters_ratio": 1.0})
            for k in range(4):
                value = level + noise * (-1) ** k * (cell == "gru")
                rows.append(about | {"kind": "run", "contest": "parameters", "network": k, "skill": value})
    return pd.DataFrame(rows)


def test_a_cell_wins_where_its_interval_says_so(frame):
    weather, music = verdicts(frame).to_dict("records")
    assert (weather["winner"], weather["best"], weather["as_good"]) == ("gru", "gru", "")
    assert weather["low_gru_less_lstm"] == pytest.approx(weather["high_gru_less_lstm"]) == pytest.approx(0.2)
    assert (music["winner"], music["best"]) == ("no difference", "gru")
    assert set(music["as_good"].split()) == {"lstm", "rnn_tanh"}
    assert music["low_gru_less_lstm"] < 0 < music["high_gru_less_lstm"]


def test_a_cell_missing_from_a_task_leaves_that_task_out(frame):
    """Here the GRU's task of skill 0.9 was not tried by the LSTM."""
    more = frame[(frame["task"] == "weather") & (frame["cell"] != "lstm")].assign(task="stocks", skill=0.9)
    for summed in (evidence, averages):
        one, other = (summed(part)[["cell", "skill"]] for part in (frame, pd.concat([frame, more], ignore_index=True)))
        pd.testing.assert_frame_equal(one, other)


def test_evidence_is_for_each_topology(frame):
    found = evidence(frame).set_index(["topology", "cell"])
    assert found.loc["many_to_one", "gru"].tolist() == pytest.approx([0.5, 0.5, 0.5, 1])
    assert found.loc["many_to_many", "lstm"]["skill"] == pytest.approx(0.3)


def test_averages_and_skills(frame):
    mean = averages(frame).set_index("cell")
    assert mean.loc["gru", "skill"] == pytest.approx(0.5)
    assert mean.loc["lstm", "update_ratio"] == pytest.approx(0.3)
    runs = frame[frame["kind"] == "run"]
    table = skills(runs, ["task"], {"all": runs["cell"] != "", "none": runs["cell"] == ""})
    assert table["all"].tolist() == pytest.approx([0.3, 0.3])
    assert table["low_none"].isna().all()
