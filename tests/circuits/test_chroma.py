"""The laws on Chroma's stacks: modulations of a small network, and text that attention must not see.

Nothing outside `models` knows of these. Padding is hidden by rows of zeros; the text encoders are FLUX.1's small ones,
whose rows behind the prompt are made zeros here, as Chroma's T5 does.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placements import same_wherever_weights_lie

from difffract_jax.address import TXT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.effects.readings import edited
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.graphs.graph import SCORE
from difffract_jax.models.chroma import ChromaConfig, ChromaMMDiT, numbered
from difffract_jax.models.chroma_text import ChromaT5Config, ChromaT5Encoder
from difffract_jax.models.qwen3 import NoPooled, NoPooledConfig
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.stacks import run_stacks, slice_layer
from difffract_jax.models.tiny import random_pipeline, random_weights
from difffract_jax.models.tokenizers import Tokenizers
from laws import conservation, intervention_error
from tolerances import TOL, relative_error
from traces import make_transcoders

SHAPE = ChromaConfig(
    depth_double=2,
    depth_single=2,
    heads=2,
    head_dim=16,
    rope_axes=(4, 6, 6),
    in_channels=16,
    out_channels=16,
    text_width=24,
    modulator_inputs=16,
    modulator_width=20,
    modulator_layers=2,
)
PROMPT, SIZE = "a red", {"height": 24, "width": 32, "text_tokens": 12}
OWN = 7
"""Tokens of the prompt: one a letter, a space before, and the closing one."""


def make(dtype):
    """A pipeline of Chroma's kind, with guidance by two branches, and transcoders of every site."""
    pipe = random_pipeline(dtype=dtype)
    model = random_weights(abstract_module(ChromaMMDiT, SHAPE, dtype), 3)
    for stack in model.stacks:
        numbered(stack)
    shape = ChromaT5Config(**vars(pipe.config.t5))
    t5 = random_weights(abstract_module(ChromaT5Encoder, shape, dtype), 4)
    config = replace(
        pipe.config,
        transformer=SHAPE,
        t5=shape,
        clip=NoPooledConfig(),
        defaults=replace(pipe.config.defaults, two_branches=True, guidance=3.0),
    )
    clip = abstract_module(NoPooled, NoPooledConfig(), dtype)
    pipe = pipe._replace(
        transformer=model, t5=t5, clip=clip, config=config, tokenizers=Tokenizers(pipe.tokenizers.t5, None, 0)
    )
    return pipe, make_transcoders(SHAPE, img=(0, 1), txt=(0, 1), joint=(0, 1), dtype=dtype, skip=True)


def make_trace(dtype, **run):
    pipe, tcs = make(dtype)
    trace = capture(pipe, tcs, PROMPT, step=1, output=True, run=pipe.plan(**SIZE, **run))
    return pipe, tcs, trace, prepare_step(trace, tcs)


@pytest.fixture(scope="module")
def traced():
    """A trace of the prompt's branch alone, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return make_trace(jnp.float64, guidance=1.0)


@pytest.fixture
def exact(traced, x64):
    """The same, for a test in float64."""
    return traced


@pytest.mark.slow
def test_in_float64_the_replacement_is_the_model_and_every_edge_an_intervention(exact):
    _, tcs, trace, prepared = exact
    reading = jax.jit(run_replacement)(*prepared)
    assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, 3)
    print(f"conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_x64
    assert caused <= TOL.intervention_x64


def test_no_edge_comes_from_text_that_is_hidden(exact):
    pipe, tcs, trace, _ = exact
    seen = np.any(np.asarray(trace.record.text) != 0, axis=-1)
    assert seen.tolist() == [True] * (OWN + 1) + [False] * (12 - OWN - 1)

    @jax.jit
    def pattern_of(stack, frozen):
        q, k = stack.queries_and_keys(frozen)
        return jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5)

    for stack, frozen in zip(trace.record.weights.stacks, trace.record.frozen, strict=True):
        for layer in range(2):
            pattern = np.asarray(pattern_of(stack, slice_layer(frozen, layer)))
            assert not np.any(pattern[..., OWN + 1 : 12]) and np.all(pattern[..., : OWN + 1] > 0)
    graph = attribute(trace, tcs, target=strongest_feature(trace, tcs, "img", 1), max_nodes=8)
    text = (graph.node_stream == TXT) & (graph.node_position > OWN)
    assert graph.largest_conservation_error <= TOL.conservation_x64
    assert not np.any(text) and np.any((graph.node_stream == TXT) & (graph.node_position <= OWN))
    text = np.array(trace.record.boundary.txt)
    text[OWN + 1 :] += 1
    run = jax.jit(lambda blocks, entering, cond: run_stacks(blocks, entering, cond)[0].img)
    given = (trace.record.boundary, trace.record.boundary._replace(txt=jax.device_put(text)))
    images = [run(trace.record.weights.stacks, entering, trace.record.cond) for entering in given]
    assert np.array_equal(*images)


@pytest.mark.slow
def test_a_graph_adds_up_with_attention_explained_and_no_hidden_token_is_a_key(exact):
    _, tcs, trace, prepared = exact
    target = strongest_feature(trace, tcs, "single", 1)
    graph = attribute(trace, tcs, target=target, max_nodes=6, attention="explained", max_scores=40)
    (explained,) = graph.provenance.attention
    assert abs(explained.total - explained.forward) <= TOL.conservation_x64 * explained.absolute
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    scores = (graph.node_kind == SCORE) & (graph.node_key_position >= 0)  # a block's others are one node
    hidden = (graph.node_key_stream == TXT) & (graph.node_key_position > OWN)
    assert scores.sum() == 40 and not np.any(scores & hidden)
    # Live, frozen and read off for one head: all see the same pattern.
    ones = [jnp.ones((x.shape[0], 1, 40)) for x in trace.record.mlp_in]
    for mode in ("direct", "live", "full"):
        reading = edited(prepared, ones, jax.tree.map(jnp.zeros_like, ones), mode)
        assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64


@pytest.mark.slow
def test_both_branches_add_up_over_steps_in_either_precision(x64):
    for dtype, bar in ((jnp.float64, TOL.conservation_x64), (jnp.float32, TOL.conservation_steps_f32)):
        pipe, tcs = make(dtype)
        run = pipe.plan(**SIZE, negative_prompt="a blue circle")
        span = capture_steps(pipe, tcs, PROMPT, first=1, last=2, run=run)
        seen = [int(np.any(np.asarray(trace.record.text) != 0, axis=-1).sum()) for trace in span.traces]
        assert seen == [OWN + 1, 12] * 2, "every branch has a mask of its own"
        graph = attribute(span, tcs, target=resolve_target(pipe, span, parse_target("velocity:")), max_nodes=8)
        error = float(np.max(graph.conservation_error))
        print(f"both branches, two steps, {np.dtype(dtype).name}: conservation {error:.1e}")
        assert set(graph.node_branch.tolist()) == {0, 1} and error <= bar
        one = capture_steps(pipe, tcs, PROMPT, first=3, last=3, run=run)
        target = resolve_target(pipe, one, parse_target("velocity:"))
        error = float(np.max(attribute(one, tcs, target=target, max_nodes=8).conservation_error))
        print(f"both branches, one step, {np.dtype(dtype).name}: conservation {error:.1e}")
        assert error <= (TOL.conservation_x64 if dtype == jnp.float64 else TOL.conservation_f32)


@pytest.mark.slow
def test_in_float32_edges_add_up_and_are_interventions():
    _, tcs, trace, prepared = make_trace(jnp.float32, guidance=1.0)
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, 3)
    print(f"float32: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_f32
    assert caused <= TOL.direct_f32


@pytest.mark.slow
def test_a_streamed_and_a_sharded_record_are_the_resident_one(tmp_path):
    pipe, tcs = make(jnp.float32)
    same_wherever_weights_lie(pipe, tcs, PROMPT, pipe.plan(**SIZE), tmp_path)
