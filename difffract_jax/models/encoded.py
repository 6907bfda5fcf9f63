"""What the text encoders make of prompts: of one, and of several that are kept."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from difffract_jax.config import UserError


class EncodedPrompt(NamedTuple):
    """What the text encoders make of a prompt.

    Attributes:
        text: embedding of every position, padding included, T5's or Qwen3's.
        pooled: CLIP's pooled embedding; without channels where nothing is pooled.
        mask: True for the prompt's own tokens, the closing one included; False for padding.
        cut: the end of the prompt that did not fit, in a run that of its negative prompt too; "" if all did.
        negative: what they make of the negative prompt; None where a step is one evaluation.
    """

    text: Float[Array, "txt text_width"]
    pooled: Float[Array, "pooled_width"]
    mask: Bool[np.ndarray, "txt"]
    cut: str
    negative: "EncodedPrompt | None" = None

    @property
    def branches(self) -> "tuple[EncodedPrompt, ...]":
        """The prompt of every branch: this one, and the negative one if there is one."""
        return (self,) if self.negative is None else (self, self.negative)


class Embeddings(NamedTuple):
    """Embeddings of some prompts.

    Attributes:
        path: of their file; "" if they are not from one.
        model: content hash of the model that made them.
        prompts: prompt -> its embeddings; all of one length.
    """

    path: str
    model: str
    prompts: Mapping[str, EncodedPrompt]

    @property
    def text_tokens(self) -> int:
        """Length of the text sequence."""
        return next(iter(self.prompts.values())).text.shape[0]

    def of(self, prompt: str, text_tokens: int) -> EncodedPrompt:
        """Returns the embeddings of a prompt.

        Args:
            prompt: one of the prompts.
            text_tokens: length of the text sequence.

        Raises:
            UserError: if there is no such prompt, or the length is another.
        """
        if prompt not in self.prompts:
            others = ", ".join(f'"{one}"' for one in list(self.prompts)[:3] if one)
            raise UserError(
                f'{self.path} holds no embedding of the prompt "{prompt}", but of {others}; encode it too, or leave '
                "--embeddings out."
            )
        if self.text_tokens != text_tokens:
            raise UserError(
                f"{self.path} holds embeddings of {self.text_tokens} text tokens, but the run has {text_tokens}; give "
                f"--text-tokens {self.text_tokens}, or encode again."
            )
        found = self.prompts[prompt]
        return found._replace(text=jnp.asarray(found.text), pooled=jnp.asarray(found.pooled))
