"""Groups that were made in circuit-tracer's viewer or on Neuronpedia come back as groups of ours."""

import json
import urllib.parse

import numpy as np
import pytest
from viewer_documents import document as foreign_document

from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.graphs.files.viewer_groups import is_foreign, read_any_groups
from difffract_jax.graphs.files.viewer_json import to_document, viewer_url
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.groups import Groups, given_names, identity, with_groups, write_groups
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes
from shown_circuits import circuit

GRAPH = aggregate(circuit())
NAMES = node_names(GRAPH)
FEATURES = [n for n in np.flatnonzero(GRAPH.node_kind == FEATURE).tolist() if n >= GRAPH.targets.size]


def document_of(graph, **more):
    return to_document(graph, "circuit-tracer", ViewerOptions(slug="g", **more))


DOCUMENT = document_of(GRAPH)
BY_NAME = {node["name"]: node for node in DOCUMENT["nodes"]}


def ids(*nodes):
    return [BY_NAME[NAMES[node]]["node_id"] for node in nodes]


CIRCLE = ("the circle", *ids(*FEATURES[:2]))


def a_view(clerps=(), groups=(CIRCLE,)):
    """A view with a group of two features, four nodes pinned, and labels."""
    pinned = [*ids(*FEATURES[:3]), BY_NAME[NAMES[-1]]["node_id"]]
    return {"pinnedIds": pinned, "supernodes": [list(group) for group in groups], "clerps": [list(c) for c in clerps]}


def saved_by_circuit_tracer(view):
    """What its server writes of a view: text, and null for what the address does not name."""
    listed = {"supernodes": json.dumps(view["supernodes"]), "clerps": json.dumps(view["clerps"])}
    return {"pinnedIds": ",".join(view["pinnedIds"]), "linkType": None, "clickedId": None, "sg_pos": None} | listed


def expected(**names):
    about = identity(GRAPH)
    pinned = (*(NAMES[n] for n in FEATURES[:3]), NAMES[-1])
    groups = {"the circle": tuple(NAMES[n] for n in FEATURES[:2])}
    return Groups(graph=about, groups=groups, pinned=pinned, names=names)


def written(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("graph", [None, GRAPH, circuit(), prune(circuit(), node_threshold=0.5)])
def test_a_document_saved_in_circuit_tracer_s_viewer_holds_for_its_graph(tmp_path, graph):
    first = BY_NAME[NAMES[FEATURES[0]]]
    view = saved_by_circuit_tracer(a_view([[str(first["feature"]), "round"]]))
    path = written(tmp_path / "g.json", DOCUMENT | {"qParams": view})
    found = read_any_groups(path, graph)
    # It names a feature by its integer, so at every step.
    kind = first["feature_type"]
    same = [n for n in DOCUMENT["nodes"] if (n["feature"], n["feature_type"]) == (first["feature"], kind)]
    assert found == expected(**{node["name"]: "round" for node in same})


def test_what_neuronpedia_keeps_holds_for_the_graph_that_was_exported(tmp_path):
    first = BY_NAME[NAMES[FEATURES[0]]]
    key = f"{first['layer']}_{first['feature']}_{first['ctx_idx']}"
    view = a_view([[key, "round"], [key, ""]]) | {"modelId": "flux", "slug": "g", "pruningThreshold": 0.8}
    for graph in (GRAPH, circuit()):
        assert read_any_groups(written(tmp_path / "v.json", view), graph) == expected(**{NAMES[FEATURES[0]]: "round"})
    with pytest.raises(UserError, match="does not hold; give the document itself"):
        read_any_groups(tmp_path / "v.json")


def test_what_neuronpedia_hands_out_has_its_labels_in_the_address_that_it_names(tmp_path):
    first, view = BY_NAME[NAMES[FEATURES[0]]], a_view()
    key = f"{first['layer']}_{first['feature']}_{first['ctx_idx']}"
    link = f"https://a.org/flux/graph?{urllib.parse.urlencode({'slug': 'g', 'clerps': json.dumps([[key, 'round']])})}"
    metadata = DOCUMENT["metadata"] | {"info": {"neuronpedia_link": link}}
    view = {"pinnedIds": view["pinnedIds"], "supernodes": view["supernodes"], "linkType": "both", "clickedId": ""}
    path = written(tmp_path / "g.json", DOCUMENT | {"metadata": metadata, "qParams": view})
    assert read_any_groups(path, circuit()) == expected(**{NAMES[FEATURES[0]]: "round"})


def test_an_address_holds_a_view(tmp_path):
    view = saved_by_circuit_tracer(a_view())
    query = urllib.parse.urlencode({"slug": "g", **{k: v for k, v in view.items() if v}})
    path = written(tmp_path / "address.txt", f"http://localhost:8041/index.html?{query}\n")
    assert read_any_groups(path, GRAPH) == expected()
    grouped = find_supernodes(GRAPH, threshold=0.2)
    address = viewer_url(document_of(grouped))
    found = read_any_groups(written(path, address), grouped)
    assert with_groups(grouped, found).supernodes.keys() == found.groups.keys() and found.groups
    assert [*with_groups(grouped, found).supernodes.values()] == [*grouped.supernodes.values()]


def test_single_positions_keep_theirs(tmp_path):
    graph = circuit()
    document = document_of(graph, by_position=True)
    node = next(n for n in document["nodes"] if n["feature_type"] == "cross layer transcoder")
    view = {"pinnedIds": [node["node_id"]], "clerps": json.dumps([[str(node["feature"]), "round"]])}
    found = read_any_groups(written(tmp_path / "g.json", document | {"qParams": view}), graph)
    assert found.pinned == (node["name"],) and "@" in node["name"]
    named = given_names(graph, found)
    features = dict(zip(node_names(graph), feature_names(graph), strict=True))
    assert {*named} == {name for name, feature in features.items() if feature == features[node["name"]]}


def test_documents_of_other_tools_are_called_as_their_graph_is(tmp_path):
    view = {"pinnedIds": "0_928_1,27_5_2", "supernodes": '[["a b", "0_928_1", "1_57794_1"]]', "clerps": None}
    path = written(tmp_path / "t.json", foreign_document() | {"qParams": view})
    graph = read_graph(path)
    found = read_any_groups(path, graph)
    assert found.groups == {"a b": ("txt/0/f928@1", "txt/1/f57794@1")} and found.pinned[0] == "txt/0/f928@1"
    assert prune(graph, node_threshold=0.01, by_position=True, keep=found.pinned).node_kind.size >= 3
    view = {"pinnedIds": ["0_928_1"]}
    with pytest.raises(UserError, match="another tool's; give the saved document"):
        read_any_groups(written(tmp_path / "v.json", view), graph)


def test_labels_of_a_document_are_those_that_say_more_than_the_name(tmp_path):
    document = foreign_document()
    document["nodes"][1]["clerp"] = "the word a"
    path = written(tmp_path / "t.json", document)
    assert read_graph(path).provenance.labels == {"txt/0/f928": "the word a"}
    ours = written(tmp_path / "g.json", document_of(GRAPH, labels={feature_names(GRAPH)[FEATURES[0]]: "round"}))
    assert [*read_graph(ours).provenance.labels.values()] == ["round"]
    name = feature_names(GRAPH)[FEATURES[0]]
    again = written(tmp_path / "g.json", document_of(GRAPH, labels={name: f"round · {name}"}))
    assert [*read_graph(again).provenance.labels.values()] == ["round"]
    read_graph(path).save(tmp_path / "t.npz")
    assert Graph.load(tmp_path / "t.npz").provenance.labels == {"txt/0/f928": "the word a"}
    del document["nodes"][1]["clerp"]
    assert read_graph(written(path, document)).provenance.labels is None


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (DOCUMENT | {"qParams": {"pinnedIds": "9_9_9"}}, "names the node '9_9_9', which the graph does not have"),
        (DOCUMENT | {"qParams": {"pinnedIds": [3, 4]}}, "names the node '3' and 1 more"),
        (DOCUMENT | {"qParams": {"supernodes": "[[1]]"}}, "the supernodes of its qParams are not lists of names"),
        (DOCUMENT | {"qParams": {"clerps": "{"}}, "The clerps of PATH are not a list"),
        (DOCUMENT | {"qParams": {"clerps": "[" * 100_000}}, "The clerps of PATH are not a list"),
        (DOCUMENT | {"qParams": {"clerps": '[["a"]]'}}, "are not pairs of a feature and its label"),
        (DOCUMENT | {"qParams": {"clerps": '[["a", "b"]]'}}, "labels the node 'a', which the graph does not have"),
        (DOCUMENT | {"nodes": [], "qParams": {}}, "it has no nodes"),
        ({"supernodes": "x"}, "The supernodes of PATH are not a list"),
        ({"supernodes": [["a", "9_9_9"]]}, "names the node '9_9_9'"),
        ({"pinnedIds": ""}, "holds no pinnedIds, supernodes or clerps"),
        ("https://[a.org/?pinnedIds=9_9_9", "holds no pinnedIds, supernodes or clerps"),
        ("https://a.org/?slug=g", "holds no pinnedIds, supernodes or clerps"),
        ({"format": "other"}, "is not a file of groups"),
        ("no groups", "is not JSON"),
    ],
)
def test_what_holds_no_groups_of_this_graph_is_one_sentence(tmp_path, stored, told):
    path = written(tmp_path / "g.json", stored)
    with pytest.raises(UserError) as error:
        read_any_groups(path, GRAPH)
    assert told.replace("PATH", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_groups_of_another_graph_are_refused(tmp_path):
    path = written(tmp_path / "g.json", DOCUMENT | {"qParams": a_view()})
    with pytest.raises(UserError, match="groups of another graph"):
        read_any_groups(path, circuit(prompt="a blue square"))


def test_groups_of_ours_are_read_as_ever(tmp_path):
    path = tmp_path / "g.groups.json"
    assert not is_foreign(path)
    write_groups(expected(), path)
    assert read_any_groups(path, GRAPH) == expected() and not is_foreign(path)
    assert is_foreign(written(tmp_path / "v.json", {"pinnedIds": []}))


def test_groups_of_one_name_are_numbered(tmp_path):
    groups = (("red", *ids(*FEATURES[:2])), ("red", *ids(*FEATURES[2:4])), ("", *ids(FEATURES[4])))
    path = written(tmp_path / "v.json", a_view(groups=groups))
    assert [*read_any_groups(path, GRAPH).groups] == ["red", "red (2)", "supernode"]
