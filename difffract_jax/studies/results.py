"""What a study ends in: tables, figures and raw numbers, written to a directory, each with how it was made."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from difffract_jax.organism.evaluate import summary
from difffract_jax.storage.files import atomic_file, make_directory

Advance = Callable[[str], Callable[[int, int], None]]
"""Stage of a study -> what to call with (done, in all) as it goes on."""
MOST_ROWS = 24
"""Of a table in a notebook; longer ones are left to the report."""


def quiet(stage: str) -> Callable[[int, int], None]:
    """Shows no progress: an `Advance` for scripts and notebooks."""
    return lambda done, total: None


class Result(NamedTuple):
    """Findings of a study; in a notebook it shows itself as verdict and tables.

    Attributes:
        name: of the study.
        verdict: what was found, in a sentence or two with its numbers.
        tables: title -> rows.
        figures: name -> figure.
        raw: everything measured, as JSON values.
    """

    name: str
    verdict: str
    tables: dict[str, list[dict[str, Any]]]
    figures: dict[str, Figure]
    raw: dict[str, Any]

    def __repr__(self) -> str:
        return f"Result({self.name!r}: {self.verdict})"

    def picture(self, name: str | None = None) -> Image.Image:
        """Returns a figure as an image, which notebooks show.

        Args:
            name: of the figure; the first if left out.
        """
        kept = io.BytesIO()
        self.figures[name or next(iter(self.figures))].savefig(kept, dpi=100, format="png")
        return Image.open(kept)

    def _repr_markdown_(self) -> str:
        short = {title: rows for title, rows in self.tables.items() if len(rows) <= MOST_ROWS}
        long = [f"`{title}` ({len(rows)} rows)" for title, rows in self.tables.items() if title not in short]
        rest = f"\nIn `tables`, too: {', '.join(long)}.\n" if long else ""
        return f"**{self.verdict}**\n\n{summary(short)}{rest}"


def write_result(result: Result, out: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Writes a study's report, figures and raw numbers.

    Args:
        result: of the study.
        out: directory; created if need be.
        record: how it was made.

    Returns:
        What was written -> path.
    """
    make_directory(out)
    files = {"report": out / f"{result.name}.md", "raw": out / f"{result.name}.json"}
    files |= {f"figure {name}": out / f"{name}.png" for name in result.figures}
    for name, figure in result.figures.items():
        with atomic_file(files[f"figure {name}"]) as partial:
            figure.savefig(partial, dpi=150, format="png")
    pictures = [f"![{name}]({name}.png)\n" for name in result.figures]
    lines = [f"# {result.name}", "", result.verdict, "", *pictures, summary(result.tables)]
    lines += ["```json", json.dumps(dict(record), indent=2), "```", ""]
    with atomic_file(files["report"]) as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    with atomic_file(files["raw"]) as partial:
        partial.write_text(
            json.dumps({**record, "verdict": result.verdict, **result.raw}, indent=1) + "\n", encoding="utf-8"
        )
    return {name: str(path) for name, path in files.items()}
