"""The commands on saved graphs, from a graph to every export; what goes wrong is one sentence and leaves nothing."""

import csv
import json
from dataclasses import replace
from functools import partial

import networkx
import numpy as np
import pytest
from commands import done, run_command, run_json
from viewer_documents import ERROR, FEATURE, document, link, node

from difffract_jax.graphs.files.viewer_document import read_document
from difffract_jax.graphs.graph import FEATURE as FEATURE_NODE
from difffract_jax.graphs.graph import INPUT, Graph
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import KnownRun
from random_graphs import random_graph, random_output_graph


@pytest.fixture
def difffract(monkeypatch, capsys, tmp_path):
    """Runs `difffract ARGUMENTS --json` in a directory with graphs; returns status, result, and what it said."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        run = KnownRun(prompt=f"prompt {seed}", seed=seed, model="m")
        random_graph(seed).with_provenance(shared=run, transcoders="t").save(f"{seed}.npz")
    random_output_graph(0).save("outputs.npz")

    return partial(run_json, monkeypatch, capsys)


def refused(result, directory, before):
    status, out, err = result
    assert status == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1
    assert sorted(path.name for path in directory.iterdir()) == before
    return err


@pytest.mark.parametrize("mode", ["standard", "difffract"])
def test_pruning_tells_the_scores_and_keeps_them(difffract, mode):
    told = done(difffract("prune", "0.npz", "--mode", mode))
    pruned = Graph.load("pruned.npz")
    assert [row.pop("of") for row in told["scores"]] == ["unpruned", "pinned", "pruned"]
    assert told["scores"] == list(to_json_values(pruned.provenance.scores).values())
    assert pruned.provenance.pruning.mode == mode and told["edges"] == pruned.edge_source.size
    assert (
        done(difffract("prune", "0.npz"))["edges"] == done(difffract("prune", "0.npz", "--mode", "standard"))["edges"]
    )


def test_pruning_that_leaves_next_to_no_feature_says_why(difffract):
    graph = random_graph(0, layers=6, max_nodes=60, smallest=0.01)
    graph.save("some.npz")
    assert "features" not in difffract("prune", "some.npz")[2]
    of_inputs = np.where(graph.node_kind[graph.edge_source] == INPUT, 1000, 1)
    replace(graph, edge_attribution=(graph.edge_attribution * of_inputs).astype(np.float32)).save("inputs.npz")
    said = difffract("prune", "inputs.npz", "--out", "left.npz")[2]
    left = int((Graph.load("left.npz").node_kind[1:] == FEATURE_NODE).sum())
    assert f"Note: {left} of " in said and "inputs hold most of the influence; keep more with --node-threshold" in said
    assert (
        "Note:"
        not in difffract("prune", "inputs.npz", "--node-threshold", 1, "--edge-threshold", 1, "--out", "all.npz")[2]
    )


def test_several_targets_are_listed_with_their_weights(difffract):
    told = done(difffract("prune", "outputs.npz", "--by-position"))
    assert [row["target"] for row in told["targets"]] == ["output 0#1", "output 1#1", "img/3/f0@0#1"]
    assert [row["weight"] for row in told["targets"]] == pytest.approx([2 / 3.5, 1 / 3.5, 0.5 / 3.5])
    assert (Graph.load("pruned.npz").node_position >= 0).any()


def test_supernodes_are_found_changed_and_exported(difffract, tmp_path):
    told = done(difffract("supernodes", "outputs.npz", "--threshold", 0.2, "--out", "grouped.npz"))
    assert told["groups"] == len(Graph.load("grouped.npz").supernodes) > 1
    nodes = node_names(Graph.load("grouped.npz"))[3:5]
    (tmp_path / "edits.json").write_text(json.dumps({"remove": [told["supernodes"][1]["supernode"]]}))
    edits = ("--keep", "--edits", "edits.json", "--set-supernode", f"mine={','.join(nodes)}", "--out", "edited.npz")
    changed = done(difffract("supernodes", "grouped.npz", *edits))
    assert changed["supernodes"][-1] == {"supernode": "mine", "members": ", ".join(nodes)}
    assert told["supernodes"][1] not in changed["supernodes"]
    before = sorted(path.name for path in tmp_path.iterdir())
    wrong = difffract("supernodes", "grouped.npz", "--set-supernode", "mine=img/99/f1", "--out", "wrong.npz")
    assert "The graph has no node `img/99/f1`" in refused(wrong, tmp_path, before)


def test_circuits_are_averaged_and_subtracted(difffract, tmp_path):
    told = done(difffract("combine", "average", "0.npz", "1.npz"))
    record = Graph.load("average.npz").provenance.combined
    assert (told["operation"], told["graphs"]) == ("average", 2)
    assert [entry.file for entry in record.graphs] == ["0.npz", "1.npz"]
    told = done(difffract("combine", "difference", "0.npz", "0.npz"))
    assert told["edges"] == 0 and Graph.load("difference.npz").provenance.combined.operation == "difference"
    done(difffract("prune", "average.npz"))
    random_graph(0).with_provenance(shared=KnownRun(model="other")).save("other.npz")
    before = sorted(path.name for path in tmp_path.iterdir())
    wrong = difffract("combine", "average", "0.npz", "other.npz", "--out", "wrong.npz")
    assert "Graphs of different models (m, other)" in refused(wrong, tmp_path, before)


def test_every_format_is_written_and_opens(difffract, tmp_path):
    graph = Graph.load("0.npz")
    done(difffract("export", "0.npz", "--out", "v2.json"))
    assert done(difffract("compare", "0.npz", "v2.json"))["largest_error"] < 1e-6
    (tmp_path / "labels.yaml").write_text(f"{node_names(graph)[1].split('@')[0]}: red\n")
    shown = done(
        difffract(
            "export", "0.npz", "--format", "circuit-tracer", "--slug", "a", "--labels", "labels.yaml", "--out", "a.json"
        )
    )
    assert shown["open"].startswith("http://localhost:8041/index.html?slug=a&")
    assert any(node["clerp"] == "red" for node in read_document("a.json")["nodes"])
    assert done(difffract("compare", "0.npz", "a.json"))["largest_error"] == 0
    done(difffract("export", "0.npz", "--format", "neuronpedia", "--scan", "flux", "--by-position", "--out", "n.json"))
    assert done(difffract("compare", "0.npz", "n.json"))["summed_over_positions"] is False
    done(difffract("export", "0.npz", "--format", "graphml", "--out", "g.graphml"))
    assert networkx.read_graphml("g.graphml").number_of_edges() == graph.edge_source.size
    told = done(difffract("export", "0.npz", "--format", "csv", "--out", "tables"))
    with (tmp_path / "tables" / "nodes.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == told["nodes"] == graph.node_kind.size
    done(difffract("export", "0.npz", "--format", "csv", "--out", "tables", "--overwrite"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "outputs.npz", "--out", "g.json"), "The reference's JSON holds one target at one step"),
        (("export", "0.npz", "--format", "neuronpedia", "--out", "g.json"), "Neuronpedia needs the id of a model"),
        (
            ("export", "0.npz", "--format", "circuit-tracer", "--max-links", "3", "--out", "g.json"),
            "that the viewers bear",
        ),
        (("export", "0.npz", "--format", "circuit-tracer", "--slug", "a b", "--out", "g.json"), "The slug may hold"),
        (
            ("export", "0.npz", "--format", "csv", "--out", "1.npz"),
            "1.npz is a file, but csv is written as a directory",
        ),
        (("prune", "0.npz", "--node-threshold", "0"), "`node_threshold` was 0.0"),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing(difffract, tmp_path, arguments, told):
    before = sorted(path.name for path in tmp_path.iterdir())
    assert told in refused(difffract(*arguments), tmp_path, before)


def test_a_graph_of_another_tool_can_be_pruned(difffract):
    done(difffract("export", "0.npz", "--format", "circuit-tracer", "--out", "a.json"))
    told = done(difffract("prune", "a.json"))
    ours = done(difffract("prune", "0.npz", "--out", "b.npz"))
    assert told["conservation error"] is None and ours["conservation error"] is not None
    assert told["scores"] == ours["scores"] and told["edges"] == ours["edges"]
    pruned = Graph.load("pruned.npz")
    assert np.allclose(pruned.node_influence, Graph.load("b.npz").node_influence)


@pytest.fixture
def foreign(tmp_path):
    """Writes documents of another tool: whole, with links that say too little, with a wrong number, with a cycle."""
    base = document()
    more = {
        "base": {},
        "absent": {"links": [*base["links"], link("9_9_9", "27_5_2", 1.0)]},
        "shared": {
            "nodes": [*base["nodes"], node("0_0_1", FEATURE, "0", 1, 0)],
            "links": [*base["links"], link("0_0_1", "1_57794_1", 0.7)],
        },
        "nan": {"links": [*base["links"], link("E_106_1", "1_57794_1", float("nan"))]},
        "cycle": {"links": [*base["links"], link("1_57794_1", "0_928_1", 0.1)]},
        "twice": {"nodes": [*base["nodes"], node("0_0_1", ERROR, "0", 1, -1)]},
    }
    for name, change in more.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(base | change))


READERS = (
    ("prune",),
    ("supernodes",),
    ("combine", "average"),
    ("export", "--format", "csv", "--out", "tables"),
    ("compare", "base.json"),
    ("heads", "organism", "organism"),
    ("validate", "organism", "organism"),
)


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_every_command_that_reads_graphs_refuses_them_alike(difffract, foreign, tmp_path, command):
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, told in (
        ("nan.json", "the weight of the link from E_106_1 to 1_57794_1 is nan, which is not a finite number"),
        ("cycle.json", "cycle.json: The graph has a cycle, 0_928_1 -> 1_57794_1 -> 0_928_1"),
        ("twice.json", "two nodes are called 0_0_1"),
    ):
        assert told in refused(difffract(*command, name), tmp_path, before)


@pytest.mark.parametrize("command", READERS[:5], ids=" ".join)
def test_every_command_that_reads_graphs_tells_of_unclear_links(difffract, foreign, command):
    status, _, err = difffract(*command, "absent.json")
    assert status == 0
    assert err == "Warning: in absent.json, 1 link was left out, as the document has no node 9_9_9.\n"
    status, _, err = difffract(*command, *(("--overwrite",) if command[0] == "export" else ()), "shared.json")
    assert status == 0 and err.startswith("Warning: in shared.json, 2 links from 0_0_1 were given to an error or to")


def test_what_was_left_out_is_counted_in_summaries(difffract, foreign):
    assert done(difffract("prune", "absent.json"))["links left out"] == 1
    assert "links left out" not in done(difffract("prune", "base.json"))
    found = done(difffract("compare", "base.json", "absent.json"))
    assert (found["links_left_out_of_a"], found["links_left_out_of_b"], found["edges_only_in_b"]) == (0, 1, 0)
    # The graph of ours was told of when it was made.
    done(difffract("prune", "absent.json", "--out", "again.npz"))
    assert difffract("prune", "again.npz", "--out", "last.npz")[2] == ""


def test_people_see_figures_first_and_ten_names(difffract, monkeypatch, capsys):
    found = done(difffract("compare", "0.npz", "outputs.npz"))
    assert len(found["nodes_only_in_b"]) > 20
    lines = run_command(monkeypatch, capsys, "compare", "0.npz", "outputs.npz").out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("nodes_", "edges_", "largest_", "pearson"))]
    assert names[-2:] == ["nodes_only_in_a", "nodes_only_in_b"] and names[0] == "nodes_in_both"
    shown = " ".join(" ".join(lines).split()).split("nodes_only_in_b ")[1]
    count = len(found["nodes_only_in_b"])
    assert shown.startswith(f"{count}: {found['nodes_only_in_b'][0]}") and shown.count(",") == 10
    assert shown.endswith(f"... and {count - 10} more (--json lists all)")
    same = run_command(monkeypatch, capsys, "compare", "0.npz", "0.npz").out
    assert [line.split() for line in same.splitlines()][-1] == ["nodes_only_in_b", "0"]


def test_a_file_that_is_replaced_is_told_of(difffract):
    note = "Note: pruned.npz existed and was replaced; --out names another output.\n"
    assert [difffract("prune", "0.npz")[2] for _ in range(2)] == ["", note]
    before = Graph.load("pruned.npz").edge_source.size
    assert difffract("prune", "0.npz", "--node-threshold", "2")[2].startswith("Error: ")
    assert Graph.load("pruned.npz").edge_source.size == before
    for command in (
        ("supernodes", "0.npz"),
        ("combine", "average", "0.npz"),
        ("combine", "difference", "0.npz", "1.npz"),
        ("export", "0.npz", "--out", "g.json"),
    ):
        assert difffract(*command)[2] == "" and "existed and was replaced" in difffract(*command)[2]
