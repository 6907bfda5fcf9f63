"""Documents of other tools become graphs, by what they say of their nodes."""

import json
from pathlib import Path

import numpy as np
import pytest
from viewer_documents import ERROR, FEATURE, document, link, node

from difffract_jax.config import UserError
from difffract_jax.graphs.files.viewer_document import checked_document
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.graph import ERROR as ERROR_NODE
from difffract_jax.graphs.graph import FEATURE as FEATURE_NODE
from difffract_jax.graphs.graph import INPUT, OUTPUT
from difffract_jax.graphs.pruning import prune

SAMPLE = Path(__file__).parents[2] / "data" / "sample_graph.json"


def read(changed):
    return graph_of(checked_document(changed, "g"), "g")


def changed(nodes=(), links=()):
    base = document()
    return base | {"nodes": [*base["nodes"], *nodes], "links": [*base["links"], *links]}


def edges(graph):
    return sorted(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True))


def test_what_the_schema_requires_is_enough():
    graph = read(document())
    assert graph.node_kind.tolist() == [OUTPUT, INPUT, FEATURE_NODE, FEATURE_NODE, ERROR_NODE]
    assert graph.node_feature.tolist() == [-1, -1, 928, 57794, -1] and graph.node_block.tolist() == [2, -1, 0, 1, 0]
    assert graph.node_value.tolist() == [1, 1, 2, 1, 1] and graph.root_weights.tolist() == [1, 0, 0, 0, 0]
    assert edges(graph) == [(1, 2), (2, 0), (2, 3), (3, 0), (4, 3)]
    assert graph.provenance.unclear_links is None
    assert np.allclose(graph.target_sum, [1.8, 0.5, 1.8]) and np.allclose(graph.target_abs_sum, [2.2, 0.5, 1.8])


@pytest.mark.parametrize("version", [None, 0, 1])
def test_a_feature_s_index_is_the_one_that_its_name_holds(version):
    base = document()
    base["metadata"]["schema_version"] = version
    assert read(base).node_feature.tolist()[2:4] == [928, 57794]
    base["nodes"][1]["feature"] = 928
    base["nodes"][2]["feature"] = None
    assert read(base).node_feature.tolist()[2:4] == [928, 57794]


def test_links_to_absent_nodes_are_left_out_and_counted():
    graph = read(changed(links=[link("9_9_9", "27_5_2", 1.0), link("E_106_1", "8_8_8", 1.0), link("9_9_9", "x", 1.0)]))
    assert edges(graph) == edges(read(document()))
    unclear = graph.provenance.unclear_links
    assert (unclear.left_out, unclear.absent, unclear.in_doubt) == (3, ("9_9_9", "8_8_8", "x"), 0)


def test_an_error_and_a_feature_of_one_name_are_two_nodes():
    graph = read(changed([node("0_0_1", FEATURE, "0", 1, 0)], [link("0_0_1", "1_57794_1", 0.7)]))
    assert graph.node_kind.tolist()[4:] == [ERROR_NODE, FEATURE_NODE] and graph.node_feature.tolist()[4:] == [-1, 0]
    found = dict(zip(edges(graph), graph.edge_attribution.tolist(), strict=True))
    given = {graph.edge_source[e]: graph.edge_attribution[e] for e in np.flatnonzero(graph.edge_target == 3)}
    assert given == {2: np.float32(1.5), 4: np.float32(0.3), 5: np.float32(0.7)} and len(found) == 6
    assert graph.provenance.unclear_links.in_doubt == 2


def test_nodes_that_a_graph_cannot_hold_are_refused():
    for wrong, sentence in (
        (node("b", "bias", 1, 1, None), "In g, the node b is of type 'bias', which a graph of ours cannot hold"),
        (node("e", ERROR, "E", 1, -1), 'In g, the node e has the layer "E", which is not a number'),
        (node("f", FEATURE, "0", 1, None), "In g, the node f of type 'cross layer transcoder' has the feature None"),
        (node("f", FEATURE, "0", 1, -4), "has the feature -4"),
        (node("f", FEATURE, "9" * 5000, 1, 4), 'the node f has the layer "9{39}, which is not a number'),
        (node("f", FEATURE, "40000", 1, 4), "has the layer 40000, but those of a graph lie in"),
        (node("f", FEATURE, "0", -2, 4), "has the column -2, but those of a graph lie in"),
        (node("f", FEATURE, "0", 2**40, 4), "has the column 1099511627776, but"),
        (node("f", FEATURE, "0", 1, 2**90), "has the feature .*, but those"),
        (node("f", FEATURE, "0", 1, 4, difffract=[0, 0, 9, 0, 0, 0]), "of itself under `difffract`"),
    ):
        with pytest.raises(UserError, match=sentence):
            read(changed([wrong]))


def test_a_cycle_is_refused_with_the_nodes_on_it():
    with pytest.raises(UserError, match="g: The graph has a cycle, 0_928_1 -> 1_57794_1 -> 0_928_1"):
        read(changed(links=[link("1_57794_1", "0_928_1", 0.1)]))
    with pytest.raises(UserError, match="a cycle, 0_928_1 -> 0_928_1"):
        read(changed(links=[link("0_928_1", "0_928_1", 0.1)]))


def test_edges_within_a_layer_are_no_cycle():
    attention = node("1_7_1", "lorsa", 1, 1, None)
    graph = read(changed([attention], [link("1_7_1", "1_57794_1", 0.5), link("0_928_1", "1_7_1", 1.0)]))
    pruned = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert pruned.edge_source.size == 7 and pruned.provenance.scores.unpruned.replacement > 0


def test_supernodes_name_the_feature_of_a_shared_name():
    base = changed([node("0_0_1", FEATURE, "0", 1, 0)])
    base["qParams"] = {"supernodes": [["red", "0_0_1", "0_928_1", "nowhere"]]}
    assert read(base).supernodes == {"red": [5, 2]}


def test_supernodes_of_one_name_are_all_kept_and_empty_ones_go():
    base = document()
    base["qParams"] = {"supernodes": [["a", "0_928_1", "0_928_1"], ["a", "1_57794_1"], ["b", "nowhere"], ["c"]]}
    assert read(base).supernodes == {"a": [2], "a (2)": [3]}


def test_the_sample_s_duplicates_are_refused_and_its_links_read():
    sample = json.loads(SAMPLE.read_text())
    sample["links"].append({"source": "E_0_0", "target": "nowhere", "weight": 1.0})
    with pytest.raises(UserError, match="two nodes are called 6_17_0"):
        read(sample | {"nodes": [*sample["nodes"], sample["nodes"][0]]})
    graph = read(sample)
    assert graph.edge_source.size == 4 and graph.node_kind[0] == OUTPUT
    assert prune(graph, by_position=True).provenance.scores.unpruned.replacement == pytest.approx(5 / 7)
