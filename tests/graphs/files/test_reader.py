"""What a graph file is, its content tells; its name never does."""

import gzip
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from viewer_documents import document

from difffract_jax.config import UserError
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files.reader import is_archive, read_graph
from difffract_jax.graphs.files.reference_json import to_document, write_reference_json
from difffract_jax.graphs.pruning import prune
from random_graphs import random_graph


def test_files_are_told_apart_by_content(tmp_path):
    graph = random_graph(0)
    graph.save(tmp_path / "g.npz")
    (tmp_path / "g.npz").rename(tmp_path / "g.json")
    write_reference_json(graph, tmp_path / "g.txt")
    (tmp_path / "g.npz").write_text(json.dumps(document()))
    found = compare(read_graph(tmp_path / "g.json"), read_graph(tmp_path / "g.txt"))
    assert found.largest_error < 1e-6 and not found.nodes_only_in_a + found.nodes_only_in_b
    assert read_graph(tmp_path / "g.npz").provenance.viewer["slug"] == "t"
    assert [is_archive(tmp_path / name) for name in ("g.json", "g.txt", "g.npz")] == [True, False, False]


def test_marks_of_encodings_and_gzip_do_not_matter(tmp_path):
    text = json.dumps(document())
    whole = {"bom.json": text.encode("utf-8-sig"), "wide.json": text.encode("utf-16"), "g.json.gz": text.encode()}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert read_graph(tmp_path / name).edge_source.size == 5


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([1, 2], "it is JSON, a list; a graph has nodes and links"),
        ({}, "it is JSON, an object without any entry; a graph has"),
        ({"a": 1, "nodes": []}, "it is JSON, an object with a, nodes; a graph has nodes and links"),
        ({str(n): n for n in range(9)}, "an object with 0, 1, 2, 3, 4, 5, ...; a graph has"),
    ],
)
def test_other_json_is_told_by_what_it_holds(tmp_path, value, told):
    (tmp_path / "g.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"g.json is not a graph file: {told}" if "it is" in told else told):
        read_graph(tmp_path / "g.json")


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.npz does not exist; give a graph file"):
        read_graph(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match=f"{tmp_path.name} is a directory; give a graph file"):
        read_graph(tmp_path)


def test_archives_of_others_are_called_what_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.ones(2))
    torch.save({"adjacency_matrix": torch.ones(2)}, tmp_path / "graph.pt")
    np.save(tmp_path / "a.npy", np.ones(2))
    empty = io.BytesIO()
    np.savez(empty)
    (tmp_path / "b.npz").write_bytes(empty.getvalue())
    for name, told in (
        ("a.npz", "is not a graph: it is an archive of weights"),
        ("graph.pt", "is not a graph: it is a file of PyTorch; export that graph as JSON"),
        ("a.npy", "is a single array, not a graph"),
        ("b.npz", "is not a graph: it is an empty archive"),
    ):
        with pytest.raises(UserError, match=told):
            read_graph(tmp_path / name)


@pytest.mark.parametrize("version", [1, "2"])
def test_documents_of_the_reference_are_known_by_nodes_and_edges(tmp_path, version):
    write_reference_json(random_graph(0), tmp_path / "g.json")
    changed = json.loads((tmp_path / "g.json").read_text()) | {"version": version}
    (tmp_path / "g.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=f"not a version 2 graph of the reference: its version is {version!r}, not 2"):
        read_graph(tmp_path / "g.json")


@pytest.mark.parametrize("name", ["preactivation", "encoder_bias"])
def test_a_target_of_the_reference_has_finite_numbers(tmp_path, name):
    graph = to_document(random_graph(0))
    graph["target"][name] = float("nan")
    (tmp_path / "g.json").write_text(json.dumps(graph))
    with pytest.raises(UserError, match=f"the {name} of its target is nan, which is not a finite number"):
        read_graph(tmp_path / "g.json")


def test_a_prompt_with_half_a_character_is_read_saved_and_read_again(tmp_path):
    base = document()
    base["metadata"]["prompt"] = "a \ud83d fox"
    (tmp_path / "g.json").write_text(json.dumps(base))
    read_graph(tmp_path / "g.json").save(tmp_path / "g.npz")
    assert read_graph(tmp_path / "g.npz").provenance.viewer["prompt"] == "a \ufffd fox"
    base["metadata"]["prompt"] = "a \U0001f98a fox"
    (tmp_path / "g.json").write_text(json.dumps(base))
    assert read_graph(tmp_path / "g.json").provenance.viewer["prompt"] == "a \U0001f98a fox"


VALUES = (None, "", 0, -1, 1.5, float("nan"), True, [], {}, "x", "1", 2**70, -(2**70), [1], {"a": 1}, "0_0_1", 1e300)


def places(value, path=()):
    """Yields the paths to everything in a JSON value, of lists to the first entries."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged(value, path, wrong):
    """Returns a JSON value with another one at a place; `places` stands for none there."""
    if not path:
        return wrong
    key, *rest = path
    inner = damaged(value[key], rest, wrong)
    if isinstance(value, list):
        return [*value[:key], *([] if inner is places else [inner]), *value[key + 1 :]]
    return {name: inner if name == key else one for name, one in value.items() if name != key or inner is not places}


@given(st.sampled_from([document(), to_document(random_graph(0))]), st.sampled_from([places, *VALUES]), st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_document_is_a_graph_or_one_sentence(tmp_path_factory, whole, wrong, data):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(damaged(whole, data.draw(st.sampled_from(list(places(whole)))), wrong)))
    try:
        graph = read_graph(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert prune(graph).edge_source.size <= graph.edge_source.size
