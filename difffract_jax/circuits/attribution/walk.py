"""The walk of cotangents down through a stack of blocks, and the edges met on the way (docs/method.md, section 4).

Targets come sorted by where they enter, highest first: at every block the first so many have begun, and only they take
part. They go through in pieces that fit a processor's cache, of sizes chosen by how many there are:

1. `contract_block`: cotangents of the residual stream leaving a block, times its gate, meet the decoder vectors of the
   features that are active there, and the errors. These are edges, written into place.
2. The block's pull-back, `jax.vjp` of the frozen block at any point, vectorised over the targets of a piece. What all
   targets share, the attention pattern first of all, is computed once per block.
3. Targets of this block enter, as the block says (`models.blocks.Block.entry`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.attribution.contraction import contract, gather_bytes
from difffract_jax.circuits.frozen.encoding import ReplacedSites, site
from difffract_jax.circuits.frozen.replacement import Sources
from difffract_jax.circuits.frozen.targets import Targets
from difffract_jax.circuits.trace.record import Record
from difffract_jax.models.blocks import Cond, Entry
from difffract_jax.models.stacks import slice_layer
from difffract_jax.spread import in_step, spread, whole

PULL_BYTES = 2**20
"""Cotangents pulled through a block at a time: few enough for a processor's cache; accelerators take them all."""
PULL_TOGETHER = 8
"""Targets pulled through a block together at least, where each such piece computes the attention pattern once more."""
CONTRACT_TARGETS = 64
"""Targets at most for which gathered decoder vectors are used together."""
CONTRACT_STEP = 10
"""How the sizes of pieces for the contraction rise, each compiled: so many targets at most are computed for nothing."""
PIECE_COST = 10
"""What a piece costs in any case, above all its gathered decoder vectors, in targets."""


class Sizes(NamedTuple):
    """How many targets go through which part of the program together; no piece reaches past the batch.

    Attributes:
        pull: through the pull-back of a block.
        enter: into the walk.
        contract: through the contraction with decoder vectors, one of these, ascending, by how many have begun. The
            last divides the batch, so that smaller ones that would reach past it cost more and are not chosen.
        batch: through the program, filled up; a multiple of `pull` and `enter`.
        gather: bytes of decoder vectors gathered at a time.
    """

    pull: int
    enter: int
    contract: tuple[int, ...]
    batch: int
    gather: int


def sizes_for(targets: int, cotangent_bytes: int, platform: str, *, blockwise: bool = False) -> Sizes:
    """Divides a number of targets.

    Args:
        targets: how many there are.
        cotangent_bytes: of one target.
        platform: that the program is for, as `jax.default_backend()` tells: `cpu`, `gpu` or `tpu`.
        blockwise: whether attention patterns are too large to be held; see `ops.attend`.

    Example:
        >>> sizes_for(50, 320 * 512 * 4, "cpu")
        Sizes(pull=1, enter=5, contract=(1, 10, 20, 30, 40, 50), batch=50, gather=131072)
    """
    most = _ceil(targets, _ceil(targets, CONTRACT_TARGETS))
    batch = most * _ceil(targets, most)
    few = _divisor(most, max(1, most // 8))
    fitting = max(PULL_TOGETHER if blockwise else 1, PULL_BYTES // cotangent_bytes)
    pull = _divisor(most, fitting) if platform == "cpu" else most
    contract = tuple(sorted({1, *range(CONTRACT_STEP, most, CONTRACT_STEP), most}))
    return Sizes(pull, few, contract, batch, gather_bytes(platform))


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor up to `most`."""
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class BlockAt(NamedTuple):
    """One block in the walk; tuples have an entry per group of the block's stack.

    Attributes:
        sites: its sites.
        values: of their features, [rows active].
        errors: of the sites, [rows d_model].
        gates: factor between a site's output and the residual stream.
        pull: pulls one target's cotangents back through the block, one [rows d_model] per group.
        enter: gradients, groups and rows of targets of this block to cotangents of the residual streams entering it.
    """

    sites: tuple[ReplacedSites, ...]
    values: tuple[Array, ...]
    errors: tuple[Array, ...]
    gates: tuple[Array, ...]
    pull: Callable[[tuple[Array, ...]], tuple[Array, ...]]
    enter: Entry


def block_at(
    record: Record, sites: Sequence[ReplacedSites], sources: Sources, stack: int, groups: slice, layer: Array
) -> BlockAt:
    """Returns a block of the walk.

    Args:
        record: the trace's arrays.
        sites: per group.
        sources: at the traced point.
        stack: number of the stack.
        groups: the stack's among all groups.
        layer: counted from the stack's first recorded block.
    """
    parts = record.weights.stacks[stack], record.frozen[stack], sources.values[groups], sources.errors[groups]
    at = tuple(ReplacedSites(one.stack, slice_layer(one.layers, layer)) for one in sites[groups])
    return block_of(record.cond, at, *slice_layer(parts, layer))


def block_of(
    cond: Cond,
    sites: tuple[ReplacedSites, ...],
    block: Any,
    frozen: Any,
    values: tuple[Array, ...],
    errors: tuple[Array, ...],
) -> BlockAt:
    """Returns a block of the walk from its own parts.

    Args:
        cond: what the evaluation's blocks share.
        sites: per group of the stack, of this block.
        block: its weights.
        frozen: its record.
        values: of its features, [rows active] per group.
        errors: of its sites, [rows d_model] per group.
    """

    def forward(h: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(block(h, cond, frozen=frozen, mlp=lambda i, x: skip(sites[i], x))[0])

    gates, entry = block.gates(cond, frozen), block.entry(cond, frozen)
    return BlockAt(sites, values, errors, gates, _puller(forward, errors), entry)


def _puller(forward: Callable[..., Any], like: tuple[Array, ...]) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
    # The map is affine: any point will do. What all targets share is computed here.
    _, pull = jax.vjp(forward, tuple(jnp.zeros_like(rows) for rows in like))
    return lambda cotangent: pull(cotangent)[0]


def skip(sites: ReplacedSites, x: Float[Array, "rows d_model"]) -> Float[Array, "rows d_model"]:
    """Returns what takes the one path through an MLP sublayer that is not a feature: a transcoder's skip."""
    if sites.stack is None or not sites.stack.config.skip:
        return jnp.zeros_like(x)
    return jnp.where(sites.layers.live[:, None], site(sites.stack, sites.layers.slot).skip(x), 0)


class Stretch(NamedTuple):
    """A stack's layers in the walk.

    Attributes:
        first: the stack's first layer, counted through all recorded layers.
        layers: how many there are.
        first_group: number of the stack's first group.
        begin: place of its first edge.
        per_layer: places of a layer.
        at: from a layer, counted from the stack's first, to the block there.
    """

    first: int
    layers: int
    first_group: int
    begin: int
    per_layer: int
    at: Callable[[Array], BlockAt]

    def clear(self, edges: Float[Array, "target source"]) -> Float[Array, "target source"]:
        """Zeroes the stack's edges, layer by layer, in place."""
        none = jnp.zeros((edges.shape[0], self.per_layer), edges.dtype)

        def one(layer: Array, edges: Array) -> Array:
            return jax.lax.dynamic_update_slice(edges, none, (0, self.begin + layer * self.per_layer))

        return jax.lax.fori_loop(0, self.layers, one, edges)


def walk(
    stretch: Stretch,
    top: Array,
    edges: Float[Array, "target source"],
    cotangent: tuple[Array, ...],
    targets: Targets,
    gradients: Float[Array, "target d_model"],
    sizes: Sizes,
) -> tuple[Array, tuple[Array, ...]]:
    """Walks the layers below `top` down to the stack's first.

    Args:
        stretch: which layers.
        top: layer after the first to walk.
        edges: to write into.
        cotangent: of the residual streams, [target rows d_model] per group of the stack.
        targets: highest first.
        gradients: of each target.
        sizes: of the pieces.

    Returns:
        The edges, and the cotangents of the residual streams entering the stack.
    """

    def step(i: Array, carry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, tuple[Array, ...]]:
        layer = top - 1 - i
        block = stretch.at(layer - stretch.first)
        column = stretch.begin + (layer - stretch.first) * stretch.per_layer
        return walk_block(block, layer, column, stretch.first_group, *carry, targets, gradients, sizes)

    return jax.lax.fori_loop(0, top - stretch.first, step, (edges, cotangent))


def walk_block(
    block: BlockAt,
    layer: Array,
    column: Array,
    first_group: int,
    edges: Float[Array, "target source"],
    cotangent: tuple[Array, ...],
    targets: Targets,
    gradients: Float[Array, "target d_model"],
    sizes: Sizes,
) -> tuple[Array, tuple[Array, ...]]:
    """Walks one block; arguments and results as for `walk`.

    Args:
        block: the block.
        layer: counted through all recorded layers.
        column: place of its first edge.
        first_group: number of its stack's first group.
        edges: to write into.
        cotangent: of the residual streams leaving the block.
        targets: highest first.
        gradients: of each target.
        sizes: of the pieces.
    """
    enters = targets.enters

    def contract_some(first: Array, count: int, edges: Array) -> Array:
        return contract_block(block, edges, (first, column), cotangent, count, sizes.gather)

    def through(first: Array, count: int, cotangent: tuple[Array, ...]) -> tuple[Array, ...]:
        return _put(cotangent, jax.vmap(block.pull)(_some(cotangent, first, count)), first)

    def enter_some(piece: Array, cotangent: tuple[Array, ...]) -> tuple[Array, ...]:
        first = piece * sizes.enter
        some, gradient, before = _some((targets, gradients, cotangent), first, sizes.enter)
        own = jnp.where((some.layer == layer)[:, None], gradient, 0)
        entered = block.enter(own, some.group - first_group, some.position)
        return _put(cotangent, jax.tree.map(jnp.add, before, entered), first)

    own, begin = (jnp.sum(enters > 2 * layer + after, dtype=jnp.int32) for after in (1, 0))
    begun, begin, waiting = in_step(jnp.stack([own, begin, -own]))
    done, edges = _in_pieces(begun, sizes.contract, contract_some, edges)
    # The pull-back writes over what the contraction reads. XLA orders by data alone, and where nothing says which
    # comes first, it copies all cotangents: hence the number to pull back comes out of the contraction.
    _, cotangent = _in_pieces(jnp.minimum(begun, done), (sizes.pull,), through, cotangent)
    last = (begin + sizes.enter - 1) // sizes.enter
    cotangent = jax.lax.fori_loop(-waiting // sizes.enter, last, enter_some, cotangent)
    return edges, tuple(spread(rows, 2, 1) for rows in cotangent)


def _in_pieces(
    targets: Array, sizes: tuple[int, ...], work: Callable[[Array, int, Any], Any], carry: Any
) -> tuple[Array, Any]:
    """Does `work(first, size, carry)` on the first so many targets, in pieces of the size that costs least.

    Returns:
        How many targets the pieces came to, and the carry.
    """
    pieces = [(targets + size - 1) // size for size in sizes]
    cheapest = jnp.argmin(jnp.stack([n * (size + PIECE_COST) for n, size in zip(pieces, sizes, strict=True)]))
    done = jnp.int32(0)
    for i, (n, size) in enumerate(zip(pieces, sizes, strict=True)):
        step = partial(lambda size, _, at: (at[0] + size, work(at[0], size, at[1])), size)
        done, carry = jax.lax.fori_loop(0, jnp.where(cheapest == i, n, 0), step, (done, carry))
    return done, carry


def _some(tree: Any, first: Array, count: int) -> Any:
    """Returns `count` targets' part of a tree with a leading target axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), tree)


def _put(tree: Any, part: Any, first: Array) -> Any:
    """Undoes `_some`."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, first, 0), tree, part)


def contract_block(
    block: BlockAt,
    edges: Float[Array, "target source"],
    corner: tuple[Array, Array],
    cotangent: tuple[Array, ...],
    count: int,
    gather: int,
) -> Float[Array, "target source"]:
    """Writes the edges that come from one block's features and errors into `count` targets.

    Args:
        block: the block.
        edges: rows to write into.
        corner: first row, and the block's first column.
        cotangent: of the residual streams leaving the block, all targets'.
        count: of targets, from the corner's row on.
        gather: bytes of decoder vectors gathered at a time.
    """
    row, column = corner
    for sites, values, written, gate in zip(block.sites, block.values, cotangent, block.gates, strict=True):
        if sites.stack is not None:
            decoder, layers = sites.stack.dec.kernel[...], sites.layers
            place = layers.slot, whole(layers.decoder_rows), whole(values)
            edges = contract(edges, (row, column), decoder, *place, written, gate, count, gather)
        column += values.size
    from_errors = [
        dot_rows(row, count, c, gate[None, :] * error)
        for c, error, gate in zip(cotangent, block.errors, block.gates, strict=True)
    ]
    return jax.lax.dynamic_update_slice(edges, jnp.concatenate(from_errors, axis=1), (row, column))


def dot_rows(
    first: Array, count: int, cotangent: Float[Array, "target rows d_model"], vectors: Float[Array, "rows d_model"]
) -> Float[Array, "some rows"]:
    """Returns the product of each row with its vector, for `count` targets.

    Args:
        first: of the targets.
        count: of targets.
        cotangent: all targets' rows.
        vectors: one per row.
    """

    def one_by_one(first: Array, cotangent: Array, vectors: Array) -> Array:
        # One target at a time stays in the cache; a product with ones is vectorised where a sum over columns is not.
        ones = jnp.ones(vectors.shape[1], vectors.dtype)
        numbers = first + jnp.arange(count, dtype=jnp.int32)
        products = lambda target: jnp.matmul(cotangent[target] * vectors, ones, precision="highest")  # noqa: E731
        return jax.lax.map(products, numbers)

    def together(first: Array, cotangent: Array, vectors: Array) -> Array:
        return jnp.sum(_some(cotangent, first, count) * vectors[None], axis=2)

    return jax.lax.platform_dependent(first, cotangent, vectors, cpu=one_by_one, default=together)
