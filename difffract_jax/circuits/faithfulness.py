"""Whether a graph says what the model does: features taken off in the real model, one at a time (METHOD section 7).

1. Take a feature off: its decoder vector, times its value, is subtracted from the MLP output at its position.
2. Run the recorded blocks live, attention, norms and MLPs included, from the recorded residual streams.
3. Read features' pre-activations. How far they moved is what a graph's influence is compared with.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from difffract_jax.circuits.pullback import Targets, preactivations_at
from difffract_jax.circuits.replacement import Replacement, Sources
from difffract_jax.models.blocks import DoubleBlock, Streams, both, run_mlps
from difffract_jax.models.mmdit import run_double

ABLATIONS_AT_ONCE = 8


def ablate(replacement: Replacement, features: Targets, readouts: Targets) -> Float64[np.ndarray, "ablated target"]:
    """Returns pre-activations with each feature taken off, alone, in the real model.

    Args:
        replacement: from `prepare`.
        features: what to take off; one run each.
        readouts: whose pre-activations to read.
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(_ablate(replacement, features, readouts), np.float64)


@jax.jit
def _ablate(replacement: Replacement, features: Targets, readouts: Targets) -> Float[Array, "ablated target"]:
    record, sites, sources = replacement
    values = _values(sites, sources, features)

    def run(one: tuple[Targets, Array]) -> Float[Array, "target"]:
        feature, value = one
        changes = [
            _vector_at(stack, slots, feature, index, like) * -value
            for index, (stack, slots, like) in enumerate(
                zip(both(lambda s: s.stack, sites), both(lambda s: s.layers.slot, sites), record.mlp_out, strict=True)
            )
        ]
        return preactivations_at(record, sites, readouts, live_inputs(replacement, Streams(*changes)))

    return jax.lax.map(run, (features, values), batch_size=ABLATIONS_AT_ONCE)


def _values(sites: Streams, sources: Sources, features: Targets) -> Float[Array, "ablated"]:
    """Returns the features' recorded values, 0 where they are inactive, whatever the activation."""
    found = []
    for layers, values in zip(both(lambda s: s.layers, sites), sources.values, strict=True):
        at = features.layer, features.position
        here = layers.index.at[at].get(mode="clip") == features.feature[:, None]
        found.append(jnp.sum(jnp.where(here, values.at[at].get(mode="clip"), 0), axis=1))
    return jnp.where(features.stream == 0, found[0], found[1])


def _vector_at(stack, slots, feature: Targets, stream: int, like: Array) -> Float[Array, "layer rows d_model"]:
    """Returns zeros but for the feature's decoder vector at its place, if it is of this stream."""
    if stack is None:
        return jnp.zeros_like(like)
    vector = stack.dec.kernel[slots[feature.layer], feature.feature]
    mine = jnp.where(feature.stream == stream, vector, 0)
    return jnp.zeros_like(like).at[feature.layer, feature.position].set(mine, mode="drop")


def live_inputs(replacement: Replacement, change: Streams) -> Streams:
    """Runs the recorded blocks live with something added to the MLPs' outputs.

    Args:
        replacement: from `prepare`; its transcoders are not used.
        change: what to add.

    Returns:
        The MLP sublayers' inputs x.
    """

    def mlp(added: Streams, block: DoubleBlock, x: Streams) -> Streams:
        return both(jnp.add, run_mlps(block, x), added)

    record = replacement.record
    run = partial(run_double, tap=lambda acts: acts.mlp_in, mlp=mlp, per_layer=change)
    return run(record.blocks, record.boundary, record.cond)[1]
