"""`difffract evaluate`: which names stand for what, and what cannot be measured or compared."""

import json

import numpy as np
import pytest
from commands import run_command

from difffract_jax.config import provenance
from difffract_jax.loading import save_transcoders
from difffract_jax.models.tiny import TINY
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import ROWS, SiteSet
from difffract_jax.transcoders.transcoder import TranscoderSet, random_transcoders


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Runs `difffract evaluate ARGUMENTS` in a directory with a set of a model's, `sites`, and one of rows, `rows`."""
    monkeypatch.chdir(tmp_path)
    tcs = random_transcoders(TINY, features=8, sites={"img": (0,)})
    save_transcoders(tcs, "sites")
    save_transcoders(TranscoderSet({"rows": tcs.stacks["img"]}, SiteSet(((ROWS, (0,)),)), tcs.config, ""), "rows")
    return lambda *arguments: run_command(monkeypatch, capsys, "evaluate", *arguments)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("sites", "sites", "sites"), "Of three names the first must be a model, but sites is not one; give MODEL A B"),
        (("tiny", "sites", "sites", "sites"), "but 4 names were given"),
        (("sites", "rows"), "rows belongs to rows and sites to a model's sites; they cannot be compared"),
        (("sites", "sites"), "do not say what they were trained on; name the model to measure on: difffract evaluate"),
        (("sites",), "do not say what they were trained on"),
        (("tiny", "sites", "sites"), "There are no prompts to run tiny on; give --prompts FILE"),
        (("rows",), "rows was trained on rows from Python; give some to measure on with --rows DIR"),
        (("rows", "--rows", "nowhere"), "nowhere is not a directory of rows"),
        (("sites", "nowhere"), "nowhere holds neither a training run nor transcoders"),
        (("organism", "sites"), "The transcoders are 32 wide, but the model is 64 wide"),
        (("rows", "--pareto", "sites"), "rows belongs to rows and sites to a model's sites; they cannot be compared"),
        (("rows", "--rows", "nowhere", "--prompts", "x"), "rows belongs to rows, which have no prompts"),
        (("rows", "--rows", "nowhere", "--weights", "disk"), "rows belongs to rows, for which no model is loaded"),
        (("tiny", "sites", "--rows", "rows"), "sites belongs to a model's sites and is measured on prompts"),
        (("sites", "--k", "2", "--pareto", "x.yaml", "--out", "y"), "so that sites has no place; leave it out"),
        (("tiny", "sites", "--out", "."), ". exists already and is not a report of difffract evaluate; name another"),
        (("sites", "sites", "--pareto", "sites"), "Compare two sets of transcoders, or draw several with --pareto"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(evaluate, names, said):
    status, out, err = evaluate(*names)
    assert (status, out) == (1, "") and said in err and err.count("\n") == 1


def test_transcoders_of_rows_are_compared_on_rows_that_are_named(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    for what in "xy":
        np.save(tmp_path / "new" / f"{what}.npy", rng.standard_normal((50, 32)).astype(np.float16))
    result = json.loads(evaluate("rows", "rows", "--rows", "new", "--json").out)
    (row,) = result["sites"]
    assert row["fvu"]["a"] == row["fvu"]["b"] > 0.5 and row["l0"]["difference"] == 0
    assert (result["A"], result["B"], result["rows"]) == ("rows", "rows", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "rows", "sites"], "no report unless asked for"


def test_two_trainings_on_rows_are_compared_on_those_that_neither_saw(evaluate, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    for what in "xy":
        np.save(tmp_path / "new" / f"{what}.npy", rng.standard_normal((50, 32)).astype(np.float16))
    stack = random_transcoders(TINY, features=8, sites={"img": (0,)}).stacks["img"]
    tcs = TranscoderSet({"rows": stack}, SiteSet(((ROWS, (0,)),)), stack.config, "")
    for name, share in (("a", 0.5), ("b", 0.1)):
        trained = TrainConfig(rows=tmp_path / "new", validation_share=share)
        save_transcoders(tcs, name, provenance=provenance("train", trained))
    one, other = (json.loads(evaluate(*names, "--json").out)["sites"][0]["fvu"] for names in ("ab", "ba"))
    assert one["a"] == other["a"] == json.loads(evaluate("b", "--json").out)["fvu"]
    assert evaluate("rows", "b").status == 0, "the one that names its rows says where, whichever stands first"
