"""A page holds its graph to the last digit, escapes what comes from outside, and refuses what is too large."""

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.page_data import ENOUGH, Limits, _header, graph_bytes, packed, shown_graph
from difffract_jax.dashboards.viewer_page import PageParts, viewer_page
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.graphs.files.viewer_json import write_viewer_json
from difffract_jax.graphs.graph import FEATURE, INPUT
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.pruning import prune
from difffract_jax.text_files import unicode_replaced
from random_graphs import random_graph, random_output_graph
from shown_circuits import circuit, large

HOSTILE = '</script><script>alert("1")</script>\u202e\ud800' + "x" * 10_000


def unpacked(text):
    """Reads what a page holds, as the page does."""
    data = zlib.decompress(base64.b64decode(text), -15)
    length = int.from_bytes(data[:4], "little")
    header, body = json.loads(data[4 : 4 + length]), data[4 + length :]
    arrays = {
        one["name"]: np.frombuffer(body, one["type"], one["length"], one["offset"]) for one in header.pop("arrays")
    }
    return header, arrays


@pytest.mark.parametrize("graph", [circuit(), random_output_graph(1), random_graph(2), aggregate(circuit(3))])
def test_a_page_holds_every_number_of_its_graph(graph):
    header, arrays = unpacked(packed(graph_bytes(graph)))
    for name in ("node_kind", "edge_attribution", "edge_source", "target_bias", "map_value", "map_indptr"):
        assert np.array_equal(arrays[name], getattr(graph, name))
    assert np.array_equal(arrays["node_level"], node_levels(graph))
    assert np.array_equal(arrays["node_root"], graph.root_weights)
    assert header["names"] == node_names(graph)
    assert len(header["targets"]) == graph.targets.size


def test_a_pruned_graph_is_shown_whole_and_a_large_one_pruned():
    assert unpacked(packed(graph_bytes(large(300, 2000))))[0]["start"]["node_threshold"] == 0.8
    assert unpacked(packed(graph_bytes(prune(large(300, 2000)))))[0]["start"]["node_threshold"] == 1.0
    graph = random_graph(0, layers=6, max_nodes=60, smallest=0.01)
    of_inputs = np.where(graph.node_kind[graph.edge_source] == INPUT, 1000, 1)
    graph = replace(graph, edge_attribution=(graph.edge_attribution * of_inputs).astype(np.float32))
    kept = (prune(graph, node_threshold=nodes, by_position=True) for nodes in (0.8, 0.9, 0.95))
    features = [int((one.node_kind == FEATURE).sum()) for one in kept]
    assert features[0] < ENOUGH, "inputs hold nearly all"
    first = next((nodes for nodes, count in zip((0.8, 0.9, 0.95), features, strict=True) if count >= ENOUGH), 0.98)
    assert unpacked(packed(graph_bytes(graph)))[0]["start"]["node_threshold"] == first


@pytest.mark.parametrize("seed", range(4))
def test_the_parts_of_a_target_add_up_to_it(seed):
    for graph in (circuit(seed), random_output_graph(seed), random_graph(seed), prune(circuit(seed))):
        told = account(graph)
        parts = told.features + told.inputs + told.errors + told.rest + told.attention + told.absent + told.bias
        assert parts == pytest.approx(told.value, abs=1e-6)


def test_the_parts_of_a_foreign_document_have_no_bias():
    graph = random_graph(0)
    unknown = np.full(graph.target_node.size, np.nan)
    told = account(replace(graph, target_bias=unknown, target_preactivation=unknown.copy()))
    assert (told.bias, told.value) == (None, None)


def test_another_tool_s_document_has_its_own_prompt_and_words(tmp_path):
    path = tmp_path / "document.json"
    write_viewer_json(circuit(), path, "circuit-tracer", ViewerOptions(slug="x", by_position=True))
    document = json.loads(path.read_text(encoding="utf-8"))
    for node in document["nodes"]:
        del node["difffract"]
    words = [f"w{place}\ud800" for place in range(len(document["metadata"]["prompt_tokens"]))]

    def header(tokens):
        document["metadata"] |= {"prompt": "one of theirs", "prompt_tokens": tokens}
        path.write_text(json.dumps(document), encoding="utf-8")
        return _header(shown_graph(read_graph(path)), {}, "")

    told = header(words)
    assert told["prompt"] == "one of theirs" and ["prompt", "one of theirs"] in told["facts"]
    assert told["tokens"] == [unicode_replaced(word) for word in words]
    assert header(words[:2])["tokens"] == []  # not one for every position


def test_nothing_from_outside_is_markup():
    graph = circuit(prompt=HOSTILE)
    page = viewer_page(shown_graph(graph), PageParts(name=HOSTILE, title=HOSTILE, labels={"img/0/f1": HOSTILE}))
    assert "alert(" not in re.sub(r"<title>.*?</title>", "", page, flags=re.DOTALL)
    assert "<title>&lt;/script&gt;" in page
    assert page.count("<script") == page.count("</script>") == 3
    page.encode("utf-8")


def test_the_policy_lets_this_script_run_and_no_other():
    page = viewer_page(shown_graph(circuit()), PageParts())
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    script = re.search(r"<script>(.*)</script>\n</body>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    assert "connect-src 'self'" in viewer_page(shown_graph(circuit()), PageParts(token="t"))


def test_a_graph_too_large_for_a_page_is_refused_with_what_would_fit():
    graph = large(400, 4000)
    limits = Limits(nodes=200, edges=900)
    with pytest.raises(UserError, match="400 nodes and 4,000 edges, more than the 200 and 900") as caught:
        shown_graph(graph, limits=limits, name="big.npz")
    nodes, edges = re.search(r"--node-threshold (\S+) --edge-threshold (\S+)", str(caught.value)).groups()
    fitting = prune(graph, node_threshold=float(nodes), edge_threshold=float(edges))
    assert shown_graph(fitting, limits=limits) is fitting
    with pytest.raises(UserError, match="even when pruned; raise --max-nodes"):
        shown_graph(graph, limits=Limits(1, 1), name="big.npz")
