"""What is known of every token of the organism's images and captions: the factors that a feature may detect.

1. Image token: the object that covers most of it, at least `COVERED`; shape, colour and place are that object's.
   Objects are those that the scorer read in the image, drawn again with their mean radius to see what they cover.
2. Text token: shape and colour are those of the object whose phrase it lies in; the relation's words and what is
   around them lie in none.
3. Factors are one-hot: a kind is a pair (factor, value), a token may be of several.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from difffract_jax.organism.captions import COLOUR_NAMES, PLACES, RELATIONS, SIZE_NAMES
from difffract_jax.organism.render import NOUNS, SIDE, coverage
from difffract_jax.organism.scorer import MARGIN, SeenScenes
from difffract_jax.organism.vocabulary import TEXT_TOKENS, WORDS
from difffract_jax.organism.world import RADII, Scenes

COVERED = 0.25
"""Share of a token's pixels that an object must cover."""
GRID = 6
"""Rows and columns of image tokens."""
CLOSING = "(end)"
"""The token that closes a prompt."""

_SHARED = (
    *(("shape", noun) for noun in NOUNS),
    *(("colour", colour) for colour in COLOUR_NAMES),
    *(("relation", relation) for relation in RELATIONS),
)
KINDS = {
    "img": (
        *_SHARED,
        ("object", "any"),
        *(("place", place) for place in PLACES),
        *(("row", str(row)) for row in range(GRID)),
        *(("column", str(column)) for column in range(GRID)),
    ),
    "txt": (
        *_SHARED,
        *(("word", word) for word in (*WORDS, CLOSING)),
        *(("position", str(position)) for position in range(TEXT_TOKENS)),
    ),
}
"""Side -> its kinds."""
_NUMBER = {side: {kind: number for number, kind in enumerate(kinds)} for side, kinds in KINDS.items()}


def image_truth(
    asked: Scenes, seen: SeenScenes, grid: tuple[int, int], tokens: Int[np.ndarray, "step caption token"]
) -> Bool[np.ndarray, "step caption token kind"]:
    """Returns the kinds of image tokens.

    Args:
        asked: the scenes.
        seen: what the scorer read in their images.
        grid: rows and columns of image tokens.
        tokens: which tokens.
    """
    truth = np.zeros((len(asked.captions), grid[0] * grid[1], len(KINDS["img"])), bool)
    every = np.arange(grid[0] * grid[1])
    for factor, index in (("row", every // grid[1]), ("column", every % grid[1])):
        truth[:, every, [_NUMBER["img"][factor, str(value)] for value in index]] = True
    _set_relations("img", asked, truth)
    share = _covered(seen, grid)
    for image in range(len(share)):
        top = share[image].argmax(axis=0)
        for token in np.flatnonzero(share[image].max(axis=0) >= COVERED):
            slot = top[token]
            for kind in (
                ("object", "any"),
                ("shape", NOUNS[seen.kind[image, slot]]),
                ("colour", COLOUR_NAMES[seen.colour[image, slot]]),
                ("place", _place(seen.centre[image, slot])),
            ):
                truth[image, token, _NUMBER["img"][kind]] = True
    return np.take_along_axis(truth[None], tokens[..., None], axis=2)


def _covered(seen: SeenScenes, grid: tuple[int, int]) -> Float[np.ndarray, "image slot token"]:
    """Returns the share of every token that each object covers; unreadable objects cover nothing."""
    images, slots = seen.kind.shape
    share = np.zeros((images, slots, grid[0] * grid[1]))
    radius = np.array(RADII, np.float32).mean(axis=1)[seen.size]
    readable = (np.arange(slots) < seen.count[:, None]) & (seen.kind >= 0) & (seen.colour >= 0)
    for kind in range(len(NOUNS)):
        at = np.nonzero(readable & (seen.kind == kind))
        if at[0].size:
            whole = coverage(kind, seen.centre[at].astype(np.float32), radius[at])[0]
            cut = whole.reshape(-1, grid[0], SIDE // grid[0], grid[1], SIDE // grid[1])
            share[at] = cut.mean(axis=(2, 4)).reshape(len(whole), -1)
    return share


def _place(centre: Float[np.ndarray, "xy"]) -> str:
    """Returns the side of the image on which an object lies, by the larger of its two offsets from the middle."""
    across, down = centre - SIDE / 2
    if max(abs(across), abs(down)) <= MARGIN:
        return "middle"
    if abs(across) >= abs(down):
        return "left" if across < 0 else "right"
    return "top" if down < 0 else "bottom"


def _set_relations(side: str, asked: Scenes, truth: np.ndarray) -> None:
    for row in np.flatnonzero(asked.count == 2):
        truth[row, :, _NUMBER[side]["relation", RELATIONS[asked.arrangement[row]]]] = True


def text_truth(
    asked: Scenes, tokens: Int[np.ndarray, "step caption token"]
) -> Bool[np.ndarray, "step caption token kind"]:
    """Returns the kinds of text tokens.

    Args:
        asked: the scenes.
        tokens: which tokens.
    """
    truth = np.zeros((len(asked.captions), TEXT_TOKENS, len(KINDS["txt"])), bool)
    number = _NUMBER["txt"]
    _set_relations("txt", asked, truth)
    for row, caption in enumerate(asked.captions):
        words = [*caption.split(), CLOSING]
        for position, word in enumerate(words):
            truth[row, position, [number["word", word], number["position", str(position)]]] = True
        for slot, phrase in enumerate(phrases(words)):
            kinds = ("shape", NOUNS[asked.kind[row, slot]]), ("colour", COLOUR_NAMES[asked.colour[row, slot]])
            truth[row, phrase, [[number[kind]] for kind in kinds]] = True
    return np.take_along_axis(truth[None], tokens[..., None], axis=2)


def phrases(words: list[str]) -> list[list[int]]:
    """Returns the positions of every object's phrase: its noun, and the size, colour and article before it.

    Args:
        words: of a caption; each is one text token of the organism's.
    """
    found = []
    for position, word in enumerate(words):
        if word in NOUNS:
            first = position
            while first and words[first - 1] in (*COLOUR_NAMES, *SIZE_NAMES, "a", "an"):
                first -= 1
            found.append(list(range(first, position + 1)))
    return found
