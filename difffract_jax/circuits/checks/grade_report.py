"""A graph's grade as tables, words and a figure (NumPy and matplotlib), of what `grading.grade` found."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from difffract_jax.graphs.grade import LARGE, RULE, Grade, happened, word, words
from difffract_jax.graphs.json_values import to_json_values

COLOURS = {"full": "#0072b2", "other": "#d55e00", "control": "#7a7a7a"}
NAMES = {"full": "in the graph's own run", "other": "with other seeds", "control": "random features instead"}
PARTS = (
    ("alone", "single edits, doses -1 to 1"),
    ("other_seeds", "single edits, doses -1 and 1, with other seeds"),
    ("large_doses", "single edits, doses -2 and 2"),
    ("small_groups", f"groups below {LARGE} features"),
    ("large_groups", f"groups of {LARGE} features and more"),
)


def grade_values(grade: Grade, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a grade and what it comes from as JSON values.

    Args:
        grade: of the graph.
        found: what edits did, from `grading.grade`.
    """
    told = {"words": words(grade), "rule": RULE, "grade": to_json_values(grade)}
    return told | {"parts": parts(grade), "facts": facts(grade)} | dict(found)


def parts(grade: Grade) -> list[dict[str, Any]]:
    """Returns the table of a grade: what was tried, the share that works, and its word."""
    rows = []
    for name, what in PARTS:
        value = getattr(grade, name)
        rows.append({"edits": what, "share that works": value, "predicted": word(value)})
    return rows


def facts(grade: Grade) -> list[dict[str, Any]]:
    """Returns what a grade says besides, a row each."""
    return [
        {"what": "the grade's number, 0 to 1", "figure": "not tried" if grade.number is None else grade.number},
        {"what": "limit of reading, share of the target", "figure": grade.limit},
        {"what": "dose from which activations are not the run's own", "figure": grade.dose_limit},
        {"what": "recovered by the pruned circuit alone, in the real model", "figure": grade.recovered},
        {"what": "lost without it", "figure": grade.lost},
        {"what": "largest change that dose 0 makes, share of the target", "figure": grade.no_op},
    ]


def grade_figure(found: Mapping[str, Any]) -> Figure:
    """Returns a figure of edits, what the graph predicts against what happened; and by size and dose what works.

    Args:
        found: `edits`, from `grading.grade`.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in found["edits"] if abs(row["dose"]) <= 1]
    for name in ("control", "other", "full"):
        pairs = [(row["predicted"], one) for row in rows for one in happened(row, name)]
        x, y = np.array(pairs).reshape(-1, 2).T
        left.plot(x, y, "o", ms=3.5, alpha=0.7, color=COLOURS[name], label=NAMES[name])
    largest = float(np.max([abs(row["predicted"]) for row in rows], initial=0.02))
    line = np.array([-largest, largest])
    left.plot(line, line, lw=0.8, color="#7a7a7a")
    left.fill_between(line, line / 2, 2 * line, color="#0072b2", alpha=0.08, lw=0, label="the edit works")
    left.set_xscale("symlog", linthresh=0.02)
    left.set_yscale("symlog", linthresh=0.02)
    left.set(xlabel="change that the graph predicts, share of the target", ylabel="change in the real model")
    left.legend(fontsize=8, loc="upper left")
    _by_size(right, rows)
    return figure


def _by_size(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    """Draws what predictions miss for growing groups: the graph's, and the frozen map's readings."""
    sizes = sorted({row["size"] for row in rows})
    for name, told, colour in (
        ("predicted", "the graph", "#0072b2"),
        ("direct", "direct", "#d55e00"),
        ("propagated", "propagated", "#009e73"),
        ("live", "live", "#cc79a7"),
    ):
        errors = [
            [abs(row[name] - row["full"]) / abs(row["full"]) for row in rows if row["size"] == size and row["full"]]
            for size in sizes
        ]
        known = [(size, float(np.median(one))) for size, one in zip(sizes, errors, strict=True) if one]
        axes.plot(*np.array(known).reshape(-1, 2).T, marker="o", ms=3.5, color=colour, label=told)
    axes.axhline(1, lw=0.6, color="#7a7a7a")
    axes.set(xscale="log", yscale="log", xlabel="features edited at once, doses -1 to 1")
    axes.set_ylabel("median error over the change itself")
    axes.legend(fontsize=8)
