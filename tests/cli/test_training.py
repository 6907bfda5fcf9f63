"""`difffract train` in one line: what is chosen and shown, how it stops early and exports, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import done, run_command, run_json

from difffract_jax.loading import load_transcoders

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts.txt"
SMALL = ("--batch", 32, "--buffer-rows", 128, "--expansion", 2, "--k", 3, "--time-embed", 4, "--log-every", 1)


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Runs `difffract train ARGUMENTS --json` in an empty directory; returns status, result and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_json(monkeypatch, capsys, "train", *arguments)


def write_rows(directory, count=300):
    rng = np.random.default_rng(0)
    directory.mkdir()
    x = rng.standard_normal((count, 6), np.float32)
    np.savez(directory / "a.npz", x=x, y=np.tanh(x[:, :4]))
    return directory


def origins(result):
    return {row["setting"]: (row["value"], row["from"]) for row in result["settings"]}


def test_one_line_says_what_it_would_do_and_where_every_setting_came_from(train, tmp_path):
    line = ("--model", "organism", "--layers", "0,1", "--steps", 200, "--set", "batch=512", "--out", "run")
    result = done(train(*line, "--dry-run"))
    assert (result["sites"], result["width"]) == ("4: img/0, img/1, txt/0, txt/1", "64")
    assert result["memory per device"].startswith("about 0.")
    rows = origins(result)
    assert rows["sites"] == ("img/0 img/1 txt/0 txt/1", "--layers") and rows["prompts"] == ("world", "default")
    assert rows["steps"] == ("200", "--steps") and rows["batch"] == ("512", "--set")
    assert rows["k"] == ("16", "default for a width of 64") and rows["model"] == ("organism", "--model")
    assert not list(tmp_path.iterdir())


def test_a_file_of_settings_means_the_same_with_and_without_flags_beside_it(train, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: organism\nlr: 0.5\nsteps: 3\n")
    rows = origins(done(train(file, "--steps", 4, "--streams", "single", "--dry-run")))
    assert rows["lr"] == ("0.5", str(file)) and rows["steps"] == ("4", "--steps") and rows["k"] == ("32", "default")
    assert rows["sites"] == ("single/*", "--streams") and rows["model"] == ("organism", str(file))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ((), "There is no model to read: `model` is missing"),
        (("--model", "nowhere"), "nowhere is not a directory"),
        (("--model", "tiny"), "There are no prompts to run tiny on; give --prompts FILE"),
        (("--model", "organism", "--layers", "6,12,18"), "The site img/6 does not exist: the model has img/0 to img/1"),
        (("--model", "organism", "--layers", "6;x"), "`--layers 6;x` names no blocks; write their numbers, as in"),
        (("--model", "organism", "--streams", "imgs"), "`imgs` is not one; did you mean `img`?"),
        (("--model", "organism", "--layers", "0", "--sites", "img/0"), "leave out --sites"),
        (("organism",), "organism does not exist; give a YAML file of settings, or a model as --model NAME"),
        (("--model", "organism", "--steps", "0"), "`steps` was 0, but input should be greater than or equal to 1"),
        (("--model", "organism", "--time-embed", "0"), "time_embed must be 0 exactly where conditioning is none"),
        (("--model", "organism", "--resume"), "run holds no run to resume; leave --resume out to begin one"),
        (("--export", "nowhere"), "nowhere holds no training run; give the `out` of difffract train"),
        (("--export", "nowhere", "--steps", 5), "--export trains nothing and takes --out alone; leave --steps out"),
        (("--export", "nowhere", "--dry-run"), "leave --dry-run out"),
        (("--export", "nowhere", "--set", "seed=0"), "leave --set out"),
        (("run.yaml", "--export", "nowhere"), "leave run.yaml out"),
        (("--rows", "nowhere"), "nowhere is not a directory of rows"),
        (("--rows", "rows", "--expansion", "0.01"), "expansion is 0.01, which leaves no feature at a width of 6"),
    ],
)
def test_lines_that_make_no_run_are_one_sentence_and_leave_nothing(train, tmp_path, line, said):
    write_rows(tmp_path / "rows")
    status, out, err = train(
        *line, "--dry-run" if "--export" not in line else "--out", *(("x",) * ("--export" in line))
    )
    assert (status, out) == (1, "") and said in err and err.startswith("Error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_a_run_of_rows_stops_early_exports_and_goes_on_without_its_settings(train, tmp_path, monkeypatch, capsys):
    rows, run = write_rows(tmp_path / "rows"), tmp_path / "run"
    line = ("--rows", rows, "--out", run, "--steps", 4, *SMALL)
    result = done(train(*line, "--max-minutes", 1e-9))
    assert result["step"] == 1 and result["stopped"].startswith("after 1 of 4 steps, saved")
    assert result["resume"] == f"difffract train --resume --out {run}"
    assert "has not finished; go on with difffract train" in run_command(monkeypatch, capsys, "evaluate", run).err
    made = done(train("--export", run, "--out", tmp_path / "early"))
    assert (made["step"], made["of steps"], made["transcoders"]) == (1, 4, str(tmp_path / "early"))
    tcs = load_transcoders(tmp_path / "early")
    assert (tcs.config.d_model, tcs.config.d_model_out, tcs.sites.names) == (6, 4, ("rows/0",))
    record = json.loads((tmp_path / "early" / "config.json").read_text())["provenance"]
    assert (record["step"], record["settings"]["steps"], record["command"]) == (1, 4, "train")
    assert "early exists already; name another --out" in train("--export", run, "--out", tmp_path / "early")[2]
    finished = done(train("--resume", "--out", run, "--max-minutes", 10))
    assert finished["step"] == 4 and load_transcoders(finished["transcoders"]).config == tcs.config
    table = done(run_json(monkeypatch, capsys, "evaluate", tmp_path / "early", run))
    row = table["sites"][0]
    assert row["site"] == "rows/0" and row.keys() == {"site", "fvu", "l0", "dead"} and table["rows"] == str(rows)
    assert row["fvu"]["difference"] == row["fvu"]["b"] - row["fvu"]["a"] != 0
    shown = run_command(monkeypatch, capsys, "evaluate", tmp_path / "early", run).out
    assert "sites: A, B, B - A" in shown and "│ FVU" in shown.replace("┃", "│") and not (run / "report").exists()
    one = done(run_json(monkeypatch, capsys, "evaluate", run, "--rows", rows))
    assert one.keys() == {"report", "fvu", "l0", "dead"} and "rows/0" in (run / "report" / "report.md").read_text()


def test_the_settings_are_shown_before_the_first_row_is_read(monkeypatch, capsys, tmp_path):
    rows = write_rows(tmp_path / "rows")
    line = ("train", "--rows", rows, "--out", tmp_path / "run", "--steps", 1, *SMALL)
    shown = run_command(monkeypatch, capsys, *line)
    places = [shown.out.index(word) for word in ("memory per device", "--batch", "rows_per_second")]
    assert shown.status == 0 and places == sorted(places) and not shown.err.strip()
