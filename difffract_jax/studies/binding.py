"""`binding`: what carries "red" to the circle and not to the square? Registered in docs/studies.md.

1. Cases: held-out scenes of two shapes; wanted is the caption with the two colours exchanged.
2. Per case and object the total effects on its own colour minus the other's, in its own box. What features at its
   phrase, its image tokens, the other object's phrase and image tokens, and elsewhere add to it, by block and step.
3. Both objects' places are moved towards the other caption's run, by circuit, by contrast, at random. Do the colours
   change places?
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from matplotlib.figure import Figure

from difffract_jax.circuits.effects.total_effects import TotalEffects
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import parse
from difffract_jax.organism.evaluate import held_out
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Case, Material, draw_cases, recoloured
from difffract_jax.studies.evaluations import refuse_branches
from difffract_jax.studies.outcomes import Outcomes, outcomes, paired_difference, summary_row
from difffract_jax.studies.precision import colour_target
from difffract_jax.studies.removing import effects_on, place_effects
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, FIRST_SEED, CASES = 90_000, 9_000_000, 100
COUNTS, STRENGTHS = (8, 32, 128), (1.0, 1.5, 2.0)
WAYS = ("circuit", "contrast", "random")
WHERE = ("own phrase", "own image tokens", "other phrase", "other image tokens", "elsewhere")


def binding(pipe: Pipeline, tcs: TranscoderSet, *, size: int | None = None, advance: Advance = quiet) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: scenes to draw instead of the registered number.
        advance: gives a progress callback for a named stage.
    """
    cases = exchanges(CASES if size is None else size)
    both = tuple(
        draw_cases(pipe, [case._replace(slot=slot) for case in cases], advance(f"images, object {slot + 1}"))
        for slot in (0, 1)
    )
    told = [_told(pipe, tcs, one, advance(f"effects, object {slot + 1}")) for slot, one in enumerate(both)]
    made = _exchange(pipe, tcs, both, told, advance)
    return report(both[0], carried(told, both), made)


def exchanges(count: int) -> list[Case]:
    """Draws scenes of two shapes in two colours; wanted is the caption with the colours exchanged.

    Args:
        count: how many.
    """
    found: list[Case] = []
    asked = held_out(4 * count, "two shapes", WORLD)
    for row, prompt in enumerate(asked.captions):
        colours = [thing.colour for thing in parse(prompt).objects]
        # Two of a kind would only change places.
        if colours[0] != colours[1] and asked.kind[row, 0] != asked.kind[row, 1] and len(found) < count:
            wanted = recoloured(recoloured(prompt, 0, colours[1]), 1, colours[0])
            found.append(Case(prompt, wanted, FIRST_SEED + row, 0))
    return found


def _told(pipe: Pipeline, tcs: TranscoderSet, material: Material, advance: Any) -> list[tuple[Any, Any]]:
    """Returns total effects on the other's colour minus the object's own, in both captions' runs, case by case."""
    found = []
    for row, case in enumerate(material.cases):
        target = colour_target(case.prompt, case.wanted, case.slot, material.box(row))
        runs = (case.prompt, case.wanted)
        first, second = (effects_on(pipe, tcs, prompt, case.seed, [target])[0] for prompt in runs)
        found.append((first, second))
        advance(row + 1, len(material.cases))
    return found


def carried(
    told: Sequence[Sequence[tuple[TotalEffects, TotalEffects]]], both: Sequence[Material]
) -> dict[str, Float64[np.ndarray, "block step"]]:
    """Returns what features in each of `WHERE` add to the object's own colour, mean over cases and objects.

    Args:
        told: for either object, case by case, total effects on the other's colour minus its own, in the runs of both
            captions.
        both: the cases, once for either object.
    """
    total: dict[str, Any] = dict.fromkeys(WHERE, 0.0)
    for slot, found in enumerate(told):
        mine, other = both[slot], both[1 - slot]
        for row, (run, _) in enumerate(found):
            # The target is the other's colour minus the own.
            parts = [
                -by_block(run, phrase, inside) / (2 * len(found))
                for phrase, inside in (
                    (mine.phrase[row], np.zeros_like(mine.inside[row])),
                    (np.zeros_like(mine.phrase[row]), mine.inside[row]),
                    (other.phrase[row], np.zeros_like(mine.inside[row])),
                    (np.zeros_like(mine.phrase[row]), other.inside[row] & ~mine.inside[row]),
                )
            ]
            everywhere = -by_block(run, np.ones_like(mine.phrase[row]), np.ones_like(mine.inside[row]))
            parts.append(everywhere / (2 * len(found)) - sum(parts))
            for name, table in zip(WHERE, parts, strict=True):
                total[name] = total[name] + table
    return total


def by_block(
    found: TotalEffects, phrase: Bool[np.ndarray, "txt"], inside: Bool[np.ndarray, "img"]
) -> Float64[np.ndarray, "block step"]:
    """Sums the effects of features at some tokens, by block of the model and step.

    Args:
        found: total effects of a run.
        phrase: text tokens that count.
        inside: image tokens that count.

    Raises:
        UserError: if the run has two evaluations a step.
    """
    refuse_branches(found.branches)
    layout, counted = found.layout, {"img": inside, "txt": phrase}
    total = np.zeros((found.features[0].shape[0], layout.depth))
    for number, (group, effects) in enumerate(zip(layout.groups, found.features, strict=True)):
        rows = np.concatenate([counted[stream] for stream in group.streams])
        total[:, layout.blocks_of(number)] += np.asarray(effects, np.float64).sum(axis=3) @ rows
    return total.T


def _exchange(
    pipe: Pipeline, tcs: TranscoderSet, both: Sequence[Material], told: Sequence[Any], advance: Advance
) -> dict[tuple[str, int, float], Outcomes]:
    """Moves both objects' places towards the other caption's run and reads what comes out."""
    places = choices.all_places(tcs, pipe.plan().steps)
    parts = []
    for slot, material in enumerate(both):
        before, after = (
            choices.mean_codes(pipe, tcs, material, [getattr(case, name) for case in material.cases])
            for name in ("prompt", "wanted")
        )
        scored = [
            [place_effects(found, tcs, material.inside[row], material.phrase[row]) for found in pair]
            for row, pair in enumerate(told[slot])
        ]
        parts.append((material, before, after, scored))
    found: dict[tuple[str, int, float], Outcomes] = {}
    for way in WAYS:
        edits = []
        keys = [(way, count, strength) for count in COUNTS for strength in STRENGTHS]
        for _, count, strength in keys:
            for row in range(len(both[0].cases)):
                mine = []
                for slot, (material, before, after, scored) in enumerate(parts):
                    scores = _scores(way, before[row], after[row], scored[row], np.random.default_rng([13, row, slot]))
                    where = material.inside[row], material.phrase[row]
                    chosen = choices.first(scores, count)
                    mine += choices.moves(places, chosen, before[row], after[row], strength, *where)
                edits.append(mine)
        made = outcomes(pipe, tcs, both[0], edits, advance(f"exchange: {way}"))
        found |= dict(zip(keys, made, strict=True))
    return found


def _scores(way: str, before: Any, after: Any, told: Any, rng: np.random.Generator) -> Any:
    if way == "circuit":
        return choices.by_circuit(before, after, *told)
    return choices.by_contrast(before, after) if way == "contrast" else choices.at_random(before, after, rng)


def report(material: Material, colours: dict[str, Any], made: dict[tuple[str, int, float], Outcomes]) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        material: the cases.
        colours: what features add to an object's own colour, from `carried`.
        made: what became of the exchanges, by way, features and strength.
    """
    rows = [{"way": w, "features": n, "strength": s} | summary_row(one) for (w, n, s), one in made.items()]
    best = {way: max((key for key in made if key[0] == way), key=lambda key: made[key].success.mean()) for way in WAYS}
    gaps = []
    for count in COUNTS:
        top = {
            way: max((made[key] for key in made if key[:2] == (way, count)), key=lambda one: one.success.mean())
            for way in WAYS
        }
        gaps += [
            {"features": count, "circuit against": way} | paired_difference(top["circuit"].success, top[way].success)
            for way in WAYS[1:]
        ]
    sums = {name: float(table.sum()) for name, table in colours.items()}
    whole = sum(abs(value) for value in sums.values())
    places = [{"features at": name, "add to the colour": value, "share": value / whole} for name, value in sums.items()]
    by_block = [
        {"features at": name, "block": block, "step": step, "add to the colour": float(table[block, step])}
        for name, table in colours.items()
        for block in range(table.shape[0])
        for step in range(table.shape[1])
    ]
    verdict = (
        f"An object's own phrase and image tokens add {places[0]['share']:.0%} and {places[1]['share']:.0%} of what "
        f"features add to its colour (in absolute shares), the other object's {places[2]['share']:.0%} and "
        f"{places[3]['share']:.0%}. Exchanged on {len(material.cases)} scenes, the colours change places in "
        + ", ".join(f"{made[key].success.mean():.1%} ({way}, {key[1]} features)" for way, key in best.items())
        + ", each at its best setting."
    )
    tables = {"Who carries the colour": places, "Exchanged": rows, "Paired differences at best strength": gaps}
    tables |= {"Cases": [{"drawn": material.drawn, "kept": len(material.cases)}], "By block and step": by_block}
    raw = {"tables": tables, "cases": [case._asdict() for case in material.cases]}
    return Result("binding", verdict, tables, {"binding": _figure(colours)}, raw)


def _figure(colours: dict[str, Any]) -> Figure:
    """Draws what features add to the colour, by block and step, one panel per place."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    most = max(float(np.abs(table).max()) for table in colours.values())
    panels = figure.subplots(1, len(colours), sharey=True)
    for axes, (name, table) in zip(panels, colours.items(), strict=True):
        drawn = axes.imshow(table, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto")
        axes.set(title=name, xlabel="step", xticks=range(table.shape[1]), yticks=range(table.shape[0]))
    panels[0].set_ylabel("block")
    figure.colorbar(drawn, ax=panels, label="added to the object's own colour")
    return figure
