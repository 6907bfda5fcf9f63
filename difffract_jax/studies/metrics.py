"""What an edit did to images: whether they show what was wanted, and what changed besides (METHOD section 9).

For any pipeline, beside the image of the same seed without the edit, in pixels of [0, 1]:

    inside, outside      root mean square difference inside and outside a region (of the whole image if there is none)
    psnr                 -20 log10(outside), in dB, at most `MOST_PSNR`
    effect per norm      inside / size of the edit, what one unit of change of the MLPs' outputs buys

Where the model is the organism, its scorer reads both images:

    success              the edited image shows what `wanted` says, word for word: every object, in the colour that it
                         names (`a blue lemon` must be blue), or in its own if it names none, placed as asked
    others changed       an object that was not meant to change has another noun, colour, size or place, or is gone
    flipped              attributes of any object that changed though they were not meant to; `Intent` says what was
    recall               of the attributes that were meant to change, the share that now are as wanted
    precision            of the attributes that changed, the share that are as wanted; 0 if none changed

Recall and precision pool the attributes of all images. Over the strengths of a sweep they are a curve: a stronger edit
reaches more of what was wanted, and changes more that was not.

An object of the original is found again in the edited image as the one nearest to it, up to `SAME_PLACE` pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from difffract_jax.config import UserError
from difffract_jax.organism.captions import Parsed, parse
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import Reading, describe, interval, judge
from difffract_jax.organism.world import Scenes, concatenate, from_caption

MOST_PSNR = 99.0
"""What PSNR is cut off at, in dB: images that do not differ have none."""
SAME_PLACE = 9.0
"""Pixels that an object may move and still count as the same object; more counts as another place."""
ATTRIBUTES = ("kind", "colour", "size", "place")


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
    """

    wanted: str
    attributes: tuple[frozenset[str], ...] | None


class Scored(NamedTuple):
    """The scorer's verdicts on edited images, each beside its original.

    Attributes:
        success: whether the image shows what was wanted.
        others: whether an object that was not meant to change did.
        flipped: attributes changed that were not meant to.
        meant: attributes that were meant to change.
        reached: those of them that are as wanted.
        changed: attributes that changed, meant to or not.
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
        UserError: if one of them is no caption of the organism.
    """
    wanted = prompt if wanted is None else wanted
    before, after = parse(prompt), parse(wanted)
    if len(before.objects) != len(after.objects):
        return Intent(wanted, None)
    return Intent(wanted, tuple(_differences(before, after, slot) for slot in range(len(before.objects))))


def _differences(before: Parsed, after: Parsed, slot: int) -> frozenset[str]:
    old, new = before.objects[slot], after.objects[slot]
    named = {"kind": old.noun != new.noun, "colour": old.colour != new.colour, "size": old.size != new.size}
    named["place"] = before.arrangement != after.arrangement
    return frozenset(name for name, differs in named.items() if differs)


def score(
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
        UserError: if a prompt is no caption of the organism, or the numbers differ.
    """
    if not len(prompts) == len(intents) == len(original) == len(edited):
        raise UserError(f"Every image needs a prompt and an intent, but there are {len(prompts)} and {len(intents)}.")
    scenes = {text: from_caption(text) for text in {*prompts, *(one.wanted for one in intents)}}
    wanted = concatenate([scenes[one.wanted] for one in intents])
    # The world draws a lemon yellow whatever its caption calls it; an edit is asked for what the caption says.
    wanted = wanted._replace(colour=np.where(wanted.named >= 0, wanted.named, wanted.colour))
    before, after = see(original), see(edited)
    others, compared = np.zeros(len(prompts), bool), np.zeros(len(prompts), bool)
    flipped, asked, reached, changed = np.zeros((4, len(prompts)))
    for row, (prompt, meant) in enumerate(zip(prompts, intents, strict=True)):
        slots = _slots(scenes[prompt], before, row)
        compared[row] = slots is not None and meant.attributes is not None
        if slots is None or meant.attributes is None:
            continue
        for slot, (place, free) in enumerate(zip(slots, meant.attributes, strict=True)):
            there = _found_again(before, after, row, place)
            differs = _changed(before, after, row, place, there)
            others[row] |= bool(differs) and not free
            flipped[row] += len(differs - free)
            changed[row] += len(differs)
            asked[row] += len(free)
            reached[row] += sum(name in differs and _is_as(wanted, after, row, slot, there, name) for name in free)
    read = tuple(describe(after, row) for row in range(len(prompts)))
    return Scored(judge(wanted, after).right, others, flipped, asked, reached, changed, compared, read)


def precision_recall(
    meant: Float[np.ndarray, "image"], reached: Float[np.ndarray, "image"], changed: Float[np.ndarray, "image"]
) -> dict[str, float]:
    """Returns precision and recall of edits in the attributes that they change, pooled over images; see above.

    Args:
        meant: attributes that were meant to change, per image, as in `Scored`; this and the rest where compared.
        reached: those of them that are as wanted.
        changed: attributes that changed.
    """
    all_meant, all_reached, all_changed = (float(one.sum()) for one in (meant, reached, changed))
    return {
        "precision": all_reached / all_changed if all_changed else 0.0,
        "recall": all_reached / all_meant if all_meant else 0.0,
    }


def _slots(asked: Scenes, seen: Reading, row: int) -> list[int] | None:
    """Returns where the original shows each object of its caption; None if it does not show all."""
    found = list(zip(seen.kind[row, : seen.count[row]], seen.colour[row, : seen.count[row]], strict=True))
    pairs = [(asked.kind[0, slot], asked.colour[0, slot]) for slot in range(asked.count[0])]
    return [found.index(pair) for pair in pairs] if all(pair in found for pair in pairs) else None


def _found_again(before: Reading, after: Reading, row: int, slot: int) -> int | None:
    """Returns where an object of the original is in the edited image; None if it is gone."""
    away = np.linalg.norm(after.centre[row, : after.count[row]] - before.centre[row, slot], axis=1)
    return int(away.argmin()) if away.size and away.min() <= 2 * SAME_PLACE else None


def _changed(before: Reading, after: Reading, row: int, slot: int, there: int | None) -> frozenset[str]:
    """Returns the attributes of one object that changed; all of them if it is gone."""
    if there is None:
        return frozenset(ATTRIBUTES)
    differs = {
        name: getattr(before, name)[row, slot] != getattr(after, name)[row, there]
        for name in ("kind", "colour", "size")
    }
    moved = np.linalg.norm(after.centre[row, there] - before.centre[row, slot]) > SAME_PLACE
    return frozenset(name for name, yes in (differs | {"place": bool(moved)}).items() if yes)


def _is_as(wanted: Scenes, after: Reading, row: int, slot: int, there: int | None, name: str) -> bool:
    """Says whether an attribute that changed is as wanted; a place is if the object moved, `success` says whither."""
    if there is None or name == "place":
        return there is not None
    return bool(getattr(after, name)[row, there] == getattr(wanted, name)[row, slot])


def table(
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
            read = score(many, [meant or intent(prompt)] * len(images), images[:, 0], images[:, column])
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
