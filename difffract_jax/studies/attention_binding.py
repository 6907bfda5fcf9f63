"""`binding` with attention in the circuit, in registered rounds (docs/studies.md).

1. Scenes as in `binding`: the first of its own for calibration, others, of another world, held out.
2. Per scene and object, what moving a place to its code in the exchanged caption's run adds to the exchange, with
   attention frozen and explained (`scene_effects`). The difference is what features do through queries and keys.
3. Every way names n places of each object, whose codes are moved; the ceilings move all. Strengths are those of most
   exchanges on the calibration scenes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from matplotlib.figure import Figure

from difffract_jax.circuits.editing.edit_tables import CodeTable
from difffract_jax.generators import random_generator
from difffract_jax.models.pipeline import Pipeline, encode
from difffract_jax.organism.captions import parse
from difffract_jax.organism.evaluate import held_out
from difffract_jax.studies import binding, choices
from difffract_jax.studies.cases import Case, Material, draw_cases, recoloured
from difffract_jax.studies.code_moves import (
    Codes,
    Tokens,
    no_moves,
    place_codes,
    place_moves,
    run_codes,
    steer_codes,
    token_moves,
    token_settings,
)
from difffract_jax.studies.outcomes import Outcomes, judged, paired_difference, summary_row
from difffract_jax.studies.patterns import with_patterns_of
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.studies.scene_effects import SceneScores, scene_scores, tokens_of_both
from difffract_jax.transcoders.transcoder import TranscoderSet

COUNTS, CALIBRATION, TEST = (8, 32, 128), 24, 80
WORLD, FIRST_SEED = 90_200, 16_000_000
"""Of the held-out scenes."""
BAR = 0.6
WAYS = ("explained", "query and key", "held", "contrast", "random")
Setting = tuple[str, int, float]
"""Way, features of each object (0 for all), strength."""


class Round(NamedTuple):
    """What a registered round lays down.

    Attributes:
        strengths: of the edits.
        ceilings: edits of all features.
        whole: their strengths.
        sets: whether edits set every token's own code; else they move the mean over tokens, as in `binding`.
    """

    strengths: tuple[float, ...]
    ceilings: tuple[str, ...]
    whole: tuple[float, ...]
    sets: bool


ROUNDS = {
    1: Round((1.0, 1.5, 2.0), ("all", "all, by token", "all, everywhere"), (1.0, 1.5, 2.0), False),
    2: Round((1.5, 2.0), ("all", "all, everywhere", "all, text side", "all, image side"), (1.0,), True),
}


class Scenes(NamedTuple):
    """Scenes, and all that a way to choose features sees of them.

    Attributes:
        both: the scenes, once for either object.
        own_text: the prompt's own text tokens, per scene.
        codes: all codes of the run of the prompt, and of that of the exchanged caption, per scene.
        places: mean codes of all places in both runs, per scene and object.
        scores: of the places of both objects, per scene.
    """

    both: tuple[Material, Material]
    own_text: list[np.ndarray]
    codes: tuple[list[Codes], list[Codes]]
    places: list[list[list[np.ndarray]]]
    scores: list[SceneScores]


def attention_binding(
    pipe: Pipeline,
    tcs: TranscoderSet,
    *,
    size: int | None = None,
    round: int | None = None,
    advance: Advance = quiet,
    kept: Path | None = None,
) -> Result:
    """Runs a round of the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: scenes of either kind to draw instead of the registered numbers.
        round: which of `ROUNDS`; the last if left out.
        advance: gives a progress callback for a named stage.
        kept: folder in which what circuits tell of a scene is kept, and looked for; none if left out.
    """
    number = max(ROUNDS) if round is None else round
    rules = ROUNDS[number]
    drawn = {
        "calibration": binding.exchanges(size or CALIBRATION),
        "held out": exchanges_of(WORLD, FIRST_SEED, size or TEST),
    }
    settings = [(way, n, s) for way in WAYS for n in COUNTS for s in rules.strengths]
    settings += [(way, 0, s) for way in rules.ceilings for s in rules.whole]
    found: dict[str, dict[Setting, Outcomes]] = {}
    scenes: dict[str, Material] = {}
    carried: list[dict[str, Any]] = []
    for name, cases in drawn.items():
        seen = read_scenes(pipe, tcs, cases, name, advance, kept)
        found[name] = exchange(pipe, tcs, seen, settings, rules, advance(f"{name}: exchange"))
        scenes[name] = seen.both[0]
        settings = best_strengths(found[name])
        if rules.sets and name == "held out":
            carried = pattern_shares(pipe, seen.both[0])
    return report(number, scenes, found, carried)


def exchanges_of(world: int, first_seed: int, count: int) -> list[Case]:
    """Draws scenes as `binding.exchanges` does, of another world and other noise.

    Args:
        world: seed of the scenes.
        first_seed: of the noise.
        count: how many.
    """
    found: list[Case] = []
    asked = held_out(4 * count, "two shapes", world)
    for row, prompt in enumerate(asked.captions):
        first, second = (thing.colour for thing in parse(prompt).objects)
        if first != second and asked.kind[row, 0] != asked.kind[row, 1] and len(found) < count:
            wanted = recoloured(recoloured(prompt, 0, second), 1, first)
            found.append(Case(prompt, wanted, first_seed + row, 0))
    return found


def read_scenes(
    pipe: Pipeline, tcs: TranscoderSet, cases: Sequence[Case], name: str, advance: Advance, kept: Path | None = None
) -> Scenes:
    """Draws scenes, and measures in them what ways to choose features see.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        cases: to draw.
        name: of the phase, for progress.
        advance: gives a progress callback for a named stage.
        kept: folder of what was measured before.
    """
    first = draw_cases(pipe, cases, advance(f"{name}: images"))
    second = draw_cases(pipe, [case._replace(slot=1) for case in first.cases], advance(f"{name}: images again"))
    both, codes = (first, second), []
    for run in ("prompt", "wanted"):
        texts = [getattr(case, run) for case in first.cases]
        codes.append(run_codes(pipe, tcs, first.cases, texts, advance(f"{name}: codes, {run}")))
    tokens = pipe.plan().text_tokens
    own = [np.asarray(encode(pipe, case.prompt, tokens).mask) for case in first.cases]
    places, scores, done = [], [], advance(f"{name}: circuits")
    for row in range(len(first.cases)):
        objects: list[Tokens] = [(one.inside[row], one.phrase[row]) for one in both]
        places.append([[place_codes(run[row], tokens) for run in codes] for tokens in objects])
        scores.append(scene_scores(pipe, tcs, both, row, (codes[0][row], codes[1][row]), kept))
        done(row + 1, len(first.cases))
    return Scenes(both, own, (codes[0], codes[1]), places, scores)


def scores_of(
    way: str,
    before: Float[np.ndarray, "place"],
    after: Float[np.ndarray, "place"],
    effects: Float[np.ndarray, "attention place"],
    seed: Sequence[int],
) -> Float64[np.ndarray, "place"]:
    """Scores the places of an object in one of `WAYS`.

    Args:
        way: which.
        before: mean codes in the run of the prompt.
        after: in that of the exchanged caption.
        effects: what moving each place adds to the exchange, attention frozen and explained.
        seed: of `random`.
    """
    frozen, live = np.asarray(effects, np.float64)
    if way == "contrast":
        return choices.by_contrast(before, after)
    if way == "random":
        return choices.at_random(before, after, random_generator(*seed))
    return {"explained": live, "query and key": live - frozen, "held": frozen}[way]


def exchange(
    pipe: Pipeline, tcs: TranscoderSet, seen: Scenes, settings: Sequence[Setting], rules: Round, progress: Any
) -> dict[Setting, Outcomes]:
    """Edits every scene in every setting and reads what comes out.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        seen: the scenes.
        settings: ways, features and strengths.
        rules: of the round.
        progress: called with (images done, images in all).
    """
    cases = seen.both[0].cases
    rows = [row for _ in settings for row in range(len(cases))]
    images, norms = steer_codes(
        pipe,
        tcs,
        [cases[row].prompt for row in rows],
        [cases[row].seed for row in rows],
        lambda image: edits_of(seen, settings[image // len(cases)], image % len(cases), rules),
        progress,
    )
    parts = (np.split(array, len(settings)) for array in (images, norms))
    return {setting: judged(seen.both[0], mine, sizes) for setting, mine, sizes in zip(settings, *parts, strict=True)}


def edits_of(seen: Scenes, setting: Setting, row: int, rules: Round) -> tuple[CodeTable, ...]:
    """Returns the edits of a scene in a setting.

    Args:
        seen: the scenes.
        setting: way, features and strength.
        row: which scene.
        rules: of the round.
    """
    way, count, strength = setting
    before, after = (codes[row] for codes in seen.codes)
    tables = no_moves(before)
    objects: list[Tokens] = [(one.inside[row], one.phrase[row]) for one in seen.both]
    if way in rules.ceilings and (rules.sets or way != "all"):
        where = _moved_tokens(seen, way, row)
        if rules.sets:
            every = np.ones(seen.scores[row].mean.shape[-1], bool)
            token_settings(tables, every, after, strength, where)
        else:
            token_moves(tables, before, after, strength, where)
        return tables
    for slot, tokens in enumerate(objects):
        old, new = seen.places[row][slot]
        effects = (seen.scores[row].token if rules.sets else seen.scores[row].mean)[:, slot]
        scores = scores_of("contrast" if way == "all" else way, old, new, effects, (13, row, slot))
        chosen = choices.first(scores, count or scores.size)
        if rules.sets:
            token_settings(tables, np.isin(np.arange(scores.size), chosen), after, strength, tokens)
        else:
            place_moves(tables, chosen, old, new, strength, tokens)
    return tables


def _moved_tokens(seen: Scenes, way: str, row: int) -> Tokens:
    """Returns where a ceiling moves features: at the objects' own tokens, everywhere, or at all tokens of one side."""
    image, text = tokens_of_both(seen.both, row)
    if way in ("all", "all, by token"):
        return image, text
    return np.full_like(image, way != "all, text side"), seen.own_text[row] & (way != "all, image side")


def pattern_shares(pipe: Pipeline, material: Material) -> list[dict[str, Any]]:
    """Returns how many scenes show the exchanged caption when only attention's patterns, or all but them, are its own.

    Args:
        pipe: the organism.
        material: the scenes.
    """
    texts = [[getattr(case, name) for case in material.cases] for name in ("prompt", "wanted")]
    seeds, rows = [case.seed for case in material.cases], []
    for patterns, (values, goes) in (("exchanged", texts), ("as they were", texts[::-1])):
        images = with_patterns_of(pipe, values, goes, seeds)
        made = judged(material, images, np.zeros(len(seeds), np.float32))
        rest = "as it was" if patterns == "exchanged" else "exchanged"
        rows.append({"patterns": patterns, "all else": rest, "colours exchanged": float(made.success.mean())})
    return rows


def best_strengths(found: dict[Setting, Outcomes]) -> list[Setting]:
    """Returns of every way and number of features the setting of most exchanges, of least collateral among equals."""
    best: dict[tuple[str, int], Setting] = {}
    for key, one in found.items():
        rank = one.success.mean(), -one.outside.mean()
        held = best.get(key[:2])
        if held is None or rank > (found[held].success.mean(), -found[held].outside.mean()):
            best[key[:2]] = key
    return list(best.values())


def report(
    number: int,
    kept: dict[str, Material],
    found: dict[str, dict[Setting, Outcomes]],
    carried: list[dict[str, Any]],
) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        number: of the round.
        kept: the scenes of either phase.
        found: what became of the exchanges, by phase and setting.
        carried: from `pattern_shares`; none if it was not asked for.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in ("held out", "calibration"):
        tables[f"Exchanged, {name}"] = [
            {"way": way, "features": n or "all", "strength": s} | summary_row(one)
            for (way, n, s), one in found[name].items()
        ]
    at = {key[:2]: (key[2], one) for key, one in found["held out"].items()}
    best = WAYS[0]
    tables["Paired differences, held out"] = [
        {"features": n, f"{best} against": way} | paired_difference(at[best, n][1].success, at[way, n][1].success)
        for n in COUNTS
        for way in WAYS[1:]
    ]
    tables["Scenes"] = [{"phase": name, "drawn": one.drawn, "kept": len(one.cases)} for name, one in kept.items()]
    tables |= {"Attention's patterns of the other run, held out": carried} if carried else {}
    share = at[best, COUNTS[-1]][1].success.mean()
    verdict = (
        f"Round {number}: on {len(kept['held out'].cases)} held-out scenes, {COUNTS[-1]} features of each object that "
        f"the circuit with attention names exchange the colours in {share:.1%} (bar {BAR:.0%}: "
        f"{'met' if share >= BAR else 'missed'}); "
        + ", ".join(f"{at[way, COUNTS[-1]][1].success.mean():.1%} {way}" for way in WAYS[1:])
        + "; of all features moved "
        + ", ".join(f"{at[way, 0][1].success.mean():.1%} ({way})" for way in ROUNDS[number].ceilings)
        + "."
    )
    raw = {
        "round": number,
        "tables": tables,
        "cases": {name: [case._asdict() for case in one.cases] for name, one in kept.items()},
        "success": {
            name: {" ".join(map(str, key)): one.success.tolist() for key, one in some.items()}
            for name, some in found.items()
        },
    }
    figure = {f"binding-attention-{number}": draw_shares(at, ROUNDS[number].ceilings)}
    return Result(f"binding-attention-{number}", verdict, tables, figure, raw)


def draw_shares(at: dict[tuple[str, int], tuple[float, Outcomes]], ceilings: Sequence[str]) -> Figure:
    """Draws the share of exchanges by number of features, a line per way, and the ceilings.

    Args:
        at: (way, features) -> strength and what became of the held-out scenes.
        ceilings: ways that move all features.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for way in WAYS:
        rows = [summary_row(at[way, n][1]) for n in COUNTS]
        shares = np.array([[row[name] for name in ("success", "95% from", "to")] for row in rows])
        bars = np.abs(shares[:, 1:] - shares[:, :1]).T
        axes.errorbar(COUNTS, shares[:, 0], bars, marker="o", capsize=3, label=way)
    for way, style in zip(ceilings, ("--", "-.", ":", (0, (1, 5))), strict=False):
        share = at[way, 0][1].success.mean()
        axes.axhline(share, linestyle=style, color="grey", label=f"{way}: {share:.0%}")
    axes.axhline(BAR, color="black", linewidth=0.8, label=f"bar, {BAR:.0%}")
    axes.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS, ylim=(0, 1))
    axes.set(xlabel="features moved of each object", ylabel="share of scenes with colours exchanged")
    axes.minorticks_off()
    # Beside the axes: within, it would lie on the lines of the bar and the ceilings.
    figure.legend(loc="outside right center", fontsize=8)
    return figure
