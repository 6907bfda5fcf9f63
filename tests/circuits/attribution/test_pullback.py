"""Edges are exact: they add up, they equal interventions, and pulling back is the transpose of pushing forward."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax import ops
from difffract_jax.circuits.attribution import contraction, pullback, walk
from difffract_jax.circuits.attribution.engine import affine_constants
from difffract_jax.circuits.attribution.pullback import PullOptions, pull_back, pull_target, push_forward
from difffract_jax.circuits.attribution.sources import source_table
from difffract_jax.circuits.frozen import targets as targets_module
from difffract_jax.circuits.frozen.replacement import prepare_step, run_replacement
from difffract_jax.circuits.frozen.targets import Targets, exact_preactivations, preactivations
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.circuits.trace.record import record_step
from difffract_jax.models.blocks import Streams
from laws import twice
from tolerances import TOL, relative_error
from traces import IMAGE, JOINT, MORE_VARIANTS, TEXT, Exact, make_exact


def some_targets(exact, count=8, seed=0):
    """Targets spread over groups, blocks and positions; active or not, the laws hold."""
    rng = np.random.default_rng(seed)
    info = exact.trace.info
    slots = exact.tcs.sites.slots(info.layout)
    sites = [(group, block) for group, blocks in enumerate(slots) for block in blocks]
    chosen = [sites[i] for i in rng.integers(0, len(sites), count)]
    rows = [exact.trace.record.mlp_in[s].shape[1] for s, _ in chosen]
    columns = (
        [s for s, _ in chosen],
        [info.recorded.index(b) for _, b in chosen],
        [rng.integers(0, n) for n in rows],
        rng.integers(0, exact.tcs.config.features, count),
    )
    return jax.device_put(Targets(*(np.array(column, np.int32) for column in columns)))


def evaluate(exact, sources):
    """The affine map, up to the MLP sublayers' inputs."""
    return jax.jit(run_replacement)(exact.replacement.record, exact.replacement.sites, sources).mlp_in


def constant(exact):
    """The affine map at zero sources."""
    return affine_constants((exact.replacement,), (exact.trace.info,), across=False)[0].mlp_in


def table_of(exact):
    return source_table((exact.replacement,), (exact.trace.info,))


def test_edges_and_bias_add_up_to_the_preactivation(exact):
    targets = some_targets(exact)
    edges = np.asarray(pull_back(exact.replacement, targets))
    u = preactivations(exact.replacement, targets, exact.trace.record.mlp_in)
    bias = preactivations(exact.replacement, targets, constant(exact))
    residual = np.abs(edges.sum(axis=1) + bias - u)
    assert np.max(residual / np.abs(edges).sum(axis=1)) <= TOL.conservation_x64


def test_numbers_of_targets_of_one_power_of_two_share_a_program(exact):
    x = exact.trace.record.mlp_in
    whole = exact_preactivations(exact.replacement, some_targets(exact), x)
    before = targets_module._terms._cache_size()
    for count in (5, 6, 7):
        some = Targets(*(column[:count] for column in some_targets(exact)))
        found = exact_preactivations(exact.replacement, some, x)
        assert relative_error(found, whole[:count]) <= TOL.x64
    assert targets_module._terms._cache_size() == before


def test_every_kind_of_edge_is_the_effect_of_its_direct_intervention(exact):
    targets = some_targets(exact, seed=1)
    edges = np.asarray(pull_back(exact.replacement, targets))
    table = table_of(exact)
    rng = np.random.default_rng(2)
    before = preactivations(exact.replacement, targets, evaluate(exact, exact.replacement.sources))
    for kind in (0, 1, 2):
        for row in rng.choice(np.flatnonzero((table.kind == kind) & (table.value > 0) & (table.stream < 2)), 6):
            doubled = _double(exact, table, row)
            after = preactivations(exact.replacement, targets, evaluate(exact, doubled))
            assert np.max(np.abs((after - before) - edges[:, row])) <= TOL.intervention_x64 * np.abs(edges).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guidance", "every site", "a gap", "a skip"])
def test_edges_are_direct_interventions_in_float32_too(name):
    exact = make_exact(dtype=jnp.float32, **MORE_VARIANTS[name])
    targets = some_targets(exact, seed=1)
    edges = np.asarray(pull_back(exact.replacement, targets))
    assert edges.dtype == np.float32
    table, scale = table_of(exact), np.abs(edges).sum(axis=1, dtype=np.float64)
    before = np.asarray(preactivations(exact.replacement, targets, evaluate(exact, exact.replacement.sources)))
    for row in np.random.default_rng(2).choice(np.flatnonzero(table.value > 0), 18):
        after = preactivations(exact.replacement, targets, evaluate(exact, _double(exact, table, row)))
        moved = np.asarray(after, np.float64) - before
        assert np.max(np.abs(moved - edges[:, row]) / scale) <= TOL.direct_f32


def _double(exact, table, row):
    """The sources with one of them, a value or a whole vector, doubled."""
    sources, info = exact.replacement.sources, exact.trace.info
    group, block, position = int(table.stream[row]), int(table.block[row]), int(table.position[row])
    layer = 0
    if table.kind[row] != 2:
        layer = info.recorded.index(block)
        if block >= 3:
            layer -= sources.values[IMAGE].shape[0]
            position += info.text_tokens if group == 0 else 0
            group = JOINT
    field = ("values", "errors", "boundary")[table.kind[row]]
    pair = getattr(sources, field)
    if field == "values":
        index = np.asarray(exact.replacement.sites[group].layers.index)[layer, position]
        place = (layer, position, int(np.flatnonzero(index == table.feature[row])[0]))
    else:
        place = (layer, position) if field == "errors" else (position,)
    new = [twice(one, place) if i == group else one for i, one in enumerate(pair)]
    return sources._replace(**{field: Streams(*new) if field == "boundary" else tuple(new)})


def group_of(exact, table):
    """The group of every row of a table."""
    joint = (table.block >= 3) & (table.kind != 2)
    return np.where(joint, JOINT, table.stream)


def test_pulling_back_is_reverse_mode_on_the_affine_map(exact):
    targets = some_targets(exact, seed=3)
    sources = exact.replacement.sources

    def u(sources):
        x = run_replacement(exact.replacement.record, exact.replacement.sites, sources).mlp_in
        return preactivations(exact.replacement, targets, x)

    gradients = jax.jit(jax.jacrev(u))(sources)
    edges = np.asarray(pull_back(exact.replacement, targets))
    table = table_of(exact)
    for kind, field in ((0, "values"), (1, "errors"), (2, "boundary")):
        for group in range(len(getattr(sources, field))):
            product = np.asarray(getattr(gradients, field)[group]) * np.asarray(getattr(sources, field)[group])[None]
            expected = product if kind == 0 else product.sum(axis=-1)
            ours = edges[:, ((table.kind == kind) & (group_of(exact, table) == group))[: edges.shape[1]]]
            if expected.size and np.any(expected):
                assert relative_error(ours, expected.reshape(len(ours), -1)) <= TOL.x64


def test_pulling_back_is_the_transpose_of_pushing_forward(exact):
    targets = some_targets(exact, seed=4)
    rng = np.random.default_rng(5)
    shares = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), exact.replacement.sources.values)
    zeros = jax.tree.map(np.zeros_like, exact.replacement.sources)
    change = zeros._replace(values=jax.tree.map(np.multiply, exact.replacement.sources.values, shares))
    moved = push_forward(exact.replacement, jax.device_put(change)).mlp_in
    still = preactivations(exact.replacement, targets, jax.device_put(jax.tree.map(np.zeros_like, moved)))
    pushed = preactivations(exact.replacement, targets, moved) - still
    table = table_of(exact)
    weights = np.zeros(len(table.kind))
    for group in (0, 1, 2):
        weights[(table.kind == 0) & (group_of(exact, table) == group)] = shares[group].ravel()
    edges = np.asarray(pull_back(exact.replacement, targets))
    pulled = edges @ weights[: edges.shape[1]]
    if np.any(pushed):  # the first recorded site alone has no features before it
        assert relative_error(pulled, pushed) <= TOL.x64
    else:
        assert not pulled.any()


def test_sources_lie_in_strictly_lower_blocks(exact):
    targets = some_targets(exact, seed=6)
    edges = np.asarray(pull_back(exact.replacement, targets))
    table = table_of(exact)
    block = table.block[: edges.shape[1]]
    for row, layer in zip(edges, np.asarray(targets.layer), strict=True):
        assert not row[block >= exact.trace.info.recorded[layer]].any()


def nothing(array):
    return jax.device_put(np.zeros_like(array))


def test_a_stream_without_sources_has_no_edges(x64):
    exact = make_exact()
    table = table_of(exact)
    silent = exact.replacement.sources
    silent = silent._replace(
        boundary=silent.boundary._replace(txt=nothing(silent.boundary.txt)),
        values=tuple(nothing(v) if i == TEXT else v for i, v in enumerate(silent.values)),
        errors=tuple(nothing(e) if i == TEXT else e for i, e in enumerate(silent.errors)),
    )
    edges = np.asarray(pull_back(exact.replacement._replace(sources=silent), some_targets(exact)))
    assert not edges[:, table.stream == 1].any() and edges[:, table.stream == 0].any()


@pytest.mark.slow
def test_one_by_one_is_the_same_as_together(x64):
    exact = make_exact()
    targets = some_targets(exact, 5)
    together = pull_back(exact.replacement, targets)
    for i in range(5):
        alone = pull_back(exact.replacement, jax.tree.map(lambda column, i=i: column[i : i + 1], targets))
        assert relative_error(alone[0], together[i]) <= TOL.x64


def test_the_pull_back_of_one_target_is_pure_and_the_same(x64):
    """It goes through `jax.jit` and `jax.vmap`, and compiles once."""
    exact = make_exact()
    targets = some_targets(exact)
    traced = chex.assert_max_traces(pull_target, n=1)
    many = jax.jit(jax.vmap(traced, (None, 0)))
    chex.clear_trace_counter()
    for changed in (targets, jax.tree.map(lambda column: column[::-1], targets)):
        assert relative_error(many(exact.replacement, changed), pull_back(exact.replacement, changed)) <= TOL.x64


def test_places_that_fill_up_change_nothing_and_have_no_edges(x64):
    exact = make_exact()
    targets = some_targets(exact)
    filled = np.isin(np.arange(8), (0, 3, 7))
    mixed = jax.device_put(jax.tree.map(lambda column: np.where(filled, np.int32(-1), column), targets))
    edges, usual = (np.asarray(pull_back(exact.replacement, some)) for some in (mixed, targets))
    assert not edges[filled].any() and usual[filled].any()
    assert relative_error(edges[~filled], usual[~filled]) <= TOL.x64


def test_how_decoder_vectors_are_gathered_changes_nothing(x64, monkeypatch):
    exact = make_exact()
    targets = some_targets(exact)
    usual = np.asarray(pull_back(exact.replacement, targets))
    for size, some in ((1, slice(3, 4)), (10_000, slice(0, 8)), (2**30, slice(3, 4))):
        monkeypatch.setattr(contraction, "GATHER_BYTES", size)
        pulled = pull_back(exact.replacement, jax.tree.map(lambda column, some=some: column[some], targets))
        assert relative_error(pulled, usual[some]) <= TOL.x64


@pytest.mark.parametrize(
    "sizes", [(5, 30), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((7, 1), (64, 1)))]
)
def test_in_how_many_pieces_targets_go_changes_nothing(x64, monkeypatch, sizes):
    exact = make_exact()
    targets = jax.tree.map(np.asarray, some_targets(exact, 40))
    few = [pull_back(exact.replacement, jax.tree.map(lambda c, i=i: c[i : i + 8], targets)) for i in range(0, 40, 8)]
    for name, size in zip(("CONTRACT_STEP", "CONTRACT_TARGETS"), sizes, strict=True):
        monkeypatch.setattr(walk, name, size)
    together = pull_back(exact.replacement, targets)
    assert relative_error(together, np.concatenate([np.asarray(rows) for rows in few])) <= TOL.x64


def test_blocks_do_not_copy_the_cotangents_of_all_targets(x64):
    exact = make_exact(joint=(0, 1))
    lowered = pullback.lower_pull(exact.replacement, 14, "cpu", directed=False, options=PullOptions())
    program = lowered.compile().as_text()
    rows = [h.shape[0] for h in exact.replacement.record.boundary]
    width = exact.replacement.record.boundary.img.shape[1]
    for count in (*rows, sum(rows)):
        assert f"[14,{count},{width}]" in program
        assert not re.findall(rf"\[14,{count},{width}\]\S* copy\(", program)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_float32_adds_up_too(golden, seed):
    trace = golden.trace(seed % 2, seed + 1)
    replacement = prepare_step(trace, golden.tcs)
    exact = Exact(golden.pipe, golden.tcs, trace, replacement)
    targets = some_targets(exact, 20, seed)
    # In batches of ten, as `test_attribute.py` traces this model.
    batches = [jax.tree.map(lambda column, i=i: np.asarray(column)[i : i + 10], targets) for i in (0, 10)]
    edges = np.concatenate([np.asarray(pull_back(replacement, some), np.float64) for some in batches])
    u = preactivations(replacement, targets, trace.record.mlp_in)
    bias = preactivations(replacement, targets, constant(exact))
    residual = np.abs(edges.sum(axis=1) + np.asarray(bias, np.float64) - np.asarray(u, np.float64))
    assert np.max(residual / np.abs(edges).sum(axis=1)) <= TOL.conservation_f32


def test_targets_of_any_block_share_one_program(x64):
    exact = make_exact()
    pull_back(exact.replacement, some_targets(exact))
    before = pullback._pull_back._cache_size()
    for seed in range(1, 5):
        pull_back(exact.replacement, some_targets(exact, seed=seed))
    assert pullback._pull_back._cache_size() == before


@pytest.fixture
def new_programs():
    """Clears the programs of records and pull-backs, which keep what constants were when they were traced."""
    programs = pullback._pull_back, record_step
    yield lambda: [program.clear_cache() for program in programs]
    for program in programs:
        program.clear_cache()


def test_attention_in_blocks_changes_no_edge(x64, monkeypatch, new_programs):
    exact = make_exact(joint=(0, 1))
    targets = some_targets(exact, 14)
    usual = pull_back(exact.replacement, targets)
    monkeypatch.setattr(ops, "WHOLE_PATTERN", 0)
    monkeypatch.setattr(ops, "PATTERN_BLOCK", 28 * 8 * 5)  # of 28 queries five at a time: the last block is filled up
    new_programs()
    assert relative_error(pull_back(exact.replacement, targets), usual) <= 1e-12
    again = capture(
        exact.pipe, exact.tcs, "a red circle", step=1, run=exact.pipe.plan(height=24, width=32, text_tokens=16)
    )
    for ours, expected in zip(jax.tree.leaves(again.record), jax.tree.leaves(exact.trace.record), strict=True):
        assert np.array_equal(ours, expected) or relative_error(ours, expected) <= 1e-12
