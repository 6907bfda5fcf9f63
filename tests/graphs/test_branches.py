"""The branch of a node, in everything that tells nodes apart: names, sums, files, other tools' documents, groups."""

import csv
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from difffract_jax.address import NEGATIVE, PROMPT, TXT, flux_layout
from difffract_jax.circuits.checks.predictions import downstream
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.group_edits import group_features
from difffract_jax.dashboards.page_data import graph_bytes
from difffract_jax.dashboards.records import card
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.combine import average, difference
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files.tables import write_csv, write_graphml
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.files.viewer_json import ViewerOptions, to_document
from difffract_jax.graphs.graph import FEATURE, OUTPUT, Graph
from difffract_jax.graphs.groups import summed_names
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import KnownRun
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.summary import to_networkx
from random_graphs import random_graph

RUN = KnownRun(
    layout=flux_layout(3, 0),
    tokens=("one", "two", "three", "four"),
    negative_tokens=("eins", "zwei", "drei", "vier"),
    negative_prompt="eins zwei drei vier",
    guidance=4.0,
    grid=(2, 2),
)


@pytest.fixture
def graph():
    """A random graph, of whose features the even nodes besides the target lie in the negative branch."""
    made = random_graph(0)
    nodes = np.arange(made.node_kind.size)
    negative = (made.node_kind == FEATURE) & (nodes % 2 == 0) & (nodes > 0)
    branch = np.where(negative, NEGATIVE, PROMPT).astype(np.uint8)
    return replace(made, node_branch=branch).with_provenance(shared=RUN)


def test_names_end_in_the_branch_and_can_be_read(graph):
    names, plain = node_names(graph), node_names(replace(graph, node_branch=np.zeros_like(graph.node_branch)))
    for node in np.flatnonzero(graph.node_kind == FEATURE):
        branch = ("prompt", "negative")[graph.node_branch[node]]
        assert names[node] == f"{plain[node]}~{branch}"
        assert Feature.parse(names[node]).branch == branch
    assert not any("~" in name for name in plain)
    summed = summed_names(graph)
    assert {*summed[1:]} <= {*node_names(aggregate(graph))}
    inside = [name for name in summed if name.endswith("~negative")]
    assert inside and {one.branch for one in group_features(inside)} == {"negative"}


def test_sums_over_positions_and_of_graphs_keep_branches_apart(graph):
    other = replace(graph, node_branch=np.zeros_like(graph.node_branch))
    summed = aggregate(graph)
    assert np.sum(summed.node_branch == NEGATIVE) > 0
    assert summed.edge_attribution.sum() == pytest.approx(graph.edge_attribution.sum(), rel=1e-5)
    apart = difference(graph, other)
    assert {*apart.node_branch.tolist()} == {PROMPT, NEGATIVE}
    assert not difference(graph, graph).edge_source.size
    assert np.array_equal(np.sort(average([graph]).node_branch), np.sort(summed.node_branch))
    assert compare(graph, other).nodes_only_in_a
    assert all("~negative" in name for name in compare(graph, other).nodes_only_in_a)


def test_files_tables_documents_and_pages_tell_the_branch(graph, tmp_path):
    graph.save(tmp_path / "graph.npz")
    assert np.array_equal(Graph.load(tmp_path / "graph.npz").node_branch, graph.node_branch)
    plain = replace(graph, node_branch=np.zeros_like(graph.node_branch))
    plain.save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as arrays:
        assert "node_branch" not in arrays, "a graph of one branch is written as it always was"
    assert not Graph.load(tmp_path / "plain.npz").node_branch.any()
    write_csv(graph, tmp_path / "tables")
    with (tmp_path / "tables" / "nodes.csv").open(newline="") as stream:
        told = {(row["kind"], row["branch"]) for row in csv.DictReader(stream)}
    assert {("feature", "prompt"), ("feature", "negative")} <= told
    assert not {("output", "prompt"), ("output", "negative")} & told, "an output is of both branches"
    document = to_document(graph, "circuit-tracer", ViewerOptions(by_position=True))
    tokens = document["metadata"]["prompt_tokens"]
    assert any(token.endswith("~negative") for token in tokens) and any(token.endswith("~prompt") for token in tokens)
    again = graph_of(document)
    assert again.node_branch.tolist() == graph.node_branch.tolist(), "a document is read with its branches"
    apart = average([graph, graph.with_provenance(shared=replace(RUN, guidance=2.0, negative_tokens=("a",) * 4))])
    assert b'"one | ?"' in graph_bytes(apart), "graphs of several scales and negative prompts have a page, too"
    assert b'"one | eins"' in graph_bytes(graph) and b'"one | eins"' not in graph_bytes(plain)


def test_network_programs_read_the_branch(graph, tmp_path):
    """GraphML and networkx have it as an attribute of a node; of what is of both branches there is none."""
    names, negative = node_names(graph), np.flatnonzero(graph.node_branch == NEGATIVE)
    write_graphml(graph, tmp_path / "graph.graphml")
    space = "{http://graphml.graphdrawing.org/xmlns}"
    root = ElementTree.parse(tmp_path / "graph.graphml").getroot()
    assert [key.get("attr.type") for key in root.iter(f"{space}key") if key.get("id") == "branch"] == ["string"]
    found = {}
    for node in root.iter(f"{space}node"):
        values = {data.get("key"): data.text for data in node.iter(f"{space}data")}
        found[values["name"]] = values.get("branch")
    assert {name for name, branch in found.items() if branch == "negative"} == {names[node] for node in negative}
    made = to_networkx(graph)
    told = {key: node.get("branch") for key, node in made.nodes(data=True)}
    assert told == found, "both leave it out of what is of both branches"
    assert all(told[names[node]] is None for node in np.flatnonzero(graph.node_kind == OUTPUT))
    plain = replace(graph, node_branch=np.zeros_like(graph.node_branch))
    assert not any("branch" in node for _, node in to_networkx(plain).nodes(data=True))


def test_a_text_feature_of_the_negative_branch_is_shown_on_its_words(graph):
    summed = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    text = np.flatnonzero((summed.node_kind == FEATURE) & (summed.node_stream == TXT))
    for node in text:
        words = {word for word, _ in card(summed, int(node)).words}
        tokens = (RUN.tokens, RUN.negative_tokens)[summed.node_branch[node]]
        assert words <= {*tokens}
    assert {*summed.node_branch[text]} == {PROMPT, NEGATIVE}


def test_a_feature_is_downstream_of_those_of_its_own_branch(graph):
    features = np.flatnonzero(graph.node_kind == FEATURE)
    apart = graph.node_branch[features][:, None] != graph.node_branch[features]
    plain = replace(graph, node_branch=np.zeros_like(graph.node_branch))
    either, own = (downstream(one, features, features) for one in (plain, graph))
    assert (either & apart).any() and np.array_equal(own, either & ~apart)
