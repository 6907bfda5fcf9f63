"""What is printed: tables for people, JSON for machines, progress apart from both; images that know their origin."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from difffract_jax.cli.bars import byte_progress, progress
from difffract_jax.cli.graph_tables import expanded_by_step, graph_summary
from difffract_jax.cli.organism import parameter_counts
from difffract_jax.cli.output import emit, replacing
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.names import node_names
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.images import save_image
from random_graphs import random_graph, random_output_graph

RESULT = {
    "name": "x",
    "share": 0.123456789,
    "rows": [{"from": "img/0/f1", "attribution": 1.5}, {"from": "b", "attribution": 2}],
}


def test_machines_get_one_json_object(capsys):
    emit(RESULT, as_json=True)
    assert json.loads(capsys.readouterr().out) == RESULT


def test_people_get_every_value_in_a_table(capsys):
    emit(RESULT)
    out = capsys.readouterr().out
    assert all(text in out for text in ("name", "0.1235", "rows", "from", "img/0/f1", "1.5"))


def test_names_and_prompts_are_shown_as_they_were_given(capsys):
    emit({"prompt": "a [red] fox :cat: [/b]", "[bold] rows": [{"[x]": "run[new]/y"}]})
    out = capsys.readouterr().out
    assert all(text in out for text in ("a [red] fox :cat: [/b]", "[bold] rows", "[x]", "run[new]/y"))


def test_words_that_a_newcomer_asks_for_are_explained_where_they_stand(capsys):
    emit({"nodes": {"feature": 3, "rest": 2}, "scores": [{"of": "pinned"}], "strongest": "an interest"})
    out = capsys.readouterr().out
    assert "rest: features that were not expanded" in out and "pinned: the kept features" in out
    emit({"nodes": {"feature": 3}, "strongest": "an interest, frozen pooled path", "rests": 1})
    assert ": " not in capsys.readouterr().out.replace('{"feature": 3}', "")


def test_a_long_value_is_wrapped_and_not_cut(capsys):
    address = "http://localhost/" + "x" * 300
    emit({"open": address})
    assert address in "".join(capsys.readouterr().out.split())


def test_a_narrow_terminal_gets_columns_that_can_be_read_in_several_tables(capsys, monkeypatch):
    names = ("success", "collateral", "precision", "recall")
    row = {"way": "circuit"} | {f"share of {name}": 0.123456 for name in names}
    monkeypatch.setenv("COLUMNS", "40")
    emit({"result": [row, row | {"way": "SAE"}]})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 40
    assert out.count("0.1235") == 8 and out.count("circuit") == out.count("further columns") + 1 > 1
    assert all(name in out for name in names)


def test_a_file_gets_each_row_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    emit({"x": 1, "y": "z" * 200, "result": [{f"column {number}": f"cell{number} of many" for number in range(30)}]})
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.endswith(" ") for line in lines)
    (line,) = [line for line in lines if "cell0" in line]
    assert line.index("cell0 of many") < line.index("cell29 of many")


def test_progress_goes_to_the_error_stream(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a bar is drawn on terminals alone
    with progress("Working") as advance:
        advance(1, 2)
    out, err = capsys.readouterr()
    assert out == "" and "Working" in err


def test_a_bar_of_bytes_counts_them(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with byte_progress("Converting") as advance:
        advance(1_500_000, 6_000_000)
    out, err = capsys.readouterr()
    assert out == "" and "Converting" in err and "1.5/6.0 MB" in re.sub(r"\x1b\[[\d;?]*\w", "", err)


def test_a_bar_says_when_a_program_is_compiled(monkeypatch):
    shown = []
    monkeypatch.setattr(Progress, "update", lambda self, task, **changes: shown.append(changes))
    with progress("Tracing"):
        jax.jit(lambda x: x * 3 + len(shown))(1.0).block_until_ready()
    told = [changes["description"] for changes in shown]
    assert told[:2] == ["Tracing (compiling)", "Tracing"] and told[-1] == "Tracing"
    jax.jit(lambda x: x * 5 + len(shown))(1.0).block_until_ready()
    assert len(shown) == len(told), "afterwards nobody listens"


def test_an_image_carries_how_it_was_made(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 4, 3)).astype(np.uint8)
    save_image(pixels, tmp_path / "a.png", {"seed": 3, "prompt": "ein Füchs"})
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert json.loads(image.text["difffract_jax"]) == {"seed": 3, "prompt": "ein Füchs"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_summary_counts_nodes_and_names_the_strongest_sources():
    graph = random_graph(3)
    told = graph_summary(graph, most=3)
    assert sum(told["nodes"].values()) == graph.node_kind.size and told["edges"] == graph.edge_source.size
    assert told["nodes"]["feature"] == np.sum(graph.node_kind == FEATURE)
    incoming = np.abs(graph.edge_attribution[graph.edge_target == graph.target])
    assert [abs(row["attribution"]) for row in told["strongest sources"]] == sorted(map(float, incoming))[::-1][:3]


def test_a_summary_tells_which_steps_features_were_expanded_in():
    graph = random_output_graph(3)
    names = [name for node, name in enumerate(node_names(graph)) if node in set(graph.target_node.tolist())]
    features = [name for name in names if re.search(r"/f\d", name)]
    early, late = (sum(name.endswith(f"#{step}") for name in features) for step in (0, 1))
    assert early + late == len(features) and late > 0
    assert expanded_by_step(graph) == {0: early, 1: late}
    told = graph_summary(graph.with_provenance(steps=(0, 1, 2)))
    assert told["features expanded"] == f"step 0: {early}, step 1: {late}, step 2: 0"
    assert "features expanded" not in graph_summary(random_graph(3))


def test_parameters_are_counted_per_part():
    pipe = random_pipeline()
    counts = parameter_counts(pipe)
    assert list(counts) == [f"{name} parameters" for name in ("transformer", "t5", "clip", "vae")]
    assert parameter_counts(pipe.transformer) == {"transformer parameters": counts["transformer parameters"]}


def test_files_that_a_block_replaced_are_told_of_when_it_ends_well(tmp_path, capsys):
    kept, changed, new = (tmp_path / name for name in ("kept", "changed", "new"))
    for path in (kept, changed):
        path.write_text("old")
    with replacing(tmp_path, tmp_path / "nowhere"):
        for path in (changed, new):
            with atomic_file(path) as partial:
                partial.write_text("new")
    told = f"Note: {changed} existed and was replaced; --out names another output.\n"
    assert capsys.readouterr() == ("", told)
    with pytest.raises(KeyError), replacing(changed):
        changed.write_text("newer")
        raise KeyError
    with replacing(changed, option="--grade"), atomic_file(changed) as partial:
        partial.write_text("newest")
    assert capsys.readouterr().err == told.replace("--out", "--grade")
    with replacing(kept, changed):
        kept.write_text("newer")
        changed.write_text("newest")
    assert f"{kept}, {changed} existed and were replaced" in capsys.readouterr().err
