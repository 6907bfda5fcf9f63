"""Edges by pull-back: the incoming edges of many targets at once, exactly (METHOD section 4).

A feature's pre-activation is u = g . x + c at its site and position, with g = (1 + alpha) * w_f. From the highest
target's block downwards:

1. Add g to the cotangent of x for the targets that lie in this block.
2. The cotangent of the MLP sublayer's output y is its gate times that of the residual stream. Contract it with the
   decoder vectors of the features that can be sources there, times their values, and with the error: these are edges.
3. Pull the cotangents through the frozen block with `jax.vjp`, vectorised over targets. The attention pattern is
   recomputed once per block for all of them.

A target may also be a direction: of the velocity, which is pulled through the last norm and projection first, or of the
residual stream entering a block. Single-stream blocks are walked first, on the joint sequence, then the double-stream
ones. What is left below the last block is the cotangent of h0; `input_edges` contracts it with h0.

The number of blocks walked is an argument of the compiled program, not a shape: targets in low blocks cost less and
compile nothing new. Targets are sorted by where they enter, highest first, and walked in pieces: at every block only
those pieces that have begun take part. Pieces are small enough for a processor's cache; see `Sizes`.

A row of edges has one place per source, in this order: for each double-stream block the features of the image stream
(position by position, K each), those of the text stream, the errors of both; for each single-stream block the features
of the joint sequence and its errors; after all blocks, the inputs of both streams. `Layout` knows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from difffract_jax.circuits.readout import Targets, target_gradients
from difffract_jax.circuits.record import Reading, Record
from difffract_jax.circuits.replacement import Replacement, Sites, Sources, run, site
from difffract_jax.models.blocks import (
    DoubleBlock,
    Frozen,
    Groups,
    SingleBlock,
    SingleFrozen,
    Streams,
    both,
)

GATHER_BYTES = 2**20
"""Decoder vectors gathered at a time: few enough to stay in a processor's cache until they have been used."""
PULL_BYTES = 2**22
"""Cotangents pulled through a block at a time on a processor, likewise; accelerators take them all."""
CONTRACT_TARGETS = 32
"""Targets at most for which gathered decoder vectors are used together."""


class Layout(NamedTuple):
    """Where the edges of which sources stand in a row.

    Attributes:
        layers: number of double- and of single-stream layers.
        rows: positions of each group.
        active: places for features per position, of each group.
    """

    layers: tuple[int, int]
    rows: Groups
    active: Groups

    @property
    def per_layer(self) -> tuple[int, int]:
        """Places of a double- and of a single-stream layer, errors included."""
        img, txt, joint = (rows * (active + 1) for rows, active in zip(self.rows, self.active, strict=True))
        return img + txt, joint

    @property
    def inputs(self) -> int:
        """The place where the inputs begin."""
        return sum(count * size for count, size in zip(self.layers, self.per_layer, strict=True))

    @property
    def size(self) -> int:
        """Places in a row."""
        return self.inputs + self.rows.img + self.rows.txt


def layout_of(sources: Sources) -> Layout:
    """Returns the layout of rows over these sources."""
    shapes = [values.shape for values in sources.values]
    return Layout(
        (shapes[0][0], shapes[2][0]), Groups(*(shape[1] for shape in shapes)), Groups(*(shape[2] for shape in shapes))
    )


class Sizes(NamedTuple):
    """How many targets go through which part of the program together; each divides the next.

    Attributes:
        pull: through the pull-back of a block.
        contract: through the contraction with decoder vectors.
        batch: through the program, filled up.
    """

    pull: int
    contract: int
    batch: int


def sizes_for(targets: int, cotangent_bytes: int, backend: str) -> Sizes:
    """Divides a number of targets.

    Args:
        targets: how many there are.
        cotangent_bytes: of one target.
        backend: of JAX, as in `jax.default_backend()`.

    Example:
        >>> sizes_for(50, 320 * 512 * 4, "cpu")
        Sizes(pull=5, contract=25, batch=50)
    """
    contract = _ceil(targets, _ceil(targets, CONTRACT_TARGETS))
    most = max(1, PULL_BYTES // cotangent_bytes) if backend == "cpu" else contract
    pieces = _ceil(contract, min(most, contract))
    pull = _ceil(contract, pieces)
    contract = pull * pieces
    return Sizes(pull, contract, contract * _ceil(targets, contract))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Pulled(NamedTuple):
    """Targets pulled back through all recorded blocks.

    Attributes:
        edges: attributions of every feature and error, in the order of `Layout`; without the inputs.
        boundary: cotangents of h0.
    """

    edges: Float[Array, "target source"]
    boundary: Streams


def pull_back(
    replacement: Replacement, targets: Targets, direction: Float[Array, "target img outputs"] | None = None
) -> Float[Array, "target source"]:
    """Returns the attribution of every source to every target, value(source) * d u(target) / d value(source).

    Args:
        replacement: from `prepare`.
        targets: as many as shall be computed together; each number of them is compiled once.
        direction: of the velocity, for targets that are directions; zeros for features.
    """
    pulled = pull(replacement, targets, None if direction is None else velocity_cotangent(replacement, direction))
    return jnp.concatenate([pulled.edges, input_edges(pulled.boundary, replacement.sources.boundary)], axis=1)


def pull(
    replacement: Replacement, targets: Targets, direction: Float[Array, "target seq d_model"] | None = None
) -> Pulled:
    """Pulls targets back through the recorded blocks.

    Args:
        replacement: from `prepare`.
        targets: as for `pull_back`.
        direction: cotangents of the joint residual stream where each direction enters; zeros for features. All
            directions enter at one layer, and no feature lies above.
    """
    count, boundary = targets.layer.shape[0], replacement.record.boundary
    sizes = sizes_for(count, sum(h.nbytes for h in boundary), jax.default_backend())
    # Highest first: then those that have begun at any block are the first so many.
    order = jnp.argsort(-targets.enters, stable=True)
    more = sizes.batch - count
    filled = jax.tree.map(lambda column: jnp.pad(column[order], (0, more), constant_values=-1), targets)
    if direction is not None:
        direction = jnp.pad(direction[order], ((0, more), (0, 0), (0, 0)))
    with jax.default_matmul_precision("highest"):
        pulled = _pull_back(*replacement, filled, direction, sizes)
    if bool(jnp.all(order == jnp.arange(count))) and not more:
        return pulled
    back = jnp.argsort(order)
    return jax.tree.map(lambda leaf: leaf[back], pulled)


@jax.jit
def input_edges(cotangent: Streams, boundary: Streams) -> Float[Array, "target rows"]:
    """Returns the edges of the residual streams entering the first block, image first."""
    with jax.default_matmul_precision("highest"):
        return jnp.concatenate(both(lambda c, h: jnp.einsum("tsm,sm->ts", c, h), cotangent, boundary), axis=1)


def velocity_cotangent(
    replacement: Replacement, direction: Float[Array, "target img outputs"]
) -> Float[Array, "target seq d_model"]:
    """Pulls directions of the velocity back to the joint residual stream leaving the last block.

    Args:
        replacement: of a trace that records the velocity.
        direction: on velocities.
    """
    with jax.default_matmul_precision("highest"):
        return _velocity_cotangent(replacement.record, direction)


@jax.jit
def _velocity_cotangent(record: Record, direction: Array) -> Array:
    final, boundary = record.weights.final, record.boundary
    assert final is not None
    _, pull_final = jax.vjp(lambda h: final(h, record.cond, record.inv_std), boundary.img)
    return jnp.pad(jax.vmap(pull_final)(direction)[0], ((0, 0), (boundary.txt.shape[0], 0), (0, 0)))


@partial(jax.jit, static_argnames="sizes")
def _pull_back(
    record: Record, sites: Groups, sources: Sources, targets: Targets, direction: Array | None, sizes: Sizes
) -> Pulled:
    layout = layout_of(sources)
    gradients = target_gradients(record, sites, targets)
    text_tokens, dtype = sources.boundary.txt.shape[0], gradients.dtype
    double, single = layout.layers
    cotangent = both(lambda h: jnp.zeros((sizes.batch, *h.shape), dtype), sources.boundary)
    top = (targets.enters[0] + 1) // 2  # layers to walk: those below where the first target enters, and its own
    edges = jnp.zeros((sizes.batch, layout.inputs), dtype)
    walk = partial(_walk, targets=targets, gradients=gradients, sizes=sizes)
    if direction is not None:
        cotangent = both(jnp.add, cotangent, _split_targets(direction, text_tokens))
    if single:
        per_layer = (record.weights.single, record.frozen_single, sources.values.joint, sources.errors.joint)
        stack = _Stack(double, double * layout.per_layer[0], layout.per_layer[1], (2,))

        def single_layer(layer: Array) -> tuple[Any, Any]:
            block, frozen, values, errors = jax.tree.map(lambda leaf: leaf[layer - double], per_layer)
            here = (_sites_at(sites.joint, layer - double),)
            return partial(_pull_single, block, frozen, record, here), (here, (values,), (errors,))

        joint = (jnp.concatenate([cotangent.txt, cotangent.img], axis=1),)
        edges, joint = walk(stack, jnp.maximum(top, double), single_layer, edges, joint)
        cotangent = _split_targets(joint[0], text_tokens)
    if double:
        here_too = (record.weights.double, record.frozen, *(Streams(s.img, s.txt) for s in sources[1:]))
        stack = _Stack(0, 0, layout.per_layer[0], (0, 1))

        def double_layer(layer: Array) -> tuple[Any, Any]:
            block, frozen, values, errors = jax.tree.map(lambda leaf: leaf[layer], here_too)
            here = both(lambda s: _sites_at(s, layer), Streams(sites.img, sites.txt))
            return partial(_pull_double, block, frozen, record, here), (here, values, errors)

        edges, cotangent = walk(stack, jnp.minimum(top, double), double_layer, edges, cotangent)
    return Pulled(edges, cotangent)


def _sites_at(sites: Sites, layer: Array) -> Sites:
    return Sites(sites.stack, jax.tree.map(lambda leaf: leaf[layer], sites.layers))


def _split_targets(joint: Float[Array, "target seq d_model"], text_tokens: int) -> Streams:
    return Streams(joint[:, text_tokens:], joint[:, :text_tokens])


class _Stack(NamedTuple):
    """A run of like layers in the walk.

    Attributes:
        first: its first layer.
        begin: place of its first edge.
        per_layer: places of a layer.
        groups: of its sites.
    """

    first: int
    begin: int
    per_layer: int
    groups: tuple[int, ...]


def _walk(
    stack: _Stack,
    top: Array,
    layer_of: Any,
    edges: Array,
    cotangent: Any,
    targets: Targets,
    gradients: Array,
    sizes: Sizes,
) -> tuple[Array, Any]:
    """Walks the layers below `top` down to the stack's first.

    Args:
        stack: which layers.
        top: layer after the first to walk.
        layer_of: from a layer to how it pulls back, and to its sites, values and errors.
        edges: to write into.
        cotangent: of the residual streams, one array per group.
        targets: highest first.
        gradients: of each target.
        sizes: of the pieces.
    """
    enters = targets.enters

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        edges, cotangent = carry
        layer = top - 1 - i
        pull_layer, (here, values, errors) = layer_of(layer)

        def contract(piece: Array, edges: Array) -> Array:
            first = piece * sizes.contract
            some = _some(cotangent, first, sizes.contract)
            written = pull_layer(some, jax.tree.map(jnp.zeros_like, some))[1]
            found = [contract_sites(*parts) for parts in zip(here, values, errors, written, strict=True)]
            row = jnp.concatenate([*(f[0] for f in found), *(f[1] for f in found)], axis=1)
            return jax.lax.dynamic_update_slice(
                edges, row, (first, stack.begin + (layer - stack.first) * stack.per_layer)
            )

        def through(piece: Array, cotangent: Any) -> Any:
            first = piece * sizes.pull
            (some, gradient), mine = _some((targets, gradients), first, sizes.pull), _some(cotangent, first, sizes.pull)
            at = jnp.where(some.layer == layer, 1, 0).astype(gradient.dtype)[:, None] * gradient
            into = [_scatter(at, some, group, c.shape) for group, c in zip(stack.groups, mine, strict=True)]
            pulled = pull_layer(mine, jax.tree.unflatten(jax.tree.structure(mine), into))[0]
            return jax.tree.map(lambda c, new: jax.lax.dynamic_update_slice_in_dim(c, new, first, 0), cotangent, pulled)

        begun, begin = (jnp.sum(enters > 2 * layer + after, dtype=jnp.int32) for after in (1, 0))
        edges = jax.lax.fori_loop(0, (begun + sizes.contract - 1) // sizes.contract, contract, edges)
        return edges, jax.lax.fori_loop(0, (begin + sizes.pull - 1) // sizes.pull, through, cotangent)

    return jax.lax.fori_loop(0, top - stack.first, step, (edges, cotangent))


def _some(tree: Any, first: Array, count: int) -> Any:
    """Returns `count` targets' part of a tree with a leading target axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), tree)


def _scatter(
    gradients: Float[Array, "target d_model"], targets: Targets, group: int, shape: tuple[int, ...]
) -> Float[Array, "target rows d_model"]:
    """Puts each target's gradient at its position, if it is of this group."""
    mine = jnp.where(targets.group == group, 1, 0).astype(gradients.dtype)[:, None] * gradients
    return jnp.zeros(shape, gradients.dtype).at[jnp.arange(shape[0]), targets.position].set(mine, mode="drop")


def _pull_double(
    block: DoubleBlock, frozen: Frozen, record: Record, sites: Streams, cotangent: Streams, into: Streams
) -> tuple[Streams, Streams]:
    """Pulls cotangents of (residual stream after the block, x) back to (residual stream before it, y)."""

    def forward(h: Streams, y: Streams) -> tuple[Streams, Streams]:
        h, acts = block(h, record.cond, frozen=frozen, mlp=lambda _, x: both(add_skip, sites, y, x))
        return h, acts.mlp_in

    return _pull_affine(forward, cotangent, into)


def _pull_single(
    block: SingleBlock,
    frozen: SingleFrozen,
    record: Record,
    sites: tuple[Sites],
    cotangent: tuple[Array],
    into: tuple[Array],
) -> tuple[tuple[Array], tuple[Array]]:
    """Does what `_pull_double` does, on the joint sequence."""

    def forward(h: tuple[Array], y: tuple[Array]) -> tuple[tuple[Array], tuple[Array]]:
        after, acts = block(h[0], record.cond, frozen=frozen, mlp=lambda _, x: add_skip(sites[0], y[0], x))
        return (after,), (acts.mlp_in,)

    return _pull_affine(forward, cotangent, into)


def _pull_affine(forward: Any, cotangent: Any, into: Any) -> Any:
    # The map is affine: any point will do.
    origin = jax.tree.map(lambda c: jnp.zeros(c.shape[1:], c.dtype), cotangent)
    _, pull_one = jax.vjp(forward, origin, origin)
    return jax.vmap(pull_one)((cotangent, into))


def add_skip(
    sites: Sites, y: Float[Array, "rows d_model"], x: Float[Array, "rows d_model"]
) -> Float[Array, "rows d_model"]:
    """Adds the one path through an MLP sublayer that is not a feature: a transcoder's skip."""
    if sites.stack is None or not sites.stack.config.skip:
        return y
    skip = site(sites.stack, sites.layers.slot).skip
    return y + jnp.where(sites.layers.live[:, None], skip(x), 0)


def contract_sites(
    sites: Sites,
    values: Float[Array, "rows active"],
    errors: Float[Array, "rows d_model"],
    written: Float[Array, "target rows d_model"],
) -> tuple[Float[Array, "target places"], Float[Array, "target rows"]]:
    """Returns the edges of one stream's features and errors in one block."""
    from_errors = jnp.einsum("tsm,sm->ts", written, errors)
    if sites.stack is None:
        return jnp.zeros((written.shape[0], 0), written.dtype), from_errors

    def position(places: tuple[Array, Array, Array]) -> Float[Array, "target active"]:
        index, value, cotangent = places
        vectors = decoder[sites.layers.slot, index]
        return jnp.einsum("tm,km->tk", cotangent, vectors) * value[None, :]

    decoder = sites.stack.dec.kernel[...]
    per_position = values.shape[1] * decoder.shape[2] * decoder.dtype.itemsize
    chunk = max(1, min(values.shape[0], GATHER_BYTES // per_position))
    by_position = (sites.layers.index, values, written.transpose(1, 0, 2))
    found = jax.lax.map(position, by_position, batch_size=chunk if chunk > 1 else None)
    return found.transpose(1, 0, 2).reshape(written.shape[0], -1), from_errors


def push_forward(replacement: Replacement, change: Sources) -> Reading:
    """Returns how all that the affine map gives moves with the sources: J change, `jax.linearize`'s map.

    Args:
        replacement: from `prepare`.
        change: of the sources, in their own units.
    """
    with jax.default_matmul_precision("highest"):
        return _push_forward(*replacement, change)


@jax.jit
def _push_forward(record: Record, sites: Groups, sources: Sources, change: Sources) -> Any:
    _, push = jax.linearize(partial(run, record, sites), sources)
    return push(change)
