"""The blocks of Z-Image, and the shape of the model: see `zimage`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.address import Group, Layout, Stack
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
from difffract_jax.models.flux2 import GatedMLP
from difffract_jax.models.head_rows import OneAttention, head_of_input
from difffract_jax.models.hidden_tokens import MASK_COLUMNS, sequence_with_mask, with_mask
from difffract_jax.ops import attend, attention_pattern, rms_norm, root_norm, rotate

UNIT = 32
"""Both sequences are multiples of this."""
NORM_EPS = 1e-5
"""Added to the mean square in every RMS norm."""
TIME_WIDTH = 256
"""Channels of the embedding of time, at most: no more than the residual stream has."""
TIME_HIDDEN = 1024
"""Hidden channels of its embedder."""
KINDS = 4
"""Modulations of a block: scale1, gate1, scale2, gate2."""
IMAGE, TEXT = Group("img", "img", ("img",)), Group("txt", "txt", ("txt",))
JOINT = Group("joint", "single", ("txt", "img"))
"""The groups of blocks on the image, on the text, and on both."""


@dataclass(frozen=True, kw_only=True)
class ZImageConfig(FluxConfig):
    """Shape of a Z-Image transformer.

    Attributes:
        depth: number of blocks on both streams.
        depth_refiner: number of blocks on either stream alone.
        depth_double: 0.
        depth_single: 0.
        rope_axes: how a head's columns are divided among place in the text, row and column; even numbers.
        text_width: channels of Qwen3's states, and one that tells learned tokens.
        pooled_width: 0, since no pooled embedding enters.
        guidance: False, since no guidance scale enters.
        rope_theta: base of the rotary wavelengths.
        family: what `config.json` of a directory tells this shape by.
    """

    title: ClassVar[str | None] = "Z-Image"
    text_unit: ClassVar[int] = UNIT
    image_unit: ClassVar[int] = UNIT
    thinking: ClassVar[bool] = True
    depth: int
    depth_refiner: int
    depth_double: int = 0
    depth_single: int = 0
    pooled_width: int = 0
    guidance: bool = False
    mlp_ratio: float = 8 / 3
    rope_theta: float = 256.0
    family: Literal["zimage"] = "zimage"

    @property
    def d_ff(self) -> int:
        """Hidden columns of an MLP, of each of its two halves."""
        return int(self.d_model / 3 * 8)

    @property
    def hidden_ratio(self) -> float:
        """Numbers of an MLP's hidden layer that are in memory together, over d_model: gate, up and their product."""
        return 3 * self.mlp_ratio

    @property
    def score_columns(self) -> int:
        """Columns of the queries of all heads, or of the keys, those of the mask included."""
        return self.heads * (self.head_dim + MASK_COLUMNS)

    @property
    def time_width(self) -> int:
        """Channels of the embedding of time."""
        return min(self.d_model, TIME_WIDTH)

    @property
    def layout(self) -> Layout:
        """The model's stacks, blocks and groups of sites."""
        return Layout(
            (
                Stack("refine_img", self.depth_refiner, (IMAGE,)),
                Stack("refine_txt", self.depth_refiner, (TEXT,)),
                Stack("trunk", self.depth, (JOINT,)),
            )
        )


class ZImageFrozen(NamedTuple):
    """What is held in one block.

    Attributes:
        q: queries of its sequence.
        k: its keys.
        inv_rms: 1 / root mean square before attention.
        inv_out: that of what attention gives.
        inv_mlp: that before the MLP.
        mod: its modulations, as they multiply.
    """

    q: Float[Array, "rows heads columns"]
    k: Float[Array, "rows heads columns"]
    inv_rms: Float[Array, "rows"]
    inv_out: Float[Array, "rows"]
    inv_mlp: Float[Array, "rows"]
    mod: Float[Array, "4 d_model"]


class ZImageBlock(OneAttention):
    """A block on both streams, text first; see the module, and `blocks.Block` for its methods.

    Attributes:
        mod: gives scale1, gate1, scale2 and gate2; None where there are no modulations.
    """

    groups: ClassVar[tuple[Group, ...]] = (JOINT,)
    attention_order: ClassVar[tuple[int, ...]] = (0,)
    modulated: ClassVar[bool] = True

    def __init__(self, config: ZImageConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        options = {"param_dtype": dtype, "rngs": rngs}
        self.mod = nnx.Linear(config.time_width, KINDS * d_model, **options) if self.modulated else None
        self.qkv = QKV(d_model, 3 * d_model, use_bias=False, **options)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype, eps=NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype, eps=NORM_EPS)
        self.attn_out = nnx.Linear(d_model, d_model, use_bias=False, **options)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)
        self.before_attn, self.behind_attn, self.before_mlp, self.behind_mlp = (
            RMSNorm(d_model, dtype=dtype, eps=NORM_EPS) for _ in range(4)
        )

    def __call__(
        self,
        h: Sequence[Float[Array, "_ d_model"]],
        cond: Cond,
        *,
        frozen: ZImageFrozen | None = None,
        mlp: StandIn | None = None,
        heads: Float[Array, "heads"] | None = None,
        scores: Float[Array, "heads queries keys"] | None = None,
    ) -> tuple[tuple[Array], BlockActs]:
        """Runs the block on its one sequence."""
        (rows,), mod = h, self._modulations(cond, frozen)
        m, inv_rms = _scaled(self.before_attn, rows, mod[0], None if frozen is None else frozen.inv_rms)
        q, k = self._queries_keys(m, cond) if frozen is None else (frozen.q, frozen.k)
        # A recorded pattern stays the recorded one, whatever precision the rest of the replacement is run in.
        precision = None if frozen is None else "highest"
        mixed = attend(q, k, self._values(m), scale=q.shape[-1] ** -0.5, bias=scores, precision=precision)
        if heads is not None:
            mixed = mixed * heads[None, :, None]
        rows, inv_out = self._after_attention(rows, mod, mixed, None if frozen is None else frozen.inv_out)
        x, inv_mlp = _scaled(self.before_mlp, rows, mod[2], None if frozen is None else frozen.inv_mlp)
        y = self.run_mlp(0, x) if mlp is None else mlp(0, x)
        rows = rows + mod[3] * y
        return (rows,), BlockActs(ZImageFrozen(q, k, inv_rms, inv_out, inv_mlp, mod), (x,), (y,), (rows,))

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the block's MLP behind its norm."""
        del group  # there is one
        return rms_norm(self.mlp(x), self.behind_mlp.scale[...], NORM_EPS)

    def gates(self, cond: Cond, frozen: ZImageFrozen | None = None) -> tuple[Float[Array, "d_model"], ...]:
        """Returns the block's second gate, which stands behind the MLP."""
        return (self._modulations(cond, frozen)[3],)

    def slim(self) -> "ZImageBlock":
        """Returns the block with the values' columns, attention's output and norms alone."""
        slim = jax.tree.map(lambda leaf: leaf, self)
        slim.qkv = slim.qkv.from_column(2 * slim.qkv.in_features)
        slim.mod = slim.mlp = None
        return slim

    def entry(self, cond: Cond, frozen: ZImageFrozen) -> Entry:
        """Returns the function that pulls gradients at single rows of x back through the block; see `double`."""
        return partial(_enter, self, frozen, self._modulations(cond, frozen))

    def query_or_key(
        self,
        cond: Cond,
        frozen: ZImageFrozen,
        part: int,
        head: Number,
        group: int,
        row: Number,
        h: Float[Array, "d_model"],
        denominator: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
        """Returns one head's rotated query or key of a residual row, and 1 / its root mean square."""
        del group  # there is one
        m, _ = _scaled(self.before_attn, h[None], self._modulations(cond, frozen)[0], frozen.inv_rms[row][None])
        place = row + self._places(cond, frozen.q.shape[0]).start
        norm = (self.q_norm, self.k_norm)[part]
        made, used = head_of_input(self.qkv, norm, cond, part, head, place, m, denominator)
        return with_mask(made, made, cond.mod[place])[part], used

    def _places(self, cond: Cond, rows: int) -> slice:
        """Returns where this block's sequence of so many rows lies in that of both streams, text first."""
        first = cond.mod.shape[0] - rows if self.groups[0].streams == ("img",) else 0
        return slice(first, first + rows)

    def _queries_keys(self, m: Float[Array, "rows d_model"], cond: Cond) -> tuple[Array, Array]:
        """Returns queries and keys, normalised and rotated, with the columns of the mask, [rows heads columns]."""
        places = self._places(cond, m.shape[0])
        q, k = jnp.split(project(self.qkv, m, slice(None, 2 * m.shape[1])), 2, axis=1)
        q, k = self.q_norm(split_heads(q, self.q_norm.width)), self.k_norm(split_heads(k, self.k_norm.width))
        assert cond.cos is not None and cond.sin is not None
        cos, sin = cond.cos[places], cond.sin[places]
        return sequence_with_mask(rotate(q, cos, sin), rotate(k, cos, sin), cond.mod[places])

    def _values(self, m: Float[Array, "rows d_model"]) -> Float[Array, "rows heads head_dim"]:
        """Returns attention's values."""
        return split_heads(project(self.qkv, m, slice(2 * m.shape[1], None)), self.q_norm.width)

    def _after_attention(
        self,
        h: Float[Array, "rows d_model"],
        mod: Float[Array, "4 d_model"],
        mixed: Float[Array, "rows heads head_dim"],
        inv_out: Float[Array, "rows"] | None,
    ) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
        """Adds what attention gives to the residual stream; returns the scale of the norm behind it, too."""
        normed, used = root_norm(self.attn_out(merge_heads(mixed)), self.behind_attn.scale[...], inv_out, NORM_EPS)
        return h + mod[1] * normed, used

    def _modulations(self, cond: Cond, frozen: ZImageFrozen | None) -> Float[Array, "4 d_model"]:
        """Returns 1 + scale1, tanh(gate1), 1 + scale2 and tanh(gate2); the recorded ones where there are."""
        if frozen is not None:
            return frozen.mod
        if self.mod is None:
            return jnp.ones((KINDS, self.attn_out.out_features), self.attn_out.kernel.dtype)
        scale1, gate1, scale2, gate2 = self.mod(cond.vec).reshape(KINDS, -1)
        return jnp.stack([1 + scale1, jnp.tanh(gate1), 1 + scale2, jnp.tanh(gate2)])


class ImageRefiner(ZImageBlock):
    """A block on the image alone."""

    groups: ClassVar[tuple[Group, ...]] = (IMAGE,)


class TextRefiner(ZImageBlock):
    """A block on the text alone, without modulations."""

    groups: ClassVar[tuple[Group, ...]] = (TEXT,)
    modulated: ClassVar[bool] = False


def _scaled(
    norm: RMSNorm, h: Float[Array, "rows d_model"], scale: Float[Array, "d_model"], inv_rms: Float[Array, "rows"] | None
) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
    """Returns what a sublayer reads, and the scale of the norm before it: the given one, if one is given."""
    normed, used = root_norm(h, norm.scale[...], inv_rms, NORM_EPS)
    return normed * scale, used


def _enter(
    block: ZImageBlock,
    frozen: ZImageFrozen,
    mod: Float[Array, "4 d_model"],
    gradients: Float[Array, "target d_model"],
    group: Int[Array, "target"],
    row: Int[Array, "target"],
) -> tuple[Float[Array, "target _ d_model"], ...]:
    """Returns the cotangents of the stream before the block; see `double`, whose steps these are."""
    del group  # there is one
    heads, columns = frozen.q.shape[1:]
    targets, head_dim = row.shape[0], block.q_norm.width
    held_out, held_mlp = (one.at[row].get(mode="clip") for one in (frozen.inv_out, frozen.inv_mlp))

    def to_x(h: Array, mixed: Array) -> Array:
        return _scaled(block.before_mlp, block._after_attention(h, mod, mixed, held_out)[0], mod[2], held_mlp)[0]

    def to_values(h: Array) -> Array:
        return block._values(_scaled(block.before_attn, h, mod[0], jnp.ones_like(h[:, 0]))[0])

    origin = jnp.zeros_like(gradients)
    past, mixed = jax.vjp(to_x, origin, origin.reshape(targets, heads, head_dim))[1](gradients)
    alone = mixed[:, :, None] * jnp.eye(heads, dtype=mixed.dtype)[None, :, :, None]
    of_heads = jnp.zeros((targets * heads, heads * head_dim), mixed.dtype)
    (directions,) = jax.vjp(to_values, of_heads)[1](alone.reshape(targets * heads, heads, head_dim))
    queries = frozen.q.at[row].get(mode="clip")
    pattern = attention_pattern(queries, frozen.k, scale=columns**-0.5, precision="highest").transpose(2, 0, 1)
    shares = pattern * frozen.inv_rms[:, None, None]
    spread = jnp.einsum("sht,thm->tsm", shares, directions.reshape(targets, heads, -1))
    return (spread.at[jnp.arange(targets), row].add(past, mode="drop"),)
