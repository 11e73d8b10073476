"""The study of what gates cost: its grid, its ratios, its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.cells import CELLS
from rnnlab.costs import Shape
from studies import tradeoffs


@pytest.fixture(scope="module")
def frame():
    """What the grid would yield with times that are proportional to the gates."""
    rng, rows = np.random.default_rng(0), []
    for point in tradeoffs.grid(quick=True):
        machine = rng.uniform(0.5, 2, size=7)  # slow and fast turns, alike for all cells
        sizes = (point["steps"], point["batch"], tradeoffs.INPUTS, point["hidden_size"])
        for cell in CELLS.values():
            own, lstm = (1e-4 * len(gates) * machine for gates in (cell.gates, CELLS["lstm"].gates))
            measured = tradeoffs.measures(own, lstm, Shape(cell.name, *sizes), "float32")
            rows.append(point | {"measured_on": "cpu", "cell": cell.name, "seed": 0, "dtype": "float32"} | measured)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("quick", [True, False])
def test_grid_holds_the_base_of_every_sweep(quick):
    points = pd.DataFrame(tradeoffs.grid(quick))
    assert set(points["scope"]) == set(tradeoffs.SCOPES)
    for sweep in tradeoffs.SWEEPS:
        part = points[points["sweep"] == sweep]
        assert part[sweep].nunique() * 2 == len(part) >= 4
        assert (part[list(tradeoffs.BASE.keys() - {sweep})].nunique() == 1).all()
    assert (points[list(tradeoffs.BASE)] == pd.Series(tradeoffs.BASE)).all(axis=1).any()


def test_ratios_are_paired_and_counts_are_those_of_the_gates(frame):
    gru = frame[frame["cell"] == "gru"]
    # Paired, the turns' speeds cancel: float64 divisions are left
    for name in ("ratio", "low_ratio", "high_ratio", "parameters_ratio", "flops_ratio"):
        np.testing.assert_allclose(gru[name], 3 / 4, rtol=1e-12)
    np.testing.assert_allclose(gru["sequence_microseconds"] * gru["batch"], gru["step_microseconds"] * gru["steps"])
    base = gru[(gru[list(tradeoffs.BASE)] == pd.Series(tradeoffs.BASE)).all(axis=1)].iloc[0]
    assert base["parameters"] == 3 * 128 * (32 + 128 + 2)
    assert base["flops"] == 3 * 2 * 100 * 32 * 3 * 128 * (32 + 128)
    assert base["bytes"] == 4 * (2 * base["parameters"] + 32 * 128 * (100 * 6 + 1))


def test_one_point_is_measured_for_every_cell(monkeypatch):
    monkeypatch.setattr(tradeoffs, "CELLS", {name: CELLS[name] for name in ("rnn_tanh", "lstm", "gru")})
    point = {"sweep": "steps", "scope": "forward", "steps": 5, "batch": 2, "hidden_size": 8, "seconds": 0.0}
    rows = tradeoffs.run(point | {"seed": 0, "dtype": "float32", "device": "cpu"})
    assert [row["cell"] for row in rows] == ["rnn_tanh", "lstm", "gru"]
    assert rows[1]["ratio"] == rows[1]["low_ratio"] == 1
    assert all(0 < row["low_step_microseconds"] <= row["step_microseconds"] < 1e5 for row in rows)


def test_figure_shows_times_ratios_and_counts(frame):
    figure = tradeoffs.plot(frame)
    assert len(figure.axes) == 12
    assert [ax.get_xlabel() for ax in figure.axes[:3]] == ["hidden size", "batch", "steps"]
    assert figure.axes[1].get_ylabel() == "time of a sequence [µs]"
    assert [ax.get_title() for ax in figure.axes[3::4]] == list(tradeoffs.COUNTS.values())
    assert "hidden size 128; 32 inputs; float32" in figure.get_supxlabel()
    widths = [bar.get_width() for bars in figure.axes[3].containers for bar in bars]
    assert sorted(set(np.round(widths, 12))) == [0.25, 0.75, 1, pytest.approx(1, abs=0.01)]  # peepholes: a few more
