"""A block run with its own record is the same block, and with its MLP held it is affine in the residual stream."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.models.blocks import Cond, Streams, join_streams, split
from difffract_jax.models.double import DoubleBlock
from difffract_jax.models.mmdit import position_ids
from difffract_jax.models.single import SingleBlock
from difffract_jax.models.stacks import sequences
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


@cache
def make(cls):
    """One random float64 block; every bias and scale is non-trivial."""
    abstract = jax.eval_shape(lambda: cls(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float64))
    return random_weights(abstract, 0)


@jax.jit
def run(block, h, cond, frozen=None, **more):
    """A block as one program."""
    return block(h, cond, frozen=frozen, **more)


@jax.jit
def run_holding(block, h, cond, written):
    """A block whose MLPs write what is given."""
    return block(h, cond, mlp=lambda i, x: written[i])


@jax.jit
def run_without(block, h, cond, heads=None):
    """A block whose MLPs write nothing."""
    return block(h, cond, heads=heads, mlp=lambda i, x: jnp.zeros_like(x))


@pytest.fixture(params=[DoubleBlock, SingleBlock])
def case(request, x64):
    """A block, and its input at a seed."""
    return make(request.param), lambda seed, size=1.0: sequences(streams(seed, size), request.param.groups)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_with_its_own_record_repeats_itself(case, seed):
    block, residual = case
    h, acts = run(block, residual(seed), cond(seed))
    again, _ = run(block, residual(seed), cond(seed), frozen=acts.frozen)
    for ours, expected in zip(jax.tree.leaves(again), jax.tree.leaves(h), strict=True):
        assert relative_error(ours, expected) <= TOL.x64
    assert all(map(np.array_equal, acts.residual, h))


def test_with_its_mlp_held_a_frozen_block_has_one_derivative(case):
    block, residual = case
    _, acts = run(block, residual(0), cond())
    direction = residual(1)

    @jax.jit
    def derivative(at):
        return jax.jvp(
            lambda h: block(h, cond(), frozen=acts.frozen, mlp=lambda i, x: acts.mlp_out[i])[0], (at,), (direction,)
        )[1]

    here, far = derivative(residual(2)), derivative(residual(3, 100.0))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(far), strict=True):
        assert relative_error(a, b) <= TOL.x64
    live = jax.jvp(lambda h: run(block, h, cond())[0], (residual(2),), (direction,))[1]
    assert relative_error(jax.tree.leaves(live)[0], jax.tree.leaves(here)[0]) > 1e-3


def test_standing_in_for_the_mlp_with_the_mlp_changes_nothing(case):
    block, residual = case
    h, acts = run(block, residual(0), cond())
    again, _ = jax.jit(lambda block, h, cond: block(h, cond, mlp=block.run_mlp))(block, residual(0), cond())
    held, _ = run_holding(block, residual(0), cond(), acts.mlp_out)
    for other in (again, held):
        for ours, expected in zip(jax.tree.leaves(other), jax.tree.leaves(h), strict=True):
            assert relative_error(ours, expected) <= TOL.x64


def test_streams_are_joined_text_first_and_come_apart_again():
    pair = streams(0)
    joint = join_streams(pair)
    assert np.array_equal(joint[:TEXT], pair.txt) and np.array_equal(joint[TEXT:], pair.img)
    assert all(np.array_equal(a, b) for a, b in zip(split(joint, TEXT), pair, strict=True))


def test_a_record_gives_the_attention_that_was_paid(x64):
    block = make(DoubleBlock)
    h, acts = run(block, streams(0), cond())
    assert acts.frozen.q.shape == (6 + TEXT, CONFIG.heads, CONFIG.head_dim)
    values = jnp.ones_like(acts.frozen.q)
    assert relative_error(attend(acts.frozen.q, acts.frozen.k, values, scale=0.25), values) <= TOL.x64
    assert h.img.shape == (6, CONFIG.d_model) and h.txt.shape == (TEXT, CONFIG.d_model)


def test_in_a_double_block_no_stream_s_mlp_sees_the_other(x64):
    block = make(DoubleBlock)
    _, acts = run(block, streams(0), cond())
    same, changed = ([block.run_mlp(i, x) for i, x in enumerate(pair)] for pair in (acts.mlp_in, doubled_text(acts)))
    assert np.array_equal(changed[0], same[0]) and np.array_equal(changed[0], acts.mlp_out.img)
    assert not np.array_equal(changed[1], same[1])


def doubled_text(acts):
    return Streams(acts.mlp_in.img, 2 * acts.mlp_in.txt)


def test_gates_stand_between_an_mlp_and_its_residual_stream(case):
    """Without the MLPs the streams lack exactly gate times output."""
    block, residual = case
    h, acts = run(block, residual(0), cond())
    without, _ = run_without(block, residual(0), cond())
    for gate, y, whole, rest in zip(block.gates(cond()), acts.mlp_out, h, without, strict=True):
        assert relative_error(gate[None] * y, whole - rest) <= TOL.x64


def test_heads_that_are_switched_off_leave_what_does_not_attend(case):
    """Attention's output is the sum over heads: what the heads add one by one they add together."""
    block, residual = case

    def through(heads):
        return run_without(block, residual(0), cond(), jnp.asarray(heads))[0]

    ones = np.eye(CONFIG.heads)
    none, every = through(np.zeros(CONFIG.heads)), through(np.ones(CONFIG.heads))
    parts = [through(one) for one in ones]
    for number, (a, b) in enumerate(zip(none, every, strict=True)):
        assert relative_error(sum(part[number] - a for part in parts), b - a) <= TOL.x64


def test_pulling_single_rows_back_is_the_gradient_of_the_frozen_block(case):
    """`entry` gives what reverse mode gives for x at single rows of every group, target by target."""
    block, residual = case
    h = residual(0)
    _, acts = run(block, h, cond())
    group = np.array([i % len(h) for i in range(4)])
    row = np.array([0, 1, 3, 4])
    gradients = jnp.asarray(np.random.default_rng(7).standard_normal((4, CONFIG.d_model)))
    enter = jax.jit(lambda block, cond, frozen, *targets: block.entry(cond, frozen)(*targets))
    ours = enter(block, cond(), acts.frozen, gradients, jnp.asarray(group), jnp.asarray(row))

    @jax.jit
    def pull(cotangents):
        return jax.vjp(lambda h: tuple(block(h, cond(), frozen=acts.frozen)[1].mlp_in), h)[1](cotangents)

    for target in range(4):
        given = [jnp.zeros_like(x) for x in acts.mlp_in]
        given[group[target]] = given[group[target]].at[row[target]].set(gradients[target])
        for cotangent, expected in zip(ours, pull(tuple(given))[0], strict=True):
            assert relative_error(cotangent[target], expected) <= TOL.x64
