"""The study of arrangements: rows against gradients computed apart, and its figure."""

import numpy as np
import pandas as pd
import pytest

from studies import topologies

SMALL = {"steps": 5, "hidden_size": 4, "batch": 2, "networks": 2, "seed": 0, "device": "cpu", "dtype": "float64"}


def rows_of(arrangement, cell="gru"):
    return pd.DataFrame(topologies.run({"arrangement": arrangement, "cell": cell} | SMALL))


@pytest.mark.parametrize(
    ("arrangement", "spans"),
    [
        ("one to one", {("h", "layer 1"): (0, 1), ("x", "layer 1"): (1, 1)}),
        ("one to many", {("h", "layer 1"): (0, 5), ("x", "layer 1"): (1, 1)}),
        ("one to many, teacher", {("h", "teacher"): (0, 5), ("x", "layer 1"): (1, 1)}),
        ("many to one", {("h", "layer 1"): (0, 5), ("x", "layer 1"): (1, 5)}),
        ("many to many", {("h", "layer 1"): (0, 5), ("x", "layer 1"): (1, 5)}),
        ("encoder and decoder", {("h", "layer 1"): (0, 5), ("h", "decoder"): (5, 10), ("x", "layer 1"): (1, 5)}),
        ("bidirectional, many to one", {("h", "forward"): (0, 5), ("h", "reverse"): (0, 5), ("x", "layer 1"): (1, 5)}),
        (
            "stacked, many to one",
            {("h", "layer 1"): (0, 5), ("h", "layer 2"): (0, 5), ("h", "layer 3"): (0, 5), ("x", "layer 1"): (1, 5)},
        ),
    ],
)
def test_curves_stand_at_the_time_of_their_states(arrangement, spans):
    frame = rows_of(arrangement)
    found = frame.groupby(["quantity", "curve"])["step"].agg(["min", "max", "count"])
    assert {key: (low, high) for key, (low, high, _) in zip(found.index, found.to_numpy(), strict=True)} == spans
    assert (found["count"] == found["max"] - found["min"] + 1).all()
    assert np.isfinite(frame.drop(columns=["quantity", "curve"]).to_numpy()).all()


def test_a_reverse_direction_is_read_at_the_first_step():
    """Its gradient is largest there, as that of the forward direction is at the last."""
    frame = rows_of("bidirectional, many to one", "rnn_tanh")
    forward, reverse = (frame[(frame["curve"] == name) & (frame["quantity"] == "h")] for name in ("forward", "reverse"))
    assert forward["norm_decades"].to_numpy().argmax() == 5
    assert reverse["norm_decades"].to_numpy().argmax() == 0


def test_the_encoder_receives_what_the_decoder_begins_with():
    frame = rows_of("encoder and decoder")
    last = frame[(frame["curve"] == "layer 1") & (frame["quantity"] == "h") & (frame["step"] == 5)]
    first = frame[(frame["curve"] == "decoder") & (frame["step"] == 5)]
    assert last["norm_decades"].item() == pytest.approx(first["norm_decades"].item(), rel=1e-12)


def test_figure_shows_every_arrangement():
    rows = []
    for full in topologies.grid(quick=True):
        point = full | SMALL
        rows += [point | row for row in topologies.run(point)]
    figure = topologies.plot(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == [*topologies.PANELS, "what reaches the inputs (LSTM)"]
    curves = [1, 2, 1, 1, 2, 2, 3]
    drawn = [sum(len(line.get_xdata()) > 1 for line in ax.get_lines()) for ax in figure.axes]
    assert drawn[:4] == [3 * count for count in curves[:4]]
    assert drawn[4] == 3 * 2 + 1  # and the line between encoder and decoder
    assert drawn[5:] == [6, 9, 5]
    assert "networks" in figure.get_supxlabel()
