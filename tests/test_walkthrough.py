"""The walkthrough, and the notebook on training, run as they stand, made small."""

import re
from pathlib import Path

import pytest
from notebooks import run, sources

import difffract_jax as dfx
from difffract_jax.dashboards.notebook import GraphPage, Page
from difffract_jax.graphs.groups import identity


@pytest.mark.slow
def test_the_walkthrough_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    few = [re.sub(r"max_nodes=\d+", "max_nodes=10", source) for source in sources("walkthrough")]
    few = [re.sub(r"prompts=\d+", "prompts=4", source) for source in few]
    few = [re.sub(r"edges=\d+, ablations=\d+", "edges=10, ablations=4", source) for source in few]
    names, shown = run("walkthrough", few)
    pages = [one for one in shown if isinstance(one, Page)]
    assert [type(page) for page in pages] == [Page, GraphPage]
    assert all(row["holds"] for row in names["found"]["exactness"])
    page, graph = names["page"], dfx.Graph.load("circuit.npz")
    assert page.groups.graph == identity(graph)
    assert dfx.graphs.read_groups(Path("circuit.groups.json"), graph) == page.groups
    assert (names["swept"].images[:, 1:] != names["swept"].images[:, :1]).any()


@pytest.mark.slow
def test_transcoders_of_one_s_own_are_trained_and_used(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    few = [re.sub(r"^STEPS = \d+", "STEPS = 60", source, flags=re.MULTILINE) for source in sources("train-your-own")]
    few = [re.sub(r"\[:32\]", "[:4]", re.sub(r"_count=\d+", "_count=4", source)) for source in few]
    few = [re.sub("batch=512", "batch=64", re.sub("buffer_rows=8192", "buffer_rows=1024", source)) for source in few]
    names, shown = run("train-your-own", few)
    assert 0 < names["trained"].metrics["fvu"] < 1 and names["mine"].scan.feature.stream == "img"
    assert dfx.load_transcoders("my-transcoders").sites.names == ("img/0", "img/1")
    assert [type(page) for page in shown if isinstance(page, Page)] == [GraphPage, Page]
