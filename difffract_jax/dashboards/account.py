"""What adds up to a graph's targets, by kind of source (NumPy).

    target = features + inputs + errors + rest + attention + pooled path + edges that are not in the file + bias

Several targets are added up by their weights. The viewer's bar shows the same, computed in the page.
"""

from typing import NamedTuple

import numpy as np

from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, MODULATION, REST, SCORE, Graph


class Account(NamedTuple):
    """The parts of the targets' weighted value.

    Attributes:
        features: sum of edges from features.
        inputs: from inputs.
        errors: from what transcoders miss.
        rest: from features that were not expanded.
        attention: from attention's scores, where they are nodes; the bias holds their sum with the opposite sign.
        pooled: from modulations, where they are nodes; the bias holds their sum with the opposite sign, too.
        absent: from edges that are not in the file: too weak when it was traced, or cut by pruning.
        bias: the affine map at zero sources; None for documents of other tools, which do not tell it.
        value: of the target; None likewise.
    """

    features: float
    inputs: float
    errors: float
    rest: float
    attention: float
    pooled: float
    absent: float
    bias: float | None
    value: float | None


def account(graph: Graph) -> Account:
    """Returns what adds up to a graph's targets.

    Args:
        graph: any graph.
    """
    weights, count = graph.root_weights, graph.targets.size
    weighted = graph.edge_attribution.astype(np.float64) * weights[graph.edge_target]
    kinds = graph.node_kind[graph.edge_source]
    features, inputs, errors, rest, attention, pooled = (
        float(weighted[kinds == kind].sum()) for kind in (FEATURE, INPUT, ERROR, REST, SCORE, MODULATION)
    )
    share = weights[:count]
    total, bias, value = (
        float(share @ column[:count]) for column in (graph.target_sum, graph.target_bias, graph.target_preactivation)
    )
    known = bool(np.isfinite(bias) and np.isfinite(value))
    return Account(
        features,
        inputs,
        errors,
        rest,
        attention,
        pooled,
        total - float(weighted.sum()),
        bias if known else None,
        value if known else None,
    )
