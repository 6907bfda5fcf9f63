"""`errors`: where the organism draws the wrong noun, what causes it? Registered in docs/studies.md.

1. Held-out captions of one object; failures show one readable object in the asked colour at the asked place, but of
   another noun.
2. The target is the velocity along the difference between the caption's and that of a caption of what was drawn, at the
   failing run's latents, in the object's box, at the last of the steps 0 to u.
3. Places that speak for what was drawn are taken away, and as many random ones with edits of the same size (`repair`).
"""

from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import COLOUR_NAMES, parse
from difffract_jax.organism.evaluate import held_out, see
from difffract_jax.organism.render import NOUNS
from difffract_jax.organism.scorer import judge
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Case, Material, concatenate, locate, take
from difffract_jax.studies.removing import effects_on, place_effects
from difffract_jax.studies.repair import Scores, attempts, blame, report
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, FIRST_SEED = 88_000, 8_000_000
CALIBRATION, TEST, MOST = 40, 120, 20_000
UNTIL = (0, 1, 2)
BATCH = 2_000


def errors(pipe: Pipeline, tcs: TranscoderSet, *, size: int | None = None, advance: Advance = quiet) -> Result:
    """Runs the study.

    Args:
        pipe: the organism.
        tcs: its transcoders.
        size: failures for the test instead of the registered number, with a third as many for calibration.
        advance: gives a progress callback for a named stage.

    Raises:
        UserError: if too few failures are found.
    """
    test = TEST if size is None else size
    calibration = CALIBRATION if size is None else max(2, size // 3)
    whole = draw_failures(pipe, calibration + test, advance)
    if len(whole.cases) <= calibration:
        raise UserError(f"Among {whole.drawn} captions only {len(whole.cases)} images show a wrong noun; give --size.")
    rows = {"calibration": np.arange(calibration), "test": np.arange(calibration, len(whole.cases))}
    phases = {name: whole.take(mine) for name, mine in rows.items()}
    scores = {name: _attempts(pipe, tcs, one, advance) for name, one in phases.items()}
    pairs = [("circuit", "random"), ("circuit", "image"), ("circuit", "text")]
    return report("errors", phases, scores, pairs, "circuit")


def draw_failures(pipe: Pipeline, count: int, advance: Advance) -> Material:
    """Draws captions of one object until enough of their images show another noun, and nothing else wrong.

    Args:
        pipe: the organism.
        count: failures to find, if `MOST` captions hold so many.
        advance: gives a progress callback for a named stage.
    """
    parts: list[Material] = []
    drawn = found = 0
    told, asked = advance("failures"), held_out(MOST, "one object", WORLD)
    while found < count and drawn < MOST:
        mine = asked.take(np.arange(drawn, drawn + BATCH))
        images = generate_batch(pipe, mine.captions, range(FIRST_SEED + drawn, FIRST_SEED + drawn + BATCH))
        seen = see(images)
        one = (seen.count == 1) & (seen.kind[:, 0] >= 0) & (seen.colour[:, 0] == mine.colour[:, 0])
        # Judged as if the noun that is seen had been asked for: what is left is the place.
        other = mine._replace(kind=np.where(one[:, None], seen.kind[:, :1], mine.kind))
        kept = np.flatnonzero(one & (seen.kind[:, 0] != mine.kind[:, 0]) & judge(other, seen).right)[: count - found]
        cases = [
            Case(
                text,
                text,
                FIRST_SEED + drawn + int(row),
                0,
                caption_of_seen(text, int(seen.kind[row, 0]), int(seen.colour[row, 0])),
            )
            for row, text in ((row, mine.captions[row]) for row in kept)
        ]
        drawn, found = drawn + BATCH, found + len(kept)
        parts.append(locate(pipe, cases, images[kept], [0] * len(kept), seen=take(seen, kept), drawn=drawn))
        told(found, count)
    return concatenate(parts)


def caption_of_seen(text: str, kind: int, colour: int) -> str:
    """Returns a caption of one object with another noun, in the colour that is seen.

    Args:
        text: a caption of one object.
        kind: index of the noun that is seen.
        colour: index of its colour.
    """
    noun = parse(text).objects[0].noun
    words = [NOUNS[kind] if word == noun else word for word in text.split()]
    if not parse(text).objects[0].colour:
        words.insert(words.index(NOUNS[kind]), COLOUR_NAMES[colour])
    return " ".join(words)


def _attempts(pipe: Pipeline, tcs: TranscoderSet, material: Material, advance: Advance) -> Scores:
    steps = pipe.plan().steps
    places = choices.all_places(tcs, steps)
    effects: dict[int, list[Any]] = {until: [] for until in UNTIL}
    told = advance("circuits")
    for row, case in enumerate(material.cases):
        target = f'velocity:contrast="{case.shows}",box={material.box(row)}'
        for until in UNTIL:
            found = effects_on(pipe, tcs, case.prompt, case.seed, [target], last=until)[0]
            where = material.inside[row], material.phrase[row]
            effects[until].append(place_effects(found, tcs, *where, steps=steps))
        told(row + 1, len(material.cases))
    codes = choices.mean_codes(pipe, tcs, material, [case.prompt for case in material.cases])
    image = places.is_image
    ways = {"circuit": (np.ones_like(image),), "image": (image,), "text": (~image,)}
    blamed = {(way, f"steps 0-{until}"): blame(effects[until], sides) for way, sides in ways.items() for until in UNTIL}
    return attempts(pipe, tcs, material, places, blamed, codes, "circuit", advance)
