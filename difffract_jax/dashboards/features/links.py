"""Features up- and downstream of a feature by weights, and its neighbours by decoder vectors.

1. What feature f writes into a residual stream is its value times d_f, its decoder vector times the block's mean gate.
   What a later feature g of the same stream reads is <w_g, .>, w_g its encoder column times the mean time scale, after
   a norm that takes the mean out and multiplies by s, here its mean at g's site. So f's usual share of g is

       weight = o_fg s a_f <w_g, d_f - mean(d_f)> / a_g

   with a the mean value of a feature where it is active, and o_fg how far both are active at tokens of the same kind:
   the sum over text and image of the smaller of their shares there. What works on patches alone has no links with what
   works on words alone. Features that never fire have none. The scale by which a block modulates its norm is left out.
2. Of every feature the `keep` weights of largest size are kept, over all later sites (downstream) and over all earlier
   ones (upstream). Attention, which carries what is written to other tokens, is left out: a graph has it.
   SAEs read what an MLP wrote, no residual stream, and have no such links.
3. Neighbours are the features of the same site with the largest cosines of decoder vectors.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from difffract_jax.address import Layout
from difffract_jax.dashboards.features.mean_run import MeanRun
from difffract_jax.models.streaming import Streamed
from difffract_jax.transcoders.transcoder import TranscoderSet

TILE = 4096
"""Features of a site whose weights to another site's are in memory at a time."""


class Strongest(NamedTuple):
    """The strongest partners of features.

    Attributes:
        value: weights or cosines, the largest first; 0 for an empty place.
        partner: site * features of a site + feature, sites in the order of the set.
    """

    value: Float[np.ndarray, "site feat keep"]
    partner: Int[np.ndarray, "site feat keep"]


class Links(NamedTuple):
    """What features are linked to by weights."""

    upstream: Strongest
    downstream: Strongest
    neighbours: Strongest


class Place(NamedTuple):
    """A site of a set.

    Attributes:
        group: its group's name.
        slot: its place in the group's stack.
        block: of the model.
        streams: that it reads and writes.
    """

    group: str
    slot: int
    block: int
    streams: tuple[str, ...]


def places_of(tcs: TranscoderSet, layout: Layout) -> list[Place]:
    """Returns every site of a set, in its order."""
    return [
        Place(group.name, slot, layout.block_of(group.label, number), group.streams)
        for group, numbers in tcs.sites.members
        for slot, number in enumerate(numbers)
    ]


def pairs_of(places: list[Place]) -> Iterator[tuple[int, int]]:
    """Yields the pairs of sites of which the first writes a stream that the second reads later."""
    for source, one in enumerate(places):
        for target, other in enumerate(places):
            if one.block < other.block and set(one.streams) & set(other.streams):
                yield source, target


def find_links(
    tcs: TranscoderSet,
    layout: Layout,
    mean: MeanRun,
    times: Float[np.ndarray, "step"],
    usual: dict[str, Float[np.ndarray, "site feat"]],
    sides: dict[str, Float[np.ndarray, "site feat side"]],
    keep: int,
    progress: Callable[[int, int], None] | None = None,
) -> Links:
    """Finds the partners of every feature.

    Args:
        tcs: the transcoders.
        layout: of the model.
        mean: the mean run, for gates and norms.
        times: denoising time of every step.
        usual: by group, mean value of each feature where it is active; 0 for one that never is.
        sides: by group, shares of the tokens at which each feature is active that are of the text and of the image.
        keep: partners to keep of each kind.
        progress: called with (pairs done, pairs in all).
    """
    places, features = places_of(tcs, layout), tcs.config.features
    pairs = list(pairs_of(places)) if tcs.config.role == "transcoder" else []
    up, down, near = (_empty(len(places), features, keep) for _ in range(3))
    total = len(pairs) + len(places)
    for site, place in enumerate(places):
        tc = _fetch(tcs.stacks[place.group], place.slot)
        units, alike = _units(tc), jnp.ones((features, 1))
        own = jnp.asarray(sides[place.group][place.slot])
        for first in range(0, features, TILE):
            rows = slice(first, first + TILE)
            tile = _tile(units[rows], units, alike[rows], alike, jnp.int32(first), keep=keep, same=True)
            _merge(near, site, rows, *map(np.asarray, tile[:2]), site * features)
        targets = [target for source, target in pairs if source == site]
        written = _written(tc, jnp.asarray(mean.gates[place.group][place.slot]), _usual(usual, place))
        del tc
        for target in targets:
            other = places[target]
            norm = jnp.asarray(mean.norms[other.group][other.slot])
            read = _read(_fetch(tcs.stacks[other.group], other.slot), jnp.asarray(times), _usual(usual, other), norm)
            theirs = jnp.asarray(sides[other.group][other.slot])
            for first in range(0, features, TILE):
                rows = slice(first, first + TILE)
                made = _tile(written[rows], read, own[rows], theirs, jnp.int32(0), keep=keep, same=False)
                tile = [np.asarray(a) for a in made]
                _merge(down, site, rows, tile[0], tile[1], target * features)
                _merge(up, target, slice(None), tile[2], tile[3], site * features + first)
            del read
        if progress is not None:
            progress(site + 1 + sum(source <= site for source, _ in pairs), total)
    return Links(up, down, near)


def _empty(sites: int, features: int, keep: int) -> Strongest:
    return Strongest(np.zeros((sites, features, keep), np.float32), np.zeros((sites, features, keep), np.int32))


def _merge(kept: Strongest, site: int, rows: slice, value: np.ndarray, partner: np.ndarray, offset: int) -> None:
    """Merges new partners of some features of a site into those that are kept, by size."""
    values = np.concatenate([kept.value[site, rows], value], axis=1)
    partners = np.concatenate([kept.partner[site, rows], (partner + offset).astype(np.int32)], axis=1)
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, : kept.value.shape[2]]
    kept.value[site, rows] = np.take_along_axis(values, order, axis=1)
    kept.partner[site, rows] = np.take_along_axis(partners, order, axis=1)


def _fetch(stack: Any, slot: int) -> Any:
    return stack.fetch(slot) if isinstance(stack, Streamed) else jax.tree.map(lambda leaf: leaf[slot], stack)


def _usual(usual: dict[str, np.ndarray], place: Place) -> Array:
    return jnp.asarray(usual[place.group][place.slot], jnp.float32)


@jax.jit
def _units(tc: Any) -> Float[Array, "feat d_model"]:
    """Returns the decoder vectors at length 1; zeros stay zeros."""
    vectors = tc.dec.kernel[...].astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


@jax.jit
def _written(tc: Any, gate: Float[Array, "d_model"], usual: Float[Array, "feat"]) -> Float[Array, "feat d_model"]:
    """Returns what features usually write, without its mean, which the next norm takes out."""
    vectors = usual[:, None] * tc.dec.kernel[...].astype(jnp.float32) * gate[None]
    return vectors - jnp.mean(vectors, axis=1, keepdims=True)


@jax.jit
def _read(
    tc: Any, times: Float[Array, "step"], usual: Float[Array, "feat"], norm: Float[Array, ""]
) -> Float[Array, "feat d_model"]:
    """Returns what features read, over their usual values; zeros for those that never fire."""
    scale = jnp.mean(jax.vmap(lambda t: tc.scale_shift(t)[0])(times), axis=0).astype(jnp.float32)
    columns = norm * tc.enc.kernel[...].astype(jnp.float32).T * (1 + scale)[None]
    return jnp.where(usual[:, None] > 0, columns / jnp.maximum(usual, 1e-30)[:, None], 0.0)


@partial(jax.jit, static_argnames=("keep", "same"))
def _tile(
    left: Float[Array, "some d_model"],
    right: Float[Array, "feat d_model"],
    left_sides: Float[Array, "some side"],
    right_sides: Float[Array, "feat side"],
    first: Array,
    *,
    keep: int,
    same: bool,
) -> tuple[Array, Array, Array, Array]:
    """Returns the products of largest size: of each row of `left`, value and partner; and of each row of `right`.

    A product counts as far as the shares of both rows' tokens, by side, overlap. With `same` a row is no partner of its
    own, `first` being the number of the first row of `left`, and only products above 0 count.
    """
    sides = zip(left_sides.T, right_sides.T, strict=True)
    overlap = sum(jnp.minimum(one[:, None], other[None]) for one, other in sides)
    products = overlap * jnp.matmul(left, right.T, precision="highest")
    if same:
        own = jnp.arange(left.shape[0])[:, None] + first == jnp.arange(right.shape[0])[None]
        products = jnp.where(own, 0.0, jnp.maximum(products, 0.0))

    def strongest(rows: Array) -> tuple[Array, Array]:
        room = min(keep, rows.shape[1])
        _, at = jax.lax.top_k(jnp.abs(rows), room)
        return jnp.take_along_axis(rows, at, axis=1), at

    return *strongest(products), *strongest(products.T)
