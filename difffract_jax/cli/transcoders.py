"""The commands that make transcoders: `harvest`, `plan`, `train`, `evaluate`; registered by `cli.py`.

They follow its rules: settings in, artefacts and a short table out; progress on stderr; imports when a command runs.
"""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.config import TraceConfig, UserError, provenance, resolve
from difffract_jax.transcoders.settings import EvaluateConfig, HarvestConfig, RowSettings, TrainConfig

CAPTION_SEED = 40_000
"""World of the captions that transcoders are trained on: another than those of the model's training and scores."""
AT_ONCE = 8
"""Captions drawn together."""
ConfigFile = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file of settings.")]
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
Join = Annotated[
    str | None,
    typer.Option(
        "--join",
        help="Make this one of several processes: `auto` on a TPU pod or under Slurm, else HOST:PORT,NUMBER,PROCESSES.",
    ),
]
Ks = Annotated[
    str | None,
    typer.Option(
        "--k",
        help="Active features to sweep, as in 2,4,8,16: trains what is missing of `--pareto CONFIG` into `--out`, and "
        "draws it; `--set` then overrides settings of the training.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in `out`, from its newest checkpoint.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(harvest)
    app.command()(plan)
    app.command()(train)
    app.command()(evaluate)


def harvest(config: ConfigFile = None, sets: opt.Sets = None, json: opt.Json = False) -> None:
    """Write the inputs and outputs of a model's MLPs to disk, for `train --set rows=DIR` to read.

    Example: `difffract harvest configs/smoke.yaml --set out=rows`
    """
    settings = resolve(HarvestConfig, _shared(config, HarvestConfig), sets=sets or ())
    from difffract_jax.cli.output import emit, progress
    from difffract_jax.transcoders.sources import open_sampler
    from difffract_jax.transcoders.store import write_store

    pipe, caption = _pipeline(settings)
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
    places, work = [open_topology(name) for name in topology], _work(settings)
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


def train(
    config: ConfigFile = None,
    sets: opt.Sets = None,
    resume: Resume = False,
    join: Join = None,
    json: opt.Json = False,
) -> None:
    """Train transcoders, or SAEs, of a model's MLPs. SIGTERM saves and exits with 0; `--resume` goes on.

    Example: `difffract train configs/smoke.yaml --set out=run`
    """
    settings = resolve(TrainConfig, file=config, sets=sets or ())
    from difffract_jax.cli.output import emit
    from difffract_jax.transcoders.processes import is_first
    from difffract_jax.transcoders.processes import join_processes as join_others

    if join is not None:
        join_others(join)
    done = _train(settings, resume)
    result: dict[str, Any] = {"run": str(settings.out), "step": done.step} | done.metrics
    if done.transcoders is None:
        result["stopped"] = "before the last step; go on with --resume"
    else:
        result["transcoders"] = str(settings.out / "transcoders")
    if is_first():
        emit(result, as_json=json)


def _train(settings: TrainConfig, resume: bool) -> Any:
    """Trains with a progress bar, saves what was made, and returns how the run ended."""
    from difffract_jax.cli.output import training_progress
    from difffract_jax.loading import save_transcoders
    from difffract_jax.transcoders.checkpoints import writing
    from difffract_jax.transcoders.processes import is_first, together
    from difffract_jax.transcoders.setup import open_mesh
    from difffract_jax.transcoders.store import open_store
    from difffract_jax.transcoders.training import Watch
    from difffract_jax.transcoders.training import train as run

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads log what the command then tells
    mesh, sae = open_mesh(settings), settings.role == "sae"
    if settings.rows is None:
        from difffract_jax.transcoders.sources import open_sampler

        pipe, caption = _pipeline(settings, mesh)
        source: Any = open_sampler(settings, pipe, "train", caption=caption, mesh=mesh, sae=sae)
        sources = opt.sources(model=pipe)
    else:
        source = open_store(settings.rows, "train", settings.seed, sae=sae)
        sources = {"rows": str(settings.rows)}
    record = provenance("train", settings, **sources)
    with training_progress(shown=is_first()) as (advance, note):
        done = run(settings, source, record, Watch(advance, note), resume=resume)
    made = done.transcoders
    if made is not None:
        with writing(settings.out):
            together(lambda: save_transcoders(made, settings.out / "transcoders", overwrite=True, provenance=record))
    return done


def _swept(given: dict[str, Any]) -> dict[str, Any]:
    """Trains the sweep that --k asks for, and puts its runs in place of the file of settings."""
    if given["k"] is None:
        return given
    first, *others = _sweep(given["k"], given["pareto"] or [], given["out"], given["sets"])
    return given | {"run": first, "pareto": others, "out": Path(given["out"]) / "report", "sets": None}


@opt.command(EvaluateConfig, arguments=("run",), layers=("sets",), prepare=_swept)
def evaluate(settings: EvaluateConfig, *, k: Ks = None, json: bool) -> None:
    """Measure how faithful trained transcoders are, on prompts that training never saw, and write a report.

    Example: `difffract evaluate run --images 8`; `difffract evaluate --pareto smoke.yaml --k 2,4,8 --out sweep`
    """
    from difffract_jax.cli.output import emit, progress
    from difffract_jax.loading import load_transcoders
    from difffract_jax.organism.scored import accuracies
    from difffract_jax.transcoders.evaluation import evaluate as measure
    from difffract_jax.transcoders.evaluation import read_run
    from difffract_jax.transcoders.evaluation_report import points, write_evaluation_report

    runs = {path: read_run(path) for path in (settings.run, *settings.pareto)}
    first = runs[settings.run]
    pipe, caption = _pipeline(first)
    judge = accuracies if first.model == "organism" else None
    results = {}
    for path, trained in runs.items():
        with progress(f"Measuring {path}") as advance:
            tcs = load_transcoders(path / "transcoders")
            results[str(path)] = measure(settings, trained, pipe, tcs, caption=caption, judge=judge, progress=advance)
    record = provenance("evaluate", settings, **opt.sources(model=pipe))
    report = write_evaluation_report(results, settings.out or settings.run / "report", record)
    more = {"points": points(results)} if k is not None else results[str(settings.run)].summary()
    emit({"report": str(report)} | more, as_json=json)


def _sweep(k: str, configs: list[Path], out: Path | None, sets: list[str] | None) -> list[Path]:
    """Trains the runs of a sweep that are missing, and returns the directories of all."""
    if len(configs) != 1 or out is None:
        raise typer.BadParameter("--k needs one `--pareto CONFIG`, a YAML file of training settings, and `--out`.")
    from difffract_jax.transcoders.sweep import is_begun, is_done, parse_ks, sweep_settings

    base = resolve(TrainConfig, file=configs[0], sets=[*(sets or ()), f"out={out}"])
    runs = sweep_settings(base, parse_ks(k))
    for settings in [run for run in runs if not is_done(run)]:
        if _train(settings, is_begun(settings)).transcoders is None:
            raise UserError(f"The sweep was stopped during {settings.out}; give the command again to go on.")
    return [run.out for run in runs]


def _shared(config: Path | None, cls: type[RowSettings]) -> dict[str, Any]:
    """Returns the settings of a file that `cls` has: one file serves training and harvesting alike."""
    from difffract_jax.config import read_yaml

    other = TrainConfig.model_fields.keys() - cls.model_fields.keys()
    return {} if config is None else {key: v for key, v in read_yaml(config).items() if key not in other}


def _work(settings: TrainConfig) -> Any:
    """Returns what shall be planned: sites, width, and the model that is read, as shapes alone."""
    from difffract_jax.loading import PARTS, abstract_pipeline
    from difffract_jax.transcoders.plan import TrainingWorkload
    from difffract_jax.transcoders.sites import parse_sites
    from difffract_jax.transcoders.store import open_store

    if settings.rows is not None:
        rows = open_store(settings.rows, "train", settings.seed)
        return TrainingWorkload(settings, rows.sites, rows.width, {})
    if settings.model == "tiny":
        pipe, _ = _pipeline(settings)
        config, parts = pipe.config.transformer, {name: getattr(pipe, name) for name in PARTS}
    else:
        config, parts = abstract_pipeline(settings.model, _dtype(settings))
    return TrainingWorkload(settings, parse_sites(settings.sites, config.layout), config.d_model, parts)


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
    config, parts = abstract_pipeline(settings.model, _dtype_named(settings.model_dtype))
    sites, taken = parse_sites(settings.plan.sites, config.layout), settings.plan
    features = round(config.d_model * taken.expansion)
    shape = TranscoderConfig(d_model=config.d_model, features=features, time_embed=256)
    dtype = _dtype_named(settings.transcoder_dtype)
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


def _pipeline(settings: RowSettings, mesh: Any = None) -> tuple[Any, Any]:
    """Returns the model, spread over a mesh if one is given, and its world's captions if it has a world."""
    from difffract_jax.loading import load_pipeline
    from difffract_jax.sharding import pipeline_shardings

    dtype = _dtype(settings)
    if settings.model == "tiny":
        from difffract_jax.models.tiny import random_pipeline

        return random_pipeline(dtype=dtype), None
    sharding = None if mesh is None or mesh.size == 1 else pipeline_shardings(mesh)
    return load_pipeline(settings.model, dtype=dtype, sharding=sharding), _world(settings)


def _dtype(settings: RowSettings) -> Any:
    return _dtype_named(settings.model_dtype)


def _dtype_named(name: str) -> Any:
    import jax.numpy as jnp

    return {"f32": jnp.float32, "bf16": jnp.bfloat16}[name]


def _world(settings: RowSettings) -> Any:
    """Returns the organism's captions by number, drawn apart from those that it was trained and is scored on."""
    if settings.model != "organism":
        return None
    from difffract_jax.organism.world import scenes

    def caption(number: int) -> str:
        return scenes(CAPTION_SEED + settings.seed, number // AT_ONCE, AT_ONCE).captions[number % AT_ONCE]

    return caption
