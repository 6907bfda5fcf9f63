"""Pictures for reports: activation as heat over an image, arrays as PNG files inside an address."""

import base64
import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

HEAT = (230, 85, 13)
"""Colour of a feature's largest value: orange, which colour-blind readers tell from grey."""
STRONGEST = 0.85
"""Opacity of the heat there."""
SHOWN = 192
"""Screen pixels along the shorter side that small images are enlarged to, by whole numbers."""


def heat_over(
    image: UInt8[np.ndarray, "H W rgb"], heat: Float[np.ndarray, "row column"]
) -> UInt8[np.ndarray, "H W rgb"]:
    """Lays a feature's values over the image in grey, one square per token, its largest value the most opaque.

    Args:
        image: pixels; a whole number of them per token.
        heat: values, 0 or more.
    """
    grey = image.astype(np.float64).mean(axis=2, keepdims=True).repeat(3, axis=2)
    sides = tuple(pixels // tokens for pixels, tokens in zip(image.shape[:2], heat.shape, strict=True))
    largest = float(heat.max(initial=0.0))
    share = heat / largest if largest > 0 else np.zeros_like(heat)
    opacity = STRONGEST * share.repeat(sides[0], axis=0).repeat(sides[1], axis=1)[:, :, None]
    return np.rint((1 - opacity) * grey + opacity * np.array(HEAT)).astype(np.uint8)


def enlarged(image: UInt8[np.ndarray, "H W rgb"]) -> UInt8[np.ndarray, "height width rgb"]:
    """Enlarges a small image by a whole number, pixel by pixel."""
    scale = max(1, -(-SHOWN // min(image.shape[:2])))
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def png_address(image: UInt8[np.ndarray, "H W rgb"]) -> str:
    """Returns an image as a `data:` address."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
