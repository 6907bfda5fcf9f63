"""The shapes of a module's weights, without its weights.

1. A constructor is traced, which draws and computes nothing.
2. Tracing still goes through every initialiser. A generator that counts its keys would take half of that time, hence
   `OneKey`, which gives the same one each time: nothing is drawn with it.
3. Of modules with a leading layer axis, `stacked`, one is traced.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key


class OneKey(nnx.Rngs):
    """Gives one key whenever one is asked for, for constructors whose shapes alone are wanted."""

    def __init__(self) -> None:
        super().__init__(0)
        self.key = nnx.data(jax.random.key(0))

    def params(self) -> Key[Array, ""]:
        """Returns the key."""
        return self.key


def stacked(module: Callable[[nnx.Rngs], Any], depth: int, rngs: nnx.Rngs) -> Any:
    """Makes modules of one kind with a leading layer axis.

    Args:
        module: makes one from a generator.
        depth: how many.
        rngs: of the keys that their weights are drawn with.
    """
    if isinstance(rngs, OneKey):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (depth, *leaf.shape)), module(rngs))
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: module(nnx.Rngs(key)))(keys)


def abstract_module(module: Callable[..., Any], config: Any, dtype: DTypeLike = jnp.float32) -> Any:
    """Returns a module's shapes without making its weights; traced once, so nothing may write into them.

    Args:
        module: called with `config`, `rngs` and `dtype`.
        config: its configuration.
        dtype: of the weights.
    """
    return _traced(module, config, jax.dtypes.canonicalize_dtype(dtype))


@cache
def _traced(module: Callable[..., Any], config: Any, dtype: Any) -> Any:
    return jax.eval_shape(lambda: module(config, rngs=OneKey(), dtype=dtype))


def abstract_stack(module: Callable[..., Any], config: Any, count: int, dtype: DTypeLike = jnp.float32) -> Any:
    """Returns the shapes of several modules of one configuration, stacked along a first axis.

    Args:
        module: as for `abstract_module`.
        config: of all of them.
        count: how many.
        dtype: of the weights.
    """
    one = abstract_module(module, config, dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), one)
