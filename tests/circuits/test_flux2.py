"""The laws on FLUX.2's stacks, whose modulations are shared and whose MLPs are gated: nothing outside `models` changes.

The text encoders are FLUX.1's small ones: what they make of a prompt is of no matter here.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.effects.readings import edited
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.loading import load_pipeline, save_pipeline
from difffract_jax.models.flux2 import Flux2Config, Flux2MMDiT
from difffract_jax.models.pipeline import generate
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import random_pipeline, random_weights
from difffract_jax.storage.checkpoint import leaf_paths
from laws import conservation, intervention_error
from tolerances import TOL, relative_error
from traces import make_transcoders

SHAPE = Flux2Config(
    depth_double=2,
    depth_single=2,
    heads=2,
    head_dim=16,
    rope_axes=(4, 4, 4, 4),
    in_channels=16,
    out_channels=16,
    text_width=24,
)
LAYERS = {"img": (0, 1), "txt": (1,), "joint": (1,)}
SIZE = {"height": 24, "width": 32, "text_tokens": 8}


def make(dtype):
    """A pipeline around such a model, and transcoders of every group of sites."""
    pipe = random_pipeline(dtype=dtype)
    model = random_weights(abstract_module(Flux2MMDiT, SHAPE, dtype), 3)
    pipe = pipe._replace(transformer=model, config=replace(pipe.config, transformer=SHAPE))
    return pipe, make_transcoders(SHAPE, dtype=dtype, skip=True, **LAYERS)


def make_trace(dtype):
    pipe, tcs = make(dtype)
    trace = capture(pipe, tcs, "a red circle", step=1, output=True, run=pipe.plan(**SIZE))
    return pipe, tcs, trace, prepare_step(trace, tcs)


@pytest.fixture
def exact(x64):
    return make_trace(jnp.float64)


def test_in_float64_the_replacement_is_the_model_and_every_edge_an_intervention(exact):
    _, tcs, trace, prepared = exact
    reading = jax.jit(run_replacement)(*prepared)
    assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    assert trace.record.unpooled is None, "nothing pooled enters, so that there is nothing to exchange"
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, len(LAYERS))
    print(f"float64: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_x64
    assert caused <= TOL.intervention_x64


@pytest.mark.slow
def test_in_float32_edges_add_up_and_are_interventions():
    _, tcs, trace, prepared = make_trace(jnp.float32)
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, len(LAYERS))
    print(f"float32: conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= TOL.conservation_f32
    assert caused <= TOL.direct_f32


@pytest.mark.slow
def test_readings_agree_where_nothing_is_edited(exact):
    _, _, trace, prepared = exact
    ones = [jnp.ones((x.shape[0], 1, 40)) for x in trace.record.mlp_in]
    for mode in ("direct", "live", "full"):
        reading = edited(prepared, ones, jax.tree.map(jnp.zeros_like, ones), mode)
        assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64


@pytest.mark.slow
def test_a_graph_adds_up_with_attention_explained(exact):
    _, tcs, trace, _ = exact
    target = strongest_feature(trace, tcs, "single", 1)
    graph = attribute(trace, tcs, target=target, max_nodes=6, attention="explained", max_scores=8)
    (explained,) = graph.provenance.attention
    assert abs(explained.total - explained.forward) <= TOL.conservation_x64 * explained.absolute
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    assert graph.provenance.pooled_path == ()


@pytest.mark.slow
def test_a_streamed_record_is_the_resident_one(tmp_path):
    pipe, tcs = make(jnp.float32)
    save_pipeline(pipe, tmp_path / "model")
    pipes = [load_pipeline(tmp_path / "model", weights=weights) for weights in ("device", "disk")]
    run, made = pipe.plan(**SIZE), []
    for one in pipes:
        span = capture_steps(one, tcs, "a red circle", first=1, last=2, run=run)
        made.append(leaf_paths([trace.record._replace(weights=None) for trace in span.traces]))
    assert made[0].keys() == made[1].keys()
    assert all(relative_error(leaf, made[0][path]) <= TOL.f32_run for path, leaf in made[1].items() if leaf.size)


@pytest.mark.slow
def test_a_span_of_steps_adds_up_and_images_are_generated():
    pipe, tcs = make(jnp.float32)
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(**SIZE))
    graph = attribute(span, tcs, target=strongest_feature(span, tcs, "single", 1), max_nodes=6)
    assert np.max(graph.conservation_error) <= TOL.conservation_steps_f32
    assert generate(pipe, "a red circle", run=pipe.plan(**SIZE)).image.shape == (24, 32, 3)
