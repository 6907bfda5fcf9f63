"""A streamed model and streamed transcoders give what resident ones give: images, records, graphs, spans."""

import shutil

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
from difffract_jax.circuits.editing.interventions import steer
from difffract_jax.circuits.editing.ranking import rank_features
from difffract_jax.circuits.editing.sweeps import sweep
from difffract_jax.circuits.effects.attention import head_loadings, score_parts
from difffract_jax.circuits.effects.readings import scaled
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.frozen import streamed_sites
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.frozen.targets import Targets
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline, save_transcoders
from difffract_jax.models.blocks import Cond
from difffract_jax.models.pipeline import generate
from difffract_jax.models.stacks import run_stack
from difffract_jax.models.streaming import READING, HostLayers, Streamed, aligned, streams_layers, wait_for
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.layers import FileLayers
from tolerances import TOL

PROMPT = "a red circle"
SAME_EDGES = 1e-6
"""Of the largest edge: float32 sums in another order, since blocks are programs of their own."""


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


@pytest.fixture(scope="module", params=["disk", "host"])
def streamed(saved, request):
    pipe = load_pipeline(saved / "model", weights=request.param)
    tcs = load_transcoders(saved / "transcoders", weights=request.param)
    assert streams_layers(pipe.transformer) and streams_layers(pipe.t5) and streams_layers(tcs.stacks)
    return pipe, tcs


def close(ours, theirs, tolerance):
    ours, theirs = (np.asarray(one, np.float64) for one in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs), initial=0) <= tolerance * max(np.max(np.abs(theirs), initial=0), 1e-30)


def test_identity_does_not_depend_on_where_weights_stay(resident, streamed):
    assert resident[0].source == streamed[0].source
    assert resident[1].source == streamed[1].source


def test_images_are_the_same(resident, streamed):
    theirs, ours = (generate(pipe, PROMPT, seed=3) for pipe in (resident[0], streamed[0]))
    np.testing.assert_array_equal(ours.image, theirs.image)
    close(ours.latents, theirs.latents, 1e-5)


@pytest.mark.parametrize("output", [False, True])
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


@pytest.mark.parametrize("target", ["feature", "velocity"])
def test_graphs_are_the_same(resident, streamed, target):
    graphs = []
    for pipe, tcs in (resident, streamed):
        trace = capture(pipe, tcs, PROMPT, output=target == "velocity")
        wanted = strongest_feature(trace, tcs, "img", 2)
        if target == "velocity":
            wanted = resolve_target(pipe, trace, parse_target("velocity:contrast=a blue square"))
        graphs.append(attribute(trace, tcs, target=wanted, max_nodes=8, min_attribution=0.0))
    same_graphs(*graphs)


def test_spans_are_the_same(resident, streamed):
    graphs = []
    for pipe, tcs in (resident, streamed):
        trace = prepare(capture_steps(pipe, tcs, PROMPT, first=0, last=1), tcs)
        places = [[values.shape for values in step.sources.values] for step in trace.steps]
        assert places[0] == places[1]
        graphs.append(attribute(trace, tcs, target=strongest_feature(trace, tcs, "txt", 1), max_nodes=6))
    same_graphs(*graphs)


def same_graphs(theirs, ours):
    def edges(graph):
        columns = ("kind", "step", "stream", "block", "position", "feature")
        names = list(zip(*(getattr(graph, f"node_{column}").tolist() for column in columns), strict=True))
        ends = zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)
        return {
            (names[a], names[b]): value for (a, b), value in zip(ends, graph.edge_attribution.tolist(), strict=True)
        }

    expected, found = edges(theirs), edges(ours)
    largest = max(map(abs, expected.values()))
    for pair in expected.keys() | found.keys():
        # One that is not there lies below the threshold, next to which an edge may fall on either side.
        within = SAME_EDGES * largest if pair in expected and pair in found else 1.01 * theirs_threshold(theirs)
        assert abs(expected.get(pair, 0) - found.get(pair, 0)) <= within, pair
    assert ours.largest_conservation_error <= 2 * max(TOL.conservation_f32, theirs.largest_conservation_error)


def theirs_threshold(graph):
    return graph.provenance.attribution.min_attribution


def test_edited_images_are_the_same(resident, streamed):
    edits = [Edit.parse("img/1/f3=add:2"), Edit.parse("txt/0/f5=zero")]
    for form in ("delta", "replace"):
        theirs, ours = (steer(*pair, PROMPT, edits, form=form, seed=2) for pair in (resident, streamed))
        close(ours.latents, theirs.latents, 1e-5)
    swept = [sweep(*pair, PROMPT, edits, (0.0, 2.0), seeds=(1, 2)) for pair in (resident, streamed)]
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
    none = jax.tree.map(lambda leaf: leaf[:0], stack)
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


def test_what_is_streamed_is_not_saved_without_its_layers(streamed, tmp_path):
    for save, one in ((save_pipeline, streamed[0]), (save_transcoders, streamed[1])):
        with pytest.raises(UserError, match="some are streamed"):
            save(one, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_reads_whole_transcoders_or_blocks_refuses_streamed_ones(resident, streamed):
    pipe, tcs = streamed
    prepared = prepare(capture(pipe, tcs, PROMPT), tcs)
    factors = [np.ones((one.layers.slot.size, one.features), np.float32) for one in prepared.steps[0].sites]
    span = capture_steps(resident[0], tcs, PROMPT, first=0, last=0)
    output = resolve_target(resident[0], span, parse_target("velocity:contrast=a blue square"))
    targets = Targets(*(jnp.zeros(1, jnp.int32) for _ in Targets._fields))
    for read in (
        lambda: scaled(prepared.steps[0], factors, "direct"),
        lambda: total_effects(span, tcs, output),
        lambda: ablate(prepared.steps[0], targets, targets),
        lambda: mean_values(prepared.steps[0]),
    ):
        with pytest.raises(UserError, match='load the model and the transcoders with weights="device"'):
            read()


def test_a_file_that_changes_is_told(saved, tmp_path):
    shutil.copytree(saved / "model", tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model", weights="disk")
    (tmp_path / "model" / "transformer.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        generate(pipe, PROMPT)
