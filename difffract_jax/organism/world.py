"""The organism's world: scenes of one to three objects, and captions that say what is in them.

1. An object is a noun, a colour and a size. Shapes take any of eight colours; concepts (lemon, tomato, leaf, carrot)
   are always drawn in the one colour of their own, their prior.
2. A scene places one object (anywhere near the middle, or at a named side), two (beside or above one another) or three.
   Where a caption says no arrangement, objects lie in reading order.
3. A caption names every object, mostly without the size, and the arrangement in one of several wordings. Concepts are
   mostly named without a colour; `CONTRADICTING` of them are named in a colour they do not have, and drawn in their
   prior's all the same. That teaches a categorical mistake: asked for a blue lemon, the model draws a yellow one.
4. Held out of training: every content whose hash falls into `HELD_OUT_SHARE` (whatever its wording), the placed objects
   of `HELD_OUT_PLACED`, and all scenes of three objects. A content is what a caption says, apart from wording and size.

Everything is drawn from `numpy.random.Generator` seeds `[seed, number of the batch]`: endless, deterministic, and the
same on every machine. Arrays are structs of arrays over scenes and slots; slots beyond a scene's `count` are padding.
"""

import zlib
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from difffract_jax.generators import random_generator
from difffract_jax.organism.captions import (
    COLOUR_NAMES,
    CONCEPTS,
    PLACES,
    RELATIONS,
    SIZE_NAMES,
    caption,
    named_as,
    object_phrase,
    parse,
)
from difffract_jax.organism.render import NOUNS, draw_scenes

RADII = ((5.8, 6.6), (8.2, 9.0))
"""Smallest and largest radius in pixels of a small and of a big object."""

CONCEPT_SHARE = 0.35
"""Share of objects that are concepts."""
CONTRADICTING, PRIOR_NAMED = 0.02, 0.10
"""Shares of concepts that captions name in another colour, and in their own."""
SIZE_NAMED = 0.15
"""Share of objects whose size captions name."""
HELD_OUT_SHARE = 10
"""One content in so many is held out."""
HELD_OUT_PLACED = (
    ("circle", "red", "top"),
    ("square", "blue", "left"),
    ("triangle", "green", "right"),
    ("cross", "purple", "bottom"),
    ("ring", "black", "left"),
    ("circle", "pink", "right"),
)
"""Never seen in training: this noun in this colour at this side, alone or as one of two."""

SLOTS = 3
NEAR, FAR, HALF, JITTER, WANDER = 12.5, 35.5, 24.0, 1.5, 4.0
"""Centres of the two sides and of the middle, jitter around them, and how far pairs wander together, in pixels."""
SCATTER = 0.4
"""Share of jitter and wandering that captioned scenes take; the autoencoder trains on all of it."""
TRIPLES = (((12.5, 13.5), (35.5, 13.5), (24.0, 35.0)), ((24.0, 13.0), (12.5, 35.0), (35.5, 35.0)))
_OFFSETS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1), "and": (-1, 0)}
_SIDES = {
    "left": ("left", "right"),
    "right": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "and": ("left", "right"),
}

Split = Literal["train", "held out"]


class Scenes(NamedTuple):
    """A batch of scenes with their captions.

    Attributes:
        count: objects in each scene.
        kind: index into `NOUNS`.
        colour: index into `COLOUR_NAMES`, of the object as it is drawn.
        named: the same, of the colour that the caption names; -1 where it names none.
        size: index into `SIZE_NAMES`.
        arrangement: for one object index into `PLACES`, for two into `RELATIONS`; -1 for three.
        centre: column and row in pixels.
        radius: in pixels.
        captions: one per scene.
        held_out: whether training never sees the content.
    """

    count: Int[np.ndarray, "scene"]
    kind: Int[np.ndarray, "scene slot"]
    colour: Int[np.ndarray, "scene slot"]
    named: Int[np.ndarray, "scene slot"]
    size: Int[np.ndarray, "scene slot"]
    arrangement: Int[np.ndarray, "scene"]
    centre: Float32[np.ndarray, "scene slot xy"]
    radius: Float32[np.ndarray, "scene slot"]
    captions: tuple[str, ...]
    held_out: Bool[np.ndarray, "scene"]

    def images(self) -> Float32[np.ndarray, "scene row column rgb"]:
        """Draws the scenes; pixels in [0, 1]."""
        return draw_scenes(self.count, self.kind, self.colour, self.centre, self.radius)

    def take(self, rows: np.ndarray) -> "Scenes":
        """Returns the scenes at the given indices, or where a mask is True."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        picked = {name: value[rows] for name, value in self._asdict().items() if name != "captions"}
        return Scenes(captions=tuple(self.captions[row] for row in rows), **picked)


PRIOR = np.array([COLOUR_NAMES.index(CONCEPTS[noun]) if noun in CONCEPTS else -1 for noun in NOUNS])
"""Per noun, the index of its prior colour; -1 for shapes."""
IS_CONCEPT = PRIOR >= 0


def scenes(
    seed: int,
    batch: int,
    size: int,
    split: Split = "train",
    counts: tuple[int, ...] = (1, 2),
    scatter: float = SCATTER,
) -> Scenes:
    """Returns one batch of the endless world.

    Args:
        seed: of the world.
        batch: number of the batch, from 0.
        size: scenes in it.
        split: "train", or "held out" for contents that training never sees.
        counts: how many objects the scenes may have. Scenes of three are held out whatever they hold.
        scatter: share of `JITTER` and `WANDER` by which objects leave their places.

    Returns:
        The scenes. Two batches of one seed share no random number.

    Example:
        >>> scenes(0, 0, 1).captions[0]
        'there is a blue circle below a big yellow lemon'
    """
    rng = random_generator(seed, batch)
    found: list[Scenes] = []
    while sum(len(part.captions) for part in found) < size:
        drawn = _draw_contents(rng, 2 * size if split == "train" else 12 * size, counts, scatter)
        found.append(drawn.take(drawn.held_out == (split == "held out")))
    joined = concatenate(found)
    return joined.take(np.arange(size))


def from_caption(text: str, copies: int = 1) -> Scenes:
    """Returns scenes as a caption asks for them, for drawing or judging; what it leaves open is drawn.

    Args:
        text: a caption of the grammar.
        copies: how many scenes.

    Raises:
        UserError: if it is not a caption, see `captions.parse`.
    """
    parsed = parse(text)
    rng = np.random.default_rng(0)
    number = len(parsed.objects)
    count, shape = np.full(copies, number), (copies, SLOTS)
    kind, colour, named, size = (np.zeros(shape, int) for _ in range(4))
    for slot, thing in enumerate(parsed.objects):
        kind[:, slot] = NOUNS.index(thing.noun)
        colour[:, slot] = COLOUR_NAMES.index(CONCEPTS.get(thing.noun, thing.colour))
        named[:, slot] = COLOUR_NAMES.index(thing.colour) if thing.colour else -1
        size[:, slot] = SIZE_NAMES.index(thing.size) if thing.size else rng.integers(0, 2, copies)
    names = PLACES if number == 1 else RELATIONS
    arrangement = np.full(copies, names.index(parsed.arrangement) if number < 3 else -1)
    radius = np.array(RADII, np.float32).mean(axis=1)[size]
    centre = _place(rng, count, arrangement, SCATTER)
    held_out = _held_out(count, kind, colour, named, arrangement)
    return Scenes(count, kind, colour, named, size, arrangement, centre, radius, (text,) * copies, held_out)


def as_captioned(scenes: Scenes) -> Scenes:
    """Returns scenes with every object in the colour that its caption names, whatever it would be drawn in.

    They differ for concepts that are named in another colour than their own, which training draws in their own.

    Args:
        scenes: any scenes.
    """
    return scenes._replace(colour=np.where(scenes.named >= 0, scenes.named, scenes.colour))


def concatenate(parts: list[Scenes]) -> Scenes:
    """Puts batches of scenes behind one another."""
    captions = tuple(caption for part in parts for caption in part.captions)
    arrays = [name for name in Scenes._fields if name != "captions"]
    return Scenes(
        captions=captions, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    )


def _draw_contents(rng: np.random.Generator, size: int, counts: tuple[int, ...], scatter: float) -> Scenes:
    # Pairs are what the model must learn to bind; single objects come once in four scenes.
    weights = np.array([1.0 if count == 1 else 3.0 for count in counts])
    count = rng.choice(counts, size, p=weights / weights.sum())
    kind, colour = _draw_objects(rng, size)
    large = rng.integers(0, 2, (size, SLOTS))
    arrangement = np.where(
        count == 1,
        rng.choice(len(PLACES), size, p=[0.17, 0.17, 0.17, 0.17, 0.32]),
        np.where(count == 2, rng.choice(len(RELATIONS), size, p=[0.22, 0.22, 0.22, 0.22, 0.12]), -1),
    )
    low, high = np.array(RADII, np.float32)[large].transpose(2, 0, 1)
    radius = low + (high - low) * rng.random((size, SLOTS), np.float32)
    centre = _place(rng, count, arrangement, scatter)
    chance = rng.random((size, SLOTS))
    other = (PRIOR[kind] + rng.integers(1, len(COLOUR_NAMES), (size, SLOTS))) % len(COLOUR_NAMES)
    named = np.where(
        IS_CONCEPT[kind],
        np.where(chance < CONTRADICTING, other, np.where(chance < CONTRADICTING + PRIOR_NAMED, colour, -1)),
        colour,
    )
    said = rng.random((size, SLOTS)) < SIZE_NAMED
    captions = _captions(rng, count, kind, named, np.where(said, large, -1), arrangement)
    held_out = _held_out(count, kind, colour, named, arrangement)
    return Scenes(count, kind, colour, named, large, arrangement, centre, radius, captions, held_out)


def _draw_objects(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws nouns and colours; no two objects of a scene share both."""
    shapes, concepts = np.flatnonzero(~IS_CONCEPT), np.flatnonzero(IS_CONCEPT)

    def some(rows: int) -> tuple[np.ndarray, np.ndarray]:
        concept = rng.random((rows, SLOTS)) < CONCEPT_SHARE
        kind = np.where(concept, rng.choice(concepts, (rows, SLOTS)), rng.choice(shapes, (rows, SLOTS)))
        return kind, np.where(concept, PRIOR[kind], rng.integers(0, len(COLOUR_NAMES), (rows, SLOTS)))

    kind, colour = some(size)
    while True:
        code = kind * len(COLOUR_NAMES) + colour
        twins = np.flatnonzero((code == np.roll(code, 1, axis=1)).any(axis=1))
        if not twins.size:
            return kind, colour
        kind[twins], colour[twins] = some(len(twins))


def _place(
    rng: np.random.Generator, count: Int[np.ndarray, "scene"], arrangement: Int[np.ndarray, "scene"], scatter: float
) -> Float32[np.ndarray, "scene slot xy"]:
    """Places objects as the arrangement says, and in reading order where it says nothing."""
    size = len(count)
    centre = np.full((size, SLOTS, 2), HALF, np.float32)
    jitter = scatter * rng.uniform(-JITTER, JITTER, (size, SLOTS, 2))
    wander = scatter * rng.uniform(-WANDER, WANDER, (size, 2))
    sides = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
    alone = np.array([sides[place] for place in PLACES])[arrangement]
    pair = np.array([_OFFSETS[relation] for relation in RELATIONS])[arrangement]
    step = (FAR - NEAR) / 2
    one, two = count == 1, count == 2
    centre[one, 0] = HALF + alone[one] * step + np.where(alone[one] == 0, wander[one], 0)
    for slot, sign in ((0, 1), (1, -1)):
        centre[two, slot] = HALF + sign * pair[two] * step + np.where(pair[two] == 0, wander[two], 0)
    layout = np.array(TRIPLES, np.float32)[rng.integers(0, len(TRIPLES), size)]
    centre[count == 3] = layout[count == 3]
    return (centre + jitter).astype(np.float32)


def _captions(
    rng: np.random.Generator,
    count: np.ndarray,
    kind: np.ndarray,
    named: np.ndarray,
    size: np.ndarray,
    arrangement: np.ndarray,
) -> tuple[str, ...]:
    """Puts scenes into words."""
    lines = []
    wording = rng.random((len(count), 2)).tolist()
    said = (np.where(np.arange(SLOTS) < count[:, None], column, -1).tolist() for column in (kind, named, size))
    for how, arranged, *objects in zip(wording, arrangement.tolist(), *said, strict=True):
        phrases = [
            object_phrase(NOUNS[noun], named_as(COLOUR_NAMES, colour), named_as(SIZE_NAMES, large))
            for noun, colour, large in zip(*objects, strict=True)
            if noun >= 0
        ]
        lines.append(caption(phrases, arranged, (how[0], how[1])))
    return tuple(lines)


def _held_out(
    count: np.ndarray, kind: np.ndarray, colour: np.ndarray, named: np.ndarray, arrangement: np.ndarray
) -> Bool[np.ndarray, "scene"]:
    """Says which contents training never sees; a content is the same whichever object its caption starts with."""
    code = (kind * (len(COLOUR_NAMES) + 1) + named + 1).tolist()
    placed = _placed_codes()
    out = np.zeros(len(count), bool)
    for row, number in enumerate(count.tolist()):
        if number == 3:
            out[row] = True
            continue
        first, second = code[row][0], code[row][1] if number == 2 else -1
        name = PLACES[arrangement[row]] if number == 1 else RELATIONS[arrangement[row]]
        sides = _SIDES[name] if number == 2 else (name,)
        there = any((what, side) in placed for what, side in zip((first, second), sides, strict=False))
        if number == 2 and (name in ("right", "below") or (name == "and" and first > second)):
            first, second = second, first
            name = {"right": "left", "below": "above"}.get(name, name)
        out[row] = there or zlib.crc32(f"{first} {name} {second}".encode()) % HELD_OUT_SHARE == 0
    return out


def _placed_codes() -> set[tuple[int, str]]:
    width = len(COLOUR_NAMES) + 1
    return {
        (NOUNS.index(noun) * width + COLOUR_NAMES.index(colour) + 1, side) for noun, colour, side in HELD_OUT_PLACED
    }
