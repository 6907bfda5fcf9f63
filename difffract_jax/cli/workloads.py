"""What a command shall do, as shapes alone: for `plan`, and for the look that commands take before they load anything.

1. `asked_of` boils a command's settings down to those that its memory depends on, `PlanConfig`.
2. `workload` makes shapes of them: of a model and of transcoders that are here, or of a published model and of
   transcoders as `PlanConfig` describes them.
3. `changes` are what a user could write to make the command smaller, in the order in which they cost least.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difffract_jax.address import read_steps
from difffract_jax.circuits.trace.record import Blocks
from difffract_jax.cli.models import dtype_named
from difffract_jax.cli.settings import PlanConfig
from difffract_jax.cli.used import up_to_targets
from difffract_jax.config import SamplingSettings, UserError, resolve
from difffract_jax.directories import SHIPPED, checkpoint, pipeline_directory
from difffract_jax.estimate.counts import COMMANDS
from difffract_jax.estimate.weights import Transcoders
from difffract_jax.estimate.work import Work
from difffract_jax.loading import PARTS, described_pipeline, from_json
from difffract_jax.models.pipeline import plan_run
from difffract_jax.parts import dtype_of_files
from difffract_jax.storage.checkpoint import read_config
from difffract_jax.transcoders.sites import parse_sites, sites_in, sites_of, some_sites
from difffract_jax.transcoders.transcoder import TranscoderConfig

WITHOUT_TRANSCODERS = ("generate", "encode", "convert")
ROWS = ("harvest", "evaluate")
"""Commands that make rows of whole runs."""
RECORDING = ("trace", "heads", "effects", "validate")
SMALLEST = 256
"""Pixels of a side below which no smaller image is advised."""


def asked_of(command: str, given: Mapping[str, Any]) -> PlanConfig:
    """Returns the settings that memory depends on, of a command's settings by name.

    Args:
        command: its name.
        given: those that are set; a trace's `plan` and `model_dtype` count as what `plan` calls them.
    """
    values = dict(given) | dict(given.get("plan") or {})
    if "model_dtype" in values:
        values["dtype"] = values["model_dtype"]
    if "steps_per_image" in values:
        values["steps"] = values["steps_per_image"]
    if isinstance(values.get("sites"), str):
        values["sites"] = tuple(values["sites"].split(","))
    names = PlanConfig.model_fields.keys() - (set() if command in RECORDING else {"step"})
    known = {name: values[name] for name in names if values.get(name) is not None}
    known["embeddings"] = bool(given.get("embeddings"))
    return resolve(PlanConfig, known)


def type_of(given: Mapping[str, Any]) -> str:
    """Returns the type of a model's weights in memory: the one that is given, or that of its files.

    Args:
        given: settings of a command by name.
    """
    named = given.get("dtype") or given.get("model_dtype")
    if named is not None:
        return str(named)
    alone = given.get("base") is not None
    home = checkpoint(given["model"], completed=True) if alone else pipeline_directory(given["model"], parts=())
    stored = dtype_of_files(home.path)
    return "bf16" if stored == dtype_named("bf16") else "f32"


def steps_of(settings: SamplingSettings) -> int:
    """Returns the denoising steps of a run: those that are named, or the model's own default.

    Args:
        settings: of a command that makes one.
    """
    return settings.steps or described_pipeline(settings.model).defaults.steps


def workload(
    command: str, asked: PlanConfig, *, host: bool = False, streamed: bool = False, room: int | None = None
) -> Work:
    """Returns a command's work.

    Args:
        command: one of `estimate.counts.COMMANDS`.
        asked: its settings.
        host: whether a processor computes.
        streamed: whether weights pass through memory block by block.
        room: bytes that the command may use; None where they are not known.

    Raises:
        UserError: if the model or transcoders are neither here nor known, or a size does not divide.
    """
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command that can be planned; there are {', '.join(COMMANDS)} and train.")
    config = described_pipeline(asked.model, base=asked.base, variant=asked.variant)
    run = plan_run(config, **asked.model_dump(include={"steps", "height", "width", "text_tokens", "guidance"}))
    shapes, layout = {name: getattr(config, name) for name in PARTS}, config.transformer.layout
    first, last = read_steps(asked.step)
    steps = last - first + 1 if command not in ROWS else asked.steps or run.steps
    # A trace of an output holds both evaluations of a step, and so do rows.
    both = command in ("harvest", "evaluate") or (command in RECORDING and (steps > 1 or asked.output))
    steps *= run.branches if both else 1
    work = Work(command, shapes, dtype_named(asked.dtype), run.grid, run.text_tokens, host=host, streamed=streamed)
    work = work._replace(batch=asked.batch, targets=min(asked.expansion_batch, asked.max_nodes), steps=steps, room=room)
    # Rows of both evaluations are made one after the other, images of both at once.
    work = work._replace(branches=1 if command == "harvest" else run.branches, scanned=run.evaluations)
    if command == "harvest":
        work = work._replace(tokens=asked.tokens_per_step)
    if asked.embeddings and command != "encode":
        work = work._replace(shapes={name: shapes[name] for name in ("transformer", "vae")})
    if command in WITHOUT_TRANSCODERS:
        return work
    tcs = _transcoders(asked, config.transformer)
    held = [block for placed in tcs.sites.slots(layout) for block in placed]
    across = command in RECORDING and steps > 1
    through = asked.output or across or command == "effects"
    blocks = Blocks(0 if across else min(held), layout.depth if through else max(held) + 1, through)
    return work._replace(tcs=tcs, recorded=(blocks.first, blocks.end))


def up_to(work: Work, targets: Sequence[Any]) -> Work:
    """Returns a trace's work with the sites alone that can bear on its targets, as the command loads them.

    Args:
        work: of a trace.
        targets: features or outputs; none leaves all sites.
    """
    layout = work.shapes["transformer"].layout
    wanted = up_to_targets(layout, targets, (0, work.steps - 1)) if targets and work.tcs is not None else None
    if wanted is None or work.tcs is None:
        return work
    kept = {group.name: [n for n in numbers if wanted(group.label, n)] for group, numbers in work.tcs.sites.members}
    sites = sites_of(kept, tuple(group for group, _ in work.tcs.sites.members))
    held = [block for placed in sites.slots(layout) for block in placed]
    return work._replace(tcs=work.tcs._replace(sites=sites), recorded=(min(held), max(held) + 1)) if held else work


def explaining(work: Work, given: Mapping[str, Any], targets: int) -> Work:
    """Returns a trace's work with what it shall explain beside features: attention, and the pooled path.

    Args:
        work: of a command.
        given: its settings.
        targets: how many it has.
    """
    explained = targets if given.get("attention") == "explained" else work.explained
    return work._replace(explained=explained, pooled=given.get("pooled") == "explained")


def _transcoders(asked: PlanConfig, model: Any) -> Transcoders:
    """Returns the shape of the transcoders that are named and here, or else of those that the settings describe."""
    itemsize = dtype_named(asked.transcoder_dtype).dtype.itemsize
    path = Path(SHIPPED.get(str(asked.transcoders), asked.transcoders or ""))
    if asked.transcoders is not None and (path / "config.json").is_file():
        record = read_config(path)
        config, held = from_json(TranscoderConfig, record["config"], path), sites_in(record)
        sites = some_sites(held, asked.sites, str(path))[0] if "sites" in asked.model_fields_set else held
    else:
        features = round(model.d_model * asked.expansion)
        config = TranscoderConfig(d_model=model.d_model, features=features, time_embed=256)
        sites = parse_sites(asked.sites, model.layout)
    return Transcoders(config, sites, itemsize, min(asked.active, config.features))


def changes(asked: PlanConfig, options: Sequence[str]) -> list[tuple[str, Callable[[Work], Work]]]:
    """Returns what could be written to make a command smaller, and what each makes of its work.

    Args:
        asked: the command's settings.
        options: names of the options that it has.
    """
    narrow, found = dtype_named("bf16"), []

    def add(name: str, words: str, change: Callable[[Work], Work]) -> None:
        if name in options:
            found.append((words, change))

    def narrower(work: Work) -> Work:
        return work if work.tcs is None else work._replace(tcs=work.tcs._replace(itemsize=narrow.dtype.itemsize))

    def smaller(work: Work) -> Work:
        rows, columns = work.grid
        return work._replace(grid=(max(1, rows // 2), max(1, columns // 2)))

    add("weights", "--weights disk", lambda work: work._replace(streamed=True))
    for name in ("dtype", "model_dtype"):
        if asked.dtype == "f32":
            add(name, f"--{name.replace('_', '-')} bf16", lambda work: work._replace(dtype=narrow))
    if asked.transcoder_dtype == "f32":
        add("transcoder_dtype", "--transcoder-dtype bf16", narrower)
    add("attention", "--attention frozen", lambda work: work._replace(explained=0))
    add("pooled", "--pooled frozen", lambda work: work._replace(pooled=False))
    if asked.batch > 1:
        add("batch", "--batch 1", lambda work: work._replace(batch=1))
    config = described_pipeline(asked.model, base=asked.base, variant=asked.variant)
    height, width = asked.height or config.defaults.height, asked.width or config.defaults.width
    if min(height, width) >= 2 * SMALLEST:
        add("height", f"--height {height // 2} --width {width // 2}", smaller)
    return found
