"""A tiny Chroma pipeline of diffusers with random weights, and the published sizes."""

import warnings

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from klein import AUTOENCODER, spread_weights

PUBLISHED = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "axes_dims_rope": (16, 56, 56),
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}
"""Chroma1-HD's transformer."""
TINY = PUBLISHED | {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "joint_attention_dim": 24,
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 20,
    "approximator_layers": 3,
}
"""The same, small."""
_WORDS = "abcdefghijklmnopqrstuvwxyz"
_T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def their_transformer(config):
    """diffusers' module of a configuration, which it builds of a class that it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return ChromaTransformer2DModel(**config)


def tiny_transformer(seed=0):
    """diffusers' module."""
    return spread_weights(their_transformer(TINY), seed)


def run_theirs(module, latents, text, t, grid, mask):
    """Returns diffusers' velocity of one example, in the module's type; `mask` says which text tokens are seen."""
    dtype = next(module.parameters()).dtype
    image = torch.cartesian_prod(torch.arange(1), torch.arange(grid[0]), torch.arange(grid[1]))
    seen = torch.cat([torch.tensor(mask), torch.ones(len(latents), dtype=torch.bool)])
    with torch.no_grad():
        made = module(
            hidden_states=torch.tensor(latents)[None].to(dtype),
            encoder_hidden_states=torch.tensor(text)[None].to(dtype),
            timestep=torch.tensor([t]),
            img_ids=image,
            txt_ids=torch.zeros(len(text), 3),
            attention_mask=seen[None],
            return_dict=False,
        )[0]
    return made[0].float().numpy()


def tiny_tokenizer():
    """One token per letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("\u2581", *_WORDS))]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_pipeline(**scheduler):
    """diffusers' pipeline; keyword arguments are the scheduler's."""
    tokenizer = tiny_tokenizer()
    vae = AutoencoderKL(
        **AUTOENCODER, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=spread_weights(vae, 3),
        text_encoder=spread_weights(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **_T5)), 4),
        tokenizer=tokenizer,
        transformer=tiny_transformer(),
    )
