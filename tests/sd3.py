"""Tiny pipelines of Stable Diffusion 3 and 3.5 of diffusers with random weights, and the published sizes."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from difffract_jax.models.sampler import pack, unpack
from klein import AUTOENCODER, spread_weights

_COMMON = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
}
PUBLISHED = {
    "sd3-medium": _COMMON
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    "sd3.5-medium": _COMMON
    | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
    | {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    "sd3.5-large": _COMMON
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
    | {"qk_norm": "rms_norm"},
}
"""The transformers' published configurations."""
_SMALL = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 12,
    "pos_embed_max_size": 8,
}
TINY = {
    name: published | _SMALL | ({"dual_attention_layers": (0,)} if published.get("dual_attention_layers") else {})
    for name, published in PUBLISHED.items()
}
"""The same, small."""


def tiny_transformer(name, seed=0):
    """diffusers' module of a variant."""
    made = spread_weights(SD3Transformer2DModel(**TINY[name]), seed)
    generator = torch.Generator().manual_seed(seed)
    made.pos_embed.pos_embed = torch.randn(made.pos_embed.pos_embed.shape, generator=generator)
    return made


def run_theirs(module, latents, text, pooled, t, grid):
    """Returns diffusers' velocity of one example, packed, in the module's type."""
    dtype = next(module.parameters()).dtype
    given = np.array(unpack(jnp.asarray(latents), grid)).transpose(2, 0, 1)
    with torch.no_grad():
        made = module(
            hidden_states=torch.tensor(given)[None].to(dtype),
            encoder_hidden_states=torch.tensor(text)[None].to(dtype),
            pooled_projections=torch.tensor(pooled)[None].to(dtype),
            timestep=torch.tensor([1000 * t]),
            return_dict=False,
        )[0]
    return np.asarray(pack(made[0].float().numpy().transpose(1, 2, 0)))


CLIP_LENGTH = 12
"""Tokens of a tiny CLIP."""
_WORDS = "abcdefghijklmnopqrstuvwxyz"
_CLIP = {
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CLIP_LENGTH,
    "vocab_size": 2 * len(_WORDS) + 3,
    "eos_token_id": 2 * len(_WORDS) + 2,
    "bos_token_id": 2 * len(_WORDS) + 1,
}
_T5 = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def tiny_clip_tokenizer(**more):
    """One token per letter."""
    vocab = {one: number for number, one in enumerate(["!", *_WORDS, *(f"{c}</w>" for c in _WORDS)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_LENGTH, **more)


def tiny_pipeline(name, t5=True):
    """diffusers' pipeline of a variant; the second CLIP fills up with another token than the first."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("\u2581", *_WORDS))]
    encoders = []
    for seed, (width, projected, act) in enumerate(((16, 10, "quick_gelu"), (24, 14, "gelu"))):
        config = CLIPTextConfig(hidden_size=width, projection_dim=projected, hidden_act=act, **_CLIP)
        encoders.append(spread_weights(CLIPTextModelWithProjection(config), seed + 1))
    return StableDiffusion3Pipeline(
        transformer=tiny_transformer(name),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=spread_weights(
            AutoencoderKL(
                **AUTOENCODER,
                scaling_factor=1.5305,
                shift_factor=0.0609,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            3,
        ),
        text_encoder=encoders[0],
        tokenizer=tiny_clip_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=tiny_clip_tokenizer(pad_token="!"),
        text_encoder_3=spread_weights(T5EncoderModel(T5Config(vocab_size=len(pieces), **_T5)), 4) if t5 else None,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0) if t5 else None,
    )
