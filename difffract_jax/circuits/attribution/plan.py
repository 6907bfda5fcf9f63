"""Will a trace fit a TPU, and what does it cost? The programs of attribution, compiled for chips that are not here.

1. `TraceWorkload` describes the trace: the model's shape and its parts, the sites that have transcoders, tokens,
   places for features per position, targets pulled back together. Everything is a shape; no weight is made.
2. `programs` lowers what `difffract trace` runs, one after the other: the recording of a step, the encoding of each
   group of sites, the affine map's constant, the pull-back of a batch of targets.
3. Each is compiled for one chip of a topology, where chips hold the same and share out the targets; or for a mesh whose
   chips split what each share holds (`placement`).
4. What a chip must hold = the program's peak + what lies there besides: while a step is recorded all parts of the
   model, later the recorded blocks alone; the transcoders and the record throughout.
5. Operations are counted from the shapes, since the compiler counts a loop once: 2 per weight and row of a product.

Symbols: S tokens of the joint sequence, D channels, F features of a transcoder, K places for features per position,
T targets. Bytes are those of one chip; GiB = 2^30. Seconds are operations over the chip's peak: no chip is faster.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difffract_jax.address import Tokens
from difffract_jax.circuits.attribution.attribute import divided
from difffract_jax.circuits.attribution.placement import replacement_shardings
from difffract_jax.circuits.attribution.pullback import PullOptions, layout_of, lower_pull, spare_rows
from difffract_jax.circuits.frozen.encoding import GroupRecord, ReplacedSites, SiteLayers, find_active
from difffract_jax.circuits.frozen.replacement import Replacement, Sources, affine_program
from difffract_jax.circuits.frozen.targets import Targets, target_gradients
from difffract_jax.circuits.trace.record import Blocks, Record, record_step, take_weights
from difffract_jax.config import UserError
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.mmdit import Inputs
from difffract_jax.sharding import make_mesh, traced_pipeline, traced_transcoders
from difffract_jax.spread import using, ways_of
from difffract_jax.transcoders.chips import CHIPS
from difffract_jax.transcoders.plan import (
    Topology,
    bytes_per_chip,
    compile_unkept,
    memory_asked,
    memory_of,
    mesh_text,
)
from difffract_jax.transcoders.transcoder import TranscoderSet

BF16_PEAK = {name: chip.flops for name, chip in CHIPS.items()}
"""Chip -> its bfloat16 operations per second, as its maker states."""
PASSES = {"f32": 6, "bf16": 1}
"""Passes of bfloat16 products that a product takes, by precision; a float32 one is `highest`."""


class TraceWorkload(NamedTuple):
    """The trace to plan.

    Attributes:
        config: shape of the transformer.
        parts: part -> abstract tree of the pipeline that is loaded.
        tcs: the transcoders, abstract.
        blocks: to record.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        active: places for features per position.
        targets: of an expansion.
        mesh: sizes of its axes.
        precision: of the pull-back's products, `f32` or `bf16`.
    """

    config: FluxConfig
    parts: Mapping[str, Any]
    tcs: TranscoderSet
    blocks: Blocks
    grid: tuple[int, int]
    text_tokens: int
    active: int
    targets: int
    mesh: Mapping[str, int]
    precision: str

    @property
    def shards(self) -> int:
        """Shares into which targets are dealt."""
        return self.mesh.get("data", 1)

    @property
    def seq(self) -> int:
        """Tokens of the joint sequence."""
        return self.text_tokens + self.grid[0] * self.grid[1]


class Program(NamedTuple):
    """One program of a trace, on one chip; None where the compiler did not say.

    Attributes:
        name: what it does.
        arguments: bytes it is given.
        temporaries: bytes it needs in between.
        peak: its highest use of memory.
        needed: peak, and what lies in memory besides.
        fits: whether it compiled and needed is at most what there is.
        flops: operations, counted from the shapes.
        bytes_accessed: as the compiler counts; a loop counts once.
        seconds: at the chip's peak; an estimate from below.
        compiled_in: seconds that compiling took.
    """

    name: str
    arguments: int | None
    temporaries: int | None
    peak: int | None
    needed: int
    fits: bool
    flops: float
    bytes_accessed: float | None
    seconds: float
    compiled_in: float


class TracePlan(NamedTuple):
    """What a trace needs on a chip of a topology.

    Attributes:
        topology: its name.
        mesh: sizes of its axes.
        hbm: bytes of a chip's memory that a program may use.
        model: bytes of the pipeline's parts.
        transcoders: bytes of the transcoders.
        weights: bytes of the recorded blocks, as far as they are copies.
        record: bytes of the record, codes and errors.
        targets: of a share that are pulled back together.
        programs: each of them.
        fits: whether all do.
        seconds_per_node: of the pull-back at the chip's peak, for targets in the highest block.
    """

    topology: str
    mesh: dict[str, int]
    hbm: int
    model: int
    transcoders: int
    weights: int
    record: int
    targets: int
    programs: tuple[Program, ...]
    fits: bool
    seconds_per_node: float


class _Lowered(NamedTuple):
    name: str
    lower: Callable[[], Any]
    held: int
    """Bytes in memory whatever the program needs besides, its arguments among them."""
    flops: float
    precision: str


def plan_trace(asked: TraceWorkload, topology: Topology, note: Callable[[str], None] = lambda _: None) -> TracePlan:
    """Compiles every program of a trace for one chip of a topology, or for a mesh whose chips split a model.

    Args:
        asked: what shall be traced.
        topology: from `open_topology`.
        note: called with a sentence before each compilation.

    Raises:
        UserError: if the compiler fails for another reason than memory, or the mesh fits neither model nor topology.
    """
    mesh, options = _mesh(asked, topology)
    model, tcs, inputs, replacement = _placed(asked, mesh)
    layout, itemsize = layout_of(replacement), replacement.record.boundary.img.dtype.itemsize
    asked = asked._replace(targets=divided(asked.targets, layout.size * itemsize, asked.shards) // asked.shards)
    chip, done = topology.name.partition(":")[0], []
    for one in _programs(asked, model, tcs, inputs, replacement, options):
        note(f"Compiling for {topology.name}: {one.name}")
        with using(options.mesh):
            done.append(_compile(one, topology, PASSES[one.precision] / BF16_PEAK.get(chip, BF16_PEAK["v5p"])))
    copies = bytes_per_chip(replacement.record.weights) - _shared(asked, replacement)
    return TracePlan(
        topology=topology.name,
        mesh=dict(asked.mesh),
        hbm=topology.hbm,
        model=bytes_per_chip(model),
        transcoders=bytes_per_chip(tcs),
        weights=copies,
        record=_record_bytes(replacement),
        targets=asked.targets,
        programs=tuple(done),
        fits=all(program.fits for program in done),
        seconds_per_node=done[-1].seconds / asked.targets,
    )


def _mesh(asked: TraceWorkload, topology: Topology) -> tuple[Mesh, PullOptions]:
    """Returns the devices to compile for, and the options of a pull-back there: one chip where all hold the same."""
    if ways_of(asked.mesh) == 1:
        return make_mesh(dict.fromkeys(asked.mesh, 1), topology.devices[:1]), PullOptions(precision=asked.precision)
    wanted = prod(asked.mesh.values())
    if wanted != len(topology.devices):
        raise UserError(
            f"The mesh {mesh_text(asked.mesh)} has {wanted} devices, but {topology.name} has {len(topology.devices)} "
            "chips, and a trace's mesh takes all; change one of them."
        )
    mesh = make_mesh(asked.mesh, topology.devices)
    return mesh, PullOptions(mesh, asked.precision)


def _placed(asked: TraceWorkload, mesh: Mesh) -> tuple[Any, Any, Any, Replacement]:
    """Returns the shapes of model, transcoders, inputs and replacement, each where it lives."""

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)

    spread, of_stack = traced_pipeline(mesh), traced_transcoders(mesh).tree
    model = {name: place(tree, spread(name, tree)) for name, tree in asked.parts.items()}
    stacks = asked.tcs.per_group(asked.config.layout)
    tcs = tuple(None if stack is None else place(stack, of_stack(stack)) for stack in stacks)
    inputs, replacement = _inputs(asked), _replacement(asked)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), inputs)
    names = [stack.name for stack in asked.config.layout.stacks]
    return model, tcs, place(inputs, everywhere), place(replacement, replacement_shardings(replacement, names, mesh))


def _inputs(asked: TraceWorkload) -> tuple[Inputs, Any]:
    """Returns the shapes of what a step is given: the transformer's inputs and the mask of replaceable text."""
    rows, config = asked.grid[0] * asked.grid[1], asked.config
    wide = partial(_shape, jnp.float32)
    guidance = wide() if config.guidance else None
    text, pooled = wide(asked.text_tokens, config.text_width), wide(config.pooled_width)
    inputs = Inputs(wide(rows, config.in_channels), text, pooled, wide(), guidance)
    return inputs, _shape(jnp.bool_, asked.text_tokens)


def _shape(dtype: Any, *axes: int) -> Any:
    return jax.ShapeDtypeStruct(axes, dtype)


def _replacement(asked: TraceWorkload) -> Replacement:
    """Returns the shapes of the replacement of a recorded step."""
    inputs, mask = _inputs(asked)
    model, blocks = asked.parts["transformer"], asked.blocks
    weights = jax.eval_shape(partial(take_weights, blocks=blocks, grid=asked.grid), model)
    step = partial(record_step, grid=asked.grid, blocks=blocks)
    record: Record = jax.eval_shape(step, model, weights, inputs, mask)._replace(weights=weights)
    record = record._replace(unpooled=record.reading if asked.config.pooled_width else None)
    sites, values = [], []
    for stack, x in zip(asked.tcs.per_group(asked.config.layout), record.mlp_in, strict=True):
        layers, rows, _ = x.shape
        places = asked.active if stack is not None and layers else 0
        index = _shape(jnp.int32, layers, rows, places)
        sites.append(
            ReplacedSites(stack, SiteLayers(_shape(jnp.int32, layers), _shape(jnp.bool_, layers, rows), index))
        )
        values.append(_shape(x.dtype, layers, rows, places))
    return Replacement(record, tuple(sites), Sources(record.boundary, tuple(values), record.mlp_out))


def _programs(
    asked: TraceWorkload,
    model: Any,
    tcs: tuple[Any, ...],
    inputs: tuple[Inputs, Any],
    replacement: Replacement,
    options: PullOptions,
) -> Iterator[_Lowered]:
    """Yields the programs in the order in which a trace runs them."""
    record, sites, sources = replacement
    count, stored = _Counts(asked), bytes_per_chip(tcs)
    call = (model["transformer"], record.weights, *inputs)
    loaded = bytes_per_chip((model, inputs, record.weights, record.unpooled)) - _shared(asked, replacement) + stored
    yield _Lowered(
        "record a step", lambda: record_step.lower(*call, asked.grid, asked.blocks), loaded, count.record(), "f32"
    )
    held = bytes_per_chip(record) + stored
    for group, (of, stack) in enumerate(zip(asked.config.layout.groups, tcs, strict=True)):
        if stack is None:
            continue
        layers = sites[group].layers
        part = GroupRecord(record.mlp_in[group], record.mlp_out[group], record.replaceable[group], record.t)
        lower = partial(find_active.lower, stack, layers.slot, layers.live, part, None, asked.active)
        yield _Lowered(f"encode {of.label}", lower, held, count.encode(group), "f32")
    held += bytes_per_chip((sources.values, sources.errors)) + bytes_per_chip([s.layers for s in sites])
    zeros, cut = _no_sources(replacement)
    lower = partial(affine_program.lower, record, cut, zeros)
    yield _Lowered("constant", lower, held + bytes_per_chip(zeros), count.constant(), "f32")
    count_of = jax.ShapeDtypeStruct((asked.targets * asked.shards,), jnp.int32, sharding=record.t.sharding)
    targets = Targets(*(count_of for _ in Targets._fields))
    held += bytes_per_chip(spare_rows(replacement, asked.targets, "tpu"))
    yield _Lowered(
        "read targets", lambda: target_gradients.lower(record, sites, targets), held, count.read(), asked.precision
    )
    yield _Lowered(
        f"pull back {asked.targets}",
        lambda: lower_pull(replacement, asked.targets, "tpu", asked.blocks.output, options),
        held,
        count.pull(),
        asked.precision,
    )


def _no_sources(replacement: Replacement) -> tuple[Sources, tuple[ReplacedSites, ...]]:
    """Returns the shapes of `engine.no_sources`, placed as the replacement is."""
    sites, sources = replacement.sites, replacement.sources
    values = tuple(_without_places(leaf) for leaf in sources.values)
    cut = tuple(one._replace(layers=one.layers._replace(index=_without_places(one.layers.index))) for one in sites)
    return sources._replace(values=values), cut


def _without_places(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct((*leaf.shape[:2], 0), leaf.dtype, sharding=leaf.sharding)


def _shared(asked: TraceWorkload, replacement: Replacement) -> int:
    """Returns the bytes of recorded weights that are the model's own arrays: whole stacks and the parts beside them."""
    weights, model = replacement.record.weights, asked.parts["transformer"]
    pairs = zip(weights.stacks, model.stacks, strict=True)
    whole = [a for a, b in pairs if jax.tree.leaves(a)[0].shape == jax.tree.leaves(b)[0].shape]
    return bytes_per_chip([whole, weights.final, weights.img_in, weights.txt_in])


def _record_bytes(replacement: Replacement) -> int:
    record, sites, sources = replacement
    held = bytes_per_chip(record) - bytes_per_chip(record.weights)
    return held + bytes_per_chip((sources.values, sources.errors)) + bytes_per_chip([s.layers for s in sites])


def _compile(one: _Lowered, topology: Topology, seconds_per_flop: float) -> Program:
    start, compiled = time.perf_counter(), None
    found: dict[str, Any] = dict.fromkeys(("arguments", "temporaries", "peak"))
    try:
        with jax.default_matmul_precision("highest"):
            compiled = compile_unkept(one.lower())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            reason = str(error).splitlines()[0]
            raise UserError(f"The compiler cannot build `{one.name}` for {topology.name}: {reason}.") from None
        found |= memory_asked(str(error), one.held)
    else:
        found |= {name: value for name, value in memory_of(compiled).items() if name in found}
    # An argument that a program does not read is not given to it, but lies in memory all the same.
    needed = one.held if found["peak"] is None else one.held + found["peak"] - found["arguments"]
    return Program(
        name=one.name,
        **found,
        needed=needed,
        fits=compiled is not None and needed <= topology.hbm,
        flops=one.flops,
        bytes_accessed=None if compiled is None else compiled.cost_analysis().get("bytes accessed"),
        seconds=one.flops * seconds_per_flop,
        compiled_in=time.perf_counter() - start,
    )


class _Counts:
    """Operations of the large products on one chip, from the shapes."""

    def __init__(self, asked: TraceWorkload) -> None:
        self.asked, self.layout = asked, asked.config.layout
        self.layers = asked.blocks.end - asked.blocks.first
        self.before = asked.blocks.first
        tokens = Tokens(asked.seq - asked.text_tokens, asked.text_tokens)
        self.rows = [sum(getattr(tokens, stream) for stream in group.streams) for group in self.layout.groups]
        self.square = asked.seq * asked.config.d_model**2
        self.pattern = asked.seq**2 * asked.config.d_model
        self.ways = ways_of(asked.mesh)

    def record(self) -> float:
        """q, k, v, the output and the MLP's matrices, in FLUX.1 12 D^2 per row; scores and mixing of values: 2 S D."""
        mlp = self.asked.config.hidden_ratio
        return (self.before + self.layers) * (2 * (4 + mlp) * self.square + 4 * self.pattern) / self.ways

    def encode(self, group: int) -> float:
        """Encodes every row of every layer to count what is active, then again, and decodes."""
        tcs, blocks = self.asked.tcs, self.layout.blocks_of(group)
        layers = len(range(max(blocks.start, self.asked.blocks.first), min(blocks.stop, self.asked.blocks.end)))
        return 6 * layers * self.rows[group] * tcs.config.features * tcs.config.d_model / self.ways

    def constant(self) -> float:
        """v and the output: 2 D^2 per row; scores and mixing of values."""
        return 4 * self.layers * (self.square + self.pattern) / self.ways

    def read(self) -> float:
        """Scales an encoder column for every target, in every group."""
        return 2.0 * self.asked.targets * self.asked.shards * self.asked.config.d_model * len(self.rows)

    def pull(self) -> float:
        """The same but for the scores, which targets share; and K decoder vectors per row of a site."""
        asked = self.asked
        slots = asked.tcs.sites.slots(self.layout)
        read = sum(len(placed) * rows for placed, rows in zip(slots, self.rows, strict=True))
        each = self.layers * (4 * self.square + 2 * self.pattern) + 2 * read * asked.active * asked.config.d_model
        return (asked.targets * each + self.layers * 2 * self.pattern) / self.ways
