"""Names of nodes, one each, that people and files can use: img/2/f401@12, error img/2, input txt, output 0.

A feature is written as in `feature`, with the block numbered through the model; position and step only where the graph
tells several apart. A target that shares its name with another node, once positions are summed over, is marked.
"""

import difflib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from difffract_jax.circuits.graph import FEATURE, INPUT, KINDS, OUTPUT, STREAMS, Graph
from difffract_jax.config import UserError


def node_names(graph: Graph) -> list[str]:
    """Returns the name of every node; no two are alike."""
    steps = np.unique(graph.node_step).size > 1
    names = [_name(graph, node, steps) for node in range(graph.node_kind.size)]
    targets, often = graph.targets.size, Counter(names)
    names = [f"{name} (target)" if node < targets and often[name] > 1 else name for node, name in enumerate(names)]
    seen: Counter[str] = Counter()
    for node, name in enumerate(names):
        seen[name] += 1
        names[node] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _name(graph: Graph, node: int, steps: bool) -> str:
    kind, stream, block = int(graph.node_kind[node]), STREAMS[graph.node_stream[node]], graph.node_block[node]
    if kind == OUTPUT:
        return f"output {np.sum(graph.node_kind[:node] == OUTPUT)}"
    place = stream if kind == INPUT else f"{stream}/{block}"
    name = f"{place}/f{graph.node_feature[node]}" if kind == FEATURE else f"{KINDS[kind]} {place}"
    position = f"@{graph.node_position[node]}" if graph.node_position[node] >= 0 else ""
    return f"{name}{position}{f'#{graph.node_step[node]}' if steps else ''}"


def find_nodes(graph: Graph, names: Sequence[str]) -> Int64[np.ndarray, "name"]:
    """Returns the nodes of some names.

    Args:
        graph: the graph.
        names: from `node_names`.

    Raises:
        UserError: naming the first that no node has, and the nearest that one has.
    """
    number = {name: node for node, name in enumerate(node_names(graph))}
    for name in names:
        if name not in number:
            close = difflib.get_close_matches(name, list(number), n=1)
            hint = (
                f"did you mean `{close[0]}`?" if close else "write it as in `img/2/f401`, as `export` to csv lists it."
            )
            raise UserError(f"The graph has no node `{name}`; {hint}")
    return np.array([number[name] for name in names], np.int64)
