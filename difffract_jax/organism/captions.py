"""The captions of the organism's world: a small grammar, spoken and understood.

    caption     prefix? object place?   |   prefix? object relation object   |   prefix? object and object and object
    object      (a | an) size? colour? noun

1. `caption` puts objects and their arrangement into words, with a choice among wordings.
2. `parse` reads a caption of that grammar back, so that any prompt of a user can be drawn, and judged by the scorer.
   What it does not understand it refuses in one sentence.
"""

import re
from typing import NamedTuple

from difffract_jax.config import UserError, nearest
from difffract_jax.organism.render import COLOURS, NOUNS

CONCEPTS = {"lemon": "yellow", "tomato": "red", "leaf": "green", "carrot": "orange"}
"""Noun -> the colour it always has, its prior."""

COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = ("small", "big")

RELATIONS = ("left", "right", "above", "below", "and")
"""Where the first of two objects is, seen from the second; "and" does not say."""
PLACES = ("left", "right", "top", "bottom", "middle")
"""Where a single object is; "middle" is not said."""

PREFIXES = ("", "", "", "a picture of ", "an image of ", "there is ")
RELATION_WORDS = {
    "left": (" left of ", " to the left of ", " on the left of "),
    "right": (" right of ", " to the right of ", " on the right of "),
    "above": (" above ", " over "),
    "below": (" below ", " under "),
    "and": (" and ", " and ", " with "),
}
PLACE_WORDS = {
    "left": (" on the left", " at the left"),
    "right": (" on the right", " at the right"),
    "top": (" at the top",),
    "bottom": (" at the bottom",),
    "middle": ("",),
}


class Phrase(NamedTuple):
    """One object of a caption.

    Attributes:
        noun: one of `NOUNS`.
        colour: one of `COLOUR_NAMES`; "" where the caption names none.
        size: one of `SIZE_NAMES`; "" where the caption names none.
    """

    noun: str
    colour: str
    size: str


class Parsed(NamedTuple):
    """What a caption says.

    Attributes:
        objects: one to three.
        arrangement: one of `PLACES` for one object, of `RELATIONS` for two, "" for three.
    """

    objects: tuple[Phrase, ...]
    arrangement: str


def object_phrase(noun: str, colour: str = "", size: str = "") -> str:
    """Returns how a caption names an object.

    Example:
        >>> object_phrase("circle", "orange"), object_phrase("lemon", size="big")
        ('an orange circle', 'a big lemon')
    """
    words = " ".join(word for word in (size, colour, noun) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def named_as(names: tuple[str, ...], index: int) -> str:
    """Returns a name by its index; "" for -1, which stands for a thing that is not said."""
    return names[index] if index >= 0 else ""


def caption(phrases: list[str], arrangement: int, wording: tuple[float, float]) -> str:
    """Puts objects into one caption.

    Args:
        phrases: one to three, from `object_phrase`.
        arrangement: index into `PLACES` for one object, into `RELATIONS` for two; ignored for three.
        wording: two numbers in [0, 1) that choose the prefix and the words of the arrangement.
    """
    prefix = PREFIXES[int(wording[0] * len(PREFIXES))]
    if len(phrases) == 3:
        return prefix + " and ".join(phrases)
    words = PLACE_WORDS[PLACES[arrangement]] if len(phrases) == 1 else RELATION_WORDS[RELATIONS[arrangement]]
    chosen = words[int(wording[1] * len(words))]
    return prefix + phrases[0] + chosen + "".join(phrases[1:])


def _choice(names: tuple[str, ...]) -> str:
    return "|".join(names)


_OBJECT = re.compile(f"an? (?:({_choice(SIZE_NAMES)}) )?(?:({_choice(COLOUR_NAMES)}) )?({_choice(NOUNS)})")
_PREFIX = re.compile("|".join(sorted(filter(None, set(PREFIXES)))))
_BETWEEN = {words: name for name, choices in RELATION_WORDS.items() for words in choices}
_BEHIND = {words: name for name, choices in PLACE_WORDS.items() for words in choices}
_KNOWN = {
    word
    for text in (*PREFIXES, *_BETWEEN, *_BEHIND, "a an", " ".join((*COLOUR_NAMES, *SIZE_NAMES, *NOUNS)))
    for word in text.split()
}


def parse(text: str) -> Parsed:
    """Reads a caption.

    Args:
        text: a caption of the grammar above; capitals and punctuation do not matter.

    Raises:
        UserError: if a word is unknown, the grammar is not followed, a shape has no colour, or two objects are alike.

    Example:
        >>> parse("A red circle left of a lemon.").arrangement
        'left'
    """
    plain = " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())
    for word in plain.split():
        if word not in _KNOWN:
            raise UserError(f"The organism knows no word `{word}`{nearest(word, sorted(_KNOWN))}")
    body = _PREFIX.sub("", plain, count=1) if _PREFIX.match(plain) else plain
    matches = list(_OBJECT.finditer(body))
    between = [body[a.end() : b.start()] for a, b in zip(matches, matches[1:], strict=False)]
    behind = body[matches[-1].end() :] if matches else ""
    objects = tuple(Phrase(m[3], m[2] or "", m[1] or "") for m in matches)
    arrangement = _arrangement(between, behind, len(objects))
    if not matches or matches[0].start() or arrangement is None:
        raise UserError(
            f"The caption {text!r} is not of the organism's grammar; say for example "
            "`a red circle left of a blue square`, `a lemon on the right`, or `a red ring and a leaf and a blue cross`."
        )
    for thing in objects:
        if not thing.colour and thing.noun not in CONCEPTS:
            raise UserError(f"The caption {text!r} gives the {thing.noun} no colour, but shapes need one.")
    # A concept has its own colour whatever the caption calls it: two lemons are always drawn alike.
    seen = [(thing.noun, CONCEPTS.get(thing.noun, thing.colour)) for thing in objects]
    for pair in seen:
        if seen.count(pair) > 1:
            raise UserError(
                f"The caption {text!r} contradicts itself or cannot be checked: it names {object_phrase(*pair)} twice; "
                "objects of one scene must differ in noun or colour."
            )
    return Parsed(objects, arrangement)


def _arrangement(between: list[str], behind: str, objects: int) -> str | None:
    """Returns the arrangement that the words between and behind the objects say; None if they say none."""
    if objects == 1:
        return _BEHIND.get(behind)
    if behind or not objects:
        return None
    if objects == 2:
        return _BETWEEN.get(between[0])
    return "" if objects == 3 and between == [" and ", " and "] else None
