"""Which heads carry the attribution into a target, and what makes one attention score, boiled down to a few rows.

A head is written as a feature is, BLOCK/hN: double/1/h1, single/0/h1. An attention score adds the token that attends
and the one attended to, BLOCK/hN@QUERY,KEY: double/1/h1@img12,txt4. Tokens count from 0 within their stream.

1. `carried` sums every head's loadings (`attention`) over all sources of the run, and keeps each head's strongest.
2. `by_kind` sums a score's parts by what stands on either side: features, errors, inputs, or the constant.
3. `strongest_pairs` finds the largest products <q_a, k_b> without computing all of them.
"""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import STACKS, Layout
from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.attribution.expansion import SourceTable
from difffract_jax.circuits.effects.attention import ScoreParts, loadings_by_layer
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, SCORE, Graph
from difffract_jax.graphs.names import find_nodes, node_names

SIDES = ("features", "errors", "inputs", "constant")
"""What a query or a key is made of, in the order of `by_kind`."""
AT_ONCE = 1024
"""Sources of either side that are multiplied at once."""
_SCORE = re.compile(
    rf"(?P<kind>{'|'.join(STACKS)})/(?P<block>\d+)/h(?P<head>\d+)@(?P<q>img|txt)(?P<i>\d+),(?P<k>img|txt)(?P<j>\d+)"
)


class Score(NamedTuple):
    """An attention score as written.

    Attributes:
        kind: stack of the block, as in double/1.
        block: its number within the stack.
        head: of the block.
        query: stream and position of the token that attends.
        key: the same of the token attended to.
    """

    kind: str
    block: int
    head: int
    query: tuple[str, int]
    key: tuple[str, int]

    def model_block(self, layout: Layout) -> int:
        """Returns the block's number in the model.

        Args:
            layout: of the model.

        Raises:
            UserError: if it has no such block.
        """
        return layout.block_number(self.kind, self.block)


def parse_score(text: str) -> Score:
    """Reads an attention score.

    Args:
        text: in the form of the module docstring.

    Raises:
        UserError: if it is not of that form.

    Example:
        >>> parse_score("single/0/h1@img12,txt4").key
        ('txt', 4)
    """
    match = _SCORE.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"{text!r} is not an attention score; write BLOCK/hHEAD@QUERY,KEY with the token that attends and the one "
            "attended to, as in double/1/h1@img12,txt4 or single/0/h1@img3,img4."
        )
    query, key = (match["q"], int(match["i"])), (match["k"], int(match["j"]))
    return Score(match["kind"], int(match["block"]), int(match["head"]), query, key)


def target_node(graph: Graph, name: str | None) -> int:
    """Returns the node that heads shall be told of.

    Args:
        graph: of one step.
        name: of the node; the graph's first target if left out.

    Raises:
        UserError: if the graph is of several steps, has no such node, or nothing leads into it.
    """
    steps = graph.provenance.steps
    if len(steps) > 1:
        raise UserError(
            f"The graph spans the steps {min(steps)} to {max(steps)}, but heads and scores are those of one step; "
            f"trace a single step, as with --step {max(steps)}."
        )
    if name is None:
        return graph.target
    node = int(find_nodes(graph, [name])[0])
    if graph.node_kind[node] == SCORE:
        raise UserError(f"`{name}` is an attention score; give it as --score to have it taken apart.")
    if graph.node_kind[node] not in (FEATURE, OUTPUT):
        raise UserError(
            f"Nothing leads into `{name}`, which is a source alone; name a feature or an output of the graph, as "
            f"`{node_names(graph)[graph.target]}`."
        )
    return node


class Carrier(NamedTuple):
    """What one head passes on to a target, or what reaches it without a hop.

    Attributes:
        name: as in double/1/h1; "no hop".
        total: sum of its loadings over the sources.
        absolute: sum of their absolute values.
        strongest: row of the source that it carries most of.
        loading: of that source.
    """

    name: str
    total: float
    absolute: float
    strongest: int
    loading: float


class Carried(NamedTuple):
    """A target's attribution by the head of its last hop.

    Attributes:
        heads: those that carry most, by absolute values, first; without those that carry nothing.
        direct: what took no hop.
        edges: what heads and `direct` add up to, of every source.
    """

    heads: tuple[Carrier, ...]
    direct: Carrier
    edges: Float64[np.ndarray, "source"]


def carried(engine: Engine, row: int) -> Carried:
    """Sums a target's head loadings over all sources of the run, those that its graph did not expand included.

    Args:
        engine: of one step.
        row: the target's row of the table.

    Raises:
        UserError: if the engine is a span's.
    """
    layout = engine.infos[0].layout
    edges, carriers = np.zeros(engine.sources), []
    for block, loadings in loadings_by_layer(engine, row):
        edges += loadings.sum(axis=0)
        names = ("no hop" if block is None else f"{layout.block_name(block)}/h{head}" for head in range(len(loadings)))
        carriers += map(_carrier, names, loadings)
        del loadings  # before the next layer's come
    *heads, direct = carriers
    heads = sorted((one for one in heads if one.absolute > 0), key=lambda one: -one.absolute)
    return Carried(tuple(heads), direct, edges)


def _carrier(name: str, loadings: Float64[np.ndarray, "source"]) -> Carrier:
    best = int(np.argmax(np.abs(loadings)))
    return Carrier(name, float(loadings.sum()), float(np.abs(loadings).sum()), best, float(loadings[best]))


def edge_error(found: Carried, graph: Graph, rows: Int64[np.ndarray, "node"], node: int) -> tuple[float | None, int]:
    """Holds what heads add up to against a graph's edges into the target.

    Args:
        found: of the target.
        graph: that has it.
        rows: of its nodes, from `recapture`.
        node: the target.

    Returns:
        The largest difference over the largest edge, None if there are no edges; and how many were held.
    """
    held = np.flatnonzero((graph.edge_target == node) & (rows[graph.edge_source] >= 0))
    if not held.size:
        return None, 0
    edges = graph.edge_attribution[held].astype(np.float64)
    apart = np.abs(found.edges[rows[graph.edge_source[held]]] - edges)
    return float(apart.max() / np.abs(edges).max()), int(held.size)


def by_kind(parts: ScoreParts, table: SourceTable) -> Float64[np.ndarray, "query key"]:
    """Sums a score's parts by what is on the query's side and on the key's, in the order of `SIDES`.

    All sixteen add up to the score: nine sums of pairs, three of linear terms on either side, and the constant.

    Args:
        parts: from `score_parts`.
        table: of the sources.
    """
    kinds = [table.kind[: parts.queries.shape[1]] == kind for kind in (FEATURE, ERROR, INPUT)]
    queries = np.stack([*(parts.queries[:, kind].sum(axis=1) for kind in kinds), parts.query_constant])
    keys = np.stack([*(parts.keys[:, kind].sum(axis=1) for kind in kinds), parts.key_constant])
    return queries @ keys.T


def strongest_pairs(parts: ScoreParts, sources: Int64[np.ndarray, "source"], most: int) -> list[tuple[int, int, float]]:
    """Finds the pairs of sources that add most to a score, of either sign, without computing all of them.

    No pair exceeds |q_a| |k_b|: with both sides sorted by norm, what follows the first hopeless block is hopeless too.

    Args:
        parts: from `score_parts`.
        sources: rows of the table that may be on either side.
        most: pairs to find.

    Returns:
        Rows on the query's side and on the key's, and the product; the largest first.
    """
    sides, norms = [], []
    for vectors in (parts.queries, parts.keys):
        norm = np.linalg.norm(vectors[:, sources], axis=0)
        order = np.argsort(-norm, kind="stable")[: np.count_nonzero(norm)]
        sides.append(sources[order])
        norms.append(norm[order])
    best: list[tuple[int, int, float]] = []
    floor = 0.0
    for i in range(0, sides[0].size, AT_ONCE):
        for j in range(0, sides[1].size, AT_ONCE):
            if norms[0][i] * norms[1][j] <= floor:
                break
            a, b = sides[0][i : i + AT_ONCE], sides[1][j : j + AT_ONCE]
            values = parts.pairs(a, b).ravel()
            top = np.argsort(-np.abs(values), kind="stable")[:most]
            best += [(int(a[n // b.size]), int(b[n % b.size]), float(values[n])) for n in top]
            best = sorted(best, key=lambda pair: -abs(pair[2]))[:most]
            floor = abs(best[-1][2]) if len(best) == most else 0.0
    return best


def strongest_terms(parts: ScoreParts, sources: Int64[np.ndarray, "source"], most: int) -> list[tuple[str, int, float]]:
    """Finds the sources that add most to a score by themselves, with the other side's constant.

    Args:
        parts: from `score_parts`.
        sources: rows of the table that count.
        most: terms to find.

    Returns:
        The side, "query" or "key", the source's row, and the term; the largest first, and none that is zero.
    """
    terms = np.stack([parts.query_terms, parts.key_terms])[:, sources]
    order = np.argsort(-np.abs(terms), axis=None, kind="stable")[:most]
    sides, places = np.unravel_index(order, terms.shape)
    return [
        (("query", "key")[side], int(sources[place]), float(terms[side, place]))
        for side, place in zip(sides, places, strict=True)
        if terms[side, place]
    ]
