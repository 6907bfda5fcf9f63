"""Tiny pipelines of FLUX.1 of diffusers with random weights, and the published sizes."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from klein import spread_weights
from tolerances import REFERENCE

_COMMON = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
PUBLISHED = {name: _COMMON | {"guidance_embeds": name == "flux-dev"} for name in ("flux-schnell", "flux-dev")}
"""The transformers' published configurations."""
_SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
}
TINY = {name: published | _SMALL for name, published in PUBLISHED.items()}
"""The same, small, for the text encoders and the autoencoder of the reference's small pipeline."""


def tiny_transformer(name, seed=0):
    """diffusers' module of a variant."""
    return spread_weights(FluxTransformer2DModel(**TINY[name]), seed)


def run_theirs(module, latents, text, pooled, t, grid, guidance=None):
    """Returns diffusers' velocity of one example, in the module's type."""
    dtype = next(module.parameters()).dtype
    image = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1]))
    with torch.no_grad():
        made = module(
            hidden_states=torch.tensor(latents)[None].to(dtype),
            encoder_hidden_states=torch.tensor(text)[None].to(dtype),
            pooled_projections=torch.tensor(pooled)[None].to(dtype),
            timestep=torch.tensor([t]),
            guidance=None if guidance is None else torch.tensor([guidance]),
            img_ids=image,
            txt_ids=torch.zeros(text.shape[0], 3),
            return_dict=False,
        )[0]
    return made[0].float().numpy()


def tiny_pipeline(name):
    """diffusers' pipeline of a variant; FLUX.1-dev's schedule is shifted by the image's size."""
    pipe = FluxPipeline.from_pretrained(
        REFERENCE / "pipeline", transformer=tiny_transformer(name), low_cpu_mem_usage=False
    )
    if name == "flux-dev":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return pipe
