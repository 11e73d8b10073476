"""The memory study: rows against closed forms, and its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.theory import forget_gate_rate
from studies import memory

SMALL = {"length": 20, "hidden_size": 8, "batch": 2, "networks": 2, "seed": 0, "dtype": "float64"}


def test_grid_covers_cells_and_biases():
    for quick in (True, False):
        frame = pd.DataFrame(memory.grid(quick))
        assert len(frame) == len(memory.CELLS) * len(memory.BIASES) == len(frame.drop_duplicates(["cell", "bias"]))


def test_rows_hold_theory_and_what_approaches_it():
    """A memory that is held open by b = 5 decays, over 20 steps, as theory says up to what 8 units and an input add."""
    frame = pd.DataFrame(memory.run({"cell": "lstm", "bias": "5"} | SMALL))
    rate = forget_gate_rate(5.0)
    survived = frame[(frame["kind"] == "survival") & (frame["state"] == "c")]
    np.testing.assert_allclose(survived["theory_decades"], np.arange(21) * rate / np.log(10), rtol=1e-12)
    np.testing.assert_allclose(survived["norm_decades"], survived["theory_decades"], atol=0.3)
    gates = frame[frame["kind"] == "gate"]
    assert len(gates) == 3 * 8 * 2
    scales = gates[gates["gate"] == "f"]["time_scale_steps"]
    assert scales.median() == pytest.approx(-1 / rate, rel=0.4)
    assert (gates[gates["gate"] == "f"]["open"] > 0.5).all()  # σ'(a) < 0.01 from a = 4.6 on
    share = frame[frame["kind"] == "share"]
    assert share["share"].iloc[0] == pytest.approx(1)
    assert ((share["share_low"] <= share["share"]) & (share["share"] <= share["share_high"])).all()


def test_figure_shows_both_cells():
    rows = []
    for full in memory.grid(quick=True):
        point = full | SMALL
        rows += [point | row for row in memory.run(point)]
    figure = memory.plot(pd.DataFrame(rows))
    titles = [ax.get_title() for ax in figure.axes]
    assert [title.split(":")[0] for title in titles] == ["LSTM"] * 4 + ["GRU"] * 4
    assert len(figure.axes[0].get_lines()) == 5 * 2 + 4  # biases × (c, h), and theory where there is one
    assert "time" in titles[1]
    assert "networks" in figure.get_supxlabel()
