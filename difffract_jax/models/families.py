"""Which class a part's shape belongs to, and which shapes there are, of every model.

1. `module_of` gives the module of a shape; loading, converting and counting build every part by it.
2. A shape that is not FLUX.1's has a field `family`, by which `config.json` of a directory tells it: `shape_class`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from difffract_jax.models.absent import Absent, AbsentConfig
from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig, Flux2Autoencoder, Flux2AutoencoderConfig
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.chroma import ChromaConfig, ChromaMMDiT
from difffract_jax.models.chroma_text import ChromaT5Config, ChromaT5Encoder
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.flux2 import Flux2Config, Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.qwen3 import NoPooled, NoPooledConfig, Qwen3Config, Qwen3Encoder
from difffract_jax.models.sampler import (
    ChromaSchedulerConfig,
    Flux2SchedulerConfig,
    SchedulerConfig,
    Sd3SchedulerConfig,
)
from difffract_jax.models.sd3 import Sd3Config, Sd3MMDiT
from difffract_jax.models.sd3_text import NoText, NoTextConfig, TwoClips, TwoClipsConfig
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.zimage import ZImageMMDiT
from difffract_jax.models.zimage_blocks import ZImageConfig
from difffract_jax.models.zimage_text import ZImageQwen3, ZImageQwen3Config

PARTS = ("transformer", "t5", "clip", "vae")
"""A pipeline's parts with weights: the transformer, the encoder of the text stream, that of the pooled text, and the
autoencoder."""
MODULES: Mapping[type, Callable[..., Any]] = {
    FluxConfig: MMDiT,
    T5Config: T5Encoder,
    CLIPConfig: CLIPTextEncoder,
    AutoencoderConfig: Autoencoder,
    Flux2Config: Flux2MMDiT,
    Qwen3Config: Qwen3Encoder,
    NoPooledConfig: NoPooled,
    Flux2AutoencoderConfig: Flux2Autoencoder,
    Sd3Config: Sd3MMDiT,
    TwoClipsConfig: TwoClips,
    NoTextConfig: NoText,
    AbsentConfig: Absent,
    ChromaConfig: ChromaMMDiT,
    ChromaT5Config: ChromaT5Encoder,
    ZImageConfig: ZImageMMDiT,
    ZImageQwen3Config: ZImageQwen3,
}
"""Class of a shape -> the module of that shape."""
FLUX1 = "flux1"
SHAPES: Mapping[str, Mapping[str, type]] = {
    FLUX1: {
        "transformer": FluxConfig,
        "t5": T5Config,
        "clip": CLIPConfig,
        "vae": AutoencoderConfig,
        "scheduler": SchedulerConfig,
    },
    "flux2": {
        "transformer": Flux2Config,
        "t5": Qwen3Config,
        "clip": NoPooledConfig,
        "vae": Flux2AutoencoderConfig,
        "scheduler": Flux2SchedulerConfig,
    },
    "sd3": {"transformer": Sd3Config, "clip": TwoClipsConfig, "t5": NoTextConfig, "scheduler": Sd3SchedulerConfig},
    "chroma": {"transformer": ChromaConfig, "t5": ChromaT5Config, "scheduler": ChromaSchedulerConfig},
    "zimage": {"transformer": ZImageConfig, "t5": ZImageQwen3Config},
    "absent": {"t5": AbsentConfig, "clip": AbsentConfig},
}
"""Family -> part -> class of its shape; parts of a pipeline may be of several families."""


def module_of(shape: Any) -> Callable[..., Any]:
    """Returns the class of a part's module, called with the shape, `rngs` and `dtype`.

    Args:
        shape: of the part.
    """
    return next(MODULES[kind] for kind in type(shape).__mro__ if kind in MODULES)


def shape_class(part: str, family: str) -> type | None:
    """Returns the class of a part's shape; None where the family is not known.

    Args:
        part: one of `PARTS`, or the scheduler.
        family: as a directory's `config.json` has it.
    """
    return SHAPES.get(family, {}).get(part)
