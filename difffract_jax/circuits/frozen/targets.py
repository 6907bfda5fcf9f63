"""Targets, and what they read: pre-activations as functions of the MLP sublayers' inputs (docs/method.md, section 4).

    u = g . x + c      g = (1 + alpha) * w_f,   c = b_f + w_f . beta

x is the input of the feature's MLP sublayer at its position, from whatever run: the model's, or the affine map's at any
sources.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from difffract_jax.circuits.frozen.encoding import ReplacedSites, site
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.frozen.streamed_sites import encoder_terms
from difffract_jax.circuits.trace.record import Record
from difffract_jax.models.streaming import jit_resident, refuse_compilation
from difffract_jax.ops import widen
from difffract_jax.transcoders.transcoder import Transcoder

DIRECTION = -2
"""Stands for the group of a target that is a direction instead of a feature."""


class Targets(NamedTuple):
    """What incoming edges are wanted of.

    Attributes:
        group: number of the feature's group; `DIRECTION` for a direction that enters below its layer.
        layer: recorded layer, counted through all stacks. A direction of the velocity has the number of all layers, one
            of the residual stream entering a layer has that layer. -1 for a place that only fills up: it costs next to
            nothing, and has no edges.
        position: within the group's sequence.
        feature: of the site's transcoder.
    """

    group: Int[Array, "target"]
    layer: Int[Array, "target"]
    position: Int[Array, "target"]
    feature: Int[Array, "target"]

    @property
    def enters(self) -> Int[Array | np.ndarray, "target"]:
        """Twice the layer, and one more for features, which enter within theirs; negative where nothing enters.

        NumPy's where the columns are NumPy's.
        """
        where = np.where if isinstance(self.layer, np.ndarray) else jnp.where
        return where(self.layer < 0, -1, 2 * self.layer + where(self.group == DIRECTION, 0, 1))


@jit_resident
def target_gradients(
    record: Record, sites: Sequence[ReplacedSites], targets: Targets
) -> Float[Array, "target d_model"]:
    """Returns g = (1 + alpha) * w_f of every target; zeros for directions and places that fill up."""
    rows = [_encoder_rows(s, record, targets, group)[0] for group, s in enumerate(sites)]
    return _by_group(targets, rows)


@jax.jit
def _by_group(targets: Targets, found: list[Array]) -> Array:
    """Picks each target's row from those of its group; zeros where it has none."""
    chosen = jnp.zeros_like(found[0])
    for group, rows in enumerate(found):
        mine = targets.group == group
        chosen = jnp.where(mine[:, None] if rows.ndim == 2 else mine, rows, chosen)
    return chosen


def preactivations(replacement: Replacement, targets: Targets, x: Sequence[Array]) -> Float[Array, "target"]:
    """Returns u of every target.

    Args:
        replacement: from `prepare_step`.
        targets: which features.
        x: inputs of the MLP sublayers: the record's, or the affine map's at any sources.
    """
    with jax.default_matmul_precision("highest"):
        gradients, inputs, constant = _terms(replacement.record, replacement.sites, targets, x)
        return jnp.sum(gradients * inputs, axis=1) + constant


@jit_resident
def reading_terms(
    record: Record, sites: Sequence[ReplacedSites], targets: Targets
) -> tuple[Float[Array, "target d_model"], Float[Array, "target"]]:
    """Returns g and c of every target, u = g . x + c, to read targets in many runs.

    Args:
        record: the trace's arrays.
        sites: from the replacement; the encoders of streamed ones are read now.
        targets: which features; directions and places that fill up have zeros.
    """
    found = [_encoder_rows(one, record, targets, group) for group, one in enumerate(sites)]
    gradients, constant = (_by_group(targets, list(column)) for column in zip(*found, strict=True))
    return gradients, constant


def inputs_at(
    record: Record, targets: Targets, x: Sequence[Float[Array, "_ _ d_model"]]
) -> Float[Array, "target d_model"]:
    """Returns the MLP sublayer's input x at each target's place; for use inside other programs.

    Args:
        record: the trace's arrays.
        targets: which features; directions and places that fill up have zeros.
        x: inputs of the MLP sublayers, [layer rows d_model] per group, of whatever run.
    """
    return _inputs_at(targets, x, record.first_layers)


@partial(jax.jit, static_argnames="firsts")
def _inputs_at(targets: Targets, x: Sequence[Array], firsts: tuple[int, ...]) -> Array:
    found = []
    for rows, first in zip(x, firsts, strict=True):
        if rows.shape[0]:
            layer = jnp.clip(targets.layer - first, 0, rows.shape[0] - 1)
            found.append(rows.at[layer, targets.position].get(mode="clip"))
        else:
            found.append(jnp.zeros((targets.layer.shape[0], rows.shape[2]), rows.dtype))
    return _by_group(targets, found)


def exact_preactivations(
    replacement: Replacement, targets: Targets, x: Sequence[Array]
) -> Float64[np.ndarray, "target"]:
    """Returns what `preactivations` does, summed in float64: u may be far larger than what edges explain."""
    # Filled up to a power of two: else every number of targets is a program, of which a process holds only so many.
    count = targets.layer.shape[0]
    more = (1 << max(count - 1, 0).bit_length()) - count
    columns = zip(targets, Targets(DIRECTION, -1, 0, 0), strict=True)
    filled = (np.pad(np.asarray(column), (0, more), constant_values=value) for column, value in columns)
    terms = _terms(replacement.record, replacement.sites, jax.device_put(Targets(*filled)), x)
    gradients, inputs, constant = (np.asarray(term, np.float64)[:count] for term in terms)
    return np.sum(gradients * inputs, axis=1) + constant


@jit_resident
def _terms(
    record: Record, sites: Sequence[ReplacedSites], targets: Targets, x: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """Returns (1 + alpha) * w_f, x, and b_f + w_f . beta of every target: u = the first times the second + the last."""
    gradients, constant = reading_terms(record, sites, targets)
    return gradients, inputs_at(record, targets, x), constant


def _group_layer(record: Record, targets: Targets, group: int) -> Int[Array, "target"]:
    """Returns targets' layers as their group counts them; for targets of other groups, some layer that exists."""
    return jnp.clip(targets.layer - record.first_layers[group], 0, record.mlp_in[group].shape[0] - 1)


def _encoder_rows(
    sites: ReplacedSites, record: Record, targets: Targets, group: int
) -> tuple[Float[Array, "target d_model"], Float[Array, "target"]]:
    """Returns (1 + alpha) * w_f, and b_f + w_f . beta, of every target as if it were of this group."""
    if sites.streamed is not None:
        return _streamed_rows(sites, record, targets, group)
    if sites.stack is None:
        none = jnp.zeros((targets.layer.shape[0], record.boundary.img.shape[1]), record.boundary.img.dtype)
        return none, none[:, 0]
    stack: Transcoder = sites.stack
    alpha, beta = jax.vmap(lambda slot: site(stack, slot).scale_shift(record.t))(sites.layers.slot)
    layer = _group_layer(record, targets, group)
    slot = sites.layers.slot[layer]
    assert stack.enc.bias is not None
    # Widened where `film` and the encoder widen them, so that bfloat16 transcoders read as they encode.
    vectors, factor = widen(stack.enc.kernel[slot, :, targets.feature]), widen(1 + alpha[layer])
    constant = widen(stack.enc.bias[slot, targets.feature]) + jnp.sum(vectors * widen(beta[layer]), axis=1)
    return vectors * factor, constant


def _streamed_rows(
    sites: ReplacedSites, record: Record, targets: Targets, group: int
) -> tuple[Float[Array, "target d_model"], Float[Array, "target"]]:
    """Returns what `_encoder_rows` does, zeros for targets of other groups; what is needed is read on the host."""
    refuse_compilation()
    dtype = record.boundary.img.dtype
    vectors = np.zeros((targets.layer.shape[0], record.boundary.img.shape[1]), dtype)
    constants = np.zeros(vectors.shape[0], dtype)
    targets = Targets(*map(np.asarray, targets))
    mine = np.flatnonzero(targets.group == group)
    if mine.size:
        layer = np.clip(targets.layer[mine] - record.first_layers[group], 0, record.mlp_in[group].shape[0] - 1)
        slot, feature = np.asarray(sites.layers.slot)[layer], targets.feature[mine]
        vectors[mine], constants[mine] = encoder_terms(sites, slot, feature, record.t)
    return jax.device_put((vectors, constants))
