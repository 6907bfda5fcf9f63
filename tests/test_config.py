"""Settings: layers, overrides, and what a mistake is told."""

import subprocess
import sys
from pathlib import Path

import pytest

from difffract_jax.cli.settings import DemoConfig, ReportConfig, SupernodesConfig, ViewConfig
from difffract_jax.config import (
    ConvertConfig,
    ExportConfig,
    GenerateConfig,
    PruneConfig,
    Settings,
    UserError,
    provenance,
    resolve,
)
from difffract_jax.trace_settings import TraceConfig
from difffract_jax.transcoders.settings import EvaluateConfig, HarvestConfig, TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = (
    *(GenerateConfig, TraceConfig, PruneConfig, ExportConfig, SupernodesConfig, ConvertConfig, DemoConfig),
    *(HarvestConfig, TrainConfig, EvaluateConfig, ViewConfig, ReportConfig),
)
TRACE = {"model": "m", "transcoders": "t", "prompt": "p", "target": "img/0/f1"}


@pytest.mark.parametrize("cls", ALL)
def test_every_setting_is_documented(cls: type[Settings]) -> None:
    assert not [name for name, field in cls.model_fields.items() if not field.description]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_says_how_to_run_it(file: Path) -> None:
    runs = {"trace": (TraceConfig, "trace --config"), "generate": (GenerateConfig, "generate --config")}
    runs["trace-flux-schnell"] = TraceConfig, "plan --trace"
    cls, command = runs.get(file.stem, (TrainConfig, "train"))
    resolve(cls, file=file)
    assert f"difffract {command} configs/{file.name}" in file.read_text()


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "trace.yaml"
    file.write_text("max_nodes: 7\nsteps: 8\nstep: 3\n")
    settings = resolve(TraceConfig, TRACE | {"steps": 9, "seed": None, "step": 2}, file=file, sets=["step=1"])
    assert (settings.max_nodes, settings.steps, settings.step, settings.seed) == (7, 9, "1", 0)


def test_settings_are_frozen() -> None:
    settings = resolve(TraceConfig, TRACE)
    with pytest.raises(ValueError, match="frozen"):
        settings.step = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "sets", "told"),
    [
        ({"max_node": 3}, (), "`max_node` is not a setting; did you mean `max_nodes`?"),
        ({"max_node": 3, "max_score": 3}, (), "did you mean `max_nodes`? `max_score` is not a setting; did"),
        ({"zzzz": 3}, (), "`zzzz` is not a setting; known are `lora`, `model`, `weights`,"),
        ({"step": -1}, (), "`step` was '-1', but string should match pattern"),
        ({"seed": -1}, (), "`seed` was -1, but input should be greater than or equal to 0"),
        ({"noise": "numpy"}, (), "`noise` was 'numpy', but input should be 'jax' or 'torch'"),
        ({"target": None}, (), "`target` is missing"),
        ({}, ("steps",), "`--set steps` is not of the form key=value"),
        ({}, ("steps=[",), "has a value that is not valid YAML"),
        ({}, ("step.deep=1",), "`step` was {'deep': 1}"),
        ({"step": 1}, ("step.deep=1",), "reaches into `step`, which is a value"),
    ],
)
def test_a_mistake_is_named(options: dict[str, object], sets: tuple[str, ...], told: str) -> None:
    merged = {key: value for key, value in (TRACE | options).items() if value is not None}
    with pytest.raises(UserError) as error:
        resolve(TraceConfig, merged, sets=sets)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(UserError, match="max_node.*not a.*seed.*greater|seed.*greater.*max_node.*not a"):
        resolve(TraceConfig, TRACE | {"max_node": 1, "seed": -1})


@pytest.mark.parametrize(("text", "told"), [("- 1\n", "must hold `key: value` lines"), ("a: [", "is not valid YAML")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        resolve(TraceConfig, TRACE, file=file)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert resolve(TraceConfig, TRACE, file=file) == resolve(TraceConfig, TRACE)


def test_provenance_can_be_resolved_again() -> None:
    settings = resolve(TraceConfig, TRACE | {"seed": 5})
    record = provenance("trace", settings, transcoders="abc")
    assert resolve(TraceConfig, record["settings"]) == settings
    assert record["sources"] == {"transcoders": "abc"}
    assert {"difffract_jax", "jax", "flax", "python"} <= record["versions"].keys()


def test_importing_the_settings_loads_nothing_heavy() -> None:
    code = "import sys, difffract_jax.config; print({'jax', 'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
