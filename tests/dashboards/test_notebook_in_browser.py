"""Pages in notebooks in Chromium: a saved notebook without a kernel, and what goes to the widget's model and back."""

import json

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from browsers import Watched, browser, until
from difffract_jax.dashboards.widget import FRONT_END
from difffract_jax.graphs.groups import Groups, identity
from shown_circuits import circuit

pytestmark = pytest.mark.browser
DRAWN = "window.difffract?.scenes.left.timings.full > 0"
# A model as front ends give it to a widget: what is set is told to listeners at once.
NOTEBOOK = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><div id="output">%s</div>
<script type="module">
const listeners = {};
const state = %s;
window.saved = [];
window.model = {
  get: (name) => state[name],
  set: (name, value) => { state[name] = value; for (const heard of listeners[`change:${name}`] ?? []) heard(); },
  on: (event, heard) => (listeners[event] ??= []).push(heard),
  off: (event, heard) => { listeners[event] = listeners[event].filter((one) => one !== heard); },
  save_changes: () => window.saved.push(JSON.parse(JSON.stringify(state))),
};
const address = URL.createObjectURL(new Blob([%s], { type: "text/javascript" }));
window.frontEnd = (await import(address)).default;
window.stop = window.frontEnd.initialize({ model: window.model });
</script>"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as context:
        yield Watched(context)


@pytest.fixture(autouse=True)
def quiet(tab):
    tab.messages.clear()
    yield
    assert tab.messages == []


def as_script(value):
    return json.dumps(value).replace("</", "<\\/")


@pytest.fixture
def live(tab, tmp_path):
    """A graph's page in a notebook whose kernel runs, its output twice; and the two frames."""
    graph = circuit()
    page = graph.show(height=340)  # a browser does not draw frames that are out of sight
    state = {name: value for name, value in page.widget.get_state().items() if not name.startswith("_")}
    del state["layout"], state["tabbable"], state["tooltip"]
    content = NOTEBOOK % (2 * page._repr_html_(), as_script(state), as_script(FRONT_END.read_text(encoding="utf-8")))
    path = tmp_path / "notebook.html"
    path.write_text(content, encoding="utf-8")
    outer = tab.open(path.as_uri(), "window.stop !== undefined")
    frames = outer.main_frame.child_frames
    for one in frames:
        until(one, DRAWN)
    assert not [url for url in tab.beyond(path.as_uri()) if not url.startswith("about:srcdoc")]
    return page, graph, outer, frames


def names_in(frame):
    return frame.evaluate("window.difffract.store.doc.names")


def test_what_is_made_in_a_page_comes_to_python_and_to_its_other_views(live):
    page, graph, outer, (first, second) = live
    assert outer.evaluate("window.saved.length") == 0, "a page that opens changes nothing"
    name = page.groups.groups["single/0/f3@txt#1 and 1 more"][0]
    first.locator("#tab-groups").click()
    first.get_by_label("Name of the group").first.fill("the circle")
    first.get_by_label("Name of the group").first.press("Enter")
    first.evaluate("(name) => window.difffract.select(window.difffract.main.graph.number.get(name))", name)
    first.locator("input.rename").fill("red </script>")
    first.locator("input.rename").press("Enter")
    first.locator("[data-slider=node_threshold]").fill("0.5")
    sent_all = "last?.pruning.node_threshold === 0.5 && last.selected === name && name in last.groups.names"
    until(outer, f"(name) => {{ const last = window.saved.at(-1); return {sent_all}; }}", name)
    sent = outer.evaluate("window.saved.at(-1)")
    page.widget.set_state({key: sent[key] for key in ("groups", "selected", "pruning")})
    assert "the circle" in page.groups.groups and page.groups.names == {name: "red </script>"}
    assert page.selected == name and page.pruning["mode"] == "standard"
    until(second, "(name) => window.difffract.store.doc.names[name] === 'red </script>'", name)
    assert second.evaluate("window.difffract.store.view.selected") is None, "another view looks where it likes"
    first.get_by_title("Undo (u)").click()
    first.get_by_title("Undo (u)").click()
    until(outer, "Object.keys(window.saved.at(-1).groups.names).length === 0")


def test_what_python_sets_is_shown_in_every_view_and_sent_by_none(live):
    page, graph, outer, frames = live
    name = frames[0].evaluate("window.difffract.graphs.a.names[2]")
    groups = Groups(graph=identity(graph), names={name: "from Python"}, notes={name: "x"}, groups={"mine": (name,)})
    outer.evaluate("(groups) => window.model.set('groups', groups)", groups.model_dump(mode="json"))
    for one in frames:
        until(one, "(name) => window.difffract.store.doc.names[name] === 'from Python'", name)
        assert [group["name"] for group in one.evaluate("window.difffract.store.doc.groups")] == ["mine"]
    outer.wait_for_timeout(400)
    assert all(one["groups"] == groups.model_dump(mode="json") for one in outer.evaluate("window.saved"))


def test_groups_of_another_graph_are_told_and_left(live):
    _, _, outer, (first, _) = live
    before = first.evaluate("window.difffract.store.doc")
    other = Groups(graph=identity(circuit(3)), names={"a": "b"}).model_dump(mode="json")
    outer.evaluate("(groups) => window.model.set('groups', groups)", other)
    until(first, "document.querySelector('.toast').textContent.includes('another graph')")
    assert first.evaluate("window.difffract.store.doc") == before


def test_messages_with_another_key_or_from_elsewhere_are_not_heard(live):
    _, graph, outer, (first, _) = live
    groups = Groups(graph=identity(graph), names={"a": "b"}).model_dump(mode="json")
    outer.evaluate("(groups) => frames[0].postMessage({ difffract: 'no', groups }, '*')", groups)
    outer.evaluate("(groups) => window.postMessage({ difffract: 'no', groups }, '*')", groups)
    first.evaluate(
        "(groups) => window.postMessage({ difffract: window.difffract.extras.notebook, groups }, '*')", groups
    )
    outer.wait_for_timeout(200)
    assert names_in(first) == {} and outer.evaluate("window.saved.length") == 0


def test_a_view_of_the_widget_shows_the_page_too_and_goes_away(live):
    page, _, outer, _ = live
    outer.evaluate(
        "() => { const el = document.createElement('div'); document.body.append(el);"
        " window.away = window.frontEnd.render({ model: window.model, el }); }"
    )
    until(outer, "document.querySelectorAll('iframe').length === 3")
    outer.wait_for_timeout(50)
    view = outer.main_frame.child_frames[2]
    until(view, "window.difffract !== undefined")
    view.evaluate("window.difffract.store.edit((doc) => { doc.pinned = [window.difffract.graphs.a.names[1]]; })")
    until(outer, "window.saved.at(-1)?.groups.pinned.length === 1")
    outer.evaluate("window.away(); window.stop()")
    assert outer.evaluate("document.querySelectorAll('iframe').length") == 2


def test_a_saved_notebook_shows_the_page_without_a_kernel(tab, tmp_path):
    page = circuit().show()
    data = {"text/html": page._repr_html_(), "text/plain": repr(page)}
    cell = new_code_cell(
        "graph.show()", execution_count=1, outputs=[new_output("execute_result", data, execution_count=1)]
    )
    saved = nbformat.writes(new_notebook(cells=[cell]))
    exporter = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="")
    content, _ = exporter.from_notebook_node(nbformat.reads(saved, as_version=4))
    path = tmp_path / "saved.html"
    path.write_text(content, encoding="utf-8")
    outer = tab.open(path.as_uri(), "document.querySelectorAll('iframe').length === 1")
    (frame,) = outer.main_frame.child_frames
    until(frame, DRAWN)
    frame.get_by_text("Why").first.wait_for()
    frame.locator("[data-slider=node_threshold]").fill("0.3")
    until(frame, "window.difffract.store.doc.node_threshold === 0.3")
    assert frame.evaluate("document.querySelector('[data-action=link]')") is None
    frame.locator("body").press("l")
    until(frame, "document.querySelector('.toast').textContent.includes('has no address')")
    outer.wait_for_timeout(400)
    assert not [url for url in tab.beyond(path.as_uri()) if not url.startswith("about:srcdoc")]
