"""The command line: help that teaches, exit statuses, one sentence per failure, and a circuit from end to end."""

import json
import logging
import os
import re
import resource
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Run, run_command

from difffract_jax.cli import main as cli
from difffract_jax.cli import trace
from difffract_jax.cli.commands import MODULES
from difffract_jax.config import UserError
from difffract_jax.storage.locks import sole_writer
from random_graphs import random_output_graph

ROOT = str(Path(__file__).parents[2])
COMMANDS = ("demo", "convert flux", "convert model", "convert transcoders", "convert check")
COMMANDS += ("generate", "trace", "prune", "supernodes", "combine average", "combine difference", "compare", "export")
COMMANDS += ("combine intervals", "combine contrast")
COMMANDS += ("harvest", "plan", "doctor", "train", "evaluate", "steer", "features", "heads", "effects", "validate")


@pytest.fixture
def difffract(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `difffract ARGUMENTS` in this process."""

    return partial(run_command, monkeypatch, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str, difffract: Callable[..., Run]) -> None:
    run = difffract(*command.split(), "--help")
    assert run.status == 0
    assert f"Example: difffract {command}" in " ".join(run.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_named_in_the_help_of_its_group(command: str, difffract: Callable[..., Run]) -> None:
    *group, name = command.split()
    assert re.search(rf"^│ {name} ", difffract(*group, "--help").out, re.MULTILINE)


@pytest.mark.parametrize("code", ["import difffract_jax", "from difffract_jax.cli.main import main; main()"])
def test_importing_and_asking_for_help_take_less_than_a_second_and_a_half(code: str) -> None:
    # Processor time, which is what the clock shows on a quiet machine, and the same on a busy one.
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(times) < 1.5


def test_a_command_line_imports_the_module_of_its_command_alone(tmp_path: Path) -> None:
    code = "import sys; from difffract_jax.cli.main import main\ntry: main()\nfinally: print(*sys.modules)"
    line = [sys.executable, "-c", code, "compare", "no.npz", "no.npz"]
    env = {**os.environ, "PYTHONPATH": ROOT}
    run = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    loaded = {name.removeprefix("difffract_jax.cli.") for name in run.stdout.split()}
    assert run.returncode == 1 and "no.npz" in run.stderr
    assert loaded & {*MODULES.values()} == {"graphs"} and not loaded & {"jax", "scipy", "matplotlib"}


def test_the_package_itself_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["difffract_jax", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("difffract_jax", run_name="__main__")
    assert capsys.readouterr().out.startswith("difffract_jax 0.")


def test_what_is_noted_is_shown_once_whoever_sets_up_the_root_logger(
    difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    @cli.app.command("note")
    def note() -> None:
        logging.basicConfig()  # as absl does, which Orbax logs by
        logging.getLogger("difffract_jax.somewhere").warning("rows were left out")
        logging.getLogger("another").warning("something else")

    root, ours = logging.getLogger(), logging.getLogger("difffract_jax")
    monkeypatch.setattr(root, "handlers", [])
    try:
        run = difffract("note")
    finally:
        cli.app.registered_commands.pop()
    assert run.status == 0 and run.err.count("rows were left out") == 1 and "something else" in run.err
    assert ours.propagate


def test_the_version_is_told(difffract: Callable[..., Run]) -> None:
    assert difffract("--version").out.startswith("difffract_jax 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("trace", "model"),
        ("generate",),
        ("generate", "model", "prompt", "--steps", "many"),
        ("generate", "model", "prompt", "--noise", "numpy"),
        ("prune", "graph.npz", "--mode", "other"),
        ("export", "graph.npz"),
        ("export", "graph.npz", "--format", "pdf", "--out", "a.pdf"),
        ("combine", "average"),
        ("combine", "difference", "a.npz"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], difffract: Callable[..., Run]) -> None:
    run = difffract(*arguments)
    assert run.status == 2
    assert run.out == "" or arguments == ("generate",)
    assert "Traceback" not in run.err


EXPLAINED = ("trace", "m", "t", "p", "--target", "img/2/f3", "--attention", "explained")
POOLED = (*EXPLAINED[:-2], "--pooled", "explained")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "m", "p", "--out", "image.bmp"), "The output file must end in .png, but got image.bmp."),
        (("generate", "m", "p", "--out", "no/image.png"), "The folder no of the output file image.png does not exist"),
        (("generate", "m", "p", "--steps", "0"), "`steps` was 0, but input should be greater than or equal to 1"),
        (("generate", "m", "p", "--set", "step=1"), "`step` is not a setting; did you mean `steps`?"),
        (("generate", "m", "p", "--config", "no.yaml"), "no.yaml: No such file or directory."),
        (("generate", "organism-flux", "p"), "nothing embedded has that name; did you mean `organism-flux2`?"),
        (("trace", "m", "t", "p", "--target", "img/2/f3", "--out", "g.json"), "must end in .npz, but got g.json"),
        ((*EXPLAINED, "--export-json", "g.json"), "leave --export-json out, or --attention explained."),
        ((*POOLED, "--export-json", "g.json"), "no modulations as nodes; leave --export-json out, or --pooled"),
        ((*POOLED, "--activations", "a.npz"), "leave --activations out, or --pooled explained."),
        ((*POOLED, "--weights", "disk"), "with all blocks in memory, but --weights is disk; give --weights device"),
        ((*EXPLAINED, "--max-scores", "-1"), "`max_scores` was -1, but input should be greater than or equal to 0"),
        ((*EXPLAINED[:-2], "--max-scores", "9"), "--max-scores does nothing without --attention explained; add that"),
        (("prune", "no.npz"), "no.npz"),
        (("compare", "no.npz", "no.npz"), "no.npz"),
        (("supernodes", "no.npz"), "no.npz does not exist; give a graph file"),
        (("supernodes", "no.npz", "--set-supernode", "a"), "'a' is not of the form NAME=node,node"),
        (("combine", "average", "no.npz", "--out", "a.json"), "must end in .npz, but got a.json"),
        (("export", "no.npz", "--format", "graphml", "--out", "g.json"), "must end in .graphml, but got g.json"),
        (
            ("export", "no.npz", "--format", "csv", "--out", "no/csv"),
            "The folder no of the output file csv does not exist",
        ),
        (("prune", "g.npz", "--node-threshold", "1.5"), "`node_threshold` was 1.5, but input should be less than or"),
    ],
)
def test_a_failure_is_one_sentence(
    arguments: tuple[str, ...],
    told: str,
    difffract: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = difffract(*arguments)
    assert (run.status, run.out) == (1, "")
    assert run.err.startswith("Error: ") and run.err.count("\n") == 1
    assert told in run.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [("generate", "m", "p"), ("trace", "m", "t", "p", "--target", "img/2/f3")])
def test_base_and_variant_reach_the_model(
    command: tuple[str, ...], difffract: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(model: str, **options: object) -> None:
        raise UserError(f"{model} {options['base']} {options['variant']}")

    monkeypatch.setattr("difffract_jax.loading.load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    assert difffract(*command, "--base", "b", "--variant", "fp16").err == "Error: m b fp16\n"


def test_debug_shows_the_traceback(difffract: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match="must end in .png"):
        difffract("generate", "m", "p", "--out", "image.bmp", "--debug")


def test_an_interruption_exits_with_130(difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("difffract_jax.cli.generate.provenance", interrupted)
    run = difffract("generate", "m", "p")
    assert run.status == 130
    assert "Traceback" not in run.err


def test_a_dry_run_prints_the_resolved_settings(difffract: Callable[..., Run]) -> None:
    run = difffract("generate", "m", "a fox", "--set", "steps=2", "--dry-run", "--json")
    assert run.status == 0
    assert json.loads(run.out)["settings"]["steps"] == 2


def test_a_graph_that_knows_no_feature_of_a_step_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    graph = random_output_graph(3)
    trace._warn("", graph)
    assert capsys.readouterr().err == ""
    trace._warn("", graph.with_provenance(steps=(0, 1, 2)))
    told = capsys.readouterr().err
    assert told.startswith("Warning: no feature of step 2 was expanded") and "lower --expansion-batch" in told


@pytest.mark.parametrize(
    ("line", "enabled"),
    [
        ("generate organism x --dry-run --out a.png", True),
        ("generate organism x --dry-run --out a.png --no-compile-cache", False),
        ("--no-compile-cache generate organism x --dry-run --out a.png", False),
        ("generate --help", False),
        ("prune no.npz", False),
        ("--version", False),
    ],
)
def test_compiled_programs_are_kept_by_commands_that_compile(difffract, monkeypatch, line, enabled):
    called = []
    monkeypatch.setattr(cli, "enable_compile_cache", lambda: called.append(True))
    run = difffract(*line.split())
    assert called == [True] * enabled and "no-compile-cache" not in run.err


def test_a_device_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from difffract_jax.cli.main import main; main()"]
        + ["generate", "organism", "x", "--out", str(tmp_path / "image.png")],
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and last.startswith("Error: JAX finds no device: ") and "Traceback" not in run.stderr
    assert "JAX_PLATFORMS=cuda names none" in last and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        ("steer", "organism", "organism", "a red ring", "--edit", "img/1/f299=zero"),
        ("validate", "organism", "organism", "graph.npz"),
        ("study", "colour-prior"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_directory_that_another_process_fills_is_refused_before_any_work(
    difffract: Callable[..., Run], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with sole_writer(tmp_path / "out"):
        run = difffract(*arguments, "--out", tmp_path / "out")
    assert run.status == 1 and "Another process is writing" in run.err and run.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
