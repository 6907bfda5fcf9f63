"""What a training run needs besides its steps: to begin, to encode prompts, and to run them through the model.

Each phase is a program of the run, compiled for the mesh as the step is, and what lies on a chip meanwhile:

    first state    the state in the making, buffer, model
    prompts        state, buffer, model; the text encoders, and what they need
    rows           state, buffer, model; what a chunk needs on its way through the model, and its rows

A refresh happens between two steps, when the step's own temporaries are free.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from difffract_jax.config import UserError
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import Run
from difffract_jax.sharding import EVERYWHERE, pipeline_shardings
from difffract_jax.transcoders.compiled import bytes_per_chip, compile_unkept, memory_asked, memory_of
from difffract_jax.transcoders.harvest import NegativeBranch, encode_many, prompts_sharding, sample_rows
from difffract_jax.transcoders.recipe import encoders_on_host
from difffract_jax.transcoders.setup import Setup, abstract_moments, born

ENCODERS = ("t5", "clip")


class Phase(NamedTuple):
    """One program of a run, besides the step.

    Attributes:
        name: of the phase.
        program: what to compile, as `jax.jit`'s `lower` returns it.
        given: parts of the model that are among the program's arguments and lie on a chip in any case.
    """

    name: str
    program: Callable[[], Any]
    given: tuple[str, ...]


def resident_parts(setup: Setup, model: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the parts of the model that lie on the devices while steps are taken."""
    if setup.settings.weights != "device":
        return ()  # its blocks are there while rows are made, two at a time
    if not encoders_on_host(setup.settings, setup.mesh.devices.flat[0].platform):
        return tuple(model)
    return tuple(name for name in model if name == "transformer")


def placed_model(setup: Setup, model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shape, type and place of the weights of a model that is read beside a training."""
    places = pipeline_shardings(setup.mesh, EVERYWHERE)

    def described(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {name: jax.tree.map(described, tree, places(name, tree)) for name, tree in model.items()}


def phases(setup: Setup, model: Mapping[str, Any], run: Run | None) -> list[Phase]:
    """Returns the programs of a run besides its step.

    Args:
        setup: of the run.
        model: part -> abstract tree of the model that is read; empty where rows come from disk.
        run: sizes and schedule of the sampler; None if they are not known, and then its programs are left out, as they
            are where blocks are streamed, each a program of its own.
    """
    found = [Phase("first state", lambda: born(setup).lower(abstract_moments(setup)), ())]
    if run is None or not model or setup.settings.weights != "device":
        return found
    weights, resident = placed_model(setup, model), resident_parts(setup, model)
    inside = tuple(name for name in resident if name in ENCODERS)
    encoders = [weights[name] for name in ENCODERS]
    ids = _ids(setup, (run.text_tokens, model["clip"].config.positions))
    sampled = _sampling(setup, weights["transformer"], run)
    return [
        *found,
        Phase("prompts", lambda: encode_many.lower(*encoders, *ids), inside),
        Phase("rows", lambda: sample_rows.lower(*sampled), ("transformer",)),
    ]


def other_phases(
    setup: Setup, name: str, hbm: int, model: Mapping[str, Any], run: Run | None, sizes: Mapping[str, int]
) -> dict[str, int]:
    """Returns what a chip needs in every phase of a run besides its steps, in bytes.

    Args:
        setup: of the run.
        name: of the topology.
        hbm: bytes of a chip's memory that a program may use.
        model: part -> abstract tree of the model that is read.
        run: sizes and schedule of the sampler; None if they are not known.
        sizes: what a chip holds, from `held_bytes`.
    """
    weights, found = placed_model(setup, model), {}
    for phase in phases(setup, model, run):
        beside = sizes["buffer"] + sizes["model"] - sum(bytes_per_chip(weights[part]) for part in phase.given)
        if phase.name != "first state":
            beside += sizes["state"]
        try:
            found[phase.name] = beside + memory_of(compile_unkept(phase.program()))["peak"]
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                reason = str(error).splitlines()[0]
                raise UserError(f"The compiler cannot build {phase.name} for {name}: {reason}.") from None
            found[phase.name] = beside + memory_asked(str(error), 0).get("peak", hbm)
    return found


def _ids(setup: Setup, lengths: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the tokens that both encoders read."""
    count = setup.settings.prompts_at_once
    spread = prompts_sharding(count, setup.mesh)
    return [jax.ShapeDtypeStruct((count, length), jnp.int32, sharding=spread) for length in lengths]


def _sampling(setup: Setup, transformer: Any, run: Run) -> tuple[Any, ...]:
    """Returns shapes of the arguments of `sample_rows` for one chunk."""
    count, config = setup.settings.prompts_at_once, transformer.config
    spread = prompts_sharding(count, setup.mesh)
    whole = NamedSharding(setup.mesh, PartitionSpec())

    def array(kind: Any, sharding: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    inputs = Inputs(
        array(jnp.float32, spread, count, run.tokens.img, config.in_channels),
        array(setup.dtype, spread, count, run.tokens.txt, config.text_width),
        array(setup.dtype, spread, count, config.pooled_width),
        array(jnp.float32, whole),
        None if run.fed_guidance is None else array(jnp.float32, whole),
    )
    front = (run.steps,) if run.branches == 1 else (run.steps, run.branches)
    by_step = NamedSharding(setup.mesh, PartitionSpec(*[None] * len(front), *spread.spec))
    most = setup.settings.tokens_per_step
    places = {group: group.rows(run.tokens) for group, _ in setup.sites.members}
    tokens = {
        group.name: array(jnp.int32, by_step, *front, count, min(rows, most or rows)) for group, rows in places.items()
    }
    negative = None
    if run.branches > 1:
        negative = NegativeBranch(
            array(setup.dtype, whole, run.tokens.txt, config.text_width),
            array(setup.dtype, whole, config.pooled_width),
            array(jnp.float32, whole),
        )
    return transformer, inputs, array(jnp.float32, whole, run.steps + 1), tokens, run.grid, setup.sites, negative
