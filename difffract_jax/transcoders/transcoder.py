"""The transcoder of one site (docs/method.md, section 2): an MLP sublayer's output from a sparse code of its input.

    e(t)          sinusoidal embedding of the denoising time
    alpha, beta   scale and shift from e, by two layers with SiLU after both, and a linear head
    u = W_enc ((1 + alpha) * x + beta) + b_enc      pre-activations, one per feature
    z = activate(u)                                 the code; never negative
    y^ = W_dec z + b_dec  (+ W_skip x)              what stands in for y = MLP(x)

Activations: `relu`; `topk`, the k largest positive of each row; `batchtopk`, the k per row on average that are largest
over all rows given together, for training only; `jumprelu`, those above a threshold per feature, which is also how a
trained `batchtopk` is exported. In all of them an active feature has z = u, so that attribution is the same.

Rows of `dec.kernel` are the features' decoder vectors; the reference's have unit norm. An SAE is the same module with
y in place of x. A module is for one site and one denoising time; `TranscoderSet` stacks those of a group of sites.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from difffract_jax.address import Layout
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, html_of, spans, text_of
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.streaming import whole, whole_bytes
from difffract_jax.ops import film, sinusoid, widen
from difffract_jax.seeds import random_key
from difffract_jax.storage.checkpoint import VERIFY_BELOW_BYTES, tree_hash
from difffract_jax.transcoders.sites import SiteSet, sites_of
from difffract_jax.trees import brief, tree_text

Conditioning = Literal["film", "film_raw_t", "none"]
Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
FEATURE_AXES = {"enc.kernel": 1, "enc.bias": 0, "threshold": 0, "dec.kernel": 0}
"""Leaf of a transcoder -> the axis along which its features lie."""
CUTOFF_HALVINGS = 40
"""Halvings of the interval that holds BatchTopK's cut-off: more than float32 resolves."""


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    """Shape of a transcoder.

    Attributes:
        d_model: channels of the MLP sublayer's input, and of its output unless `d_out` says otherwise.
        features: features of the code.
        time_embed: channels of the time embedding; 0 without conditioning.
        conditioning: how time enters. `film`: embedded as the model does, 1000 t, so that steps are far apart;
            `film_raw_t`: t itself, as the reference; `none`: not at all.
        activation: from pre-activation to code, see the module.
        skip: whether an affine path leads around the code.
        role: `transcoder` maps x to y, `sae` y to y.
        k: active features per row of `topk`, and on average of `batchtopk`; 0 for the others.
        d_out: channels of the output where they are other than those of the input, as in rows of another kind of model;
            else None.
    """

    d_model: int
    features: int
    time_embed: int
    conditioning: str = "film"
    activation: str = "relu"
    skip: bool = False
    role: Literal["transcoder", "sae"] = "transcoder"
    k: int = 0
    d_out: int | None = None

    @property
    def d_model_out(self) -> int:
        """Channels of the output."""
        return self.d_model if self.d_out is None else self.d_out

    def __post_init__(self) -> None:
        if self.d_out == self.d_model:
            object.__setattr__(self, "d_out", None)  # one way to say it, so that equal shapes are equal
        for name, known in (("conditioning", get_args(Conditioning)), ("activation", get_args(Activation))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, but is {getattr(self, name)!r}.")
        counted = self.activation in ("topk", "batchtopk")
        if counted and not 1 <= self.k <= self.features:
            raise UserError(
                f"k must lie in [1, {self.features}], the number of features, with activation {self.activation}, "
                f"but is {self.k}."
            )
        if not counted and self.k:
            raise UserError(
                f"k is for topk and batchtopk, but is {self.k} with activation {self.activation}; leave it."
            )
        if (self.time_embed == 0) != (self.conditioning == "none"):
            raise UserError(
                f"time_embed is {self.time_embed} with conditioning {self.conditioning!r}, but it must be 0 exactly "
                "where conditioning is none."
            )


class Transcoder(nnx.Module):
    """The transcoder of one site; see the module."""

    __repr__ = brief

    def __init__(self, config: TranscoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        d_model, d_model_out, time = config.d_model, config.d_model_out, config.time_embed
        self.config = config
        if time:
            self.time_in = nnx.Linear(time, time, param_dtype=dtype, rngs=rngs)
            self.time_out = nnx.Linear(time, time, param_dtype=dtype, rngs=rngs)
            self.film = nnx.Linear(time, 2 * d_model, param_dtype=dtype, rngs=rngs)
        self.enc = nnx.Linear(d_model, config.features, param_dtype=dtype, rngs=rngs)
        self.dec = nnx.Linear(config.features, d_model_out, param_dtype=dtype, rngs=rngs)
        if config.activation == "jumprelu":
            self.threshold = nnx.Param(jnp.zeros(config.features, dtype))
        if config.skip:
            self.skip = nnx.Linear(d_model, d_model_out, use_bias=False, param_dtype=dtype, rngs=rngs)

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
        return self.activate(self.preactivation(x, t))

    def activate(self, u: Float[Array, "rows feat"]) -> Float[Array, "rows feat"]:
        """Turns pre-activations into codes, see the module.

        Args:
            u: pre-activations; with `batchtopk`, a row's code depends on the others.
        """
        match self.config.activation:
            case "relu":
                return jax.nn.relu(u)
            case "topk":
                values, index = jax.lax.top_k(u, self.config.k)
                rows = jnp.arange(u.shape[0])[:, None]
                return jnp.zeros_like(u).at[rows, index].set(jax.nn.relu(values))
            case "batchtopk":
                return above(u, batch_cutoff(u, self.config.k))
            case _:
                return above(u, self.threshold[None, :])

    def decode(self, z: Float[Array, "rows feat"], x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model_out"]:
        """Returns y^ from a code, and from the input where there is a skip.

        Args:
            z: codes.
            x: inputs that the codes came from; read by the skip alone.
        """
        y = self.dec(z)
        return y + self.skip(x) if self.config.skip else y

    def __call__(self, x: Float[Array, "rows d_model"], t: Float[Array, ""]) -> Float[Array, "rows d_model_out"]:
        """Returns y^ of every row; arguments as `preactivation`."""
        return self.decode(self.encode(x, t), x)


def above(u: Float[Array, "rows feat"], threshold: Float[Array, "*#shape"]) -> Float[Array, "rows feat"]:
    """Returns u where it exceeds a threshold, and 0 elsewhere."""
    return jnp.where(u > threshold, u, 0)


def batch_cutoff(u: Float[Array, "rows feat"], k: int, *, axis: str | None = None) -> Float[Array, ""]:
    """Returns the least value, up to rounding, that at most k entries per row on average exceed; at least 0.

    It is found by halving an interval, which needs counts alone: no sort, and over devices nothing but their sum.

    Args:
        u: pre-activations.
        k: entries per row.
        axis: mapped axis of the devices that hold the other rows; None if these are all.
    """

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        active = jnp.mean(jnp.sum(u > middle, axis=1), dtype=u.dtype)
        crowded = (active if axis is None else jax.lax.pmean(active, axis)) > k
        return jnp.where(crowded, middle, low), jnp.where(crowded, high, middle)

    u = jax.lax.stop_gradient(u)
    largest = jnp.maximum(jnp.max(u), 0)
    ends = jnp.zeros((), u.dtype), largest if axis is None else jax.lax.pmax(largest, axis)
    return jax.lax.fori_loop(0, CUTOFF_HALVINGS, halve, ends)[1]


class TranscoderSet(NamedTuple):
    """The transcoders of a model's MLPs, one stack per group of sites.

    Attributes:
        stacks: name of a group, as img, txt or joint -> its transcoders, stacked over its sites, or streamed; only
            groups that have any.
        sites: which sites these are.
        config: shape of each transcoder.
        source: content hash of the weights.
        origin: the repository on the hub that they came from, commit included; "" if they did not.
    """

    stacks: dict[str, Any]
    sites: SiteSet
    config: TranscoderConfig
    source: str
    origin: str = ""

    def per_group(self, layout: Layout) -> tuple[Any, ...]:
        """Returns the stack of every group of a model; None where there is none."""
        return tuple(self.stacks.get(group.name) for group in layout.groups)

    def __repr__(self) -> str:
        return text_of(*self._page())

    def _repr_html_(self) -> str:
        return html_of(*self._page())

    def _page(self) -> tuple[str, dict[str, str]]:
        """Returns what it shows of itself: a title and facts."""
        config, sites = self.config, [f"{label}/{spans(numbers)}" for label, numbers in self.sites.labels.items()]
        kind = "Transcoders" if config.role == "transcoder" else "SAEs"
        width = f"{config.d_model}" if config.d_out is None else f"{config.d_model} to {config.d_out}"
        shape = f"{config.features} features each, width {width}, activation {config.activation}"
        return f"{kind} of {len(self.sites.names)} MLPs", {
            "sites": ", ".join(sites),
            "shape": f"{shape}, conditioning {config.conditioning}{', skip' if config.skip else ''}",
            "weights": tree_text(self.stacks),
            "source": hash_text(self.source),
        } | ({"from": self.origin} if self.origin else {})


def source_of_some(source: str, sites: SiteSet, stacks: Mapping[str, Any]) -> str:
    """Returns what identifies some transcoders of a set: their content hash, or of large ones where they come from.

    Args:
        source: content hash of the set.
        sites: which transcoders these are.
        stacks: the transcoders.
    """
    if sum(map(whole_bytes, stacks.values())) < VERIFY_BELOW_BYTES:
        return tree_hash({name: whole(stack) for name, stack in stacks.items()})
    return hashlib.sha256(f"{source} {' '.join(sites.names)}".encode()).hexdigest()


def check_fit(tcs: TranscoderSet, config: FluxConfig) -> None:
    """Refuses transcoders of another width, or of sites that the model does not have.

    Args:
        tcs: the transcoders.
        config: the model they shall be used with.

    Raises:
        UserError: naming what does not fit.
    """
    if {tcs.config.d_model, tcs.config.d_model_out} != {config.d_model}:
        width = f"{tcs.config.d_model}" if tcs.config.d_out is None else f"{tcs.config.d_model} to {tcs.config.d_out}"
        raise UserError(
            f"The transcoders are {width} wide, but the model is {config.d_model} wide; "
            "give transcoders that were trained on this model."
        )
    if tcs.config.activation == "batchtopk":
        raise UserError(
            "These transcoders have activation batchtopk, whose codes depend on which rows come together; "
            "export them with a threshold, as `difffract train` does."
        )
    depths = {label: len(blocks) for label, blocks in config.layout.labels.items()}
    absent = [
        f"{label}/{number}"
        for label, numbers in tcs.sites.labels.items()
        for number in numbers
        if not 0 <= number < depths.get(label, 0)
    ]
    if absent:
        raise UserError(
            f"The transcoders are for the sites {', '.join(absent)}, but the model has {config.layout.describe()}; "
            "give transcoders that were trained on this model."
        )


def random_transcoders(
    config: FluxConfig,
    *,
    seed: int = 0,
    features: int | None = None,
    active: float = 0.07,
    dtype: DTypeLike = jnp.float32,
    sites: Mapping[str, Sequence[int]] | None = None,
) -> TranscoderSet:
    """Makes untrained transcoders; for tests, benchmarks and demonstrations.

    Decoder vectors are random and of unit norm, the encoder is the decoder transposed, and a constant encoder bias
    lets about a share `active` of the features fire on inputs of unit variance. There is no time conditioning. No more
    than one transcoder lies in memory besides the set.

    Args:
        config: shape of the model.
        seed: of the weights.
        features: features per site; 8 per channel if left out.
        active: share of features that fire.
        dtype: of the weights.
        sites: name of a group, as img, txt or joint -> numbers of the sites that have one; if left out, all sites that
            work on one stream, as in FLUX's double-stream blocks.
    """
    shape = TranscoderConfig(
        d_model=config.d_model, features=features or 8 * config.d_model, time_embed=0, conditioning="none"
    )
    bias = jax.jit(jax.scipy.stats.norm.ppf)(active)

    def build(key: jax.Array) -> Transcoder:
        tc = Transcoder(shape, rngs=nnx.Rngs(key), dtype=dtype)
        vectors = jax.random.normal(key, (shape.features, shape.d_model), jnp.float32)
        vectors = (vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)
        tc.dec.kernel[...] = vectors
        tc.enc.kernel[...] = vectors.T
        assert tc.enc.bias is not None
        tc.enc.bias[...] = jnp.full(shape.features, bias, dtype)
        return tc

    layout = config.layout
    depths = {name: layout.depth_of(name) for name in layout.names}
    if sites is None:
        sites = {name: range(depth) for name, depth in depths.items() if len(layout.named(name).streams) == 1}
    chosen = sites_of(sites, layout.groups)
    ends = np.cumsum(list(depths.values()))
    firsts = dict(zip(depths, ends - list(depths.values()), strict=True))
    keys = jax.random.split(random_key(seed), int(ends[-1]))
    one_by_one = jax.jit(lambda keys, numbers: jax.lax.map(build, keys[numbers]))
    stacks = {name: one_by_one(keys, firsts[name] + np.array(numbers)) for name, numbers in chosen.groups.items()}
    return TranscoderSet(stacks, chosen, shape, f"random:{seed}")
