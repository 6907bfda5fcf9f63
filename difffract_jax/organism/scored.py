"""What the organism's scorer says of images drawn with every MLP replaced by its transcoder.

1. Held-out captions of one and two objects, none of which contradicts a prior; noise seeds that training never used.
2. Each is drawn twice from the same noise, by the model and by the model with all its MLPs replaced; `judge` says
   which images show what was asked.

Padded text positions keep the true MLP, and which they are belongs to a prompt. Captions of one length go together.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from difffract_jax.models.batch import generate_batch
from difffract_jax.models.pipeline import Pipeline, model_velocity
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.organism.evaluate import FIRST_SEED, WORLD_SEED, see, share
from difffract_jax.organism.scorer import judge
from difffract_jax.organism.vocabulary import WORDS
from difffract_jax.organism.world import Scenes, concatenate, scenes
from difffract_jax.transcoders.replaced import TRANSCODER, Replaced, replaced_velocity, swaps_of
from difffract_jax.transcoders.transcoder import TranscoderSet

AT_ONCE = 32
"""Images drawn together; groups of captions are filled up to multiples of it."""


def accuracies(
    pipe: Pipeline, tcs: TranscoderSet, size: int, progress: Callable[[int], None] = lambda done: None
) -> list[dict[str, Any]]:
    """Returns the shares of right images, by the model and with all MLPs of a set replaced, and what both get right.

    Args:
        pipe: the organism.
        tcs: transcoders of its MLPs.
        size: captions.
        progress: called with the number of captions drawn by both.
    """
    asked = captions(size)
    original, replaced = np.zeros(size, bool), np.zeros(size, bool)
    done = 0
    for rows, length in _by_length(asked):
        part, seeds = asked.take(rows), (FIRST_SEED + rows).tolist()
        params = _replaced(pipe, tcs, length)
        for right, velocity, weights in (
            (original, model_velocity, pipe.transformer),
            (replaced, replaced_velocity, params),
        ):
            images = generate_batch(pipe, part.captions, seeds, velocity=velocity, params=weights, batch=AT_ONCE)
            right[rows] = judge(part, see(images)).right
        done = min(size, done + len(set(rows.tolist())))
        progress(done)
    return [
        share(name, int(right.sum()), size)
        for name, right in (("model", original), ("all MLPs replaced", replaced), ("both", original & replaced))
    ]


def captions(size: int) -> Scenes:
    """Returns held-out scenes of one and two objects, none of which names a colour that is not the object's."""
    found: list[Scenes] = []
    while sum(len(part.captions) for part in found) < size:
        drawn = scenes(WORLD_SEED + 4, len(found), 512, "held out", (1, 2))
        used = np.arange(drawn.kind.shape[1]) < drawn.count[:, None]
        found.append(drawn.take(~((drawn.named >= 0) & (drawn.named != drawn.colour) & used).any(axis=1)))
    return concatenate(found).take(np.arange(size))


def _by_length(asked: Scenes) -> list[tuple[np.ndarray, int]]:
    """Returns rows of captions of the same number of words, in parts of `AT_ONCE`, the last filled by repetition."""
    words = np.array([len(text.split()) for text in asked.captions])
    parts = []
    for length in np.unique(words):
        rows = np.flatnonzero(words == length)
        filled = np.resize(rows, -(-len(rows) // AT_ONCE) * AT_ONCE)
        parts += [(part, int(length)) for part in filled.reshape(-1, AT_ONCE)]
    return parts


def _replaced(pipe: Pipeline, tcs: TranscoderSet, words: int) -> Replaced:
    """Returns the model with all MLPs of a set replaced, for captions of a number of words."""
    model = pipe.transformer
    # Nothing is ablated, so no mean is read.
    nothing = {name: np.zeros((len(layers), 1, tcs.config.d_model)) for name, layers in tcs.sites.groups.items()}
    kinds = np.full(len(tcs.sites.names), TRANSCODER)
    # Closing tokens and a template's count; which they are is the same for all captions of a length. A negative prompt
    # is the empty one.
    lengths, tokens = [words, 0][: pipe.plan().branches], pipe.config.defaults.text_tokens
    captions = (" ".join(WORDS[:length]) for length in lengths)
    masks = [encode_prompt(pipe.tokenizers, caption, tokens).t5_mask for caption in captions]
    mask: Bool[np.ndarray, "branch txt"] = np.stack(masks)
    swaps = swaps_of(tcs.sites, model, nothing, kinds)
    return Replaced(model, tcs.per_group(model.config.layout), swaps, jnp.asarray(mask))
