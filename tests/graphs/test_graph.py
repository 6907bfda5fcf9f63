"""A graph survives its file, and a damaged file says what is wrong."""

import io
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.graph import Graph, subgraph
from difffract_jax.graphs.provenance import Provenance
from random_graphs import random_graph, random_output_graph


def assert_same(a, b):
    for field in fields(Graph):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), field.name
        else:
            assert x == y, field.name


@given(st.integers(0, 10_000), st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3))
@settings(max_examples=15, deadline=None)
def test_what_is_saved_is_loaded(tmp_path_factory, seed, extra):
    path = tmp_path_factory.mktemp("graph") / "g.npz"
    for name in ("format_version", *(field.name for field in fields(Provenance))):
        extra.pop(name, None)
    graph = replace(random_graph(seed), supernodes={"a": [0, 1]}).with_provenance(extra=extra, steps=(1,))
    graph.save(path)
    assert_same(Graph.load(path), graph)


def test_keeping_everything_is_the_same_graph():
    graph = replace(random_graph(2), supernodes={"a": [0, 2]})
    ones = (np.ones(graph.node_kind.size, bool), np.ones(graph.edge_source.size, bool))
    assert_same(subgraph(graph, *ones), graph)


def test_edges_go_with_their_nodes():
    graph = replace(random_graph(2), supernodes={"a": [0, 2], "b": [2]})
    nodes = np.arange(graph.node_kind.size) != 2
    kept = subgraph(graph, nodes, np.ones(graph.edge_source.size, bool))
    gone = (graph.edge_source == 2) | (graph.edge_target == 2)
    assert kept.edge_source.size == np.sum(~gone) and kept.supernodes == {"a": [0]}
    assert np.array_equal(kept.node_feature, graph.node_feature[nodes])
    assert np.array_equal(kept.node_feature[kept.edge_source], graph.node_feature[graph.edge_source[~gone]])


def test_weights_are_shares_of_the_targets():
    graph = random_output_graph(0)
    assert graph.targets.tolist() == [0, 1, 2]
    assert graph.root_weights[:3].tolist() == [2 / 3.5, 1 / 3.5, 0.5 / 3.5] and not graph.root_weights[3:].any()
    assert random_graph(0).root_weights[0] == 1 and random_graph(0).targets.tolist() == [0]


def test_all_targets_are_kept():
    graph = random_output_graph(0)
    kept = subgraph(graph, np.zeros(graph.node_kind.size, bool), np.ones(graph.edge_source.size, bool))
    assert kept.node_kind.size == 3 and kept.target_node.tolist() == [0, 1, 2]


@pytest.mark.parametrize("weights", [(), (1.0, -1.0), (0.0,), (1.0, float("inf"))])
def test_weights_that_are_not_positive_are_refused(weights):
    with pytest.raises(ValueError, match="instead of a list of positive numbers"):
        random_graph(0).with_provenance(target_weights=weights)


def test_targets_that_are_not_first_are_refused():
    graph = random_output_graph(0)
    with pytest.raises(ValueError, match="its 3 targets are not its first nodes"):
        replace(graph, target_node=graph.target_node[::-1].copy())


def test_a_file_from_before_cumulative_shares_is_read(tmp_path, arrays):
    del arrays["node_cumulative"]
    assert np.isnan(Graph.load(rewritten(tmp_path, arrays)).node_cumulative).all()


def test_the_conservation_error_is_relative_to_absolute_edges_and_bias():
    graph = random_graph(3)
    bias, size = np.linspace(-2, 2, graph.target_node.size), graph.target_abs_sum
    graph = replace(graph, target_bias=bias, target_preactivation=graph.target_sum + bias)
    assert graph.largest_conservation_error <= 1e-15
    missed = np.zeros(bias.size)
    missed[[0, -1]] = 0.25 * (size[0] + 2), 0.5 * (size[-1] + 2)
    wrong = replace(graph, target_preactivation=graph.target_preactivation + missed)
    assert wrong.conservation_error[[0, -1]] == pytest.approx([0.25, 0.5], abs=1e-12)
    assert wrong.conservation_error[1:-1].max() <= 1e-15 and wrong.largest_conservation_error == pytest.approx(0.5)


def test_a_target_without_edges_and_bias_is_held_to_its_absolute_error():
    graph = random_graph(3)
    zeros, u = np.zeros(graph.target_node.size), np.full(graph.target_node.size, 0.125)
    bare = replace(graph, target_abs_sum=zeros, target_sum=zeros, target_bias=zeros, target_preactivation=u)
    assert bare.target_scale.tolist() == np.ones(u.size).tolist() and bare.conservation_error.tolist() == u.tolist()


def test_documents_that_do_not_tell_preactivations_have_no_conservation_error():
    graph = random_graph(3)
    unknown = replace(graph, target_preactivation=np.full(graph.target_node.size, np.nan))
    assert unknown.largest_conservation_error is None and np.isnan(unknown.conservation_error).all()


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "g.npz"
    random_graph(0).save(path)
    return dict(np.load(path))


def rewritten(tmp_path, arrays):
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    return path


def metadata(**entries):
    return np.frombuffer(json.dumps(entries).encode(), np.uint8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"edge_source": None}, "it lacks edge_source; trace it again"),
        ({"edge_source": np.zeros(1, np.int32)}, "entries instead of 1"),
        ({"node_kind": np.zeros(3, np.int64)}, "node_kind is int64 with 1 axes instead of uint8"),
        ({"target_node": np.array([10**6], np.int32)}, "entries instead of 1"),
        ({"map_indptr": np.zeros(2, np.int64)}, "map_indptr has 2 entries"),
        ({"metadata": metadata(format_version=99)}, "graph format 99, but this release reads 1"),
        ({"metadata": np.zeros(4, np.uint8)}, "its metadata are not JSON"),
        ({"metadata": metadata(format_version=1, steps="x")}, 'steps is "x", but should be a valid array; give'),
        ({"metadata": metadata(format_version=1, target_weights=[None])}, "target_weights.0 is null, but should be a"),
        ({"metadata": metadata(format_version=1, target_weights=[0])}, "target_weights are .0.0. instead of a list"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, arrays, change, sentence):
    merged = {name: array for name, array in (arrays | change).items() if array is not None}
    with pytest.raises(UserError, match=sentence):
        Graph.load(rewritten(tmp_path, merged))


def test_an_index_that_points_nowhere_is_refused(tmp_path, arrays):
    arrays["edge_source"][0] = 10**6
    with pytest.raises(UserError, match="edge_source points outside the"):
        Graph.load(rewritten(tmp_path, arrays))


def test_what_is_no_graph_file_is_refused(tmp_path):
    for name, content in (("text.npz", b"hello"), ("empty.npz", b""), ("cut.npz", b"PK\x03\x04 and no more")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a readable .npz file"):
            Graph.load(tmp_path / name)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    (tmp_path / "single.npz").write_bytes(single.getvalue())
    with pytest.raises(UserError, match="is a single array, not a graph"):
        Graph.load(tmp_path / "single.npz")


def test_a_pickle_is_not_opened(tmp_path, arrays):
    path = rewritten(tmp_path, arrays | {"node_value": np.array([{}], dtype=object)})
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        Graph.load(path)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "g.npz"
    random_graph(0).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        random_graph(1).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
