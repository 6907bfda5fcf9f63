"""A model with a kind of stack that the package does not have: everything works on it, since no one asks for FLUX's.

Between the double- and the single-stream blocks stand blocks of the image stream alone, without attention: a modulated
norm and a gated MLP, whose up-projection has no bias.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.address import IMG, Group, Layout, Stack
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, pull_rows
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.checks.faithfulness import live_reading
from difffract_jax.circuits.effects.attention import head_loadings
from difffract_jax.circuits.effects.readings import edited
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.graphs.graph import FEATURE, SCORE, Graph
from difffract_jax.models.blocks import BlockActs, FluxConfig
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.pipeline import generate
from difffract_jax.models.tiny import TINY, random_pipeline, random_weights
from difffract_jax.ops import film, layer_norm
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet
from laws import conservation, doubled_sources
from tolerances import TOL, relative_error

LENS = Group("lens", "lens", ("img",))
DEPTH = 2
LAYERS = {"img": (0, 2), "txt": (1,), "lens": (0, 1), "joint": (1,)}
SIZE = {"height": 24, "width": 32, "text_tokens": 8}


class LensBlock(nnx.Module):
    """A block of the image stream alone."""

    groups: ClassVar[tuple[Group, ...]] = (LENS,)

    def __init__(self, config, *, rngs, dtype=jnp.float32):
        self.mod = nnx.Linear(config.d_model, 3 * config.d_model, param_dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.d_model, config.d_ff, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.d_ff, config.d_model, param_dtype=dtype, rngs=rngs)

    def __call__(self, h, cond, *, frozen=None, mlp=None, heads=None):
        shift, scale, gate = self._modulation(cond)
        normed, inv_std = layer_norm(h[0], frozen)
        x = film(normed, scale, shift)
        y = self.run_mlp(0, x) if mlp is None else mlp(0, x)
        after = h[0] + gate[None] * y
        return (after,), BlockActs(inv_std, (x,), (y,), (after,))

    def run_mlp(self, group, x):
        return self.down(jax.nn.silu(self.up(x)))

    def gates(self, cond, frozen=None):
        return (self._modulation(cond)[2],)

    def entry(self, cond, frozen):
        scale = self._modulation(cond)[1]

        def enter(gradients, group, row):
            del group
            inv_std = frozen.at[row].get(mode="clip")
            origin = jnp.zeros_like(gradients)
            _, pull = jax.vjp(lambda h: film(layer_norm(h, inv_std)[0], scale, jnp.zeros_like(scale)), origin)
            rows = jnp.zeros((gradients.shape[0], frozen.shape[0], gradients.shape[1]), gradients.dtype)
            return (rows.at[jnp.arange(row.shape[0]), row].set(pull(gradients)[0], mode="drop"),)

        return enter

    @staticmethod
    def attention_shape(frozen):
        return None

    def _modulation(self, cond):
        return self.mod(jax.nn.silu(cond.vec)).reshape(3, -1)


@dataclass(frozen=True, kw_only=True)
class LensConfig(FluxConfig):
    """FLUX's shape, with the other stack in between."""

    @property
    def layout(self):
        double, single = super().layout.stacks
        return Layout((double, Stack("lens", DEPTH, (LENS,)), single))


class LensModel(MMDiT):
    """FLUX with the other stack in between."""

    def __init__(self, config, *, rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        build = jax.vmap(lambda key: LensBlock(config, rngs=nnx.Rngs(key), dtype=dtype))
        self.lens = build(jax.random.split(rngs.params(), DEPTH))


SETTINGS = {"max_nodes": 20, "expansion_batch": 2 * sum(map(len, LAYERS.values()))}
"""As many targets together as the laws pull back: one program for all."""


def make(dtype):
    """A pipeline around such a model, and transcoders at sites of every stack."""
    pipe = random_pipeline(dtype=dtype)
    config = LensConfig(**{field.name: getattr(TINY, field.name) for field in fields(TINY)})
    abstract = jax.eval_shape(lambda: LensModel(config, rngs=nnx.Rngs(0), dtype=dtype))
    model = random_weights(abstract, 3)
    pipe = pipe._replace(transformer=model, config=replace(pipe.config, transformer=config))
    shape = TranscoderConfig(d_model=config.d_model, features=40, time_embed=8, conditioning="film", skip=True)
    stacks = {}
    for number, (name, numbers) in enumerate(LAYERS.items()):
        build = jax.vmap(lambda key: Transcoder(shape, rngs=nnx.Rngs(key), dtype=dtype))
        stacks[name] = random_weights(jax.eval_shape(build, jax.random.split(jax.random.key(0), len(numbers))), number)
        stacks[name].enc.bias[...] = jax.device_put(np.asarray(stacks[name].enc.bias[...]) - 1)
    return pipe, TranscoderSet(stacks, sites_of(LAYERS, config.layout.groups), shape, "lens")


@pytest.fixture(scope="module")
def traced():
    """A pipeline, transcoders, a trace and its step in float64, made once."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        pipe, tcs = make(jnp.float64)
        trace = capture(pipe, tcs, "a red circle", step=1, output=True, run=pipe.plan(**SIZE))
        return pipe, tcs, trace, prepare_step(trace, tcs)


@pytest.fixture
def made(traced, x64):
    """The same, for a test in float64."""
    return traced


def test_the_replacement_is_the_model_and_edges_and_bias_add_up(made):
    _, tcs, trace, prepared = made
    reading = jax.jit(run_replacement)(*prepared)
    assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    assert conservation(trace, tcs, prepared) <= TOL.conservation_x64


def test_edges_of_every_stack_are_direct_interventions(made):
    _, tcs, trace, prepared = made
    differences, edges = doubled_sources(trace, tcs, prepared, len(LAYERS))
    assert np.max(differences) <= TOL.intervention_x64 * np.abs(edges).max()


def test_readings_agree_where_nothing_is_edited(made):
    _, _, trace, prepared = made
    zeros = jax.device_put(jax.tree.map(np.zeros_like, trace.record.mlp_out))
    ones = [np.ones((x.shape[0], 1, 40)) for x in trace.record.mlp_in]
    run = jax.jit(edited, static_argnums=3)
    for mode in ("direct", "propagated", "live", "full"):
        reading = run(prepared, ones, jax.tree.map(np.zeros_like, ones), mode)
        assert relative_error(reading.velocity, trace.record.velocity) <= TOL.x64
    assert relative_error(live_reading(prepared, zeros).velocity, trace.record.velocity) <= TOL.x64


def test_a_graph_reaches_features_of_the_foreign_stack_and_adds_up(made, tmp_path):
    pipe, tcs, trace, _ = made
    target = strongest_feature(trace, tcs, "single", 1)
    graph = attribute(trace, tcs, target=target, **SETTINGS)
    lens = trace.info.layout.labels["lens"]
    assert np.any((graph.node_kind == FEATURE) & np.isin(graph.node_block, lens) & (graph.node_stream == IMG))
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    graph.save(tmp_path / "g.npz")
    again = Graph.load(tmp_path / "g.npz")
    assert again.provenance.run.layout == pipe.config.transformer.layout
    own = attribute(trace, tcs, target=strongest_feature(trace, tcs, "lens", 1), **SETTINGS)
    assert np.max(own.conservation_error) <= TOL.conservation_x64


@pytest.mark.slow
def test_heads_and_no_hop_add_up_across_a_stack_without_attention(made):
    _, tcs, trace, _ = made
    engine = make_engine(trace, tcs)
    table = engine.table
    rows = np.flatnonzero((table.kind == FEATURE) & (table.value > 0) & (table.block == table.block.max() - 0))
    row = rows[np.argmax(table.value[rows])]
    edges = pull_rows(engine, np.array([row]), 1).edges[0]
    loadings = head_loadings(engine, int(row))
    assert relative_error(loadings.loading.sum(axis=0) + loadings.direct, edges) <= TOL.x64
    assert not np.isin(loadings.block, trace.info.layout.labels["lens"]).any()


@pytest.mark.slow
def test_a_span_of_steps_adds_up_and_images_are_generated():
    pipe, tcs = make(jnp.float32)
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(**SIZE))
    graph = attribute(span, tcs, target=strongest_feature(span, tcs, "lens", 0), max_nodes=6)
    assert np.max(graph.conservation_error) <= TOL.conservation_steps_f32
    assert generate(pipe, "a red circle", run=pipe.plan(**SIZE)).image.shape == (24, 32, 3)


@pytest.mark.slow
def test_attention_is_explained_around_blocks_without_any(made):
    _, tcs, trace, _ = made
    target = strongest_feature(trace, tcs, "single", 1)
    graph = attribute(trace, tcs, target=target, max_nodes=4, attention="explained", max_scores=8)
    (told,) = graph.provenance.attention
    assert abs(told.total - told.forward) <= TOL.conservation_x64 * told.absolute
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    blocks = np.unique(graph.node_block[graph.node_kind == SCORE])
    assert np.any(graph.node_head >= 0) and not np.isin(blocks, trace.info.layout.labels["lens"]).any()
