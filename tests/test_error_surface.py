"""The study of the error's walls: its surface against a plain loop, the wall against finite differences, descent."""

import math

import numpy as np
import pandas as pd
import pytest

from studies import error_surface


def plain_error(weight, bias, steps=50):
    """Pascanu, Mikolov & Bengio (2013), Fig. 6, as it is written there."""
    x = 0.5
    for _ in range(steps):
        x = weight / (1 + math.exp(-x)) + bias
    return (1 / (1 + math.exp(-x)) - 0.7) ** 2


def test_every_unit_is_a_network_of_its_own():
    rng = np.random.default_rng(0)
    weight, bias = rng.uniform(3, 7, 37), rng.uniform(-4, 0, 37)
    error, d_weight, d_bias = error_surface.surface(weight, bias, "float64")
    # the error of a step grows at most as fast as the gradient, here by some 1e2
    np.testing.assert_allclose(error, [plain_error(*point) for point in zip(weight, bias, strict=True)], rtol=1e-12)
    step = 1e-6
    for got, dw, db in ((d_weight, step, 0), (d_bias, 0, step)):
        ends = [[plain_error(w + s * dw, b + s * db) for s in (1, -1)] for w, b in zip(weight, bias, strict=True)]
        want = np.array([(above - below) / (2 * step) for above, below in ends])
        # a central difference: step² times third derivatives of up to some 1e4, and rounding of 1e-16 / step
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_gradient_on_the_wall_is_the_closed_form():
    weight = np.array([4.5, 5.0, 6.0, 7.0])
    bias, norm = error_surface.wall(weight)
    _, d_weight, d_bias = error_surface.surface(weight, bias, "float64")
    # rounding of b, 2e-16, grows by (7 · 0.235)^50 = 6e10 until it moves h
    np.testing.assert_allclose(np.hypot(d_weight, d_bias), norm, rtol=1e-4)
    for w, b in zip(weight[:2], bias[:2], strict=True):
        beside = [error_surface.surface(np.array([w]), np.array([b + 0.3 * side]), "float64") for side in (1, -1)]
        assert all(np.hypot(dw, db)[0] < 1 for _, dw, db in beside)


def test_descent_takes_the_clipped_step():
    start = np.array([6.0, 5.0]), np.array([-2.5, -2.6])
    _, d_weight, d_bias = error_surface.surface(*start, "float64")
    norm = np.hypot(d_weight, d_bias)
    free = error_surface.descend(*start, 0.5, None, 1, "float64")
    clipped = error_surface.descend(*start, 0.5, 0.1, 1, "float64")
    assert (norm > 0.1).tolist() == [False, True]
    for paths, scale in ((free, np.ones(2)), (clipped, np.minimum(1, 0.1 / norm))):
        after = paths[paths["step"] == 1]
        np.testing.assert_allclose(after["weight"], start[0] - 0.5 * scale * d_weight, rtol=1e-14)
        np.testing.assert_allclose(after["bias"], start[1] - 0.5 * scale * d_bias, rtol=1e-14)
    np.testing.assert_allclose(clipped["step_length"][:2], 0.5 * np.minimum(norm, 0.1), rtol=1e-14)


@pytest.fixture(scope="module")
def frame():
    rows = []
    for point in error_surface.grid(quick=True):
        changes = {"surface": {"size": 15}, "path": {"steps": 60}, "starts": {"size": 16, "steps": 100}}
        full = point | changes.get(point["part"], {}) | {"seed": 0, "device": "cpu", "dtype": "float64"}
        rows += [full | row for row in error_surface.run(full)]
    return pd.DataFrame(rows)


def test_clipping_keeps_the_path_in_the_picture(frame):
    last = frame[(frame["part"] == "path") & (frame["step"] == 60)]
    free, clipped = (last[last["threshold"].isna() == missing] for missing in (True, False))
    assert (clipped["bias"] < -1).all()
    assert (free["bias"] > 0).any()


def test_success_is_highest_between_the_thresholds(frame):
    share = frame[frame["part"] == "starts"].set_index("threshold")["success"]
    assert share[1.0] > share[0.01]
    assert share[1.0] > share[100.0]
    np.testing.assert_array_equal(share[share.index.isna()], share[100.0])  # no gradient met here is longer


def test_figure_has_a_surface_and_names_its_setting(frame):
    figure = error_surface.plot(frame)
    assert sum(ax.name == "3d" for ax in figure.axes) == 1
    assert "float64" in figure.get_supxlabel()
    assert "learning rate 0.5, 60 steps; solved: 16 random starts, 100 steps" in figure.get_supxlabel()
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes if ax.get_title() == "what clipping does"]
    assert labels == [("step of descent", "length of the step")]
