"""What a graph says of the paths that the replacement holds: pooled embedding, and attention (pure Python)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PooledPath:
    """How much of a target goes through the pooled embedding, which the replacement holds constant.

    Attributes:
        value: of the target in the real model.
        without: its value with the pooled embedding of the empty prompt.
        share: the absolute difference over the absolute value.
    """

    value: float
    without: float
    share: float


@dataclass(frozen=True, kw_only=True)
class ExplainedPooled:
    """What modulations add to a target's account, where they are nodes.

    Attributes:
        total: sum of its edges from modulations, of all there are; its bias holds minus this.
        absolute: sum of the absolute edges.
        remainder: by how much more the target falls when the pooled embedding is exchanged.
        direct: by how much it falls in the frozen map, all sources held, when all modulations are exchanged.
        unspoken: part of `total` that no word makes, as the place where CLIP reads the embedding; None without words.
        points: of the integral.
    """

    total: float
    absolute: float
    remainder: float
    direct: float
    unspoken: float | None
    points: int


@dataclass(frozen=True, kw_only=True)
class ExplainedAttention:
    """What attention's scores add to a target's account, where they are nodes.

    Attributes:
        total: sum of its edges from scores, of all scores of all blocks; its bias holds minus this.
        absolute: sum of the absolute edges from the graph's own score nodes.
        forward: the target's derivative by eps with all queries scaled by 1 + eps and live softmaxes, in forward mode;
            it is `total` up to rounding.
    """

    total: float
    absolute: float
    forward: float
