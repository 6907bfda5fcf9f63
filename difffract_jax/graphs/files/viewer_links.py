"""Which nodes the links of a viewer's document join: links name them, and names may be missing or shared.

1. A link that names a node that the document does not have is left out, as the viewers do, and counted.
2. circuit-tracer calls the error of layer L like the feature L of layer 0 at the same column (`0_L_COLUMN`), so that
   two nodes may share a name. Nothing leads into an error: a link to the name leads to the feature. A link from it
   leaves the one that lies below its target, where one alone does.
3. Where both do, and there is a link for each, they are given out in the order of the nodes, in which circuit-tracer
   writes them; a single link is the feature's, as the viewers take it. These are counted: the document does not tell.
4. Several links may join the same two nodes. All are kept, so that their weights add up, and those after the first are
   counted: a document that was put together by mistake looks like this.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from difffract_jax.graphs.unclear_links import UnclearLinks

NAMED = 3
"""Names that are kept of links that were left out, repeat others, or are not clear."""


class ResolvedLinks(NamedTuple):
    """The links of a document that join two of its nodes.

    Attributes:
        source: node of each.
        target: node of each.
        kept: the links, in the order of the document.
        unclear: those that were left out, are told twice, or whose source the document does not tell; None if there
            are none.
    """

    source: Int64[np.ndarray, "link"]
    target: Int64[np.ndarray, "link"]
    kept: list[Mapping[str, Any]]
    unclear: UnclearLinks | None


def resolve_links(
    links: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    errors: Bool[np.ndarray, "node"],
    block: Int64[np.ndarray, "node"],
) -> ResolvedLinks:
    """Finds the nodes that links join.

    Args:
        links: of the document, with source, target and weight.
        ids: name of every node; an error and another node may share one.
        errors: which nodes are errors.
        block: of every node.
    """
    named: dict[str, list[int]] = {}
    for node, name in enumerate(ids):
        named.setdefault(name, []).append(node)
    kept = [link for link in links if link["source"] in named and link["target"] in named]
    target = [next((n for n in named[link["target"]] if not errors[n]), named[link["target"]][0]) for link in kept]
    pairs = [(link["source"], into) for link, into in zip(kept, target, strict=True)]
    often, seen, source, doubtful = Counter(pairs), Counter[tuple[str, int]](), [], []
    for name, into in pairs:
        possible = named[name]
        if len(possible) > 1:
            possible = [node for node in possible if block[node] < block[into]] or possible
        if len(possible) > 1:
            doubtful.append(name)
            both = often[name, into] == len(possible)
            node = possible[seen[name, into]] if both else next(n for n in possible if not errors[n])
            seen[name, into] += 1
        else:
            node = possible[0]
        source.append(node)
    joined = list(zip(source, target, strict=True))
    again = [pair for pair, times in Counter(joined).items() if times > 1]
    absent = [end for link in links for end in (link["source"], link["target"]) if end not in named]
    unclear = UnclearLinks(
        left_out=len(links) - len(kept),
        absent=_first(absent),
        in_doubt=len(doubtful),
        shared=_first(doubtful),
        repeated=len(joined) - len(set(joined)),
        pairs=_first([f"{ids[a]} -> {ids[b]}" for a, b in again]),
    )
    ends = np.array(source, np.int64), np.array(target, np.int64)
    return ResolvedLinks(*ends, kept, unclear if absent or doubtful or again else None)


def _first(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))[:NAMED]
