"""What a validation found, in words and short tables, of the values that `validate` returns or validation.json holds.

The graph's own targets come first: how well it orders what moves them, and how much of them its circuit carries. What
holds over every node downstream is told after that; a graph can know its inside well and its target badly.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

EVERY = "every node downstream"
"""What correlations over all pairs are said to be of; the others are of one target each."""
WORDS = {
    "exactness": "What is exact in the frozen model. An error is relative to the model's own array for the "
    "replacement, and for the rest to the size of all that adds up to the target: its absolute edges and its bias.",
    "perturbation": "Each of the {ablated} most influential features was taken off alone in the real model, with "
    "attention, norms and MLPs live, and the change read at the target, at every feature of the graph in a later "
    "block, and at outputs. `influence` is the reference's prediction, from column shares of absolute edges, compared "
    "with the size of the change; `change` follows signed edges, and is compared with the change itself. A correlation "
    "of 1 means that the graph orders the features as the model does, 0 that it says nothing of their order. The "
    "target's own comes first; the one over every node downstream says how well the graph knows its inside.",
    "completeness": "A circuit is some features at all positions. Recovered: only they keep their values, all other "
    "features get {ablation}; 0 is the value with none kept, 1 with all. Lost: only they get it. Errors, inputs and "
    "MLPs without a transcoder stay. Readings: `propagated` is the frozen model, `live` lets features switch on and "
    "off, `full` is the real model. Pruning keeps {pruned} features.",
}
ABLATIONS = {"mean": "their mean over the run's positions of the same stream and step", "zero": "0"}
BECOME = {"mean": "their mean over positions", "zero": "zero"}
READINGS = {
    "full": "in the real model",
    "live": "in the frozen model, features free to switch",
    "propagated": "in the frozen model",
}
"""Readings in words, the one nearest to the real model first."""
RECOVERED = "1: the target keeps its value; 0: it is as with no feature kept"
LOST = "1: what features add to the target is gone; 0: all of it is still there"
ORDER = "1: the graph orders these features as the model does; 0: it says nothing of their order"


def words(name: str, found: Mapping[str, Any]) -> str:
    """Returns a part of a validation in words: `exactness`, `perturbation` or `completeness`.

    Args:
        name: of the part.
        found: from `validation.validate`.
    """
    complete = found["completeness"]
    return WORDS[name].format(
        ablated=found["perturbation"]["ablated"],
        ablation=ABLATIONS[complete["ablation"]],
        pruned=complete["pruned"],
    )


def at_size(found: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """Returns what circuits of one size recover and lose, per reading and ranking; random ones on average.

    Args:
        found: from `validation.validate`.
        size: one that was measured.
    """
    rows = []
    for one in found["completeness"]["curves"]:
        for ranking in dict.fromkeys(row["ranking"] for row in one["rows"]):
            mine = [row for row in one["rows"] if row["ranking"] == ranking and row["size"] == size]
            told = {name: _mean([row[name] for row in mine]) for name in ("recovered", "lost")}
            rows.append({"reading": one["reading"], "features": size, "ranking": ranking} | told)
    return rows


def own_figures(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what a validation says of the graph's own targets, as a table for people who read one for the first time.

    Args:
        found: from `validation.validate`.

    Returns:
        Rows of what was done, the figure, the same of as many features at random where that was measured, and what the
        figure means; the real model's, where it was measured, else those of the reading nearest to it.
    """
    perturbed, rows = found["perturbation"], _kept_and_removed(found)
    own = [row for row in perturbed["rows"] if row["of"] != EVERY]
    several = len({row["of"] for row in own}) > 1
    done = f"the {perturbed['ablated']} most influential features taken off one at a time in the real model: "
    compared = {
        "change": "the target's change as the graph predicts it, against the one measured (Spearman)",
        "influence": "their influence in the graph, against the size of the target's change (Spearman)",
    }
    for name, told in compared.items():
        for row in (one for one in own if one["prediction"] == name):
            where = f", {row['of']}" if several else ""
            rows.append(_figure(f"{done}{told}{where}", row["spearman"], None, ORDER))
    return rows


def _kept_and_removed(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the pruned circuit, kept alone and removed."""
    complete = found["completeness"]
    size, measured = complete["pruned"], [one["reading"] for one in complete["curves"]]
    reading = next((name for name in READINGS if name in measured), None)
    mine = {row["ranking"]: row for row in at_size(found, size) if row["reading"] == reading}
    if reading is None or "influence" not in mine or mine["influence"]["recovered"] is None:
        return []
    become, where = BECOME[complete["ablation"]], READINGS[reading]
    told = {
        "recovered": (f"only the pruned circuit's {size} features kept, all others at {become}, {where}", RECOVERED),
        "lost": (f"only these {size} features at {become}, {where}", LOST),
    }
    random = mine.get("random", {})
    return [_figure(what, mine["influence"][name], random.get(name), means) for name, (what, means) in told.items()]


def _figure(what: str, value: float | None, random: float | None, means: str) -> dict[str, Any]:
    return {"what was done": what, "figure": value, "as many at random": random, "what it means": means}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
