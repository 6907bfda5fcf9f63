"""The report of a validation: a page of Markdown, two figures, and every number as JSON.

report.md  validation.json  perturbation.png  completeness.png, and grade.png where the graph was graded

The figures are functions of the numbers alone (NumPy and matplotlib), for other reports to show.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from difffract_jax.circuits.checks.grade_report import grade_figure
from difffract_jax.circuits.checks.summaries import EVERY, at_size, own_figures, words
from difffract_jax.circuits.checks.validation import failed_checks
from difffract_jax.storage.files import atomic_file, make_directory

COLOURS = {"influence": "#0072b2", "largest value": "#d55e00", "random": "#7a7a7a"}
NAMES = {"influence": "the graph's, by influence", "largest value": "by largest value", "random": "at random"}


def write_validation(found: Mapping[str, Any], out: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Writes the report.

    Args:
        found: from `validation.validate`.
        out: directory to write into; it is made if it does not exist.
        record: how it was made.

    Returns:
        Paths by name.
    """
    make_directory(out)
    files = {name: out / name for name in ("report.md", "validation.json", "perturbation.png", "completeness.png")}
    figures = [("perturbation.png", perturbation_figure(found)), ("completeness.png", curves_figure(found))]
    if "grade" in found:
        files["grade.png"] = out / "grade.png"
        figures.append(("grade.png", grade_figure(found["grade"])))
    for name, figure in figures:
        with atomic_file(files[name]) as partial:
            figure.savefig(partial, dpi=120, format="png")
    with atomic_file(files["validation.json"]) as partial:
        partial.write_text(json.dumps({"provenance": record, **found}, indent=1) + "\n", encoding="utf-8")
    with atomic_file(files["report.md"]) as partial:
        partial.write_text(page(found, record), encoding="utf-8")
    return {name: str(path) for name, path in files.items()}


def page(found: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Returns the report as Markdown.

    Args:
        found: from `validation.validate`.
        record: how it was made.
    """
    tests, perturbed, complete = found["exactness"], found["perturbation"], found["completeness"]
    medians = [{"prediction": name} | told for name, told in perturbed["median"].items()]
    parts = [
        "# A graph held against its model",
        failed_checks(dict(found)) or "Every bar is held.",
        "## The target itself",
        markdown_table(own_figures(found)),
        *_graded(found),
        "## Exactness",
        words("exactness", found),
        markdown_table(
            [{key: row[key] for key in ("check", "worst", "median", "checked", "of", "bar")} for row in tests]
        ),
        "## Perturbation",
        words("perturbation", found),
        markdown_table(perturbed["rows"]),
        "Medians of the correlations of single nodes downstream, over the features taken off:",
        markdown_table(medians),
        "![Changes against predictions](perturbation.png)",
        "## Completeness and minimality",
        words("completeness", found),
        markdown_table(at_size(found, complete["pruned"])),
        "![What circuits of growing size recover and lose](completeness.png)",
        "## How it was made",
        f"```json\n{json.dumps(record, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _graded(found: Mapping[str, Any]) -> list[str]:
    """Returns the part of the page on the grade; nothing if there is none."""
    graded = found.get("grade")
    if graded is None:
        return []
    return [
        "## The grade",
        f"{graded['words']} {graded['rule']}",
        markdown_table(graded["parts"]),
        markdown_table(graded["facts"]),
        "What predictions miss of the change in the real model, over the change itself, in the median:",
        markdown_table(graded["errors"]),
        "![Edits, as the graph predicts them and as they turned out](grade.png)",
    ]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of JSON values as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def perturbation_figure(found: Mapping[str, Any]) -> Figure:
    """Returns a figure of changes in the real model against predictions, a point per pair: the target's, then all.

    Args:
        found: from `validation.validate`.
    """
    figure, pairs = Figure(figsize=(12.5, 4)), found["perturbation"]["pairs"]
    target, left, right = figure.subplots(1, 3)
    _arrange(figure, (1, 3), (0.75, 0.25, 0.5, 0.5), 0.8)
    measured, own = np.array(pairs["measured"]), np.array(pairs["own"], bool)
    influence, change = np.array(pairs["influence"]), np.array(pairs["change"])
    target.plot(change[own], measured[own], "D", ms=4, color=COLOURS["largest value"])
    target.axline((0, 0), slope=1, lw=0.8, color="#7a7a7a")
    target.locator_params(nbins=5)
    target.set(title=_title(found, "change", own=True))
    shown = (influence > 0) & (measured != 0)
    left.loglog(influence[shown], np.abs(measured[shown]), ".", ms=3, alpha=0.4, color=COLOURS["influence"])
    left.set(xlabel="influence", ylabel="|change| in the real model", title=_title(found, "influence"))
    for axis, limits in ((left.xaxis, left.get_xlim()), (left.yaxis, left.get_ylim())):
        if limits[1] < 100 * limits[0]:
            axis.set_major_locator(LogLocator(subs=(1, 3)))
    right.plot(change, measured, ".", ms=3, alpha=0.4, color=COLOURS["influence"])
    right.axline((0, 0), slope=1, lw=0.8, color="#7a7a7a")
    largest = float(np.max(np.abs(np.concatenate([change, measured])), initial=1e-12))
    right.set_xscale("symlog", linthresh=largest / 100)
    right.set_yscale("symlog", linthresh=largest / 100)
    right.set_xticks(_ticks(largest))
    right.set_yticks(_ticks(largest))
    right.set(title=_title(found, "change"))
    for axes in (target, right):
        axes.set(xlabel="change that the graph predicts", ylabel="change in the real model")
    for axes in (target, left, right):
        _spare(axes)
    return figure


def _spare(axes: Any) -> None:
    """Leaves out what takes matplotlib longest to draw, and says nothing: small ticks, powers as formulas, and the
    search for a place for the title that no tick would reach anyway."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        if axis.get_scale() != "linear":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(axes.get_title(), y=1.0)


def _arrange(figure: Figure, panels: tuple[int, int], margins: tuple[float, float, float, float], gap: float) -> None:
    """Places a grid of panels by inches; to have matplotlib measure the margins takes as long as drawing all.

    Args:
        figure: whose panels these are.
        panels: rows and columns.
        margins: left, right, bottom and top.
        gap: between panels.
    """
    (width, height), (left, right, bottom, top) = figure.get_size_inches(), margins
    rows, columns = panels
    panel_width = (width - left - right - (columns - 1) * gap) / columns
    panel_height = (height - bottom - top - (rows - 1) * gap) / rows
    edges = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
    figure.subplots_adjust(**edges, wspace=gap / panel_width, hspace=gap / panel_height)


def _ticks(largest: float) -> list[float]:
    """Returns powers of ten on both sides of 0, few enough to read."""
    top = 10.0 ** np.floor(np.log10(largest))
    return [-top, -top / 10, 0.0, top / 10, top]


def _title(found: Mapping[str, Any], prediction: str, *, own: bool = False) -> str:
    """Returns the correlations that a panel shows, of the targets or of every node downstream."""
    rows = [row for row in found["perturbation"]["rows"] if row["prediction"] == prediction]
    mine = [row for row in rows if (row["of"] != EVERY) == own]
    told = ", ".join(_cell(row["spearman"]) for row in mine)
    return f"{'The target itself' if own else 'Every node downstream'}\nSpearman {told}, {mine[0]['pairs']} pairs"


def curves_figure(found: Mapping[str, Any]) -> Figure:
    """Returns a figure of what circuits of growing size recover and lose, a column per reading.

    Args:
        found: from `validation.validate`.
    """
    complete = found["completeness"]
    curves = complete["curves"]
    figure = Figure(figsize=(3.2 * len(curves) + 0.6, 5.4))
    _arrange(figure, (2, len(curves)), (0.65, 0.1, 0.8, 0.3), 0.12)
    grid = figure.subplots(2, len(curves), sharex=True, sharey=True, squeeze=False)
    for column, one in enumerate(curves):
        for axes, measure in zip(grid[:, column], ("recovered", "lost"), strict=True):
            for ranking in COLOURS:
                _curve(axes, one["rows"], ranking, measure)
            axes.axvline(complete["pruned"], lw=0.8, ls=":", color="black", label="size of the pruned circuit")
            axes.axhline(1, lw=0.6, color="#bbbbbb")
            axes.set(xscale="log", ylim=(-0.3, 1.5))
        grid[0, column].set_title(one["reading"])
        grid[1, column].set_xlabel("features in the circuit")
        for axes in grid[:, column]:
            _spare(axes)
    grid[0, 0].set_ylabel("recovered by the circuit alone")
    grid[1, 0].set_ylabel("lost without the circuit")
    names, handles = _legend(grid.flat)
    figure.legend(handles, names, fontsize=8, loc="lower center", ncols=len(names))  # beside the curves
    return figure


def _legend(grid: Iterable[Any]) -> tuple[list[str], list[Any]]:
    """Returns every name of several axes once, with what it stands for."""
    shown = {name: handle for axes in grid for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(shown), list(shown.values())


def _curve(axes: Any, rows: Sequence[Mapping[str, Any]], ranking: str, measure: str) -> None:
    """Draws one ranking's mean over draws, and the range that they span."""
    mine = [row for row in rows if row["ranking"] == ranking and row[measure] is not None]
    sizes = sorted({row["size"] for row in mine})
    values = [[row[measure] for row in mine if row["size"] == size] for size in sizes]
    if not sizes:
        return
    axes.plot(sizes, [np.mean(v) for v in values], marker="o", ms=3, color=COLOURS[ranking], label=NAMES[ranking])
    if any(len(v) > 1 for v in values):
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(sizes, low, high, alpha=0.2, lw=0, color=COLOURS[ranking])
