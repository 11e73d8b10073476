"""The asv suite: its committed configuration builds an environment, and its results become one table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no installed package

import benchmarks.__main__ as tidying  # noqa: E402
from benchmarks import bench_peers, shapes  # noqa: E402


def stored(folder, commit, value):
    """Write results as asv 0.6 stores them: two numbers of one benchmark with two parameters, the first not run."""
    (folder / "machine-a").mkdir(exist_ok=True)
    (folder / "machine-a" / "machine.json").write_text(json.dumps({"machine": "machine-a", "version": 1}))
    result = {
        "commit_hash": commit,
        "date": 1_700_000_000_000,
        "params": {"machine": "machine-a"},
        "result_columns": ["result", "params", "version"],
        "results": {
            "bench.Layers.time": [[None, value], [["'lstm'"], ["'T1'", "'T2'"]], "1"],
            "bench.Costs.track": [[7], [], "1"],
        },
    }
    (folder / "machine-a" / f"{commit}-env.json").write_text(json.dumps(result))
    described = {"bench.Layers.time": {"param_names": ["cell", "shape"], "unit": "seconds"}, "version": 2}
    (folder / "benchmarks.json").write_text(json.dumps(described))


@pytest.mark.filterwarnings("default")  # what a peer says while it is imported
@pytest.mark.parametrize("track", ["track_ratio_forward", "track_ratio_training"])
def test_the_ratio_to_a_peer_is_tracked(track, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(bench_peers, "PEERS", {"torch": bench_peers.PEERS["torch"]})
    suite = bench_peers.Peers()
    suite.setup("rnn_tanh", "T100_B1_H32")
    assert getattr(suite, track)("rnn_tanh", "T100_B1_H32") > 0


def test_stored_results_become_one_table(tmp_path):
    stored(tmp_path, "aaaa", 0.5)
    stored(tmp_path, "bbbb", 0.25)
    frame = tidying.tidy(tmp_path)
    assert list(frame) == ["machine", "commit", "date", "benchmark", "unit", "cell", "shape", "value"]
    assert len(frame) == 6
    second = frame[(frame["shape"] == "T2")].set_index("commit")
    assert second["value"].to_dict() == {"aaaa": 0.5, "bbbb": 0.25}
    assert second["unit"].tolist() == ["seconds"] * 2
    assert frame[frame["shape"] == "T1"]["value"].isna().all()


def test_command_writes_the_table(tmp_path):
    stored(tmp_path, "aaaa", 0.5)
    result = CliRunner().invoke(tidying.main, ["--tidy", str(tmp_path / "out.csv"), "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv(tmp_path / "out.csv")) == 3
    empty = CliRunner().invoke(tidying.main, ["--tidy", "-", "--results", str(tmp_path / "none")])
    assert empty.exit_code == 1
    assert "folder must hold asv results" in empty.stderr


def test_curated_results_can_be_read():
    frame = tidying.tidy(ROOT / "benchmarks" / "results" / "asv")
    assert set(frame.loc[frame["benchmark"].str.contains("time_training"), "cell"]) == set(shapes.CELLS)
    assert np.isfinite(frame["value"].dropna()).all()


def test_a_device_that_is_not_there_is_no_failure():
    from rnnlab.kernels import available

    if available("cuda") is None:
        pytest.skip("this machine has the device")
    with pytest.raises(NotImplementedError, match="device 'cuda' cannot be used"):
        shapes.problem("lstm", "T100_B1_H32", "float32", "cuda")


def test_committed_configuration_builds_an_environment(tmp_path):
    """asv builds HEAD in an environment of its own and runs one benchmark there; about 40 s."""
    pytest.importorskip("asv")
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    environment = os.environ | {"HOME": str(home)}

    def run(*command):
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    asv = (sys.executable, "-m", "asv")
    run(*asv, "machine", "--yes", "--machine", "test")
    run(*asv, "run", "HEAD^!", "--machine", "test", "--bench", "bench_compile.Import", "--show-stderr")
    run(*asv, "publish")
    frame = tidying.tidy(clone / "benchmarks" / "results" / "asv")
    assert (frame[frame["machine"] == "test"]["benchmark"] == "bench_compile.Import.timeraw_import").all()
    assert 0.01 < frame[frame["machine"] == "test"]["value"].item() < 60
    assert (clone / ".asv" / "html" / "index.html").exists()
