"""Names of features: from labels files, tables and JSON, with one sentence for what is none; edges of a graph."""

import json

import numpy as np
import pytest

from difffract_jax.address import flux_layout
from difffract_jax.circuits.notation.labels import read_labels
from difffract_jax.config import UserError
from difffract_jax.dashboards.features.texts import Text, edges_by_feature, merged, read_texts, texts_of
from difffract_jax.dashboards.records import feature_of
from difffract_jax.directories import labels_file
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.provenance import KnownRun
from random_graphs import random_graph


def test_labels_of_the_organism_have_factor_and_auroc():
    labels = read_labels(labels_file("organism"))
    texts = texts_of(labels)
    assert texts["img/1/f159"].text == str(labels.sites["img/1"][159])
    factor, value, auroc, step, side = texts["img/1/f159"].rows[0]
    best = labels.sites["img/1"][159].best
    assert (factor, value, auroc, step, side) == (best.factor, best.value, best.auroc, best.step, best.side)
    rows = labels.sites["img/1"]
    assert rows[-1] == rows[len(rows) - 1] and rows[2:4] == (rows[2], rows[3]) and len([*rows]) == len(rows)
    with pytest.raises(IndexError):
        rows[len(rows)]
    never = [f"img/0/f{i}" for i, label in enumerate(labels.sites["img/0"]) if not label.best.factor]
    assert never and not any(name in texts for name in never)
    assert read_texts(labels_file("organism"), labels.transcoders) == texts
    with pytest.raises(UserError, match="other transcoders"):
        read_texts(labels_file("organism"), "another")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.json", json.dumps({"img/1/f3": "a, red", "txt/0/f1@2": "word"})),
        ("labels.csv", 'feature,label,more\nimg/1/f3,"a, red",x\ntxt/0/f1@2,word,\n'),
        ("labels.tsv", "label\tfeature\na, red\timg/1/f3\nword\ttxt/0/f1\n"),
    ],
)
def test_texts_are_read_from_json_and_tables(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(tmp_path / name, "t") == {"img/1/f3": Text("a, red"), "txt/0/f1": Text("word")}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("labels.json", "[1, 2]", "is not a file of labels; give JSON"),
        ("labels.json", "{", "is not a file of labels"),
        ("labels.json", '{"img/1/f3": 4}', "is not a file of labels"),
        ("labels.json", '{"red": "img/1/f3"}', "names 'red', which is not a feature"),
        ("labels.csv", "a,b\n1,2\n", "columns feature and label, but has a, b"),
    ],
)
def test_what_is_no_file_of_texts_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_texts(tmp_path / name, "t")
    (tmp_path / name).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"UTF-8|no file of labels|columns"):
        read_texts(tmp_path / name, "t")


def test_a_text_of_ones_own_stands_before_what_was_measured():
    measured = {"img/1/f3": Text("colour red (0.98)", (("colour", "red", 0.98, 1, "img"),))}
    found = merged(measured, {"img/1/f3": Text("reddish"), "img/1/f4": Text("new")})
    assert found == {"img/1/f3": Text("reddish", measured["img/1/f3"].rows), "img/1/f4": Text("new")}


def test_edges_of_a_graph_are_summed_by_feature():
    graph = random_graph(3).with_provenance(shared=KnownRun(layout=flux_layout(2, 1)))
    found, whole = edges_by_feature(graph), aggregate(graph)
    features = {int(n): str(feature_of(whole, int(n))) for n in np.flatnonzero(whole.node_kind == FEATURE)}
    size = np.bincount(whole.edge_target, np.abs(whole.edge_attribution), whole.node_kind.size)
    often = list(features.values())
    node = next(n for n in features if (whole.edge_target == n).any() and often.count(features[n]) == 1)
    into = whole.edge_target == node
    strongest = np.abs(whole.edge_attribution[into]).max() / size[node]
    ends = found[features[node]]["up"]
    assert abs(ends[0][1]) >= strongest * 0.999 and len(ends) <= 8
    assert np.all(np.diff([abs(value) for _, value in ends]) <= 1e-12)
    for name, value in ends:
        if name in found:
            back = dict(found[name]["down"])
            assert features[node] not in back or back[features[node]] == pytest.approx(value)
