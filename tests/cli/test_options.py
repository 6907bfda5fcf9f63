"""Options are the settings: spelled in the class alone, the same help, no default, and a missing one is wrong usage."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from commands import run_command
from pydantic import Field

from difffract_jax.cli import main as cli
from difffract_jax.cli import options as opt
from difffract_jax.cli.options import field, in_options, settings_of
from difffract_jax.config import Settings, UserError
from difffract_jax.trace_settings import TraceConfig

GIVEN = {"model": "m", "transcoders": "t", "prompt": "p", "target": "img/0/f1"}
ON_SETTINGS = {
    "dashboards",
    "demo",
    "encode",
    "convert flux",
    "convert model",
    "convert transcoders",
    "generate",
    "trace",
    "steer",
    "features",
    "heads",
}
ON_SETTINGS |= {
    "encode",
    "effects",
    "validate",
    "prune",
    "supernodes",
    "export",
    "view",
    "report",
    "train",
    "evaluate",
    "study",
}


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields every command below one, by its full name."""
    for name, below in getattr(command, "commands", {}).items():
        if hasattr(below, "commands"):
            yield from leaves(below, (*path, name))
        else:
            yield " ".join((*path, name)), below


COMMANDS = dict(leaves(typer.main.get_command(cli.app)))


def function_of(command: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters of the function that a command runs, as it is written."""
    return dict(inspect.signature(inspect.unwrap(command.callback)).parameters)


class Inner(Settings):
    depth: int = 1
    """How deep."""


class Base(Settings):
    """What is inherited."""

    place: str
    """Where."""
    seed: int = Field(0, ge=0)
    """Seed."""


class Toy(Base):
    """Every kind of field."""

    names: tuple[str, ...] = ()
    """Names."""
    one_or_more: str | tuple[str, ...] | None = None
    """One or more."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    share: float | None = None
    """Share."""
    is_flag: bool = False
    """Flag."""
    inner: Inner = Inner()
    """More settings."""


def toy(result: list[Any], **how: Any) -> Any:
    """Returns a command on `Toy` that adds what it was called with to a list."""

    @opt.command(Toy, arguments=("place",), **how)
    def run(settings: Toy, *, extra: Annotated[int, typer.Option("--extra")] = 4, json: bool) -> None:
        """Run."""
        result.append((settings, extra, json))

    return run


def test_the_commands_on_settings_are_known():
    assert {name for name, command in COMMANDS.items() if "settings" in function_of(command)} == ON_SETTINGS


@pytest.mark.parametrize("name", sorted(ON_SETTINGS))
def test_a_command_s_options_are_the_fields_of_its_settings(name):
    written = function_of(COMMANDS[name])
    cls = written.pop("settings").annotation
    assert not written.keys() & cls.model_fields.keys(), "a field is spelled again"
    listed = {one.name: one for one in COMMANDS[name].params}
    assert listed.keys() - {"help"} <= cls.model_fields.keys() | written.keys() | opt.SHARED.keys()
    for key in (listed.keys() & cls.model_fields.keys()) - ({"labels"} if name == "export" else set()):
        one = listed[key]
        assert one.help == field(cls, key)["help"]
        assert one.default in (None, False) and not one.required
        if one.param_type_name == "option":
            assert (one.opts, one.secondary_opts) == ([f"--{key.replace('_', '-')}"], [])


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_what_it_says(name):
    for one in COMMANDS[name].params:
        # Help is Markdown: two stars outside code would be taken for emphasis, and not be shown.
        assert re.sub("`[^`]*`", "", getattr(one, "help", None) or "").count("*") < 2, one.name
        assert one.param_type_name == "option" or one.metavar.isupper(), one.name


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("compare", "[OPTIONS] A B"),
        ("combine average", "[OPTIONS] GRAPH..."),
        ("convert check", "[OPTIONS] SOURCE [CONVERTED]"),
        ("prune", "[OPTIONS] GRAPH"),
        ("convert flux", "[OPTIONS] SOURCE OUT"),
        ("convert model", "[OPTIONS] SOURCE OUT"),
        ("trace", "[OPTIONS] [MODEL] [TRANSCODERS] [PROMPT]"),
    ],
)
def test_usage_names_arguments_plainly(monkeypatch, capsys, command, usage):
    text = run_command(monkeypatch, capsys, *command.split(), "--help").out
    assert f"Usage: difffract {command} {usage}\n" in re.sub(" +\n", "\n", text)


@pytest.mark.parametrize("name", sorted(ON_SETTINGS))
def test_shared_options_come_last_and_in_one_order(name):
    listed = [one.name for one in COMMANDS[name].params if one.name != "help"]
    shared = [key for key in opt.SHARED if key in listed]
    assert listed[-len(shared) :] == shared


def test_a_field_s_type_is_its_option_s():
    made = inspect.signature(toy([])).parameters
    types = {key: get_args(one.annotation)[0] for key, one in made.items() if key not in ("extra", *opt.SHARED)}
    strings = list[str] | None
    assert types == {
        **{"place": str | None, "names": strings, "one_or_more": strings, "kind": Literal["a", "b"] | None},
        **{"share": float | None, "is_flag": bool | None, "seed": int | None},
    }


def test_options_stand_in_the_order_asked_for():
    def names(**how: Any) -> list[str]:
        return list(inspect.signature(toy([], **how)).parameters)

    own = ["names", "one_or_more", "kind", "share", "is_flag"]
    assert names() == ["place", *own, "seed", "extra", "config", "sets", "json"]
    assert names(layers=(), without=("share",)) == ["place", *own[:3], "is_flag", "seed", "extra", "json"]
    assert names(layers=(), before={"kind": ("seed", "extra")}) == [
        "place",
        *own[:2],
        "seed",
        "extra",
        *own[2:],
        "json",
    ]
    with pytest.raises(AssertionError, match="have no place"):
        names(before={"kin": ("seed",)})


def test_a_command_is_called_with_what_was_merged(tmp_path: Path):
    result: list[Any] = []
    (tmp_path / "a.yaml").write_text("seed: 5\nshare: .5\n")
    given = dict.fromkeys(inspect.signature(toy([])).parameters) | {"place": "p", "names": [], "extra": 4, "json": True}
    toy(result)(**given | {"config": tmp_path / "a.yaml", "seed": 6, "sets": ["kind=b"]})
    assert result == [(Toy(place="p", seed=6, share=0.5, kind="b"), 4, True)]
    toy(result, prepare=lambda given: given | {"seed": given["extra"]})(**given)
    assert result[1][0].seed == 4


def test_steer_and_features_show_inherited_options_among_their_own(monkeypatch, capsys):
    text = run_command(monkeypatch, capsys, "steer", "--help").out
    places = [text.index(f"--{key} ") for key in ("edit", "seeds", "sweep", "box", "expect", "steps", "batch", "out")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["max_nodes", "prompt", "noise", "include_padding"])
def test_help_is_the_setting_s_own_docstring(name):
    told = field(TraceConfig, name)["help"]
    info = TraceConfig.model_fields[name]
    assert told.startswith(" ".join(info.description.split()))
    assert (f"Default: `{info.default}`." in told) == (name in ("max_nodes", "noise"))


def test_what_is_not_given_is_left_to_the_settings():
    assert settings_of(TraceConfig, GIVEN | {"max_nodes": None}).max_nodes == 1000
    assert settings_of(TraceConfig, GIVEN | {"max_nodes": 7, "sets": ["max_nodes=8"]}).max_nodes == 8


def test_a_file_fills_in_what_is_missing_and_options_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\ntranscoders: t\nprompt: p\ntarget: img/0/f1\nmax_nodes: 5\nstep: 2\n")
    settings = settings_of(TraceConfig, {"config": tmp_path / "a.yaml", "max_nodes": 6, "prompt": None})
    assert (settings.prompt, settings.max_nodes, settings.step) == ("p", 6, "2")


def test_what_is_missing_is_named():
    with pytest.raises(typer.BadParameter, match="TRANSCODERS, TARGET missing; see --help"):
        settings_of(TraceConfig, {"model": "m", "prompt": "p"})
    with pytest.raises(UserError, match="`target` is missing"):
        settings_of(TraceConfig, {"model": "m", "transcoders": "t", "prompt": "p", "sets": ["step=1"]})


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("max_nodes is 1, too few for 2 targets.", "--max-nodes is 1, too few for 2 targets."),
        ("Name one of them, or trace with include_padding.", "Name one of them, or trace with --include-padding."),
        ("step must lie in [0, 4), but got 4.", "--step must lie in [0, 4), but got 4."),
        ("The steps of a trace must ascend.", "The steps of a trace must ascend."),
        ("out is a file; give another --out.", "out is a file; give another --out."),
        ("runs/max_nodes/a.npz does not exist.", "runs/max_nodes/a.npz does not exist."),
        ("max_nodes.npz and 'max_nodes' and max_nodes=3", "max_nodes.npz and 'max_nodes' and max_nodes=3"),
        ("prompt must be at least 1 word.", "PROMPT must be at least 1 word."),
    ],
)
def test_errors_of_the_library_name_options_where_that_is_certain(sentence, named):
    assert in_options(sentence, list(TraceConfig.model_fields), ("prompt",)) == named


def test_a_command_s_error_names_options_and_keeps_its_cause():
    @opt.command(Toy, layers=())
    def run(settings: Toy) -> None:
        """Fail."""
        raise UserError("one_or_more is of no use, and seed must be at least 1.")

    with pytest.raises(UserError, match="^--one-or-more is of no use, and seed must be at least 1.$") as caught:
        run(place="p")
    assert isinstance(caught.value.__cause__, UserError)


def test_an_output_file_that_is_a_directory_is_refused_before_any_work(tmp_path):
    (tmp_path / "graph.npz").mkdir()
    with pytest.raises(UserError, match=r"graph\.npz is a directory, but the output is one file; name another output"):
        opt.check_out(tmp_path / "graph.npz", ".npz")
