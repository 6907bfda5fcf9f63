"""The notebooks of `examples/`: there is one per study, it has been run, and it still runs, on the fewest cases."""

import json
import re
from pathlib import Path

import pytest

from difffract_jax.studies.results import Result
from difffract_jax.studies.settings import QUESTIONS

HOME = Path(__file__).parents[1] / "examples"


def code_cells(name):
    cells = json.loads((HOME / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_every_study_has_a_notebook():
    assert {path.stem for path in HOME.glob("*.ipynb")} == set(QUESTIONS)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_notebook_has_been_run_from_top_to_bottom(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"site-packages|/home/|/tmp/", json.dumps(cells))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_notebook_runs(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in code_cells(name)]
    few = [re.sub(r"^SIZE = \d+", "SIZE = 2", source, flags=re.MULTILINE) for source in sources]
    assert few != sources
    names = {}
    for number, source in enumerate(few, 1):
        exec(compile(source, f"{name}.ipynb, cell {number}", "exec"), names)
    result = names["result"]
    assert isinstance(result, Result) and result.name == name and result.verdict in result._repr_markdown_()
    assert all(min(result.picture(figure).size) > 100 for figure in result.figures)
