"""A look before a command loads anything: what cannot fit is told in a sentence, with what would.

1. The command's work is counted from `config.json` files (`workloads`, `estimate`), which takes a second or two.
2. What it holds throughout is exact: if that alone is more than there is, the command ends here.
3. What it needs in between is an estimate: if the two together are more than there is, a note says so.

Nothing is counted of the embedded model, which fits everywhere, nor of models on the hub or in buckets, which are not
here yet, nor where weights are spread over a mesh. `--no-preflight` leaves the look out.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from difffract_jax.config import ORGANISMS, Settings, UserError
from difffract_jax.memory import Memory, memory_for, parse_bytes, text_of_bytes

SMALL = (*ORGANISMS, "tiny")
OFF = "--no-preflight"
switched_off = False
"""Set by `main` where `--no-preflight` is given."""


def check_fits(command: str, settings: Settings, **known: Any) -> None:
    """Refuses a command that cannot fit the memory there is.

    Args:
        command: its name.
        settings: of it.
        known: what a graph says of its run, by the names of `PlanConfig`, and `grid`; of a trace its `targets`.

    Raises:
        UserError: if what it holds is more than the device, or the host where it computes, has.
    """
    set_here = settings.model_dump(exclude={"plan"})
    given = {name: value for name, value in set_here.items() if value is not None} | known
    grid, targets = given.pop("grid", None), given.pop("targets", ())
    if switched_off or given.get("model") in (None, *SMALL) or given.get("mesh"):
        return
    from difffract_jax.hub.names import parse_hub_name
    from difffract_jax.storage.remote.addresses import is_remote

    names = [str(given[name]) for name in ("model", "base") if name in given]
    if any(is_remote(name) or parse_hub_name(name) is not None for name in names):
        return
    import jax

    from difffract_jax.cli.workloads import asked_of, explaining, type_of, up_to, workload
    from difffract_jax.estimate.counts import count

    device = jax.devices()[0]
    there = capped(memory_for(device), given)
    # Where a command may stream its weights, that is what it needs at least.
    streamed = given.get("weights", "device") != "device"
    try:
        dtype = type_of(given) if "weights" in given else "f32"
        asked = asked_of(command, {"dtype": dtype, "sites": ("*/*",)} | given)
        work = workload(command, asked, host=device.platform == "cpu", streamed=streamed, room=there.available)
        work = work if grid is None else work._replace(grid=grid)
        work = work if "sites" in given else up_to(work, targets)
        work = explaining(work, given, len(targets))
    except UserError:
        return  # loading tells it better
    needed = count(work)
    if needed.held > there.available:
        from difffract_jax.cli.workloads import changes

        raise UserError(_refusal(command, work, there, changes(asked, tuple(type(settings).model_fields))))
    if needed.needed > there.available:
        sys.stderr.write(
            f"Note: {command} needs about {text_of_bytes(needed.needed)}, most to {needed.largest.name}, but "
            f"{there.bound} leaves {text_of_bytes(there.available)}; it may not fit.\n"
        )


def check_graph_fits(command: str, settings: Settings, graph: Any) -> None:
    """Refuses a command that cannot fit the memory there is, of one that captures a graph's run anew.

    Args:
        command: its name.
        settings: of it.
        graph: position by position; one that does not tell its run is refused later.
    """
    if str(settings.model_dump()["model"]) not in SMALL and graph.provenance.run is not None and graph.provenance.steps:
        check_fits(command, settings, **known_of(graph))


def known_of(graph: Any) -> dict[str, Any]:
    """Returns what a graph says of its run, as far as memory depends on it; what it does not tell is left out.

    Args:
        graph: position by position.
    """
    from difffract_jax.cli.used import traced_types
    from difffract_jax.graphs.graph import OUTPUT

    told, steps = graph.provenance, graph.provenance.steps
    known: dict[str, Any] = {} if told.run is None else {"grid": told.run.grid, "text_tokens": told.run.text_tokens}
    known |= {"step": f"{min(steps)}-{max(steps)}"} if steps else {}
    return known | traced_types(graph) | {"output": bool((graph.node_kind == OUTPUT).any())}


def loras_of(graph: Any, given: Sequence[str]) -> dict[str, Any]:
    """Returns the LoRAs that a graph's model is loaded with: those that are named, or those that it was traced with.

    Args:
        graph: the graph.
        given: those that are named, FILE or FILE:SCALE.
    """
    traced = (graph.provenance.settings or {}).get("lora")
    return {"lora": tuple(given) or tuple(traced if isinstance(traced, list | tuple) else ())}


def check_training_fits(work: Any) -> None:
    """Refuses a training whose state, buffer, model and rows are more than a device has.

    Args:
        work: a `TrainingWorkload`, with the settings that will be used.

    Raises:
        UserError: saying which takes how much.
    """
    if switched_off or str(work.settings.model) in SMALL:
        return
    from difffract_jax.transcoders.plan import held_bytes
    from difffract_jax.transcoders.setup import open_mesh, set_up

    mesh = open_mesh(work.settings)
    held = held_bytes(set_up(work.settings, work.sites, work.width, mesh), work.model)
    device = mesh.devices.flat[0]
    there = memory_for(device)
    # Devices that a processor pretends to be share its memory.
    each = there.available // (mesh.local_mesh.size if device.platform == "cpu" else 1)
    if sum(held.values()) > each:
        parts = ", ".join(f"{name} {text_of_bytes(size)}" for name, size in held.items() if size)
        raise UserError(
            f"train needs at least {text_of_bytes(sum(held.values()))} on every device ({parts}), but of {there.bound} "
            f"{text_of_bytes(each)} are free; train fewer --sites, or of fewer features (--expansion), keep fewer "
            f"--buffer-rows, the model in --model-dtype bf16, or spread it with --mesh; `difffract plan train` counts, "
            f"and {OFF} tries all the same."
        )


def capped(there: Memory, given: Mapping[str, Any]) -> Memory:
    """Returns the memory there is, or what `--memory` allows of it.

    Args:
        there: the memory there is.
        given: a command's settings by name.
    """
    if given.get("memory") is None:
        return there
    most = parse_bytes(given["memory"], "--memory")
    return Memory(most, most, "--memory") if most < there.available else there


def _refusal(command: str, work: Any, there: Memory, ways: Any) -> str:
    from difffract_jax.estimate.counts import count, remedies

    estimate = count(work)
    phase = max(estimate.phases, key=lambda one: sum(one.held.values()))
    parts = ", ".join(f"{name} {text_of_bytes(size)}" for name, size in phase.held.items() if size)
    taken, needed = remedies(work, there.available, ways)
    advice = f"with {', '.join(taken)} it needs about {text_of_bytes(needed)}" if taken else "nothing makes it fit here"
    if taken and needed > there.available:
        advice += ", which is more still"
    return (
        f"{command} needs at least {text_of_bytes(estimate.held)} to {phase.name} ({parts}), but of {there.bound} "
        f"{text_of_bytes(there.available)} are free; {advice}; `difffract plan {command}` counts other sizes "
        f"and devices, and {OFF} tries all the same."
    )
