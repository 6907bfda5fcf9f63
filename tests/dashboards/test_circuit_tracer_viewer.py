"""What is exported, opened in circuit-tracer's own viewer; what is grouped, named and pinned there, taken back."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tracer_viewer
from browsers import Watched, browser, until
from difffract_jax.cli.viewer_export import write_for_viewer
from difffract_jax.config import ExportConfig
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.viewer_groups import read_any_groups
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.groups import with_groups
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.supernodes import find_supernodes
from shown_circuits import circuit

NPM = [program for program in (shutil.which("npm"),) if program]
"""Without npm there is nowhere to take the page's libraries from."""
pytestmark = [pytest.mark.browser, pytest.mark.parametrize("npm", NPM)]
HOSTILE = '<img src=x onerror="window.hacked=1">'
WHOLE = circuit()
GRAPH = find_supernodes(aggregate(WHOLE), threshold=0.2)
LABELLED = int(np.flatnonzero(GRAPH.node_kind == FEATURE)[-1])
TYPES = {"cross layer transcoder": "●", "mlp reconstruction error": "◆", "embedding": "■", "logit": "■"}


class Opened(NamedTuple):
    """The viewer with an exported graph.

    Attributes:
        page: of the browser.
        document: that was written, as it was.
        file: that it lies in.
        address: that the export told, at this server.
        beyond: requests that left the server and the libraries.
        messages: of its console.
    """

    page: Any
    document: dict[str, Any]
    file: Path
    address: str
    beyond: list[str]
    messages: list[str]

    def is_quiet(self):
        """Says whether nothing was asked of the web, and nothing failed."""
        return self.beyond == [] and [one for one in self.messages if one.startswith("error")] == []


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """One server, folder and tab for all tests of this file."""
    folder, labels = tmp_path_factory.mktemp("shown"), {feature_names(GRAPH)[LABELLED]: HOSTILE}
    GRAPH.save(folder / "graph.npz")
    with tracer_viewer.served(folder) as address, browser(tmp_path_factory.mktemp("profile")) as context:
        beyond = tracer_viewer.hand_out(context, address)
        tab = Watched(context)

        def opened(slug="circle"):
            file = folder / f"{slug}.json"
            settings = ExportConfig(graph=folder / "graph.npz", format="circuit-tracer", out=file, labels=labels)
            told = write_for_viewer(GRAPH, GRAPH, settings)
            shown = told["open"].replace("http://localhost:8041/", address)
            tab.page.goto("about:blank")
            tab.messages.clear()
            beyond.clear()
            tab.page.goto(shown)
            until(tab.page, "document.querySelectorAll('.supernode-container').length > 0")
            return Opened(tab.page, json.loads(file.read_text(encoding="utf-8")), file, shown, beyond, tab.messages)

        yield opened


def nodes_of(opened):
    """Returns the nodes that are drawn: id, name, mark and place on the page."""
    call = """() => [...document.querySelectorAll('.link-graph text.node')].map((e) => {
      const box = e.getBoundingClientRect();
      return [e.__data__.nodeId, e.__data__.ppClerp, e.textContent, box.x + box.width / 2, box.y + box.height / 2];
    })"""
    return opened.page.evaluate(call)


def click(opened, node_id, *modifiers):
    x, y = next((x, y) for name, _, _, x, y in nodes_of(opened) if name == node_id)
    for key in modifiers:
        opened.page.keyboard.down(key)
    opened.page.mouse.click(x, y)
    for key in modifiers:
        opened.page.keyboard.up(key)


def test_the_whole_graph_is_drawn_by_its_names_and_groups(viewer, npm):
    opened = viewer()
    told = {node["node_id"]: node for node in opened.document["nodes"]}
    drawn = {name: (label, mark) for name, label, mark, _, _ in nodes_of(opened)}
    assert drawn.keys() == told.keys()
    for name, (label, mark) in drawn.items():
        node = told[name]
        assert mark == TYPES[node["feature_type"]]
        if node["feature_type"] == "cross layer transcoder":
            assert node["clerp"] and label.endswith(node["clerp"])
    options = opened.page.eval_on_selector_all(".graph-prompt-select option", "l => l.map((e) => e.value)")
    assert options == ["circle"] and opened.page.title() == "Attribution Graph: a red circle"
    heads = opened.page.eval_on_selector_all(".prompt-token text", "l => l.map((e) => e.textContent)")
    assert {*heads} <= {*opened.document["metadata"]["prompt_tokens"]} and heads
    named = opened.page.eval_on_selector_all(".node-text-container span", "l => l.map((e) => e.textContent)")
    groups = [group[0] for group in opened.document["qParams"]["supernodes"]]
    assert groups and {*groups} <= {*named}
    assert opened.is_quiet()


def test_a_feature_shows_where_it_is_active_in_the_run(viewer, npm):
    opened = viewer()
    node = next(n for n in opened.document["nodes"] if n["name"].startswith("img/") and n["activation"] is not None)
    click(opened, node["node_id"])
    until(opened.page, "document.querySelectorAll('.example-quantile').length > 0")
    titles = opened.page.eval_on_selector_all(".quantile-title", "l => l.map((e) => e.textContent.trim())")
    assert titles and all(title.startswith("In this run, step ") for title in titles)
    place = node_names(GRAPH).index(node["name"])
    part = slice(*GRAPH.map_indptr[place : place + 2])
    count = "l => l.filter((e) => e.style.background).length"
    coloured = opened.page.eval_on_selector_all(".feature-example-list .token", count)
    assert coloured >= np.count_nonzero(GRAPH.map_value[part])
    assert opened.is_quiet()


def test_pins_groups_and_labels_made_there_come_back(viewer, npm):
    opened = viewer("mine")
    page = opened.page
    features = [n for n in opened.document["nodes"] if n["feature_type"] == "cross layer transcoder"]
    pinned = {*opened.document["qParams"]["pinnedIds"]}
    first, second = [n for n in features if n["node_id"] not in pinned][:2]
    for node in (first, second):
        click(opened, node["node_id"], "Control")
    until(page, f"window.location.href.includes({second['node_id']!r})")
    click(opened, first["node_id"])
    page.click(".edit-clerp-button")
    page.fill(".clerp-edit input", "roundness")
    page.keyboard.press("Enter")
    until(page, "decodeURIComponent(window.location.href).includes('roundness')")
    page.keyboard.down("g")
    for node in (first, second):
        page.click(f".supernode-container >> nth={position_of(page, node['node_id'])}", force=True)
    page.keyboard.up("g")
    until(page, "decodeURIComponent(window.location.search).includes('roundness')")
    page.click(".save-button")
    until(page, "document.querySelector('.save-button').textContent === 'Saved!'")
    found = read_any_groups(opened.file, WHOLE)
    made = [members for name, members in found.groups.items() if {*members} == {first["name"], second["name"]}]
    assert len(made) == 1 and {first["name"], second["name"]} <= {*found.pinned}
    assert found.names[first["name"]] == "roundness"
    kept = with_groups(GRAPH, found).supernodes
    assert [*GRAPH.supernodes.values()] == [*kept.values()][: len(GRAPH.supernodes)]
    assert opened.is_quiet()


def position_of(page, node_id):
    call = "(id) => [...document.querySelectorAll('.supernode-container')].findIndex((e) => e.__data__.nodeId === id)"
    return page.evaluate(call, node_id)


def test_markup_in_a_label_is_shown_as_text(viewer, npm):
    opened = viewer()
    node = next(n for n in opened.document["nodes"] if "onerror" in n["clerp"])
    x, y = next((x, y) for name, _, _, x, y in nodes_of(opened) if name == node["node_id"])
    opened.page.mouse.move(x, y)
    until(opened.page, "document.querySelector('.tooltip').textContent.includes('onerror')")
    assert opened.page.evaluate("window.hacked") is None and opened.is_quiet()


def test_without_the_list_the_viewer_shows_nothing(viewer, npm):
    opened = viewer()
    index = opened.file.with_name("graph-metadata.json")
    index.rename(index.with_suffix(".away"))
    opened.page.goto(opened.address)
    opened.page.wait_for_timeout(300)
    assert opened.page.inner_text("body").strip() == ""
    index.with_suffix(".away").rename(index)
