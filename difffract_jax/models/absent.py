"""What stands for text encoders that a directory lacks: prompts then come as embeddings from a file."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from difffract_jax.config import UserError
from difffract_jax.trees import brief


@dataclass(frozen=True, kw_only=True)
class AbsentConfig:
    """Shape of a text encoder that is not there.

    Attributes:
        d_model: channels of what it would give.
        d_ff: 0, as the rest: nothing is computed.
        heads: 0.
        layers: 0.
        positions: 0.
        family: what `config.json` of a directory tells this shape by.
    """

    d_model: int
    d_ff: int = 0
    heads: int = 0
    layers: int = 0
    positions: int = 0
    family: Literal["absent"] = "absent"


class Absent(nnx.Module):
    """Has no weights, and encodes nothing."""

    __repr__ = brief
    layered: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: AbsentConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        del rngs, dtype
        self.config = config

    def __call__(self, ids: Any) -> NoReturn:
        """Refuses to encode a prompt."""
        del ids
        raise UserError(
            "This model has no text encoders, which read prompts; give the file of embeddings that `difffract encode` "
            "wrote with a complete one, --embeddings FILE, or a directory that has them."
        )
