"""The `difffract` command: settings in, artefacts and a short table out.

1. `main` runs one command and turns its end into an exit status: 0 done, 1 failed with one sentence, 2 wrong usage,
   130 interrupted. `--debug`, anywhere on the line, shows the traceback instead of the sentence;
   `--no-compile-cache` compiles every program anew, `--no-preflight` tries what by count does not fit.
2. A command merges its options into settings: defaults, then `--config FILE`, then options, then `--set`.
3. What can be refused cheaply is refused before weights are read; the work itself is the package's own functions.
4. Progress goes to stderr, results to stdout: a table for people, one JSON object with `--json` for machines.

Functions import what they use when they run, and only here, so that `difffract --help` answers without loading JAX.
A command's module is imported when it is named (`commands`).
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, NoReturn

import typer

from difffract_jax import __version__
from difffract_jax.cli import preflight
from difffract_jax.cli.commands import STYLE, WITHOUT_JAX, Commands
from difffract_jax.cli.failures import sentence_for, told_when_terminated
from difffract_jax.cli.garbage import seldom
from difffract_jax.config import SharedError, sentence_of
from difffract_jax.memory import allow, share_memory
from difffract_jax.storage.compile_cache import enable_compile_cache
from difffract_jax.storage.remote.addresses import spelled

ANYWHERE = ("--debug", "--no-compile-cache", preflight.OFF)
app = typer.Typer(name="difffract", cls=Commands, pretty_exceptions_enable=False, **STYLE)


class _Notes(logging.Handler):
    """Shows on stderr what is noted in passing, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one note."""
        sys.stderr.write(f"Note: {spelled(record.getMessage())}\n")


def main() -> None:
    """Runs the command line; the entry point `difffract`."""
    with _showing_notes():
        _run()


@contextmanager
def _showing_notes() -> Iterator[None]:
    """Shows what the packages note, once: other libraries give the root logger a handler that would tell it again."""
    loggers = [logging.getLogger(package) for package in ("converters", "difffract_jax")]
    for notes in loggers:
        notes.handlers, notes.propagate = [_Notes()], False
        notes.setLevel(logging.INFO)
    try:
        yield
    finally:
        for notes in loggers:
            notes.propagate = True


def _run() -> None:
    # Typer takes the options of `_root` before the command's name alone.
    first = [argument for argument in sys.argv[1:] if argument in ANYWHERE]
    others = [argument for argument in sys.argv[1:] if argument not in ANYWHERE]
    compiles = _compiles(others)
    preflight.switched_off = preflight.OFF in first
    allow(None)
    if compiles:
        share_memory()
    if "--no-compile-cache" not in first and compiles:
        enable_compile_cache()
    options = _options_of(others) if compiles else ()
    try:
        with told_when_terminated(options, others) if compiles else nullcontext(), seldom(next(iter(others), "")):
            app(first + others, prog_name="difffract")
    except (ValueError, OSError, RuntimeError, AssertionError, MemoryError, ImportError) as error:
        if "--debug" in first:
            raise
        sentence = sentence_for(error, options, others)
        if sentence is None and isinstance(error, ValueError | OSError):
            sentence = sentence_of(error)
        if sentence is None:
            raise
        if isinstance(error, SharedError) and not error.speaks:
            sys.exit(1)
        _fail(sentence)


def _options_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the options of the command that a command line names; none if it names none."""
    command: Any = typer.main.get_command(app)
    for name in arguments:
        if name not in getattr(command, "commands", {}):
            break
        command = command.commands[name]
    return tuple(one.name for one in getattr(command, "params", ()))


def _compiles(arguments: Sequence[str]) -> bool:
    """Says whether a command line may compile programs: it names a command, not one of saved graphs, and no help."""
    command = next(iter(arguments), "-")
    return not (command.startswith("-") or command in WITHOUT_JAX or {"-h", "--help"} & {*arguments})


def _fail(sentence: str) -> NoReturn:
    sys.stderr.write(f"Error: {spelled(sentence)}\n")
    sys.exit(1)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"difffract_jax {__version__}")
        raise typer.Exit()
    return wanted


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a failure's traceback; anywhere on the line.")]
NoCompileCache = Annotated[
    bool,
    typer.Option(
        "--no-compile-cache", help="Neither use nor keep compiled programs (~/.cache/difffract); anywhere on the line."
    ),
]
NoPreflight = Annotated[
    bool,
    typer.Option(preflight.OFF, help="Load even what by count does not fit the memory; anywhere on the line."),
]


@app.callback()
def _root(
    version: Version = False,
    debug: Debug = False,
    no_compile_cache: NoCompileCache = False,
    no_preflight: NoPreflight = False,
) -> None:
    """Trace circuits in FLUX diffusion transformers, in JAX.

    Start with `difffract demo`. Exit status: 0 done, 1 failed with one sentence on stderr, 2 wrong usage.
    """
