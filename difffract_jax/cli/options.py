"""The vocabulary of the command line: every option that commands share, documented by the settings themselves.

1. An option's help is the docstring of the setting of that name, so that the two cannot drift.
2. Options left out are None, so that they do not hide the value of a `--config` file; defaults live in the settings.
3. `settings_of` merges what was given into the settings of a command.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from difffract_jax.config import ConvertConfig, Settings, TraceConfig, UserError, resolve

S = TypeVar("S", bound=Settings)


def field(cls: type[Settings], name: str) -> dict[str, Any]:
    """Returns the help of a setting, with its default, for `typer.Option` or `typer.Argument`."""
    info = cls.model_fields[name]
    silent = info.is_required() or info.default in (None, False, ())
    default = "" if silent else f" Default: {info.default}."
    return {"help": " ".join((info.description or "").split()) + default, "show_default": False}


def option(cls: type[Settings], name: str) -> Any:
    """Returns the option `--name` of a setting."""
    return typer.Option(f"--{name.replace('_', '-')}", **field(cls, name))


def argument(cls: type[Settings], name: str) -> Any:
    """Returns the positional argument NAME of a setting."""
    return typer.Argument(metavar=name.upper(), **field(cls, name))


Model = Annotated[str | None, argument(TraceConfig, "model")]
Prompt = Annotated[str | None, argument(TraceConfig, "prompt")]
Seed = Annotated[int | None, option(TraceConfig, "seed")]
Steps = Annotated[int | None, option(TraceConfig, "steps")]
Height = Annotated[int | None, option(TraceConfig, "height")]
Width = Annotated[int | None, option(TraceConfig, "width")]
TextTokens = Annotated[int | None, option(TraceConfig, "text_tokens")]
Latents = Annotated[Path | None, option(TraceConfig, "latents")]
Noise = Annotated[Literal["jax", "torch"] | None, option(TraceConfig, "noise")]
Source = Annotated[Path | None, argument(ConvertConfig, "source")]
Target = Annotated[Path | None, argument(ConvertConfig, "out")]
Dtype = Annotated[Literal["f32", "bf16"] | None, option(ConvertConfig, "dtype")]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", **field(ConvertConfig, "overwrite"))]
GraphFile = Annotated[
    Path, typer.Argument(help="Graph file: `.npz`, the reference's JSON, or circuit-tracer's and Neuronpedia's.")
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; options win over it.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any setting; wins over all.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
IncludePadding = Annotated[bool | None, typer.Option("--include-padding", **field(TraceConfig, "include_padding"))]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and leave.")]
ToTorch = Annotated[bool, typer.Option("--to-torch", help="The other way: from our directory to `.pt` files.")]
Tolerance = Annotated[float, typer.Option("--tolerance", min=0, help="Largest relative error of a block.")]


def check_out(path: Path, suffix: str) -> None:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: file or directory to write.
        suffix: that it must have; "" for a directory, which needs none.
    """
    if suffix and path.suffix != suffix:
        raise UserError(f"The output file must end in {suffix}, but got {path}.")
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} of the output file {path.name} does not exist; create it first.")


def settings_of(cls: type[S], given: Mapping[str, Any]) -> S:
    """Resolves a command's settings from its arguments; a missing one is a usage error unless a file may hold it.

    Args:
        cls: settings of the command.
        given: the command's parameters by name, its `locals()`; None counts as not given.
    """
    options = {name: value for name, value in given.items() if name in cls.model_fields}
    file, sets = given.get("config"), given.get("sets") or ()
    if not file and not sets:
        missing = [name for name, info in cls.model_fields.items() if info.is_required() and options.get(name) is None]
        if missing:
            raise typer.BadParameter(f"{', '.join(name.upper() for name in missing)} missing; see --help.")
    return resolve(cls, options, file=file, sets=sets)
