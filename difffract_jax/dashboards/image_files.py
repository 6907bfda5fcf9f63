"""Images beside a graph: read, kept, and put into an address (NumPy and Pillow).

The images of a run lie in one PNG beside the graph, STEM.images.png: the finished one, then what each step predicted,
side by side. Its text chunk `difffract_jax` says of which run and which steps, so that those of another run are not
taken.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from difffract_jax.config import UserError
from difffract_jax.dashboards.viewer_page import ShownImage
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

SUFFIX = ".images.png"
LARGEST = 1024
"""Pixels along the longer side of an image in a page; larger ones are made smaller."""


class KeptImages(NamedTuple):
    """The images of a run.

    Attributes:
        pixels: the finished image, then those that steps predicted.
        steps: whose, as many as images but one.
    """

    pixels: UInt8[np.ndarray, "image H W rgb"]
    steps: tuple[int, ...]


def kept_path(graph: Path) -> Path:
    """Returns where the images of a graph's run are kept."""
    return graph.with_name(graph.name.removesuffix(graph.suffix) + SUFFIX)


def read_kept(path: Path, key: str) -> KeptImages | None:
    """Reads the images of a run; None if there are none, or they are of another run.

    Args:
        path: from `kept_path`.
        key: of the run.
    """
    try:
        with Image.open(path) as image:
            record = json.loads(getattr(image, "text", {}).get("difffract_jax", "{}"))
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    steps = tuple(record["steps"])
    width = pixels.shape[1] // (len(steps) + 1)
    return KeptImages(np.stack([pixels[:, i * width : (i + 1) * width] for i in range(len(steps) + 1)]), steps)


def keep(images: KeptImages, path: Path, key: str) -> None:
    """Writes the images of a run beside each other, whole or not at all.

    Args:
        images: to keep.
        path: from `kept_path`.
        key: of the run.
    """
    info = PngInfo()
    info.add_itxt("difffract_jax", json.dumps({"key": key, "steps": images.steps}))
    with atomic_file(path) as partial:
        Image.fromarray(np.concatenate(list(images.pixels), axis=1)).save(partial, format="PNG", pnginfo=info)


def read_image(path: Path, data: bytes | None = None) -> Any:
    """Reads an image of any format as Pillow's; raises `UserError` if it is none.

    Args:
        path: the file.
        data: the image itself, if it lies in that file among other things.
    """
    try:
        with Image.open(local_file(path) if data is None else io.BytesIO(data)) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give an image file.") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more pixels than are safe to read; make it smaller.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise UserError(f"{path} is not an image that can be read; give a PNG or JPEG.") from None


def shown(image: Any, step: int | None = None, *, largest: int = LARGEST) -> ShownImage:
    """Returns an image as a page holds it.

    Args:
        image: of Pillow.
        step: whose prediction it is; None for the finished one.
        largest: pixels along the longer side; a larger image is made smaller.
    """
    if max(image.size) > largest:
        image = image.copy()
        image.thumbnail((largest, largest))
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return ShownImage("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), step)


def shown_images(images: KeptImages) -> Sequence[ShownImage]:
    """Returns the images of a run as a page holds them, the finished one first."""
    steps = (None, *images.steps)
    height, width = images.pixels.shape[1:3]
    return [
        shown(Image.fromarray(one), step)._replace(size=(width, height))
        for one, step in zip(images.pixels, steps, strict=True)
    ]
