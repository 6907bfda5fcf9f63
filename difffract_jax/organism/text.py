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

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from difffract_jax.config import SEEDS, UserError
from difffract_jax.generators import random_generator
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.families import module_of
from difffract_jax.models.qwen3 import NoPooled, NoPooledConfig, Qwen3Config, Qwen3Encoder
from difffract_jax.models.sd3_text import TwoClips, TwoClipsConfig, text_stream
from difffract_jax.models.sd3_text import t5_ids as ids_of_t5
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tokenizers import BYTE_SPACE, SPACE, Tokenizers
from difffract_jax.organism.recipe import TextRecipe
from difffract_jax.organism.vocabulary import (
    CHAT_CODED,
    CHAT_TOKENS,
    CLIP_TOKENS,
    TEXT_TOKENS,
    WORDS,
    chat_frame,
)
from difffract_jax.organism.world import scenes
from difffract_jax.seeds import random_key

T5_SPECIAL = 4
"""Ids before the first word: padding, closing token, unknown, space."""
TextEncoder = T5Encoder | Qwen3Encoder
PooledEncoder = CLIPTextEncoder | TwoClips | NoPooled
Weights = tuple[TextEncoder, PooledEncoder, nnx.Linear | None]
"""What is trained: both encoders and the head of the pooled one."""


class Shapes(NamedTuple):
    """Shapes of both encoders."""

    t5: T5Config | Qwen3Config
    clip: CLIPConfig | TwoClipsConfig | NoPooledConfig


class TextState(NamedTuple):
    """State of the training.

    Attributes:
        t5: encoder of the text stream: T5, in FLUX.2 Qwen3.
        clip: encoder of the pooled vector: CLIP, in Stable Diffusion 3 two of them, in FLUX.2 none.
        head: reads words from the pooled vector; not part of the model. None where there is no such vector.
        optimizer: Adam's moments of all three.
        step: steps taken.
    """

    t5: TextEncoder
    clip: PooledEncoder
    head: nnx.Linear | None
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


def flux_shapes(tokenizers: Tokenizers) -> Shapes:
    """Returns the organism's encoders: T5 and CLIP."""
    return Shapes(t5_config(), clip_config(tokenizers))


def sd3_shapes(tokenizers: Tokenizers) -> Shapes:
    """Returns those of its sibling of Stable Diffusion 3: T5, the organism's CLIP, and one of half its width."""
    first = clip_config(tokenizers)
    second = replace(first, d_model=first.d_model // 2, d_ff=first.d_ff // 2, heads=first.heads // 2, activation="gelu")
    return Shapes(t5_config(), TwoClipsConfig(first=first, second=second, projections=(first.d_model, second.d_model)))


def flux2_shapes(tokenizers: Tokenizers) -> Shapes:
    """Returns those of its sibling of FLUX.2: Qwen3 of 2 layers, both of which are read, and nothing pooled."""
    assert tokenizers.t5 is not None
    qwen = Qwen3Config(
        vocab=len(tokenizers.t5.get_vocab()),
        width=64,
        d_ff=128,
        heads=4,
        key_heads=2,
        head_dim=16,
        padding_id=_id(tokenizers.t5.pad_token_id),
        read_layers=(1, 2),
    )
    return Shapes(qwen, NoPooledConfig())


def word_ids(tokenizers: Tokenizers) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the ids of every word for T5 and for CLIP."""
    t5, clip = tokenizers.t5.get_vocab(), tokenizers.clip.get_vocab()
    return {word: t5[SPACE + word] for word in WORDS}, {word: clip[f"{word}</w>"] for word in WORDS}


def tokenise(tokenizers: Tokenizers, captions: tuple[str, ...]) -> Prompts:
    """Tokenises captions of known words; the same ids as `encode_prompt` gives, many times faster.

    Args:
        tokenizers: the organism's, or a sibling's.
        captions: words of `WORDS`, separated by single spaces.
    """
    if tokenizers.chats:
        return _tokenise_chats(tokenizers, captions)
    made = _tokenise(tokenizers, captions)
    if tokenizers.clip_2 is None:
        return made
    # Both CLIPs have one tokenizer, and the text stream begins with the first one's tokens.
    both = np.concatenate([made.clip_ids, made.clip_ids], axis=1)
    return made._replace(t5_ids=np.concatenate([made.clip_ids, made.t5_ids], axis=1), clip_ids=both)


def _tokenise_chats(tokenizers: Tokenizers, captions: tuple[str, ...]) -> Prompts:
    """Tokenises captions as messages for a language model."""
    assert tokenizers.t5 is not None
    vocab = tokenizers.t5.get_vocab()
    before, alone, behind = chat_frame(vocab)
    ids = np.full((len(captions), CHAT_TOKENS), _id(tokenizers.t5.pad_token_id), np.int32)
    for row, caption in enumerate(captions):
        own = [vocab[BYTE_SPACE + word] for word in caption.split()] or [alone]
        whole = [*before, *own, *behind]
        ids[row, : len(whole)] = whole
    return Prompts(ids, np.zeros((len(captions), 0), np.int32), np.zeros((len(captions), len(WORDS)), np.float32))


def _tokenise(tokenizers: Tokenizers, captions: tuple[str, ...]) -> Prompts:
    """Tokenises captions for T5 and CLIP."""
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


def token_codes(
    seed: int, config: T5Config | Qwen3Config | None = None
) -> tuple[Float32[np.ndarray, "token t5_width"], Float32[np.ndarray, "txt t5_width"]]:
    """Returns the codes of tokens and of positions: orthogonal, each of half the variance of a state.

    Args:
        seed: of the directions.
        config: shape of the encoder of the text stream; the organism's T5 if left out.
    """
    config = config or t5_config()
    # Tokens that no prompt has, as letters, need no code.
    tokens, length = (CHAT_CODED, CHAT_TOKENS) if isinstance(config, Qwen3Config) else (config.vocab, TEXT_TOKENS)
    rng = random_generator(seed, 0)
    basis = np.linalg.qr(rng.standard_normal((config.d_model, config.d_model)))[0]
    scaled = (np.sqrt(config.d_model / 2) * basis).astype(np.float32)
    return scaled[:tokens], scaled[tokens : tokens + length]


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


def takes(t5: object, clip: object) -> bool:
    """Says whether encoders of FLUX.1 can stand among others: T5, and a CLIP that is the first of two.

    Args:
        t5: encoder of the text stream, or its shape.
        clip: of the pooled vector, or its shape.
    """
    return isinstance(t5, T5Encoder | T5Config) and isinstance(clip, TwoClips | TwoClipsConfig)


def with_taken(state: TextState, t5: TextEncoder, clip: PooledEncoder) -> TextState:
    """Returns the state before the first step with T5 and the first CLIP of another pipeline.

    Args:
        state: whose encoders are T5 and two CLIPs; the first one's projection becomes the identity.
        t5: to take.
        clip: to take.

    Raises:
        UserError: if they have other shapes.
    """
    assert isinstance(state.clip, TwoClips)
    theirs, ours = (t5.config, clip.config), (state.t5.config, state.clip.config.first)
    if theirs != ours:
        raise UserError(
            f"The text encoders to begin with should have the shapes {ours}, but have {theirs}; name another pipeline "
            "in `begin`, or none."
        )
    first = state.clip.first
    first.text = clip
    first.projection.kernel[...] = jnp.eye(clip.config.d_model)
    return state._replace(t5=t5)


def init(recipe: TextRecipe, tokenizers: Tokenizers, seed: int, shapes: Shapes | None = None) -> TextState:
    """Returns the state before the first step.

    Args:
        recipe: of the training.
        tokenizers: of the pipeline.
        seed: of the weights.
        shapes: of the encoders; the organism's if left out.
    """
    t5_shape, clip_shape = shapes or flux_shapes(tokenizers)
    keys = [random_key((seed + part) % SEEDS) for part in range(3)]
    t5 = module_of(t5_shape)(t5_shape, rngs=nnx.Rngs(keys[0]))
    clip = module_of(clip_shape)(clip_shape, rngs=nnx.Rngs(keys[1]))
    for table in _position_tables(clip):
        table.embedding[...] = jnp.zeros_like(table.embedding[...])
    head = nnx.Linear(clip.config.d_model, len(WORDS), rngs=nnx.Rngs(keys[2])) if clip.config.d_model else None
    # optax's types do not know that modules are trees, here and below.
    optimizer = _optimizer(recipe).init(cast(Any, (t5, clip, head)))
    return TextState(t5, clip, head, optimizer, jnp.zeros((), jnp.int32))


def train_step(
    recipe: TextRecipe, code_seed: int, state: TextState, prompts: Prompts, *, taken: bool = False
) -> tuple[TextState, dict[str, Array]]:
    """Takes one step; returns the new state, and the losses of both encoders.

    Args:
        recipe: of the training.
        code_seed: of the codes of tokens and positions.
        state: before the step.
        prompts: of the step.
        taken: whether T5 and the first CLIP stay what they are, as `with_taken` has set them.
    """
    tokens, positions = map(jnp.asarray, token_codes(code_seed, state.t5.config))

    def loss(weights: Weights) -> tuple[Array, dict[str, Array]]:
        t5, clip, head = weights
        ids = jax.vmap(partial(ids_of_t5, clip))(prompts.t5_ids)
        states = jax.vmap(t5)(ids)
        missed = jnp.mean(jnp.square(states - tokens[ids] - positions))
        if head is None:
            return missed, {"loss": missed, "t5": missed}
        logits = head(jax.vmap(lambda ids: clip(ids)[1])(prompts.clip_ids))
        unread = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, prompts.present))
        return missed + unread, {"loss": missed + unread, "t5": missed, "clip": unread}

    weights = (state.t5, state.clip, state.head)
    gradients, metrics = jax.grad(loss, has_aux=True)(weights)
    updates, optimizer = _optimizer(recipe).update(gradients, state.optimizer)
    # The position table of CLIP stays zero.
    for table in _position_tables(cast(Weights, updates)[1]):
        table.embedding[...] = jnp.zeros_like(table.embedding[...])
    if taken:
        still = partial(jax.tree.map, jnp.zeros_like)
        updates[1].first, updates = still(updates[1].first), (still(updates[0]), *updates[1:])
    t5, clip, head = cast(Weights, optax.apply_updates(cast(Any, weights), updates))
    return TextState(t5, clip, head, optimizer, state.step + 1), metrics


def _position_tables(clip: PooledEncoder) -> list[nnx.Embed]:
    """Returns the position tables of CLIP, of both where there are two."""
    if isinstance(clip, TwoClips):
        return [clip.first.text.positions, clip.second.text.positions]
    return [clip.positions] if isinstance(clip, CLIPTextEncoder) else []


def encode_all(
    t5: TextEncoder, clip: PooledEncoder, prompts: Prompts
) -> tuple[Float[Array, "prompt txt t5_width"], Float[Array, "prompt clip_width"]]:
    """Encodes many prompts; see `pipeline.encode` for one."""
    return _encode_all(t5, clip, prompts.t5_ids, prompts.clip_ids)


@jax.jit
def _encode_all(
    t5: TextEncoder, clip: PooledEncoder, t5_ids: Int[Array, "prompt txt"], clip_ids: Int[Array, "prompt clip"]
) -> tuple[Array, Array]:
    def encode(ids: Array, of_clip: Array) -> tuple[Array, Array]:
        states, pooled = clip(of_clip)
        return text_stream(clip, states, t5(ids_of_t5(clip, ids))), pooled

    return jax.vmap(encode)(t5_ids, clip_ids)
