"""The mean-field study: its pairs, its rows, its figure."""

import pandas as pd
import pytest

from rnnlab.theory import tanh_rate
from studies import mean_field

SMALL = {"hidden_size": 128, "batch": 4, "length": 40, "networks": 3, "seed": 0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def frame():
    points = {(p["gain"], p["input_variance"]): p | SMALL for p in mean_field.grid(quick=True)}
    return pd.DataFrame([point | row for point in points.values() for row in mean_field.run(point)])


def test_eight_pairs_are_near_theory(frame):
    rates = frame[frame["kind"] == "rate"].set_index(["gain", "input_variance"])
    assert len(rates) == 8
    assert rates["theory_nats_per_step"].to_dict() == {pair: tanh_rate(*pair) for pair in rates.index}
    assert rates["rate"].min() < -1
    assert rates["rate"].max() > 0
    less = frame[frame["kind"] == "rate less theory"]
    assert (less["rate"].to_numpy() == (rates["rate"] - rates["theory_nats_per_step"]).to_numpy()).all()
    # Each network's rate scatters by 0.03, and most where W_hh is all but linear and its largest eigenvalues decide.
    assert less["rate"].abs().max() < 0.08
    assert less["rate"].abs().median() < 0.03
    assert (less["lowest"] < less["highest"]).all()


def test_figure_states_setting_and_interval(frame):
    figure = mean_field.plot(frame)
    assert "3 networks × 4 sequences of 40 steps, 95 % bootstrap interval" in figure.get_supxlabel()
    assert all("nats per step" in ax.get_xlabel() for ax in figure.axes)
