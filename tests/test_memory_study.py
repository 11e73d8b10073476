"""The memory study: rows against closed forms, and its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.theory import forget_gate_rate
from studies import memory

SMALL = {"length": 20, "hidden_size": 8, "batch": 2, "networks": 2, "seed": 0, "device": "cpu", "dtype": "float64"}


def test_grid_covers_cells_and_biases():
    for quick in (True, False):
        frame = pd.DataFrame(memory.grid(quick))
        assert len(frame) == len(memory.CELLS) * len(memory.BIASES) == len(frame.drop_duplicates(["cell", "bias"]))


def test_rows_hold_theory_and_what_approaches_it():
    """Theory is for infinitely many units at rest: 64 that an input drives come within a tenth of three decades."""
    frame = pd.DataFrame(memory.run({"cell": "lstm", "bias": "0"} | SMALL | {"hidden_size": 64}))
    survived = frame[(frame["kind"] == "survival") & (frame["state"] == "c")]
    np.testing.assert_allclose(survived["gate_decades"], np.arange(21) * np.log10(0.5), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(survived["norm_decades"], survived["theory_decades"], rtol=0, atol=0.3)
    assert survived["theory_decades"].iloc[-1] < -2.9


def test_gate_that_is_held_open():
    frame = pd.DataFrame(memory.run({"cell": "lstm", "bias": "5"} | SMALL))
    gates = frame[frame["kind"] == "gate"]
    assert len(gates) == 3 * 8 * 2
    scales = gates[gates["gate"] == "f"]["time_scale_steps"]
    assert scales.median() == pytest.approx(-1 / forget_gate_rate(5.0), rel=0.4)  # an input moves it
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
    assert len(figure.axes[0].get_lines()) == 5 * 2 + 4 + 5  # biases × (c, h), the gate alone, dots
    assert "time" in titles[1]
    assert "networks" in figure.get_supxlabel()
