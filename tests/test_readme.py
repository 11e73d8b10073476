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
    assert "rate=-" in capsys.readouterr().out
    assert isinstance(namespace["frame"], pd.DataFrame)
    gradient = namespace["grads"].params["weight_hh_l0"]
    assert gradient.shape == (4 * 64, 64)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert all((Path(__file__).parents[1] / link).exists() for link in links)
