"""Edges by pull-back: the incoming edges of many targets at once, exactly (METHOD section 4).

A target's pre-activation is u = g . x + c at its site and position, with g = (1 + alpha) * w_f. From the highest
target's block downwards:

1. Add g to the cotangent of x for the targets that lie in this block.
2. The cotangent of the MLP sublayer's output y is gate2 times that of the residual stream. Contract it with the decoder
   vectors of the features that can be sources there, times their values, and with the error: these are edges.
3. Pull the cotangents through the frozen block with `jax.vjp`, vectorised over targets. The attention pattern is
   recomputed once per block for all of them.

Below the last block the cotangent of h0, times h0, gives the edges of the inputs. The number of blocks walked is an
argument of the compiled program, not a shape: targets in low blocks cost less and compile nothing new.

Targets are sorted by block, highest first, and walked in pieces: at every block only those pieces that have begun take
part. Pieces are small enough for a processor's cache; see `Sizes`.

A row of edges has one place per source, in this order: for each block the features of the image stream (position by
position, K each), those of the text stream, the errors of both; after all blocks, the inputs of both. `Layout` knows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from difffract_jax.circuits.contraction import contract
from difffract_jax.circuits.entry import enter
from difffract_jax.circuits.replacement import Replacement, Sites, Sources, run, site
from difffract_jax.circuits.trace import Record
from difffract_jax.models.blocks import Cond, DoubleBlock, Frozen, Streams, both, modulations
from difffract_jax.transcoders.transcoder import Transcoder

PULL_BYTES = 2**20
"""Cotangents pulled through a block at a time: few enough for a processor's cache; accelerators take them all."""
CONTRACT_TARGETS = 64
"""Targets at most for which gathered decoder vectors are used together."""
PIECE_COST = 10
"""What a piece costs in any case, above all its gathered decoder vectors, in targets."""


class Targets(NamedTuple):
    """Features whose incoming edges are wanted.

    Attributes:
        stream: 0 image, 1 text.
        layer: block, counted from the trace's first; -1 for a place that only fills up: it costs next to nothing, and
            has no edges.
        position: within the stream.
        feature: of the site's transcoder.
    """

    stream: Int[Array, "target"]
    layer: Int[Array, "target"]
    position: Int[Array, "target"]
    feature: Int[Array, "target"]


class Layout(NamedTuple):
    """Where the edges of which sources stand in a row.

    Attributes:
        layers: number of blocks.
        rows: positions of each stream.
        active: places for features per position, of each stream.
    """

    layers: int
    rows: Streams
    active: Streams

    @property
    def features(self) -> int:
        """Places for features per block."""
        return self.rows.img * self.active.img + self.rows.txt * self.active.txt

    @property
    def per_layer(self) -> int:
        """Places per block, errors included."""
        return self.features + self.rows.img + self.rows.txt

    @property
    def size(self) -> int:
        """Places in a row."""
        return self.layers * self.per_layer + self.rows.img + self.rows.txt


def layout_of(sources: Sources) -> Layout:
    """Returns the layout of rows over these sources."""
    layers = sources.values.img.shape[0]
    return Layout(layers, both(lambda v: v.shape[1], sources.values), both(lambda v: v.shape[2], sources.values))


class Sizes(NamedTuple):
    """How many targets go through which part of the program together; `batch` is a multiple of each.

    Attributes:
        pull: through the pull-back of a block.
        enter: into the walk.
        contract: through the contraction with decoder vectors, one of these, ascending, by how many have begun.
        batch: through the program, filled up.
    """

    pull: int
    enter: int
    contract: tuple[int, ...]
    batch: int


def sizes_for(targets: int, cotangent_bytes: int, backend: str) -> Sizes:
    """Divides a number of targets.

    Args:
        targets: how many there are.
        cotangent_bytes: of one target.
        backend: of JAX, as in `jax.default_backend()`.

    Example:
        >>> sizes_for(50, 320 * 512 * 4, "cpu")
        Sizes(pull=1, enter=5, contract=(1, 5, 25, 50), batch=50)
    """
    most = _ceil(targets, _ceil(targets, CONTRACT_TARGETS))
    batch = most * _ceil(targets, most)
    few, half = _divisor(most, max(1, most // 8)), _divisor(most, max(1, most // 2))
    pull = _divisor(most, max(1, PULL_BYTES // cotangent_bytes)) if backend == "cpu" else most
    return Sizes(pull, few, tuple(sorted({1, few, half, most})), batch)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor up to `most`."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def pull_back(
    replacement: Replacement, targets: Targets, spare: Float[Array, "batch source"] | None = None
) -> Float[Array, "target source"]:
    """Returns the attribution of every source to every target, value(source) * d u(target) / d value(source).

    Args:
        replacement: from `prepare`.
        targets: as many as shall be computed together; each number of them is compiled once.
        spare: what an earlier call with as many targets returned, and nobody needs any more: its memory is used again.
    """
    count, boundary = targets.layer.shape[0], replacement.record.boundary
    sizes = sizes_for(count, sum(h.nbytes for h in boundary), jax.default_backend())
    # Highest first: then those that have begun at any block are the first so many.
    order = jnp.argsort(-targets.layer, stable=True)
    padding = (0, sizes.batch - count)
    filled = jax.tree.map(lambda column: jnp.pad(column[order], padding, constant_values=-1), targets)
    with jax.default_matmul_precision("highest"):
        shape, dtype = (sizes.batch, layout_of(replacement.sources).size), boundary.img.dtype
        fits = spare is not None and spare.shape == shape and spare.dtype == dtype
        edges = _pull_back(*replacement, filled, spare if fits else jnp.zeros(shape, dtype), sizes)
    return edges if bool(jnp.all(order == jnp.arange(count))) and sizes.batch == count else edges[jnp.argsort(order)]


@partial(jax.jit, static_argnames="sizes", donate_argnames="spare")
def _pull_back(
    record: Record, sites: Streams, sources: Sources, targets: Targets, spare: Array, sizes: Sizes
) -> Float[Array, "target source"]:
    layout = layout_of(sources)
    gradients = target_gradients(record, sites, targets)
    cotangent = both(lambda h: jnp.zeros((sizes.batch, *h.shape), gradients.dtype), sources.boundary)

    def block_step(i: Array, carry: tuple[Array, Streams]) -> tuple[Array, Streams]:
        edges, cotangent = carry
        layer = targets.layer[0] - i
        here = _block_at(record, sites, sources, layer)
        pull = _puller(here, record.cond)

        def contract_some(first: Array, count: int, edges: Array) -> Array:
            return _contract_block(here, edges, (first, layer * layout.per_layer), cotangent, count)

        def through(first: Array, count: int, cotangent: Streams) -> Streams:
            return _put(cotangent, jax.vmap(pull)(_some(cotangent, first, count)), first)

        def enter_some(piece: Array, cotangent: Streams) -> Streams:
            first = piece * sizes.enter
            some, gradient, before = _some((targets, gradients, cotangent), first, sizes.enter)
            gradient = jnp.where((some.layer == layer)[:, None], gradient, 0)
            entered = enter(here.block, here.frozen, here.mod, gradient, some.stream, some.position)
            return _put(cotangent, both(jnp.add, before, entered), first)

        begun, begin = (jnp.sum(where, dtype=jnp.int32) for where in (targets.layer > layer, targets.layer >= layer))
        edges = _in_pieces(begun, sizes.contract, contract_some, edges)
        cotangent = _in_pieces(begun, (sizes.pull,), through, cotangent)
        last = (begin + sizes.enter - 1) // sizes.enter
        return edges, jax.lax.fori_loop(begun // sizes.enter, last, enter_some, cotangent)

    none = jnp.zeros((sizes.batch, layout.per_layer), gradients.dtype)
    empty = jax.lax.fori_loop(0, layout.layers, lambda layer, edges: _columns(edges, none, layer, layout), spare)
    edges, cotangent = jax.lax.fori_loop(0, targets.layer[0] + 1, block_step, (empty, cotangent))
    inputs = both(partial(_dot_rows, jnp.int32(0), sizes.batch), cotangent, sources.boundary)
    return _columns(edges, jnp.concatenate(inputs, axis=1), layout.layers, layout)


def _columns(edges: Array, new: Array, layer: int | Array, layout: Layout) -> Array:
    """Writes what belongs to a block; the inputs stand where one more block would."""
    return jax.lax.dynamic_update_slice(edges, new, (0, layer * layout.per_layer))


def _in_pieces(targets: Array, sizes: tuple[int, ...], work: Callable[[Array, int, Any], Any], carry: Any) -> Any:
    """Does `work(first, size, carry)` on the first so many targets, in pieces of the size that costs least."""
    pieces = [(targets + size - 1) // size for size in sizes]
    cheapest = jnp.argmin(jnp.stack([n * (size + PIECE_COST) for n, size in zip(pieces, sizes, strict=True)]))
    for i, (n, size) in enumerate(zip(pieces, sizes, strict=True)):
        step = partial(lambda size, piece, carry: work(piece * size, size, carry), size)
        carry = jax.lax.fori_loop(0, jnp.where(cheapest == i, n, 0), step, carry)
    return carry


def _some(tree: Any, first: Array, count: int) -> Any:
    """Returns `count` targets' part of a tree with a leading target axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), tree)


def _put(tree: Any, part: Any, first: Array) -> Any:
    """Undoes `_some`."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, first, 0), tree, part)


class _Here(NamedTuple):
    """One block's part of a replacement, and its modulations."""

    block: DoubleBlock
    mod: Streams
    frozen: Frozen
    sites: Streams
    values: Streams
    errors: Streams


def _block_at(record: Record, sites: Streams, sources: Sources, layer: Array) -> _Here:
    block, frozen, values, errors = jax.tree.map(
        lambda leaf: leaf[layer], (record.blocks, record.frozen, sources.values, sources.errors)
    )
    slices = both(lambda s: Sites(s.stack, jax.tree.map(lambda leaf: leaf[layer], s.layers)), sites)
    return _Here(block, modulations(block, record.cond.vec), frozen, slices, values, errors)


def _puller(here: _Here, cond: Cond) -> Callable[[Streams], Streams]:
    """Returns the pull-back of one target's cotangents through a block; what all targets share is computed here."""

    def forward(h: Streams) -> Streams:
        return here.block(h, cond, frozen=here.frozen, mlp=lambda _, x: both(_skip, here.sites, x))[0]

    # The map is affine: any point will do.
    origin = both(jnp.zeros_like, here.errors)
    _, pull = jax.vjp(forward, origin)
    return lambda cotangent: pull(cotangent)[0]


def _skip(sites: Sites, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
    """Returns what takes the one path through an MLP sublayer that is not a feature: a transcoder's skip."""
    if sites.stack is None or not sites.stack.config.skip:
        return jnp.zeros_like(x)
    return jnp.where(sites.layers.live[:, None], site(sites.stack, sites.layers.slot).skip(x), 0)


def _contract_block(
    here: _Here, edges: Array, corner: tuple[Array, Array], cotangent: Streams, count: int
) -> Float[Array, "target source"]:
    """Writes the edges that come from one block's features and errors into `count` targets."""
    row, column = corner
    gates = both(lambda mod: mod[5], here.mod)
    for sites, values, written, gate in zip(here.sites, here.values, cotangent, gates, strict=True):
        if sites.stack is not None:
            decoder, layers = sites.stack.dec.kernel[...], sites.layers
            edges = contract(edges, (row, column), decoder, layers.slot, layers.index, values, written, gate, count)
        column += values.size
    from_errors = both(lambda c, e, gate: _dot_rows(row, count, c, gate[None, :] * e), cotangent, here.errors, gates)
    return jax.lax.dynamic_update_slice(edges, jnp.concatenate(from_errors, axis=1), (row, column))


def _dot_rows(
    first: Array, count: int, cotangent: Float[Array, "target rows d_model"], vectors: Float[Array, "rows d_model"]
) -> Float[Array, "some rows"]:
    """Returns the product of each row with its vector, for `count` targets."""
    if jax.default_backend() != "cpu":
        return jnp.sum(_some(cotangent, first, count) * vectors[None], axis=2)
    # One target at a time stays in the cache, and a product with ones is vectorised where a sum over columns is not.
    ones = jnp.ones(vectors.shape[1], vectors.dtype)
    return jax.lax.map(lambda target: (cotangent[target] * vectors) @ ones, first + jnp.arange(count, dtype=jnp.int32))


def target_gradients(record: Record, sites: Streams, targets: Targets) -> Float[Array, "target d_model"]:
    """Returns g = (1 + alpha) * w_f of every target."""
    rows = [_encoder_rows(s, record, targets)[0] for s in sites]
    return jnp.where((targets.stream == 0)[:, None], rows[0], rows[1])


def preactivations(replacement: Replacement, targets: Targets, x: Streams) -> Float[Array, "target"]:
    """Returns u of every target.

    Args:
        replacement: from `prepare`.
        targets: which features.
        x: inputs of the MLP sublayers: the record's, or the affine map's at any sources.
    """
    with jax.default_matmul_precision("highest"):
        return preactivations_at(replacement.record, replacement.sites, targets, x)


@jax.jit
def preactivations_at(record: Record, sites: Streams, targets: Targets, x: Streams) -> Array:
    """Returns what `preactivations` does, from the parts of a replacement; for use inside other programs."""
    gradients, here, constant = _encoder_terms(record, sites, targets, x)
    return jnp.sum(gradients * here, axis=1) + constant


def exact_preactivations(replacement: Replacement, targets: Targets, x: Streams) -> Float64[np.ndarray, "target"]:
    """Returns what `preactivations` does, summed in float64: u may be far larger than what edges explain."""
    terms = _terms(replacement.record, replacement.sites, targets, x)
    gradients, here, constant = (np.asarray(term, np.float64) for term in terms)
    return np.sum(gradients * here, axis=1) + constant


def _encoder_terms(record: Record, sites: Streams, targets: Targets, x: Streams) -> tuple[Array, Array, Array]:
    """Returns (1 + alpha) * w_f, x, and b_f + w_f . beta of every target: u = the first times the second + the last."""
    found = []
    for stream, rows in zip(sites, x, strict=True):
        gradients, constant = _encoder_rows(stream, record, targets)
        found.append((gradients, rows.at[targets.layer, targets.position].get(mode="clip"), constant))
    first = targets.stream == 0
    gradients, here, constant = (
        jnp.where(first[:, None] if a.ndim == 2 else first, a, b) for a, b in zip(*found, strict=True)
    )
    return gradients, here, constant


_terms = jax.jit(_encoder_terms)


def _encoder_rows(
    sites: Sites, record: Record, targets: Targets
) -> tuple[Float[Array, "target d_model"], Float[Array, "target"]]:
    """Returns (1 + alpha) * w_f, and b_f + w_f . beta, of every target as if it were of this stream."""
    if sites.stack is None:
        none = jnp.zeros((targets.layer.shape[0], record.boundary.img.shape[1]), record.boundary.img.dtype)
        return none, none[:, 0]
    stack: Transcoder = sites.stack
    alpha, beta = jax.vmap(lambda slot: site(stack, slot).scale_shift(record.t))(sites.layers.slot)
    slot = sites.layers.slot[targets.layer]
    vectors = stack.enc.kernel[slot, :, targets.feature]
    assert stack.enc.bias is not None
    constant = stack.enc.bias[slot, targets.feature] + jnp.sum(vectors * beta[targets.layer], axis=1)
    return vectors * (1 + alpha[targets.layer]), constant


def push_forward(replacement: Replacement, change: Sources) -> Streams:
    """Returns how every MLP sublayer's input moves when the sources move: J change, `jax.linearize`'s map.

    Args:
        replacement: from `prepare`.
        change: of the sources, in their own units.
    """
    with jax.default_matmul_precision("highest"):
        return _push_forward(*replacement, change)


@jax.jit
def _push_forward(record: Record, sites: Streams, sources: Sources, change: Sources) -> Any:
    _, push = jax.linearize(partial(run, record, sites), sources)
    return push(change)
