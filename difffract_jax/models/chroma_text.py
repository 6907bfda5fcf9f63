"""The text of Chroma: T5, whose attention does not see padding, and zeros for what the transformer must not see.

1. T5 hides padding from every token, where FLUX.1's does not.
2. The transformer sees the prompt's own tokens and one token of padding. The rows behind it are zeros, by which
   `chroma.ChromaMMDiT` knows that they are hidden.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from difffract_jax.models.t5 import T5_XXL, T5Config, T5Encoder


@dataclass(frozen=True, kw_only=True)
class ChromaT5Config(T5Config):
    """Shape of Chroma's T5.

    Attributes:
        padding_id: token that fills prompts up.
        family: what `config.json` of a directory tells this shape by.
    """

    padding_id: int = 0
    family: Literal["chroma"] = "chroma"


CHROMA_T5_XXL = ChromaT5Config(**vars(T5_XXL))
"""T5 v1.1 XXL, as FLUX.1 has it."""


class ChromaT5Encoder(T5Encoder):
    """T5 with padding hidden."""

    config: ChromaT5Config

    def __call__(self, ids: Int[Array | np.ndarray, "txt"]) -> Float[Array, "txt t5_width"]:
        """Encodes one prompt.

        Args:
            ids: token ids, filled up at the end to the text length that the transformer shall see.

        Returns:
            One vector per token of the prompt and for the first token of padding, and zeros behind.
        """
        states = super().__call__(ids)
        return jnp.where((jnp.arange(len(ids)) <= self._own(jnp.asarray(ids)))[:, None], states, 0)

    def _own(self, ids: Int[Array, "txt"]) -> Int[Array, ""]:
        """Returns how many tokens are the prompt's own: those up to the last that is not padding, and at least one."""
        return jnp.max(jnp.where(ids != self.config.padding_id, jnp.arange(1, len(ids) + 1), 1))

    def _bias_for(self, ids: Int[Array, "txt"]) -> Float[Array, "heads txt txt"]:
        """Returns what is added to the scores of every layer: -inf where a key is padding."""
        bias = super()._bias_for(ids)
        return jnp.where(jnp.arange(len(ids)) < self._own(ids), bias, jnp.asarray(-jnp.inf, bias.dtype))
