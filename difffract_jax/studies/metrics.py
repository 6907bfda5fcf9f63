"""What an edit did to images: whether they show what was wanted, and what changed besides (docs/method.md, section 9).

For any pipeline, beside the image of the same seed without the edit, in pixels of [0, 1]:

    inside, outside      root mean square difference inside and outside a region (of the whole image if there is none)
    psnr                 -20 log10(outside), in dB, at most `MOST_PSNR`
    effect per norm      inside / size of the edit, what one unit of change of the MLPs' outputs buys

Where the model is the organism, its scorer reads both images:

    success              the edited image shows what `wanted` says, word for word: every object, in the colour that it
                         names (`a blue lemon` must be blue), or in its own if it names none, placed as asked
    others changed       an object that was not meant to change has another noun, colour, size or place, or is gone
    flipped              attributes of any object that changed though they were not meant to; `Intent` says what was
    recall               of the attributes that were to change, the share that now are as wanted
    precision            of the attributes that changed, the share that were to, and are as wanted

Recall and precision pool the attributes of all images; without any there is no value. An attribute was to change if
`wanted` names it and the original does not show it so; what `wanted` leaves open counts for nothing. Noun, colour
and size are counted per object, the arrangement of all objects as one. Over strengths this is a curve.

An object of the original is found again in the edited image as the one nearest to it, up to twice `SAME_PLACE` pixels;
where objects were to change places, as one that looks as wanted, else as before, else as the nearest that is left.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from difffract_jax.config import UserError
from difffract_jax.organism.captions import CONCEPTS, Parsed, parse
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import SeenScenes, describe, interval, is_placed, judge
from difffract_jax.organism.world import Scenes, concatenate, from_caption

MOST_PSNR = 99.0
"""What PSNR is cut off at, in dB: images that do not differ have none."""
SAME_PLACE = 9.0
"""Pixels that an object may move and still count as the same object; more counts as another place."""
ATTRIBUTES = ("kind", "colour", "size", "place")
OPEN_ARRANGEMENTS = ("", "and", "middle")
"""Which the scorer takes anywhere."""


class Distances(NamedTuple):
    """How far edited images are from the originals.

    Attributes:
        inside: root mean square difference inside the region, or of the whole image.
        outside: the same outside; 0 if there is no region.
        psnr: of the outside, in dB; of the whole image if there is no region.
    """

    inside: Float[np.ndarray, "*image"]
    outside: Float[np.ndarray, "*image"]
    psnr: Float[np.ndarray, "*image"]


class Intent(NamedTuple):
    """What an edit is meant to change.

    Attributes:
        wanted: the caption that edited images shall show.
        attributes: per object of the prompt, in its order, the attributes that differ between prompt and `wanted`;
            None if the two name different numbers of objects, which makes every change a wanted one.
        named: per object, those of them that `wanted` names; the others may be anything.
    """

    wanted: str
    attributes: tuple[frozenset[str], ...] | None
    named: tuple[frozenset[str], ...]


class Scored(NamedTuple):
    """The scorer's verdicts on edited images, each beside its original.

    Attributes:
        success: whether the image shows what was wanted.
        others: whether an object that was not meant to change did.
        flipped: attributes changed that were not meant to.
        meant: attributes that were to change, and are named.
        reached: those of them that are as wanted.
        changed: attributes that changed, but for those that were left open.
        compared: whether the original showed the prompt's objects, so that the five above mean something; else they
            are 0.
        read: what the scorer read.
    """

    success: Bool[np.ndarray, "image"]
    others: Bool[np.ndarray, "image"]
    flipped: Float[np.ndarray, "image"]
    meant: Float[np.ndarray, "image"]
    reached: Float[np.ndarray, "image"]
    changed: Float[np.ndarray, "image"]
    compared: Bool[np.ndarray, "image"]
    read: tuple[str, ...]


def distances(
    original: UInt8[np.ndarray, "*image H W rgb"],
    edited: UInt8[np.ndarray, "*image H W rgb"],
    mask: Bool[np.ndarray, "H W"] | None = None,
) -> Distances:
    """Measures how far images are from their originals.

    Args:
        original: pixels.
        edited: pixels of the same images, edited.
        mask: the region that was meant to change; None if there is none.
    """
    square = np.square((edited.astype(np.float64) - original) / 255).mean(axis=-1)
    whole = np.ones(square.shape[-2:], bool) if mask is None else mask
    inside = np.sqrt(square[..., whole].mean(axis=-1))
    rest = ~whole if mask is not None and not mask.all() else whole
    outside = np.sqrt(square[..., rest].mean(axis=-1))
    psnr = -20 * np.log10(np.maximum(outside, 10 ** (-MOST_PSNR / 20)))
    return Distances(inside, np.zeros_like(inside) if rest is whole else outside, psnr)


def intent(prompt: str, wanted: str | None = None) -> Intent:
    """Says what an edit of a prompt is meant to change.

    Args:
        prompt: the organism's caption that is edited.
        wanted: the caption that the edited images shall show; the prompt itself if left out: then nothing.

    Raises:
        UserError: if one of them is not a caption of the organism.
    """
    wanted = prompt if wanted is None else wanted
    before, after = parse(prompt), parse(wanted)
    if len(before.objects) != len(after.objects):
        return Intent(wanted, None, ())
    differ = tuple(_differences(before, after, slot) for slot in range(len(before.objects)))
    return Intent(wanted, differ, tuple(found & _named(after, slot) for slot, found in enumerate(differ)))


def _differences(before: Parsed, after: Parsed, slot: int) -> frozenset[str]:
    old, new = before.objects[slot], after.objects[slot]
    named = {"kind": old.noun != new.noun, "colour": old.colour != new.colour, "size": old.size != new.size}
    named["place"] = before.arrangement != after.arrangement
    return frozenset(name for name, differs in named.items() if differs)


def _named(asked: Parsed, slot: int) -> frozenset[str]:
    """Returns the attributes of an object that a caption does not leave open."""
    thing = asked.objects[slot]
    said = {"kind": True, "colour": bool(thing.colour or thing.noun in CONCEPTS), "size": bool(thing.size)}
    said["place"] = asked.arrangement not in OPEN_ARRANGEMENTS
    return frozenset(name for name, yes in said.items() if yes)


def score_edits(
    prompts: Sequence[str],
    intents: Sequence[Intent],
    original: UInt8[np.ndarray, "image H W rgb"],
    edited: UInt8[np.ndarray, "image H W rgb"],
) -> Scored:
    """Reads edited images of the organism, and compares them with their originals.

    Args:
        prompts: one per image.
        intents: what was meant to change, one per image.
        original: images of the same prompts and seeds without the edit.
        edited: edited images.

    Raises:
        UserError: if a prompt is not a caption of the organism, or the numbers differ.
    """
    if not len(prompts) == len(intents) == len(original) == len(edited):
        raise UserError(f"Every image needs a prompt and an intent, but there are {len(prompts)} and {len(intents)}.")
    scenes = {text: from_caption(text) for text in {*prompts, *(one.wanted for one in intents)}}
    wanted = concatenate([scenes[one.wanted] for one in intents])
    # The world draws a lemon yellow whatever its caption calls it; an edit is asked for what the caption says.
    wanted = wanted._replace(colour=np.where(wanted.named >= 0, wanted.named, wanted.colour))
    before, after = see(original), see(edited)
    others, compared = np.zeros(len(prompts), bool), np.zeros(len(prompts), bool)
    counts = np.zeros((4, len(prompts)))
    for row, (prompt, meant) in enumerate(zip(prompts, intents, strict=True)):
        slots = _slots(scenes[prompt], before, row)
        compared[row] = slots is not None and meant.attributes is not None
        if slots is not None and meant.attributes is not None:
            pair = _Pair(before, after, row, slots, _found_again(before, after, wanted, row, slots, meant))
            others[row], counts[:, row] = _compare(pair, wanted, meant.attributes, meant.named)
    flipped, asked, reached, changed = counts
    read = tuple(describe(after, row) for row in range(len(prompts)))
    return Scored(judge(wanted, after).right, others, flipped, asked, reached, changed, compared, read)


class _Pair(NamedTuple):
    """One image before and after its edit; `old` and `new` are where each object of the prompt is, None if gone."""

    before: SeenScenes
    after: SeenScenes
    row: int
    old: list[int]
    new: list[int | None]


def _compare(
    pair: _Pair, wanted: Scenes, free: tuple[frozenset[str], ...], named: tuple[frozenset[str], ...]
) -> tuple[bool, tuple[int, int, int, int]]:
    """Returns whether others changed; and how many attributes flipped, were to change, did as wanted, and changed."""
    differs = [_changed(pair, slot) for slot in range(len(pair.old))]
    others = any(bool(found) and not may for found, may in zip(differs, free, strict=True))
    flipped = sum(len(found - may) for found, may in zip(differs, free, strict=True))
    asked = reached = 0
    changed = flipped
    for slot, (found, may, says) in enumerate(zip(differs, free, named, strict=True)):
        for name in may & says - {"place"}:
            value = getattr(wanted, name)[pair.row, slot]
            was = bool(getattr(pair.before, name)[pair.row, pair.old[slot]] == value)
            there = pair.new[slot]
            now = there is not None and bool(getattr(pair.after, name)[pair.row, there] == value)
            asked, reached, changed = asked + (not was), reached + (now and not was), changed + (name in found)
    if any("place" in may & says for may, says in zip(free, named, strict=True)):
        was, now = _placed(wanted, pair.before, pair.row, pair.old), _placed(wanted, pair.after, pair.row, pair.new)
        asked, reached = asked + (not was), reached + (now and not was)
        changed += (now and not was) or any("place" in found for found in differs)
    return others, (flipped, asked, reached, changed)


def _placed(wanted: Scenes, seen: SeenScenes, row: int, at: Sequence[int | None]) -> bool:
    """Says whether objects lie as wanted; not if one is gone."""
    there = [place for place in at if place is not None]
    return len(there) == len(at) and is_placed(int(wanted.arrangement[row]), [seen.centre[row, i] for i in there])


def precision_recall(
    meant: Float[np.ndarray, "image"], reached: Float[np.ndarray, "image"], changed: Float[np.ndarray, "image"]
) -> dict[str, float | None]:
    """Returns precision and recall of edits in the attributes that they change, pooled over images; see above.

    Args:
        meant: attributes that were to change, per image, as in `Scored`; this and the rest 0 where not compared.
        reached: those of them that are as wanted.
        changed: attributes that changed.

    Returns:
        Both; None for precision where nothing changed, for recall where nothing was to.
    """
    all_meant, all_reached, all_changed = (float(one.sum()) for one in (meant, reached, changed))
    return {
        "precision": all_reached / all_changed if all_changed else None,
        "recall": all_reached / all_meant if all_meant else None,
    }


def _slots(asked: Scenes, seen: SeenScenes, row: int) -> list[int] | None:
    """Returns where the original shows each object of its caption; None if it does not show all.

    What a caption names in a colour not its own may be shown in either.
    """
    found = list(zip(seen.kind[row, : seen.count[row]], seen.colour[row, : seen.count[row]], strict=True))
    slots = []
    for slot in range(asked.count[0]):
        pairs = [(asked.kind[0, slot], colours[0, slot]) for colours in (asked.named, asked.colour)]
        shown = [found.index(pair) for pair in pairs if pair in found]
        if not shown:
            return None
        slots.append(shown[0])
    return slots


def _found_again(
    before: SeenScenes, after: SeenScenes, wanted: Scenes, row: int, slots: list[int], meant: Intent
) -> list[int | None]:
    """Returns where each object of the original is in the edited image; None if it is gone."""
    centres = after.centre[row, : after.count[row]]
    away = np.stack([np.linalg.norm(centres - before.centre[row, place], axis=1) for place in slots])
    if not any("place" in one for one in meant.attributes or ()):
        return [int(one.argmin()) if one.size and one.min() <= 2 * SAME_PLACE else None for one in away]
    seen = list(zip(after.kind[row, : after.count[row]], after.colour[row, : after.count[row]], strict=True))
    found: list[int | None] = [None] * len(slots)
    for looks in (wanted, before):
        for slot, place in enumerate(slots):
            at = slot if looks is wanted else place
            same = [i for i, one in enumerate(seen) if one == (looks.kind[row, at], looks.colour[row, at])]
            free = [i for i in same if i not in found]
            found[slot] = free[0] if found[slot] is None and free else found[slot]
    for slot, one in enumerate(found):
        left = [i for i in range(len(seen)) if i not in found]
        found[slot] = min(left, key=lambda i, slot=slot: away[slot, i]) if one is None and left else one
    return found


def _changed(pair: _Pair, slot: int) -> frozenset[str]:
    """Returns the attributes of one object that changed; all of them if it is gone."""
    before, after, row, old, new = pair.before, pair.after, pair.row, pair.old[slot], pair.new[slot]
    if new is None:
        return frozenset(ATTRIBUTES)
    differs = {
        name: getattr(before, name)[row, old] != getattr(after, name)[row, new] for name in ("kind", "colour", "size")
    }
    moved = np.linalg.norm(after.centre[row, new] - before.centre[row, old]) > SAME_PLACE
    return frozenset(name for name, yes in (differs | {"place": bool(moved)}).items() if yes)


def sweep_table(
    columns: Sequence[str],
    images: UInt8[np.ndarray, "seed column H W rgb"],
    norms: Float[np.ndarray, "seed column"],
    mask: Bool[np.ndarray, "H W"] | None = None,
    prompt: str | None = None,
    meant: Intent | None = None,
) -> list[dict[str, Any]]:
    """Summarises a sweep, one row per column: means over seeds, and counts of the scorer's verdicts.

    Args:
        columns: names; the first is the original.
        images: pixels.
        norms: sizes of the edits.
        mask: region that was meant to change.
        prompt: the organism's caption; None for a pipeline without a scorer.
        meant: what was meant to change; nothing if left out.
    """
    first = np.broadcast_to(images[:, :1], images.shape)
    far = distances(first, images, mask)
    rows = []
    for column, name in enumerate(columns):
        row: dict[str, Any] = {"edit": name, "images": len(images), "norm": float(norms[:, column].mean())}
        row |= {"inside" if mask is not None else "difference": float(far.inside[:, column].mean())}
        if mask is not None:
            row["outside"] = float(far.outside[:, column].mean())
        row["psnr outside" if mask is not None else "psnr"] = float(far.psnr[:, column].mean())
        sizes = norms[:, column]
        row["effect per norm"] = float((far.inside[:, column] / np.where(sizes > 0, sizes, np.inf)).mean())
        if prompt is not None:
            many = [prompt] * len(images)
            read = score_edits(many, [meant or intent(prompt)] * len(images), images[:, 0], images[:, column])
            row |= _verdicts(read)
        rows.append(row)
    return rows


def _verdicts(read: Scored) -> dict[str, Any]:
    right, many = int(read.success.sum()), len(read.success)
    low, high = interval(right, many)
    compared = int(read.compared.sum())
    return {
        "success": right,
        "95% from": low,
        "to": high,
        "compared": compared,
        "others changed": int((read.others & read.compared).sum()),
        "flipped": float(read.flipped[read.compared].mean()) if compared else 0.0,
    } | precision_recall(read.meant, read.reached, read.changed)
