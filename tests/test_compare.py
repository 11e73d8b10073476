"""`rnnlab compare`: its problems, its table, its exit codes."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from rnnlab import cli, compare, peers, timing
from rnnlab.costs import Shape

pytestmark = pytest.mark.filterwarnings("default")  # what peers say while they are imported


@pytest.fixture
def run(monkeypatch):
    """Run the command in this process, whose libraries have whatever threads they have."""
    monkeypatch.setattr(timing, "pin", lambda threads: True)

    def invoke(*arguments):
        return CliRunner().invoke(cli.main, ["compare", "--no-progress", "--seconds", "0", *arguments])

    return invoke


def sleeper(seconds):
    """Return a peer that gives our results after so many seconds."""

    def prepare(problem):
        ours = peers.prepare_rnnlab(problem)

        def call():
            timing.time.sleep(seconds)
            return ours.call()

        return peers.Run(call, ours.result)

    return peers.Peer(("numpy",), ("cpu",), prepare)


def liar(problem):
    ours = peers.prepare_rnnlab(problem)

    def result():
        ours.call()
        return {name: 1.01 * array for name, array in ours.result().items()}

    return peers.Run(ours.call, result)


def test_shapes_of_sets_and_of_single_problems():
    reference = compare.shapes(["reference"], ["lstm"])
    assert len(reference) == 13
    assert reference == compare.shapes(["small", "medium", "large", "small"], ["lstm"])
    assert compare.shapes(["10,2,3,4"], ["gru"]) == [Shape("gru", 10, 2, 3, 4)]
    deepbench = compare.shapes(["deepbench"], ["lstm", "gru", "rnn_tanh"])
    assert {shape.cell for shape in deepbench} == {"lstm", "gru"}
    assert max(shape.hidden_size for shape in deepbench) == 4096


def test_table_has_a_row_for_every_implementation(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", sleeper(0.02))
    monkeypatch.setitem(peers.PEERS, "liar", peers.Peer(("numpy",), ("cpu",), liar))
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer(("no_such_package",), ("cpu",), liar))
    todo = compare.problems(["rnn_tanh"], ["5,2,3,4"], ["cpu"], ["float32", "float64"], "training")
    frame = compare.compare(todo, ["slow", "liar", "absent"], seconds=0)
    assert len(frame) == 2 * 4
    single = frame[frame["dtype"] == "float32"].set_index("implementation")
    assert single["status"].to_dict() == {
        "rnnlab": "ok",
        "slow": "ok",
        "liar": "wrong",
        "absent": "not installed: no_such_package",
    }
    assert single.loc["slow", "milliseconds"] > 20
    assert single.loc["slow", "ratio"] > 5  # 20 ms beside some tens of microseconds
    assert single.loc["rnnlab", "ratio"] == 1
    flops = 3 * 2 * 5 * 2 * 4 * (3 + 4)
    assert single.loc["slow", "gflops_per_second"] == pytest.approx(flops / single.loc["slow", "milliseconds"] * 1e-6)
    assert 0 < single.loc["rnnlab", "peak_share"] < 1
    assert pd.isna(single.loc["liar", "milliseconds"])
    best = compare.fastest(frame)
    assert best["peer"].tolist() == ["slow", "slow"]
    assert compare.worst_ratio(frame) == best["ratio"].min()
    text = compare.table(frame)
    assert "wrong" in text
    assert len(text.splitlines()) == 3


def test_ratio_is_that_of_the_fastest_peer(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", sleeper(0.02))
    monkeypatch.setitem(peers.PEERS, "slower", sleeper(0.06))
    todo = compare.problems(["gru"], ["5,2,3,4"], ["cpu"], ["float32"], "forward")
    frame = compare.compare(todo, ["slower", "slow"], seconds=0)
    assert compare.fastest(frame)["peer"].item() == "slow"
    by_name = frame.set_index("implementation")["ratio"]
    assert by_name["slower"] / by_name["slow"] == pytest.approx(3, rel=0.3)  # sleeps wake late, by a fraction of a ms


def test_without_a_peer_there_is_no_ratio():
    todo = compare.problems(["lstm"], ["5,2,3,4"], ["cpu"], ["float32"], "step")
    frame = compare.compare(todo, [], seconds=0)
    assert np.isnan(compare.worst_ratio(frame))
    assert compare.table(frame).splitlines()[1].split()[-3:-1] == ["-", "-"]


def test_crossing_of_two_curves():
    sizes = np.array([1.0, 10.0, 100.0])
    assert compare.crossing(sizes, sizes, np.full(3, np.sqrt(1000.0))) == pytest.approx((10**1.5, 10**1.5))
    assert compare.crossing(sizes, 2 * sizes, sizes) == pytest.approx((1, 1))
    assert np.isnan(compare.crossing(sizes, sizes, 2 * sizes)).all()


def test_command_prints_the_table_and_writes_files(run, tmp_path, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", sleeper(0.01))
    files = {name: tmp_path / name for name in ("out.csv", "out.svg")}
    result = run(
        "--shapes", "5,2,3,4", "--peers", "slow", "--csv", str(files["out.csv"]), "--plot", str(files["out.svg"])
    )
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["cell", "rnn_tanh", "lstm", "gru"]
    frame = pd.read_csv(files["out.csv"])
    assert len(frame) == 6
    assert "numba" in json.loads((tmp_path / "out.manifest.json").read_text())["packages"]
    assert "above 1 we are faster" in files["out.svg"].read_text()


def test_command_prints_json(run, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "slow", sleeper(0.01))
    result = run("--shapes", "5,2,3,4", "--cells", "gru", "--peers", "slow", "--json")
    data = json.loads(result.stdout)
    assert [row["implementation"] for row in data["rows"]] == ["rnnlab", "slow"]
    assert data["worst_ratio"] > 1
    assert data["environment"]["cores"] >= 1


@pytest.mark.parametrize(("at_least", "code"), [("1", 0), ("1e9", 1)])
def test_check_fails_below_the_bar(run, monkeypatch, at_least, code):
    monkeypatch.setitem(peers.PEERS, "slow", sleeper(0.01))
    result = run("--shapes", "5,2,3,4", "--cells", "gru", "--peers", "slow", "--check", "--at-least", at_least)
    assert result.exit_code == code


def test_a_wrong_result_fails(run, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "liar", peers.Peer(("numpy",), ("cpu",), liar))
    assert run("--shapes", "5,2,3,4", "--cells", "gru", "--peers", "liar").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--peers", "theano"], 2, "'theano' is not one of torch, jax, jax_cudnn, onnxruntime, cudnn, cudnn_graph"),
        (["--cells", "gru,elman"], 2, "'elman' is not one of rnn_tanh"),
        (["--dtypes", "int8"], 2, "'int8' is not one of float32, float64, tf32, bf16, fp16"),
        (["--shapes", "tiny"], 2, "small, medium, large, reference, deepbench or T,B,I,H, got 'tiny'"),
        (["--shapes", "1,2,3"], 2, "got '1,2,3'"),
        (["--shapes", "0,2,3,4"], 2, "steps must be an integer of at least 1, got 0"),
        (["--devices", "tpu"], 2, "'tpu' is not one of cpu, cuda"),
        (["--threads", "4096"], 2, "cores, got 4096"),
        (["--shapes", "5,2,3,4", "--devices", "cuda"], 3, "device 'cuda' cannot be used"),
    ],
)
def test_bad_input_is_named(run, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
