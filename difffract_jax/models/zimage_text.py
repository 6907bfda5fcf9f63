"""The text of Z-Image: one state of Qwen3, of the prompt's own tokens alone, and learned tokens behind them.

For one prompt, filled up with padding:

1. The states before Qwen3's last layer; padding is hidden from all tokens.
2. Every state is divided by its root mean square: the transformer's first norm, whose weights `zimage.ZImageMMDiT` has.
3. The text of n own tokens is filled up to the next multiple of 32 with learned tokens, which the transformer sees:
   rows whose last channel is 1, and whose other channels are 0. All behind these are zeros, and hidden.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from difffract_jax.models.qwen3 import QWEN3_4B, Qwen3Config, Qwen3Encoder
from difffract_jax.models.zimage_blocks import NORM_EPS, UNIT
from difffract_jax.ops import root_norm


@dataclass(frozen=True, kw_only=True)
class ZImageQwen3Config(Qwen3Config):
    """Shape of Z-Image's Qwen3.

    Attributes:
        read_layers: after how many layers the residual stream is read: one number.
        family: what `config.json` of a directory tells this shape by.
    """

    family: Literal["zimage"] = "zimage"  # type: ignore[assignment]  # every family has its own

    @property
    def d_model(self) -> int:
        """Channels of the result: a state's, and one that tells learned tokens."""
        return super().d_model + 1


ZIMAGE_QWEN3_4B = ZImageQwen3Config(**{**vars(QWEN3_4B), "read_layers": (35,), "family": "zimage"})
"""The encoder of Z-Image: the first 35 of Qwen3-4B's 36 layers."""


class ZImageQwen3(Qwen3Encoder):
    """Token ids of one prompt to the text that the transformer reads."""

    config: ZImageQwen3Config

    def __call__(self, ids: Int[Array | np.ndarray, "txt"]) -> Float[Array, "txt states"]:
        """Encodes one prompt.

        Args:
            ids: token ids, filled up at the end to the text length that the transformer shall see.

        Returns:
            Of every own token its state over its root mean square, and 0; for learned tokens zeros and 1; zeros behind.
        """
        return filled_text(super().__call__(ids), jnp.asarray(ids) != self.config.padding_id)


def filled_text(states: Float[Array, "txt width"], unlike_padding: Array) -> Float[Array, "txt states"]:
    """Returns the text that the transformer reads.

    Args:
        states: Qwen3's, of every token.
        unlike_padding: which ids are not the padding's; the prompt's own are those up to the last.
    """
    places = jnp.arange(states.shape[0])
    own = jnp.max(jnp.where(unlike_padding, places + 1, 0))
    seen = -(-own // UNIT) * UNIT
    normed, _ = root_norm(states, jnp.ones(states.shape[1], states.dtype), eps=NORM_EPS)
    learned = (places >= own) & (places < seen)
    return jnp.concatenate(
        [jnp.where((places < own)[:, None], normed, 0), learned[:, None].astype(states.dtype)], axis=1
    )
