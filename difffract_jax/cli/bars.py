"""Progress of commands, as bars on stderr.

1. `progress` shows one bar while a command works; it hands out a callback `advance(done, total)`. While XLA compiles
   the bar says so. `byte_progress` counts bytes.
2. `stages` shows one bar per stage, and `training_progress` one that tells how training goes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int, int], None]


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """Shows a progress bar on stderr for as long as the context lasts."""
    console = Console(stderr=True)
    # Where there is no terminal, a bar would only leave an empty line beside what else is told.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        description = escape(description)
        task = bar.add_task(description, total=None)
        with _told_of_compiling(lambda text: bar.update(task, description=f"{description}{text}")):
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def byte_progress(description: str) -> Iterator[Advance]:
    """Shows a bar on stderr that counts bytes, with their rate and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn(escape(description)), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _told_of_compiling(show: Callable[[str], None]) -> Iterator[None]:
    """Calls `show` with " (compiling)" when XLA begins to compile or to read a program, and with "" when it ends."""
    import jax.monitoring

    # JAX tells when a stage ends: when a program has been lowered, its compilation begins.
    after = {"jaxpr_to_mlir_module_duration": " (compiling)", "backend_compile_duration": ""}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        text = after.get(event.rsplit("/", 1)[-1])
        if text is not None:
            show(text)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextmanager
def stages() -> Iterator[Callable[..., None]]:
    """Shows one bar per stage on stderr, with the time left, and yields `advance(stage, done, total, loss)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int, loss: float = math.nan) -> None:
            note = "" if math.isnan(loss) else f"loss {loss:.4f}"
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note=note)
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield advance


@contextmanager
def training_progress(
    *, shown: bool = True
) -> Iterator[tuple[Callable[[int, int, Mapping[str, float]], None], Callable[[str], None]]]:
    """Shows on stderr how training goes: a bar with time left, rows per second, FVU, L0 and share of dead features.

    Hands out `advance(done, total, values)` and `note(sentence)`, which prints above the bar.

    Args:
        shown: whether to show anything; of several processes one does.
    """
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[values]}"))
    console = Console(stderr=True, quiet=not shown)
    # As in `progress`: a bar that nobody sees would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Training", total=None, values="")

        def advance(done: int, total: int, values: Mapping[str, float]) -> None:
            shown = (
                f"{values['rows_per_second']:,.0f} rows/s  FVU {values['fvu']:.3f}  L0 {values['l0']:.1f}  "
                f"dead {values['dead']:.1%}"
            )
            bar.update(task, completed=done, total=total, values=shown)

        yield (
            advance,
            lambda sentence: bar.console.print(
                f"Note: {sentence}", soft_wrap=True, highlight=False, markup=False, emoji=False
            ),
        )
