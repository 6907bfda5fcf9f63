"""The commands that make transcoders, besides `train`: `harvest` and `plan`; registered by `main`.

They follow the rules there: settings in, artefacts and a short table out; progress on stderr; imports when a command
runs.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.models import dtype_named, pipeline_of, work_of
from difffract_jax.cli.training import ConfigFile
from difffract_jax.config import TraceConfig, UserError, provenance, resolve
from difffract_jax.transcoders.settings import HarvestConfig, RowSettings, TrainConfig

Topologies = Annotated[
    list[str], typer.Option("--topology", help="TPUs to plan for, as chip and shape; give it as often as wanted.")
]
Traced = Annotated[
    Path | None, typer.Option("--trace", help="YAML file of settings of `difffract trace`, to plan instead.")
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh", help="Devices by axis, as in data=4,site=2,feature=8; `auto` chooses. Default: the config's."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(harvest)
    app.command()(plan)


def harvest(config: ConfigFile = None, sets: opt.Sets = None, json: opt.Json = False) -> None:
    """Write the inputs and outputs of a model's MLPs to disk, for `train --rows DIR` to read.

    Example: `difffract harvest configs/smoke.yaml --set out=rows`
    """
    settings = resolve(HarvestConfig, _shared(config, HarvestConfig), sets=sets or ())
    from difffract_jax.cli.output import emit, progress
    from difffract_jax.transcoders.sources import open_sampler
    from difffract_jax.transcoders.store import write_store

    pipe, caption = pipeline_of(settings)
    sources: dict[Any, Any] = {
        split: open_sampler(settings, pipe, split, caption=caption) for split in ("train", "validation")
    }
    wanted = {"train": settings.train_prompts, "validation": settings.validation_prompts}
    chunks: dict[Any, int] = {split: -(-count // settings.prompts_at_once) for split, count in wanted.items()}
    record = provenance("harvest", settings, **opt.sources(model=pipe))
    with progress("Harvesting") as advance:
        made = write_store(sources, chunks, settings.out, record, advance)
    rows = {split: sum(max(shard.values()) for shard in shards) for split, shards in made["rows"].items()}
    emit({"rows": str(settings.out), "sites": len(sources["train"].sites.names)} | rows, as_json=json)


def plan(
    topology: Topologies,
    config: ConfigFile = None,
    trace: Traced = None,
    mesh: Mesh = None,
    sets: opt.Sets = None,
    json: opt.Json = False,
) -> None:
    """Say whether training, or a trace, fits TPUs that are not here: memory per chip, FLOPs, by compiling it.

    Chips are v5e, v5p and v6e, shapes such as v5e:8x8 or v5p:2x2x1. If neither `--mesh` nor the config's `mesh` says
    how to spread the work, the meshes that should need least memory are compiled, until one fits. Needs the extra
    `tpu`, but no TPU and no weights. A step of FLUX's size that fits takes minutes to compile; one that does not,
    seconds. With `--trace` the programs of `difffract trace` are compiled for one chip instead: every chip of a pod
    holds the same, and takes its share of the targets. Its transcoders are those of the settings' `plan`.

    Example: `difffract plan configs/train-flux-schnell.yaml --topology v5p:2x2x1 --topology v5e:8x8`;
    a trace: `difffract plan --trace configs/trace-flux-schnell.yaml --topology v5p:2x2x1`
    """
    if trace is not None:
        if config is not None or mesh is not None:
            raise UserError("Plan a training by its CONFIG or a trace by --trace, without --mesh, not both at once.")
        return _plan_trace(resolve(TraceConfig, file=trace, sets=sets or ()), topology, json)
    settings = resolve(TrainConfig, file=config, sets=sets or ())
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is used, even where there is one
    from difffract_jax.cli.output import emit, planned
    from difffract_jax.sharding import parse_mesh
    from difffract_jax.transcoders.plan import open_topology, smallest_plan
    from difffract_jax.transcoders.plan import plan as compile_for

    asked = mesh or (settings.mesh if "mesh" in settings.model_fields_set else "auto")
    shape = None if asked == "auto" else parse_mesh(asked)
    places, work = [open_topology(name) for name in topology], work_of(settings)
    plans = [compile_for(work, place, shape, lambda sentence: typer.echo(sentence, err=True)) for place in places]
    best = smallest_plan(plans)
    if json:
        emit({"plans": [found._asdict() for found in plans], "smallest": best and best.topology}, as_json=True)
    else:
        emit(planned(plans, best))


def _plan_trace(settings: TraceConfig, topology: list[str], json: bool) -> None:
    """Plans the trace that the settings describe for one chip of every topology."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is used, even where there is one
    from difffract_jax.circuits.attribution.plan import plan_trace
    from difffract_jax.cli.output import emit, planned_trace
    from difffract_jax.transcoders.plan import open_topology

    places, asked = [open_topology(name) for name in topology], _asked_trace(settings)
    plans = [plan_trace(asked, place, lambda sentence: typer.echo(sentence, err=True)) for place in places]
    if json:
        found = [one._asdict() | {"programs": [program._asdict() for program in one.programs]} for one in plans]
        emit({"plans": found}, as_json=True)
    else:
        emit(planned_trace(plans))


def _shared(config: Path | None, cls: type[RowSettings]) -> dict[str, Any]:
    """Returns the settings of a file that `cls` has: one file serves training and harvesting alike."""
    from difffract_jax.config import read_yaml

    other = TrainConfig.model_fields.keys() - cls.model_fields.keys()
    return {} if config is None else {key: v for key, v in read_yaml(config).items() if key not in other}


def _asked_trace(settings: TraceConfig) -> Any:
    """Returns what shall be traced, as shapes alone."""
    from converters.transcoders import stacked_transcoders
    from difffract_jax.circuits.attribution.outputs import parse_target
    from difffract_jax.circuits.attribution.plan import TraceWorkload
    from difffract_jax.circuits.notation.feature import Feature
    from difffract_jax.circuits.trace.capture import blocks_for
    from difffract_jax.cli.requests import read_steps
    from difffract_jax.loading import abstract_pipeline, pipeline_shapes
    from difffract_jax.models.sampler import PATCH
    from difffract_jax.sharding import parse_mesh
    from difffract_jax.transcoders.sites import parse_sites
    from difffract_jax.transcoders.transcoder import TranscoderConfig, TranscoderSet

    first, last = read_steps(settings.step)
    if first != last:
        raise UserError(f"One step is planned at a time, but step is {settings.step}; a trace holds a record of each.")
    config, parts = abstract_pipeline(settings.model, dtype_named(settings.model_dtype))
    sites, taken = parse_sites(settings.plan.sites, config.layout), settings.plan
    features = round(config.d_model * taken.expansion)
    shape = TranscoderConfig(d_model=config.d_model, features=features, time_embed=256)
    dtype = dtype_named(settings.transcoder_dtype)
    stacks = {name: stacked_transcoders(shape, len(numbers), dtype) for name, numbers in sites.groups.items()}
    tcs = TranscoderSet(stacks, sites, shape, "planned")
    asked = [settings.target] if isinstance(settings.target, str) else settings.target
    output = any(not isinstance(parse_target(one), Feature) for one in asked)
    unit = PATCH * pipeline_shapes(settings.model)["vae"].factor
    height, width, text_tokens = settings.height, settings.width, settings.text_tokens
    if height is None or width is None or text_tokens is None or height % unit or width % unit:
        raise UserError(f"A plan needs height and width, multiples of {unit}, and text_tokens; give them in its file.")
    grid = height // unit, width // unit
    shards = parse_mesh(settings.mesh).get("data", 1) if settings.mesh else 1
    size = (grid, text_tokens, min(taken.active, features), settings.expansion_batch, shards)
    return TraceWorkload(config, parts, tcs, blocks_for(config, tcs, output), *size, settings.precision)
