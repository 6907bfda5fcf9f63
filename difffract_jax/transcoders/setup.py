"""What a run is made of before it has read a row; `train` makes it, and `plan` describes it without making it.

1. `set_up` lays the settings over sites and a width: mesh, constants of the step, shape of a transcoder, sizes of the
   buffer; and refuses what does not fit together.
2. `first_state` makes the state from the moments of rows, in one compiled program whose results lie where the mesh
   wants them: no array that shall be split is ever whole on one device. `abstract_state`, `abstract_rows` and
   `buffer.abstract_store` say what shapes the arrays have and which devices hold them: what a checkpoint is restored
   into, and what a step can be compiled for where none of these devices is.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difffract_jax.config import UserError
from difffract_jax.seeds import random_key
from difffract_jax.sharding import AnyMesh, make_mesh, parse_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders.objective import ActivationRows, Width
from difffract_jax.transcoders.recipe import recipe_of, shape_of, sparsities
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.state import Init, Moments, TrainState, init_params, init_state, state_shardings
from difffract_jax.transcoders.step import Recipe, optimizer, rows_sharding
from difffract_jax.transcoders.transcoder import TranscoderConfig


class Setup(NamedTuple):
    """What a run never changes.

    Attributes:
        settings: of the run.
        sites: that have a transcoder.
        width: channels of a row; of x and y, where they differ.
        mesh: devices; or an `AbstractMesh`, to describe what each of so many would hold.
        recipe: constants of the step.
        plan: sizes of the buffer.
        shape: of each transcoder.
    """

    settings: TrainConfig
    sites: SiteSet
    width: Width
    mesh: Any
    recipe: Recipe
    plan: buffers.BufferSizes
    shape: TranscoderConfig

    @property
    def dtype(self) -> Any:
        """Type of the rows in the buffer."""
        return jnp.bfloat16 if self.settings.model_dtype == "bf16" else jnp.float32


def set_up(settings: TrainConfig, sites: SiteSet, width: Width, mesh: AnyMesh) -> Setup:
    """Lays settings over sites of a width; a mesh without devices will do to describe what lies where.

    Raises:
        UserError: if the settings do not fit one another, the sites or the mesh.
    """
    shape = shape_of(settings, width)
    if settings.activation == "jumprelu" and settings.target_l0 > shape.features:
        raise UserError(
            f"target_l0 must be at most {shape.features}, the number of features, but is {settings.target_l0}."
        )
    words = {"data": "batch", "site": "the number of sites", "feature": "the number of features"}
    for axis, size in split_sizes(settings, sites, width).items():
        if size % mesh.shape[axis]:
            raise UserError(
                f"The mesh has {axis}={mesh.shape[axis]}, but {words[axis]}, {size}, is not divisible by it; "
                "change one of them."
            )
    if jax.process_count() > 1:
        _check_processes(settings, mesh)
    if settings.parallel == "pmap" and mesh.size != mesh.shape["data"]:
        raise UserError("parallel: pmap spreads rows alone; use a mesh with a data axis only, or parallel: jit.")
    plan = buffers.plan_buffer(settings.buffer_rows, settings.batch, settings.refresh, settings.seed)
    recipe = recipe_of(settings, shape, mesh, plan.round_batches)
    return Setup(settings, sites, width, mesh, recipe, plan, shape)


def _check_processes(settings: TrainConfig, mesh: AnyMesh) -> None:
    if mesh.size != jax.device_count():
        raise UserError(
            f"The mesh has {mesh.size} devices, but the {jax.process_count()} processes together have "
            f"{jax.device_count()}; a run of several processes must use all, so change the mesh."
        )
    if settings.max_minutes is not None:
        raise UserError("max_minutes is for one process, as clocks differ; stop a run of several with SIGTERM.")
    if settings.parallel == "pmap":
        raise UserError("parallel: pmap is for one process; use parallel: jit, which spreads a run over several.")
    if settings.buffer != "device":
        raise UserError(
            f"buffer: {settings.buffer} is for one process; use buffer: device, spread over the devices of all."
        )


def split_sizes(settings: TrainConfig, sites: SiteSet, width: Width) -> dict[str, int]:
    """Returns what each axis of the mesh splits, and must divide: rows of a batch, sites, features."""
    return {"data": settings.batch, "site": len(sites.names), "feature": shape_of(settings, width).features}


def open_mesh(settings: TrainConfig) -> Mesh:
    """Returns the devices that the settings ask for."""
    return make_mesh(parse_mesh(settings.mesh))


def first_state(setup: Setup, moments: Moments) -> TrainState:
    """Makes the state before the first step from the moments of rows, every array on its devices from birth."""
    return born(setup)(moments)


def born(setup: Setup) -> Any:
    """Returns the compiled function from the moments of the sites' rows to the first state, spread over the mesh."""
    places, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, abstract_state(setup)))
    return _born(_birth_of(setup), structure, tuple(places))


@lru_cache(maxsize=4)
def _born(birth: "_Birth", structure: Any, places: tuple[NamedSharding, ...]) -> Any:
    """Returns the same function for the same constants, so that JAX does not trace it again."""
    return jax.jit(partial(_state_of, birth), out_shardings=jax.tree.unflatten(structure, places))


class _Birth(NamedTuple):
    """What the first state depends on besides the moments of rows; all of it can be looked up by its value."""

    seed: int
    init: Init
    shape: TranscoderConfig
    recipe: Recipe
    sparsity: tuple[float, ...]
    shards: int


def _birth_of(setup: Setup) -> _Birth:
    settings, sparsity = setup.settings, sparsities(setup.settings, setup.sites)
    shards = setup.mesh.shape["site"]
    return _Birth(settings.seed, settings.init, setup.shape, setup.recipe, tuple(map(float, sparsity)), shards)


def _state_of(birth: _Birth, moments: Moments) -> TrainState:
    key, sparsity = random_key(birth.seed), jnp.asarray(birth.sparsity, jnp.float32)
    params = init_params(key, birth.shape, birth.init, moments, shards=birth.shards)
    return init_state(params, optimizer(birth.recipe), moments, sparsity)


@lru_cache(maxsize=4)
def _shapes(birth: _Birth, x64: bool) -> TrainState:
    """Returns the shapes of the state, which depend on `x64` too: whether JAX makes numbers of 64 bits."""
    del x64
    sites, float32 = len(birth.sparsity), jnp.float32
    widths = (sites, birth.shape.d_model), (sites, birth.shape.d_model_out), (sites,), (sites,)
    moments = Moments(*cast(Any, (jax.ShapeDtypeStruct(shape, float32) for shape in widths)))
    return jax.eval_shape(partial(_state_of, birth), moments)


def abstract_moments(setup: Setup) -> Moments:
    """Returns shape, type and place of the moments that a state is made from: whole on every device."""
    sites, everywhere = len(setup.sites.names), NamedSharding(setup.mesh, PartitionSpec())
    shapes = (sites, setup.shape.d_model), (sites, setup.shape.d_model_out), (sites,), (sites,)
    return Moments(*cast(Any, (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere) for shape in shapes)))


def abstract_state(setup: Setup) -> TrainState:
    """Returns shape, type and place of every array of the state, without making one."""
    state = _shapes(_birth_of(setup), bool(jax.config.jax_enable_x64))
    return jax.tree.map(_with_sharding, state, state_shardings(state, setup.mesh))


def abstract_rows(setup: Setup) -> ActivationRows:
    """Returns the same of what a step is given: a batch of every site, as `buffer.gather` makes it."""
    sites, batch = len(setup.sites.names), setup.settings.batch
    shapes = (sites, batch, setup.shape.d_model), (sites, batch, setup.shape.d_model_out), (sites, batch)
    kinds = setup.dtype, setup.dtype, jnp.float32
    rows = (jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(shapes, kinds, strict=True))
    return jax.tree.map(_with_sharding, ActivationRows(*cast(Any, rows)), rows_sharding(setup.mesh))


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
