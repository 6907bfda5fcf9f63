"""Weights in fewer bits: fp8 and its scales, which are read exactly, and what tells the kinds that are not.

1. Plain fp8 (F8_E4M3, F8_E5M2) is widened to float32, which holds every value of it.
2. Scaled fp8 has `X.scale_weight` or `X.weight_scale` beside `X.weight`: one number, or one per row of the matrix
   (output channel). The weight is their product, formed in float32.
3. `X.scale_input`, `X.input_scale` and the markers `scaled_fp8` and `X.comfy_quant` say how ComfyUI multiplies in fp8;
   they do not change the weights, and are left out, also where they were left over in a file of full precision.
4. A scale beside a weight that is not fp8 is refused unless it is 1. ComfyUI multiplies such a weight too, but a
   program that has widened an fp8 file may have multiplied already or not, and nothing in the file says which.
   Multiplying twice, or never, gives white images.
5. Every other kind is recognised by the names that its library gives to its tensors, or by a type of fewer than 8 bits.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np

FP8 = ("F8_E4M3", "F8_E5M2")
"""Types of eight bits that are read, as safetensors calls them."""
SCALES = ("scale_weight", "weight_scale")
_HINTS = ("scale_input", "input_scale", "comfy_quant")
_MARKER = "scaled_fp8"
BF16_FILES = "huggingface.co/black-forest-labs has FLUX.1-schnell and FLUX.1-dev in bf16"
"""What to take instead of weights that cannot be read."""

_KINDS = (
    (r"\.quant_state\.bitsandbytes__|\.(nested_)?(absmax|quant_map)$", "bitsandbytes in 4 bits (nf4 or fp4)"),
    (r"\.(SCB|weight_format)$", "bitsandbytes in 8 bits (int8)"),
    (r"\.(wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig)$", "SVDQuant (Nunchaku), 4 bits"),
    (r"\.(qzeros|g_idx)$", "GPTQ or AWQ, packed integers"),
    (r"\.qweight$", "packed integers (SVDQuant, GPTQ or AWQ)"),
    (r"\.weight_scale_2$", "NVFP4, 4 bits"),
    (r"\.weight_scale_inv$", "fp8 with a scale for every tile"),
    (r"\.weight\._(data|scale|shift|qtype)$", "optimum-quanto"),
    (r"[._]weight_?_?(qdata|zero_point)$", "torchao"),
)
"""Patterns of keys, and which way of quantising gives such names; the first that fits counts."""


def scale_keys(keys: Collection[str]) -> dict[str, str]:
    """Returns which weight has which scale.

    Args:
        keys: all keys of a checkpoint.

    Returns:
        Key of the weight -> key of its scale.
    """
    present = set(keys)
    pairs = ((f"{key.removesuffix(name)}weight", key) for name in SCALES for key in keys if key.endswith(f".{name}"))
    return {weight: scale for weight, scale in pairs if weight in present}


def hint_keys(keys: Collection[str]) -> set[str]:
    """Returns the keys that say how to multiply in fp8 and nothing about the weights."""
    present = set(keys)
    hints = {
        key
        for name in _HINTS
        for key in keys
        if key.endswith(f".{name}") and f"{key.removesuffix(name)}weight" in present
    }
    return hints | ({_MARKER} & present)


def kind_of(dtypes: Mapping[str, str | None]) -> tuple[str, str] | None:
    """Tells how a checkpoint is quantised that is neither of full precision nor fp8.

    Args:
        dtypes: type of every tensor, as safetensors calls it, by key; None where it is not known.

    Returns:
        The kind, in words, and the first tensor that shows it; None where there is none.
    """
    for pattern, kind in _KINDS:
        for key in dtypes:
            if re.search(pattern, key):
                return kind, key
    for key, code in dtypes.items():
        if code is not None and re.match(r"F[46](_|$)|F8_E8M0|[IU]4", code):
            return f"packed numbers of type {code}", key
        if key.endswith(".weight") and code in ("I8", "U8"):
            return f"integers of type {code}", key
    return None


def widen(weight: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Returns an fp8 weight as float32, multiplied by its scale.

    Args:
        weight: of any shape, fp8.
        scale: one number, or one per row, in any shape that holds as many; None for plain fp8.
    """
    wide = weight.astype(np.float32)
    if scale is not None:
        rows = (
            scale.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
            if scale.size > 1
            else np.float32(scale.item())
        )
        np.multiply(wide, rows, out=wide)
    return wide


def scale_fits(shape: Iterable[int], scale: Iterable[int]) -> bool:
    """Says whether a scale of one shape is one number, or one per row, for a weight of the other."""
    (rows, *_), scale = tuple(shape) or (1,), tuple(scale)
    return all(size == 1 for size in scale) or (scale[0] == rows and all(size == 1 for size in scale[1:]))
