"""The laws on Z-Image's stacks: norms behind sublayers, refiners of one stream, learned tokens and hidden ones.

Nothing outside `models` knows of these. A transcoder stands in for an MLP and the norm behind it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placements import same_wherever_weights_lie
from zimage import tiny_pipeline

from difffract_jax.address import TXT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.effects.readings import edited
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.graphs.graph import SCORE
from difffract_jax.loading import load_pipeline
from difffract_jax.models.stacks import slice_layer
from laws import conservation, intervention_error
from tolerances import TOL, relative_error
from traces import make_transcoders

PROMPT, SIZE = "a red", {"height": 32, "width": 64, "text_tokens": 64, "steps": 4}
OWN, SEEN = 24, 32
"""Tokens of the prompt in its template, and those that attention sees, learned ones included."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    made = tmp_path_factory.mktemp("zimage") / "diffusers"
    tiny_pipeline().save_pretrained(made)
    return made


def make(home, dtype):
    """The small pipeline, and transcoders of every site."""
    pipe = load_pipeline(home, dtype=dtype)
    sites = {"img": (0, 1), "txt": (0, 1), "joint": (0, 1)}
    return pipe, make_transcoders(pipe.config.transformer, **sites, dtype=dtype, skip=True)


@pytest.fixture(scope="module")
def traced(home):
    """A trace in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        pipe, tcs = make(home, jnp.float64)
        trace = capture(pipe, tcs, PROMPT, step=1, output=True, run=pipe.plan(**SIZE))
        return pipe, tcs, trace, prepare_step(trace, tcs)


@pytest.fixture
def exact(traced, x64):
    """The same, for a test in float64."""
    return traced


def test_in_float64_the_replacement_is_the_model_and_every_edge_an_intervention(exact):
    _, tcs, trace, prepared = exact
    reading = jax.jit(run_replacement)(*prepared)
    assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, 3)
    print(f"conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_x64
    assert caused <= TOL.intervention_x64


def test_no_edge_comes_from_text_that_is_hidden_and_learned_tokens_are_seen(exact):
    _, tcs, trace, _ = exact
    seen = np.any(np.asarray(trace.record.text) != 0, axis=-1)
    assert np.array_equal(seen, np.arange(64) < SEEN) and trace.record.replaceable_text.sum() == OWN
    for stack, frozen in zip(trace.record.weights.stacks[1:], trace.record.frozen[1:], strict=True):
        for layer in range(2):
            q, k = stack.queries_and_keys(slice_layer(frozen, layer))
            pattern = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5)
            assert not np.any(pattern[..., SEEN:64]) and np.all(pattern[..., :SEEN] > 0)
    graph = attribute(trace, tcs, target=strongest_feature(trace, tcs, "single", 1), max_nodes=200)
    words = graph.node_position[graph.node_stream == TXT]
    assert graph.largest_conservation_error <= TOL.conservation_x64
    assert np.any(words < OWN) and np.any((words >= OWN) & (words < SEEN)) and not np.any(words >= SEEN)


@pytest.mark.slow
def test_a_graph_adds_up_with_attention_explained_and_no_hidden_token_is_a_key(exact):
    _, tcs, trace, prepared = exact
    for label in ("img", "txt", "single"):  # a key is a row of its own stack's sequence
        target = strongest_feature(trace, tcs, label, 1)
        graph = attribute(trace, tcs, target=target, max_nodes=6, attention="explained", max_scores=40)
        (explained,) = graph.provenance.attention
        assert abs(explained.total - explained.forward) <= TOL.conservation_x64 * explained.absolute
        assert np.max(graph.conservation_error) <= TOL.conservation_x64
        scores = (graph.node_kind == SCORE) & (graph.node_key_position >= 0)  # a block's others are one node
        hidden = (graph.node_key_stream == TXT) & (graph.node_key_position >= SEEN)
        assert scores.sum() == 40 and not np.any(scores & hidden)
    # Live, frozen and read off for one head: all see the same pattern.
    ones = [jnp.ones((x.shape[0], 1, 40)) for x in trace.record.mlp_in]
    for mode in ("direct", "live", "full"):
        reading = edited(prepared, ones, jax.tree.map(jnp.zeros_like, ones), mode)
        assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64


@pytest.mark.slow
def test_steps_add_up_in_either_precision(home, x64):
    for dtype, bar in ((jnp.float64, TOL.conservation_x64), (jnp.float32, TOL.conservation_steps_f32)):
        pipe, tcs = make(home, dtype)
        span = capture_steps(pipe, tcs, PROMPT, first=0, last=3, run=pipe.plan(**SIZE))
        graph = attribute(span, tcs, target=resolve_target(pipe, span, parse_target("velocity:")), max_nodes=8)
        error = float(np.max(graph.conservation_error))
        print(f"four steps, {np.dtype(dtype).name}: conservation {error:.1e}")
        assert error <= bar


@pytest.mark.slow
def test_in_float32_edges_add_up_and_are_interventions(home):
    pipe, tcs = make(home, jnp.float32)
    trace = capture(pipe, tcs, PROMPT, step=1, output=True, run=pipe.plan(**SIZE))
    prepared = prepare_step(trace, tcs)
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, 3)
    print(f"float32: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_f32
    assert caused <= TOL.direct_f32


@pytest.mark.slow
def test_a_streamed_and_a_sharded_record_are_the_resident_one(home, tmp_path):
    pipe, tcs = make(home, jnp.float32)
    same_wherever_weights_lie(pipe, tcs, PROMPT, pipe.plan(**SIZE), tmp_path)
