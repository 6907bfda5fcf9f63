"""Two sets of transcoders side by side, site by site, from what `evaluation` or `row_evaluation` measured of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difffract_jax.transcoders.evaluation import Evaluation

MEASURES = {"fvu": "FVU", "l0": "L0", "dead": "dead", "recovered": "recovered"}
"""Measure -> how tables call it. The velocity recovered is that with the site's MLP alone replaced."""


def side_by_side(first: Evaluation, second: Evaluation) -> list[dict[str, Any]]:
    """Returns one row per site that both have, and one with the means over these: `a`, `b` and `b - a` of each measure.

    Args:
        first: a.
        second: b; measured on the same rows, else the difference says nothing.
    """
    ours, theirs = _by_site(first), _by_site(second)
    shared = [site for site in ours if site in theirs]
    measures = [name for name in MEASURES if all(name in one[site] for one in (ours, theirs) for site in shared)]
    values = {site: {name: (ours[site][name], theirs[site][name]) for name in measures} for site in shared}
    if len(shared) > 1:
        pairs = {name: np.mean([values[site][name] for site in shared], axis=0).tolist() for name in measures}
        values["mean"] = {name: (a, b) for name, (a, b) in pairs.items()}
    return [
        {"site": site} | {name: {"a": a, "b": b, "difference": b - a} for name, (a, b) in row.items()}
        for site, row in values.items()
    ]


def unshared(first: Evaluation, second: Evaluation) -> tuple[list[str], list[str]]:
    """Returns the sites that only the first has, and those that only the second has."""
    ours, theirs = ([row["site"] for row in one.sites] for one in (first, second))
    return [site for site in ours if site not in theirs], [site for site in theirs if site not in ours]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Returns the same with text in every cell: a, b and the difference of a measure beside one another."""
    table = []
    for row in rows:
        cells = {"site": row["site"]}
        for name, title in MEASURES.items():
            if name in row:
                a, b, difference = (row[name][part] for part in ("a", "b", "difference"))
                cells[title] = f"{a:.3g}, {b:.3g}, {difference:+.2g}"
        table.append(cells)
    return table


def _by_site(one: Evaluation) -> dict[str, dict[str, Any]]:
    alone = {row["site"]: {"recovered": row["recovered"]} for row in one.alone}
    return {row["site"]: {**row, **alone.get(row["site"], {})} for row in one.sites}
