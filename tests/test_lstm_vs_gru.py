"""The study of LSTM against GRU: its grid, one point of it, and its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.applications import APPLICATIONS
from studies import lstm_vs_gru


@pytest.mark.parametrize("quick", [True, False])
def test_grid_gives_every_cell_the_same(quick):
    points = pd.DataFrame(lstm_vs_gru.grid(quick))
    assert set(points["task"]) == {*APPLICATIONS, "temporal_order", "adding"}
    for task, part in points.groupby("task"):
        assert (part[["hidden", "updates", "runs"]].nunique() == 1).all()
        assert set(part["cell"]) == set(lstm_vs_gru.BAI if task == "adding" else lstm_vs_gru.CELLS)
        assert set(part.loc[part["sizes"] == "parameters", "cell"]) == set(part["cell"])
    assert (points["runs"] >= (2 if quick else 5)).all()
    assert not points.astype(str).duplicated().any()


def test_one_point_enters_its_contests():
    point = {"task": "temporal_order", "cell": "lstm", "sizes": "parameters", "hidden": 8, "length": 10, "batch": 8}
    point |= {"runs": 2, "updates": 16, "rates": [0.01, 0.03], "seed": 0, "dtype": "float32", "device": "cpu"}
    rows = pd.DataFrame(lstm_vs_gru.run(point))
    assert set(rows.loc[rows["kind"] == "run", "contest"]) == set(lstm_vs_gru.CONTESTS)
    search = rows[rows["kind"] == "search"].set_index("learning_rate")["skill"]
    cost = rows[rows["kind"] == "cost"].iloc[0]
    assert cost["learning_rate"] == search.idxmax()
    assert cost["hidden_size"] == 8
    curve = rows[rows["kind"] == "curve"]
    assert list(curve["update"]) == list(range(0, 17, 2))
    assert (curve["low_skill"] <= curve["skill"]).all()
    assert (curve["skill"] <= curve["high_skill"]).all()
    np.testing.assert_allclose(curve["seconds"], curve["update"] * cost["update_milliseconds"] / 1e3)
    gru = pd.DataFrame(lstm_vs_gru.run(point | {"cell": "gru", "runs": 1, "rates": [0.01]}))
    # 8·4·(6 + 8 + 2) + 4·9 = 548 numbers: 9 units of a GRU have 3·9·17 + 40 = 499, 10 have 584
    assert gru[gru["kind"] == "cost"].iloc[0]["hidden_size"] == 9


def made_up(point, rng):
    """What a point could yield."""
    strength = lstm_vs_gru.CELLS.index(point["cell"]) / 10
    names = [name for name in lstm_vs_gru.CONTESTS if (name == "units") != (point["sizes"] == "parameters")]
    names = list(lstm_vs_gru.CONTESTS) if point["cell"] == "lstm" else names
    ratios = dict.fromkeys(("update", "latency", "batch_of_64", "bytes", "parameters"), 0.8 + strength)
    yield {"kind": "cost", "topology": "many_to_one", **{f"{name}_ratio": value for name, value in ratios.items()}}
    for k in range(point["runs"]):
        value = strength + 0.01 * rng.random()
        about = {"network": k, "skill": value, "value": 2 * value, "horizon_in_lengths": 0.9}
        yield from [{"kind": "run", "contest": name, **about} for name in names]
        if point["sizes"] == "parameters" and point["cell"] in ("lstm", "gru"):
            yield {"kind": "torch", **about}
    for update in (0, 8):
        yield {"kind": "curve", "update": update, "seconds": 0.1, "skill": 0.1, "low_skill": 0.0, "high_skill": 0.2}


@pytest.mark.parametrize("torch", [True, False])
def test_figure_says_who_wins(torch):
    rng, rows = np.random.default_rng(0), []
    for point in lstm_vs_gru.grid(quick=True):
        found = [row for row in made_up(point, rng) if torch or row["kind"] != "torch"]
        rows += [point | {"rates": "[0.01]", "seed": 0, "dtype": "float32"} | row for row in found]
    frame = pd.DataFrame(rows)
    figure = lstm_vs_gru.plot(frame)
    assert len(figure.axes) == 12
    texts = {cell.get_text().get_text() for cell in figure.axes[11].tables[0].get_celld().values()}
    assert {"equal units", "equal parameters", "equal time", "not tried", "weather"} < texts
    assert sum(text.startswith("gru by 0.") for text in texts) > 5
    assert ("not installed" in figure.axes[10].get_title()) != torch
    assert "2 networks a point" in figure.get_supxlabel()
    tables = lstm_vs_gru.tables(frame)
    assert set(tables["verdicts"]["winner"]) == {"gru"}
    assert set(tables["evidence"]["cell"]) == set(lstm_vs_gru.CELLS)
    assert ("values" in tables) == torch
    if torch:
        assert len(tables["values"]) == 2 * len(lstm_vs_gru.SIZES)
        gru = tables["values"][tables["values"]["cell"] == "gru"]
        assert gru["rnnlab"].between(0.6, 0.62).all()  # twice a skill of 0.3 and up to 0.01
        np.testing.assert_array_equal(gru["rnnlab"], gru["PyTorch"])
