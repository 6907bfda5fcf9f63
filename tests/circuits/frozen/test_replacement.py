"""The replacement is exact at the trace, and affine everywhere else."""

import chex
import jax
import numpy as np
import pytest

from difffract_jax.circuits.frozen.replacement import prepare, replacement
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.config import UserError
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.transcoder import Transcoder, random_transcoders
from tolerances import TOL, relative_error
from traces import IMAGE, TEXT, layer_of, make_exact, make_transcoders


def random_like(tree, seed, size=1.0):
    """A tree of normal noise."""
    rng = np.random.default_rng(seed)
    made = jax.tree.map(lambda leaf: (size * rng.standard_normal(leaf.shape)).astype(leaf.dtype), tree)
    return jax.device_put(made)


def pairs(*groups):
    """The arrays of like groups, side by side, where there are any layers."""
    return [arrays for arrays in zip(*groups, strict=True) if arrays[0].size]


def test_it_is_exact_at_the_trace(exact):
    f, sources = replacement(exact.trace, exact.tcs)
    for ours, recorded in pairs(jax.jit(f)(sources).mlp_in, exact.trace.record.mlp_in):
        assert relative_error(ours, recorded) <= TOL.x64


def test_its_derivative_is_the_same_everywhere(exact):
    f, sources = replacement(exact.trace, exact.tcs)
    direction = random_like(sources, 1)

    @jax.jit
    def derivative(at):
        return jax.jvp(f, (at,), (direction,))[1]

    for here, far in pairs(derivative(sources).mlp_in, derivative(random_like(sources, 2, 100.0)).mlp_in):
        assert relative_error(here, far) <= TOL.x64


def test_a_finite_step_is_its_derivative(exact):
    f, sources = replacement(exact.trace, exact.tcs)
    step = random_like(sources, 3)
    moved = jax.jit(f)(jax.device_put(jax.tree.map(np.add, sources, step)))
    linear = jax.jit(lambda at, change: jax.linearize(f, at)[1](change))(sources, step)
    for after, before, change in pairs(moved.mlp_in, jax.jit(f)(sources).mlp_in, linear.mlp_in):
        assert relative_error(after - before, change) <= TOL.x64


def test_only_active_features_are_sources(exact):
    tcs, record = exact.tcs, exact.trace.record
    first = exact.trace.info.recorded[0]
    for group, name in ((IMAGE, "img"), (TEXT, "txt")):
        stack, values = tcs.stacks.get(name), exact.replacement.sources.values[group]
        index = exact.replacement.sites[group].layers.index
        dense = np.zeros((*values.shape[:2], tcs.config.features))
        np.put_along_axis(dense, np.asarray(index), np.asarray(values), axis=2)
        expected = np.zeros_like(dense)
        for slot, block in enumerate(tcs.sites.groups.get(name, ())):
            tc: Transcoder = layer_of(stack, slot)
            z = tc.encode(record.mlp_in[group][block - first], record.t)
            expected[block - first] = np.where(np.asarray(record.replaceable[group])[:, None], z, 0)
        assert np.allclose(dense, expected, rtol=0, atol=1e-13)


def test_sites_without_a_transcoder_are_one_constant_each(x64):
    exact = make_exact(img=(0, 2), txt=(0, 2))
    for group in (IMAGE, TEXT):
        errors = exact.replacement.sources.errors[group]
        assert np.array_equal(errors[1], exact.trace.record.mlp_out[group][1])
        assert not exact.replacement.sources.values[group][1].any()


def test_padded_positions_keep_their_true_mlp(x64):
    exact = make_exact(prompt="a red", text_tokens=16)
    padded = ~np.asarray(exact.trace.record.replaceable[TEXT])
    assert padded.any()
    errors, outputs = exact.replacement.sources.errors[TEXT], exact.trace.record.mlp_out[TEXT]
    assert np.array_equal(errors[:, padded], outputs[:, padded])
    assert not exact.replacement.sources.values[TEXT][:, padded].any()


def test_the_affine_map_is_a_pytree_and_one_program_serves_all_traces_of_a_shape():
    pipe = random_pipeline()
    tcs = random_transcoders(pipe.config.transformer)
    chex.clear_trace_counter()
    evaluate = jax.jit(chex.assert_max_traces(lambda f, sources: f(sources).mlp_in, n=1))
    size = {"height": 24, "width": 32, "text_tokens": 16}
    for prompt, step in (("a red circle", 0), ("a blue square above", 2)):
        prepared = prepare(capture(pipe, tcs, prompt, step=step, run=pipe.plan(**size)), tcs, active=(64, 64, 0))
        f, sources = replacement(prepared, tcs)
        assert len(jax.tree.leaves(f)) > 10
        for ours, theirs in zip(evaluate(f, sources), prepared.trace.record.mlp_in, strict=True):
            assert not theirs.size or relative_error(ours, theirs) <= TOL.f32_block


def test_what_is_prepared_is_not_encoded_again_and_knows_its_transcoders():
    pipe = random_pipeline()
    tcs = random_transcoders(pipe.config.transformer)
    prepared = prepare(capture(pipe, tcs, "a red circle", run=pipe.plan(height=24, width=32, text_tokens=16)), tcs)
    assert prepare(prepared, tcs) is prepared and len(repr(prepared).splitlines()) <= 15
    with pytest.raises(UserError, match="was prepared with the transcoders .*prepare it again"):
        prepare(prepared, random_transcoders(pipe.config.transformer, seed=1))


@pytest.mark.parametrize("layers", [(0, 1), (0, 2)])
def test_another_set_of_transcoders_fits_only_inside_the_trace(x64, layers):
    exact = make_exact(img=(1, 2), txt=(1, 2))
    other = make_transcoders(exact.pipe.config.transformer, img=layers, txt=())
    with pytest.raises(UserError, match="recorded the blocks 1 to 2, but the transcoders have block 0"):
        replacement(exact.trace, other)
