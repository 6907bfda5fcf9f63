"""Will training fit a TPU pod, and how? The training step, compiled ahead of time for chips that are not here.

1. `open_topology` describes a pod by name, `v5p:4x4x4`: its devices, as libtpu knows them, which needs no TPU.
2. A mesh is given, or `meshes` lists all that use every chip, best first: those with the least `estimate`.
3. `setup` says what shapes the state and a batch have and where they live, `step.jit_step` is the trainer's own step.
   It is compiled from these shapes; no weight is made. That memory does not suffice is an answer of the compiler's.
4. What a chip must hold in a step = the compiled step's peak + its share of buffer and model, which lie there
   meanwhile. Where a step fits, the run's other programs are compiled, too (`plan_phases`); the most that any needs
   counts.

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
from difffract_jax.models.pipeline import Run
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.buffer import abstract_store
from difffract_jax.transcoders.chips import CHIPS
from difffract_jax.transcoders.compiled import bytes_per_chip, communication, compile_unkept, memory_asked, memory_of
from difffract_jax.transcoders.objective import Width, widths
from difffract_jax.transcoders.plan_phases import other_phases, placed_model, resident_parts
from difffract_jax.transcoders.recipe import row_flops, shape_of, takes_turns
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import Setup, abstract_rows, abstract_state, set_up, split_sizes
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.step import jit_step

GIB = 2**30
HBM = {name: chip.hbm / GIB for name, chip in CHIPS.items()}
"""Chip -> GiB of its memory that the compiler lets a program use."""
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
        run: sizes and schedule of the sampler; None if they are not known, and then a refresh is not planned.
    """

    settings: TrainConfig
    sites: SiteSet
    width: Width
    model: Mapping[str, Any]
    run: Run | None = None


class TrainingPlan(NamedTuple):
    """What training needs on one topology; bytes per chip, None where the compiler did not say.

    Attributes:
        topology: its name.
        chips: how many.
        mesh: size of every axis.
        state: weights, optimiser and counters.
        rows: a batch.
        buffer: the shuffle buffer.
        model: what lies there of the model that is read while steps are taken.
        arguments: what the compiled step is given: state and rows, as laid out in memory.
        outputs: what it returns beyond the donated state.
        temporaries: what it needs in between.
        peak: its highest use of memory.
        needed: peak, buffer and model; or what another phase needs, if that is more.
        hbm: what there is.
        fits: whether needed is at most that.
        flops: of a step on all chips, in its large matrix products.
        compiled_flops: of a step on one chip, as the compiler counts; a loop counts once.
        communication: kind -> operations and bytes of their results, on one chip; a loop counts once.
        seconds: that compiling took.
        phases: name of a phase besides the steps -> what it needs, buffer and model included.
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
    phases: dict[str, int]


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
        tried.append(compile_step(setup, topology, work.model, work.run))
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

    Weights and moments, and a batch; of the sites that take their step together about 3.6 copies of the gradient and 5
    arrays of pre-activations, and for `topk` 2.2 of all features of a row, gathered from their shards to be sorted. The
    factors are fitted to what the compiler said of steps of FLUX's size.
    """
    settings, sizes = work.settings, split_sizes(work.settings, work.sites, work.width)
    channels, chips, mine = sum(widths(work.width)), prod(shape.values()), sizes["site"] / shape["site"]
    together = 1 if takes_turns(settings, shape_of(settings, work.width), shape) else mine
    weights = 4 * channels * sizes["feature"] / shape["feature"]
    whole = 4 * sizes["data"] * sizes["feature"] / shape["data"]
    row = channels * (2 if settings.model_dtype == "bf16" else 4)
    rows = row * sizes["data"] * mine / shape["data"]
    buffer = row * settings.buffer_rows * sizes["site"] / chips if settings.buffer == "device" else 0
    between = 3.6 * weights + whole * (5 / shape["feature"] + 2.2 * (settings.activation == "topk"))
    model = bytes_per_chip(work.model) / chips if settings.weights == "device" else 0
    return 3 * weights * mine + between * together + rows + buffer + model


def compile_step(setup: Setup, topology: Topology, model: Mapping[str, Any], run: Run | None = None) -> TrainingPlan:
    """Compiles the step of a run for the mesh it was set up on, and its other programs if that fits.

    Args:
        setup: of the run.
        topology: of the mesh.
        model: part -> abstract tree of the model that is read.
        run: sizes and schedule of the sampler; None if they are not known.

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
    others = {}
    if compiled is not None and needed <= topology.hbm:
        others = other_phases(setup, topology.name, topology.hbm, model, run, sizes)
        needed = max(needed, *others.values())
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
        phases=others,
    )


def held_bytes(setup: Setup, model: Mapping[str, Any]) -> dict[str, int]:
    """Returns what a chip holds whatever the step needs besides: state, rows, buffer and model, in bytes."""
    weights, resident = placed_model(setup, model), resident_parts(setup, model)
    store = abstract_store(setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh)
    return {
        "state": bytes_per_chip(abstract_state(setup)),
        "rows": bytes_per_chip(abstract_rows(setup)),
        "buffer": bytes_per_chip(store) if setup.settings.buffer == "device" else 0,
        "model": sum(bytes_per_chip(weights[name]) for name in resident),
    }


def _set_up(work: TrainingWorkload, topology: Topology, shape: Mapping[str, int]) -> Setup:
    chips, wanted = len(topology.devices), prod(shape.values())
    if chips != wanted:
        raise UserError(
            f"The mesh {mesh_text(shape)} has {wanted} devices, but {topology.name} has {chips} chips, and "
            "a pod's mesh takes all; change one of them, or leave the choice to --mesh auto."
        )
    mesh = make_mesh(shape, topology.devices)
    return set_up(work.settings, work.sites, work.width, mesh)
