"""Every public name's values show themselves in at most 15 lines, whatever they hold; notebooks get escaped HTML."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import difffract_jax as dfx
from difffract_jax.circuits.editing.ranking import Ranked
from difffract_jax.circuits.editing.sweeps import Sweep
from difffract_jax.circuits.notation.labels import Detected, Label, Labels
from difffract_jax.circuits.trace.capture import Span
from difffract_jax.graphs.provenance import AttributionSettings
from difffract_jax.models.pipeline import GeneratedImage
from random_graphs import random_graph

PROMPT = "a <script>alert(1)</script>\nfox"
SIZES: dict[str, Any] = {"height": 32, "width": 32, "text_tokens": 16, "steps": 2}
MOST, WIDE = 15, 600
WITH_HTML = ("load_pipeline", "random_pipeline", "load_transcoders", "random_transcoders", "capture", "capture_steps")
WITH_HTML += ("attribute", "Graph", "prune", "read_graph")
WITHOUT_VALUE = {"__version__", "UserError", "models", "transcoders", "circuits", "graphs"}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every public function returns, and an instance of every public class, on the tiny random pipeline.

    What would take long to compute, and is but arrays of some shape, is shown up.
    """
    folder = tmp_path_factory.mktemp("reprs")
    pipe = dfx.random_pipeline()
    tcs = dfx.random_transcoders(pipe.config.transformer)
    trace = dfx.capture(pipe, tcs, PROMPT, output=True, run=pipe.plan(**SIZES))
    span = Span((trace, trace._replace(info=replace(trace.info, step=1))))
    settings = AttributionSettings(target="img/1/f3", max_nodes=9, expansion_batch=3, min_attribution=0.0)
    graph = random_graph(0).with_provenance(run=trace.info, attribution=settings, transcoders=tcs.source)
    graph.save(folder / "graph.npz")
    feature, never = dfx.Feature("img", 1, 3, tuple(range(0, 99, 2))), Detected("", "", 0.5, 0, "img")
    edit, image = (
        dfx.Edit(feature, "zero"),
        GeneratedImage(np.zeros((32, 32, 3), np.uint8), trace.record.latents, PROMPT),
    )
    shown: dict[str, Any] = {
        "enable_compile_cache": folder / "programs",  # of a test run, it is set already
        "make_mesh": dfx.make_mesh({"data": 1}, jax.devices()[:1]),
        "load_pipeline": pipe,
        "save_pipeline": dfx.save_pipeline(pipe, folder / "pipeline"),
        "load_transcoders": tcs,
        "save_transcoders": dfx.save_transcoders(tcs, folder / "transcoders"),
        "generate": image,
        "random_pipeline": pipe,
        "random_transcoders": tcs,
        "capture": trace,
        "capture_steps": span,
        "prepare": dfx.prepare(trace, tcs),
        "replacement": dfx.replacement(trace, tcs),
        "attribute": graph,
        "strongest_feature": feature,
        "Feature": feature,
        "Graph": graph,
        "prune": dfx.prune(graph),
        "compare": dfx.compare(graph, random_graph(1)),
        "read_graph": dfx.read_graph(folder / "graph.npz"),
        "Edit": edit,
        "steer": image,
        "sweep": Sweep(np.zeros((9, 9, 32, 32, 3), np.uint8), np.zeros((9, 9)), ("original",) * 9, (0,) * 9, PROMPT),
        "rank_features": [Ranked(feature, 0.5, 1.0, 0.5, 3, 4)],
        "load_labels": Labels({f"img/{i}": (Label(never, never, 0.0, ()),) * 40 for i in range(40)}, tcs.source, {}),
    }
    shown["feature"] = dfx.feature("img/1/f159", pipe, tcs, prompts=[PROMPT] * 99)
    assert shown.keys() == {*dfx.__all__} - WITHOUT_VALUE, "a public name has no value here"
    return shown


NAMES = sorted({*dfx.__all__} - WITHOUT_VALUE)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_value_shows_itself_in_a_few_lines(values: dict[str, Any], name: str) -> None:
    lines = repr(values[name]).splitlines()
    assert 1 <= len(lines) <= MOST and max(map(len, lines)) <= WIDE


@pytest.mark.parametrize("name", WITH_HTML)
def test_a_notebook_gets_a_short_escaped_table(values: dict[str, Any], name: str) -> None:
    page = values[name]._repr_html_()
    assert page.startswith("<table>") and page.count("<tr>") <= MOST and "<script>" not in page
    if name in ("capture", "capture_steps", "attribute"):
        assert "&lt;script&gt;" in page


def test_parts_of_public_values_show_themselves_too(values: dict[str, Any]) -> None:
    pipe, tcs, trace, graph = (values[name] for name in ("load_pipeline", "load_transcoders", "capture", "prune"))
    parts = [pipe.transformer, pipe.t5, pipe.clip, pipe.vae, pipe.config, tcs.stacks["img"], tcs.config]
    parts += [trace.record, trace.info, graph.provenance, graph.provenance.known, graph.summary(), graph.top(50)]
    for part in parts:
        lines = repr(part).splitlines()
        assert 1 <= len(lines) <= MOST and max(map(len, lines)) <= 2 * WIDE, type(part)


def test_what_is_shown_is_what_is_there(values: dict[str, Any]) -> None:
    pipe, tcs, trace = (values[name] for name in ("load_pipeline", "load_transcoders", "capture"))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(pipe.transformer))
    assert f"{numbers:,} float32" in repr(pipe) and pipe.source[:12] in repr(pipe) and pipe.source not in repr(pipe)
    assert f"{tcs.config.features} features each" in repr(tcs) and tcs.source[:12] in repr(tcs)
    assert "step 0 of 2" in repr(trace) and "4 x 4 of the image" in repr(trace)
    assert "steps 0 to 1 of 2" in repr(values["capture_steps"]) and "and the velocity" in repr(values["capture_steps"])


def test_modules_and_records_are_still_trees(values: dict[str, Any]) -> None:
    for name in ("load_pipeline", "load_transcoders", "capture", "capture_steps"):
        leaves, structure = jax.tree.flatten(values[name])
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(values[name]) and len(jax.tree.leaves(again)) == len(leaves)


def test_a_tree_of_shapes_shows_itself(values: dict[str, Any]) -> None:
    shapes = jax.eval_shape(lambda: values["load_transcoders"].stacks["img"])
    assert 1 <= len(repr(shapes).splitlines()) <= MOST
