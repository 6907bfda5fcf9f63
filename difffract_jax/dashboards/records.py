"""What a report shows of a circuit: its strongest features, with where each is active and what it stands for."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64

from difffract_jax.address import BRANCHES, IMG, PROMPT, TXT
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE, Graph

Known = TypeVar("Known")


class Card(NamedTuple):
    """One feature of a circuit, as a report shows it.

    Attributes:
        name: as commands take it, img/1/f3.
        detects: what it stands for by the labels; "" without labels.
        influence: share of all influence on the targets, in [0, 1].
        value: largest value.
        heat: over image tokens, [row column], for features of image positions; None for those of text.
        words: tokens of the prompt with values, for features of text positions; empty for those of images.
    """

    name: str
    detects: str
    influence: float
    value: float
    heat: Float64[np.ndarray, "row column"] | None
    words: tuple[tuple[str, float], ...]


def feature_of(graph: Graph, node: int) -> Feature:
    """Returns a feature node without its position, in a graph of both branches with its own.

    Args:
        graph: one that says which blocks its model has.
        node: a feature.
    """
    site = graph.provenance.layout.site_number(int(graph.node_block[node]), int(graph.node_stream[node]))
    branch = BRANCHES[graph.node_branch[node]] if graph.node_branch.any() else None
    return Feature(*site, int(graph.node_feature[node]), branch=branch)


def top_features(graph: Graph, most: int, streams: Sequence[int] = (IMG, TXT)) -> list[int]:
    """Returns a pruned graph's most influential features, targets left out, the strongest first.

    Args:
        graph: pruned.
        most: how many at most.
        streams: whose positions, as `graph.IMG` and `graph.TXT`.

    Returns:
        Nodes.
    """
    inside = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)
    inside = inside[np.isin(graph.node_stream[inside], streams)]
    return inside[np.argsort(-graph.node_influence[inside], kind="stable")][:most].tolist()


def card(graph: Graph, node: int, detects: str = "") -> Card:
    """Returns what is to be shown of a feature.

    Args:
        graph: summed over positions, with influence; its provenance tells the image's grid and the prompt's tokens.
        node: a feature.
        detects: what it stands for.
    """
    run = graph.provenance.known
    feature = feature_of(graph, node)
    part = slice(graph.map_indptr[node], graph.map_indptr[node + 1])
    positions, values = graph.map_position[part], graph.map_value[part].astype(np.float64)
    heat, words = None, ()
    if graph.node_stream[node] == IMG:
        grid = _said(run.grid, "its image's grid")
        heat = np.zeros(int(np.prod(grid)))
        heat[positions] = values
        heat = heat.reshape(grid)
    else:
        tokens = run.tokens if graph.node_branch[node] == PROMPT else run.negative_tokens or None
        words = _words(
            _said(tokens, "its prompt's tokens"), dict(zip(positions.tolist(), values.tolist(), strict=True))
        )
    return Card(
        str(feature),
        detects,
        float(graph.node_influence[node]),
        float(values.max(initial=0.0)),
        heat,
        words,
    )


def _said(fact: Known | None, what: str) -> Known:
    """Returns what a graph says of its run; refuses one that does not say it."""
    if fact is None:
        raise UserError(f"The graph does not say {what}; give the graph of one run, as `difffract trace` wrote it.")
    return fact


def _words(tokens: Sequence[str], values: dict[int, float]) -> tuple[tuple[str, float], ...]:
    """Returns the prompt's tokens up to its end, with a feature's values."""
    own = [i for i, token in enumerate(tokens) if token not in ("<pad>", "[PAD]") and not token.startswith("<|")]
    last = max([*own, *values], default=-1) + 1
    return tuple((tokens[i].replace("▁", " ").strip() or "·", values.get(i, 0.0)) for i in range(last))


def edges_among(graph: Graph, nodes: Sequence[int]) -> list[tuple[int, int, float]]:
    """Returns the edges among some nodes, as places in `nodes` and the share of the target's sum of absolute edges.

    Args:
        graph: the graph.
        nodes: to draw.
    """
    place = {node: i for i, node in enumerate(nodes)}
    total = np.bincount(graph.edge_target, np.abs(graph.edge_attribution), graph.node_kind.size)
    edges: list[Any] = []
    for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True):
        if int(source) in place and int(target) in place:
            edges.append((place[int(source)], place[int(target)], float(value / total[target])))
    return edges
