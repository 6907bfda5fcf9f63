"""A streamed model and streamed transcoders give what resident ones give: images, records, graphs, spans."""

import shutil
import weakref
from concurrent.futures import Future
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax import attribute, capture, random_pipeline, random_transcoders, strongest_feature
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import target_row
from difffract_jax.circuits.checks.completeness import mean_values
from difffract_jax.circuits.checks.faithfulness import ablate
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.circuits.editing.interventions import steer
from difffract_jax.circuits.editing.ranking import rank_features
from difffract_jax.circuits.editing.sweeps import sweep
from difffract_jax.circuits.effects.attention import head_loadings, score_parts
from difffract_jax.circuits.effects.effect_tables import strongest
from difffract_jax.circuits.effects.readings import Mode, scaled
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.frozen import streamed_sites
from difffract_jax.circuits.frozen.replacement import prepare, residuals
from difffract_jax.circuits.frozen.streamed_sites import RowLayers
from difffract_jax.circuits.frozen.targets import Targets
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import SCORE
from difffract_jax.graphs.names import node_names
from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline, save_transcoders
from difffract_jax.memory import allow
from difffract_jax.models.blocks import Cond
from difffract_jax.models.pipeline import generate
from difffract_jax.models.stacks import run_stack
from difffract_jax.models.streaming import READING, HostLayers, Streamed, aligned, streams_layers, wait_for
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.layers import FileLayers
from tolerances import TOL
from traces import SAME_EDGES, layer_of, same_edges

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    home = tmp_path_factory.mktemp("streamed")
    pipe = random_pipeline()
    save_pipeline(pipe, home / "model")
    save_transcoders(random_transcoders(pipe.config.transformer), home / "transcoders")
    return home


@pytest.fixture(scope="module")
def resident(saved):
    return load_pipeline(saved / "model"), load_transcoders(saved / "transcoders")


IN_HOST_TOO = pytest.mark.parametrize("streamed", ["disk", pytest.param("host", marks=pytest.mark.slow)], indirect=True)
"""Weights in host memory too: what comes after a layer was fetched is the same for both."""


@pytest.fixture(scope="module", params=["disk"])
def streamed(saved, request):
    pipe = load_pipeline(saved / "model", weights=request.param)
    tcs = load_transcoders(saved / "transcoders", weights=request.param)
    assert streams_layers(pipe.transformer) and streams_layers(pipe.t5) and streams_layers(tcs.stacks)
    return pipe, tcs


def close(ours, theirs, tolerance):
    ours, theirs = (np.asarray(one, np.float64) for one in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs), initial=0) <= tolerance * max(np.max(np.abs(theirs), initial=0), 1e-30)


@IN_HOST_TOO
def test_identity_does_not_depend_on_where_weights_stay(resident, streamed):
    assert resident[0].source == streamed[0].source
    assert resident[1].source == streamed[1].source


class Immediate:
    """An executor that fetches a layer where the real one would begin to."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def test_a_layer_is_let_go_before_the_one_after_next_is_fetched(monkeypatch):
    fetched, there = [], []
    fetch = Streamed.fetch

    def counted(stack, layer):
        arrays = fetch(stack, layer)
        fetched.append(weakref.ref(arrays["x"]))
        there.append(sum(one() is not None for one in fetched))
        return arrays

    monkeypatch.setattr(Streamed, "fetch", counted)
    monkeypatch.setattr("difffract_jax.models.streaming.ThreadPoolExecutor", Immediate)
    layers = [{"x": np.full(3, number, np.float32)} for number in range(5)]
    read = []
    for layer in Streamed(HostLayers(layers, layers[0]), (), tuple(range(5))):
        read.append(int(layer["x"][0]))
        del layer
    assert read == [0, 1, 2, 3, 4]
    assert there == [1, 2, 2, 2, 2]


@IN_HOST_TOO
def test_images_are_the_same(resident, streamed):
    theirs, ours = (generate(pipe, PROMPT, seed=3) for pipe in (resident[0], streamed[0]))
    np.testing.assert_array_equal(ours.image, theirs.image)
    close(ours.latents, theirs.latents, 1e-5)


@IN_HOST_TOO
@pytest.mark.parametrize("output", [pytest.param(False, marks=pytest.mark.slow), True])
def test_records_are_the_same(resident, streamed, output):
    theirs, ours = (capture(*pair, PROMPT, step=1, output=output).record for pair in (resident, streamed))
    ours, theirs = (leaf_paths(one._replace(weights=None)) for one in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        close(leaf, theirs[path], 1e-5)


def test_a_slim_record_keeps_a_fraction_of_the_blocks(resident, streamed):
    theirs, ours = (capture(*pair, PROMPT).record.weights for pair in (resident, streamed))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(ours.stacks) < 0.2 * size(theirs.stacks)
    assert all(isinstance(stack, Streamed) for stack in ours.live)


@IN_HOST_TOO
@pytest.mark.parametrize("target", ["feature", pytest.param("velocity", marks=pytest.mark.slow)])
def test_graphs_are_the_same(resident, streamed, target):
    graphs = []
    for pipe, tcs in (resident, streamed):
        trace = capture(pipe, tcs, PROMPT, output=target == "velocity")
        wanted = strongest_feature(trace, tcs, "img", 2)
        if target == "velocity":
            wanted = resolve_target(pipe, trace, parse_target("velocity:contrast=a blue square"))
        graphs.append(attribute(trace, tcs, target=wanted, max_nodes=8, min_attribution=0.0))
    same_edges(*graphs)


@IN_HOST_TOO
def test_spans_are_the_same(resident, streamed):
    graphs = []
    for pipe, tcs in (resident, streamed):
        trace = prepare(capture_steps(pipe, tcs, PROMPT, first=0, last=1), tcs)
        places = [[values.shape for values in step.sources.values] for step in trace.steps]
        assert places[0] == places[1]
        graphs.append(attribute(trace, tcs, target=strongest_feature(trace, tcs, "txt", 1), max_nodes=8))
    same_edges(*graphs)


@pytest.mark.parametrize("target", ["feature", "velocity", "span", pytest.param("bf16", marks=pytest.mark.slow)])
def test_graphs_are_the_same_where_decoder_rows_are_streamed(streamed, monkeypatch, target):
    pipe, tcs = streamed
    output, precision = target == "velocity", "bf16" if target == "bf16" else "f32"
    if target == "span":
        trace = capture_steps(pipe, tcs, PROMPT, first=0, last=1)
    else:
        trace = capture(pipe, tcs, PROMPT, output=output)
    wanted = resolve_target(pipe, trace, parse_target("velocity:contrast=a blue square")) if output else None
    wanted = wanted or strongest_feature(trace, tcs, "img", 2)
    options = {"max_nodes": 8, "min_attribution": 0.0, "precision": precision}
    held, read = attribute(trace, tcs, target=wanted, **options), []
    monkeypatch.setattr(
        RowLayers, "read", lambda self, *given, real=RowLayers.read: read.append(self) or real(self, *given)
    )
    try:
        allow(4_000)
        rows = attribute(trace, tcs, target=wanted, **options)
    finally:
        allow(None)
    assert len(read) > len(tcs.sites.names)
    for name in ("edge_source", "edge_target", "edge_attribution", "target_bias", "target_preactivation"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(held, name), err_msg=name)


@IN_HOST_TOO
def test_decoder_rows_that_fit_are_held(streamed):
    pipe, tcs = streamed
    trace = capture(pipe, tcs, PROMPT)
    held, rows = (prepare(trace, tcs, rows=which).steps[0] for which in ("auto", "streamed"))
    for one, other in zip(held.sites, rows.sites, strict=True):
        if one.stack is None:  # single-stream blocks, of which none is recorded
            assert other.stack is None
            continue
        assert isinstance(other.stack, Streamed) and not isinstance(one.stack, Streamed)
        read = [other.stack.fetch(slot) for slot in range(other.stack.depth)]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda *leaves: np.stack(leaves), *read), one.stack)
        (shape,) = {jax.tree.structure(leaf) for leaf in read}
        assert shape == jax.tree.structure(other.stack.abstract())


def test_residual_streams_are_the_same_where_decoder_rows_alone_are_streamed(resident, streamed):
    trace = capture(resident[0], streamed[1], PROMPT)
    held, rows = (residuals(*prepare(trace, streamed[1], rows=which).steps[0]) for which in ("held", "streamed"))
    for one, other in zip(held, rows, strict=True):
        close(other, one, 1e-5)


def test_no_transcoder_is_fetched_for_blocks_without(resident, saved, tmp_path):
    some = random_transcoders(resident[0].config.transformer, sites={"img": (0, 2), "txt": (2,)})
    save_transcoders(some, tmp_path / "some")
    pipe, tcs = load_pipeline(saved / "model", weights="disk"), load_transcoders(tmp_path / "some", weights="disk")
    step = prepare(capture(pipe, tcs, PROMPT), tcs).steps[0]
    factors = [np.full((one.layers.slot.size, one.features), 0.5, np.float32) for one in step.sites]
    works = {"read": lambda: scaled(step, factors, "live"), "means": lambda: mean_values(step)}
    for name, work in works.items():
        begin = READING.layers
        work()
        assert READING.layers - begin == len(tcs.sites.names) == 3, name
    there = prepare(capture(resident[0], some, PROMPT), some).steps[0]
    for ours, theirs in zip(mean_values(step), mean_values(there), strict=True):
        close(ours, theirs, 1e-5)


EDITS = [Edit.parse("img/1/f3=add:2"), Edit.parse("txt/0/f5=zero")]


@IN_HOST_TOO
@pytest.mark.parametrize("form", ["replace", pytest.param("delta", marks=pytest.mark.slow)])
def test_edited_images_are_the_same(resident, streamed, form):
    theirs, ours = (steer(*pair, PROMPT, EDITS, form=form, seed=2) for pair in (resident, streamed))
    close(ours.latents, theirs.latents, 1e-5)


@IN_HOST_TOO
def test_sweeps_of_added_differences_are_the_same(resident, streamed):
    swept = [sweep(*pair, PROMPT, EDITS, (0.0, 2.0), seeds=(1, 2)) for pair in (resident, streamed)]
    close(swept[1].norms, swept[0].norms, 1e-5)
    np.testing.assert_allclose(swept[1].images.astype(int), swept[0].images.astype(int), atol=1)


def test_features_are_ranked_the_same(resident, streamed):
    theirs, ours = (rank_features(pipe, tcs, PROMPT, seeds=(1, 2), top=3) for pipe, tcs in (resident, streamed))
    assert {label: [row.feature for row in rows] for label, rows in ours.items()} == {
        label: [row.feature for row in rows] for label, rows in theirs.items()
    }


def test_heads_and_scores_are_the_same(resident, streamed):
    loadings, scores = [], []
    for pipe, tcs in (resident, streamed):
        trace = capture(pipe, tcs, PROMPT)
        engine = make_engine(trace, tcs)
        row = target_row(engine, strongest_feature(trace, tcs, "img", 2))
        loadings.append(head_loadings(engine, row).loading)
        scores.append(score_parts(engine, 1, 0, ("img", 3), ("txt", 1)).score)
    close(loadings[1], loadings[0], SAME_EDGES)
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_waiting_reaches_through_a_map():
    ready = []

    def slow(x):
        y = jax.jit(lambda a: jax.lax.fori_loop(0, 300, lambda _, m: jnp.tanh(m @ m), a))(x)
        if ready:
            wait_for(y)
        ready.append(y.val.is_ready())
        return y

    matrices = jnp.ones((2, 256, 256))
    jax.vmap(slow)(matrices)
    jax.vmap(slow)(matrices)
    assert ready == [False, True]


@pytest.mark.parametrize("kind", [FileLayers, HostLayers])
def test_a_stack_of_no_layers_reports_as_a_resident_one_does(resident, kind):
    stack = resident[0].transformer.double
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stack)
    if kind is HostLayers:
        source = HostLayers([], like)
    else:
        source = FileLayers(
            {}, "", jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((0, *leaf.shape), leaf.dtype), like), aligned
        )
    h = jnp.ones((4, 32)), jnp.ones((2, 32))
    half = resident[0].config.transformer.head_dim // 2
    cond = Cond(jnp.ones(32), jnp.ones((6, half)), jnp.zeros((6, half)))
    tap = lambda visit: tuple(visit.acts.mlp_in)  # noqa: E731
    none = layer_of(stack, slice(0, 0))
    for kept in (None, ((), ())):
        ours, theirs = (
            run_stack(one, h, cond, tap=tap, kept=kept)[1] for one in (Streamed(source, stack.groups, ()), none)
        )
        assert jax.tree.map(lambda leaf: leaf.shape, ours) == jax.tree.map(lambda leaf: leaf.shape, theirs)


def test_streamed_steps_get_as_many_places_without_being_read_again(streamed, monkeypatch):
    pipe, tcs = streamed
    span = capture_steps(pipe, tcs, PROMPT, first=0, last=1)
    begin = READING.layers
    made = iter([8] * len(tcs.sites.names) + [16] * len(tcs.sites.names))
    monkeypatch.setattr(streamed_sites, "_places", lambda active: max(-(-active // 8) * 8, 256 - next(made)))
    first, second = prepare(span, tcs).steps
    assert READING.layers - begin == 2 * len(tcs.sites.names)
    for one, other in zip(first.sources.values, second.sources.values, strict=True):
        assert one.shape[2] == other.shape[2]


@IN_HOST_TOO
def test_what_is_streamed_is_not_saved_without_its_layers(streamed, tmp_path):
    for save, one in ((save_pipeline, streamed[0]), (save_transcoders, streamed[1])):
        with pytest.raises(UserError, match="some are streamed"):
            save(one, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_effects_along_all_paths_are_the_same(resident, streamed):
    found = []
    for pipe, tcs in (resident, streamed):
        span = capture_steps(pipe, tcs, PROMPT, first=0, last=1)
        output = resolve_target(pipe, span, parse_target("velocity:contrast=a blue square"))
        found.append((total_effects(span, tcs, output), tcs))
    try:
        allow(4_000)  # no room for decoder rows
        rows = total_effects(span, tcs, output)
    finally:
        allow(None)
    for one, other in zip(rows.features, found[1][0].features, strict=True):
        close(one, other, 1e-6)
    every = np.ones(found[0][0].noise.shape, bool), np.ones(found[0][0].text.shape, bool)
    theirs, ours = ({str(one.feature): one.effect for one in strongest(*pair, *every, 50)} for pair in found)
    largest = max(map(abs, theirs.values()))
    assert len(ours.keys() & theirs.keys()) > 45  # two of one size may change places
    assert all(abs(ours[name] - theirs[name]) <= 1e-5 * largest for name in ours.keys() & theirs.keys())
    for name in ("text", "noise"):
        close(getattr(found[1][0], name), getattr(found[0][0], name), 1e-5)
    for one, other in zip(found[1][0].errors, found[0][0].errors, strict=True):
        close(one, other, 1e-5)


@pytest.fixture(scope="module")
def both(resident, streamed):
    """A prepared trace with its velocity: resident, streamed."""
    return [prepare(capture(*pair, PROMPT, output=True), pair[1]) for pair in (resident, streamed)]


@pytest.mark.parametrize("mode", get_args(Mode))
def test_readings_are_the_same(both, mode):
    found = []
    for prepared in both:
        step = prepared.steps[0]
        factors = [np.full((one.layers.slot.size, one.features), 0.5, np.float32) for one in step.sites]
        found.append(scaled(step, factors, mode))
    theirs, ours = found
    for one, other in zip((*ours.mlp_in, ours.velocity), (*theirs.mlp_in, theirs.velocity), strict=True):
        close(one, other, 1e-5)


def test_means_of_features_are_the_same(both):
    theirs, ours = (mean_values(prepared.steps[0]) for prepared in both)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-5)


def targets(*columns):
    return jax.device_put(Targets(*(np.array(column, np.int32) for column in columns)))


def test_features_taken_off_do_the_same(both):
    step = both[0].steps[0]
    rows = step.sites[0].layers.index.shape[1]
    features = targets([0, 0, 1], [0, 1, 1], [2, 3, 4], [0, 0, 0])
    index = [np.asarray(one.layers.index) for one in step.sites]
    chosen = [index[g][layer, at, 0] for g, layer, at in zip(*map(np.asarray, features[:3]), strict=True)]
    features = features._replace(feature=jax.device_put(np.array(chosen, np.int32)))
    readouts = targets([0, 2], [1, 2], [0, 5], [3, 1])
    assert rows and not np.array_equal(ablate(step, features, readouts)[0], ablate(step, features, readouts)[1])
    theirs, ours = (ablate(prepared.steps[0], features, readouts) for prepared in both)
    close(ours, theirs, 1e-5)


def test_attention_is_explained_alike(resident, streamed, both):
    scores_are_alike(zip((resident, streamed), both, strict=True))


@pytest.mark.slow
def test_attention_is_explained_alike_over_steps(resident, streamed):
    pairs = (resident, streamed)
    scores_are_alike((pair, capture_steps(pair[0], pair[1], PROMPT, first=0, last=1)) for pair in pairs)


def scores_are_alike(given):
    """The same scores, with the same edges, in a graph of resident and one of streamed weights."""
    graphs = []
    for pair, trace in given:
        target = strongest_feature(trace, pair[1], "img", 2)
        graphs.append(attribute(trace, pair[1], target=target, max_nodes=4, attention="explained", max_scores=6))
    theirs, ours = graphs
    assert ours.largest_conservation_error <= TOL.conservation_f32 and np.any(ours.node_head >= 0)
    assert ours.provenance.attention[0].total == pytest.approx(theirs.provenance.attention[0].total, rel=1e-4)
    found = []
    for graph in graphs:
        (told,) = graph.provenance.attention
        size = graph.target_abs_sum[0] + abs(graph.target_bias[0])
        assert abs(told.total - told.forward) <= TOL.conservation_f32 * size
        names, of_score = node_names(graph), (graph.node_kind == SCORE)[graph.edge_source]
        ends = zip(graph.edge_source[of_score], graph.edge_target[of_score], strict=True)
        found.append(
            {(names[a], names[b]): v for (a, b), v in zip(ends, graph.edge_attribution[of_score], strict=True)}
        )
    assert found[0].keys() == found[1].keys()
    close(list(found[1].values()), [found[0][pair] for pair in found[1]], 1e-4)


def test_attention_is_explained_with_all_decoder_rows_in_memory(streamed):
    pipe, tcs = streamed
    trace = capture(pipe, tcs, PROMPT)
    options = {"target": strongest_feature(trace, tcs, "img", 2), "attention": "explained"}
    with pytest.raises(UserError, match='prepare the trace with rows="held"'):
        attribute(prepare(trace, tcs, rows="streamed"), tcs, **options)
    try:
        allow(4_000)  # where rows would be streamed
        graph = attribute(trace, tcs, max_nodes=4, max_scores=6, **options)
    finally:
        allow(None)
    assert np.any(graph.node_head >= 0)


@pytest.mark.slow
def test_a_graph_is_validated_alike(resident, streamed, both):
    target = strongest_feature(both[0], resident[1], "img", 2)
    graph = attribute(both[0], resident[1], target=target, max_nodes=8, min_attribution=0.0)
    size = {"edges": 20, "ablations": 4, "draws": 1}
    theirs, ours = (validate(capture_again(*pair, graph), graph, **size) for pair in (resident, streamed))
    assert all(row["holds"] for row in ours["exactness"])
    close(ours["perturbation"]["pairs"]["measured"], theirs["perturbation"]["pairs"]["measured"], 1e-4)
    for one, other in zip(ours["completeness"]["curves"], theirs["completeness"]["curves"], strict=True):
        close([row["kept"] for row in one["rows"]], [row["kept"] for row in other["rows"]], 1e-4)
        close([row["removed"] for row in one["rows"]], [row["removed"] for row in other["rows"]], 1e-4)


def test_a_file_that_changes_is_told(saved, tmp_path):
    shutil.copytree(saved / "model", tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model", weights="disk")
    (tmp_path / "model" / "transformer.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        generate(pipe, PROMPT)
