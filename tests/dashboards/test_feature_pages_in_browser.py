"""The pages in Chromium, from a disk: a feature opens by its address, and texts from outside stay texts."""

import html
import json
import re
import shutil
import subprocess
import threading

import pytest
from scans import PROMPTS, places, small

from browsers import WAIT, Watched, browser, until
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.cli.settings import ViewConfig
from difffract_jax.cli.view import pages_address
from difffract_jax.dashboards.features.addresses import open_pages
from difffract_jax.dashboards.features.alone import feature_page
from difffract_jax.dashboards.features.build import build_dashboards
from difffract_jax.dashboards.features.request import DashboardOptions
from difffract_jax.dashboards.features.texts import Text
from difffract_jax.dashboards.page_server import PageServer
from difffract_jax.dashboards.viewer_page import PageParts, viewer_page
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.names import feature_names, node_names
from shown_circuits import circuit

pytestmark = pytest.mark.browser
GROUND = {False: "rgb(251, 250, 247)", True: "rgb(22, 24, 28)"}
"""Background of a feature's page, light and dark."""
HOSTILE = "</script><img src=x onerror='document.title=1'><script>document.title=2</script>\u202e\"'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "a folder, with 'quotes' & ümlauts"
    edges = {"img/1/f3": {"up": [[HOSTILE, 0.5], ["img/0/f1", -0.25]], "down": []}}
    options = DashboardOptions(
        top=3, per_third=1, sample=5, texts={"img/1/f3": Text(HOSTILE)}, edges=edges, graph=HOSTILE
    )
    build_dashboards(small().corpus, small().tcs, out, options)
    return out


def opened(folder, tmp_path, address, size="1280,720"):
    """Returns the page after its scripts have run, and what the console said."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "Chromium must be installed for tests that are marked `browser`"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--virtual-time-budget=4000"]
    options += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    page = (folder / "index.html").as_uri() + address
    run = subprocess.run([chromium, *options, page], capture_output=True, text=True, timeout=300, check=True)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return run.stdout, console


def text_of(page):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def test_a_feature_opens_by_its_address(folder, tmp_path):
    page, console = opened(folder, tmp_path, "#single/0/f5")
    assert 'data-ready="single/0/f5"' in page and "<title>single/0/f5</title>" in page and not console
    text = text_of(page)
    for words in ("Strongest examples", "share of the site's L0", "Upstream, by weights", "Direct effect on pixels"):
        assert words in text
    assert page.count('class="example"') >= 3 and page.count("<canvas") >= 3
    assert "difffract trace MODEL TRANSCODERS" in text and any(prompt in text for prompt in PROMPTS)


def test_texts_from_outside_are_shown_and_not_run(folder, tmp_path):
    page, console = opened(folder, tmp_path, "#img/1/f3")
    assert "<title>img/1/f3</title>" in page and not console
    assert "<img" not in page and "onerror=" not in html.unescape(re.sub(r">[^<]*<", "><", page).replace(HOSTILE, ""))
    assert html.unescape(page).count(HOSTILE) >= 3


def test_a_feature_that_never_fires_says_so(folder, tmp_path):
    page, _ = opened(folder, tmp_path, "#img/1/f7")
    assert "It was never active: none of the 7 prompts of this scan made it fire." in text_of(page)


@pytest.mark.parametrize(
    ("address", "said"),
    [("", "320 features of the transcoders"), ("#img/9/f1", "There is no feature img/9/f1 in this scan.")]
    + [("#img/1/f999", "There is no page of img/1/f999 in this scan.")],
)
def test_other_addresses_are_answered(folder, tmp_path, address, said):
    page, console = opened(folder, tmp_path, address, size="390,844")
    assert said in text_of(page) and set(places(small())) <= set(re.findall(r">(\w+/\d)<", page))
    assert not [line for line in console if "ERR_FILE_NOT_FOUND" not in line]


def test_some_features_have_pages_and_links_lead_to_these_alone(tmp_path):
    names = {f"{site}/f{number}" for site in ("img/1", "single/0") for number in range(1, 40, 2)}
    options = DashboardOptions(links=40, features=tuple(map(Feature.parse, sorted(names))))
    build_dashboards(small().corpus, small().tcs, tmp_path / "out", options)
    page, console = opened(tmp_path / "out", tmp_path, "#single/0/f5")
    assert 'data-ready="single/0/f5"' in page and not console
    linked = set(re.findall(r'<li><a class="name" href="#([^"]*)"', page))
    others = set(re.findall(r'<li><span class="name">([^<]*)<', page))
    assert linked and linked <= names and others and not others & names
    page, console = opened(tmp_path / "out", tmp_path, "")
    assert f"{len(names)} features of the transcoders" in text_of(page) and "NaN" not in page and not console


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield Watched(made)


def open_in_panel(page, name):
    """Opens the page of a node's feature by the keyboard, and returns the panel's document when it is drawn."""
    page.evaluate("(name) => difffract.select(difffract.main.graph.names.indexOf(name))", name)
    page.keyboard.press("o")
    shown = page.frame_locator(".feature-page iframe")
    shown.locator(f"body[data-ready='{name.partition('@')[0]}']").wait_for()
    return shown


def follows_the_switch(page, name):
    """Holds the page in the panel to the viewer's theme, not the system's, when it opens and while it is open."""
    from playwright.sync_api import expect

    page.emulate_media(color_scheme="dark")
    # The viewer follows the system when it hears of the change, which comes with a frame: not in between.
    until(page, "matchMedia('(prefers-color-scheme: dark)').matches")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    for dark in (False, True):
        page.evaluate("(dark) => difffract.setTheme(dark)", dark)
        body = open_in_panel(page, name).locator("body")
        expect(body).to_have_css("background-color", GROUND[dark], timeout=WAIT * 1000)
        page.evaluate("(dark) => difffract.setTheme(dark)", not dark)
        expect(body).to_have_css("background-color", GROUND[not dark], timeout=WAIT * 1000)
        page.click(".feature-page button")


def opens_again_before_the_next_frame(page, name):
    """Presses the key right after the panel is closed: a closed dialog keeps the focus until the next frame."""
    open_in_panel(page, name)
    focused, shown = page.evaluate("""() => {
      const dialog = document.querySelector(".feature-page"), button = dialog.querySelector("button");
      button.focus();
      button.click();
      const focused = document.activeElement;
      focused.dispatchEvent(new KeyboardEvent("keydown", { key: "o", bubbles: true }));
      return [focused === button, dialog.open];
    }""")
    assert focused and shown
    page.click(".feature-page button")


@pytest.mark.parametrize("served", [False, True])
def test_nodes_of_a_viewed_graph_open_these_pages_in_a_panel(folder, tab, tmp_path, served):
    graph = aggregate(circuit(steps=1))
    settings = ViewConfig(graph=tmp_path / "a.npz", out=tmp_path / "a.html", pages=folder, serve=served)
    pages = open_pages(folder)
    without = pages.missing({*feature_names(graph)} - {""})
    parts = PageParts(pages=pages_address(settings), without_page=[*without, "img/0/f1"])
    server = PageServer(lambda token: viewer_page(graph, parts._replace(token=token)), str, pages=folder)
    settings.out.write_text(viewer_page(graph, parts), encoding="utf-8")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        page = tab.open(server.address if served else settings.out.as_uri())
        names = [name for name, node in zip(node_names(graph), graph.node_kind, strict=True) if node == FEATURE]
        first, second = [name for name in names if name.startswith(("img/1", "single/0"))][:2]
        for name in (first, second, first):
            shown = open_in_panel(page, name)
            assert name.partition("@")[0] in shown.locator("h1").inner_text()
            assert page.get_attribute(".feature-page a", "href").endswith(f"#{name.partition('@')[0]}")
            page.click(".feature-page button")
            assert page.is_hidden(".feature-page")
        follows_the_switch(page, first)
        opens_again_before_the_next_frame(page, first)
        page.evaluate("difffract.select(difffract.main.graph.names.indexOf('img/0/f1'))")
        assert page.locator("[data-action=page]").count() == 0  # it is said to have none
        own = (server.address if served else folder.as_uri(), "data:", "blob:", settings.out.as_uri())
        assert not [url for url in tab.requests if not url.startswith(own)] and tab.messages == []
    finally:
        tab.page.goto("about:blank")
        server.shutdown()
        server.server_close()
        thread.join()


DRIVE = """
const found = {}, wait = (true_) => new Promise((done, failed) => {
  let left = 10000;
  (function look() {
    try { if (true_()) return done(); } catch (error) { /* not there yet */ }
    return left-- ? setTimeout(look, 10) : failed(new Error(`never came: ${true_}`));
  })();
});
const get = (id) => document.getElementById(id), rows = () => [...document.querySelectorAll(".row")];
const set = (id, value) => {
  const field = get(id);
  if (field.type === "checkbox") field.checked = value; else field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const ready = (name) => wait(() => document.body.dataset.ready === name);
const shown = () => Number(get("count").textContent.split(" ")[0]);
(async () => {
  await ready("img/1/f4");
  found.alive = shown();
  set("dead", true); await wait(() => shown() === 40); found.all = shown();
  set("dead", false); await wait(() => shown() === found.alive);
  set("sort", "peak"); await wait(() => !rows()[0].textContent.includes("%"));
  found.peaks = rows().slice(0, 6).map((row) => Number(row.querySelector(".figure").textContent));
  set("search", "LANTERN"); await wait(() => shown() === 1); found.searched = rows().map((row) => row.title);
  set("all", true); await wait(() => shown() === 2); found.everywhere = rows().map((row) => row.title).sort();
  set("search", ""); set("all", false); await wait(() => shown() === found.alive);
  set("sort", "feature"); await wait(() => rows()[0].title === "img/1/f0");
  rows()[1].click(); const first = rows()[1].title; await ready(first); found.clicked = [first, document.title];
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  const next = rows()[2].title; await ready(next); found.next = [next, location.hash];
  const field = document.querySelector(".note input"); field.value = "<b>mine</b>";
  field.dispatchEvent(new Event("change", { bubbles: true }));
  await wait(() => document.querySelector("h1").textContent.includes("<b>mine</b>"));
  found.labelled = document.querySelectorAll("h1 b").length;
  set("search", "<b>mine"); await wait(() => shown() === 1); found.own = rows()[0].title;
  get("jump").value = " single/1/f5 "; get("go").requestSubmit();
  await ready("single/1/f5"); found.jumped = location.hash;
  const cards = [...document.querySelectorAll(".example")];
  const before = document.querySelector("pre").textContent;
  cards[1].click();
  found.marked = cards.map((card) => card.getAttribute("aria-pressed"));
  found.commands = [before, document.querySelector("pre").textContent];
})().catch((error) => { found.error = String(error); }).finally(() => {
  const result = document.createElement("pre"); result.id = "result"; result.textContent = JSON.stringify(found);
  document.body.append(result);
});
"""


def test_the_list_is_searched_and_sorted_and_features_are_labelled(tmp_path):
    out = tmp_path / "out"
    texts = {"img/1/f4": Text("a lantern"), "single/0/f9": Text("Lantern, lit")}
    build_dashboards(small().corpus, small().tcs, out, DashboardOptions(top=3, per_third=1, sample=5, texts=texts))
    (out / "drive.js").write_text(DRIVE, encoding="utf-8")
    page = (out / "index.html").read_text(encoding="utf-8")
    driven = page.replace("</body>", '<script src="drive.js"></script></body>')
    (out / "index.html").write_text(driven, encoding="utf-8")
    page, console = opened(out, tmp_path, "#img/1/f4")
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', page, re.DOTALL)[1]))
    assert "error" not in found and not console, found
    assert 30 < found["alive"] < found["all"] == 40
    assert found["peaks"] == sorted(found["peaks"], reverse=True) and found["peaks"][0] > found["peaks"][-1]
    assert found["searched"] == ["img/1/f4"] and found["everywhere"] == ["img/1/f4", "single/0/f9"]
    assert found["clicked"] == ["img/1/f1"] * 2 and found["next"] == ["img/1/f2", "#img/1/f2"]
    assert found["labelled"] == 0 and found["own"] == "img/1/f2" and found["jumped"] == "#single/1/f5"
    assert found["marked"][:2] == ["false", "true"] and found["marked"].count("true") == 1
    before, after = found["commands"]
    assert before != after and "difffract trace MODEL TRANSCODERS" in after and "--target single/1/f5@" in after


def test_one_feature_s_page_stands_by_itself(folder, tmp_path):
    home = tmp_path / "alone"
    home.mkdir()
    (home / "index.html").write_text(feature_page(folder, Feature("img", 1, 3)), encoding="utf-8")
    page, console = opened(home, tmp_path, "")
    assert 'data-ready="img/1/f3"' in page and not console
    text = text_of(page.partition("<main")[2].partition("<script>")[0])
    assert "Strongest examples" in text and "Direct effect on pixels" in text and "Your own label" not in text
    shown = page.partition("<main")[2].partition("</main>")[0]
    assert "data:image/png" in shown and "data/thumbs" not in shown and "<img" not in shown
    assert not re.search(r'<a [^>]*href="#', shown), "other features have no page here"
