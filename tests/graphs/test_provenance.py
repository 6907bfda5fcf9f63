"""What a graph says of itself: typed, unchanged by a file, the same in files of earlier releases.

`tests/data/formats` holds graphs as release 0.1.0 wrote them when provenance was a dictionary: one of the embedded
model at one step (`graph-v1`), pruned and grouped, averaged with another, through the reference's JSON, and one of two
targets over two steps with products in bfloat16; and documents of the reference (`foreign`) and of a viewer.
"""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from difffract_jax.address import flux_layout
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.json_values import beyond, merge_json
from difffract_jax.graphs.provenance import (
    AttributionSettings,
    KnownRun,
    Origin,
    PooledPath,
    Provenance,
    Rounding,
    TraceInfo,
)
from difffract_jax.graphs.reduction import GroupingSettings, PruningSettings, Scores
from random_graphs import random_graph

FORMATS = Path(__file__).parents[1] / "data" / "formats"
KINDS = ("pruned", "combined", "steps", "reference", "foreign", "viewer")
FILES = ("graph-v1", *(f"graph-v1-{kind}" for kind in KINDS))
MODEL = "7132c2f37ef1bbf1fdc12bf253d2e3ef8ebbf6457e029e67316344374f8a09ba"


def record_of(path):
    return json.loads(np.load(path)["metadata"].tobytes())


@pytest.mark.parametrize("name", FILES)
def test_an_earlier_file_loads_and_is_written_as_it_was(name, tmp_path):
    old, new = FORMATS / f"{name}.npz", tmp_path / "new.npz"
    Graph.load(old).save(new)
    assert record_of(new) == record_of(old)
    before, after = np.load(old), np.load(new)
    assert set(before) == set(after)
    for array in set(before) - {"metadata"}:
        assert before[array].dtype == after[array].dtype and before[array].tobytes() == after[array].tobytes()


def test_the_facts_of_an_earlier_file_are_typed():
    provenance = Graph.load(FORMATS / "graph-v1.npz").provenance
    assert provenance.run == TraceInfo(
        prompt="a red circle above a blue square",
        cut="",
        seed=0,
        step=1,
        sigmas=(1.0, 0.75, 0.5, 0.25, 0.0),
        grid=(6, 6),
        text_tokens=20,
        tokens=("▁a", "▁red", "▁circle", "▁above", "▁a", "▁blue", "▁square", "</s>", *["<pad>"] * 12),
        guidance=None,
        recorded=(0, 1, 2, 3),
        layout=flux_layout(2, 2),
        include_padding=False,
        latents_given=False,
        model=MODEL,
    )
    assert provenance.attribution == AttributionSettings(
        target="img/1/f159@9", max_nodes=4, expansion_batch=50, min_attribution=0.2
    )
    assert provenance.attribution.targets == ("img/1/f159@9",)
    assert provenance.steps == (1,) and provenance.target_weights == (1.0,)
    path = PooledPath(value=916.2352227209403, without=130.98710954491, share=0.8570376838865481)
    assert provenance.pooled_path == (path,) and provenance.command == "trace"
    assert provenance.settings["noise"] == "jax" and provenance.sources["model"] == MODEL
    unsaid = provenance.pruning, provenance.precision, provenance.combined, provenance.shared
    assert unsaid == (None, None, None, None) and not provenance.extra
    assert provenance.known.grid == (6, 6)
    assert provenance.layout == flux_layout(2, 2) and provenance.traced_run is provenance.run


def test_pruned_grouped_rounded_and_combined_graphs_say_so():
    pruned, steps, combined = (
        Graph.load(FORMATS / f"graph-v1-{name}.npz").provenance for name in ("pruned", "steps", "combined")
    )
    assert pruned.pruning == PruningSettings(mode="standard", node_threshold=0.8, edge_threshold=0.98)
    assert pruned.scores.unpruned == Scores(0.3809656001114109, 0.7221229379761794)
    assert pruned.grouping == GroupingSettings(threshold=0.05, map_weight=0.25)
    assert steps.precision == Rounding(
        products="bf16", edge_error=0.0020416648483730536, conservation_error=1.0506025328663396e-05
    )
    assert steps.attribution.targets == ("pixels:color=red,box=0,0,32,16", "velocity:contrast=a blue circle")
    assert steps.target_weights == (2.0, 1.0) and steps.steps == (2, 3) and len(steps.pooled_path) == 2
    assert combined.run is None and combined.shared.layout == flux_layout(2, 2) and combined.shared.prompt is None
    assert combined.combined.operation == "average" and combined.combined.occurs_in["img/0/f77"] == 0.5
    assert combined.combined.graphs[0] == Origin(
        prompt="a red circle above a blue square", seed=0, step=1, file="graph-v1.npz"
    )


def test_documents_of_other_tools_keep_their_own_words():
    reference, viewer = (Graph.load(FORMATS / f"graph-v1-{name}.npz").provenance for name in ("reference", "viewer"))
    assert reference.reference_config["circuit_max_nodes"] == 4 and reference.run.step == 1
    foreign = Graph.load(FORMATS / "graph-v1-foreign.npz").provenance
    assert foreign.pruning is None and set(foreign.extra) == {"circuit_tracing", "pruning"}
    assert viewer.viewer["slug"] == "flux-red-cube" and viewer.run is None and viewer.known == KnownRun()
    with pytest.raises(UserError, match="does not tell the run that it explains"):
        _ = viewer.traced_run
    with pytest.raises(UserError, match="does not say which blocks its model has"):
        _ = viewer.layout


def test_what_a_later_release_adds_is_kept_wherever_it_stands(tmp_path):
    arrays = dict(np.load(FORMATS / "graph-v1.npz"))
    record = record_of(FORMATS / "graph-v1.npz")
    record |= {"note": [1, {"a": None}], "steps": [1]}
    record["trace"]["height"] = 48
    record["pooled_path"][0]["norm"] = 2.0
    path = tmp_path / "later.npz"
    np.savez(path, **arrays | {"metadata": np.frombuffer(json.dumps(record).encode(), np.uint8)})
    graph = Graph.load(path)
    assert graph.provenance.extra == {"note": [1, {"a": None}], "trace": {"height": 48}, "pooled_path": [{"norm": 2.0}]}
    assert graph.provenance.run == Graph.load(FORMATS / "graph-v1.npz").provenance.run
    graph.with_provenance(steps=(2,)).save(path)
    assert record_of(path) == record | {"steps": [2]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trace": 3}, "trace is 3, but should be"),
        ({"trace": {"grid": [1]}}, "trace.grid.1 is missing"),
        ({"trace": {"seed": "7"}}, 'trace.seed is "7", but should be a valid integer'),
        ({"attribution": {"target": "a"}}, "attribution.max_nodes is missing"),
        ({"attribution": {"target": 3}}, "attribution.target is 3, but should be a valid string"),
        ({"scores": {"unpruned": {"replacement": "x"}}}, 'scores.unpruned.replacement is "x", but should be'),
        ({"pooled_path": [{"value": 1, "share": 1}]}, "pooled_path.0.without is missing"),
        ({"combined": []}, "combined is .., but should be"),
        ({"command": 1}, "command is 1, but should be a valid string"),
    ],
)
def test_a_fact_of_the_wrong_type_is_refused_by_name(change, sentence):
    with pytest.raises(UserError, match=f"^g.npz is damaged: in its metadata, {sentence}.*; give the file as") as error:
        Provenance.from_json(change, "g.npz")
    assert "\n" not in str(error.value)


def test_metadata_that_are_not_named_values_are_refused(tmp_path):
    arrays = dict(np.load(FORMATS / "graph-v1.npz"))
    np.savez(tmp_path / "list.npz", **arrays | {"metadata": np.frombuffer(b'["format_version"]', np.uint8)})
    with pytest.raises(UserError, match="list.npz is damaged: its metadata are not named values"):
        Graph.load(tmp_path / "list.npz")


def test_a_graph_has_one_run_or_what_several_share():
    run = Graph.load(FORMATS / "graph-v1.npz").provenance.run
    with pytest.raises(ValueError, match="`run` or `shared`, not both"):
        Provenance(run=run, shared=KnownRun())
    with pytest.raises(FrozenInstanceError):
        run.seed = 3


def test_facts_are_replaced_one_by_one():
    graph = random_graph(0).with_provenance(steps=(0, 1)).with_provenance(transcoders="t")
    assert graph.provenance == Provenance(steps=(0, 1), transcoders="t")
    with pytest.raises(TypeError, match="stesp"):
        graph.with_provenance(stesp=(0,))
    assert replace(graph.provenance, steps=()) == Provenance(transcoders="t")


def test_what_is_told_stands_over_what_was_left_over():
    record = {"a": 1, "b": {"c": 2, "d": [{"e": 3}, {}]}, "f": []}
    understood = {"b": {"c": 2, "d": [{}, {}]}}
    rest = beyond(record, understood)
    assert rest == {"a": 1, "b": {"d": [{"e": 3}, {}]}, "f": []} and merge_json(understood, rest) == record
    assert merge_json({"a": 2, "b": {"d": [1]}}, rest) == {"a": 2, "b": {"d": [1]}, "f": []}
    assert beyond(understood, understood) == {}
