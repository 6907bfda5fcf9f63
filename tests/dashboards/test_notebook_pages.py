"""Pages in notebooks: the output holds the whole page, and groups come back where anywidget is installed."""

import base64
import io
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import viewer_documents
from PIL import Image

from difffract_jax.circuits.notation.labels import Labels
from difffract_jax.config import UserError
from difffract_jax.dashboards import notebook
from difffract_jax.dashboards.image_files import shown
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.viewer_document import checked_document
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups, identity, read_groups, write_groups
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.pruning import prune
from random_graphs import random_graph
from shown_circuits import circuit, large


class Frames(HTMLParser):
    """Collects the attributes of frames."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag == "iframe":
            self.found.append(dict(attrs))


def framed(page):
    """Returns the attributes of the one frame that a page's output holds."""
    parser = Frames()
    parser.feed(page._repr_html_())
    (frame,) = parser.found
    return frame


def extras(content):
    """Returns what lies in a page beside its graph."""
    return json.loads(block(content, "extras"))


def block(content, name):
    """Returns the bytes that lie in a page by a name."""
    text = content.partition(f'id="{name}">')[2].partition("<")[0]
    return zlib.decompress(base64.b64decode(text), -15)


def named(graph, node, name):
    return Groups(graph=identity(graph), names={node_names(graph)[node]: name})


def test_the_output_holds_the_whole_page_in_a_frame_that_reaches_nothing():
    page = circuit().show(height=400)
    frame = framed(page)
    assert frame["sandbox"].split() == ["allow-scripts", "allow-downloads"] and "src" not in frame
    assert "height:400px" in page._repr_html_() and frame["title"] == page.title
    content = frame["srcdoc"]
    assert content.startswith("<!doctype html>") and content.rstrip().endswith("</html>")
    assert "connect-src 'none'" in content and extras(content)["notebook"] == frame["data-difffract"]


def test_a_saved_page_stands_by_itself(tmp_path):
    page = circuit().show()
    page.save(tmp_path / "page.html")
    kept = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert kept == page.html and extras(kept)["notebook"] is None and "save('page.html')" in repr(page)


def test_what_the_page_sends_is_in_python_and_in_the_next_output():
    graph = circuit()
    page = graph.show()
    found = page.groups
    assert found.groups and found.graph == identity(graph) and (page.selected, page.pruning) == (None, {})
    sent = found.model_dump(mode="json") | {"notes": {node_names(graph)[2]: "</script> \u202e"}}
    sliders = {"mode": "standard", "node_threshold": 0.5, "edge_threshold": 0.9}
    node = node_names(aggregate(graph))[2]
    page.widget.set_state({"groups": sent, "selected": node, "pruning": sliders})
    assert page.groups == Groups.model_validate(sent)
    assert (page.selected, page.pruning) == (node, sliders)
    assert extras(framed(page)["srcdoc"])["groups"] == sent == extras(page.html)["groups"]


def test_what_python_sets_goes_to_the_page():
    graph = circuit()
    page, groups = graph.show(), named(graph, 2, "red")
    page.groups = groups
    state = page.widget.get_state()
    assert state["groups"] == groups.model_dump(mode="json")
    assert extras(state["page"])["notebook"] == state["key"] and extras(state["page"])["groups"] == state["groups"]


def test_groups_of_another_graph_are_refused(tmp_path):
    graph, other = circuit(), circuit(3)
    theirs, page = named(other, 2, "red"), graph.show()
    before = page.groups
    write_groups(theirs, tmp_path / "theirs.groups.json")
    for give in (
        lambda: graph.show(groups=theirs),
        lambda: graph.show(groups=tmp_path / "theirs.groups.json"),
        lambda: setattr(page, "groups", theirs),
        lambda: setattr(page.widget, "groups", theirs.model_dump(mode="json")),
    ):
        with pytest.raises(UserError, match="groups of another graph"):
            give()
    with pytest.raises(UserError, match="not a file of groups"):
        page.widget.groups = {"a": 1}
    assert page.groups == before


SLIDERS = {"mode": "standard", "node_threshold": 0.5, "edge_threshold": 0.9}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"selected": "img/0/f9999"}, "The page shows no node 'img/0/f9999'"),
        ({"pruning": {"mode": "standard"}}, "`pruning` is a mode and two numbers"),
        ({"pruning": SLIDERS | {"more": 1}}, "`pruning` is a mode and two numbers"),
        ({"pruning": SLIDERS | {"node_threshold": "0.5"}}, "`pruning` is a mode and two numbers"),
        ({"pruning": SLIDERS | {"node_threshold": 1.5}}, r"node_threshold .* must lie in \(0, 1\], but got 1.5"),
        ({"pruning": SLIDERS | {"mode": "mine"}}, "The pruning mode must be one of standard, difffract"),
    ],
)
def test_what_the_page_cannot_show_is_refused(state, said):
    page = circuit().show()
    ((trait, value),) = state.items()
    with pytest.raises(UserError, match=said):
        setattr(page.widget, trait, value)
    assert (page.selected, page.pruning) == (None, {})


def test_nodes_of_two_graphs_can_be_in_hand():
    first, second = circuit(), circuit(3)
    page = first.show(compare=second)
    both = {*node_names(aggregate(first))} ^ {*node_names(aggregate(second))}
    for name in sorted(both)[:1] + sorted(both)[-1:]:
        page.widget.selected = name
        assert page.selected == name


def test_groups_that_are_given_are_opened(tmp_path):
    graph = circuit()
    write_groups(named(graph, 2, "red"), str(tmp_path / "my.groups.json"))
    assert read_groups(str(tmp_path / "my.groups.json"), graph) == named(graph, 2, "red")
    for given in (named(graph, 2, "red"), str(tmp_path / "my.groups.json")):
        assert graph.show(groups=given).groups == named(graph, 2, "red")


def test_without_anywidget_the_page_is_shown_and_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(notebook, "find_spec", lambda name: None)
    page = circuit().show(groups=named(circuit(), 2, "red"))
    assert extras(framed(page)["srcdoc"])["groups"]["names"]
    for get in (lambda: page.groups, lambda: page.widget, lambda: page.selected, lambda: page.pruning):
        with pytest.raises(UserError, match=r"pip install 'difffract_jax\[notebook\]'"):
            get()


def test_an_image_is_pixels_or_a_file(tmp_path):
    pixels = np.full((8, 8, 3), 7, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    address = shown(Image.fromarray(pixels)).address
    for image in (pixels, Image.fromarray(pixels), tmp_path / "image.png"):
        assert extras(circuit().show(image=image).html)["images"] == [{"address": address, "step": None, "size": None}]
    with pytest.raises(UserError, match=r"shape \(8, 8, 3\) and type float64; give pixels"):
        circuit().show(image=pixels / 255)
    assert "graph.show(pipe)" in extras(circuit().show().html)["image_note"]
    with pytest.raises(UserError, match="does not tell a run of one prompt"):
        circuit().show(pipe=object())


def test_labels_are_texts_or_those_of_the_transcoders():
    graph = circuit()
    name = next(name for name in feature_names(graph) if name)
    assert b'"red things"' not in block(graph.show().html, "graph")
    assert b'"red things"' in block(graph.show(labels={name: "red things"}).html, "graph")
    with pytest.raises(UserError, match="labels of other transcoders"):
        graph.show(labels=Labels({}, "others", {}))


def foreign(**image):
    """The graph of another tool's document, which calls a feature "the word a", with an image."""
    document = viewer_documents.document()
    document["nodes"][1]["clerp"] = "the word a"
    document["metadata"]["image_input"] = image
    return graph_of(checked_document(document, "t.json"))


def test_a_document_s_image_and_labels_are_shown(tmp_path):
    stream, picture = io.BytesIO(), Image.new("RGB", (8, 8), "red")
    picture.save(stream, "PNG")
    graph = foreign(image_base64="data:image/png;base64," + base64.b64encode(stream.getvalue()).decode())
    graph.save(tmp_path / "t.npz")
    for one in (graph, Graph.load(tmp_path / "t.npz")):
        page = one.show().html
        assert [image["address"] for image in extras(page)["images"]] == [shown(picture).address]
        assert b"the word a" in block(page, "graph")
    named = graph.show(image=np.zeros((8, 8, 3), np.uint8), labels={"txt/0/f928": "another word"}).html
    assert extras(named)["images"][0]["address"] != shown(picture).address
    assert b"another word" in block(named, "graph") and b"the word a" not in block(named, "graph")


@pytest.mark.parametrize(("text", "said"), [("no base64!", "not base64"), ("AAAA", "not an image that can be read")])
def test_a_document_s_image_that_cannot_be_read_is_told_in_the_page(text, said):
    told = extras(foreign(image_base64=text).show().html)
    assert told["images"] == [] and said in told["image_note"] and "--image" not in told["image_note"]


def test_two_graphs_lie_side_by_side():
    page = circuit().show(compare=circuit(1))
    assert 'id="graph-b"' in page.html and 'id="graph-difference"' in page.html
    with pytest.raises(UserError, match="leave by_position out"):
        circuit().show(compare=circuit(1), by_position=True)
    with pytest.raises(UserError, match="The difference of the two graphs has .* or raise `limits`"):
        circuit().show(compare=circuit(1), limits=notebook.Limits(70, 100_000))


def test_a_graph_that_is_too_large_is_refused_with_what_makes_it_fit():
    graph, limits = large(400, 4000), notebook.Limits(200, 900)
    with pytest.raises(
        UserError, match=r"The graph has 400 nodes and 4,000 edges.*`prune\(graph, .*\)`, and show"
    ) as told:
        graph.show(limits=limits)
    thresholds = {key: float(value) for key, value in re.findall(r"(\w+_threshold)=([\d.]+\d)", str(told.value))}
    assert prune(graph, **thresholds).show(limits=limits).title
    with pytest.raises(UserError, match="even when pruned; raise `limits`"):
        graph.show(limits=notebook.Limits(1, 1))
    assert random_graph(0).show().title
