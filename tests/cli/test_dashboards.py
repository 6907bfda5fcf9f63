"""`difffract dashboards`: a folder of pages from one command, told before it starts, and one sentence for bad input."""

import pytest
from commands import done, run_command, run_json

from difffract_jax.cli.dashboards import DashboardsConfig
from difffract_jax.config import UserError, resolve
from difffract_jax.dashboards.features.record import load_scan

ORGANISM = ("dashboards", "organism", "organism")
QUICK = ("--sites", "img/1", "--batch", "4", "--top", "2", "--per-third", "1")


def test_captions_of_the_organism_become_pages(monkeypatch, capsys, tmp_path):
    texts, out = tmp_path / "labels.json", tmp_path / "out"
    texts.write_text('{"img/1/f159": "my own"}', encoding="utf-8")
    found = done(
        run_json(monkeypatch, capsys, *ORGANISM, "--prompts", 6, *QUICK, "--labels", texts, "--steps", 2, "--out", out)
    )
    assert (found["sites"], found["features"], found["pages"]) == ("img/1", 512, str(out / "index.html"))
    scan = load_scan(out)
    assert len(scan.prompts) == 6 and scan.config["run"]["steps"] == 2
    record = scan.config["provenance"]
    assert record["settings"]["prompts"] == "6" and record["sources"]["transcoders"] == scan.config["transcoders"]
    listed = (out / "data" / "img-1" / "list.js").read_text(encoding="ascii")
    assert '"my own"' in listed and "colour blue (" in listed
    # The same folder again is refused, and made anew if that is asked for.
    again = run_command(monkeypatch, capsys, *ORGANISM, "--prompts", "6", *QUICK, "--out", out)
    assert again.status == 1 and again.err.count("\n") == 1 and "exists already" in again.err
    (out / "mine").write_text("", encoding="utf-8")
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue ring\n", encoding="utf-8")
    arguments = (*ORGANISM, "--prompts", file, *QUICK, "--features", "img/1/f159,img/1/f3", "--steps", 2)
    arguments += ("--overwrite", "--out", out)
    found = done(run_json(monkeypatch, capsys, *arguments))
    assert found["features"] == 2 and load_scan(out).prompts == ("a red circle", "a blue ring")
    assert not (out / "mine").exists()


def test_what_a_scan_takes_is_told_before_it_starts(monkeypatch, capsys, tmp_path):
    found = done(run_json(monkeypatch, capsys, *ORGANISM, "--prompts", 4096, "--dry-run", "--out", tmp_path / "out"))
    assert found["runs"] == "4,096 prompts of 4 steps, twice" and found["features scanned"] == "3,072 of 6 sites"
    assert found["memory for statistics"] == "2.3 MiB" and "MiB" in found["disk in the end, about"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--prompts", "0"), "--prompts is 0"),
        (("--prompts", "absent.txt"), "absent.txt is not a file of prompts"),
        (("--prompts", "4", "--sites", "img/7"), "img/7 does not exist"),
        (("--prompts", "4", "--sites", "red"), "'red' names no sites"),
        (("--prompts", "4", "--features", "img/1/f512"), "features 0 to 511"),
        (("--prompts", "4", "--features", "red"), "'red' is not a feature"),
        (("--prompts", "4", "--labels", "{words}"), "is not a file of labels"),
        (("--prompts", "{words}"), "vocabulary of"),
        (("--prompts", "4", "--out", "{words}"), "is a file, but the pages go to a folder"),
        (("--prompts", "4", "--out", "{folder}"), "is not a folder of dashboards"),
        (("--prompts", "4", "--out", "{folder}/a/b"), "does not exist; create it first"),
        (("--prompts", "4", "--top", "0"), "greater than or equal to 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence(monkeypatch, capsys, tmp_path, given, said):
    words = tmp_path / "words.txt"
    words.write_text("a zebra\n", encoding="utf-8")
    given = [one.format(words=words, folder=tmp_path) for one in given]
    out = () if "--out" in given else ("--out", tmp_path / "out")
    run = run_command(monkeypatch, capsys, *ORGANISM, *given, *out)
    assert run.status == 1 and said in run.err, run.err
    assert run.err.strip().splitlines()[-1].startswith("Error: ") and "Traceback" not in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["words.txt"]


def test_transcoders_of_another_model_are_one_sentence(monkeypatch, capsys, tmp_path):
    from difffract_jax.loading import save_transcoders
    from difffract_jax.models.tiny import TINY
    from difffract_jax.transcoders.transcoder import random_transcoders

    save_transcoders(random_transcoders(TINY), tmp_path / "tcs")
    arguments = ("dashboards", "organism", tmp_path / "tcs", "--prompts", "4", "--out", tmp_path / "out")
    run = run_command(monkeypatch, capsys, *arguments)
    assert run.status == 1 and "The transcoders are 32 wide, but the model is 64 wide" in run.err
    assert not (tmp_path / "out").exists()


def test_other_models_have_no_captions(monkeypatch, capsys, tmp_path):
    run = run_command(monkeypatch, capsys, "dashboards", "flux", "tcs", "--prompts", "64", "--out", tmp_path / "out")
    assert run.status == 1 and "which the organism and its siblings have; give a .txt" in run.err


def test_features_tell_which_sites_are_scanned():
    given = {"model": "m", "transcoders": "t", "prompts": "p"}
    settings = resolve(DashboardsConfig, given | {"features": ("img/1/f3,txt/0/f1", "img/1/f4")})
    assert settings.features == ("img/1/f3", "txt/0/f1", "img/1/f4") and settings.patterns == ("img/1", "txt/0")
    assert resolve(DashboardsConfig, given).patterns == ("*/*",)
    assert resolve(DashboardsConfig, given | {"sites": "img/0-1, txt/*"}).patterns == ("img/0-1", "txt/*")
    with pytest.raises(UserError, match="not a feature"):
        resolve(DashboardsConfig, given | {"features": ("nothing",)})


def test_a_graph_of_other_transcoders_is_refused(monkeypatch, capsys, tmp_path):
    from random_graphs import random_graph

    random_graph(0).with_provenance(transcoders="0" * 64).save(tmp_path / "graph.npz")
    arguments = (*ORGANISM, "--prompts", "4", *QUICK, "--graph", tmp_path / "graph.npz", "--out", tmp_path / "out")
    run = run_command(monkeypatch, capsys, *arguments)
    assert run.status == 1 and "graph.npz was traced with the transcoders 000000000000" in run.err
    assert not (tmp_path / "out").exists()
