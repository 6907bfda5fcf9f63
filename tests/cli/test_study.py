"""`difffract study`: refusals in one sentence, and a small study from the command line to its files."""

import json
from pathlib import Path

import pytest
from commands import done, run_command, run_json
from page_folders import make_folder

from difffract_jax.loading import load_labels
from difffract_jax.studies import repair
from difffract_jax.studies.registry import STUDIES
from difffract_jax.studies.results import Result
from difffract_jax.studies.settings import QUESTIONS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["precison"], "There is no study `precison`; did you mean `precision`?"),
        (["binding", "--out", "FILE"], "is a file, but the results go to a directory"),
        (["binding", "--out", "none/there"], "does not exist; create it first"),
        (["binding", "--size", "1"], "size"),
        (["binding", "--round", "1"], "Only `precision`, and `binding` with --attention explained, were run in rounds"),
        (
            ["binding", "--attention", "explained", "--round", "3"],
            "`binding` was run in 2 rounds; give a --round of 1 to",
        ),
        (["flow", "--attention", "explained"], "Only `binding` explains attention; leave out --attention for `flow`."),
        (["binding", "--prompts", "FILE"], "only `flow` takes --prompts"),
        (["flow", "--model", "organism-sd4"], "nothing embedded has that name; did you mean `organism-sd3`?"),
        (["flow", "--model", "elsewhere"], "only `flow` runs on other pipelines, with --prompts"),
    ],
)
def test_bad_requests_get_one_sentence(monkeypatch, capsys, tmp_path, arguments, sentence):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    run = run_command(monkeypatch, capsys, "study", *arguments)
    assert run.status == 1 and sentence in run.err and run.err.count("\n") == 1


def test_help_tells_every_question(monkeypatch, capsys):
    text = " ".join(run_command(monkeypatch, capsys, "study", "--help").out.split())
    assert all(name in text for name in QUESTIONS)


def test_the_pages_of_features_that_a_study_names_are_listed(monkeypatch, capsys, tmp_path):
    tables = {"Most frequent": [{"feature": f"img/0/f{number}", "cases": 1} for number in range(40)]}
    result = Result("flow", "It hangs on img/1/f7.", tables, {}, {})
    monkeypatch.setitem(STUDIES, "flow", lambda given, advance: result)
    monkeypatch.chdir(tmp_path)  # a short address is not wrapped
    make_folder(Path("pages"), load_labels("organism").transcoders, {"img/0": range(30), "img/1": [7]})
    arguments = ("study", "flow", "--out", "s", "--pages", "pages")
    told = run_command(monkeypatch, capsys, *arguments).out
    assert "pages/index.html#img/1/f7" in told and "11; --json lists all" in told
    found = done(run_json(monkeypatch, capsys, *arguments))
    assert [row["feature"] for row in found["pages"]] == ["img/1/f7", *(f"img/0/f{number}" for number in range(30))]
    raw = json.loads(Path("s/flow.json").read_text())
    assert raw["settings"]["out"] == "s" and raw["sources"]["transcoders"] and raw["verdict"] == result.verdict
    assert result.verdict in Path("s/flow.md").read_text()


@pytest.mark.slow
def test_a_study_writes_report_figures_and_every_case(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(repair, "COUNTS", (8,))
    monkeypatch.setattr(repair, "STRENGTHS", (1.0,))
    found = done(run_json(monkeypatch, capsys, "study", "colour-prior", "--size", 2, "--out", tmp_path / "s"))
    assert "Of 2 failures repaired" in found["verdict"]
    ways = {row["way"]: row for row in found["tables"]["Repaired, test"]}
    assert set(ways) == {"image", "text", "both", "random"}
    # Random edits are scaled to the size of those they stand beside; what an edit does later steps answer to.
    assert ways["random"]["norm"] == pytest.approx(ways["both"]["norm"], rel=0.3)
    raw = json.loads((tmp_path / "s" / "colour-prior.json").read_text())
    assert len(raw["cases"]) == 2 and raw["settings"]["size"] == 2 and raw["sources"]["transcoders"]
    report = (tmp_path / "s" / "colour-prior.md").read_text()
    assert found["verdict"] in report and "![colour-prior](colour-prior.png)" in report
    assert all(
        (tmp_path / "s" / f"{name}.png").stat().st_size > 5_000 for name in ("colour-prior", "colour-prior-images")
    )
