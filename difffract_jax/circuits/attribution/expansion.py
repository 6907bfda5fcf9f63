"""Iterative expansion on the host: what to expand next, and the resulting graph.

This is mode `difffract` of docs/method.md, section 5:

1. A table lists every possible source of a trace, one row each. A target's edges come as one dense row over the table.
2. `add`: keep the edges of at least `min_attribution`; from features only those whose value exceeds it too.
3. `next_batch`: among the expanded, A = column shares of the edges between them and reach = e_target + B e_target. A
   source that is not expanded scores sum over targets of |edge| * reach(target); the best are next. Through an
   attention score it scores by its share of the score.
4. `compact`: edges between expanded features, from errors and from inputs stay. What comes from features that were not
   expanded is summed per (target, site, position) into `rest` nodes.

`aggregate` then sums over positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int16, Int32, Int64, UInt8
from numpy.typing import NDArray

from difffract_jax.address import BRANCHES, STREAMS, Layout
from difffract_jax.graphs.arrays import DTYPES
from difffract_jax.graphs.graph import ERROR, FEATURE, REST, SCORE, Graph
from difffract_jax.graphs.influence import column_shares, reach
from difffract_jax.graphs.names import place_name
from difffract_jax.graphs.order import levels, levels_of


class SourceTable(NamedTuple):
    """Every possible source of one trace, a row each.

    Attributes:
        kind: 0 feature, 1 error, 2 input, 3 output; outputs come last, and are targets alone. Scores of attention, 5,
            stand behind them where they are nodes.
        stream: 0 img, 1 txt, 2 latent.
        block: the model's block; -1 for inputs, the number of all blocks for outputs.
        position: within the stream; -1 for outputs.
        feature: -1 for all else.
        value: a feature's value, 0 for places that hold none; 1 for errors, inputs and outputs.
        step: denoising step; inputs that several steps share have the first.
        branch: of guidance, 0 prompt or 1 negative; latents that both branches share, and outputs, have 0.
    """

    kind: UInt8[np.ndarray, "source"]
    stream: UInt8[np.ndarray, "source"]
    block: Int16[np.ndarray, "source"]
    position: Int32[np.ndarray, "source"]
    feature: Int32[np.ndarray, "source"]
    value: Float32[np.ndarray, "source"]
    step: Int16[np.ndarray, "source"]
    branch: UInt8[np.ndarray, "source"]


class Edges(NamedTuple):
    """Edges by rows of the table.

    Attributes:
        source: row.
        target: row.
        attribution: of the source to the target.
        query: of an edge into an attention score, the part that goes through its query; else 0.
        remainder: of an edge from one, what the linearisation misses; else 0.
    """

    source: Int64[np.ndarray, "edge"]
    target: Int64[np.ndarray, "edge"]
    attribution: Float32[np.ndarray, "edge"]
    query: Float32[np.ndarray, "edge"]
    remainder: Float32[np.ndarray, "edge"]


class ScoreRows(NamedTuple):
    """Attention scores at the end of a table; see `graphs.arrays` for what they are.

    Attributes:
        first: row of the first.
        head: of each; -1 for the rest of a block's.
        key_stream: of each one's key.
        key_position: of each one's key; -1 for the rest of a block's.
        expanded: how many of them, from the first on, have edges into them.
    """

    first: int
    head: Int64[np.ndarray, "score"]
    key_stream: Int64[np.ndarray, "score"]
    key_position: Int64[np.ndarray, "score"]
    expanded: int


class Totals(NamedTuple):
    """What every expanded target must add up to.

    Attributes:
        preactivation: u.
        bias: value of the affine map at zero sources.
        sum: of all edges, before any threshold.
        abs_sum: of their absolute values.
    """

    preactivation: Float64[np.ndarray, "expanded"]
    bias: Float64[np.ndarray, "expanded"]
    sum: Float64[np.ndarray, "expanded"]
    abs_sum: Float64[np.ndarray, "expanded"]


class Expansion(NamedTuple):
    """How far an expansion has come.

    Attributes:
        table: the sources.
        targets: rows of the graph's targets.
        weights: of the targets; positive, their sum is 1.
        min_attribution: smallest edge kept.
        expanded: rows of the expanded features, in the order in which they were added.
        totals: of the expanded, in that order.
        edges: into the expanded.
        scores: attention scores that are nodes; None where attention is frozen.
    """

    table: SourceTable
    targets: Int64[np.ndarray, "target"]
    weights: Float64[np.ndarray, "target"]
    min_attribution: float
    expanded: Int64[np.ndarray, "expanded"]
    totals: Totals
    edges: Edges
    scores: ScoreRows | None = None

    @property
    def features(self) -> int:
        """How many features and outputs are expanded."""
        return self.expanded.size - (0 if self.scores is None else self.scores.expanded)


def start_expansion(
    table: SourceTable,
    targets: Int64[np.ndarray, "target"],
    weights: Float64[np.ndarray, "target"],
    min_attribution: float,
) -> Expansion:
    """Returns an expansion with nothing expanded yet.

    Args:
        table: the sources.
        targets: rows of the graph's targets, features or outputs.
        weights: of the targets, positive.
        min_attribution: smallest edge to keep.
    """
    none = np.zeros(0, np.int64)
    totals = Totals(*(np.zeros(0) for _ in Totals._fields))
    edges = Edges(none, none, *(np.zeros(0, np.float32) for _ in range(3)))
    return Expansion(table, targets, weights / weights.sum(), min_attribution, none, totals, edges)


def add(
    state: Expansion,
    rows: Int64[np.ndarray, "target"],
    attributions: Sequence[NDArray[np.floating]],
    preactivation: Float64[np.ndarray, "target"],
    bias: Float64[np.ndarray, "target"],
) -> Expansion:
    """Adds the edges of newly expanded targets.

    Args:
        state: the expansion.
        rows: the targets.
        attributions: of the table's sources to every target, [target source], in one part or in several that follow one
            another in the table; each begins with a block.
        preactivation: of every target.
        bias: of every target.
    """
    runs, first = _runs(state.table), np.cumsum([0, *(part.shape[1] for part in attributions)])
    runs = runs[runs[:, 0] < first[-1]]
    places = np.concatenate([runs[:, 0], rows])
    below, own = np.split(levels(state.table.step[places], state.table.block[places]), [len(runs)])
    part_of = np.searchsorted(first, runs[:, 0], side="right") - 1
    found, sums, abs_sums = [], np.zeros(rows.size), np.zeros(rows.size)
    for i, row in enumerate(rows):
        # Edges lead upwards: where a row has none, it need not be read.
        for run in np.flatnonzero(below < own[i]):
            (begin, end), part = runs[run], part_of[run]
            values = attributions[part][i, begin - first[part] : end - first[part]]
            sizes = np.abs(values)
            sums[i] += np.sum(values, dtype=np.float64)
            abs_sums[i] += np.sum(sizes, dtype=np.float64)
            found.append(edges_of(state, int(row), values, sizes, int(begin)))
    new = Totals(preactivation, bias, sums, abs_sums)
    totals = Totals(*(np.concatenate(pair) for pair in zip(state.totals, new, strict=True)))
    edges = Edges(*(np.concatenate(parts) for parts in zip(state.edges, *found, strict=True)))
    return state._replace(expanded=np.concatenate([state.expanded, rows]), totals=totals, edges=edges)


def _runs(table: SourceTable) -> Int64[np.ndarray, "run ends"]:
    """Returns begin and end of the stretches of a table that are of one step, branch and block each."""
    columns = np.stack([table.block, table.step, table.branch.astype(np.int16)])
    begin = np.flatnonzero(np.any(np.diff(columns, axis=1, prepend=-2), axis=0))
    return np.stack([begin, np.append(begin[1:], table.block.size)], axis=1)


def edges_of(
    state: Expansion, row: int, values: NDArray[np.floating], sizes: NDArray[np.floating], begin: int = 0
) -> Edges:
    """Returns those of one target's edges whose size is large enough.

    Args:
        state: the expansion.
        row: the target's.
        values: its edges from some rows of the table.
        sizes: their absolute values.
        begin: the first of these rows.
    """
    smallest = state.min_attribution
    place = np.flatnonzero(sizes >= smallest)
    source = place + begin
    strong = (state.table.kind[source] != FEATURE) | (state.table.value[source] > smallest)
    strong &= values[place] != 0
    source, place = source[strong], place[strong]
    none = np.zeros(source.size, np.float32)
    return Edges(source, np.full(source.size, row), values[place].astype(np.float32), none, none)


def next_batch(state: Expansion, size: int) -> Int64[np.ndarray, "target"]:
    """Returns the rows of the most influential features that are not expanded, at most `size`; the best first."""
    rows = state.table.kind.size
    expanded = np.zeros(rows, bool)
    expanded[state.expanded] = True
    number = np.zeros(rows, np.int64)
    number[state.expanded] = np.arange(state.expanded.size)
    edges, count = state.edges, state.expanded.size
    inner = expanded[edges.source]
    source, target = number[edges.source[inner]], number[edges.target[inner]]
    shares = column_shares(target, edges.attribution[inner], count)
    level = levels_of(*(column[state.expanded] for column in (state.table.kind, state.table.step, state.table.block)))
    roots = np.zeros(count)
    roots[number[state.targets]] = state.weights
    reached = reach(level, source, target, shares, roots)
    outer = ~inner & (state.table.kind[edges.source] == FEATURE)
    absolute = np.abs(edges.attribution).astype(np.float64)
    # Scores have a unit of their own: what drives one is weighed by its share of what the score adds to targets.
    scores = state.table.kind[state.expanded] == SCORE
    through = np.bincount(source, absolute[inner] * reached[target], count)
    reached[scores] = through[scores] / np.maximum(state.totals.abs_sum[scores], np.finfo(np.float64).tiny)
    weight = absolute[outer] * reached[number[edges.target[outer]]]
    total = np.bincount(edges.source[outer], weight, rows)
    candidates = np.flatnonzero(total)
    best = np.argsort(-total[candidates], kind="stable")[: max(size, 0)]
    return candidates[best]


def compact(state: Expansion) -> Graph:
    """Returns the graph of what was expanded, position by position."""
    table, edges = state.table, state.edges
    expanded = np.zeros(table.kind.size, bool)
    expanded[state.expanded] = True
    unexpanded = (table.kind[edges.source] == FEATURE) & ~expanded[edges.source]
    rest = _rest_edges(state, Edges(*(column[unexpanded] for column in edges)))
    kept = Edges(*(column[~unexpanded] for column in edges))
    # A rest node is keyed by the row of its site's error at its position, past the end of the table.
    source = np.concatenate([kept.source, rest.source + table.kind.size])
    target = np.concatenate([kept.target, rest.target])
    parts = [np.concatenate(pair) for pair in zip(kept[2:], rest[2:], strict=True)]
    nodes = np.unique(np.concatenate([source, state.expanded]))
    row = nodes % table.kind.size
    kind = np.where(nodes >= table.kind.size, REST, table.kind[row]).astype(np.uint8)
    columns = (table.step, table.branch, table.block, table.stream, table.position, table.feature)
    order = _node_order(kind, *(column[row] for column in columns))
    order = np.concatenate([np.searchsorted(nodes, state.targets), order[~np.isin(nodes[order], state.targets)]])
    nodes, row, kind = nodes[order], row[order], kind[order]
    number = _inverse(nodes)
    edge_order = np.lexsort((number(source), number(target)))
    first = np.argsort(number(state.expanded), kind="stable")
    totals = Totals(*(column[first] for column in state.totals))
    indptr, position, value = _activation_maps(table, row, kind, state.targets.size)
    attribution, query, remainder = (part[edge_order].astype(np.float32) for part in parts)
    return Graph(
        node_kind=kind,
        node_step=table.step[row],
        node_branch=table.branch[row],
        node_stream=table.stream[row],
        node_block=table.block[row],
        node_position=table.position[row],
        node_feature=np.where(kind == FEATURE, table.feature[row], -1).astype(np.int32),
        node_value=np.where(np.isin(kind, (FEATURE, SCORE)), table.value[row], 1).astype(np.float32),
        node_influence=np.full(nodes.size, np.nan, np.float32),
        edge_source=number(source)[edge_order].astype(np.int32),
        edge_target=number(target)[edge_order].astype(np.int32),
        edge_attribution=attribution,
        edge_query=query,
        edge_remainder=remainder,
        **_score_columns(state, row),
        target_node=number(state.expanded)[first].astype(np.int32),
        target_preactivation=totals.preactivation,
        target_bias=totals.bias,
        target_sum=totals.sum,
        target_abs_sum=totals.abs_sum,
        map_indptr=indptr,
        map_position=position,
        map_value=value,
    )


def _score_columns(state: Expansion, row: Int64[np.ndarray, "node"]) -> dict[str, np.ndarray]:
    """Returns the columns that attention scores alone have."""
    if state.scores is None:
        return {}
    place = row - state.scores.first
    mine = place >= 0
    columns = {}
    for name, other in (("head", -1), ("key_stream", 0), ("key_position", -1)):
        values = np.where(mine, getattr(state.scores, name)[np.maximum(place, 0)], other)
        columns[f"node_{name}"] = values.astype(DTYPES[f"node_{name}"])
    return columns


def _rest_edges(state: Expansion, edges: Edges) -> Edges:
    """Sums edges from unexpanded features per (target, site, position); sources are the rows of the errors there."""
    table = state.table
    errors = np.flatnonzero(table.kind == ERROR)
    rows = int(table.position.max()) + 1
    place, of_source = (_sites(table, at) * rows + table.position[at] for at in (errors, edges.source))
    error_at = np.zeros(int(max(place.max(initial=-1), of_source.max(initial=-1))) + 1, np.int64)
    error_at[place] = errors
    pair = edges.target * table.kind.size + error_at[of_source]
    pairs, group = np.unique(pair, return_inverse=True)
    sums, *more = (np.bincount(group, part.astype(np.float64), pairs.size) for part in edges[2:])
    target, error = np.divmod(pairs, table.kind.size)
    large = (np.abs(sums) >= state.min_attribution) & (sums != 0)
    return Edges(error[large], target[large], *(part[large].astype(np.float32) for part in (sums, *more)))


def _sites(table: SourceTable, rows: Any) -> Int64[np.ndarray, "row"]:
    """Returns one number per (step, branch, stream, block); inputs have block -1, hence the 1."""
    blocks = int(table.block.max()) + 2
    place = table.step[rows].astype(np.int64) * len(BRANCHES) + table.branch[rows]
    place = place * len(STREAMS) + table.stream[rows]
    return place * blocks + table.block[rows] + 1


def _node_order(*keys: NDArray[np.integer]) -> Int64[np.ndarray, "node"]:
    return np.lexsort(keys[::-1])


def _inverse(nodes: Int64[np.ndarray, "node"]):
    """Returns the function from entries of `nodes` to their places."""
    order = np.argsort(nodes, kind="stable")
    return lambda entries: order[np.searchsorted(nodes, entries, sorter=order)]


def _activation_maps(
    table: SourceTable, row: Int64[np.ndarray, "node"], kind: UInt8[np.ndarray, "node"], targets: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Returns every feature node's values over all positions, in CSR form.

    The graph's own targets, the first so many nodes, have the value at their own position alone.
    """
    features = int(table.feature.max(initial=0)) + 1

    def key(rows: NDArray[np.integer]) -> NDArray[np.int64]:
        return _sites(table, rows) * features + table.feature[rows]

    active = np.flatnonzero((table.kind == FEATURE) & (table.value > 0))
    # Of a million active features a graph names a few hundred: pick theirs before sorting.
    keys, named = key(active), key(row[kind == FEATURE])
    wanted = np.zeros(max(keys.max(initial=-1), named.max(initial=-1)) + 1, bool)
    wanted[named] = True
    active = active[wanted[keys]]
    active = active[np.lexsort((table.position[active], key(active)))]
    keys = key(active)
    begin, end = (np.searchsorted(keys, key(row), side) for side in ("left", "right"))
    own = (np.arange(row.size) < targets) & (kind == FEATURE)
    lengths = np.where(own, 1, np.where(kind == FEATURE, end - begin, 0))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    entry = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths) + np.repeat(begin, lengths)
    # An own entry's place among the active is not used.
    listed = active[np.minimum(entry, active.size - 1)] if active.size else np.zeros(entry.size, np.int64)
    chosen = np.where(np.repeat(own, lengths), np.repeat(row, lengths), listed)
    return indptr, table.position[chosen], table.value[chosen]


def source_names(table: SourceTable, rows: Int64[np.ndarray, "row"], layout: Layout) -> list[str]:
    """Returns the names of some sources of one step, spelled as the nodes of its graph are.

    Args:
        table: of the sources.
        rows: of the table; no outputs.
        layout: of the model.
    """
    columns = table.kind, table.stream, table.block, table.position, table.feature
    names = []
    for row in rows:
        kind, stream, block, position, feature = (int(column[row]) for column in columns)
        names.append(place_name(kind, stream, block, position, feature, layout))
    return names
