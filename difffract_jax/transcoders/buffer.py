"""The shuffle buffer: rows of many prompts and steps on the device, served in random order and replaced by parts.

1. `fill_store` writes chunks until the group of sites with the most rows per prompt is full. Groups with fewer rows,
   such as the text stream, hold what came until then, and go on filling.
2. A round serves `round_rows` rows of every group in a random order, batch by batch, none of them twice before all have
   been served once.
3. `refresh` then overwrites the rows that were served with those of new chunks, until a group has replaced all it
   served; the others stay. So a batch mixes rows of old and new prompts, and no row waits for the whole buffer. A group
   that gets fewer new rows than it served keeps some of those, and serves them again.

Which row goes where is arithmetic on the host, from the seed, the number of the round and how full each group is: a
`Position`, which is all that a resumed run needs besides the rows.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from difffract_jax.config import UserError
from difffract_jax.seeds import random_generator
from difffract_jax.transcoders.harvest import RowSource
from difffract_jax.transcoders.objective import ActivationRows, Width, widths
from difffract_jax.transcoders.sites import KNOWN_GROUPS, SiteSet

Store = dict[str, ActivationRows]
"""By group of sites: x [site capacity d_model], y [site capacity d_model_out], t [capacity]."""


def groups_of(store: Store) -> tuple[str, ...]:
    """Returns a buffer's groups in the order of the stack; a dictionary that went through JAX has lost it."""
    return tuple(group.name for group in KNOWN_GROUPS if group.name in store)


class Position(NamedTuple):
    """How far the data have come.

    Attributes:
        chunk: chunks taken from the source.
        round: number of the round that is being served.
        served: batches of it that have been.
        counts: rows that every group holds, in the order of its sites' groups.
    """

    chunk: int
    round: int
    served: int
    counts: tuple[int, ...]


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


def abstract_store(sites: SiteSet, width: Width, capacity: int, dtype: Any, mesh: Mesh) -> Store:
    """Returns shape, type and place of a buffer's arrays: capacity over `data`, sites over `site`, where even."""

    def describe(shape: tuple[int, ...], kind: Any, axes: tuple[str, ...]) -> Any:
        even = (a if n % mesh.shape[a] == 0 else None for n, a in zip(shape, axes, strict=False))
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, PartitionSpec(*even)))

    store = {}
    for name, layers in sites.groups.items():
        x, y = (describe((len(layers), capacity, each), dtype, ("site", "data")) for each in widths(width))
        store[name] = ActivationRows(x, y, describe((capacity,), jnp.float32, ("data",)))
    return store


def empty_store(sites: SiteSet, width: Width, capacity: int, dtype: Any, mesh: Mesh) -> Store:
    """Makes a buffer without rows."""
    abstract = abstract_store(sites, width, capacity, dtype, mesh)
    return jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), abstract)


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


def refresh(store: Store, source: RowSource, plan: BufferSizes, position: Position) -> tuple[Store, Position]:
    """Ends a round: overwrites rows that it served with new ones, and begins the next."""
    orders = serving_orders(groups_of(store), plan, position)
    slots = {name: order[np.sort(np.unique(order, return_index=True)[1])] for name, order in orders.items()}
    while all(left.size for left in slots.values()):
        store, position, slots = write_chunk(store, source, plan, position, slots)
    return store, position._replace(round=position.round + 1, served=0)


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
        written[name] = _write(store[name], chunk.rows[name], places)
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
    """Returns the places that a round serves, in order: a permutation, and further ones where that is too short."""
    return _orders(groups, plan, position.round, position.counts)


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


@jax.jit
def gather(store: Store, places: dict[str, Int[Array | np.ndarray, "batch"]]) -> ActivationRows:
    """Returns a batch of every site, [site batch ...], in float32, from the given places of each group."""
    parts = []
    for name in groups_of(store):
        rows, at = store[name], places[name]
        t = jnp.broadcast_to(rows.t[at], (rows.x.shape[0], at.shape[0]))
        parts.append(ActivationRows(rows.x[:, at].astype(jnp.float32), rows.y[:, at].astype(jnp.float32), t))
    return ActivationRows(*(jnp.concatenate(part) for part in zip(*parts, strict=True)))
