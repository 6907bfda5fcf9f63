"""`difffract harvest`, `train` and `evaluate` from end to end on the small random pipeline, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from difffract_jax.cli.models import with_origin
from difffract_jax.loading import load_transcoders
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sweep import parse_ks, sweep_settings

ROOT = Path(__file__).parents[2]
SMALL = ("steps=6", "batch=32", "buffer_rows=128", "tokens_per_step=8", "steps_per_image=2", "height=16", "width=24")
SMALL += ("checkpoint_every=3", "log_every=2", "k=4", "expansion=2", "time_embed=8", "prompts_at_once=2")


@pytest.fixture
def difffract(monkeypatch, capsys):
    """Runs `difffract COMMAND configs/smoke.yaml --set ...` in the repository's folder; returns status, out, err."""

    def run(*arguments, sets=()):
        given = [str(a) for a in arguments] + [part for each in sets for part in ("--set", each)]
        monkeypatch.chdir(ROOT)
        return run_command(monkeypatch, capsys, *given)

    return run


FEW = ("--prompts-count", 2, "--velocity-count", 2, "--json")


def harvested(difffract, rows):
    """Writes rows of a few prompts."""
    more = (f"out={rows}", "train_prompts=16", "validation_prompts=2")
    small = [each for each in SMALL if each.split("=")[0] in ("tokens_per_step", "steps_per_image", "height", "width")]
    status, out, _ = difffract("harvest", "configs/smoke.yaml", "--json", sets=(*small, "prompts_at_once=2", *more))
    assert status == 0 and json.loads(out)["sites"] == 8


def trained(difffract, run, *source):
    """Trains from the model, or from the rows in `source`."""
    status, out, err = difffract("train", "configs/smoke.yaml", "--json", sets=(*SMALL, f"out={run}", *source))
    assert status == 0, err
    assert json.loads(out)["step"] == 6
    tcs = load_transcoders(run / "transcoders")
    assert (*map(tcs.sites.groups.get, ("img", "joint")), tcs.config.activation) == ((0, 1, 2), (0, 1), "jumprelu")
    assert json.loads((run / "transcoders" / "config.json").read_text())["provenance"]["command"] == "train"


def evaluated(difffract, run):
    """Evaluates a run, and returns the result."""
    status, out, err = difffract("evaluate", run, *FEW, "--images", 1)
    assert status == 0, err
    alone = json.loads(out)
    assert np.isfinite(alone["fvu"]) and "By site" in (run / "report" / "report.md").read_text()
    return alone


def test_rows_training_and_report_from_end_to_end(difffract, tmp_path):
    rows, run = tmp_path / "rows", tmp_path / "run"
    harvested(difffract, rows)
    known = with_origin(TrainConfig(rows=rows, seed=3))
    assert (known.model, known.prompts, known.validation_share, known.seed) == ("tiny", "configs/prompts.txt", 0.2, 3)
    trained(difffract, run, f"rows={rows}")
    evaluated(difffract, run)


@pytest.mark.slow
def test_a_run_from_the_model_is_compared_with_one_from_rows(difffract, tmp_path):
    run, other = tmp_path / "run", tmp_path / "stored" / "transcoders"
    trained(difffract, run)
    harvested(difffract, tmp_path / "rows")
    trained(difffract, tmp_path / "stored", f"rows={tmp_path / 'rows'}")
    alone = evaluated(difffract, run)
    status, out, err = difffract("evaluate", "tiny", run, other, "--out", tmp_path / "both", *FEW)
    assert status == 0, err
    *sites, mean = json.loads(out)["sites"]
    assert len(sites) == 8 and mean["site"] == "mean" and mean["fvu"]["a"] == pytest.approx(alone["fvu"])
    assert all(row["recovered"]["difference"] == row["recovered"]["b"] - row["recovered"]["a"] for row in sites)
    assert (tmp_path / "both" / "report.md").is_file() and not (tmp_path / "stored" / "report").exists()


@pytest.mark.parametrize(
    ("command", "sets", "told"),
    [
        ("train", ("activation=gelu",), "`activation` was 'gelu', but input should be 'relu', 'topk'"),
        ("train", ("sites=[img/9]",), "The site img/9 does not exist: the model has img/0 to img/2 and txt/0 to txt/2"),
        ("train", ("prompts=no.txt",), "no.txt is not a file of prompts"),
        ("train", ("prompts=world",), "prompts: world needs a model with a world of its own"),
        ("train", ("mesh=data=3",), "data=3, but batch, 32, is not divisible by it"),
        ("train", ("activation=jumprelu", "target_l0=65"), "target_l0 must be at most 64"),
        ("train", ("batch=256",), "buffer_rows must be at least batch, 256"),
        ("train", ("rows=nothing",), "holds no config.json"),
        ("train", ("prompts=pyproject.parquet",), "pyproject.parquet is not a file of prompts"),
        ("train", ("out=ftp://bucket/run",), "gs:// or s3://, but got ftp://"),
        ("train", ("out=/sys/run",), "/sys/run: "),
        ("train", ("step=3",), "`step` is not a setting; did you mean `steps`?"),
        ("train", ("out=pyproject.toml/run",), "Not a directory"),
        ("harvest", ("out=pyproject.toml/rows",), "pyproject.toml: File exists."),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(difffract, tmp_path, command, sets, told):
    out = tmp_path / "run"
    common = SMALL if command == "train" else SMALL[3:7]
    status, printed, err = difffract(command, "configs/smoke.yaml", sets=(*common, f"out={out}", *sets))
    assert (status, printed) == (1, "")
    # A progress bar that was up leaves an empty line.
    assert told in err and err.strip().startswith("Error: ") and "\n" not in err.strip()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--k", "2,x"), "`--k 2,x` names no numbers of active features"),
        (("--k", "0"), "`--k 0` names no numbers of active features"),
        (("--k", "2", "--set", "activation=relu"), "relu's sparsity follows from l1"),
        (("--k", "2", "--set", "kk=1"), "`kk` is not a setting; did you mean `k`?"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(difffract, tmp_path, arguments, told):
    status, out, err = difffract(
        "evaluate", "--pareto", "configs/smoke.yaml", "--out", tmp_path / "sweep", "--prompts-count", 2, *arguments
    )
    assert (status, out) == (1, "") and told in err and "\n" not in err.strip()
    assert not list(tmp_path.iterdir())
    status, _, err = difffract("evaluate", "--k", "2", "--out", tmp_path / "sweep")
    assert status == 2 and "--k needs one `--pareto CONFIG`" in " ".join(err.split())


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing_and_draws_both_roles(difffract, tmp_path):
    out, small = tmp_path / "sweep", [*(each for each in SMALL if each != "k=4"), "sites=[img/0]"]
    there = out / "transcoder-2"
    status, _, err = difffract("train", "configs/smoke.yaml", sets=(*small, "k=2", f"out={there}"))
    assert status == 0, err
    before = (there / "train.json").stat().st_mtime_ns, (there / "transcoders" / "config.json").stat().st_mtime_ns
    few = ("--prompts-count", 2, "--velocity-count", 2, "--images", 0, "--json")
    given = ("evaluate", "--pareto", "configs/smoke.yaml", "--k", "2", "--out", out, *few)
    status, printed, err = difffract(*given, sets=small)
    assert status == 0, err
    assert {(row["set"], row["role"]) for row in json.loads(printed)["points"]} == {
        (str(there), "transcoder"),
        (str(out / "sae-2"), "sae"),
    }
    found = json.loads((out / "report" / "evaluation.json").read_text())["points"]
    assert found == json.loads(printed)["points"] and all(np.isfinite(row["least velocity recovered"]) for row in found)
    report = (out / "report" / "report.md").read_text()
    assert (
        out / "report" / "pareto.png"
    ).exists() and "| role | fvu | l0 | dead | least velocity recovered |" in report
    after = (there / "train.json").stat().st_mtime_ns, (there / "transcoders" / "config.json").stat().st_mtime_ns
    assert after == before, "the run that was there is not trained again"
    status, _, err = difffract(*given, sets=(*small, "lr=1"))
    assert status == 1 and "begun with other settings (lr: 0.002 -> 1.0)" in err


def test_a_sweep_has_both_roles_at_every_sparsity(tmp_path):
    base = TrainConfig(model="m", prompts="p", out=tmp_path, activation="jumprelu")
    runs = sweep_settings(base, parse_ks("8, 2,8"))
    assert [(run.out.name, run.role, run.target_l0) for run in runs] == [
        ("transcoder-2", "transcoder", 2.0),
        ("sae-2", "sae", 2.0),
        ("transcoder-8", "transcoder", 8.0),
        ("sae-8", "sae", 8.0),
    ]


def test_processes_that_cannot_be_joined_are_told(difffract, tmp_path):
    for text in ("somewhere", "host:1,2", "host:1,2,2", "host,0,2"):
        status, _, err = difffract("train", "configs/smoke.yaml", "--join", text, sets=(f"out={tmp_path / 'run'}",))
        assert status == 1 and f"`--join {text}` names no processes; write auto, or HOST:PORT,NUMBER,PROCESSES" in err
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_none_or_unfinished_is_not_evaluated(difffract, tmp_path):
    assert "holds neither a training run nor transcoders" in difffract("evaluate", tmp_path)[2]
    (tmp_path / "train.json").write_text("{}")
    assert "has not finished; go on with difffract train --resume" in difffract("evaluate", tmp_path)[2]
