"""What is printed of a graph: its target, its size, the strongest sources, and the paths that it explains.

`graph_summary` also says whether edges and bias add up to the pre-activations. It reads the graph's arrays only.
"""

from typing import Any

import numpy as np

from difffract_jax.graphs.graph import FEATURE, MODULATION, SCORE, WORD, Graph
from difffract_jax.graphs.names import node_names


def graph_summary(graph: Graph, most: int = 8) -> dict[str, Any]:
    """Returns what one wants to know of a graph first.

    Args:
        graph: the graph.
        most: how many of the strongest edges into its targets to list.
    """
    names, targets = node_names(graph), graph.targets
    incoming = np.flatnonzero(np.isin(graph.edge_target, targets))
    strongest = incoming[np.argsort(-np.abs(graph.edge_attribution[incoming]), kind="stable")][:most]
    rows = [
        {"from": names[graph.edge_source[edge]]}
        | ({"to": names[graph.edge_target[edge]]} if targets.size > 1 else {})
        | {"attribution": float(graph.edge_attribution[edge])}
        for edge in strongest
    ]
    paths = graph.provenance.pooled_path
    pooled = {"share of the frozen pooled path": ", ".join(f"{path.share:.3g}" for path in paths)} if paths else {}
    rounding = graph.provenance.precision
    rounded = {"bfloat16 error": f"{rounding.edge_error:.2g} of the largest edge"} if rounding else {}
    unclear = graph.provenance.unclear_links
    left_out = {"links left out": unclear.left_out} if unclear is not None and unclear.left_out else {}
    by_step = expanded_by_step(graph)
    spread = ", ".join(f"step {step}: {count}" for step, count in by_step.items())
    weighted = [{"target": names[node], "weight": float(graph.root_weights[node])} for node in targets]
    return {
        "target": names[targets[0]],
        **({"targets": weighted} if len(weighted) > 1 else {}),
        "nodes": graph.summary().nodes,
        **({"features expanded": spread} if len(by_step) > 1 else {}),
        "edges": len(graph.edge_attribution),
        **left_out,
        "conservation error": graph.largest_conservation_error,
        **rounded,
        **pooled,
        "strongest sources": rows,
        **attention_tables(graph, most),
        **pooled_tables(graph, most),
    }


def expanded_by_step(graph: Graph) -> dict[int, int]:
    """Returns how many expanded features a graph holds of each step that it was traced over; pruning leaves fewer."""
    mine = graph.node_step[graph.target_node[graph.node_kind[graph.target_node] == FEATURE]]
    steps = graph.provenance.steps or np.unique(graph.node_step).tolist()
    return {int(step): int(np.sum(mine == step)) for step in steps}


def attention_tables(graph: Graph, most: int = 8) -> dict[str, Any]:
    """Returns what attention's scores add to a graph's targets, where they are nodes; else nothing.

    Args:
        graph: the graph.
        most: how many of the scores with the largest edges to list.
    """
    told = graph.provenance.attention
    if not told:
        return {}
    names = node_names(graph)
    from_scores = np.flatnonzero((graph.node_kind == SCORE)[graph.edge_source])
    own = from_scores[graph.node_head[graph.edge_source[from_scores]] >= 0]
    order = own[np.argsort(-np.abs(graph.edge_attribution[own]), kind="stable")][:most]
    rows = [
        {"score": names[graph.edge_source[edge]]}
        | ({"to": names[graph.edge_target[edge]]} if graph.targets.size > 1 else {})
        | {"above its query's mean": float(graph.node_value[graph.edge_source[edge]])}
        | {"attribution": float(graph.edge_attribution[edge]), "remainder": float(graph.edge_remainder[edge])}
        for edge in order
    ]
    shown, size = (float(np.abs(graph.edge_attribution[edges]).sum()) for edges in (own, from_scores))
    missed = [abs(one.total - one.forward) / one.absolute if one.absolute else 0.0 for one in told]
    return {
        "sum of edges from scores": ", ".join(f"{one.total:.4g}" for one in told),
        "its distance from forward mode, over absolute edges": max(missed),
        "share of these edges that is from single scores": shown / size if size else None,
        **({"strongest scores": rows} if rows else {}),
    }


def pooled_tables(graph: Graph, most: int = 8) -> dict[str, Any]:
    """Returns what modulations and words bring to a graph's targets, where they are nodes; else nothing.

    Args:
        graph: the graph.
        most: how many of the modulations, and of the words, with the largest edges to list.
    """
    told = graph.provenance.pooled
    if not told:
        return {}
    names, several = node_names(graph), graph.targets.size > 1
    kind = graph.node_kind[graph.edge_source]
    from_modulations = np.flatnonzero(kind == MODULATION)
    order = from_modulations[np.argsort(-np.abs(graph.edge_attribution[from_modulations]), kind="stable")][:most]
    rows = [
        {"modulation": names[graph.edge_source[edge]]}
        | ({"to": names[graph.edge_target[edge]]} if several else {})
        | {"attribution": float(graph.edge_attribution[edge]), "remainder": float(graph.edge_remainder[edge])}
        for edge in order
    ]
    words = np.flatnonzero(graph.node_kind == WORD)
    brought = np.bincount(graph.edge_source, graph.edge_attribution.astype(np.float64), graph.node_kind.size)[words]
    spoken = [
        {"word": names[words[i]], "through modulations, edges kept": float(brought[i])}
        for i in np.argsort(-np.abs(brought), kind="stable")[:most]
    ]
    unspoken = told[0].unspoken
    return {
        "sum of edges from modulations": ", ".join(f"{one.total:.4g}" for one in told),
        "remainder of the exchange": ", ".join(f"{one.remainder:.2g}" for one in told),
        "points of the integral": told[0].points,
        "of the exchange, direct": ", ".join(f"{one.direct:.4g}" for one in told),
        "no word's": "embeddings are from a file, without CLIP" if unspoken is None else f"{unspoken:.4g}",
        **({"strongest modulations": rows} if rows else {}),
        **({"words": spoken} if spoken else {}),
    }
