"""`colour-prior`: "a blue lemon" is drawn yellow. What undoes it? Registered in docs/studies.md.

1. Captions that name a concept in a colour not its own; failures are images in which it has its prior's colour.
2. What every feature adds to the asked colour minus the prior's, in the concept's box, in the failing run.
3. Places that speak for the prior are taken away: on the image side alone, on the text side alone, on both (`repair`).
"""

from typing import Any

import numpy as np

from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import COLOUR_NAMES, parse
from difffract_jax.organism.evaluate import contradicting, see
from difffract_jax.organism.render import NOUNS
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.world import PRIOR
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Case, Material, concatenate, locate, recoloured, slot_of, take
from difffract_jax.studies.outcomes import Outcomes
from difffract_jax.studies.precision import colour_target
from difffract_jax.studies.removing import effects_on, place_effects
from difffract_jax.studies.repair import Scores, attempts, blame, report
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, FIRST_SEED = 86_000, 7_000_000
CALIBRATION, TEST = 40, 120
BATCH = 64


def colour_prior(pipe: Pipeline, tcs: TranscoderSet, *, size: int | None = None, advance: Advance = quiet) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: failures for the test instead of the registered number, with a third as many for calibration.
        advance: gives a progress callback for a named stage.
    """
    test = TEST if size is None else size
    calibration = CALIBRATION if size is None else max(2, size // 3)
    whole = draw_failures(pipe, calibration + test, advance)
    rows = {"calibration": np.arange(calibration), "test": np.arange(calibration, calibration + test)}
    phases = {name: whole.take(mine) for name, mine in rows.items()}
    scores = {name: _attempts(pipe, tcs, one, advance) for name, one in phases.items()}
    pairs = [("both", "image"), ("both", "random"), ("both", "text"), ("image", "random")]
    return report("colour-prior", phases, scores, pairs, "both", prior_gone)


def draw_failures(pipe: Pipeline, count: int, advance: Advance) -> Material:
    """Draws contradicting captions until enough of their images show the concept in its prior's colour.

    Args:
        pipe: the organism.
        count: failures to find.
        advance: gives a progress callback for a named stage.
    """
    parts: list[Material] = []
    drawn = found = 0
    told = advance("failures")
    while found < count:
        # Captions come in one endless order, so that more of them begin with the same.
        asked = contradicting(drawn + BATCH, WORLD).take(np.arange(drawn, drawn + BATCH))
        seeds = range(FIRST_SEED + drawn, FIRST_SEED + drawn + BATCH)
        images = generate_batch(pipe, asked.captions, seeds)
        seen = see(images)
        # Scenes are drawn in the prior's colour, so that a right image is one that shows the prior.
        kept = [int(row) for row in np.flatnonzero(judge(asked, seen).right)[: count - found]]
        cases = [
            Case(
                asked.captions[row],
                asked.captions[row],
                seeds[row],
                0,
                recoloured(asked.captions[row], 0, COLOUR_NAMES[PRIOR[asked.kind[row, 0]]]),
            )
            for row in kept
        ]
        slots = [slot_of(seen, row, case) for row, case in zip(kept, cases, strict=True)]
        drawn, found = drawn + BATCH, found + len(kept)
        parts.append(locate(pipe, cases, images[kept], slots, seen=take(seen, kept), drawn=drawn))
        told(found, count)
    return concatenate(parts)


def _attempts(pipe: Pipeline, tcs: TranscoderSet, material: Material, advance: Advance) -> Scores:
    places = choices.all_places(tcs, pipe.plan().steps)
    told, effects = advance("circuits"), []
    for row, case in enumerate(material.cases):
        target = colour_target(case.shows or case.prompt, case.wanted, case.slot, material.box(row))
        found = effects_on(pipe, tcs, case.prompt, case.seed, [target])[0]
        effects.append(place_effects(found, tcs, material.inside[row], material.phrase[row]))
        told(row + 1, len(material.cases))
    codes = choices.mean_codes(pipe, tcs, material, [case.prompt for case in material.cases])
    image, text = places.is_image, ~places.is_image
    ways = {"image": (image,), "text": (text,), "both": (image, text)}
    blamed = {(way, ""): blame(effects, sides) for way, sides in ways.items()}
    return attempts(pipe, tcs, material, places, blamed, codes, "both", advance)


def prior_gone(material: Material, found: Outcomes) -> dict[str, Any]:
    """Returns how often no object of the concept's noun has the prior's colour any more.

    Args:
        material: the cases.
        found: what became of them.
    """
    seen, gone = see(found.images), 0
    for row, case in enumerate(material.cases):
        noun = NOUNS.index(parse(case.prompt).objects[case.slot].noun)
        gone += not np.any((seen.kind[row] == noun) & (seen.colour[row] == PRIOR[noun]))
    return {"prior gone": gone / len(material.cases)}
