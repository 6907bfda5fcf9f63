"""Training of the transformer by rectified flow (arXiv 2209.03003), on latents and text embeddings made beforehand.

1. A pool of scenes is drawn, encoded by the frozen autoencoder (posterior mean, shifted, scaled, packed) and by the
   frozen text encoders.
2. One step draws rows of the pool, noise e and times t, uniform in [0, 1] for most and one of schnell's four for the
   rest, and takes a gradient of mean |v(z_t, t) - (e - x)|^2 at z_t = (1 - t) x + t e. The velocity points from data to
   noise, as FLUX's does: one Euler step is z + (t_next - t) v.
3. Muon for the matrices of the blocks, Adam for the rest (biases, norms, the layers that read and write channels).
4. The learning rate is flat and then falls linearly to zero.
5. Samples are drawn from an exponential moving average of the weights.

At the start every modulation is the identity and the last projection zero, so that blocks are plain residual blocks
(`beginnings`).
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Key

from difffract_jax.generators import random_generator
from difffract_jax.models.families import module_of
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.mmdit import FluxConfig, Inputs, MMDiT
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.organism.beginnings import FIXED, begin_plain
from difffract_jax.organism.recipe import FlowRecipe
from difffract_jax.seeds import random_key
from difffract_jax.storage.checkpoint import leaf_paths

GRID = (6, 6)
"""Rows and columns of image tokens."""
SCHNELL_TIMES = (1.0, 0.75, 0.5, 0.25)


class FlowState(NamedTuple):
    """State of the training.

    Attributes:
        model: the transformer.
        average: moving average of its weights.
        optimizer: state of Muon and Adam.
        step: steps taken.
    """

    model: MMDiT
    average: MMDiT
    optimizer: optax.OptState
    step: Array


class EncodedScenes(NamedTuple):
    """Training data, a row per scene: packed latents, text embeddings, pooled embeddings."""

    latents: Float32[np.ndarray, "row img channels"]
    text: Float32[np.ndarray, "row txt text_width"]
    pooled: Float32[np.ndarray, "row pooled_width"]


def transformer_config(recipe: FlowRecipe) -> FluxConfig:
    """Returns the organism's transformer."""
    return FluxConfig(
        depth_double=recipe.depth_double,
        depth_single=recipe.depth_single,
        heads=recipe.heads,
        head_dim=32,
        rope_axes=(8, 12, 12),
        in_channels=32,
        out_channels=32,
        text_width=96,
        pooled_width=64,
        guidance=False,
    )


def sd3_config(recipe: FlowRecipe, text_width: int, pooled_width: int) -> Sd3Config:
    """Returns the transformer of the sibling of Stable Diffusion 3.

    Args:
        recipe: says how many blocks and heads.
        text_width: channels of the text embedding.
        pooled_width: channels of the pooled embedding.
    """
    return Sd3Config(
        depth_double=recipe.depth_double,
        heads=recipe.heads,
        head_dim=32,
        in_channels=32,
        out_channels=32,
        text_width=text_width,
        pooled_width=pooled_width,
        qk_norm=True,
        table=8,
    )


def flux2_config(recipe: FlowRecipe, text_width: int) -> Flux2Config:
    """Returns the transformer of the sibling of FLUX.2; arguments as for `sd3_config`."""
    return Flux2Config(
        depth_double=recipe.depth_double,
        depth_single=recipe.depth_single,
        heads=recipe.heads,
        head_dim=32,
        rope_axes=(8, 8, 8, 8),
        in_channels=32,
        out_channels=32,
        text_width=text_width,
    )


def learning_rate(recipe: FlowRecipe) -> optax.Schedule:
    """Returns the schedule: warm-up, flat, and linear to zero."""
    rate, flat = recipe.learning_rate, int(recipe.steps * recipe.flat_share)
    warm_up = min(recipe.warm_up, flat)
    rise, fall = optax.linear_schedule(0.0, rate, warm_up), optax.linear_schedule(rate, 0.0, recipe.steps - flat)
    return optax.join_schedules([rise, optax.constant_schedule(rate), fall], [warm_up, flat])


def _optimizer(recipe: FlowRecipe) -> optax.GradientTransformation:
    matrices = optax.contrib.MuonDimensionNumbers(1, 2)

    def dimensions(weights: dict[str, Any]) -> dict[str, Any]:
        return {name: matrices if _in_block(name) else None for name in weights}

    schedule = learning_rate(recipe)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule,
            # The annotation says any tree, but what comes is the weights' dict.
            muon_weight_dimension_numbers=cast(Any, dimensions),
            adam_b2=0.99,
            adam_learning_rate=lambda step: recipe.adam * schedule(step),
        ),
    )


def _in_block(name: str) -> bool:
    """Says whether a weight is a stack of matrices of blocks."""
    return name.startswith(("double.", "single.", "last.")) and name.endswith(".kernel")


def init(recipe: FlowRecipe, seed: int, shape: FluxConfig | None = None) -> FlowState:
    """Returns the state before the first step.

    Args:
        recipe: of the training.
        seed: of the weights.
        shape: of the transformer; the organism's if left out.
    """
    shape = transformer_config(recipe) if shape is None else shape
    model = module_of(shape)(shape, rngs=nnx.Rngs(random_key(seed)))
    begin_plain(model)
    average = jax.tree.map(jnp.copy, model)
    return FlowState(model, average, _optimizer(recipe).init(leaf_paths(model)), jnp.zeros((), jnp.int32))


def batch(recipe: FlowRecipe, seed: int, step: int, pool: EncodedScenes) -> EncodedScenes:
    """Returns the rows of one step."""
    rows = random_generator(seed, step, 2).integers(0, len(pool.latents), recipe.batch)
    return EncodedScenes(*(part[rows] for part in pool))


def train_step(
    recipe: FlowRecipe, state: FlowState, rows: EncodedScenes, key: Key[Array, ""]
) -> tuple[FlowState, dict[str, Array]]:
    """Takes one step; returns the new state and the loss."""
    keys = jax.random.split(key, 4)
    count = rows.latents.shape[0]
    uniform = jax.random.uniform(keys[0], (count,))
    fixed = jax.random.choice(keys[1], jnp.array(SCHNELL_TIMES), (count,))
    t = jnp.where(jax.random.uniform(keys[2], (count,)) < recipe.uniform_share, uniform, fixed)
    noise = jax.random.normal(keys[3], rows.latents.shape)
    noisy = (1 - t[:, None, None]) * rows.latents + t[:, None, None] * noise

    def loss(model: MMDiT) -> Array:
        velocity = jax.vmap(lambda *inputs: model(Inputs(*inputs), GRID))(noisy, rows.text, rows.pooled, t)
        return jnp.mean(jnp.square(velocity - (noise - rows.latents)))

    value, gradients = jax.value_and_grad(loss)(state.model)
    weights = leaf_paths(state.model)
    slopes = {name: jnp.zeros_like(leaf) if name in FIXED else leaf for name, leaf in leaf_paths(gradients).items()}
    updates, optimizer = _optimizer(recipe).update(slopes, state.optimizer, weights)
    new = cast(dict[str, Array], optax.apply_updates(weights, updates))  # the tree is that of `weights`
    model = jax.tree.unflatten(jax.tree.structure(state.model), [new[name] for name in weights])
    decay = jnp.minimum(recipe.average, (1 + state.step) / (10 + state.step))
    before, structure = leaf_paths(state.average), jax.tree.structure(state.average)
    # What is not trained would move by rounding.
    mixed = [a if name in FIXED else decay * a + (1 - decay) * new[name] for name, a in before.items()]
    average = jax.tree.unflatten(structure, mixed)
    return FlowState(model, average, optimizer, state.step + 1), {"loss": value}
