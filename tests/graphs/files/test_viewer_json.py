"""Exports for circuit-tracer's viewer and for Neuronpedia hold to the format, and step into none of its traps.

The tables below are the format as a schema; traps are numbered as in docs/viewers.md. Trap 10 is about a server, which
these modules do not have.
"""

import gzip
import json
import re
import urllib.parse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.files import viewer_json
from difffract_jax.graphs.files.viewer_document import read_document, write_document
from difffract_jax.graphs.files.viewer_graph import graph_of, unpair
from difffract_jax.graphs.files.viewer_image import image_bytes
from difffract_jax.graphs.files.viewer_json import ViewerOptions, to_document, viewer_url, write_viewer_json
from difffract_jax.graphs.files.viewer_nodes import cantor
from difffract_jax.graphs.graph import ERROR, FEATURE, REST, SCORE, subgraph
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.provenance import KnownRun
from difffract_jax.graphs.pruning import cumulative_shares, node_influence, prune
from difffract_jax.graphs.scoring import scores
from difffract_jax.graphs.supernodes import find_supernodes
from random_graphs import random_graph, random_output_graph, with_score
from shown_circuits import TOKENS, circuit

SAMPLE = Path(__file__).parents[2] / "data" / "sample_graph.json"
STRING, INTEGER, NUMBER, BOOLEAN, NULL = "string", "integer", "number", "boolean", "null"
SCHEMA = {
    "metadata": {
        "slug": (True, re.compile(r"[a-zA-Z0-9_.-]+")),
        "scan": (True, STRING),
        "transcoder_list": (True, [STRING]),
        "prompt_tokens": (True, [STRING]),
        "prompt": (True, STRING),
        "node_threshold": (False, NUMBER, NULL),
        "schema_version": (False, INTEGER),
        "feature_details": (False, {}),
        "info": (False, {}),
        "generation_settings": (False, {}),
        "pruning_settings": (False, {}),
        "replacement_score": (False, NUMBER),
        "completeness_score": (False, NUMBER),
    },
    "qParams": {
        "pinnedIds": (False, [STRING]),
        "supernodes": (False, [[STRING]]),
        "linkType": (False, re.compile("input|output|either|both")),
        "clickedId": (False, STRING),
        "sg_pos": (False, STRING),
        "clerps": (False, STRING),
    },
    "nodes": {
        "node_id": (True, STRING),
        "feature": (True, INTEGER),  # null is allowed by the schema, but not by circuit-tracer's viewer: trap 6
        "layer": (True, re.compile(r"E|\d+")),
        "ctx_idx": (True, INTEGER),
        "feature_type": (True, re.compile("cross layer transcoder|mlp reconstruction error|embedding|logit")),
        "jsNodeId": (True, STRING),
        "clerp": (True, STRING),
        "token_prob": (False, NUMBER),
        "is_target_logit": (False, BOOLEAN),
        "run_idx": (False, INTEGER),
        "reverse_ctx_idx": (False, INTEGER),
        "influence": (True, NUMBER, NULL),  # a missing one hides the node in circuit-tracer's viewer
        "activation": (False, NUMBER, NULL),
        "vis_link": (False, STRING),
    },
    "links": {"source": (True, STRING), "target": (True, STRING), "weight": (True, NUMBER)},
}
TYPES = {STRING: str, INTEGER: int, NUMBER: (int, float), BOOLEAN: bool, NULL: type(None)}


def fits(value, form):
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(entry, form[0]) for entry in value)
    if isinstance(form, dict):
        return isinstance(value, dict)
    return isinstance(value, TYPES[form]) and (form in (BOOLEAN,) or not isinstance(value, bool))


def violations(document):
    """Everything that a document has against the schema."""
    found = []
    for part, fields in SCHEMA.items():
        entries = document[part] if isinstance(document[part], list) else [document[part]]
        for entry in entries:
            for name, (required, *forms) in fields.items():
                if name in entry and not any(fits(entry[name], form) for form in forms):
                    found.append((part, name, entry[name]))
                if required and name not in entry:
                    found.append((part, name, "missing"))
    ids = {node["node_id"] for node in document["nodes"]}
    found += [
        ("nodes", "node_id", name) for name, n in Counter(x["node_id"] for x in document["nodes"]).items() if n > 1
    ]
    found += [
        ("links", end, link[end]) for link in document["links"] for end in ("source", "target") if link[end] not in ids
    ]
    found += [("qParams", "pinnedIds", name) for name in document["qParams"]["pinnedIds"] if name not in ids]
    return found


def options(flavour, **more):
    return ViewerOptions(slug="a-graph", **({"scan": "flux-1-schnell"} if flavour == "neuronpedia" else {}), **more)


def document_of(graph, flavour="circuit-tracer", **more):
    return to_document(graph, flavour, options(flavour, **more))


@pytest.mark.parametrize("flavour", ["circuit-tracer", "neuronpedia"])
def test_the_value_of_an_attention_score_is_written_and_read_back(flavour):
    graph, score = with_score(random_graph(3))
    read = graph_of(json.loads(json.dumps(document_of(graph, flavour, by_position=True))))
    (back,) = np.flatnonzero(read.node_kind == SCORE)
    assert read.node_value[back] == graph.node_value[score] == -2.5
    assert node_names(read)[back] == node_names(graph)[score]


@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from(["circuit-tracer", "neuronpedia"]))
@settings(max_examples=25, deadline=None)
def test_every_export_holds_to_the_format_and_can_be_read_back(seed, several, by_position, flavour):
    graph = random_output_graph(seed) if several else random_graph(seed)
    document = json.loads(json.dumps(document_of(graph, flavour, by_position=by_position), allow_nan=False))
    assert violations(document) == []
    whole = graph if by_position else aggregate(graph)
    found = compare(whole, graph_of(document))
    assert not found.nodes_only_in_a + found.nodes_only_in_b and found.largest_error == 0
    assert found.edges_only_in_a == found.edges_only_in_b == 0
    assert np.allclose(node_influence(graph_of(document)), node_influence(whole))


def test_the_schema_sees_what_is_wrong():
    document = document_of(random_graph(0))
    for part, name, value in (("nodes", "feature", None), ("nodes", "layer", "x"), ("links", "target", "nowhere")):
        broken = json.loads(json.dumps(document))
        broken[part][0][name] = value
        assert (part, name, value) in violations(broken)


def test_the_sample_is_read_and_written_without_change(tmp_path):
    document = read_document(SAMPLE)
    write_document(document, tmp_path / "g.json")
    original = json.loads(SAMPLE.read_text())
    assert json.loads((tmp_path / "g.json").read_text()) == original and read_document(tmp_path / "g.json") == document
    assert violations(original) == []


def test_the_sample_s_scores_and_influences_are_ours():
    document = read_document(SAMPLE)
    graph = graph_of(document)
    told = document["metadata"]
    found = scores(graph)
    assert round(found.replacement, 6) == told["replacement_score"]
    assert round(found.completeness, 6) == told["completeness_score"]
    shares = cumulative_shares(node_influence(graph))
    order = ["19_0_2", *(node["node_id"] for node in document["nodes"] if node["feature_type"] != "logit")]
    influences = {node["node_id"]: node["influence"] for node in document["nodes"]}
    assert [round(share, 6) for share in shares[1:]] == [influences[name] for name in order[1:]]
    assert [graph.node_feature[order.index(name)] for name in ("6_17_0", "11_40001_2")] == [17, 40001]


def test_what_pruning_found_is_exported():
    pruned = prune(random_graph(2))
    document = document_of(pruned)
    told = document["metadata"]
    assert told["pruning_settings"] == {"mode": "standard", "node_threshold": 0.8, "edge_threshold": 0.98}
    assert told["replacement_score"] == pruned.provenance.scores.unpruned.replacement
    assert told["scored_on"] == "the graph before pruning"
    influences = [node["influence"] for node in document["nodes"][1:]]
    assert np.allclose(influences, pruned.node_cumulative[1:], atol=1e-7) and document["nodes"][0]["influence"] is None
    assert {node["feature_type"] for node in document["nodes"][:1]} == {"logit"}


def test_labels_links_and_tokens_are_shown():
    graph = random_graph(0)
    node = next(n for n in document_of(graph)["nodes"] if n["feature_type"] == "cross layer transcoder")
    stream, block, feature = ("img", "txt")[node["difffract"][2]], node["difffract"][3], node["difffract"][5]
    name = f"{stream}/{block}/f{feature}"
    shown = document_of(graph, labels={name: "red"}, dashboard="https://a.org")
    found = next(n for n in shown["nodes"] if n["node_id"] == node["node_id"])
    assert found["clerp"] == "red" and found["vis_link"] == f"https://a.org/{stream}_{block}/{feature}"
    assert "clerps" not in shown["qParams"], "what is there later, somebody wrote in the viewer"
    by_position = document_of(graph, by_position=True, tokens=["a", "red"])["metadata"]["prompt_tokens"]
    assert {"a", "txt[2]", "img[0]"} <= {*by_position}
    grid = document_of(graph.with_provenance(shared=KnownRun(grid=(2, 2))), by_position=True)
    assert "img[1,0]" in grid["metadata"]["prompt_tokens"]


@given(st.integers(0, 60_000), st.integers(0, 60_000))
def test_pairing_is_undone(k, feature):
    assert unpair(cantor(k, feature)) == (k, feature)
    assert cantor(6, 17) == 293 and cantor(11, 40001) == 800540079


def decode_url_features(url):
    """How circuit-tracer's notebooks read an address, by its rules (trap 5)."""
    query = urllib.parse.parse_qs(urllib.parse.urlparse(urllib.parse.unquote(url)).query)
    groups = {}
    for name, *members in json.loads(query.get("supernodes", ["[]"])[0]):
        groups[name] = [tuple(map(int, member.split("_"))) for member in members]
        assert all(len(member) == 3 for member in groups[name])
    singles = []
    for pin in filter(None, query.get("pinnedIds", [""])[0].split(",")):
        parts = pin.removeprefix("E_").split("_")
        if len(parts) == (2 if pin.startswith("E_") else 3):
            singles.append(tuple(map(int, parts)))
    return groups, singles


def test_trap_1_errors_are_not_called_like_features():
    graph = random_output_graph(1)
    for node in document_of(graph)["nodes"]:
        is_error = node["feature_type"] == "mlp reconstruction error"
        assert is_error == (node["difffract"][0] in (ERROR, REST)) == (len(node["node_id"].split("_")) == 4)


def test_trap_2_every_logit_tells_its_share():
    nodes = document_of(random_output_graph(1))["nodes"]
    logits = [node for node in nodes if node["feature_type"] == "logit"]
    assert [float(node["clerp"].split("(p=")[1].split(")")[0]) for node in logits] == [0.571, 0.286, 0.143]
    assert sum(node["token_prob"] for node in logits) == pytest.approx(1)
    assert [node["is_target_logit"] for node in logits] == [True, False, False]


def test_trap_3_the_highest_layer_below_the_logits_is_not_0():
    graph = aggregate(random_graph(0))
    flat = subgraph(graph, graph.node_block <= 0, np.ones(graph.edge_source.size, bool))
    for flavour in ("circuit-tracer", "neuronpedia"):
        nodes = document_of(flat, flavour)["nodes"]
        layers = {int(n["layer"]) for n in nodes if n["layer"] != "E" and n["feature_type"] != "logit"}
        assert max(layers) == 1 and {n["layer"] for n in nodes if n["feature_type"] == "logit"} == {"2"}
    bare = subgraph(graph, graph.node_block < 0, np.ones(graph.edge_source.size, bool))
    with pytest.raises(UserError, match="no features or errors besides its targets"):
        document_of(bare)


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_trap_4_no_feature_fills_two_thirds_of_the_columns(seed, several, by_position):
    document = document_of(random_output_graph(seed) if several else random_graph(seed), by_position=by_position)
    columns = len(document["metadata"]["prompt_tokens"])
    assert columns >= 2 and columns > max(node["ctx_idx"] for node in document["nodes"])
    group = Counter()
    for node in document["nodes"]:
        error = f"__err_idx_{columns - node['ctx_idx']}" if "error" in node["feature_type"] else ""
        group[f"{node['layer']}_{node['feature']}{error}"] += 1
    assert max(group.values()) <= columns * 2 / 3


def test_trap_4_empty_columns_are_added_where_a_feature_is_everywhere():
    graph = random_graph(0)
    same = graph.node_feature.copy()
    same[graph.node_kind == FEATURE] = 1
    rows = np.arange(graph.node_kind.size) % 4
    everywhere = replace(
        graph,
        node_feature=same,
        node_block=np.where(graph.node_kind == FEATURE, 1, graph.node_block).astype(np.int16),
        node_stream=np.where(graph.node_kind == FEATURE, 0, 1).astype(np.uint8),
        node_position=rows.astype(np.int32),
    )
    features = np.flatnonzero(graph.node_kind == FEATURE)[1:5]
    only = subgraph(everywhere, np.isin(np.arange(rows.size), features), np.zeros(graph.edge_source.size, bool))
    tokens = document_of(only, by_position=True)["metadata"]["prompt_tokens"]
    assert tokens[-1] == " " and len(tokens) * 2 / 3 >= 4


def test_trap_5_notebooks_can_read_the_address():
    graph = find_supernodes(prune(random_output_graph(0), node_threshold=1.0, edge_threshold=1.0), threshold=0.3)
    error = int(np.flatnonzero(graph.node_kind == ERROR)[0])
    first, *others = graph.supernodes.values()
    graph = replace(graph, supernodes={"a#b & c+d%20;?": [*first, error], "only errors": [error], "rest": others[0]})
    document = document_of(graph)
    groups, singles = decode_url_features(viewer_url(document))
    assert list(groups) == ["a b c d 20 ", "rest"] and len(groups["rest"]) == len(others[0])
    ids = {node["node_id"] for node in document["nodes"]}
    assert {"_".join(map(str, pin)) for pin in singles} == set(document["qParams"]["pinnedIds"]) <= ids
    assert {"_".join(map(str, member)) for group in groups.values() for member in group} <= ids


def test_trap_5_at_most_200_nodes_are_pinned(monkeypatch):
    graph = find_supernodes(aggregate(random_output_graph(0)), threshold=0.3)
    monkeypatch.setattr(viewer_json, "MAX_PINNED", 4)
    view = document_of(graph)["qParams"]
    assert 0 < len(view["pinnedIds"]) <= 4
    assert {member for _, *group in view["supernodes"] for member in group} == set(view["pinnedIds"])


def test_trap_6_every_feature_is_an_integer():
    for flavour in ("circuit-tracer", "neuronpedia"):
        for node in document_of(random_output_graph(2), flavour)["nodes"]:
            assert type(node["feature"]) is int
            str(node["feature"]).encode()


def test_trap_7_graphs_too_large_for_the_viewers_are_refused():
    graph = aggregate(random_graph(0))
    assert document_of(graph, max_nodes=graph.node_kind.size, max_links=graph.edge_source.size)
    for less in ({"max_nodes": graph.node_kind.size - 1}, {"max_links": graph.edge_source.size - 1}):
        with pytest.raises(UserError, match="more than the .* that the viewers bear; prune it further"):
            document_of(graph, **less)


def test_trap_8_a_view_saved_by_the_viewer_is_read(tmp_path):
    document = document_of(find_supernodes(aggregate(random_output_graph(0)), threshold=0.3))
    view = document["qParams"]
    saved = view | {"pinnedIds": ",".join(view["pinnedIds"]), "supernodes": json.dumps(view["supernodes"])}
    (tmp_path / "g.json").write_text(json.dumps(document | {"qParams": saved}))
    again = read_document(tmp_path / "g.json")
    assert again["qParams"] == view
    assert graph_of(again).supernodes == graph_of(document).supernodes != {}


def test_trap_9_uploads_have_the_sizes_that_are_accepted(tmp_path, monkeypatch):
    graph = aggregate(random_graph(0))
    small = subgraph(graph, graph.node_kind == ERROR, np.ones(graph.edge_source.size, bool))
    written = write_viewer_json(small, tmp_path / "g.json", "neuronpedia", options("neuronpedia"))
    text = (tmp_path / "g.json").read_bytes()
    assert len(gzip.compress(text)) >= 1024 and violations(json.loads(text)) == [] and json.loads(text) == written
    monkeypatch.setattr(viewer_json, "UPLOAD_MOST", 1000)
    with pytest.raises(UserError, match="bytes, more than the 1000 of an upload"):
        write_viewer_json(graph, tmp_path / "h.json", "neuronpedia", options("neuronpedia"))
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


def test_trap_11_scan_is_what_each_viewer_takes():
    graph = random_graph(0)
    local = document_of(graph)["metadata"]["scan"]
    assert local == "./graph_data/a-graph-features"  # where its server looks beside the graph
    assert re.fullmatch(r"[a-zA-Z0-9_.-]+", document_of(graph, "neuronpedia")["metadata"]["scan"])
    for flavour, wrong, sentence in (
        ("neuronpedia", {"scan": "a/b"}, "pass --scan"),
        ("neuronpedia", {}, "pass --scan"),
        ("circuit-tracer", {"scan": "./features/flux"}, "looks for ./features/flux on the web"),
        ("circuit-tracer", {"slug": "a b"}, "The slug may hold letters"),
    ):
        with pytest.raises(UserError, match=sentence):
            to_document(graph, flavour, ViewerOptions(**wrong))


def test_trap_12_all_that_was_kept_is_seen_at_first():
    document = document_of(prune(random_graph(1), node_threshold=0.5))
    start = document["metadata"]["node_threshold"]
    assert all(node["influence"] is None or node["influence"] <= start for node in document["nodes"])


def test_trap_13_neuronpedia_reads_files_at_an_address_only_where_features_are_not_said_to_be_paired():
    graph = circuit()
    for flavour, more, paired in (
        ("neuronpedia", {"feature_url": "https://a.org/features"}, False),
        ("neuronpedia", {}, True),
        ("circuit-tracer", {"feature_url": "https://a.org/features"}, True),
    ):
        document = document_of(graph, flavour, **more)
        assert (document["metadata"].get("schema_version") == 1) == paired
        assert np.array_equal(graph_of(document).node_feature, aggregate(graph).node_feature)


def test_trap_14_no_name_is_markup():
    label = "<img src=x onerror=alert(1)>"
    graph = find_supernodes(aggregate(circuit()), threshold=0.2)
    graph = replace(graph, supernodes={label: next(iter(graph.supernodes.values()))})
    labels = dict.fromkeys(feature_names(graph), label)
    document = document_of(graph, labels=labels)
    by_position = document_of(circuit(), by_position=True, tokens=["<b>", "</b>"])
    shown = [node["clerp"] for node in document["nodes"]] + [group[0] for group in document["qParams"]["supernodes"]]
    assert "\u2039img src=x onerror=alert(1)\u203a" in shown
    assert not [name for name in (*shown, *by_position["metadata"]["prompt_tokens"]) if "<" in name or ">" in name]


def test_features_are_called_by_their_labels_else_by_name_and_strongest_place():
    graph = aggregate(circuit(steps=1))
    features = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)
    labelled = feature_names(graph)[features[0]]
    names = {n["name"]: n["clerp"] for n in document_of(graph, labels={labelled: "roundness"})["nodes"]}
    assert names.pop(node_names(graph)[features[0]]) == "roundness"
    for node in features[1:]:
        part = slice(*graph.map_indptr[node : node + 2])
        position = int(graph.map_position[part][np.argmax(np.abs(graph.map_value[part]))])
        place = (
            f"img[{position // 2},{position % 2}]" if graph.node_stream[node] == 0 else TOKENS[position].strip("\u2581")
        )
        place = place.replace("<", "\u2039").replace(">", "\u203a")
        assert names[node_names(graph)[node]] == f"{feature_names(graph)[node]} · {place}"
    single = circuit(steps=1)
    for node in document_of(single, by_position=True, labels={labelled: "roundness"})["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            name, _, position = node["name"].partition("@")
            place = f"img[{int(position) // 2},{int(position) % 2}]" if name.startswith("img") else None
            expected = "roundness" if name == labelled else place and f"{name} · {place}"
            assert expected in (None, node["clerp"]) and node["clerp"]


def test_groups_that_were_found_are_called_by_what_their_first_member_is_called():
    graph = find_supernodes(aggregate(circuit()), threshold=0.2)
    labels = dict.fromkeys(feature_names(graph), "round")
    for group in document_of(graph, labels=labels)["qParams"]["supernodes"]:
        assert re.fullmatch(r"round and \d+ more", group[0])
    mine = replace(graph, supernodes={"the circle": next(iter(graph.supernodes.values()))})
    assert [group[0] for group in document_of(mine)["qParams"]["supernodes"]] == ["the circle"]


def test_the_image_lies_over_the_columns_of_its_patches():
    graph, address = circuit(), "data:image/png;base64,aGVsbG8="
    document = to_document(graph, "neuronpedia", options("neuronpedia", by_position=True), image=address)
    told = document["metadata"]["image_input"]
    assert (told["image_base64"], told["grid_rows"], told["grid_cols"]) == (address, 2, 2)
    heads = document["metadata"]["prompt_tokens"]
    last = max(node["difffract"][1] for node in document["nodes"])
    expected = [f"img[{row},{column}]#{last}" for row in range(2) for column in range(2)]
    found = [None if place < 0 else heads[place] for place in told["image_positions"]]
    assert [a for a in found if a] and all(a in (None, b) for a, b in zip(found, expected, strict=True))
    summed = to_document(graph, "neuronpedia", options("neuronpedia"), image=address)["metadata"]
    (column,) = summed["image_input"]["image_positions"]
    assert summed["prompt_tokens"][column] == f"img#{last}" and summed["image_input"]["grid_rows"] == 1
    assert image_bytes(summed) == image_bytes({"image_input": {"image_base64": "aGVsbG8="}}) == b"hello"
    assert image_bytes({}) is image_bytes(None) is image_bytes({"image_input": 3}) is None
    with pytest.raises(UserError, match="not base64"):
        image_bytes({"image_input": {"image_base64": "data:image/png;base64,?"}})
    unknown = graph.with_provenance(shared=KnownRun(prompt="p"))
    with pytest.raises(UserError, match="does not tell its grid"):
        to_document(unknown, "neuronpedia", options("neuronpedia", by_position=True), image=address)


def test_names_given_by_hand_go_along_and_so_do_pins():
    graph = aggregate(circuit())
    names = node_names(graph)
    error = names[int(np.flatnonzero(graph.node_kind == ERROR)[0])]
    document = to_document(
        graph, "neuronpedia", options("neuronpedia", labels={error: "what is <missed>"}), pinned=[error]
    )
    (node,) = [one for one in document["nodes"] if one["name"] == error]
    assert node["clerp"] == "what is \u2039missed\u203a" and document["qParams"]["pinnedIds"] == [node["node_id"]]


def test_an_integration_of_vision_models_outlines_the_patches_that_have_nodes():
    """Its rule: of `image_positions`, those columns in which a node stands that is no embedding."""
    graph = circuit()
    document = to_document(graph, "neuronpedia", options("neuronpedia", by_position=True), image="data:,")
    told = document["metadata"]["image_input"]
    with_nodes = {n["ctx_idx"] for n in document["nodes"] if n["feature_type"] not in ("embedding", "logit")}
    outlined = {k for k, column in enumerate(told["image_positions"]) if column in with_nodes}
    mine = (graph.node_stream == 0) & (graph.node_step == graph.node_step.max())
    mine &= np.isin(graph.node_kind, (FEATURE, ERROR, REST)) & (np.arange(mine.size) >= graph.targets.size)
    assert outlined == {*graph.node_position[mine].tolist()} != set()
    assert len(told["image_positions"]) == told["grid_rows"] * told["grid_cols"]
