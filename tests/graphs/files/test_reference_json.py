"""The reference's JSON is read and written field for field."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files.reference_json import (
    from_document,
    read_reference_json,
    to_document,
    write_reference_json,
)
from difffract_jax.graphs.graph import ERROR, REST
from random_graphs import random_graph
from tolerances import REFERENCE, TOL

DOCUMENTS = [(number, kind) for number in range(5) for kind in ("aggregated", "pruned")]


def document_of(number, kind):
    return json.loads((REFERENCE / f"golden_graph_{number}.json").read_text())[kind]


@pytest.mark.parametrize(("number", "kind"), DOCUMENTS)
def test_the_reference_s_documents_survive(number, kind):
    document = document_of(number, kind)
    ours = to_document(from_document(document))
    for field in ("version", "target", "config"):
        assert ours[field] == document[field]
    total = document["stats"].pop("attribution_sum")
    assert ours["stats"].pop("attribution_sum") == pytest.approx(total, rel=1e-6)  # edges are float32 here
    assert ours["stats"] == document["stats"]
    assert {n["id"]: n for n in ours["nodes"]} == {n["id"]: rounded(n) for n in document["nodes"]}
    pairs = [sorted((e["src"], e["tgt"], np.float32(e["attribution"])) for e in d["edges"]) for d in (ours, document)]
    for a, b in zip(*pairs, strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-6, abs=1e-8)


def rounded(node):
    """A node whose map went through float32."""
    return node | {"activation_map": {p: round(float(np.float32(v)), 6) for p, v in node["activation_map"].items()}}


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_graph_of_ours_survives_up_to_rounding_and_names(tmp_path_factory, seed):
    graph = random_graph(seed)
    path = tmp_path_factory.mktemp("json") / "g.json"
    write_reference_json(graph, path)
    back = read_reference_json(path)
    found = compare(graph, back)
    assert found.largest_error <= TOL.edge
    assert not found.nodes_only_in_a + found.nodes_only_in_b
    assert found.edges_only_in_a == found.edges_only_in_b == 0


def test_errors_and_unexpanded_features_get_one_name():
    graph = random_graph(4)
    assert np.any(graph.node_kind == REST) and np.any(graph.node_kind == ERROR)
    ids = [node["id"] for node in to_document(graph)["nodes"]]
    assert len(ids) == len(set(ids))
    assert not np.any(from_document(to_document(graph)).node_kind == REST)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 1}, "its version is 1, not 2"),
        ({"nodes": []}, "its target .* is not among its nodes"),
        ({"target": {}}, "its target has no id"),
        ({"config": {"step": None}}, "its config has the step null instead of a whole number"),
        ({"config": {"step": -(2**70)}}, "its step is -118"),
        ({"edges": [{"src": 1, "tgt": "x", "attribution": 1.0}]}, "an edge has the src 1 instead of text"),
        ({"edges": [{"src": "feature_L9_img_f1", "tgt": "x", "attribution": 1.0}]}, "which is not among its nodes"),
    ],
)
def test_another_document_is_refused(tmp_path, change, sentence):
    path = tmp_path / "g.json"
    path.write_text(json.dumps(document_of(4, "pruned") | change))
    with pytest.raises(UserError, match=f"not a version 2 graph of the reference: .*{sentence}"):
        read_reference_json(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_are_refused_by_name(value):
    document = document_of(4, "pruned")
    edge = document["edges"][0]
    edge["attribution"] = value
    with pytest.raises(
        ValueError, match=f"the attribution of the edge from {edge['src']} to {edge['tgt']} is .*finite"
    ):
        from_document(document)
    document = document_of(4, "pruned")
    node = document["nodes"][0]
    node["activation_map"]["0"] = value
    with pytest.raises(ValueError, match=f"activation map of the node {node['id']} is not finite"):
        from_document(document)


def test_a_node_that_comes_twice_or_cannot_be_held_is_refused():
    document = document_of(4, "pruned")
    for name, value in (("layer", 2**15), ("feat_idx", -(2**70)), ("activation_map", {str(2**31): 1.0})):
        node = document["nodes"][0]
        with pytest.raises(
            ValueError, match=f"the node {node['id']} has a layer, feature or position that a graph cannot"
        ):
            from_document(document | {"nodes": [node | {name: value}, *document["nodes"][1:]]})
    document["nodes"].append(document["nodes"][1])
    with pytest.raises(ValueError, match=f"two nodes are called {document['nodes'][1]['id']}"):
        from_document(document)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_other_json_is_refused(tmp_path, text):
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(UserError, match="g.json is no"):  # "is not a graph", "is not readable"
        read_reference_json(path)
