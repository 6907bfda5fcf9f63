"""The viewer in Chromium: what a person does with a circuit, and that nothing leaves the page."""

import base64
import json
import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from browsers import Watched, browser, downloaded, until
from difffract_jax.address import BRANCHES, NEGATIVE
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.image_files import shown as shown_image
from difffract_jax.dashboards.page_data import graph_bytes, packed, shown_graph
from difffract_jax.dashboards.page_server import PageServer
from difffract_jax.dashboards.target_words import target_title
from difffract_jax.dashboards.viewer_page import PageParts, viewer_page
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.combine import difference
from difffract_jax.graphs.files.reader import read_graph
from difffract_jax.graphs.files.viewer_json import write_viewer_json
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.groups import Groups, identity, nodes_of
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes
from random_graphs import random_graph, random_output_graph, with_score
from shown_circuits import circuit, guided_circuit, large

pytestmark = pytest.mark.browser
HOSTILE = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\u202eevil " \' `'


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def tab(context):
    """One tab for all tests of this file; a test that finishes has said nothing on the console."""
    return Watched(context)


@pytest.fixture(autouse=True)
def quiet(tab):
    tab.messages.clear()
    yield
    assert tab.messages == []


IMAGES = [
    shown_image(Image.new("RGB", (8, 8), colour), step) for colour, step in (("red", None), ("blue", 0), ("green", 1))
]


@pytest.fixture(scope="module")
def whole():
    """The graph that most tests look at, with groups that were found automatically."""
    return find_supernodes(aggregate(circuit()), threshold=0.2)


@pytest.fixture(scope="module")
def main_page(folder, whole):
    path = folder / "main.html"
    labels = {"img/0/f1": "roundness", "txt/0/f2": "the word red"}
    path.write_text(viewer_page(whole, PageParts(name="main", images=IMAGES, labels=labels)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(tab, main_page):
    opened = tab.open(main_page)
    opened.evaluate("localStorage.clear()")
    yield opened
    assert tab.beyond(main_page) == []


def state(page, path):
    return page.evaluate(f"difffract.{path}")


def all_shown(page):
    """Shows the whole graph, so that every node stands somewhere."""
    page.evaluate("difffract.store.edit((doc) => { doc.node_threshold = 1; doc.edge_threshold = 1; })")
    page.wait_for_timeout(60)


def shown(page):
    """Returns the nodes in view; a feature without an edge in is never."""
    return np.flatnonzero(page.evaluate("Array.from(difffract.main.masks.nodes)"))


def place_of(page, name, side="left"):
    call = "([name, side]) => difffract.scenes[side].pageOf(difffract.scenes[side].look.graph.number.get(name))"
    return page.evaluate(call, [name, side])


def click_node(page, name):
    page.mouse.click(*place_of(page, name))
    until(page, "(name) => difffract.store.view.selected === name", name)


def strongest_feature(graph):
    """Returns the name of a feature that feeds others and is fed."""
    names = node_names(graph)
    both = np.intersect1d(graph.edge_source, graph.edge_target)
    best = [n for n in both if graph.node_kind[n] == FEATURE and n not in graph.targets]
    return names[best[0]]


CENTRES = """(places) => {
  const canvas = document.querySelector('canvas.base'), box = canvas.getBoundingClientRect();
  const k = canvas.width / box.width, wide = canvas.width;
  const data = canvas.getContext('2d').getImageData(0, 0, wide, canvas.height).data;
  const at = ([x, y]) => 4 * (Math.round((y - box.top) * k) * wide + Math.round((x - box.left) * k));
  return places.map((place) => Array.from(data.slice(at(place), at(place) + 4)));
}"""
"""The colours of the drawing at places of the window."""

# What is drawn


def test_rows_are_blocks_and_every_edge_leads_up(page, whole):
    all_shown(page)
    y = np.array(page.evaluate("Array.from(difffract.main.layout.y)"))
    nodes = shown(page)
    levels = np.array(page.evaluate("Array.from(difffract.graphs.a.node_level)"))[nodes]
    for level in np.unique(levels)[1:]:
        assert y[nodes[levels == level]].max() < y[nodes[levels < level]].min()
    pixels = page.evaluate(
        """() => {
          const canvas = difffract.scenes.left.canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const seen = new Set();
          for (let i = 0; i < data.length; i += 4) seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
          return seen.size;
        }"""
    )
    assert pixels > 50


def test_words_and_the_image_have_zones_of_their_own(page, whole):
    all_shown(page)
    x = np.array(page.evaluate("Array.from(difffract.main.layout.x)"))
    zones = state(page, "main.layout.zones")
    assert zones["text"][1] < zones["image"][0]
    for node in shown(page):
        if whole.node_kind[node] != FEATURE:
            continue
        zone = zones["text"] if whole.node_stream[node] == 1 else zones["image"]
        assert zone[0] <= x[node] <= zone[1]


@pytest.mark.parametrize("mode", ["standard", "difffract"])
@pytest.mark.parametrize("seed", range(3))
def test_pruning_in_the_page_is_python_s(tab, main_page, mode, seed):
    page = tab.page if tab.page.url.startswith("file") else tab.open(main_page)
    for graph in (
        aggregate(circuit(seed)),
        random_output_graph(seed),
        random_graph(seed, max_nodes=20),
        large(300, 3000),
    ):
        pinned = node_names(graph)[-3:-1]
        cases = [
            ({"mode": mode, "node_threshold": nodes, "edge_threshold": edges}, list(keep))
            for nodes, edges in ((0.8, 0.98), (0.5, 0.7), (1.0, 0.9), (0.35, 1.0))
            for keep in ((), pinned)
        ]
        for (how, keep), (nodes, edges) in zip(cases, in_page(page, graph, cases), strict=True):
            expected = prune(graph, **how, keep=keep, by_position=True)
            assert nodes == nodes_before(graph, expected), (how, keep)
            assert edges == edges_before(graph, expected), (how, keep)


def identities(graph):
    columns = (graph.node_kind, graph.node_step, graph.node_stream, graph.node_block, graph.node_position)
    return [tuple(int(c[n]) for c in (*columns, graph.node_feature)) for n in range(graph.node_kind.size)]


def nodes_before(graph, pruned):
    kept = {(i, n < pruned.targets.size and n) for n, i in enumerate(identities(pruned))}
    return [n for n, i in enumerate(identities(graph)) if (i, n < graph.targets.size and n) in kept]


def edges_before(graph, pruned):
    number = {(one, n < graph.targets.size and n): n for n, one in enumerate(identities(graph))}
    place = [number[one, n < pruned.targets.size and n] for n, one in enumerate(identities(pruned))]
    return sorted(zip((place[s] for s in pruned.edge_source), (place[t] for t in pruned.edge_target), strict=True))


def in_page(page, graph, cases):
    """Returns what the page's own pruning keeps of a graph, case by case: nodes, and edges by their ends."""
    call = """([data, cases]) => {
      const graph = difffract.tools.readGraph(data);
      const kept = (mask) => Array.from(mask.keys()).filter((i) => mask[i]);
      return cases.map(([how, keep]) => {
        const { nodes, edges } = difffract.tools.prune(graph, how, keep.map((name) => graph.number.get(name)));
        return [kept(nodes), kept(edges).map((e) => [graph.edge_source[e], graph.edge_target[e]])];
      });
    }"""
    found = page.evaluate(call, [packed(graph_bytes(graph)), cases])
    return [(nodes, sorted(map(tuple, edges))) for nodes, edges in found]


def test_influence_in_the_page_is_python_s_to_the_last_digit(page, whole):
    from difffract_jax.graphs.influence import node_influence

    assert np.array_equal(page.evaluate("Array.from(difffract.main.influence)"), node_influence(whole))


def test_all_figures_of_the_bar_add_up_to_the_target(page, whole):
    for nodes in (1.0, 0.6, 0.2):
        page.evaluate(f"difffract.store.edit((doc) => {{ doc.node_threshold = {nodes}; }})")
        figures = [float(t) for t in page.eval_on_selector_all(".part .figure", "l => l.map(e => e.dataset.value)")]
        assert sum(figures[:-1]) == pytest.approx(figures[-1], rel=1e-6)
        assert figures[-1] == pytest.approx(float(whole.target_preactivation[0]), rel=1e-9)
    all_shown(page)
    told, parts = account(whole), state(page, "account().parts")
    for name in ("features", "inputs", "errors", "rest", "absent", "bias"):
        assert parts[name] == pytest.approx(getattr(told, name), abs=1e-6)
    assert parts["hidden"] == 0
    assert "holds fixed" in page.inner_text(".pooled") and page.inner_text(".part.bias th") == "bias"


def test_the_panel_says_in_words_what_is_explained(page, whole):
    names = [node_names(whole)[node] for node in whole.targets]
    asked = target_title(names[0]) if len(names) == 1 else f"Why {names[0]} and {len(names) - 1} more"
    assert page.inner_text(".panel h2 >> nth=0") == asked and "velocity:" not in asked


def test_in_a_row_nodes_stand_in_the_order_of_their_centres_of_mass(page, whole):
    all_shown(page)
    x, zones = np.array(page.evaluate("Array.from(difffract.main.layout.x)")), state(page, "main.layout.zones")
    centre = {}
    for node in shown(page):
        part = slice(whole.map_indptr[node], whole.map_indptr[node + 1])
        if whole.node_kind[node] == FEATURE and whole.node_stream[node] == 0 and part.stop > part.start:
            weights = whole.map_value[part].astype(float)
            centre[node] = (weights * (whole.map_position[part] % 2 + 0.5)).sum() / weights.sum() / 2
    pairs = [(a, b) for a in centre for b in centre if whole.node_block[a] == whole.node_block[b]]
    pairs = [(a, b) for a, b in pairs if whole.node_step[a] == whole.node_step[b] and centre[a] < centre[b] - 1e-6]
    assert pairs and all(x[a] < x[b] for a, b in pairs) and zones["image"][0] < min(x[n] for n in centre)


# Pointing


def test_pointing_at_a_node_shows_where_it_is_active(page, whole):
    all_shown(page)
    names = node_names(whole)
    node = next(n for n in shown(page) if whole.node_kind[n] == FEATURE and whole.node_stream[n] == 0)
    page.mouse.move(*place_of(page, names[node]))
    page.wait_for_selector(".tip:not([hidden])")
    assert names[node] in page.inner_text(".tip")
    heat = "document.querySelector('.heat').getContext('2d').getImageData(0, 0, 2, 2).data"
    call = f"Array.from({heat}).filter((_, i) => i % 4 === 3)"
    opacity = np.array(page.evaluate(call))
    part = slice(whole.map_indptr[node], whole.map_indptr[node + 1])
    assert {*np.flatnonzero(opacity)} == {int(p) for p in whole.map_position[part]}
    page.mouse.move(400, 5)
    page.wait_for_selector(".tip", state="hidden")


def test_pointing_at_a_text_node_colours_its_words(page, whole):
    all_shown(page)
    node = next(n for n in shown(page) if whole.node_kind[n] == FEATURE and whole.node_stream[n] == 1)
    page.mouse.move(*place_of(page, node_names(whole)[node]))
    part = slice(whole.map_indptr[node], whole.map_indptr[node + 1])
    wanted = {min(int(p), 3) for p in whole.map_position[part]}
    until(page, "document.querySelector('.word[style*=background]')")
    coloured = page.eval_on_selector_all(".word", "l => l.map(e => e.style.backgroundColor !== '')")
    assert {*np.flatnonzero(coloured)} == wanted


def test_pointing_at_a_patch_brings_its_nodes_into_focus(page, whole):
    all_shown(page)
    box = page.query_selector(".photo").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.25 * box["height"])
    until(page, "difffract.marked?.position === 1")
    owners = np.repeat(np.arange(whole.node_kind.size), np.diff(whole.map_indptr))
    here = {int(n) for n in owners[whole.map_position == 1] if whole.node_stream[n] != 1} & {*shown(page).tolist()}
    assert {*state(page, "scenes.left.focus.nodes")} == here
    assert f"{len(here)} nodes active at here" in page.inner_text("figcaption")


def test_pointing_at_a_word_brings_its_nodes_into_focus(page, whole):
    all_shown(page)
    page.hover(".word >> nth=1")
    until(page, "difffract.marked?.text === true")
    assert "“red”" in page.inner_text("figcaption")
    nodes = state(page, "scenes.left.focus.nodes")
    assert nodes and all(whole.node_stream[n] == 1 for n in nodes)
    zone = state(page, "main.layout.zones")["text"]
    frame, box = state(page, "scenes.left.frame"), page.query_selector(".over").bounding_box()
    x = box["x"] + (zone[0] + 1.5 / 4 * (zone[1] - zone[0])) * frame["k"] + frame["x"]
    page.mouse.move(x, box["y"] + box["height"] - 20)
    until(page, "difffract.marked?.position === 1 && difffract.fromAxis")


def test_small_maps_appear_beside_nodes_when_there_is_room(page, whole):
    all_shown(page)
    node = next(n for n in shown(page) if whole.node_kind[n] == FEATURE and whole.node_stream[n] == 0)
    box = f"difffract.tools.thumbnailBox(difffract.scenes.left.look, difffract.scenes.left.frame, {node})"
    assert page.evaluate(box) is None
    page.evaluate(
        """(node) => {
          const { frame, look } = difffract.scenes.left;
          const k = 60 / Math.min(look.layout.apart, 0.75 * look.layout.tall);
          difffract.scenes.left.place({ k, x: 400 - look.layout.x[node] * k, y: 300 - look.layout.y[node] * k });
        }""",
        int(node),
    )
    until(page, "!difffract.scenes.left.moving")
    page.wait_for_timeout(50)
    left, top, width, height = page.evaluate(box)
    # A quarter of the box is a token; the one with the value is the heat's colour.
    position = int(whole.map_position[whole.map_indptr[node]])
    place = [left + (0.25 + 0.5 * (position % 2)) * width, top + (0.25 + 0.5 * (position // 2)) * height]
    colour = page.evaluate(
        "([x, y]) => [...difffract.scenes.left.canvas.getContext('2d').getImageData(x, y, 1, 1).data]", place
    )
    assert colour[:3] == pytest.approx(page.evaluate("difffract.colours.heat"), abs=3)


def test_images_of_steps_are_shown(page):
    page.click(".steps button >> nth=2")
    assert page.get_attribute(".photo img", "src") == IMAGES[2].address
    assert "step 1 predicts" in page.inner_text("figcaption")
    assert state(page, "store.view.image") == 2


def test_steps_unfold_and_stack(page):
    rows = page.evaluate("difffract.main.layout.rows.length")
    page.click("[data-action=fold]")
    assert page.evaluate("difffract.main.layout.rows.length") < rows
    page.keyboard.press("s")
    assert page.evaluate("difffract.main.layout.rows.length") == rows


# Working


def test_clicking_a_node_opens_its_card_with_sorted_edges(page, whole):
    all_shown(page)
    name = strongest_feature(whole)
    click_node(page, name)
    assert page.inner_text(".card .address >> nth=0") == name
    node = node_names(whole).index(name)
    for table, ends in (("in", whole.edge_target), ("out", whole.edge_source)):
        values = page.eval_on_selector_all(f"[data-table={table}] .figure", "l => l.map(e => Number(e.dataset.value))")
        mine = whole.edge_attribution[ends == node].astype(float)
        assert values == pytest.approx(sorted(mine, key=lambda v: -abs(v)))
    other = page.get_attribute("[data-table=in] tr >> nth=0", "data-node")
    page.click("[data-table=in] tr >> nth=0")
    assert state(page, "store.view.selected") == other


def test_the_card_of_an_attention_score_tells_its_value(tab, folder):
    graph, score = with_score(random_graph(3))
    (folder / "score.html").write_text(viewer_page(graph, PageParts()), encoding="utf-8")
    page = tab.open((folder / "score.html").as_uri())
    all_shown(page)
    page.evaluate("(name) => difffract.select(difffract.main.graph.names.indexOf(name))", node_names(graph)[score])
    facts = page.locator("dl.numbers")
    facts.locator("dt", has_text="score, less the query's mean").wait_for()
    assert "\u22122.5" in facts.inner_text() and "largest value" not in facts.inner_text()


def test_nodes_say_which_branch_of_guidance_they_are_of(tab, folder):
    """In the drawing those of the negative prompt are hollow; tooltip, card, tables and labels say it in words."""
    graph = guided_circuit()
    labels = dict.fromkeys({name for name in feature_names(graph) if name.startswith("img/")}, "roundness")
    (folder / "guided.html").write_text(viewer_page(graph, PageParts(labels=labels)), encoding="utf-8")
    page = tab.open((folder / "guided.html").as_uri())
    all_shown(page)
    assert "of the negative prompt" in page.inner_text(".legend")
    names, labelled = node_names(graph), [int(node) for node in shown(page) if graph.node_kind[node] == FEATURE]
    for node in labelled:
        branch = BRANCHES[graph.node_branch[node]]
        assert names[node].endswith(f"~{branch}")
        title = page.evaluate("(node) => difffract.title(node)", node)
        assert title.endswith(f"~{branch}"), title
        page.evaluate("(node) => difffract.select(node)", node)
        facts = page.locator("dl.numbers")
        facts.locator("dt", has_text="branch of guidance").wait_for()
        assert branch in facts.inner_text()
    node = next(n for n in labelled if graph.node_branch[n] == NEGATIVE)
    page.mouse.move(*place_of(page, names[node]))
    page.wait_for_selector(".tip:not([hidden])")
    assert "negative branch" in page.inner_text(".tip")
    marked = page.eval_on_selector_all(
        ".edge-table tr.row",
        "l => l.map(e => [e.dataset.node, e.querySelector('.mark').classList.contains('negative')])",
    )
    assert marked and all(hollow == name.endswith("~negative") for name, hollow in marked)
    colours = page.evaluate(CENTRES, [place_of(page, names[n]) for n in labelled])
    hollow, filled = set(), set()
    for n, colour in zip(labelled, colours, strict=True):
        (hollow if graph.node_branch[n] == NEGATIVE else filled).add(tuple(colour))
    assert hollow and filled and not hollow & filled, "no colour is both of a hollow and of a filled node"


def test_a_graph_of_one_evaluation_a_step_says_nothing_of_branches(page, whole):
    all_shown(page)
    click_node(page, strongest_feature(whole))
    assert "branch" not in page.inner_text(".card") and "negative" not in page.inner_text(".legend")


def test_sliders_prune_and_one_drag_is_one_undo(page):
    before = state(page, "store.doc.node_threshold")
    counts = page.inner_text(".counted")
    slider = page.query_selector("[data-slider=node_threshold]")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowLeft")
    assert state(page, "store.doc.node_threshold") == pytest.approx(before - 0.3)
    assert page.inner_text(".counted") != counts
    page.select_option(".controls select", "difffract")
    assert state(page, "store.doc.mode") == "difffract"
    page.click("[data-action=undo]")
    assert state(page, "store.doc.mode") == "standard"
    box = slider.bounding_box()
    past = state(page, "store.past.length")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 8)
    page.mouse.down()
    for x in (0.6, 0.7, 0.9):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + 8)
    page.mouse.up()
    assert state(page, "store.past.length") == past + 1


def test_pins_stay_and_are_undone_and_redone(page, whole):
    all_shown(page)
    names, influence = node_names(whole), page.evaluate("Array.from(difffract.main.influence)")
    weakest = min((n for n in shown(page) if whole.node_kind[n] == FEATURE), key=lambda n: influence[n])
    click_node(page, names[weakest])
    page.keyboard.press("p")
    page.evaluate("difffract.store.edit((doc) => { doc.node_threshold = 0.1; })")
    assert state(page, f"main.masks.nodes[{weakest}]") == 1
    page.keyboard.press("u")
    page.keyboard.press("Control+z")
    assert state(page, "store.doc.pinned") == []
    page.keyboard.press("r")
    page.keyboard.press("Control+Shift+Z")
    assert state(page, "store.doc.pinned") == [names[weakest]]
    page.click("[data-action=pin]")
    assert state(page, "store.doc.pinned") == []


def test_automatic_groups_come_first_and_nodes_are_grouped_by_hand(page, whole):
    all_shown(page)
    groups = [group["name"] for group in state(page, "store.doc.groups")]
    assert groups == list(whole.supernodes) and groups
    page.click("#tab-groups")
    page.hover(".group-head >> nth=0")
    members = {node_names(whole).index(name) for name in state(page, "store.doc.groups[0].members")}
    assert {*state(page, "scenes.left.focus.nodes")} == members & {*shown(page).tolist()}
    name = strongest_feature(whole)
    click_node(page, name)
    page.keyboard.press("g")
    page.keyboard.type("mine")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-group=mine]")
    made = state(page, "store.doc.groups")
    assert made[-1] == {"name": "mine", "members": [name]}
    assert not any(name in group["members"] for group in made[:-1])
    page.fill("[data-group=mine] input", "ours")
    page.press("[data-group=mine] input", "Enter")
    assert state(page, "store.doc.groups.at(-1).name") == "ours"
    page.click("[data-group=ours] button")
    assert "ours" not in [group["name"] for group in state(page, "store.doc.groups")]
    page.keyboard.press("u")
    assert state(page, "store.doc.groups.at(-1).name") == "ours"


def test_naming_and_annotating(page, whole):
    all_shown(page)
    name = strongest_feature(whole)
    click_node(page, name)
    page.keyboard.press("n")
    page.keyboard.type("the edge of things")
    page.keyboard.press("Enter")
    assert state(page, "store.doc.names") == {name: "the edge of things"}
    assert page.inner_text(".card h2") == "the edge of things"
    page.fill("textarea.note", "fires at edges")
    page.press("textarea.note", "Tab")
    assert state(page, "store.doc.notes") == {name: "fires at edges"}
    page.click("#tab-groups")
    assert "fires at edges" in page.inner_text(".notes")


def test_search_finds_labels_names_and_notes(page, whole):
    all_shown(page)
    page.keyboard.press("/")
    page.keyboard.type("roundness")
    page.wait_for_selector(".results li.row")
    found = page.get_attribute(".results li.row", "data-node")
    assert found.startswith("img/0/f1")
    page.keyboard.press("Enter")
    assert state(page, "store.view.selected") == found and page.is_hidden(".results")
    page.fill(".search", "no such thing")
    assert page.inner_text(".results") == "Nothing found."
    page.keyboard.press("Escape")
    assert page.is_hidden(".results")


def test_the_keyboard_walks_along_edges(page, whole):
    all_shown(page)
    page.keyboard.press("ArrowUp")
    assert state(page, "store.view.selected") == node_names(whole)[0]
    page.keyboard.press("ArrowDown")
    into = np.flatnonzero(whole.edge_target == 0)
    best = whole.edge_source[into[np.argmax(np.abs(whole.edge_attribution[into]))]]
    assert state(page, "store.view.selected") == node_names(whole)[best]
    names, places = node_names(whole), state(page, "main.layout.rows")
    row = next(one["nodes"] for one in places if len([n for n in one["nodes"] if n in shown(page)]) > 2)
    x = page.evaluate("Array.from(difffract.main.layout.x)")
    ordered = sorted((n for n in row if n in shown(page)), key=lambda n: x[n])
    click_node(page, names[ordered[0]])
    page.keyboard.press("ArrowRight")
    assert state(page, "store.view.selected") == names[ordered[1]]
    page.keyboard.press("ArrowLeft")
    assert state(page, "store.view.selected") == names[ordered[0]]
    page.keyboard.press("?")
    assert page.is_visible("dialog.help")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.help", state="hidden")
    page.keyboard.press("Escape")
    assert state(page, "store.view.selected") is None


def test_the_strongest_path_leads_to_the_target(page, whole):
    all_shown(page)
    shares = np.abs(whole.edge_attribution).astype(float)
    shares /= np.bincount(whole.edge_target, shares, whole.node_kind.size)[whole.edge_target]
    best = np.zeros(whole.node_kind.size)
    best[0] = 1
    levels = np.array(page.evaluate("Array.from(difffract.graphs.a.node_level)"))
    for edge in np.argsort(-levels[whole.edge_target], kind="stable"):
        source, target = whole.edge_source[edge], whole.edge_target[edge]
        best[source] = max(best[source], shares[edge] * best[target])
    names = node_names(whole)
    node = next(n for n in np.flatnonzero(whole.node_kind == FEATURE)[::-1] if best[n] > 0)
    click_node(page, names[node])
    page.keyboard.press("t")
    page.wait_for_selector(".path-box")
    path = state(page, "path")
    assert (path["nodes"][0], path["nodes"][-1]) == (node, 0)
    assert path["share"] == pytest.approx(best[node])
    assert page.locator(".path-box li").count() == len(path["nodes"])


def test_zoom_drag_and_fit(page):
    box = page.query_selector(".over").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = state(page, "scenes.left.frame.k")
    page.mouse.move(*middle)
    page.mouse.wheel(0, -300)
    until(page, "(k) => difffract.scenes.left.frame.k > k", before)
    x = state(page, "scenes.left.frame.x")
    page.mouse.down()
    page.mouse.move(middle[0] + 80, middle[1], steps=4)
    page.mouse.up()
    assert state(page, "scenes.left.frame.x") == pytest.approx(x + 80, abs=1)
    until(page, "!difffract.scenes.left.moving")
    page.keyboard.press("f")
    assert state(page, "scenes.left.frame.k") == pytest.approx(before)
    page.click("[data-action=zoom-in]")
    assert state(page, "scenes.left.frame.k") > before


def test_an_address_brings_back_the_view(tab, page, main_page, whole):
    all_shown(page)
    name = strongest_feature(whole)
    click_node(page, name)
    page.keyboard.press("p")
    page.click("[data-action=fold]")
    until(page, "location.hash.length > 20")
    page.wait_for_timeout(300)
    address = page.url
    opened = tab.open(address)
    assert opened.evaluate("[difffract.store.view.selected, difffract.store.view.unfolded]") == [name, False]
    assert state(opened, "store.doc.pinned") == [name] and state(opened, "store.doc.node_threshold") == 1
    tab.open(main_page + "#nonsense")
    assert state(tab.page, "store.view.selected") is None


@pytest.mark.parametrize(
    "held",
    [
        {"view": {"show": "difference"}},  # of a page that compared two graphs
        {"view": {"show": "side", "image": -1, "camera": {"k": 0}, "selected": 3}},
        {"doc": {"pinned": 5, "groups": [{"name": "x"}], "names": None, "node_threshold": "a", "mode": "else"}},
        {"doc": [], "view": None, "constructor": {}},
    ],
)
def test_an_address_of_another_page_does_no_harm(tab, main_page, held):
    squeezed = zlib.compress(json.dumps(held).encode(), wbits=-15)
    opened = tab.open(f"{main_page}#{base64.urlsafe_b64encode(squeezed).decode().rstrip('=')}")
    fresh = opened.evaluate("[JSON.parse(difffract.store.initial.doc), difffract.store.initial.view]")
    assert opened.evaluate("[difffract.store.doc, {...difffract.store.view}]") == fresh


# Files


@pytest.mark.parametrize("by_position", [False, True])
def test_groups_of_sums_and_of_single_positions_open_in_each_other_s_page(tab, folder, by_position):
    graph = circuit()
    summed, path = aggregate(graph), folder / "positions.html"
    shows, saved_from = (graph, summed) if by_position else (summed, graph)
    node = max(n for n in range(saved_from.node_kind.size) if saved_from.node_kind[n] == FEATURE)
    name = node_names(saved_from)[node]
    groups = Groups(graph=identity(graph), groups={"x": (name,)}, names={name: "round"}, pinned=(name, "gone"))
    path.write_text(viewer_page(shows, PageParts(groups=groups)), encoding="utf-8")
    doc = tab.open(path.as_uri()).evaluate("difffract.store.doc")
    expected = [node_names(shows)[n] for n in nodes_of(shows, [name])]
    assert expected and doc["groups"] == [{"name": "x", "members": expected}]
    assert doc["names"] == dict.fromkeys(expected, "round") and doc["pinned"] == [*expected, "gone"]


def test_groups_are_saved_and_opened_again(page, whole, folder):
    all_shown(page)
    name = strongest_feature(whole)
    click_node(page, name)
    page.keyboard.press("p")
    page.click("#tab-groups")
    file, content = downloaded(page, lambda: page.click("[data-action=save]"))
    saved = json.loads(content)
    assert file == "main.groups.json" and saved["pinned"] == [name]
    assert saved["graph"] == identity(whole).model_dump(mode="json")
    assert list(saved["groups"]) == list(whole.supernodes)
    (folder / "mine.groups.json").write_bytes(content)
    page.keyboard.press("u")
    with page.expect_file_chooser() as chooser:
        page.click("[data-action=load]")
    chooser.value.set_files(folder / "mine.groups.json")
    until(page, "(name) => difffract.store.doc.pinned.includes(name)", name)
    (folder / "other.groups.json").write_text(json.dumps(saved | {"graph": {"fingerprint": "else"}}), encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.click("[data-action=load]")
    chooser.value.set_files(folder / "other.groups.json")
    page.wait_for_selector(".toast:not([hidden])")
    until(page, "document.querySelector('.toast').textContent.includes('another graph')")
    (folder / "other.groups.json").write_text(json.dumps(saved | {"groups": {"x": 3}}), encoding="utf-8")
    with page.expect_file_chooser() as chooser:
        page.click("[data-action=load]")
    chooser.value.set_files(folder / "other.groups.json")
    until(page, "document.querySelector('.toast').textContent.includes('damaged at groups')")


def test_figures_are_saved_as_svg_and_png(page, folder, whole):
    import xml.etree.ElementTree as xml

    all_shown(page)
    name = next(node_names(whole)[n] for n in shown(page) if whole.node_kind[n] == FEATURE)
    page.evaluate(
        "(name) => difffract.store.edit((doc) => { doc.groups = [{ name: 'the edge', members: [name] }]; })", name
    )
    file, content = downloaded(page, lambda: page.click("[data-action=svg]"))
    drawn = xml.fromstring(content.decode())
    assert file == "main.svg" and len(drawn.findall(".//{*}path")) > 8
    texts = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"red", "inputs", "the edge"} <= {*texts}
    file, content = downloaded(page, lambda: page.click("[data-action=png]"))
    (folder / "out.png").write_bytes(content)
    with Image.open(folder / "out.png") as image:
        assert file == "main.png" and image.width == 3 * round(state(page, "scenes.left.frame.width"))


# Looks


def test_light_and_dark_follow_the_reader_and_the_switch(tab, main_page):
    tab.page.emulate_media(color_scheme="dark")
    page = tab.open(main_page)
    page.evaluate("localStorage.clear()")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.keyboard.press("d")
    assert page.evaluate(ground) != dark
    tab.page.emulate_media(color_scheme="light")
    page = tab.open(main_page)
    page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("size", [(1280, 720), (390, 844)])
def test_nothing_is_wider_than_the_screen(tab, main_page, size):
    tab.page.set_viewport_size({"width": size[0], "height": size[1]})
    page = tab.open(main_page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    sizes = page.eval_on_selector_all(
        "body *",
        "l => l.filter(e => e.offsetParent && e.childNodes.length && [...e.childNodes].some(n => n.nodeType === 3 "
        "&& n.data.trim())).map(e => parseFloat(getComputedStyle(e).fontSize))",
    )
    assert min(sizes) >= 10.5
    tab.page.set_viewport_size({"width": 1280, "height": 720})


# Two graphs


@pytest.fixture
def two(tab, folder):
    a, b = aggregate(circuit(0)), aggregate(circuit(1))
    path = folder / "two.html"
    parts = PageParts(other=b, other_title="second", difference=difference(a, b), title="first")
    parts = parts._replace(image_note="The first has none.", other_image_note="The second has none.")
    path.write_text(viewer_page(a, parts), encoding="utf-8")
    return a, b, tab.open(path.as_uri())


def test_each_of_two_graphs_says_why_it_has_no_image(two):
    call = "(key) => difffract.pictures[key].element.querySelector('figcaption').textContent"
    notes = [two[2].evaluate(call, key) for key in ("a", "b")]
    assert notes == ["The first has none.", "The second has none."]


def test_two_graphs_stand_side_by_side_and_move_together(two):
    a, b, page = two
    page.click("[data-show=side]")
    until(page, "difffract.scenes.right.timings.full > 0")
    assert page.evaluate("difffract.scenes.right.look.graph.count") == b.node_kind.size
    common = sorted({*node_names(a)} & {*node_names(b)} - {node_names(a)[0]})[0]
    all_shown(page)
    page.mouse.move(*place_of(page, common))
    until(page, "(name) => difffract.hovered === name", common)
    assert page.evaluate("difffract.scenes.right.focus.hovered") == node_names(b).index(common)
    page.mouse.wheel(0, -200)
    until(page, "difffract.scenes.right.frame.k === difffract.scenes.left.frame.k")
    page.mouse.click(*place_of(page, common, "right"))
    assert state(page, "store.view.selected") == common


def test_the_difference_is_the_one_of_combine(two):
    a, b, page = two
    page.click("[data-show=difference]")
    all_shown(page)
    expected = difference(a, b)
    assert page.evaluate("Array.from(difffract.main.graph.edge_attribution)") == pytest.approx(
        expected.edge_attribution.tolist()
    )
    assert page.get_attribute("[data-show=difference]", "aria-pressed") == "true"
    total = float(page.get_attribute(".part.total .figure", "data-value"))
    assert total == pytest.approx(float(a.target_preactivation[0] - b.target_preactivation[0]))


# What comes from outside


@pytest.mark.parametrize("place", ["prompt", "label", "name"])
def test_injections_are_text(tab, folder, place):
    long = HOSTILE + "x" * 10_000
    graph = find_supernodes(aggregate(circuit(prompt=long if place == "prompt" else "p")), threshold=0.2)
    labels = {feature: long for feature in ("img/0/f1", "img/0/f2", "txt/0/f1", "img/1/f1")} if place == "label" else {}
    if place == "name":
        graph = replace(graph, supernodes={long: next(iter(graph.supernodes.values()))})
    path = folder / "hostile.html"
    path.write_text(
        viewer_page(graph, PageParts(name=HOSTILE, title=long if place == "name" else "", labels=labels)),
        encoding="utf-8",
    )
    page = tab.open(path.as_uri())
    all_shown(page)
    for key in ("circuit", "node", "groups"):
        page.click(f"#tab-{key}")
    page.evaluate("difffract.select(difffract.graphs.a.count - 1)")
    page.keyboard.press("/")
    page.keyboard.type("script")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked === undefined")
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert page.evaluate("document.scripts.length") == 3
    assert "onerror" in page.inner_text("body") or place == "label"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert tab.beyond(path.as_uri()) == []


def test_documents_of_other_tools_and_single_positions_are_shown(tab, folder):
    document_path = folder / "document.json"
    write_viewer_json(circuit(), document_path, "circuit-tracer", ViewerOptions(slug="x"))
    content = json.loads(document_path.read_text(encoding="utf-8"))
    for node in content["nodes"]:
        del node["difffract"]
    document_path.write_text(json.dumps(content), encoding="utf-8")
    for graph in (shown_graph(read_graph(document_path)), shown_graph(circuit(), by_position=True)):
        path = folder / "other.html"
        path.write_text(viewer_page(graph, PageParts(image_note="None.")), encoding="utf-8")
        page = tab.open(path.as_uri())
        all_shown(page)
        assert shown(page).size > 5
        total = page.inner_text(".part.total th")
        known = bool(np.isfinite(graph.target_preactivation[0]))
        assert total == ("target" if known else "sum of edges")
        figures = [float(t) for t in page.eval_on_selector_all(".part .figure", "l => l.map(e => e.dataset.value)")]
        assert sum(figures[:-1]) == pytest.approx(figures[-1], rel=1e-6)


def test_a_page_from_disk_opens_pages_of_features_beside_it(tab, folder):
    (folder / "beside").mkdir(exist_ok=True)
    (folder / "beside" / "index.html").write_text("<!doctype html>the page of a feature", encoding="utf-8")
    graph = aggregate(circuit())
    path = folder / "with-pages.html"
    path.write_text(viewer_page(graph, PageParts(pages="beside/index.html#{feature}")), encoding="utf-8")
    page = tab.open(path.as_uri())
    all_shown(page)
    click_node(page, node_names(graph)[next(n for n in shown(page) if graph.node_kind[n] == FEATURE)])
    page.click("[data-action=page]")
    page.frame_locator(".feature-page iframe").get_by_text("the page of a feature").wait_for()


def test_a_graph_without_image_says_so(tab, folder):
    path = folder / "plain.html"
    path.write_text(viewer_page(shown_graph(random_graph(0)), PageParts(image_note="No image here.")), encoding="utf-8")
    page = tab.open(path.as_uri())
    assert "No image here." in page.inner_text("figcaption")
    assert page.locator(".photo img").count() == 0


# Served


@pytest.fixture
def served(tab, folder):
    """The page from its server, with feature pages; what it saved is in a list."""
    pages, saved = folder / "feature-pages", []
    pages.mkdir(exist_ok=True)
    (pages / "index.html").write_text("<!doctype html><title>A feature</title>the page of a feature", encoding="utf-8")

    def save(text):
        if len(saved) == 1:
            raise UserError("These groups belong to another graph.")
        saved.append(json.loads(text))
        return "Saved as main.groups.json."

    graph = aggregate(circuit())

    def page(token):
        return viewer_page(graph, PageParts(token=token, pages="pages/index.html#{feature}"))

    server = PageServer(page, save, pages=pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield graph, tab.open(server.address), saved, server
    tab.page.goto("about:blank")
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_served_page_saves_its_groups_by_itself(served, tab):
    graph, page, saved, server = served
    all_shown(page)
    name = strongest_feature(graph)
    click_node(page, name)
    page.keyboard.press("p")
    page.click("#tab-groups")
    page.click("[data-action=save]")
    until(page, "document.querySelector('.toast').textContent === 'Saved as main.groups.json.'")
    assert [one["pinned"] for one in saved] == [[name]]
    assert tab.beyond(server.address) == [f"{server.address}groups"]
    page.click("[data-action=save]")
    until(page, "document.querySelector('.toast').textContent.includes('belong to another graph')")
    tab.messages.clear()  # the browser notes that the server refused


def test_a_node_opens_the_page_of_its_feature(served, tab):
    graph, page, _, server = served
    all_shown(page)
    node = next(n for n in shown(page) if graph.node_kind[n] == FEATURE)
    click_node(page, node_names(graph)[node])
    page.keyboard.press("o")
    page.frame_locator(".feature-page iframe").get_by_text("the page of a feature").wait_for()
    address = page.get_attribute(".feature-page iframe", "src")
    assert address == f"pages/index.html#{state(page, f'graphs.a.features[{node}]')}"
    page.click(".feature-page button")
    assert page.is_hidden(".feature-page")
