"""The list of graphs that circuit-tracer's viewer reads: written, merged, never in place of something else."""

import json

import pytest

from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.files.viewer_index import NAME, add_to_index, read_index
from difffract_jax.graphs.files.viewer_json import to_document
from shown_circuits import circuit


def metadata(slug, prompt="a red circle"):
    image = "data:image/png;base64,aGVsbG8="
    return to_document(circuit(prompt=prompt), "circuit-tracer", ViewerOptions(slug=slug), image=image)["metadata"]


def test_a_graph_is_listed_once_and_others_stay(tmp_path):
    assert read_index(tmp_path) == {"graphs": []}
    other = {"slug": "theirs", "scan": "gemma", "title_prefix": "x", "prompt": "p"}
    (tmp_path / NAME).write_text(json.dumps({"graphs": [other], "more": 1}), encoding="utf-8")
    for told in (metadata("mine", "old"), metadata("second"), metadata("mine")):
        assert add_to_index(tmp_path, told) == tmp_path / NAME
    index = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert index["more"] == 1 and [graph["slug"] for graph in index["graphs"]] == ["theirs", "second", "mine"]
    assert index["graphs"][0] == other and index["graphs"][2]["prompt"] == "a red circle"
    assert "image_input" not in index["graphs"][2] and index["graphs"][2]["node_threshold"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"graphs": 3}', '{"graphs": [3]}'])
def test_another_file_of_that_name_is_left_alone(tmp_path, content):
    (tmp_path / NAME).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not the list of graphs that circuit-tracer's viewer reads"):
        add_to_index(tmp_path, metadata("mine"))
    assert (tmp_path / NAME).read_text(encoding="utf-8") == content
