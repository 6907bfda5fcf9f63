"""Encoding the sites of a trace: which features are active at every position, their values, and what is missing.

Codes are kept as the active features alone: `index` and `value` of up to K features per position, K the largest number
anywhere in a group. Filling places have value 0.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.models.stacks import slice_layer
from difffract_jax.models.streaming import Streamed
from difffract_jax.spread import spread
from difffract_jax.transcoders.transcoder import Transcoder
from difffract_jax.trees import brief

BY_EIGHTS = 8
"""K is rounded up to a multiple of this, so that similar traces share a compilation."""
CODE_BYTES = 2**28
"""Codes of a group kept between counting and finding their active features; larger ones are computed twice."""


class SiteLayers(NamedTuple):
    """Where one group's MLP sublayers are replaced; arrays have a leading layer axis.

    Attributes:
        slot: place in the stack of each block's transcoder; 0, and nothing live, where there is none.
        live: positions that are replaced.
        index: features of every position that can be sources: the active ones, filled up with inactive ones.
        row: of the decoder rows in the stack, that of each; None where the stack holds those of all features.
    """

    slot: Int[Array, "layer"]
    live: Bool[Array, "layer rows"]
    index: Int[Array, "layer rows active"]
    row: Int[Array, "layer rows active"] | None = None

    @property
    def decoder_rows(self) -> Int[Array, "*layer rows active"]:
        """The decoder row of each feature in `index`."""
        return self.index if self.row is None else self.row

    def without_features(self) -> "SiteLayers":
        """Returns the same sites with no places for features."""
        return self._replace(index=self.index[..., :0], row=None if self.row is None else self.row[..., :0])


class ReplacedSites(NamedTuple):
    """One group's MLP sublayers in the replacement.

    Attributes:
        stack: the group's transcoders; None if it has none. Of streamed ones, what the affine map reads of them, which
            is streamed itself where there is no room for it.
        layers: where they stand.
        streamed: the transcoders of the same sites, as they are fetched; None where they lie in `stack`.
    """

    stack: Any  # a stack of transcoders, Streamed, or None
    layers: SiteLayers
    streamed: Streamed | None = None

    @property
    def row_layers(self) -> Streamed | None:
        """What the affine map reads of each block's transcoder, where that is streamed; else None."""
        return self.stack.pick(self.used_slots) if isinstance(self.stack, Streamed) else None

    @property
    def features(self) -> int:
        """Features of each transcoder; 0 if there is none."""
        if self.streamed is not None:
            return self.streamed.abstract().config.features
        return 0 if self.stack is None else self.stack.config.features

    @property
    def used_slots(self) -> list[int | None]:
        """Of each block the place of its transcoder in the stack; None where no position is replaced."""
        live = np.asarray(self.layers.live).any(axis=1)
        return [slot if used else None for slot, used in zip(np.asarray(self.layers.slot).tolist(), live, strict=True)]

    def transcoder(self, slot: Any) -> Transcoder:
        """Returns the whole transcoder of one of the sites; fetched, if they are streamed.

        Args:
            slot: from `SiteLayers.slot`.
        """
        assert self.stack is not None
        return site(self.stack, slot) if self.streamed is None else self.streamed.fetch(int(slot))

    __repr__ = brief


class GroupRecord(NamedTuple):
    """What encoding one group's sites reads of a trace: MLP inputs and outputs, replaceable positions, time."""

    mlp_in: Float[Array, "layer rows d_model"]
    mlp_out: Float[Array, "layer rows d_model"]
    replaceable: Bool[Array, "rows"]
    t: Float[Array, ""]


def encode_group(
    stack: Transcoder | None, slots: Sequence[int | None], record: GroupRecord, most: int | None
) -> tuple[ReplacedSites, Array, Array]:
    """Encodes one group's sites.

    Args:
        stack: the group's transcoders; None if it has none.
        slots: of each recorded block, the place of its transcoder in the stack; None where it has none.
        record: what encoding reads of a trace.
        most: places for features per position; counted if None.

    Returns:
        The group's sites, the values of their features, and the errors.
    """
    count, rows, _ = record.mlp_in.shape
    has = np.array([place is not None for place in slots], bool)
    slot = jax.device_put(np.array([place or 0 for place in slots], np.int32))
    live = _live(has, record.replaceable)
    if stack is None or not count:
        index, values = (np.zeros((count, rows, 0), dtype) for dtype in (np.int32, record.mlp_in.dtype))
        return (
            ReplacedSites(None, SiteLayers(slot, live, jax.device_put(index))),
            jax.device_put(values),
            record.mlp_out,
        )
    codes, counted, size = None, None, count * rows * stack.config.features * record.mlp_in.dtype.itemsize
    if size <= CODE_BYTES:
        codes, counted = _codes(stack, slot, live, record)
    if most is None:
        counted = count_active(stack, slot, live, record) if counted is None else counted
        most = min(-(-max(int(counted), 1) // BY_EIGHTS) * BY_EIGHTS, stack.config.features)
    index, values, errors = find_active(stack, slot, live, record, codes, most)
    return ReplacedSites(stack, SiteLayers(slot, live, index)), values, errors


@jax.jit
def _live(has: Bool[Array, "layer"], replaceable: Bool[Array, "rows"]) -> Bool[Array, "layer rows"]:
    """Returns which positions of which blocks are replaced."""
    return has[:, None] & replaceable[None]


def site(stack: Transcoder, slot: Int[Array, ""]) -> Transcoder:
    """Returns one transcoder of a stack."""
    return slice_layer(stack, slot)


@jax.jit
def _codes(
    stack: Transcoder, slot: Array, live: Array, record: GroupRecord
) -> tuple[Float[Array, "layer rows feat"], Int[Array, ""]]:
    """Returns the code of every position of every block, and what `count_active` does."""

    def one(layer: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        slot, live, x = layer
        code = _code(stack, slot, live, x, record.t)
        return code, _most_active(code)

    codes, counts = jax.lax.map(one, (slot, live, record.mlp_in))
    return codes, jnp.max(counts)


@jax.jit
def count_active(stack: Transcoder, slot: Array, live: Array, record: GroupRecord) -> Int[Array, ""]:
    """Returns the largest number of active features at any position of any block, from one block's codes at a time."""

    def one(layer: tuple[Array, Array, Array]) -> Array:
        slot, live, x = layer
        return _most_active(_code(stack, slot, live, x, record.t))

    return jnp.max(jax.lax.map(one, (slot, live, record.mlp_in)))


def _code(stack: Transcoder, slot: Array, live: Array, x: Array, t: Array) -> Float[Array, "rows feat"]:
    # Over several devices each takes some positions, since the largest of a row are sought among all its features.
    return spread(jnp.where(live[:, None], site(stack, slot).encode(x, t), 0), 0)


def _most_active(code: Float[Array, "rows feat"]) -> Int[Array, ""]:
    return jnp.max(jnp.sum(code > 0, axis=1, dtype=jnp.int32))


@partial(jax.jit, static_argnames="most")
def find_active(
    stack: Transcoder, slot: Array, live: Array, record: GroupRecord, codes: Array | None, most: int
) -> tuple[Int[Array, "layer rows active"], Float[Array, "layer rows active"], Float[Array, "layer rows d_model"]]:
    """Returns every position's active features, strongest first, their values, and the errors."""

    def step(_: None, layer: tuple[Array, Array, Array, Array, Array | None]) -> tuple[None, Any]:
        slot, live, x, y, z = layer
        transcoder = site(stack, slot)
        if z is None:
            z = _code(stack, slot, live, x, record.t)
        value, index = jax.lax.top_k(z, most)
        error = y - spread(jnp.where(live[:, None], transcoder.decode(z, x), 0), 0)
        return None, (spread(index, 0), spread(value, 0), spread(error, 1, 0))

    return jax.lax.scan(step, None, (slot, live, record.mlp_in, record.mlp_out, codes))[1]
