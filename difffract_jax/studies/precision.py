"""`precision`: are edits chosen by a circuit more precise than those chosen with an SAE? Registered in docs/studies.md.

1. Cases (`cases.recolourings`): one of two shapes shall take another colour and all else stay. Some are for
   calibration, others, of another world, for the test.
2. Every way to choose features sees the same: the runs of the prompt and of the wanted caption from the same noise, the
   object's image tokens and the tokens of its phrase. It names n places; the edits take their codes from one run's
   towards the other's.
3. On the calibration cases the SAE's count and strength are those of most success; the circuit's those of most success
   among its settings whose collateral is not above the SAE's. Collateral is the change of pixels that are surely not
   the object's.
4. On the test cases both edit every case; the difference of success is paired, with a bootstrap interval.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import CONCEPTS, parse
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Material, draw_cases, recolourings
from difffract_jax.studies.outcomes import Outcomes, outcomes, paired_difference, summary_row
from difffract_jax.studies.removing import effects_on, place_effects
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WAYS = ("circuit", "SAE", "contrast", "activation", "random")
"""Circuit; SAE features by contrast; the transcoders' features by contrast, by activation and at random."""
FIRST_SEED = 6_000_000


class Round(NamedTuple):
    """What a registered round lays down.

    Attributes:
        calibration: world and number of the cases for calibration.
        test: of those for the test.
        counts: features that are edited.
        strengths: of the edits.
        total: whether the circuits' answers are total effects, of all features in all steps, instead of those of graphs
            with few features expanded.
    """

    calibration: tuple[int, int]
    test: tuple[int, int]
    counts: tuple[int, ...]
    strengths: tuple[float, ...]
    total: bool


ROUNDS = {
    1: Round((80_000, 60), (81_000, 240), (8, 32, 128), (0.5, 1.0, 1.5, 2.0, 3.0), False),
    2: Round((82_000, 120), (83_000, 240), (8, 32, 128), (1.0, 1.25, 1.5, 2.0), True),
}


def precision(
    pipe: Pipeline,
    tcs: TranscoderSet,
    saes: TranscoderSet,
    *,
    size: int | None = None,
    advance: Advance = quiet,
    round: int = max(ROUNDS),
) -> Result:
    """Runs a round of the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        saes: its SAEs.
        size: test cases to draw instead of the registered number, with a quarter as many for calibration.
        advance: gives a progress callback for a named stage.
        round: which of `ROUNDS`.
    """
    phases, scores, rules = {}, {}, ROUNDS[round]
    for name, (world, count) in (("calibration", rules.calibration), ("test", rules.test)):
        count = count if size is None else max(2, size if name == "test" else size // 4)
        cases = recolourings(world, count, FIRST_SEED + world)
        material = draw_cases(pipe, cases, advance(f"{name}: images"))
        scores[name] = measure(pipe, tcs, saes, material, name, rules, advance)
        phases[name] = material
    chosen = choose_settings(scores["calibration"])
    return report(phases, scores, chosen, rules)


Scores = dict[tuple[str, int, float], Outcomes]


def measure(
    pipe: Pipeline,
    tcs: TranscoderSet,
    saes: TranscoderSet,
    material: Material,
    name: str,
    rules: Round,
    advance: Advance,
) -> Scores:
    """Edits every case in every way, count and strength.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        saes: its SAEs.
        material: the cases.
        name: of the phase, for progress.
        rules: of the round.
        advance: as in `precision`.
    """
    places = choices.all_places(tcs, pipe.plan().steps)
    prompts, wanted = [case.prompt for case in material.cases], [case.wanted for case in material.cases]
    found: Scores = {}
    values = {
        key: tuple(choices.mean_codes(pipe, one, material, text) for text in (prompts, wanted))
        for key, one in (("SAE", saes), ("transcoder", tcs))
    }
    effects = _effects(pipe, tcs, material, places, rules.total, advance(f"{name}: circuits"))
    for way in WAYS:
        before, after = values["SAE" if way == "SAE" else "transcoder"]
        keys = [(way, count, strength) for count in rules.counts for strength in rules.strengths]
        edits = []
        for _, count, strength in keys:
            for row in range(len(prompts)):
                chosen = _choose(way, row, before[row], after[row], effects, count)
                where = material.inside[row], material.phrase[row]
                edits.append(choices.moves(places, chosen, before[row], after[row], strength, *where))
        made = outcomes(pipe, saes if way == "SAE" else tcs, material, edits, advance(f"{name}: {way}"))
        found |= dict(zip(keys, made, strict=True))
    return found


def _choose(
    way: str,
    row: int,
    before: Float[np.ndarray, "place"],
    after: Float[np.ndarray, "place"],
    effects: tuple[Any, Any],
    count: int,
) -> Int[np.ndarray, "chosen"]:
    if way == "activation":
        return choices.first(choices.by_activation(before, after), count)
    if way == "random":
        return choices.first(choices.at_random(before, after, np.random.default_rng([7, row])), count)
    if way == "circuit":
        return choices.first(choices.by_circuit(before, after, effects[0][row], effects[1][row]), count)
    return choices.first(choices.by_contrast(before, after), count)


def _effects(
    pipe: Pipeline, tcs: TranscoderSet, material: Material, places: choices.FeaturePlaces, total: bool, advance: Any
) -> tuple[Any, Any]:
    """Returns what every place adds to (wanted colour - present colour) in the object's box, in both runs."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for row, case in enumerate(material.cases):
        target = colour_target(case.prompt, case.wanted, case.slot, material.box(row))
        for kept, prompt in zip(found, (case.prompt, case.wanted), strict=True):
            where = material.inside[row], material.phrase[row]
            if total:
                kept.append(place_effects(effects_on(pipe, tcs, prompt, case.seed, [target])[0], tcs, *where))
            else:
                graph = choices.circuit_of(pipe, tcs, prompt, case.seed, target)
                kept.append(choices.circuit_effects(graph, places, *where))
        advance(row + 1, len(material.cases))
    return found


def colour_target(prompt: str, wanted: str, slot: int, box: str) -> str:
    """Returns the pixel objective of one object turning from its colour to another.

    Args:
        prompt: a caption that names its colour.
        wanted: one that names the other.
        slot: the object.
        box: around it.
    """
    old, new = (parse(text).objects[slot] for text in (prompt, wanted))
    return f"pixels:color={new.colour},minus={old.colour or CONCEPTS[old.noun]},box={box}"


def choose_settings(scores: Scores) -> dict[str, tuple[int, float]]:
    """Chooses count and strength of every way on the calibration cases, as registered.

    Args:
        scores: of the calibration cases.

    Returns:
        Way -> count and strength. The SAE's are those of most success, of the least collateral among equals; those of
        the others are of most success among settings whose collateral is not above the SAE's, or if none is, of least
        collateral.
    """
    rows = {key: (float(one.success.mean()), float(one.outside.mean())) for key, one in scores.items()}

    def best(way: str, most: float) -> tuple[str, int, float]:
        mine = [key for key in rows if key[0] == way]
        within = [key for key in mine if rows[key][1] <= most]
        if not within:
            return min(mine, key=lambda key: rows[key][1])
        return max(within, key=lambda key: (rows[key][0], -rows[key][1]))

    sae = best("SAE", np.inf)
    return {way: (sae if way == "SAE" else best(way, rows[sae][1]))[1:] for way in WAYS}


def report(
    phases: dict[str, Material], scores: dict[str, Scores], chosen: dict[str, tuple[int, float]], rules: Round
) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        phases: the cases of calibration and test.
        scores: of both.
        chosen: count and strength of every way.
        rules: of the round.
    """
    test = scores["test"]
    at = {way: test[way, *chosen[way]] for way in WAYS}
    main = [{"way": way, "features": chosen[way][0], "strength": chosen[way][1]} | summary_row(at[way]) for way in WAYS]
    compared = [
        {"circuit against": way, "measure": name}
        | paired_difference(getattr(at["circuit"], name), getattr(at[way], name))
        for way in WAYS[1:]
        for name in ("success", "others", "outside")
    ]
    every = {
        phase: [{"way": w, "features": n, "strength": s} | summary_row(one) for (w, n, s), one in found.items()]
        for phase, found in scores.items()
    }
    gap = compared[0]
    verdict = (
        f"On {len(phases['test'].cases)} edits circuits succeed in {at['circuit'].success.mean():.1%}, SAEs in "
        f"{at['SAE'].success.mean():.1%}: a difference of {100 * gap['difference']:.1f} points (95% interval "
        f"{100 * gap['95% from']:.1f} to {100 * gap['to']:.1f}), with a collateral of "
        f"{at['circuit'].outside.mean():.4f} against {at['SAE'].outside.mean():.4f}."
    )
    counts = [{"phase": name, "drawn": one.drawn, "kept": len(one.cases)} for name, one in phases.items()]
    tables = {"At matched collateral, test": main, "Paired differences, test": compared, "Cases": counts}
    tables |= {f"Every setting, {phase}": rows for phase, rows in every.items()}
    raw = {"chosen": chosen, "tables": tables}
    raw["per case"] = {
        way: {name: getattr(at[way], name).tolist() for name in ("success", "others", "outside", "norm")}
        for way in WAYS
    }
    raw["cases"] = [case._asdict() for case in phases["test"].cases]
    axes = ("outside", "change outside the object (RMS)"), ("success", "edits that succeed")
    figures = {"precision": _figure(test, chosen, rules, *axes)}
    axes = ("recall", "recall: wanted changes made"), ("precision", "precision: changes that were wanted")
    return Result(
        "precision", verdict, tables, figures | {"precision-recall": _figure(test, chosen, rules, *axes)}, raw
    )


def _figure(
    scores: Scores, chosen: dict[str, tuple[int, float]], rules: Round, across: tuple[str, str], up: tuple[str, str]
) -> Figure:
    """Draws one measure over another, each a column of `summary_row` and its name; a curve of strengths per way.

    A precision that is None, where nothing changed, is not a point of a curve.
    """
    figure = Figure(figsize=(1 + 3.3 * len(rules.counts), 3.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(rules.counts), sharex=True, sharey=True), rules.counts, strict=True):
        for way in WAYS:
            rows = [summary_row(scores[way, count, strength]) for strength in rules.strengths]
            points = np.array([[row[name] for row in rows] for name, _ in (across, up)], float)
            axes.plot(*points, marker="o", ms=3, label=way)
            if chosen[way][0] == count:
                axes.plot(*points[:, rules.strengths.index(chosen[way][1])], "k*", ms=9)
        axes.set(title=f"{count} features", xlabel=across[1], ylim=(-0.02, 1.02))
    figure.axes[0].set_ylabel(up[1])
    figure.axes[0].legend(fontsize=8, title="star: setting compared", title_fontsize=7)
    return figure
