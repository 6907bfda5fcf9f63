"""The report of an evaluation: a page of Markdown with tables and figures, and the numbers as JSON.

report.md  evaluation.json  fvu_by_step.png  density.png  pareto.png (with several sets)
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import atomic_directory
from difffract_jax.storage.files import is_occupied
from difffract_jax.transcoders.evaluation import DENSITY_EDGES, Evaluation
from difffract_jax.transcoders.run_place import has

MEASURES = (
    "FVU: squared error over the variance of y about its mean per step. L0: active features per row. "
    "Shrinkage: length of y^ over that of y. Dead: share of features that fired in no row. "
    "Velocity recovered: 1 - |v_rep - v|^2 / |v_abl - v|^2 along the original run, where v_abl has the same MLPs' mean "
    "outputs per site and step. With guidance by two branches each evaluation of a step has means of its own, and the "
    "velocity is the step's. Padding is left out throughout."
)


NUMBERS = "evaluation.json"


def check_place(out: Path) -> None:
    """Refuses a directory that holds something else than an earlier report, which would be lost.

    Args:
        out: directory of the report.

    Raises:
        UserError: if it does.
    """
    if is_occupied(out) and not has(out, NUMBERS):
        raise UserError(f"{out} exists already and is not a report of difffract evaluate; name another --out.")


def write_evaluation_report(results: Mapping[str, Evaluation], out: Path, record: Mapping[str, Any]) -> Path:
    """Writes the report of one or several sets of transcoders; the first is described in full.

    Args:
        results: name -> what was measured.
        out: directory to write; an earlier report there is replaced.
        record: how it was made.

    Returns:
        Path of the page.

    Raises:
        UserError: if the directory holds something else.
    """
    check_place(out)
    name, first = next(iter(results.items()))
    with atomic_directory(out, overwrite=True) as partial:
        _by_step_figure(first).savefig(partial / "fvu_by_step.png", dpi=120)
        _density_figure(first).savefig(partial / "density.png", dpi=120)
        if len(results) > 1:
            _pareto_figure(results).savefig(partial / "pareto.png", dpi=120)
        (partial / "report.md").write_text(report_page(name, results), encoding="utf-8")
        numbers = {key: value._asdict() for key, value in results.items()}
        text = json.dumps({"provenance": record, "points": points(results), "results": numbers}, indent=2)
        (partial / NUMBERS).write_text(text + "\n", encoding="utf-8")
    return out / "report.md"


def report_page(name: str, results: Mapping[str, Evaluation]) -> str:
    """Returns the page as Markdown.

    Args:
        name: of the set that is described in full.
        results: name -> what was measured.
    """
    first = results[name]
    alone = {row["site"]: {"velocity recovered, alone": row["recovered"]} for row in first.alone}
    sites = [row | alone.get(row["site"], {}) for row in first.sites]
    parts = [
        f"# How faithful the {first.role}s of `{name}` are",
        MEASURES,
        "## By site",
        _table(sites),
        f"Mean L0 over sites: {np.mean([row['l0'] for row in first.sites]):.1f}.",
        *(["## All MLPs replaced at once, by step", _table(first.velocity)] if first.velocity else []),
        "## By site and step",
        "![FVU by step](fvu_by_step.png)",
        _table(first.steps),
        "## How often features fire",
        "![Histogram of firing rates](density.png)",
    ]
    if first.images:
        parts += ["## Images with all MLPs replaced, against the original from the same noise", _table(first.images)]
    if first.scored:
        parts += ["## Images that show what was asked, held-out captions, same noise", _table(first.scored)]
    if len(results) > 1:
        parts += ["## Sparsity against faithfulness", "![Pareto figure](pareto.png)", _table(points(results))]
    return "\n\n".join(parts) + "\n"


def points(results: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Returns one row per set: its means over sites, and the least velocity recovered."""
    return [{"set": name, "role": one.role} | one.summary() for name, one in results.items()]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(row[n]) for n in names) + " |" for row in rows)])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _by_step_figure(one: Evaluation) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for site, branch in dict.fromkeys((row["site"], row.get("branch", "")) for row in one.steps):
        rows = [row for row in one.steps if (row["site"], row.get("branch", "")) == (site, branch)]
        style = {"linestyle": "--" if branch == "negative" else "-", "label": f"{site} {branch}".strip()}
        axes.plot([row["step"] for row in rows], [row["fvu"] for row in rows], marker="o", **style)
    axes.set(xlabel="denoising step", ylabel="FVU", xticks=range(len(one.sigmas)))
    axes.legend(fontsize=7, ncols=2)
    return figure


def _density_figure(one: Evaluation) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for site, counts in one.density.items():
        axes.stairs(counts, DENSITY_EDGES, label=site)
    axes.set(xlabel="log10 of the share of rows in which a feature fires", ylabel="features")
    axes.legend(fontsize=7, ncols=2)
    return figure


def _pareto_figure(results: Mapping[str, Evaluation]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    rows = sorted(points(results), key=lambda row: row["l0"])
    names = [name for name in ("fvu", "least velocity recovered") if name in rows[0]]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for role in dict.fromkeys(row["role"] for row in rows):
            mine = [row for row in rows if row["role"] == role]
            axes.plot([row["l0"] for row in mine], [row[name] for row in mine], marker="o", label=role)
        axes.set(xlabel="L0", ylabel=name)
        axes.legend()
    return figure
