"""A small FLUX pipeline with random weights, in need of no files: for demonstrations, tests and first steps.

1. Shapes: 3 double- and 2 single-stream blocks, width 32, 48 x 48 pixels = 36 image tokens, 40 text tokens.
2. Weights: each part's own initialisation, then normal noise on every weight, so that no bias or norm scale is trivial.
3. Tokenizers: one token per character.

Its images are noise; nothing it shows means anything. The mathematics is FLUX's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from transformers import CLIPTokenizer, T5Tokenizer

from difffract_jax.checkpoint import tree_hash
from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.mmdit import FluxConfig, MMDiT
from difffract_jax.models.pipeline import GenerationDefaults, Pipeline, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tokenizers import Tokenizers

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
SPREAD = 0.05
"""Standard deviation of the noise on every weight: enough that each counts, little enough that nothing saturates."""

TINY = FluxConfig(
    depth_double=3,
    depth_single=2,
    heads=2,
    head_dim=16,
    rope_axes=(4, 6, 6),
    in_channels=16,
    out_channels=16,
    text_width=24,
    pooled_width=16,
    guidance=False,
)
"""Shape of the small transformer."""


def random_pipeline(*, seed: int = 0, transformer: FluxConfig = TINY, dtype: DTypeLike = jnp.float32) -> Pipeline:
    """Makes a pipeline with random weights.

    Args:
        seed: of the weights.
        transformer: shape of the MM-DiT; 16 packed channels, text width and pooled width even.
        dtype: of the weights.
    """
    tokenizers = _tokenizers()
    config = PipelineConfig(
        transformer=transformer,
        t5=T5Config(vocab=len(tokenizers.t5), d_model=transformer.text_width, d_kv=8, d_ff=32, layers=2, heads=2),
        clip=CLIPConfig(
            vocab=len(tokenizers.clip),
            d_model=transformer.pooled_width,
            d_ff=32,
            layers=2,
            heads=2,
            positions=tokenizers.clip_length,
            eos_token_id=tokenizers.clip.eos_token_id,
        ),
        vae=AutoencoderConfig(
            latent_channels=transformer.in_channels // 4,
            widths=(8, 8, 16),
            layers_per_block=1,
            norm_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        scheduler=SchedulerConfig(),
        defaults=GenerationDefaults(height=48, width=48, text_tokens=40, steps=4, guidance=3.5),
    )
    classes = {"transformer": MMDiT, "t5": T5Encoder, "clip": CLIPTextEncoder, "vae": Autoencoder}
    keys = jax.random.split(jax.random.key(seed), len(classes))
    parts = {
        name: randomise(cls(getattr(config, name), rngs=nnx.Rngs(key), dtype=dtype), key)
        for (name, cls), key in zip(classes.items(), keys, strict=True)
    }
    return Pipeline(**parts, tokenizers=tokenizers, config=config, source=tree_hash(parts))


def randomise(tree: Any, key: jax.Array, spread: float = SPREAD) -> Any:
    """Adds normal noise to every array of a tree, so that biases are not zero nor norm scales one."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [leaf + spread * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def _tokenizers() -> Tokenizers:
    """One token per character; both pad, and close a prompt, as FLUX's do."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("\u2581", *CHARACTERS))]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0)
    words = ["!", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=48)
    return Tokenizers(t5, clip, 48)
