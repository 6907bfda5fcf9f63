"""What the documentation shows runs: the README's example, and every example in a docstring."""

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from difffract_jax.graphs.graph import Graph
from tolerances import TOL

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("difffract_jax", "converters") for path in sorted((ROOT / package).rglob("*.py"))]
SHOWING = [str(path.relative_to(ROOT)) for path in SOURCES if ">>> " in path.read_text()]


def test_the_readme_s_example_makes_a_circuit_that_adds_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    graph = Graph.load("circuit.npz")
    assert graph.largest_conservation_error <= TOL.conservation_f32
    # Circuit-tracer's rule, the default, keeps a handful.
    assert np.isfinite(graph.node_influence).all() and graph.target_node.size > 2


@pytest.mark.parametrize("name", SHOWING)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0
