"""The pooled path in a graph: it adds up, loses nothing, and is the frozen graph without it."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.cli.graph_tables import graph_summary
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.page_data import graph_bytes
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.arrays import OF_SCORES
from difffract_jax.graphs.combine import average, difference
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files import reference_json, viewer_json
from difffract_jax.graphs.files.tables import write_csv
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.frozen_attention import without_pooled
from difffract_jax.graphs.graph import MODULATION, OUTPUT, WORD, Graph
from difffract_jax.graphs.groups import summed_names
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.pruning import prune
from difffract_jax.models.embeddings import Embeddings
from difffract_jax.models.pipeline import encode
from tolerances import TOL
from traces import velocity_and_feature

SETTINGS = {"max_nodes": 6, "expansion_batch": 4, "min_attribution": 1e-6}


@pytest.fixture(scope="module")
def graphs(traced, prepared):
    """The graph of the velocity and of a feature, with the pooled path explained, and frozen."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        targets = velocity_and_feature(traced, prepared)
        return [
            attribute(prepared, traced.tcs, target=targets, pooled=pooled, pipe=traced.pipe, **SETTINGS)
            for pooled in ("explained", "frozen")
        ]


def of_kind(graph, kind):
    return np.flatnonzero(graph.node_kind == kind)


def test_targets_and_modulations_add_up_and_the_exchange_is_told(graphs):
    graph, frozen = graphs
    assert np.max(graph.conservation_error) <= TOL.conservation_x64
    assert of_kind(graph, MODULATION).size > 20 and np.isin(of_kind(graph, MODULATION), graph.target_node).all()
    for path, one in zip(graph.provenance.pooled_path, graph.provenance.pooled, strict=True):
        assert one.total + one.remainder == pytest.approx(path.value - path.without, rel=1e-9)
        assert abs(one.remainder) <= 1e-3 * one.absolute and one.points >= 8 and one.direct != 0
    into = np.isin(graph.edge_target, graph.targets) & (graph.node_kind == MODULATION)[graph.edge_source]
    for target, one in zip(graph.targets, graph.provenance.pooled, strict=True):
        mine = graph.edge_attribution[into & (graph.edge_target == target)].astype(float)
        assert mine.sum() == pytest.approx(one.total, abs=1e-6 * one.absolute + 100 * SETTINGS["min_attribution"])
    assert np.any(graph.edge_remainder[into] != 0)
    assert frozen.provenance.pooled == () and frozen.provenance.words == ()


def test_modulations_come_before_what_they_act_on_and_words_before_all(graphs):
    graph, _ = graphs
    into = np.isin(graph.edge_target, of_kind(graph, MODULATION))
    assert np.all(graph.node_kind[graph.edge_source[into]] == WORD)
    level = node_levels(graph)
    assert np.all(level[graph.edge_source] < level[graph.edge_target])
    order = np.lexsort((graph.edge_source, graph.edge_target))
    assert np.array_equal(order, np.arange(order.size)) and np.all(np.diff(graph.target_node) > 0)
    names = node_names(graph)
    assert {"img/0/attn_shift", "txt/1/mlp_gate", "single/1/gate", "final/scale"} <= {*names} and len({*names}) == len(
        names
    )
    spoken = [names[node] for node in of_kind(graph, WORD)]
    assert spoken and all(name.startswith("word ") and "@" in name for name in spoken)
    assert find_nodes(graph, [spoken[0], "final/scale"]).size == 2


def test_without_its_modulations_it_is_the_frozen_graph(graphs):
    graph, frozen = graphs
    plain = without_pooled(graph)
    assert plain.provenance == frozen.provenance
    for name in ("node_kind", "node_feature", "edge_source", "edge_target", "edge_attribution", "target_node"):
        assert np.array_equal(getattr(plain, name), getattr(frozen, name)), name
    for name in ("preactivation", "bias", "sum", "abs_sum"):
        assert np.allclose(getattr(plain, f"target_{name}"), getattr(frozen, f"target_{name}"), rtol=1e-9), name
    assert without_pooled(frozen) is frozen
    with pytest.raises(UserError, match="has modulations as nodes but does not say what they add to its targets"):
        without_pooled(average([graph]))


def test_a_graph_with_modulations_is_saved_summed_pruned_and_shown(graphs, tmp_path):
    graph, frozen = graphs
    graph.save(tmp_path / "g.npz")
    again = Graph.load(tmp_path / "g.npz")
    assert again.provenance == graph.provenance and node_names(again) == node_names(graph)
    assert all(np.array_equal(getattr(again, name), getattr(graph, name)) for name in ("node_kind", *OF_SCORES))
    summed = aggregate(graph)
    for kind in (MODULATION, WORD):
        assert of_kind(summed, kind).size == of_kind(graph, kind).size
        # They have no positions to be summed over, so that they keep their names.
        assert {summed_names(graph)[node] for node in of_kind(graph, kind)} <= {*node_names(summed)}
    assert summed.edge_remainder.sum() == pytest.approx(graph.edge_remainder.sum(), rel=1e-4, abs=1e-6)
    for mode, share in (("standard", 1.0), ("difffract", 0.8)):
        pruned = prune(graph, mode=mode, node_threshold=share, edge_threshold=1.0)
        assert of_kind(pruned, MODULATION).size and 0 <= pruned.provenance.scores.pruned.replacement <= 1
    assert prune(graph).node_kind.size < summed.node_kind.size
    told = account(summed)
    parts = told.features + told.inputs + told.errors + told.rest + told.pooled + told.absent + told.bias
    assert parts == pytest.approx(told.value, rel=1e-6) and told.pooled != 0 and account(frozen).pooled == 0
    assert len(graph_bytes(graph)) > len(graph_bytes(frozen))
    write_csv(graph, tmp_path / "csv")
    assert "img/0/attn_shift" in (tmp_path / "csv" / "nodes.csv").read_text(encoding="utf-8")
    shown = graph_summary(graph)
    assert shown["points of the integral"] == graph.provenance.pooled[0].points
    assert shown["strongest modulations"] and shown["words"] and "words" not in graph_summary(frozen)


def test_graphs_with_modulations_are_combined_and_compared(graphs):
    graph, frozen = graphs
    assert compare(graph, graph).largest_error == 0
    assert any(name.startswith("modulation") for name in compare(graph, frozen).nodes_only_in_a)
    same = average([graph, graph])
    assert of_kind(same, MODULATION).size == of_kind(graph, MODULATION).size
    assert "img/0/attn_shift" in node_names(same)
    assert not difference(graph, graph).edge_source.size


@pytest.mark.parametrize("by_position", [True, False])
def test_the_viewers_document_holds_modulations_and_is_read_back(graphs, by_position):
    options = ViewerOptions(by_position=by_position, slug="a")
    document = viewer_json.to_document(graphs[0], "circuit-tracer", options, image="data:image/png;base64,aGk=")
    ids = [node["node_id"] for node in document["nodes"]]
    assert len({*ids}) == len(ids)
    again, ours = graph_of(document), graphs[0] if by_position else aggregate(graphs[0])
    for name in ("node_kind", "node_block", "node_feature"):
        # Targets are logits to the viewers, above all other blocks.
        found, expected = (np.sort(getattr(one, name)[one.node_kind != OUTPUT]) for one in (again, ours))
        assert np.array_equal(found, expected), name


def test_the_references_format_has_no_modulations(graphs):
    for kind in (MODULATION, WORD):
        with pytest.raises(UserError, match="no modulations or words of the pooled path"):
            reference_json.node_id(graphs[0], int(of_kind(graphs[0], kind)[0]))


@pytest.mark.slow
def test_the_frozen_part_is_validated(traced, graphs):
    graph, _ = graphs
    with jax.enable_x64(True):
        again = capture_again(traced.pipe, traced.tcs, graph)
        found = validate(again, graph, edges=50, ablations=2, draws=1, readings=("propagated",))
    assert all(row["holds"] for row in found["exactness"])


def test_without_clip_there_are_modulations_without_words(traced, prepared, graphs):
    """Embeddings from a file do not tell which words made them."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        info = traced.trace.info
        known = {prompt: encode(traced.pipe, prompt, info.text_tokens) for prompt in (info.prompt, "")}
        pipe = traced.pipe._replace(known=Embeddings("e.npz", traced.pipe.source, known))
        velocity = resolve_target(pipe, traced.trace, parse_target("velocity:"))
        one = attribute(
            prepared, traced.tcs, target=velocity, pooled="explained", pipe=pipe, **SETTINGS | {"max_nodes": 1}
        )
    assert of_kind(one, MODULATION).size and not of_kind(one, WORD).size and one.provenance.words == ()
    assert one.target_node.tolist() == [0] and one.provenance.pooled[0].unspoken is None
    assert one.provenance.pooled[0].total == pytest.approx(graphs[0].provenance.pooled[0].total, rel=1e-9)
    assert "without CLIP" in graph_summary(one)["no word's"]


def test_what_the_pooled_path_is_not_explained_of_is_refused(x64, traced, prepared):
    feature = strongest_feature(prepared, traced.tcs, "img", 2)
    trace, pipe = traced.trace, traced.pipe
    shape = replace(pipe.config.transformer, pooled_width=0)
    unread = pipe._replace(config=replace(pipe.config, transformer=shape))
    imported = trace._replace(record=trace.record._replace(unpooled=None))
    for given, more, sentence in (
        (imported, {}, "did not run the exchange of the pooled embedding"),
        (trace, {"pipe": unread}, "Nothing pooled from the prompt enters this model"),
        (trace, {"pipe": None}, "give the pipeline that was traced, as pipe"),
        (trace, {"pipe": pipe._replace(source="another")}, "but the pipeline given is another"),
    ):
        with pytest.raises(UserError, match=sentence):
            attribute(given, traced.tcs, target=feature, **{"pooled": "explained", "pipe": pipe} | more)


def test_names_of_modulations_without_a_layout_are_numbers(graphs):
    graph = graphs[0]
    bare = graph.with_provenance(run=None, words=())
    names = node_names(replace(bare))
    assert any(name.startswith("modulation img/0/") for name in names) and any(
        name.startswith("word @") for name in names
    )
