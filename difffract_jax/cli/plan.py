"""`difffract plan`: what a command needs, before there is a device, a model or an hour to lose.

1. `plan COMMAND --device ...` counts every command for GPUs, hosts and TPUs from shapes alone (`estimate`), with the
   weights resident and streamed block by block. Nothing is compiled, which the answer says.
2. Training and traces on TPUs are compiled by libtpu instead: `plan CONFIG --topology ...`, `plan --trace FILE`, and
   the same by `plan train` or `plan trace` with a TPU as --device.
3. `plan CONFIG --sweep ...` models a training on slices of many sizes (`cli/sweep.py`).
4. `planned_rows` is one row per device and way, and the phases of the largest.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.models import dtype_named, work_of
from difffract_jax.cli.settings import PlanConfig
from difffract_jax.config import UserError, read_yaml, resolve
from difffract_jax.trace_settings import TraceConfig
from difffract_jax.transcoders.settings import TrainConfig

DEFAULT_MODEL = "flux-schnell"
COMPILED = ("train", "trace")
"""Commands that libtpu can compile."""
RESIDENT, STREAMED = "resident", "streamed"
RESIDENT_ALONE = ("convert",)
"""Commands that stream in any case, so that nothing else is counted."""
BY_DISK = "--weights disk"
FROM_EMBEDDINGS = ("generate", "trace", "features", "steer")
"""Commands that need no text encoders where prompt embeddings come from a file."""
NOTHING = "nothing that was counted"
"""What makes a command fit that no smaller image and no shorter type does."""
Asked = Annotated[
    str | None,
    typer.Argument(
        metavar="WHAT",
        help="A command: generate, encode, trace, features, steer, heads, effects, validate, evaluate, dashboards, "
        "harvest, convert or train; or a YAML file of settings of a training.",
    ),
]
Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Its model. Default: `flux-schnell`, which need not be here.")
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        help="Where: a GPU's memory as in 24GB, a GPU as in h100, a100-40 or rtx4090, TPUs as in v5e:2x4, a machine "
        "without either as in host:16GB, or `host`, this one. Give it as often as wanted.",
    ),
]
Topologies = Annotated[
    list[str] | None,
    typer.Option("--topology", help="TPUs to compile for, as chip and shape; give it as often as wanted."),
]
Traced = Annotated[
    Path | None, typer.Option("--trace", help="YAML file of settings of `difffract trace`, to plan instead.")
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Of a training or a trace on TPUs, devices by axis, as in data=4,site=2,feature=8; `auto` chooses a "
        "training's. Default: the config's.",
    ),
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep",
        help="TPU slices of many sizes to model a training on, as chip and numbers of chips, as in "
        "v5e:4..256,v5p:4..64 or v6e:16; sizes are powers of two.",
    ),
]
Compile = Annotated[
    int,
    typer.Option(
        "--compile", min=0, help="Of a sweep, slices to compile as well, the smallest that fit first: minutes each."
    ),
]
Table = Annotated[Path | None, typer.Option("--table", help="Write a sweep to this file, .json or .md.")]
FigureFile = Annotated[Path | None, typer.Option("--figure", help="Draw a sweep into this file, .png, .svg or .pdf.")]
Settings = Annotated[Path | None, typer.Option("--config", help="YAML file of settings of the command.")]


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(plan)


def plan(
    what: Asked = None,
    model: Model = None,
    device: Devices = None,
    topology: Topologies = None,
    trace: Traced = None,
    mesh: Mesh = None,
    sweep: Sweep = None,
    compile_slices: Compile = 0,
    table: Table = None,
    figure: FigureFile = None,
    config: Settings = None,
    sets: opt.Sets = None,
    json: opt.Json = False,
) -> None:
    """Say what a command needs, and on which devices it fits, without them: GPUs, hosts and TPUs.

    With --device memory is counted from shapes; --set gives sizes: height, width, text_tokens, dtype, sites, expansion,
    active, transcoders, transcoder_dtype, step, steps, tokens_per_step, batch, expansion_batch, max_nodes, output,
    base, variant. Each way is told: the weights resident, and streamed block by block. Of GPUs 92% count, which the
    commands let JAX take.

    Training and traces on TPUs are compiled, which needs the extra `tpu`, but no TPU and no weights: chips are v5e, v5p
    and v6e, shapes such as v5e:8x8 or v5p:2x2x1. If neither `--mesh` nor the config's `mesh` says how to spread a
    training, the meshes that should need least memory are compiled, until one fits. A step of FLUX's size that fits
    takes minutes to compile; one that does not, seconds. Of a trace, every chip holds the same and takes its share of
    the targets, unless a mesh's `feature` or `site` splits what they hold; its transcoders are those of the settings'
    `plan`.

    With --sweep a training is laid on slices of every size of a range, beginning with the smallest whose chips hold the
    state: memory of a chip by part, what chips exchange, how long a step and a whole run take at the makers' peak
    rates, and what holds them up, `compute`, `memory`, `network` or `host`. That takes seconds and needs no libtpu;
    `--compile 2` compiles the two smallest that fit, too. `--table` and `--figure` write files.

    Example: `difffract plan trace --device 24GB --device h100 --set height=512 --set width=512`; training on TPUs:
    `difffract plan configs/train-flux-schnell.yaml --topology v5p:2x2x1 --topology v5e:8x8`; a trace:
    `difffract plan --trace configs/trace-flux-schnell.yaml --topology v5p:2x2x1`; a training at many sizes:
    `difffract plan configs/train-flux-schnell.yaml --sweep v5e:4..256,v5p:4..64 --figure sweep.png`
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no accelerator is used, even where there is one
    from difffract_jax.cli.output import emit

    sets, is_file = sets or [], what is not None and (Path(what).suffix in (".yaml", ".yml") or Path(what).is_file())
    if trace is not None and is_file:
        raise UserError("Plan a training by its CONFIG or a trace by --trace, not both at once.")
    command = "trace" if trace is not None else "train" if is_file or what is None else str(what)
    file = trace or (Path(str(what)) if is_file else config)
    pods = [name for name in device or () if _is_pod(name)]
    compiled = [*(topology or ()), *(pods if command in COMPILED else ())]
    counted = [name for name in device or () if name not in compiled]
    if sweep is not None:
        _refuse_beside_a_sweep(command, {"--device": device, "--topology": topology, "--mesh": mesh})
        from difffract_jax.cli.sweep import sweep_training

        words, values = sweep_training(_training(file, model, sets), sweep, compile_slices, table, figure)
        emit(values if json else words, as_json=json)
        return
    if compile_slices or table or figure:
        raise UserError("--compile, --table and --figure are of a sweep; add --sweep, as in --sweep v5e:4..256.")
    if not compiled and not counted:
        raise typer.BadParameter("--device is missing; name one, as in 24GB, h100, v5e:2x4 or host:16GB.")
    shown: dict[str, Any] = {}
    if counted:
        shown |= _counted(command, file, model, counted, sets, json)
    if compiled and command not in COMPILED:
        raise UserError(f"--topology compiles a training or a trace, but {command} is counted; give it as --device.")
    if compiled:
        compile_for = _compiled_trace if command == "trace" else _compiled_training
        shown |= compile_for(file, model, compiled, mesh, sets, json)
    lacking = _lacking_encoders(command, file, model, sets, compiled=bool(compiled))
    shown |= {} if lacking is None else {"text_encoders" if json else "text encoders": lacking}
    emit(shown, as_json=json)


def _refuse_beside_a_sweep(command: str, others: Mapping[str, Any]) -> None:
    """Refuses a sweep of what is no training, and options that say where, which it says itself."""
    if command != "train":
        raise UserError(f"--sweep is for trainings, but {command} is asked for; plan it with --device or --topology.")
    given = [name for name, value in others.items() if value]
    if given:
        raise UserError(f"--sweep names its slices and looks for their meshes itself; leave out {' and '.join(given)}.")


def _is_pod(name: str) -> bool:
    from difffract_jax.estimate.places import read_place

    return read_place(name).kind == "tpu"


def _compiled_training(
    file: Path | None, model: str | None, topology: Sequence[str], mesh: str | None, sets: Sequence[str], json: bool
) -> dict[str, Any]:
    """Compiles the step of a training for TPUs."""
    from difffract_jax.cli.plan_tables import planned
    from difffract_jax.sharding import parse_mesh
    from difffract_jax.transcoders.plan import open_topology, smallest_plan
    from difffract_jax.transcoders.plan import plan as compile_for

    settings = _training(file, model, sets)
    asked = mesh or (settings.mesh if "mesh" in settings.model_fields_set else "auto")
    shape = None if asked == "auto" else parse_mesh(asked)
    places, work = [open_topology(name) for name in topology], work_of(settings)
    plans = [compile_for(work, place, shape, lambda sentence: typer.echo(sentence, err=True)) for place in places]
    best = smallest_plan(plans)
    if json:
        return {"plans": [found._asdict() for found in plans], "smallest": best and best.topology}
    return planned(plans, best)


def _training(file: Path | None, model: str | None, sets: Sequence[str]) -> TrainConfig:
    """Returns the settings of a training: of a file, or of a published model."""
    given = {} if model is None else {"model": model}
    named = given | ({} if file is not None else {"model": model or DEFAULT_MODEL, "model_dtype": "bf16"})
    return resolve(TrainConfig, named, file=file, sets=sets)


def _compiled_trace(
    file: Path | None, model: str | None, topology: Sequence[str], mesh: str | None, sets: Sequence[str], json: bool
) -> dict[str, Any]:
    """Compiles the programs of a trace for one chip of every topology, or for a mesh of all its chips."""
    from difffract_jax.circuits.attribution.plan import plan_trace
    from difffract_jax.cli.plan_tables import planned_trace
    from difffract_jax.transcoders.plan import open_topology

    if mesh == "auto":
        raise UserError("`auto` chooses meshes for training alone; name a trace's, as in --mesh feature=8.")
    settings = _traced(file, model, [*sets, *([] if mesh is None else [f"mesh='{mesh}'"])])
    places, asked = [open_topology(name) for name in topology], _asked_trace(settings)
    plans = [plan_trace(asked, place, lambda sentence: typer.echo(sentence, err=True)) for place in places]
    if json:
        return {"plans": [one._asdict() | {"programs": [each._asdict() for each in one.programs]} for one in plans]}
    return planned_trace(plans)


def _traced(file: Path | None, model: str | None, sets: Sequence[str]) -> TraceConfig:
    """Returns the settings of a trace: of a file, or of a published model, whose prompt and target are any."""
    if file is not None:
        return resolve(TraceConfig, {} if model is None else {"model": model}, file=file, sets=sets)
    asked = _asked(None, model, sets)
    names = {"height", "width", "text_tokens", "step", "transcoder_dtype", "expansion_batch", "max_nodes"}
    given = asked.model_dump(include=names)
    assumed = asked.model_dump(include={"sites", "expansion", "active"})
    target = "pixels:color=red" if asked.output else "img/0/f0"
    named = {"model": asked.model, "model_dtype": asked.dtype, "transcoders": "planned", "prompt": "", "target": target}
    return resolve(TraceConfig, {**named, **given, "plan": assumed})


def _asked(file: Path | None, model: str | None, sets: Sequence[str]) -> PlanConfig:
    """Returns what a command shall do: of a file of its settings, of `--set`, or as `plan` assumes."""
    from difffract_jax.cli.workloads import asked_of

    told = {} if file is None else asked_of("trace", read_yaml(file)).model_dump(exclude_unset=True)
    return resolve(PlanConfig, told | ({} if model is None else {"model": model}), sets=sets)


def _counted(
    command: str, file: Path | None, model: str | None, devices: Sequence[str], sets: Sequence[str], json: bool
) -> dict[str, Any]:
    """Counts a command for every device, with the weights resident and streamed."""
    from difffract_jax.cli.plan_tables import counted_json, counted_tables
    from difffract_jax.estimate.counts import COMMANDS, count
    from difffract_jax.estimate.places import read_place

    if command not in (*COMMANDS, "train"):
        raise UserError(
            f"`{command}` is neither a YAML file nor a command that can be planned; there are {', '.join(COMMANDS)} "
            "and train."
        )
    places, found = [read_place(name) for name in devices], []
    for place in places:
        if command == "train":
            found += _counted_training(_training(file, model, sets), place)
            continue
        from difffract_jax.cli.workloads import changes, workload
        from difffract_jax.estimate.counts import remedies

        asked = _asked(file, model, sets)
        for way in (RESIDENT,) if command in RESIDENT_ALONE else (RESIDENT, STREAMED):
            work = workload(command, asked, host=place.kind == "host", streamed=way == STREAMED, room=place.usable)
            ways = changes(asked, ("dtype", "transcoder_dtype", "batch", "height"))
            taken, least = remedies(work, place.usable, ways)
            streams = command not in RESIDENT_ALONE and count(work._replace(streamed=True)).needed <= place.usable
            less = taken if least <= place.usable else [BY_DISK if streams else NOTHING]
            found.append((place, way, count(work), less))
    return (counted_json if json else counted_tables)(command, found)


def _lacking_encoders(
    command: str, file: Path | None, model: str | None, sets: Sequence[str], *, compiled: bool
) -> str | None:
    """Says that a model has no text encoders that could be counted; None where it has, or where none is wanted.

    Args:
        command: its name.
        file: of its settings.
        model: its model, if it is named.
        sets: settings by name, of `trace` itself where it is compiled from a file.
        compiled: whether it was.
    """
    from difffract_jax.loading import described_pipeline
    from difffract_jax.models.absent import AbsentConfig

    if command in RESIDENT_ALONE:
        return None  # no prompt is read
    if command == "train":
        settings = _training(file, model, sets)
        if settings.rows is not None or settings.model in (None, "tiny"):
            return None
        name, given = str(settings.model), {}
    else:
        asked = _traced(file, model, sets) if compiled and file is not None else _asked(file, model, sets)
        if asked.embeddings:
            return None
        name, given = asked.model, {"base": asked.base, "variant": asked.variant}
    if not isinstance(described_pipeline(name, **given).t5, AbsentConfig):
        return None
    if command in FROM_EMBEDDINGS:
        return (
            f"{name} lacks its text encoders, so that none is counted: the bytes hold where prompts come from a file "
            "(--embeddings FILE)"
        )
    return (
        f"{name} lacks its text encoders, without which `{command}` does not run; with those of the release their "
        "weights and work come on top of these bytes"
    )


def _counted_training(settings: TrainConfig, place: Any) -> list[tuple[Any, str, Any, list[str]]]:
    """Counts a training on a device, its model resident and streamed; of rows from disk there is one way."""
    from difffract_jax.estimate.training import count_training
    from difffract_jax.loading import described_pipeline

    read = settings.rows is None and settings.model not in (None, "tiny")
    config = described_pipeline(str(settings.model)) if read else None
    work, platform = work_of(settings), "cpu" if place.kind == "host" else place.kind
    ways = {RESIDENT: "device", STREAMED: "disk"} if read else {RESIDENT: "device"}
    counted = {}
    for way, weights in ways.items():
        asked = settings.model_copy(update={"weights": weights})
        counted[way] = count_training(asked, work._replace(settings=asked), platform, config)
    fitting = {way: one.needed <= place.usable for way, one in counted.items()}
    less = {way: [] if fits else [BY_DISK if fitting.get(STREAMED) else NOTHING] for way, fits in fitting.items()}
    return [(place, way, one, less[way]) for way, one in counted.items()]


def _asked_trace(settings: TraceConfig) -> Any:
    """Returns what shall be traced, as shapes alone."""
    from converters.transcoders import stacked_transcoders
    from difffract_jax.address import read_steps
    from difffract_jax.circuits.attribution.outputs import parse_target
    from difffract_jax.circuits.attribution.plan import TraceWorkload
    from difffract_jax.circuits.notation.feature import Feature
    from difffract_jax.circuits.trace.capture import blocks_for
    from difffract_jax.cli.workloads import type_of
    from difffract_jax.loading import abstract_pipeline, pipeline_shapes
    from difffract_jax.models.presets import PRESETS
    from difffract_jax.models.sampler import PATCH
    from difffract_jax.sharding import parse_mesh
    from difffract_jax.transcoders.sites import parse_sites
    from difffract_jax.transcoders.transcoder import TranscoderConfig, TranscoderSet

    first, last = read_steps(settings.step)
    if first != last:
        raise UserError(f"One step is planned at a time, but step is {settings.step}; a trace holds a record of each.")
    published = settings.model in PRESETS and not Path(settings.model).is_dir()
    named = settings.model_dtype or ("bf16" if published else type_of({"model": settings.model}))
    config, parts = abstract_pipeline(settings.model, dtype_named(named))
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
    mesh = parse_mesh(settings.mesh) if settings.mesh else {}
    targets = min(settings.expansion_batch, settings.max_nodes)
    size = (grid, text_tokens, min(taken.active, features), targets, mesh)
    return TraceWorkload(config, parts, tcs, blocks_for(config, tcs, output), *size, settings.precision)
