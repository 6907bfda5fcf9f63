"""The transcoder of one site (METHOD section 2): an MLP sublayer's output from a sparse code of its input.

    e(t)          sinusoidal embedding of the denoising time
    alpha, beta   scale and shift from e, by two layers with SiLU after both, and a linear head
    u = W_enc ((1 + alpha) * x + beta) + b_enc      pre-activations, one per feature
    z = relu(u)                                     the code
    y^ = W_dec z + b_dec  (+ W_skip x)              what stands in for y = MLP(x)

Rows of `dec.kernel` are the features' decoder vectors; the reference's have unit norm. An SAE is the same module with
y in place of x. A module is for one site and one denoising time; `TranscoderSet` stacks those of a stream.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.config import UserError
from difffract_jax.models.mmdit import FluxConfig
from difffract_jax.ops import film, sinusoid, widen

CONDITIONINGS = ("film", "film_raw_t", "none")


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    """Shape of a transcoder.

    Attributes:
        d_model: channels of the MLP sublayer's input and output.
        features: features of the code.
        time_embed: channels of the time embedding; 0 without conditioning.
        conditioning: how time enters. `film`: embedded as the model does, 1000 t, so that steps are far apart;
            `film_raw_t`: t itself, as the reference; `none`: not at all.
        activation: from pre-activation to code.
        skip: whether an affine path leads around the code.
        role: `transcoder` maps x to y, `sae` y to y.
    """

    d_model: int
    features: int
    time_embed: int
    conditioning: Literal["film", "film_raw_t", "none"] = "film"
    activation: Literal["relu"] = "relu"
    skip: bool = False
    role: Literal["transcoder", "sae"] = "transcoder"

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise UserError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, but is {self.conditioning!r}.")
        if self.activation != "relu":
            raise UserError(f"activation must be relu, the only one this release has, but is {self.activation!r}.")
        if (self.time_embed == 0) != (self.conditioning == "none"):
            raise UserError(
                f"time_embed is {self.time_embed} with conditioning {self.conditioning!r}, but it must be 0 exactly "
                "where conditioning is none."
            )


class Transcoder(nnx.Module):
    """The transcoder of one site; see the module."""

    def __init__(self, config: TranscoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model, time = config.d_model, config.time_embed
        self.config = config
        if time:
            self.time_in = nnx.Linear(time, time, param_dtype=dtype, rngs=rngs)
            self.time_out = nnx.Linear(time, time, param_dtype=dtype, rngs=rngs)
            self.film = nnx.Linear(time, 2 * d_model, param_dtype=dtype, rngs=rngs)
        self.enc = nnx.Linear(d_model, config.features, param_dtype=dtype, rngs=rngs)
        self.dec = nnx.Linear(config.features, d_model, param_dtype=dtype, rngs=rngs)
        if config.skip:
            self.skip = nnx.Linear(d_model, d_model, use_bias=False, param_dtype=dtype, rngs=rngs)

    def scale_shift(self, t: Float[Array, ""]) -> tuple[Float[Array, "d_model"], Float[Array, "d_model"]]:
        """Returns alpha and beta at a denoising time.

        Args:
            t: denoising time in [0, 1], the value the transformer is fed.
        """
        dtype = self.enc.kernel.dtype
        if self.config.conditioning == "none":
            return jnp.zeros(self.config.d_model, dtype), jnp.zeros(self.config.d_model, dtype)
        if self.config.conditioning == "film":
            embedded = sinusoid(1000 * widen(t), self.config.time_embed, "cos_sin")
        else:
            embedded = sinusoid(widen(t), self.config.time_embed, "sin_cos")
        hidden = jax.nn.silu(self.time_out(jax.nn.silu(self.time_in(embedded.astype(dtype)))))
        scale, shift = jnp.split(self.film(hidden), 2)
        return scale, shift

    def preactivation(self, x: Float[Array, "rows d_model"], t: Float[Array, ""]) -> Float[Array, "rows feat"]:
        """Returns u of every row.

        Args:
            x: inputs of the MLP sublayer.
            t: denoising time in [0, 1].
        """
        return self.enc(film(x, *self.scale_shift(t)))

    def encode(self, x: Float[Array, "rows d_model"], t: Float[Array, ""]) -> Float[Array, "rows feat"]:
        """Returns the code z of every row; arguments as `preactivation`."""
        return jax.nn.relu(self.preactivation(x, t))

    def decode(self, z: Float[Array, "rows feat"], x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
        """Returns y^ from a code, and from the input where there is a skip.

        Args:
            z: codes.
            x: inputs that the codes came from; read by the skip alone.
        """
        y = self.dec(z)
        return y + self.skip(x) if self.config.skip else y

    def __call__(self, x: Float[Array, "rows d_model"], t: Float[Array, ""]) -> Float[Array, "rows d_model"]:
        """Returns y^ of every row; arguments as `preactivation`."""
        return self.decode(self.encode(x, t), x)


class TranscoderSet(NamedTuple):
    """The transcoders of a model's MLPs, one stack per stream.

    Attributes:
        img: image stream's, stacked over `img_layers`; None if there are none.
        txt: text stream's, stacked over `txt_layers`; None if there are none.
        img_layers: double-stream blocks of the image stream's stack, ascending.
        txt_layers: the same for the text stream.
        config: shape of each.
        source: content hash of the weights.
    """

    img: Transcoder | None
    txt: Transcoder | None
    img_layers: tuple[int, ...]
    txt_layers: tuple[int, ...]
    config: TranscoderConfig
    source: str


def check_fit(tcs: TranscoderSet, config: FluxConfig) -> None:
    """Refuses transcoders of another width, or of sites that the model does not have.

    Args:
        tcs: the transcoders.
        config: the model they shall be used with.

    Raises:
        UserError: naming what does not fit.
    """
    if tcs.config.d_model != config.d_model:
        raise UserError(
            f"The transcoders are {tcs.config.d_model} wide, but the model is {config.d_model} wide; "
            "give transcoders that were trained on this model."
        )
    sites = [("img", layer) for layer in tcs.img_layers] + [("txt", layer) for layer in tcs.txt_layers]
    absent = [f"{stream}/{layer}" for stream, layer in sites if not 0 <= layer < config.depth_double]
    if absent:
        raise UserError(
            f"The transcoders are for the sites {', '.join(absent)}, but the model has double-stream blocks 0 to "
            f"{config.depth_double - 1}; give transcoders that were trained on this model."
        )


def random_transcoders(
    config: FluxConfig,
    *,
    seed: int = 0,
    features: int | None = None,
    active: float = 0.07,
    dtype: DTypeLike = jnp.float32,
) -> TranscoderSet:
    """Makes untrained transcoders for every double-stream MLP of a model; for tests, benchmarks and demonstrations.

    Decoder vectors are random and of unit norm, the encoder is the decoder transposed, and a constant encoder bias
    lets about a share `active` of the features fire on inputs of unit variance. There is no time conditioning.

    Args:
        config: shape of the model.
        seed: of the weights.
        features: features per site; 8 per channel if left out.
        active: share of features that fire.
        dtype: of the weights.
    """
    shape = TranscoderConfig(
        d_model=config.d_model, features=features or 8 * config.d_model, time_embed=0, conditioning="none"
    )
    bias = jax.scipy.stats.norm.ppf(active)

    def build(key: jax.Array) -> Transcoder:
        tc = Transcoder(shape, rngs=nnx.Rngs(key), dtype=dtype)
        vectors = jax.random.normal(key, (shape.features, shape.d_model), jnp.float32)
        vectors = (vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
        tc.dec.kernel[...] = vectors
        tc.enc.kernel[...] = vectors.T
        assert tc.enc.bias is not None
        tc.enc.bias[...] = jnp.full(shape.features, bias, dtype)
        return tc

    layers = tuple(range(config.depth_double))
    stacks = [jax.vmap(build)(keys) for keys in jax.random.split(jax.random.key(seed), (2, len(layers)))]
    return TranscoderSet(stacks[0], stacks[1], layers, layers, shape, f"random:{seed}")
