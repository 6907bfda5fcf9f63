"""What a graph's predictions of edits are worth, in words, and the rule behind them (NumPy only).

`circuits.checks.grading` tries edits in the model and tells of each what the graph predicted and what happened; here is
what follows from that. Changes are shares of the target's value. docs/faithfulness.md registers the rule:

    works       the target moves in the predicted direction, by at least half and at most twice as much
    well        at least two of three edits work; fairly: at least one of three; else poorly
    limit       upper decile of what random features of the same places do at doses -1 to 1; at least 1%, below which
                nothing was tried
    number      mean over the graph's own run and those from other seeds of the share of single edits, doses -1 to 1,
                that work
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WELL, FAIRLY = 2 / 3, 1 / 3
"""Least shares of edits that work."""
LEAST, MOST = 0.5, 2.0
"""Between which the change must lie, over the predicted one."""
WORTH = 0.01
"""Features predicted to move the target by less of its value are not tried, and not vouched for."""
LARGE = 8
"""Features from which on a group is large."""
OWN = 1.0
"""Distance beyond which activations are not the run's own."""
RULE = (
    "An edit works if the target moves in the predicted direction, by at least half and at most twice as much. Well: "
    "at least two of three edits work; fairly: at least one of three; poorly: fewer. The limit of reading is the upper "
    "decile of what random features of the same places, active alike, do when edited as strongly; at least 1%, below "
    "which nothing was tried."
)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a graph's predictions of edits are worth; shares of edits that work are None where none was tried.

    Attributes:
        number: share of single edits at doses -1 to 1 that work, the mean over all runs; the grade as one number. None
            where no edit was worth trying.
        alone: share of single edits at doses -1 to 1 that work.
        large_doses: of single edits at doses beyond.
        small_groups: of groups below 8 features.
        large_groups: of larger groups.
        other_seeds: of single edits at doses -1 and 1 in runs from other seeds.
        limit: smallest share of the target that is told from random features and was tried; None without controls.
        dose_limit: smallest size of a dose at which the median single edit leaves the run's own activations; None if
            none of those tried does.
        recovered: of the target by the pruned circuit alone, in the real model; None if not measured.
        lost: without it; likewise.
        no_op: largest change, as a share of the target, that an edit of dose 0 makes.
        edits: how many were tried in the graph's own run, controls left out.
        seeds: of the runs, the graph's own first.
    """

    number: float | None = None
    alone: float | None = None
    large_doses: float | None = None
    small_groups: float | None = None
    large_groups: float | None = None
    other_seeds: float | None = None
    limit: float | None = None
    dose_limit: float | None = None
    recovered: float | None = None
    lost: float | None = None
    no_op: float = 0.0
    edits: int = 0
    seeds: tuple[int, ...] = ()

    def __str__(self) -> str:
        return words(self)


def works(predicted: float, happened: float) -> bool:
    """Says whether an edit does what was predicted.

    Args:
        predicted: change of the target.
        happened: in the same units.

    Example:
        >>> works(-0.2, -0.11), works(-0.2, -0.09), works(-0.2, 0.2), works(0.1, 0.2)
        (True, False, False, True)
    """
    return predicted != 0 and LEAST <= happened / predicted <= MOST


def share(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    """Returns the share of edits that work; None if none was tried.

    Args:
        rows: edits, with what was `predicted`.
        column: name of what happened, a number or several; rows without it are passed over.
    """
    tried = [works(row["predicted"], one) for row in rows for one in happened(row, column)]
    return float(np.mean(tried)) if tried else None


def happened(row: Mapping[str, Any], column: str) -> list[float]:
    """Returns what happened after an edit: no number, one, or one for each of several runs.

    Args:
        row: an edit.
        column: name of what happened.
    """
    value = row.get(column)
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def grade_of(rows: Sequence[Mapping[str, Any]], **facts: Any) -> Grade:
    """Returns the grade that follows from what edits did.

    Args:
        rows: of each edit its `size` (features), `dose`, and changes as shares of the target: `predicted` by the graph,
            `full` in the real model, and where they were measured `other`, one for each other seed, `control` of
            random features, and `distance` of activations.
        facts: further fields of `Grade`.

    Example:
        >>> tried = [{"size": 1, "dose": 1.0, "predicted": 0.1, "full": 0.12, "other": [0.01], "control": 0.004}]
        >>> print(grade_of(tried))
        Predicts single edits well; with other seeds poorly. Do not read edges below 1% of the target.
    """
    alone = [row for row in rows if row["size"] == 1]
    usual = [row for row in alone if abs(row["dose"]) <= 1]
    own, other = share(usual, "full"), share(usual, "other")
    seeds = max((len(happened(row, "other")) for row in usual), default=0)
    controls = [abs(row["control"]) for row in usual if row.get("control") is not None]
    return Grade(
        number=None if own is None else (own + seeds * (other or 0.0)) / (1 + seeds),
        alone=own,
        large_doses=share([row for row in alone if abs(row["dose"]) > 1], "full"),
        small_groups=share([row for row in rows if 1 < row["size"] < LARGE], "full"),
        large_groups=share([row for row in rows if row["size"] >= LARGE], "full"),
        other_seeds=other,
        limit=max(float(np.quantile(controls, 0.9)), WORTH) if controls else None,
        dose_limit=_dose_limit(alone),
        edits=len(rows),
        **facts,
    )


def stored_grade(values: Any) -> Any:
    """Returns a grade's JSON values as they are written now: earlier files say 0.0 where nothing was tried.

    Args:
        values: of the grade, read from a file.

    Example:
        >>> stored_grade({"number": 0.0, "no_op": 0.0}), stored_grade({"number": 0.0, "alone": 0.0})
        ({'no_op': 0.0}, {'number': 0.0, 'alone': 0.0})
    """
    if isinstance(values, Mapping) and values.get("alone") is None and values.get("number") == 0:
        return {name: value for name, value in values.items() if name != "number"}
    return values


def _dose_limit(alone: Sequence[Mapping[str, Any]]) -> float | None:
    for dose in sorted({abs(row["dose"]) for row in alone}):
        distances = [row["distance"] for row in alone if abs(row["dose"]) == dose and row.get("distance") is not None]
        if distances and np.median(distances) > OWN:
            return float(dose)
    return None


def word(value: float | None) -> str | None:
    """Returns the word for a share of edits that work; None if none was tried."""
    if value is None:
        return None
    return "well" if value >= WELL else "fairly" if value >= FAIRLY else "poorly"


def words(grade: Grade) -> str:
    """Returns a grade in a few sentences, what matters most first."""
    parts = {
        "single edits": grade.alone,
        "small groups": grade.small_groups,
        "large groups": grade.large_groups,
        "large doses": grade.large_doses,
    }
    told = [f"{name} {word(value)}" for name, value in parts.items() if value is not None]
    if not told:
        return "Predicts no edit that is worth trying: no feature is predicted to move the target by 1%."
    other = f"; with other seeds {word(grade.other_seeds) or 'untried'}"
    sentences = [f"Predicts {', '.join(told)}{other}."]
    if grade.limit is not None:
        percent = float(f"{100 * grade.limit:.2g}")  # to two digits, and without an exponent
        sentences.append(f"Do not read edges below {percent:g}% of the target.")
    if grade.dose_limit is not None:
        sentences.append(f"From dose {grade.dose_limit:g} on, activations are not the run's own any more.")
    return " ".join(sentences)


def median_error(rows: Sequence[Mapping[str, Any]], column: str, kept: Callable[[Mapping[str, Any]], bool]) -> Any:
    """Returns the median over edits of |prediction - change| over |change|; None if there is none.

    Args:
        rows: edits, with what happened in the real model as `full`.
        column: name of the prediction.
        kept: which edits count.
    """
    errors = [
        abs(row[column] - row["full"]) / abs(row["full"])
        for row in rows
        if kept(row) and row.get(column) is not None and row["full"] != 0
    ]
    return float(np.median(errors)) if errors else None
