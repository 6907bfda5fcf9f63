"""The MM-DiT of FLUX.1 (docs/method.md, section 1), from packed latents to a velocity.

1. `embed`: packed latents and text embeddings become two residual streams; time, pooled prompt and, in FLUX.1-dev,
   guidance become one vector `vec`, the same for all tokens.
2. `stacks.run_stacks`: the double-stream blocks on both streams, then the single-stream blocks on the joint sequence.
3. `final`: the last norm and projection, on the image stream.

`forward` does all three, with MLPs replaced and activations reported where asked. Every function is for one example;
batches are `jax.vmap` outside.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.models.blocks import Cond, FluxConfig, Streams
from difffract_jax.models.double import DoubleBlock
from difffract_jax.models.shapes import stacked
from difffract_jax.models.single import SingleBlock
from difffract_jax.models.stacks import Tap, Write, drop, run_stacks
from difffract_jax.models.streaming import streams_layers
from difffract_jax.ops import film, layer_norm, rope_table, sinusoid, widen
from difffract_jax.trees import brief

TIME_CHANNELS = 256
"""Channels of the sinusoids that embed time and guidance."""


class Inputs(NamedTuple):
    """What one evaluation of the transformer takes.

    Attributes:
        latents: packed latents, [img channels].
        text: text embedding, [txt text_width].
        pooled: pooled prompt embedding, [pooled_width].
        t: denoising time in [0, 1], 1 = noise.
        guidance: guidance scale, for models that take one.
    """

    latents: Float[Array, "img channels"]
    text: Float[Array, "txt text_width"]
    pooled: Float[Array, "pooled_width"]
    t: Float[Array, ""]
    guidance: Float[Array, ""] | None = None


class Embedder(nnx.Module):
    """Two layers with a SiLU in between: what time, guidance and the pooled prompt enter through.

    The hidden layer is `hidden` wide, as the result if left out.
    """

    def __init__(
        self,
        inputs: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        use_bias: bool = True,
        hidden: int | None = None,
    ) -> None:
        wide = d_model if hidden is None else hidden
        self.up = nnx.Linear(inputs, wide, use_bias=use_bias, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(wide, d_model, use_bias=use_bias, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "inputs"]) -> Float[Array, "d_model"]:
        """Embeds one vector."""
        return self.down(jax.nn.silu(self.up(x)))


class Final(nnx.Module):
    """The last norm, modulated by shift and scale, and the projection to a velocity."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, use_bias: bool = True) -> None:
        options: Any = {"use_bias": use_bias, "param_dtype": dtype, "rngs": rngs}
        self.mod = nnx.Linear(config.d_model, 2 * config.d_model, **options)
        self.proj = nnx.Linear(config.d_model, config.out_channels, **options)

    def __call__(
        self,
        h: Float[Array, "img d_model"],
        cond: Cond,
        inv_std: Float[Array, "img"] | None = None,
        modulation: Float[Array, "2 d_model"] | None = None,
    ) -> Float[Array, "img outputs"]:
        """Turns the image stream into a velocity; with a given norm scale, it is affine in the stream.

        Args:
            h: the image stream.
            cond: what the evaluation's blocks share.
            inv_std: scale of the norm to hold; that of the stream itself if left out.
            modulation: added to shift and scale; 0 if left out.
        """
        mod = self.modulations(cond)
        shift, scale = mod if modulation is None else mod + modulation
        return self.proj(film(layer_norm(h, inv_std)[0], scale, shift))

    def modulations(self, cond: Cond) -> Float[Array, "2 d_model"]:
        """Returns shift and scale."""
        return self.mod(jax.nn.silu(cond.vec)).reshape(2, -1)


class MMDiT(nnx.Module):
    """The whole transformer; `double` and `single` are its stacks, blocks with a leading layer axis."""

    __repr__ = brief

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model = config.d_model
        self.config = config
        self.img_in = nnx.Linear(config.in_channels, d_model, param_dtype=dtype, rngs=rngs)
        self.txt_in = nnx.Linear(config.text_width, d_model, param_dtype=dtype, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, d_model, rngs=rngs, dtype=dtype)
        self.vector_in = Embedder(config.pooled_width, d_model, rngs=rngs, dtype=dtype)
        self.guidance_in = Embedder(TIME_CHANNELS, d_model, rngs=rngs, dtype=dtype) if config.guidance else None
        self.double = stack_of(DoubleBlock, config, config.depth_double, rngs, dtype)
        self.single = stack_of(SingleBlock, config, config.depth_single, rngs, dtype)
        self.final = Final(config, rngs=rngs, dtype=dtype)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the residual streams entering the first block, and what all blocks share.

        Args:
            inputs: of one evaluation.
            grid: rows and columns of image tokens.

        Raises:
            ValueError: if the model takes guidance and there is none, or the other way round.
        """
        if (inputs.guidance is None) == self.config.guidance:
            wanted = "needs a guidance scale" if self.config.guidance else "takes no guidance scale"
            raise ValueError(f"This model {wanted}, but guidance was {inputs.guidance}.")
        dtype = self.img_in.kernel.dtype
        vec = self.time_in(time_channels(inputs.t, dtype)) + self.vector_in(inputs.pooled.astype(dtype))
        if self.guidance_in is not None and inputs.guidance is not None:
            vec = vec + self.guidance_in(time_channels(inputs.guidance, dtype))
        streams = Streams(self.img_in(inputs.latents.astype(dtype)), self.txt_in(inputs.text.astype(dtype)))
        ids = position_ids(grid, inputs.text.shape[0])
        cos, sin = rope_table(ids, self.config.rope_axes, self.config.rope_theta)
        wide = np.promote_types(dtype, np.float32)
        return streams, Cond(vec, jnp.asarray(cos, wide), jnp.asarray(sin, wide))

    def projections(self, grid: tuple[int, int]) -> tuple[nnx.Linear, nnx.Linear]:
        """Returns the affine maps from packed latents and from the text embedding to the residual streams.

        Args:
            grid: rows and columns of image tokens, which tell positions apart where these are added to the latents'.
        """
        del grid
        return self.img_in, self.txt_in

    @property
    def layered(self) -> tuple[str, ...]:
        """Attributes whose leaves have a leading layer axis: the stacks' names."""
        return tuple(stack.name for stack in self.config.layout.stacks)

    @property
    def stacks(self) -> tuple[Any, ...]:
        """The stacks of blocks, in the order of `config.layout`."""
        return tuple(getattr(self, name) for name in self.layered)

    def __call__(self, inputs: Inputs, grid: tuple[int, int]) -> Float[Array, "img outputs"]:
        """Returns the velocity of one example."""
        return forward(self, inputs, grid)[0]


def forward(
    model: Any,
    inputs: Inputs,
    grid: tuple[int, int],
    *,
    write: Write | None = None,
    fixed: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    tap: Tap | Sequence[Tap] = drop,
    kept: Sequence[Sequence[int]] | None = None,
) -> tuple[Float[Array, "img outputs"], tuple[Any, ...]]:
    """Runs the whole transformer, with MLP sublayers replaced and activations reported where asked.

    Args:
        model: the transformer: `embed`, `stacks` and `final`.
        inputs: of one evaluation.
        grid: rows and columns of image tokens.
        write: stands in for every MLP sublayer; this and the rest as for `stacks.run_stacks`.
        fixed: per group.
        layers: per group.
        tap: what each block reports.
        kept: per group, of which blocks reports are kept.

    Returns:
        The velocity, and each stack's reports.
    """
    # Where blocks are programs of their own, so is what stands before and behind them.
    embed, final = (_EMBED, _FINAL) if streams_layers(model) else (_embed, _final)
    h, cond = embed(model, inputs, grid)
    h, reports = run_stacks(model.stacks, h, cond, write=write, fixed=fixed, layers=layers, tap=tap, kept=kept)
    return final(model, h.img, cond), reports


def _embed(model: Any, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
    return model.embed(inputs, grid)


def _final(model: Any, h: Float[Array, "img d_model"], cond: Cond) -> Float[Array, "img outputs"]:
    return model.final(h, cond)


_EMBED, _FINAL = jax.jit(_embed, static_argnames="grid"), jax.jit(_final)


def stack_of(block: Callable[..., Any], config: FluxConfig, depth: int, rngs: nnx.Rngs, dtype: DTypeLike) -> Any:
    """Makes blocks of one class with a leading layer axis.

    Args:
        block: the class.
        config: shape of the model.
        depth: how many.
        rngs: of their first weights.
        dtype: of the weights.
    """
    return stacked(lambda one: block(config, rngs=one, dtype=dtype), depth, rngs)


def time_channels(t: Float[Array, ""], dtype: DTypeLike) -> Float[Array, "time_embed"]:
    """Embeds 1000 t in sines and cosines; in float32 before the cast, since bfloat16 would turn 750 into 752."""
    return sinusoid(1000 * widen(t), TIME_CHANNELS, "cos_sin").astype(dtype)


def position_ids(grid: tuple[int, int], text_tokens: int) -> Float[np.ndarray, "seq axes"]:
    """Returns [0, row, column] of every position, text first; text tokens are all at zero."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    img = np.stack([np.zeros(rows.size), rows.ravel(), columns.ravel()], axis=1)
    return np.concatenate([np.zeros((text_tokens, 3)), img]).astype(np.float64)
