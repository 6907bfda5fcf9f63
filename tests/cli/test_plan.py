"""`difffract plan` for devices that are counted; those that libtpu compiles have tests beside their planners."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import Run, run_command

from difffract_jax.circuits.attribution.plan import TracePlan
from difffract_jax.cli.plan import RESIDENT_ALONE
from difffract_jax.estimate.counts import COMMANDS
from difffract_jax.transcoders.plan import TrainingPlan
from tolerances import REFERENCE

SIZE = ("--set", "height=512", "--set", "width=512", "--set", "text_tokens=512")


@pytest.fixture
def difffract(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `difffract ARGUMENTS` in this process."""
    return partial(run_command, monkeypatch, capsys)


def planned(run: Run) -> list[dict]:
    assert run.status == 0, run.err
    return json.loads(run.out)["counted"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_planned_for_gpus_hosts_and_tpus(command: str, difffract: Callable[..., Run]) -> None:
    devices = ("24GB", "h100", "host:16GB") + (("v5e:2x4",) if command != "trace" else ())
    flags = [word for name in devices for word in ("--device", name)]
    rows = planned(difffract("plan", command, *flags, *SIZE, "--set", "sites=[img/3,txt/3]", "--json"))
    ways = ("resident",) if command in RESIDENT_ALONE else ("resident", "streamed")
    assert [(row["device"], row["weights"]) for row in rows] == [(name, way) for name in devices for way in ways]
    for row in rows:
        assert row["compiled"] is False and row["fits"] == (row["needed"] <= row["usable"])
        assert row["needed"] == max(phase["needed"] for phase in row["phases"])
    assert all(row["fits"] for row in rows if row["weights"] == "streamed")


def test_weights_that_are_streamed_are_what_makes_a_small_machine_do(difffract: Callable[..., Run]) -> None:
    resident, streamed = planned(difffract("plan", "generate", "--device", "host:16GB", *SIZE, "--json"))
    assert not resident["fits"] and resident["takes_less"] == ["--weights disk"]
    assert streamed["fits"] and streamed["takes_less"] == []


def test_a_plan_says_that_it_is_counted_and_what_would_fit(
    difffract: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    run = difffract("plan", "trace", "--device", "h100", *SIZE, "--set", "sites=[img/3-18,txt/3-18]")
    assert run.status == 0 and "not compiled" in run.out
    assert "--transcoder-dtype bf16" in " ".join(run.out.split()) and "copies of recorded blocks" in run.out


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's directory that lacks its text encoders."""
    bare = tmp_path_factory.mktemp("plan") / "bare"
    return shutil.copytree(REFERENCE / "pipeline", bare, ignore=shutil.ignore_patterns("text_encoder*"))


def test_text_encoders_that_are_not_there_are_said_to_be_uncounted(
    difffract: Callable[..., Run], tmp_path: Path, bare: Path
) -> None:
    full, given = REFERENCE / "pipeline", tmp_path / "generate.yaml"
    given.write_text(f"model: {bare}\nembeddings: prompts.npz\n", encoding="utf-8")
    size = ("--device", "24GB", "--set", "height=32", "--set", "width=32", "--set", "text_tokens=16")

    def told(*arguments: object) -> str | None:
        run = difffract("plan", *arguments, "--json")
        assert run.status == 0, run.err
        return json.loads(run.out).get("text_encoders")

    assert told("generate", full, *size) is None and told("generate", "--config", given, *size) is None
    training = "configs/train-organism.yaml", "--device", "24GB", "--set", f"model={bare}"
    assert f"{bare} lacks its text encoders, so that none is counted" in told("generate", bare, *size)
    for command, sentence in (("encode", told("encode", bare, *size)), ("train", told(*training))):
        assert f"{bare} lacks its text encoders, without which `{command}` does not run" in sentence
    assert told("convert", bare, "--device", "24GB") is None


def test_what_is_compiled_says_so_of_text_encoders_too(
    difffract: Callable[..., Run], tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of what is counted; the compiler's own part, which takes libtpu, is left out."""
    trace = TracePlan("v5e:2x2", {}, 2**30, 1, 1, 1, 1, 1, (), True, 1.0)
    step = TrainingPlan("v5e:2x2", 4, {"data": 4}, 1, 1, 0, 0, 1, 1, 1, 1, 1, 2**30, True, 1.0, 1.0, {}, 1.0, {})
    monkeypatch.setattr("difffract_jax.transcoders.plan.open_topology", lambda name: name)
    monkeypatch.setattr("difffract_jax.circuits.attribution.plan.plan_trace", lambda *_: trace)
    monkeypatch.setattr("difffract_jax.transcoders.plan.plan", lambda *_: step)
    file = tmp_path / "trace.yaml"
    size = "height: 32\nwidth: 32\ntext_tokens: 16\nmax_nodes: 5\nplan: {sites: [img/0]}\n"
    run = "transcoders: planned\nprompt: a red fox\ntarget: img/0/f0\n"

    def told(*arguments: object) -> str | None:
        run = difffract("plan", *arguments, "--topology", "v5e:2x2", "--json")
        assert run.status == 0 and json.loads(run.out)["plans"][0]["fits"], run.err
        return json.loads(run.out).get("text_encoders")

    sets = [word for name in ("height=32", "width=32", "text_tokens=16") for word in ("--set", name)]
    for model, more in ((bare, ""), (bare, "embeddings: prompts.npz\n"), (REFERENCE / "pipeline", "")):
        file.write_text(f"model: {model}\n{size}{run}{more}", encoding="utf-8")
        lacking = told("--trace", file, "--set", "min_attribution=0.1", "--mesh", "feature=4")
        if model != bare or more:
            assert lacking is None
        else:
            counted = difffract("plan", "trace", bare, "--device", "24GB", *sets, "--json")
            assert lacking is not None and lacking == json.loads(counted.out)["text_encoders"]
    assert "so that none is counted" in str(told("trace", bare, *sets))
    training = ("configs/train-organism.yaml", "--set", f"model={bare}")
    assert "without which `train` does not run" in str(told(*training))


def test_a_training_is_counted_phase_by_phase(difffract: Callable[..., Run]) -> None:
    row, streamed = planned(difffract("plan", "configs/train-organism.yaml", "--device", "24GB", "--json"))
    assert (row["weights"], streamed["weights"]) == ("resident", "streamed")
    assert streamed["needed"] < row["needed"] and "blocks on their way" in streamed["phases"][2]["held"]
    phases = {phase["name"]: phase for phase in row["phases"]}
    assert [*phases] == ["initialise", "encode prompts", "harvest", "step"] and row["fits"]
    assert {"state", "buffer", "model", "rows"} == phases["step"]["held"].keys()
    more = planned(
        difffract("plan", "configs/train-organism.yaml", "--device", "24GB", "--set", "expansion=64", "--json")
    )
    assert more[0]["needed"] > row["needed"]


def test_a_models_own_transcoders_are_read(difffract: Callable[..., Run]) -> None:
    sets = ("--set", "transcoders=organism", "--set", "sites=[img/*]")
    rows = planned(difffract("plan", "trace", "organism", "--device", "host:4GB", *sets, "--json"))
    whole = planned(
        difffract("plan", "trace", "organism", "--device", "host:4GB", "--set", "transcoders=organism", "--json")
    )
    held = [row[0]["phases"][0]["held"]["transcoders"] for row in (rows, whole)]
    assert 0 < held[0] < held[1] < 2**25


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sing", "--device", "24GB"), "neither a YAML file nor a command"),
        (("generate", "--device", "hal9000"), "is not a device"),
        (("generate", "--device", "24GB", "--set", "height=500"), "multiples of 16"),
        (("generate", "--device", "24GB", "--set", "colour=red"), "colour"),
        (("generate", "--topology", "v5e:2x4"), "give it as --device"),
        (("generate", "nowhere", "--device", "24GB"), "nowhere is not a directory"),
    ],
)
def test_a_plan_that_cannot_be_made_is_told_in_a_sentence(
    arguments: tuple[str, ...], told: str, difffract: Callable[..., Run]
) -> None:
    run = difffract("plan", *arguments)
    assert run.status == 1 and told in run.err and run.err.count("\n") == 1


def test_a_plan_needs_a_device(difffract: Callable[..., Run]) -> None:
    run = difffract("plan", "generate")
    assert run.status == 2 and "--device" in run.err


def test_a_training_is_swept_over_slices_into_tables_and_a_figure(
    difffract: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    sizes = [
        word for name in ("height=16", "width=16", "text_tokens=8", "steps_per_image=2") for word in ("--set", name)
    ]
    files = "--table", tmp_path / "sweep.json", "--figure", tmp_path / "sweep.png"
    run = difffract("plan", "configs/smoke.yaml", "--sweep", "v5p:4..8,v6e:4", *sizes, *files)
    assert run.status == 0, run.err
    for told in ("modelled", "v5p:2x2x2", "chip-hours", "smallest that fits", "which no program reaches"):
        assert told in run.out
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    points = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["points"]
    assert [point["topology"] for point in points] == ["v5p:2x2x1", "v5p:2x2x2", "v6e:2x2"]
    for point in points:
        assert point["fits"] and not point["compiled"] and point["chunk"]["compute"] > 0
        assert point["needed"] >= sum(point["parts"].values()) > 0
        assert point["chip_hours"] == pytest.approx(point["seconds"] * point["chips"] / 3600)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "--sweep", "v5e:4..8"), "--sweep is for trainings, but generate is asked for"),
        (("train", "--sweep", "v5e:4..8", "--mesh", "data=4"), "leave out --mesh"),
        (("train", "--sweep", "v5e:4..8", "--figure", "plan.gif"), "must end in one of .png, .svg, .pdf"),
        (("train", "--sweep", "v5e:4..8", "--table", "plan.txt"), "must end in one of .json, .md"),
        (("train", "--device", "24GB", "--figure", "plan.png"), "are of a sweep; add --sweep"),
        (("train", "--sweep", "v5q:4"), "`v5q` is not a chip"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_told_in_a_sentence(
    arguments: tuple[str, ...], told: str, difffract: Callable[..., Run]
) -> None:
    run = difffract("plan", *arguments)
    assert run.status == 1 and told in run.err and run.err.count("\n") == 1 and not run.out
