"""Heads' sums add up to a target's edges, and the few rows told of a score are the largest of all."""

import numpy as np
import pytest

from difffract_jax.address import flux_layout
from difffract_jax.circuits.attribution.engine import make_engine, pull_rows
from difffract_jax.circuits.attribution.expansion import source_names
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import named
from difffract_jax.circuits.effects import heads
from difffract_jax.circuits.effects.attention import head_loadings, score_parts
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE
from tolerances import TOL, relative_error
from traces import make_exact


@pytest.fixture
def engine(x64):
    made = make_exact(seed=5, img=(0, 2), txt=(0, 1, 2), joint=(0, 1), skip=True, output=True)
    output = resolve_target(made.pipe, made.trace, parse_target("pixels:color=red"))
    return make_engine(made.trace, made.tcs, (output,))


def test_heads_and_what_took_no_hop_add_up_to_the_edges(engine):
    row = engine.sources
    found = heads.carried(engine, row)
    edges = pull_rows(engine, np.array([row], np.int64), 1).edges[0]
    assert relative_error(found.edges, edges) <= TOL.x64
    every = [*found.heads, found.direct]
    assert sum(one.total for one in every) == pytest.approx(edges.sum(), rel=1e-9)
    loadings = head_loadings(engine, row)
    assert len(found.heads) == loadings.head.size
    sizes = [one.absolute for one in found.heads]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    for name, loading in zip(
        [
            f"{engine.infos[0].layout.block_name(int(b))}/h{h}"
            for b, h in zip(loadings.block, loadings.head, strict=True)
        ],
        loadings.loading,
        strict=True,
    ):
        (one,) = (one for one in found.heads if one.name == name)
        assert one.total == pytest.approx(loading.sum(), rel=1e-9, abs=1e-12)
        assert abs(one.loading) == np.abs(loading).max() and loading[one.strongest] == one.loading


def test_a_score_s_kinds_add_up_to_it(engine):
    parts = score_parts(engine, 4, 1, ("img", 3), ("txt", 2))
    kinds = heads.by_kind(parts, engine.table)
    assert kinds.sum() == pytest.approx(parts.score, rel=1e-9)
    assert kinds[3, 3] == pytest.approx(parts.constant) and kinds[0, 0] != 0
    assert kinds[:3, 3].sum() == pytest.approx(parts.query_terms.sum())
    assert kinds[3, :3].sum() == pytest.approx(parts.key_terms.sum())


@pytest.mark.parametrize("at_once", [7, 5000])
def test_the_strongest_pairs_and_terms_are_the_largest_of_all(engine, monkeypatch, at_once):
    monkeypatch.setattr(heads, "AT_ONCE", at_once)
    parts = score_parts(engine, 4, 1, ("img", 3), ("img", 2))
    features = np.flatnonzero(engine.table.kind == FEATURE)
    every = parts.pairs(features, features)
    largest = np.sort(np.abs(every), axis=None)[::-1]
    found = heads.strongest_pairs(parts, features, 12)
    assert [abs(value) for *_, value in found] == pytest.approx(largest[:12].tolist(), rel=1e-12)
    place = {int(row): i for i, row in enumerate(features)}
    assert all(every[place[a], place[b]] == pytest.approx(value, rel=1e-12) for a, b, value in found)
    # More than there are: all that are not zero.
    some = features[:40]
    pairs = [(a, b) for a, b, value in heads.strongest_pairs(parts, some, 10**6) if value]
    nonzero = np.argwhere(parts.pairs(some, some))
    assert sorted(pairs) == sorted((int(some[a]), int(some[b])) for a, b in nonzero)
    terms = heads.strongest_terms(parts, features, 5)
    both = np.abs(np.concatenate([parts.query_terms[features], parts.key_terms[features]]))
    assert [abs(term) for *_, term in terms] == pytest.approx(np.sort(both)[::-1][:5].tolist())
    side, row, term = terms[0]
    assert term == {"query": parts.query_terms, "key": parts.key_terms}[side][row]


def test_what_adds_nothing_is_not_listed(engine):
    low = np.flatnonzero((engine.table.kind == FEATURE) & (engine.table.block == 1) & (engine.table.value > 0))[0]
    found = heads.carried(engine, int(low))
    # Heads of the target's own block and of those below; none above.
    assert found.heads and {one.name.rsplit("/", 1)[0] for one in found.heads} <= {"double/0", "double/1"}
    assert all(one.absolute > 0 for one in found.heads)
    parts = score_parts(engine, 0, 0, ("img", 0), ("txt", 0))
    features = np.flatnonzero(engine.table.kind == FEATURE)
    assert not heads.strongest_terms(parts, features, 5) and not heads.strongest_pairs(parts, features, 5)


def test_sources_are_named_as_nodes_are(engine):
    table = engine.table
    features = np.flatnonzero((table.kind == FEATURE) & (table.value > 0))
    assert source_names(table, features, engine.infos[0].layout) == [str(named(engine, int(row))) for row in features]
    others = source_names(table, np.flatnonzero(table.kind[: engine.sources] != FEATURE), engine.infos[0].layout)
    assert {"error img/1@0", "error single/1@txt2", "input txt@3", "input latent@0"} <= set(others)
    assert len(set(others)) == len(others)


def test_a_score_is_read_as_it_is_written():
    assert heads.parse_score(" single/1/h0@txt3,img12 ") == ("single", 1, 0, ("txt", 3), ("img", 12))
    assert heads.parse_score("single/1/h0@txt3,img12").model_block(flux_layout(3, 2)) == 4
    assert heads.parse_score("double/2/h0@txt3,img12").model_block(flux_layout(3, 2)) == 2
    for text in ("double/1/1@img0,img1", "1/h1@img0,img1", "img/1/h1@img0,img1", "double/1/h1@img0", "double/1/h1@0,1"):
        with pytest.raises(UserError, match=f"{text!r} is not an attention score; write BLOCK/hHEAD@QUERY,KEY"):
            heads.parse_score(text)
    with pytest.raises(UserError, match="no block double/3; the model has double/0 to double/2 and single/0 to single"):
        heads.parse_score("double/3/h0@txt3,img12").model_block(flux_layout(3, 2))
    with pytest.raises(UserError, match="no block single/0; the model has double/0 to double/2"):
        heads.parse_score("single/0/h0@txt3,img12").model_block(flux_layout(3, 0))
