"""Drawing the organism's world: flat figures with a soft shadow on a calm background, 48 x 48 pixels.

1. A figure is a function of unit coordinates (u to the right, v downwards, the figure within [-1, 1]) that returns
   signed distances, negative inside: of its body, and of its accent (a tomato's calyx, a carrot's tuft) if it has one.
2. Distances times the radius in pixels become coverage by a ramp one pixel wide, which smooths the edges.
3. Every figure is lit from above, has a darker rim and drops a shadow; figures are laid over the background in order.

All objects of one kind, over all scenes, are drawn in one go. Everything is NumPy in float32 and deterministic.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int

SIDE = 48
"""Pixels along each side of an image."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.17),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.97, 0.84, 0.18),
    "green": (0.20, 0.62, 0.28),
    "blue": (0.16, 0.38, 0.85),
    "purple": (0.50, 0.22, 0.66),
    "pink": (0.96, 0.56, 0.74),
    "black": (0.13, 0.13, 0.16),
}
"""Name -> red, green and blue in [0, 1]."""

ACCENT = (0.16, 0.45, 0.22)
"""Colour of calyx and tuft, darker than any green object."""
BACKGROUND_TOP, BACKGROUND_BOTTOM = (0.955, 0.950, 0.935), (0.885, 0.890, 0.895)
LIGHT, RIM, SHADOW = 0.10, 0.16, 0.13
"""How much the lit side gains, how much the rim and the shadowed background lose."""
SHADOW_OFFSET = (1.0, 1.6)
"""Pixels to the right and downwards by which a shadow is moved."""

Plane = Float32[np.ndarray, "object row column"]
Distances = tuple[Plane, Plane | None]


def _disc(u: Plane, v: Plane, radius: float) -> Plane:
    return np.sqrt(u * u + v * v) - np.float32(radius)


def _ellipse(u: Plane, v: Plane, a: float, b: float) -> Plane:
    """Signed distance to an ellipse, exact on its edge and along its short axis, which is all that coverage needs."""
    level = np.sqrt((u / np.float32(a)) ** 2 + (v / np.float32(b)) ** 2)
    return (level - 1) * np.float32(min(a, b))


def _box(u: Plane, v: Plane, a: float, b: float) -> Plane:
    return np.maximum(np.abs(u) - np.float32(a), np.abs(v) - np.float32(b))


def _wedge(u: Plane, v: Plane, tip: float, base: float, half: float) -> Plane:
    """A triangle with its tip at v = tip, and its base, 2 half wide, at v = base."""
    rise = np.float32(base - tip)
    side = (np.abs(u) * np.abs(rise) - (v - np.float32(tip)) * np.sign(rise) * np.float32(half)) / np.float32(
        np.hypot(rise, half)
    )
    return np.maximum(side, (v - np.float32(base)) * np.sign(rise))


def _circle(u: Plane, v: Plane) -> Distances:
    return _disc(u, v, 0.95), None


def _square(u: Plane, v: Plane) -> Distances:
    return _box(u, v, 0.82, 0.82), None


def _triangle(u: Plane, v: Plane) -> Distances:
    return _wedge(u, v, -0.98, 0.78, 0.98), None


def _cross(u: Plane, v: Plane) -> Distances:
    return np.minimum(_box(u, v, 0.34, 0.96), _box(u, v, 0.96, 0.34)), None


def _ring(u: Plane, v: Plane) -> Distances:
    return np.maximum(_disc(u, v, 0.97), -_disc(u, v, 0.48)), None


def _lemon(u: Plane, v: Plane) -> Distances:
    tips = _ellipse(np.abs(u) - np.float32(0.80), v, 0.20, 0.17)
    return np.minimum(_ellipse(u, v, 0.84, 0.62), tips), None


def _tomato(u: Plane, v: Plane) -> Distances:
    calyx = np.minimum(_ellipse(u, v + np.float32(0.56), 0.50, 0.17), _box(u, v + np.float32(0.80), 0.12, 0.20))
    return _ellipse(u, v - np.float32(0.16), 0.95, 0.80), calyx


def _leaf(u: Plane, v: Plane) -> Distances:
    along, across = (u - v) * np.float32(np.sqrt(0.5)), (u + v) * np.float32(np.sqrt(0.5))
    blade = _disc(along, np.abs(across) + np.float32(0.70), 1.26)
    stem = _box(along + np.float32(1.05), across, 0.25, 0.09)
    return np.minimum(blade, stem), None


def _carrot(u: Plane, v: Plane) -> Distances:
    spread = np.abs(u) - np.float32(0.20) - np.float32(0.55) * (np.float32(-0.42) - v)
    tuft = np.maximum(spread, np.abs(v + np.float32(0.70)) - np.float32(0.28))
    return _wedge(u, v, 1.0, -0.48, 0.60), tuft


FIGURES: dict[str, Callable[[Plane, Plane], Distances]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "lemon": _lemon,
    "tomato": _tomato,
    "leaf": _leaf,
    "carrot": _carrot,
}
"""Noun -> figure."""

NOUNS, PALETTE = tuple(FIGURES), np.array(list(COLOURS.values()), np.float32)


def background() -> Float32[np.ndarray, "row column rgb"]:
    """Returns the empty scene, a gentle gradient."""
    share = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    top, bottom = (np.array(colour, np.float32) for colour in (BACKGROUND_TOP, BACKGROUND_BOTTOM))
    return np.broadcast_to((1 - share) * top + share * bottom, (SIDE, SIDE, 3)).astype(np.float32)


def coverage(
    kind: int, centre: Float32[np.ndarray, "object xy"], radius: Float32[np.ndarray, "object"], side: int = SIDE
) -> tuple[Plane, Plane, Plane]:
    """Returns how much of every pixel the figures of one kind cover.

    Args:
        kind: index into `NOUNS`.
        centre: column and row of each figure's origin, in pixels from the upper left corner.
        radius: pixels per unit of the figure's coordinates.
        side: pixels along each side of the canvas.

    Returns:
        Coverage in [0, 1] of the whole figure, of its accent alone, and of its rim.
    """
    pixels = np.arange(side, dtype=np.float32) + np.float32(0.5)
    scale = radius[:, None, None]
    u = (pixels[None, None, :] - centre[:, 0, None, None]) / scale
    v = (pixels[None, :, None] - centre[:, 1, None, None]) / scale
    u, v = np.broadcast_arrays(u, v)
    body, accent = FIGURES[NOUNS[kind]](u, v)
    whole = body if accent is None else np.minimum(body, accent)
    covered = np.clip(np.float32(0.5) - whole * scale, 0, 1)
    top = np.zeros_like(covered) if accent is None else np.clip(np.float32(0.5) - accent * scale, 0, 1)
    rim = covered * np.clip(np.float32(1.6) + whole * scale, 0, 1)
    return covered, top, rim


def draw_scenes(
    count: Int[np.ndarray, "scene"],
    kind: Int[np.ndarray, "scene slot"],
    colour: Int[np.ndarray, "scene slot"],
    centre: Float32[np.ndarray, "scene slot xy"],
    radius: Float32[np.ndarray, "scene slot"],
    canvas: Float32[np.ndarray, "scene row column rgb"] | None = None,
) -> Float32[np.ndarray, "scene row column rgb"]:
    """Draws scenes.

    Args:
        count: objects in each scene; slots from there on are empty.
        kind: index into `NOUNS`.
        colour: index into `COLOURS`.
        centre: column and row in pixels.
        radius: in pixels.
        canvas: square pictures to draw on; empty scenes if left out.

    Returns:
        Pixels in [0, 1].
    """
    scenes, slots = kind.shape
    image = np.broadcast_to(background(), (scenes, SIDE, SIDE, 3)).copy() if canvas is None else canvas.copy()
    side = image.shape[1]
    covered, accent, rim, shadow = np.zeros((4, scenes, slots, side, side), np.float32)
    for number in range(len(NOUNS)):
        at = np.nonzero((kind == number) & (np.arange(slots) < count[:, None]))
        if not at[0].size:
            continue
        covered[at], accent[at], rim[at] = coverage(number, centre[at], radius[at], side)
        moved = centre[at] + np.array(SHADOW_OFFSET, np.float32)
        shadow[at] = coverage(number, moved, radius[at], side)[0]
    image *= (1 - SHADOW * shadow.max(axis=1))[..., None]
    rows = np.arange(side, dtype=np.float32)
    for slot in range(slots):
        lit = 1 + LIGHT * (centre[:, slot, 1, None] - rows) / radius[:, slot, None]
        shade = np.clip(lit, 1 - LIGHT, 1 + LIGHT)[:, :, None] * (1 - RIM * rim[:, slot])
        top = accent[:, slot, ..., None]
        paint = (1 - top) * PALETTE[colour[:, slot]][:, None, None] + top * np.array(ACCENT, np.float32)
        over = covered[:, slot, ..., None]
        image = (1 - over) * image + over * np.clip(paint * shade[..., None], 0, 1)
    return image
