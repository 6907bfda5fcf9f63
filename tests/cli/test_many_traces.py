"""`trace --prompts`: many runs into one directory, each as it is traced alone; and what is said of them all."""

import csv
import json
from pathlib import Path

import pytest
from commands import run_command, run_json

from difffract_jax.cli import main as cli
from difffract_jax.cli.many_traces import read_seeds
from difffract_jax.config import UserError
from difffract_jax.graphs.collection import read_collection
from difffract_jax.graphs.graph import Graph

PROMPTS = ("a red circle left of a blue square", "a green cross above a yellow circle", "a blue cross")
TRACE = ("trace", "organism", "organism")
TARGET = ("--target", "img/1/f159", "--step", "1", "--max-nodes", "5")


@pytest.fixture
def difffract(monkeypatch, capsys):
    return lambda *arguments: run_command(monkeypatch, capsys, *map(str, arguments))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Three prompts with two seeds, traced."""
    home = tmp_path_factory.mktemp("many")
    (home / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    given = ("--prompts", home / "prompts.txt", "--seeds", "0..1", "--out", home / "graphs")
    with pytest.MonkeyPatch.context() as patch, (home / "out").open("w", encoding="utf-8") as out:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.argv", ["difffract", *TRACE, *TARGET, *map(str, given), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return home


def test_every_run_is_traced_as_it_is_alone(many, tmp_path, difffract):
    collection = read_collection(many / "graphs")
    assert [(run.prompt, run.seed) for run in collection.runs] == [(p, seed) for p in PROMPTS for seed in (0, 1)]
    assert difffract(*TRACE, PROMPTS[1], *TARGET, "--seed", 1, "--out", tmp_path / "one.npz").status == 0
    alone, one = Graph.load(tmp_path / "one.npz"), Graph.load(many / "graphs" / collection.runs[3].graph)
    assert (alone.edge_attribution == one.edge_attribution).all() and (alone.node_feature == one.node_feature).all()
    assert one.provenance.run == alone.provenance.run
    assert one.provenance.settings["prompt"] == PROMPTS[1] and one.provenance.settings["prompts"] is None


def test_what_is_there_is_not_traced_again_and_other_settings_are_refused(many, difffract):
    given = (*TRACE, *TARGET, "--prompts", many / "prompts.txt", "--seeds", "0-1", "--out", many / "graphs")
    before = {file: file.stat().st_mtime_ns for file in (many / "graphs" / "graphs").iterdir()}
    run = difffract(*given, "--json")
    assert json.loads(run.out)["traced"] == 6
    assert before == {file: file.stat().st_mtime_ns for file in (many / "graphs" / "graphs").iterdir()}
    refused = difffract(*given, "--max-nodes", 6)
    assert refused.status == 1 and "was begun with --max-nodes 5, not 6; name another output" in " ".join(
        refused.err.split()
    )


def test_a_prompt_in_which_the_target_is_inactive_is_noted(many, tmp_path, difffract):
    (tmp_path / "two.txt").write_text("a red circle\n" * 1 + "a red square\n", encoding="utf-8")
    given = ("--prompts", tmp_path / "two.txt", "--target", "txt/1/f3@0", "--step", "1", "--out", tmp_path / "graphs")
    run = difffract(*TRACE, *given)
    assert run.status == 1 and "Not one of 2 runs could be traced; the first: txt/1/f3@0 is inactive" in run.err
    assert all("inactive" in one.problem for one in read_collection(tmp_path / "graphs").runs)
    again = difffract(*TRACE, *given, "--retry")
    assert again.status == 1 and "Not one of 2 runs could be traced" in again.err
    alone = difffract(*TRACE, "a red circle", *given[2:], "--retry")
    assert alone.status == 1 and "--retry tries runs of many again" in " ".join(alone.err.split())


def test_edges_of_all_runs_are_averaged_and_written(many, tmp_path, difffract, monkeypatch, capsys):
    refused = difffract("combine", "intervals", many / "graphs")
    assert refused.status == 1 and "takes at least 10 prompts" in refused.err
    status, told, _ = run_json(
        monkeypatch, capsys, "combine", "average", str(many / "graphs"), "--out", str(tmp_path / "a.npz")
    )
    assert status == 0 and told["graphs"] == 6
    ten = [many / "graphs"] * 2  # twelve runs of three prompts are three units
    assert "there are 3" in difffract("combine", "intervals", *ten).err
    same = [one for file in sorted((many / "graphs" / "graphs").glob("*.npz")) for one in [file] * 2]
    assert difffract("combine", "intervals", *same).status == 1


def test_intervals_and_contrasts_are_shown_and_written(many, tmp_path, difffract):
    sets = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for number, file in enumerate(sorted((many / "graphs" / "graphs").glob("*.npz")) * 2):
            graph = Graph.load(file)
            known = graph.provenance.known
            path = tmp_path / name / f"{number}.npz"
            graph.with_provenance(
                run=None, shared=known.__class__(**{**vars(known), "prompt": f"{name} {number}"})
            ).save(path)
        sets.append(sorted((tmp_path / name).glob("*.npz")))
    run = difffract("combine", "intervals", *sets[0], "--out", tmp_path / "edges.csv", "--json")
    told = json.loads(run.out)
    assert told["runs"] == told["prompts or seeds"] == 12
    rows = list(csv.DictReader((tmp_path / "edges.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in told["edges of all runs"]]
    assert len(rows) == told["edges"] > 0
    shown = difffract("combine", "intervals", *sets[0]).out
    assert "into the target" in shown and "img/1/f159" in shown
    assert difffract("combine", "contrast", *[many / "graphs"] * 2).status == 1  # three pairs


def test_sets_traced_with_other_settings_are_not_held_against_each_other(many, tmp_path, difffract):
    (tmp_path / "other").mkdir()
    head = json.loads((many / "graphs" / "collection.json").read_text(encoding="utf-8"))
    head["settings"]["max_nodes"] = 6
    (tmp_path / "other" / "collection.json").write_text(json.dumps(head), encoding="utf-8")
    for name in ("contrast", "intervals"):
        run = difffract("combine", name, many / "graphs", tmp_path / "other")
        assert run.status == 1 and "different settings (max_nodes 5 and 6), and edges would differ" in run.err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((PROMPTS[0], "--prompts", "p.txt"), "Both PROMPT and --prompts name what shall run"),
        (("--seeds", "0-3"), "PROMPT is missing; give the prompt of all seeds"),
        ((), "PROMPT is missing; give the prompt of the run"),
        ((PROMPTS[0], "--seeds", "0-3", "--seed", "1"), "Both --seed and --seeds name what shall run"),
        ((PROMPTS[0], "--seeds", "5-3"), "count down; write 3-5"),
        ((PROMPTS[0], "--share", "1/2"), "--share divides many runs; leave it out"),
        ((PROMPTS[0], "--seeds", "0-3", "--share", "3/2"), "share must be which of how many, as in 2/4, but got '3/2'"),
        ((PROMPTS[0], "--seeds", "0-3,2"), "name one twice"),
        ((PROMPTS[0], "--seeds", "0-3", "--out", "many.npz"), "--out many.npz is a graph file; name a directory"),
        ((PROMPTS[0], "--seeds", "0-3", "--out", "gs://bucket"), "gs://bucket is a whole bucket; name a folder in it"),
        ((PROMPTS[0], "--seeds", "0-1", "--share", "3/3"), "--share 3/3 is empty, as there are 2 runs"),
        ((PROMPTS[0], "--seeds", "0-3", "--export-json", "g.json"), "--export-json describes one run"),
        ((PROMPTS[0], "--seeds", "0-3", "--pages", "pages"), "--pages shows the features of one graph"),
        (
            (PROMPTS[0], "--seeds", "0-3", "--out", str(Path(__file__).parent)),
            "exists already and is not a collection of graphs",
        ),
        (("--prompts", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_does_not_go_together_is_refused(given, sentence, difffract, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = difffract(*TRACE, *given, *TARGET)
    assert run.status == 1 and sentence in " ".join(run.err.split())
    assert not list(tmp_path.iterdir())


def test_seeds_are_numbers_and_ranges():
    assert read_seeds("0..2, 7,9-9") == [0, 1, 2, 7, 9]
    with pytest.raises(UserError, match="are more than 100,000"):
        read_seeds("0-100000")
