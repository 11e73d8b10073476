"""The gradient-decay study: its grid, its rows against theory, its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.theory import forget_gate_rate
from studies import gradient_decay

SMALL = {"hidden_size": 8, "batch": 3, "networks": 2, "length": 30, "seed": 0, "dtype": "float32"}


def point(**changes):
    plain = {"cell": "lstm", "input": "white_noise", "initialiser": "uniform", "forget_bias": None}
    return plain | SMALL | changes


@pytest.mark.parametrize(("quick", "longest"), [(True, 200), (False, 1000)])
def test_grid_covers_cells_lengths_inputs_and_initialisers(quick, longest):
    frame = pd.DataFrame(gradient_decay.grid(quick))
    plain = frame[frame["forget_bias"].isna()]
    assert plain["length"].max() == longest
    assert len(plain) == 3 * plain["length"].nunique() * 3 * 2
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
            small = full | {"hidden_size": 4, "batch": 2, "networks": 2, "seed": 0, "device": "cpu", "dtype": "float32"}
            rows += [small | row for row in gradient_decay.run(small | {"length": full["length"] // 10})]
    frame = pd.DataFrame(rows)
    frame["length"] //= 10
    figure = gradient_decay.plot(frame)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:4] == ["RNN: dL/dh", "GRU: dL/dh", "LSTM: dL/dh", "LSTM: dL/dc"]
    assert all(len(ax.get_lines()) >= 8 for ax in figure.axes[:5])
    assert all("lag [steps" in ax.get_xlabel() for ax in figure.axes[:5])
    cells = figure.axes[5].tables[0].get_celld()
    assert len(cells) == 9 * 4 - 1
    assert "networks" in figure.get_supxlabel()
