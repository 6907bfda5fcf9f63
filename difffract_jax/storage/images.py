"""Images as PNG files that know how they were made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from difffract_jax.storage.files import atomic_file


def save_image(image: UInt8[np.ndarray, "H W rgb"], path: Path, record: Mapping[str, Any]) -> None:
    """Writes a PNG whose text chunk `difffract_jax` is the record of how it was made, as JSON."""
    info = PngInfo()
    info.add_itxt("difffract_jax", json.dumps(record))
    with atomic_file(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=info)
