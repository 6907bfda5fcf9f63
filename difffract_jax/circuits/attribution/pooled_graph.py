"""The pooled path as nodes of a graph: modulations, and the words behind them (docs/method.md, section 11).

1. `pooled_path.integrate` gives every modulation's edge into the graph's targets.
2. `pooled_words.word_parts` splits each edge among the words of the prompt that its branch of guidance reads.
3. `graphs.pooled_nodes` puts both into the graph; what is left over is told in its provenance.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import BRANCHES, PROMPT
from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.attribution.pooled_path import PooledEffects, integrate
from difffract_jax.circuits.attribution.pooled_words import Words, word_parts
from difffract_jax.circuits.frozen.replacement import Prepared
from difffract_jax.circuits.trace.capture import Span, Trace
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.held_paths import ExplainedPooled
from difffract_jax.graphs.pooled_nodes import PooledNodes, with_pooled_nodes
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.streaming import streams_layers


def check_pooled(trace: Trace | Span | Prepared, pipe: Pipeline | None) -> None:
    """Refuses what the pooled path is not explained of.

    Args:
        trace: what is traced.
        pipe: the pipeline that was traced.

    Raises:
        UserError: if it did not run the exchange of the pooled embedding, or the pipeline is
            missing, another one, has streamed blocks, or takes no pooled embedding.
    """
    whole = trace.trace if isinstance(trace, Prepared) else trace
    one = whole.traces[-1] if isinstance(whole, Span) else whole
    if pipe is not None and not pipe.config.transformer.pooled_width:
        raise UserError(
            "Nothing pooled from the prompt enters this model, which has no pooled path to explain; leave it frozen."
        )
    if one.record.unpooled is None:
        raise UserError(
            "This trace did not run the exchange of the pooled embedding: it was imported, or its model takes none; "
            "capture one with a model that does to have the pooled path explained."
        )
    if pipe is None:
        raise UserError("The pooled path is explained with the live model; give the pipeline that was traced, as pipe.")
    if pipe.source != one.info.model:
        raise UserError(
            f"The trace is of the model {one.info.model[:12]}, but the pipeline given is {pipe.source[:12]}; give the "
            "one that was traced."
        )
    if streams_layers(pipe.transformer.stacks):
        raise UserError(
            "The pooled path is explained with all of the model's blocks in memory; give --weights device, or leave "
            "the pooled path frozen."
        )


def add_pooled(
    graph: Graph, engine: Engine, rows: Int64[np.ndarray, "target"], pipe: Pipeline, min_attribution: float
) -> Graph:
    """Adds modulations and words to a graph.

    Args:
        graph: position by position, without them.
        engine: of its steps.
        rows: of its targets in the engine's table, in their order.
        pipe: the pipeline that was traced.
        min_attribution: smallest edge that is kept.
    """
    effects = integrate(engine, rows, pipe)
    share = graph.root_weights[graph.targets]
    # One direction for each modulation: what it brings to all targets, by their weights.
    directions = np.einsum("t,tmw->mw", share, effects.weights)
    spoken = {}
    for branch, exchanged in effects.exchanged.items():
        info, mine = next(one for one in engine.infos if one.branch == branch), effects.places.branch == branch
        words = word_parts(pipe, info.text, info.text_tokens, directions[mine], exchanged)
        if words is not None:
            spoken[branch] = words
    edges, bias = _in_rows(spoken, effects, share)
    places = {branch: words.place for branch, words in spoken.items()}
    nodes = PooledNodes(
        *effects.places,
        change=effects.change,
        edges=effects.edges,
        remainder=effects.alone - effects.edges,
        word_branch=np.repeat(np.array([*places], np.int64), [place.size for place in places.values()]),
        place=np.concatenate([np.zeros(0, np.int64), *places.values()]),
        words=edges,
        bias=bias,
    )
    graph = with_pooled_nodes(graph, nodes, engine.infos[0].step, min_attribution)
    texts = {name: _texts(spoken.get(BRANCHES.index(branch))) for name, branch in _NAMES.items()}
    return graph.with_provenance(pooled=_told(effects, None if not spoken else float(bias.sum())), **texts)


_NAMES = {"words": BRANCHES[PROMPT], "negative_words": BRANCHES[1 - PROMPT]}
"""Of a graph's provenance what holds the words of which branch."""


def _in_rows(
    spoken: Mapping[int, Words], effects: PooledEffects, share: Float64[np.ndarray, "target"]
) -> tuple[Float64[np.ndarray, "modulation word"], Float64[np.ndarray, "modulation"]]:
    """Returns the edges of all branches' words, which reach the modulations of their own, and what no word makes."""
    edges = np.zeros((effects.change.size, sum(words.place.size for words in spoken.values())))
    bias, first = share @ effects.rounding if spoken else np.zeros(effects.change.size), 0
    for branch, words in spoken.items():
        mine, end = effects.places.branch == branch, first + words.place.size
        edges[mine, first:end], first = words.edges, end
        bias[mine] += words.missed
    return edges, bias


def _told(effects: PooledEffects, unspoken: float | None) -> tuple[ExplainedPooled, ...]:
    """Returns what a graph says of each target; what no word makes is the same for all, by their weights."""
    total, absolute = effects.edges.sum(axis=1).tolist(), np.abs(effects.edges).sum(axis=1).tolist()
    columns = zip(total, absolute, effects.remainder.tolist(), effects.direct.tolist(), strict=True)
    return tuple(
        ExplainedPooled(total=a, absolute=b, remainder=c, direct=d, unspoken=unspoken, points=effects.points)
        for a, b, c, d in columns
    )


def _texts(words: Words | None) -> tuple[str, ...]:
    """Returns the words by their places in CLIP's sequence."""
    if words is None or not words.place.size:
        return ()
    found = [""] * (int(words.place.max()) + 1)
    for place, text in zip(words.place.tolist(), words.text, strict=True):
        found[place] = text
    return tuple(found)
