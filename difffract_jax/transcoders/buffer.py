"""The shuffle buffer: rows of many prompts and steps, served in random order and replaced by parts.

1. `fill_store` writes chunks until the group of sites with the most rows per prompt is full. Groups with fewer rows,
   such as the text stream, hold what came until then, and go on filling.
2. A round serves `round_rows` rows of every group in a random order, batch by batch, none of them twice before all have
   been served once.
3. `refresh` then overwrites the rows that were served with those of new chunks, until a group has replaced all it
   served; the others stay. So a batch mixes rows of old and new prompts, and no row waits for the whole buffer. A group
   that gets fewer new rows than it served keeps some of those, and serves them again.

Which row goes where is arithmetic on the host, from the seed, the number of the round and how full each group is: a
`Position`, which is all that a resumed run needs besides the rows. A refresh may begin while its round is served, see
`overlap`.

The rows lie on the devices: capacity over `data`, sites over `site`, channels over what is left, so that every device
has its share. Or they lie in this machine's memory or on disk, as NumPy's arrays (`host_buffer`).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from difffract_jax.config import UserError
from difffract_jax.generators import random_generator
from difffract_jax.sharding import MESH_AXES, AnyMesh
from difffract_jax.transcoders import host_buffer
from difffract_jax.transcoders.harvest import RowSource
from difffract_jax.transcoders.objective import ActivationRows, Width, widths
from difffract_jax.transcoders.sites import KNOWN_GROUPS, SiteSet

Store = dict[str, ActivationRows]
"""By group of sites: x [site capacity d_model], y [site capacity d_model_out], t [capacity]."""


def groups_of(store: Store) -> tuple[str, ...]:
    """Returns a buffer's groups in the order of the stack; a dictionary that went through JAX has lost it."""
    order = [group.name for group in KNOWN_GROUPS]
    # Groups of a model of one's own come behind, by name: what restores a store may have lost its order.
    return tuple(sorted(store, key=lambda name: (order.index(name) if name in order else len(order), name)))


class Position(NamedTuple):
    """How far the data have come.

    Attributes:
        chunk: chunks taken from the source.
        round: number of the round that is being served.
        served: batches of it that have been.
        counts: rows that every group holds, in the order of its sites' groups.
        before: the same when the refresh that is under way began; empty between refreshes.
        left: rows of every group that it has yet to replace.
    """

    chunk: int
    round: int
    served: int
    counts: tuple[int, ...]
    before: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


class BufferSizes(NamedTuple):
    """Sizes of the buffer.

    Attributes:
        capacity: rows of a site that it holds.
        batch: rows of a site that a step takes.
        round_batches: batches served between two refreshes.
        seed: of the orders.
    """

    capacity: int
    batch: int
    round_batches: int
    seed: int


def plan_buffer(capacity: int, batch: int, refresh: float, seed: int) -> BufferSizes:
    """Returns sizes of a buffer that is refreshed by a share of its rows.

    Raises:
        UserError: if a batch is larger than the buffer.
    """
    if capacity < batch:
        raise UserError(f"buffer_rows must be at least batch, {batch}, but is {capacity}; enlarge the buffer.")
    return BufferSizes(capacity, batch, max(1, round(capacity * refresh / batch)), seed)


def abstract_store(sites: SiteSet, width: Width, capacity: int, dtype: Any, mesh: AnyMesh) -> Store:
    """Returns shape, type and place of a buffer's arrays, spread over all devices of a mesh as far as they divide."""

    def describe(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spread(shape, mesh)))

    store = {}
    for name, layers in sites.groups.items():
        x, y = (describe(len(layers), capacity, each) for each in widths(width))
        t: Any = NamedSharding(mesh, PartitionSpec("data" if capacity % mesh.shape["data"] == 0 else None))
        store[name] = ActivationRows(x, y, cast(Any, jax.ShapeDtypeStruct((capacity,), jnp.float32, sharding=t)))
    return store


def spread(shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Returns how rows [site row channel] lie on a mesh: sites and rows where they divide, channels over the rest."""
    axes = [axis if size % mesh.shape[axis] == 0 else None for size, axis in zip(shape, ("site", "data"), strict=False)]
    left = [axis for axis in MESH_AXES if axis not in axes and mesh.shape[axis] > 1]
    while left and shape[2] % prod(mesh.shape[axis] for axis in left):
        left.pop(0)
    return PartitionSpec(*axes, tuple(left) or None)


def empty_store(sites: SiteSet, width: Width, capacity: int, dtype: Any, mesh: Mesh) -> Store:
    """Makes a buffer without rows, every part where it belongs."""
    abstract = abstract_store(sites, width, capacity, dtype, mesh)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract), out_shardings=places)()


def fill_store(store: Store, source: RowSource, plan: BufferSizes) -> tuple[Store, Position]:
    """Writes the first chunks into an empty buffer.

    Raises:
        UserError: if some group would not even hold one batch.
    """
    position = Position(0, 0, 0, (0,) * len(store))
    nothing = {name: np.zeros(0, np.int32) for name in store}
    while max(position.counts) < plan.capacity:
        store, position, _ = write_chunk(store, source, plan, position, nothing)
    for name, count in zip(groups_of(store), position.counts, strict=True):
        if count < plan.batch:
            raise UserError(
                f"The {name} sites have {count} rows when the buffer is full, fewer than one batch of {plan.batch}; "
                "enlarge buffer_rows, or lower batch or tokens_per_step."
            )
    return store, position


def refresh(
    store: Store,
    source: RowSource,
    plan: BufferSizes,
    position: Position,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Store, Position]:
    """Ends a round: overwrites rows that it served with new ones, and begins the next.

    Args:
        store: the buffer; its arrays are reused.
        source: where rows come from.
        plan: sizes.
        position: at the end of a round, or within a refresh that was stopped.
        stop: asked before every chunk whether to leave off; the position then says how to go on.
    """
    if not position.before:
        position = position._replace(before=position.counts)
    orders = serving_orders(groups_of(store), plan, position)
    slots = {name: order[np.sort(np.unique(order, return_index=True)[1])] for name, order in orders.items()}
    if position.left:
        slots = {
            name: slots[name][slots[name].size - n :] for name, n in zip(groups_of(store), position.left, strict=True)
        }
    while all(left.size for left in slots.values()):
        if stop():
            return store, position._replace(left=tuple(slots[name].size for name in groups_of(store)))
        store, position, slots = write_chunk(store, source, plan, position, slots)
    return store, position._replace(round=position.round + 1, served=0, before=(), left=())


def write_chunk(
    store: Store, source: RowSource, plan: BufferSizes, position: Position, slots: dict[str, Int[np.ndarray, "_"]]
) -> tuple[Store, Position, dict[str, Int[np.ndarray, "_"]]]:
    """Writes the source's next chunk; rows for which there is no place are dropped.

    Args:
        store: the buffer; its arrays are reused.
        source: where rows come from.
        plan: sizes.
        position: how far the data have come.
        slots: by group, places that may be overwritten once the group is full.

    Returns:
        The buffer, the new position, and the places that are left.
    """
    chunk = source.chunk(position.chunk)
    counts, written, left = [], {}, {}
    for name, count in zip(groups_of(store), position.counts, strict=True):
        valid = np.flatnonzero(chunk.valid[name])
        free = np.concatenate([np.arange(count, plan.capacity, dtype=np.int32), slots[name]])[: valid.size]
        places = np.full(chunk.valid[name].size, plan.capacity, np.int32)
        places[valid[: free.size]] = free
        write = host_buffer.write if isinstance(store[name].x, np.ndarray) else _write
        written[name] = write(store[name], chunk.rows[name], places)
        grown = min(plan.capacity - count, free.size)
        counts.append(count + grown)
        left[name] = slots[name][free.size - grown :]
    return written, position._replace(chunk=position.chunk + 1, counts=tuple(counts)), left


@partial(jax.jit, donate_argnums=0)
def _write(old: ActivationRows, new: ActivationRows, places: Int[Array | np.ndarray, "rows"]) -> ActivationRows:
    """Writes rows to their places; those past the end are dropped."""

    def put(a: Array, b: Array) -> Array:
        return a.at[:, places].set(b.astype(a.dtype), mode="drop")

    return ActivationRows(put(old.x, new.x), put(old.y, new.y), old.t.at[places].set(new.t, mode="drop"))


def serving_orders(
    groups: tuple[str, ...], plan: BufferSizes, position: Position
) -> dict[str, Int[np.ndarray, "rows"]]:
    """Returns the places that a round serves, in order: a permutation, and further ones where that is too short.

    How many rows a group holds counts as it was when the refresh began that may be under way.
    """
    return _orders(groups, plan, position.round, position.before or position.counts)


@lru_cache(maxsize=2)
def _orders(
    groups: tuple[str, ...], plan: BufferSizes, number: int, counts: tuple[int, ...]
) -> dict[str, Int[np.ndarray, "rows"]]:
    amount = plan.batch * plan.round_batches
    orders = {}
    for place, (name, count) in enumerate(zip(groups, counts, strict=True)):
        rng = random_generator(plan.seed, number, place)
        turns = [rng.permutation(count) for _ in range(-(-amount // count))]
        orders[name] = np.concatenate(turns)[:amount].astype(np.int32)
    return orders


def gather(store: Store, places: dict[str, Int[Array | np.ndarray, "batch"]], shardings: Any = None) -> ActivationRows:
    """Returns a batch of every site, [site batch ...], from the given places of each group, in the buffer's types.

    Args:
        store: the buffer.
        places: of each group.
        shardings: where the batch goes; left to the compiler, or the default device, if left out.
    """
    names = groups_of(store)
    if isinstance(store[names[0]].x, np.ndarray):
        rows = host_buffer.gather([(store[name], np.asarray(places[name])) for name in names])
        return jax.device_put(rows, shardings)
    return _gathering(shardings)(store, places)


@lru_cache(maxsize=2)
def _gathering(shardings: Any) -> Any:
    return jax.jit(_gather) if shardings is None else jax.jit(_gather, out_shardings=shardings)


def _gather(store: Store, places: dict[str, Int[Array, "batch"]]) -> ActivationRows:
    parts = []
    for name in groups_of(store):
        rows, at = store[name], places[name]
        t = jnp.broadcast_to(rows.t[at], (rows.x.shape[0], at.shape[0]))
        parts.append(ActivationRows(rows.x[:, at], rows.y[:, at], t))
    return ActivationRows(*(jnp.concatenate(part) for part in zip(*parts, strict=True)))
