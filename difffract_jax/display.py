"""How objects show themselves, at a prompt as text and in a notebook as HTML: few lines, whatever they hold.

1. `text_of` and `html_of` lay out a title and facts, one a line.
2. `text_table` and `html_table` lay out rows; past `MOST` rows they say how many more there are.
3. `hash_text`, `size_text`, `spans`, `one_line`, `record_text` and `arrays_text` shorten what is long.
4. `page_of` makes a page of an object; what makes pages lies far above this module, and is imported when it is called.

HTML is escaped here, once: prompts and names may hold anything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from importlib import import_module
from typing import Any

MOST = 10
"""Rows of a table that are shown."""
WIDTH = 88
"""Characters of a fact that are shown."""
FIELD = 40
"""Characters of a table's cell, or of a field of a record, that are shown."""
PAGES = {"graph": ("difffract_jax.dashboards.notebook", "show_graph")}
"""What makes the page of an object, by kind of object: module and function."""


def page_of(kind: str, shown: Any, *arguments: Any, **options: Any) -> Any:
    """Returns the page of an object, which a notebook shows.

    Args:
        kind: key of `PAGES`.
        shown: the object.
        arguments: of the function that makes the page.
        options: the same.
    """
    module, name = PAGES[kind]
    return getattr(import_module(module), name)(shown, *arguments, **options)


def text_of(title: str, facts: Mapping[str, object]) -> str:
    """Returns a title and facts as text, a line each; facts that are None or empty are left out."""
    stated = _stated(facts)
    width = max(map(len, stated), default=0)
    return "\n".join([one_line(title), *(f"  {name:<{width}}  {value}" for name, value in stated.items())])


def html_of(title: str, facts: Mapping[str, object]) -> str:
    """Returns a title and facts as an HTML table, escaped; facts that are None or empty are left out."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in _stated(facts).items()
    )
    return f"<table><caption>{escape(one_line(title))}</caption>{rows}</table>"


def _stated(facts: Mapping[str, object]) -> dict[str, str]:
    return {name: one_line(str(value)) for name, value in facts.items() if value is not None and str(value) != ""}


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns rows as aligned text under a title and the columns' names."""
    cells = [[one_line(str(name), FIELD) for name in columns], *_cells(rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([one_line(title), *lines, *_more(rows)])


def html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns rows as an HTML table, escaped."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _cells(rows))
    caption = escape(" ".join([one_line(title), *_more(rows)]))
    return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


def _cells(rows: Sequence[Sequence[object]]) -> list[list[str]]:
    return [[one_line(number_text(cell), FIELD) for cell in row] for row in rows[:MOST]]


def _more(rows: Sequence[Sequence[object]]) -> list[str]:
    return [f"... and {len(rows) - MOST} more"] if len(rows) > MOST else []


def number_text(value: object) -> str:
    """Returns a float with four digits, None as a dash, anything else as it is."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def one_line(text: str, width: int = WIDTH) -> str:
    """Returns a text on one line, cut where it is longer than `width`.

    Example:
        >>> one_line("a  red\\ncircle", 8)
        'a red...'
    """
    joined = " ".join(text.split())
    return joined if len(joined) <= width else joined[: width - 3].rstrip() + "..."


def hash_text(value: str | None) -> str:
    """Returns the first characters of a content hash; "unknown" without one."""
    if not value:
        return "unknown"
    return value if len(value) <= 12 else f"{value[:12]}..."


def size_text(size: int) -> str:
    """Returns a number of bytes in the unit that suits it.

    Example:
        >>> size_text(512), size_text(5_400_000)
        ('512 B', '5.1 MiB')
    """
    unit = max(0, min(4, (max(size, 1).bit_length() - 1) // 10))
    return f"{size} B" if unit == 0 else f"{size / 2 ** (10 * unit):.1f} {('KiB', 'MiB', 'GiB', 'TiB')[unit - 1]}"


def spans(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as spans.

    Example:
        >>> spans((0, 1, 2, 5))
        '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def record_text(self: Any) -> str:
    """Returns a dataclass on one line, with long values cut and long sequences counted; for use as `__repr__`."""
    stated = (f"{one.name}={_value(getattr(self, one.name))}" for one in fields(self))
    return f"{type(self).__name__}({', '.join(stated)})"


def _value(value: object) -> str:
    text = repr(value)
    if isinstance(value, tuple | list | dict) and len(text) > FIELD:
        return f"<{len(value)} entries>"
    return one_line(text, FIELD)


def arrays_text(arrays: Iterable[Any]) -> str:
    """Returns what some arrays come to: how many numbers, of which types, and how many bytes.

    Args:
        arrays: with `size`, `dtype` and `nbytes`; others are passed over.
    """
    known = [array for array in arrays if all(hasattr(array, name) for name in ("size", "dtype", "nbytes"))]
    count: Counter[str] = Counter()
    for array in known:
        count[str(array.dtype)] += int(array.size)
    types = ", ".join(f"{number:,} {name}" for name, number in count.most_common(3)) or "no numbers"
    return f"{types}; {size_text(sum(int(array.nbytes) for array in known))}"
