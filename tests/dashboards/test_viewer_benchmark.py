"""The benchmark of the viewer measures what it says, on a small circuit."""

import importlib.util
from pathlib import Path

import pytest

from shown_circuits import large

pytestmark = pytest.mark.browser


def test_it_measures_every_bar():
    path = Path(__file__).parents[2] / "benchmarks" / "viewer.py"
    spec = importlib.util.spec_from_file_location("viewer_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = module.measured(large(60, 300), 1)
    assert (row["nodes"], row["edges"]) == (60, 300) and 0.05 < row["file, MB"] < 0.5
    assert all(row[name] > 0 for name in module.BARS)
    assert row["full frame after rest, ms"] >= row["drawing the full frame, ms"]
