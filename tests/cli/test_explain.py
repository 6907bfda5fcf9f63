"""`heads` and `effects` from end to end on the organism, and their failures, one sentence each."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from commands import done, run_command, run_json

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import GREY, colour_of, parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.editing.sweeps import steer_batch
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask, tokens_in
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import Combined, Provenance
from difffract_jax.graphs.pruning import prune
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders

PROMPT = "a red circle left of a blue square"
RED = "pixels:color=red,box=0,0,24,48"
HEADS = ("heads", "organism", "organism")
EFFECTS = ("effects", "organism", "organism", PROMPT)
FLOAT32 = 1e-5
"""Sums of float32 edges, over the largest."""


@pytest.fixture
def difffract(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `difffract ARGUMENTS` in this process; returns exit status, stdout and stderr."""

    return partial(run_command, monkeypatch, capsys)


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `difffract ARGUMENTS --json`, which must succeed; returns the result."""

    return lambda *arguments: done(run_json(monkeypatch, capsys, *arguments))


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    """The pipeline and its transcoders."""
    return load_pipeline("organism"), load_transcoders("organism")


@pytest.fixture(scope="module")
def graphs(organism: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graph of an output, and graphs that heads cannot be told of."""
    folder = tmp_path_factory.mktemp("graphs")
    pipe, tcs = organism
    trace = capture(pipe, tcs, PROMPT, seed=0, step=1, output=True)
    graph = attribute(trace, tcs, target=resolve_target(pipe, trace, parse_target(RED)), max_nodes=30)
    graph.save(folder / "output.npz")
    replace(graph, edge_attribution=graph.edge_attribution * np.float32(1.01)).save(folder / "wrong.npz")
    graph.with_provenance(steps=(0, 1)).save(folder / "steps.npz")
    graph.with_provenance(combined=Combined(operation="average", graphs=(), occurs_in={})).save(folder / "combined.npz")
    prune(graph).save(folder / "summed.npz")
    replace(graph, provenance=Provenance()).save(folder / "untold.npz")
    return folder


@pytest.mark.parametrize(("name", "below"), [("output", 4), pytest.param("feature", 2, marks=pytest.mark.slow)])
def test_heads_add_up_to_the_graph_s_edges(name: str, below: int, organism: Any, result: Any, graphs: Path) -> None:
    pipe, tcs = organism
    if name == "feature":
        trace = capture(pipe, tcs, PROMPT, seed=0, step=1)
        graph = attribute(trace, tcs, target=strongest_feature(trace, tcs, "img", 1), max_nodes=30)
        graph.save(graphs / "feature.npz")
    heads = below * pipe.transformer.config.heads
    graph = Graph.load(graphs / f"{name}.npz")
    told = result(*HEADS, graphs / f"{name}.npz", "--top", 2)
    assert told["target"] == node_names(graph)[0]
    rows = told["heads"]
    assert [row["head"] for row in rows[2:]] == [f"{heads - 2} others", "no hop"]
    scale = graph.target_abs_sum[0]
    assert sum(row["sum"] for row in rows) == pytest.approx(graph.target_sum[0], abs=FLOAT32 * scale)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert told["edges of the graph that heads add up to"] > 10
    assert told["worst error, over the largest"] <= FLOAT32
    assert rows[0]["absolute"] >= rows[1]["absolute"] >= abs(rows[1]["its loading"]) > 0
    assert told["settings"]["top"] == 2 and told["sources"].keys() == {"model", "transcoders"}


def test_edges_that_heads_do_not_add_up_to_are_told(result: Any, graphs: Path) -> None:
    told = result(*HEADS, graphs / "wrong.npz", "--top", 1)
    assert told["worst error, over the largest"] == pytest.approx(0.01 / 1.01, rel=0.01)


def test_another_target_is_found_by_its_name(difffract: Any, result: Any, graphs: Path) -> None:
    graph = Graph.load(graphs / "output.npz")
    names = node_names(graph)
    node = int(graph.target_node[5])
    told = result(*HEADS, graphs / "output.npz", "--target", names[node])
    assert told["target"] == names[node] != names[0]
    scale = graph.target_abs_sum[5]
    assert told["sum of its edges"] == pytest.approx(graph.target_sum[5], abs=FLOAT32 * scale)
    status, out, _ = difffract(*HEADS, graphs / "output.npz", "--target", names[node])
    assert status == 0 and names[node] in out and "no hop" in out


def test_parts_of_a_score_sum_to_the_model_s(result: Any, graphs: Path, organism: tuple[Any, Any]) -> None:
    told = result(*HEADS, graphs / "output.npz", "--score", "double/1/h1@img12,txt4", "--top", 3)
    trace = capture(*organism, PROMPT, seed=0, step=1, output=True)
    frozen, text = trace.record.frozen[0], trace.info.text_tokens
    q, k = (np.asarray(a, np.float64) for a in (frozen.q[1, text + 12, 1], frozen.k[1, 4, 1]))
    score = q @ k / np.sqrt(q.size)
    parts = [told[name] for name in ("constant", "linear terms of the query", "linear terms of the key", "pairs")]
    scale = np.abs(parts).max()
    assert told["score"] == pytest.approx(score, abs=FLOAT32 * scale)
    assert sum(parts) == pytest.approx(score, abs=FLOAT32 * scale) and min(map(abs, parts)) > 0
    assert told["error of their sum"] <= FLOAT32 * scale
    table = told["score by what makes the query, and the key"]
    assert sum(row[side] for row in table for side in ("features", "errors", "inputs", "constant")) == pytest.approx(
        score, abs=FLOAT32 * scale
    )
    pairs = told["strongest pairs of features"]
    assert len(pairs) == 3 and abs(pairs[0]["product"]) >= abs(pairs[2]["product"]) > 0
    for row in pairs:
        # Only block 0's features lie below block 1.
        assert Feature.parse(row["query"]).block == Feature.parse(row["key"]).block == 0
        assert row["query detects"] == str(load_labels("organism").of(Feature.parse(row["query"])))


@pytest.mark.slow
def test_parts_of_a_centred_score_sum_to_its_distance_from_its_query_s_mean(
    result: Any, graphs: Path, organism: tuple[Any, Any]
) -> None:
    told = result(*HEADS, graphs / "output.npz", "--score", "double/1/h1@img12,txt4", "--centred", "--top", 3)
    trace = capture(*organism, PROMPT, seed=0, step=1, output=True)
    frozen, text = trace.record.frozen[0], trace.info.text_tokens
    q, k = (np.asarray(a, np.float64) for a in (frozen.q[1, text + 12, 1], frozen.k[1, :, 1]))
    scores = k @ q / np.sqrt(q.size)
    pattern = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    parts = [told[name] for name in ("constant", "linear terms of the query", "linear terms of the key", "pairs")]
    scale = np.abs(parts).max()
    assert told["above its query's mean"] == pytest.approx(scores[4] - pattern @ scores, abs=FLOAT32 * scale)
    assert sum(parts) == pytest.approx(told["above its query's mean"], abs=FLOAT32 * scale)
    assert "score" not in told and told["error of their sum"] <= FLOAT32 * scale


def test_effects_are_total_effects_in_names_to_paste(result: Any, organism: tuple[Any, Any]) -> None:
    pipe, tcs = organism
    told = result(*EFFECTS, "--target", RED, "--seed", 3, "--box", "0,0,24,48", "--top", 400)
    span = capture_steps(pipe, tcs, PROMPT, last=3, seed=3)
    found = total_effects(span, tcs, resolve_target(pipe, span, parse_target(RED)))
    inside = np.isin(np.arange(36), tokens_in(box_mask("0,0,24,48", (48, 48)), (6, 6)))
    labels = load_labels("organism")
    assert told["step"] == 3 and told["image tokens counted"] == "18 of 36"
    seen = set()
    for row in told["features"]:
        feature, side = Feature.parse(row["feature"]), row["side"]
        group = ("img", "txt", "single").index(feature.stream)
        mine = np.asarray(found.index[group][feature.steps[0], feature.block]) == feature.feature
        effect = (np.asarray(found.features[group])[feature.steps[0], feature.block] * mine).sum(axis=1)
        if feature.stream == "single":
            effect = effect[:20] if side == "txt" else effect[20:]
        assert row["effect"] == pytest.approx(effect[inside].sum() if side == "img" else effect.sum(), rel=1e-4)
        assert Edit.parse(f"{row['feature']}=zero") and row["detects"] == str(labels.of(feature))
        seen.add((feature.stream, side, feature.steps[0]))
    assert {("img", "img", 0), ("txt", "txt", 1), ("single", "img", 3)} <= seen
    assert told["text embedding"] == pytest.approx(float(found.text.sum()), rel=1e-4)
    assert told["noise"] == pytest.approx(float(found.noise[inside].sum()), rel=1e-4)
    assert [(row["step"], row["stream"]) for row in told["sums"][:5]] == [
        *((0, stream) for stream in ("img", "txt", "single", "single")),
        (1, "img"),
    ]


@pytest.mark.slow
def test_without_a_feature_the_image_moves_against_its_effect(result: Any, organism: tuple[Any, Any]) -> None:
    rows = result(*EFFECTS, "--target", RED, "--top", 200)["features"]
    chosen = [row for row in rows if row["effect"] > 0][:3] + [row for row in rows if row["effect"] < 0][:3]
    assert len(chosen) == 6
    edits = [[], *([Edit.parse(f"{row['feature']}=zero")] for row in chosen)]
    images = steer_batch(*organism, [PROMPT] * 7, edits, [0] * 7, batch=7).images
    inside, red = jnp.asarray(box_mask("0,0,24,48", (48, 48))), jnp.asarray((1.0, 0.0, 0.0))
    values = [float(colour_of(jnp.asarray(one / np.float32(255)), inside, red, jnp.asarray(GREY))) for one in images]
    for row, value in zip(chosen, values[1:], strict=True):
        assert np.sign(value - values[0]) == -np.sign(row["effect"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*HEADS, "steps.npz"), "The graph spans the steps 0 to 1, but heads and scores are those of one step; trace"),
        ((*HEADS, "summed.npz"), "is summed over positions, as by `difffract prune`"),
        ((*HEADS, "untold.npz"), "does not tell the run that it explains; give an .npz"),
        ((*HEADS, "combined.npz"), "combines the circuits of several runs"),
        ((*HEADS, "none.npz"), "none.npz does not exist; give a graph file"),
        ((*HEADS, "output.npz", "--centred"), "--centred does nothing without --score; add that, or leave it out."),
        ((*HEADS, "output.npz", "--target", "img/1/f159@99"), "The graph has no node `img/1/f159@99`; did you mean `"),
        (
            (*HEADS, "output.npz", "--target", "input img@3"),
            "Nothing leads into `input img@3`, which is a source alone",
        ),
        (
            (*HEADS, "output.npz", "--score", "double/1/1@img0"),
            "is not an attention score; write BLOCK/hHEAD@QUERY,KEY",
        ),
        ((*HEADS, "output.npz", "--score", "single/2/h0@img0,img1"), "There is no block single/2; the model has"),
        ((*HEADS, "output.npz", "--score", "double/1/h2@img0,img1"), "The block double/1 has heads 0 to 1, but got 2"),
        ((*HEADS, "output.npz", "--score", "double/1/h0@img36,img1"), "There is no token img36; the run has 36 image"),
        ((*HEADS, "output.npz", "--score", "double/1/h0@img0,txt20"), "There is no token txt20; the run has 36 image"),
        ((*EFFECTS, "--target", "img/1/f12"), "img/1/f12 is a feature, but total effects are those on an output"),
        ((*EFFECTS, "--target", "pixels:colour=red"), "has no option colour; pixels takes box, color, mask, minus"),
        ((*EFFECTS, "--target", RED, "--step", 4), "4"),
        ((*EFFECTS, "--target", RED, "--box", "0,0,99,9"), "The box 0,0,99,9 is empty or leaves the image"),
        (
            (*EFFECTS, "--target", RED, "--box", "0,0,9,9", "--mask", "m.png"),
            "Both --box and --mask describe the region",
        ),
        ((*EFFECTS, "--target", RED, "--latents", "no.npy"), "no.npy"),
        ((*EFFECTS, "--target", RED, "--set", "top=0"), "`top` was 0"),
        (("effects", "organism", "organism-saes", PROMPT, "--target", RED), "Tracing needs transcoders"),
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
    placed = [graphs / str(one) if str(one).endswith(".npz") else one for one in arguments]
    status, out, err = difffract(*placed)
    assert (status, out) == (1, "")
    assert err.startswith("Error: ") and err.count("\n") == 1 and told in err
    assert not list(tmp_path.iterdir())


def test_wrong_usage_exits_with_2(difffract: Any) -> None:
    for arguments in (HEADS, EFFECTS, (*EFFECTS, "--target", RED, "--step", "1-2")):
        status, out, err = difffract(*arguments)
        assert (status, out) == (2, "") and "Traceback" not in err
