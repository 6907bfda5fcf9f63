"""The text of Stable Diffusion 3: two CLIPs and T5, side by side and one behind the other.

1. Each CLIP gives the states before its last layer, and the pooled vector behind its projection.
2. Both CLIPs' states lie side by side, filled up with zeros to T5's width: the first `positions` text tokens.
3. T5's states follow. Where there is no T5, zeros stand for them (`NoText`).
4. The pooled embedding is that of the first CLIP, then that of the second.

Token ids are those of the whole text stream, the first CLIP's and then T5's; and for `TwoClips` those of the first and
then of the second.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.trees import brief


@dataclass(frozen=True, kw_only=True)
class TwoClipsConfig:
    """Shape of both CLIPs.

    Attributes:
        first: CLIP ViT-L.
        second: OpenCLIP ViT-bigG.
        projections: channels of each one's pooled vector.
        family: what `config.json` of a directory tells this shape by.
    """

    first: CLIPConfig
    second: CLIPConfig
    projections: tuple[int, int]
    family: Literal["sd3"] = "sd3"

    @property
    def d_model(self) -> int:
        """Channels of the pooled embedding."""
        return sum(self.projections)

    @property
    def positions(self) -> int:
        """Token ids that are read: as many of the first as of the second."""
        return 2 * self.states

    @property
    def states(self) -> int:
        """Text tokens that they give."""
        return self.first.positions

    @property
    def layers(self) -> int:
        """Blocks of both."""
        return self.first.layers + self.second.layers


CLIP_L_PROJECTED = CLIPConfig(vocab=49408, d_model=768, d_ff=3072, layers=12, heads=12, positions=77)
"""The first CLIP of Stable Diffusion 3, as of FLUX.1."""
CLIP_G = CLIPConfig(vocab=49408, d_model=1280, d_ff=5120, layers=32, heads=20, positions=77, activation="gelu")
"""The second, OpenCLIP ViT-bigG/14."""
SD3_CLIPS = TwoClipsConfig(first=CLIP_L_PROJECTED, second=CLIP_G, projections=(768, 1280))


class ProjectedClip(nnx.Module):
    """A CLIP and the projection of its pooled vector."""

    def __init__(self, config: CLIPConfig, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.text = CLIPTextEncoder(config, rngs=rngs, dtype=dtype)
        self.projection = nnx.Linear(config.d_model, width, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "clip"]) -> tuple[Float[Array, "clip clip_width"], Float[Array, "projected"]]:
        """Returns the states before the last layer, and the projected pooled vector."""
        states, pooled = self.text.before_last(ids)
        return states, self.projection(pooled)


class TwoClips(nnx.Module):
    """Both CLIPs of Stable Diffusion 3."""

    __repr__ = brief

    def __init__(self, config: TwoClipsConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.first = ProjectedClip(config.first, config.projections[0], rngs=rngs, dtype=dtype)
        self.second = ProjectedClip(config.second, config.projections[1], rngs=rngs, dtype=dtype)

    def __call__(
        self, ids: Int[Array | np.ndarray, "two_clips"]
    ) -> tuple[Float[Array, "clip both_widths"], Float[Array, "pooled_width"]]:
        """Encodes one prompt.

        Args:
            ids: token ids for the first, then as many for the second.
        """
        first, second = jnp.split(jnp.asarray(ids), 2)
        pairs = self.first(first), self.second(second)
        states, pooled = (jnp.concatenate(column, axis=-1) for column in zip(*pairs, strict=True))
        return states, pooled


@dataclass(frozen=True, kw_only=True)
class NoTextConfig:
    """Shape of what stands where Stable Diffusion 3 would have T5.

    Attributes:
        d_model: channels of the text embedding.
        d_ff: 0, as the rest: nothing is computed.
        heads: 0.
        layers: 0.
        family: what `config.json` of a directory tells this shape by.
    """

    d_model: int
    d_ff: int = 0
    heads: int = 0
    layers: int = 0
    family: Literal["sd3"] = "sd3"


class NoText(nnx.Module):
    """Gives zeros for every token."""

    __repr__ = brief
    layered: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: NoTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        del rngs
        self.config, self.dtype = config, np.dtype(dtype)

    def __call__(self, ids: Int[Array | np.ndarray, "txt"]) -> Float[Array, "txt text_width"]:
        """Returns zeros."""
        return jnp.zeros((len(ids), self.config.d_model), self.dtype)


def t5_ids(clip: Any, ids: Int[Array | np.ndarray, "txt"]) -> Int[Array | np.ndarray, "t5"]:
    """Returns those of a text stream's token ids that T5 reads: all, or those behind the CLIPs' own.

    Args:
        clip: encoder of the pooled prompt.
        ids: of the whole text stream.
    """
    return ids[clip.config.states :] if isinstance(clip, TwoClips) else ids


def text_stream(
    clip: Any, states: Float[Array, "clip clip_width"], text: Float[Array, "t5 text_width"]
) -> Float[Array, "txt text_width"]:
    """Returns the text embedding: T5's states, or behind those of two CLIPs, which are filled up with zeros.

    Args:
        clip: encoder of the pooled prompt.
        states: that it gives.
        text: T5's states.
    """
    if not isinstance(clip, TwoClips):
        return text
    filled = jnp.pad(states.astype(text.dtype), ((0, 0), (0, text.shape[-1] - states.shape[-1])))
    return jnp.concatenate([filled, text])
