"""Whether a graph says what the model does: features taken off in the real model, one at a time.

This is docs/method.md, section 7:

1. Take a feature off: its decoder vector, times its value, is subtracted from the MLP output at its position.
2. Run the recorded blocks live, attention, norms and MLPs included, from the recorded residual streams.
3. Read features' pre-activations. How far they moved is what a graph's influence is compared with.

`ablate` does so in one step; `perturb` over all steps of a span, and reads outputs too. What a graph says of it is in
`predictions`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.circuits.attribution.engine import Engine
from difffract_jax.circuits.checks.variants import (
    AT_ONCE,
    SourceLocations,
    entering,
    locations_at,
    map_variants,
    pad_rows,
    read_variants,
    recorded_latents,
)
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Replacement, Sources
from difffract_jax.circuits.frozen.targets import Targets, inputs_at, reading_terms
from difffract_jax.circuits.trace.record import RunOutputs
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.models.stacks import keep_mlp_in, per_group, run_stacks
from difffract_jax.models.streaming import jit_resident, streams_layers


def ablate(replacement: Replacement, features: Targets, readouts: Targets) -> Float64[np.ndarray, "ablated target"]:
    """Returns pre-activations with each feature taken off, alone, in the real model.

    Args:
        replacement: from `prepare_step`.
        features: what to take off; one run each.
        readouts: whose pre-activations to read.
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(_ablate(replacement, features, readouts), np.float64)


@jit_resident
def _ablate(replacement: Replacement, features: Targets, readouts: Targets) -> Float[Array, "ablated target"]:
    values, read = _values(replacement, features), _reader(replacement, readouts)

    def run(one: tuple[Targets, Array]) -> Float[Array, "target"]:
        return read(live_reading(replacement, _taken_off(replacement, *one)))

    return map_variants(run, (features, values), AT_ONCE, streamed=streams_layers(replacement))


def _reader(replacement: Replacement, readouts: Targets) -> Callable[[RunOutputs], Float[Array, "target"]]:
    """Returns what reads the pre-activations of some features of a run."""
    gradients, constant = reading_terms(replacement.record, replacement.sites, readouts)

    def read(run: RunOutputs) -> Float[Array, "target"]:
        return jnp.sum(gradients * inputs_at(replacement.record, readouts, run.mlp_in), axis=1) + constant

    return read


def _taken_off(replacement: Replacement, feature: Targets, value: Array) -> tuple[Float[Array, "_ _ d_model"], ...]:
    """Returns what the MLPs' outputs lose with a feature of this value, per group."""
    record = replacement.record
    return tuple(
        -value * _vector_at(site, feature, group, record.first_layers[group], like)
        for group, (site, like) in enumerate(zip(replacement.sites, record.mlp_out, strict=True))
    )


def perturb(
    engine: Engine, features: Int64[np.ndarray, "ablated"], readouts: Int64[np.ndarray, "target"]
) -> Float64[np.ndarray, "ablated target"]:
    """Returns by how much each feature, taken off alone, moves the readouts in the real model, over all steps.

    Args:
        engine: of the run, one step or several.
        features: rows of its table, feature sources at their positions and steps.
        readouts: rows of its table, features (their pre-activation u) or outputs.
    """
    # The model unperturbed runs in the same program, so that what both round alike cancels.
    rows = pad_rows(np.append(features, -1), AT_ONCE)

    def run_step(number: int, targets: Targets, latents: Array) -> tuple[Array, Array | None]:
        with jax.default_matmul_precision("highest"):
            places = locations_at(engine, rows, number)
            return _perturb(engine.steps[number], places, targets, latents, across=engine.across)

    found = read_variants(engine, readouts, recorded_latents(engine, rows.size), run_step)
    return found[: features.size] - found[features.size]


@partial(jit_resident, static_argnames="across")
def _perturb(
    replacement: Replacement, places: SourceLocations, readouts: Targets, latents: Array, *, across: bool
) -> tuple[Array, Array | None]:
    features = Targets(places.group, places.layer, places.position, places.feature)
    values = jnp.where(places.kind == FEATURE, _values(replacement, features), 0)
    read = _reader(replacement, readouts)

    def run(one: tuple[Targets, Array, Array]) -> tuple[Array, Array | None]:
        feature, value, z = one
        there = entering(replacement, z, across=across)
        found = live_reading(there, _taken_off(replacement, feature, value))
        return read(found), found.velocity

    return map_variants(run, (features, values, latents), AT_ONCE, streamed=streams_layers(replacement))


def _values(replacement: Replacement, features: Targets) -> Float[Array, "ablated"]:
    """Returns the features' recorded values, 0 where they are inactive, whatever the activation."""
    record, sites, sources = replacement
    return _values_of(tuple(site.layers.index for site in sites), sources, features, record.first_layers)


@partial(jax.jit, static_argnames="firsts")
def _values_of(
    indices: tuple[Array, ...], sources: Sources, features: Targets, firsts: tuple[int, ...]
) -> Float[Array, "ablated"]:
    total = jnp.zeros(features.layer.shape, sources.boundary.img.dtype)
    for group, (index, values) in enumerate(zip(indices, sources.values, strict=True)):
        if not values.size:
            continue
        at = features.layer - firsts[group], features.position
        matches = index.at[at].get(mode="clip") == features.feature[:, None]
        value = jnp.sum(jnp.where(matches, values.at[at].get(mode="clip"), 0), axis=1)
        total = jnp.where(features.group == group, value, total)
    return total


def _vector_at(
    sites: ReplacedSites, feature: Targets, group: int, first: int, like: Float[Array, "layer rows d_model"]
) -> Float[Array, "layer rows d_model"]:
    """Returns zeros but for the feature's decoder vector at its place, if it is of this group."""
    if sites.stack is None or not like.size:
        return jnp.zeros_like(like)
    layer = feature.layer - first
    slot, at = sites.layers.slot.at[layer].get(mode="clip"), (layer, feature.position)
    row = feature.feature
    if sites.layers.row is not None:  # the stack holds the decoder rows of active features alone
        matches = sites.layers.index.at[at].get(mode="clip") == feature.feature
        row = sites.layers.row.at[at].get(mode="clip")[jnp.argmax(matches)]
    own = jnp.where(feature.group == group, sites.stack.dec.kernel[slot, row], 0)
    return jnp.zeros_like(like).at[layer, feature.position].set(own, mode="drop")


def live_reading(replacement: Replacement, change: Sequence[Float[Array, "_ _ d_model"]]) -> RunOutputs:
    """Runs the recorded blocks live with something added to the MLPs' outputs.

    Args:
        replacement: from `prepare_step`; its transcoders are not used.
        change: what to add, [layer rows d_model] per group.

    Returns:
        The MLP sublayers' inputs x, and the velocity if it is recorded.
    """
    record, final = replacement.record, replacement.record.weights.final
    h, kept = run_stacks(record.weights.live, record.boundary, record.cond, write=_add, layers=change, tap=keep_mlp_in)
    return RunOutputs(per_group(kept), None if final is None else final(h.img, record.cond), record.latents)


def _add(_: None, added: Array, x: Array, true: Callable[[], Array]) -> tuple[Array, None]:
    del x
    return true() + added, None
