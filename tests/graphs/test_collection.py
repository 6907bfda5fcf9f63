"""Graphs of many runs: traced once each, taken up where it was stopped, and never mixed with others."""

import json

import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs.collection import fill_collection, is_collection, read_collection
from difffract_jax.graphs.comparison import compare
from difffract_jax.storage.locks import sole_writer
from random_graphs import random_graph

RUNS = [(prompt, seed) for prompt in ("a", "b", "c\nd") for seed in (0, 1)]


class Tracer:
    """Traces made-up runs; refuses prompt b with seed 1, and stops where it shall."""

    def __init__(self, stop=None):
        self.stop, self.traced = stop, []

    def __call__(self, prompt, seed):
        if (prompt, seed) == self.stop:
            raise KeyboardInterrupt
        self.traced.append((prompt, seed))
        if (prompt, seed) == ("b", 1):
            raise UserError("inactive there")
        return random_graph(RUNS.index((prompt, seed)))


def test_every_run_has_its_graph_or_its_problem(tmp_path):
    seen = []
    collection = fill_collection(
        tmp_path / "many", RUNS, Tracer(), settings={"step": 1}, progress=lambda *done: seen.append(done)
    )
    assert seen == [*((number, 6) for number in range(6)), (6, 6)]
    assert [(run.prompt, run.seed) for run in collection.runs] == RUNS
    assert [run.problem for run in collection.runs] == ["", "", "", "inactive there", "", ""]
    assert collection == read_collection(tmp_path / "many")
    numbers = [number for number in range(6) if number != 3]
    for number, graph in zip(numbers, collection.graphs(), strict=True):
        assert compare(graph, random_graph(number)).largest_error == 0
        assert collection.runs[number].edges == graph.edge_source.size


def test_the_index_is_a_table_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    collection = fill_collection(tmp_path / "many", RUNS, Tracer(), settings={})
    rows = parquet.read_table(tmp_path / "many" / "index.parquet").to_pylist()
    assert rows == [vars(run) for run in collection.runs]


class Mended(Tracer):
    """Traces what `Tracer` refuses."""

    def __call__(self, prompt, seed):
        self.traced.append((prompt, seed))
        return random_graph(RUNS.index((prompt, seed)))


def test_runs_that_failed_are_tried_again_if_that_is_asked_for_and_no_others(tmp_path):
    path, settings = tmp_path / "many", {"step": 1}
    fill_collection(path, RUNS, Tracer(), settings=settings)
    kept = {file: file.read_bytes() for file in (path / "graphs").iterdir()}
    left, again, mended, after = Tracer(), Tracer(), Mended(), Mended()
    fill_collection(path, RUNS, left, settings=settings)
    failed = fill_collection(path, RUNS, again, settings=settings, retry=True)
    assert (left.traced, again.traced) == ([], [("b", 1)]) and failed.runs[3].problem == "inactive there"
    done = fill_collection(path, RUNS, mended, settings=settings, retry=True)
    assert mended.traced == [("b", 1)] and all(run.graph for run in done.runs)
    assert [(run.prompt, run.seed) for run in done.runs] == RUNS
    assert len((path / "index.jsonl").read_text().splitlines()) == len(RUNS)
    assert all(file.read_bytes() == data for file, data in kept.items())
    fill_collection(path, RUNS, after, settings=settings, retry=True)
    assert after.traced == []


def test_a_share_that_tries_a_run_again_counts_whatever_the_other_says(tmp_path):
    path = tmp_path / "many"
    fill_collection(path, RUNS, Tracer(), settings={}, share=(1, 2))  # which has b with seed 1, in index-2-of-2
    done = fill_collection(path, RUNS, Mended(), settings={}, retry=True)
    assert all(run.graph for run in done.runs) and len(done.runs) == len(RUNS)


@pytest.mark.parametrize("torn", ["", '{"prompt": "b", "se'])
def test_what_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path, torn):
    path = tmp_path / "many"
    with pytest.raises(KeyboardInterrupt):
        fill_collection(path, RUNS, Tracer(stop=("b", 1)), settings={"step": 1})
    with (path / "index.jsonl").open("a", encoding="utf-8") as file:
        file.write(torn)
    assert len(read_collection(path).runs) == 3
    second = Tracer()
    resumed = fill_collection(path, RUNS, second, settings={"step": 1})
    assert second.traced == RUNS[3:]
    whole = fill_collection(tmp_path / "whole", RUNS, Tracer(), settings={"step": 1})
    assert resumed.runs == whole.runs
    assert (path / "index.jsonl").read_text() == (tmp_path / "whole" / "index.jsonl").read_text()
    third = Tracer()
    fill_collection(path, [*RUNS[:2], ("a", 7)][:2], third, settings={"step": 1})
    assert third.traced == []


def test_other_settings_other_directories_and_other_writers_are_refused(tmp_path):
    path = tmp_path / "many"
    fill_collection(path, RUNS[:1], Tracer(), settings={"step": 1, "model": "m"})
    with pytest.raises(UserError, match="was begun with step 1, not 2; name another output"):
        fill_collection(path, RUNS, Tracer(), settings={"step": 2, "model": "m"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a collection of graphs; name another output"):
        fill_collection(tmp_path / "other", RUNS, Tracer(), settings={})
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    with sole_writer(path / "index.jsonl"), pytest.raises(UserError, match="Another process is writing"):
        fill_collection(path, RUNS, Tracer(), settings={"step": 1, "model": "m"})
    with pytest.raises(UserError, match="seed 0 is asked for twice"):
        fill_collection(path, [RUNS[0], RUNS[0]], Tracer(), settings={"step": 1, "model": "m"})
    assert not is_collection(tmp_path / "other")


def test_shares_together_are_the_whole(tmp_path):
    path, tracers = tmp_path / "many", [Tracer() for _ in range(3)]
    for part in (2, 0, 1):
        fill_collection(path, RUNS, tracers[part], settings={}, share=(part, 3))
    assert [one.traced for one in tracers] == [RUNS[0::3], RUNS[1::3], RUNS[2::3]]
    whole = fill_collection(tmp_path / "whole", RUNS, Tracer(), settings={})
    by_run = {(run.prompt, run.seed): run for run in read_collection(path).runs}
    assert by_run == {(run.prompt, run.seed): run for run in whole.runs}
    again = Tracer()
    fill_collection(path, RUNS, again, settings={})
    assert again.traced == []
    with pytest.raises(UserError, match="no share 3 of 3"):
        fill_collection(path, RUNS, again, settings={}, share=(3, 3))
    with pytest.raises(UserError, match="Share 3 of 3 is empty, as there are 2 runs; make fewer shares"):
        fill_collection(path, RUNS[:2], again, settings={}, share=(2, 3))


def test_a_run_that_two_shares_traced_counts_once(tmp_path):
    path = tmp_path / "many"
    fill_collection(path, RUNS, Tracer(), settings={}, share=(0, 2))
    text = (path / "index-1-of-2.jsonl").read_text()
    (path / "index-1-of-3.jsonl").write_text(text)
    assert [(run.prompt, run.seed) for run in read_collection(path).runs] == RUNS[::2]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "many"
    fill_collection(path, RUNS, Tracer(), settings={})
    text = (path / "index.jsonl").read_text()
    (path / "index.jsonl").write_text(text.replace('"prompt"', '"promt"', 1))
    with pytest.raises(UserError, match=r"Line 1 of .*index\.jsonl is damaged; take the line out"):
        read_collection(path)
    (path / "collection.json").write_text(json.dumps({"kind": "graphs", "format_version": 9, "settings": {}}))
    with pytest.raises(UserError, match="has format 9, but this version reads 1"):
        read_collection(path)
    (path / "collection.json").write_text("{")
    with pytest.raises(UserError, match=r"collection\.json is damaged"):
        read_collection(path)
    with pytest.raises(UserError, match="is not a collection of graphs"):
        read_collection(tmp_path)
