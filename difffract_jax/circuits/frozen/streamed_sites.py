"""Sites whose transcoders do not lie in memory: one at a time encodes, and what an affine map reads of it is kept.

1. `encode_sites` fetches the transcoder of one site after the other, finds the active features of every position, and
   keeps of the transcoder the decoder rows of those that are active anywhere, in the order of their numbers.
2. Where these rows are more than the room there is for them, they are let go, and `RowLayers` reads them again, site by
   site, whenever a walk through the blocks comes by.
3. `SiteLayers.row` says which of the rows is whose; `SiteLayers.index` still numbers features as the transcoder does.
4. `encoder_terms` reads the encoder columns of single features when they are targets.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.circuits.frozen.encoding import BY_EIGHTS, GroupRecord, ReplacedSites, SiteLayers
from difffract_jax.models.streaming import Streamed, Take, stack_trees, take_some
from difffract_jax.ops import widen
from difffract_jax.transcoders.transcoder import FEATURE_AXES, Transcoder

ROWS_STEP = 256
"""The number of decoder rows that are kept is rounded up to a multiple of this, so that programs are shared."""


def encode_sites(
    stack: Streamed,
    slots: Sequence[int | None],
    record: GroupRecord,
    most: int | None,
    room: float = inf,
) -> tuple[ReplacedSites, Array, Array]:
    """Encodes one group's sites, a transcoder at a time; arguments and results as for `encoding.encode_group`.

    Args:
        stack: the group's transcoders.
        slots: of each recorded block, the place of its transcoder; None where it has none.
        record: what encoding reads of a trace.
        most: places for features per position; as many as are needed if None.
        room: bytes that the decoder rows of the group may take; if they are more, they are streamed.
    """
    count, rows, _ = record.mlp_in.shape
    used = [(layer, place) for layer, place in enumerate(slots) if place is not None]
    index, values, errors = [], [], list(record.mlp_out)
    decoders = _Decoders(stack.pick(place for _, place in used), room)
    layers = iter([layer for layer, _ in used])
    # Not `zip`, which would hold on to the transcoder before.
    for _, transcoder in stack.fetched(place for _, place in used):
        layer = next(layers)
        code = _encode(transcoder, record.mlp_in[layer], record.replaceable, record.t)
        places = _places(int(_most_active(code))) if most is None else most
        chosen, value, errors[layer] = _split(
            transcoder, code, record.mlp_in[layer], record.mlp_out[layer], record.replaceable, places
        )
        index.append(np.asarray(chosen))
        values.append(value)
        decoders.add(transcoder, np.unique(index[-1][np.asarray(value) > 0]))
        del transcoder, code
    return _joined(used, (count, rows), record, (index, values, errors), decoders)


class _Decoders:
    """What the affine map reads of some sites' decoders: kept as long as there is room, or else how to read it again.

    Attributes:
        sites: the transcoders.
        active: of each, the features that are active anywhere, ascending.
    """

    def __init__(self, sites: Streamed, room: float) -> None:
        self.sites, self.active, self._room = sites, list[np.ndarray](), room
        self._kept: list[Transcoder] | None = []

    def add(self, transcoder: Transcoder, active: Int[np.ndarray, "kept"]) -> None:
        """Takes what is read of the next site's transcoder."""
        self.active.append(active)
        kernel = transcoder.dec.kernel[...]
        most = max(map(_padded_size, self.active)) * self.sites.depth * kernel.shape[1] * kernel.dtype.itemsize
        if most > self._room:
            self._kept = None
        if self._kept is not None:
            self._kept.append(_take(transcoder, jax.device_put(_padded(active))))
            jax.block_until_ready(self._kept[-1])

    def stack(self) -> Transcoder | Streamed:
        """Returns all sites as a stack, each with as many rows as the one with most; streamed where room was short."""
        size = max(map(_padded_size, self.active))
        if self._kept is None:
            rows = RowLayers(self.sites, self.active, size)
            return Streamed(rows, (), tuple(range(rows.depth)))
        for decoder in self._kept:
            more = size - decoder.dec.kernel.shape[0]
            decoder.dec.kernel = nnx.Param(jnp.pad(decoder.dec.kernel[...], ((0, more), (0, 0))))
            decoder.config = replace(decoder.config, features=size)
        return stack_trees(self._kept)


class RowLayers:
    """Decoder rows of a group's active features, read from where the transcoders lie; a `models.streaming.LayerSource`.

    A layer is what the affine map reads of a transcoder, as `_take` gives it.
    """

    def __init__(self, sites: Streamed, active: Sequence[Int[np.ndarray, "_"]], size: int) -> None:
        """Names what is read.

        Args:
            sites: the transcoders.
            active: of each, the features whose rows are read, ascending.
            size: rows of each; the last is repeated where there are fewer.
        """
        self._sites, self._size = sites, size
        self._rows = [_padded(one, size) for one in active]

    @property
    def depth(self) -> int:
        """How many sites there are."""
        return len(self._rows)

    def without_rows(self) -> "RowLayers":
        """Returns the same sites without any rows: their biases and skips."""
        none = np.zeros(0, np.int64)
        return RowLayers(self._sites, [none] * self.depth, 0)

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one site's arrays.

        Args:
            layer: its number.
            take: as for `models.streaming.LayerSource`.

        Raises:
            UserError: if its file has changed or gone meanwhile.
        """
        number, none = self._sites.numbers[layer], np.zeros(0, np.int64)
        assert number is not None, "a site has a transcoder"
        wanted = {name: (axis, none) for name, axis in FEATURE_AXES.items()}
        part = self._sites.source.read(number, wanted | {"dec.kernel": (0, self._rows[layer])})
        tree = _decoder_of(part, part.dec.kernel[...])
        return tree if take is None else take_some(tree, take)

    def abstract(self) -> Any:
        """Returns the shapes and types of a site."""
        chosen = jax.ShapeDtypeStruct((self._size,), jnp.int32)
        return jax.eval_shape(_take, self._sites.abstract(), chosen)


def _places(active: int) -> int:
    """Rounds the places for features up: by eights, and where there are many to a power of two, to compile seldom."""
    size = max(active, 1)
    return -(-size // BY_EIGHTS) * BY_EIGHTS if size <= 8 * BY_EIGHTS else 1 << (size - 1).bit_length()


def without_rows(stack: Any) -> Any:
    """Returns what gives a map's constant: of streamed decoder rows none, so that next to nothing is read.

    Args:
        stack: from `ReplacedSites.stack`.
    """
    if not (isinstance(stack, Streamed) and isinstance(stack.source, RowLayers)):
        return stack
    return replace(stack, source=stack.source.without_rows())


def _padded_size(active: Int[np.ndarray, "kept"]) -> int:
    return max(1, -(-active.size // ROWS_STEP)) * ROWS_STEP


def _padded(active: Int[np.ndarray, "kept"], size: int | None = None) -> Int[np.ndarray, "padded"]:
    """Repeats the last number, so that few lengths occur; up to a size if one is given."""
    size = _padded_size(active) if size is None else size
    return np.pad(active, (0, size - active.size), mode="edge") if active.size else np.zeros(size, active.dtype)


@jax.jit
def _encode(transcoder: Transcoder, x: Array, live: Array, t: Array) -> Float[Array, "rows feat"]:
    return jnp.where(live[:, None], transcoder.encode(x, t), 0)


@jax.jit
def _most_active(code: Float[Array, "rows feat"]) -> Int[Array, ""]:
    return jnp.max(jnp.sum(code > 0, axis=1, dtype=jnp.int32))


@partial(jax.jit, static_argnames="most")
def _split(
    transcoder: Transcoder, code: Array, x: Array, y: Array, live: Bool[Array, "rows"], most: int
) -> tuple[Int[Array, "rows active"], Float[Array, "rows active"], Float[Array, "rows d_model"]]:
    """Returns every position's active features, strongest first, their values, and the error."""
    value, index = jax.lax.top_k(code, min(most, code.shape[1]))
    return index, value, y - jnp.where(live[:, None], transcoder.decode(code, x), 0)


@jax.jit
def _take(transcoder: Transcoder, chosen: Int[Array, "kept"]) -> Transcoder:
    """Returns what an affine map reads of a transcoder: some decoder rows, their bias, and the skip."""
    return _decoder_of(transcoder, transcoder.dec.kernel[chosen])


def _decoder_of(transcoder: Transcoder, rows: Any) -> Transcoder:
    """Returns a transcoder without all that encodes, with some decoder rows."""
    kept, config = jax.tree.map(lambda leaf: leaf, transcoder), transcoder.config
    timed = ("time_in", "time_out", "film") if config.time_embed else ()
    for name in ("enc", *timed, *(("threshold",) if config.activation == "jumprelu" else ())):
        delattr(kept, name)
    kept.dec.kernel = nnx.Param(rows)
    plain = {"activation": "relu", "k": 0, "conditioning": "none", "time_embed": 0}
    kept.config = replace(config, features=rows.shape[0], **plain)
    return kept


def _joined(
    used: list[tuple[int, int]], shape: tuple[int, int], record: GroupRecord, parts: Any, decoders: _Decoders
) -> tuple[ReplacedSites, Array, Array]:
    """Puts the sites on a layer axis: all have as many places and rows as the one with most."""
    index, values, errors = parts
    (count, rows), dtype = shape, record.mlp_in.dtype
    places, slot = max(one.shape[1] for one in index), np.zeros(count, np.int32)
    whole, row = np.zeros((count, rows, places), np.int32), np.zeros((count, rows, places), np.int32)
    value, live = np.zeros((count, rows, places), dtype), np.zeros((count, rows), bool)
    for number, (layer, _) in enumerate(used):
        width, active = index[number].shape[1], decoders.active[number]
        slot[layer], live[layer] = number, np.asarray(record.replaceable)
        whole[layer, :, :width] = index[number]
        found = np.minimum(np.searchsorted(active, index[number]), max(active.size - 1, 0))
        row[layer, :, :width] = found  # of a place that fills up some row: its value is 0
        value[layer, :, :width] = values[number]
    layers, value = jax.device_put((SiteLayers(slot, live, whole, row), value))
    return ReplacedSites(decoders.stack(), layers, decoders.sites), value, jnp.stack(errors)


def encoder_terms(
    sites: ReplacedSites,
    slot: Int[np.ndarray, "target"],
    feature: Int[np.ndarray, "target"],
    t: Float[Array, ""],
) -> tuple[Float[np.ndarray, "target d_model"], Float[np.ndarray, "target"]]:
    """Returns (1 + alpha) * w_f and b_f + w_f . beta of some features, read from where the transcoders lie.

    Args:
        sites: from `encode_sites`.
        slot: of each feature's site, as `SiteLayers.slot` has it.
        feature: its number in the transcoder.
        t: denoising time.
    """
    assert sites.streamed is not None
    source, found = sites.streamed.source, [np.zeros((0, 0))] * feature.size
    constants = np.zeros(feature.size, np.promote_types(t.dtype, np.float32))
    for number in np.unique(slot):
        mine = np.flatnonzero(slot == number)
        chosen = np.resize(feature[mine], -(-mine.size // BY_EIGHTS) * BY_EIGHTS)
        take = {name: (axis, chosen) for name, axis in FEATURE_AXES.items()}
        part = source.read(sites.streamed.numbers[number], take)
        vectors, constant = (np.asarray(one) for one in _terms(part, t))
        constants[mine] = constant[: mine.size]
        for place, at in enumerate(mine):
            found[at] = vectors[place]
    return np.stack(found), constants


@jax.jit
def _terms(part: Transcoder, t: Array) -> tuple[Float[Array, "target d_model"], Float[Array, "target"]]:
    alpha, beta = part.scale_shift(t)
    # Widened where `film` and the encoder widen them, so that bfloat16 transcoders read as they encode.
    vectors = widen(part.enc.kernel[...]).T
    assert part.enc.bias is not None
    return vectors * widen(1 + alpha)[None], widen(part.enc.bias[...]) + jnp.sum(vectors * widen(beta)[None], axis=1)
