"""`steps`: in which step, and on which side, is an object's colour decided? Registered in docs/studies.md.

1. Cases (`removing.draw_plain`); of each the total effects on the colour of the object's box in the last step.
2. `Shares`: how the absolute effects divide among steps and sides.
3. The n places of highest effect of one step, each in turn, and of all steps, are taken away; beside them as many at
   random of the same step, with the same norm.
4. Counted on the images: whether the object still has its colour, what else stays, and by how much its colour fell.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure

from difffract_jax.circuits.effects.effect_tables import counted_rows
from difffract_jax.circuits.effects.total_effects import TotalEffects
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.studies import removing
from difffract_jax.studies.cases import Material
from difffract_jax.studies.choices import FeaturePlaces, all_places, first, mean_codes
from difffract_jax.studies.evaluations import refuse_branches, refuse_other_groups
from difffract_jax.studies.outcomes import mean_with_interval, paired_difference
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, SIZE, FIRST_SEED = 94_000, 60, 11_000_000
COUNTS, STRENGTHS = (8, 32), (1.0, 2.0)
SIDES = ("image stream", "text stream", "single-stream, image", "single-stream, text")


class Shares(NamedTuple):
    """How one run's absolute total effects divide; the parts sum to 1.

    Attributes:
        features: by side, as in `SIDES`.
        errors: likewise.
        text: of the text embedding.
        noise: of the starting noise.
    """

    features: Float64[np.ndarray, "step side"]
    errors: Float64[np.ndarray, "step side"]
    text: float
    noise: float


def steps(pipe: Pipeline, tcs: TranscoderSet, *, size: int | None = None, advance: Advance = quiet) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: scenes to draw instead of the registered number.
        advance: gives a progress callback for a named stage.
    """
    material = removing.right_images(pipe, removing.draw_plain(WORLD, size or SIZE, FIRST_SEED), advance("images"))
    colours, progress = [removing.drawn_colour(case) for case in material.cases], advance("effects")
    divided, effects = [], []
    for row, case in enumerate(material.cases):
        target = f"pixels:color={colours[row]},box={material.box(row)}"
        (found,) = removing.effects_on(pipe, tcs, case.prompt, case.seed, [target])
        divided.append(shares(found))
        effects.append(removing.place_effects(found, tcs, material.inside[row], material.phrase[row]))
        progress(row + 1, len(material.cases))
    places = all_places(tcs, pipe.plan().steps)
    codes = mean_codes(pipe, tcs, material, [case.prompt for case in material.cases], advance("codes"))
    ways = chosen_ways(places, material, np.stack(effects))
    looks = removing.run_removals(pipe, tcs, material, places, ways, advance("removals"))
    random = random_ways(places, material, codes, ways)
    norms = {name: one.norm for name, one in looks.items()}
    ways = removing.matched(pipe, tcs, material, places, random, norms, advance("random: norms"))
    others = removing.run_removals(pipe, tcs, material, places, ways, advance("random"))
    return report(material, divided, looks, others)


def shares(found: TotalEffects) -> Shares:
    """Divides the absolute effects of a run.

    Args:
        found: its total effects.

    Raises:
        UserError: if the run has two evaluations a step, or the model other groups of sites than FLUX.1.
    """
    refuse_branches(found.branches)
    refuse_other_groups(found.layout)
    every = {"img": np.ones(found.noise.shape[0], bool), "txt": np.ones(found.text.shape[0], bool)}
    parts = []
    for kind in (found.features, found.errors):
        effects = [np.abs(np.asarray(group, np.float64)) for group in kind]
        # Image before text, as in `SIDES`.
        sides = sorted(found.layout.sides)
        rows = [counted_rows(found.layout, group, side, every["img"], every["txt"]) for group, side in sides]
        sums = [
            effects[g][:, :, mask].reshape(len(effects[g]), -1).sum(axis=1)
            for (g, _), mask in zip(sides, rows, strict=True)
        ]
        parts.append(np.stack(sums, axis=1))
    inputs = [float(np.abs(np.asarray(part, np.float64)).sum()) for part in (found.text, found.noise)]
    total = parts[0].sum() + parts[1].sum() + sum(inputs)
    return Shares(parts[0] / total, parts[1] / total, inputs[0] / total, inputs[1] / total)


def chosen_ways(
    places: FeaturePlaces, material: Material, effects: Float64[np.ndarray, "case place"]
) -> dict[tuple[Any, ...], removing.Removal]:
    """Returns the removals by (step, count, strength); step "all" chooses among those of all steps.

    Args:
        places: of the transcoders.
        material: the cases.
        effects: of every place on the object's colour.
    """
    found = {}
    for step in (*range(int(places.step.max()) + 1), "all"):
        here = np.ones_like(places.step, bool) if step == "all" else places.step == step
        for count in COUNTS:
            chosen = tuple(first(np.where(here, row, 0.0), count) for row in effects)
            way = removing.Removal(chosen, np.ones(len(effects)), material.inside, material.phrase)
            found |= {(step, count, strength): way.at(strength) for strength in STRENGTHS}
    return found


def random_ways(
    places: FeaturePlaces, material: Material, codes: np.ndarray, ways: Mapping[tuple[Any, ...], removing.Removal]
) -> dict[tuple[Any, ...], removing.Removal]:
    """Returns for every step and count as many active places at random of that step.

    Args:
        places: of the transcoders.
        material: the cases.
        codes: of every place.
        ways: from `chosen_ways`.
    """
    found = {}
    for number, (step, count) in enumerate(dict.fromkeys(name[:2] for name in ways)):
        here = np.ones_like(places.step, bool) if step == "all" else places.step == step
        chosen = removing.random_places(codes, ways[step, count, STRENGTHS[0]].chosen, number, here)
        found[step, count] = removing.Removal(chosen, np.ones(len(chosen)), material.inside, material.phrase)
    return found


def report(
    material: Material,
    divided: list[Shares],
    looks: Mapping[tuple[Any, ...], removing.Looks],
    random: Mapping[tuple[Any, ...], removing.Looks],
) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        material: the cases.
        divided: shares of every case.
        looks: by step, count and strength.
        random: the same at random.
    """
    colours = [removing.drawn_colour(case) for case in material.cases]
    before = removing.colour_values(material, material.images, colours)
    fall = {
        who: {name: before - removing.colour_values(material, one.images, colours) for name, one in found.items()}
        for who, found in (("circuit", looks), ("random", random))
    }
    rows = [
        {"step": name[0], "places": name[1], "strength": name[2], "way": who}
        | removing.counted(found[name], colours, fall[who][name])
        for name in looks
        for who, found in (("circuit", looks), ("random", random))
    ]
    against = [
        {"step": name[0], "places": name[1], "strength": name[2]}
        | paired_difference(fall["circuit"][name], fall["random"][name])
        for name in looks
    ]
    last = max(name[0] for name in looks if name[0] != "all")
    to_last = [
        {"step": name[0], "places": name[1], "strength": name[2]}
        | paired_difference(fall["circuit"][name], fall["circuit"][last, *name[1:]])
        for name in looks
        if name[0] != last
    ]
    tables = {"Shares of absolute effects": share_table(divided), "Removals": rows}
    tables |= {"Fall of the colour, circuit - random": against, f"Fall of the colour, step - step {last}": to_last}
    tables["Cases"] = [{"drawn": material.drawn, "kept": len(material.cases), "colour value": float(before.mean())}]
    by_step = {
        step: sum(r["share"] for r in tables["Shares of absolute effects"] if r["step"] == step)
        for step in range(last + 1)
    }
    at = {step: 1 - float(looks[step, COUNTS[-1], 1.0].has(colours).mean()) for step in (*range(last + 1), "all")}
    verdict = (
        f"In {len(material.cases)} scenes the absolute effects on an object's colour divide among the steps as "
        + ", ".join(f"{share:.0%}" for share in by_step.values())
        + f"; zeroing {COUNTS[-1]} places of one step takes the object's colour away in "
        + ", ".join(f"{at[step]:.0%}" for step in range(last + 1))
        + f" of the cases, the best {COUNTS[-1]} of all steps in {at['all']:.0%}."
    )
    raw = {"tables": tables, "cases": [case._asdict() for case in material.cases]}
    raw["fall"] = {who: {str(name): a.tolist() for name, a in found.items()} for who, found in fall.items()}
    figures = {"steps": _figure(divided, fall, last)}
    return Result("steps", verdict, tables, figures, raw)


def share_table(divided: list[Shares]) -> list[dict[str, Any]]:
    """Returns mean shares with intervals: a row per step and side, and one for either input.

    Args:
        divided: shares of every case.
    """
    rows = []
    features, errors = (np.stack([getattr(one, name) for one in divided]) for name in ("features", "errors"))
    for step in range(features.shape[1]):
        for side, name in enumerate(SIDES):
            mean, low, high = mean_with_interval(features[:, step, side])
            row = {"step": step, "side": name, "share": mean, "95% from": low, "to": high}
            rows.append(row | {"errors beside": float(errors[:, step, side].mean())})
    for name in ("text", "noise"):
        mean, low, high = mean_with_interval(np.array([getattr(one, name) for one in divided]))
        label = {"text": "text embedding", "noise": "starting noise"}[name]
        rows.append({"step": "-", "side": label, "share": mean, "95% from": low, "to": high, "errors beside": 0.0})
    return rows


def _figure(divided: list[Shares], fall: Mapping[str, Any], last: int) -> Figure:
    """Draws shares by step, and the fall of the colour by the step of the removal."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(COUNTS))
    mean = np.stack([one.features for one in divided]).mean(axis=0)
    bottom = np.zeros(last + 1)
    for side, name in enumerate(SIDES):
        left.bar(range(last + 1), mean[:, side], bottom=bottom, label=name)
        bottom += mean[:, side]
    left.set(title="features' share of absolute effects", xlabel="step", xticks=range(last + 1))
    left.legend(fontsize=7)
    steps_ = (*range(last + 1), "all")
    for axes, count in zip(right, COUNTS, strict=True):
        for number, (who, strength) in enumerate((w, s) for w in ("circuit", "random") for s in STRENGTHS):
            values = [mean_with_interval(fall[who][step, count, strength]) for step in steps_]
            middle = np.array([v[0] for v in values])
            ends = np.abs(np.array([v[1:] for v in values]).T - middle)
            at = np.arange(len(steps_)) + (number - 1.5) * 0.2
            colour = "tab:blue" if who == "circuit" else "tab:grey"
            alpha = 0.55 if strength == STRENGTHS[0] else 1.0
            axes.bar(at, middle, 0.2, yerr=ends, color=colour, alpha=alpha, label=f"{who}, strength {strength:g}")
        axes.set(title=f"fall of the colour, {count} places", xlabel="step of the removal")
        axes.set_xticks(range(len(steps_)), [str(step) for step in steps_])
    right[0].legend(fontsize=7)
    return figure
