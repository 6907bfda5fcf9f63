"""`concept-context`: does an object hang on features at its own tokens, or on those around it? Registered in
docs/studies.md.

1. Cases (`removing.draw_plain`); of each the total effects on the object's own colour in its box.
2. Concept: places at the image tokens that the object covers and at its phrase. Context: places at all other image
   tokens, and at all other tokens of the prompt. The n of highest effect of either are taken away, and beside them as
   many at random of the same, with the same norm.
3. Counted on the images: whether the object keeps its noun and its colour, what becomes of the others and of the rest
   of the image, and by how much the colour fell.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure

from difffract_jax.models.pipeline import Pipeline, encode
from difffract_jax.studies import removing
from difffract_jax.studies.cases import Material
from difffract_jax.studies.choices import all_places, first, mean_codes
from difffract_jax.studies.outcomes import mean_with_interval, paired_difference
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, SIZE, FIRST_SEED = 96_000, 60, 12_000_000
COUNTS, STRENGTHS = (8, 32, 128), (1.0, 2.0)
COMPARED = (32, 1.0)
"""Count and strength of the comparison."""
WHERE = ("concept", "context")


def concept_context(pipe: Pipeline, tcs: TranscoderSet, *, size: int | None = None, advance: Advance = quiet) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: scenes to draw instead of the registered number.
        advance: gives a progress callback for a named stage.
    """
    material = removing.right_images(pipe, removing.draw_plain(WORLD, size or SIZE, FIRST_SEED), advance("images"))
    prompts, progress = [case.prompt for case in material.cases], advance("effects")
    around = context_of(pipe, material)
    effects: dict[str, list[np.ndarray]] = {name: [] for name in WHERE}
    for row, case in enumerate(material.cases):
        target = f"pixels:color={removing.drawn_colour(case)},box={material.box(row)}"
        (found,) = removing.effects_on(pipe, tcs, case.prompt, case.seed, [target])
        for name, where in zip(WHERE, (material, around), strict=True):
            effects[name].append(removing.place_effects(found, tcs, where.inside[row], where.phrase[row]))
        progress(row + 1, len(prompts))
    places = all_places(tcs, pipe.plan().steps)
    ways: dict[tuple[Any, ...], removing.Removal] = {}
    random: dict[tuple[Any, ...], removing.Removal] = {}
    for name, where in zip(WHERE, (material, around), strict=True):
        codes = mean_codes(pipe, tcs, where, prompts, advance(f"{name}: codes"))
        for count in COUNTS:
            way = removing.Removal(
                tuple(first(row, count) for row in effects[name]), np.ones(len(prompts)), where.inside, where.phrase
            )
            ways |= {(name, count, strength): way.at(strength) for strength in STRENGTHS}
            random[name, count] = way._replace(chosen=removing.random_places(codes, way.chosen, count))
    looks = removing.run_removals(pipe, tcs, material, places, ways, advance("removals"))
    norms = {name: one.norm for name, one in looks.items()}
    scaled = removing.matched(pipe, tcs, material, places, random, norms, advance("random: norms"))
    others = removing.run_removals(pipe, tcs, material, places, scaled, advance("random"))
    stacked = {name: np.stack(rows) for name, rows in effects.items()}
    return report(material, stacked, looks, others)


def context_of(pipe: Pipeline, material: Material) -> Material:
    """Returns the material with the masks of everything around: image tokens that the object does not cover, and tokens
    of the prompt, the closing one included, outside its phrase.

    Args:
        pipe: the organism.
        material: the cases.
    """
    length = material.phrase.shape[1]
    own = np.stack([np.asarray(encode(pipe, case.prompt, length).mask) for case in material.cases])
    return material._replace(inside=~material.inside, phrase=own & ~material.phrase)


def report(
    material: Material,
    effects: Mapping[str, Float64[np.ndarray, "case place"]],
    looks: Mapping[tuple[Any, ...], removing.Looks],
    random: Mapping[tuple[Any, ...], removing.Looks],
) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        material: the cases.
        effects: of every place, at the object's tokens and around.
        looks: by where, count and strength.
        random: the same at random.
    """
    colours = [removing.drawn_colour(case) for case in material.cases]
    before = removing.colour_values(material, material.images, colours)
    found = {(*name, "circuit"): one for name, one in looks.items()}
    found |= {(*name, "random"): one for name, one in random.items()}
    fall = {name: before - removing.colour_values(material, one.images, colours) for name, one in found.items()}
    rows = [
        {"at": name[0], "places": name[1], "strength": name[2], "way": name[3]}
        | removing.counted(one, colours, fall[name])
        for name, one in found.items()
    ]
    pair = [(name, *COMPARED, "circuit") for name in WHERE]
    compared = [
        {"concept - context": what, "places": COMPARED[0], "strength": COMPARED[1]} | paired_difference(*values)
        for what, values in (
            ("fall of the colour", [fall[name] for name in pair]),
            ("keeps its colour", [found[name].has(colours) for name in pair]),
            ("change elsewhere", [found[name].outside for name in pair]),
            ("norm", [found[name].norm for name in pair]),
        )
    ]
    against = [
        {"at": name[0], "places": name[1], "strength": name[2]}
        | paired_difference(fall[*name, "circuit"], fall[*name, "random"])
        for name in looks
    ]
    sizes = np.stack([np.abs(effects[name]).sum(axis=1) for name in WHERE], axis=1)
    part = sizes[:, 0] / sizes.sum(axis=1)
    mean, low, high = mean_with_interval(part)
    tables = {"Removals": rows, "Concept - context": compared, "Fall of the colour, circuit - random": against}
    tables["Share of the features' absolute effects"] = [{"at": "concept", "share": mean, "95% from": low, "to": high}]
    tables["Cases"] = [{"drawn": material.drawn, "kept": len(material.cases), "colour value": float(before.mean())}]
    keeps = [float(found[name].has(colours).mean()) for name in pair]
    verdict = (
        f"In {len(material.cases)} scenes, zeroing {COMPARED[0]} features at the object's tokens lowers its colour's "
        f"value by {fall[pair[0]].mean():.3f}, as many at all other tokens by {fall[pair[1]].mean():.3f} "
        f"(difference {compared[0]['difference']:.3f}, 95% interval {compared[0]['95% from']:.3f} to "
        f"{compared[0]['to']:.3f}); the object keeps its colour in {keeps[0]:.0%} and {keeps[1]:.0%}. Its own tokens "
        f"hold {mean:.0%} of the features' absolute effects."
    )
    raw = {"tables": tables, "cases": [case._asdict() for case in material.cases], "share": part.tolist()}
    raw["fall"] = {str(name): values.tolist() for name, values in fall.items()}
    return Result("concept-context", verdict, tables, {"concept-context": _figure(found, fall, colours)}, raw)


def _figure(
    found: Mapping[tuple[Any, ...], removing.Looks], fall: Mapping[tuple[Any, ...], Any], colours: list[str]
) -> Figure:
    """Draws what the object keeps and what changes, over the number of places."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    measures = (
        ("object keeps its colour", lambda name: found[name].has(colours).mean()),
        ("fall of the colour", lambda name: fall[name].mean()),
        ("change elsewhere (RMS)", lambda name: found[name].outside.mean()),
    )
    for axes, (title, measure) in zip(figure.subplots(1, 3), measures, strict=True):
        for where, colour in zip(WHERE, ("tab:blue", "tab:orange"), strict=True):
            for way, dash in (("circuit", "-"), ("random", ":")):
                for strength, mark in zip(STRENGTHS, "os", strict=True):
                    line = [measure((where, count, strength, way)) for count in COUNTS]
                    label = f"{where}, {way}, {strength:g}"
                    axes.plot(COUNTS, line, dash, color=colour, marker=mark, ms=4, label=label)
        axes.set(title=title, xlabel="features taken away", xscale="log")
        axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes.minorticks_off()
    lines = figure.axes[0].get_legend_handles_labels()
    title = "strength 1 zeroes,\n2 inverts"
    figure.legend(*lines, loc="outside right center", fontsize=8, title=title, title_fontsize=8)
    return figure
