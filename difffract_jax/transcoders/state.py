"""The state of training: one transcoder per site, stacked, with everything that a resumed run needs.

1. `init_state` makes the weights of all sites at once. Decoder vectors are random; the encoder starts as their
   transpose. Kind `reference`: Kaiming-uniform, and the encoder is copied before the vectors get unit norm, biases 0.
   Kind `tied`: both from unit vectors, b_dec the mean of y, and b_enc such that the mean of x gives u = 0 (as
   EleutherAI's sparsify does). The FiLM head starts at 0, so that time does nothing yet. Where x and y differ in width
   nothing can be transposed: the encoder's vectors are then random too, unit ones for `tied`.
2. Rows are divided by one number per site for x and one for y, so that their root mean square is 1.
3. `export_transcoders` undoes 2 in the weights, exactly, and turns `batchtopk` into `jumprelu`: the cut-off is the
   threshold.

With x = s_x x' and y = s_y y':  u = W_enc ((1 + alpha) x / s_x + beta) + b_enc. All activations commute with a
positive factor, so W_enc * s_y / s_x, beta * s_x, b_enc * s_y, thresholds and b_dec * s_y, W_skip * s_y / s_x act on
unscaled rows, and decoder vectors keep their unit norm.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from difffract_jax.sharding import PLACEMENT, TRANSCODER, AnyMesh, partition_specs
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.site_loop import make_sites
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig

Init = Literal["reference", "tied"]
SITE_PLACEMENT = {**PLACEMENT, "layer": "site"}
"""In training the stacked axis of transcoders is split over the mesh axis `site`."""


class TrainState(NamedTuple):
    """Everything that a training step reads and writes; arrays have a leading site axis but for `step`.

    Attributes:
        step: steps done.
        params: the transcoders, in units of scaled rows.
        opt_state: of the optimiser.
        silent: rows since each feature was last active.
        cutoff: running mean of `batchtopk`'s cut-off.
        sparsity: see `objective.site_loss`.
        x_scale: what x is divided by.
        y_scale: what y is divided by.
    """

    step: Int[Array, ""]
    params: Transcoder
    opt_state: Any
    silent: Int[Array, "site feat"]
    cutoff: Float[Array, "site"]
    sparsity: Float[Array, "site"]
    x_scale: Float[Array, "site"]
    y_scale: Float[Array, "site"]


class Moments(NamedTuple):
    """What is known of the rows before training; leading site axis.

    Attributes:
        x_mean: mean of x.
        y_mean: mean of y.
        x_scale: what x shall be divided by.
        y_scale: what y shall be divided by.
    """

    x_mean: Float[Array, "site d_model"]
    y_mean: Float[Array, "site d_model_out"]
    x_scale: Float[Array, "site"]
    y_scale: Float[Array, "site"]


@partial(jax.jit, static_argnames="scaled")
def measure_moments(rows: ActivationRows, scaled: bool) -> Moments:
    """Returns the moments of rows of all sites.

    Args:
        rows: with a leading site axis.
        scaled: whether training shall scale rows; if not, the scales are 1.
    """
    x, y = rows.x.astype(jnp.float32), rows.y.astype(jnp.float32)
    sizes = [jnp.sqrt(jnp.mean(jnp.square(a), axis=(1, 2))) for a in (x, y)]
    scales = [jnp.where(size > 0, size, 1) if scaled else jnp.ones_like(size) for size in sizes]
    return Moments(jnp.mean(x, axis=1), jnp.mean(y, axis=1), *scales)


def init_params(key: Array, config: TranscoderConfig, kind: Init, moments: Moments, *, shards: int = 1) -> Transcoder:
    """Makes one transcoder per site, one after another.

    Args:
        key: of the random numbers.
        config: shape of each.
        kind: see the module.
        moments: of the sites' rows; their number is that of the sites.
        shards: parts into which a mesh splits the sites.
    """

    def one(given: tuple[Array, Moments]) -> Transcoder:
        key, moments = given
        tc = Transcoder(config, rngs=nnx.Rngs(key))
        bound = (6 / config.features) ** 0.5
        vectors = jax.random.uniform(key, tc.dec.kernel.shape, minval=-bound, maxval=bound)
        unit = unit_rows(vectors)
        tc.dec.kernel[...] = unit
        reads = vectors
        if config.d_out is not None:
            reads = jax.random.uniform(
                jax.random.fold_in(key, 1), tc.enc.kernel.shape[::-1], minval=-bound, maxval=bound
            )
        tc.enc.kernel[...] = (reads if kind == "reference" else unit_rows(reads)).T
        if config.time_embed:
            tc.film.kernel[...] = jnp.zeros_like(tc.film.kernel[...])
        if config.skip:
            tc.skip.kernel[...] = jnp.zeros_like(tc.skip.kernel[...])
        if kind == "tied":
            assert tc.enc.bias is not None and tc.dec.bias is not None  # made with them
            tc.enc.bias[...] = -(moments.x_mean / moments.x_scale) @ tc.enc.kernel[...]
            tc.dec.bias[...] = moments.y_mean / moments.y_scale
        if config.activation == "jumprelu":
            tc.threshold[...] = jnp.full(config.features, 0.1, jnp.float32)
        return tc

    return make_sites(one, (jax.random.split(key, moments.x_scale.shape[0]), moments), shards=shards)


def init_state(params: Transcoder, tx: optax.GradientTransformation, moments: Moments, sparsity: Array) -> TrainState:
    """Returns the state before the first step.

    Args:
        params: from `init_params`, or weights to go on from.
        tx: the optimiser.
        moments: of the sites' rows.
        sparsity: of every site.
    """
    sites, _, features = params.enc.kernel.shape
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.vmap(tx.init)(cast(Any, params)),
        silent=jnp.zeros((sites, features), jnp.int32),
        cutoff=jnp.zeros(sites),
        sparsity=jnp.asarray(sparsity, jnp.float32),
        x_scale=moments.x_scale,
        y_scale=moments.y_scale,
    )


def unit_rows(kernel: Float[Array, "*site feat d_model"]) -> Float[Array, "*site feat d_model"]:
    """Returns decoder vectors of unit norm; a vector of zeros stays."""
    return kernel / jnp.maximum(jnp.linalg.norm(kernel, axis=-1, keepdims=True), 1e-12)


def state_shardings(state: Any, mesh: AnyMesh) -> Any:
    """Returns the sharding of every array of a state, by the rules of its transcoders.

    An array of the optimiser is placed as the weight it belongs to: its path ends in the weight's.

    Args:
        state: the state, or its shapes.
        mesh: where it shall live.
    """
    specs = partition_specs(state.params, mesh, TRANSCODER, SITE_PLACEMENT)
    site = "site" if mesh.shape["site"] > 1 else None

    def place(weights: Transcoder) -> Transcoder:
        leaves = [NamedSharding(mesh, spec) for spec in specs.values()]
        return jax.tree.unflatten(jax.tree.structure(weights), leaves)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Transcoder):
            return place(leaf)
        return NamedSharding(mesh, PartitionSpec(site) if leaf.ndim else PartitionSpec())

    placed = jax.tree.map(other, state, is_leaf=lambda node: isinstance(node, Transcoder))
    return placed._replace(silent=NamedSharding(mesh, specs["enc.bias"]))


def export_transcoders(state: TrainState, *, dtype: Any = jnp.float32) -> tuple[Transcoder, TranscoderConfig]:
    """Returns the transcoders for unscaled rows, stacked over the sites, and their shape.

    Args:
        state: of the training.
        dtype: of the weights.
    """
    config = state.params.config
    shape = replace(config, activation="jumprelu", k=0) if config.activation == "batchtopk" else config
    return _exported(state.params, state.cutoff, state.x_scale, state.y_scale, shape, jnp.dtype(dtype)), shape


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _exported(
    params: Transcoder, cutoff: Array, x_scale: Array, y_scale: Array, shape: TranscoderConfig, dtype: Any
) -> Transcoder:
    """Returns transcoders for unscaled rows in one program: outside one, every product would be one of its own."""
    config = params.config

    def one(tc: Transcoder, cutoff: Array, x_scale: Array, y_scale: Array) -> Transcoder:
        out = Transcoder(shape, rngs=nnx.Rngs(0))
        if config.time_embed:
            out.time_in, out.time_out = tc.time_in, tc.time_out
            factor = jnp.concatenate([jnp.ones(config.d_model), jnp.full(config.d_model, x_scale)])
            assert out.film.bias is not None and tc.film.bias is not None  # made with them
            out.film.kernel[...] = tc.film.kernel[...] * factor[None]
            out.film.bias[...] = tc.film.bias[...] * factor
        assert out.enc.bias is not None and tc.enc.bias is not None  # made with them
        assert out.dec.bias is not None and tc.dec.bias is not None
        out.enc.kernel[...] = tc.enc.kernel[...] * (y_scale / x_scale)
        out.enc.bias[...] = tc.enc.bias[...] * y_scale
        out.dec.kernel[...] = tc.dec.kernel[...]
        out.dec.bias[...] = tc.dec.bias[...] * y_scale
        if config.skip:
            out.skip.kernel[...] = tc.skip.kernel[...] * (y_scale / x_scale)
        if config.activation == "batchtopk":
            out.threshold[...] = jnp.full(config.features, cutoff * y_scale)
        elif config.activation == "jumprelu":
            out.threshold[...] = tc.threshold[...] * y_scale
        return out

    made = jax.vmap(one)(params, cutoff, x_scale, y_scale)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), made)


def place(tree: Any, shardings: Any) -> Any:
    """Returns the tree with every array where its sharding says."""
    return jax.tree.map(jax.device_put, tree, shardings)
