"""Where the organism binds colours to nouns: linear probes, and a replacement test of the text encoder.

1. Probe: from the state of a noun's token, read the colour that the caption gives to that noun, by ridge regression
   onto one-hot colours, fitted on training contents and tested on held-out ones. Chance is one in eight. Probed are
   T5's embedding, its output, and the text tokens after every block of the transformer at the first step, where the
   image stream is noise and can tell nothing.
2. Replacement: every T5 state becomes the mean state of its word at its position, over many captions. If binding stays
   what it was, T5 has told the transformer nothing but words and positions.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from difffract_jax.models import sampler
from difffract_jax.models.batch import draw
from difffract_jax.models.blocks import Streams
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import Pipeline, Run
from difffract_jax.models.sd3_text import t5_ids as ids_of_t5
from difffract_jax.models.stacks import depth_of, run_stacks, streams
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.organism.captions import COLOUR_NAMES
from difffract_jax.organism.evaluate import FIRST_SEED, WORLD_SEED, held_out, see, share
from difffract_jax.organism.render import NOUNS
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.text import Prompts, encode_all, tokenise
from difffract_jax.organism.vocabulary import word_starts
from difffract_jax.organism.world import Scenes, scenes

RIDGE = 1e-3
"""Penalty of the regression, relative to the mean square of the states."""


def probe_binding(pipe: Pipeline, size: int = 2048) -> list[dict[str, Any]]:
    """Returns the probe's accuracy at every place.

    Args:
        pipe: the organism.
        size: captions to fit on, and as many to test on.
    """
    fit, test = _shapes_only(size, "train"), held_out(size, "two shapes", WORLD_SEED + 4)
    fitted, tested = _noun_states(pipe, fit), _noun_states(pipe, test)
    rows = []
    for place, (states, colours) in fitted.items():
        weights = _ridge(states, colours)
        held, wanted = tested[place]
        guess = (np.c_[held, np.ones(len(held))] @ weights).argmax(axis=1)
        rows.append(share(place, int((guess == wanted).sum()), len(wanted)))
    return rows


def replace_text(pipe: Pipeline, size: int = 500) -> list[dict[str, Any]]:
    """Returns two-object binding with T5's own states, and with the mean of each word at each position.

    Args:
        pipe: the organism.
        size: images of each.
    """
    asked, run = held_out(size, "two shapes"), pipe.plan()
    prompts = tokenise(pipe.tokenizers, asked.captions)
    text, pooled = encode_all(pipe.t5, pipe.clip, prompts)
    rows = []
    for name, states in (
        ("states as they are", text),
        ("mean of word and position", _means(pipe, prompts, np.asarray(text))),
    ):
        images = _draw(pipe, run, jnp.asarray(states), pooled)
        rows.append(share(name, int(judge(asked, see(images)).right.sum()), size))
    return rows


def _means(pipe: Pipeline, prompts: Prompts, text: Float[np.ndarray, "prompt txt width"]) -> np.ndarray:
    """Replaces states by the mean over many captions of the same token at the same position."""
    # With two CLIPs the stream has ids of two vocabularies, at different positions.
    vocabularies = (pipe.tokenizers.t5, pipe.tokenizers.clip)
    total = np.zeros((max(len(one.get_vocab()) for one in vocabularies if one is not None), *text.shape[1:]))
    count = np.zeros(total.shape[:2])
    for number in range(16):
        drawn = tokenise(pipe.tokenizers, scenes(WORLD_SEED + 5, number, 512).captions)
        states = np.asarray(encode_all(pipe.t5, pipe.clip, drawn)[0])
        at = drawn.t5_ids, np.broadcast_to(np.arange(text.shape[1]), drawn.t5_ids.shape)
        np.add.at(total, at, states)
        np.add.at(count, at, 1)
    at = prompts.t5_ids, np.broadcast_to(np.arange(text.shape[1]), prompts.t5_ids.shape)
    mean = total[at] / np.maximum(count[at], 1)[..., None]
    return np.where(count[at][..., None] > 0, mean, text).astype(np.float32)


def _draw(pipe: Pipeline, run: Run, text: Array, pooled: Array) -> np.ndarray:
    seeds = range(FIRST_SEED, FIRST_SEED + len(text))
    noise = jnp.stack([sampler.draw_noise(seed, run.grid, pipe.config.transformer.in_channels) for seed in seeds])
    return draw(pipe, run, text, pooled, noise)


def _shapes_only(size: int, split: Any) -> Scenes:
    """Returns scenes of two coloured shapes."""
    drawn = scenes(WORLD_SEED + 6, 0, 8 * size, split, (2,))
    coloured = (drawn.named[:, :2] == drawn.colour[:, :2]).all(axis=1)
    return drawn.take(coloured).take(np.arange(size))


def _noun_states(pipe: Pipeline, asked: Scenes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns, by place, the states of all nouns' tokens and their colours."""
    prompts = tokenise(pipe.tokenizers, asked.captions)
    rows, positions, colours = _nouns(asked)
    text, pooled = encode_all(pipe.t5, pipe.clip, prompts)
    # Words of other encoders than this one may stand before those that it reads.
    start = word_starts(pipe.tokenizers)[-1]
    own = jax.vmap(partial(ids_of_t5, pipe.clip))(prompts.t5_ids)
    embedded = pipe.t5.embed.embedding[...][own]
    skipped = prompts.t5_ids.shape[1] - own.shape[1]
    encoder = "T5" if isinstance(pipe.t5, T5Encoder) else "the language model"
    before = np.asarray(embedded)[rows, positions + start - skipped]
    stages = [(f"after {encoder}", text), *_block_states(pipe, text, pooled)]
    after = {name: (np.asarray(states)[rows, positions + start], colours) for name, states in stages}
    return {f"before {encoder}": (before, colours)} | after


def _nouns(asked: Scenes) -> tuple[Int[np.ndarray, "noun"], Int[np.ndarray, "noun"], Int[np.ndarray, "noun"]]:
    """Returns caption, position and colour of every coloured noun; the colour is the word before it."""
    found = [
        (row, position, COLOUR_NAMES.index(words[position - 1]))
        for row, words in enumerate(caption.split() for caption in asked.captions)
        for position, word in enumerate(words)
        if word in NOUNS and words[position - 1] in COLOUR_NAMES
    ]
    rows, positions, colours = (np.array(column) for column in zip(*found, strict=True))
    return rows, positions, colours


def _block_states(pipe: Pipeline, text: Array, pooled: Array) -> list[tuple[str, Array]]:
    """Returns the text tokens after the entrance and after every block, at the first step."""
    run = pipe.plan()
    noise = jnp.stack([sampler.draw_noise(i, run.grid, pipe.config.transformer.in_channels) for i in range(len(text))])
    entered, after = _run_blocks(pipe.transformer, noise, text, pooled, run.grid)
    layout = pipe.config.transformer.layout
    states = (states for stack in after for states in jnp.swapaxes(stack, 0, 1))
    return [
        ("txt entering", entered),
        *((f"txt after {layout.block_name(block)}", of_block) for block, of_block in enumerate(states)),
    ]


@partial(jax.jit, static_argnames="grid")
def _run_blocks(
    model: Any, noise: Array, text: Array, pooled: Array, grid: tuple[int, int]
) -> tuple[Array, tuple[Array, ...]]:
    """Returns the text tokens before the first block, and per stack after every block, [prompt layer txt d_model]."""

    def one(z: Array, txt: Array, vec: Array) -> tuple[Array, tuple[Array, ...]]:
        h, cond = model.embed(Inputs(z, txt, vec, jnp.ones((), z.dtype)), grid)
        _, reports = run_stacks(model.stacks, h, cond, tap=lambda visit: visit.acts.residual)
        last, after = h, []
        for report, stack in zip(reports, model.stacks, strict=True):
            depth = depth_of(stack)
            same = Streams(*(jnp.broadcast_to(part, (depth, *part.shape)) for part in last))
            after.append(streams(report, stack.groups, same))
            last = Streams(*(part[-1] for part in after[-1]))
        return h.txt, tuple(one.txt for one in after)

    return jax.vmap(one)(noise, text, pooled)


def _ridge(states: Float[np.ndarray, "noun width"], colours: Int[np.ndarray, "noun"]) -> np.ndarray:
    """Fits one-hot colours; the last row of the result is the intercept."""
    x = np.c_[states, np.ones(len(states))].astype(np.float64)
    penalty = RIDGE * np.mean(np.square(states)) * len(states) * np.eye(x.shape[1])
    return np.linalg.solve(x.T @ x + penalty, x.T @ np.eye(len(COLOUR_NAMES))[colours])
