"""The notebooks of `examples/`: one per study and two more; they have been run, and they still run, made small.

A study's notebook takes the steps one by one, and ends in what the study itself ends in.
"""

import json
import re

import pytest
from notebooks import HOME, code_cells, run, sources

from difffract_jax.studies import binding, errors, flow, precision, repair
from difffract_jax.studies.registry import STUDIES, Given
from difffract_jax.studies.results import Result, quiet
from difffract_jax.studies.settings import QUESTIONS

OTHERS = ("walkthrough", "train-your-own")
REPAIRS = ((repair, "COUNTS", (8,)), (repair, "STRENGTHS", (1.0, 2.0)))
SMALLER = {
    "binding": ((binding, "COUNTS", (8,)), (binding, "STRENGTHS", (1.0, 1.5))),
    "colour-prior": REPAIRS,
    "errors": (*REPAIRS, (errors, "UNTIL", (0, 1)), (errors, "BATCH", 500)),
    "flow": ((flow, "NODES", 100),),
    "precision": ((precision, "ROUNDS", {2: precision.ROUNDS[2]._replace(counts=(8, 32), strengths=(1.0, 1.5))}),),
}
"""What of a study's settings is made smaller beside its size, in the notebook and in the study alike."""
CALLED = re.compile(r"\b(?:{})\(pipe, tcs".format("|".join(name.replace("-", "_") for name in QUESTIONS)))


def test_every_study_has_a_notebook():
    assert {path.stem for path in HOME.glob("*.ipynb")} == {*QUESTIONS, *OTHERS}


@pytest.mark.parametrize("name", [*QUESTIONS, *OTHERS])
def test_a_notebook_has_been_run_from_top_to_bottom(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"site-packages|/home/|/tmp/", json.dumps(cells))


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_study_s_notebook_shows_its_steps(name):
    cells = sources(name)
    assert not CALLED.search("\n".join(cells)), "the study is called as a whole"
    assert len(cells) >= 7 and re.search(r"circuits\.total_effects|dfx\.attribute", "".join(cells))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_study_s_notebook_runs_and_ends_in_what_the_study_ends_in(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module, setting, value in SMALLER.get(name, ()):
        monkeypatch.setattr(module, setting, value)
    few = [re.sub(r"^SIZE = \d+", "SIZE = 2", source, flags=re.MULTILINE) for source in sources(name)]
    assert few != sources(name)
    names, _ = run(name, few)
    result = names["result"]
    assert isinstance(result, Result) and result.name == name and result.verdict in result._repr_markdown_()
    assert all(min(result.picture(figure).size) > 100 for figure in result.figures)
    given = {part: names.get(part) for part in ("pipe", "tcs", "saes", "labels")}
    whole = STUDIES[name](Given(**given, size=2, round=2 if name == "precision" else None, prompts=None), quiet)
    assert result.verdict == whole.verdict and json.dumps(result.raw) == json.dumps(whole.raw)
