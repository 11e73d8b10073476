"""A study: a grid of points, each measured once, kept as tidy rows with their provenance and one figure.

    study = Study("gradient_decay", question=__doc__, grid=grid, run=run, plot=plot)

`grid(quick)` lists the points, `run(point)` returns the rows of one, `plot(frame)` sees the table of all rows only.
A finished point is a file named by the hash of everything that determines its numbers, so a killed sweep resumes.
"""

import contextlib
import csv
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from unittest import mock

import click
from tqdm import tqdm

from . import kernels
from .timing import thread_environment

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DTYPES", "Options", "Study", "flags", "provenance", "records", "side_by_side"]

DTYPES = ("float32", "float64")
FIGURES = ("figure.svg", "figure.png")
#: Packages that numbers depend on (Pillow draws the letters of a data set); those that times depend on too; all.
NUMERICAL = ("numba", "numpy", "scipy", "pillow")
COMPUTING = ("rnnlab", "numba", "numba-cuda", "llvmlite", "numpy", "scipy", "torch", "jax", "onnxruntime")
PACKAGES = (*COMPUTING, "pillow", "pandas", "matplotlib", "seaborn")

Point = dict[str, Any]
Rows = list[dict[str, Any]]
Run = Callable[[Point], Rows]
#: What became of a point: its rows, or a dict with `error` (type: message) and `traceback`.
Outcome = Rows | dict[str, str]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """What a run of a study may be told, on the command line or in Python; the metadata is that of `click.option`."""

    quick: bool = field(default=False, metadata={"is_flag": True, "help": "A small grid, in seconds."})
    out: Path | None = field(
        default=None, metadata={"type": click.Path(path_type=Path), "help": "[default: results/STUDY]"}
    )
    seed: int = field(default=0, metadata={"type": click.IntRange(min=0), "help": "Seed of every random draw."})
    device: str = field(default="cpu", metadata={"type": click.Choice(kernels.DEVICES)})
    dtype: str = field(default="float32", metadata={"type": click.Choice(DTYPES)})
    jobs: int | None = field(
        default=None,
        metadata={"type": click.IntRange(min=1), "help": "Points at a time.  [default: 1, or as the study says]"},
    )
    scheduler: str | None = field(default=None, metadata={"help": "A Dask scheduler, tcp://host:port, to run points."})
    fresh: bool = field(default=False, metadata={"is_flag": True, "help": "Forget the stored points."})
    no_progress: bool = field(default=False, metadata={"is_flag": True, "help": "No progress bar on a terminal."})
    json: bool = field(default=False, metadata={"is_flag": True, "help": "One JSON object on stdout, no paths."})


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give the callback of a click command, called with the fields of `Options`, a flag for each of them."""
    for option in reversed(fields(Options)):
        name = f"--{option.name.replace('_', '-')}"
        shown = option.default is not None
        command = click.option(name, default=option.default, show_default=shown, **option.metadata)(command)
    return command


@dataclass(frozen=True)
class Study:
    """One question, the grid of points that answers it, and the figure.

    name: a plain identifier; names the folder of the outputs.
    question: text whose first line is the question (the docstring of the study's file).
    grid: `grid(quick)` returns the points, dicts of str, int, float, bool, None and lists of them.
    run: `run(point)` returns rows, dicts of scalars; `point` also holds `seed`, `device`, `dtype`. A module's function.
    plot: `plot(frame)` returns a Figure; the frame's leading columns are the point's parameters, lists as JSON text.
    devices: those that `run` takes.
    parallel: whether points run side by side, one a core, each with one thread, where --jobs does not say otherwise.
    tables: `tables(frame)` returns what else is to be written as CSV, by the name of the file.
    timed: whether rows hold times, which depend on the machine, its threads and all packages; stored points then too.
    version: raise it when stored points must be forgotten for a reason that the source does not show.

    Raises ValueError for a name that is no identifier and for an empty question.
    """

    name: str
    question: str | None
    grid: Callable[[bool], list[Point]]
    run: Run
    plot: Callable[["pd.DataFrame"], "Figure"]
    devices: tuple[str, ...] = kernels.DEVICES
    parallel: bool = False
    tables: Callable[["pd.DataFrame"], dict[str, "pd.DataFrame"]] | None = None
    timed: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"name must be a plain identifier such as 'gradient_decay', got {self.name!r}")
        if not (self.question or "").strip():
            raise ValueError(f"question must be a text that asks it (the file's docstring), got {self.question!r}")

    @property
    def headline(self) -> str:
        """The first line of the question."""
        return (self.question or "").strip().splitlines()[0]

    def main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the command line and exit: 0 ok, 1 a point or the figure failed, 2 usage, 3 no device, 130 interrupted.

        Raises ValueError for a grid that is empty, lists a point twice or holds what JSON cannot.
        """

        @click.command(help=self.question)
        @flags
        def command(**values: Any) -> None:
            summary = self.launch(Options(**values))
            if values["json"]:
                click.echo(json.dumps(summary))
            sys.exit(1 if summary["failed"] else 0)

        command.main(argv)

    def launch(self, options: Options) -> dict[str, Any]:
        """Measure, write the outputs and return the manifest; the paths go to stdout, failures to stderr.

        Raises click's usage errors, ValueError as `main` does, and SystemExit with 3 or 130.
        """
        out = options.out or Path("results", self.name)
        if options.jobs is None:
            options = replace(options, jobs=kernels.threads() if self.parallel and not options.scheduler else 1)
        assert options.jobs is not None
        if options.scheduler and options.jobs > 1:
            raise click.UsageError("--jobs and --scheduler exclude each other: a cluster has its own number of workers")
        if options.scheduler and self.timed:
            raise click.UsageError(f"{self.name} measures times of this machine, got --scheduler {options.scheduler}")
        if options.device not in self.devices:
            raise click.UsageError(
                f"{self.name} runs on {', '.join(self.devices)} alone, got --device {options.device}"
            )
        try:
            kernels.backend(options.device)
            (out / "points").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out / "points").close()
        except kernels.DeviceNotAvailable as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(3)
        except OSError as error:
            raise click.BadParameter(f"cannot write in {out}: {error.strerror}", param_hint="--out") from error
        try:
            manifest = self._sweep(options, out)
        except KeyboardInterrupt:
            click.echo(f"Interrupted. Finished points are kept in {out / 'points'}: the next run resumes.", err=True)
            sys.exit(130)
        for failure in manifest["failed"]:
            click.echo(f"{self.name}: {failure['point']}: {failure['error']}", err=True)
        if not options.json:
            click.echo("\n".join(manifest["outputs"]))
        return manifest

    def _sweep(self, options: Options, out: Path) -> dict[str, Any]:
        assert options.jobs is not None
        start = time.perf_counter()
        _digest.cache_clear()
        source = _source_hash(self.run)
        environment = provenance() | ({"threads": _threads(options.jobs)} if options.jobs > 1 else {})
        points = {self._identity(point, source, environment): point for point in self._points(options)}
        files = {identity: out / "points" / f"{identity}.json" for identity in points}
        for file in (out / "points").glob("*.json*") if options.fresh else ():
            file.unlink()
        stored = {identity: rows for identity in points if (rows := _load(files[identity], points[identity]))}
        todo = {identity: point for identity, point in points.items() if identity not in stored}
        outcomes: dict[str, Outcome] = {**stored}
        arriving = _outcomes(self.run, todo, source, options)
        bar = tqdm(arriving, self.name, len(points), initial=len(stored), disable=options.no_progress or None)
        # Closed here, not by the garbage collector: an interrupted pool would first work off all its points.
        with contextlib.closing(arriving), bar:
            for identity, outcome in bar:
                outcomes[identity] = outcome
                if isinstance(outcome, list):
                    _write(files[identity], json.dumps({"point": points[identity], "rows": outcome}))
        outcomes = {identity: outcomes[identity] for identity in points}  # the grid's order, not that of arrival
        table = _table([(points[identity], outcome) for identity, outcome in outcomes.items()])
        _write(out / "results.csv", _csv(table))
        failed = [{"point": points[key], **outcome} for key, outcome in outcomes.items() if isinstance(outcome, dict)]
        measured = [row for row in table if "error" not in row]
        no_figure, (tables, no_tables) = self._draw(measured, out), self._tabulate(measured, out)
        names = ["results.csv", *tables, "manifest.json", *(() if no_figure else FIGURES)]
        manifest = {
            "study": self.name,
            "version": self.version,
            "question": self.headline,
            "command": self._reproduce(options),
            "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "wall_seconds": time.perf_counter() - start,
            "outputs": [str(out / name) for name in names],
            "points": len(points),
            "computed": [identity for identity in todo if isinstance(outcomes[identity], list)],
            "reused": list(stored),
            "tables": tables,
            "failed": failed + no_figure + no_tables,
            "flags": asdict(options) | {"out": str(out)},
            "seed": options.seed,
            "source_sha256": source,
            "environment": environment,
        }
        _write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return manifest

    def _points(self, options: Options) -> list[Point]:
        grid = list(self.grid(options.quick))
        flagged = {"seed": options.seed, "device": options.device, "dtype": options.dtype}
        if not grid:
            raise ValueError("grid must return at least one point, got none")
        for name, value in (item for point in grid for item in point.items()):
            if not isinstance(name, str) or name in (*flagged, "error"):
                raise ValueError(f"grid: a parameter is named by a str, not seed, device, dtype or error; got {name!r}")
            if not _is_json(value):
                raise ValueError(f"grid: {name} must be str, int, float, bool, None or a list of them, got {value!r}")
        texts = [json.dumps(point, sort_keys=True) for point in grid]
        if twice := {text for text in texts if texts.count(text) > 1}:
            raise ValueError(f"grid must list each point once, got more than once {', '.join(sorted(twice))}")
        return [json.loads(json.dumps(point)) | flagged for point in grid]

    def _identity(self, point: Point, source: str, environment: dict[str, Any]) -> str:
        packages = {name: environment["packages"].get(name) for name in COMPUTING if self.timed}
        machine = {name: environment[name] for name in ("cpu", "cpu_target", "threads", "gpu") if self.timed}
        content = {"study": self.name, "version": self.version, "point": point, "source": source} | packages | machine
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _draw(self, rows: Rows, out: Path) -> list[dict[str, Any]]:
        import matplotlib
        import pandas as pd
        from matplotlib import pyplot

        for name in FIGURES:
            (out / name).unlink(missing_ok=True)  # none is better than that of an earlier run
        # A backend that somebody chose stays: saving works with any, and switching would close their windows.
        if matplotlib.get_backend(auto_select=False) is None:
            matplotlib.use("agg")
        try:
            if not rows:
                raise ValueError("no point has rows to draw")
            figure = self.plot(pd.DataFrame(rows))
            with matplotlib.rc_context({"svg.hashsalt": self.name}):
                for name, metadata in zip(FIGURES, ({"Date": None}, {}), strict=True):
                    image = io.BytesIO()
                    figure.savefig(image, format=name[-3:], metadata=metadata, bbox_inches="tight", dpi=150)
                    _write(out / name, image.getvalue())
            pyplot.close(figure)
        except Exception as error:
            return [{"point": "figure", **_failure(error)}]
        return []

    def _tabulate(self, rows: Rows, out: Path) -> tuple[list[str], list[dict[str, Any]]]:
        """Write the tables that the study makes of its rows; return the names of their files, and what failed."""
        import pandas as pd

        with contextlib.suppress(OSError, ValueError, LookupError):
            for name in json.loads((out / "manifest.json").read_bytes())["tables"]:
                (out / name).unlink(missing_ok=True)  # none is better than that of an earlier run
        try:
            tables = self.tables(pd.DataFrame(rows)) if self.tables and rows else {}
        except Exception as error:
            return [], [{"point": "tables", **_failure(error)}]
        for name, table in tables.items():
            _write(out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        return [f"{name}.csv" for name in tables], []

    def _reproduce(self, options: Options) -> str:
        module = _module_name(self.run)
        words = ["python", inspect.getfile(self.run)] if module == "__main__" else ["python", "-m", module]
        words += ["--quick"] * options.quick + (["--out", str(options.out)] if options.out else [])
        return shlex.join([*words, "--seed", str(options.seed), "--device", options.device, "--dtype", options.dtype])


def side_by_side(function: Callable[[Point, int], Result], point: Point) -> list[Result]:
    """Return function(point, seed) for point["runs"] seeds, in as many threads as kernels may use."""
    seeds = [1000 * point["seed"] + k for k in range(point["runs"])]
    with ThreadPoolExecutor(kernels.threads()) as pool:
        return list(pool.map(lambda seed: function(point, seed), seeds))


def records(frame: "pd.DataFrame") -> Rows:
    """Return a table as rows."""
    rows: Any = frame.to_dict("records")
    return list(rows)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def provenance() -> dict[str, Any]:
    """Return what numbers depend on besides their source: packages, commit, CPU, threads, GPU or why it is not used."""
    from .kernels.simd import CPU, VECTOR_BYTES

    git = ("git", "--no-optional-locks", "-C", str(Path(__file__).parent))
    # An installed rnnlab may lie inside a checkout of something else: only one that tracks this file counts.
    tracked = _stdout(*git, "ls-files", "--error-unmatch", Path(__file__).name)
    return {
        "packages": _versions(PACKAGES),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _stdout(*git, "rev-parse", "HEAD") if tracked else None,
        "git_dirty": bool(_stdout(*git, "status", "--porcelain")) if tracked else None,
        "cpu": (_stdout("grep", "-m1", "model name", "/proc/cpuinfo") or "").partition(": ")[2] or platform.processor(),
        "cpu_target": CPU,
        "cores": os.cpu_count(),
        "vector_bytes": VECTOR_BYTES,
        "threads": kernels.threads(),
        "gpu": _stdout("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "gpu_unused_because": kernels.available("cuda"),
    }


def _stdout(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _failure(error: Exception) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


def _write(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


@functools.cache  # a worker keeps its first answer: what it has imported counts, not what the disk holds by now
def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        digest.update(f"{file.relative_to(path.parent).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _source_hash(run: Run) -> str:
    """Hash all that numbers depend on besides a point: sources, Python, whose own text a task reads, and packages."""
    parts = _digest(Path(__file__).parent), _digest(Path(inspect.getfile(run))), platform.python_version()
    return hashlib.sha256(repr((*parts, _versions(NUMERICAL))).encode()).hexdigest()


def _module_name(run: Run) -> str:
    # `python -m studies.x` calls that module __main__, a name under which no worker could import it.
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification.name if run.__module__ == "__main__" and specification else run.__module__


def _load(path: Path, point: Point) -> Rows | None:
    try:
        return _checked(json.loads(path.read_bytes())["rows"], point)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _checked(rows: Rows, point: Point) -> Rows:
    import numpy as np

    if not isinstance(rows, list) or not rows:
        raise ValueError(f"run must return a list of at least one row, got {rows!r}")
    plain = [
        {name: cell.item() if isinstance(cell, np.generic) else cell for name, cell in row.items()} for row in rows
    ]
    for name, cell in (item for row in plain for item in row.items()):
        if not isinstance(name, str) or name == "error" or (name in point and point[name] != cell):
            raise ValueError(
                f"run: a column is named by a str, not error, and repeats no parameter; got {name}={cell!r}"
            )
        if not _is_json(cell) or isinstance(cell, list):
            raise ValueError(f"run: {name} must be a scalar (str, int, float, bool or None), got {cell!r}")
    result: Rows = json.loads(json.dumps(plain))  # exactly what a resumed run reads
    return result


def _table(outcomes: list[tuple[Point, Outcome]]) -> Rows:
    parameters = dict.fromkeys(name for point, _ in outcomes for name in point)
    table: Rows = []
    for point, outcome in outcomes:
        leading = {name: json.dumps(value) if isinstance(value, list) else value for name, value in point.items()}
        rows = outcome if isinstance(outcome, list) else [{"error": outcome["error"]}]
        table += [dict.fromkeys(parameters) | leading | row for row in rows]
    return table


def _csv(table: Rows) -> str:
    columns = sorted(dict.fromkeys(name for row in table for name in row), key="error".__eq__)  # the error comes last
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _measure(run: Run, point: Point, source: str) -> Outcome:
    try:
        if _source_hash(run) != source:
            raise RuntimeError(
                "this worker holds another version of rnnlab, of the study, of Python or of "
                f"{', '.join(NUMERICAL)}: update and restart it"
            )
        return _checked(run(json.loads(json.dumps(point))), point)
    except Exception as error:
        return _failure(error)


def _measure_in_dask(run: Run, point: Point, source: str) -> Outcome:
    if "NUMBA_NUM_THREADS" not in os.environ:  # Dask itself limits the threads of OpenMP and BLAS only
        kernels.set_threads(1)
    return _measure(run, point, source)


def _start_worker() -> None:
    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=end_with_parent, daemon=True).start()


def _threads(jobs: int) -> int:
    return max(1, kernels.threads() // jobs)


@contextlib.contextmanager
def _pool(options: Options, workers: int) -> Iterator[Callable[..., Future[Outcome]]]:
    assert options.jobs is not None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    # Workers start while points are submitted, and must find the limits before they import NumPy.
    with mock.patch.dict(os.environ, thread_environment(_threads(options.jobs))):
        try:
            yield lambda *task, identity: pool.submit(_measure, *task)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(options: Options) -> Iterator[Callable[..., Future[Outcome]]]:
    if not re.fullmatch(r"\w+://.+:\d+", options.scheduler or ""):  # Dask itself would try for a minute
        raise click.UsageError(f"--scheduler takes an address such as tcp://host:8786, got {options.scheduler!r}")
    try:
        distributed: Any = importlib.import_module("distributed")  # its annotations are too incomplete to check against
        client = distributed.Client(options.scheduler, set_as_default=False)
    except ImportError as error:
        raise click.UsageError('--scheduler needs the package distributed: pip install "rnnlab[cluster]"') from error
    except (OSError, ValueError) as error:
        raise click.UsageError(f"no Dask scheduler answers at {options.scheduler}: {error}") from error
    place = {"resources": {"GPU": 1}} if options.device == "cuda" else {}
    with client:
        executor = client.get_executor(retries=1, pure=False, **place)
        yield lambda *task, identity: executor.submit(_measure_in_dask, *task, key=identity)


def _outcomes(
    run: Run, points: dict[str, Point], source: str, options: Options
) -> Generator[tuple[str, Outcome], None, None]:
    """Yield each point's id and outcome as they arrive: from this process, a pool of processes or a Dask cluster.

    A process that dies takes its pool along: what is left is measured one by one, so that no point fails for another.
    """
    if options.jobs == 1 and not options.scheduler:
        for identity, point in points.items():
            yield identity, _measure(run, point, source)
        return
    if run.__module__ == "__main__":
        run = getattr(importlib.import_module(_module_name(run)), run.__name__)
    todo, workers = dict(points), options.jobs or 1
    while todo:
        died: BrokenProcessPool | None = None
        with _cluster(options) if options.scheduler else _pool(options, workers) as submit:
            futures = {submit(run, point, source, identity=identity): identity for identity, point in todo.items()}
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except BrokenProcessPool as error:
                    died = error
                    continue
                except Exception as error:  # a worker of a cluster died, or could not import the study
                    outcome = _failure(error)
                del todo[futures[future]]
                yield futures[future], outcome
        if died and workers == 1:  # which was at work on the first of those that are left
            identity = next(iter(todo))
            del todo[identity]
            yield identity, _failure(died)
        workers = 1
