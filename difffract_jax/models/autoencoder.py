"""The variational autoencoder of latent diffusion (arXiv 2112.10752, `AutoencoderKL`): pixels <-> latents.

For one image, channels last:

1. encode: conv_in; for each width but the last, resnets at that width and a strided convolution that halves the image;
   resnets at the last width; the middle; norm, SiLU, conv_out -> mean and log variance of a diagonal Gaussian.
2. decode: conv_in; the middle; for each width from the last to the first, one resnet more than in the encoder and, but
   for the first width, a doubling (nearest neighbour, then a convolution); norm, SiLU, conv_out -> pixels, around
   [-1, 1].
3. resnet: x + conv(SiLU(norm(conv(SiLU(norm(x)))))); where the width changes, x goes through a 1x1 convolution.
4. the middle: resnet, single-head self-attention over all pixels, resnet.

The transformer works on scaled latents: scaled = (latent - shift_factor) * scaling_factor, packed into tokens. `decode`
takes, and `encode` returns, unscaled ones; `unpacked` makes the one of the other. FLUX.2's autoencoder
(`AutoencoderKLFlux2`) scales every channel of a token by itself: scaled = (packed - mean) / sqrt(variance + eps).

Axes: `H W rgb` pixels, `h w latent` latents, h = H / factor; `rows cols width` anything in between. The number and the
widths of the blocks differ from level to level, so these are lists and not stacks. Norms and softmax are computed in at
least float32 whatever the dtype of the weights.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.models.sampler import PATCH, scale_for_decoder, unpack
from difffract_jax.ops import standardise, widen
from difffract_jax.trees import brief

EPS = 1e-6
"""Added to the variance under the root of every norm; AutoencoderKL has no setting for it."""

QUERIES_AT_ONCE = 1024
"""Rows of the attention pattern held at a time: 1024 px have 16,384 positions, whose full pattern would take 1 GB."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Log variances are clipped to this, so that their exponential stays finite."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of an autoencoder.

    Attributes:
        in_channels: channels of the image, in and out.
        latent_channels: channels of the latent.
        widths: channels of each level, from the pixels inwards; every one after the first halves the image.
        layers_per_block: resnets per level in the encoder; the decoder has one more.
        norm_groups: groups of every group norm; divides every width.
        scaling_factor: one over the standard deviation of the latents, after the shift.
        shift_factor: mean of the latents.
        quant_conv: whether a 1x1 convolution follows the encoder.
        post_quant_conv: whether a 1x1 convolution precedes the decoder.
        mid_attention: whether the middle has an attention layer.
    """

    in_channels: int = 3
    latent_channels: int
    widths: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    scaling_factor: float
    shift_factor: float
    quant_conv: bool = False
    post_quant_conv: bool = False
    mid_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.widths) - 1)


FLUX_VAE = AutoencoderConfig(
    latent_channels=16,
    widths=(128, 256, 512, 512),
    layers_per_block=2,
    norm_groups=32,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)
"""The autoencoder of FLUX.1."""


SD3_VAE = replace(FLUX_VAE, scaling_factor=1.5305, shift_factor=0.0609)
"""The autoencoder of Stable Diffusion 3: FLUX.1's shape, other scales."""


@dataclass(frozen=True, kw_only=True)
class Flux2AutoencoderConfig(AutoencoderConfig):
    """Shape of FLUX.2's autoencoder.

    Attributes:
        scaling_factor: 1, since channels are scaled one by one.
        shift_factor: 0.
        batch_norm_eps: added to a channel's variance under the root.
        family: what `config.json` of a directory tells this shape by.
    """

    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    quant_conv: bool = True
    post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4
    family: Literal["flux2"] = "flux2"


FLUX2_VAE = Flux2AutoencoderConfig(latent_channels=32, widths=(128, 256, 512, 512), layers_per_block=2, norm_groups=32)
"""The autoencoder of FLUX.2."""


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all pixels, then scales and shifts each channel."""

    def __init__(self, width: int, groups: int, *, dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))
        self.groups = groups

    def __call__(self, x: Float[Array, "rows cols width"]) -> Float[Array, "rows cols width"]:
        """Normalises one image."""
        wide = widen(x)
        grouped = wide.reshape(*x.shape[:2], self.groups, -1)
        wide = standardise(grouped, (0, 1, 3), EPS).reshape(x.shape)
        scale, bias = self.scale[...].astype(wide.dtype), self.bias[...].astype(wide.dtype)
        return (wide * scale + bias).astype(x.dtype)


def _conv3x3(wide_in: int, wide_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Conv:
    return nnx.Conv(wide_in, wide_out, (3, 3), padding=1, param_dtype=dtype, rngs=rngs)


def _conv1x1(wide_in: int, wide_out: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Conv:
    return nnx.Conv(wide_in, wide_out, (1, 1), param_dtype=dtype, rngs=rngs)


def _halving(width: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.Conv:
    return nnx.Conv(width, width, (3, 3), strides=2, padding="VALID", param_dtype=dtype, rngs=rngs)


class Resnet(nnx.Module):
    """Two convolutions around a skip path; `shortcut` exists where the width changes."""

    def __init__(
        self, wide_in: int, wide_out: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.norm1 = GroupNorm(wide_in, groups, dtype=dtype)
        self.conv1 = _conv3x3(wide_in, wide_out, rngs=rngs, dtype=dtype)
        self.norm2 = GroupNorm(wide_out, groups, dtype=dtype)
        self.conv2 = _conv3x3(wide_out, wide_out, rngs=rngs, dtype=dtype)
        self.shortcut = None if wide_in == wide_out else _conv1x1(wide_in, wide_out, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "rows cols wide_in"]) -> Float[Array, "rows cols wide_out"]:
        """Returns the image at the new width."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class PixelAttention(nnx.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.norm = GroupNorm(width, groups, dtype=dtype)
        self.q = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.k = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.v = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "rows cols width"]) -> Float[Array, "rows cols width"]:
        """Returns x plus what the attention adds."""
        tokens = self.norm(x).reshape(-1, x.shape[-1])
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        wide = np.promote_types(x.dtype, np.float32)

        def mix(query: Float[Array, "width"]) -> Float[Array, "width"]:
            scores = x.shape[-1] ** -0.5 * jnp.dot(k, query, preferred_element_type=wide)
            return jax.nn.softmax(scores).astype(v.dtype) @ v

        return x + self.out(jax.lax.map(mix, q, batch_size=QUERIES_AT_ONCE)).reshape(x.shape)


class Middle(nnx.Module):
    """The innermost level of encoder and decoder."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        width, groups = config.widths[-1], config.norm_groups
        self.first = Resnet(width, width, groups, rngs=rngs, dtype=dtype)
        self.attn = PixelAttention(width, groups, rngs=rngs, dtype=dtype) if config.mid_attention else None
        self.second = Resnet(width, width, groups, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "rows cols width"]) -> Float[Array, "rows cols width"]:
        """Returns an image of the same shape."""
        x = self.first(x)
        return self.second(x if self.attn is None else self.attn(x))


def _resnets(wide_in: int, wide_out: int, count: int, groups: int, *, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.List:
    """The resnets of one level; the first one changes the width."""
    wide_ins = [wide_in] + [wide_out] * (count - 1)
    return nnx.List([Resnet(wide, wide_out, groups, rngs=rngs, dtype=dtype) for wide in wide_ins])


class DownLevel(nnx.Module):
    """The resnets at one width, then the halving convolution, which the innermost level lacks."""

    def __init__(
        self,
        config: AutoencoderConfig,
        level: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        wide_in, width = config.widths[max(level - 1, 0)], config.widths[level]
        self.resnets = _resnets(wide_in, width, config.layers_per_block, config.norm_groups, rngs=rngs, dtype=dtype)
        self.halve = _halving(width, rngs=rngs, dtype=dtype) if level < len(config.widths) - 1 else None

    def __call__(self, x: Float[Array, "rows cols wide_in"]) -> Float[Array, "rows_out cols_out wide_out"]:
        """Returns the image at the new width, halved where there is a convolution for it."""
        for resnet in self.resnets:
            x = resnet(x)
        # PyTorch pads below and to the right only; padding all around would shift the image by half a pixel.
        return x if self.halve is None else self.halve(jnp.pad(x, ((0, 1), (0, 1), (0, 0))))


class UpLevel(nnx.Module):
    """The resnets at one width, then doubling and a convolution, which the outermost level lacks."""

    def __init__(
        self,
        config: AutoencoderConfig,
        level: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        widths = config.widths[::-1]
        wide_in, width = widths[max(level - 1, 0)], widths[level]
        count = config.layers_per_block + 1
        self.resnets = _resnets(wide_in, width, count, config.norm_groups, rngs=rngs, dtype=dtype)
        self.double = _conv3x3(width, width, rngs=rngs, dtype=dtype) if level < len(widths) - 1 else None

    def __call__(self, x: Float[Array, "rows cols wide_in"]) -> Float[Array, "rows_out cols_out wide_out"]:
        """Returns the image at the new width, doubled where there is a convolution for it."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.double is None else self.double(jnp.repeat(jnp.repeat(x, 2, axis=0), 2, axis=1))


class Encoder(nnx.Module):
    """Pixels to the moments of the latent."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        outer, inner = config.widths[0], config.widths[-1]
        self.conv_in = _conv3x3(config.in_channels, outer, rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [DownLevel(config, level, rngs=rngs, dtype=dtype) for level in range(len(config.widths))]
        )
        self.mid = Middle(config, rngs=rngs, dtype=dtype)
        self.norm_out = GroupNorm(inner, config.norm_groups, dtype=dtype)
        self.conv_out = _conv3x3(inner, 2 * config.latent_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "H W rgb"]) -> Float[Array, "h w moments"]:
        """Returns mean and log variance side by side on the channel axis."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latent to pixels."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        outer, inner = config.widths[0], config.widths[-1]
        self.conv_in = _conv3x3(config.latent_channels, inner, rngs=rngs, dtype=dtype)
        self.mid = Middle(config, rngs=rngs, dtype=dtype)
        self.levels = nnx.List([UpLevel(config, level, rngs=rngs, dtype=dtype) for level in range(len(config.widths))])
        self.norm_out = GroupNorm(outer, config.norm_groups, dtype=dtype)
        self.conv_out = _conv3x3(outer, config.in_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "h w latent"]) -> Float[Array, "H W rgb"]:
        """Returns the image, around [-1, 1] and not clipped."""
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Pixels to latents and back, for one image."""

    __repr__ = brief

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)
        latent = config.latent_channels
        self.quant_conv = _conv1x1(2 * latent, 2 * latent, rngs=rngs, dtype=dtype) if config.quant_conv else None
        self.post_quant_conv = _conv1x1(latent, latent, rngs=rngs, dtype=dtype) if config.post_quant_conv else None

    def encode(self, image: Float[Array, "H W rgb"]) -> tuple[Float[Array, "h w latent"], Float[Array, "h w latent"]]:
        """Encodes one image.

        Args:
            image: pixels in [-1, 1]; both sides divisible by `config.factor`.

        Returns:
            Mean and log variance of the latent's diagonal Gaussian, not yet shifted and scaled.

        Raises:
            ValueError: if a side is not divisible.
        """
        height, width, factor = *image.shape[:2], self.config.factor
        if height % factor or width % factor:
            raise ValueError(
                f"The image is {height} x {width} pixels, but both sides must be divisible by {factor}; "
                "crop or resize it."
            )
        moments = self.encoder(image)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latent: Float[Array, "h w latent"]) -> Float[Array, "H W rgb"]:
        """Decodes one latent.

        Args:
            latent: as `encode` gives it: divided by `config.scaling_factor`, plus `config.shift_factor`.

        Returns:
            Pixels around [-1, 1], not clipped.
        """
        return self.decoder(latent if self.post_quant_conv is None else self.post_quant_conv(latent))

    def unpacked(self, tokens: Float[Array, "img channels"], grid: tuple[int, int]) -> Float[Array, "h w latent"]:
        """Returns the latent that packed and scaled tokens stand for, as `decode` takes it.

        Args:
            tokens: as the transformer works on them.
            grid: rows and columns of tokens.
        """
        return scale_for_decoder(unpack(tokens, grid), self.config.scaling_factor, self.config.shift_factor)


class LatentStatistics(nnx.Module):
    """Mean and variance of every channel of packed latents, as batch norm counted them in training."""

    def __init__(self, channels: int, *, dtype: DTypeLike) -> None:
        self.mean = nnx.Param(jnp.zeros(channels, dtype))
        self.variance = nnx.Param(jnp.ones(channels, dtype))


class Flux2Autoencoder(Autoencoder):
    """FLUX.2's autoencoder: that of latent diffusion, and the statistics of its packed latents."""

    def __init__(self, config: Flux2AutoencoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.latents = LatentStatistics(PATCH**2 * config.latent_channels, dtype=dtype)
        self.eps = config.batch_norm_eps

    def unpacked(self, tokens: Float[Array, "img channels"], grid: tuple[int, int]) -> Float[Array, "h w latent"]:
        """Returns the latent that packed and scaled tokens stand for, as `decode` takes it."""
        mean, variance = (one[...].astype(tokens.dtype) for one in (self.latents.mean, self.latents.variance))
        return unpack(tokens * jnp.sqrt(variance + self.eps)[None] + mean[None], grid)
