"""Regions of an image: a box or a mask in pixels, and the image tokens that lie in it.

1. A box is `X0,Y0,X1,Y1` in pixels from the upper left corner; X1 and Y1 are the first column and row outside.
2. A mask is a grey-scale picture of the image's size; what is lighter than the middle grey lies inside.
3. A token belongs to a region if at least `INSIDE` of its pixels do.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from difffract_jax.config import UserError
from difffract_jax.storage.remote.cache import local_file

INSIDE = 0.25
"""Share of a token's pixels that must lie in a region for the token to belong to it."""


def box_mask(box: str, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns the pixels of a box.

    Args:
        box: `X0,Y0,X1,Y1`.
        size: height and width of the image in pixels.

    Raises:
        UserError: if it is not four whole numbers that describe a box within the image.
    """
    height, width = size
    try:
        x0, y0, x1, y1 = map(int, box.split(","))
    except ValueError:
        raise UserError(f"A box is X0,Y0,X1,Y1 in whole pixels, as in 0,0,24,48, but got {box!r}.") from None
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"The box {box} is empty or leaves the image, which is {width} x {height} pixels; give X0 < X1 <= {width} "
            f"and Y0 < Y1 <= {height}."
        )
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Reads a mask from a picture.

    Args:
        path: the picture.
        size: height and width that it must have.

    Raises:
        UserError: if it is not a picture, has another size, or is all dark.
    """
    path = local_file(path)
    if not path.is_file():
        raise UserError(f"The mask {path} is not a file; give an image file of {size[1]} x {size[0]} pixels.")
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"))
    except UnidentifiedImageError:
        raise UserError(f"The mask {path} is not a picture that can be read; give a PNG.") from None
    if grey.shape != size:
        raise UserError(
            f"The mask {path} is {grey.shape[1]} x {grey.shape[0]} pixels, but the image is {size[1]} x {size[0]}."
        )
    if not (grey > 127).any():
        raise UserError(f"The mask {path} is dark everywhere; paint the region white.")
    return grey > 127


def tokens_in(mask: Bool[np.ndarray, "H W"], grid: tuple[int, int]) -> tuple[int, ...]:
    """Returns the image tokens that lie in a region, ascending.

    Args:
        mask: its pixels.
        grid: rows and columns of image tokens.

    Raises:
        UserError: if no token does.

    Example:
        >>> mask = np.zeros((4, 4), bool)
        >>> mask[:2, 2:] = True
        >>> tokens_in(mask, (2, 2))
        (1,)
    """
    rows, columns = grid
    height, width = mask.shape[0] // rows, mask.shape[1] // columns
    share = mask.reshape(rows, height, columns, width).mean(axis=(1, 3)).ravel()
    found = np.flatnonzero(share >= INSIDE)
    if not found.size:
        raise UserError(
            f"The region holds no image token: it covers less than {INSIDE:.0%} of every patch of {width} x {height} "
            "pixels; give a larger one."
        )
    return tuple(int(token) for token in found)
