"""Shapes of the published models; facts about checkpoints, not choices of a run.

Sources: the `config.json` files of FLUX.1[schnell] and FLUX.1[dev], which differ in the guidance embedding and in the
schedule alone; copies of those of FLUX.2-klein-4B, SD3-medium, SD3.5-medium and SD3.5-large (docs/models.md); of
Chroma1-HD and Z-Image-Turbo the defaults of diffusers' classes, which were written for them; Z-Image's 8 steps are
those of diffusers' example, and its shift of 3 was not compared with its file.
"""

from collections.abc import Mapping
from dataclasses import replace

from difffract_jax.models.autoencoder import FLUX2_VAE, FLUX_VAE, SD3_VAE
from difffract_jax.models.chroma import ChromaConfig
from difffract_jax.models.chroma_text import CHROMA_T5_XXL
from difffract_jax.models.clip import CLIP_L
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.models.qwen3 import QWEN3_4B, NoPooledConfig
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import (
    ChromaSchedulerConfig,
    Flux2SchedulerConfig,
    SchedulerConfig,
    Sd3SchedulerConfig,
)
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.sd3_text import SD3_CLIPS
from difffract_jax.models.t5 import T5_XXL
from difffract_jax.models.zimage_blocks import ZImageConfig
from difffract_jax.models.zimage_text import ZIMAGE_QWEN3_4B


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


KLEIN = Flux2Config(
    depth_double=5,
    depth_single=20,
    heads=24,
    head_dim=128,
    in_channels=128,
    out_channels=128,
    text_width=QWEN3_4B.d_model,
)
KLEIN_RUN = GenerationDefaults(height=1024, width=1024, text_tokens=512, steps=4, guidance=0.0)
"""What a run of the distilled FLUX.2-klein takes."""
KLEIN_BASE_RUN = replace(KLEIN_RUN, steps=50, guidance=4.0, two_branches=True)
"""What a run of FLUX.2-klein's base model takes."""


def _sd3(*, depth: int, heads: int, table: int, depth_dual: int = 0, qk_norm: bool = True) -> Sd3Config:
    return Sd3Config(
        depth_double=depth,
        heads=heads,
        head_dim=64,
        in_channels=64,
        out_channels=64,
        text_width=T5_XXL.d_model,
        pooled_width=SD3_CLIPS.d_model,
        depth_dual=depth_dual,
        qk_norm=qk_norm,
        table=table,
    )


def sd3_run(shape: Sd3Config) -> GenerationDefaults:
    """Returns what a run of Stable Diffusion 3 takes, by the shape of its transformer.

    Args:
        shape: as of SD3-medium, SD3.5-medium or SD3.5-large.
    """
    steps, guidance = (40, 4.5) if shape.depth_dual else (28, 3.5) if shape.qk_norm else (28, 7.0)
    return GenerationDefaults(1024, 1024, SD3_CLIPS.states + 256, steps, guidance, two_branches=True)


CHROMA = ChromaConfig(
    depth_double=19,
    depth_single=38,
    heads=24,
    head_dim=128,
    rope_axes=(16, 56, 56),
    in_channels=64,
    out_channels=64,
    text_width=T5_XXL.d_model,
)
CHROMA_RUN = GenerationDefaults(1024, 1024, text_tokens=512, steps=35, guidance=5.0, two_branches=True)
"""What a run of Chroma takes, as diffusers' pipeline has it."""

ZIMAGE = ZImageConfig(
    depth=30,
    depth_refiner=2,
    heads=30,
    head_dim=128,
    rope_axes=(32, 48, 48),
    in_channels=64,
    out_channels=64,
    text_width=ZIMAGE_QWEN3_4B.d_model,
)
ZIMAGE_RUN = GenerationDefaults(1024, 1024, text_tokens=512, steps=8, guidance=0.0)
"""What a run of Z-Image-Turbo takes."""


PRESETS: Mapping[str, FluxConfig] = {
    "flux-schnell": _flux(guidance=False),
    "flux-dev": _flux(guidance=True),
    "flux2-klein": KLEIN,
    "flux2-klein-base": KLEIN,
    "chroma1-hd": CHROMA,
    "z-image-turbo": ZIMAGE,
    "sd3-medium": _sd3(depth=24, heads=24, table=192, qk_norm=False),
    "sd3.5-medium": _sd3(depth=24, heads=24, table=384, depth_dual=13),
    "sd3.5-large": _sd3(depth=38, heads=38, table=192),
}
"""Name -> shape of the transformer."""


def preset_config(name: str) -> PipelineConfig:
    """Returns the shapes of a published pipeline, and what a run of it takes that names nothing else.

    Args:
        name: one of `PRESETS`.
    """
    shape = PRESETS[name]
    if isinstance(shape, Flux2Config):
        schedule = Flux2SchedulerConfig(shift=3.0, use_dynamic_shifting=True)
        run = KLEIN_BASE_RUN if name.endswith("-base") else KLEIN_RUN
        return PipelineConfig(shape, QWEN3_4B, NoPooledConfig(), FLUX2_VAE, schedule, run)
    if isinstance(shape, ChromaConfig):
        schedule = ChromaSchedulerConfig(use_beta_sigmas=True)
        return PipelineConfig(shape, CHROMA_T5_XXL, NoPooledConfig(), FLUX_VAE, schedule, CHROMA_RUN)
    if isinstance(shape, ZImageConfig):
        schedule = SchedulerConfig(shift=3.0)
        return PipelineConfig(shape, ZIMAGE_QWEN3_4B, NoPooledConfig(), FLUX_VAE, schedule, ZIMAGE_RUN)
    if isinstance(shape, Sd3Config):
        schedule = Sd3SchedulerConfig(shift=3.0)
        return PipelineConfig(shape, T5_XXL, SD3_CLIPS, SD3_VAE, schedule, sd3_run(shape))
    tokens, steps, guidance = (512, 28, 3.5) if shape.guidance else (256, 4, 0.0)
    defaults = GenerationDefaults(height=1024, width=1024, text_tokens=tokens, steps=steps, guidance=guidance)
    scheduler = SchedulerConfig(shift=3.0 if shape.guidance else 1.0, use_dynamic_shifting=shape.guidance)
    return PipelineConfig(shape, T5_XXL, CLIP_L, FLUX_VAE, scheduler, defaults)
