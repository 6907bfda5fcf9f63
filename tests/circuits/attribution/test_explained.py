"""Attention's scores in a graph: it adds up, loses nothing, and is the frozen graph without them."""

import jax
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.circuits.effects.heads import target_node
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.page_data import graph_bytes
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.arrays import OF_SCORES
from difffract_jax.graphs.combine import average, difference
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files import reference_json, viewer_json
from difffract_jax.graphs.files.tables import write_csv, write_graphml
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.frozen_attention import without_scores
from difffract_jax.graphs.graph import ERROR, FEATURE, SCORE, Graph, subgraph
from difffract_jax.graphs.groups import summed_names, without_position
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.scoring import scores
from tolerances import TOL
from traces import velocity_and_feature

SETTINGS = {"max_nodes": 12, "expansion_batch": 4, "min_attribution": 1e-6}
ALONE = SETTINGS | {"max_nodes": 1}


@pytest.fixture(scope="module")
def graphs(traced, prepared):
    """The graph of the velocity and of a feature, with attention explained, and frozen."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        targets = velocity_and_feature(traced, prepared)
        return [
            attribute(prepared, traced.tcs, target=targets, attention=attention, max_scores=15, **SETTINGS)
            for attention in ("explained", "frozen")
        ]


def single(graph):
    """The nodes of single scores."""
    return np.flatnonzero((graph.node_kind == SCORE) & (graph.node_head >= 0))


def test_targets_and_scores_add_up_and_forward_mode_agrees(graphs):
    graph, _ = graphs
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    expanded = np.isin(single(graph), graph.target_node)
    assert single(graph).size > 5 and expanded.all()
    for one in graph.provenance.attention:
        assert abs(one.total - one.forward) <= TOL.conservation_x64 * one.absolute and one.absolute > 0
    assert graph.provenance.attribution.max_scores == 15
    # What a graph keeps of the scores' edges is what it says that they add.
    into = np.isin(graph.edge_target, graph.targets) & (graph.node_kind == SCORE)[graph.edge_source]
    for target, one in zip(graph.targets, graph.provenance.attention, strict=True):
        mine = graph.edge_attribution[into & (graph.edge_target == target)].astype(float)
        assert mine.sum() == pytest.approx(one.total, abs=1e-6 * one.absolute + 20 * SETTINGS["min_attribution"])


def test_features_that_act_through_scores_are_sources_of_them_and_remainders_are_told(graphs):
    graph, _ = graphs
    into = np.isin(graph.edge_target, single(graph))
    assert np.any(graph.node_kind[graph.edge_source[into]] == FEATURE)
    assert np.any(graph.edge_query[into] != 0) and np.any(graph.edge_query[into] != graph.edge_attribution[into])
    assert not graph.edge_query[~into].any()
    out = np.isin(graph.edge_source, single(graph))
    assert np.any(graph.edge_remainder[out] != 0) and not graph.edge_remainder[~out].any()
    # Scores come before the features of their block, and above everything that drives them.
    assert np.all(graph.node_block[graph.edge_source[into]] < graph.node_block[graph.edge_target[into]])
    assert np.all(graph.node_block[graph.edge_source[out]] <= graph.node_block[graph.edge_target[out]])


def test_without_its_scores_it_is_the_frozen_graph(traced, prepared, graphs):
    graph, frozen = graphs
    plain = without_scores(graph)
    assert not np.any(plain.node_kind == SCORE) and plain.provenance.attention == ()
    for name in ("preactivation", "bias", "sum", "abs_sum"):
        ours, theirs = (getattr(one, f"target_{name}")[:2] for one in (plain, frozen))
        assert np.allclose(ours, theirs, rtol=1e-9), name
    assert without_scores(frozen) is frozen
    with pytest.raises(UserError, match="does not say what they add to its targets"):
        without_scores(average([graph]))


def test_with_no_scores_of_their_own_all_are_the_rest_of_their_blocks(traced, prepared, graphs):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        velocity = resolve_target(traced.pipe, traced.trace, parse_target("velocity:"))
        graph = attribute(prepared, traced.tcs, target=velocity, attention="explained", max_scores=0, **ALONE)
    rest = np.flatnonzero(graph.node_kind == SCORE)
    assert np.all(graph.node_head[rest] == -1) and [node_names(graph)[node] for node in rest] == [
        *("other scores double/0", "other scores double/1", "other scores double/2"),
        *("other scores single/0", "other scores single/1"),
    ]
    assert graph.provenance.attention[0].total == pytest.approx(graphs[0].provenance.attention[0].total, rel=1e-9)
    assert scores(graph).completeness < scores(without_scores(graph)).completeness  # they count as error


def test_a_graph_with_scores_is_saved_summed_pruned_and_shown(graphs, tmp_path):
    graph, frozen = graphs
    for one, held in ((graph, True), (frozen, False)):
        one.save(tmp_path / "g.npz")
        with np.load(tmp_path / "g.npz") as file:
            assert ({*OF_SCORES} <= {*file.files}) == held
        again = Graph.load(tmp_path / "g.npz")
        assert again.provenance == one.provenance
        assert all(np.array_equal(getattr(again, name), getattr(one, name)) for name in OF_SCORES)
    names = node_names(graph)
    some = int(single(graph)[0])
    assert names[some].startswith(("double/", "single/")) and "/h" in names[some] and "," in names[some]
    assert find_nodes(graph, [names[some]])[0] == some and len({*names}) == len(names)
    summed = aggregate(graph)
    assert without_position(names[some]) == summed_names(graph)[some]
    assert summed_names(graph)[some] in node_names(summed)
    for name in ("edge_attribution", "edge_query", "edge_remainder"):
        assert getattr(summed, name).sum() == pytest.approx(getattr(graph, name).sum(), rel=1e-4, abs=1e-6)
    assert "score" in graph.summary().nodes and graph.summary().nodes["score"] == np.sum(graph.node_kind == SCORE)
    for mode, share, by_position in (("standard", 1.0, True), ("standard", 1.0, False), ("difffract", 0.8, True)):
        pruned = prune(graph, mode=mode, node_threshold=share, edge_threshold=1.0, by_position=by_position)
        assert np.any(pruned.node_kind == SCORE) and pruned.provenance.scores is not None
    assert prune(graph).node_kind.size < summed.node_kind.size
    told = account(summed)
    parts = told.features + told.inputs + told.errors + told.rest + told.attention + told.absent + told.bias
    assert parts == pytest.approx(told.value, rel=1e-6) and told.attention != 0
    assert len(graph_bytes(graph)) > len(graph_bytes(frozen))
    write_csv(graph, tmp_path / "csv")
    write_graphml(graph, tmp_path / "g.graphml")
    assert names[some] in (tmp_path / "csv" / "nodes.csv").read_text(encoding="utf-8")


def test_graphs_with_scores_are_combined_and_compared(graphs):
    graph, frozen = graphs
    assert compare(graph, graph).largest_error == 0
    apart = compare(graph, frozen)
    assert any(name.startswith("score block") for name in apart.nodes_only_in_a) and not any(
        name.startswith("score") for name in apart.nodes_only_in_b
    )
    same = average([graph, graph])
    assert np.sum(same.node_kind == SCORE) == np.sum(aggregate(graph).node_kind == SCORE)
    assert same.edge_query.sum() == pytest.approx(graph.edge_query.sum(), rel=1e-4, abs=1e-6)
    assert not difference(graph, graph).edge_source.size


@pytest.mark.parametrize("by_position", [True, False])
def test_the_viewers_document_holds_scores_and_is_read_back(graphs, by_position):
    options = ViewerOptions(by_position=by_position, slug="a")
    document = viewer_json.to_document(graphs[0], "circuit-tracer", options, image="data:image/png;base64,aGk=")
    heads, places = (document["metadata"][name] for name in ("prompt_tokens", "image_input"))
    found = [heads[place] for place in places["image_positions"] if place >= 0]
    assert found and all(head.startswith("img[") if by_position else head == "img" for head in found)
    ids = [node["node_id"] for node in document["nodes"]]
    assert len({*ids}) == len(ids)
    again, ours = graph_of(document), graphs[0] if by_position else aggregate(graphs[0])
    for name in ("node_kind", "node_head", "node_key_stream", "node_key_position", "node_block", "node_position"):
        assert np.array_equal(np.sort(getattr(again, name)), np.sort(getattr(ours, name))), name
    broken = next(node for node in document["nodes"] if node["difffract"][0] == SCORE)
    broken["difffract"] = broken["difffract"][:6]
    with pytest.raises(UserError, match="instead of kind, step"):
        graph_of(document)


def test_the_references_format_has_no_scores(traced, prepared):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        feature = strongest_feature(prepared, traced.tcs, "img", 2)
        graph = attribute(prepared, traced.tcs, target=feature, attention="explained", max_scores=3, **ALONE)
    keep = np.isin(graph.node_kind, (FEATURE, ERROR, SCORE))
    with pytest.raises(UserError, match="no attention scores as nodes"):
        reference_json.to_document(subgraph(graph, keep, np.ones(graph.edge_source.size, bool)))
    score = node_names(graph)[int(single(graph)[0])]
    with pytest.raises(UserError, match="is an attention score; give it as --score"):
        target_node(graph, score)


@pytest.mark.slow
def test_the_frozen_part_is_validated(traced, graphs):
    graph, _ = graphs
    with jax.enable_x64(True):
        again = capture_again(traced.pipe, traced.tcs, graph)
        found = validate(again, graph, edges=50, ablations=2, draws=1, readings=("propagated",))
    assert all(row["holds"] for row in found["exactness"])


def test_what_attention_is_not_explained_of_is_refused(traced, prepared):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        feature = strongest_feature(prepared, traced.tcs, "img", 2)
        with pytest.raises(UserError, match="max_scores must be 0 or more, but got -1"):
            attribute(prepared, traced.tcs, target=feature, attention="explained", max_scores=-1)
