"""One training step of all sites at once: `state, metrics = train_step(state, rows, ...)`.

1. Scale the rows of every site, and take loss and gradient of each (`objective`), all sites together or one after
   another (`site_loop`).
2. Take away the part of a decoder vector's gradient along the vector, which normalising would undo anyway; without it
   Adam's moments hold a direction in which nothing may move. The reference does not do so.
3. Clip each site's gradient to a norm, if asked; AdamW; decoder vectors back to unit norm; thresholds back to >= 0.
4. Count the rows since each feature was last active.

`jit_step` compiles it for a mesh: rows over `data`, sites over `site`, features over `feature`, and XLA adds the
communication. `pmap_step` runs one copy per device on its part of the rows, and averages the gradients: the same
numbers, for programs that are built on `jax.pmap`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.sharding import AnyMesh
from difffract_jax.transcoders.objective import ActivationRows, Objective, site_loss
from difffract_jax.transcoders.site_loop import update_sites
from difffract_jax.transcoders.state import TrainState, state_shardings, unit_rows

CUTOFF_MEMORY = 0.99
"""Weight of the past in the running mean of `batchtopk`'s cut-off: about 100 steps."""
MOST_SILENT = 2**30
Schedule = Literal["constant", "linear", "cosine_cycles"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How training steps are taken: constants of one compilation.

    Attributes:
        objective: constants of the loss.
        lr: learning rate, after warming up.
        b1: decay of Adam's first moment.
        b2: decay of its second moment.
        eps: added to the root of the second moment.
        weight_decay: AdamW's.
        schedule: `constant`; `linear`, falling to 0 over the last `decay` of the steps; `cosine_cycles`, the
            reference's: a half cosine to 0 that moves on every `cycle` steps.
        warmup: steps over which the rate rises from 0.
        decay: share of the steps, see `schedule`.
        cycle: steps, see `schedule`.
        steps: steps of the whole training.
        sparsity_warmup: steps over which the penalty for active features rises from 0.
        clip: largest norm of a site's gradient; 0 for any.
        project_decoder: remove the gradient along decoder vectors.
        in_turn: take one site of a device after another, so that what lies in between exists once; sparse codes are
            taken so in any case, as their loops are of different lengths.
    """

    objective: Objective = field(default_factory=Objective)
    lr: float = 2e-4
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup: int = 0
    decay: float = 0.2
    cycle: int = 1
    steps: int = 1
    sparsity_warmup: int = 0
    clip: float = 0.0
    project_decoder: bool = False
    in_turn: bool = False


class Metrics(NamedTuple):
    """What a step tells, before its update; arrays with a site axis.

    Attributes:
        loss: what is minimised.
        fvu: fraction of variance unexplained in this batch.
        l1: sum of a row's code.
        l0: active features per row.
        dead: share of features that were silent for `dead_after` rows.
        grad_norm: norm of the gradient before clipping.
    """

    loss: Float[Array, "site"]
    fvu: Float[Array, "site"]
    l1: Float[Array, "site"]
    l0: Float[Array, "site"]
    dead: Float[Array, "site"]
    grad_norm: Float[Array, "site"]


class Moment(NamedTuple):
    """What all sites have in common at a step.

    Attributes:
        revive: whether any feature of any site is dead.
        pressure: factor of the penalty for active features.
        memory: weight of the past in `cutoff`'s mean.
        seen: rows of the whole batch.
    """

    revive: Bool[Array, ""]
    pressure: Float[Array, ""]
    memory: Float[Array, ""]
    seen: Int[Array, ""]


def rate(recipe: Recipe) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the steps done."""

    def at(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        factor = jnp.minimum(1.0, (step + 1) / recipe.warmup) if recipe.warmup else jnp.ones(())
        if recipe.schedule == "linear":
            factor = factor * jnp.clip((recipe.steps - step) / max(1.0, recipe.decay * recipe.steps), 0, 1)
        elif recipe.schedule == "cosine_cycles":
            cycles = -(-recipe.steps // recipe.cycle)
            factor = factor * (1 + jnp.cos(jnp.pi * (step // recipe.cycle) / cycles)) / 2
        return recipe.lr * factor

    return at


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Returns AdamW with the recipe's schedule, for one site."""
    clip = [optax.clip_by_global_norm(recipe.clip)] if recipe.clip else []
    adam = optax.adamw(rate(recipe), recipe.b1, recipe.b2, recipe.eps, weight_decay=recipe.weight_decay)
    return optax.chain(*clip, adam)


def train_step(
    state: TrainState,
    rows: ActivationRows,
    recipe: Recipe,
    *,
    axis: str | None = None,
    shards: int = 1,
    in_place: bool = False,
) -> tuple[TrainState, Metrics]:
    """Takes one step.

    Args:
        state: before it; its arrays may be donated.
        rows: a batch of every site, unscaled, or this device's part of it.
        recipe: constants.
        axis: mapped axis of the devices that hold the other rows; None if these are all.
        shards: parts into which the mesh splits the sites.
        in_place: whether sites that take turns change the donated state where it is, see `site_loop`.

    Returns:
        The state after the step, and what the step saw.
    """
    dead = state.silent > recipe.objective.dead_after
    pressure = jnp.minimum(1.0, (state.step + 1) / max(1, recipe.sparsity_warmup))
    seen = rows.t.shape[1] * (1 if axis is None else jax.lax.axis_size(axis))
    memory = jnp.where(state.step == 0, 0, CUTOFF_MEMORY)
    moment = Moment(jnp.any(dead), pressure, memory, jnp.asarray(seen, jnp.int32))
    site = partial(_site_step, recipe=recipe, moment=moment, axis=axis)
    in_turn = recipe.in_turn or recipe.objective.sparse
    every, metrics = update_sites(
        site, state._replace(step=()), rows, shards=shards, in_turn=in_turn, in_place=in_place
    )
    return every._replace(step=state.step + 1), metrics._replace(dead=jnp.mean(dead, axis=1))


def _site_step(
    state: TrainState, rows: ActivationRows, *, recipe: Recipe, moment: Moment, axis: str | None
) -> tuple[TrainState, Metrics]:
    """Returns one site's state after a step, and what the step saw."""
    x, y, t = (a.astype(jnp.float32) for a in rows)
    scaled = ActivationRows(x / state.x_scale, y / state.y_scale, t)
    loss = partial(site_loss, objective=recipe.objective, axis=axis)
    given = state.params, scaled, state.silent, state.sparsity, moment.revive, moment.pressure
    grads, report = jax.grad(loss, has_aux=True)(*given)
    if axis is not None:
        grads = jax.lax.pmean(grads, axis)
    if recipe.project_decoder:
        grads.dec.kernel[...] = across(grads.dec.kernel[...], state.params.dec.kernel[...])
    updates, opt_state = optimizer(recipe).update(cast(Any, grads), state.opt_state, cast(Any, state.params))
    params: Any = optax.apply_updates(cast(Any, state.params), updates)
    params.dec.kernel[...] = unit_rows(params.dec.kernel[...])
    if params.config.activation == "jumprelu":
        params.threshold[...] = jnp.maximum(params.threshold[...], 0)
    after = state._replace(
        params=params,
        opt_state=opt_state,
        silent=jnp.where(report.fired, 0, jnp.minimum(state.silent + moment.seen, MOST_SILENT)),
        cutoff=moment.memory * state.cutoff + (1 - moment.memory) * report.cutoff,
    )
    dead = jnp.zeros(())  # counted for all sites at once
    return after, Metrics(report.loss, report.fvu, report.l1, report.l0, dead, optax.tree.norm(grads))


def across(
    gradient: Float[Array, "feat d_model"], vectors: Float[Array, "feat d_model"]
) -> Float[Array, "feat d_model"]:
    """Returns the part of each gradient that is orthogonal to its unit vector."""
    return gradient - jnp.sum(gradient * vectors, axis=-1, keepdims=True) * vectors


def rows_sharding(mesh: AnyMesh) -> ActivationRows:
    """Returns where batches live: sites over `site`, rows over `data`."""
    matrix: Any = NamedSharding(mesh, PartitionSpec("site", "data"))
    return ActivationRows(matrix, matrix, matrix)


def jit_step(
    recipe: Recipe, mesh: Mesh, state: TrainState
) -> Callable[[TrainState, ActivationRows], tuple[TrainState, Metrics]]:
    """Returns the step compiled for a mesh; the state is donated.

    Args:
        recipe: constants; codes are multiplied densely where the mesh has several devices.
        mesh: where state and rows live; the number of sites must be divisible by its `site` axis, rows by `data`.
        state: the state, or its shapes.
    """
    in_place = mesh.devices.flat[0].platform != "cpu"
    recipe = replace(recipe, objective=replace(recipe.objective, branch=not in_place))
    if mesh.size > 1:
        recipe = replace(recipe, objective=replace(recipe.objective, sparse=False, mesh=mesh))
    places, structure = jax.tree.flatten(state_shardings(state, mesh))
    return _jit_step(recipe, mesh, in_place, structure, tuple(places))


@lru_cache(maxsize=4)
def _jit_step(recipe: Recipe, mesh: Mesh, in_place: bool, structure: Any, places: tuple[NamedSharding, ...]) -> Any:
    """Returns the same function for the same constants, so that JAX does not trace it again."""
    placed = jax.tree.unflatten(structure, places)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partial(train_step, recipe=recipe, shards=mesh.shape["site"], in_place=in_place),
        in_shardings=(placed, rows_sharding(mesh)),
        out_shardings=(placed, whole),
        donate_argnums=0,
    )


def pmap_step(
    recipe: Recipe, devices: Any = None
) -> Callable[[TrainState, ActivationRows], tuple[TrainState, Metrics]]:
    """Returns the step for `jax.pmap`: state with a leading device axis, rows [device site rows ...]; state donated.

    Args:
        recipe: constants.
        devices: devices to use; all of this process if left out.
    """
    step = partial(train_step, recipe=recipe, axis="data")
    return jax.pmap(step, axis_name="data", devices=devices, donate_argnums=0)


def split_rows(rows: ActivationRows, devices: int) -> ActivationRows:
    """Returns rows [site rows ...] as [device site rows ...]."""

    def cut(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(a.shape[0], devices, -1, *a.shape[2:]), 1, 0)

    return ActivationRows(*map(cut, rows))


def repeat_state(state: TrainState, devices: int) -> TrainState:
    """Returns one copy of a state per device, on a leading axis."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (devices, *a.shape)), state)
