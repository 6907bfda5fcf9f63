"""What `combine intervals` and `combine contrast` print and write: edges over many runs."""

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from difffract_jax.cli import options as opt
from difffract_jax.cli.graph_files import graphs_at
from difffract_jax.cli.output import emit, replacing
from difffract_jax.config import UserError
from difffract_jax.graphs import population
from difffract_jax.graphs.collection import is_collection, read_collection
from difffract_jax.graphs.population import Difference, Interval
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.addresses import is_remote

SHOWN = 15
"""Edges of each list that are printed; with --json all are."""
EVERYWHERE = 0.95
"""Share of the runs from which on an edge counts as common to them."""
LEVEL = 0.05
"""p-value up to which a difference counts."""
DECIDING = (
    *("target", "weight", "sites", "step", "max_nodes", "min_attribution", "attention", "max_scores"),
    *("pooled", "include_padding"),
)
"""Settings that decide which edges a graph has; in others, such as `guidance`, two sets may differ."""


def show_intervals(
    paths: Sequence[Path], *, level: float, min_share: float, draws: int, seed: int, out: Path | None, json: bool
) -> None:
    """Prints edges with intervals, the largest means first: those into the graphs' own targets, then the others.

    Args:
        paths: graphs, or collections of them.
        level: of the intervals.
        min_share: edges of a smaller share of the runs are left out.
        draws: of the runs.
        seed: of the draws.
        out: `.csv` file of all edges.
        json: print one JSON object.
    """
    _check(out, paths)
    graphs = [graph for path in paths for graph in graphs_at(path)]
    table = population.edge_table(graphs, min_share=min_share)
    rows = population.intervals(table, level=level, draws=draws, seed=seed)
    common = sum(row.share >= EVERYWHERE and row.sure for row in rows)
    summary = {"runs": len(graphs), "prompts or seeds": len(set(table.units)), "edges": len(rows)}
    summary |= _left_out(table.left_out, min_share)
    summary |= {"edges whose interval leaves 0 out": sum(row.sure for row in rows)}
    summary |= {f"of them in at least {EVERYWHERE:.0%} of the runs": common}
    into, others = ([row for row in rows if (row.target in table.roots) == root] for root in (True, False))
    if json:
        emit(summary | _written(rows, out) | {"edges of all runs": [row._asdict() for row in rows]}, as_json=True)
    else:
        shown = {"into the target": into, "others": others}
        emit(
            summary | _written(rows, out) | {name: _first(some, Interval._fields) for name, some in shown.items()},
            as_json=False,
        )


def show_contrast(a: Path, b: Path, *, min_share: float, draws: int, seed: int, out: Path | None, json: bool) -> None:
    """Prints the edges that differ most between two sets of runs; arguments as for `show_intervals`."""
    _check(out, (a, b))
    first, second = graphs_at(a), graphs_at(b)
    rows, paired = population.contrast(first, second, min_share=min_share, draws=draws, seed=seed)
    summary = {"runs": f"{len(first)} and {len(second)}", "compared": "pair by pair" if paired else "set against set"}
    summary |= {"edges": len(rows), f"edges that differ (p up to {LEVEL})": sum(row.p <= LEVEL for row in rows)}
    fields = Difference._fields if json else ("source", "target", "first", "second", "difference", "p")
    shown = {"differences": [row._asdict() for row in rows]} if json else {"largest": _first(rows, fields)}
    emit(summary | _written(rows, out) | shown, as_json=json)


def _check(out: Path | None, paths: Sequence[Path]) -> None:
    """Refuses, before a graph is read, an output that cannot be written, and collections of different circuits."""
    if out is not None:
        opt.check_out(out, ".csv")
    several = [path for path in paths if is_collection(path) or (is_remote(path) and not path.suffix)]
    collections = [read_collection(path) for path in several]
    for at, (one, other) in enumerate(pairwise(collections)):
        apart = [name for name in DECIDING if one.settings.get(name) != other.settings.get(name)]
        if apart:
            differing = ", ".join(
                f"{name} {one.settings.get(name)!r} and {other.settings.get(name)!r}" for name in apart
            )
            raise UserError(
                f"{several[at]} and {several[at + 1]} were traced with different settings ({differing}), and edges "
                "would differ for that alone; trace one of them again."
            )


def _left_out(count: int, share: float) -> dict[str, Any]:
    return {f"edges of less than {share:.0%} of the runs, left out": count} if count else {}


def _written(rows: Sequence[Any], out: Path | None) -> dict[str, str]:
    """Writes all edges to a table, if one is wanted, and returns what to say of it."""
    if out is None:
        return {}
    with replacing(out), atomic_file(out) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields if rows else ())
        writer.writerows(rows)
    return {"table": str(out)}


def _first(rows: Sequence[Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the first rows as people read them."""
    return [{name: getattr(row, name) for name in fields} for row in rows[:SHOWN]]
