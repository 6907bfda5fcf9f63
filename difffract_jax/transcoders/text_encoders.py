"""Text encoders that lie in the host's memory, and on the devices only while they encode many prompts.

1. `parked` moves a tree of arrays to the host's memory beside its devices; each part stays with its process.
2. `HostEncoders.take` returns the embeddings of a chunk's prompts. Where they are not there yet, the encoders are sent
   to the devices, encode the prompts of this chunk and of the next ones, and are dropped. What they made waits on the
   host.

The embeddings are those that encoders on the device make, bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from difffract_jax.transcoders.compiled import bytes_per_chip

CHUNKS = 16
"""Chunks whose prompts are encoded while the encoders are there: of FLUX 128 prompts, whose embeddings take 0.5 GiB."""


class HostEncoders:
    """Both text encoders of a pipeline, in the host's memory between uses."""

    def __init__(self, t5: Any, clip: Any) -> None:
        self._homes = jax.tree.map(lambda leaf: leaf.sharding, (t5, clip))
        self._encoders = parked((t5, clip))
        self._made: dict[int, Any] = {}

    @property
    def visiting(self) -> int:
        """Bytes of a device that they take while they are there."""
        return bytes_per_chip(self._encoders)

    def take(
        self, number: int, encode: Callable[..., tuple[Array, Array]], ids: Callable[[int], list[Array]]
    ) -> tuple[Array, Array]:
        """Returns what the encoders make of a chunk's prompts.

        Args:
            number: of the chunk.
            encode: from T5, CLIP and tokens to embeddings.
            ids: from the number of a chunk to its tokens.
        """
        if number not in self._made:
            there = jax.device_put(self._encoders, self._homes)
            made = {n: encode(*there, *ids(n)) for n in range(number, number + CHUNKS)}
            del there
            self._made = {n: (parked(pair), jax.tree.map(lambda leaf: leaf.sharding, pair)) for n, pair in made.items()}
        return jax.device_put(*self._made.pop(number))


def parked(tree: Any) -> Any:
    """Returns a tree of arrays in the host's memory beside the devices that they are on."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), tree)
