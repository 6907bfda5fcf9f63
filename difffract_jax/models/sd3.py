"""The MM-DiT of Stable Diffusion 3 and 3.5: FLUX.1's double-stream blocks alone, in up to three kinds.

1. `dual`, the first blocks of SD3.5-medium: the image attends a second time, to itself alone. Its modulations have nine
   rows: shift1, scale1, gate1, shift2, scale2, gate2, as in FLUX.1, then shift, scale and gate of that attention.
2. `double`: as FLUX.1's, without positions in attention, and in SD3-medium without norms of queries and keys.
3. `last`, one block: the image reads the text, and nothing reads what would become of the text. It has shift and scale
   before attention, no output of attention and no MLP. The text is a group without MLPs (`address.Group.mlp`), whose
   stand-in is given zeros, and adds nothing.
4. Positions are added to the image tokens once, from a table whose middle is cut out to the image's shape.

Nothing in attention depends on positions, so that the order of its sequence changes nothing but rounding: the text
comes first here as in FLUX.1's blocks; in the model's own code the image does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.address import IMAGE, TEXT, Group, Layout, Stack
from difffract_jax.config import UserError
from difffract_jax.models.blocks import (
    BlockActs,
    Cond,
    Entry,
    FluxConfig,
    StandIn,
    Streams,
    merge_heads,
    project,
    split_heads,
)
from difffract_jax.models.double import (
    MLP,
    Attention,
    DoubleBlock,
    DoubleStream,
    Frozen,
    through_output,
    through_values,
    values,
)
from difffract_jax.models.mmdit import TIME_CHANNELS, Embedder, Final, Inputs, MMDiT, stack_of, time_channels
from difffract_jax.models.sampler import PATCH
from difffract_jax.ops import attend, attention_pattern, film

IMAGE_TWICE = IMAGE._replace(
    modulations=(*IMAGE.modulations, *(f"attn2_{kind}" for kind in ("shift", "scale", "gate")))
)
"""The image of a block that attends twice."""
READ_TEXT = Group("txt", "txt", ("txt",), ("attn_shift", "attn_scale"), mlp=False)
"""The text of the last block."""

STACKS = ("dual", "double", "last")
"""Names of the stacks, in order; `dual` is missing where no block attends twice."""


@dataclass(frozen=True, kw_only=True)
class Sd3Config(FluxConfig):
    """Shape of a transformer of Stable Diffusion 3.

    Attributes:
        depth_double: number of all blocks, the last included.
        depth_single: 0.
        rope_axes: none, since nothing is turned by positions.
        guidance: False, since no guidance scale enters.
        depth_dual: how many of the first blocks let the image attend to itself too.
        qk_norm: whether queries and keys are normalised.
        table: side of the table of positions, in image tokens.
        family: what `config.json` of a directory tells this shape by.
    """

    title: ClassVar[str | None] = "Stable Diffusion 3"
    depth_single: int = 0
    rope_axes: tuple[int, ...] = ()
    guidance: bool = False
    depth_dual: int = 0
    qk_norm: bool = False
    table: int
    family: Literal["sd3"] = "sd3"

    @classmethod
    def of_blocks(cls, blocks: int, **sizes: Any) -> "Sd3Config":
        """Returns the shape of a transformer with so many blocks in all.

        Args:
            blocks: how many.
            sizes: the other attributes.
        """
        return cls(depth_double=blocks, **sizes)

    @property
    def layout(self) -> Layout:
        """The model's stacks, blocks and groups of sites."""
        plain = self.depth_double - 1 - self.depth_dual
        dual = (Stack("dual", self.depth_dual, (IMAGE_TWICE, TEXT)),) if self.depth_dual else ()
        return Layout((*dual, Stack("double", plain, (IMAGE, TEXT)), Stack("last", 1, (IMAGE, READ_TEXT))))


class Sd3Stream(DoubleStream):
    """One stream's weights in a block."""

    rows: ClassVar[int] = 6

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.mod = nnx.Linear(config.d_model, self.rows * config.d_model, param_dtype=dtype, rngs=rngs)
        self.attn = Attention(config, rngs=rngs, dtype=dtype, normed=config.qk_norm)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)


class TwiceStream(Sd3Stream):
    """The image's weights in a block where it attends twice."""

    rows: ClassVar[int] = 9
    gate_rows: ClassVar[tuple[int, ...]] = (2, 5, 8)

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.attn2 = Attention(config, rngs=rngs, dtype=dtype, normed=config.qk_norm)


class ReadStream(DoubleStream):
    """The text's weights in the last block, where it is read and not written to."""

    gate_rows: ClassVar[tuple[int, ...]] = ()

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.mod = nnx.Linear(config.d_model, 2 * config.d_model, param_dtype=dtype, rngs=rngs)
        self.attn = Attention(config, rngs=rngs, dtype=dtype, normed=config.qk_norm)
        self.attn.proj = None

    def after_attention(self, h: Array, mod: Array, mixed: Array) -> Float[Array, "rows d_model"]:
        """Returns the residual stream as it is."""
        del mod, mixed
        return h

    def mlp_input(
        self, h: Array, mod: Array, inv_std: Array | None = None
    ) -> tuple[Float[Array, "rows d_model"], Float[Array, "rows"]]:
        """Returns zeros: there is no MLP to read anything."""
        del mod
        return jnp.zeros_like(h), jnp.ones_like(h[:, 0]) if inv_std is None else inv_std

    def after_mlp(self, h: Array, mod: Array, y: Array) -> Float[Array, "rows d_model"]:
        """Returns the residual stream as it is."""
        del mod, y
        return h

    def mlp(self, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns zeros."""
        return jnp.zeros_like(x)

    def gate(self, mod: Float[Array, "shift_scale d_model"]) -> Float[Array, "d_model"]:
        """Returns zeros: nothing is added for an MLP."""
        return jnp.zeros_like(mod[0])


class Sd3Block(DoubleBlock):
    """FLUX.1's double-stream block with weights of Stable Diffusion 3; see `blocks.Block` for its methods."""

    streams: ClassVar[tuple[type, type]] = (Sd3Stream, Sd3Stream)

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        image, text = self.streams
        self.img = image(config, rngs=rngs, dtype=dtype)
        self.txt = text(config, rngs=rngs, dtype=dtype)


class LastBlock(Sd3Block):
    """The block after which nothing reads the text."""

    groups: ClassVar[tuple[Group, ...]] = (IMAGE, READ_TEXT)
    streams: ClassVar[tuple[type, type]] = (Sd3Stream, ReadStream)


class DualBlock(Sd3Block):
    """A block where the image attends to text and image, and by heads of its own to itself.

    `heads` counts those of joint attention, then those of the image's own.
    """

    groups: ClassVar[tuple[Group, ...]] = (IMAGE_TWICE, TEXT)
    streams: ClassVar[tuple[type, type]] = (TwiceStream, Sd3Stream)

    def __call__(
        self,
        h: Sequence[Float[Array, "_ d_model"]],
        cond: Cond,
        *,
        frozen: Frozen | None = None,
        mlp: StandIn | None = None,
        heads: Float[Array, "heads"] | None = None,
        scores: Float[Array, "heads queries keys"] | None = None,
        modulation: Sequence[Float[Array, "_ d_model"]] | None = None,
    ) -> tuple[Streams, BlockActs]:
        """Runs the block on the image and the text stream; `scores` are refused."""
        if scores is not None:
            _refuse_scores()
        return super().__call__(h, cond, frozen=frozen, mlp=mlp, heads=heads, modulation=modulation)

    def slim(self) -> "DualBlock":
        """Returns the block with the values' columns, the output projections and the heads' width alone."""
        slim = super().slim()
        slim.img.attn2.qkv = slim.img.attn2.qkv.from_column(2 * slim.img.attn2.qkv.in_features)
        return slim

    def entry(self, cond: Cond, frozen: Frozen) -> Entry:
        """Returns the function that pulls gradients at single rows of x back through both attentions."""
        return partial(_enter_twice, self, super().entry(cond, frozen), self._modulations(cond, frozen).img, frozen)

    @staticmethod
    def attention_shape(frozen: Frozen) -> tuple[int, int, int]:
        """Returns queries, heads of both attentions, and columns of a head."""
        queries, heads, head_dim = DoubleBlock.attention_shape(frozen)
        return queries, 2 * heads, head_dim

    @staticmethod
    def queries_and_keys(frozen: Frozen) -> NoReturn:
        """Refuses: there are two attentions, over different sequences."""
        del frozen
        _refuse_scores()

    @staticmethod
    def with_queries(frozen: Frozen, factor: Float[Array, ""]) -> NoReturn:
        """Refuses, as `queries_and_keys`."""
        del frozen, factor
        _refuse_scores()

    def query_or_key(self, *args: Any) -> NoReturn:
        """Refuses, as `queries_and_keys`."""
        del args
        _refuse_scores()

    def _attend_again(
        self,
        h: Streams,
        normed: Float[Array, "img d_model"],
        mod: Float[Array, "9 d_model"],
        frozen: Frozen | None,
        heads: Float[Array, "heads"] | None,
    ) -> tuple[Streams, tuple[Array, Array]]:
        """Adds what the image's attention to itself gives, and returns its queries and keys."""
        attn, m = self.img.attn2, film(normed, mod[7], mod[6])
        again = _own_queries_keys(attn, m) if frozen is None else frozen.again
        assert again is not None, "a record of this kind of blocks has both attentions"
        q, k = again
        precision = None if frozen is None else "highest"
        mixed = attend(q, k, values(attn, m), scale=q.shape[-1] ** -0.5, precision=precision)
        if heads is not None:
            mixed = mixed * heads[None, -mixed.shape[1] :, None]
        return h._replace(img=h.img + mod[8] * attn.proj(merge_heads(mixed))), again


def _refuse_scores() -> NoReturn:
    raise UserError(
        "Attention's scores are not explained as yet in a model whose blocks attend twice, as SD3.5-medium's do; leave "
        "attention frozen, or take SD3-medium or SD3.5-large."
    )


def _own_queries_keys(attn: Attention, m: Float[Array, "img d_model"]) -> tuple[Array, Array]:
    """Returns queries and keys of the image's attention to itself, [img heads head_dim]."""
    q, k = jnp.split(project(attn.qkv, m, slice(None, 2 * m.shape[1])), 2, axis=1)
    return attn.q_norm(split_heads(q, attn.q_norm.width)), attn.k_norm(split_heads(k, attn.k_norm.width))


def _enter_twice(
    block: DualBlock,
    jointly: Entry,
    mod: Float[Array, "9 d_model"],
    frozen: Frozen,
    gradients: Float[Array, "target d_model"],
    group: Int[Array, "target"],
    row: Int[Array, "target"],
) -> tuple[Float[Array, "target _ d_model"], ...]:
    """Adds to what enters through joint attention what does through the image's own; see the module `double`.

    Args:
        block: the block.
        jointly: what enters through joint attention, and past it.
        mod: modulations of the image.
        frozen: record of the block.
        gradients: of targets by their MLP's input.
        group: 0 for the image, 1 for the text.
        row: within the group's sequence.
    """
    assert frozen.again is not None
    (q, k), attn = frozen.again, block.img.attn2
    heads, head_dim = q.shape[1:]
    own = jnp.where((group == 0)[:, None], gradients, 0)
    inv_std = frozen.inv_std2.img.at[row].get(mode="clip")
    behind, _ = through_output(heads, block.img, mod, inv_std, own)
    origin = jnp.zeros((row.shape[0], heads, head_dim), own.dtype)
    _, pull = jax.vjp(lambda mixed: mod[8] * attn.proj(merge_heads(mixed)), origin)
    directions = through_values(attn, mod[6:8], pull(behind)[0])
    pattern = attention_pattern(q.at[row].get(mode="clip"), k, scale=head_dim**-0.5, precision="highest")
    shares = pattern.transpose(2, 0, 1) * frozen.inv_std1.img[:, None, None]
    img, txt = jointly(gradients, group, row)
    return img + jnp.einsum("sht,thm->tsm", shares, directions), txt


class PatchProjection(nnx.Linear):
    """The projection of packed latents.

    Attributes:
        places: what is added to every image token for its position, [img d_model]; None until the image's shape is
            known.
    """

    places: Any = None

    def __call__(self, latents: Float[Array, "img channels"]) -> Float[Array, "img d_model"]:
        """Projects the tokens of an image, and adds their positions where these are known."""
        made = super().__call__(latents)
        return made if self.places is None else made + self.places[...].astype(made.dtype)

    def at(self, places: Float[Array, "img d_model"]) -> "PatchProjection":
        """Returns the projection with positions."""
        placed = jax.tree.map(lambda leaf: leaf, self)
        placed.places = nnx.Param(places)
        return placed


class Sd3MMDiT(MMDiT):
    """The whole transformer; its stacks are `dual` where there is any, `double` and `last`."""

    def __init__(self, config: Sd3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.config = config
        self.img_in = PatchProjection(config.in_channels, d_model, param_dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((config.table, config.table, d_model), dtype))
        self.txt_in = nnx.Linear(config.text_width, d_model, param_dtype=dtype, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, d_model, rngs=rngs, dtype=dtype)
        self.vector_in = Embedder(config.pooled_width, d_model, rngs=rngs, dtype=dtype)
        blocks = {"dual": DualBlock, "double": Sd3Block, "last": LastBlock}
        for stack in config.layout.stacks:
            setattr(self, stack.name, stack_of(blocks[stack.name], config, stack.depth, rngs, dtype))
        self.final = Final(config, rngs=rngs, dtype=dtype)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the residual streams entering the first block, and what all blocks share.

        Args:
            inputs: of one evaluation.
            grid: rows and columns of image tokens.

        Raises:
            ValueError: if there is a guidance scale.
            UserError: if the image is larger than the table of positions.
        """
        if inputs.guidance is not None:
            raise ValueError(f"This model takes no guidance scale, but guidance was {inputs.guidance}.")
        dtype = self.img_in.kernel.dtype
        vec = self.time_in(time_channels(inputs.t, dtype)) + self.vector_in(inputs.pooled.astype(dtype))
        img_in, txt_in = self.projections(grid)
        return Streams(img_in(inputs.latents.astype(dtype)), txt_in(inputs.text.astype(dtype))), Cond(vec, None, None)

    def projections(self, grid: tuple[int, int]) -> tuple[nnx.Linear, nnx.Linear]:
        """Returns the affine maps from packed latents, positions included, and from the text embedding.

        Args:
            grid: rows and columns of image tokens.

        Raises:
            UserError: if the image is larger than the table of positions.
        """
        side = self.config.table
        if max(grid) > side:
            raise UserError(
                f"The model has positions for {side} x {side} image tokens of {PATCH} x {PATCH} latents, but the image "
                f"has {grid[0]} x {grid[1]}; take a smaller one."
            )
        top, left = ((side - length) // 2 for length in grid)
        places = self.positions[top : top + grid[0], left : left + grid[1]]
        return self.img_in.at(places.reshape(-1, places.shape[-1])), self.txt_in
