"""Reading scenes back from pixels: which objects, in which colours, where. Deterministic; no learned part.

1. Pixels that differ from the empty background by more than a shadow does, joined where they touch, are components;
   those under `SMALLEST` pixels are specks.
2. Colour: every pixel inside a component votes for the nearest colour of the palette, or for the accent, which does not
   count. Less than `MAJORITY` of the votes for one colour, or pixels far from it, make the colour unreadable.
3. Kind: each figure is drawn in that colour over the background, with the component's area and centre of mass, and
   compared: the share of the component's energy that it leaves unexplained. The least one wins;
   above `UNEXPLAINED` the kind is unreadable.
4. `judge` compares what was read with what a caption asks for, object by object and as a whole.
"""

from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import ndimage, stats

from difffract_jax.organism.captions import COLOUR_NAMES, PLACES, RELATIONS
from difffract_jax.organism.render import ACCENT, COLOURS, NOUNS, PALETTE, SIDE, background, coverage, draw_scenes
from difffract_jax.organism.world import RADII, Scenes

FOREGROUND = 0.22
"""Distance from the background, RGB in [0, 1], above which a pixel belongs to an object; shadows stay below."""
SMALLEST, LARGEST_SPECK = 14, 5
"""Pixels of the smallest object; of the largest speck that is overlooked. Between them lies an unreadable object."""
LARGEST = 1.2 * RADII[1][1]
"""Radius in pixels above which a component is not an object: more than it would fit the window of the comparison."""
CORE = 0.65
"""Distance from the background above which a pixel votes, as a share of the component's 90th percentile."""
MAJORITY, NEAR = 0.6, 0.30
"""Share of votes that a colour needs, and how far from it the median pixel may lie."""
UNEXPLAINED = 0.25
"""Largest share of energy that the best figure may leave."""
WINDOW = 26
"""Pixels along each side of the window in which figures are compared."""
MARGIN = 6.0
"""Pixels by which one object must lie beside another, or off the middle, for a relation or a place to be read."""
UNREADABLE = -1
_BIG = (RADII[0][1] + RADII[1][0]) / 2
_PAINTS = np.concatenate([PALETTE, np.array([ACCENT], np.float32)])
_GREEN = tuple(COLOURS).index("green")


class SeenScenes(NamedTuple):
    """Objects that the scorer finds in images. Slots beyond an image's `count` are padding.

    Attributes:
        count: objects, unreadable ones included.
        kind: index into `NOUNS`, -1 unreadable.
        colour: index into `COLOURS`, -1 unreadable or mixed.
        size: 0 small, 1 big.
        centre: column and row in pixels.
    """

    count: Int[np.ndarray, "image"]
    kind: Int[np.ndarray, "image seen"]
    colour: Int[np.ndarray, "image seen"]
    size: Int[np.ndarray, "image seen"]
    centre: Float[np.ndarray, "image seen xy"]


class Verdict(NamedTuple):
    """How far images show what their captions ask for.

    Attributes:
        kinds: whether exactly the nouns asked for are there.
        colours: whether exactly the colours are there, on whatever.
        bound: whether exactly the (noun, colour) pairs are there.
        placed: whether the objects lie as the caption says; True where it leaves that open.
        right: bound and placed.
    """

    kinds: Bool[np.ndarray, "image"]
    colours: Bool[np.ndarray, "image"]
    bound: Bool[np.ndarray, "image"]
    placed: Bool[np.ndarray, "image"]
    right: Bool[np.ndarray, "image"]


def read_scenes(images: Float32[np.ndarray, "image row column rgb"]) -> SeenScenes:
    """Reads images.

    Args:
        images: pixels in [0, 1], 48 x 48.
    """
    distance = np.linalg.norm(images - background(), axis=-1)
    connected = np.zeros((3, 3, 3), int)
    connected[1] = 1
    # Without `output` it returns both; with one, the number alone.
    labels, total = cast(tuple[np.ndarray, int], ndimage.label(distance > FOREGROUND, structure=connected))
    area = np.bincount(labels.ravel(), minlength=total + 1)
    keep = 1 + np.flatnonzero(area[1:] > LARGEST_SPECK)
    home = ndimage.minimum(np.arange(len(images))[:, None, None] + np.zeros_like(labels), labels, keep).astype(int)
    colour = np.array([_colour(images[i], distance[i], labels[i] == n) for i, n in zip(home, keep, strict=True)], int)
    kind, radius, centre = _figures(images, labels, distance, home, keep, colour)
    kind = np.where((area[keep] < SMALLEST) | (radius > LARGEST), UNREADABLE, kind)
    return _by_image(len(images), home, kind, colour, (radius > _BIG).astype(int), centre)


def _colour(
    image: Float[np.ndarray, "row column rgb"], distance: Float[np.ndarray, "row column"], mine: np.ndarray
) -> int:
    """Returns the colour of one component; its edges, blended with the background, do not vote."""
    core = mine & (distance > CORE * np.quantile(distance[mine], 0.9))
    away = np.linalg.norm(image[core][:, None] - _PAINTS, axis=-1)
    votes = np.bincount(away.argmin(axis=1), minlength=len(_PAINTS))[:-1]
    best = int(votes.argmax())
    if best != _GREEN:
        votes[_GREEN] = 0  # a calyx or tuft blends with what is around it
    clear = votes[best] > MAJORITY * votes.sum() and np.median(np.sort(away[:, best])[: votes[best]]) < NEAR
    return best if clear else UNREADABLE


def _figures(
    images: np.ndarray, labels: np.ndarray, distance: np.ndarray, home: np.ndarray, keep: np.ndarray, colour: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns kind, radius and centre of every component."""
    number = len(keep)
    if not number:
        return np.zeros(0, int), np.zeros(0), np.zeros((0, 2))
    mine = labels[home] == keep[:, None, None]
    paint = PALETTE[np.maximum(colour, 0)]
    half = 0.5 * np.minimum(np.linalg.norm(paint - background()[SIDE // 2, 0], axis=1), 1.0)
    mask = mine & (distance[home] > half[:, None, None])
    size = np.maximum(mask.sum(axis=(1, 2)), 1)
    pixels = np.arange(SIDE) + 0.5
    mass = np.stack([(mask.sum(axis=1) @ pixels) / size, (mask.sum(axis=2) @ pixels) / size], axis=1)
    corner = np.clip(np.round(mass).astype(int) - WINDOW // 2, 0, SIDE - WINDOW)
    rows, columns = (corner[:, axis, None] + np.arange(WINDOW) for axis in (1, 0))
    at = np.arange(number)[:, None, None], rows[:, :, None], columns[:, None, :]
    theirs = ((labels[home] > 0) & ~mine)[at]
    weight = np.logical_not(ndimage.binary_dilation(theirs, _plane(), 2))[..., None].astype(np.float32)
    picture, empty = images[home][at], background()[at[1:]]
    base = np.sum(np.square(picture - empty) * weight, axis=(1, 2, 3))
    error = np.zeros((number, len(NOUNS)))
    radius = np.sqrt(size[:, None] / _UNIT[0])
    centre = mass[:, None] - radius[..., None] * _UNIT[1]
    for kind in range(len(NOUNS)):
        drawn = _draw_window(empty, kind, np.maximum(colour, 0), centre[:, kind] - corner, radius[:, kind])
        error[:, kind] = np.sum(np.square(picture - drawn) * weight, axis=(1, 2, 3)) / base
    best = error.argmin(axis=1)
    flat = np.arange(number), best
    return np.where((error[flat] <= UNEXPLAINED) & (colour >= 0), best, UNREADABLE), radius[flat], centre[flat]


def _draw_window(
    empty: np.ndarray, kind: int, colour: np.ndarray, centre: np.ndarray, radius: np.ndarray
) -> Float32[np.ndarray, "object row column rgb"]:
    """Draws one figure into each window."""
    number = len(radius)
    return draw_scenes(
        np.ones(number, int),
        np.full((number, 1), kind),
        colour[:, None],
        centre[:, None].astype(np.float32),
        radius[:, None].astype(np.float32),
        empty,
    )


def _plane() -> np.ndarray:
    """Neighbours within one image of a stack."""
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = True
    return plane


def _unit_moments() -> tuple[np.ndarray, np.ndarray]:
    """Returns area and centre of mass of every figure of radius 1."""
    side, radius = 200, 90.0
    areas, offsets = np.zeros(len(NOUNS)), np.zeros((len(NOUNS), 2))
    pixels = np.arange(side) + 0.5
    for kind in range(len(NOUNS)):
        middle = np.full((1, 2), side / 2, np.float32)
        covered = coverage(kind, middle, np.full(1, radius, np.float32), side)[0][0].astype(np.float64)
        areas[kind] = covered.sum() / radius**2
        mass = np.array([covered.sum(axis=0) @ pixels, covered.sum(axis=1) @ pixels]) / covered.sum()
        offsets[kind] = (mass - side / 2) / radius
    return areas, offsets


_UNIT = _unit_moments()


def _by_image(
    images: int, home: np.ndarray, kind: np.ndarray, colour: np.ndarray, size: np.ndarray, centre: np.ndarray
) -> SeenScenes:
    """Sorts components into the slots of their images."""
    count = np.bincount(home, minlength=images)
    most = max(int(count.max(initial=0)), 1)
    reading = SeenScenes(
        count,
        np.full((images, most), UNREADABLE),
        np.full((images, most), UNREADABLE),
        np.zeros((images, most), int),
        np.zeros((images, most, 2)),
    )
    slot = np.arange(len(home)) - np.concatenate([[0], np.cumsum(count)])[home]
    for column, values in zip(reading[1:], (kind, colour, size, centre), strict=True):
        column[home, slot] = values
    return reading


def describe(reading: SeenScenes, row: int) -> str:
    """Says what the scorer read in one image."""
    names = []
    for kind, colour in zip(reading.kind[row], reading.colour[row], strict=True):
        if len(names) < reading.count[row]:
            names.append(
                f"{COLOUR_NAMES[colour] if colour >= 0 else 'mixed'} {NOUNS[kind] if kind >= 0 else 'unreadable'}"
            )
    return ", ".join(names) or "nothing"


def judge(asked: Scenes, seen: SeenScenes) -> Verdict:
    """Compares images with their captions.

    Args:
        asked: the scenes; objects are wanted as they would be drawn.
        seen: what was read, image by image.
    """
    size = len(asked.count)
    kinds, colours, bound, placed = (np.zeros(size, bool) for _ in range(4))
    for row in range(size):
        number = int(asked.count[row])
        wanted = list(zip(asked.kind[row, :number].tolist(), asked.colour[row, :number].tolist(), strict=True))
        shown = int(seen.count[row])
        found = list(zip(seen.kind[row, :shown].tolist(), seen.colour[row, :shown].tolist(), strict=True))
        kinds[row] = sorted(k for k, _ in wanted) == sorted(k for k, _ in found)
        colours[row] = sorted(c for _, c in wanted) == sorted(c for _, c in found)
        bound[row] = sorted(wanted) == sorted(found)
        if bound[row]:
            at = [seen.centre[row, found.index(pair)] for pair in wanted]
            placed[row] = is_placed(int(asked.arrangement[row]), at)
    return Verdict(kinds, colours, bound, placed, bound & placed)


def is_placed(arrangement: int, at: list[np.ndarray]) -> bool:
    """Says whether objects lie as an arrangement asks.

    Args:
        arrangement: for one object index into `PLACES`, for two into `RELATIONS`; ignored for three.
        at: centre of each, column and row in pixels, in the order of the caption.
    """
    if len(at) == 1:
        name, (across, down) = PLACES[arrangement], at[0] - SIDE / 2
        if name == "middle":
            return True
    elif len(at) == 2:
        name, (across, down) = RELATIONS[arrangement], at[0] - at[1]
        if name == "and":
            return True
    else:
        return True
    along = {"left": -across, "right": across, "top": -down, "above": -down, "bottom": down, "below": down}[name]
    aside = abs(down) if name in ("left", "right") else abs(across)
    return bool(along > MARGIN and along > aside)


def interval(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's interval of a share.

    Args:
        right: successes.
        total: trials.
        confidence: of the interval.
    """
    found = stats.binomtest(right, total).proportion_ci(confidence, "wilson")
    return float(found.low), float(found.high)
