"""Shapes of the published models; facts about checkpoints, not choices of a run.

Sources: the `config.json` files of FLUX.1[schnell] and FLUX.1[dev], which differ in the guidance embedding and in the
schedule alone.
"""

from collections.abc import Mapping

from difffract_jax.models.autoencoder import FLUX_VAE
from difffract_jax.models.clip import CLIP_L
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.pipeline import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5_XXL


def _flux(*, guidance: bool) -> FluxConfig:
    return FluxConfig(
        depth_double=19,
        depth_single=38,
        heads=24,
        head_dim=128,
        rope_axes=(16, 56, 56),
        in_channels=64,
        out_channels=64,
        text_width=4096,
        pooled_width=768,
        guidance=guidance,
    )


PRESETS: Mapping[str, FluxConfig] = {"flux-schnell": _flux(guidance=False), "flux-dev": _flux(guidance=True)}
"""Name -> shape of the transformer."""


def preset_config(name: str) -> PipelineConfig:
    """Returns the shapes of a published pipeline, and what a run of it takes that names nothing else.

    Args:
        name: one of `PRESETS`.
    """
    shape = PRESETS[name]
    tokens, steps, guidance = (512, 28, 3.5) if shape.guidance else (256, 4, 0.0)
    defaults = GenerationDefaults(height=1024, width=1024, text_tokens=tokens, steps=steps, guidance=guidance)
    scheduler = SchedulerConfig(shift=3.0 if shape.guidance else 1.0, use_dynamic_shifting=shape.guidance)
    return PipelineConfig(shape, T5_XXL, CLIP_L, FLUX_VAE, scheduler, defaults)
