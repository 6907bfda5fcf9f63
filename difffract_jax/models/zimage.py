"""The MM-DiT of Z-Image (diffusers' `ZImageTransformer2DModel`): blocks of one kind, on each stream and on both.

1. Two blocks refine the image, two the text, and the rest run on both: `refine_img`, `refine_txt`, `trunk`.
2. A block is h += tanh(gate) * norm(attention(scale * norm(h))), then the same of its gated MLP. Norms are RMS norms
   with weights, also on what attention and MLP give. There are no shifts, and the text's refiners have no modulations.
3. **An MLP sublayer's y is what leaves the norm behind it**, so that a transcoder stands in for both: norms act on
   rows, as transcoders do, and the factor between y and the stream, tanh(gate), is one vector. Of the norm behind
   attention the scale of every row is held, as those of the norms before the sublayers are.
4. `Inputs.text` is what `zimage_text` gives: Qwen3's states, each divided by its root mean square, and in one more
   channel 1 for a learned token, by which the text is filled up to a multiple of 32. Attention sees these. Rows of
   zeros behind them are hidden (`hidden_tokens`). `txt_in` multiplies states by the weights of their norm and by its
   matrix, and turns the other channel into the learned token: an affine map.
5. A word is at (1 + n, 0, 0), a token of the image at (1 + length of the text, row, column).
6. The model is fed 1 - t, and gives the velocity's negative.

An image whose tokens are not a multiple of 32 is filled up with learned tokens in diffusers, which go through all
blocks. Such sizes are refused here: `img_pad`, the learned token, is kept for the checkpoint's sake and never read.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from difffract_jax.models.blocks import Cond, RMSNorm, Streams
from difffract_jax.models.hidden_tokens import HIDDEN, stretch
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
from difffract_jax.models.zimage_blocks import (
    NORM_EPS,
    TIME_HIDDEN,
    UNIT,
    ImageRefiner,
    TextRefiner,
    ZImageBlock,
    ZImageConfig,
)
from difffract_jax.ops import rope_table, widen


class ZImageFinal(Final):
    """The last norm, which time scales alone, and the projection to the velocity's negative."""

    def __init__(self, config: ZImageConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.mod = nnx.Linear(config.time_width, config.d_model, param_dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(config.d_model, config.out_channels, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "img d_model"],
        cond: Cond,
        inv_std: Float[Array, "img"] | None = None,
        modulation: Float[Array, "2 d_model"] | None = None,
    ) -> Float[Array, "img outputs"]:
        """Turns the image stream into a velocity; arguments as for `Final`."""
        return -super().__call__(h, cond, inv_std, modulation)

    def modulations(self, cond: Cond) -> Float[Array, "2 d_model"]:
        """Returns a shift of zeros, and the scale."""
        scale = self.mod(jax.nn.silu(cond.vec))
        return jnp.stack([jnp.zeros_like(scale), scale])


class ZImageMMDiT(MMDiT):
    """The whole transformer of Z-Image; its stacks are `refine_img`, `refine_txt` and `trunk`."""

    def __init__(self, config: ZImageConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model, options = config.d_model, {"param_dtype": dtype, "rngs": rngs}
        self.config = config
        self.img_in = nnx.Linear(config.in_channels, d_model, **options)
        self.txt_norm = RMSNorm(config.text_width - 1, dtype=dtype, eps=NORM_EPS)
        self.txt_in = nnx.Linear(config.text_width - 1, d_model, **options)
        self.img_pad, self.txt_pad = (nnx.Param(jnp.zeros((1, d_model), dtype)) for _ in range(2))
        self.time_in = Embedder(TIME_CHANNELS, config.time_width, rngs=rngs, dtype=dtype, hidden=TIME_HIDDEN)
        self.refine_img = stack_of(ImageRefiner, config, config.depth_refiner, rngs, dtype)
        self.refine_txt = stack_of(TextRefiner, config, config.depth_refiner, rngs, dtype)
        self.trunk = stack_of(ZImageBlock, config, config.depth, rngs, dtype)
        self.final = ZImageFinal(config, rngs=rngs, dtype=dtype)

    def embed(self, inputs: Inputs, grid: tuple[int, int]) -> tuple[Streams, Cond]:
        """Returns the residual streams entering the first block, and what all blocks share.

        Args:
            inputs: of one evaluation; `pooled` is not read, and rows of zeros in `text` are hidden.
            grid: rows and columns of image tokens.

        Raises:
            ValueError: if there is a guidance scale, or a sequence is not a multiple of `UNIT`.
        """
        if inputs.guidance is not None:
            raise ValueError(f"This model takes no guidance scale, but guidance was {inputs.guidance}.")
        words, pixels = inputs.text.shape[0], grid[0] * grid[1]
        if words % UNIT or pixels % UNIT:
            raise ValueError(f"Text and image must be multiples of {UNIT} tokens, but are {words} and {pixels}.")
        config, dtype = self.config, self.img_in.kernel.dtype
        wide = np.promote_types(dtype, np.float32)
        seen = jnp.any(inputs.text != 0, axis=-1)
        hidden = jnp.concatenate([jnp.where(seen, 0, HIDDEN), jnp.zeros(pixels)]).astype(wide)
        img_in, txt_in = self.projections(grid)
        streams = Streams(img_in(inputs.latents.astype(dtype)), txt_in(widen(inputs.text)).astype(dtype))
        cos, sin = _angles(config, grid, words, jnp.sum(seen) // UNIT)
        turned = (stretch(config.head_dim) * one.astype(wide) for one in (cos, sin))
        return streams, Cond(self.time_in(time_channels(1 - inputs.t, dtype)), *turned, hidden)

    def projections(self, grid: tuple[int, int]) -> tuple[nnx.Linear, nnx.Linear]:
        """Returns the affine maps from packed latents, and from the text as `zimage_text` gives it.

        Args:
            grid: rows and columns of image tokens.
        """
        del grid
        kernel, bias = widen(self.txt_in.kernel[...]), widen(self.txt_in.bias[...])
        learned = widen(self.txt_pad[...]) - bias[None]
        joined = jax.tree.map(lambda leaf: leaf, self.txt_in)
        joined.kernel = nnx.Param(jnp.concatenate([widen(self.txt_norm.scale[...])[:, None] * kernel, learned]))
        joined.bias = nnx.Param(bias)
        return self.img_in, joined


def _angles(
    config: ZImageConfig, grid: tuple[int, int], words: int, units: Int[Array, ""]
) -> tuple[Float[Array, "seq half"], Float[Array, "seq half"]]:
    """Returns cosines and sines of every position, text first.

    Args:
        config: shape of the model.
        grid: rows and columns of image tokens.
        words: length of the text sequence.
        units: how many units of the text attention sees, learned tokens included.
    """
    ids = position_ids(grid, words)
    ids[:words, 0] = 1 + np.arange(words)
    text = rope_table(ids[:words], config.rope_axes, config.rope_theta)
    # The image's first coordinate is the same in every token, and one of few.
    firsts = rope_table(1 + UNIT * np.arange(words // UNIT + 1)[:, None] * 1.0, config.rope_axes[:1], config.rope_theta)
    others = rope_table(ids[words:, 1:], config.rope_axes[1:], config.rope_theta)
    made = []
    for of_text, first, other in zip(text, firsts, others, strict=True):
        chosen = jnp.broadcast_to(jnp.asarray(first)[units], (len(other), first.shape[1]))
        made.append(jnp.concatenate([jnp.asarray(of_text), jnp.concatenate([chosen, jnp.asarray(other)], axis=1)]))
    return made[0], made[1]
