"""Features that do the same are grouped, every time alike, and groups can be changed by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError, resolve
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import find_nodes, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.reduction import GroupingSettings
from difffract_jax.graphs.supernodes import Edits, edit_supernodes, find_supernodes, parse_assignment, similarity
from random_graphs import random_graph, random_output_graph


def features_of(graph):
    return np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)


def with_twin(graph, node, *, scale=2.0, sign=1.0):
    """The graph with one more feature, at its end: like `node`, but `scale` times as strong, out-edges times `sign`."""
    count = graph.node_kind.size
    out, into = graph.edge_source == node, graph.edge_target == node
    own = slice(graph.map_indptr[node], graph.map_indptr[node + 1])
    columns = {name: np.append(getattr(graph, name), getattr(graph, name)[node]) for name in NODE_COLUMNS}
    columns["node_feature"][-1] += 100
    return replace(
        graph,
        **columns,
        edge_source=np.concatenate(
            [graph.edge_source, np.full(out.sum(), count), graph.edge_source[into]], dtype=np.int32
        ),
        edge_target=np.concatenate(
            [graph.edge_target, graph.edge_target[out], np.full(into.sum(), count)], dtype=np.int32
        ),
        edge_attribution=np.concatenate(
            [graph.edge_attribution, scale * sign * graph.edge_attribution[out], scale * graph.edge_attribution[into]],
            dtype=np.float32,
        ),
        map_indptr=np.append(graph.map_indptr, graph.map_indptr[-1] + own.stop - own.start),
        map_position=np.append(graph.map_position, graph.map_position[own]),
        map_value=np.append(graph.map_value, np.float32(scale) * graph.map_value[own]),
    )


NODE_COLUMNS = (
    *("node_kind", "node_step", "node_stream", "node_block", "node_position", "node_feature"),
    *("node_value", "node_influence", "node_cumulative"),
)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_twins_are_grouped_and_opposites_are_not(seed):
    graph = aggregate(random_graph(seed))
    node = int(features_of(graph)[-1])
    pair = np.array([node, graph.node_kind.size])
    twin = with_twin(graph, node)
    assert similarity(twin, pair)[0, 1] == pytest.approx(1, abs=1e-6)
    groups = find_supernodes(twin, threshold=0.999).supernodes.values()
    assert [set(pair)] == [set(group) for group in groups if node in group]
    opposite = with_twin(graph, node, sign=-1.0)
    assert similarity(opposite, pair, map_weight=0.0)[0, 1] <= 0.5 + 1e-6
    groups = find_supernodes(opposite, threshold=0.9, map_weight=0.0).supernodes.values()
    assert not [group for group in groups if set(pair) <= set(group)]


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.6]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_two_of_a_group_are_alike_and_no_node_is_in_two(seed, threshold, several):
    graph = random_output_graph(seed) if several else aggregate(random_graph(seed, max_nodes=30))
    grouped = find_supernodes(graph, threshold=threshold)
    members = [node for group in grouped.supernodes.values() for node in group]
    assert len(members) == len(set(members)) and not set(members) & set(graph.targets.tolist())
    for group in grouped.supernodes.values():
        assert len(group) > 1 and similarity(graph, np.array(group)).min() >= threshold - 1e-6
    assert find_supernodes(grouped, threshold=threshold).supernodes == grouped.supernodes


def test_similarity_is_the_mean_cosine_of_what_enters_and_leaves():
    graph = random_output_graph(2)
    matrix = np.zeros((graph.node_kind.size,) * 2)
    matrix[graph.edge_target, graph.edge_source] = graph.edge_attribution
    features = features_of(graph)

    def cosine(a, b):
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0

    expected = [
        [(cosine(matrix[a], matrix[b]) + cosine(matrix[:, a], matrix[:, b])) / 2 for b in features] for a in features
    ]
    assert np.allclose(similarity(graph, features, map_weight=0.0), expected, atol=1e-9)
    same = graph.node_stream[features][:, None] == graph.node_stream[features][None, :]
    maps = similarity(graph, features, map_weight=1.0)
    assert not maps[~same].any() and maps[same].max() == pytest.approx(1)


def test_groups_are_named_by_their_strongest_member_and_survive_the_file(tmp_path):
    graph = prune(with_twin(aggregate(random_graph(4)), 3), node_threshold=1.0, edge_threshold=1.0)
    grouped = find_supernodes(graph, threshold=0.95)
    names = node_names(graph)
    assert grouped.supernodes and grouped.provenance.grouping == GroupingSettings(threshold=0.95, map_weight=0.25)
    for name, group in grouped.supernodes.items():
        strongest = max(group, key=lambda node: graph.node_influence[node])
        assert name == f"{names[strongest]} and {len(group) - 1} more"
    grouped.save(tmp_path / "g.npz")
    assert Graph.load(tmp_path / "g.npz").supernodes == grouped.supernodes


def test_groups_can_be_changed_by_hand(tmp_path):
    graph = aggregate(random_graph(4))
    names = node_names(graph)
    graph = replace(graph, supernodes={"a": [1, 2], "b": [3, 4], "c": [5]})
    (tmp_path / "edits.json").write_text(
        f'{{"remove": ["b"], "rename": {{"a": "red"}}, "set": {{"new": ["{names[2]}", "{names[5]}"]}}}}'
    )
    edits = resolve(Edits, file=tmp_path / "edits.json")
    assert edit_supernodes(graph, edits).supernodes == {"red": [1], "new": [2, 5]}
    assert parse_assignment("sky = img/2/f1, txt/0/f2") == ("sky", ["img/2/f1", "txt/0/f2"])


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ({"remove": ["x"]}, "has no supernode 'x'; it has 'a', 'b'"),
        ({"rename": {"a": "b"}}, "would get the same name"),
        ({"set": {"new": ["img/9/f9999"]}}, "has no node `img/9/f9999`; did you mean|write it as"),
        ({"rmove": ["a"]}, "did you mean `remove`"),
        ({"set": {"new": "img/2/f1"}}, "`set.new` was 'img/2/f1'"),
    ],
)
def test_edits_that_fit_nothing_are_refused(edits, sentence):
    graph = replace(aggregate(random_graph(4)), supernodes={"a": [1], "b": [2]})
    with pytest.raises(UserError, match=sentence):
        edit_supernodes(graph, resolve(Edits, edits))


def test_numbers_out_of_range_and_graphs_too_large_are_refused(monkeypatch):
    graph = random_graph(0)
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"map_weight": -0.1}):
        with pytest.raises(UserError, match="threshold must lie in"):
            find_supernodes(graph, **wrong)
    monkeypatch.setattr("difffract_jax.graphs.supernodes.MAX_FEATURES", 3)
    with pytest.raises(UserError, match="more than the 3 that are clustered together; prune it first"):
        find_supernodes(graph)
    for text in ("name", "=a", "name=", "name=,"):
        with pytest.raises(UserError, match="not of the form NAME=node,node"):
            parse_assignment(text)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_node_has_a_name_of_its_own_and_is_found_by_it(seed, summed):
    graph = random_output_graph(seed)
    graph = aggregate(graph) if summed else graph
    names = node_names(graph)
    assert len(set(names)) == len(names) and [name.split("#")[0] for name in names[:2]] == ["output 0", "output 1"]
    assert find_nodes(graph, names).tolist() == list(range(len(names)))
