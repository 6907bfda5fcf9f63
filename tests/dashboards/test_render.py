"""A report is one file that fetches nothing, escapes what comes from outside, and shows where features are active."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from difffract_jax.address import IMG, TXT, flux_layout
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.dashboards.pictures import HEAT, STRONGEST, enlarged, heat_over, png_address
from difffract_jax.dashboards.records import card, edges_among, feature_of, top_features
from difffract_jax.dashboards.render import Picture, Section, drawing, feature_card, render, write_report
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.provenance import KnownRun
from difffract_jax.graphs.pruning import node_influence
from random_graphs import random_graph

HOSTILE = '<script>alert("1")</script> & `<b>`'
TOKENS = ("▁a", "▁red", "</s>", *["<pad>"] * 60)


@pytest.fixture
def graph():
    """A graph summed over positions, with influence, on a run of known sizes."""
    summed = aggregate(random_graph(3))
    run = KnownRun(layout=flux_layout(2, 1), grid=(8, 8), tokens=TOKENS)
    return replace(summed, node_influence=node_influence(summed).astype(np.float32)).with_provenance(shared=run)


def page(*sections):
    return render(f"title {HOSTILE}", [f"summary {HOSTILE}"], sections, f"record {HOSTILE}")


def pixels(address):
    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


def test_text_from_outside_is_escaped_wherever_it_stands():
    told = {"name": HOSTILE, "detects": HOSTILE, "influence": 0.5, "value": 1.0, "heat": None}
    told |= {"words": [(HOSTILE, 1.0, 2.0)]}
    laid = drawing([HOSTILE], [HOSTILE], [0], [HOSTILE], [])
    tables = {HOSTILE: [{HOSTILE: HOSTILE, "none": None, "share": 0.12345, "holds": True}]}
    picture = Picture("data:,", HOSTILE)
    found = page(Section(HOSTILE, [HOSTILE], [picture], tables, [told], laid))
    assert "<script" not in found and "<b>" not in found and 'alert("1")' not in found
    assert found.count("&lt;script&gt;") >= 12
    assert "<code>&lt;b&gt;</code>" in found
    for cell in ("<td>–</td>", "<td>0.123</td>", "<td>yes</td>"):
        assert cell in found


def test_a_report_fetches_nothing_and_is_written_whole(tmp_path):
    picture = Picture(png_address(np.zeros((2, 2, 3), np.uint8)), "a figure")
    write_report(tmp_path / "report.html", page(Section("s", (), [picture])))
    text = (tmp_path / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert not re.search(r"https?://|@import|url\(|<link|<script", text)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', text))
    assert "prefers-color-scheme: dark" in text and 'alt="a figure"' in text


def test_heat_lies_on_the_tokens_where_a_feature_is_active():
    image = np.full((8, 12, 3), 100, np.uint8)
    heat = np.zeros((2, 3))
    heat[1, 2], heat[0, 0] = 4.0, 1.0
    found = heat_over(image, heat)
    strongest = np.rint((1 - STRONGEST) * 100 + STRONGEST * np.array(HEAT))
    assert np.array_equal(found[4:, 8:], np.broadcast_to(strongest, (4, 4, 3)).astype(np.uint8))
    quarter = np.rint((1 - STRONGEST / 4) * 100 + STRONGEST / 4 * np.array(HEAT))
    assert np.array_equal(found[:4, :4], np.broadcast_to(quarter, (4, 4, 3)).astype(np.uint8))
    rest = np.ones((8, 12), bool)
    rest[4:, 8:] = rest[:4, :4] = False
    assert np.all(found[rest] == 100)
    assert np.array_equal(heat_over(image, np.zeros((2, 3))), image)
    assert np.array_equal(pixels(png_address(enlarged(found)))[::24, ::24], found)


def test_cards_hold_the_graph_s_maps(graph):
    seen = set()
    for node in top_features(graph, 10**6):
        part = slice(graph.map_indptr[node], graph.map_indptr[node + 1])
        found = card(graph, node)
        assert found.influence == graph.node_influence[node] and found.detects == ""
        assert Feature.parse(found.name) == feature_of(graph, node)
        if graph.node_stream[node] == IMG:
            assert found.heat is not None and not found.words
            assert found.heat.ravel()[graph.map_position[part]] == pytest.approx(graph.map_value[part])
            assert np.count_nonzero(found.heat) == np.count_nonzero(graph.map_value[part])
        else:
            assert found.heat is None and [word for word, _ in found.words[:3]] == ["a", "red", "</s>"]
            places = graph.map_position[part]
            assert [found.words[p][1] for p in places] == pytest.approx(graph.map_value[part].tolist())
        seen.add(int(graph.node_stream[node]))
        told = feature_card(found, np.zeros((16, 16, 3), np.uint8))
        assert max((share for _, share, _ in told["words"]), default=1.0) == 1.0
    assert seen == {IMG, TXT}


def test_the_strongest_features_come_first_and_targets_are_left_out(graph):
    nodes = top_features(graph, 5)
    influence = graph.node_influence[nodes]
    assert len(nodes) == 5 and np.all(np.diff(influence) <= 0) and not {*nodes} & {*graph.targets.tolist()}
    others = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), [*nodes, *graph.targets])
    assert graph.node_influence[others].max() <= influence[-1]
    assert all(graph.node_stream[node] == TXT for node in top_features(graph, 5, [TXT]))


def test_lines_are_shares_of_what_enters_their_ends(graph):
    nodes = [*top_features(graph, 10), graph.target]
    found = edges_among(graph, nodes)
    assert found
    for a, b, share in found:
        into = graph.edge_target == nodes[b]
        edge = graph.edge_attribution[into & (graph.edge_source == nodes[a])]
        assert share == pytest.approx(float(edge[0]) / np.abs(graph.edge_attribution[into]).sum())
