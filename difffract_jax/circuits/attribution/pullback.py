"""Edges by pull-back: the incoming edges of many targets at once, exactly (docs/method.md, section 4).

A feature's pre-activation is u = g . x + c at its site and position, with g = (1 + alpha) * w_f. From the highest
target's block downwards:

1. The cotangent of the MLP sublayer's output y is its gate times that of the residual stream. Contract it with the
   decoder vectors of the features that can be sources there, times their values, and with the error: these are edges.
2. Pull the cotangents through the frozen block with `jax.vjp`, vectorised over targets. The attention pattern is
   recomputed once per block for all of them.
3. Let the targets that lie in this block enter: g at their position, pulled to the residual streams before the block.

A target may also be a direction: of the velocity, which is pulled through the last norm and projection first, or of the
residual streams entering a block. The stacks are walked from the last to the first, each on its own sequences. What is
left below the last block is the cotangent of h0; `input_edges` contracts it with h0.

The number of blocks walked is an argument of the compiled program, not a shape: targets in low blocks cost less and
compile nothing new. `walk` has the way through the blocks.

A row of edges has one place per source, in this order: block by block, stack after stack, the features of each group
(position by position, K each), then the errors of each group; after all blocks, the inputs of both streams.
`RowLayout` knows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from difffract_jax.circuits.attribution.contraction import gather_bytes
from difffract_jax.circuits.attribution.layerwise import goes_layerwise, pull_layerwise
from difffract_jax.circuits.attribution.rounding import rounded
from difffract_jax.circuits.attribution.walk import Sizes, Stretch, block_at, dot_rows, sizes_for, walk
from difffract_jax.circuits.frozen.encoding import ReplacedSites
from difffract_jax.circuits.frozen.replacement import Replacement, Sources, run_replacement
from difffract_jax.circuits.frozen.targets import Targets, target_gradients
from difffract_jax.circuits.trace.record import Record, RunOutputs
from difffract_jax.models.blocks import Streams, both
from difffract_jax.models.stacks import group_slices, sequences, streams
from difffract_jax.ops import query_blocks
from difffract_jax.spread import in_step, on_mesh_of, spread, using, ways_of, whole

PRECISIONS = {"f32": "highest", "bf16": "default"}
"""Precision of the pull-back's products -> what JAX calls it."""


class RowLayout(NamedTuple):
    """Where the edges of which sources stand in a row; tuples are per stack, those within them per group of the stack.

    Attributes:
        layers: recorded layers.
        rows: positions of each sequence.
        active: places for features per position.
        input_rows: places of the inputs.
    """

    layers: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    active: tuple[tuple[int, ...], ...]
    input_rows: int

    @property
    def per_layer(self) -> tuple[int, ...]:
        """Places of a layer of each stack, errors included."""
        pairs = zip(self.rows, self.active, strict=True)
        return tuple(sum(r * (a + 1) for r, a in zip(rows, active, strict=True)) for rows, active in pairs)

    @property
    def begins(self) -> tuple[int, ...]:
        """The place where each stack begins, and last that of the inputs."""
        sizes = [count * size for count, size in zip(self.layers, self.per_layer, strict=True)]
        return tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))

    @property
    def inputs(self) -> int:
        """The place where the inputs begin."""
        return self.begins[-1]

    @property
    def size(self) -> int:
        """Places in a row."""
        return self.inputs + self.input_rows


def layout_of(replacement: Replacement) -> RowLayout:
    """Returns the layout of rows over a replacement's sources."""
    slices = group_slices(replacement.record.weights.stacks)
    shapes = [[values.shape for values in replacement.sources.values[part]] for part in slices]
    return RowLayout(
        tuple(stack[0][0] for stack in shapes),
        tuple(tuple(shape[1] for shape in stack) for stack in shapes),
        tuple(tuple(shape[2] for shape in stack) for stack in shapes),
        sum(h.shape[0] for h in replacement.sources.boundary),
    )


class Pulled(NamedTuple):
    """Targets pulled back through all recorded blocks.

    Attributes:
        edges: attributions of every feature and error, in the order of `RowLayout`; without the inputs.
        boundary: cotangents of h0.
    """

    edges: Float[Array, "target source"]
    boundary: Streams


class PullOptions(NamedTuple):
    """Devices and precision of a pull-back; they change no more than the rounding of the edges.

    Attributes:
        mesh: of several devices; None for one. Its axis `data` shares targets out, the others split what is replaced,
            which must lie on it, see `engine.make_engine`.
        precision: of the products: `f32`, or `bf16` with sums in float32 and patterns as they were recorded.
    """

    mesh: Mesh | None = None
    precision: str = "f32"

    @property
    def shards(self) -> int:
        """Shares into which targets are dealt; each is one device, or several that split the model."""
        return 1 if self.mesh is None else self.mesh.shape["data"]


def pull_back(
    replacement: Replacement, targets: Targets, direction: Float[Array, "target img outputs"] | None = None
) -> Float[Array, "target source"]:
    """Returns the attribution of every source to every target, value(source) * d u(target) / d value(source).

    Args:
        replacement: from `prepare_step`.
        targets: as many as shall be computed together; each number of them is compiled once.
        direction: of the velocity, for targets that are directions; zeros for features.
    """
    pulled = pull(replacement, targets, None if direction is None else velocity_cotangent(replacement, direction))
    return jnp.concatenate([pulled.edges, input_edges(pulled.boundary, replacement.sources.boundary)], axis=1)


def pull_target(replacement: Replacement, target: Targets) -> Float[Array, "source"]:
    """Returns the attribution of every source to one feature: a pure function, to give to `jax.jit` and `jax.vmap`.

    `pull_back` gives the same for many targets at once, faster: it sorts them on the host, and shares what they share.

    Args:
        replacement: from `prepare_step`.
        target: scalars.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from difffract_jax import capture, prepare, random_pipeline, random_transcoders
        >>> from difffract_jax.circuits.attribution.pullback import pull_target
        >>> from difffract_jax.circuits.frozen.targets import Targets
        >>> pipe = random_pipeline()
        >>> tcs = random_transcoders(pipe.config.transformer)
        >>> (step,) = prepare(capture(pipe, tcs, "a red circle"), tcs).steps
        >>> features = Targets(*jnp.array([[0, 0], [2, 1], [5, 5], [40, 41]]))  # group, layer, position, feature
        >>> jax.jit(jax.vmap(pull_target, (None, 0)))(step, features).shape[0]
        2
    """
    one = Targets(*(jnp.reshape(jnp.asarray(column, jnp.int32), (1,)) for column in target))
    sizes = Sizes(pull=1, enter=1, contract=(1,), batch=1, gather=gather_bytes(jax.default_backend()))
    spare = jnp.zeros((1, layout_of(replacement).inputs), replacement.record.boundary.img.dtype)
    with jax.default_matmul_precision("highest"):
        gradients = target_gradients(replacement.record, replacement.sites, one)
        pulled = _pull_share(sizes, *replacement, one, gradients, None, spare)
    return jnp.concatenate([pulled.edges, input_edges(pulled.boundary, replacement.sources.boundary)], axis=1)[0]


def pull(
    replacement: Replacement,
    targets: Targets,
    direction: Streams | None = None,
    spare: Float[Array, "batch source"] | None = None,
    options: PullOptions = PullOptions(),  # noqa: B008  (immutable)
) -> Pulled:
    """Pulls targets back through the recorded blocks.

    Args:
        replacement: from `prepare_step`.
        targets: as for `pull_back`. Of several devices each takes its share of them, the first device the first.
        direction: cotangents of the residual streams where each direction enters, [target rows d_model] per stream;
            zeros for features. All directions enter at one layer, and no feature lies above.
        spare: edges that an earlier call with as many targets returned, and nobody needs any more: their memory is used
            again.
        options: devices and precision.
    """
    count, boundary = targets.layer.shape[0], replacement.record.boundary
    sizes = _sizes(replacement, _ceil(count, options.shards), jax.default_backend())
    whole = sizes.batch * options.shards
    more = whole - count
    # On the host, where small operations cost little.
    columns = Targets(*(np.pad(np.asarray(column), (0, more), constant_values=-1) for column in targets))
    # Highest first on every device: then those that have begun at any block are the first so many.
    order = np.argsort(-columns.enters.reshape(options.shards, -1), axis=1, stable=True)
    order = (order + sizes.batch * np.arange(options.shards)[:, None]).ravel()
    filled = jax.device_put(Targets(*(column[order] for column in columns)))
    if direction is not None:
        direction = _rows(direction, order, more)
    shape, dtype = (whole, layout_of(replacement).inputs), boundary.img.dtype
    if spare is None or spare.shape != shape or spare.dtype != dtype:
        split = None if options.mesh is None else NamedSharding(options.mesh, PartitionSpec("data"))
        spare = jnp.zeros(shape, dtype, device=split)
    with jax.default_matmul_precision(PRECISIONS[options.precision]), using(options.mesh):
        gradients = target_gradients(replacement.record, replacement.sites, filled)
        if goes_layerwise(replacement, options.mesh):
            pulled = _pull_streamed(sizes, replacement, filled, gradients, direction, spare, options.precision)
        else:
            pulled = _pull_back(*replacement, filled, gradients, direction, spare, sizes, options)
    same = not more and np.array_equal(order, np.arange(whole))
    return pulled if same else _rows(pulled, np.argsort(order)[:count])


@partial(jax.jit, static_argnames="more")
def _rows(tree: Any, order: Int[Array | np.ndarray, "target"], more: int = 0) -> Any:
    """Returns targets' rows of all arrays, and of so many rows of zeros behind them, in another order."""
    return jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, more), *[(0, 0)] * (leaf.ndim - 1)))[order], tree)


def lower_pull(replacement: Replacement, count: int, platform: str, directed: bool, options: PullOptions) -> Any:
    """Lowers the pull-back of a batch of targets from shapes alone, as `jax.jit`'s `lower` does.

    Args:
        replacement: shapes with shardings, as `jax.ShapeDtypeStruct`.
        count: of targets, of one share.
        platform: to compile for: `cpu`, `gpu` or `tpu`.
        directed: whether directions of the velocity are among the targets.
        options: devices and precision.
    """
    sizes, boundary = _sizes(replacement, count, platform), replacement.record.boundary
    place = boundary.img.sharding if options.mesh is None else NamedSharding(options.mesh, PartitionSpec("data"))

    def like(*shape: int, dtype: Any = boundary.img.dtype) -> Any:
        return jax.ShapeDtypeStruct((sizes.batch * options.shards, *shape), dtype, sharding=place)

    targets = Targets(*(like(dtype=jnp.int32) for _ in Targets._fields))
    direction = Streams(*(like(*h.shape) for h in boundary)) if directed else None
    given = (targets, like(boundary.img.shape[1]), direction, like(layout_of(replacement).inputs), sizes, options)
    with jax.default_matmul_precision(PRECISIONS[options.precision]), using(options.mesh):
        return _pull_back.lower(*replacement, *given)


def spare_rows(replacement: Replacement, count: int, platform: str) -> jax.ShapeDtypeStruct:
    """Returns the shape of the edges of a share of targets, which each of its devices holds.

    Args:
        replacement: shapes with shardings.
        count: of targets.
        platform: that they are computed on.
    """
    shape, like = (
        (_sizes(replacement, count, platform).batch, layout_of(replacement).inputs),
        replacement.record.t,
    )
    return jax.ShapeDtypeStruct(shape, replacement.record.boundary.img.dtype, sharding=like.sharding)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _sizes(replacement: Replacement, count: int, platform: str) -> Sizes:
    """Divides targets for a platform."""
    record = replacement.record
    itemsize, width = record.boundary.img.dtype.itemsize, record.boundary.img.shape[1]
    shapes = [one.attention_shape(held) for one, held in zip(record.weights.stacks, record.frozen, strict=True)]
    blockwise = any(shape is not None and query_blocks(shape, shape[0], itemsize) for shape in shapes)
    one = sum(h.shape[0] for h in record.boundary) * width * itemsize
    return sizes_for(count, one, platform, blockwise=blockwise)


@jax.jit
def input_edges(cotangent: Streams, boundary: Streams) -> Float[Array, "target rows"]:
    """Returns the edges of the residual streams entering the first block, image first."""
    with jax.default_matmul_precision("highest"):
        rows = both(lambda c, h: dot_rows(jnp.int32(0), c.shape[0], c, h), cotangent, boundary)
        return jnp.concatenate(rows, axis=1)


def velocity_cotangent(replacement: Replacement, direction: Float[Array, "target img outputs"]) -> Streams:
    """Pulls directions of the velocity back to the residual streams leaving the last block, [target rows d_model].

    Args:
        replacement: of a trace that records the velocity.
        direction: on velocities.
    """
    with jax.default_matmul_precision("highest"), on_mesh_of(replacement.record):
        return _velocity_cotangent(replacement.record, direction)


@jax.jit
def _velocity_cotangent(record: Record, direction: Array) -> Streams:
    final, boundary = record.weights.final, record.boundary
    assert final is not None
    _, pull_final = jax.vjp(lambda h: final(h, record.cond, record.inv_std), boundary.img)
    img = spread(jax.vmap(pull_final)(direction)[0], 2, 1)
    return Streams(img, jnp.zeros((img.shape[0], *boundary.txt.shape), img.dtype))


@partial(jax.jit, static_argnames=("sizes", "options"), donate_argnames="spare")
def _pull_back(
    record: Record,
    sites: tuple[ReplacedSites, ...],
    sources: Sources,
    targets: Targets,
    gradients: Float[Array, "batch d_model"],
    direction: Streams | None,
    spare: Float[Array, "batch source"],
    sizes: Sizes,
    options: PullOptions = PullOptions(),  # noqa: B008  (immutable)
) -> Pulled:
    """Pulls sorted targets back, each share its own; shares say nothing to one another."""
    pull_one = partial(_pull_share, sizes)
    if options.precision == "bf16":
        pull_one = rounded(pull_one)
    if options.shards > 1:
        assert options.mesh is not None
        same, split = PartitionSpec(), PartitionSpec("data")
        # Each device's loops run as often as its targets need, which the check of replicated values cannot follow.
        pull_one = jax.shard_map(
            pull_one,
            mesh=options.mesh,
            in_specs=(same, same, same, split, split, split, split),
            out_specs=split,
            axis_names={"data"} if ways_of(options.mesh) > 1 else set(),
            check_vma=False,
        )
    return pull_one(record, sites, sources, targets, gradients, direction, spare)


def _pull_share(
    sizes: Sizes,
    record: Record,
    sites: tuple[ReplacedSites, ...],
    sources: Sources,
    targets: Targets,
    gradients: Float[Array, "batch d_model"],
    direction: Streams | None,
    spare: Float[Array, "batch source"],
) -> Pulled:
    """Pulls sorted targets back, those of one device, or of the devices that share a model."""
    layout, stacks = layout_of(Replacement(record, sites, sources)), record.weights.stacks
    edges = whole(spare)
    cotangent = both(lambda h: jnp.zeros((sizes.batch, *h.shape), gradients.dtype), sources.boundary)
    if direction is not None:
        cotangent = both(jnp.add, cotangent, direction)
    # Layers to walk: those below where the first target enters, and its own.
    top = in_step((targets.enters[0] + 1) // 2)
    slices = group_slices(stacks)
    for i, (stack, groups) in reversed(list(enumerate(zip(stacks, slices, strict=True)))):
        first, count = sum(layout.layers[:i]), layout.layers[i]
        if not count:
            continue
        at = partial(block_at, record, sites, sources, i, groups)
        stretch = Stretch(first, count, groups.start, layout.begins[i], layout.per_layer[i], at)
        above = jnp.clip(top, first, first + count)
        joined = sequences(cotangent, stack.groups)
        edges, joined = walk(stretch, above, stretch.clear(edges), joined, targets, gradients, sizes)
        cotangent = streams(joined, stack.groups, cotangent)
    return Pulled(whole(edges), cotangent)


def _pull_streamed(
    sizes: Sizes,
    replacement: Replacement,
    targets: Targets,
    gradients: Float[Array, "batch d_model"],
    direction: Streams | None,
    spare: Float[Array, "batch source"],
    precision: str,
) -> Pulled:
    """Pulls sorted targets back through blocks that were streamed: see `layerwise`."""
    layout, boundary = layout_of(replacement), replacement.sources.boundary
    cotangent = both(lambda h: jnp.zeros((sizes.batch, *h.shape), gradients.dtype), boundary)
    if direction is not None:
        cotangent = both(jnp.add, cotangent, direction)
    places = list(zip(layout.layers, layout.begins[:-1], layout.per_layer, strict=True))
    given = targets, gradients, cotangent, spare
    return Pulled(*pull_layerwise(sizes, *replacement, places, *given, precision=precision))


def push_forward(replacement: Replacement, change: Sources) -> RunOutputs:
    """Returns how all that the affine map gives moves with the sources: J change, `jax.linearize`'s map.

    Args:
        replacement: from `prepare_step`.
        change: of the sources, in their own units.
    """
    with jax.default_matmul_precision("highest"):
        return _push_forward(*replacement, change)


@jax.jit
def _push_forward(record: Record, sites: tuple[ReplacedSites, ...], sources: Sources, change: Sources) -> Any:
    _, push = jax.linearize(partial(run_replacement, record, sites), sources)
    return push(change)
