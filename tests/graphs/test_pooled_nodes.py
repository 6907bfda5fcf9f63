"""Modulations and words of several steps and branches in a graph: names, order, sums, files; made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from difffract_jax.address import IMG, NEGATIVE, PROMPT, flux_layout
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.files.viewer_json import ViewerOptions, to_document
from difffract_jax.graphs.frozen_attention import without_pooled
from difffract_jax.graphs.graph import MODULATION, WORD, Graph
from difffract_jax.graphs.held_paths import ExplainedPooled
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.pooled_nodes import PooledNodes, with_pooled_nodes
from difffract_jax.graphs.provenance import KnownRun
from random_graphs import random_output_graph

PLACES = [(0, PROMPT), (0, NEGATIVE), (1, PROMPT), (1, NEGATIVE)]
EDGES = np.array([0.5, -0.25, 2.0, 1.0])
WORDS = np.array([[0.3, 0.0], [0.0, -0.2], [1.5, 0.0], [0.0, 0.75]])


@pytest.fixture
def graph():
    """A random graph over two steps, with a gate of one block in both branches of both, and a word of each prompt."""
    made = random_output_graph(0, weights=(2.0,)).with_provenance(shared=KnownRun(layout=flux_layout(4, 0)))
    step, branch = np.array(PLACES).T
    four, size = np.ones(4, np.int64), float(np.abs(EDGES).sum())
    nodes = PooledNodes(
        step=step,
        branch=branch,
        block=four,
        stream=IMG * four,
        row=2 * four,
        change=np.ones(4),
        edges=EDGES[None],
        remainder=np.zeros((1, 4)),
        word_branch=np.array([PROMPT, NEGATIVE]),
        place=np.array([1, 1]),
        words=WORDS,
        bias=made.root_weights[made.targets] @ EDGES[None] - WORDS.sum(axis=1),
    )
    told = ExplainedPooled(total=EDGES.sum(), absolute=size, remainder=0.0, direct=0.0, unspoken=0.0, points=8)
    found = with_pooled_nodes(made, nodes, 0, 1e-6)
    return made, found.with_provenance(pooled=(told,), words=("", "red"), negative_words=("", "blue"))


def test_modulations_are_named_by_step_and_branch_and_words_by_their_prompt(graph, tmp_path):
    made, found = graph
    names = np.array(node_names(found))
    gate = "img/1/attn_gate"
    expected = [f"{gate}#{step}~{('prompt', 'negative')[branch]}" for step, branch in PLACES]
    assert names[found.node_kind == MODULATION].tolist() == expected
    words = found.node_kind == WORD
    assert names[words].tolist() == ["word red@1~prompt", "word blue@1~negative"]
    assert not found.node_step[words].any() and len({*names.tolist()}) == names.size
    found.save(tmp_path / "g.npz")
    again = Graph.load(tmp_path / "g.npz")
    assert again.provenance == found.provenance and node_names(again) == names.tolist()
    none = replace(found, node_branch=np.zeros_like(found.node_branch))
    assert "word red@1" in node_names(none), "words have no step, as inputs have none"


def test_they_add_up_lead_upwards_and_are_taken_out_again(graph):
    made, found = graph
    assert found.conservation_error.max() <= made.conservation_error.max() + 1e-12
    level = node_levels(found)
    assert np.all(level[found.edge_source] < level[found.edge_target])
    summed, document = aggregate(found), to_document(found, "circuit-tracer", ViewerOptions(by_position=True, slug="a"))
    ids = [node["node_id"] for node in document["nodes"]]
    assert len({*ids}) == len(ids)
    for kind, count in ((MODULATION, 4), (WORD, 2)):
        assert all(np.sum(one.node_kind == kind) == count for one in (found, summed, graph_of(document)))
    plain = without_pooled(found)
    assert np.allclose(plain.target_bias, made.target_bias) and np.allclose(plain.target_sum, made.target_sum)
    assert plain.provenance.words == plain.provenance.negative_words == ()
    assert np.array_equal(plain.edge_attribution, made.edge_attribution)
