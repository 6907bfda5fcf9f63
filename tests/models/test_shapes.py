"""Shapes of modules without weights: those of the module itself, traced once."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.shapes import abstract_module, abstract_stack
from difffract_jax.models.tiny import TINY
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig

SHAPE = TranscoderConfig(d_model=8, features=12, time_embed=4, conditioning="film")


@pytest.mark.parametrize(("module", "config"), [(MMDiT, TINY), (Transcoder, SHAPE)], ids=["model", "transcoder"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_are_those_of_the_module(module, config, dtype) -> None:
    made = jax.eval_shape(lambda: module(config, rngs=nnx.Rngs(3), dtype=dtype))
    found = abstract_module(module, config, dtype)
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert jax.tree.leaves(found) == jax.tree.leaves(made)


def test_a_stack_is_that_of_modules_mapped_over_keys() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    made = jax.eval_shape(jax.vmap(lambda key: Transcoder(SHAPE, rngs=nnx.Rngs(key))), keys)
    found = abstract_stack(Transcoder, SHAPE, 3)
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert jax.tree.leaves(found) == jax.tree.leaves(made)


def test_a_module_is_traced_once_for_each_type() -> None:
    traced = []

    def module(config, *, rngs, dtype):
        traced.append(dtype)
        return nnx.Linear(config, 2, param_dtype=dtype, rngs=rngs)

    for _ in range(2):
        abstract_module(module, 3, jnp.bfloat16)
        abstract_module(module, 3, jnp.float32)
    assert [jnp.dtype(dtype).name for dtype in traced] == ["bfloat16", "float32"]


def test_double_precision_is_traced_anew_where_it_is_on(x64) -> None:
    with jax.enable_x64(False):
        narrow = abstract_module(Transcoder, SHAPE, jnp.float64)
    wide = abstract_module(Transcoder, SHAPE, jnp.float64)
    assert narrow.enc.kernel.dtype == jnp.float32 and wide.enc.kernel.dtype == jnp.float64
