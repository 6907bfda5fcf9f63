"""Will training fit a TPU pod, and how? The training step, compiled ahead of time for chips that are not here.

1. `open_topology` describes a pod by name, `v5p:4x4x4`: its devices, as libtpu knows them, which needs no TPU.
2. A mesh is given, or `meshes` lists all that use every chip, best first: those with the least `estimate`.
3. `setup` says what shapes the state and a batch have and where they live, `step.jit_step` is the trainer's own step.
   It is compiled from these shapes; no weight is made. That memory does not suffice is an answer of the compiler's.
4. What a chip must hold = the compiled step's peak + its share of buffer and model, which lie there meanwhile.

Bytes are those of one chip. GiB = 2^30.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain, islice
from math import prod
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from difffract_jax.config import UserError, nearest
from difffract_jax.sharding import make_mesh, pipeline_shardings
from difffract_jax.transcoders.buffer import abstract_store
from difffract_jax.transcoders.objective import Width, widths
from difffract_jax.transcoders.recipe import row_flops
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import Setup, abstract_rows, abstract_state, set_up, split_sizes
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.step import jit_step

GIB = 2**30
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
"""Chip -> GiB of its memory that the compiler lets a program use, in its own words; sold as 16, 95 and 32 GB."""
SHAPES = {"v5e": "v5e:8x8", "v5p": "v5p:4x4x4", "v6e": "v6e:4x4"}
LIBTPU = {
    # Without these libtpu asks a metadata server which machine it is on, takes the lock that keeps two programs off
    # one TPU, and writes log files; describing a pod needs none of it.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}
TRIES = 3
"""Meshes that are compiled before a topology is said not to fit. One that does not fit fails in seconds."""
WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](\d+))\[([\d,]*)\]")
_TOLD = re.compile(r"(HLO temporaries|Used) \(?([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Topology(NamedTuple):
    """A pod, or a slice of one.

    Attributes:
        name: `v5p:4x4x4`.
        devices: to compile for.
        hbm: bytes of a chip's memory that a program may use.
    """

    name: str
    devices: Sequence[Any]
    hbm: int


class TrainingWorkload(NamedTuple):
    """The training to plan.

    Attributes:
        settings: of the run.
        sites: that get a transcoder.
        width: channels of a row; of x and y, where they differ.
        model: part -> abstract tree of the model that runs beside the training; empty where rows come from disk.
    """

    settings: TrainConfig
    sites: SiteSet
    width: Width
    model: Mapping[str, Any]


class TrainingPlan(NamedTuple):
    """What training needs on one topology; bytes per chip, None where the compiler did not say.

    Attributes:
        topology: its name.
        chips: how many.
        mesh: size of every axis.
        state: weights, optimiser and counters.
        rows: a batch.
        buffer: the shuffle buffer.
        model: the model that is read.
        arguments: what the compiled step is given: state and rows, as laid out in memory.
        outputs: what it returns beyond the donated state.
        temporaries: what it needs in between.
        peak: its highest use of memory.
        needed: peak, buffer and model.
        hbm: what there is.
        fits: whether needed is at most that.
        flops: of a step on all chips, in its large matrix products.
        compiled_flops: of a step on one chip, as the compiler counts; a loop counts once.
        communication: kind -> operations and bytes of their results, on one chip; a loop counts once.
        seconds: that compiling took.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    state: int
    rows: int
    buffer: int
    model: int
    arguments: int | None
    outputs: int | None
    temporaries: int | None
    peak: int | None
    needed: int
    hbm: int
    fits: bool
    flops: float
    compiled_flops: float | None
    communication: dict[str, dict[str, int]]
    seconds: float


def open_topology(name: str) -> Topology:
    """Describes a TPU topology by its name, `CHIP:SHAPE`.

    Raises:
        UserError: if libtpu is missing, or knows no such topology.
    """
    chip, _, shape = name.partition(":")
    if chip not in HBM:
        raise UserError(f"`{name}` names no topology: `{chip}` is not a chip{nearest(chip, tuple(HBM))}")
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"`{name}` names no topology; write chip and shape, as in {SHAPES[chip]}.")
    if find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError("Compiling for TPUs needs libtpu, but no TPU: pip install 'difffract_jax[tpu]'.")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0].rstrip(".")
        raise UserError(f"libtpu knows no topology {name}: {reason}; try {SHAPES[chip]}.") from None
    return Topology(name, devices, round(HBM[chip] * GIB))


def plan(
    work: TrainingWorkload,
    topology: Topology,
    mesh: Mapping[str, int] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> TrainingPlan:
    """Compiles the step for a topology, and says what it needs there.

    Args:
        work: what shall be trained.
        topology: where.
        mesh: size of every axis; left out, the meshes that should need least memory are tried, until one fits.
        note: called with a sentence before each compilation.

    Returns:
        The plan for the mesh given; else for the first that fits, or of those tried the one that needs least.

    Raises:
        UserError: if the mesh does not fit topology, sites, features or batch.
    """
    if work.settings.parallel == "pmap":
        raise UserError("Only parallel: jit can be planned; pmap holds the whole state on every chip.")
    setups = (_set_up(work, topology, shape) for shape in (meshes(work, topology) if mesh is None else (mesh,)))
    first = next(setups)
    hopeful = (s for s in chain((first,), setups) if sum(held_bytes(s, work.model).values()) <= topology.hbm)
    tried: list[TrainingPlan] = []
    for setup in list(islice(hopeful, TRIES)) or [first]:
        note(f"Compiling for {topology.name}, mesh {mesh_text(setup.mesh.shape)}; minutes if it fits, seconds if not")
        tried.append(compile_step(setup, topology, work.model))
        if tried[-1].fits:
            break
    return min(tried, key=lambda found: (not found.fits, found.needed))


def mesh_text(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as it is written in settings: `data=4,site=2,feature=8`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def smallest_plan(plans: Sequence[TrainingPlan]) -> TrainingPlan | None:
    """Returns of the plans that fit the one with the fewest chips, and of these the least memory; None if none fits."""
    return min((p for p in plans if p.fits), key=lambda p: (p.chips, p.chips * p.hbm), default=None)


def meshes(work: TrainingWorkload, topology: Topology) -> list[dict[str, int]]:
    """Returns every mesh that uses all chips and divides rows, sites and features; least `estimate` first.

    Raises:
        UserError: if there is none.
    """
    chips = len(topology.devices)
    sizes = split_sizes(work.settings, work.sites, work.width)
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    shapes = (
        {"data": chips // (site * feature), "site": site, "feature": feature}
        for site in divisors
        for feature in divisors
        if chips % (site * feature) == 0
    )
    fitting = [shape for shape in shapes if all(sizes[axis] % n == 0 for axis, n in shape.items())]
    if not fitting:
        wanted = f"{sizes['data']} rows, {sizes['site']} sites and {sizes['feature']} features"
        raise UserError(
            f"No mesh spreads {wanted} over the {chips} chips of {topology.name}; change batch or topology."
        )
    return sorted(fitting, key=lambda shape: (estimate(work, shape), shape["feature"]))


def estimate(work: TrainingWorkload, shape: Mapping[str, int]) -> float:
    """Returns about how many bytes a chip needs. It orders meshes; whether one fits is the compiler's to say.

    Weights, moments and about 3.6 copies of the gradient; about 5 arrays of pre-activations; where the strongest
    features of a row are sought, 2.2 of the row's features gathered from all their shards. The factors are fitted to
    what the compiler said when it refused steps of FLUX's size.
    """
    settings, sizes = work.settings, split_sizes(work.settings, work.sites, work.width)
    channels = sum(widths(work.width))
    weights = 4 * sizes["site"] * channels * sizes["feature"] / (shape["site"] * shape["feature"])
    whole = 4 * sizes["site"] * sizes["data"] * sizes["feature"] / (shape["site"] * shape["data"])
    sorts = settings.activation == "topk" or (settings.activation == "batchtopk" and settings.aux_weight > 0)
    model = bytes_per_chip(work.model) / shape["feature"]
    rows = settings.buffer_rows * sizes["site"] * channels * (2 if settings.model_dtype == "bf16" else 4)
    # The buffer keeps img and txt sites apart, and each part must divide by itself.
    even = all(len(layers) % shape["site"] == 0 for layers in work.sites.groups.values())
    buffer = rows / (shape["data"] * (shape["site"] if even else 1))
    return 6.6 * weights + whole * (5 / shape["feature"] + 2.2 * sorts) + model + buffer


def compile_step(setup: Setup, topology: Topology, model: Mapping[str, Any]) -> TrainingPlan:
    """Compiles the step of a run for the mesh it was set up on.

    Raises:
        UserError: if the compiler fails for another reason than memory.
    """
    state, rows, sizes = abstract_state(setup), abstract_rows(setup), held_bytes(setup, model)
    start = time.perf_counter()
    compiled: Any = None
    found: dict[str, Any] = dict.fromkeys(("arguments", "outputs", "temporaries", "peak", "compiled_flops"))
    try:
        compiled = compile_unkept(jit_step(setup.recipe, setup.mesh, state).lower(state, rows))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            reason = str(error).splitlines()[0]
            raise UserError(f"The compiler cannot build the step for {topology.name}: {reason}.") from None
        found |= memory_asked(str(error), sizes["state"] + sizes["rows"])
    else:
        found |= memory_of(compiled)
    peak: Any = found["peak"]
    needed = (sizes["state"] + sizes["rows"] if peak is None else peak) + sizes["buffer"] + sizes["model"]
    return TrainingPlan(
        topology=topology.name,
        chips=len(topology.devices),
        mesh=dict(setup.mesh.shape),
        **sizes,
        **found,
        needed=needed,
        hbm=topology.hbm,
        fits=compiled is not None and needed <= topology.hbm,
        flops=float(row_flops(setup.shape, setup.recipe) * setup.settings.batch * len(setup.sites.names)),
        communication={} if compiled is None else communication(compiled.as_text()),
        seconds=time.perf_counter() - start,
    )


def held_bytes(setup: Setup, model: Mapping[str, Any]) -> dict[str, int]:
    """Returns what a chip holds whatever the step needs besides: state, rows, buffer and model, in bytes."""
    spread = pipeline_shardings(setup.mesh)
    store = abstract_store(setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh)
    return {
        "state": bytes_per_chip(abstract_state(setup)),
        "rows": bytes_per_chip(abstract_rows(setup)),
        "buffer": bytes_per_chip(store),
        "model": sum(bytes_per_chip(tree, spread(name, tree)) for name, tree in model.items()),
    }


def compile_unkept(lowered: Any) -> Any:
    """Compiles a program without writing it to JAX's compilation cache, which could not read it back without the chip.

    Args:
        lowered: what `jax.jit`'s `lower` returns.
    """
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, before)


def memory_of(compiled: Any) -> dict[str, Any]:
    """Returns bytes and operations of a compiled program on one chip."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = given + returned + temporaries + memory.generated_code_size_in_bytes
    names = {"arguments": given, "outputs": returned, "temporaries": temporaries, "peak": peak}
    return names | {"compiled_flops": costs.get("flops")}


def memory_asked(message: str, arguments: int) -> dict[str, int]:
    """Returns what a program would have needed that the compiler refused for want of memory, as far as it says so.

    Args:
        message: of the compiler.
        arguments: bytes of what the program is given.
    """
    said = {what: round(float(size) * _UNITS[unit]) for what, size, unit in _TOLD.findall(message)}
    if "Used" in said:
        return {"arguments": arguments, "temporaries": said["Used"] - arguments, "peak": said["Used"]}
    if "HLO temporaries" in said:
        temporaries = said["HLO temporaries"]
        return {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries}
    return {}


def communication(program: str) -> dict[str, dict[str, int]]:
    """Returns how many operations of each kind move data between chips, and the bytes of their results.

    Args:
        program: the compiled program's text, the part of one chip. What lies in a loop counts once.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind in _COLLECTIVE.findall(program):
        counts = found.setdefault(kind, {"operations": 0, "bytes": 0})
        parts = [
            prod(map(int, filter(None, shape.split(",")))) * (WIDTHS.get(name) or max(1, int(bits) // 8))
            for name, bits, shape in _ARRAY.findall(result)
        ]
        counts["operations"] += 1
        # An operation in two halves returns its operand beside the result; the larger of the two is what moves.
        counts["bytes"] += sum(parts) if kind == "all-reduce" else max(parts, default=0)
    return dict(sorted(found.items()))


def bytes_per_chip(tree: Any, shardings: Any = None) -> int:
    """Returns the bytes of a tree's arrays that one chip holds.

    Args:
        tree: of arrays, or their shapes.
        shardings: of its arrays; left out, their own, and arrays without one are whole.
    """
    leaves = jax.tree.leaves(tree)
    places = [getattr(leaf, "sharding", None) for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    return sum(
        prod(leaf.shape if place is None else place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )


def _set_up(work: TrainingWorkload, topology: Topology, shape: Mapping[str, int]) -> Setup:
    chips, wanted = len(topology.devices), prod(shape.values())
    if chips != wanted:
        raise UserError(
            f"The mesh {mesh_text(shape)} has {wanted} devices, but {topology.name} has {chips} chips, and "
            "a pod's mesh takes all; change one of them, or leave the choice to --mesh auto."
        )
    mesh = make_mesh(shape, topology.devices)
    return set_up(work.settings, work.sites, work.width, mesh)
