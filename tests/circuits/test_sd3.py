"""The laws on Stable Diffusion 3's stacks: no positions in attention, a second attention, a last block without a text
MLP. Nothing outside `models` knows of these.

The text encoders are FLUX.1's small ones: what they make of a prompt is of no matter here.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import IMG, TXT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline, save_pipeline
from difffract_jax.models.pipeline import generate
from difffract_jax.models.sd3 import Sd3Config, Sd3MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import random_pipeline, random_weights
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.transcoders.sites import parse_sites
from laws import conservation, intervention_error
from tolerances import TOL, relative_error
from traces import make_transcoders

COMMON = {
    "depth_double": 4,
    "heads": 2,
    "head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_width": 24,
    "pooled_width": 16,
    "table": 6,
}
MEDIUM = Sd3Config(**COMMON)
MEDIUM_35 = Sd3Config(**COMMON, depth_dual=2, qk_norm=True)
LAYERS = {"img": (0, 1, 2, 3), "txt": (0, 1, 2)}
SIZE = {"height": 24, "width": 32, "text_tokens": 8}


def make(dtype, shape=MEDIUM_35):
    """A pipeline around such a model, and transcoders of every site."""
    pipe = random_pipeline(dtype=dtype)
    model = random_weights(abstract_module(Sd3MMDiT, shape, dtype), 3)
    pipe = pipe._replace(transformer=model, config=replace(pipe.config, transformer=shape))
    return pipe, make_transcoders(shape, dtype=dtype, skip=True, **LAYERS)


def make_trace(dtype, shape=MEDIUM_35):
    pipe, tcs = make(dtype, shape)
    trace = capture(pipe, tcs, "a red circle", step=1, output=True, run=pipe.plan(**SIZE))
    return pipe, tcs, trace, prepare_step(trace, tcs)


@pytest.fixture(scope="module")
def traced():
    """A trace of a model with all three kinds of blocks, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return make_trace(jnp.float64)


@pytest.fixture
def exact(traced, x64):
    """The same, for a test in float64."""
    return traced


def held_to_the_laws(made, conserved_to, caused_to):
    _, tcs, trace, prepared = made
    conserved, caused = conservation(trace, tcs, prepared), intervention_error(trace, tcs, prepared, 5)
    print(f"conservation {conserved:.1e}, edge against intervention {caused:.1e}")
    assert conserved <= conserved_to
    assert caused <= caused_to


@pytest.mark.slow
def test_in_float64_the_replacement_is_the_model_and_every_edge_an_intervention(exact):
    _, _, trace, prepared = exact
    reading = jax.jit(run_replacement)(*prepared)
    assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    assert not np.any(trace.record.mlp_out[-1]) and not np.any(trace.record.mlp_in[-1])
    held_to_the_laws(exact, TOL.conservation_x64, TOL.intervention_x64)


def test_the_last_block_has_no_text_site():
    layout = MEDIUM_35.layout
    assert layout.describe() == "img/0 to img/3 and txt/0 to txt/2"
    assert [stack.name for stack in layout.stacks] == ["dual", "double", "last"]
    assert parse_sites(["*/*"], layout).names == tuple([f"img/{n}" for n in range(4)] + [f"txt/{n}" for n in range(3)])
    with pytest.raises(UserError, match="txt/3 does not exist: the model has img/0 to img/3 and txt/0 to txt/2"):
        parse_sites(["txt/3"], layout)
    names = layout.modulation_name(0, IMG, 8), layout.modulation_name(3, TXT, 1), layout.modulation_name(3, IMG, 5)
    assert names == ("img/0/attn2_gate", "txt/3/attn_scale", "img/3/mlp_gate")


@pytest.mark.slow
def test_a_streamed_record_is_the_resident_one_and_a_span_adds_up(tmp_path):
    pipe, tcs = make(jnp.float32)
    save_pipeline(pipe, tmp_path / "model")
    run, made = pipe.plan(**SIZE), []
    for weights in ("device", "disk"):
        one = load_pipeline(tmp_path / "model", weights=weights)
        span = capture_steps(one, tcs, "a red circle", first=1, last=2, run=run)
        made.append(leaf_paths([trace.record._replace(weights=None) for trace in span.traces]))
    assert made[0].keys() == made[1].keys()
    assert all(relative_error(leaf, made[0][path]) <= TOL.f32_run for path, leaf in made[1].items() if np.any(leaf))
    graph = attribute(span, tcs, target=strongest_feature(span, tcs, "img", 3), max_nodes=6)
    assert np.max(graph.conservation_error) <= TOL.conservation_steps_f32
    assert generate(pipe, "a red circle", run=run).image.shape == (24, 32, 3)
