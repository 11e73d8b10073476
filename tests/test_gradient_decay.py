"""The gradient-decay study: its grid, its rows against theory, its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.theory import forget_gate_rate
from studies import gradient_decay

SMALL = {
    "hidden_size": 8,
    "batch": 3,
    "networks": 2,
    "length": 30,
    "updates": 2,
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
}


def point(**changes):
    plain = {"cell": "lstm", "input": "white_noise", "initialiser": "uniform", "forget_bias": None}
    return plain | SMALL | changes


@pytest.mark.parametrize(("quick", "longest"), [(True, 200), (False, 1000)])
def test_grid_covers_cells_lengths_inputs_and_initialisers(quick, longest):
    frame = pd.DataFrame(gradient_decay.grid(quick))
    plain = frame[frame["forget_bias"].isna()]
    assert plain["length"].max() == longest
    assert (plain["initialiser"] == "trained").sum() == (1 if quick else 3)
    assert len(plain[plain["initialiser"] != "trained"]) == 3 * plain["length"].nunique() * 3 * 2
    assert set(frame["forget_bias"].dropna()) == {0, 1, 2, 5}


@pytest.mark.parametrize("bias", gradient_decay.FORGET_BIASES)
def test_zero_weights_decay_as_theory_says(bias):
    frame = pd.DataFrame(gradient_decay.run(point(initialiser="zeros", forget_bias=bias)))
    memory = frame[frame["state"] == "c"]
    # float32 adjoints of 30 steps: 30 roundings of 6e-8, far below a decade
    curve = memory[memory["kind"] == "curve"]
    np.testing.assert_allclose(curve["norm_decades"], curve["theory_decades"], rtol=0, atol=1e-5)
    rate = memory[memory["kind"] == "decay"]["rate_nats_per_step"].item()
    assert rate == pytest.approx(forget_gate_rate(bias), rel=1e-5)


def test_driven_tanh_network_decays_as_mean_field_says():
    """A wide orthogonal network under noise. Log-norms of one network scatter by √(lag / 2H) = 0.2 decades."""
    changes = {"cell": "rnn_tanh", "initialiser": "orthogonal", "hidden_size": 128, "networks": 4, "length": 60}
    frame = pd.DataFrame(gradient_decay.run(point(**changes)))
    curve = frame[frame["kind"] == "curve"]
    assert curve["theory_decades"].iloc[-1] < -1.4
    np.testing.assert_allclose(curve["norm_decades"], curve["theory_decades"], rtol=0, atol=0.25)


def test_training_changes_the_decay_and_has_no_theory():
    initial, trained = (
        pd.DataFrame(gradient_decay.run(point(input="digit_pixels", initialiser=name, updates=20)))
        for name in ("uniform", "trained")
    )
    assert "theory_decades" not in trained
    difference = trained["norm_decades"] - initial["norm_decades"]
    assert difference.abs().max() > 0.1
    again = gradient_decay.run(point(input="digit_pixels", initialiser="trained", updates=20))
    pd.testing.assert_frame_equal(trained, pd.DataFrame(again))


@pytest.mark.parametrize("cell", gradient_decay.CELLS)
def test_rows_are_tidy_and_reproducible(cell):
    rows = gradient_decay.run(point(cell=cell, input="digit_pixels"))
    states = {"h", "c"} if cell == "lstm" else {"h"}
    assert {row["state"] for row in rows} == states
    assert sum(row["kind"] == "decay" for row in rows) == len(states)
    assert rows == gradient_decay.run(point(cell=cell, input="digit_pixels"))
    half_lives = [row["half_life_steps"] for row in rows if row["kind"] == "decay"]
    assert all(0 < value < 30 for value in half_lives)


def test_figure_shows_every_panel():
    rows = []
    for full in gradient_decay.grid(quick=True):
        if full["length"] != 100:
            small = full | SMALL | {"hidden_size": 4, "length": full["length"]}
            rows += [small | row for row in gradient_decay.run(small | {"length": full["length"] // 10})]
    frame = pd.DataFrame(rows)
    frame["length"] //= 10
    figure = gradient_decay.plot(frame)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:4] == ["RNN: dL/dh", "GRU: dL/dh", "LSTM: dL/dh", "LSTM: dL/dc"]
    assert all(len(ax.get_lines()) >= 8 for ax in figure.axes[:5])
    assert "after 2 updates" in titles[5]
    assert {line.get_label() for line in figure.axes[5].get_lines()} >= {"lstm, uniform", "lstm, trained"}
    assert all("lag [steps" in ax.get_xlabel() for ax in figure.axes[:6])
    tables = [ax.tables[0].get_celld() for ax in figure.axes[6:]]
    assert all(len(cells) == 9 * 4 - 1 for cells in tables)
    fit = frame[(frame["kind"] == "decay") & (frame["length"] == 20) & (frame["cell"] == "rnn_tanh")].iloc[0]
    assert (fit["input"], fit["initialiser"]) == ("white_noise", "uniform")
    assert tables[0][1, 0].get_text().get_text().startswith(f"{fit['half_life_steps']:.3g} (")
    assert tables[1][1, 0].get_text().get_text() == f"{fit['horizon_steps']:.3g}"
    assert "networks" in figure.get_supxlabel()
