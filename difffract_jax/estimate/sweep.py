"""A training on TPU slices of many sizes: how much of a chip's memory, how long, and what holds it up.

1. `parse_sweep` reads `v5e:4..256,v5p:16` as slices: every size of a range that the chip is cut into.
2. `sweep` leaves out slices whose chips could not even hold the state, and looks for each of the others at every mesh
   that fits: that which takes least time is the slice's. No device is needed: meshes are abstract.
3. Memory: state, rows, buffer and model are exact, counted by the trainer's own shardings; what the step needs in
   between is `transcoders.plan.estimate`'s and `Chip.state_copied`, and so modelled. A slice may be compiled besides
   (`with_compiled`).
4. Time: each program takes as long as the slowest of products, memory, links and host, at the rates of
   `transcoders.chips` (`step_model` counts, `roofline` divides). A run is its steps, the chunks of prompts that fill
   and refill the buffer, and its checkpoints, one after the other. Rates are the maker's peaks, which no program
   reaches.

Two settings follow the mesh. With fewer prompts at once than devices along `data` and `site`, devices would do the same
work twice: as many run together as there are such devices. Where `sites_at_once` is `auto` and lets sites take their
step together, they are also tried in turn, which needs less memory.
"""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from difffract_jax.config import UserError
from difffract_jax.estimate.roofline import Seconds, price
from difffract_jax.estimate.step_model import Cost, chunk_cost, rows_of_prompt, step_cost
from difffract_jax.estimate.weights import block_bytes
from difffract_jax.sharding import MESH_AXES
from difffract_jax.transcoders.buffer import abstract_store
from difffract_jax.transcoders.chips import Chip, chip_named, hosts_of, slice_named
from difffract_jax.transcoders.compiled import bytes_per_chip, moved
from difffract_jax.transcoders.plan import Topology, TrainingPlan, TrainingWorkload, estimate, meshes
from difffract_jax.transcoders.plan_phases import placed_model
from difffract_jax.transcoders.recipe import encoders_on_host
from difffract_jax.transcoders.setup import Setup, abstract_rows, abstract_state, set_up
from difffract_jax.transcoders.state import TrainState, state_shardings

DAY = 86_400
COPIES_OF_ROWS = 2
"""Times that the rows of a chunk lie in memory: as blocks report them, and by site."""
FOLLOWING = ("prompts_at_once", "sites_at_once")
"""Settings that follow the mesh, see the module."""
EXAMPLE = "v5e:4..256,v5p:4..64"


class Point(NamedTuple):
    """A training on one slice; bytes are those of one chip, seconds at the chip's peak rates.

    Attributes:
        topology: name of the slice.
        chips: how many.
        mesh: size of every axis.
        compiled: whether memory and communication of the step are the compiler's; else they are modelled.
        parts: name -> bytes: `state`, `rows`, `buffer`, `model`, and what the step needs `in between`.
        needed: the most that the step or a phase between steps needs.
        hbm: what there is.
        fits: whether needed is at most that.
        communication: kind -> bytes of the results of what a chip exchanges in a step, loops in full.
        step: seconds of a step, by resource.
        chunk: seconds of a chunk of prompts, by resource; None where rows come from disk.
        prompts: that run through the model together.
        sites_at_once: `one` where the sites of a chip take their step in turn, else `all`.
        changes: settings that the run must have besides those given, by name.
        run: seconds of the whole training, by resource: of its steps and chunks, and of its checkpoints.
        seconds: of the whole training.
        tokens: rows per second that every site learns from, the making of rows included.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    compiled: bool
    parts: dict[str, int]
    needed: int
    hbm: int
    fits: bool
    communication: dict[str, int]
    step: Seconds
    chunk: Seconds | None
    prompts: int
    sites_at_once: str
    changes: dict[str, Any]
    run: Seconds
    seconds: float
    tokens: float

    @property
    def bound(self) -> str:
        """The resource that the training waits for most: `compute`, `memory`, `network` or `host`."""
        return self.run.bound

    @property
    def days(self) -> float:
        """Of the whole training."""
        return self.seconds / DAY

    @property
    def chip_hours(self) -> float:
        """Hours of all chips together."""
        return self.seconds * self.chips / 3600


class Layout(NamedTuple):
    """A training on a mesh, whatever its chips are; bytes and costs are those of one.

    Attributes:
        setup: of the run.
        parts: as in `Point`.
        needed: as in `Point`.
        step: cost of a step.
        chunk: cost of a chunk of prompts; None where rows come from disk.
        chunks: that a run makes.
        state: bytes of the state on all chips.
        changes: as in `Point`.
    """

    setup: Setup
    parts: dict[str, int]
    needed: int
    step: Cost
    chunk: Cost | None
    chunks: int
    state: int
    changes: dict[str, Any]


class LeftOut(NamedTuple):
    """A slice that was not looked at, since its chips cannot hold the state.

    Attributes:
        topology: its name.
        state: least bytes of a chip that the state takes.
        hbm: what there is.
    """

    topology: str
    state: int
    hbm: int


def parse_sweep(text: str) -> list[tuple[Chip, int]]:
    """Reads slices as they are written: chips by name, each with a number of chips or a range of them.

    Args:
        text: as in `v5e:4..256,v5p:16`; both ends of a range count, and are powers of two.

    Raises:
        UserError: if it is not written so, or names a chip or a size that there is not.

    Example:
        >>> [(chip.name, chips) for chip, chips in parse_sweep("v5p:4..16,v6e:8")]
        [('v5p', 4), ('v5p', 8), ('v5p', 16), ('v6e', 8)]
    """
    slices: list[tuple[Chip, int]] = []
    for item in text.split(","):
        name, _, sizes = item.strip().partition(":")
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", sizes)
        if match is None:
            raise UserError(
                f"--sweep {text}: `{item.strip()}` names no slices; write a chip, a colon and its numbers of chips, as "
                f"in {EXAMPLE}."
            )
        chip, first, last = chip_named(name), int(match[1]), int(match[2] or match[1])
        slices += [(chip, size) for size in _sizes(text, chip, first, last) if (chip, size) not in slices]
    return slices


def _sizes(text: str, chip: Chip, first: int, last: int) -> list[int]:
    """Returns the sizes of slices from one to another."""
    for size in dict.fromkeys((first, last)):
        if size < 1 or size & (size - 1):
            near = 1 << max(0, size.bit_length() - 1)
            raise UserError(
                f"--sweep {text}: slices of {chip.name} have a power of two of chips, but {size} is none; write {near} "
                f"or {2 * near}."
            )
        slice_named(chip, size)
    if first > last:
        raise UserError(f"--sweep {text}: {first}..{last} runs downwards; write {last}..{first}.")
    return [size for size in chip.slices if first <= size <= last]


def sweep(work: TrainingWorkload, slices: Sequence[tuple[Chip, int]]) -> tuple[list[Point], list[LeftOut]]:
    """Models a training on slices.

    Args:
        work: what shall be trained.
        slices: from `parse_sweep`.

    Returns:
        A point for every slice whose chips can hold the state, in their order, and the slices left out.

    Raises:
        UserError: if the training is one of `pmap`, or no mesh divides its rows, sites and features.
    """
    if work.settings.parallel == "pmap":
        raise UserError("Only parallel: jit is swept; pmap holds the whole state on every chip.")
    points, left_out, laid = [], [], {}
    shapes = None
    for chip, chips in slices:
        name, layouts = slice_named(chip, chips), []
        for shape in meshes(work, Topology(name, range(chips), chip.hbm)):
            for setup in _setups(work, shape):
                key = (*shape.values(), setup.recipe.in_turn)
                shapes = shapes or abstract_state(setup)
                laid[key] = laid.get(key) or lay_out(work, setup, shapes)
                layouts.append(laid[key])
        state = min(layout.parts["state"] for layout in layouts)
        if state > chip.hbm:
            left_out.append(LeftOut(name, state, chip.hbm))
            continue
        tried = [_point(layout, chip, chips) for layout in layouts]
        points.append(min(tried, key=lambda point: (not point.fits, point.seconds if point.fits else point.needed)))
    return points, left_out


def _setups(work: TrainingWorkload, shape: Mapping[str, int]) -> list[Setup]:
    """Returns a training on a mesh; where the settings let sites take their step together, in turn as well."""
    setup = abstract_setup(work, shape)
    if setup.recipe.in_turn or work.settings.sites_at_once != "auto":
        return [setup]
    in_turn = work.settings.model_copy(update={"sites_at_once": "one"})
    return [setup, abstract_setup(work._replace(settings=in_turn), shape)]


def abstract_setup(work: TrainingWorkload, shape: Mapping[str, int]) -> Setup:
    """Lays a training over a mesh of devices that are not here.

    Args:
        work: the training; prompts that run together become as many as its mesh splits, where they were fewer.
        shape: sizes of the mesh's axes.
    """
    together = max(work.settings.prompts_at_once, shape["data"] * shape["site"])
    settings = work.settings.model_copy(update={"prompts_at_once": together})
    mesh = AbstractMesh(tuple(shape[axis] for axis in MESH_AXES), MESH_AXES)
    return set_up(settings, work.sites, work.width, mesh)


def lay_out(work: TrainingWorkload, setup: Setup, shapes: TrainState) -> Layout:
    """Counts a training on a mesh, whatever its chips are.

    Args:
        work: what shall be trained.
        setup: of the run, from `abstract_setup`.
        shapes: of the state's arrays.
    """
    given, set_here = work.settings, setup.settings
    names = [name for name in FOLLOWING if getattr(set_here, name) != getattr(given, name)]
    work, places = work._replace(settings=set_here), state_shardings(shapes, setup.mesh)
    weights = bytes_per_chip(shapes.params, places.params) * setup.mesh.shape["site"] // len(setup.sites.names)
    chunk = chunk_cost(work, setup) if work.run is not None and work.model else None
    parts, needed = memory_parts(work, setup, bytes_per_chip(shapes, places))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    changes = {name: getattr(set_here, name) for name in names}
    return Layout(setup, parts, needed, step_cost(setup, weights), chunk, _chunks(work, setup), whole, changes)


def _point(layout: Layout, chip: Chip, chips: int) -> Point:
    """Returns what a training takes on a slice with one mesh."""
    settings, step = layout.setup.settings, price(layout.step, chip, chips)
    chunk = None if layout.chunk is None else price(layout.chunk, chip, chips)
    programs = [(step, settings.steps), *([] if chunk is None else [(chunk, layout.chunks)])]
    busy = Seconds(*(sum(times * one[place] for one, times in programs) for place in range(len(Seconds._fields))))
    copied = round(chip.state_copied * layout.parts["state"])
    parts, needed = layout.parts | {"in between": layout.parts["in between"] + copied}, layout.needed
    needed = max(needed, sum(parts.values()))
    saves = ceil(settings.steps / settings.checkpoint_every)
    saving = saves * layout.state / (hosts_of(chip, chips) * chip.network_rate)
    seconds = saving + sum(times * one.longest for one, times in programs)
    return Point(
        topology=slice_named(chip, chips),
        chips=chips,
        mesh=dict(layout.setup.mesh.shape),
        compiled=False,
        parts=parts,
        needed=needed,
        hbm=chip.hbm,
        fits=needed <= chip.hbm,
        communication=moved(list(layout.step.exchanged)),
        step=step,
        chunk=chunk,
        prompts=settings.prompts_at_once,
        sites_at_once="one" if layout.setup.recipe.in_turn else "all",
        changes=layout.changes,
        run=busy._replace(network=busy.network + saving),
        seconds=seconds,
        tokens=settings.steps * settings.batch / seconds,
    )


def with_compiled(point: Point, plan: TrainingPlan) -> Point:
    """Returns a point with the compiler's memory of the step in place of the model's; its times stay modelled.

    Args:
        point: of a slice and a mesh.
        plan: of the same.
    """
    between = {} if plan.temporaries is None else {"in between": plan.temporaries}
    return point._replace(compiled=True, parts=point.parts | between, needed=plan.needed, fits=plan.fits)


def memory_parts(work: TrainingWorkload, setup: Setup, state: int) -> tuple[dict[str, int], int]:
    """Returns what lies in a chip's memory in a step, by part, and the most that it needs at any time.

    Args:
        work: what shall be trained.
        setup: of the run.
        state: bytes of a chip's part of the state.
    """
    shape = setup.mesh.shape
    settings, weights = setup.settings, placed_model(setup, work.model)
    on_host = encoders_on_host(settings, "tpu")
    resident = [name for name in weights if name == "transformer" or not on_host]
    store = abstract_store(setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh)
    held = {
        "state": state,
        "rows": bytes_per_chip(abstract_rows(setup)),
        "buffer": bytes_per_chip(store) if settings.buffer == "device" else 0,
        "model": sum(bytes_per_chip(weights[name]) for name in resident) if settings.weights == "device" else 0,
    }
    bare = work._replace(model={}, settings=settings)
    between = round(estimate(bare, shape)) - sum(held[name] for name in ("state", "rows", "buffer"))
    parts = held | {"in between": max(0, between)}
    return parts, max(sum(parts.values()), sum(held.values()) - held["rows"] + _refreshing(work, setup, weights))


def _refreshing(work: TrainingWorkload, setup: Setup, weights: Mapping[str, Any]) -> int:
    """Returns what making rows needs besides state, buffer and model: text encoders, or a block and a chunk's rows."""
    if work.run is None or not work.model or setup.settings.weights != "device":
        return 0
    shape, settings = setup.mesh.shape, setup.settings
    on_host = encoders_on_host(settings, "tpu")
    encoders = sum(bytes_per_chip(weights[name]) for name in ("t5", "clip") if name in weights) if on_host else 0
    sites, ways = len(setup.sites.names), shape["data"] * shape["site"]
    rows = sites * rows_of_prompt(work) * settings.prompts_at_once // ways
    config, tokens = work.model["transformer"].config, work.run.tokens
    stream = settings.prompts_at_once * (tokens.img + tokens.txt) * config.d_model * 4 // ways
    one = block_bytes(work.model["transformer"]) // shape["feature"]
    passing = round(stream * (7 + config.hidden_ratio) / shape["feature"]) + one
    return max(encoders + one, passing + COPIES_OF_ROWS * rows * 2 * config.d_model * jnp.dtype(setup.dtype).itemsize)


def _chunks(work: TrainingWorkload, setup: Setup) -> int:
    """Returns how many chunks of prompts a run makes: to fill the buffer, and to replace what each round served."""
    if work.run is None or not work.model:
        return 0
    settings, plan = setup.settings, setup.plan
    of_chunk = rows_of_prompt(work) * settings.prompts_at_once
    renewed = min(plan.capacity, plan.batch * plan.round_batches)
    rounds = ceil(settings.steps / plan.round_batches)
    return ceil(plan.capacity / of_chunk) + (rounds - 1) * ceil(renewed / of_chunk)
