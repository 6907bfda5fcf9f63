"""`steer` and `features` from end to end on the organism, and their failures, one sentence each."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from page_folders import make_folder
from PIL import Image

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.loading import load_labels

PROMPT = "a red circle left of a blue square"
STEER = ("steer", "organism", "organism", PROMPT)


@pytest.fixture
def difffract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `difffract ARGUMENTS` in this process; returns exit status, stdout and stderr."""

    return partial(run_command, monkeypatch, capsys)


def test_steering_writes_a_grid_and_a_table(difffract: Any, tmp_path: Path) -> None:
    options = ("--edit", "img/1/f469=set:400", "--box", "0,0,24,48", "--seeds", "1..2", "--sweep", "0,1")
    make_folder(tmp_path / "pages", load_labels("organism").transcoders, {"img/1": [469]})
    wanted = ("--expect", "a pink circle left of a blue square", "--out", tmp_path / "out", "--json")
    wanted += ("--pages", tmp_path / "pages")
    status, out, _ = difffract(*STEER, *options, *wanted)
    assert status == 0
    result = json.loads(out)
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["metrics"] == result["metrics"]
    assert result["pages"] == [{"feature": "img/1/f469", "page": f"{tmp_path}/pages/index.html#img/1/f469"}]
    assert [row["edit"] for row in stored["metrics"]] == ["original", "x 0", "x 1"]
    original, off, set_ = stored["metrics"]
    assert (original["norm"], original["success"], original["compared"]) == (0, 0, 2)
    assert set_["norm"] > off["norm"] and set_["inside"] > set_["outside"] > 0
    assert stored["settings"]["sweep"] == "0,1" and stored["sources"].keys() == {"model", "transcoders"}
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert f"### {PROMPT}: img/1/f469=set:400" in table and "| original | 2 |" in table
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (64 + 3 * (192 + 6), 22 + 2 * (192 + 6))
        assert "difffract_jax" in grid.text  # pyright: ignore[reportAttributeAccessIssue]


def test_features_are_printed_ready_to_paste(difffract: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where the default folder of feature pages is
    make_folder(
        tmp_path / "dashboards", load_labels("organism").transcoders, {"img/0": range(512), "img/1": range(512)}
    )
    status, out, _ = difffract(
        *("features", "organism", "organism", PROMPT, "--contrast", "a pink circle left of a blue square"),
        *("--seeds", "0,3", "--top", 4, "--step", 2, "--json"),
    )
    assert status == 0
    result = json.loads(out)
    for stream in ("img", "txt", "single"):
        assert len(result[stream]) == 4
        for row in result[stream]:
            feature = Feature.parse(row["feature"])
            assert (feature.stream, feature.steps) == (stream, (2,)) and feature.positions is not None
            assert row["detects"] and row["seeds"].endswith("of 2")
            page = f"dashboards/index.html#img/{feature.block}/f{feature.feature}" if stream == "img" else None
            assert row.get("page") == page
    assert "colour" in json.dumps([row["detects"] for row in result["img"]])
    assert result["settings"]["contrast"].startswith("a pink")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*STEER, "--edit", "img/1/f3"), "'img/1/f3' is not an edit; write FEATURE=zero"),
        ((*STEER, "--edit", "img/1/f512=zero"), "names feature 512, but there are 0 to 511."),
        ((*STEER, "--edit", "img/7/f3=zero"), "There is no transcoder at img/7; blocks with one: 0, 1."),
        ((*STEER, "--edit", "img/1/f3#4=zero"), "names step 4, but there are 0 to 3."),
        ((*STEER, "--edit", "img/1/f3=zero", "--step", "9"), "names step 9, but there are 0 to 3."),
        ((*STEER, "--edit", "img/1/f3=zero", "--edit", "img/1/f3=set:2"), "Edits contradict each other"),
        ((*STEER, "--edit", "img/1/f3=zero", "--box", "0,0,1,1"), "The region holds no image token"),
        ((*STEER, "--edit", "img/1/f3=zero", "--box", "1,2", "--mask", "m.png"), "give one of them"),
        ((*STEER, "--edit", "img/1/f3=zero", "--mask", "m.png"), "The mask m.png is not a file"),
        ((*STEER, "--edit", "img/1/f3=zero", "--sweep", "weak"), "strengths are numbers, as in 0,-1,-2"),
        ((*STEER, "--edit", "img/1/f3=zero", "--seeds", "4..1"), "1..4 is how a range is written"),
        ((*STEER, "--edit", "img/1/f3=zero", "--out", "no/such"), "The folder no of the output directory such"),
        ((*STEER, "--edit", "img/1/f3=zero", "--expect", "a red house"), "The organism knows no word `house`"),
        (("steer", "m", "t", "p", "--edit", "img/1/f3=zero", "--expect", "a"), "other models have none; leave it out"),
        (("features", "organism", "organism", PROMPT, "--by", "region"), "give --box or --mask"),
        (("features", "organism", "organism", PROMPT, "--step", "4"), "The step 4 does not exist"),
        (("features", "organism", "organism", "--scan"), "A scan writes a labels file: give --out FILE.json"),
        (("features", "m", "t", "--scan", "--out", "l.json"), "other models have none."),
        (("features", "m", "t", "--scan", "--pages", "d"), "--pages does nothing with --scan, which labels every"),
        (("features", "m", "t", PROMPT, "--scan", "--top", "3"), "PROMPT and --top do nothing with --scan"),
        (("features", "m", "t", PROMPT, "--out", "l.json"), "--out does nothing without --scan; add that"),
        ((*STEER, "--edit", "img/1/f3=zero", "--pages", "none"), "none has no index.html; give the folder"),
    ],
)
def test_a_failure_is_one_sentence(
    arguments: tuple[str, ...], told: str, difffract: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = difffract(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and told in err
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_2(difffract: Any) -> None:
    for arguments in (STEER, ("features", "organism", "organism"), (*STEER, "--edit", "img=zero", "--form", "both")):
        status, out, err = difffract(*arguments)
        assert (status, out) == (2, "") and "Traceback" not in err


def test_settings_are_read_as_they_are_written() -> None:
    from difffract_jax.cli.settings import SteerConfig
    from difffract_jax.config import resolve

    given = {"model": "m", "transcoders": "t", "prompt": "p", "edit": ["img=zero"]}
    made = resolve(SteerConfig, given | {"seeds": "3,0..2", "sweep": "0,-1.5,2e-1", "step": "0,2"})
    assert made.seed_list == (3, 0, 1, 2)
    assert made.amounts == (0, -1.5, 0.2)
    assert made.edited_steps == (0, 2)
    with pytest.raises(UserError, match="`edit`"):
        resolve(SteerConfig, given | {"edit": []})
