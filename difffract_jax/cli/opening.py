"""Opening the model that a command runs: in which type, where its blocks stay, and with which embeddings.

`--weights auto` counts what the command needs with all weights on the device (`estimate`). If that fits, they lie
there. Else, where one prompt is encoded and all but the text encoders fits, these alone are read block by block, once.
Else all blocks are streamed: from host memory where it can hold them beside an accelerator, or else from disk. The
choice is told in one sentence.
"""

import math
import sys
from typing import Any, Literal, NamedTuple

from difffract_jax import loading
from difffract_jax.cli.garbage import often_if_large
from difffract_jax.cli.models import dtype_named
from difffract_jax.cli.preflight import SMALL, capped
from difffract_jax.cli.workloads import asked_of, explaining, type_of, up_to, workload
from difffract_jax.config import Settings, UserError
from difffract_jax.estimate.counts import count
from difffract_jax.estimate.weights import (
    abstract_parts,
    around_bytes,
    block_bytes,
    bytes_of,
    largest_block,
    weights_needed,
)
from difffract_jax.memory import allow, host_memory, memory_for, parse_bytes, text_of_bytes
from difffract_jax.models.embeddings import read_embeddings, with_embeddings
from difffract_jax.models.pipeline import Pipeline, plan_run
from difffract_jax.models.streaming import whole_bytes

Place = Literal["device", "host", "disk"]
ONE_PROMPT = ("generate", "trace", "steer", "features", "effects", "heads", "validate")
"""Commands that encode few prompts, in the beginning."""


class Opened(NamedTuple):
    """A model, and where its blocks stay; transcoders stay there, too."""

    pipe: Pipeline
    weights: Place


def open_model(command: str, settings: Settings, *, sharding: Any = None, **known: Any) -> Opened:
    """Loads the model that a command's settings name.

    Args:
        command: its name.
        settings: of it; `weights`, `memory`, `embeddings`, `base`, `variant`, `lora` and the type count, as far as it
            has them.
        sharding: as for `load_pipeline`; then nothing is streamed.
        known: as for `preflight.check_fits`.

    Raises:
        UserError: if one block does not fit, or the model or the embeddings cannot be loaded.
    """
    given = settings.model_dump() | known
    allow(None if given.get("memory") is None else parse_bytes(given["memory"], "--memory"))
    embeddings = None if given.get("embeddings") is None else read_embeddings(given["embeddings"])
    asked = {name: given[name] for name in ("guidance", "negative_prompt") if given.get(name) is not None}
    if asked.get("guidance") or "negative_prompt" in asked:  # what takes none is told before its weights are read
        described = loading.described_pipeline(given["model"], base=given.get("base"), variant=given.get("variant"))
        plan_run(described, **asked)
    name = given.get("dtype") or given.get("model_dtype")
    if sharding is not None and given.get("weights") in ("host", "disk"):
        raise UserError(
            f"--mesh splits weights that lie on its devices, but --weights is {given['weights']}, from where they are "
            "fetched one block at a time; leave one of the two out."
        )
    weights, encoders = ("device", None) if sharding is not None else places_of(command, settings, **known)
    # With embeddings the text encoder is not run at all, and of recorded activations for a contrast prompt alone.
    seldom = embeddings is not None or (given.get("activations") is not None and sharding is None)
    # Of `encode` the text encoders alone run, so that the transformer's blocks need not be read.
    encodes = command == "encode"
    pipe = loading.load_pipeline(
        given["model"],
        base=given.get("base"),
        variant=given.get("variant"),
        dtype=None if name is None else dtype_named(name),
        sharding=sharding,
        weights="disk" if encodes else weights,
        text_encoders=weights if encodes else "disk" if seldom else encoders,
        lora=given.get("lora", ()),
        encoders=embeddings is None,
    )
    often_if_large(whole_bytes((pipe.transformer, pipe.t5, pipe.clip)))
    return Opened(pipe if embeddings is None else with_embeddings(pipe, embeddings), weights)


def place_of(command: str, settings: Settings, **known: Any) -> Place:
    """Returns where a command's weights stay, but for text encoders of their own; see `places_of`."""
    return places_of(command, settings, **known)[0]


def places_of(command: str, settings: Settings, **known: Any) -> tuple[Place, Place | None]:
    """Returns where a command's weights stay, and says so where they are streamed by our choice.

    Args:
        command: its name.
        settings: of it.
        known: as for `preflight.check_fits`.

    Returns:
        The place of all, and that of the text encoders' blocks; None for the same.

    Raises:
        UserError: if the memory that is allowed does not hold two blocks, which streaming needs.
    """
    given = {name: value for name, value in settings.model_dump(exclude={"plan"}).items() if value is not None} | known
    grid, targets = given.pop("grid", None), given.pop("targets", ())
    asked = given.get("weights", "device")
    uncounted = str(given["model"]) in SMALL and "memory" not in given
    if asked == "device" or (asked == "auto" and uncounted):
        return "device", None
    import jax

    device = jax.devices()[0]
    there = capped(memory_for(device), given)
    work = _work(command, given, host=device.platform == "cpu")
    if work is None:
        return "device" if asked == "auto" else asked, None
    work = work._replace(room=there.available) if grid is None else work._replace(room=there.available, grid=grid)
    work = work if "sites" in given else up_to(work, targets)
    work = explaining(work, given, len(targets))
    _refuse_tight(work, there)
    needed = count(work).needed
    if asked != "auto" or needed <= there.available:
        return "device" if asked == "auto" else asked, None
    why = (
        f"With all of them on the device, {command} needs about {text_of_bytes(needed)}, but {there.bound} leaves "
        f"{text_of_bytes(there.available)}"
    )
    if command in ONE_PROMPT and not given.get("prompts") and _beside_encoders(work) <= there.available:
        sys.stderr.write(f"Weights: device; of the text encoder, disk. {why}; its blocks are read one at a time.\n")
        return "device", "disk"
    sizes = sum(weights_needed(work.shapes, work.dtype).values())
    place: Place = "disk" if device.platform == "cpu" or sizes > 0.8 * host_memory().available else "host"
    where = {"disk": "read from disk", "host": "kept in host memory, and fetched"}[place]
    sys.stderr.write(f"Weights: {place}. {why}; blocks are {where} one at a time.\n")
    return place, None


def _beside_encoders(work: Any) -> int | float:
    """Returns the bytes that a command needs where the blocks of the text encoder pass through memory."""
    if "t5" not in work.shapes:
        return math.inf
    parts = abstract_parts({name: work.shapes[name] for name in ("t5", "clip")}, work.dtype)
    held = around_bytes(parts["t5"], streamed=True) + 2 * block_bytes(parts["t5"]) + bytes_of(parts["clip"])
    others = {name: shape for name, shape in work.shapes.items() if name not in parts}
    return held + count(work._replace(shapes=others)).needed


def _work(command: str, given: dict[str, Any], *, host: bool) -> Any:
    """Returns the command's work with weights on the device; None where it cannot be counted: loading tells why."""
    try:
        given = given | {"dtype": type_of(given)}
        names = {"model", "base", "variant", "transcoders", "sites", "height", "width", "text_tokens", "step", "steps"}
        names |= {"dtype", "model_dtype", "transcoder_dtype", "batch", "output", "embeddings"}
        names |= {"expansion_batch", "max_nodes"}
        asked = asked_of(command, {"sites": ("*/*",)} | {name: given[name] for name in names & given.keys()})
        return workload(command, asked, host=host)
    except UserError:
        return None


def _refuse_tight(work: Any, there: Any) -> None:
    block = largest_block(work.shapes, work.dtype)
    if 2 * block > there.available:
        raise UserError(
            f"Even streamed, the largest block of the model takes {text_of_bytes(block)}, and two are in memory at a "
            f"time, but {there.bound} leaves {text_of_bytes(there.available)}; allow more memory, or keep weights in "
            "bf16."
        )
