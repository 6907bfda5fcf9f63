"""`export` for circuit-tracer's viewer and Neuronpedia: what lies beside the document, and groups that come back."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import done, run_json
from PIL import Image

from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.cli import view as cli_view
from difffract_jax.cli.group_edits import edits_of
from difffract_jax.cli.settings import SteerConfig, ViewConfig
from difffract_jax.dashboards.features import viewer_records
from difffract_jax.dashboards.features.record import Scan, SiteScan
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.run_features import run_features
from difffract_jax.graphs.files.viewer_image import image_bytes
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.groups import identity
from difffract_jax.graphs.names import feature_names, node_names
from shown_circuits import circuit

RUN = "import sys; from difffract_jax.cli.main import main; sys.argv[0] = 'difffract'; main()"
TRACER = ("--format", "circuit-tracer")


@pytest.fixture
def difffract(monkeypatch, capsys, tmp_path):
    """Runs `difffract ARGUMENTS --json` in a directory with a graph, an image, and a folder."""
    monkeypatch.chdir(tmp_path)
    circuit(0).save("a.npz")
    circuit(1, prompt="a blue square").save("b.npz")
    Image.new("RGB", (8, 8), "red").save("image.png")
    Path("shown").mkdir()
    return partial(run_json, monkeypatch, capsys)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def refused(result, before):
    status, out, err = result
    assert status == 1 and out == "" and err.startswith("Error: ") and err.count("\n") == 1
    assert contents() == before
    return err


def contents():
    return sorted(str(path) for path in Path().rglob("*"))


def test_the_list_and_the_features_lie_beside_the_graph(difffract):
    for name in ("a", "b"):
        told = done(difffract("export", f"{name}.npz", *TRACER, "--image", "image.png", "--out", f"shown/{name}.json"))
    assert told["list"] == "shown/graph-metadata.json" and told["image"] == "yes"
    assert [graph["slug"] for graph in read(told["list"])["graphs"]] == ["a", "b"]
    document = read("shown/b.json")
    assert document["metadata"]["slug"] == "b" and document["metadata"]["scan"] == "./graph_data/b-features"
    features = {node["feature"] for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"}
    files = {int(path.stem) for path in Path("shown/b-features").iterdir()}
    assert files == {f for f in features if f in files} and len(files) == len(run_features(circuit(1)))
    Image.open("image.png").load()
    assert image_bytes(document["metadata"]).startswith(b"\x89PNG")
    again = done(difffract("export", "b.npz", *TRACER, "--out", "shown/b.json"))
    assert again["image"] == "none" and len(read(told["list"])["graphs"]) == 2


def test_neuronpedia_gets_files_to_put_at_an_address_and_no_list(difffract):
    more = ("--format", "neuronpedia", "--scan", "flux")
    assert "features" not in done(difffract("export", "a.npz", *more, "--out", "shown/n.json"))
    told = done(difffract("export", "a.npz", *more, "--feature-url", "https://a.org/f", "--out", "shown/n.json"))
    assert told["features"].startswith("shown/n-features, ") and "list" not in told
    assert "schema_version" not in read("shown/n.json")["metadata"]
    assert not Path("shown/graph-metadata.json").exists()


def test_what_a_viewer_would_not_find_and_what_would_be_lost_is_refused(difffract):
    Path("shown/c-features").mkdir()
    Path("shown/c-features/notes.txt").write_text("mine", encoding="utf-8")
    Path("other").mkdir()
    Path("other/graph-metadata.json").write_text("[]", encoding="utf-8")
    before = contents()
    for arguments, told in (
        (("--slug", "x", "--out", "shown/a.json"), "would look for x.json, but the output is a.json"),
        (("--out", "shown/a b.json"), "would look for a-b.json, but the output is a b.json"),
        (("--out", "shown/c.json"), "holds notes.txt, but features go there"),
        (("--out", "other/a.json"), "is not the list of graphs that circuit-tracer's viewer reads"),
        (("--out", "shown/a.json", "--image", "a.npz"), "a.npz is not an image"),
        (("--out", "shown/a.json", "--pages", "shown"), "shown"),
        (("--out", "shown/a.json", "--scan", "./mine", "--pages", "shown"), "leave --scan out, or --pages"),
        (("--out", "shown/a.json", "--groups", "image.png"), "image.png is not text in UTF-8"),
    ):
        assert told in refused(difffract("export", "a.npz", *TRACER, *arguments), before)


def test_an_image_in_a_document_is_shown_and_carried_on(difffract):
    done(difffract("export", "a.npz", *TRACER, "--image", "image.png", "--out", "shown/a.json"))
    assert done(difffract("view", "shown/a.json"))["image"] == "finished"
    told = done(difffract("export", "shown/a.json", *TRACER, "--out", "shown/again.json"))
    assert told["image"] == "yes" and image_bytes(read("shown/again.json")["metadata"]).startswith(b"\x89PNG")
    document = read("shown/a.json")
    document["metadata"]["image_input"]["image_base64"] = "?"
    Path("broken.json").write_text(json.dumps(document), encoding="utf-8")
    assert "is not base64" in done(difffract("view", "broken.json"))["image"]


def test_groups_made_in_the_viewer_come_back_into_every_command(difffract):
    done(difffract("export", "a.npz", *TRACER, "--out", "shown/a.json"))
    document = read("shown/a.json")
    ours = [node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"][:2]
    chosen = [node["node_id"] for node in ours]
    error = next(node for node in document["nodes"] if "error" in node["feature_type"])
    document["qParams"] |= {
        "pinnedIds": ",".join([*chosen, error["node_id"]]),
        "supernodes": json.dumps([["the circle", *chosen]]),
    }
    document["qParams"]["clerps"] = json.dumps([[str(ours[0]["feature"]), "round"]])
    Path("shown/a.json").write_text(json.dumps(document), encoding="utf-8")
    names = [node["name"] for node in ours]
    groups = ("--groups", "shown/a.json")
    done(difffract("prune", "a.npz", "--node-threshold", 0.01, *groups))
    pruned = Graph.load("pruned.npz")
    assert {*names} <= {*node_names(pruned)} and [*pruned.supernodes] == ["the circle"]
    done(difffract("export", "a.npz", *TRACER, *groups, "--out", "shown/again.json"))
    again = read("shown/again.json")
    assert again["qParams"]["supernodes"] == [["the circle", *chosen]]
    assert again["qParams"]["pinnedIds"] == [*chosen, error["node_id"]]
    assert "round" in {node["clerp"] for node in again["nodes"]}
    done(difffract("view", "a.npz", *groups))
    done(difffract("report", "a.npz", *groups))
    assert "the circle" in Path("report.html").read_text(encoding="utf-8")
    base = {"model": "m", "transcoders": "t", "prompt": "p", "groups": Path("shown/a.json")}
    (edit,), found = edits_of(SteerConfig(edit=("the circle=zero",), **base))
    assert isinstance(edit, Edit) and edit.feature.name == "the circle" and found.pinned == (*names, error["name"])
    before = contents()
    for command in (("prune",), ("view",), ("export", *TRACER, "--out", "shown/x.json")):
        assert "groups of another graph" in refused(difffract(*command, "b.npz", *groups), before)


def test_a_served_page_saves_over_nothing_of_another_viewer(difffract):
    done(difffract("export", "a.npz", *TRACER, "--out", "shown/a.json"))
    Path("a.groups.json").write_text("{}", encoding="utf-8")
    before = contents()
    said = refused(difffract("view", "a.npz", "--serve", "--groups", "shown/a.json"), before)
    assert "is another viewer's, so that the page would save as a.groups.json, which exists" in said
    Path("a.groups.json").write_text('{"pinnedIds": []}', encoding="utf-8")
    said = refused(difffract("view", "a.npz", "--serve"), before)
    assert "a.groups.json is another viewer's, and the page would save over it" in said
    Path("a.groups.json").unlink()
    serve = ViewConfig(graph=Path("a.npz"), serve=True, groups=Path("shown/a.json"))
    assert cli_view._groups_path(serve) == Path("a.groups.json")
    assert cli_view._opened_groups(Graph.load("a.npz"), serve).graph == identity(circuit(0))


def scan_of(graph, transcoders="t"):
    """A scan of one site of the circuit, in which feature 1 fired in two prompts."""
    features = int(graph.node_feature.max()) + 1
    shape = (features, 2)
    site = {name: np.zeros(shape, np.int64) for name in ("active", "total", "histogram")}
    site |= {name: np.zeros(features, np.int64) for name in ("prompts", "text", "peak")}
    site |= {"edges": np.array([1.0]), "example_tier": np.zeros(shape, np.uint8)}
    site |= {"example_prompt": np.full(shape, -1), "example_place": np.zeros(shape, np.int64)}
    site |= {"example_value": np.zeros(shape), "total": np.ones(shape)}
    site["example_prompt"][1], site["example_value"][1], site["active"][1], site["histogram"][1] = [0, 1], [3, 2], 5, 4
    made = SiteScan(**site)
    run = {"steps": 2, "grid": [2, 2], "text_tokens": 6}
    sites = {"img/0": {"tokens": 8, "streams": ["img"]}}
    config = {"sites": sites, "run": run, "seed": 0, "model": "m", "transcoders": transcoders, "features": features}

    class Known(Scan):
        def site(self, name):
            return made

    return Known(Path("pages"), config, ("a ring", "a disc"))


def test_examples_of_a_corpus_go_into_the_files_of_features():
    graph = circuit(0)
    nodes = [n for n, name in enumerate(feature_names(graph)) if name == "img/0/f1"]
    assert nodes and graph.node_kind[nodes[0]] == FEATURE
    records = {(one.dictionary, one.feature): one for one in run_features(graph)}
    found = {
        (one.dictionary, one.feature): one
        for one in viewer_records.with_scan([*records.values()], graph, scan_of(graph))
    }
    assert found.keys() >= records.keys()
    mine = found[1, 1]
    (kind,) = [name for name in mine.examples if name.startswith("Corpus of 2 prompts")]
    assert [example.activations for example in mine.examples[kind]] == [[3.0], [2.0]]
    assert mine.examples[kind][0].tokens[0].startswith("a ring (img/0/f1@")
    assert mine.frequency == 10 / 16 and mine.histogram == [4.0, 4.0]
    assert {*records[1, 1].examples} < {*mine.examples} and aggregate(graph).node_kind.size
    with pytest.raises(Exception, match="about other transcoders than the graph"):
        viewer_records.with_scan([], graph, scan_of(graph, "other"))


def test_exports_do_not_import_jax(difffract):
    arguments = ["export", "a.npz", *TRACER, "--image", "image.png", "--out", "shown/a.json"]
    code = f"import sys; sys.argv[1:] = {arguments!r}; exec({RUN!r}); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
