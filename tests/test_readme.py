"""The README's examples run as they stand."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_examples_run(capsys):
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, namespace)
    said = capsys.readouterr().out
    assert "rate=-" in said
    # Found 0.136 and 0.158, 96 % and 7 %, 2.2 and 5.0 bits. The bounds lie about half of the way to the baseline, and
    # for the digits, where half is easy, nearer.
    error, today = map(float, re.search(r"squared error (\S+), as today (\S+)", said).groups())
    assert error < 0.95 * today
    right, chance = map(float, re.search(r"(\S+)% right, chance (\S+)%", said).groups())
    assert right > 85 > 15 > chance
    bits, unigram = map(float, re.search(r"(\S+) bits a character, unigram (\S+)", said).groups())
    assert bits < 0.6 * unigram
    assert namespace["text"].startswith("The ")
    assert len(namespace["text"]) == 301
    assert isinstance(namespace["frame"], pd.DataFrame)
    gradient = namespace["grads"].params["weight_hh_l0"]
    assert gradient.shape == (4 * 64, 64)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert all((Path(__file__).parents[1] / link).stat().st_size > 0 for link in links)
