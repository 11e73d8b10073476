"""The study of clipping rules: what it measures of a rule, and its figure."""

import numpy as np
import pandas as pd
import pytest

from studies import clipping

SMALL = {"length": 10, "runs": 2, "seed": 0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def frame():
    rows = []
    for point in clipping.grid(quick=True):
        small = point | SMALL | ({"updates": 30} if point["part"] == "solved" else {"batches": 3})
        rows += [small | row for row in clipping.run(small)]
    return pd.DataFrame(rows)


def test_effects_are_those_of_the_rules(frame):
    effect = frame[frame["kind"] == "rule"].set_index(["rule", "threshold"])
    np.testing.assert_allclose(effect["norm"], effect["norm"].iloc[0], rtol=1e-6)  # the same batches for every rule
    # float32 gradients of 3,000 numbers, norms in float64
    np.testing.assert_allclose(effect.loc["global norm"]["cosine"], 1, rtol=1e-6)
    assert (effect.loc["global norm"]["clipped_norm"] <= effect.index[:3].get_level_values(1) * (1 + 1e-6)).all()
    assert effect.loc[("value", 0.01)]["cosine"] < 0.999
    assert effect["bias"].between(0, 1 + 1e-6).all()
    ordered = effect["low_cosine"] <= effect["cosine"]
    assert ordered.all()


def test_rules_for_the_whole_gradient_take_the_same_from_every_lag(frame):
    lags = frame[frame["kind"] == "lag"].set_index(["rule", "threshold"])
    norm = lags.loc[("global norm", 0.1)]["removed"]
    np.testing.assert_allclose(norm, norm.iloc[0], rtol=1e-4)  # energies of float32 products
    assert 0 < norm.iloc[0] < 1
    step = lags.loc[("time step", 0.001)].set_index("lag_steps")["removed"]
    assert step[9] > step[0] > 0


def test_run_says_what_became_of_each_network(frame):
    ends = frame[frame["kind"] == "run"]
    # ten steps leave one place for each symbol, which Adam finds: others spend the 30 updates
    assert (ends["solved"] == (ends["updates_taken"] < 30)).all()
    assert ends[ends["solved"]]["optimiser"].unique().tolist() == ["Adam"]
    shares = frame[frame["kind"] == "share"].set_index(["optimiser", "rule", "threshold"])["success"]
    counted = ends.groupby(["optimiser", "rule", "threshold"], dropna=False)["solved"].mean()
    np.testing.assert_allclose(counted[shares.index].astype(float), shares, rtol=1e-15)


def test_a_network_that_diverges_is_recorded():
    point = SMALL | {"part": "solved", "optimiser": "SGD", "learning_rate": 3e38, "rule": "none", "threshold": None}
    *ends, share = clipping.run(point | {"updates": 300})
    assert {end["outcome"] for end in ends} == {"diverged"}
    assert share["success"] == 0


def test_figure_shows_every_rule(frame):
    figure = clipping.plot(frame)
    assert len(figure.axes) == 6
    assert [label.get_text() for label in figure.axes[4].get_legend().get_texts()] == [
        f"{name} {tops[0]:g}" for name, (_, tops) in clipping.RULES.items()
    ]
    assert "30 updates" in figure.get_supxlabel()
