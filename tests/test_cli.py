"""The command line `rnnlab`."""

import importlib.metadata
import json

import numpy as np
import pytest
from click.testing import CliRunner

from rnnlab.cells import CELLS
from rnnlab.cli import main
from rnnlab.kernels import cpu
from rnnlab.study import DTYPES, provenance


def test_info_prints_the_provenance():
    facts = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    assert facts == provenance()
    lines = dict(line.split(maxsplit=1) for line in CliRunner().invoke(main, ["info"]).stdout.splitlines())
    assert lines["numpy"] == np.__version__
    assert lines["vector_bytes"] == str(facts["vector_bytes"])
    assert lines["threads"] == str(facts["threads"])
    assert lines.keys() == facts["packages"].keys() | facts.keys() - {"packages"}


def test_info_explains_how_a_gpu_would_be_used():
    done = CliRunner().invoke(main, ["info", "--plan", "lstm,512,16,512,512", "--dtype", "bf16"])
    assert done.exit_code == 0
    assert "forward: tier A" in done.stdout
    assert "backward: tier A" in done.stdout
    for problem, dtype, told in (
        ("lstm,1,2,3", "bf16", "wanted CELL,T,B,I,H"),
        ("gru,1,1,1,1", "int8", "is not one of"),
    ):
        done = CliRunner().invoke(main, ["info", "--plan", problem, "--dtype", dtype])
        assert done.exit_code == 2
        assert told in done.stderr


def test_info_names_what_it_cannot_plan():
    for words, told in (
        (["--plan", "lstm,1,1,1,100000"], "no kernel of tier A or B or C fits lstm"),
        (["--plan", "lstm,1,1,1,8", "--json"], "--json and --plan exclude each other"),
    ):
        done = CliRunner().invoke(main, ["info", *words])
        assert done.exit_code == 2
        assert told in " ".join(done.stderr.split())


@pytest.fixture
def compiled(monkeypatch):
    """The calls of `cpu.warmup`, which compiles nothing here."""
    calls = []
    monkeypatch.setattr(cpu, "warmup", lambda cell, dtype: calls.append((cell, dtype)))
    return calls


def test_warmup_compiles_every_cell_for_both_types(compiled):
    result = CliRunner().invoke(main, ["warmup"])
    assert result.exit_code == 0
    assert compiled == [(cell, dtype) for cell in CELLS for dtype in DTYPES]
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [(cell, dtype) for cell, dtype, _ in rows] == compiled
    assert all(float(seconds) >= 0 for *_, seconds in rows)


def test_warmup_compiles_what_is_named(compiled):
    words = ["warmup", "--cell", "gru", "--cell", "lstm", "--dtype", "float64"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert compiled == [("gru", "float64"), ("lstm", "float64")]


@pytest.mark.parametrize(("option", "accepted"), [("--cell", "rnn_tanh"), ("--dtype", "float64")])
def test_warmup_names_what_it_accepts(compiled, option, accepted):
    result = CliRunner().invoke(main, ["warmup", option, "float8"])
    assert result.exit_code == 2
    assert "'float8' is not one of" in result.stderr
    assert accepted in result.stderr
    assert compiled == []


def test_version_is_that_of_the_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"rnnlab": "1.2.3"}.__getitem__)
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert "1.2.3" in result.stdout
