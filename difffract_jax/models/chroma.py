"""The MM-DiT of Chroma: FLUX.1's double- and single-stream blocks, without what conditioned them.

1. Blocks compute no modulations. A small network (`Modulator`), once an evaluation, makes all of them from the time and
   from which modulation it is: one row [d_model] each. A block knows by its number which rows are its own.
2. Padding of the text is hidden from attention: a row of zeros in `Inputs.text` is no token. The encoder
   (`chroma_text`) gives zeros behind the first padding token, which is seen.
3. Nothing pooled from the text enters, and no guidance scale: guidance is by two branches.

What hides a token is a column of queries and keys (`hidden_tokens`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from difffract_jax.models.blocks import QKV, Cond, FluxConfig, Number, RMSNorm, Streams
from difffract_jax.models.double import MLP, Attention, DoubleBlock, DoubleStream, Frozen
from difffract_jax.models.hidden_tokens import HIDDEN, MASK_COLUMNS, sequence_with_mask, stretch, with_mask
from difffract_jax.models.mmdit import Final, Inputs, MMDiT, position_ids, stack_of
from difffract_jax.models.shapes import stacked
from difffract_jax.models.single import SingleBlock, SingleFrozen
from difffract_jax.ops import rms_norm, rope_table, sinusoid, widen

NORM_EPS = 2.0**-23
"""Added to the mean square in the modulator's norms: float32's epsilon, as PyTorch's norm takes where none is given."""
DOUBLE_ROWS, SINGLE_ROWS, FINAL_ROWS = 6, 3, 2
"""Modulations of one stream of a double-stream block, of a single-stream block, and of the last norm."""


@dataclass(frozen=True, kw_only=True)
class ChromaConfig(FluxConfig):
    """Shape of a Chroma transformer.

    Attributes:
        pooled_width: 0, since no pooled embedding enters.
        guidance: False, since no guidance scale enters.
        modulator_inputs: channels that the modulator reads: a quarter each for time and guidance, half for which
            modulation it is.
        modulator_width: channels of its residual stream.
        modulator_layers: its layers.
        family: what `config.json` of a directory tells this shape by.
    """

    title: ClassVar[str | None] = "Chroma"
    pooled_width: int = 0
    guidance: bool = False
    modulator_inputs: int = 64
    modulator_width: int = 5120
    modulator_layers: int = 5
    family: Literal["chroma"] = "chroma"

    @property
    def score_columns(self) -> int:
        """Columns of the queries of all heads, or of the keys, those of the mask included."""
        return self.heads * (self.head_dim + MASK_COLUMNS)

    @property
    def modulation_rows(self) -> int:
        """Modulations of the whole model."""
        return SINGLE_ROWS * self.depth_single + 2 * DOUBLE_ROWS * self.depth_double + FINAL_ROWS


class ChromaShared(NamedTuple):
    """What the blocks of one evaluation share.

    Attributes:
        double: shift1, scale1, gate1, shift2, scale2, gate2 of either stream, [block 6 d_model].
        single: shift, scale, gate, [block 3 d_model].
        final: shift and scale of the last norm.
        hidden: of every place of attention's sequence `HIDDEN` where no query may see it, else 0.
    """

    double: Streams
    single: Float[Array, "block 3 d_model"]
    final: Float[Array, "2 d_model"]
    hidden: Float[Array, "seq"]


class ModulatorLayer(nnx.Module):
    """One layer of the modulator: x + down(silu(up(rms norm of x)))."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.norm = RMSNorm(width, dtype=dtype)
        self.up = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
        """Returns the residual stream after this layer."""
        return x + self.down(jax.nn.silu(self.up(rms_norm(x, self.norm.scale[...], NORM_EPS))))


class Modulator(nnx.Module):
    """The network that makes all modulations of an evaluation."""

    def __init__(self, config: ChromaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        width = config.modulator_width
        self.inputs = nnx.Linear(config.modulator_inputs, width, param_dtype=dtype, rngs=rngs)
        self.layers = stacked(lambda one: ModulatorLayer(width, rngs=one, dtype=dtype), config.modulator_layers, rngs)
        self.outputs = nnx.Linear(width, config.d_model, param_dtype=dtype, rngs=rngs)

    def __call__(self, t: Float[Array, ""], rows: int) -> Float[Array, "rows d_model"]:
        """Returns all modulations: of single-stream blocks, of image and text in double-stream ones, of the last norm.

        They are computed in at least float32, from weights of whatever type: all blocks depend on them, and in bfloat16
        they would make up most of its error.

        Args:
            t: denoising time.
            rows: how many modulations.
        """
        quarter = self.inputs.in_features // 4
        # The channels that were for guidance read a scale of 0 throughout.
        read = 1000 * widen(t), jnp.zeros_like(widen(t))
        both = jnp.concatenate([sinusoid(one, quarter, "cos_sin") for one in read])
        places = jnp.asarray(row_channels(rows, 2 * quarter), both.dtype)
        x = self.inputs(jnp.concatenate([jnp.broadcast_to(both, (rows, both.size)), places], axis=1))
        x, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)
        return self.outputs(x).astype(self.inputs.kernel.dtype)


def row_channels(rows: int, channels: int) -> Float32[np.ndarray, "rows channels"]:
    """Returns cosines and sines that tell the modulator's rows apart: of 1000 times a row's number.

    The angles reach 1e5 radians, where float32 has steps of 0.01: they are rounded as PyTorch rounds them, since the
    weights were trained on these.

    Args:
        rows: how many.
        channels: of each; even.
    """
    half = channels // 2
    exponents = np.float32(-np.log(1e4)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.float32(1000) * np.arange(rows, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _row_of(number: nnx.Param, rows: Float[Array, "block kinds d_model"]) -> Float[Array, "kinds d_model"]:
    """Returns the modulations of the block with a number."""
    at = jnp.round(widen(number[0])).astype(jnp.int32)
    return jax.lax.dynamic_index_in_dim(rows, at, keepdims=False)


class ChromaStream(DoubleStream):
    """One stream's weights in a double-stream block."""

    def __init__(self, config: ChromaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)


class ChromaDoubleBlock(DoubleBlock):
    """FLUX.1's double-stream block with Chroma's weights; see `blocks.Block` for its methods.

    Attributes:
        number: of the block among the double-stream blocks, [1], by which it finds its modulations.
    """

    def __init__(self, config: ChromaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.img = ChromaStream(config, rngs=rngs, dtype=dtype)
        self.txt = ChromaStream(config, rngs=rngs, dtype=dtype)
        self.number = nnx.Param(jnp.zeros(1, dtype))

    def query_or_key(
        self,
        cond: Cond,
        frozen: Frozen,
        part: int,
        head: Number,
        group: int,
        row: Number,
        h: Float[Array, "d_model"],
        denominator: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "head_dim"], Float[Array, ""]]:
        """Returns one head's rotated query or key of a residual row, and 1 / its root mean square."""
        made, used = super().query_or_key(cond, frozen, part, head, group, row, h, denominator)
        place = row + (0 if group == 1 else frozen.inv_std1.txt.shape[0])
        return with_mask(made, made, cond.mod.hidden[place])[part], used

    def _queries_keys(self, m: Streams, cond: Cond) -> tuple[Array, Array]:
        """Returns queries and keys of the joint sequence, with the columns of the mask."""
        return sequence_with_mask(*super()._queries_keys(m, cond), cond.mod.hidden)

    def _modulations(self, cond: Cond, frozen: Frozen | None) -> Streams:
        """Returns the block's rows of what the modulator made; the recorded ones where there are."""
        if frozen is not None and frozen.mod is not None:
            return frozen.mod
        return Streams(*(_row_of(self.number, rows) for rows in cond.mod.double))


class ChromaSingleBlock(SingleBlock):
    """FLUX.1's single-stream block with Chroma's weights.

    Attributes:
        number: of the block among the single-stream blocks, [1], by which it finds its modulations.
    """

    def __init__(self, config: ChromaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.qkv = QKV(d_model, 3 * d_model, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.up = nnx.Linear(d_model, config.d_ff, param_dtype=dtype, rngs=rngs)
        self.attn_out = nnx.Linear(d_model, d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.mlp_out = nnx.Linear(config.d_ff, d_model, param_dtype=dtype, rngs=rngs)
        self.number = nnx.Param(jnp.zeros(1, dtype))

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
        made, used = super().query_or_key(cond, frozen, part, head, group, row, h, denominator)
        return with_mask(made, made, cond.mod.hidden[row])[part], used

    def _queries_keys(self, x: Float[Array, "seq d_model"], cond: Cond) -> tuple[Array, Array]:
        """Returns queries and keys of the joint sequence, with the columns of the mask."""
        return sequence_with_mask(*super()._queries_keys(x, cond), cond.mod.hidden)

    def _modulation(self, cond: Cond, frozen: SingleFrozen | None) -> Float[Array, "3 d_model"]:
        """Returns the block's rows of what the modulator made; the recorded ones where there are."""
        return _row_of(self.number, cond.mod.single) if frozen is None or frozen.mod is None else frozen.mod


class ChromaFinal(Final):
    """The last norm, modulated by what the modulator made, and the projection to a velocity."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.proj = nnx.Linear(config.d_model, config.out_channels, param_dtype=dtype, rngs=rngs)

    def modulations(self, cond: Cond) -> Float[Array, "2 d_model"]:
        """Returns shift and scale."""
        return cond.mod.final


class ChromaMMDiT(MMDiT):
    """The whole transformer of Chroma; `double` and `single` are its stacks."""

    def __init__(self, config: ChromaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model, options = config.d_model, {"param_dtype": dtype, "rngs": rngs}
        self.config = config
        self.img_in = nnx.Linear(config.in_channels, d_model, **options)
        self.txt_in = nnx.Linear(config.text_width, d_model, **options)
        self.modulator = Modulator(config, rngs=rngs, dtype=dtype)
        self.double = numbered(stack_of(ChromaDoubleBlock, config, config.depth_double, rngs, dtype))
        self.single = numbered(stack_of(ChromaSingleBlock, config, config.depth_single, rngs, dtype))
        self.final = ChromaFinal(config, rngs=rngs, dtype=dtype)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the residual streams entering the first block, and what all blocks share.

        Args:
            inputs: of one evaluation; `pooled` is not read, and rows of zeros in `text` are hidden.
            grid: rows and columns of image tokens.

        Raises:
            ValueError: if there is a guidance scale.
        """
        if inputs.guidance is not None:
            raise ValueError(f"This model takes no guidance scale, but guidance was {inputs.guidance}.")
        config, dtype = self.config, self.img_in.kernel.dtype
        wide = np.promote_types(dtype, np.float32)
        seen = jnp.any(inputs.text != 0, axis=-1)
        hidden = jnp.concatenate([jnp.where(seen, 0, HIDDEN), jnp.zeros(inputs.latents.shape[0])])
        shared = _shared(config, self.modulator(inputs.t, config.modulation_rows), hidden.astype(wide))
        streams = Streams(self.img_in(inputs.latents.astype(dtype)), self.txt_in(inputs.text.astype(dtype)))
        cos, sin = rope_table(position_ids(grid, inputs.text.shape[0]), config.rope_axes, config.rope_theta)
        angles = (jnp.asarray(stretch(config.head_dim) * one, wide) for one in (cos, sin))
        return streams, Cond(jnp.zeros(config.d_model, dtype), *angles, shared)


def _shared(config: ChromaConfig, rows: Float[Array, "rows d_model"], hidden: Float[Array, "seq"]) -> ChromaShared:
    """Sorts the modulator's rows into blocks."""
    ends = np.cumsum([SINGLE_ROWS * config.depth_single, *(DOUBLE_ROWS * config.depth_double,) * 2])
    single, img, txt, final = jnp.split(rows, ends)
    double = Streams(*(one.reshape(config.depth_double, DOUBLE_ROWS, -1) for one in (img, txt)))
    return ChromaShared(double, single.reshape(config.depth_single, SINGLE_ROWS, -1), final, hidden)


def numbered(stack: Any) -> Any:
    """Gives the blocks of a stack their numbers, and returns it.

    Args:
        stack: blocks with a leading layer axis.
    """
    stack.number[...] = jnp.arange(stack.number.shape[0])[:, None].astype(stack.number.dtype)
    return stack
