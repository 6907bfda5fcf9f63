"""Which model a LoRA was made for, as far as its names and sizes tell, to say so where it does not fit.

1. Names that one architecture alone has tell it.
2. `transformer_blocks` are FLUX.1's, Chroma's and Stable Diffusion 3's alike; the width of what they read tells the
   last apart, and modulations FLUX.1, since Chroma's blocks have none.
"""

import re
from collections.abc import Sequence
from typing import Any

from converters.kinds import TABLED
from converters.lora_files import Module, bare
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.sd3 import Sd3MMDiT

SD3 = "Stable Diffusion 3"
_NAMES = (
    (r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)", "FLUX.2"),
    *((kind.tables.names, kind.models) for kind in TABLED.values() if kind.tables),
    (r"blocks[._]\d+[._](modulation[._]lin|(img|txt)_mod[._]lin)", "FLUX.1"),
    (r"single_transformer_blocks[._]\d+[._]norm[._]linear", "FLUX.1"),
    (r"blocks[._]\d+[._]proj_mlp", "FLUX.1 or Chroma"),
    (r"(double|single)_blocks|single_transformer_blocks", "FLUX or Chroma"),
    (r"joint_blocks|transformer_blocks[._]\d+[._]attn2[._](to_|norm_)[qkvo]", SD3),
)
"""Pattern of a module's name -> the model that has such modules, the first that fits."""
_UNET = re.compile(r"(input|output|middle|down|up|mid)_blocks?[._]")
_WIDTHS = {1536: "SD3-medium or SD3.5-medium", 2432: "SD3.5-large", 3072: "FLUX.1 or Chroma"}
"""Columns of a matrix that reads the residual stream -> the models of that width."""
_READER = re.compile(r"transformer_blocks[._]\d+[._](attn[._](to|add)_[qkv](_proj)?|norm1(_context)?[._]linear)")


def model_of(transformer: Any) -> str:
    """Returns what a transformer is called in messages.

    Args:
        transformer: the module, or its shapes.
    """
    if isinstance(transformer, Sd3MMDiT):
        shape = transformer.config
        return "SD3.5-medium" if shape.depth_dual else "SD3.5-large" if shape.qk_norm else "SD3-medium"
    if isinstance(transformer, Flux2MMDiT):
        return "FLUX.2-klein"
    kind = TABLED.get(type(getattr(transformer, "config", None)))
    if kind is not None:
        return kind.models
    return "FLUX.1" if type(transformer) is MMDiT else "this model"


def other_base(modules: Sequence[Module], model: str) -> str | None:
    """Returns which other model a LoRA was made for; None where nothing tells, or it may be the same.

    Args:
        modules: of its file.
        model: the one at hand, from `model_of`.
    """
    base = _base_of(modules)
    if base is None or model.startswith(tuple(base.split(" or "))):
        return None
    return None if base == SD3 and model.startswith("SD3") else base


def _base_of(modules: Sequence[Module]) -> str | None:
    """Returns which model a LoRA was made for; None where nothing tells."""
    names = [bare(module.name) for module in modules]
    if any(_UNET.match(name) for name in names):  # whose attention has blocks of the same names as transformers
        return "Stable Diffusion 1, 2 or XL"
    for pattern, model in _NAMES:
        if any(re.search(pattern, name) for name in names):
            return model
    readers = [module for module in modules if _READER.search(module.name) and len(module.shape) == 2]
    base = next((_WIDTHS[width] for width in sorted({one.shape[1] for one in readers}) if width in _WIDTHS), None)
    modulated = any("norm1" in module.name for module in readers)
    return "FLUX.1" if modulated and base == _WIDTHS[3072] else base
