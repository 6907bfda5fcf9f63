"""Taking away what speaks for a mistake: the part that the studies of mistakes share.

1. A `Blame` ranks, for every case and for one or both sides of the sequence, the places that speak for the mistake.
2. `attempts` takes the first n of each away at several strengths and reads what comes out; and, beside one of the
   ways, as many places of each side drawn at random, at the strength that gives their edit the same norm.
3. `choose_settings` chooses every way's setting on the calibration cases; `report` compares on the test cases.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from matplotlib.figure import Figure

from difffract_jax.models.pipeline import Pipeline
from difffract_jax.studies.cases import Material
from difffract_jax.studies.choices import FeaturePlaces, at_random, first, removals
from difffract_jax.studies.outcomes import Outcomes, outcomes, paired_difference, summary_row
from difffract_jax.studies.results import Advance, Result
from difffract_jax.studies.sheets import sheet
from difffract_jax.transcoders.transcoder import TranscoderSet

COUNTS = (8, 32, 128)
STRENGTHS = (1.0, 2.0, 3.0)
RANDOM = "random"
Key = tuple[str, str, int, float]
"""Way, variant of its circuit, features of each side, strength."""
Scores = dict[Key, Outcomes]


class Blame(NamedTuple):
    """The places that speak for a mistake, worst first.

    Attributes:
        sides: for each side that is edited, the ranked places of every case.
    """

    sides: tuple[tuple[Int[np.ndarray, "ranked"], ...], ...]

    def taken(self, row: int, count: int) -> Int[np.ndarray, "chosen"]:
        """Returns the first places of each side of one case."""
        return np.concatenate([side[row][:count] for side in self.sides])


def blame(effects: Sequence[Float64[np.ndarray, "place"]], sides: Sequence[Bool[np.ndarray, "place"]]) -> Blame:
    """Ranks places by how much they speak against what is wanted.

    Args:
        effects: of every case, on what is wanted.
        sides: which places belong to each side that is edited.
    """
    return Blame(tuple(tuple(first(np.where(side, -one, 0.0), one.size) for one in effects) for side in sides))


def attempts(
    pipe: Pipeline,
    tcs: TranscoderSet,
    material: Material,
    places: FeaturePlaces,
    ways: Mapping[tuple[str, str], Blame],
    codes: Float[np.ndarray, "case place"],
    matched: str,
    advance: Advance,
) -> Scores:
    """Takes features away in every way, and beside one of them random ones of the same number and size.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        material: the cases.
        places: of the transcoders.
        ways: way and variant -> whom it blames.
        codes: of every place, in the unedited runs; random places are drawn among active ones.
        matched: the way that the random edits stand beside.
        advance: gives a progress callback for a named stage.
    """
    found: Scores = {}
    for (way, variant), blamed in ways.items():
        keys = [(way, variant, count, strength) for count in COUNTS for strength in STRENGTHS]
        edits = [
            removals(places, blamed.taken(row, count), strength, material.inside[row], material.phrase[row])
            for _, _, count, strength in keys
            for row in range(len(material.cases))
        ]
        made = outcomes(pipe, tcs, material, edits, advance(f"{way} {variant}".strip()))
        found |= dict(zip(keys, made, strict=True))
        if way == matched:
            drawn = _random(blamed, places, codes)
            found |= _matched(pipe, tcs, material, places, drawn, {key: found[key] for key in keys}, advance)
    return found


def _random(
    blamed: Blame, places: FeaturePlaces, codes: Float[np.ndarray, "case place"]
) -> Callable[[int, int], np.ndarray]:
    """Returns a choice of as many random active places of each side as are blamed."""

    def taken(row: int, count: int) -> np.ndarray:
        parts = []
        for number, side in enumerate(blamed.sides):
            mine = (
                places.is_image == places.is_image[side[row][0]] if side[row].size else np.zeros(codes.shape[1], bool)
            )
            both = len({bool(places.is_image[place]) for place in side[row][:count]}) > 1
            scores = at_random(codes[row], codes[row], np.random.default_rng([11, row, number]))
            parts.append(first(np.where(mine | both, scores, 0.0), len(side[row][:count])))
        return np.concatenate(parts)

    return taken


def _matched(
    pipe: Pipeline,
    tcs: TranscoderSet,
    material: Material,
    places: FeaturePlaces,
    drawn: Callable[[int, int], np.ndarray],
    beside: Scores,
    advance: Advance,
) -> Scores:
    """Takes random places away, with edits of the same norms as those they stand beside."""

    def edits(strengths: Mapping[Key, np.ndarray]) -> list[Any]:
        return [
            removals(places, drawn(row, key[2]), float(strengths[key][row]), material.inside[row], material.phrase[row])
            for key in beside
            for row in range(len(material.cases))
        ]

    plain = {key: np.full(len(material.cases), key[3]) for key in beside}
    tried = outcomes(pipe, tcs, material, edits(plain), advance("random, to measure its norm"))
    scaled = {
        key: key[3] * beside[key].norm / np.maximum(one.norm, 1e-6) for key, one in zip(beside, tried, strict=True)
    }
    made = outcomes(pipe, tcs, material, edits(scaled), advance("random"))
    return {(RANDOM, *key[1:]): one for key, one in zip(beside, made, strict=True)}


def choose_settings(scores: Scores, matched: str) -> dict[str, Key]:
    """Chooses every way's setting: of most repairs, among equals of least collateral; random takes its partner's.

    Args:
        scores: of the calibration cases.
        matched: the way that the random edits stand beside.
    """
    best: dict[str, Key] = {}
    for key, one in scores.items():
        rank = (float(one.success.mean()), -float(one.outside.mean()))
        if key[0] not in best or rank > (
            float(scores[best[key[0]]].success.mean()),
            -float(scores[best[key[0]]].outside.mean()),
        ):
            best[key[0]] = key
    best[RANDOM] = (RANDOM, *best[matched][1:])
    return best


def report(
    name: str,
    phases: Mapping[str, Material],
    scores: Mapping[str, Scores],
    compared: Sequence[tuple[str, str]],
    matched: str,
    more: Callable[[Material, Outcomes], dict[str, Any]] = lambda material, one: {},
) -> Result:
    """Puts tables, figures and verdict together.

    Args:
        name: of the study.
        phases: the cases of `calibration` and `test`.
        scores: of both.
        compared: pairs of ways whose repairs are compared on the test cases.
        matched: the way that the random edits stand beside.
        more: further columns of the table.
    """
    chosen = choose_settings(scores["calibration"], matched)
    test, material = scores["test"], phases["test"]
    main = []
    for way, key in chosen.items():
        row = {"way": way, "circuit": key[1], "features": key[2], "strength": key[3]} | summary_row(test[key])
        row["repaired"] = row.pop("success")
        main.append(row | more(material, test[key]))
    gaps = [
        {"way": a, "against": b} | paired_difference(test[chosen[a]].success, test[chosen[b]].success)
        for a, b in compared
    ]
    every = {
        f"Every setting, {phase}": [
            {"way": w, "circuit": v, "features": n, "strength": s} | summary_row(one)
            for (w, v, n, s), one in made.items()
        ]
        for phase, made in scores.items()
    }
    counts = [{"phase": phase, "cases": len(one.cases), "drawn": one.drawn} for phase, one in phases.items()]
    rates = ", ".join(f"{row['way']} {row['repaired']:.1%}" for row in main)
    told = "; ".join(
        f"{gap['way']} - {gap['against']} {100 * gap['difference']:.1f} points (95% interval "
        f"{100 * gap['95% from']:.1f} to {100 * gap['to']:.1f})"
        for gap in gaps
    )
    verdict = f"Of {len(material.cases)} failures repaired: {rates}. {told}."
    tables = {"Repaired, test": main, "Paired differences, test": gaps, "Cases": counts} | every
    raw = {"chosen": chosen, "tables": tables, "cases": [case._asdict() for case in material.cases]}
    raw["per case"] = {way: test[key].success.tolist() for way, key in chosen.items()}
    figures = {name: _figure(main), f"{name}-images": _pictures(material, test[chosen[matched]], test[chosen[RANDOM]])}
    return Result(name, verdict, tables, figures, raw)


def _figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the share of repaired images, way by way."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    ways, rates = [row["way"] for row in rows], [row["repaired"] for row in rows]
    below, above = ([abs(row[end] - row["repaired"]) for row in rows] for end in ("95% from", "to"))
    axes.barh(ways, rates, xerr=(below, above), color="#4878a8", ecolor="black", capsize=3)
    axes.set(xlim=(0, 1), xlabel="images repaired (95% interval)")
    axes.invert_yaxis()
    return figure


def _pictures(material: Material, repaired: Outcomes, random: Outcomes, most: int = 6) -> Figure:
    """Draws some cases without edits, with them, and with random ones; the first, not the best."""
    rows = np.arange(min(most, len(material.cases)))
    grid = np.stack([material.images[rows], repaired.images[rows], random.images[rows]], axis=1)
    names = [f"{row + 1}" for row in rows]
    page = sheet(grid, names, ("unedited", "by circuit", "at random"))
    figure = Figure(figsize=(page.shape[1] / 150, page.shape[0] / 150 + 0.18 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(page)
    axes.axis("off")
    axes.set_title("\n".join(f"{row + 1}: {material.cases[row].prompt}" for row in rows), fontsize=6, loc="left")
    return figure
