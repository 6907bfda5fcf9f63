"""Commands on settings: their options are the fields of a class, which says name, type, default and help of each once.

1. `command` gives a function a signature that Typer reads: arguments and options from the fields of the class, then the
   function's own options, then those that commands share.
2. An option's help is the docstring of its field. Options left out are None, so that they do not hide the value of a
   `--config` file; defaults live in the class.
3. When the command runs, `settings_of` merges what was given, and the function is called with the result.
4. A library function's error names arguments of Python, which are settings by their names; `in_options` names the
   options that a user can change.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from difffract_jax.config import Settings, SharedError, UserError, resolve
from difffract_jax.graphs.loras import texts_of
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.storage.remote.cache import local_file, refuse_remote
from difffract_jax.storage.remote.outputs import ask

S = TypeVar("S", bound=Settings)
Command = Callable[..., None]
GRAPH_HELP = "`.npz`, the reference's JSON, or circuit-tracer's and Neuronpedia's."
FirstGraph = Annotated[Path, typer.Argument(metavar="A", help=f"Graph file: {GRAPH_HELP}")]
SecondGraph = Annotated[Path, typer.Argument(metavar="B", help=f"The graph file to hold against it: {GRAPH_HELP}")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; options win over it.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any setting; wins over all.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and leave.")]
SHARED: dict[str, tuple[Any, Any]] = {
    "dry_run": (DryRun, False),
    "config": (Config, None),
    "sets": (Sets, None),
    "json": (Json, False),
}
"""Options that commands share, in the order of their help: type and default."""


class PlainUsage(TyperCommand):
    """A command whose usage line names required arguments as its help does, NAME, where Typer writes {NAME} or [NAME].

    To Typer the arguments of `command` are optional, since a file of settings may hold them; where there is no such
    file, they are not.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words that follow the command's name."""
        required = vars(self.callback).get("required_arguments", ())
        pieces = [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]
        return [piece[1:-1] if piece[1:-1] in required else piece for piece in pieces]


def plain_usage(app: typer.Typer) -> None:
    """Makes every command of an app, and of those below it, a `PlainUsage`."""
    for one in app.registered_commands:
        one.cls = PlainUsage
    for group in app.registered_groups:
        if group.typer_instance is not None:
            plain_usage(group.typer_instance)


def command(
    cls: type[S],
    *,
    arguments: Sequence[str] = (),
    layers: Sequence[str] = ("config", "sets"),
    without: Sequence[str] = (),
    before: Mapping[str, Sequence[str]] | None = None,
    instead: Mapping[str, Any] | None = None,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    fills: str | None = None,
    local: Sequence[str] = (),
    renamed: bool = True,
) -> Callable[[Command], Command]:
    """Makes a command for Typer of a function of settings.

    The function takes the resolved settings first, and what else it needs of the command line as keyword arguments:
    options of SHARED, options of its own, annotated for Typer, and `line`: all that was given, by name.

    Args:
        cls: settings of the command. Every field is an option, but for one that holds further settings.
        arguments: fields that are positional arguments, in their order.
        layers: which of `config` and `sets` the command takes.
        without: fields that the command line does not offer.
        before: field -> what help shows before it: inherited fields, or the function's own options. Inherited fields
            follow those of the class otherwise, and the function's own options follow all fields.
        instead: field -> annotation for Typer, where the option holds something else than the field.
        prepare: changes what was given, by name, before it is merged.
        fills: field of the directory, if any, that the command writes several files into; it has one writer at a time.
        local: fields whose paths must lie on this machine; all others may be remote.
        renamed: whether errors of the library shall name options; not where settings come from a file as a rule.

    Example:
        >>> from difffract_jax.config import PruneConfig
        >>> @command(PruneConfig, arguments=("graph",), layers=())
        ... def prune(settings: PruneConfig, *, json: bool) -> None: ...
        >>> list(inspect.signature(prune).parameters)
        ['graph', 'mode', 'node_threshold', 'edge_threshold', 'by_position', 'groups', 'out', 'json']
    """
    fields = [name for name in _own_first(cls) if name not in without]
    options: dict[str, tuple[Any, Any]] = {
        name: ((instead or {}).get(name) or _declared(cls, name, name in arguments), None) for name in fields
    }

    def decorate(function: Command) -> Command:
        parameters = dict(list(inspect.signature(function).parameters.items())[1:])
        wanted = {name: one for name, one in parameters.items() if name != "line"}
        special = {name: (one.annotation, one.default) for name, one in wanted.items() if name not in SHARED}
        shared = {name: declaration for name, declaration in SHARED.items() if name in wanted or name in layers}
        placed = _placed([name for name in (*fields, *special) if name not in arguments], before or {})
        declared = options | special | shared

        @functools.wraps(function)
        def run(**given: Any) -> None:
            further = {name: given[name] if name in wanted else dict(given) for name in parameters}
            settings = settings_of(cls, given if prepare is None else prepare(given))
            for name in local:
                for path in _paths(getattr(settings, name)):
                    refuse_remote(path, name.upper() if name in arguments else f"--{name}")
            filled = None if fills is None else getattr(settings, fills)
            if filled is not None and is_remote(filled):
                ask(filled)
            try:
                with nullcontext() if filled is None else sole_writer(filled):
                    function(settings, **further)
            except UserError as error:
                sentence = in_options(str(error), fields, arguments) if renamed else str(error)
                if sentence == str(error):
                    raise
                if isinstance(error, SharedError):
                    raise SharedError(sentence, speaks=error.speaks) from error
                raise UserError(sentence) from error

        _sign(run, {name: declared[name] for name in (*arguments, *placed, *shared)})
        if not layers:
            required = [name.upper() for name in arguments if cls.model_fields[name].is_required()]
            vars(run)["required_arguments"] = required
        return run

    return decorate


def _paths(value: Any) -> Sequence[Path]:
    """Returns the paths that a setting holds: none, one or several."""
    return () if value is None else (value,) if isinstance(value, Path) else value


def _own_first(cls: type[Settings]) -> list[str]:
    """Returns the fields of a class that an option can hold: its own, then those that it inherits."""
    inherited = {name for base in cls.__mro__[1:] if issubclass(base, Settings) for name in base.model_fields}
    names = [name for name, info in cls.model_fields.items() if not _is_settings(info.annotation)]
    return sorted(names, key=lambda name: name in inherited)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _declared(cls: type[Settings], name: str, positional: bool) -> Any:
    """Returns the type of a field, which may be left out, with its argument or option for Typer."""
    annotation = cls.model_fields[name].annotation
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    repeated = [get_args(one)[0] for one in alternatives if get_origin(one) is tuple]
    kinds = [list[repeated[0]]] if repeated else [one for one in alternatives if one is not type(None)]
    assert len(kinds) == 1, f"{cls.__name__}.{name} has no one type that an option could hold"
    made = argument if positional else option
    return Annotated[kinds[0] | None, made(cls, name)]


def _placed(names: Sequence[str], before: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns names in the order of help: those of `before` stand before their key."""
    moved = {name for group in before.values() for name in group}
    placed: list[str] = []
    for name in names:
        if name not in moved:
            placed += [*(one for one in before.get(name, ()) if one in names), name]
    assert sorted(placed) == sorted(names), f"options {set(names) ^ set(placed)} have no place"
    return placed


def _sign(function: Command, declared: Mapping[str, tuple[Any, Any]]) -> None:
    """Gives a function parameters that Typer reads, each with its annotation and default."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in declared.items()
    ]
    function.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    vars(function)["__signature__"] = inspect.Signature(parameters)


def field(cls: type[Settings], name: str) -> dict[str, Any]:
    """Returns the help of a setting, with its default, for `typer.Option` or `typer.Argument`."""
    info = cls.model_fields[name]
    silent = info.is_required() or info.default in (None, False, ())
    value = " ".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    # As code, since help is Markdown, to which */* is emphasis.
    default = "" if silent else f" Default: `{value}`."
    return {"help": " ".join((info.description or "").split()) + default, "show_default": False}


def option(cls: type[Settings], name: str) -> Any:
    """Returns the option `--name` of a setting."""
    return typer.Option(f"--{name.replace('_', '-')}", **field(cls, name))


def argument(cls: type[Settings], name: str) -> Any:
    """Returns the positional argument NAME of a setting."""
    return typer.Argument(metavar=name.upper(), **field(cls, name))


def check_out(path: Path, suffix: str) -> None:
    """Refuses an output that could not be written, before any work is done for it.

    Args:
        path: file or directory to write.
        suffix: that it must have; "" for a directory, which needs none.
    """
    if suffix and path.suffix != suffix:
        raise UserError(f"The output file must end in {suffix}, but got {path}.")
    if is_remote(path):
        return ask(path)
    if suffix and path.is_dir():
        raise UserError(f"{path} is a directory, but the output is one file; name another output.")
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} of the output file {path.name} does not exist; create it first.")


def sources(**loaded: Any) -> dict[str, str]:
    """Returns what a result records of the pipeline and the transcoders that it came from.

    Args:
        loaded: pipelines and sets of transcoders, by their role.

    Returns:
        The content hash of each by its role, and of those from the hub the repository, commit included, by
        ROLE_origin; of a model with LoRAs also these, and the content hash without them, as model_loras and model_base.
    """
    hashes = {role: one.source for role, one in loaded.items()}
    if "model" in loaded and loaded["model"].loras:
        hashes |= {"model_base": loaded["model"].base, "model_loras": texts_of(loaded["model"].loras)}
    return hashes | {f"{role}_origin": one.origin for role, one in loaded.items() if one.origin}


def in_options(sentence: str, fields: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """Names options instead of settings in an error of the library, where a word can be nothing else.

    That is a name with an underscore that is no part of a path, a value or a quotation, or any name at the beginning of
    a sentence on its range. Other names are English words too, and are left.

    Args:
        sentence: of the error.
        fields: settings of the command.
        arguments: those of them that are positional.

    Example:
        >>> in_options("max_nodes is 1, too few for 2 targets.", ["steps", "max_nodes"])
        '--max-nodes is 1, too few for 2 targets.'
        >>> in_options("steps must be at least 1, in steps.", ["steps", "max_nodes"])
        '--steps must be at least 1, in steps.'
    """

    def option_of(name: re.Match[str]) -> str:
        return name[0].upper() if name[0] in arguments else f"--{name[0].replace('_', '-')}"

    for name in fields:
        sentence = re.sub(rf"^{name}(?= must (?:lie in|be at least) )", option_of, sentence)
        if "_" in name:
            sentence = re.sub(rf"(?<![\w./`'\"=-]){name}(?![\w/`'\"=-]|\.\w)", option_of, sentence)
    return sentence


def check_used(settings: Settings, names: Sequence[str], why: str, *, arguments: Sequence[str] = ()) -> None:
    """Refuses settings that were given though nothing would read them.

    Args:
        settings: of the command.
        names: fields that nothing reads.
        why: the rest of the sentence, after the names.
        arguments: those of the fields that are positional.

    Raises:
        UserError: if any was given, by option or in a file.
    """
    given = [name for name in names if name in settings.model_fields_set and getattr(settings, name) is not None]
    if given:
        shown = [name.upper() if name in arguments else f"--{name.replace('_', '-')}" for name in given]
        raise UserError(f"{' and '.join(shown)} {'does' if len(shown) == 1 else 'do'} nothing {why}")


def settings_of(cls: type[S], given: Mapping[str, Any]) -> S:
    """Resolves a command's settings from its arguments; a missing one is a usage error unless a file may hold it.

    Args:
        cls: settings of the command.
        given: what the command line holds, by name of field or option; None, and an option given no time, are left out.
    """
    options = {name: value for name, value in given.items() if name in cls.model_fields and value != []}
    file, sets = given.get("config"), given.get("sets") or ()
    file = None if file is None else local_file(file)
    if not file and not sets:
        missing = [name for name, info in cls.model_fields.items() if info.is_required() and options.get(name) is None]
        if missing:
            raise typer.BadParameter(f"{', '.join(name.upper() for name in missing)} missing; see --help.")
    return resolve(cls, options, file=file, sets=sets)
