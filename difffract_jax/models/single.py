"""The single-stream block of FLUX (docs/method.md, section 1): the joint sequence, text first.

Attention and MLP read the same norm, and their outputs are added. The fused output's bias lies outside the MLP's
output y. A target enters at a row of x, which is read off the stream that enters the block: no attention lies between.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.address import JOINT, Group
from difffract_jax.models.blocks import (
    QKV,
    BlockActs,
    Cond,
    Entry,
    FluxConfig,
    Number,
    RMSNorm,
    StandIn,
    merge_heads,
    project,
    split_heads,
)
from difffract_jax.models.head_rows import OneAttention, head_of_row
from difffract_jax.ops import attend, film, layer_norm, rotate


class SingleFrozen(NamedTuple):
    """What is held in one single-stream block.

    Attributes:
        q: queries of the joint sequence.
        k: its keys.
        inv_std: scale of its one norm.
        mod: its modulation; None to compute it from what conditions the evaluation.
    """

    q: Float[Array, "seq heads head_dim"]
    k: Float[Array, "seq heads head_dim"]
    inv_std: Float[Array, "seq"]
    mod: Float[Array, "3 d_model"] | None = None


class SingleBlock(OneAttention):
    """A single-stream block; `mod` gives shift, scale, gate, and `mlp_out` holds the bias of the fused output."""

    groups: ClassVar[tuple[Group, ...]] = (JOINT,)
    attention_order: ClassVar[tuple[int, ...]] = (0,)
    gate_rows: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.mod = nnx.Linear(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.qkv = QKV(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.up = nnx.Linear(d_model, config.d_ff, param_dtype=dtype, rngs=rngs)
        self.attn_out = nnx.Linear(d_model, d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(config.d_ff, d_model, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Sequence[Float[Array, "_ d_model"]],
        cond: Cond,
        *,
        frozen: SingleFrozen | None = None,
        mlp: StandIn | None = None,
        heads: Float[Array, "heads"] | None = None,
        scores: Float[Array, "heads queries keys"] | None = None,
        modulation: Sequence[Float[Array, "3 d_model"]] | None = None,
    ) -> tuple[tuple[Array], BlockActs]:
        """Runs the block on the joint sequence, its one group."""
        (joint,), mod = h, self._modulation(cond, frozen)
        if modulation is not None:
            mod = mod + modulation[0]
        shift, scale, gate = mod
        normed, inv_std = layer_norm(joint, None if frozen is None else frozen.inv_std)
        x = film(normed, scale, shift)
        q, k = self._queries_keys(x, cond) if frozen is None else (frozen.q, frozen.k)
        v = split_heads(project(self.qkv, x, slice(2 * joint.shape[1], None)), self.q_norm.width)
        precision = None if frozen is None else "highest"
        mixed = attend(q, k, v, scale=q.shape[-1] ** -0.5, bias=scores, precision=precision)
        if heads is not None:
            mixed = mixed * heads[None, :, None]
        y = self.run_mlp(0, x) if mlp is None else mlp(0, x)
        out = self.attn_out(merge_heads(mixed)) + y
        out = out if self.mlp_out.bias is None else out + self.mlp_out.bias[None, :]
        joint = joint + gate[None, :] * out
        return (joint,), BlockActs(SingleFrozen(q, k, inv_std, mod), (x,), (y,), (joint,))

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the block's MLP, without the bias that it shares with attention."""
        del group  # there is one
        return jax.nn.gelu(self.up(x), approximate=True) @ self.mlp_out.kernel[...]

    def gates(self, cond: Cond, frozen: SingleFrozen | None = None) -> tuple[Float[Array, "d_model"], ...]:
        """Returns the block's one gate."""
        return (self._modulation(cond, frozen)[2],)

    def modulations(self, cond: Cond) -> tuple[Float[Array, "3 d_model"]]:
        """Returns shift, scale and gate."""
        return (self._modulation(cond, None),)

    def slim(self) -> "SingleBlock":
        """Returns the block with the values' columns, attention's output and the heads' width alone."""
        slim = jax.tree.map(lambda leaf: leaf, self)
        slim.qkv = slim.qkv.from_column(2 * slim.qkv.in_features)
        slim.mod = slim.up = None
        slim.mlp_out.kernel = None
        return slim

    def entry(self, cond: Cond, frozen: SingleFrozen) -> Entry:
        """Returns the function that pulls gradients at single rows of x back to the stream before the block."""
        scale = self._modulation(cond, frozen)[1]

        def enter(gradients: Array, group: Array, row: Array) -> tuple[Array, ...]:
            del group  # there is one
            inv_std = frozen.inv_std.at[row].get(mode="clip")
            origin = jnp.zeros_like(gradients)
            _, pull = jax.vjp(lambda h: film(layer_norm(h, inv_std)[0], scale, jnp.zeros_like(scale)), origin)
            rows = jnp.zeros((gradients.shape[0], frozen.inv_std.shape[0], gradients.shape[1]), gradients.dtype)
            return (rows.at[jnp.arange(row.shape[0]), row].set(pull(gradients)[0], mode="drop"),)

        return enter

    def query_or_key(
        self,
        cond: Cond,
        frozen: SingleFrozen,
        part: int,
        head: Number,
        group: int,
        row: Number,
        h: Float[Array, "d_model"],
        denominator: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
        """Returns one head's rotated query or key of a residual row, and 1 / its root mean square."""
        del group  # there is one
        shift, scale = self._modulation(cond, frozen)[:2]
        norm = (self.q_norm, self.k_norm)[part]
        return head_of_row(self.qkv, norm, cond, (shift, scale), part, head, row, h, frozen.inv_std[row], denominator)

    def _queries_keys(self, x: Float[Array, "seq d_model"], cond: Cond) -> tuple[Array, Array]:
        """Returns queries and keys of the joint sequence, normalised and rotated, [seq heads head_dim]."""
        q, k = jnp.split(project(self.qkv, x, slice(None, 2 * x.shape[1])), 2, axis=1)
        q, k = self.q_norm(split_heads(q, self.q_norm.width)), self.k_norm(split_heads(k, self.k_norm.width))
        return rotate(q, cond.cos, cond.sin), rotate(k, cond.cos, cond.sin)

    def _modulation(self, cond: Cond, frozen: SingleFrozen | None) -> Float[Array, "3 d_model"]:
        """Returns shift, scale and gate; the recorded ones where there are."""
        if frozen is not None and frozen.mod is not None:
            return frozen.mod
        return self.mod(jax.nn.silu(cond.vec)).reshape(3, -1)
