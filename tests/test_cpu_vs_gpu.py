"""The study of devices: its rows, and its figure on a machine without a GPU."""

import pandas as pd
import pytest

from rnnlab.kernels import available
from studies import cpu_vs_gpu


@pytest.fixture(scope="module")
def frame():
    rows = []
    for point in cpu_vs_gpu.grid(quick=True):
        small = point | {"sizes": point["sizes"][:2], "seconds": 0.0, "seed": 0, "device": "cpu", "dtype": "float32"}
        if small["cell"] == "gru":
            rows += [
                {key: value for key, value in small.items() if key != "sizes"} | row for row in cpu_vs_gpu.run(small)
            ]
    return pd.DataFrame(rows)


def test_every_size_is_measured_on_every_device(frame):
    devices = 1 + (available("cuda") is None)
    times = frame[frame["kind"] == "time"]
    assert len(times) == 3 * 2 * 2 * devices
    assert (times["step_microseconds"] > 0).all()
    assert (times["low_step_microseconds"] <= times["high_step_microseconds"]).all()
    # The peak is measured once, and on a machine that others use it is not the same all the time.
    assert (times["roofline_share"] < 1.5).all()


def test_figure_says_what_it_was_measured_on(frame):
    figure = cpu_vs_gpu.plot(frame)
    text = figure.get_supxlabel()
    assert ("no GPU on this machine" in text) == (available("cuda") is not None)
    assert [ax.get_xlabel() for ax in figure.axes[:3]] == ["hidden size", "batch", "steps"]
    assert all(ax.get_yscale() == ax.get_xscale() == "log" for ax in figure.axes)
