"""Outputs that grow, or are many files, in a bucket: graphs of many runs, studies, pages, the demonstration, sweeps."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from commands import done, run_command, run_json

from bucket_servers import Proxy
from difffract_jax.config import UserError
from difffract_jax.graphs.collection import fill_collection, read_collection
from difffract_jax.graphs.collection_files import files_of
from difffract_jax.graphs.comparison import compare
from difffract_jax.graphs.graph import Graph
from difffract_jax.storage.remote import cache
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.bucket import Bucket, open_bucket
from difffract_jax.storage.remote.claims import Claim
from difffract_jax.storage.remote.objects import Stat
from difffract_jax.storage.remote.outputs import holds_files, sent_files, working_folder
from difffract_jax.storage.remote.publication import CLAIM, MARKER
from difffract_jax.studies.registry import STUDIES
from difffract_jax.studies.results import Result
from random_graphs import random_graph

RUNS = [(prompt, 0) for prompt in ("a", "b", "c", "d")]
MANY = "gs://bucket/many"


@pytest.fixture
def empty(gs: Proxy) -> Proxy:
    """The emulated bucket with nothing in it."""
    at = parse_address("gs://bucket/x")
    for stat in open_bucket(at).below(""):
        open_bucket(at).delete(stat.key)
    return gs


@pytest.fixture
def difffract(
    empty: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable:
    """Runs `difffract ARGUMENTS --json` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return partial(run_json, monkeypatch, capsys)


def names(url: str) -> set[str]:
    at = parse_address(url)
    return {stat.key.removeprefix(f"{at.key}/") for stat in open_bucket(at).below(at.key)}


def read(url: str) -> str:
    at = parse_address(url)
    return open_bucket(at).read(at.key).decode()


class Tracer:
    """Traces made-up runs; refuses prompt b, and does something else before one."""

    def __init__(self, before: dict[str, Callable[[], None]] | None = None) -> None:
        self.before, self.traced = before or {}, []

    def __call__(self, prompt: str, seed: int) -> Graph:
        self.before.get(prompt, lambda: None)()
        self.traced.append(prompt)
        if prompt == "b":
            raise UserError("inactive there")
        return random_graph(RUNS.index((prompt, seed)))


def interrupt() -> None:
    raise KeyboardInterrupt


def test_graphs_of_many_runs_go_on_where_they_were_stopped(empty: Proxy, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill_collection(MANY, RUNS, Tracer({"c": interrupt}), settings={"step": 1})
    assert [run.prompt for run in read_collection(MANY).runs] == ["a", "b"]
    with pytest.raises(UserError, match=r"gs:/+bucket/many was begun with step 1, not 2"):
        fill_collection(MANY, RUNS, Tracer(), settings={"step": 2})
    tracer = Tracer()
    seen = []
    fill_collection(MANY, RUNS, tracer, settings={"step": 1}, progress=lambda *one: seen.append(one))
    assert tracer.traced == ["c", "d"] and seen == [(2, 4), (3, 4), (4, 4)]
    local = fill_collection(tmp_path / "many", RUNS, Tracer(), settings={"step": 1})
    there = read_collection(MANY)
    assert there.runs == local.runs and there.settings == local.settings
    assert all(compare(*two).largest_error == 0 for two in zip(there.graphs(), local.graphs(), strict=True))
    here = {path.relative_to(tmp_path / "many").as_posix() for path in (tmp_path / "many").rglob("*.*")}
    assert names(MANY) == here, "no claim stays"
    assert read(f"{MANY}/index.jsonl") == (tmp_path / "many/index.jsonl").read_text(encoding="utf-8")


def test_shares_of_many_runs_are_held_apart_and_together_the_whole(empty: Proxy) -> None:
    def other() -> None:
        fill_collection(MANY, RUNS, Tracer(), settings={}, share=(1, 2))

    fill_collection(MANY, RUNS, Tracer({"c": other}), settings={}, share=(0, 2))
    assert {run.prompt for run in read_collection(MANY).runs} == {"a", "b", "c", "d"}
    assert {"index-1-of-2.jsonl", "index-2-of-2.jsonl", "index.parquet"} <= names(MANY)


def test_a_process_that_was_taken_over_writes_no_line_more(empty: Proxy) -> None:
    at = parse_address(f"{MANY}/claims/index.jsonl")

    def lose() -> None:
        claim = Claim(at)
        open_bucket(at).write((at / CLAIM).key, claim._content())  # what another process writes that takes over

    with pytest.raises(UserError, match="taken over by process"):
        fill_collection(MANY, RUNS, Tracer({"c": lose}), settings={})
    assert [run.prompt for run in read_collection(MANY).runs] == ["a", "b"]


def test_indices_that_others_write_meanwhile_are_read_whole(empty: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_collection(MANY, RUNS, Tracer(), settings={}, share=(1, 2))
    key, text = parse_address(f"{MANY}/index-2-of-2.jsonl").key, read(f"{MANY}/index-2-of-2.jsonl")
    written = []

    def meanwhile(name: str, real: Callable) -> None:
        def answer(bucket: Bucket, of: Stat | str) -> object:
            if key in (of, getattr(of, "key", "")) and name not in written:
                written.append(name)
                bucket.write(key, text.encode())
            return real(bucket, of)

        monkeypatch.setattr(Bucket, name, answer)

    meanwhile("read_version", Bucket.read_version)
    assert files_of(MANY).text("index-2-of-2.jsonl") == text
    meanwhile("known", Bucket.known)
    assert [run.prompt for run in read_collection(MANY).runs] == ["b", "d"]
    assert written == ["read_version", "known"]


def test_a_line_that_is_damaged_is_named_where_it_lies(empty: Proxy) -> None:
    fill_collection(MANY, RUNS, Tracer(), settings={})
    at = parse_address(f"{MANY}/index.jsonl")
    open_bucket(at).write(at.key, b"no line\n")
    with pytest.raises(UserError, match=r"Line 1 of gs:/+bucket/many/index\.jsonl is damaged"):
        read_collection(MANY)


def test_a_place_that_holds_something_else_is_no_collection(empty: Proxy) -> None:
    open_bucket(parse_address(MANY)).write("many/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"gs:/+bucket/many exists already and is not a collection of graphs"):
        fill_collection(MANY, RUNS, Tracer(), settings={})
    with pytest.raises(UserError, match=r"gs:/+bucket/many is not a collection of graphs, which has a file"):
        read_collection(MANY)


def test_files_are_sent_together_and_kept_if_they_cannot_be(empty: Proxy) -> None:
    out = "gs://bucket/out"
    assert not holds_files(out)
    with sent_files(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/one.txt").write_text("1", encoding="utf-8")
        (folder / "two.txt").write_text("2", encoding="utf-8")
        assert names(out) == set()
    assert names(out) == {"sub/one.txt", "two.txt"} and holds_files(out)
    with sent_files(out) as folder:
        (folder / "two.txt").write_text("3", encoding="utf-8")
    assert read(f"{out}/two.txt") == "3" and read(f"{out}/sub/one.txt") == "1"
    with pytest.raises(RuntimeError), sent_files(out) as folder:
        (folder / "two.txt").write_text("4", encoding="utf-8")
        raise RuntimeError
    assert read(f"{out}/two.txt") == "3"
    empty.fault = lambda method, path: 403 if "upload" in path else None
    with pytest.raises(UserError, match="is complete, and kept in") as told, sent_files(out) as folder:
        (folder / "two.txt").write_text("5", encoding="utf-8")
    kept = Path(str(told.value).rpartition("kept in ")[2].removesuffix("."))
    assert (kept / "two.txt").read_text(encoding="utf-8") == "5"


def test_what_an_output_keeps_here_is_there_for_the_next_start_and_goes_when_it_is_done(empty: Proxy) -> None:
    out = "gs://bucket/study"
    with pytest.raises(KeyboardInterrupt), working_folder(out) as folder:
        (folder / "circuit.npz").write_bytes(b"1")
        raise KeyboardInterrupt
    with working_folder(out) as folder:
        assert (folder / "circuit.npz").read_bytes() == b"1"
    assert not folder.exists()


def test_a_study_is_written_into_a_bucket(difffract: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(given: object, advance: object) -> Result:
        assert given.kept == cache.root() / "outputs" / given.kept.parts[-3] / "study" / "circuits"
        return Result("flow", "It hangs on img/1/f7.", {"Most": [{"feature": "img/1/f7", "cases": 1}]}, {}, {})

    monkeypatch.setitem(STUDIES, "flow", flow)
    status, told, err = difffract("study", "flow", "--out", "gs://bucket/study")
    assert status == 0 and "replaced" not in err
    assert told["report"] == "gs://bucket/study/flow.md" and "It hangs on" in read(told["report"])
    assert json.loads(read(told["raw"]))["settings"]["out"] == str(Path("gs://bucket/study"))
    assert names("gs://bucket/study") == {"flow.md", "flow.json", MARKER}
    status, _, err = difffract("study", "flow", "--out", "gs://bucket/study")
    assert status == 0 and "Note: gs://bucket/study existed and was replaced" in err


@pytest.mark.slow
def test_many_prompts_are_traced_into_a_bucket_by_two_shares(difffract: Callable, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue ring\n", encoding="utf-8")
    line = ["trace", "organism", "organism", "--prompts", "p.txt", "--target", "img/1/f159", "--step", "1"]
    line += ["--max-nodes", "5", "--out"]
    for share in ("1/2", "2/2"):
        told = done(difffract(*line, MANY, "--share", share))
    assert told["collection"] == MANY and told["further runs there"] == 1
    done(difffract(*line, "many"))
    there, here = ({run.prompt: run for run in read_collection(path).runs} for path in (MANY, tmp_path / "many"))
    assert there == here
    for path in (MANY, "many"):
        done(difffract("combine", "average", path, "--out", f"{Path(path).name}.npz"))


@pytest.mark.slow
def test_pages_of_features_are_written_into_a_bucket(
    difffract: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["dashboards", "organism", "organism", "--prompts", "4", "--features", "img/1/f159,img/1/f3"]
    line += ["--batch", "4", "--top", "2", "--per-third", "1", "--steps", "2", "--out"]
    told = done(difffract(*line, "gs://bucket/pages"))
    assert told["pages"] == "gs://bucket/pages/index.html"
    done(difffract(*line, "pages"))
    assert names("gs://bucket/pages") == {MARKER} | {
        path.relative_to(tmp_path / "pages").as_posix() for path in (tmp_path / "pages").rglob("*") if path.is_file()
    }
    again = run_command(monkeypatch, capsys, *line, "gs://bucket/pages")
    assert again.status == 1 and "gs://bucket/pages exists already; name another output, or pass" in again.err
    done(difffract(*line, "gs://bucket/pages", "--overwrite"))


@pytest.mark.slow
def test_the_demonstration_is_written_into_a_bucket(difffract: Callable) -> None:
    told = done(difffract("demo", "--out", "gs://bucket/demo"))
    assert told["report.html"] == "gs://bucket/demo/report.html"
    there = names("gs://bucket/demo")
    assert {"image.png", "graph.npz", "graph.images.png", "report.html", "steered/grid.png", MARKER} <= there
    assert "validation/validation.json" in there and CLAIM not in there
    assert "In short" in (page := read("gs://bucket/demo/report.html")) and str(cache.root()) not in page
    assert str(cache.root()) not in read("gs://bucket/demo/graph.html")
    assert Graph.load("gs://bucket/demo/pruned.npz").edge_source.size


CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = ("steps=2", "batch=32", "buffer_rows=256", "warmup=1", "checkpoint_every=2", "log_every=1", "sites=[img/0]")
SMALL += (f"prompts={CONFIGS / 'prompts.txt'}",)


@pytest.mark.slow
def test_a_sweep_trains_its_runs_in_a_bucket_once(difffract: Callable) -> None:
    sets = [part for each in SMALL for part in ("--set", each)]
    few = [*sets, "--images", "0", "--prompts-count", "2", "--velocity-count", "2"]
    line = ["evaluate", "--pareto", CONFIGS / "smoke.yaml", "--k", "2", *few, "--out"]
    status, _, err = difffract(*line, "gs://no-such-bucket/sweep")
    assert status == 1 and "There is no bucket gs://no-such-bucket (404)" in err
    line.append("gs://bucket/sweep")
    told = done(difffract(*line))
    there = names("gs://bucket/sweep")
    assert {"transcoder-2/transcoders/config.json", "sae-2/transcoders/config.json", "report/report.md"} <= there
    assert [row["role"] for row in told["points"]] == ["transcoder", "sae"]
    before = read("gs://bucket/sweep/transcoder-2/train.json")
    done(difffract(*line))
    assert read("gs://bucket/sweep/transcoder-2/train.json") == before
