"""A small FLUX pipeline with random weights, in need of no files: for demonstrations, tests and first steps.

1. Shapes: 3 double- and 2 single-stream blocks, width 32, 48 x 48 pixels = 36 image tokens, 40 text tokens.
2. Weights: normal noise everywhere, biases and norm scales included, so that nothing is trivially zero or one.
3. Tokenizers: one token per character.
4. Schedule: FLUX.1[schnell]'s, or of a model that takes guidance FLUX.1[dev]'s, shifted by image size.

Its images are noise; nothing it shows means anything. The mathematics is FLUX's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Key
from transformers import CLIPTokenizer, T5Tokenizer

from difffract_jax.config import SEEDS
from difffract_jax.generators import check_seed
from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.mmdit import FluxConfig, MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tokenizers import Tokenizers
from difffract_jax.seeds import random_key
from difffract_jax.storage.checkpoint import leaf_paths, tree_hash

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
SPREAD = 0.1
"""Standard deviation of biases, and of norm scales around 1."""
LARGE = 2**20
"""Numbers from which on an array is worth a program of its own to draw it."""

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


def random_pipeline(
    *, seed: int = 0, transformer: FluxConfig = TINY, dtype: DTypeLike = jnp.float32, on_device: bool = False
) -> Pipeline:
    """Makes a pipeline with random weights.

    Args:
        seed: of the weights.
        transformer: shape of the MM-DiT; 16 packed channels, text width and pooled width even.
        dtype: of the weights.
        on_device: whether the device draws those of `LARGE` arrays, which it does within seconds. Nothing is hashed
            then: what is drawn differs between kinds of devices.
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
            eos_token_id=len(tokenizers.clip) - 1,  # <|endoftext|>, the last of the vocabulary
        ),
        vae=AutoencoderConfig(
            latent_channels=transformer.in_channels // 4,
            widths=(8, 8, 16),
            layers_per_block=1,
            norm_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        scheduler=SchedulerConfig(shift=3.0, use_dynamic_shifting=True) if transformer.guidance else SchedulerConfig(),
        defaults=GenerationDefaults(height=48, width=48, text_tokens=40, steps=4, guidance=3.5),
    )
    classes = {"transformer": MMDiT, "t5": T5Encoder, "clip": CLIPTextEncoder, "vae": Autoencoder}
    parts = {}
    for number, (name, cls) in enumerate(classes.items()):
        abstract = abstract_module(cls, getattr(config, name), dtype)
        parts[name] = random_weights(abstract, len(classes) * check_seed(seed) + number, on_device=on_device)
    source = f"random:{seed}" if on_device else tree_hash(parts)
    return Pipeline(**parts, tokenizers=tokenizers, config=config, source=source)


def random_weights(abstract: Any, seed: int, *, on_device: bool = False) -> Any:
    """Fills a tree of shapes with random weights, none of them trivial.

    Args:
        abstract: from `jax.eval_shape` of a constructor.
        seed: of the generator.
        on_device: whether JAX's generator draws `LARGE` arrays on the device, and not NumPy's, which is much faster on
            a CPU.

    Returns:
        The tree: kernels and embeddings of variance 1 / inputs, norm scales around 1, biases around 0.
    """
    rng = np.random.default_rng(seed)
    leaves = leaf_paths(abstract)
    keys = dict(zip(leaves, jax.random.split(_key(seed), len(leaves)), strict=True)) if on_device else {}

    def fill(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kind = path.rpartition(".")[2]
        kernel = kind in ("kernel", "embedding")
        # Convolutions have two axes of pixels before that of the input channels.
        inputs = leaf.shape[-2] if kernel and "conv" not in path and "halve" not in path else np.prod(leaf.shape[:-1])
        if on_device and leaf.size >= LARGE:
            spread = float(inputs**-0.5) if kernel else SPREAD
            return _draw(keys[path], float(kind == "scale"), spread, leaf.shape, leaf.dtype)
        noise = rng.standard_normal(leaf.shape, np.float32)
        around = kind in ("scale", "variance")
        values = noise / np.sqrt(inputs) if kernel else around + SPREAD * noise
        # Rounded by NumPy, as JAX would make a program for every shape; to float32 first, as it does.
        exact = leaf.dtype.itemsize == 8
        return jax.device_put((values if exact else values.astype(np.float32)).astype(leaf.dtype))

    return jax.tree.unflatten(jax.tree.structure(abstract), [fill(path, leaf) for path, leaf in leaves.items()])


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key: jax.Array, offset: ArrayLike, spread: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    # Drawn in bfloat16, normal numbers would have 128 values.
    return jnp.asarray(offset + spread * jax.random.normal(key, shape, jnp.float32), dtype)


def _key(seed: int) -> Key[Array, ""]:
    """Returns the key of a seed of one part: a pipeline's own, times four, which may exceed 64 bits."""
    above, within = divmod(seed, SEEDS)
    return jax.random.fold_in(random_key(within), above) if above else random_key(within)


def _tokenizers() -> Tokenizers:
    """One token per character; both pad, and close a prompt, as FLUX's do."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in ("\u2581", *CHARACTERS))]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0)
    words = ["!", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=48)
    return Tokenizers(t5, clip, 48)
