"""A trace holds what the reference's does, at every step, and refuses what cannot be traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.trace.capture import capture
from difffract_jax.config import UserError
from difffract_jax.loading import load_transcoders
from difffract_jax.models.stacks import depth_of
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.ops import attention_pattern
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import REFERENCE, TOL, relative_error
from traces import IMAGE, TEXT


@pytest.fixture(scope="module")
def reference():
    return np.load(REFERENCE / "golden_trace_0.npz")


@pytest.fixture(scope="module")
def record(golden):
    return golden.trace(0, 1).record


@pytest.mark.parametrize("stream", ["img", "txt"])
def test_a_trace_holds_the_reference_s_arrays(record, reference, stream):
    group = ("img", "txt").index(stream)
    part = {name: getattr(record, name)[group] for name in ("boundary", "mlp_in", "mlp_out")}
    assert relative_error(part["boundary"], reference[f"boundary_{stream}"]) <= TOL.f32_block
    for layer in range(3):
        for ours, theirs in (
            (part["mlp_in"][layer], "x_ff"),
            (part["mlp_out"][layer], "ff_out"),
            (record.frozen[0].inv_std1[group][layer][:, None], "norm1_inv_denom"),
            (record.frozen[0].inv_std2[group][layer][:, None], "norm2_inv_denom"),
        ):
            assert relative_error(ours, reference[f"L{layer}_{stream}_{theirs}"]) <= TOL.f32_block


def test_attention_patterns_come_back_from_queries_and_keys(record, reference):
    for layer in range(3):
        q, k = record.frozen[0].q[layer], record.frozen[0].k[layer]
        pattern = attention_pattern(q, k, scale=q.shape[-1] ** -0.5)
        assert relative_error(pattern, reference[f"L{layer}_P"]) <= TOL.f32_block


def test_no_array_of_a_trace_is_quadratic_in_the_sequence(record):
    seq = record.frozen[0].q.shape[1]
    assert not [leaf.shape for leaf in jax.tree.leaves(record) if leaf.shape.count(seq) > 1]


@pytest.mark.parametrize("step", range(4))
def test_every_step_can_be_traced(golden, step):
    record = golden.trace(1, step).record
    h = golden.pipe.transformer.img_in(jnp.asarray(golden.forward["p1_latents"][step]))
    assert relative_error(record.boundary.img, h) <= TOL.f32_run
    assert float(record.t) == golden.forward["timesteps"][step]


def test_padding_is_not_replaced_unless_asked_for(golden):
    usual, all_of_it = (golden.trace(0, 1, include_padding=flag).record.replaceable for flag in (False, True))
    ids = golden.forward["p0_t5_input_ids"]
    own = np.flatnonzero(ids == 1)[0] + 1  # </s> closes the prompt
    assert np.array_equal(np.flatnonzero(usual[TEXT]), np.arange(own))
    assert own < 16 and usual[IMAGE].all() and all_of_it[TEXT].all()


def test_a_whole_stack_is_recorded_without_a_copy(golden, record):
    """At FLUX's size a copy would be the largest array of a trace."""
    stack, recorded = golden.pipe.transformer.stacks[0], record.weights.stacks[0]
    assert depth_of(stack) == depth_of(recorded)
    for ours, taken in zip(jax.tree.leaves(stack), jax.tree.leaves(recorded), strict=True):
        assert ours.unsafe_buffer_pointer() == taken.unsafe_buffer_pointer()


def test_weights_in_bfloat16_are_kept_and_all_that_is_recorded_is_float32():
    pipe = random_pipeline(dtype=jnp.bfloat16)
    trace = capture(pipe, random_transcoders(pipe.config.transformer), "a red circle", step=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(trace.record.weights)} == {jnp.dtype(jnp.bfloat16)}
    recorded = jax.tree.leaves(trace.record._replace(weights=None, unpooled=None))
    assert {leaf.dtype for leaf in recorded} <= {jnp.float32.dtype, jnp.bool_.dtype}


def test_a_trace_says_where_it_comes_from(golden):
    info = golden.trace(0, 2).info
    assert (info.step, info.sigmas, info.grid) == (2, (1.0, 0.75, 0.5, 0.25, 0.0), (6, 6))
    assert info.model == golden.pipe.source != "" and info.latents_given


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"step": 4}, "step must lie in [0, 4), as the run has 4 steps counted from 0, but got 4."),
        ({"step": -1}, "step must lie in [0, 4)"),
        ({"height": 50}, "multiples of 8 pixels"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": 3.5}, "takes no guidance scale"),
    ],
)
def test_what_is_out_of_range_is_refused(change, sentence):
    pipe = random_pipeline()
    with pytest.raises(UserError) as caught:
        run = pipe.plan(**{name: value for name, value in change.items() if name != "step"})
        capture(pipe, random_transcoders(pipe.config.transformer), "a red circle", run=run, step=change.get("step", 0))
    assert sentence in str(caught.value)


def test_transcoders_of_another_model_are_refused(golden):
    pipe = random_pipeline()
    with pytest.raises(UserError, match="The transcoders are 64 wide, but the model is 32 wide"):
        capture(pipe, golden.tcs, "a red circle")
    elsewhere = random_transcoders(pipe.config.transformer)._replace(
        sites=sites_of({"img": (0, 1, 7), "txt": (0, 1, 2)})
    )
    with pytest.raises(
        UserError, match="sites img/7, but the model has img/0 to img/2 and txt/0 to txt/2 and single/0 to single/1"
    ):
        capture(pipe, elsewhere, "a red circle")


def test_saes_cannot_be_traced(golden):
    with pytest.raises(UserError, match="these are SAEs; give a directory of transcoders"):
        capture(golden.pipe, load_transcoders(REFERENCE / "saes"), "a red fox")


def test_a_prompt_that_is_too_long_is_cut_and_says_so(golden):
    prompt = "a red fox " * 12 + "at dawn"
    info = capture(golden.pipe, golden.tcs, prompt, run=golden.pipe.plan(height=96, width=96, text_tokens=16)).info
    assert info.cut and prompt.endswith(info.cut)
