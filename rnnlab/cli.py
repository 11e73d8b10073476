"""The command line `rnnlab`: data on stdout, everything else on stderr."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

__all__ = ["main"]


@click.group()
@click.version_option(package_name="rnnlab")
def main() -> None:
    """Show what happens to a gradient inside a recurrent network, and what the choice of cell costs."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--plan", "problem", metavar="CELL,T,B,I,H", help="How a GPU would be used, e.g. lstm,512,16,512,512.")
@click.option("--dtype", default="float32", show_default=True, help="Arithmetic of --plan, or tf32, bf16, fp16.")
def info(as_json: bool, problem: str | None, dtype: str) -> None:
    """Print versions, CPU, vector width, threads, GPU and why it is not used; or with --plan how it would be used."""
    if as_json and problem is not None:
        raise click.UsageError("--json and --plan exclude each other: a plan is a text")
    if problem is not None:
        _print_plans(problem, dtype)
        return
    from .study import provenance

    facts = provenance()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, version in facts.pop("packages").items():
        click.echo(f"{name:<18}  {version}")
    for name, value in facts.items():
        click.echo(f"{name:<18}  {'-' if value is None else value}")


def _print_plans(problem: str, dtype: str) -> None:
    """Print the layouts of the kernels of one layer for an H200, or for the GPU of this machine."""
    from .cells import CELLS
    from .kernels import available, backend
    from .kernels.plan import ARITHMETIC, H200, explain, plan

    cell, *numbers = problem.split(",")
    if cell not in CELLS or len(numbers) != 4 or not all(number.isdigit() and int(number) for number in numbers):
        raise click.BadParameter(f"wanted CELL,T,B,I,H, got {problem!r}", param_hint="--plan")
    if dtype not in ARITHMETIC:
        raise click.BadParameter(f"{dtype!r} is not one of {', '.join(ARITHMETIC)}", param_hint="--dtype")
    chip = H200 if available("cuda") else backend("cuda").chip()
    click.echo(f"compute capability {chip.capability[0]}.{chip.capability[1]}, {chip.processors} multiprocessors")
    for backward in (False, True):
        try:
            made = plan(cell, dtype, int(numbers[1]), int(numbers[3]), backward, chip)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        click.echo(explain(made, chip))


@main.command()
@click.option("--dtype", "dtypes", multiple=True, help="float32 or float64, repeatable.  [default: both]")
@click.option("--cell", "cells", multiple=True, help="Name of a cell, repeatable.  [default: all]")
def warmup(dtypes: tuple[str, ...], cells: tuple[str, ...]) -> None:
    """Compile the sequence kernels into Numba's on-disk cache and print the seconds of each cell."""
    from .cells import CELLS
    from .kernels import cpu
    from .study import DTYPES

    for option, values, accepted in (("--dtype", dtypes, DTYPES), ("--cell", cells, tuple(CELLS))):
        if unknown := [value for value in values if value not in accepted]:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(accepted)}", param_hint=option)
    for cell in cells or CELLS:
        for dtype in dtypes or DTYPES:
            start = time.perf_counter()
            cpu.warmup(cell, dtype)
            click.echo(f"{cell}\t{dtype}\t{time.perf_counter() - start:.2f}")


def _names(module: str, accepted: str) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return the callback of an option that takes names of `rnnlab.module.accepted`, separated by commas."""

    def split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(value.split(",")))
        known = tuple(getattr(importlib.import_module(f"rnnlab.{module}"), accepted))
        if unknown := [name for name in names if name not in known]:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return split


def _print_json(frame: Any, **more: Any) -> None:
    """Print one JSON object: the rows of a table, `more` and the environment; what is not a number is null."""
    from .study import provenance

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{name: plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
    more = {name: plain(value) for name, value in more.items()}
    click.echo(json.dumps({"rows": rows, **more, "environment": provenance()}, allow_nan=False))


_FILE = click.Path(path_type=Path, dir_okay=False)


@main.command()
@click.option("--cells", default="rnn_tanh,lstm,gru", show_default=True, callback=_names("cells", "CELLS"))
@click.option("--shapes", multiple=True, default=["small"], show_default=True, help="Set or T,B,I,H; repeatable.")
@click.option("--devices", default="cpu", show_default=True, callback=_names("kernels", "DEVICES"))
@click.option("--dtypes", default="float32", show_default=True, callback=_names("peers", "DTYPES"))
@click.option("--peers", default="torch,jax,onnxruntime", show_default=True, callback=_names("peers", "PEERS"))
@click.option("--scope", type=click.Choice(["forward", "training", "step"]), default="training", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="For every implementation.  [default: all cores]")
@click.option("--seconds", type=click.FloatRange(min=0), default=4.0, show_default=True, help="Time of a problem.")
@click.option("--csv", "csv_file", type=_FILE, help="Write the tidy table, and its manifest beside it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
@click.option("--plot", type=_FILE, help="Draw the ratios and the roofline.")
@click.option("--check", is_flag=True, help="Exit 1 when a ratio to the fastest peer is below --at-least.")
@click.option("--at-least", type=float, default=1.0, show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bar on a terminal.")
def compare(
    cells: tuple[str, ...],
    shapes: tuple[str, ...],
    devices: tuple[str, ...],
    dtypes: tuple[str, ...],
    peers: tuple[str, ...],
    scope: str,
    threads: int | None,
    seconds: float,
    csv_file: Path | None,
    as_json: bool,
    plot: Path | None,
    check: bool,
    at_least: float,
    no_progress: bool,
) -> None:
    """Time rnnlab and its peers on the same problems, interleaved in one process. A ratio above 1 is our lead.

    SHAPES are reference (= small, medium and large), deepbench, or T,B,I,H. Each implementation is checked against
    float64 before it is timed. Exit 1: below --at-least, or wrong; 2: usage; 3: a device is not there.
    """
    import pandas as pd
    from tqdm import tqdm

    from . import compare as comparison
    from .kernels import DeviceNotAvailable
    from .study import provenance
    from .timing import pin, thread_environment, usable_cores

    threads = threads or usable_cores()
    if threads > usable_cores():
        raise click.BadParameter(f"this process may use {usable_cores()} cores, got {threads}", param_hint="--threads")
    try:
        todo = comparison.problems(cells, shapes, devices, dtypes, scope)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for option, file in (("--csv", csv_file), ("--plot", plot)):
        if file is not None and not os.access(file.parent, os.W_OK):
            raise click.BadParameter(f"cannot write in {file.parent}", param_hint=option)
    if not pin(threads):
        # Libraries count their threads when they are imported, and some already are: start again in a new process.
        command = [sys.executable, "-m", "rnnlab.cli", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | thread_environment(threads)).returncode)
    try:
        bar = partial(tqdm, desc="compare", disable=no_progress or None)
        keep = None if csv_file is None else partial(pd.DataFrame.to_csv, path_or_buf=csv_file, index=False)
        frame = comparison.compare(todo, peers, seconds=seconds, progress=bar, keep=keep)
    except DeviceNotAvailable as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(3)
    worst = comparison.worst_ratio(frame)
    if as_json:
        _print_json(frame, worst_ratio=worst)
    else:
        click.echo(comparison.table(frame))
    if csv_file:
        csv_file.with_suffix(".manifest.json").write_text(json.dumps(provenance(), indent=2) + "\n")
    if plot:
        comparison.draw(frame).savefig(plot, bbox_inches="tight", dpi=150)
    if (check and not worst >= at_least) or (frame["status"] == "wrong").any():
        click.echo(f"Error: worst ratio {worst:.3g}, wanted {at_least:.3g}; see the column status", err=True)
        sys.exit(1)


@main.command()
@click.option("--task-like", "topology", default="many_to_one", show_default=True, help="As of rnnlab.SequenceModel.")
@click.option("--length", type=click.IntRange(min=1), required=True, help="Steps of a sequence.")
@click.option("--inputs", "input_size", type=click.IntRange(min=1), required=True, help="Numbers in at each step.")
@click.option(
    "--outputs", "output_size", type=click.IntRange(min=1), default=1, help="Numbers or classes.  [default: 1]"
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--layers", "num_layers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--budget-ms", type=click.FloatRange(min=0, min_open=True), help="Time that a batch may take.")
@click.option("--params", type=click.IntRange(min=1), help="Parameters that the model may have.")
@click.option("--scope", type=click.Choice(["forward", "training"]), default="forward", show_default=True)
@click.option("--cells", default="rnn_tanh,lstm,gru", show_default=True, callback=_names("cells", "CELLS"))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def choose(budget_ms: float | None, params: int | None, cells: tuple[str, ...], as_json: bool, **job: Any) -> None:
    """Rank cells and their sizes for a kind of task and a budget: --budget-ms or --params.

    Parameters and memory are counted, times measured on this machine for a batch of sequences: its prediction, or in
    scope training its loss and gradients. Exit 2: usage, or a budget that is too small; 3: the device is not there.
    """
    from . import choose as choosing
    from .kernels import DeviceNotAvailable

    try:
        wanted = choosing.Job(**job)
        seconds = None if budget_ms is None else 1e-3 * budget_ms
        frame = choosing.choose(wanted, cells, most_parameters=params, most_seconds=seconds)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except DeviceNotAvailable as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(3)
    if as_json:
        _print_json(frame)
    else:
        click.echo(choosing.words(wanted, frame))


if __name__ == "__main__":
    main()
