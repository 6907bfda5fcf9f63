"""Which words of a prompt make its pooled embedding differ from the empty prompt's (docs/method.md, section 11).

A word counts by what its token's embedding has beyond that of the token which the empty prompt has at its place, times
the mean slope of CLIP on the straight line between the two prompts' tokens, read where the prompt ends. What no word
makes is told apart, from push-forwards: mostly that the empty prompt's embedding is read at another place.

Where two CLIPs pool (Stable Diffusion 3), each makes its own channels of the pooled embedding, behind its projection. A
word's part is the sum of what both make of it; both cut prompts into the same tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int64

from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.sd3_text import ProjectedClip, TwoClips
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.ops import widen

Clip = CLIPTextEncoder | ProjectedClip
POINTS = 16
"""Gauss-Legendre points of the mean slope."""
END = "</w>"
"""What a token of CLIP ends with that ends a word."""


class Words(NamedTuple):
    """A prompt's tokens as CLIP reads them, where they differ from the empty prompt's.

    Attributes:
        place: of each in CLIP's sequence.
        text: of each, without the mark of a word's end.
        edges: parts of directions of the pooled embedding that each makes.
        missed: parts that none makes.
    """

    place: Int64[np.ndarray, "word"]
    text: tuple[str, ...]
    edges: Float64[np.ndarray, "direction word"]
    missed: Float64[np.ndarray, "direction"]


def word_parts(
    pipe: Pipeline,
    prompt: str,
    text_tokens: int,
    directions: Float64[np.ndarray, "direction pooled_width"],
    exchanged: Float64[np.ndarray, "pooled_width"],
) -> Words | None:
    """Splits directions of the exchanged part of the pooled embedding among the prompt's words.

    Args:
        pipe: the pipeline.
        prompt: that the pooled embedding is of.
        text_tokens: of the run.
        directions: whose products with `exchanged` are split.
        exchanged: the prompt's pooled embedding minus the empty prompt's.

    Returns:
        The words; None where embeddings come from a file, without CLIP's weights.
    """
    if pipe.known is not None:
        return None
    ids, empty = (encode_prompt(pipe.tokenizers, text, text_tokens).clip_ids for text in (prompt, ""))
    clips: tuple[Clip, ...] = (pipe.clip.first, pipe.clip.second) if isinstance(pipe.clip, TwoClips) else (pipe.clip,)
    columns = np.cumsum([pooled_channels(clip) for clip in clips])[:-1].tolist()
    given = zip(clips, np.split(ids, len(clips)), np.split(empty, len(clips)), strict=True)
    with jax.default_matmul_precision("highest"):
        made = [
            _parts(clip, jnp.asarray(one), jnp.asarray(other), jnp.asarray(own))
            for (clip, one, other), own in zip(given, np.split(directions, columns, axis=1), strict=True)
        ]
    parts = np.sum([np.asarray(one, np.float64) for one, _ in made], axis=0)
    pushed = np.concatenate([np.asarray(one, np.float64) for _, one in made])
    differing = np.any(np.reshape(ids != empty, (len(clips), -1)), axis=0)
    place = np.flatnonzero(differing)
    assert pipe.tokenizers.clip is not None
    tokens = pipe.tokenizers.clip.convert_ids_to_tokens(ids[place].tolist())
    missed = directions @ (exchanged - pushed)
    return Words(place, tuple(one.removesuffix(END) for one in tokens), parts[:, place], missed)


def pooled_channels(clip: Clip) -> int:
    """Returns how many channels of the pooled embedding a CLIP makes."""
    return clip.projection.out_features if isinstance(clip, ProjectedClip) else clip.config.d_model


@jax.jit
def _parts(
    clip: Clip,
    ids: Int[Array, "clip"],
    empty: Int[Array, "clip"],
    directions: Float[Array, "direction pooled_width"],
) -> tuple[Float[Array, "direction clip"], Float[Array, "pooled_width"]]:
    """Returns every token's part of every direction, and what all tokens together make of the pooled embedding."""
    clip = jax.tree.map(widen, clip)
    encoder = clip.text if isinstance(clip, ProjectedClip) else clip
    at, before = (encoder.embedded(one) for one in (ids, empty))
    change = at - before

    def pooled(embedded: Array) -> Array:
        read = encoder.encode_embedded(embedded, ids)[1]
        return clip.projection(read) if isinstance(clip, ProjectedClip) else read

    def add(sums: tuple[Array, Array], point: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        place, share = point
        here = before + place * change
        _, pull = jax.vjp(pooled, here)
        parts = jax.lax.map(lambda row: jnp.sum(pull(row.astype(here.dtype))[0] * change, axis=1), directions)
        pushed = jax.jvp(pooled, (here,), (change,))[1]
        return (sums[0] + share * parts, sums[1] + share * pushed), None

    places, shares = np.polynomial.legendre.leggauss(POINTS)
    points = tuple(jnp.asarray(column, at.dtype) for column in ((places + 1) / 2, shares / 2))
    none = jnp.zeros((directions.shape[0], ids.shape[0]), at.dtype), jnp.zeros(directions.shape[1], at.dtype)
    return jax.lax.scan(add, none, points)[0]
