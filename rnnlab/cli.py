"""The command line `rnnlab`: data on stdout, everything else on stderr."""

import json
import time

import click

__all__ = ["main"]


@click.group()
@click.version_option(package_name="rnnlab")
def main() -> None:
    """Show what happens to a gradient inside a recurrent network, and what the choice of cell costs."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(as_json: bool) -> None:
    """Print versions, CPU, vector width, threads, GPU and why it is not used."""
    from .study import provenance

    facts = provenance()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, version in facts.pop("packages").items():
        click.echo(f"{name:<18}  {version}")
    for name, value in facts.items():
        click.echo(f"{name:<18}  {'-' if value is None else value}")


@main.command()
@click.option("--dtype", "dtypes", multiple=True, help="float32 or float64, repeatable.  [default: both]")
@click.option("--cell", "cells", multiple=True, help="Name of a cell, repeatable.  [default: all]")
def warmup(dtypes: tuple[str, ...], cells: tuple[str, ...]) -> None:
    """Compile the kernels into Numba's on-disk cache and print the seconds of each cell."""
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
