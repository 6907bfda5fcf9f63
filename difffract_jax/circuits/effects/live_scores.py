"""Blocks of the frozen map whose attention scores follow what enters them, to first order.

A frozen block reads values through the recorded pattern. Here its scores are recomputed from the residual streams, with
the denominators of the norms of queries and keys held, and what they differ from themselves is added to the recorded
ones: nothing at the traced point, but a derivative takes the paths through queries and keys as well as those through
values. Over a whole run that derivative is the sum over all scores of gradient times score (`score_gradients`,
`score_sides`), along all paths.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.address import Group
from difffract_jax.circuits.attribution.score_sides import queries_or_keys
from difffract_jax.models.blocks import BlockActs, Cond, StandIn


class LiveScores(NamedTuple):
    """A block, or a stack of them, that runs frozen but for its attention scores; see the module.

    Attributes:
        block: with all of its weights.
    """

    block: Any

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of the block's MLP sublayers."""
        return self.block.groups

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the block's own MLP sublayer of a group."""
        return self.block.run_mlp(group, x)

    def __call__(
        self, h: Sequence[Float[Array, "_ d_model"]], cond: Cond, *, frozen: Any, mlp: StandIn
    ) -> tuple[tuple[Array, ...], BlockActs]:
        """Runs the block; see `models.blocks.Block`.

        Args:
            h: the residual stream of each group's sequence.
            cond: what the evaluation's blocks share.
            frozen: record of the block.
            mlp: stands in for the MLP sublayers.
        """
        if self.block.attention_shape(frozen) is None:
            return self.block(h, cond, frozen=frozen, mlp=mlp)
        sides = []
        for part in (0, 1):
            held = jax.lax.stop_gradient(queries_or_keys(self.block, cond, frozen, part, tuple(h), None)[1])
            sides.append(queries_or_keys(self.block, cond, frozen, part, tuple(h), held)[0])
        scores = jnp.einsum("qhd,khd->hqk", *sides) * sides[0].shape[-1] ** -0.5
        return self.block(h, cond, frozen=frozen, mlp=mlp, scores=scores - jax.lax.stop_gradient(scores))
