"""What a command prints on stdout, for people and for machines, and which files it tells that it has replaced.

1. `emit` prints a result, a dictionary of JSON values, as a table of its plain values and one table per list of rows.
2. A terminal that is too narrow for all columns of a list gets several tables, each with the first column. A file or
   a pipe, which has no width, gets lines as long as they come.
3. Commands replace files that are there already, and `replacing` says so.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from difffract_jax.storage.remote.addresses import is_remote, spelled
from difffract_jax.storage.remote.outputs import holds_files

EXPLAINED = {
    "rest": "features that were not expanded, as one node a site and position",
    "pinned": "the kept features alone, all others counted as error",
    "frozen pooled path": "what the prompt's one vector adds, held fixed, without nodes unless --pooled explained",
}
"""Words of tables that a newcomer asks for; the others are in docs/glossary.md."""
LONG = 10_000
"""Width in characters of what has none."""
FOLDED = 24
"""Characters up to which a cell is not folded."""
AROUND = 3
"""Characters that a table adds to each column."""


def emit(result: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Prints a result on stdout, for machines as one JSON object, for people as tables."""
    if as_json:
        sys.stdout.write(spelled(json.dumps(result, indent=2)) + "\n")
        return
    console = Console(soft_wrap=True, markup=False, emoji=False)  # names and prompts may hold [brackets] and :colons:
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LONG
    plain = Table(show_header=False, box=None, pad_edge=False)
    plain.add_column()
    plain.add_column(overflow="fold")  # an address or a path is wrapped, not cut
    tables = []
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables += _rows(name, value, console.width)
        else:
            plain.add_row(name, _text(value))
    if console.width < LONG:
        console.print(plain, *tables, *_explained(result), sep="\n")
        return
    with console.capture() as printed:
        console.print(plain, *tables, *_explained(result), sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def _explained(result: Mapping[str, Any]) -> list[str]:
    """Returns a line for each word of `EXPLAINED` that a result shows as a name or in its rows."""
    shown = [*result]
    for value in result.values():
        if isinstance(value, Mapping):
            shown += value
        elif isinstance(value, list):
            shown += [str(next(iter(row.values()))) for row in value if isinstance(row, Mapping)]
    text = "\n".join(shown)
    return [f"{word}: {meaning}" for word, meaning in EXPLAINED.items() if re.search(rf"\b{word}\b", text)]


@contextmanager
def replacing(*targets: Path, option: str = "--out") -> Iterator[None]:
    """Tells on stderr, when the block ends well, which files it replaced that were there before.

    Args:
        targets: files that the block writes, or directories that it writes files into.
        option: that names them.
    """
    before = {path: _stamp(path) for target in targets for path in _files(target)}
    remote = [spelled(target) for target in targets if is_remote(target) and holds_files(target)]
    yield
    replaced = [str(path) for path, stamp in before.items() if path.is_file() and _stamp(path) != stamp] + remote
    if replaced:
        verb = "was" if len(replaced) == 1 else "were"
        sys.stderr.write(f"Note: {', '.join(replaced)} existed and {verb} replaced; {option} names another output.\n")


def _files(target: Path) -> list[Path]:
    if target.is_dir():
        return sorted(path for path in target.iterdir() if path.is_file())
    return [target] if target.is_file() else []


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _rows(title: str, rows: list[Mapping[str, Any]], width: int) -> list[Table]:
    """Returns a table of rows, or as many as it takes for its columns to be readable in a width of characters."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_text(row.get(name)) for row in rows] for name in names}
    narrowest = {name: min(FOLDED, max(map(len, (name, *texts)))) for name, texts in columns.items()}
    tables = []
    for part in _parts(narrowest, width):
        table = Table(title=title if not tables else f"{title}, further columns", title_justify="left")
        for name in part:
            table.add_column(name, overflow="fold", min_width=narrowest[name])  # a mesh is wrapped, not cut
        for texts in zip(*(columns[name] for name in part), strict=True):
            table.add_row(*texts)
        tables.append(table)
    return tables


def _parts(needed: Mapping[str, int], width: int) -> list[list[str]]:
    """Divides columns into tables of a width; the first column, which names the rows, comes in each."""
    first, *others = needed
    parts, used = [[first]], needed[first] + AROUND + 1
    for name in others:
        used += needed[name] + AROUND
        if used > width and len(parts[-1]) > 1:
            parts.append([first])
            used = needed[first] + needed[name] + 2 * AROUND + 1
        parts[-1].append(name)
    return parts


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list):
        return json.dumps(value)
    return "-" if value is None else spelled(str(value))
