"""What was done to a graph to make it smaller, and what that left of it (pure Python)."""

from dataclasses import dataclass
from typing import NamedTuple


class Scores(NamedTuple):
    """How much of a graph is explained by features; `scores` has the definitions.

    Attributes:
        replacement: share in [0, 1]; None if neither inputs nor errors have influence.
        completeness: share in [0, 1].
    """

    replacement: float | None
    completeness: float


@dataclass(frozen=True, kw_only=True)
class PruningScores:
    """What pruning left of a graph's scores.

    Attributes:
        unpruned: of the graph before pruning.
        pinned: of the same graph with every feature that was dropped counted as error.
        pruned: of the result.
    """

    unpruned: Scores
    pinned: Scores
    pruned: Scores


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """How a graph was pruned.

    Attributes:
        mode: whose rule, one of `pruning.MODES`.
        node_threshold: share of influence that the kept nodes hold.
        edge_threshold: share of the edge scores that the kept edges hold.
    """

    mode: str
    node_threshold: float
    edge_threshold: float


@dataclass(frozen=True, kw_only=True)
class GroupingSettings:
    """How supernodes were found.

    Attributes:
        threshold: least similarity of any two features in a group.
        map_weight: share of the activation maps in the similarity.
    """

    threshold: float
    map_weight: float
