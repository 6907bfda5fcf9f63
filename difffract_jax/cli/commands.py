"""Which module has which command, so that a command line imports the one that it names, and help all.

1. `MODULES` lists the commands, in the order in which help shows them.
2. A module's `register` adds its commands to an app of Typer, as it would without this.
3. `Commands` is the group that looks them up; a command's module is imported the first time that it is looked up.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from difffract_jax.cli.options import plain_usage

MODULES = {
    "encode": "encoding",
    "prune": "graphs",
    "supernodes": "graphs",
    "compare": "graphs",
    "export": "graphs",
    "harvest": "transcoders",
    "plan": "plan",
    "doctor": "doctor",
    "train": "training",
    "evaluate": "evaluation",
    "steer": "steer",
    "features": "steer",
    "study": "study",
    "heads": "explain",
    "effects": "explain",
    "validate": "validate",
    "view": "view",
    "report": "view",
    "dashboards": "dashboards",
    "demo": "generate",
    "generate": "generate",
    "trace": "trace",
    "convert": "convert",
    "organism": "organism",
    "combine": "graphs",
}
"""Command, or group of commands -> its module in `cli`."""
WITHOUT_JAX = ("prune", "supernodes", "combine", "compare", "export")
"""Commands of saved graphs, which compile nothing."""
STYLE: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""How every app of Typer shows itself."""


class Commands(TyperGroup):
    """The group of all commands; see the module."""

    def __init__(self, *, commands: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Takes what Typer gives a group.

        Args:
            commands: further ones, by name.
            options: of `TyperGroup`.
        """
        super().__init__(**options)
        self.commands = _Table(commands or {})


class _Table(MutableMapping[str, Any]):
    """The commands by name, of which those of `MODULES` are made when they are looked up."""

    def __init__(self, further: Mapping[str, Any]) -> None:
        self._made: dict[str, Any] = dict.fromkeys(MODULES) | dict(further)

    def __getitem__(self, name: str) -> Any:
        if self._made[name] is None:
            self._made[name] = _made(MODULES[name])[name]
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@cache
def _made(module: str) -> Mapping[str, Any]:
    """Returns the commands of a module of `cli`, by name."""
    app = typer.Typer(**STYLE)
    app.callback()(_group)
    import_module(f"difffract_jax.cli.{module}").register(app)
    plain_usage(app)
    group: Any = typer.main.get_command(app)
    return group.commands


def _group() -> None:
    """Stands for the options of all commands, so that Typer makes a group of one command, too."""
