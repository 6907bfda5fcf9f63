"""Where a run's buffer lies, and how its batches get to the step: on the devices, in this machine's memory, or on disk.

1. `empty_buffer`, `abstract_buffer` and `restored_buffer` make it, describe it for a checkpoint's reader, and take what
   that has read. A checkpoint holds the same arrays in all three cases, so that a run may go on with another.
2. `serving` hands out the function from a buffer and a position to the next batch, where the step wants it. From the
   host it has the next batch of the round on its way while a step runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import host_buffer
from difffract_jax.transcoders.buffer import Position, Store
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.run_place import home_of
from difffract_jax.transcoders.setup import Setup
from difffract_jax.transcoders.step import rows_sharding


def empty_buffer(setup: Setup) -> Store:
    """Makes the run's buffer, without rows."""
    sizes = setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh
    if setup.settings.buffer == "device":
        return buffers.empty_store(*sizes)
    return host_buffer.empty(buffers.abstract_store(*sizes), _directory(setup))


def abstract_buffer(setup: Setup) -> Store:
    """Returns shape, type and place of its arrays; of those on the host, NumPy's arrays that take no memory."""
    abstract = buffers.abstract_store(setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh)
    if setup.settings.buffer == "device":
        return abstract
    return jax.tree.map(lambda a: np.broadcast_to(np.zeros((), a.dtype), a.shape), abstract)


def restored_buffer(setup: Setup, found: Store) -> Store:
    """Returns a buffer that was read from a checkpoint as one that the run can go on with."""
    return found if setup.settings.buffer == "device" else host_buffer.restored(found, _directory(setup))


def _directory(setup: Setup) -> Path | None:
    return home_of(setup.settings.out) if setup.settings.buffer == "disk" else None


def moments_sharding(setup: Setup, count: int) -> ActivationRows:
    """Returns where some first rows of every site go to be measured: spread as far as they divide."""
    sites, shape = len(setup.sites.names), setup.shape
    places: list[Any] = [
        NamedSharding(setup.mesh, buffers.spread((sites, count, each), setup.mesh))
        for each in (shape.d_model, shape.d_model_out)
    ]
    return ActivationRows(*places, NamedSharding(setup.mesh, PartitionSpec()))


@contextmanager
def serving(setup: Setup) -> Iterator[Callable[[Store, Position], ActivationRows]]:
    """Hands out the function that returns the batch at a position of the round."""
    places = rows_sharding(setup.mesh)

    def batch(store: Store, position: Position, served: int) -> ActivationRows:
        orders = buffers.serving_orders(buffers.groups_of(store), setup.plan, position)
        here = slice(served * setup.plan.batch, (served + 1) * setup.plan.batch)
        return buffers.gather(store, {name: order[here] for name, order in orders.items()}, places)

    if setup.settings.buffer == "device":
        yield lambda store, position: batch(store, position, position.served)
        return
    asked: dict[str, Any] = {}
    ahead = host_buffer.Ahead(lambda served: batch(asked["store"], asked["position"], served))

    def prepared(store: Store, position: Position) -> ActivationRows:
        asked.update(store=store, position=position)
        return ahead.take(position.served, setup.plan.round_batches - 1)

    try:
        yield prepared
    finally:
        ahead.close()
        if setup.settings.buffer == "disk":
            host_buffer.discard(home_of(setup.settings.out))
