"""Shapes of the published models; facts about checkpoints, not choices of a run.

Sources: the `config.json` files of FLUX.1[schnell] and FLUX.1[dev], which differ in the guidance embedding and in the
schedule alone.
"""

from collections.abc import Mapping

from difffract_jax.models.mmdit import FluxConfig


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
"""Name -> shape of the transformer. Text encoders and autoencoder: `T5_XXL`, `CLIP_L`, `FLUX_VAE` beside them."""
