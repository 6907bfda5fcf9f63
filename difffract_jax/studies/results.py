"""What a study ends in: tables, figures and raw numbers, written to a directory, each with how it was made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from difffract_jax.checkpoint import atomic_file
from difffract_jax.organism.evaluate import summary


class Result(NamedTuple):
    """Findings of a study.

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


def write_result(result: Result, out: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Writes a study's report, figures and raw numbers.

    Args:
        result: of the study.
        out: directory; created if need be.
        record: how it was made.

    Returns:
        What was written -> path.
    """
    out.mkdir(exist_ok=True)
    files = {"report": out / f"{result.name}.md", "raw": out / f"{result.name}.json"}
    files |= {f"figure {name}": out / f"{name}.png" for name in result.figures}
    for name, figure in result.figures.items():
        with atomic_file(files[f"figure {name}"]) as partial:
            figure.savefig(partial, dpi=150, format="png")
    pictures = [f"![{name}]({name}.png)\n" for name in result.figures]
    lines = [f"# {result.name}", "", result.verdict, "", *pictures, summary(result.tables)]
    lines += ["```json", json.dumps(dict(record), indent=2), "```", ""]
    with atomic_file(files["report"]) as partial:
        partial.write_text("\n".join(lines))
    with atomic_file(files["raw"]) as partial:
        partial.write_text(json.dumps({**record, "verdict": result.verdict, **result.raw}, indent=1) + "\n")
    return {name: str(path) for name, path in files.items()}
