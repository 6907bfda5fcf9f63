"""Rows made while steps run: the next refresh of the buffer, chunk by chunk, in places that were served already.

1. A round serves rows in an order that is known before it begins, and so is the step that reads a place last.
   `refresh_served` writes chunks of the refresh that ends the round into places that no step of it will read any more.
   Which rows go where is what `buffer.refresh` would do at the end of the round, and the batches of a round follow from
   how full the buffer was when it began: so all that is served is the same, bit for bit, and no room is needed but for
   the chunks that wait.
2. `Upcoming` has the next chunk made by a thread: tokens, the choice of rows, files, calls of the model, and, for a
   buffer on the host, the way there. Programs that span devices must be called in one order on all of them, so that on
   several devices the thread of the steps makes it, and the same chunks at the same steps.
3. `upcoming` decides whether a run does so. On a device programs take turns, and what one needs in between is free when
   another runs; what is needed besides is room for the chunks that wait, and for text encoders that come and go.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from difffract_jax.config import UserError
from difffract_jax.memory import memory_for
from difffract_jax.transcoders.buffer import BufferSizes, Position, Store, groups_of, serving_orders, write_chunk
from difffract_jax.transcoders.compiled import bytes_per_chip
from difffract_jax.transcoders.harvest import Chunk, RowSource, Sampler
from difffract_jax.transcoders.objective import Width
from difffract_jax.transcoders.plan import TrainingWorkload, estimate, held_bytes
from difffract_jax.transcoders.processes import gathered
from difffract_jax.transcoders.setup import Setup
from difffract_jax.transcoders.sites import SiteSet

WAITING = 2
"""Chunks that wait at most: one that is made, and the next one in the making."""


class Upcoming:
    """A source of rows, of which the next chunk is made while something else is done; to be closed."""

    def __init__(self, source: RowSource, *, to_host: bool = False, devices: int = 1) -> None:
        """Takes a source, from which nothing is asked yet.

        Args:
            source: where rows come from.
            to_host: bring rows to this machine's memory.
            devices: how many the programs of steps and of the source span, in all processes.
        """
        self._source, self._to_host = source, to_host
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows") if devices == 1 else None
        self._coming: tuple[int, Future[Chunk]] | None = None

    @property
    def sites(self) -> SiteSet:
        """Sites it has rows of."""
        return self._source.sites

    @property
    def width(self) -> Width:
        """Channels of a row."""
        return self._source.width

    def look(self, number: int) -> Chunk | None:
        """Returns a chunk if it is there, and begins with it if nobody has; it stays until `chunk` takes it.

        What goes wrong with a chunk is told by `chunk`: it may never be needed.
        """
        if self._coming is None or self._coming[0] != number:
            self._coming = number, self._begun(number)
        coming = self._coming[1]
        return coming.result() if coming.done() and coming.exception() is None else None

    def wait(self, number: int) -> Chunk:
        """Returns a chunk once it is there; it stays until `chunk` takes it."""
        self.look(number)
        assert self._coming is not None
        return self._coming[1].result()

    def chunk(self, number: int) -> Chunk:
        """Waits for a chunk and returns it; the next one is begun."""
        coming, self._coming = self._coming, None
        made = coming[1] if coming is not None and coming[0] == number else self._begun(number)
        chunk = made.result()
        if self._thread is not None:
            self._coming = number + 1, self._begun(number + 1)
        return chunk

    def close(self) -> None:
        """Waits for what is in the making, and ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _begun(self, number: int) -> "Future[Chunk]":
        if self._thread is not None:
            return self._thread.submit(self._make, number)
        made: Future[Chunk] = Future()
        try:
            made.set_result(self._make(number))
        except UserError as error:
            made.set_exception(error)
        return made

    def _make(self, number: int) -> Chunk:
        chunk = self._source.chunk(number)
        return jax.tree.map(np.asarray, chunk) if self._to_host else chunk


def refresh_served(store: Store, source: Upcoming, plan: BufferSizes, position: Position) -> tuple[Store, Position]:
    """Writes new rows where the round has served all it will; `buffer.refresh` at its end writes what is left.

    Args:
        store: the buffer; its arrays are reused.
        source: where rows come from; chunks that are not there yet are not waited for.
        plan: sizes.
        position: within a round, all of whose batches so far have been taken.

    Returns:
        The buffer, and the position with how much of the refresh is left.
    """
    groups = groups_of(store)
    if not position.before:
        position = position._replace(before=position.counts)
    served, replaced = position.served * plan.batch, last_served(groups, plan, position.round, position.before)
    left = position.left or tuple(replaced[name][0].size for name in groups)
    slots = {name: replaced[name][0][replaced[name][0].size - n :] for name, n in zip(groups, left, strict=True)}
    while all(slots[name].size for name in groups):
        chunk = source.look(position.chunk)
        if chunk is None:
            break
        for name, count in zip(groups, position.counts, strict=True):
            # As many places are taken as `write_chunk` does, after those that are still empty.
            taken = min(max(0, np.count_nonzero(chunk.valid[name]) - (plan.capacity - count)), slots[name].size)
            places, last = replaced[name]
            begin = places.size - slots[name].size
            if taken and last[begin : begin + taken].max() >= served:
                return store, _with_left(position, slots, groups)
        store, position, slots = write_chunk(store, source, plan, position, slots)
    return store, _with_left(position, slots, groups)


def _with_left(position: Position, slots: dict[str, Int[np.ndarray, "_"]], groups: tuple[str, ...]) -> Position:
    return position._replace(left=tuple(slots[name].size for name in groups))


@lru_cache(maxsize=2)
def last_served(
    groups: tuple[str, ...], plan: BufferSizes, number: int, counts: tuple[int, ...]
) -> dict[str, tuple[Int[np.ndarray, "slot"], Int[np.ndarray, "slot"]]]:
    """Returns the places that a round serves in the order in which they are replaced, and when each is served last.

    Args:
        groups: of the buffer.
        plan: sizes.
        number: of the round.
        counts: rows that every group held when it began.

    Returns:
        By group, places, and for each the number of the last row of the round that it is.
    """
    replaced = {}
    for name, order in serving_orders(groups, plan, Position(0, number, 0, counts)).items():
        places, first = np.unique(order, return_index=True)
        last = order.size - 1 - np.unique(order[::-1], return_index=True)[1]
        turn = np.argsort(first)
        replaced[name] = places[turn], last[turn]
    return replaced


@contextmanager
def upcoming(setup: Setup, source: RowSource, position: Position) -> Iterator[Upcoming | None]:
    """Hands out the source of the rows that are made while steps run; None where a run does one after the other.

    Args:
        setup: of the run, whose state, buffer and model are in their places.
        source: where its rows come from.
        position: how far the data have come.
    """
    asked, device = setup.settings.overlap, first_device(setup.mesh)
    # On a processor, steps and model would share the cores, and hold their memory at the same time.
    if asked == "off" or (asked == "auto" and device.platform == "cpu"):
        yield None
        return
    coming = Upcoming(source, to_host=setup.settings.buffer != "device", devices=setup.mesh.size)
    try:
        fits = asked == "on"
        if not fits:
            chunk = coming.wait(position.chunk)
            visiting = source.encoders.visiting if isinstance(source, Sampler) and source.encoders is not None else 0
            fits = _fits(setup, chunk, memory_for(device).available - visiting)
        # All do so, or none.
        yield coming if all(bool(one) for one in gathered(np.array(fits))) else None
    finally:
        coming.close()


def first_device(mesh: Mesh) -> Any:
    """Returns the first of this process's devices in a mesh."""
    return mesh.local_devices[0]


def _fits(setup: Setup, chunk: Chunk, free: int) -> bool:
    """Says whether a device has room for what a step needs, and for the chunks that wait beside this one."""
    held = held_bytes(setup, {})
    between = estimate(TrainingWorkload(setup.settings, setup.sites, setup.width, {}), setup.mesh.shape)
    between -= sum(held.values())
    return max(0, between) + held["rows"] + (WAITING - 1) * bytes_per_chip(chunk.rows) <= free
