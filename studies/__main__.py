"""Run studies one after the other: `python -m studies [NAMES]...`, all of them when none is named."""

import importlib
import json
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import studies
from rnnlab.study import Options, Study, flags


def find() -> list[str]:
    """Return the names of the modules in the package `studies`, each of which holds a `study`."""
    return sorted(module.name for module in pkgutil.iter_modules(studies.__path__) if not module.name.startswith("_"))


def load(name: str) -> Study:
    """Import a study by its module's name."""
    study: Study = importlib.import_module(f"studies.{name}").study
    return study


@click.command()
@click.argument("names", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="Print each study's name and question, and run nothing.")
@flags
def main(names: tuple[str, ...], listing: bool, **values: Any) -> None:
    """Run the studies NAMES, or all of them; --out is the folder that holds one folder a study."""
    known = find()
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known) or 'none yet'}", param_hint="NAMES")
    chosen = [load(name) for name in names or known]
    if listing:
        click.echo("\n".join(f"{study.name}  {study.headline}" for study in chosen), nl=bool(chosen))
        return
    options = Options(**values)
    if others := [study.name for study in chosen if options.device not in study.devices]:
        if names:
            raise click.UsageError(f"not on {options.device}: {', '.join(others)}")
        click.echo(f"left out, as they do not run on {options.device}: {', '.join(others)}", err=True)
        chosen = [study for study in chosen if study.name not in others]
    parent = options.out or Path("results")
    summaries = {study.name: study.launch(replace(options, out=parent / study.name)) for study in chosen}
    if options.json:
        click.echo(json.dumps(summaries))
    sys.exit(1 if any(summary["failed"] for summary in summaries.values()) else 0)


if __name__ == "__main__":
    main()
