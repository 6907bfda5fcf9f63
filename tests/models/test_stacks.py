"""The walk through the stacks: a scan is a loop, streams come back from their sequences, and reports come per group."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.address import IMAGE, JOINT, TEXT
from difffract_jax.models.blocks import BlockActs, Cond, Streams
from difffract_jax.models.mmdit import Inputs, MMDiT, forward
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import (
    UNROLLED,
    depth_of,
    group_slices,
    per_group,
    run_stack,
    run_stacks,
    sequences,
    slice_layer,
    streams,
)
from difffract_jax.models.tiny import TINY, random_weights
from tolerances import TOL, relative_error

GRID = (2, 3)
GROUPS = [(IMAGE, TEXT), (TEXT, IMAGE), (IMAGE,), (TEXT,), (JOINT,)]


def pair(seed=0, *, img=6, txt=5, width=TINY.d_model, lead=()):
    rng = np.random.default_rng(seed)
    return Streams(*(jnp.asarray(rng.standard_normal((*lead, rows, width))) for rows in (img, txt)))


def model(seed=0):
    return random_weights(abstract_module(MMDiT, TINY, jnp.float64), seed)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (6, TINY.in_channels), (5, TINY.text_width), (TINY.pooled_width,)
    return Inputs(*(jnp.asarray(rng.standard_normal(shape)) for shape in shapes), jnp.asarray(0.5))


class Toy(nnx.Module):
    """A block that multiplies every group's sequence by a number, and adds its MLP: the square of that."""

    def __init__(self, factor):
        self.factor = nnx.Param(factor)

    def __call__(self, h, cond, *, frozen=None, mlp=None, heads=None):
        x = tuple(self.factor[...] * rows for rows in h)
        y = tuple((self.run_mlp if mlp is None else mlp)(i, rows) for i, rows in enumerate(x))
        after = tuple(a + b for a, b in zip(x, y, strict=True))
        return after, BlockActs(frozen, x, y, after)

    def run_mlp(self, group, x):
        return jnp.tanh(x) * (group + 1)


class ToyPair(Toy):
    groups: ClassVar = (IMAGE, TEXT)


class ToyImage(Toy):
    groups: ClassVar = (IMAGE,)


class ToyJoint(Toy):
    groups: ClassVar = (JOINT,)


NOTHING = Cond(jnp.zeros(1), jnp.zeros((1, 1)), jnp.zeros((1, 1)))


def toys():
    """Three stacks of a model that is not FLUX; the second is too deep to be written out."""
    rng = np.random.default_rng(5)
    depths = zip((ToyPair, ToyImage, ToyJoint), (2, UNROLLED + 1, 1), strict=True)
    return tuple(jax.vmap(cls)(jnp.asarray(rng.standard_normal(depth))) for cls, depth in depths)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("lead", "axis"), [((), -2), ((), 0), ((3,), -2), ((3,), 1)])
def test_streams_undo_sequences(groups, lead, axis):
    before = pair(lead=lead)
    joined = sequences(before, groups, axis)
    assert len(joined) == len(groups)
    after = streams(joined, groups, pair(1, lead=lead), axis)
    for name in ("img", "txt"):
        used = any(name in group.streams for group in groups)
        assert np.array_equal(getattr(after, name), getattr(before if used else pair(1, lead=lead), name))


def test_the_joint_sequence_has_the_text_first_along_any_axis():
    masks = Streams(np.array([True, False]), np.array([False, True, True]))
    (rows,) = sequences(masks, (JOINT,), axis=0)
    assert isinstance(rows, np.ndarray) and rows.tolist() == [False, True, True, True, False]
    (joint,) = sequences(pair(), (JOINT,))
    assert np.array_equal(joint[:5], pair().txt) and np.array_equal(joint[5:], pair().img)


def test_stacks_know_their_depth_and_their_place_among_the_groups():
    assert [depth_of(stack) for stack in model_stacks()] == [TINY.depth_double, TINY.depth_single]
    assert group_slices(model_stacks()) == (slice(0, 2), slice(2, 3))
    assert group_slices(toys()) == (slice(0, 2), slice(2, 3), slice(3, 4))


def model_stacks():
    return abstract_module(MMDiT, TINY).stacks


def loop(stacks, h, cond):
    """What `run_stacks` does, written out: the streams after every block, and those at the end."""
    after = []
    for stack in stacks:
        for layer in range(depth_of(stack)):
            joined, _ = slice_layer(stack, layer)(sequences(h, stack.groups), cond)
            h = streams(joined, stack.groups, h)
            after.append(h)
    return after, h


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_a_scan_is_a_loop_for_the_model(x64, unroll, remat):
    made = model()
    h, cond = made.embed(inputs(), GRID)
    run = partial(run_stacks, tap=lambda visit: (visit.entering, visit.acts.residual), unroll=unroll, remat=remat)
    end, reports = jax.jit(run)(made.stacks, h, cond)
    expected, last = jax.jit(loop)(made.stacks, h, cond)
    before = [h, *expected[:-1]]
    block = 0
    for stack, (entering, residual) in zip(made.stacks, reports, strict=True):
        for layer in range(depth_of(stack)):
            for rows, streams_there in ((entering, before[block]), (residual, expected[block])):
                for ours, theirs in zip(rows, sequences(streams_there, stack.groups), strict=True):
                    assert relative_error(ours[layer], theirs) <= TOL.x64
            block += 1
    for ours, theirs in zip(end, last, strict=True):
        assert relative_error(ours, theirs) <= TOL.x64


def test_a_scan_is_a_loop_for_other_stacks(x64):
    stacks, h = toys(), pair()
    end, _ = jax.jit(run_stacks)(stacks, h, NOTHING)
    _, last = loop(stacks, h, NOTHING)
    for ours, theirs in zip(end, last, strict=True):
        assert relative_error(ours, theirs) <= TOL.x64


def test_remat_leaves_gradients_as_they_are(x64):
    made = model()
    h, cond = made.embed(inputs(), GRID)

    @partial(jax.jit, static_argnums=2)
    def gradient(stacks, h, remat):
        run = partial(run_stacks, unroll=False, remat=remat)
        return jax.grad(lambda h: jnp.sum(jnp.sin(run(stacks, h, cond)[0].img)))(h)

    for ours, theirs in zip(gradient(made.stacks, h, True), gradient(made.stacks, h, False), strict=True):
        assert relative_error(ours, theirs) <= TOL.x64


def test_writing_the_true_output_changes_nothing(x64):
    made = model()
    write = jax.jit(
        lambda made, given: forward(made, given, GRID, write=lambda fixed, layer, x, true: (true(), None))[0]
    )
    plain = jax.jit(lambda made, given: made(given, GRID))(made, inputs())
    assert relative_error(write(made, inputs()), plain) <= TOL.x64
    nothing = jax.jit(
        lambda made, given: forward(made, given, GRID, write=lambda fixed, layer, x, true: (0 * x, None))[0]
    )
    assert relative_error(nothing(made, inputs()), plain) > 1e-3


def test_a_run_with_its_own_records_repeats_itself(x64):
    made = model()
    h, cond = made.embed(inputs(), GRID)
    end, records = jax.jit(partial(run_stacks, tap=lambda visit: visit.acts.frozen))(made.stacks, h, cond)
    again, _ = jax.jit(lambda stacks, h, records: run_stacks(stacks, h, cond, frozen=records))(made.stacks, h, records)
    for ours, theirs in zip(again, end, strict=True):
        assert relative_error(ours, theirs) <= TOL.x64


@pytest.mark.parametrize("kind", ["model", "toys"])
def test_every_group_gets_its_own_and_reports_per_layer(x64, kind):
    """`write` gets the group's whole and the block's slice, and what it reports is stacked per group."""
    if kind == "model":
        made = model()
        stacks, (h, cond) = made.stacks, made.embed(inputs(), GRID)
    else:
        stacks, h, cond = toys(), pair(), NOTHING
    groups = [(stack, group) for stack in stacks for group in stack.groups]
    fixed = tuple(jnp.asarray(float(number)) for number in range(len(groups)))
    layers = tuple(10 * number + jnp.arange(depth_of(stack)) for number, (stack, _) in enumerate(groups))

    def write(whole, layer, x, true):
        return true(), (whole, layer, jnp.sum(x), jnp.sum(true()))

    def tap(visit):
        return tuple(zip(visit.reports, visit.acts.mlp_in, visit.acts.mlp_out, strict=True))

    end, reports = jax.jit(partial(run_stacks, write=write, tap=tap))(stacks, h, cond, fixed=fixed, layers=layers)
    taken = per_group(reports)
    assert len(taken) == len(groups)
    for number, ((whole, layer, x, y), mlp_in, mlp_out) in enumerate(taken):
        assert np.array_equal(whole, np.full(len(layers[number]), number)) and np.array_equal(layer, layers[number])
        assert relative_error(x, jnp.sum(mlp_in, axis=(1, 2))) <= TOL.x64
        assert relative_error(y, jnp.sum(mlp_out, axis=(1, 2))) <= TOL.x64
    for ours, theirs in zip(end, jax.jit(run_stacks)(stacks, h, cond)[0], strict=True):
        assert relative_error(ours, theirs) <= TOL.x64


def test_without_write_there_are_no_reports(x64):
    _, kept = run_stack(toys()[2], sequences(pair(), (JOINT,)), NOTHING, tap=lambda visit: visit.reports)
    assert kept == ()
