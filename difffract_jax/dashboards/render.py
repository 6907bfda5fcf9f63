"""Reports as one HTML file: templates filled in, text escaped, pictures inside the file, nothing fetched.

1. A report is a title, a summary, and sections of paragraphs, pictures, tables and features.
2. `render` fills in the template; `write_report` writes it, whole or not at all.

The page follows the reader's light or dark setting. Pictures have a word for those who cannot see them, and a caption.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from difffract_jax.dashboards.pictures import enlarged, heat_over, png_address
from difffract_jax.dashboards.records import Card
from difffract_jax.storage.files import atomic_file

TEMPLATES = Path(__file__).parent / "templates"
LANES = 215
"""Width of a column of the circuit's drawing, in its own units."""


class Picture(NamedTuple):
    """A picture with its words.

    Attributes:
        address: `data:` address.
        caption: what it shows.
        small: whether it is one of several in a row.
    """

    address: str
    caption: str
    small: bool = False


class Section(NamedTuple):
    """A part of a report.

    Attributes:
        title: heading.
        words: paragraphs.
        pictures: shown in a row where they fit.
        tables: rows of JSON values, by title.
        cards: features, see `feature_card`.
        drawing: the circuit, see `drawing`; None for none.
    """

    title: str
    words: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = {}
    cards: Sequence[Mapping[str, Any]] = ()
    drawing: Mapping[str, Any] | None = None


def render(title: str, summary: Sequence[str], sections: Sequence[Section], record: str) -> str:
    """Returns a report as HTML.

    Args:
        title: of the page.
        summary: paragraphs at its head.
        sections: its parts.
        record: how it was made, as text.
    """
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "code": _code}
    template = environment.get_template("report.html.j2")
    return template.render(title=title, summary=summary, sections=sections, record=record)


def write_report(path: Path, page: str) -> None:
    """Writes a page; it appears only when it is complete."""
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def feature_card(card: Card, image: Any) -> dict[str, Any]:
    """Returns a feature as the template takes it.

    Args:
        card: from `records.card`.
        image: pixels of the run's image, [H W rgb] u8, for heat.
    """
    heat = None if card.heat is None else png_address(enlarged(heat_over(image, card.heat)))
    largest = max((value for _, value in card.words), default=0.0)
    words = [(word, round(value / largest, 3) if largest > 0 else 0.0, value) for word, value in card.words]
    return card._asdict() | {"heat": heat, "words": words}


def drawing(
    names: Sequence[str],
    detects: Sequence[str],
    levels: Sequence[int],
    heads: Sequence[str],
    edges: Sequence[tuple[int, int, float]],
) -> dict[str, Any]:
    """Returns a circuit laid out in columns of blocks, as the template draws it.

    Args:
        names: of the nodes.
        detects: what they stand for.
        levels: column of each, from 0.
        heads: heading of each column.
        edges: from, to, share of the target's edges with its sign.
    """
    height: dict[int, int] = {}
    nodes = []
    for name, detail, level in zip(names, detects, levels, strict=True):
        row = height.get(level, 0)
        height[level] = row + 1
        nodes.append({"name": name, "detects": detail, "x": LANES * level + 8, "y": 44 * row + 30})
    lines = [
        {"a": nodes[a], "b": nodes[b], "width": round(0.6 + 9 * abs(share), 2), "negative": share < 0, "share": share}
        for a, b, share in edges
    ]
    size = {"width": LANES * len(heads), "height": 44 * max(height.values(), default=0) + 40}
    return size | {"nodes": nodes, "lines": lines, "heads": [(LANES * i + 8, head) for i, head in enumerate(heads)]}


def _code(text: str) -> list[tuple[str, bool]]:
    """Parts a paragraph at its backticks: each part, and whether it is code."""
    return [(part, bool(number % 2)) for number, part in enumerate(text.split("`"))]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
