"""Sections of a report on what `difffract steer` and `difffract validate` wrote for its graph (NumPy and Pillow).

Nothing is computed anew but short tables. What was found with another model, other transcoders, or for another graph is
refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difffract_jax.circuits.checks.summaries import at_size, own_figures, words
from difffract_jax.config import UserError
from difffract_jax.dashboards.image_files import read_image, shown
from difffract_jax.dashboards.render import Picture, Section
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import identity, without_position

LARGEST_FIGURE = 2048
"""Pixels along the longer side of a figure; text in smaller ones blurs."""
STEER, VALIDATE = "difffract steer", "difffract validate"
UNSHOWN = ("images", "norm", "effect per norm", "95% from", "to", "success", "compared", "others changed", "flipped")
UNSHOWN += ("precision", "recall", "psnr", "psnr outside")
"""Columns of the metrics that a report leaves to metrics.md, or says in other words."""
CHANGES = {"difference": "change", "inside": "change inside the region", "outside": "change outside"}


def edit_sections(directory: Path | None, graph: Graph) -> list[Section]:
    """Returns the section on an edit; none without a directory.

    Args:
        directory: of `difffract steer`.
        graph: of the report.

    Raises:
        UserError: if the directory is not what it should be, or is about another model.
    """
    if directory is None:
        return []
    path = directory / "metrics.json"
    record = _json(path, STEER)
    try:
        _check_origin(record["sources"], graph, path)
        rows, settings = [_change(row) for row in record["metrics"]], record["settings"]
        lines = [
            f"Edits, at every step in which the image is made: {', '.join(map(_spoken_edit, settings['edit']))}. The "
            f"prompt was: {settings['prompt']}.",
            "Change is the root mean square difference from the image without the edit, of pixels in 0 to 1.",
        ]
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(path, STEER) from None
    image = shown(read_image(directory / "grid.png"), largest=LARGEST_FIGURE)
    picture = Picture(image.address, "A row per seed of the starting noise; the first column is without the edit.")
    return [Section("An edit, before and after", lines, [picture], {"What changed": rows})]


def _spoken_edit(edit: str) -> str:
    return f"`{edit}`" + (" (taken off)" if edit.endswith("=zero") else "")


def _change(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a sweep's metrics for people who see one for the first time."""
    columns: dict[str, Any] = {"image": row["edit"]}
    if "success" in row:
        columns["as wanted"] = f"{row['success']} of {row['images']}"
    columns |= {name: row[key] for key, name in CHANGES.items() if key in row}
    known = {"edit", *UNSHOWN, *CHANGES}
    return columns | {k: v for k, v in row.items() if k not in known and not isinstance(v, dict | list)}


def validation_sections(directory: Path | None, graph: Graph) -> list[Section]:
    """Returns the sections on how far to trust the graph, its target's own figures first; none without a directory.

    Args:
        directory: of `difffract validate`.
        graph: of the report.

    Raises:
        UserError: if the directory is not what it should be, or is about another graph.
    """
    if directory is None:
        return []
    path = directory / "validation.json"
    validation = _json(path, VALIDATE)
    try:
        _check_origin(validation["provenance"]["sources"], graph, path)
        _check_targets(validation, graph, path)
        return _validated(validation, directory)
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(path, VALIDATE) from None


def _validated(validation: Mapping[str, Any], directory: Path) -> list[Section]:
    exact = [{key: row[key] for key in ("check", "worst", "median", "bar", "holds")} for row in validation["exactness"]]
    held = sum(bool(row["holds"]) for row in exact)
    about = Path(validation["provenance"]["settings"]["graph"]).name
    first = [
        f"What `difffract validate` found for `{about}`. The first table is about the target itself: whether the "
        "circuit carries it, and whether the graph knows what moves it, both held against the real model. "
        f"{held} of {len(exact)} checks that must be exact hold.",
    ]
    moved = _figure(
        directory / "perturbation.png",
        "Features taken off one at a time in the real model: how far the target moved against what the graph predicts "
        "(left, in the target's own unit), and every node downstream, without sign (middle) and with it (right). What "
        "lies on the grey line was predicted exactly.",
    )
    curves = _figure(
        directory / "completeness.png",
        "Circuits of growing size. Above, what a circuit recovers of the target when all else is averaged out; below, "
        "what is lost when the circuit is. Blue is the graph's order; the shaded range, random circuits.",
    )
    sizes = at_size(validation, validation["completeness"]["pruned"])
    return [
        Section("How far to trust it", first, (), _table("The target itself", own_figures(validation))),
        *_graded(validation, directory),
        Section(
            "Features taken off one at a time",
            [words("perturbation", validation)],
            [moved],
            _table("Correlations of what was predicted with what happened", validation["perturbation"]["rows"]),
        ),
        Section(
            "Circuits kept alone and removed",
            [words("completeness", validation)],
            [curves],
            _table("The pruned circuit", sizes),
        ),
        Section("What must be exact", [words("exactness", validation)], (), _table("Relative errors", exact)),
    ]


def _graded(validation: Mapping[str, Any], directory: Path) -> list[Section]:
    """Returns the section on the graph's grade; none where it was not graded."""
    graded = validation.get("grade")
    if graded is None:
        return []
    edits = _figure(
        directory / "grade.png",
        "Left: edits tried in the real model, as the graph predicts them and as they turned out; those within the "
        "shaded wedges work. Right: what predictions miss of the change, for growing groups of features.",
    )
    return [
        Section(
            "What its predictions of edits are worth",
            [graded["words"], graded["rule"]],
            [edits],
            _table("Edits tried in the real model", graded["parts"]),
        )
    ]


def _table(title: str, rows: Any) -> dict[str, Any]:
    return {title: rows} if rows else {}


def _figure(path: Path, caption: str) -> Picture:
    return Picture(shown(read_image(path), largest=LARGEST_FIGURE).address, caption)


def _check_targets(validation: Mapping[str, Any], graph: Graph, path: Path) -> None:
    """Refuses what was found for a graph of other targets."""
    theirs = {row["of"].partition("#")[0] for row in validation["perturbation"]["rows"]}
    theirs |= {without_position(name) for name in theirs}  # documents of other tools name targets so
    about, ours = validation["provenance"]["settings"]["graph"], identity(graph).targets
    if theirs.isdisjoint(name.partition("#")[0] for name in ours):
        raise UserError(f"{path} is about another graph, {about}, not one of {', '.join(ours)}; validate this one.")


def _check_origin(sources: Mapping[str, str], graph: Graph, path: Path) -> None:
    """Refuses what was found with another model or other transcoders than the graph's."""
    ours = {"model": graph.provenance.known.model, "transcoders": graph.provenance.transcoders}
    for what, known in ours.items():
        theirs = sources.get(what)
        if None not in (known, theirs) and known != theirs:
            raise UserError(
                f"{path} was made with another {what} ({str(theirs)[:12]}...) than the graph ({str(known)[:12]}...); "
                "give what was made with the graph's own."
            )


def _json(path: Path, command: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _unreadable(path, command) from None


def _unreadable(path: Path, command: str) -> UserError:
    return UserError(f"{path} cannot be read; give the directory that `{command}` wrote.")
