"""What a feature does to the predicted image directly, as a small picture.

1. At one image token, a feature's usual value times its decoder vector and gate passes the last norm and layer, as in
   the mean run's last step: a change of that token's predicted clean latents.
2. The autoencoder's decoder is linearised at the mean of the final latents. Its derivative along each channel of the
   token in the middle of the image gives a picture; a feature's picture is a sum of these few.
3. The picture shows `TOKENS` x `TOKENS` tokens around it, at most `SIDE` pixels a side, grey where nothing changes,
   with its largest change scaled to the full range; `strength` says how large that is, in units of the full range.

Paths through later blocks are left out: this is the direct effect alone.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.mean_run import MeanRun
from difffract_jax.models.pipeline import decode_raw
from difffract_jax.models.sampler import PATCH
from difffract_jax.ops import widen

TOKENS = 3
"""Tokens along a side of a picture."""
SIDE = 24
"""Most pixels along a side of a picture."""


class Effects(NamedTuple):
    """Direct effects of a site's features.

    Attributes:
        strength: largest change of a colour of a pixel, in [0, 1] of the full range.
        picture: what changes.
    """

    strength: Float[np.ndarray, "feat"]
    picture: UInt8[np.ndarray, "feat height width rgb"]


def token_pictures(corpus: Corpus, mean: MeanRun) -> Float[np.ndarray, "channels height width rgb"]:
    """Returns what one more unit of each channel of the middle token changes in the image, around that token.

    Args:
        corpus: what was run.
        mean: its mean run.
    """
    rows, columns = grid = corpus.run.grid
    row, column = rows // 2, columns // 2
    vae = jax.tree.map(widen, corpus.pipe.vae)
    changed = np.asarray(_derivatives(vae, jnp.asarray(mean.latents), jnp.int32(row * columns + column), grid))
    unit = PATCH * corpus.pipe.config.vae.factor
    box = []
    for at, side in ((row, rows), (column, columns)):
        first = max(0, min(at - TOKENS // 2, side - TOKENS))
        box.append(slice(first * unit, min(first + TOKENS, side) * unit))
    cut = changed[:, box[0], box[1]]
    each = -(-max(cut.shape[1:3]) // SIDE)
    height, width = (side // each * each for side in cut.shape[1:3])
    cut = cut[:, :height, :width].reshape(len(cut), height // each, each, width // each, each, 3)
    return cut.mean(axis=(2, 4))


@partial(jax.jit, static_argnames="grid")
def _derivatives(vae: Any, latents: Array, token: Array, grid: tuple[int, int]) -> Float[Array, "channels H W rgb"]:
    """Returns the decoder's derivative along each channel of a token; half of its own range is the full range."""

    def one(channel: Array) -> Array:
        along = jnp.zeros_like(latents).at[token, channel].set(1.0)
        return jax.jvp(lambda z: decode_raw(vae, z, grid) / 2, (latents,), (along,))[1]

    return jax.lax.map(one, jnp.arange(latents.shape[1]))


def effects_of(
    decoder: Float[np.ndarray, "feat d_model"],
    gate: Float[np.ndarray, "d_model"],
    usual: Float[np.ndarray, "feat"],
    mean: MeanRun,
    pictures: Float[np.ndarray, "channels height width rgb"],
) -> Effects:
    """Returns the effects of a site's features.

    Args:
        decoder: their decoder vectors.
        gate: of the site, in the last step.
        usual: mean values where features are active.
        mean: the mean run.
        pictures: from `token_pictures`.
    """
    written = usual[:, None].astype(np.float32) * (decoder.astype(np.float32) * gate[None])
    change = (written @ mean.final) @ pictures.reshape(len(pictures), -1)
    strength = np.abs(change).max(axis=1, initial=0.0)
    share = change / np.maximum(strength, 1e-30)[:, None]
    picture = np.rint(127.5 + 127.5 * share).astype(np.uint8).reshape(-1, *pictures.shape[1:])
    return Effects(strength, picture)
