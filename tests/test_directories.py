"""Models and transcoders by their names on the hub, from Python and in commands, through the real client."""

import json

import jax
import numpy as np
import pytest
from commands import done, run_command, run_json
from PIL import Image
from safetensors.numpy import save_file

from converters.flux import FLUX_SINGLE_FILE
from converters.mapping import save_tree
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_flux, convert_transcoders
from difffract_jax.directories import SHIPPED, pipeline_directory
from difffract_jax.graphs.graph import Graph
from difffract_jax.hub.names import HubName
from difffract_jax.hub.repository import fetch, open_repository
from difffract_jax.loading import (
    abstract_pipeline,
    load_labels,
    load_pipeline,
    load_transcoders,
    save_pipeline,
)
from difffract_jax.models.pipeline import GeneratedImage
from difffract_jax.storage.checkpoint import read_config
from difffract_jax.storage.sums import sample_hash
from tolerances import REFERENCE

PIPELINE, TRANSCODERS = REFERENCE / "pipeline", REFERENCE / "transcoders"
# As in test_journey.py, whose programs are then compiled already.
PROMPT = "a red fox at dawn, oil painting"
SIZE = ("--height", 96, "--width", 96, "--text-tokens", 16)
TRACE = (PROMPT, "--target", "img/2/f326", "--step", 1, "--seed", 7, "--noise", "torch", "--include-padding", *SIZE)
LIMITS = ("--max-nodes", 10, "--expansion-batch", 10, "--min-attribution", 1e-4)
DECOYS = {
    **dict.fromkeys(("flux1-schnell.safetensors", "ae.safetensors", "README.md", "grid.jpeg"), b"unread"),
    **dict.fromkeys(("transformer/diffusion_pytorch_model.fp16.safetensors", "vae/x.bin", "SHA256SUMS"), b"unread"),
}


@pytest.fixture(scope="module")
def local():
    return load_pipeline(PIPELINE)


def read(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_pipeline(hub, name="someone/flux", **more):
    return hub.add(name, read(PIPELINE) | DECOYS, **more)


def add_transcoders(hub, name="someone/tcs"):
    files = {f"tt/{path}": content for path, content in read(TRANSCODERS).items()}
    return hub.add(name, files | dict.fromkeys(("README.md", "saes/sae_img_0.pt", "tt/config.json"), b"unread"))


def assert_equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def test_a_pipeline_is_loaded_by_name_from_what_it_needs(hub, local) -> None:
    hosted = add_pipeline(hub, branches=("main", "v1"))
    pipe = load_pipeline("someone/flux", revision="v1")
    assert_equal(pipe[:4], local[:4])
    assert pipe.source == local.source
    assert pipe.origin == f"hf:someone/flux@{hosted.commit}" and pipe.origin in repr(pipe)
    assert {*hub.downloaded} == {*hosted.files} - {*DECOYS}


def test_the_shapes_of_a_pipeline_need_no_weights(hub, local) -> None:
    add_pipeline(hub)
    config, _ = abstract_pipeline("hf:someone/flux")
    assert config == local.config.transformer
    assert not [path for path in hub.downloaded if path.endswith(".safetensors")]


def test_a_pipeline_that_cannot_be_run_is_refused_before_its_weights(hub) -> None:
    index = json.dumps({"_class_name": "StableDiffusionXLPipeline"}).encode()
    add_pipeline(hub).files["model_index.json"] = index
    with pytest.raises(UserError, match="StableDiffusionXLPipeline, but only FluxPipeline"):
        load_pipeline("hf:someone/flux")
    assert not [path for path in hub.downloaded if path.endswith(".safetensors")]
    hub.add("someone/single", {"flux1-dev.safetensors": b"unread"})
    with pytest.raises(
        UserError, match="difffract convert flux hf:someone/single/flux1-dev.safetensors OUT --base DIR"
    ):
        load_pipeline("hf:someone/single")
    hub.add("someone/language", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"unread"})
    for load in (load_pipeline, load_transcoders):
        with pytest.raises(UserError, match="hf:someone/language holds files of another tool"):
            load("hf:someone/language")
    assert "model.safetensors" not in hub.downloaded
    with pytest.raises(UserError, match="is a transformer alone; name a diffusers directory"):
        load_pipeline("hf:someone/single/flux1-dev.safetensors")


def test_transcoders_are_loaded_by_name_and_site(hub) -> None:
    hosted = add_transcoders(hub)
    with pytest.raises(UserError, match="name the folder that holds them: hf:someone/tcs/saes or hf:someone/tcs/tt"):
        load_transcoders("someone/tcs")
    some = load_transcoders("someone/tcs", subfolder="tt", sites=["img/1-2"])
    assert hub.downloaded == ["tt/transcoder_img_1.pt", "tt/transcoder_img_2.pt"]
    assert some.sites.names == ("img/1", "img/2")
    assert some.origin == f"hf:someone/tcs@{hosted.commit}/tt" and some.origin in repr(some)
    tcs, local = load_transcoders("hf:someone/tcs/tt"), load_transcoders(TRANSCODERS)
    assert_equal(tcs.stacks, local.stacks)
    assert tcs.source == local.source != some.source
    assert len(hub.downloaded) == 6 and all(path.endswith(".pt") for path in hub.downloaded)


def test_sites_are_chosen_in_every_format(tmp_path) -> None:
    whole = load_transcoders(TRANSCODERS)
    for tcs in (
        load_transcoders(REFERENCE, subfolder="transcoders", sites=["img/0", "txt/1-2"]),
        load_transcoders(convert_transcoders(TRANSCODERS, tmp_path / "ours", sites=["img/0", "txt/1-2"]).path),
        load_transcoders(tmp_path / "ours", sites=["*/*"]),
    ):
        assert tcs.sites.names == ("txt/1", "txt/2", "img/0") or tcs.sites.names == ("img/0", "txt/1", "txt/2")
        assert_equal(tcs.stacks["txt"], jax.tree.map(lambda leaf: leaf[1:], whole.stacks["txt"]))
    one = load_transcoders(tmp_path / "ours", sites=["txt/2"])
    assert one.sites.names == ("txt/2",) and one.source != tcs.source
    with pytest.raises(UserError, match="holds none of the sites img/2; it has"):
        load_transcoders(tmp_path / "ours", sites=["img/2"])
    with pytest.raises(UserError, match="holds none of the sites img/7; it has img/0"):
        load_transcoders(TRANSCODERS, sites=["img/7"])
    with pytest.raises(UserError, match="'img' names no sites"):
        load_transcoders(TRANSCODERS, sites=["img"])


def test_directories_of_ours_are_read_from_the_hub_with_labels(hub, local, tmp_path) -> None:
    hub.add("someone/labelled", read(SHIPPED["organism"]))
    tcs = load_transcoders("hf:someone/labelled")
    assert tcs.source == load_transcoders("organism").source
    assert load_labels("hf:someone/labelled").transcoders == tcs.source
    assert not [path for path in hub.downloaded if path.startswith("report/")]
    with pytest.raises(UserError, match="hf:someone/labelled holds transcoders, but pipeline is wanted here"):
        load_pipeline("hf:someone/labelled")
    add_transcoders(hub)
    with pytest.raises(
        UserError, match="no labels of hf:someone/tcs/tt; `difffract convert transcoders hf:someone/tcs/tt DIR`"
    ):
        load_labels("hf:someone/tcs/tt")
    save_pipeline(local, tmp_path / "ours")
    hub.add("someone/ours", read(tmp_path / "ours"))
    config, _ = abstract_pipeline("hf:someone/ours")
    assert config == local.config.transformer and "t5.safetensors" not in hub.downloaded
    assert_equal(load_pipeline("hf:someone/ours")[:4], local[:4])


def test_other_formats_of_a_site_in_the_cache_do_not_matter(hub) -> None:
    add_transcoders(hub).files["tt/transcoder_img_0.safetensors"] = b"unread"
    fetch(open_repository(HubName("someone/tcs")), ["tt/transcoder_img_0.safetensors"])
    assert_equal(load_transcoders("hf:someone/tcs/tt").stacks, load_transcoders(TRANSCODERS).stacks)


def test_other_files_in_the_cache_do_not_change_what_large_weights_are_called(hub) -> None:
    add_pipeline(hub)
    found = pipeline_directory("hf:someone/flux")
    assert sample_hash(found.path, found.weights) == sample_hash(PIPELINE)
    fetch(open_repository(HubName("someone/flux")), ["flux1-schnell.safetensors"])
    assert (found.path / "flux1-schnell.safetensors").is_file()
    assert sample_hash(found.path, found.weights) == sample_hash(PIPELINE)


def test_what_only_a_repository_has_is_refused_elsewhere() -> None:
    for load, given in (
        *((load_pipeline, model) for model in (PIPELINE, "organism")),
        *((load_transcoders, tcs) for tcs in (TRANSCODERS, "organism")),
    ):
        with pytest.raises(UserError, match="does not lie on the hub, so it takes no revision; leave revision out"):
            load(given, revision="main")


def test_an_image_records_the_repository_and_its_commit(hub, local, tmp_path, monkeypatch, capsys) -> None:
    hosted, image = add_pipeline(hub), tmp_path / "image.png"
    blank = GeneratedImage(np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1), np.float32), "")
    monkeypatch.setattr("difffract_jax.models.pipeline.generate", lambda *_, **__: blank)
    done(run_json(monkeypatch, capsys, "generate", "hf:someone/flux", PROMPT, *SIZE, "--out", image))
    with Image.open(image) as drawn:
        sources = json.loads(drawn.info["difffract_jax"])["sources"]
    assert sources == {"model": local.source, "model_origin": f"hf:someone/flux@{hosted.commit}"}


@pytest.mark.slow
def test_a_circuit_is_traced_by_name_and_records_repositories_and_commits(hub, tmp_path, monkeypatch, capsys) -> None:
    model, tcs, graph = add_pipeline(hub), add_transcoders(hub), tmp_path / "graph.npz"
    traced = ("trace", "hf:someone/flux@main", "hf:someone/tcs/tt", *TRACE, *LIMITS, "--out", graph)
    done(run_json(monkeypatch, capsys, *traced))
    stored = Graph.load(graph).provenance
    assert stored.sources["model_origin"] == f"hf:someone/flux@{model.commit}"
    assert stored.sources["transcoders_origin"] == f"hf:someone/tcs@{tcs.commit}/tt"
    assert stored.traced_run.model_origin == f"hf:someone/flux@{model.commit}"


def test_conversions_take_names(hub, local, tmp_path, monkeypatch, capsys) -> None:
    model, tcs = add_pipeline(hub), add_transcoders(hub)
    done(run_json(monkeypatch, capsys, "convert", "flux", "hf:someone/flux", tmp_path / "flux"))
    assert read_config(tmp_path / "flux")["content_hash"] == local.source
    # Where it came from stays known after the conversion.
    assert load_pipeline(tmp_path / "flux").origin == f"hf:someone/flux@{model.commit}"
    source, sites = "hf:someone/tcs/tt", ("--sites", "img/0,txt/1")
    result = done(run_json(monkeypatch, capsys, "convert", "transcoders", source, tmp_path / "tcs", *sites))
    assert result["img layers"] == [0] and result["txt layers"] == [1]
    sites_read = [path for path in hub.downloaded if path.endswith(".pt")]
    assert sites_read == ["tt/transcoder_img_0.pt", "tt/transcoder_txt_1.pt"]
    assert load_transcoders(tmp_path / "tcs").origin == f"hf:someone/tcs@{tcs.commit}/tt"
    hub.log.clear()
    run = run_command(monkeypatch, capsys, "convert", "transcoders", "hf:someone/tcs/tt", tmp_path / "tcs")
    assert run.status == 1 and "exists already" in run.err and not hub.log


def test_a_file_on_the_hub_is_completed_by_another_repository(hub, local, tmp_path) -> None:
    tensors = {key: np.ascontiguousarray(value) for key, value in save_tree(local.transformer, FLUX_SINGLE_FILE)}
    save_file(tensors, tmp_path / "flux1.safetensors")
    add_pipeline(hub)
    hub.add("someone/tuned", {"flux1.safetensors": (tmp_path / "flux1.safetensors").read_bytes(), "README.md": b"#"})
    made = convert_flux("hf:someone/tuned/flux1.safetensors", tmp_path / "out", base="hf:someone/flux")
    assert_equal(load_pipeline(made.path)[:4], local[:4])
    assert read_config(tmp_path / "out")["content_hash"] == local.source == made.source
    assert "transformer/config.json" in hub.downloaded and "flux1.safetensors" in hub.downloaded
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.downloaded
    with pytest.raises(UserError, match="--base completes a transformer, but hf:someone/flux is a directory"):
        convert_flux("hf:someone/flux", tmp_path / "never", base="hf:someone/flux")


def test_a_transformer_on_the_hub_is_loaded_with_a_base(hub, local) -> None:
    add_pipeline(hub)
    with pytest.raises(UserError, match="hf:someone/flux/transformer is a transformer alone"):
        load_pipeline("hf:someone/flux/transformer")
    pipe = load_pipeline("hf:someone/flux/transformer", base="hf:someone/flux")
    assert_equal(pipe[:4], local[:4])
    assert pipe.origin.endswith("/transformer")


def test_a_pipeline_on_the_hub_without_some_parts_is_completed_by_a_base(hub, local) -> None:
    add_pipeline(hub)
    held = {path: content for path, content in read(PIPELINE).items() if not path.startswith("text_encoder")}
    hub.add("someone/half", held)
    with pytest.raises(UserError, match="lacks text_encoder, text_encoder_2; copy these folders.*, with --base"):
        load_pipeline("hf:someone/half")
    assert not [path for path in hub.downloaded if path.endswith(".safetensors")]
    pipe = load_pipeline("hf:someone/half", base="hf:someone/flux", revision="main")
    assert_equal(pipe[:4], local[:4])
    assert pipe.source == local.source


def test_a_variant_on_the_hub_is_downloaded_where_it_is_asked_for(hub) -> None:
    add_pipeline(hub)
    found = pipeline_directory("hf:someone/flux", variant="fp16")
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in found.weights
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.downloaded
    assert "vae/diffusion_pytorch_model.safetensors" in found.weights  # which has no such variant


def test_a_failed_download_leaves_no_conversion_behind(hub, tmp_path, monkeypatch, capsys) -> None:
    add_pipeline(hub, gated=True)
    run = run_command(monkeypatch, capsys, "convert", "flux", "hf:someone/flux", tmp_path / "flux")
    assert run.status == 1 and "Error: someone/flux is gated" in run.err and "Traceback" not in run.err
    assert not [path for path in tmp_path.iterdir() if path.name != "hub-cache"]


def test_a_lora_is_one_file_of_a_repository(hub, tmp_path) -> None:
    names = [f"transformer.single_transformer_blocks.0.proj_mlp.lora_{one}.weight" for one in "AB"]
    width = load_pipeline(PIPELINE).config.transformer.d_model
    shapes = ((2, width), (4 * width, 2))
    save_file(
        dict(zip(names, (np.ones(shape, np.float32) for shape in shapes), strict=True)), tmp_path / "a.safetensors"
    )
    content = (tmp_path / "a.safetensors").read_bytes()
    hosted = hub.add("someone/style", {"b/a.safetensors": content, "other.safetensors": b"unread"})
    pipe = load_pipeline(PIPELINE, lora=["hf:someone/style/b/a.safetensors:0.5"])
    assert hub.downloaded == ["b/a.safetensors"]
    assert (pipe.loras[0].name, pipe.loras[0].scale) == (f"hf:someone/style@{hosted.commit}/b/a.safetensors", 0.5)
    with pytest.raises(UserError, match="name one as hf:OWNER/NAME/FILE, as in hf:someone/style/b/a.safetensors"):
        load_pipeline(PIPELINE, lora=["hf:someone/style"])
