"""`suppressor`: are there features that hold a competing colour down? Registered in docs/studies.md.

1. Two materials: scenes of two shapes, where the other object's colour competes; captions that name a concept in a
   colour not its own and are drawn in its prior's, where the colour asked for does.
2. Of every place at the object's tokens two total effects in its box, each against grey: c on the competing colour, o
   on the object's own. What carries its own colour lowers the other too, since the pixels cannot be both.
   `suppressors` have c < 0 and o at most a quarter of |c|, lowest c first; `carriers` o above a quarter of |c|, highest
   first.
3. n suppressors, n carriers, n of each, and as many at random with the suppressors' norm are taken away.
4. Counted on the images: by how much the competing colour rises, and how often the object reads in it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from matplotlib.figure import Figure

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.labels import Labels
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import parse
from difffract_jax.organism.evaluate import contradicting
from difffract_jax.studies import removing
from difffract_jax.studies.cases import Case, Material
from difffract_jax.studies.choices import SIDES, FeaturePlaces, all_places, first, mean_codes
from difffract_jax.studies.outcomes import mean_with_interval, paired_difference
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

SIZE = 60
SCENES, CONTRADICTIONS = (98_000, 13_000_000), (99_000, 14_000_000)
"""World, and noise seed of the first case."""
COUNTS, STRENGTHS = (8, 32), (1.0, 2.0, 3.0)
COMPARED = (32, 2.0)
MOST_OWN = 0.25
"""Effect on the object's own colour, over the size of that on the competing one, up to which a place may suppress."""
WAYS = ("suppressors", "carriers", "both", "random")
LISTED = 12
"""Features listed per material."""


def suppressor(
    pipe: Pipeline,
    tcs: TranscoderSet,
    *,
    labels: Labels | None = None,
    size: int | None = None,
    advance: Advance = quiet,
) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        labels: of its features, to name suppressors by.
        size: cases to draw of each material instead of the registered number.
        advance: gives a progress callback for a named stage.
    """
    count, (world, seed) = size or SIZE, SCENES
    scenes = removing.draw_plain(world, count, seed)
    captions = contradicting(count, CONTRADICTIONS[0]).captions
    drawn = {
        "scenes": [case for case in scenes if competing_colour(case) != removing.drawn_colour(case)],
        "contradictions": [Case(text, text, CONTRADICTIONS[1] + row, 0) for row, text in enumerate(captions)],
    }
    parts = {}
    for name, cases in drawn.items():
        material = removing.right_images(pipe, cases, advance(f"{name}: images"))
        parts[name] = _measure(pipe, tcs, material, name, advance)
    return report(all_places(tcs, pipe.plan().steps), parts, labels)


def competing_colour(case: Case) -> str:
    """Returns the colour that is held down: the one asked for if the object is drawn in another, else the other one's.

    Args:
        case: a right image of two objects, or a concept in a colour not its own.
    """
    objects = parse(case.prompt).objects
    if objects[case.slot].colour != removing.drawn_colour(case):
        return objects[case.slot].colour
    return removing.drawn_colour(case._replace(slot=1 - case.slot))


def choose(
    own: Float64[np.ndarray, "place"], competing: Float64[np.ndarray, "place"], count: int
) -> tuple[Int[np.ndarray, "chosen"], Int[np.ndarray, "carrier"]]:
    """Returns suppressors and carriers; no place is both.

    Args:
        own: total effect of every place on the object's own colour.
        competing: on the competing one.
        count: at most so many of each.
    """
    carries = own > MOST_OWN * np.abs(competing)
    return first(np.where(carries, 0.0, -competing), count), first(np.where(carries, own, 0.0), count)


Part = tuple[Material, dict[tuple[Any, ...], removing.Looks], list[np.ndarray]]


def _measure(pipe: Pipeline, tcs: TranscoderSet, material: Material, name: str, advance: Advance) -> Part:
    """Returns the material, what became of it in every way, and the suppressors of every case, lowest first."""
    progress = advance(f"{name}: effects")
    effects = []
    for row, case in enumerate(material.cases):
        colours = removing.drawn_colour(case), competing_colour(case)
        targets = [f"pixels:color={colour},box={material.box(row)}" for colour in colours]
        found = removing.effects_on(pipe, tcs, case.prompt, case.seed, targets)
        effects.append([removing.place_effects(one, tcs, material.inside[row], material.phrase[row]) for one in found])
        progress(row + 1, len(material.cases))
    places = all_places(tcs, pipe.plan().steps)
    codes = mean_codes(pipe, tcs, material, [case.prompt for case in material.cases], advance(f"{name}: codes"))
    ways: dict[tuple[Any, ...], removing.Removal] = {}
    random: dict[tuple[Any, ...], removing.Removal] = {}
    for count in COUNTS:
        pairs = [choose(own, competing, count) for own, competing in effects]
        sets = dict(zip(WAYS, zip(*pairs, strict=True), strict=False))
        sets["both"] = tuple(np.concatenate(pair) for pair in pairs)
        for way, chosen in sets.items():
            made = removing.Removal(chosen, np.ones(len(chosen)), material.inside, material.phrase)
            ways |= {(way, count, strength): made.at(strength) for strength in STRENGTHS}
        like = ways["suppressors", count, STRENGTHS[0]]
        random["random", count] = like._replace(chosen=removing.random_places(codes, like.chosen, count))
    looks = removing.run_removals(pipe, tcs, material, places, ways, advance(f"{name}: removals"))
    norms = {("random", *key[1:]): one.norm for key, one in looks.items() if key[0] == "suppressors"}
    scaled = removing.matched(pipe, tcs, material, places, random, norms, advance(f"{name}: random, norms"))
    looks |= removing.run_removals(pipe, tcs, material, places, scaled, advance(f"{name}: random"))
    return material, looks, [choose(own, competing, COUNTS[-1])[0] for own, competing in effects]


def report(places: FeaturePlaces, parts: Mapping[str, Part], labels: Labels | None) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        places: of the transcoders.
        parts: by material, its cases, what became of them, and their suppressors.
        labels: of the features, if there are any.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    raw: dict[str, Any] = {"cases": {}, "rise": {}}
    rises, said = {}, []
    for name, (material, looks, chosen) in parts.items():
        own, rival = ([f(case) for case in material.cases] for f in (removing.drawn_colour, competing_colour))
        rise, fall = (_changes(material, looks, colours) for colours in (rival, own))
        fall = {key: -change for key, change in fall.items()}
        tables[f"{name}: removals"] = [
            {"way": key[0], "places": key[1], "strength": key[2]}
            | _rises(rise[key], looks[key], rival)
            | removing.counted(looks[key], own, fall[key])
            for key in sorted(looks, key=lambda key: (WAYS.index(key[0]), key[1:]))
        ]
        pairs = ("suppressors", "random"), ("both", "carriers"), ("suppressors", "carriers")
        tables[f"{name}: rise of the competing colour"] = [
            {"difference of": f"{a} - {b}", "places": COMPARED[0], "strength": COMPARED[1]}
            | paired_difference(rise[a, *COMPARED], rise[b, *COMPARED])
            for a, b in pairs
        ]
        tables[f"{name}: most frequent suppressors"] = frequent(places, chosen, labels)
        tables[f"{name}: where suppressors lie"] = where(places, chosen)
        tables[f"{name}: cases"] = [
            {"drawn": material.drawn, "kept": len(material.cases)} | _levels(material, own, rival)
        ]
        rises[name] = rise
        reads = looks["suppressors", *COMPARED].has(rival).mean()
        gap = tables[f"{name}: rise of the competing colour"][0]
        said.append(
            f"{name}, {len(material.cases)} cases: without {COMPARED[0]} suppressors at strength {COMPARED[1]:g} the "
            f"competing colour's value rises by {rise['suppressors', *COMPARED].mean():.3f}, {gap['difference']:.3f} "
            f"more than at random of the same norm (95% interval {gap['95% from']:.3f} to {gap['to']:.3f}), and the "
            f"object reads in it in {reads:.0%} of the cases"
        )
        raw["cases"][name] = [case._asdict() for case in material.cases]
        raw["rise"][name] = {str(key): values.tolist() for key, values in rise.items()}
    verdict = ". ".join(text[0].upper() + text[1:] for text in said) + "."
    return Result("suppressor", verdict, tables, {"suppressor": _figure(parts, rises)}, raw | {"tables": tables})


def _levels(material: Material, own: Sequence[str], rival: Sequence[str]) -> dict[str, float]:
    values = [float(removing.colour_values(material, material.images, c).mean()) for c in (own, rival)]
    return dict(zip(("own colour's value", "competing colour's"), values, strict=True))


def _changes(
    material: Material, looks: Mapping[tuple[Any, ...], removing.Looks], colours: Sequence[str]
) -> dict[tuple[Any, ...], Float64[np.ndarray, "case"]]:
    """Returns by how much colours' values are higher than in the unedited images, in every way."""
    before = removing.colour_values(material, material.images, colours)
    return {key: removing.colour_values(material, one.images, colours) - before for key, one in looks.items()}


def _rises(rise: Float64[np.ndarray, "case"], one: removing.Looks, rival: Sequence[str]) -> dict[str, float]:
    mean, low, high = mean_with_interval(rise)
    return {"rise": mean, "rise from": low, "rise to": high, "reads in it": float(one.has(rival).mean())}


def frequent(
    places: FeaturePlaces, chosen: Sequence[Int[np.ndarray, "_"]], labels: Labels | None
) -> list[dict[str, Any]]:
    """Lists the features that are chosen in most cases, at whatever step.

    Args:
        places: of the transcoders.
        chosen: places of every case.
        labels: of the features, if there are any.
    """
    cases: Counter[tuple[int, int, int]] = Counter()
    for mine in chosen:
        cases.update({(int(places.group[p]), int(places.block[p]), int(places.feature[p])) for p in mine})
    rows = []
    for (group, block, number), count in cases.most_common(LISTED):
        site, side = SIDES[group]
        feature = Feature(site.label, block, number)
        row = {"feature": str(feature), "side": side, "cases": count, "of": len(chosen)}
        rows.append(row | ({} if labels is None else {"label": str(labels.of(feature))}))
    return rows


def where(places: FeaturePlaces, chosen: Sequence[Int[np.ndarray, "_"]]) -> list[dict[str, Any]]:
    """Counts chosen places by side and step, as shares of all.

    Args:
        places: of the transcoders.
        chosen: places of every case.
    """
    every = np.concatenate(chosen)
    rows = []
    for group, (site, side) in enumerate(SIDES):
        stream = {"img": "image stream", "txt": "text stream"}.get(site.label, f"{site.label}-stream, {side}")
        mine = places.step[every[places.group[every] == group]]
        shares = np.bincount(mine, minlength=int(places.step.max()) + 1) / max(len(every), 1)
        row = {f"step {step}": float(share) for step, share in enumerate(shares)}
        rows.append({"side": stream} | row | {"all": float(shares.sum())})
    return rows


def _figure(parts: Mapping[str, Part], rises: Mapping[str, Mapping[tuple[Any, ...], np.ndarray]]) -> Figure:
    """Draws rise of the competing colour, and how often the object reads in it, over strength."""
    figure = Figure(figsize=(10, 3.4 * len(parts)), layout="constrained")
    for axes, (name, (material, looks, _)) in zip(
        figure.subplots(len(parts), 2, squeeze=False), parts.items(), strict=True
    ):
        rival = [competing_colour(case) for case in material.cases]
        for number, way in enumerate(WAYS):
            for count, dash in zip(COUNTS, (":", "-"), strict=True):
                keys = [(way, count, strength) for strength in STRENGTHS]
                style = {"color": f"C{number}", "linestyle": dash, "marker": "o", "ms": 4}
                axes[0].plot(STRENGTHS, [rises[name][key].mean() for key in keys], label=f"{way}, {count}", **style)
                axes[1].plot(STRENGTHS, [looks[key].has(rival).mean() for key in keys], **style)
        axes[0].set(title=f"{name}: rise of the competing colour", xlabel="strength", xticks=STRENGTHS)
        axes[1].set(title="object reads in it", xlabel="strength", xticks=STRENGTHS)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure
