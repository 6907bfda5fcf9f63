"""A tiny Z-Image pipeline of diffusers with random weights, and the published sizes."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from difffract_jax.models.sampler import PATCH, pack, unpack
from klein import AUTOENCODER, ENCODER, spread_weights, tiny_tokenizer

PUBLISHED = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
"""Z-Image-Turbo's transformer."""
TINY = PUBLISHED | {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
"""The same, small."""
GRID = (4, 8)
"""Rows and columns of image tokens, which must be multiples of 32."""
LARGE = 1000.0
"""Factor of states that were divided by their root mean square, so that PyTorch's norm of them changes nothing."""


def tiny_transformer(seed=0):
    """diffusers' module."""
    return spread_weights(ZImageTransformer2DModel(**TINY), seed)


def draw_text(rng, tokens, width, own=20):
    """Draws a text as our encoder gives it: states of root mean square 1, then learned tokens, then hidden ones."""
    text = np.zeros((tokens, width), np.float32)
    states = rng.standard_normal((own, width - 1))
    text[:own, :-1] = states / np.sqrt(np.mean(np.square(states), axis=1, keepdims=True))
    text[own : -(-own // 32) * 32, -1] = 1
    return text


def run_theirs(module, latents, text, t, grid):
    """Returns diffusers' velocity of one example, in the module's type, of a text as our encoder gives it."""
    dtype = next(module.parameters()).dtype
    spatial = torch.tensor(np.array(unpack(jnp.asarray(latents), grid)).transpose(2, 0, 1))[:, None]
    states = torch.tensor(LARGE * text[np.any(text[:, :-1] != 0, axis=1), :-1])
    with torch.no_grad():
        made = module([spatial.to(dtype)], torch.tensor([1 - t]), [states.to(dtype)]).sample[0]
    return -np.asarray(pack(made[:, 0].float().numpy().transpose(1, 2, 0)))


def tiny_encoder(headed=False, seed=1):
    """transformers' module, alone or with its head."""
    config = Qwen3Config(**ENCODER | {"num_hidden_layers": 3}, vocab_size=264)
    return spread_weights((Qwen3ForCausalLM if headed else Qwen3Model)(config), seed)


def tiny_pipeline(headed=False, **scheduler):
    """diffusers' pipeline; keyword arguments are the scheduler's."""
    vae = AutoencoderKL(
        **AUTOENCODER, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        vae=spread_weights(vae, 3),
        text_encoder=tiny_encoder(headed),
        tokenizer=tiny_tokenizer(),
        transformer=tiny_transformer(),
    )


def mlps(transformer):
    """Returns the MLPs of all blocks: site, the module that reads x, the norm that gives y."""
    stacks = (("img", transformer.noise_refiner), ("txt", transformer.context_refiner), ("single", transformer.layers))
    return [(f"{label}/{n}", one.feed_forward, one.ffn_norm2) for label, stack in stacks for n, one in enumerate(stack)]


def run_pipeline(pipe, prompt, noise, grid=GRID, steps=4, words=64):
    """Runs diffusers' pipeline from packed noise; returns pixels, packed latents after the last step, and the times."""
    pipe.set_progress_bar_config(disable=True)
    times, side = [], PATCH * pipe.vae_scale_factor
    last = {}

    def keep(pipe, step, t, values):
        times.append(float(t) / 1000)
        last.update(values)
        return values

    made = pipe(
        prompt,
        height=side * grid[0],
        width=side * grid[1],
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=torch.tensor(np.array(unpack(jnp.asarray(noise), grid)).transpose(2, 0, 1))[None],
        max_sequence_length=words,
        output_type="np",
        callback_on_step_end=keep,
    ).images[0]
    return made, np.asarray(pack(last["latents"][0].float().numpy().transpose(1, 2, 0))), times
