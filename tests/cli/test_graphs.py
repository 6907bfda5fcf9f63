"""The commands on saved graphs, from a graph to every export; what goes wrong is one sentence and leaves nothing."""

import csv
import json
from functools import partial

import networkx
import numpy as np
import pytest
from commands import done, run_json

from difffract_jax.graphs.files.viewer_document import read_document
from difffract_jax.graphs.graph import Graph
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
