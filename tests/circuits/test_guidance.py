"""The laws with guidance by two branches: a step is two evaluations that read the same latents, and both are explained.

The model is the small FLUX.1, whose velocities a run combines as FLUX.2-klein's base model does: it has a pooled
embedding too.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import BRANCHES, NEGATIVE, PROMPT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine, pull_rows
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.checks import edit_runs, grading
from difffract_jax.circuits.checks.edit_runs import run_edits
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.trial_edits import laid_out, trial, units_of
from difffract_jax.circuits.checks.variants import push_edges
from difffract_jax.circuits.editing.interventions import Edit, WholeSite, delta_velocity, edit_model, steer
from difffract_jax.circuits.editing.sweeps import steer_batch
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, SCORE
from difffract_jax.models.pipeline import encode_run, initial_noise, model_velocity, sample, step_inputs
from laws import last_targets, steps_conserved, steps_intervened
from tolerances import TOL, relative_error
from traces import guided_pipeline, make_transcoders

TEXT, AWAY = "a red circle", "a blurred square"
SIZE = {"height": 24, "width": 32, "text_tokens": 16, "steps": 3}
SCALE = 2.5
TOGETHER = 7
"""Targets pulled back together: one program for all graphs of the model."""
PIXELS = "pixels:color=red,minus=blue,box=8,8,24,20"


@cache
def model(dtype):
    """A pipeline, its transcoders, and a run."""
    pipe = guided_pipeline(dtype)
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(1, 2), joint=(0, 1), skip=True, dtype=dtype)
    return pipe, tcs, pipe.plan(**SIZE, guidance=SCALE, negative_prompt=AWAY)


@cache
def made(dtype):
    """The same, and a span of two steps of the run."""
    pipe, tcs, run = model(dtype)
    return pipe, tcs, run, capture_steps(pipe, tcs, TEXT, first=1, last=2, run=run)


@pytest.mark.slow
def test_the_recorded_velocities_are_those_of_the_run(x64):
    pipe, _, run, span = made(jnp.float64)
    assert [(t.info.step, BRANCHES[t.info.branch]) for t in span.traces] == [
        (step, branch) for step in (1, 2) for branch in BRANCHES
    ]
    assert sum(t.info.velocity_weight for t in span.traces[:2]) == 1
    noise = initial_noise(pipe, run, 0)
    entering = z = span.traces[2].record.latents
    for trace in span.traces[2:]:
        assert np.array_equal(trace.record.latents, entering), "both branches read the same latents"
        z = z + trace.info.taken * trace.record.velocity
    end = sample(model_velocity, pipe.transformer, run, encode_run(pipe, TEXT, run), noise)
    assert relative_error(z, end) <= TOL.x64


def test_both_branches_of_all_steps_add_up_and_every_edge_is_its_intervention(x64):
    pipe, tcs, _, span = made(jnp.float64)
    engine = make_engine(span, tcs, (resolve_target(pipe, span, parse_target(PIXELS)),))
    rows, table = last_targets(engine), engine.table
    assert rows.size == TOGETHER
    missed, found = steps_conserved(engine, rows)
    print(f"float64: conservation over both branches and two steps {missed:.1e}")
    assert missed <= TOL.conservation_x64
    moved, replayed = steps_intervened(engine, rows, found)
    assert replayed <= TOL.x64 and moved <= TOL.intervention_x64
    of_other = (table.step[: engine.sources] == 2) & (table.branch[: engine.sources] == NEGATIVE)
    assert table.branch[rows[0]] == PROMPT and not found.edges[0, of_other].any() and found.edges[-1, of_other].any()


@pytest.mark.slow
def test_strong_guidance_over_several_steps_adds_up_in_float32():
    """The weights 7 and -6 of the branches make edges larger than what they leave, but not their error beside them."""
    pipe, tcs, _ = model(jnp.float32)
    run = pipe.plan(**SIZE, guidance=7.0, negative_prompt=AWAY)
    span = capture_steps(pipe, tcs, TEXT, first=0, last=2, run=run)
    engine = make_engine(span, tcs, (resolve_target(pipe, span, parse_target(PIXELS)),))
    table, rng, rows = engine.table, np.random.default_rng(0), [engine.sources]
    for step, branch in [(s, b) for s in range(3) for b in (PROMPT, NEGATIVE)]:
        of = (table.kind == FEATURE) & (table.value > 0) & (table.step == step) & (table.branch == branch)
        rows += rng.choice(np.flatnonzero(of), 4, replace=False).tolist()
    found = pull_rows(engine, np.array(rows), len(rows))
    edges, bias = np.asarray(found.edges, np.float64), np.asarray(found.bias, np.float64)
    scale = np.abs(edges).sum(axis=1) + np.abs(bias)
    missed = np.abs(edges.sum(axis=1) + bias - found.preactivation)
    print(f"float32, guidance 7, three steps: {(missed / scale).max():.1e} of the absolute edges and bias")
    print(
        f"of the output itself, which they exceed {scale[0] / abs(found.preactivation[0]):.0f} times: "
        f"{missed[0] / abs(found.preactivation[0]):.1e}"
    )
    assert (missed / scale).max() <= TOL.conservation_f32


@pytest.mark.slow
def test_a_graph_keeps_its_branches_in_its_file_and_finds_its_run_again(tmp_path):
    pipe, tcs, _, span = made(jnp.float32)
    graph = attribute(span, tcs, target=resolve_target(pipe, span, parse_target(PIXELS)), max_nodes=40)
    assert graph.largest_conservation_error <= TOL.conservation_steps_f32
    assert {*graph.node_branch[graph.node_kind == FEATURE]} == {PROMPT, NEGATIVE}
    graph.save(tmp_path / "graph.npz")
    kept = type(graph).load(tmp_path / "graph.npz")
    assert np.array_equal(kept.node_branch, graph.node_branch)
    run = kept.provenance.traced_run
    assert (run.negative_prompt, run.guidance, run.branches) == (AWAY, SCALE, 2)
    assert run.negative_tokens[3:7] == ("b", "l", "u", "r") and run.tokens[3:6] == ("r", "e", "d")
    again = capture_again(pipe, tcs, kept)
    named = np.isin(kept.node_kind, (FEATURE, ERROR, INPUT, OUTPUT))
    assert np.array_equal(again.engine.table.branch[again.rows[named]], kept.node_branch[named])
    edges = np.random.default_rng(0).choice(np.flatnonzero(named[kept.edge_source]), 40)
    source, target = kept.edge_source[edges], kept.edge_target[edges]
    pushed = push_edges(again.engine, again.rows[np.unique(source)], again.rows[np.unique(target)])
    pushed = pushed[np.searchsorted(np.unique(source), source), np.searchsorted(np.unique(target), target)]
    scale = kept.target_scale[np.searchsorted(kept.target_node, target)]
    assert np.all(np.abs(pushed - kept.edge_attribution[edges]) <= TOL.direct_f32 * scale)


@pytest.mark.slow
def test_scores_of_both_branches_add_up_to_what_scaled_queries_do(x64):
    pipe, tcs, _, span = made(jnp.float64)
    target = resolve_target(pipe, span, parse_target(PIXELS))
    settings = {"max_nodes": 4, "min_attribution": 1e-6, "attention": "explained", "max_scores": 60}
    graph = attribute(span, tcs, target=target, **settings)
    (told,) = graph.provenance.attention
    assert abs(told.total - told.forward) <= TOL.conservation_x64 * told.absolute and told.absolute > 0
    assert graph.conservation_error.max() <= TOL.conservation_x64
    scores = np.flatnonzero((graph.node_kind == SCORE) & (graph.node_head >= 0))
    assert {*graph.node_branch[scores].tolist()} == {PROMPT, NEGATIVE}
    # Within a step no score of one branch has a source in the other: only through the latents of earlier steps.
    source, target = (end[np.isin(graph.edge_target, scores)] for end in (graph.edge_source, graph.edge_target))
    same = (graph.node_step[source] == graph.node_step[target]) & (graph.node_kind[source] != INPUT)
    assert np.array_equal(graph.node_branch[source][same], graph.node_branch[target][same])


@pytest.fixture
def traced():
    """The graph of a colour in one guided step, which holds both branches, and its run, in float64."""
    with jax.enable_x64(True):
        pipe, tcs, run = model(jnp.float64)
        span = capture_steps(pipe, tcs, TEXT, first=1, last=1, run=run)
        target = resolve_target(pipe, span, parse_target(PIXELS))
        graph = attribute(span, tcs, target=target, max_nodes=60, expansion_batch=TOGETHER, min_attribution=1e-7)
        yield graph, capture_again(pipe, tcs, graph)


def test_a_groups_edit_acts_in_both_branches_and_dose_0_changes_nothing(traced):
    graph, again = traced
    units = units_of(again, graph)[:4]
    branches = graph.node_branch[np.concatenate([unit.nodes for unit in units])]
    assert {*branches.tolist()} == {PROMPT, NEGATIVE} and all(unit.norm > 0 and unit.mean > 0 for unit in units)
    rows = again.rows[graph.targets]
    trials = [trial(units, 0.0), trial(units, 0.5), trial(units[:1], -1.0)]
    for mode in ("direct", "full"):
        found = run_edits(again.engine, rows, laid_out(again.engine, trials), mode, moved=True)
        assert np.array_equal(found.values[0], found.values[1]), "dose 0 is exact"
        assert found.distance[1] <= TOL.x64 < found.distance[2] and found.active[1] == found.active[0] > 0
        if mode == "direct":
            moved = found.values[:, 0] - found.values[0, 0]
    # In the frozen map with all else held, a change is the dose times the edges of both branches' features.
    table, pulled = again.engine.table, pull_rows(again.engine, rows, 1).edges[0]
    columns = zip(
        *(c[: pulled.size].tolist() for c in (table.step, table.stream, table.block, table.feature)), strict=True
    )
    keys = list(columns)
    for number, chosen, dose in ((2, units, 0.5), (3, units[:1], -1.0)):
        own = {unit.key for unit in chosen}
        mine = [i for i, key in enumerate(keys) if key in own and table.kind[i] == FEATURE]
        assert {*table.branch[mine].tolist()} == {PROMPT, NEGATIVE}
        assert moved[number] == pytest.approx(dose * pulled[mine].sum(), rel=1e-8)


@pytest.mark.slow
def test_a_guided_graph_is_graded(traced, monkeypatch):
    graph, again = traced
    monkeypatch.setattr(edit_runs, "LEAST", 8)
    pipe, tcs, _ = model(jnp.float64)
    grade, found = grading.grade(
        pipe, tcs, again, graph, units=lambda units: units[:2], seeds=1, readings=("propagated",)
    )
    assert grade.no_op <= 1e-8 and grade.number is not None and len(grade.seeds) == 2
    for row in found["edits"]:
        assert all(np.isfinite(row[name]) for name in ("predicted", "propagated", "full", "distance", "active"))
        assert (row["all steps"] is None) == (abs(row["dose"]) != 1)
    alone = [row for row in found["edits"] if row["size"] == 1]
    predicted, propagated = (np.array([row[name] for row in alone]) for name in ("predicted", "propagated"))
    assert np.corrcoef(predicted, propagated)[0, 1] > 0.9


@pytest.mark.slow
def test_a_feature_of_one_branch_is_traced_alone():
    pipe, tcs, run = model(jnp.float32)
    trace = capture(pipe, tcs, TEXT, step=1, run=run, branch="negative")
    target = strongest_feature(trace, tcs, "img", 2)
    assert target.branch == "negative" and str(target).endswith("~negative")
    graph = attribute(trace, tcs, target=target, max_nodes=10)
    assert graph.largest_conservation_error <= TOL.conservation_f32
    assert {*graph.node_branch} == {NEGATIVE}
    with pytest.raises(UserError, match="asked for in the branch prompt, but what is traced is negative"):
        attribute(trace, tcs, target=replace(target, branch="prompt"), max_nodes=10)


def test_what_a_branch_cannot_give_is_one_sentence():
    pipe, tcs, run = model(jnp.float32)
    with pytest.raises(UserError, match="the velocity of a step is that of both; record both, with capture_steps"):
        capture(pipe, tcs, TEXT, run=run, output=True)
    with pytest.raises(UserError, match="branch must be prompt in this run, .* but got 'negative'"):
        capture(pipe, tcs, TEXT, run=pipe.plan(**SIZE, guidance=1.0), branch="negative")


@pytest.mark.slow
def test_an_edit_in_one_branch_is_that_branch_s_alone():
    """Steering reads and writes the branch that is named: the other evaluation of every step stays as it was."""
    pipe, tcs, run = model(jnp.float32)
    branch = "negative"
    edit = Edit.parse(f"img/0~{branch}=scale:3")
    params = edit_model(pipe.transformer, tcs, [edit], run)
    prompts = encode_run(pipe, TEXT, run).branches
    z = initial_noise(pipe, run, 0)
    for number, prompt in enumerate(prompts):
        inputs = step_inputs(run, prompt, z, 1)
        theirs = delta_velocity(params, inputs, jnp.asarray(2 + number), run.grid)
        plain = pipe.transformer(inputs, run.grid)
        assert np.array_equal(theirs, plain) == (BRANCHES[number] != branch)


@pytest.mark.slow
def test_many_edited_images_are_the_single_ones():
    pipe, tcs, run = model(jnp.float32)
    edits = [Edit.parse("txt/1~negative=scale:2"), Edit.parse("img/2=zero")]
    sites = [WholeSite("txt", 1), WholeSite("img", 2)]
    found = steer_batch(pipe, tcs, [TEXT, TEXT], [edits, []], [0, 0], form="replace", run=run, replaced=sites)
    for latents, own in zip(found.latents, (edits, []), strict=True):
        alone = steer(pipe, tcs, TEXT, own, form="replace", run=run, replaced=sites)
        assert relative_error(latents, alone.latents) <= TOL.f32_run
    assert not np.array_equal(*found.latents)
