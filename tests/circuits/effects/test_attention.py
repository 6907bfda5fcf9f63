"""Heads' shares of an edge add up to it, and pairs, terms and constant add up to a score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.engine import make_engine, pull_rows
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.effects.attention import head_loadings, loadings_by_layer, score_parts
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE
from tolerances import TOL, relative_error
from traces import EXPLAINED, make_exact


@pytest.fixture
def exact(x64):
    return make_exact(**EXPLAINED)


def top_feature(engine, *, single):
    table = engine.table
    rows = np.flatnonzero((table.kind == FEATURE) & (table.value > 0) & ((table.block >= 3) == single))
    rows = rows[table.block[rows] == table.block[rows].max()]
    return int(rows[np.argmax(table.value[rows])])


@pytest.mark.parametrize(
    "kind",
    ["single", "pixels:color=red", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("double", "velocity:"))],
)
def test_head_loadings_add_up_to_every_edge(exact, kind):
    outputs = () if ":" not in kind else (resolve_target(exact.pipe, exact.trace, parse_target(kind)),)
    engine = make_engine(exact.trace, exact.tcs, outputs)
    row = engine.sources if outputs else top_feature(engine, single=kind == "single")
    found = head_loadings(engine, row)
    edges = pull_rows(engine, np.array([row], np.int64), 1).edges[0]
    assert relative_error(found.loading.sum(axis=0) + found.direct, edges) <= TOL.x64
    assert np.abs(found.loading).max() > 0 and np.abs(found.direct).max() > 0
    # No head of the target's own block or above it, as far as x is read before attention there.
    if kind == "single":
        assert not found.loading[found.block >= engine.table.block[row]].any()


def test_loadings_come_layer_by_layer_from_the_top_and_what_took_no_hop_last(exact):
    engine = make_engine(exact.trace, exact.tcs)
    row = top_feature(engine, single=True)
    layers = list(loadings_by_layer(engine, row))
    assert [block for block, _ in layers] == [*reversed(engine.infos[0].recorded), None]
    found = head_loadings(engine, row)
    assert found.block.tolist() == [block for block, part in layers[:-1] for _ in part]
    assert np.array_equal(np.concatenate([part for _, part in layers]), np.vstack([found.loading, found.direct]))


def test_a_source_at_another_token_reaches_a_target_through_hops_alone(exact):
    engine = make_engine(exact.trace, exact.tcs)
    row = top_feature(engine, single=False)
    found = head_loadings(engine, row)
    table = engine.table
    elsewhere = (table.position != table.position[row]) | (table.stream != table.stream[row])
    assert not found.direct[elsewhere].any() and found.loading[:, elsewhere].any()


def test_a_loading_is_the_edge_without_the_other_heads_at_the_last_hop(exact):
    """Cutting a head of the target's own block takes exactly its loading off the edge."""
    engine = make_engine(exact.trace, exact.tcs)
    row = top_feature(engine, single=False)
    found = head_loadings(engine, row)
    block = int(engine.table.block[row])
    record = engine.steps[0].record
    before = pull_rows(engine, np.array([row], np.int64), 1).edges[0]
    for head in range(record.frozen[0].q.shape[2]):
        # Columns of the value projection that belong to the head are zeroed in that block alone.
        width, per = record.boundary.img.shape[1], record.frozen[0].q.shape[3]
        columns = slice(2 * width + head * per, 2 * width + (head + 1) * per)
        weights = jax.tree.map(lambda leaf: leaf, record.weights)
        for stream in (weights.stacks[0].img, weights.stacks[0].txt):
            stream.attn.qkv.kernel[...] = stream.attn.qkv.kernel[...].at[block, :, columns].set(0)
        cut = engine._replace(
            steps=(engine.steps[0]._replace(record=record._replace(weights=weights)),), constants=engine.constants
        )
        after = pull_rows(cut, np.array([row], np.int64), 1).edges[0]
        mine = (found.block == block) & (found.head == head)
        assert relative_error(before - after, found.loading[mine][0]) <= TOL.x64


@pytest.mark.parametrize(
    ("block", "head", "query", "key"),
    [(1, 0, ("img", 5), ("txt", 1)), (2, 1, ("txt", 0), ("img", 7)), (4, 1, ("img", 3), ("img", 4))],
)
def test_pairs_terms_and_constant_add_up_to_the_score(exact, block, head, query, key):
    engine = make_engine(exact.trace, exact.tcs)
    parts = score_parts(engine, block, head, query, key)
    record, text = engine.steps[0].record, exact.trace.info.text_tokens
    frozen, layer = (record.frozen[0], block) if block < 3 else (record.frozen[1], block - 3)
    at = [position + (text if stream == "img" else 0) for stream, position in (query, key)]
    q, k = frozen.q[layer, at[0], head], frozen.k[layer, at[1], head]
    assert parts.score == pytest.approx(float(jnp.dot(q, k)) * q.size**-0.5, rel=1e-9)
    rows = np.flatnonzero(np.abs(parts.queries).sum(axis=0) > 0), np.flatnonzero(np.abs(parts.keys).sum(axis=0) > 0)
    total = parts.pairs(*rows).sum() + parts.query_terms.sum() + parts.key_terms.sum() + parts.constant
    scale = np.abs(parts.pairs(*rows)).sum() + abs(parts.score)
    assert abs(total - parts.score) <= TOL.conservation_x64 * scale


def test_spans_are_refused(exact):
    span = capture_steps(
        exact.pipe, exact.tcs, "a red circle", first=1, last=1, run=exact.pipe.plan(height=24, width=32, text_tokens=16)
    )
    engine = make_engine(span, exact.tcs)
    with pytest.raises(UserError, match="not of a span"):
        head_loadings(engine, top_feature(engine, single=False))
    with pytest.raises(UserError, match="not a span's"):
        score_parts(engine, 1, 0, ("img", 0), ("img", 0))


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ((9, 0, ("img", 0), ("img", 0)), "recorded the blocks double/0 to single/1, but not single/6"),
        ((1, 7, ("img", 0), ("img", 0)), "The block double/1 has heads 0 to 1, but got 7"),
        ((1, 0, ("img", 99), ("img", 0)), "There is no token img99"),
        ((1, 0, ("img", 0), ("joint", 0)), "There is no token joint0"),
    ],
)
def test_scores_that_are_not_in_the_trace_are_refused(exact, place, sentence):
    with pytest.raises(UserError, match=sentence):
        score_parts(make_engine(exact.trace, exact.tcs), *place)
