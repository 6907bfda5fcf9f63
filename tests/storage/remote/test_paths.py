"""Where a path can stand, one in a bucket can: graphs, models, transcoders, rows, prompts, outputs of commands."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import Run, done, run_command, run_json
from PIL import Image

import difffract_jax as dfx
from bucket_servers import Proxy
from difffract_jax import sharding
from difffract_jax.config import UserError
from difffract_jax.conversion import convert_flux
from difffract_jax.dashboards.image_files import read_image
from difffract_jax.directories import ORGANISM
from difffract_jax.graphs.collection import fill_collection
from difffract_jax.graphs.graph import Graph
from difffract_jax.loading import described_pipeline, load_labels, save_pipeline, save_transcoders
from difffract_jax.models.streaming import whole
from difffract_jax.storage import headers
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.remote import cache
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import local_directory
from difffract_jax.storage.remote.publication import MARKER
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.own_rows import open_rows
from difffract_jax.transcoders.prompts import read_prompts
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.store import open_store, write_store
from random_graphs import random_graph

RUN = ("--set", "model=organism", "--set")


@pytest.fixture
def difffract(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable:
    """Runs `difffract ARGUMENTS --json` in an empty directory, beside a bucket with a graph."""
    monkeypatch.chdir(tmp_path)
    random_graph(0).save("gs://bucket/graphs/0.npz")
    put("gs://bucket/two.txt", b"a fox\na hen\n")
    return partial(run_json, monkeypatch, capsys)


def put(url: str, content: bytes) -> None:
    at = parse_address(url)
    open_bucket(at).write(at.key, content)


def read(url: str) -> bytes:
    at = parse_address(url)
    return open_bucket(at).read(at.key)


def names(url: str) -> list[str]:
    at = parse_address(url)
    return [stat.key.removeprefix(f"{at.key}/") for stat in open_bucket(at).below(at.key)]


def test_commands_read_and_write_graphs_in_buckets(difffract: Callable, tmp_path: Path) -> None:
    pruned_at = "gs://bucket/out/pruned.npz"
    told = done(difffract("prune", "gs://bucket/graphs/0.npz", "--out", pruned_at))
    assert told["graph"] == "gs://bucket/out/pruned.npz"
    pruned = Graph.load(Path("gs://bucket/out/pruned.npz"))
    assert told["edges"] == pruned.edge_source.size == dfx.read_graph("gs://bucket/out/pruned.npz").edge_source.size
    done(difffract("combine", "average", *["gs://bucket/graphs/0.npz"] * 2, "--out", "gs://bucket/out/average.npz"))
    told = done(difffract("compare", "gs://bucket/graphs/0.npz", "gs://bucket/out/pruned.npz"))
    assert told == done(difffract("compare", *map(cache.local_file, ("gs://bucket/graphs/0.npz", pruned_at))))
    put("gs://bucket/labels.yaml", b"img/3/f0: red\n")
    out = "gs://bucket/out/graph.json"
    done(difffract("export", out.replace("graph.json", "pruned.npz"), "--format", "difffract-v2", "--out", out))
    done(difffract("view", "gs://bucket/out/pruned.npz", "--labels", "gs://bucket/labels.yaml"))
    assert read("gs://bucket/out/pruned.html").startswith(b"<!doctype html>")
    table = "gs://bucket/out/table"
    done(difffract("export", "gs://bucket/out/pruned.npz", "--format", "csv", "--out", table))
    assert {MARKER, "nodes.csv", "edges.csv"} <= {*names(table)}
    assert names("gs://bucket/out") and not [path for path in tmp_path.iterdir() if path.name != "cache"]


def test_an_output_that_is_replaced_is_told(difffract: Callable) -> None:
    *_, err = difffract("prune", "gs://bucket/graphs/0.npz", "--out", "gs://bucket/out/twice.npz")
    assert "replaced" not in err
    *_, err = difffract("prune", "gs://bucket/graphs/0.npz", "--out", "gs://bucket/out/twice.npz")
    assert "Note: gs://bucket/out/twice.npz existed and was replaced; --out names another output." in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "gs://bucket/none.npz"], "gs://bucket/none.npz does not exist; check the name"),
        (["prune", "gs://no-such-bucket/g.npz"], "There is no bucket gs://no-such-bucket (404)"),
        (["prune", "0.npz", "--out", "gs://no-such-bucket/g.npz"], "There is no bucket gs://no-such-bucket (404)"),
        (["prune", "gs://bucket/graphs/0.npz", "--out", "gs://bucket"], "The output file must end in .npz"),
        (["prune", "gs://bucket/graphs/0.npz", "--out", "gs://bucket/g.json"], "must end in .npz, but got gs://bucket"),
        (["view", "gs://bucket/graphs/0.npz", "--pages", "gs://bucket/pages"], "--pages must lie on this machine"),
        (
            ["trace", "organism", "organism", "--prompts", "gs://bucket/two.txt", "--target", "img/1/f1"]
            + ["--out", "gs://bucket/graphs"],
            "gs://bucket/graphs exists already and is not a collection of graphs; name another output",
        ),
        (
            ["study", "flow", "--size", "2", "--pages", "gs://bucket/pages", "--out", "gs://bucket/study"],
            "The folder of feature pages must lie on this machine, but got gs://bucket/pages; name a path here",
        ),
        (["demo", "--out", "gs://bucket"], "gs://bucket is a whole bucket; name a file or a folder in it"),
        (["trace", "gs://bucket/none", "organism", "a", "--target", "img/1/f1"], "gs://bucket/none holds nothing"),
        (["trace", "organism", "gs://bucket/none", "a", "--target", "img/1/f1"], "gs://bucket/none holds nothing"),
        (
            ["train", *RUN, "out=gs://no-such-bucket/run"],
            "There is no bucket gs://no-such-bucket (404); check its name",
        ),
        (["harvest", *RUN, "out=gs://no-such-bucket/rows"], "There is no bucket gs://no-such-bucket (404)"),
        (["convert", "model", "organism", "gs://no-such-bucket/m"], "There is no bucket gs://no-such-bucket (404)"),
        (["train", "--resume", "--out", "gs://no-such-bucket/run"], "There is no bucket gs://no-such-bucket (404)"),
        (["train", "--resume", "--out", "gs://bucket/no-run"], "gs://bucket/no-run holds no run to resume; leave"),
        (["evaluate", "gs://bucket/no-run"], "gs://bucket/no-run holds nothing; check the name"),
    ],
)
def test_bad_paths_are_one_sentence_and_leave_nothing(
    difffract: Callable, arguments: list[str], said: str, tmp_path: Path
) -> None:
    status, out, err = difffract(*arguments)
    assert status == 1 and out == ""
    assert err.startswith("Error: ") and err.count("\n") == 1 and said in err
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_forbidden_bucket_ends_a_command_with_a_sentence(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gs.fault = lambda method, path: 403
    run: Run = run_command(monkeypatch, capsys, "prune", "gs://bucket/graphs/0.npz")
    assert run.status == 1 and run.err.startswith(
        "Error: gs://bucket/graphs/0.npz cannot be read, since the credentials"
    )
    assert run.err.count("\n") == 1 and "gcloud auth" in run.err


def test_models_and_transcoders_are_saved_and_loaded(gs: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = dfx.random_pipeline()
    save_pipeline(pipe, "gs://bucket/models/tiny")
    loaded = dfx.load_pipeline("gs://bucket/models/tiny")
    assert loaded.origin == "gs://bucket/models/tiny"
    for one, other in zip(jax.tree.leaves(loaded.transformer), jax.tree.leaves(pipe.transformer), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="gs://bucket/models/tiny exists already"):
        save_pipeline(pipe, "gs://bucket/models/tiny")
    tcs = dfx.random_transcoders(pipe.config.transformer)
    save_transcoders(tcs, "gs://bucket/models/tcs")
    whole = dfx.load_transcoders("gs://bucket/models", subfolder="tcs")
    assert whole.origin == "gs://bucket/models/tcs"
    for one, other in zip(jax.tree.leaves(whole.stacks), jax.tree.leaves(tcs.stacks), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="gs://bucket/models/tiny holds pipeline, but transcoders is wanted here"):
        dfx.load_transcoders("gs://bucket/models/tiny")
    with pytest.raises(UserError, match="does not lie on the hub, so it takes no revision"):
        dfx.load_pipeline("gs://bucket/models/tiny", revision="main")
    with pytest.raises(UserError, match="labels"):
        load_labels("gs://bucket/models/tcs")


@pytest.mark.slow
def test_weights_in_buckets_are_cut_into_tiles_and_are_the_same_weights(
    gs: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "TILE", 2**8)
    here = convert_flux(ORGANISM, tmp_path / "here")
    with pytest.raises(KeyboardInterrupt):
        convert_flux(ORGANISM, "gs://bucket/tiled/model", progress=interrupt)
    there = convert_flux(ORGANISM, "gs://bucket/tiled/model")
    pipe = dfx.load_pipeline("gs://bucket/tiled/model", verify=True)
    save_pipeline(pipe, "gs://bucket/tiled/saved")
    converted, saved = (local_directory(f"gs://bucket/tiled/{name}") for name in ("model", "saved"))
    for path in converted.glob("*.safetensors"):
        assert path.read_bytes() == (saved / path.name).read_bytes(), "in one pass, or interrupted, or from memory"
    assert there.source == here.source == pipe.source, "however they are cut"
    tensors = TensorFile(converted / "transformer.safetensors").tensors
    assert sum(info.tiling is not None for info in tensors.values()) > 10
    assert not any(info.tiling for info in TensorFile(converted / "vae.safetensors").tensors.values())
    streamed = dfx.load_pipeline("gs://bucket/tiled/model", weights="disk")
    assert all(map(np.array_equal, *map(jax.tree.leaves, (whole(streamed.transformer), pipe.transformer))))
    for folder, version in ((converted, 2), (tmp_path / "here", 1)):
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["format_version"] == version
    assert save_pipeline(pipe, tmp_path / "back") == here.source
    for path in (tmp_path / "here").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def interrupt(done: int, total: int) -> None:
    """Ends a conversion halfway."""
    if done > total // 2:
        raise KeyboardInterrupt


def held_bytes(path: Path) -> int:
    """Returns how many bytes a copy holds that is filled as it is read."""
    ends = json.loads(path.with_name(f"{path.name}.origin").read_text(encoding="utf-8"))["ends"]
    return int(np.diff([0, *ends])[np.fromfile(path.with_name(f"{path.name}.units"), np.uint8) == 1].sum())


def test_of_some_sites_little_else_than_their_own_weights_is_fetched(
    gs: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SPARSE_FROM", 1)
    monkeypatch.setattr(headers, "SHORTEST", 2**7)
    monkeypatch.setattr(headers, "LONGEST", 2**8)
    tcs = dfx.random_transcoders(dfx.random_pipeline().config.transformer)
    save_transcoders(tcs, "gs://bucket/models/by-site")
    some = dfx.load_transcoders("gs://bucket/models/by-site", sites=["img/1"], verify=False)
    for one, other in zip(jax.tree.leaves(some.stacks["img"]), jax.tree.leaves(tcs.stacks["img"]), strict=True):
        np.testing.assert_array_equal(one[0], other[1])
    held = {path.name: held_bytes(path) for path in cache.root().rglob("*.safetensors")}
    own = sum(leaf[0].nbytes for leaf in jax.tree.leaves(tcs.stacks["img"]))
    header = 2**11
    assert own <= held["img.safetensors"] <= 1.1 * own + header
    assert len(held) > 1 and all(count <= header for name, count in held.items() if name != "img.safetensors")


def test_prompts_rows_and_images_are_read(gs: Proxy, tmp_path: Path) -> None:
    put("gs://bucket/prompts/list.txt", "a fox\n\nein Füchslein\n".encode())
    put("gs://bucket/prompts/list.jsonl", b'{"caption": "a fox"}\n{"caption": "a hen"}\n')
    assert read_prompts("gs://bucket/prompts/list.txt") == ["a fox", "ein Füchslein"]
    assert read_prompts("gs://bucket/prompts/list.jsonl:caption") == ["a fox", "a hen"]
    with pytest.raises(UserError, match="gs://bucket/prompts/list is not a file of prompts"):
        read_prompts("gs://bucket/prompts/list")
    rng = np.random.default_rng(0)
    for name in ("x", "y"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(64, 8)).astype(np.float32))
        put(f"gs://bucket/rows/{name}.npy", (tmp_path / f"{name}.npy").read_bytes())
    there, here = (open_rows(Path(path), None, 0.5, 0) for path in ("gs://bucket/rows", str(tmp_path)))
    assert (
        type(there) is type(here) and there.identity.replace(str(cache.root()), "") if hasattr(there, "identity") else 1
    )
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    put("gs://bucket/red.png", (tmp_path / "red.png").read_bytes())
    assert read_image(Path("gs://bucket/red.png")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.slow
def test_of_a_diffusers_directory_only_what_is_needed_is_fetched(gs: Proxy, tmp_path: Path) -> None:
    for path in ORGANISM.rglob("*"):
        if path.is_file():
            put(f"gs://bucket/organism/{path.relative_to(ORGANISM).as_posix()}", path.read_bytes())
    put("gs://bucket/organism/transformer/diffusion_pytorch_model.bin", bytes(100))
    gs.log.clear()
    config = described_pipeline("gs://bucket/organism")
    assert config == described_pipeline("organism")
    assert not [path for method, path, _ in gs.log if "alt=media" in path and ".safetensors" in path]
    made = convert_flux("gs://bucket/organism", "gs://bucket/converted/organism")
    assert made.path == Path("gs://bucket/converted/organism") and MARKER in names("gs://bucket/converted/organism")
    assert not [path for _, path, _ in gs.log if "pytorch_model.bin?alt=media" in path]
    loaded, own = dfx.load_pipeline("gs://bucket/converted/organism"), dfx.load_pipeline("organism")
    for one, other in zip(jax.tree.leaves(loaded.transformer), jax.tree.leaves(own.transformer), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match="gs://bucket/converted/organism exists already"):
        convert_flux("organism", "gs://bucket/converted/organism")


def test_graphs_of_many_runs_are_read_from_a_bucket(difffract: Callable, tmp_path: Path) -> None:
    runs = [("a", 0), ("b", 0)]
    fill_collection(tmp_path / "many", runs, lambda prompt, seed: random_graph(0), settings={"step": 1})
    for path in (tmp_path / "many").rglob("*"):
        if path.is_file():
            put(f"gs://bucket/many/{path.relative_to(tmp_path / 'many').as_posix()}", path.read_bytes())
    told = done(difffract("combine", "average", "gs://bucket/many", "--out", "average.npz"))
    assert told["graphs"] == 2
    done(difffract("combine", "average", tmp_path / "many", "--out", "here.npz"))
    there, here = (Graph.load(name) for name in ("average.npz", "here.npz"))
    np.testing.assert_array_equal(there.edge_attribution, here.edge_attribution)


class Numbered:
    """Rows that are a number each."""

    sites, width, timed = sites_of({"img": (0,)}), 4, False

    def chunk(self, number: int) -> Chunk:
        rows = jax.numpy.full((1, 3, 4), number, jax.numpy.float32)
        if number == 2:
            raise UserError("the model is gone")
        return Chunk({"img": ActivationRows(rows, rows + 1, jax.numpy.zeros(3))}, {"img": np.ones(3, bool)})


def test_rows_are_harvested_shard_by_shard_into_a_bucket(gs: Proxy) -> None:
    write_store({"train": Numbered()}, {"train": 2}, Path("gs://bucket/rows/harvested"), {})
    assert names("gs://bucket/rows/harvested") == [
        "config.json",
        MARKER,
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    rows = open_store(local_directory("gs://bucket/rows/harvested", by_range=True), "train", 0)
    assert sorted(float(rows.chunk(number).rows["img"].x[0, 0, 0]) for number in range(2)) == [0, 1]
    with pytest.raises(UserError, match="gs://bucket/rows/harvested exists already"):
        write_store({"train": Numbered()}, {"train": 2}, Path("gs://bucket/rows/harvested"), {})
    with pytest.raises(UserError, match="the model is gone"):
        write_store({"train": Numbered()}, {"train": 3}, Path("gs://bucket/rows/broken"), {})
    assert names("gs://bucket/rows/broken") == []
