"""The material of the studies: prompts of the organism, what they should show instead, and where it is to happen.

1. A `Case` is a prompt, a caption that the image shall show instead, a noise seed, and the object that is meant.
2. `recolourings` draws cases by rule from the held-out world: one object of two shall take another colour.
3. `draw_cases` samples the images of both captions from the same noise and keeps the cases in which both show what they
   say; what is not right before an edit cannot be judged after it.
4. Of each kept case: the image tokens that the object covers, the pixels that are surely not the object's, and the text
   tokens of its phrase. Edits may act there and nowhere else, whoever chose them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from difffract_jax.circuits.notation.region import tokens_in
from difffract_jax.generators import random_generator
from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.organism.captions import COLOUR_NAMES, object_phrase, parse
from difffract_jax.organism.evaluate import held_out, see
from difffract_jax.organism.render import SIDE
from difffract_jax.organism.scorer import SeenScenes, judge
from difffract_jax.organism.vocabulary import word_starts
from difffract_jax.organism.world import RADII, from_caption
from difffract_jax.studies.truth import phrases

NEAR, FAR = 1.0, 4.0
"""Pixels around an object that still count as its own, and beyond which pixels surely are not."""
Progress = Callable[[int, int], None]


class Case(NamedTuple):
    """One thing to change in one image.

    Attributes:
        prompt: of the run that is edited.
        wanted: caption of what the edited image shall show; it names as many objects, word for word at the same places.
        seed: of the starting noise.
        slot: the object that is meant, in the order of the prompt.
        shows: caption of what the unedited image shows; the prompt if left out.
    """

    prompt: str
    wanted: str
    seed: int
    slot: int
    shows: str | None = None


class Material(NamedTuple):
    """Cases, and where their edits may act.

    Attributes:
        cases: those that are kept.
        drawn: how many there were.
        images: of the prompts, without edits.
        inside: image tokens that the object covers.
        outside: pixels that are surely not the object's.
        phrase: text tokens of the object's phrase.
    """

    cases: tuple[Case, ...]
    drawn: int
    images: UInt8[np.ndarray, "case H W rgb"]
    inside: Bool[np.ndarray, "case img"]
    outside: Bool[np.ndarray, "case H W"]
    phrase: Bool[np.ndarray, "case txt"]

    def take(self, rows: Int[np.ndarray, "kept"]) -> "Material":
        """Returns some of the cases."""
        arrays = [getattr(self, name)[rows] for name in Material._fields[2:]]
        return Material(tuple(self.cases[row] for row in rows), self.drawn, *arrays)

    def box(self, row: int) -> str:
        """Returns the smallest box around the pixels that may be the object's, as X0,Y0,X1,Y1."""
        rows, columns = np.nonzero(~self.outside[row])
        return f"{columns.min()},{rows.min()},{columns.max() + 1},{rows.max() + 1}"


def recolourings(world: int, count: int, first_seed: int) -> list[Case]:
    """Draws cases: in a held-out scene of two shapes, one of them shall have a colour that neither has.

    Args:
        world: seed of the scenes and of the choices.
        count: how many.
        first_seed: noise seed of the first case; the others count on.
    """
    asked, rng = held_out(count, "two shapes", world), random_generator(world, 1)
    found = []
    for row, prompt in enumerate(asked.captions):
        slot = row % 2
        others = [name for name in range(len(COLOUR_NAMES)) if name not in asked.colour[row, :2]]
        found.append(Case(prompt, recoloured(prompt, slot, COLOUR_NAMES[rng.choice(others)]), first_seed + row, slot))
    return found


def recoloured(prompt: str, slot: int, colour: str) -> str:
    """Returns a caption with one object in another colour, word for word the same elsewhere.

    Args:
        prompt: a caption that names the object's colour.
        slot: the object, in the caption's order.
        colour: the new one.

    Example:
        >>> recoloured("a red circle left of a blue square", 0, "orange")
        'an orange circle left of a blue square'
    """
    thing = parse(prompt).objects[slot]
    words = prompt.split()
    positions = phrases(words)[slot]
    words[positions[0] : positions[-1] + 1] = object_phrase(thing.noun, colour, thing.size).split()
    return " ".join(words)


def draw_cases(pipe: Pipeline, cases: Sequence[Case], progress: Progress | None = None) -> Material:
    """Samples both captions of every case, and keeps the cases in which both images show what they say.

    Args:
        pipe: the organism.
        cases: the cases.
        progress: called with (images done, images in all).
    """
    prompts = [*(case.prompt for case in cases), *(case.wanted for case in cases)]
    images = generate_batch(pipe, prompts, [case.seed for case in cases] * 2, progress=progress)
    seen = see(images)
    right = [bool(judge(from_caption(text), _row(seen, row)).right[0]) for row, text in enumerate(prompts)]
    kept = [row for row in range(len(cases)) if right[row] and right[row + len(cases)]]
    slots = [slot_of(seen, row, cases[row]) for row in kept]
    return locate(pipe, [cases[row] for row in kept], images[kept], slots, seen=take(seen, kept), drawn=len(cases))


def locate(
    pipe: Pipeline,
    cases: Sequence[Case],
    images: UInt8[np.ndarray, "case H W rgb"],
    slots: Sequence[int],
    *,
    seen: SeenScenes,
    drawn: int,
) -> Material:
    """Says where the edits of cases may act.

    Args:
        pipe: the organism.
        cases: the cases.
        images: of their prompts.
        slots: which of the objects that were read is the one meant.
        seen: what was read in the images.
        drawn: cases that these were taken from.
    """
    run = pipe.plan()
    radius = np.array(RADII, np.float32).mean(axis=1)
    at = np.stack(np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5), axis=-1)  # column and row of each pixel
    inside = np.zeros((len(cases), run.grid[0] * run.grid[1]), bool)
    outside = np.zeros((len(cases), SIDE, SIDE), bool)
    phrase = np.zeros((len(cases), run.text_tokens), bool)
    starts = np.array(word_starts(pipe.tokenizers))
    for row, (case, slot) in enumerate(zip(cases, slots, strict=True)):
        far = np.linalg.norm(at - seen.centre[row, slot], axis=-1) - radius[seen.size[row, slot]]
        inside[row, list(tokens_in(far <= NEAR, run.grid))] = True
        outside[row] = far > FAR
        phrase[row, np.add.outer(starts, phrases(case.prompt.split())[case.slot])] = True
    return Material(tuple(cases), drawn, images, inside, outside, phrase)


def concatenate(parts: Sequence[Material]) -> Material:
    """Puts cases behind one another; the last part says how many were drawn."""
    arrays = [np.concatenate([getattr(one, name) for one in parts]) for name in Material._fields[2:]]
    return Material(tuple(case for one in parts for case in one.cases), parts[-1].drawn, *arrays)


def _row(seen: SeenScenes, row: int) -> SeenScenes:
    return take(seen, [row])


def take(seen: SeenScenes, rows: Sequence[int] | np.ndarray) -> SeenScenes:
    """Returns the readings of some images."""
    return SeenScenes(*(column[list(rows)] for column in seen))


def slot_of(seen: SeenScenes, row: int, case: Case) -> int:
    """Returns which of the objects read in a right image is the one that a case means.

    Args:
        seen: what was read.
        row: the image.
        case: the case; an image is right if it shows the objects as the world draws them.
    """
    asked = from_caption(case.prompt)
    pairs = zip(seen.kind[row, : seen.count[row]], seen.colour[row, : seen.count[row]], strict=True)
    return list(pairs).index((asked.kind[0, case.slot], asked.colour[0, case.slot]))
