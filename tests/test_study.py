"""Studies: what a sweep keeps, what it computes again, and how it ends."""

import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib import pyplot

import rnnlab.study
import studies
from rnnlab import kernels
from rnnlab.study import Options, Study, provenance, side_by_side
from studies.__main__ import main as run_studies

ROOT = Path(__file__).parents[1]

#: A study in a file of its own. `LOG` names a folder where each call of `run` leaves its process and its thread limit.
MODULE = '''"""Does {name} grow with its size?

Read the line from left to right.
"""

import os
import time
from pathlib import Path

from rnnlab import kernels
from rnnlab.study import Study

kernels.backend = lambda device: None


def grid(quick):
    return [{{"size": size, "shape": [size, 2]}} for size in ([1] if quick else [3, 1, 2, 5, 4, 6])]


def run(point):
    if log := os.environ.get("LOG"):
        Path(log, f"{{point['size']}}-{{os.getpid()}}").write_text(os.environ.get("NUMBA_NUM_THREADS", ""))
    time.sleep({seconds})
    return [{{"step": step, "value": point["size"] / 3 + step}} for step in range(2)]


def plot(frame):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    axes.plot(frame["size"], frame["value"])
    return figure


study = Study("{name}", question=__doc__, grid=grid, run=run, plot=plot)

if __name__ == "__main__":
    study.main()
'''


def plot(frame):
    figure, axes = pyplot.subplots(figsize=(1, 1))
    axes.plot(frame["size"], frame["value"])
    return figure


class Counted:
    """A study in this process that counts the calls of `run` and does in them what it is told."""

    def __init__(self, grid=None, rows=None, plot=plot):
        self.calls = []
        self.rows = rows or (lambda point: [{"value": point["size"] / 3}])

        def run(point):
            self.calls.append(point)
            return self.rows(point)

        points = grid or [{"size": size} for size in (2, 1, 3)]
        self.study = Study("counted", question="How often?\nOnce.", grid=lambda quick: points, run=run, plot=plot)

    def __call__(self, out, *flags):
        """Run the command line and return its exit code."""
        with pytest.raises(SystemExit) as end:
            self.study.main(["--out", str(out), *flags])
        return end.value.code


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    """A machine without a GPU, whatever this one has, and without the time to import the kernels."""

    def backend(device):
        if device == "cuda":
            raise kernels.DeviceNotAvailable("device 'cuda' cannot be used: this machine has none")

    monkeypatch.setattr(kernels, "backend", backend)
    yield
    sys.modules.pop("grows", None)


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def command(tmp_path, *flags, seconds=0, environment=()):
    """Write the module `grows` and return what starts it as `python -m`, like `subprocess.Popen(*, **)`."""
    (tmp_path / "grows.py").write_text(MODULE.format(name="grows", seconds=seconds))
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    words = [sys.executable, "-W", "error", "-m", "grows", *map(str, flags)]
    return words, {"env": {**os.environ, "PYTHONPATH": path, **dict(environment)}, "cwd": tmp_path}


def test_table_has_the_parameters_in_front_and_the_rows_in_the_order_of_the_grid(tmp_path, capsys):
    counted = Counted([{"size": 2, "shape": [2, 1]}, {"size": 1, "cell": "lstm"}])
    assert counted(tmp_path) == 0
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "size,shape,seed,device,dtype,cell,value",
        '2,"[2, 1]",0,cpu,float32,,0.6666666666666666',
        "1,,0,cpu,float32,lstm,0.3333333333333333",
    ]
    names = ["results.csv", "manifest.json", "figure.svg", "figure.png"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / name) for name in names]
    assert all(Path(name).stat().st_size for name in printed)


def test_run_receives_the_flags_and_cannot_change_the_table(tmp_path):
    def rows(point):
        point["size"] = 99
        return [{"value": 1}]

    counted = Counted(rows=rows)
    counted(tmp_path, "--seed", "7", "--dtype", "float64")
    frame = pd.read_csv(tmp_path / "results.csv")
    assert frame["size"].tolist() == [2, 1, 3]
    assert set(frame["seed"]) == {7}
    assert set(frame["dtype"]) == {"float64"}
    assert [(point["seed"], point["device"], point["dtype"]) for point in counted.calls] == [(7, "cpu", "float64")] * 3


def test_quick_points_are_reused_by_the_full_grid(tmp_path):
    (tmp_path / "grows.py").write_text(MODULE.format(name="grows", seconds=0))
    study = load(tmp_path / "grows.py").study
    study.launch(Options(out=tmp_path, quick=True))
    full = study.launch(Options(out=tmp_path))
    assert (len(full["reused"]), len(full["computed"])) == (1, 5)


def test_unusual_numbers_survive_a_resumed_run(tmp_path):
    numbers = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 2**70, np.float32(0.1), np.int64(3), np.True_]
    seen = []

    def draw(frame):
        seen.append(frame["value"].tolist())
        return pyplot.figure()

    counted = Counted([{"size": 1}], lambda point: [{"value": number} for number in numbers], draw)
    assert counted(tmp_path) == 0
    first = (tmp_path / "results.csv").read_bytes()
    assert counted(tmp_path) == 0
    assert len(counted.calls) == 1
    assert (tmp_path / "results.csv").read_bytes() == first
    written = [row.split(",")[-1] for row in first.decode().splitlines()[1:]]
    assert written[:3] == ["nan", "inf", "-inf"]
    assert written[-2:] == ["3", "True"]
    assert list(map(float, written[3:8])) == list(map(float, numbers[3:8]))
    assert math.copysign(1, float(written[3])) == -1
    assert repr(seen[0]) == repr(seen[1])
    assert math.isnan(seen[0][0])


def test_resume_after_a_kill_gives_the_bytes_of_a_straight_run(tmp_path):
    words, settings = command(tmp_path, "--out", "straight")
    subprocess.run(words, check=True, capture_output=True, **settings)
    words, settings = command(tmp_path, "--out", "killed", seconds=0.2)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("points/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = {path.stem for path in (tmp_path / "killed" / "points").glob("*.json")}
    assert 2 <= len(kept) < 6
    assert not (tmp_path / "killed" / "results.csv").exists()
    subprocess.run(words, check=True, capture_output=True, **settings)
    assert set(manifest(tmp_path / "killed")["reused"]) == kept
    assert (tmp_path / "killed" / "results.csv").read_bytes() == (tmp_path / "straight" / "results.csv").read_bytes()


def test_two_jobs_give_the_bytes_of_one_in_processes_with_fewer_threads(tmp_path):
    logs = {jobs: tmp_path / f"log{jobs}" for jobs in (1, 2)}
    for jobs, log in logs.items():
        log.mkdir()
        flags = ("--out", f"jobs{jobs}", "--jobs", jobs)
        words, settings = command(
            tmp_path, *flags, seconds=0.5, environment={"LOG": str(log), "NUMBA_NUM_THREADS": "4"}
        )
        subprocess.run(words, check=True, capture_output=True, **settings)
    assert (tmp_path / "jobs2" / "results.csv").read_bytes() == (tmp_path / "jobs1" / "results.csv").read_bytes()
    processes = {jobs: {path.name.split("-")[1] for path in log.iterdir()} for jobs, log in logs.items()}
    assert (len(processes[1]), len(processes[2])) == (1, 2)
    assert {path.read_text() for path in logs[1].iterdir()} == {"4"}
    assert {path.read_text() for path in logs[2].iterdir()} == {"2"}
    assert manifest(tmp_path / "jobs2")["environment"]["threads"] == 2


def test_a_point_whose_process_dies_fails_alone(tmp_path):
    words, settings = command(tmp_path, "--out", "out", "--jobs", 2)
    module = tmp_path / "grows.py"
    module.write_text(
        module.read_text().replace("    time.sleep", "    if point['size'] == 5: os._exit(9)\n    time.sleep")
    )
    assert subprocess.run(words, capture_output=True, **settings).returncode == 1
    [failure] = manifest(tmp_path / "out")["failed"]
    assert failure["point"]["size"] == 5
    assert failure["error"].startswith("BrokenProcessPool")
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert rows.dropna(subset="value")["size"].tolist() == [3, 3, 1, 1, 2, 2, 4, 4, 6, 6]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_workers_leave_when_their_parent_is_killed(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    words, settings = command(tmp_path, "--out", "out", "--jobs", 2, seconds=60, environment={"LOG": str(log)})
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings)
    deadline = time.monotonic() + 60
    while len(list(log.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [int(path.name.split("-")[1]) for path in log.iterdir()]
    process.kill()
    process.wait()
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2
    assert not any(alive(worker) for worker in workers)


def alive(process):
    """Whether a process runs: one that has ended but that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_cluster_gives_the_bytes_of_one_process(tmp_path):
    distributed = pytest.importorskip("distributed")
    (tmp_path / "grows.py").write_text(MODULE.format(name="grows", seconds=0))
    study = load(tmp_path / "grows.py").study
    study.launch(Options(out=tmp_path / "here"))
    with distributed.LocalCluster(n_workers=1, processes=False, protocol="tcp", dashboard_address=None) as cluster:
        study.launch(Options(out=tmp_path / "there", scheduler=cluster.scheduler_address))
    assert manifest(tmp_path / "there")["reused"] == []
    assert (tmp_path / "there" / "results.csv").read_bytes() == (tmp_path / "here" / "results.csv").read_bytes()


def load(path):
    """Import a file afresh under its own name."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


def test_a_failed_point_is_recorded_and_tried_again(tmp_path, capsys):
    def fails(point):
        if point["size"] == 1:
            raise RuntimeError("too small, says run")
        return [{"value": 1.0}]

    counted = Counted(rows=fails)
    assert counted(tmp_path) == 1
    assert "RuntimeError: too small, says run" in capsys.readouterr().err
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "size,seed,device,dtype,value,error",
        "2,0,cpu,float32,1.0,",
        '1,0,cpu,float32,,"RuntimeError: too small, says run"',
        "3,0,cpu,float32,1.0,",
    ]
    [failure] = manifest(tmp_path)["failed"]
    assert failure["point"]["size"] == 1
    assert failure["error"] == "RuntimeError: too small, says run"
    assert "in fails" in failure["traceback"]
    counted.calls.clear()
    counted.rows = lambda point: [{"value": 2.0}]
    assert counted(tmp_path) == 0
    assert [point["size"] for point in counted.calls] == [1]
    assert pd.read_csv(tmp_path / "results.csv")["value"].tolist() == [1.0, 2.0, 1.0]
    assert manifest(tmp_path)["failed"] == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        None,
        {"value": 1},
        [{"value": [1]}],
        [{"value": np.zeros(2)}],
        [{"value": 1j}],
        [{"error": 1}],
        [{"size": 9}],
    ],
    ids=str,
)
def test_rows_that_no_table_holds_are_a_failure(tmp_path, rows):
    assert Counted([{"size": 1}], lambda point: rows)(tmp_path) == 1
    assert manifest(tmp_path)["failed"][0]["error"].startswith("ValueError: run")
    assert not list((tmp_path / "points").glob("*.json"))


def test_a_failed_figure_leaves_the_results_and_no_older_figure(tmp_path, capsys):
    assert Counted()(tmp_path) == 0
    broken = Counted(plot=lambda frame: frame["no such column"])
    assert broken(tmp_path) == 1
    assert "KeyError" in capsys.readouterr().err
    assert manifest(tmp_path)["failed"][0]["point"] == "figure"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "points", "results.csv"]
    assert len(broken.calls) == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"point": {"size": 1}, "ro',
        b"\xff\xfe\x00",
        b"[]",
        b'{"rows": []}',
        b'{"rows": [3]}',
        b'{"rows": [{"v": []}]}',
    ],
)
def test_a_garbled_point_is_measured_again(tmp_path, content):
    counted = Counted()
    assert counted(tmp_path) == 0
    before = (tmp_path / "results.csv").read_bytes()
    broken = min((tmp_path / "points").glob("*.json"))
    whole = broken.read_bytes()
    broken.write_bytes(content)
    counted.calls.clear()
    assert counted(tmp_path) == 0
    assert len(counted.calls) == 1
    assert broken.read_bytes() == whole
    assert (tmp_path / "results.csv").read_bytes() == before


def test_seed_dtype_and_fresh_measure_again(tmp_path):
    counted = Counted()
    for flags, calls in (
        ([], 3),
        (["--seed", "1"], 6),
        (["--dtype", "float64"], 9),
        ([], 9),
        (["--fresh"], 12),
        ([], 12),
    ):
        assert counted(tmp_path, *flags) == 0
        assert len(counted.calls) == calls
    assert len(list((tmp_path / "points").iterdir())) == 3


def test_an_edited_study_or_kernel_measures_again(tmp_path, monkeypatch):
    package = tmp_path / "rnnlab"
    (package / "kernels").mkdir(parents=True)
    kernel = package / "kernels" / "cpu.py"
    kernel.write_text("factor = 1")
    monkeypatch.setattr(rnnlab.study, "__file__", str(package / "study.py"))
    path = tmp_path / "grows.py"
    path.write_text(MODULE.format(name="grows", seconds=0))
    options = Options(out=tmp_path / "out")
    assert len(load(path).study.launch(options)["computed"]) == 6
    assert len(load(path).study.launch(options)["computed"]) == 0
    path.write_text(path.read_text().replace("/ 3", "/ 7"))
    assert len(load(path).study.launch(options)["computed"]) == 6
    assert pd.read_csv(tmp_path / "out" / "results.csv")["value"].tolist()[0] == 3 / 7
    kernel.write_text("factor = 2")
    assert len(load(path).study.launch(options)["computed"]) == 6
    assert len(load(path).study.launch(options)["computed"]) == 0


def test_a_worker_that_has_imported_other_sources_refuses(tmp_path):
    (tmp_path / "grows.py").write_text(MODULE.format(name="grows", seconds=0))
    run = load(tmp_path / "grows.py").run
    point = {"size": 1}
    source = rnnlab.study._source_hash(run)
    assert len(rnnlab.study._measure(run, point, source)) == 2
    assert "another version" in rnnlab.study._measure(run, point, source[::-1])["error"]


def test_an_interrupt_keeps_the_finished_points(tmp_path, capsys):
    def interrupts(point):
        if point["size"] == 1:
            raise KeyboardInterrupt
        return [{"value": 1}]

    counted = Counted(rows=interrupts)
    assert counted(tmp_path) == 130
    assert "the next run resumes" in capsys.readouterr().err
    counted.rows = lambda point: [{"value": 2}]
    assert counted(tmp_path) == 0
    assert pd.read_csv(tmp_path / "results.csv")["value"].tolist() == [1, 2, 2]


def test_an_interrupt_ends_a_pool_at_once(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    words, settings = command(tmp_path, "--out", "out", "--jobs", 2, seconds=60, environment={"LOG": str(log)})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a background job ignores, its children do
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **settings
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while len(list(log.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert [line.split(".")[0] for line in err.splitlines()] == ["Interrupted"]


def test_json_prints_one_object(tmp_path, capsys):
    counted = Counted()
    assert counted(tmp_path, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert printed.err == ""
    assert [Path(path).name for path in summary["outputs"]] == [
        "results.csv",
        "manifest.json",
        "figure.svg",
        "figure.png",
    ]
    assert (summary["points"], len(summary["computed"]), summary["reused"], summary["failed"]) == (3, 3, [], [])
    assert summary["wall_seconds"] > 0
    assert summary == manifest(tmp_path)


def test_manifest_says_how_to_get_the_same_numbers(tmp_path):
    words, settings = command(tmp_path, "--out", "a b", "--quick", "--seed", "3", "--dtype", "float64")
    subprocess.run(words, check=True, capture_output=True, **settings)
    found = manifest(tmp_path / "a b")
    assert found["command"] == "python -m grows --quick --out 'a b' --seed 3 --device cpu --dtype float64"
    assert (found["study"], found["version"], found["seed"]) == ("grows", 1, 3)
    assert found["question"] == "Does grows grow with its size?"
    assert found["flags"]["jobs"] == 1
    assert abs(time.time() - pd.Timestamp(found["date_utc"]).timestamp()) < 600
    assert found["environment"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_more_tables_are_written_beside_the_results(tmp_path):
    def tables(frame):
        return {"means": frame.groupby("size", as_index=False)["value"].mean()}

    counted = Counted()
    counted.study = dataclasses.replace(counted.study, tables=tables)
    assert counted(tmp_path) == 0
    assert (tmp_path / "means.csv").read_text() == "size,value\n1,0.3333333333333333\n2,0.6666666666666666\n3,1.0\n"
    assert str(tmp_path / "means.csv") in manifest(tmp_path)["outputs"]


def test_tables_that_fail_are_a_failure_beside_the_others(tmp_path, capsys):
    counted = Counted()
    counted.study = dataclasses.replace(counted.study, tables=lambda frame: {"ones": frame[["value"]]})
    assert counted(tmp_path) == 0
    counted.study = dataclasses.replace(counted.study, tables=lambda frame: 1 / 0)
    assert counted(tmp_path) == 1
    assert "tables: ZeroDivisionError" in capsys.readouterr().err
    assert len(manifest(tmp_path)["reused"]) == 3
    assert not (tmp_path / "ones.csv").exists()


def test_points_run_side_by_side_where_the_study_says_so(tmp_path, monkeypatch):
    asked = []

    def outcomes(run, points, source, options):
        asked.append(options.jobs)
        yield from ((identity, run(point)) for identity, point in points.items())

    monkeypatch.setattr(rnnlab.study, "_outcomes", outcomes)
    monkeypatch.setattr(kernels, "threads", lambda: 5)
    counted = Counted()
    for parallel, flags in ((False, []), (True, []), (True, ["--jobs", "2"])):
        counted.study = dataclasses.replace(counted.study, parallel=parallel)
        assert counted(tmp_path / "out", "--fresh", *flags) == 0
    assert asked == [1, 5, 2]


def test_usage_errors(tmp_path, capsys, monkeypatch):
    counted = Counted()
    (tmp_path / "file").touch()
    monkeypatch.setitem(sys.modules, "distributed", None)
    for flags, message in (
        (["--jobs", "0"], "--jobs"),
        (["--out", str(tmp_path / "file" / "below")], "cannot write in"),
        (["--dtype", "float16"], "float32"),
        (["--scheduler", "tcp://localhost:1", "--jobs", "2"], "exclude each other"),
        (["--scheduler", "localhost"], "tcp://host:8786"),
        (["--scheduler", "tcp://localhost:1"], 'pip install "rnnlab[cluster]"'),
    ):
        assert counted(tmp_path / "out", *flags) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
        assert message in line
    assert counted.calls == []


def test_an_absent_device_exits_3_with_its_reason(tmp_path, capsys):
    counted = Counted()
    assert counted(tmp_path, "--device", "cuda") == 3
    assert capsys.readouterr().err == "Error: device 'cuda' cannot be used: this machine has none\n"
    assert counted.calls == []


def test_a_device_that_a_study_does_not_take_is_a_usage_error(tmp_path, capsys):
    counted = Counted()
    counted.study = dataclasses.replace(counted.study, devices=("cpu",))
    assert counted(tmp_path, "--device", "cuda") == 2
    assert "counted runs on cpu alone, got --device cuda" in capsys.readouterr().err
    assert counted.calls == []


def test_times_are_not_measured_on_another_machine(tmp_path, capsys):
    counted = Counted()
    counted.study = dataclasses.replace(counted.study, timed=True)
    assert counted(tmp_path, "--scheduler", "tcp://localhost:1") == 2
    assert "counted measures times of this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "at least one point"),
        ([{"size": 1}, {"size": 2}, {"size": 1}], r'more than once \{"size": 1\}'),
        ([{"size": np.int64(1)}], r"size must be .* got np.int64\(1\)"),
        ([{"size": [1, {}]}], "size must be"),
        ([{"seed": 1}], "got 'seed'"),
        ([{3: 1}], "got 3"),
    ],
)
def test_a_grid_that_is_none_is_refused(tmp_path, grid, message):
    study = Study("counted", question="Why?", grid=lambda quick: grid, run=lambda point: [], plot=plot)
    with pytest.raises(ValueError, match=message):
        study.launch(Options(out=tmp_path))


def test_a_study_needs_a_name_and_a_question():
    with pytest.raises(ValueError, match=r"name must be a plain identifier .* got '\.\./up'"):
        Study("../up", question="Why?", grid=list, run=list, plot=plot)
    with pytest.raises(ValueError, match="question must be a text"):
        Study("up", question=None, grid=list, run=list, plot=plot)


def test_figures_have_the_same_bytes_and_leave_the_backend_alone(tmp_path):
    before = matplotlib.get_backend(auto_select=False)
    try:
        matplotlib.use("svg")
        for out in ("one", "two"):
            assert Counted()(tmp_path / out) == 0
        assert matplotlib.get_backend(auto_select=False) == "svg"
        assert pyplot.get_fignums() == []
    finally:
        matplotlib.use(before or "agg")
    for name in ("figure.svg", "figure.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "<dc:date>" not in (tmp_path / "one" / "figure.svg").read_text()


def test_provenance_names_what_numbers_depend_on(tmp_path):
    found = provenance()
    assert found["packages"]["numpy"] == np.__version__
    assert found["packages"]["matplotlib"] == matplotlib.__version__
    assert found["vector_bytes"] in (16, 32, 64)
    assert found["cores"] == os.cpu_count()
    assert found["threads"] >= 1
    assert found["cpu"]
    assert found["gpu_unused_because"] == "device 'cuda' cannot be used: this machine has none"
    assert json.loads(json.dumps(found)) == found


def test_provenance_knows_the_commit_of_a_checkout_that_tracks_it(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit():
        found = provenance()
        return found["git_commit"], found["git_dirty"]

    file = tmp_path / "study.py"
    file.touch()
    monkeypatch.setattr(rnnlab.study, "__file__", str(file))
    assert commit() == (None, None)
    git("init")
    (tmp_path / "other").touch()
    git("add", "other")
    git("commit", "-m", "one")
    assert commit() == (None, None)
    git("add", "study.py")
    git("commit", "-m", "two")
    assert commit() == (git("rev-parse", "HEAD"), False)
    file.write_text("changed")
    assert commit() == (git("rev-parse", "HEAD"), True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package `studies` with the two studies `alpha` and `beta` in it, and nothing else."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("alpha", "beta"):
        (folder / f"{name}.py").write_text(MODULE.format(name=name, seconds=0))
        monkeypatch.delitem(sys.modules, f"studies.{name}", raising=False)
    (folder / "__main__.py").touch()
    monkeypatch.setattr(studies, "__path__", [str(folder)])
    yield folder
    for name in ("alpha", "beta"):
        sys.modules.pop(f"studies.{name}", None)


@pytest.mark.usefixtures("package")
def test_runner_lists_names_and_questions():
    result = CliRunner().invoke(run_studies, ["--list"])
    assert result.exit_code == 0
    assert result.stdout == "alpha  Does alpha grow with its size?\nbeta  Does beta grow with its size?\n"


@pytest.mark.usefixtures("package")
def test_runner_refuses_an_unknown_name():
    result = CliRunner().invoke(run_studies, ["alpha", "gamma"])
    assert result.exit_code == 2
    assert "'gamma' is none of alpha, beta" in result.stderr


def test_runner_refuses_a_device_before_anything_runs(package, tmp_path):
    path = package / "beta.py"
    path.write_text(path.read_text().replace("plot=plot)", 'plot=plot, devices=("cpu",))'))
    result = CliRunner().invoke(run_studies, ["alpha", "beta", "--device", "cuda", "--out", str(tmp_path / "all")])
    assert result.exit_code == 2
    assert "not on cuda: beta" in result.stderr
    assert not (tmp_path / "all").exists()


@pytest.mark.usefixtures("package")
def test_runner_gives_each_study_a_folder(tmp_path):
    result = CliRunner().invoke(run_studies, ["--out", str(tmp_path / "all"), "--quick", "--seed", "4", "--json"])
    assert result.exit_code == 0
    summaries = json.loads(result.stdout)
    assert sorted(summaries) == ["alpha", "beta"]
    for name in summaries:
        assert set(pd.read_csv(tmp_path / "all" / name / "results.csv")["seed"]) == {4}
        assert f"python -m studies.{name} --quick --out" in manifest(tmp_path / "all" / name)["command"]


def test_runner_goes_on_after_a_failure_and_exits_with_the_worst(package, tmp_path):
    path = package / "alpha.py"
    path.write_text(path.read_text().replace("time.sleep(0)", "raise OSError('no luck')"))
    result = CliRunner().invoke(run_studies, ["--out", str(tmp_path / "all")])
    assert result.exit_code == 1
    assert "alpha" in result.stderr
    assert "OSError: no luck" in result.stderr
    assert str(tmp_path / "all" / "beta" / "figure.svg") in result.stdout.splitlines()
    assert CliRunner().invoke(run_studies, ["beta", "--out", str(tmp_path / "all")]).exit_code == 0


def test_side_by_side_keeps_the_order_of_its_seeds():
    found = side_by_side(lambda point, seed: (point["name"], seed), {"name": "one", "seed": 7, "runs": 5})
    assert found == [("one", 7000 + k) for k in range(5)]
