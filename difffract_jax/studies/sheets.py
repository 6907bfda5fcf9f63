"""Pictures of many images side by side: rows of seeds, columns of edits, with a heading each."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 160
"""Pixels along the shorter side that a small image is at least enlarged to, by whole numbers."""
GAP, TOP, LEFT = 6, 22, 64
"""Pixels between images, above them for headings, and to their left for the names of rows."""


def sheet(
    images: UInt8[np.ndarray, "row column H W rgb"], rows: Sequence[str], columns: Sequence[str]
) -> UInt8[np.ndarray, "height width rgb"]:
    """Lays images out in a grid.

    Args:
        images: pixels.
        rows: a name for each row.
        columns: a heading for each column.
    """
    scale = max(1, -(-SMALLEST // min(images.shape[2:4])))
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    height, width = large.shape[2:4]
    size = LEFT + len(columns) * (width + GAP), TOP + len(rows) * (height + GAP)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, heading in enumerate(columns):
        pen.text((LEFT + column * (width + GAP) + width // 2, TOP // 2), heading, "black", font, "mm")
        for row in range(len(rows)):
            corner = LEFT + column * (width + GAP), TOP + row * (height + GAP)
            page.paste(Image.fromarray(large[row, column]), corner)
    for row, name in enumerate(rows):
        pen.text((LEFT // 2, TOP + row * (height + GAP) + height // 2), name, "black", font, "mm")
    return np.asarray(page)
