"""The study of temporal order: its initialisations, its rule of success, its rows and its figure."""

import numpy as np
import pandas as pd
import pytest

from rnnlab.tasks import sample_task
from rnnlab.training import error_rate
from studies import temporal_order

SMALL = {"task": "temporal_order", "updates": 1000, "runs": 2, "seed": 0, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(("init", "spread"), [("sigmoid", 0.01), ("tanh", 0.1), ("smart tanh", 0.01)])
def test_weights_are_drawn_as_in_the_paper(init, spread):
    params = temporal_order.network(init, "float32", 3).params
    recurrent = params["rnn.weight_hh_l0"]
    if init == "smart tanh":
        assert ((recurrent != 0).sum(axis=1) == 15).all()
        # eigenvalues of a float32 matrix, found in float32
        assert np.abs(np.linalg.eigvals(recurrent)).max() == pytest.approx(0.95, rel=1e-4)
    else:
        assert recurrent.std() == pytest.approx(spread, rel=0.06)  # 2,500 numbers: a standard error of 1.4 %
    others = np.concatenate([params["rnn.weight_ih_l0"].ravel(), params["readout.weight"].ravel()])
    assert others.std() == pytest.approx(spread, rel=0.13)  # 500 numbers: 3.2 %
    assert not any(values.any() for name, values in params.items() if "bias" in name)


def test_solved_is_what_fresh_sequences_say():
    point = SMALL | {"init": "tanh", "method": "SGD + clipping + Ω", "length": 10}
    end, curve = temporal_order.learn(point, 0)
    assert end["solved"] == (end["wrong"] < 0.01)
    assert end["sequences"] == 20 * curve[-1]["update"]
    assert curve[1]["loss"] == pytest.approx(np.log(4), abs=0.05)  # the first batch of small weights knows nothing
    repeated, _ = temporal_order.learn(point, 0)
    assert repeated == end


def test_an_untrained_network_is_wrong_three_times_in_four():
    model = temporal_order.network("tanh", "float32", 0)
    x, targets = sample_task("temporal_order", 20, 4000, 1)
    guessed = (model.predict(x)[0].argmax(axis=-1) != targets).mean()
    # guesses of four classes, 4,000 of them: a standard error of 0.7 %; 10,000 others: 0.4 %
    assert guessed == pytest.approx(0.75, abs=0.03)
    assert error_rate(model, "temporal_order", 20) == pytest.approx(guessed, abs=0.04)


def test_grid_has_every_method_and_five_networks():
    frame = pd.DataFrame(temporal_order.grid(quick=False))
    order = frame[frame["task"] == "temporal_order"]
    assert not order.duplicated(["init", "method", "length"]).any()
    for init in ("tanh", "smart tanh"):
        for method in temporal_order.METHODS:
            tried = order[(order["init"] == init) & (order["method"] == method)]
            assert {50, 100, 150, 200} <= set(tried["length"])
    assert (frame["runs"] >= 5).all()
    assert set(frame[frame["task"] == "adding_1997"]["length"]) == {100}


def test_figure_draws_every_method():
    rows = []
    for point in temporal_order.grid(quick=True):
        small = point | {"updates": 20, "seed": 0, "device": "cpu", "dtype": "float32"}
        # Kernels of other cells take their time to compile: for the figure one cell does.
        like = {"task": "temporal_order", "init": "tanh", "method": "SGD"}
        rows += [small | row for row in temporal_order.run(small if point["init"] == "tanh" else small | like)]
    frame = pd.DataFrame(rows)
    share = frame[frame["kind"] == "share"]
    assert (share["success"] == 0).all()  # nothing is solved in 20 updates
    # Wilson's upper end of 0 in 3: z²/(n + z²)
    np.testing.assert_allclose(share["high_success"], 3.8415 / 6.8415, rtol=1e-4)
    figure = temporal_order.plot(frame)
    assert [len(ax.containers) for ax in figure.axes[:3]] == [3, 3, 3]
    assert "20 updates" in figure.get_supxlabel()
