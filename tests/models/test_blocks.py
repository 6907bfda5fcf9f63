"""A block run with its own record is the same block, and with its MLP held it is affine in the residual stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.models.blocks import DoubleBlock, SingleBlock, Streams, join, run_mlp, run_mlps, split
from difffract_jax.models.mmdit import Cond, position_ids
from difffract_jax.models.tiny import TINY, random_weights
from difffract_jax.ops import attend, rope_table
from tolerances import TOL, relative_error

GRID, TEXT = (2, 3), 5
CONFIG = TINY


def streams(seed, size=1.0):
    rng = np.random.default_rng(seed)
    return Streams(*(jnp.asarray(size * rng.standard_normal((rows, CONFIG.d_model))) for rows in (6, TEXT)))


def cond(seed=0):
    cos, sin = rope_table(position_ids(GRID, TEXT), CONFIG.rope_axes, CONFIG.rope_theta)
    vec = np.random.default_rng(seed).standard_normal(CONFIG.d_model)
    return Cond(jnp.asarray(vec), jnp.asarray(cos), jnp.asarray(sin))


def make(cls, seed=0):
    """One random float64 block; every bias and scale is non-trivial."""
    abstract = jax.eval_shape(lambda: cls(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float64))
    return random_weights(abstract, seed)


@pytest.fixture(params=[DoubleBlock, SingleBlock])
def case(request, x64):
    """A block, its input at a seed, and the same with the MLP replaced by a function of the seed."""
    block = make(request.param)
    double = request.param is DoubleBlock

    def residual(seed, size=1.0):
        return streams(seed, size) if double else join(streams(seed, size))

    return block, residual, run_mlps if double else run_mlp


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_with_its_own_record_repeats_itself(case, seed):
    block, residual, _ = case
    h, acts = block(residual(seed), cond(seed))
    again, _ = block(residual(seed), cond(seed), frozen=acts.frozen)
    for ours, expected in zip(jax.tree.leaves(again), jax.tree.leaves(h), strict=True):
        assert relative_error(ours, expected) <= TOL.x64
    assert jax.tree.all(jax.tree.map(jnp.array_equal, acts.residual, h))


def test_with_its_mlp_held_a_frozen_block_has_one_derivative(case):
    block, residual, _ = case
    _, acts = block(residual(0), cond())
    direction = residual(1)

    @jax.jit
    def derivative(at):
        return jax.jvp(
            lambda h: block(h, cond(), frozen=acts.frozen, mlp=lambda b, x: acts.mlp_out)[0], (at,), (direction,)
        )[1]

    here, far = derivative(residual(2)), derivative(residual(3, 100.0))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(far), strict=True):
        assert relative_error(a, b) <= TOL.x64
    live = jax.jvp(lambda h: block(h, cond())[0], (residual(2),), (direction,))[1]
    assert relative_error(jax.tree.leaves(live)[0], jax.tree.leaves(here)[0]) > 1e-3


def test_standing_in_for_the_mlp_with_the_mlp_changes_nothing(case):
    block, residual, own = case
    h, acts = block(residual(0), cond())
    again, _ = block(residual(0), cond(), mlp=own)
    held, _ = block(residual(0), cond(), mlp=lambda b, x: acts.mlp_out)
    for other in (again, held):
        for ours, expected in zip(jax.tree.leaves(other), jax.tree.leaves(h), strict=True):
            assert relative_error(ours, expected) <= TOL.x64


def test_streams_are_joined_text_first_and_come_apart_again():
    pair = streams(0)
    joint = join(pair)
    assert np.array_equal(joint[:TEXT], pair.txt) and np.array_equal(joint[TEXT:], pair.img)
    assert all(np.array_equal(a, b) for a, b in zip(split(joint, TEXT), pair, strict=True))


def test_a_record_gives_the_attention_that_was_paid(x64):
    block = make(DoubleBlock)
    h, acts = block(streams(0), cond())
    assert acts.frozen.q.shape == (6 + TEXT, CONFIG.heads, CONFIG.head_dim)
    values = jnp.ones_like(acts.frozen.q)
    assert relative_error(attend(acts.frozen.q, acts.frozen.k, values, scale=0.25), values) <= TOL.x64
    assert h.img.shape == (6, CONFIG.d_model) and h.txt.shape == (TEXT, CONFIG.d_model)


def test_in_a_double_block_no_stream_s_mlp_sees_the_other(x64):
    block = make(DoubleBlock)
    _, acts = block(streams(0), cond())
    changed = Streams(acts.mlp_in.img, 2 * acts.mlp_in.txt)
    assert np.array_equal(run_mlps(block, changed).img, run_mlps(block, acts.mlp_in).img)
    assert not np.array_equal(run_mlps(block, changed).txt, run_mlps(block, acts.mlp_in).txt)
