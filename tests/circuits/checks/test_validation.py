"""A graph held against its model: what is exact is so in float64, and a wrong graph is found out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import pull_rows, targets_of
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.checks import completeness, edit_runs, grading
from difffract_jax.circuits.checks.completeness import Sets, by_influence, candidates, curve, values_of
from difffract_jax.circuits.checks.edit_runs import run_edits
from difffract_jax.circuits.checks.faithfulness import ablate, perturb
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.trial_edits import controls_of, laid_out, trial, units_of
from difffract_jax.circuits.checks.validation import failed_checks, validate
from difffract_jax.circuits.checks.variants import push_edges
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.config import UserError
from difffract_jax.graphs.grade import grade_of
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, REST
from difffract_jax.graphs.pruning import prune
from difffract_jax.models.pipeline import encode, model_velocity, plan_run, step_inputs
from tolerances import TOL, relative_error
from traces import JOINT, TEXT, layer_of, make_exact

PIXELS = "pixels:color=red,box=0,0,16,16"
TOGETHER = 10
"""Targets pulled back together, everywhere: one program for each number of steps."""


@pytest.fixture(scope="module")
def made():
    """A pixel target's graph over one step, and one over two, each with its run."""
    jax.config.update("jax_enable_x64", True)
    exact = make_exact(seed=2, text_tokens=8, img=(0, 1, 2), txt=(1,), joint=(0, 1), skip=True, output=True)
    span = capture_steps(
        exact.pipe, exact.tcs, "a red circle", first=1, last=2, run=exact.pipe.plan(height=24, width=32, text_tokens=8)
    )
    found = []
    for trace in (exact.trace, span):
        target = resolve_target(exact.pipe, trace, parse_target(PIXELS))
        graph = attribute(trace, exact.tcs, target=target, max_nodes=60, expansion_batch=TOGETHER, min_attribution=1e-6)
        found.append((capture_again(exact.pipe, exact.tcs, graph), graph))
    yield exact, *found
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("steps", (pytest.param(1, marks=pytest.mark.slow), 2))
def test_the_push_forward_of_every_kind_of_source_is_its_edge(made, steps):
    again, graph = made[steps]
    table, rng = again.engine.table, np.random.default_rng(0)
    sources = []
    for kind in (FEATURE, ERROR, INPUT):
        for stream in range(3):
            there = np.flatnonzero((table.kind == kind) & (table.stream == stream) & (table.value > 0))
            sources += rng.choice(there, min(there.size, 6), replace=False).tolist()
    sources, targets = np.array(sources, np.int64), again.rows[graph.target_node[:TOGETHER]]
    pulled = pull_rows(again.engine, targets, TOGETHER).edges[:, sources].T
    pushed = push_edges(again.engine, sources, targets)
    assert np.count_nonzero(pulled) > 50
    assert relative_error(pushed, pulled) <= TOL.x64


def test_perturbing_is_ablating_in_one_step(made):
    exact, (again, graph), _ = made
    rows = again.rows[np.flatnonzero(graph.node_kind == FEATURE)]
    features, readouts = (targets_of(again.engine, part, 0) for part in (rows[:5], rows))
    before = ablate(exact.replacement, features._replace(feature=features.feature * 0 + 10**6), readouts)
    after = ablate(exact.replacement, features, readouts)
    assert np.abs(after - before).max() > 0
    assert relative_error(perturb(again.engine, rows[:5], rows), after - before) <= 1e-8


def test_perturbing_an_earlier_step_is_the_model_run_on_from_there(made):
    exact, _, (again, graph) = made
    first = graph.node_step == 1
    node = int(np.flatnonzero((graph.node_kind == FEATURE) & first & (graph.node_block == 1))[0])
    moved = perturb(again.engine, again.rows[[node]], again.rows[graph.targets])[0, 0]
    # By hand: the first step's velocity without the feature, one Euler step, and the model itself.
    prepared, info = again.engine.steps[0], again.engine.infos[0]
    feature = targets_of(again.engine, again.rows[[node]], 0)
    name = ("img", "txt")[int(feature.group[0])]
    stack, slot = exact.tcs.stacks[name], exact.tcs.sites.groups[name].index(int(feature.layer[0]))
    vector = -float(graph.node_value[node]) * stack.dec.kernel[slot, feature.feature[0]]
    from difffract_jax.circuits.checks.faithfulness import live_reading

    change = [jnp.zeros_like(y) for y in prepared.record.mlp_out]
    group = int(feature.group[0])
    change[group] = change[group].at[feature.layer[0], feature.position[0]].set(vector)
    velocity = live_reading(prepared, tuple(change)).velocity
    z = prepared.record.latents + (info.sigmas[2] - info.sigmas[1]) * velocity
    run = plan_run(exact.pipe.config, height=24, width=32, text_tokens=8)
    inputs = step_inputs(run, encode(exact.pipe, "a red circle", 8), z, 2)
    live = jax.jit(lambda model, inputs: model_velocity(model, inputs, jnp.int32(2), info.grid))
    last = live(exact.pipe.transformer, inputs)
    output, record = again.engine.outputs[0], again.engine.steps[1].record
    expected = jnp.vdot(output.velocity, last - record.velocity) + jnp.vdot(output.latents, z - record.latents)
    # The value in the graph is a float32, and the conditioning of the sampler another rounding than the record's.
    assert moved == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("steps", "mode"), [(1, "live"), (2, "full")])
def test_keeping_all_and_removing_none_is_the_run(made, steps, mode):
    again, graph = made[steps]
    units, places = candidates(again, graph)
    order = by_influence(graph, places)
    sets = Sets(jnp.zeros(3, jnp.int32), jnp.array([-1, 0, -1], jnp.int32), jnp.array([False, True, True]))
    found = values_of(again, graph, units, [order], sets, mode)
    assert relative_error(found[:2], np.full(2, graph.target_preactivation[0])) <= TOL.x64
    assert abs(found[2] - found[0]) > 1e-6 * abs(found[0])


def test_one_program_serves_the_two_frozen_readings(made, monkeypatch):
    _, (again, graph), _ = made
    units, _ = candidates(again, graph)
    count = units.value.size
    given = (again, graph, units, [np.arange(count)])
    sizes = np.linspace(1, count - 1, 7).astype(np.int32)
    sets = Sets(jnp.zeros(8, jnp.int32), jnp.asarray([-1, *sizes], jnp.int32), jnp.zeros(8, bool))
    live = values_of(*given, sets, "live")
    programs = completeness._run_sets._cache_size()
    propagated = values_of(*given, sets, "propagated")
    assert completeness._run_sets._cache_size() == programs
    assert relative_error(live[0], propagated[0]) <= TOL.x64
    assert relative_error(live, propagated) > 100 * TOL.x64
    monkeypatch.setattr(completeness, "SWITCHED", ())
    assert relative_error(propagated, values_of(*given, sets, "propagated")) <= TOL.x64
    assert completeness._run_sets._cache_size() == programs + 1


def test_in_the_direct_reading_what_is_kept_adds_up_by_edges(made):
    _, (again, graph), _ = made
    units, places = candidates(again, graph)
    order, table = by_influence(graph, places), again.engine.table
    pulled = pull_rows(again.engine, again.rows[graph.targets], TOGETHER)
    edges = pulled.edges[0]
    size = 7
    sets = Sets(jnp.zeros(2, jnp.int32), jnp.full(2, size, jnp.int32), jnp.array([False, True]))
    kept, removed = values_of(again, graph, units, [order], sets, "direct", ablation="zero")
    inside = {key for key, row in places.items() if row in order[:size]}
    features = np.flatnonzero(table.kind[: edges.size] == FEATURE)
    keys = zip(
        *(c[features].tolist() for c in (table.step, table.branch, table.stream, table.block, table.feature)),
        strict=True,
    )
    mine = np.array([key in inside for key in keys])
    whole = pulled.preactivation[0]
    assert kept == pytest.approx(whole - edges[features[~mine]].sum(), rel=TOL.x64)
    assert removed == pytest.approx(whole - edges[features[mine]].sum(), rel=TOL.x64)
    assert 0 < mine.sum() < mine.size and kept != removed


def test_a_mean_is_taken_over_live_positions_of_a_stream(made):
    exact, (again, _), _ = made
    record, found = exact.trace.record, completeness.mean_values(again.engine.steps[0])
    z = layer_of(exact.tcs.stacks["joint"], 1).encode(record.mlp_in[JOINT][1], record.t)
    live = np.asarray(record.replaceable[JOINT])
    text = np.arange(live.size) < 8
    for side, rows in enumerate((live & text, live & ~text)):
        assert relative_error(found[JOINT][1, side], np.mean(z[rows], axis=0)) <= TOL.x64
    assert found[TEXT].shape[:2] == (3, 1) and not np.any(found[TEXT][0])


def test_a_curve_ends_where_nothing_is_left_to_ablate(made):
    _, (again, graph), _ = made
    units, _ = candidates(again, graph)
    found = curve(again, graph, [3, 10**9], "propagated", ablation="zero", draws=2)
    assert {row["size"] for row in found["rows"]} == {3}
    assert [(row["ranking"], row["draw"]) for row in found["rows"]] == [
        *(("influence", 0), ("largest value", 0), ("random", 0), ("random", 1))
    ]
    everything = Sets(jnp.zeros(1, jnp.int32), jnp.full(1, units.value.size, jnp.int32), jnp.zeros(1, bool))
    order = [np.arange(units.value.size)]
    value = values_of(again, graph, units, order, everything, "propagated", ablation="zero")
    assert relative_error(value, np.array([graph.target_preactivation[0]])) <= TOL.x64


def test_a_sound_graph_holds_every_bar_and_a_wrong_edge_is_found(made):
    _, _, (again, graph) = made
    options = {"edges": 0, "ablations": 4, "draws": 1, "readings": ("propagated",)}
    done = []
    found = validate(again, graph, **options, progress=lambda *at: done.append(at))
    assert failed_checks(found) is None and done[-1] == (len(done), len(done))
    checked = {row["kind"]: row for row in found["exactness"]}
    assert checked["edges"]["checked"] == np.sum(graph.node_kind[graph.edge_source] != REST)
    assert checked["conservation"]["worst"] <= TOL.conservation_x64
    # A share of its own target's size, the least edge's: no other check can see it.
    single = np.flatnonzero(graph.node_kind[graph.edge_source] != REST)
    wrong, edge = graph.edge_attribution.copy(), int(single[np.argmin(np.abs(graph.edge_attribution[single]))])
    place = int(np.flatnonzero(graph.target_node == graph.edge_target[edge])[0])
    wrong[edge] += 1e-4 * (graph.target_abs_sum[place] + abs(graph.target_bias[place]))
    told = failed_checks(validate(again, replace(graph, edge_attribution=wrong), **options))
    assert told is not None and "edge = its direct intervention, 0.0001 where" in told and ";" not in told.split(")")[0]
    sums = replace(graph, target_sum=graph.target_sum + 1e-3 * (graph.target_abs_sum + np.abs(graph.target_bias)))
    told = failed_checks(validate(again, sums, **options))
    assert told is not None and "edges + bias = pre-activation, 0.001 where" in told


def test_an_edit_of_dose_0_changes_nothing_and_the_frozen_map_s_add_up_by_edges(made, monkeypatch):
    monkeypatch.setattr(edit_runs, "LEAST", 8)
    _, (again, graph), _ = made
    units = units_of(again, graph)
    assert len(units) > 3 and [abs(unit.effect) for unit in units] == sorted(
        (abs(u.effect) for u in units), reverse=True
    )
    trials = [trial(units, 0.0), trial(units[:1], -1.0)]
    edits, targets = laid_out(again.engine, trials), again.rows[graph.targets]
    found = run_edits(again.engine, targets, edits, "full", moved=True)
    nothing, off = found.values[:, 0][[0, 1]], found.values[2, 0]
    # Bit for bit what an edit of nothing gives, and the run itself.
    assert nothing[0] == nothing[1] == pytest.approx(graph.target_preactivation[0], rel=TOL.x64)
    assert off != nothing[0] and found.distance[2] > 1e-3 and max(found.distance[:2]) <= 1e-8
    assert found.active[0] == found.active[1] > 0
    # In the frozen map with all else held, a unit's change is its dose times its edges into the target.
    moved = run_edits(again.engine, targets, laid_out(again.engine, [trial(units[:2], 0.5)]), "direct").values
    pulled = pull_rows(again.engine, targets, TOGETHER).edges[0]
    keys = {unit.key for unit in units[:2]}
    table = again.engine.table
    columns = (c[: pulled.size].tolist() for c in (table.step, table.stream, table.block, table.feature))
    mine = [i for i, key in enumerate(zip(*columns, strict=True)) if key in keys and table.kind[i] == FEATURE]
    assert moved[1, 0] - moved[0, 0] == pytest.approx(0.5 * pulled[mine].sum(), rel=1e-8)


def test_no_feature_is_the_control_of_two_units(made):
    _, (again, graph), _ = made
    units = units_of(again, graph)
    assert units
    # One unit over and over draws from the same five again and again: until nothing of its site is left.
    found = controls_of(again, graph, [units[0]] * 200, seed=0)
    drawn = [pair[0].key for pair in found if pair is not None]
    assert len(drawn) > 1 and len(set(drawn)) == len(drawn) and found[-1] is None
    assert all(key[:3] == units[0].key[:3] for key in drawn)


@pytest.mark.slow
def test_a_graph_is_graded_in_its_own_run_and_with_other_seeds(made, monkeypatch):
    monkeypatch.setattr(edit_runs, "LEAST", 8)
    exact, (again, graph), _ = made
    grade, found = grading.grade(
        exact.pipe, exact.tcs, again, graph, units=lambda units: units[:4], seeds=2, readings=("propagated",)
    )
    edits = found["edits"]
    assert len(grade.seeds) == 3 and grade.edits == len(edits) == 4 * 6 + 2 * 6
    assert grade.no_op <= 1e-8 and grade == grade_of(
        edits, no_op=grade.no_op, seeds=grade.seeds, recovered=grade.recovered, lost=grade.lost
    )
    for row in edits:
        assert all(np.isfinite(row[name]) for name in ("predicted", "propagated", "full", "distance", "active"))
        assert (row["other"] is None) == (abs(row["dose"]) != 1) and len(row["other"] or (0, 0)) == 2
    # With as many features as the graph has, what it predicts is nearly what the frozen map's propagated reading gives.
    predicted, propagated = (np.array([row[name] for row in edits]) for name in ("predicted", "propagated"))
    assert np.corrcoef(predicted, propagated)[0, 1] > 0.9
    assert any(row["control"] for row in edits) and set(found["steering"]) == {"detect and replace", "steering"}


def test_a_pruned_graph_by_position_is_held_too_and_a_sum_over_positions_refused(made):
    exact, (_, graph), _ = made
    pruned = prune(graph, by_position=True, node_threshold=0.98)
    found = validate(capture_again(exact.pipe, exact.tcs, pruned), pruned, ablations=3, draws=1, readings=("direct",))
    assert failed_checks(found) is None
    with pytest.raises(UserError, match="summed over positions"):
        capture_again(exact.pipe, exact.tcs, prune(graph))


def test_another_run_is_told_from_the_graph_s(made):
    exact, (_, graph), _ = made
    with pytest.raises(UserError, match="The graph was traced with another set of transcoders"):
        capture_again(exact.pipe, exact.tcs._replace(source="other"), graph)
    other = graph.with_provenance(run=replace(graph.provenance.run, seed=5))
    with pytest.raises(UserError, match="The run captured anew"):
        capture_again(exact.pipe, exact.tcs, other)
    values = replace(graph, node_value=np.where(graph.node_kind == FEATURE, 1.01 * graph.node_value, 1).astype("f4"))
    with pytest.raises(UserError, match="is not the graph's: .* has the value"):
        capture_again(exact.pipe, exact.tcs, values)
