"""Documents of other tools: what the schema makes optional may be missing, what is wrong is named."""

import json
from pathlib import Path

import pytest
from viewer_documents import ERROR, FEATURE, document, link, node

from difffract_jax.config import UserError
from difffract_jax.graphs.files.viewer_document import checked_document, problem_of, read_document

SAMPLE = Path(__file__).parents[2] / "data" / "sample_graph.json"


@pytest.mark.parametrize("view", [None, {}, {"supernodes": ""}, {"pinnedIds": "a,b", "supernodes": "[]"}])
def test_the_view_may_be_missing_or_saved_as_strings(view):
    changed = document() | {"qParams": view}
    assert checked_document(changed, "g")["qParams"] == {
        key: (["a", "b"] if key == "pinnedIds" else []) for key in view or {}
    }
    del changed["qParams"]
    assert checked_document(changed, "g")["qParams"] == {}


@pytest.mark.parametrize("name", ["clerp", "jsNodeId"])
def test_what_only_serves_to_show_a_node_may_be_missing_or_null(name):
    changed = document()
    changed["nodes"][0][name] = None
    del changed["nodes"][1][name]
    assert problem_of(changed) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nodes": None}, "its nodes are null instead of a list"),
        ({"nodes": []}, "it has no nodes"),
        ({"links": []}, "it has 5 nodes, but no links between them"),
        ({"links": [link("a", "b", 1.0)]}, "none of its links joins two of its nodes"),
        ({"links": [{"source": "a"}]}, "a link has no target, in "),
        ({"links": [3]}, "a link is a number instead of an object"),
        ({"links": [link("E_106_1", "0_928_1", "1")]}, 'a link has the weight "1" instead of a number'),
        ({"links": [link("E_106_1", "0_928_1", True)]}, "a link has the weight true instead of a number"),
        ({"metadata": {}}, "its metadata has no slug"),
        ({"metadata": [1]}, "its metadata are a list instead of an object"),
        ({"qParams": 3}, "its qParams are a number instead of an object"),
        ({"qParams": {"supernodes": "[["}}, "the supernodes of its qParams are not lists of names"),
        ({"qParams": {"supernodes": [3]}}, "the supernodes of its qParams are not lists of names"),
        ({"nodes": [node("a", FEATURE, "0", 1, 0)]}, "it has no logit"),
        ({"nodes": [node("a", FEATURE, "0", "1", 0)]}, 'a node has the ctx_idx "1" instead of a whole number'),
    ],
)
def test_other_documents_are_refused(tmp_path, change, sentence):
    path = tmp_path / "g.json"
    path.write_text(json.dumps(document() | change))
    with pytest.raises(UserError) as caught:
        read_document(path)
    told = str(caught.value)
    assert told.startswith(f"{path} is not a graph of circuit-tracer or Neuronpedia: {sentence}"), told


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e300"])
@pytest.mark.parametrize("field", ["weight", "activation", "token_prob"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value, field):
    changed = document()
    place = {"weight": changed["links"][1], "activation": changed["nodes"][1], "token_prob": changed["nodes"][4]}[field]
    place[field] = 77.25
    path = tmp_path / "g.json"
    path.write_text(json.dumps(changed).replace("77.25", value))
    name = {"weight": "from 0_928_1 to 1_57794_1", "activation": "node 0_928_1", "token_prob": "node 27_5_2"}[field]
    with pytest.raises(UserError, match=f"the {field} of the .*{name} is .*, which is not a finite number"):
        read_document(path)


def test_an_error_may_share_its_name_with_a_feature_and_no_other_nodes_may():
    changed = document()
    error = changed["nodes"][3]
    for other, allowed in (
        (node("0_0_1", FEATURE, "0", 1, 0), True),
        (node("0_0_1", ERROR, 5, 1, -1), True),
        (error, False),
        (node("0_0_1", ERROR, 0, 1, -1), False),
        (node("0_928_1", FEATURE, "0", 1, 3), False),
        (node("0_928_1", FEATURE, "7", 2, 3), False),
    ):
        problem = problem_of(changed | {"nodes": [*changed["nodes"], other]})
        assert (problem is None) == allowed, (other, problem)
        assert allowed or problem.startswith(f"two nodes are called {other['node_id']}")


def test_the_sample_is_whole():
    assert problem_of(json.loads(SAMPLE.read_text())) is None
