"""The MM-DiT of FLUX.2: FLUX.1's double- and single-stream blocks, with what they compute arranged in another way.

1. Modulations belong to a kind of blocks, not to a block: one matrix for the image stream and one for the text stream
   of all double-stream blocks, one for all single-stream blocks. `Flux2MMDiT.embed` computes them once, and blocks find
   them in `Cond.mod`.
2. No matrix has a bias.
3. The MLP sublayer is gated: down(silu(gate x) * (up x)). A transcoder stands in for all of it, from x to the input of
   the sublayer's gate in the residual stream.
4. Positions have four axes: frame, row, column, and the place in the text. A text token is at (0, 0, 0, n), an image
   token at (0, row, column, 0).
5. Nothing pooled from the text enters: the conditioning vector is that of time alone, and `Inputs.pooled` has no
   channels.

Attention, norms, the order of streams and groups, and with them everything that is traced, are FLUX.1's.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.models.blocks import QKV, Cond, FluxConfig, RMSNorm, Streams
from difffract_jax.models.double import Attention, DoubleBlock, DoubleStream, Frozen
from difffract_jax.models.mmdit import (
    TIME_CHANNELS,
    Embedder,
    Final,
    Inputs,
    MMDiT,
    position_ids,
    stack_of,
    time_channels,
)
from difffract_jax.models.single import SingleBlock, SingleFrozen
from difffract_jax.ops import rope_table


@dataclass(frozen=True, kw_only=True)
class Flux2Config(FluxConfig):
    """Shape of a FLUX.2 transformer.

    Attributes:
        rope_axes: how a head's columns are divided among frame, row, column and place in the text; even numbers.
        pooled_width: 0, since no pooled embedding enters.
        guidance: False, since no guidance scale enters.
        mlp_ratio: hidden columns of an MLP, of each of its two halves, over d_model.
        rope_theta: base of the rotary wavelengths.
        family: what `config.json` of a directory tells this shape by.
    """

    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    pooled_width: int = 0
    guidance: bool = False
    mlp_ratio: float = 3.0
    rope_theta: float = 2000.0
    family: Literal["flux2"] = "flux2"

    @property
    def hidden_ratio(self) -> float:
        """Numbers of an MLP's hidden layer that are in memory together, over d_model: gate, up and their product."""
        return 3 * self.mlp_ratio


class SharedModulations(NamedTuple):
    """What the blocks of one evaluation are modulated by.

    Attributes:
        double: shift1, scale1, gate1, shift2, scale2, gate2 of either stream, [6 d_model].
        single: shift, scale, gate of the joint sequence.
    """

    double: Streams
    single: Float[Array, "3 d_model"]


def _linear(wide_in: int, wide_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Linear:
    return nnx.Linear(wide_in, wide_out, use_bias=False, param_dtype=dtype, rngs=rngs)


class GatedMLP(nnx.Module):
    """The MLP sublayer: down(silu(gate x) * (up x))."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.gate = _linear(config.d_model, config.d_ff, rngs=rngs, dtype=dtype)
        self.up = _linear(config.d_model, config.d_ff, rngs=rngs, dtype=dtype)
        self.down = _linear(config.d_ff, config.d_model, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Maps x to y, row by row."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Flux2DoubleStream(DoubleStream):
    """One stream's weights in a double-stream block."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attn = Attention(config, rngs=rngs, dtype=dtype, use_bias=False)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)


class Flux2DoubleBlock(DoubleBlock):
    """FLUX.1's double-stream block with FLUX.2's weights; see `blocks.Block` for its methods."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.img = Flux2DoubleStream(config, rngs=rngs, dtype=dtype)
        self.txt = Flux2DoubleStream(config, rngs=rngs, dtype=dtype)

    def _modulations(self, cond: Cond, frozen: Frozen | None) -> Streams:
        """Returns the modulations that all double-stream blocks share; the recorded ones where there are."""
        return cond.mod.double if frozen is None or frozen.mod is None else frozen.mod


class Flux2SingleBlock(SingleBlock):
    """FLUX.1's single-stream block with FLUX.2's weights, whose checkpoints fuse `qkv`, `gate` and `up`."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.qkv = QKV(d_model, 3 * d_model, use_bias=False, param_dtype=dtype, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, dtype=dtype)
        self.gate = _linear(d_model, config.d_ff, rngs=rngs, dtype=dtype)
        self.up = _linear(d_model, config.d_ff, rngs=rngs, dtype=dtype)
        self.attn_out = _linear(d_model, d_model, rngs=rngs, dtype=dtype)
        self.mlp_out = _linear(config.d_ff, d_model, rngs=rngs, dtype=dtype)

    def run_mlp(self, group: int, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns the output of the block's gated MLP."""
        del group  # there is one
        return self.mlp_out(jax.nn.silu(self.gate(x)) * self.up(x))

    def slim(self) -> "Flux2SingleBlock":
        """Returns the block with the values' columns, attention's output and the heads' width alone."""
        slim = super().slim()
        slim.gate = None
        return slim

    def _modulation(self, cond: Cond, frozen: SingleFrozen | None) -> Float[Array, "3 d_model"]:
        """Returns the modulation that all single-stream blocks share; the recorded one where there is."""
        return cond.mod.single if frozen is None or frozen.mod is None else frozen.mod


class Modulations(nnx.Module):
    """The matrices that make the conditioning vector the modulations of each kind of blocks."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.img = _linear(d_model, 6 * d_model, rngs=rngs, dtype=dtype)
        self.txt = _linear(d_model, 6 * d_model, rngs=rngs, dtype=dtype)
        self.joint = _linear(d_model, 3 * d_model, rngs=rngs, dtype=dtype)

    @property
    def layers(self) -> tuple[nnx.Linear, nnx.Linear, nnx.Linear]:
        """The matrices, of the image stream, the text stream and the single-stream blocks."""
        return self.img, self.txt, self.joint

    def __call__(self, vec: Float[Array, "d_model"]) -> SharedModulations:
        """Returns the modulations of an evaluation."""
        vec = jax.nn.silu(vec)
        double = Streams(self.img(vec).reshape(6, -1), self.txt(vec).reshape(6, -1))
        return SharedModulations(double, self.joint(vec).reshape(3, -1))


class Flux2MMDiT(MMDiT):
    """The whole transformer of FLUX.2; `double` and `single` are its stacks."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.config = config
        self.img_in = _linear(config.in_channels, d_model, rngs=rngs, dtype=dtype)
        self.txt_in = _linear(config.text_width, d_model, rngs=rngs, dtype=dtype)
        self.time_in = Embedder(TIME_CHANNELS, d_model, rngs=rngs, dtype=dtype, use_bias=False)
        self.shared = Modulations(d_model, rngs=rngs, dtype=dtype)
        self.double = stack_of(Flux2DoubleBlock, config, config.depth_double, rngs, dtype)
        self.single = stack_of(Flux2SingleBlock, config, config.depth_single, rngs, dtype)
        self.final = Final(config, rngs=rngs, dtype=dtype, use_bias=False)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the residual streams entering the first block, and what all blocks share.

        Args:
            inputs: of one evaluation; `pooled` is not read.
            grid: rows and columns of image tokens.

        Raises:
            ValueError: if there is guidance.
        """
        if inputs.guidance is not None:
            raise ValueError(f"This model takes no guidance scale, but guidance was {inputs.guidance}.")
        dtype = self.img_in.kernel.dtype
        vec = self.time_in(time_channels(inputs.t, dtype))
        streams = Streams(self.img_in(inputs.latents.astype(dtype)), self.txt_in(inputs.text.astype(dtype)))
        ids = flux2_position_ids(grid, inputs.text.shape[0])
        cos, sin = rope_table(ids, self.config.rope_axes, self.config.rope_theta)
        wide = np.promote_types(dtype, np.float32)
        return streams, Cond(vec, jnp.asarray(cos, wide), jnp.asarray(sin, wide), self.shared(vec))


def flux2_position_ids(grid: tuple[int, int], text_tokens: int) -> Float[np.ndarray, "seq axes"]:
    """Returns [frame, row, column, word] of every position, text first; the frame is 0 throughout.

    Args:
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
    """
    ids = np.pad(position_ids(grid, text_tokens), ((0, 0), (0, 1)))
    ids[:text_tokens, 3] = np.arange(text_tokens)
    return ids
