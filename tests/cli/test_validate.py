"""`validate` from end to end on the organism, and its failures, one sentence each."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_command
from PIL import Image

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.checks import grading
from difffract_jax.circuits.checks.summaries import EVERY
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.graphs.files.reference_json import write_reference_json
from difffract_jax.graphs.grade import Grade, grade_of
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.provenance import Combined, Provenance
from difffract_jax.graphs.pruning import prune
from difffract_jax.loading import load_pipeline, load_transcoders
from tolerances import REFERENCE

PROMPT = "a red circle left of a blue square"
VALIDATE = ("validate", "organism", "organism")
SMALL = ("--edges", 20, "--ablations", 8, "--draws", 1)


@pytest.fixture
def difffract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `difffract ARGUMENTS` in this process; returns exit status, stdout and stderr."""

    return partial(run_command, monkeypatch, capsys)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph, and graphs that cannot be validated."""
    folder = tmp_path_factory.mktemp("graphs")
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    trace = capture(pipe, tcs, PROMPT, seed=0, step=1)
    graph = attribute(trace, tcs, target=strongest_feature(trace, tcs, "single", 0), max_nodes=60)
    graph.save(folder / "graph.npz")
    wrong = graph.edge_attribution.copy()
    wrong += (1e-3 * graph.target_abs_sum.max()).astype(np.float32)
    replace(graph, edge_attribution=wrong).save(folder / "wrong.npz")
    prune(graph).save(folder / "summed.npz")
    write_reference_json(prune(graph), folder / "reference.json")
    replace(graph, provenance=Provenance()).save(folder / "untold.npz")
    run = graph.provenance.run
    assert run is not None
    for name, change in {
        "noise": {"run": replace(run, latents_given=True)},
        "step": {"steps": (9,)},
        "activations": {"settings": {"activations": "a.npz"}},
        "seed": {"run": replace(run, seed=3)},
        "combined": {"combined": Combined(operation="average", graphs=(), occurs_in={})},
    }.items():
        graph.with_provenance(**change).save(folder / f"{name}.npz")
    first = strongest_feature(trace, tcs, "img", 0)
    attribute(trace, tcs, target=first, max_nodes=5).save(folder / "bare.npz")
    return folder


def graded(*_: Any, circuit: dict[str, Any], **options: Any) -> tuple[Grade, dict[str, Any]]:
    """Stands for `grading.grade`, which takes longer than all else; `test_validation.py` has the true one."""
    assert set(circuit) == {"recovered", "lost"} and options["reproducible"] and options["latents"] is None
    row = {"size": 1, "dose": 1.0, "predicted": 0.2, "full": 0.15, "other": [0.3, -0.1], "control": 0.001}
    row |= {"direct": 0.2, "propagated": 0.2, "live": 0.2}
    return grade_of([row], seeds=(0, 1, 2), **circuit), {"edits": [row], "errors": [{"prediction": "the graph"}]}


def test_a_sound_graph_is_reported_and_graded(
    difffract: Any, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grading, "grade", graded)
    more = ("--grade", tmp_path / "graded.npz", "--out", tmp_path / "v", "--json")
    status, out, _ = difffract(*VALIDATE, graphs / "graph.npz", *SMALL, *more)
    assert status == 0
    told, stored = json.loads(out), json.loads((tmp_path / "v" / "validation.json").read_text())
    assert stored["exactness"] == told["exactness"] and all(row["holds"] for row in told["exactness"])
    assert [row["checked"] for row in told["exactness"]][-1] == 20
    perturbed = stored["perturbation"]
    assert perturbed["ablated"] == 8 and {row["prediction"] for row in perturbed["rows"]} == {"influence", "change"}
    *own, _, every = perturbed["rows"]  # the target's own come first
    assert all(row["of"] != EVERY and row["pairs"] <= 8 for row in own) and every["of"] == EVERY
    assert len(perturbed["pairs"]["measured"]) == len(perturbed["pairs"]["change"]) >= every["pairs"] > 8
    assert sum(perturbed["pairs"]["own"]) == own[0]["pairs"]
    curves = stored["completeness"]["curves"]
    assert [one["reading"] for one in curves] == ["propagated", "live", "full"]
    pruned = stored["completeness"]["pruned"]
    assert any(row["size"] == pruned and row["ranking"] == "influence" for row in curves[0]["rows"])
    assert stored["provenance"]["settings"]["edges"] == 20 and stored["provenance"]["sources"]["model"]
    page = (tmp_path / "v" / "report.md").read_text()
    assert "Every bar is held." in page and "their mean over the run's positions" in page
    again = Graph.load(tmp_path / "graded.npz")
    assert str(again.provenance.grade) == told["grade"]["words"] and again.provenance.grade.seeds == (0, 1, 2)
    assert told["grade"]["words"].startswith("Predicts single edits well; with other seeds fairly.")
    assert told["grade"]["words"] in page and np.array_equal(
        again.edge_attribution, Graph.load(graphs / "graph.npz").edge_attribution
    )
    for name in ("perturbation.png", "completeness.png", "grade.png"):
        with Image.open(tmp_path / "v" / name) as figure:
            assert min(figure.size) > 300


def test_a_wrong_edge_ends_with_status_1_and_is_named(difffract: Any, graphs: Path) -> None:
    status, out, err = difffract(*VALIDATE, graphs / "wrong.npz", *SMALL)
    assert status == 1 and "NO" in out and "edge = its direct" in out
    assert err.startswith("Error: The graph is not what its run gives (edge = its direct intervention, ")
    assert err.count("\n") == 1 and "conservation" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("organism", "organism", "summed.npz"), "is summed over positions, as by `difffract prune`, and single edges"),
        (("organism", "organism", "reference.json"), "is summed over positions"),
        (("organism", "organism", "untold.npz"), "does not tell the run that it explains; give an .npz"),
        (("organism", "organism", "noise.npz"), "give the same noise again, with --latents or --noise"),
        (("organism", "organism", "step.npz"), "The graph names step 9, but its run has the steps 0 to 3"),
        (("organism", "organism", "activations.npz"), "traced from the activations in a.npz; give that file with"),
        (("organism", "organism", "seed.npz"), "The run captured anew"),
        (("organism", "organism", "combined.npz"), "combines the circuits of several runs"),
        (("organism", "organism", "bare.npz"), "has no features besides its targets"),
        (("organism", "organism", "none.npz"), "none.npz does not exist; give a graph file"),
        ((REFERENCE / "pipeline", "organism", "graph.npz"), "The graph was traced with another model"),
        (("organism", REFERENCE / "transcoders", "graph.npz"), "The graph was traced with another set of transcoders"),
        (("organism", "organism", "graph.npz", "--out", "no/such"), "The folder no of the output directory such"),
        (
            ("organism", "organism", "graph.npz", "--grade", "no/g.npz"),
            "The folder no of the output file g.npz does not",
        ),
        (("organism", "organism", "graph.npz", "--grade", "graph.json"), "must end in .npz, but got graph.json"),
        (("organism", "organism", "graph.npz", "--latents", "no.npy"), "no.npy"),
        (("organism", "organism", "graph.npz", "--activations", "a.npz", "--noise", "jax"), "leave out latents and"),
        (("organism", "organism", "graph.npz", "--set", "draws=0"), "`draws` was 0"),
    ],
)
def test_a_failure_is_one_sentence(
    arguments: tuple[Any, ...],
    told: str,
    difffract: Any,
    graphs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tcs, graph, *more = arguments
    status, out, err = difffract("validate", model, tcs, graphs / graph, *more)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and told in err
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_2(difffract: Any) -> None:
    for arguments in (VALIDATE, (*VALIDATE, "g.npz", "--ablation", "both")):
        status, out, err = difffract(*arguments)
        assert (status, out) == (2, "") and "Traceback" not in err
