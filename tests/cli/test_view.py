"""`view` and `report`, and the groups that the viewer saves, in the commands that read them."""

import base64
import http.client
import io
import json
import re
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import done, run_command, run_json
from page_folders import make_folder
from PIL import Image

from difffract_jax.address import flux_layout
from difffract_jax.circuits.checks.summaries import EVERY
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.group_edits import group_features
from difffract_jax.cli import view as cli_view
from difffract_jax.cli.group_edits import check_groups, edits_of
from difffract_jax.cli.settings import SteerConfig, ViewConfig
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.dashboards import image_files, page_groups, page_labels
from difffract_jax.dashboards.graph_report import graph_report
from difffract_jax.dashboards.image_files import KeptImages, keep, kept_path, read_kept, shown_images
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.viewer_json import write_viewer_json
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.groups import GraphIdentity, Groups, identity, write_groups
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.provenance import PooledPath, TraceInfo
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes
from random_graphs import random_output_graph
from shown_circuits import TOKENS, circuit

RUN = "import sys; from difffract_jax.cli.main import main; sys.argv[0] = 'difffract'; main()"


@pytest.fixture
def difffract(monkeypatch, capsys, tmp_path):
    """Runs `difffract ARGUMENTS --json` in a directory with two graphs and an image."""
    monkeypatch.chdir(tmp_path)
    circuit(0).save("a.npz")
    circuit(1).save("b.npz")
    make_folder(Path("others"), "of another model", {"img/0": [1]})
    Image.new("RGB", (8, 8), "red").save("image.png")
    return partial(run_json, monkeypatch, capsys)


@pytest.fixture
def groups():
    """Groups of a.npz: one of two features, one pinned, one named."""
    summed = aggregate(circuit(0))
    names = node_names(summed)
    features = [names[n] for n in np.flatnonzero(summed.node_kind == FEATURE)[-4:]]
    made = Groups(
        graph=identity(summed),
        groups={"the circle": tuple(features[:2])},
        names={features[0]: "round"},
        pinned=features[3:],
    )
    write_groups(made, Path("mine.groups.json"))
    return made


def refused(result):
    status, out, err = result
    assert status == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1
    return err


def test_view_writes_one_file_beside_the_graph_and_says_so(difffract):
    told = done(difffract("view", "a.npz", "--image", "image.png"))
    assert told["page"] == "a.html" and told["image"] == "finished"
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "a red circle" not in page
    assert sorted(path.name for path in Path().iterdir()) == ["a.html", "a.npz", "b.npz", "image.png", "others"]


def test_a_graph_without_image_says_why(difffract):
    assert "give one with --image FILE" in done(difffract("view", "a.npz"))["image"]


def test_neither_command_imports_jax(difffract):
    for arguments in (["view", "a.npz", "--image", "image.png"], ["report", "a.npz", "--image", "image.png"]):
        code = f"import sys; sys.argv[1:] = {arguments!r}; exec({RUN!r}); assert 'jax' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_images_of_a_run_are_kept_beside_the_graph(tmp_path):
    images = KeptImages(np.random.default_rng(0).integers(0, 255, (3, 8, 6, 3), np.uint8), (0, 2))
    path = kept_path(tmp_path / "a.b.npz")
    assert path.name == "a.b.images.png" and read_kept(path, "key") is None
    keep(images, path, "key")
    found = read_kept(path, "key")
    assert found.steps == (0, 2) and np.array_equal(found.pixels, images.pixels)
    assert read_kept(path, "another run") is None
    path.write_bytes(b"no image")
    assert read_kept(path, "key") is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("view", "none.npz"), "none.npz does not exist"),
        (("view", "a.npz", "--out", "a.txt"), "must end in .html"),
        (("view", "a.npz", "--image", "a.npz"), "a.npz is not an image"),
        (("view", "a.npz", "--image", "none.png"), "none.png does not exist"),
        (("view", "a.npz", "--max-nodes", 10), "--node-threshold"),
        (("view", "a.npz", "--compare", "b.npz", "--by-position"), "leave --by-position out"),
        (("view", "a.npz", "--pages", "."), "has no index.html"),
        (("view", "a.npz", "--pages", "others"), "pages of other transcoders"),
        (("view", "b.npz", "--groups", "mine.groups.json"), "groups of another graph"),
        (("report", "b.npz", "--groups", "mine.groups.json"), "groups of another graph"),
        (("prune", "b.npz", "--groups", "mine.groups.json"), "groups of another graph"),
        (("export", "b.npz", "--groups", "mine.groups.json", "--out", "x.json"), "groups of another graph"),
        (("report", "a.npz", "--validation", "."), "give the directory that `difffract validate` wrote"),
        (("view", "a.npz", "--labels", "image.png"), "image.png"),
        (("view", "a.npz", "--port", 8000), "add --serve, or leave --port out"),
        (("view", "a.npz", "--serve", "--out", "x.html"), "leave one of the two out"),
        (("view", "a.npz", "--compare", "b.npz", "--max-nodes", 70), "The difference of the two graphs has"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(difffract, groups, arguments, told):
    assert told in refused(difffract(*arguments))
    assert not list(Path().glob("*.html"))


def test_nodes_open_the_pages_that_there_are(difffract):
    make_folder(Path("my pages"), "t", {"img/0": range(9), "single/0": [1]})
    done(difffract("view", "a.npz", "--image", "image.png", "--pages", "my pages"))
    settings = ViewConfig(graph=Path("a.npz"), pages=Path("my pages"), out=Path("others/a.html"))
    _, parts = cli_view.page_parts(Graph.load("a.npz"), settings)
    assert parts.pages == "../my%20pages/index.html#{feature}"
    named = set(feature_names(Graph.load("a.npz"))) - {""}
    paged = {name for name in named if name.startswith("img/0/") or name == "single/0/f1"}
    assert {*parts.without_page} == named - paged and paged and named - paged
    _, parts = cli_view.page_parts(Graph.load("a.npz"), ViewConfig(graph=Path("a.npz")))
    assert parts.pages is None and not parts.without_page


def test_an_image_of_too_many_pixels_is_one_sentence(difffract, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)  # Pillow refuses twice as many; the image has 64
    assert "more pixels than are safe" in refused(difffract("view", "a.npz", "--image", "image.png"))


def test_the_pruning_that_is_advised_can_be_pasted_into_a_shell(difffract):
    Path("a.npz").rename("it's a graph.npz")
    said = refused(difffract("view", "it's a graph.npz", "--max-nodes", 40))
    words = shlex.split(said.split("`")[1])
    assert words[:3] == ["difffract", "prune", "it's a graph.npz"] and "--node-threshold" in words


def test_a_second_graph_says_itself_why_it_has_no_image(difffract):
    settings = ViewConfig(graph=Path("a.npz"), compare=Path("b.npz"), image=Path("image.png"))
    _, parts = cli_view.page_parts(Graph.load("a.npz"), settings)
    assert parts.image_note == "" and len(parts.images) == 1
    assert parts.other_image_note == "The file does not tell a run of one prompt, so there is no image."


def test_labels_and_a_second_graph(difffract):
    Path("labels.yaml").write_text("img/0/f1: roundness\n", encoding="utf-8")
    done(difffract("view", "a.npz", "--labels", "labels.yaml", "--compare", "b.npz", "--image", "image.png"))
    page = Path("a.html").read_text(encoding="utf-8")
    assert all(f'id="{key}"' in page for key in ("graph", "graph-b", "graph-difference"))


def test_a_report_shows_the_sum_the_circuit_and_the_groups(difffract, groups):
    done(difffract("report", "a.npz", "--image", "image.png", "--groups", "mine.groups.json"))
    page = Path("report.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("What adds up to the target", "the circle", "velocity:norm", "a red circle"))
    figures = re.findall(
        r"<td>(features|inputs|errors|rest|not in the file|bias|the target)</td>\s*<td>(\S+?)</td>", page
    )
    *parts, (last, total) = [(name, float(value)) for name, value in figures]
    assert last == "the target" and sum(value for _, value in parts) == pytest.approx(total, abs=0.02)
    assert "http" not in re.sub(r"http://www\.w3\.org\S+", "", page)


def test_each_target_s_pooled_path_is_told_by_its_name(difffract):
    graph = random_output_graph(0)
    paths = tuple(PooledPath(value=float(n), without=n / 2, share=0.5) for n in (1, 2, 3))
    graph.with_provenance(pooled_path=paths).save("several.npz")
    done(difffract("report", "several.npz"))
    page = Path("report.html").read_text(encoding="utf-8")
    names = node_names(aggregate(graph))[:3]
    assert len({*names}) == 3 and all(f"the target {name} would be" in page for name in names)


def test_a_report_outlines_the_target_s_box_on_the_run_s_own_images(difffract):
    graph, target = circuit(0), "pixels:color=red,box=2,0,8,4"
    settings = replace(graph.provenance.attribution, target=target)
    boxed = graph.with_provenance(attribution=settings)
    images = shown_images(KeptImages(np.zeros((2, 8, 8, 3), np.uint8), (0,)))
    given = {"labels": {}, "image_note": "", "groups": None, "top": 3, "validation": None, "edit": None}
    page = graph_report(boxed, images=images, **given, lead=["In short."])
    assert "<h1>Why these pixels are red</h1>" in page and page.index("In short.") < page.index("(2, 0) to (8, 4) are")
    assert "The box in white and black is the target" in page and f"<code>{target}#1</code>" in page
    address = re.search(r'src="data:image/png;base64,([^"]*)"', page)[1]
    with Image.open(io.BytesIO(base64.b64decode(address))) as image:
        pixels = np.asarray(image.convert("L"))
    inside = np.zeros((192, 192), bool)  # 24 pixels on the screen for each of the image's
    inside[1:95, 49:191] = True
    inside[2:94, 50:190] = False
    assert np.array_equal(pixels == 255, inside) and pixels[~inside].max() == 0
    boxed.save("a.npz")
    done(difffract("report", "a.npz", "--image", "image.png"))  # whose size says nothing of the run's
    assert "The box in white" not in Path("report.html").read_text(encoding="utf-8")


def test_a_report_without_a_bias_claims_no_sum_of_the_target(difffract):
    graph = circuit(0)
    unknown = np.full(graph.target_node.size, np.nan)
    told = graph.with_provenance(shared=None)
    replace(told, target_bias=unknown, target_preactivation=unknown.copy()).save("a.npz")
    done(difffract("report", "a.npz", "--image", "image.png"))
    page = Path("report.html").read_text(encoding="utf-8")
    assert "does not tell the target&#39;s bias" in page and "<td>sum of edges</td>" in page
    assert "the target is the sum of these parts" not in page and "Its features" not in page


def test_a_report_shows_what_was_found_for_its_graph_alone(difffract):
    graph = Graph.load("a.npz")
    sources = {"model": graph.provenance.known.model, "transcoders": graph.provenance.transcoders}
    checks = [{"check": "edges", "worst": 1e-9, "median": 1e-9, "bar": 1e-4, "holds": True}]
    rows = [
        {"prediction": "change", "of": of, "spearman": value, "pearson": value, "pairs": 9}
        for of, value in ((EVERY, 0.75), ("velocity:norm#1", 0.123))
    ]
    kept = {"size": 3, "ranking": "influence", "recovered": 0.456, "lost": 0.5}
    validation = {
        "provenance": {"sources": sources, "settings": {"graph": "a.npz"}},
        "exactness": checks,
        "perturbation": {"rows": rows, "ablated": 9},
        "completeness": {"ablation": "mean", "pruned": 3, "curves": [{"reading": "full", "rows": [kept]}]},
    }
    changed = {"edit": "x 0", "images": 4, "success": 3, "inside": 0.25, "norm": 9.0, "red in the box": 0.5}
    edit = {"sources": sources, "settings": {"edit": ["img/0/f1=zero"], "prompt": "a ring"}, "metrics": [changed]}
    for name in ("perturbation.png", "completeness.png", "grid.png"):
        Image.new("RGB", (8, 8), "red").save(name)

    def report(**changed):
        Path("validation.json").write_text(json.dumps(validation | changed), encoding="utf-8")
        Path("metrics.json").write_text(json.dumps(edit | changed), encoding="utf-8")
        return difffract("report", "a.npz", "--image", "image.png", "--validation", ".", "--edit", ".")

    done(report())
    page = Path("report.html").read_text(encoding="utf-8")
    assert "found for <code>a.npz</code>" in page and "<code>img/0/f1=zero</code> (taken off)" in page
    assert all(f"<td>{cell}</td>" in page for cell in ("3 of 4", "0.25", "0.5", "edges")) and "norm</th>" not in page
    own = page[page.index("How far to trust it") : page.index("Features taken off one at a time")]
    assert all(f"<td>{cell}</td>" in own for cell in ("0.123", "0.456")) and "0.75" not in own
    assert "is about another graph, a.npz, not one of velocity:norm" in refused(report(perturbation={"rows": rows[:1]}))
    other = {"sources": sources | {"model": "n"}}
    assert "metrics.json was made with another model" in refused(report(**other))
    assert "validation.json was made with another model" in refused(report(provenance=validation["provenance"] | other))
    assert "difffract validate" in refused(report(exactness=3)) and "difffract steer" in refused(report(metrics=3))


def test_documents_whose_sums_would_run_in_circles_are_reported_and_compared(difffract):
    write_viewer_json(Graph.load("a.npz"), Path("a.json"), "circuit-tracer", ViewerOptions(slug="x", by_position=True))
    document = json.loads(Path("a.json").read_text(encoding="utf-8"))
    layers = {}
    for node in document["nodes"]:
        del node["difffract"]
        if node["feature_type"] == "cross layer transcoder":
            layers.setdefault(node["layer"], {}).setdefault(node["feature"], []).append(node["node_id"])
    several = ([ids for ids in features.values() if len(ids) > 1] for features in layers.values())
    (a, b, *_) = next(found for found in several if len(found) > 1)
    document["links"] += [{"source": s, "target": t, "weight": 5.0} for s, t in ((a[0], b[1]), (b[0], a[1]))]
    Path("a.json").write_text(json.dumps(document), encoding="utf-8")
    done(difffract("report", "a.json"))
    assert "The circuit" in Path("report.html").read_text(encoding="utf-8")
    done(difffract("view", "a.json", "--compare", "b.npz"))
    page = Path("a.html").read_text(encoding="utf-8")
    assert 'id="graph-b"' in page and 'id="graph-difference"' not in page
    said = refused(difffract("prune", "a.json"))
    assert "Summed over positions, edges of the graph run in a circle, " in said and "with --by-position" in said
    assert " --by-position --out pruned.npz`" in refused(difffract("view", "a.json", "--max-nodes", 20))
    done(difffract("prune", "a.json", "--by-position"))


def test_pruning_keeps_what_is_pinned_and_groups(difffract, groups):
    done(difffract("prune", "a.npz", "--node-threshold", 0.05, "--groups", "mine.groups.json"))
    pruned = Graph.load("pruned.npz")
    assert {*groups.pinned} <= {*node_names(pruned)}
    done(difffract("prune", "a.npz", "--node-threshold", 1, "--groups", "mine.groups.json"))
    whole = Graph.load("pruned.npz")
    names = node_names(whole)
    expected = {name for name in groups.groups["the circle"] if name in names}
    assert {names[n] for n in whole.supernodes.get("the circle", [])} == expected


def test_exports_show_groups_and_names(difffract, groups):
    arguments = ("--format", "circuit-tracer", "--groups", "mine.groups.json", "--out", "x.json")
    done(difffract("export", "a.npz", *arguments))
    document = json.loads(Path("x.json").read_text(encoding="utf-8"))
    assert [group[0] for group in document["qParams"]["supernodes"]] == ["the circle"]
    assert "round" in {node["clerp"] for node in document["nodes"]}


def test_edits_name_groups(difffract, groups):
    settings = SteerConfig(
        model="m",
        transcoders="t",
        prompt="p",
        edit=("the circle=scale:-1", "img/0/f1=zero"),
        groups=Path("mine.groups.json"),
    )
    (made, plain), read = edits_of(settings)
    assert read == groups and plain == Edit.parse("img/0/f1=zero")
    assert (made.mode, made.amount, made.feature.name) == ("scale", -1.0, "the circle")
    assert made.feature.features == group_features(groups.groups["the circle"]) and made.feature.features
    with pytest.raises(UserError, match="has the groups 'the circle'"):
        edits_of(settings.model_copy(update={"edit": ("the square=zero",)}))
    with pytest.raises(UserError, match="another model"):
        check_groups(groups, "another", "t", settings)
    with pytest.raises(UserError, match="another set of transcoders"):
        check_groups(groups, "m", "another", settings)
    check_groups(groups, "m", "t", settings)
    none = Groups(graph=GraphIdentity(fingerprint=""), groups={"errors": ("error img/0", "input txt")})
    write_groups(none, Path("none.groups.json"))
    with pytest.raises(UserError, match="'errors' of none.groups.json holds no feature"):
        edits_of(settings.model_copy(update={"edit": ("errors=zero",), "groups": Path("none.groups.json")}))


def test_features_of_a_group_are_written_as_edits_are():
    names = ["img/3/f4", "single/0/f7@img", "single/0/f7@txt", "txt/1/f2#3", "error img/2", "img/0/f1 (target)"]
    assert [str(feature) for feature in group_features(names)] == ["img/3/f4", "single/0/f7", "txt/1/f2#3"]
    assert [str(feature) for feature in group_features(["img/3/f4@12", "single/0/f7@txt3#1"])] == [
        *("img/3/f4", "single/0/f7#1")
    ]


def test_serving_gives_the_page_and_takes_groups(difffract, groups, tmp_path):
    arguments = [sys.executable, "-c", RUN, "view", "a.npz", "--serve", "--image", "image.png"]
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            line = process.stdout.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
                connection.request("GET", "/")
                assert b"<!doctype html>" in connection.getresponse().read()
        finally:
            process.terminate()
    assert "a.groups.json" in line


def test_serving_tells_its_address_as_json(difffract, tmp_path):
    arguments = [sys.executable, "-c", RUN, "view", "a.npz", "--serve", "--json", "--image", "image.png"]
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            lines = iter(process.stdout.readline, "}\n")
            told = json.loads("".join(lines) + "}")
        finally:
            process.terminate()
    assert told["groups"] == "a.groups.json" and told["open"].startswith("http://127.0.0.1:")


def test_a_served_page_opens_with_what_it_would_save_over(difffract, groups):
    serve = ViewConfig(graph=Path("a.npz"), serve=True)
    whole = Graph.load("a.npz")
    assert cli_view._opened_groups(whole, serve) is None
    write_groups(groups, Path("a.groups.json"))
    assert cli_view._opened_groups(whole, serve) == groups
    assert cli_view._opened_groups(whole, serve.model_copy(update={"serve": False})) is None
    assert cli_view._opened_groups(whole, serve.model_copy(update={"groups": Path("new.groups.json")})) is None
    write_groups(groups, Path("b.groups.json"))
    said = refused(difffract("view", "b.npz", "--serve"))
    assert "groups of another graph" in said and "would save over it" in said
    assert "nowhere of the output file" in refused(difffract("view", "a.npz", "--serve", "--groups", "nowhere/x.json"))


def test_features_of_the_second_graph_alone_have_labels_too(difffract, monkeypatch):
    first, second = (set(feature_names(Graph.load(name))) - {""} for name in ("a.npz", "b.npz"))
    (only, *_) = sorted(second - first)
    every = lambda graph, file, figures: dict.fromkeys(set(feature_names(graph)) - {""}, "x")  # noqa: E731
    monkeypatch.setattr(page_labels, "labels_of", every)
    settings = ViewConfig(graph=Path("a.npz"), compare=Path("b.npz"))
    _, parts = cli_view.page_parts(Graph.load("a.npz"), settings)
    assert parts.labels[only] == "x" and set(parts.labels) == first | second


@pytest.fixture
def told_run(difffract):
    """A graph that tells its run."""
    sizes = {"grid": (2, 2), "text_tokens": 6, "tokens": TOKENS, "layout": flux_layout(2, 2), "recorded": (0, 1)}
    noise = {"seed": 0, "step": 0, "sigmas": (1.0, 0.5, 0.0), "guidance": None, "latents_given": False}
    run = TraceInfo(prompt="a red circle", cut="", include_padding=False, model="m", **sizes, **noise)
    circuit(0).with_provenance(shared=None, run=run).save("run.npz")
    return run


def test_images_that_are_kept_are_used_without_the_model(difffract, told_run):
    assert "not at hand" in done(difffract("view", "run.npz"))["image"]
    images = KeptImages(np.zeros((3, 8, 8, 3), np.uint8), (0, 1))
    keep(images, Path("run.images.png"), cli_view.run_key(Graph.load("run.npz")))
    assert done(difffract("view", "run.npz"))["image"] == "finished, and as step 0, 1 predicted it"


def test_an_embedded_model_of_another_release_is_no_failure(difffract, told_run, monkeypatch):
    def refuse(graph, model, lora):
        raise UserError("The graph was traced in another model.")

    monkeypatch.setattr(cli_view, "_model_at_hand", lambda graph: "organism")
    monkeypatch.setattr(cli_view, "_made", refuse)
    assert done(difffract("view", "run.npz"))["image"] == "The graph was traced in another model."
    assert "another model" in refused(difffract("view", "run.npz", "--model", "organism"))


def test_a_second_graph_of_another_model_is_shown_without_its_images(difffract, told_run, monkeypatch):
    with_lora = replace(told_run, model="n", base_model="m")
    Graph.load("b.npz").with_provenance(shared=None, run=with_lora).save("other.npz")

    def make(graph, model, lora):
        if graph.provenance.run.model != "m":
            raise UserError("The graph was traced in another model: its hash; give the model that it was traced in.")
        return KeptImages(np.zeros((2, 8, 8, 3), np.uint8), (0,))

    monkeypatch.setattr(cli_view, "_made", make)
    settings = ViewConfig(graph=Path("run.npz"), compare=Path("other.npz"), model="flux")
    _, parts = cli_view.page_parts(Graph.load("run.npz"), settings)
    assert len(parts.images) == 2 and not parts.other_images
    assert parts.other_image_note == "The graph was traced in another model: its hash."
    assert done(difffract("view", "run.npz", "--compare", "other.npz", "--model", "flux"))["image"].startswith(
        "finished"
    )
    assert "another model" in refused(difffract("view", "other.npz", "--compare", "run.npz", "--model", "flux"))


def test_an_image_that_cannot_be_kept_is_shown_all_the_same(difffract, told_run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_view, "_made", lambda *_: KeptImages(np.zeros((3, 8, 8, 3), np.uint8), (0, 1)))
    monkeypatch.setattr(image_files, "keep", full)
    status, told, err = difffract("view", "run.npz", "--model", "organism")
    assert status == 0 and told["image"].startswith("finished") and "No space left on device" in err


def test_a_port_in_use_is_one_sentence(difffract):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(difffract("view", "a.npz", "--serve", "--port", port))
    assert f"Port {port} of this machine cannot be listened on" in said and "leave --port out" in said


def test_a_page_opens_with_the_groups_that_are_found(difffract):
    graph = aggregate(circuit(0))
    grouped = page_groups.grouped(graph)
    found = find_supernodes(prune(graph))
    names = node_names(found)
    expected = {title: [names[n] for n in members] for title, members in found.supernodes.items()}
    ours = node_names(graph)
    assert {title: [ours[n] for n in members] for title, members in grouped.supernodes.items()} == expected
    assert page_groups.grouped(found) is found


def test_help_teaches(monkeypatch, capsys):
    for command in ("view", "report"):
        said = run_command(monkeypatch, capsys, command, "--help").out
        assert "Example:" in said and "--image" in said
