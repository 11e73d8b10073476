"""`python -m benchmarks --tidy FILE`: all stored asv results as one table, variants of a commit side by side."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import click
import pandas as pd

ROOT = Path(__file__).parents[1]


def tidy(folder: Path) -> pd.DataFrame:
    """Return one row a stored number: machine, commit, date, benchmark, unit, each parameter, value.

    Raises ValueError for a folder without results.
    """
    benchmarks = json.loads((folder / "benchmarks.json").read_text()) if (folder / "benchmarks.json").exists() else {}
    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*/*.json")):
        if file.name == "machine.json":
            continue
        stored = json.loads(file.read_text())
        for name, values in stored["results"].items():
            record = dict(zip(stored["result_columns"], values, strict=False))
            described = benchmarks.get(name, {})
            names = described.get("param_names") or [f"param{k}" for k in range(len(record["params"]))]
            combinations = itertools.product(*record["params"])
            for combination, value in zip(combinations, record["result"] or [], strict=False):
                named = dict(zip(names, (text.strip("'") for text in combination), strict=False))
                rows.append(
                    {
                        "machine": stored["params"]["machine"],
                        "commit": stored["commit_hash"],
                        "date": pd.Timestamp(stored["date"], unit="ms"),
                        "benchmark": name,
                        "unit": described.get("unit"),
                        **named,
                        "value": value,
                    }
                )
    if not rows:
        raise ValueError(f"folder must hold asv results (MACHINE/COMMIT-….json), found none in {folder}")
    frame = pd.DataFrame(rows)
    return frame[[*(name for name in frame.columns if name != "value"), "value"]]


@click.command()
@click.option("--tidy", "target", required=True, help="CSV file to write; - is stdout.")
@click.option("--results", default=ROOT / "benchmarks" / "results" / "asv", type=click.Path(path_type=Path))
def main(target: str, results: Path) -> None:
    """Write all stored asv results as one tidy CSV."""
    try:
        frame = tidy(results)
    except ValueError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    frame.to_csv(sys.stdout if target == "-" else target, index=False)


if __name__ == "__main__":
    main()
