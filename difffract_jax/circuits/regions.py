"""Regions of an image: boxes and masks, in pixels and in image tokens.

A token is a square of pixels, `unit` on a side; it belongs to a region that covers at least half of it, or, where a
region covers half of no token, to the region that touches it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from difffract_jax.config import UserError


@dataclass(frozen=True)
class Region:
    """A box, or the bright part of a mask file; the whole image if neither is given.

    Attributes:
        box: x0, y0, x1, y1 in pixels; x1 and y1 are exclusive.
        mask: image file; pixels brighter than half are inside.
    """

    box: tuple[int, int, int, int] | None = None
    mask: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether it is the whole image."""
        return self.box is None and self.mask is None


def pixels(region: Region, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    """Returns which pixels a region holds.

    Args:
        region: box or mask.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        UserError: if a box leaves the image or is empty, or a mask is unreadable, of another size, or empty.
    """
    if region.mask is not None:
        return _mask(region.mask, height, width)
    x0, y0, x1, y1 = region.box or (0, 0, width, height)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"The box {x0},{y0},{x1},{y1} does not lie in the image; give X0,Y0,X1,Y1 in pixels with "
            f"X0 < X1 <= {width} and Y0 < Y1 <= {height}."
        )
    inside = np.zeros((height, width), bool)
    inside[y0:y1, x0:x1] = True
    return inside


def _mask(path: Path, height: int, width: int) -> Bool[np.ndarray, "H W"]:
    if not path.exists():
        raise UserError(f"The mask {path} does not exist; give an image file of {width} x {height} pixels.")
    try:
        with Image.open(path) as image:
            size, bright = image.size, np.asarray(image.convert("L")) > 127
    except (UnidentifiedImageError, OSError):
        raise UserError(f"The mask {path} is no readable image; give a PNG of {width} x {height} pixels.") from None
    if size != (width, height):
        raise UserError(f"The mask {path} has {size[0]} x {size[1]} pixels, but the image has {width} x {height}.")
    if not bright.any():
        raise UserError(f"The mask {path} is empty: no pixel is brighter than half; paint the region white.")
    return bright


def tokens(inside: Bool[np.ndarray, "H W"], unit: int) -> Bool[np.ndarray, "img"]:
    """Returns which image tokens belong to a region.

    Args:
        inside: its pixels.
        unit: side of a token in pixels.
    """
    rows, columns = inside.shape[0] // unit, inside.shape[1] // unit
    covered = inside.reshape(rows, unit, columns, unit).mean(axis=(1, 3)).ravel()
    return covered >= 0.5 if np.any(covered >= 0.5) else covered > 0
