"""`difffract organism`: help, refusals, and a training from nothing to a pipeline that the other commands run on.

The training takes no step here, which spares compiling it; what its steps do is tested in `organism/test_train.py`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from difffract_jax.cli import main as cli
from difffract_jax.cli.organism import _verdict
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline
from difffract_jax.models.pipeline import generate
from difffract_jax.organism import pool, train
from difffract_jax.organism.render import NOUNS
from difffract_jax.organism.scorer import judge, read_scenes
from difffract_jax.organism.world import as_captioned, from_caption
from difffract_jax.storage.sums import SUMS, check_sums

COMMANDS = ("info", "sample", "score", "train")
TINY = (
    *("--set", "seed=3", "--set", "flow.depth_double=1", "--set", "flow.depth_single=1", "--set", "flow.heads=1"),
    *("--set", "flow.pool=16", "--set", "flow.steps=10", "--set", "text.steps=1", "--set", "images.steps=1"),
)


class Run(NamedTuple):
    """How one command line ended."""

    status: int
    out: str
    err: str


def call(*arguments: object) -> int:
    """Runs `difffract organism ARGUMENTS` in this process; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["difffract", "organism", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.fixture
def organism(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `difffract organism ARGUMENTS`, and keeps what it prints."""
    return lambda *arguments: Run(call(*arguments), *capsys.readouterr())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a training with tiny settings and without steps."""

    def no_step(stage: train.Stage, directory: Path, save_every: int, report: train.Progress, **_: Any) -> Any:
        report(stage.name, stage.steps, stage.steps, 0.0)
        (directory / "metrics.jsonl").touch()
        return stage.init()

    directory = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "AT_ONCE", 16)
        patch.setattr(train, "fit", no_step)
        assert call("train", "--out", directory, "--images", "0", *TINY) == 0
    yield directory


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str, organism: Callable[..., Run]) -> None:
    run = organism(command, "--help")
    assert run.status == 0
    assert f"Example: difffract organism {command}" in " ".join(run.out.split())


def test_the_group_names_its_commands(organism: Callable[..., Run]) -> None:
    run = organism("--help")
    assert run.status == 0
    assert all(f"│ {command} " in run.out for command in COMMANDS)


def test_a_dry_run_prints_the_recipe_and_trains_nothing(organism: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("save_every: 7\nflow:\n  heads: 3\n")
    arguments = ("--config", tmp_path / "recipe.yaml", "--set", "flow.steps=20", "--set", "seed=4", "--dry-run")
    run = organism("train", "--out", tmp_path / "run", *arguments)
    assert run.status == 0
    recipe = json.loads(run.out)
    assert (recipe["seed"], recipe["save_every"], recipe["flow"]["steps"], recipe["flow"]["heads"]) == (4, 7, 20, 3)
    assert recipe["text"]["steps"] > 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("score", "--tables", "bindin"), "There is no table `bindin`; did you mean `binding`?"),
        (("score", "--tables", "binding,speeed"), "There is no table `speeed`; did you mean `speed`?"),
        (("sample", "--out", "sheet.jpg"), "The picture must be a .png file in a folder that exists, but got sheet."),
        (("sample", "--out", "no/sheet.png"), "a folder that exists, but got no/sheet.png."),
        (("sample", "--prompt", "a red cirle"), "The organism knows no word `cirle`; did you mean `circle`?"),
        (("info", "no-such-model"), "no-such-model"),
        (("train", "--out", "run", "--set", "flow.step=3"), "`flow.step` is not a setting; did you mean `flow.steps`?"),
        (("train", "--out", "run", "--set", "flow.steps=3"), "`flow.steps` was 3, but input should be greater than"),
    ],
)
def test_a_failure_is_one_sentence(
    arguments: tuple[str, ...],
    told: str,
    organism: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = organism(*arguments)
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith("Error: ") and run.err.count("\n") == 1
    assert told in run.err
    assert not list(tmp_path.iterdir())


def test_training_leaves_a_pipeline_whose_hashes_hold(out: Path) -> None:
    assert json.loads((out / "recipe.json").read_text())["flow"]["depth_double"] == 1
    check_sums(out / "pipeline")
    listed = {line.split("  ", 1)[1] for line in (out / "pipeline" / SUMS).read_text().splitlines()}
    files = {path.relative_to(out / "pipeline").as_posix() for path in (out / "pipeline").rglob("*") if path.is_file()}
    assert listed == files - {SUMS}
    pipe = load_pipeline(out / "pipeline")
    assert generate(pipe, "A red circle.").image.shape == (48, 48, 3)
    assert pipe.config.transformer.heads == 1


def test_training_twice_into_one_directory_is_refused(out: Path, organism: Callable[..., Run]) -> None:
    before = (out / "pipeline" / SUMS).read_bytes()
    run = organism("train", "--out", out, "--images", "0", *TINY)
    assert run.status == 1
    assert "holds a run already; add --resume to go on with it" in " ".join(run.err.split())
    run = organism("train", "--out", out, "--resume", "--images", "0", *TINY[:-1], "images.steps=9")
    assert run.status == 1
    assert "was started with other values of images.steps" in " ".join(run.err.split())
    assert (out / "pipeline" / SUMS).read_bytes() == before


def test_info_tells_what_the_model_knows(out: Path, organism: Callable[..., Run]) -> None:
    told = json.loads(organism("info", out / "pipeline", "--json").out)
    assert all(noun in told["shapes"] + told["concepts"] for noun in NOUNS)
    assert told["blocks"] == "1 double, 1 single, width 32"
    assert (told["image"], told["text tokens"]) == ("48 x 48 pixels", 20)


BOTH = " as captioned; 0 of 3 as trained (concepts keep their colour)"


@pytest.mark.parametrize(
    ("prompt", "more"),
    [("a yellow lemon left of a red ring", ""), ("a blue lemon left of a red ring", BOTH)],
)
def test_a_sheet_of_samples_is_drawn(
    out: Path, organism: Callable[..., Run], tmp_path: Path, prompt: str, more: str
) -> None:
    given = ("--count", 3, "--prompt", prompt, "--out", tmp_path / "sheet.png", "--json")
    run = organism("sample", out / "pipeline", *given)
    assert run.status == 0
    assert json.loads(run.out) == {"samples": str(tmp_path / "sheet.png"), "right": f"0 of 3{more}"}
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 0


def test_held_out_captions_are_drawn_without_a_prompt(out: Path, organism: Callable[..., Run], tmp_path: Path) -> None:
    run = organism("sample", out / "pipeline", "--count", 3, "--out", tmp_path / "sheet.png", "--json")
    assert run.status == 0 and json.loads(run.out)["right"].startswith("0 of 3")


def test_verdicts_tell_the_caption_from_what_training_draws() -> None:
    asked = from_caption("a blue lemon left of a red ring", 4)
    drawn = read_scenes(asked.images())
    verdicts = [judge(scenes, drawn).right for scenes in (as_captioned(asked), asked)]
    told = _verdict(asked, *verdicts)
    assert told == "0 of 4 as captioned; 4 of 4 as trained (concepts keep their colour)"
    literal = as_captioned(asked)
    verdicts = [judge(scenes, read_scenes(literal.images())).right for scenes in (literal, asked)]
    assert _verdict(asked, *verdicts).startswith("4 of 4 as captioned; 0 of 4 as trained ")


def test_scores_are_counts_of_what_was_asked_for(out: Path, organism: Callable[..., Run]) -> None:
    run = organism("score", out / "pipeline", "--images", 3, "--tables", "uncoloured", "--json")
    assert run.status == 0
    (rows,) = json.loads(run.out).values()
    assert (rows[0]["images"], rows[0]["right"]) == (3, 0)


def test_one_corrupt_byte_is_refused_by_name(out: Path) -> None:
    weights = out / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(UserError) as caught:
            load_pipeline(out / "pipeline")
    finally:
        weights.write_bytes(whole)
    message = str(caught.value)
    assert f"{out / 'pipeline'} is damaged (transformer/{weights.name} differs, against SHA256SUMS)" in message
    assert "\n" not in message
