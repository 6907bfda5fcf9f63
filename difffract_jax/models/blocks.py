"""What the blocks of an MM-DiT have in common, and what each class of blocks offers (docs/method.md, section 1).

A class of blocks is an NNX module of one block's weights; `double` and `single` hold FLUX's. Its weights with a leading
layer axis are a stack, and `stacks` runs those. Nothing outside `models` looks inside a block: `Block` lists what a
class must offer, and any class that offers it can be captured, replaced and attributed.

A block is `block(h, cond, *, frozen=None, mlp=None, heads=None, scores=None, modulation=None) -> (h, acts)`:

    live       `frozen` left out: queries, keys and norm scales are computed.
    frozen     they come from a record; then the block is affine in `h` but for its MLPs. The attention pattern is
               recomputed from q and k; no S x S matrix is ever stored.
    replaced   `mlp(i, x)` stands in for the MLP sublayer of the i-th group, a function of the sublayer's input x.

What a block computed leaves through `BlockActs`. Every function is for one example.

Symbols: h residual stream, m attention input, x and y MLP input and output, q and k queries and keys after RMS norm
and rotation, v values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.address import Group, Layout, flux_layout
from difffract_jax.ops import rms_norm

StandIn = Callable[[int, Float[Array, "rows d_model"]], Float[Array, "rows d_model"]]
"""Stands in for MLP sublayers: from a group's number within the block, and the sublayer's input, to its output."""
Entry = Callable[[Float[Array, "target d_model"], Int[Array, "target"], Int[Array, "target"]], tuple[Array, ...]]
"""Lets targets into the walk of cotangents; see `Block.entry`."""
Number = int | Int[Array, ""]
"""A number that may be traced, so that `jax.vmap` can run over it."""


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Shape of an MM-DiT.

    Attributes:
        depth_double: number of double-stream blocks.
        depth_single: number of single-stream blocks.
        heads: attention heads.
        head_dim: columns of a head.
        rope_axes: how a head's columns are divided among the three axes of position; even numbers.
        in_channels: channels of a packed latent.
        out_channels: channels of the velocity.
        text_width: channels of the text embedding (T5's width).
        pooled_width: channels of the pooled prompt embedding (CLIP's width).
        guidance: whether the model takes a guidance scale (FLUX.1-dev).
        mlp_ratio: hidden columns of an MLP over d_model.
        rope_theta: base of the rotary wavelengths.
        title: what its pipelines are called; None for FLUX and for a model of one's own.
        text_unit: the length of the text sequence is a multiple of this.
        image_unit: the number of image tokens is a multiple of this.
        thinking: whether the chat template of a language model that reads the prompt leaves room for thinking.
    """

    title: ClassVar[str | None] = None
    text_unit: ClassVar[int] = 1
    image_unit: ClassVar[int] = 1
    thinking: ClassVar[bool] = False
    depth_double: int
    depth_single: int
    heads: int
    head_dim: int
    rope_axes: tuple[int, ...]
    in_channels: int
    out_channels: int
    text_width: int
    pooled_width: int
    guidance: bool
    mlp_ratio: float = 4.0
    rope_theta: float = 10000.0

    @property
    def d_model(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def d_ff(self) -> int:
        """Hidden columns of an MLP."""
        return int(self.d_model * self.mlp_ratio)

    @property
    def score_columns(self) -> int:
        """Columns of the queries of all heads, or of the keys, as blocks record them."""
        return self.d_model

    @property
    def hidden_ratio(self) -> float:
        """Numbers of an MLP's hidden layer that are in memory together, over d_model: both sides of the GELU."""
        return 2 * self.mlp_ratio

    @property
    def layout(self) -> Layout:
        """The model's stacks, blocks and groups of sites."""
        return flux_layout(self.depth_double, self.depth_single)


class Streams(NamedTuple):
    """One thing per residual stream, mostly arrays [rows d_model].

    Attributes:
        img: the image stream's.
        txt: the text stream's.
    """

    img: Any
    txt: Any


def both(function: Callable[..., Any], *pairs: Any) -> Streams:
    """Applies a function to each stream; `pairs` are anything with `img` and `txt`."""
    return Streams(function(*(pair.img for pair in pairs)), function(*(pair.txt for pair in pairs)))


class Cond(NamedTuple):
    """What every block of one evaluation shares.

    Attributes:
        vec: conditioning vector of time, pooled prompt and guidance, [d_model].
        cos: cosines of the rotary angles, [seq head_dim/2]; None for a model whose attention knows no positions.
        sin: their sines.
        mod: modulations that blocks share, in a type of the model's own; None where every block computes its own.
    """

    vec: Float[Array, "d_model"]
    cos: Float[Array, "seq half"] | None
    sin: Float[Array, "seq half"] | None
    mod: Any = None


class Modulations(NamedTuple):
    """One thing for the modulations of a model, mostly arrays [layer kind d_model].

    Attributes:
        blocks: per group of all stacks; None for a group that names none.
        final: of the last norm, without a layer axis; None where it is not run.
    """

    blocks: tuple[Any, ...] | None
    final: Any


class BlockActs(NamedTuple):
    """What one block computed; all but the first have one entry per group.

    Attributes:
        frozen: queries, keys and norm scales it used; a type of the block's own.
        mlp_in: the MLP sublayer's input x.
        mlp_out: what was added for the MLP sublayer before its gate, y.
        residual: the residual streams leaving the block.
    """

    frozen: Any
    mlp_in: tuple[Float[Array, "_ d_model"], ...]
    mlp_out: tuple[Float[Array, "_ d_model"], ...]
    residual: tuple[Float[Array, "_ d_model"], ...]


class Block(Protocol):
    """One block of a stack. "Per group" is a tuple in the order of `groups`.

    Attributes:
        groups: of its MLP sublayers.
        attention_order: numbers of the groups within the block, in the order in which attention's sequence holds them.
            A class of blocks without attention has none, and takes no `scores`.
    """

    groups: ClassVar[tuple[Group, ...]]
    attention_order: ClassVar[tuple[int, ...]]

    def __call__(
        self,
        h: Sequence[Float[Array, "_ d_model"]],
        cond: Cond,
        *,
        frozen: Any = None,
        mlp: StandIn | None = None,
        heads: Float[Array, "heads"] | None = None,
        scores: Float[Array, "heads queries keys"] | None = None,
        modulation: Sequence[Float[Array, "_ d_model"]] | None = None,
    ) -> tuple[tuple[Array, ...], BlockActs]:
        """Runs the block.

        Args:
            h: the residual stream of each group's sequence.
            cond: what the evaluation's blocks share.
            frozen: record to take queries, keys and norm scales from.
            mlp: stands in for the MLP sublayers; `run_mlp` if left out.
            heads: factor of each attention head's output; 1 if left out.
            scores: added to attention's scores before the softmax; 0 if left out.
            modulation: added to the modulations, per group, in the order of `modulations`; 0 if left out. A class of
                blocks whose groups name no modulations does not take it.

        Returns:
            The residual streams after the block, per group, and what it computed.
        """
        ...

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the block's own MLP sublayer of a group."""
        ...

    def gates(self, cond: Cond, frozen: Any = None) -> tuple[Float[Array, "d_model"], ...]:
        """Returns the factor between each group's MLP output and its residual stream.

        Args:
            cond: what the evaluation's blocks share.
            frozen: record to take it from; computed if left out.
        """
        ...

    def modulations(self, cond: Cond) -> tuple[Float[Array, "_ d_model"], ...]:
        """Returns the modulations of each group, in the order of `Group.modulations`; needed where these are named.

        Args:
            cond: what the evaluation's blocks share.
        """
        ...

    def slim(self) -> "Block":
        """Returns the block without what it does not read when its MLPs are replaced and all else comes from a record.

        Queries and keys, modulations and MLPs are not in it, so that it is a tenth as large.
        """
        ...

    def entry(self, cond: Cond, frozen: Any) -> Entry:
        """Returns the function that pulls gradients at single rows of MLP inputs back through the frozen block.

        Args:
            cond: what the evaluation's blocks share.
            frozen: record of the block.

        Returns:
            A function of the targets' gradients by x, [target d_model], zeros for one that does not enter here; of
            their groups' numbers within the block; and of their rows within the group's sequence. It returns the
            cotangents of the residual streams entering the block, [target rows d_model] per group.
        """
        ...

    @staticmethod
    def attention_shape(frozen: Any) -> tuple[int, int, int] | None:
        """Returns queries, heads and columns of a head, from a record or a stack of them; None without attention."""
        ...

    @staticmethod
    def queries_and_keys(
        frozen: Any,
    ) -> tuple[Float[Array, "seq heads head_dim"], Float[Array, "seq heads head_dim"]]:
        """Returns the recorded queries and keys; attention scales their products by 1 / sqrt(head_dim)."""
        ...

    @staticmethod
    def with_queries(frozen: Any, factor: Float[Array, ""]) -> Any:
        """Returns a record, or a stack of them, with its queries multiplied by a factor."""
        ...

    def query_or_key(
        self,
        cond: Cond,
        frozen: Any,
        part: int,
        head: Number,
        group: int,
        row: Number,
        h: Float[Array, "d_model"],
        denominator: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
        """Returns one head's rotated query or key of a residual row, and 1 / its root mean square.

        Args:
            cond: what the evaluation's blocks share.
            frozen: record of the block; its norm scale is held.
            part: 0 for the query, 1 for the key.
            head: number of the head.
            group: the row's group, its number within the block.
            row: within the group's sequence.
            h: the residual row entering the block.
            denominator: 1 / root mean square to hold; that of the row itself if None.
        """
        ...


class RMSNorm(nnx.Module):
    """RMS norm of queries or keys over the columns of a head, with a learned scale; `eps` joins the mean square."""

    def __init__(self, width: int, *, dtype: DTypeLike, eps: float = 1e-6) -> None:
        self.scale, self.eps = nnx.Param(jnp.ones(width, dtype)), eps

    def __call__(self, x: Float[Array, "*rows head_dim"]) -> Float[Array, "*rows head_dim"]:
        """Normalises the last axis."""
        return rms_norm(x, self.scale[...], self.eps)

    @property
    def width(self) -> int:
        """Columns of a head."""
        return self.scale.shape[-1]

    def held(
        self, x: Float[Array, "rows head_dim"], denominator: Float[Array, ""] | None
    ) -> tuple[Float[Array, "rows head_dim"], Float[Array, ""]]:
        """Normalises with a given 1 / root mean square, x's own if None; returns which it was, too."""
        if denominator is None:
            denominator = jax.lax.rsqrt(jnp.mean(jnp.square(x)) + self.eps)
        return x * denominator * self.scale[...], denominator


class QKV(nnx.Linear):
    """The projection to queries, keys and values, side by side.

    Attributes:
        first: the first of the columns that are there; those of a slim block are the values' alone.
    """

    first: int = 0

    def from_column(self, first: int) -> "QKV":
        """Returns the projection without the columns before `first`."""
        rest = jax.tree.map(lambda leaf: leaf, self)
        rest.kernel = nnx.Param(self.kernel[..., first - self.first :])
        if self.bias is not None:
            rest.bias = nnx.Param(self.bias[..., first - self.first :])
        rest.first = first
        return rest


def split_heads(x: Float[Array, "rows width"], head_dim: int) -> Float[Array, "rows heads head_dim"]:
    """Cuts the columns into heads."""
    return x.reshape(x.shape[0], -1, head_dim)


def merge_heads(x: Float[Array, "rows heads head_dim"]) -> Float[Array, "rows width"]:
    """Puts the heads' columns side by side."""
    return x.reshape(x.shape[0], -1)


def join_streams(pair: Any) -> Float[Array, "seq *rest"]:
    """Puts the streams into one sequence, text first."""
    return jnp.concatenate([pair.txt, pair.img])


def split(joint: Float[Array, "seq *rest"], text_tokens: int) -> Streams:
    """Undoes `join_streams`."""
    return Streams(img=joint[text_tokens:], txt=joint[:text_tokens])


def project(layer: QKV, x: Float[Array, "rows d_model"], columns: slice) -> Float[Array, "rows columns"]:
    """Applies some columns of the projection to queries, keys and values."""
    begin = 0 if columns.start is None else columns.start
    assert begin >= layer.first, "a slim block has no queries and keys"
    part = slice(begin - layer.first, None if columns.stop is None else columns.stop - layer.first)
    y = x @ layer.kernel[:, part]
    return y if layer.bias is None else y + layer.bias[None, part]
