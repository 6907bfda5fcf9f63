"""Pretraining of the text encoders, which are frozen afterwards, as FLUX's are.

What the text encoder already solves the transformer need not, and the studies want to see binding solved in the
transformer. So the encoders learn as little as they may:

1. T5: every token's state shall be `code[word] + code[position]`, fixed orthonormal directions scaled to unit variance,
   padding included. FLUX gives text no rotary positions, so T5 must carry them; it has relative biases alone and has to
   find positions by attention. A state that held anything of its neighbours would miss its target.
2. CLIP: its position table stays zero. With one layer, the pooled state is then the same whatever the order of the
   words: a bag of words, relation word included. A linear head, dropped afterwards, reads which words there are.
3. Half of the prompts are captions, half random words of random number, so that no word's position can be guessed.

Both train together with Adam and a cosine to zero.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from difffract_jax.config import SEEDS
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tokenizers import SPACE, Tokenizers
from difffract_jax.organism.recipe import TextRecipe
from difffract_jax.organism.vocabulary import CLIP_TOKENS, TEXT_TOKENS, WORDS
from difffract_jax.organism.world import scenes
from difffract_jax.seeds import random_generator, random_key

T5_SPECIAL = 4
"""Ids before the first word: padding, closing token, unknown, space."""
Weights = tuple[T5Encoder, CLIPTextEncoder, nnx.Linear]
"""What is trained: both encoders and CLIP's head."""


class TextState(NamedTuple):
    """State of the training.

    Attributes:
        t5: encoder of the text stream.
        clip: encoder of the pooled vector.
        head: reads words from the pooled vector; not part of the model.
        optimizer: Adam's moments of all three.
        step: steps taken.
    """

    t5: T5Encoder
    clip: CLIPTextEncoder
    head: nnx.Linear
    optimizer: optax.OptState
    step: Array


class Prompts(NamedTuple):
    """Tokenised prompts: ids for T5 and CLIP, and which words occur."""

    t5_ids: Int32[np.ndarray, "prompt txt"]
    clip_ids: Int32[np.ndarray, "prompt clip"]
    present: Float32[np.ndarray, "prompt word"]


def t5_config() -> T5Config:
    """Returns the organism's T5: 2 layers, width 96."""
    return T5Config(
        vocab=T5_SPECIAL + len(WORDS), d_model=96, d_kv=24, d_ff=192, layers=2, heads=4, buckets=64, max_distance=32
    )


def clip_config(tokenizers: Tokenizers) -> CLIPConfig:
    """Returns the organism's CLIP: 1 layer, width 64."""
    return CLIPConfig(
        vocab=len(tokenizers.clip),
        d_model=64,
        d_ff=128,
        layers=1,
        heads=4,
        positions=CLIP_TOKENS,
        eos_token_id=_id(tokenizers.clip.eos_token_id),
    )


def word_ids(tokenizers: Tokenizers) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the ids of every word for T5 and for CLIP."""
    t5, clip = tokenizers.t5.get_vocab(), tokenizers.clip.get_vocab()
    return {word: t5[SPACE + word] for word in WORDS}, {word: clip[f"{word}</w>"] for word in WORDS}


def tokenise(tokenizers: Tokenizers, captions: tuple[str, ...]) -> Prompts:
    """Tokenises captions of known words; the same ids as `encode_prompt` gives, many times faster.

    Args:
        tokenizers: the organism's.
        captions: words of `WORDS`, separated by single spaces.
    """
    t5, clip = word_ids(tokenizers)
    start, end = _id(tokenizers.clip.bos_token_id), _id(tokenizers.clip.eos_token_id)
    number = {word: place for place, word in enumerate(WORDS)}
    t5_ids = np.full((len(captions), TEXT_TOKENS), tokenizers.t5.pad_token_id, np.int32)
    clip_ids = np.full((len(captions), CLIP_TOKENS), tokenizers.clip.pad_token_id, np.int32)
    present = np.zeros((len(captions), len(WORDS)), np.float32)
    for row, caption in enumerate(captions):
        words = caption.split()
        t5_ids[row, : len(words) + 1] = [*(t5[word] for word in words), _id(tokenizers.t5.eos_token_id)]
        ids = [start, *(clip[word] for word in words), end]
        clip_ids[row, : len(ids)] = ids
        present[row, [number[word] for word in words]] = 1
    return Prompts(t5_ids, clip_ids, present)


def _id(special: object) -> int:
    """Returns the id of a special token."""
    assert isinstance(special, int)  # transformers allows tokenizers without one; the organism's have all
    return special


def token_codes(seed: int) -> tuple[Float32[np.ndarray, "token t5_width"], Float32[np.ndarray, "txt t5_width"]]:
    """Returns the codes of tokens and of positions: orthogonal, each of half the variance of a state."""
    config = t5_config()
    rng = random_generator(seed, 0)
    basis = np.linalg.qr(rng.standard_normal((config.d_model, config.d_model)))[0]
    scaled = (np.sqrt(config.d_model / 2) * basis).astype(np.float32)
    return scaled[: config.vocab], scaled[config.vocab : config.vocab + TEXT_TOKENS]


def batch(recipe: TextRecipe, tokenizers: Tokenizers, seed: int, step: int) -> Prompts:
    """Returns the prompts of one step."""
    rng = random_generator(seed, step, 1)
    half = recipe.batch // 2
    lengths = rng.integers(0, TEXT_TOKENS, recipe.batch - half)
    shuffled = tuple(" ".join(rng.choice(WORDS, length)) for length in lengths)
    return tokenise(tokenizers, scenes(seed, step, half).captions + shuffled)


def _optimizer(recipe: TextRecipe) -> optax.GradientTransformation:
    warm_up = min(50, recipe.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warm_up, recipe.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def init(recipe: TextRecipe, tokenizers: Tokenizers, seed: int) -> TextState:
    """Returns the state before the first step."""
    keys = [random_key((seed + part) % SEEDS) for part in range(3)]
    t5 = T5Encoder(t5_config(), rngs=nnx.Rngs(keys[0]))
    clip = CLIPTextEncoder(clip_config(tokenizers), rngs=nnx.Rngs(keys[1]))
    clip.positions.embedding[...] = jnp.zeros_like(clip.positions.embedding[...])
    head = nnx.Linear(clip.config.d_model, len(WORDS), rngs=nnx.Rngs(keys[2]))
    # optax's types do not know that modules are trees, here and below.
    optimizer = _optimizer(recipe).init(cast(Any, (t5, clip, head)))
    return TextState(t5, clip, head, optimizer, jnp.zeros((), jnp.int32))


def train_step(
    recipe: TextRecipe, code_seed: int, state: TextState, prompts: Prompts
) -> tuple[TextState, dict[str, Array]]:
    """Takes one step; returns the new state, and the losses of both encoders."""
    tokens, positions = map(jnp.asarray, token_codes(code_seed))

    def loss(weights: Weights) -> tuple[Array, dict[str, Array]]:
        t5, clip, head = weights
        states = jax.vmap(t5)(prompts.t5_ids)
        missed = jnp.mean(jnp.square(states - tokens[prompts.t5_ids] - positions))
        logits = head(jax.vmap(lambda ids: clip(ids)[1])(prompts.clip_ids))
        unread = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, prompts.present))
        return missed + unread, {"loss": missed + unread, "t5": missed, "clip": unread}

    weights = (state.t5, state.clip, state.head)
    gradients, metrics = jax.grad(loss, has_aux=True)(weights)
    updates, optimizer = _optimizer(recipe).update(gradients, state.optimizer)
    # The position table of CLIP stays zero.
    table = cast(Weights, updates)[1].positions.embedding
    table[...] = jnp.zeros_like(table[...])
    t5, clip, head = cast(Weights, optax.apply_updates(cast(Any, weights), updates))
    return TextState(t5, clip, head, optimizer, state.step + 1), metrics


def encode_all(
    t5: T5Encoder, clip: CLIPTextEncoder, prompts: Prompts
) -> tuple[Float[Array, "prompt txt t5_width"], Float[Array, "prompt clip_width"]]:
    """Encodes many prompts; see `pipeline.encode` for one."""
    return _encode_all(t5, clip, prompts.t5_ids, prompts.clip_ids)


@jax.jit
def _encode_all(
    t5: T5Encoder, clip: CLIPTextEncoder, t5_ids: Int[Array, "prompt txt"], clip_ids: Int[Array, "prompt clip"]
) -> tuple[Array, Array]:
    return jax.vmap(t5)(t5_ids), jax.vmap(lambda ids: clip(ids)[1])(clip_ids)
