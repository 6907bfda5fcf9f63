"""A traced circuit is the reference's, edge by edge, and adds up."""

import json
import re

import numpy as np
import pytest

from difffract_jax.circuits.attribution import pullback
from difffract_jax.circuits.attribution.attribute import attribute, pull_options
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.selection import site_preactivations
from difffract_jax.circuits.attribution.sources import source_table
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files.reference_json import from_document
from difffract_jax.graphs.graph import FEATURE, INPUT, REST
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.graphs.pruning import prune
from tolerances import REFERENCE, TOL
from traces import MORE_VARIANTS, VARIANTS, golden_trace, make_exact, variant

ALL = [*VARIANTS, *MORE_VARIANTS]
SOME = ("padding replaced, a gap, guidance, through to the velocity", "the largest few, no time, no text")
"""That edges add up in each variant, `test_pullback.py` tests; here that a graph keeps what adds up."""
SETTINGS = {"max_nodes": 80, "expansion_batch": 10, "min_attribution": 1e-4}


@pytest.fixture(scope="module")
def graphs(golden):
    """Our graphs of the five golden targets."""
    made = []
    for number in range(5):
        trace, target = golden_trace(golden, number)
        feature = Feature(target["stream"], target["layer"], target["feat_idx"])
        made.append(attribute(trace, golden.tcs, target=feature, **SETTINGS))
    return made


def edges_of(graph):
    """Edges by what their ends are."""
    columns = (graph.node_kind, graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    names = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
    pairs = zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True)
    return {(names[source], names[target]): float(value) for source, target, value in pairs}


def reference_edges(data):
    """The reference's edges in the same form; it marks unexpanded features by feature -2, and inputs by block 0."""
    edges = {}
    for row in range(data["edge_attribution"].size):
        kind, stream, block, position, feature = (
            int(data[f"edge_src_{name}"][row]) for name in ("type", "stream", "layer", "pos", "feat")
        )
        source = (REST if feature == -2 else kind, stream, -1 if kind == INPUT else block, position, max(feature, -1))
        target = tuple(int(data[f"edge_tgt_{name}"][row]) for name in ("stream", "layer", "pos", "feat"))
        edges[source, (FEATURE, *target)] = float(data["edge_attribution"][row])
    return edges


@pytest.mark.parametrize("number", range(5))
def test_the_graph_is_the_reference_s_edge_by_edge(graphs, number):
    ours, theirs = edges_of(graphs[number]), reference_edges(dict(np.load(REFERENCE / f"golden_graph_{number}.npz")))
    assert ours.keys() == theirs.keys()
    largest = max(map(abs, theirs.values()))
    assert max(abs(ours[pair] - theirs[pair]) for pair in theirs) <= TOL.edge * largest


def test_a_graph_says_where_on_the_hub_model_and_transcoders_came_from(golden, graphs):
    origins = {"model_origin": "hf:a/flux@c0ffee", "transcoders_origin": "hf:a/tcs@c0ffee/saes"}
    trace, target = golden_trace(golden._replace(pipe=golden.pipe._replace(origin=origins["model_origin"])), 0)
    tcs = golden.tcs._replace(origin=origins["transcoders_origin"])
    feature = Feature(target["stream"], target["layer"], target["feat_idx"])
    told = attribute(trace, tcs, target=feature, **SETTINGS | {"max_nodes": 1}).provenance
    assert told.sources == origins and told.traced_run.model_origin == origins["model_origin"]
    assert Provenance.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert graphs[0].provenance.sources is None and "model_origin" not in graphs[0].provenance.to_json()["trace"]


@pytest.mark.parametrize("number", range(5))
def test_the_same_features_are_expanded(graphs, number):
    data, graph = np.load(REFERENCE / f"golden_graph_{number}.npz"), graphs[number]
    theirs = set(zip(*(data[f"expanded_{name}"].tolist() for name in ("stream", "layer", "pos", "feat")), strict=True))
    columns = (graph.node_stream, graph.node_block, graph.node_position, graph.node_feature)
    assert set(zip(*(c[graph.target_node].tolist() for c in columns), strict=True)) == theirs


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("kind", ["aggregated", "pruned"])
def test_sums_and_pruned_graphs_are_the_reference_s(graphs, number, kind):
    graph = prune(graphs[number], mode="difffract") if kind == "pruned" else graphs[number]
    theirs = from_document(json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())[kind])
    found = compare(graph, theirs)
    assert not found.nodes_only_in_a + found.nodes_only_in_b
    assert found.edges_only_in_a == found.edges_only_in_b == 0
    assert found.largest_error <= TOL.edge


@pytest.mark.parametrize("number", range(5))
def test_every_target_adds_up(graphs, number):
    assert graphs[number].largest_conservation_error <= TOL.conservation_f32


@pytest.mark.parametrize("number", range(5))
def test_the_bias_is_the_reference_s_with_what_it_leaves_out(graphs, number):
    golden = json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())
    bias = golden["target"]["target_encoder_bias"] + golden["exact_accounting"]["omitted_constant"]
    scale = graphs[number].target_abs_sum[0]
    assert abs(graphs[number].target_bias[0] - bias) <= TOL.conservation_f32 * scale
    assert abs(graphs[number].target_preactivation[0] - golden["target"]["preactivation"]) <= TOL.f32_run
    everything = golden["exact_accounting"]["all_edges_sum_threshold0"]
    assert abs(graphs[number].target_sum[0] - everything) <= TOL.conservation_f32 * scale


def strongest(exact):
    """The strongest feature of the highest traced site."""
    table = source_table((exact.replacement,), (exact.trace.info,))
    rows = np.flatnonzero((table.kind == FEATURE) & (table.block == table.block.max()))
    row = rows[np.argmax(table.value[rows])]
    site = exact.trace.info.layout.site_number(int(table.block[row]), int(table.stream[row]))
    return Feature(*site, int(table.feature[row]))


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name not in SOME)]
)
def test_a_graph_in_float64_adds_up(x64, name):
    exact = variant(name)
    graph = attribute(exact.trace, exact.tcs, target=strongest(exact), max_nodes=30, expansion_batch=8)
    assert graph.largest_conservation_error <= TOL.conservation_x64


def test_how_many_targets_go_together_changes_nothing(x64):
    exact = make_exact()
    graphs = [
        attribute(exact.trace, exact.tcs, target=strongest(exact), max_nodes=20, expansion_batch=6, target_batch=size)
        for size in (None, 1, 4)
    ]
    for other in graphs[1:]:
        found = compare(graphs[0], other)
        assert not found.nodes_only_in_a + found.nodes_only_in_b and found.largest_error <= TOL.edge


def test_one_program_does_for_a_trace(x64):
    exact = make_exact()
    pullback._pull_back.clear_cache()
    settings = {"max_nodes": 40, "expansion_batch": 9}
    attribute(exact.trace, exact.tcs, target=strongest(exact), **settings)
    # The lone first target and every batch that follows, whatever their blocks.
    assert pullback._pull_back._cache_size() == 1
    attribute(exact.trace, exact.tcs, target=Feature("img", 1, strongest_at(exact, 1)), **settings)
    assert pullback._pull_back._cache_size() == 1


def strongest_at(exact, block):
    table = source_table((exact.replacement,), (exact.trace.info,))
    rows = np.flatnonzero((table.kind == FEATURE) & (table.block == block) & (table.stream == 0))
    return int(table.feature[rows[np.argmax(table.value[rows])]])


def test_progress_and_provenance_are_kept(x64):
    exact, seen = make_exact(), []
    graph = attribute(
        exact.trace,
        exact.tcs,
        target=strongest(exact),
        max_nodes=12,
        expansion_batch=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 12), (5, 12), (9, 12), (12, 12)]
    assert graph.provenance.run.prompt == "a red circle"
    assert graph.provenance.run.model == exact.pipe.source != ""
    assert graph.provenance.transcoders == exact.tcs.source
    assert graph.provenance.attribution.max_nodes == 12


def test_without_a_position_the_strongest_is_taken(golden, graphs):
    for number, graph in enumerate(graphs):
        target = json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())["target"]
        assert graph.node_position[graph.target] == target["position"]


@pytest.fixture(scope="module")
def trace(golden):
    return golden.trace(0, 1, include_padding=False)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("img-2-326", "img-2-326"),
        ("img/3/f1", "There is no transcoder at img/3; blocks with one: 0, 1, 2."),
        ("img/2/f512", "img/2/f512 does not exist: the transcoders have features 0 to 511."),
        ("img/2/f326@36", "names position 36, but the stream has positions 0 to 35."),
        ("img/2/f326#0", "is asked for at other steps than the traced one, 1"),
        ("txt/2/f324@15", "lies on padding, where transcoders are not used; name one of the prompt's own tokens, 0 to"),
        ("single/0/f1", "There is no transcoder at single/0; blocks with one: none."),
        ("img/2/f326@8", "img/2/f326@8 is inactive there; it is active at the positions (values): 14 ("),
    ],
)
def test_a_target_that_cannot_be_traced_is_refused(golden, trace, target, sentence):
    with pytest.raises(UserError) as caught:
        attribute(trace, golden.tcs, target=target)
    with pytest.raises(UserError, match=re.escape(sentence)):
        attribute(trace, golden.tcs, target=[(target, 2.0)])
    assert sentence in str(caught.value)


def test_a_feature_that_is_nowhere_active_says_how_close_it_comes(golden, trace):
    engine = make_engine(trace, golden.tcs)
    table = engine.table
    site = (table.kind == FEATURE) & (table.block == 2) & (table.stream == 0) & (table.value > 0)
    silent = min(set(range(512)) - set(table.feature[site].tolist()))
    with pytest.raises(UserError) as caught:
        attribute(trace, golden.tcs, target=Feature("img", 2, silent))
    u = site_preactivations(engine, trace.info, Feature("img", 2, silent))
    assert f"inactive at every position of step 1: it comes closest at position {np.argmax(u)}" in str(caught.value)
    assert "Strongest at this site: f" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_nodes": 0}, "max_nodes must be at least 1, but got 0."),
        ({"expansion_batch": 0}, "expansion_batch must be at least 1"),
        ({"target_batch": 0}, "target_batch must be at least 1"),
        ({"min_attribution": -1.0}, "min_attribution must be 0 or more, but got -1.0."),
        ({"min_attribution": float("nan")}, "min_attribution must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(golden, trace, settings, sentence):
    with pytest.raises(UserError) as caught:
        attribute(trace, golden.tcs, target=Feature("img", 2, 326), **settings)
    assert sentence in str(caught.value)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="precision must be f32 or bf16, but got 'f64'"):
        pull_options(None, "f64")
