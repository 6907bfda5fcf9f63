"""A trace over devices that split its weights: the same numbers as on one, and nothing large on every device."""

import json
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from difffract_jax import ops
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pullback import PullOptions
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.cli import main as cli
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import MODULATION, SCORE, WORD, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.loading import PARTS, save_pipeline, save_transcoders
from difffract_jax.models.pipeline import generate
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.sharding import make_mesh, traced_pipeline, traced_transcoders
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error
from traces import make_transcoders, same_graph

SIZE = {"height": 32, "width": 32, "text_tokens": 16}
EDGE = 1e-6
"""Largest difference of an edge over the largest edge: sums in another order."""
ALL = {"data": 2, "site": 2, "feature": 2}
SMALL = 8192
"""Bytes below which an array of the tiny trace may lie on every device."""


@cache
def whole():
    """A pipeline whose heads four devices can split, and its transcoders, on one device."""
    pipe = random_pipeline(transformer=replace(TINY, heads=8, head_dim=8, rope_axes=(4, 2, 2)))
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(1,), joint=(1,), dtype=jnp.float32)
    return pipe, tcs


def split(mesh):
    """Returns the same on a mesh."""
    pipe, tcs = whole()
    spread, place = traced_pipeline(mesh), traced_transcoders(mesh).tree
    parts = {name: getattr(pipe, name) for name in PARTS}
    placed = {name: jax.device_put(tree, spread(name, tree)) for name, tree in parts.items()}
    stacks = {name: jax.device_put(stack, place(stack)) for name, stack in tcs.stacks.items()}
    return pipe._replace(**placed), tcs._replace(stacks=stacks)


def traced(pipe, tcs, mesh=None, **more):
    """Returns a graph of a colour and of a feature."""
    trace = capture(pipe, tcs, "a red circle", step=1, output=True, run=pipe.plan(**SIZE))
    output = resolve_target(pipe, trace, parse_target("pixels:color=red,box=8,8,24,20"))
    targets = [(output, 2.0), (strongest_feature(trace, tcs, "img", 2), 1.0)]
    live = {"pipe": pipe} if "pooled" in more else {}
    return attribute(trace, tcs, target=targets, max_nodes=30, expansion_batch=7, mesh=mesh, **live, **more)


@cache
def alone():
    return traced(*whole())


def replicated(tree, ways):
    """Returns the paths of arrays of more than `SMALL` bytes of which a device holds more than its part."""
    return [
        path
        for path, leaf in leaf_paths(tree).items()
        if leaf.nbytes > SMALL and leaf.addressable_shards[0].data.nbytes * ways > leaf.nbytes
    ]


def test_a_trace_recorded_encoded_and_pulled_back_on_a_mesh_is_that_of_one_device():
    mesh = make_mesh(ALL)
    shared = traced(*split(mesh), mesh)
    same_graph(shared, alone(), EDGE)
    assert shared.largest_conservation_error <= TOL.conservation_f32
    assert relative_error(shared.target_preactivation, alone().target_preactivation) <= TOL.sharded
    paths = zip(shared.provenance.pooled_path, alone().provenance.pooled_path, strict=True)
    assert all(a.without == pytest.approx(b.without, rel=1e-4) for a, b in paths)


def test_what_lies_on_one_device_is_split_by_attribution_itself():
    same_graph(traced(*whole(), make_mesh(ALL)), alone(), EDGE)


def test_nothing_large_lies_on_every_device():
    mesh, ways = make_mesh(ALL), 4
    pipe, tcs = split(mesh)
    trace = capture(pipe, tcs, "a red circle", step=1, output=True, run=pipe.plan(**SIZE))
    record = trace.record
    recorded = (record.frozen, record.mlp_in, record.mlp_out, record.unpooled.mlp_in)
    assert replicated(recorded, ways) == []
    prepared = prepare(trace, tcs)
    assert replicated([step.sources for step in prepared.steps], ways) == []
    engine = make_engine(prepared, tcs, (), PullOptions(mesh))
    assert replicated((engine.steps, [one.mlp_in for one in engine.constants]), ways) == []
    decoder, heads = engine.steps[0].sites[0].stack.dec.kernel, record.frozen[0].q
    assert decoder.sharding.shard_shape(decoder.shape)[2] == decoder.shape[2] // ways
    assert heads.sharding.shard_shape(heads.shape)[2] == heads.shape[2] // ways


@pytest.mark.slow
def test_attention_in_blocks_goes_through_heads_of_all_devices_at_once(monkeypatch):
    sizes = {"height": 32, "width": 24, "text_tokens": 16}

    def velocity(pipe):
        return generate(pipe, "a red circle", run=pipe.plan(steps=1, **sizes)).latents

    pipe, mesh = whole()[0], make_mesh({"feature": 4})
    expected = velocity(pipe)
    monkeypatch.setattr(ops, "WHOLE_PATTERN", 0)
    monkeypatch.setattr(ops, "PATTERN_BLOCK", 512)
    jax.clear_caches()
    assert relative_error(velocity(split(mesh)[0]), expected) <= TOL.f32_run


@pytest.mark.slow
def test_a_span_of_steps_on_a_mesh_is_that_of_one_device():
    def graph(pipe, tcs, mesh=None):
        span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(**SIZE))
        output = resolve_target(pipe, span, parse_target("velocity:"))
        return attribute(span, tcs, target=output, max_nodes=12, expansion_batch=5, mesh=mesh)

    mesh = make_mesh(ALL)
    ours, expected = graph(*split(mesh), mesh), graph(*whole())
    same_graph(ours, expected, EDGE)
    assert ours.largest_conservation_error <= TOL.conservation_steps_f32


@pytest.mark.slow
def test_attention_is_explained_on_a_mesh_as_on_one_device():
    mesh, more = make_mesh(ALL), {"attention": "explained", "max_scores": 12}
    ours, expected = traced(*split(mesh), mesh, **more), traced(*whole(), **more)
    same_graph(ours, expected, EDGE)
    assert np.sum(expected.node_kind == SCORE) > 12 and ours.largest_conservation_error <= TOL.conservation_f32
    for name in ("node_value", "edge_query", "edge_remainder"):
        assert relative_error(getattr(ours, name), getattr(expected, name)) <= TOL.sharded
    pairs = zip(ours.provenance.attention, expected.provenance.attention, strict=True)
    assert all(abs(a.forward - b.forward) <= TOL.sharded * b.absolute for a, b in pairs)


@pytest.mark.slow
def test_the_pooled_path_over_two_steps_is_explained_on_a_mesh_as_on_one_device():
    def graph(pipe, tcs, mesh=None):
        span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(**SIZE))
        output = resolve_target(pipe, span, parse_target("pixels:color=red,box=8,8,24,20"))
        settings = {"max_nodes": 6, "expansion_batch": 5, "min_attribution": 0.0, "pooled": "explained", "pipe": pipe}
        return attribute(span, tcs, target=output, mesh=mesh, **settings)

    mesh = make_mesh({"data": 2, "feature": 2})
    ours, expected = graph(*split(mesh), mesh), graph(*whole())
    assert ours.largest_conservation_error <= TOL.conservation_f32
    assert {*expected.node_step[expected.node_kind == MODULATION]} == {1, 2}
    (told,), (other,) = ours.provenance.pooled, expected.provenance.pooled
    mine, theirs = pooled_edges(ours), pooled_edges(expected)
    assert mine.keys() == theirs.keys() and len(theirs) > 50
    assert all(abs(mine[ends] - value) <= TOL.sharded * other.absolute for ends, value in theirs.items())
    for name in ("total", "absolute", "direct", "unspoken"):
        assert abs(getattr(told, name) - getattr(other, name)) <= TOL.sharded * other.absolute


def pooled_edges(graph):
    """Returns the edges of modulations, and of words as CLIP reads them, by the names of their ends."""
    mine, names = np.isin(graph.node_kind[graph.edge_source], (MODULATION, WORD)), node_names(graph)
    ends = graph.edge_source[mine], graph.edge_target[mine], graph.edge_attribution[mine]
    return {(names[source], names[target]): value for source, target, value in zip(*ends, strict=True)}


@pytest.mark.slow
def test_bfloat16_products_on_a_mesh_tell_their_error():
    mesh = make_mesh(ALL)
    told = traced(*split(mesh), mesh, precision="bf16").provenance.precision
    assert 1e-4 < told.edge_error <= TOL.bf16


def test_a_mesh_that_divides_nothing_is_refused_before_anything_is_moved():
    pipe, tcs = whole()
    with pytest.raises(UserError) as error:
        traced(pipe, tcs, make_mesh({"feature": 7}))
    assert "splits a trace 7 ways (site x feature), which divides neither its 64 channels nor its 40 features" in str(
        error.value
    )
    with pytest.raises(UserError, match="splits the model 7 ways .* neither its 8 heads nor its 256 MLP columns"):
        traced_pipeline(make_mesh({"feature": 7}))("transformer", pipe.transformer)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the pipeline and of its transcoders."""
    pipe, tcs = whole()
    folder = tmp_path_factory.mktemp("saved")
    save_pipeline(pipe, folder / "pipe")
    save_transcoders(tcs, folder / "tcs")
    return folder


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["difffract", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


SIZES = ("--height", 32, "--width", 32, "--text-tokens", 16)


def test_a_command_takes_a_mesh(saved, monkeypatch, capsys):
    images = []
    for name, mesh in (("one", ()), ("many", ("--mesh", "site=2,feature=2"))):
        image = saved / f"step-{name}.png"
        asked = ("generate", saved / "pipe", "a red circle", *SIZES, "--steps", 1, *mesh, "--out", image)
        status, _, err = run(monkeypatch, capsys, *asked)
        assert status == 0, err
        images.append(np.asarray(Image.open(image)).astype(int))
    assert np.max(np.abs(images[1] - images[0])) <= 1


@pytest.mark.slow
def test_traces_and_images_of_commands_on_a_mesh_are_those_of_one_device(saved, monkeypatch, capsys):
    graphs, images = {}, {}
    for name, mesh, image_mesh in (
        ("one", (), ()),
        ("many", ("--mesh", "data=2,site=2,feature=2"), ("--mesh", "site=2,feature=2")),
    ):
        asked = ("trace", saved / "pipe", saved / "tcs", "a red circle", "--target", "img/2/f3", "--max-nodes", 8)
        status, out, err = run(monkeypatch, capsys, *asked, *SIZES, *mesh, "--out", saved / f"{name}.npz", "--json")
        assert status == 0, err
        assert json.loads(out)["conservation error"] <= TOL.conservation_f32
        graphs[name] = Graph.load(saved / f"{name}.npz")
        image = saved / f"{name}.png"
        status, _, err = run(
            monkeypatch, capsys, "generate", saved / "pipe", "a red circle", *SIZES, *image_mesh, "--out", image
        )
        assert status == 0, err
        images[name] = np.asarray(Image.open(image)).astype(int)
    same_graph(graphs["many"], graphs["one"], EDGE)
    assert np.max(np.abs(images["many"] - images["one"])) <= 1


@pytest.mark.parametrize(
    ("mesh", "told"),
    [
        ("feature=7", "splits the model 7 ways (site x feature), which divides neither its 8 heads"),
        ("feature=16", "needs 16 devices, but only 8 are here"),
        ("heads=2", "`heads` is not a mesh axis"),
        ("data=2,feature=4", "One image leaves the mesh axis data idle"),
    ],
)
def test_a_mesh_that_cannot_be_ends_a_command_with_a_sentence(saved, monkeypatch, capsys, mesh, told):
    out = saved / "never.png"
    status, printed, err = run(monkeypatch, capsys, "generate", saved / "pipe", "a", "--mesh", mesh, "--out", out)
    assert (status, printed) == (1, "") and told in err and "Traceback" not in err
    asked = ("trace", saved / "pipe", saved / "tcs", "a", "--target", "img/2/f3", "--weights", "disk")
    status, printed, err = run(monkeypatch, capsys, *asked, "--mesh", "feature=4", "--out", out.with_suffix(".npz"))
    assert (status, printed) == (1, "") and "--mesh splits weights that lie on its devices" in err
    assert not out.exists() and not out.with_suffix(".npz").exists()
