"""`difffract train`: in one line or by a file of settings, stopped when it suits, resumed, exported at any time.

1. `_given` turns the line into settings: --layers and --streams into sites; --resume without a file, and --export, take
   what is not on the line from the run itself.
2. `_completed` fills in what suits the rows, unless a file of settings was given, and remembers where every value came
   from. Settings, origins and the memory that they will need are shown before the first row is read.
3. `run_training` trains and saves the transcoders; `evaluate --k` calls it too.
"""

import logging
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.hosts import Join, as_one_of
from difffract_jax.cli.models import check_weights, model_of, pipeline_of, rows_in, with_origin, work_of, world_of
from difffract_jax.cli.preflight import check_training_fits
from difffract_jax.cli.restarts import is_supervised, supervise
from difffract_jax.config import UserError, provenance, read_yaml
from difffract_jax.storage.remote.cache import has_file, local_file
from difffract_jax.transcoders.settings import TrainConfig

ConfigFile = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file of settings.")]
Layers = Annotated[
    str | None, typer.Option("--layers", help="Blocks to train at, as in 6,12,18 or 0-5: short for --sites.")
]
Streams = Annotated[
    str | None,
    typer.Option("--streams", help="Streams of these blocks, as in img,txt or single. Default: img,txt."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in `out`, from its newest checkpoint.")]
Export = Annotated[
    Path | None,
    typer.Option(
        "--export",
        metavar="RUN",
        help="Train nothing: write the transcoders of RUN's newest checkpoint to --out, by default RUN/transcoders.",
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        "--max-restarts",
        min=0,
        help="Go on with the run in `out` if there is one, and start it again up to so many times when it was killed "
        "or another host died; each time after twice the wait.",
    ),
]
SWITCHED_OFF = ("scale_rows", "project_decoder")
"""Settings that are on unless `--set` says otherwise, for which an option could only say what is so anyway."""
GIB = 2**30
LARGE = 8 * GIB
"""Models that take more than this in float32 are read in bfloat16, unless told otherwise."""


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(train)


def _given(given: dict[str, Any]) -> dict[str, Any]:
    """Turns the command line into settings."""
    line = {name: value for name, value in given.items() if value not in (None, [])}
    if given["export"] is not None:
        others = [name for name, value in line.items() if value is not False and name not in ("export", "out", "json")]
        if others:
            raise UserError(f"--export trains nothing and takes --out alone; leave {_as_written(others[0], line)} out.")
        return _of_run(given["export"]) | {"out": line.get("out", given["export"] / "transcoders")}
    if given["layers"] is not None or given["streams"] is not None:
        if "sites" in line or "rows" in line:
            raise UserError(
                "--layers and --streams say which sites, so leave out --sites, or --rows, which has its own."
            )
        from difffract_jax.transcoders.sites import layer_patterns

        line["sites"] = layer_patterns(given["layers"], given["streams"])
    if given["file"] is not None:
        if not has_file(given["file"]):
            raise UserError(
                f"{given['file']} does not exist; give a YAML file of settings, or a model as --model NAME."
            )
        return line | {"config": given["file"]}
    if given["resume"] or is_supervised():
        sets = dict(text.partition("=")[::2] for text in given["sets"] or ())
        out = Path(line.get("out") or sets.get("out") or TrainConfig.model_fields["out"].default)
        from difffract_jax.transcoders.run_place import has

        if not has(out, "train.json"):
            if not given["resume"]:
                return line
            raise UserError(f"{out} holds no run to resume; leave --resume out to begin one.")
        before = _of_run(out)
        if before["model"] is None and before["rows"] is None:
            raise UserError(f"The run in {out} trains on rows from Python; go on there, with resume=True.")
        line = before | {"out": out} | line
    return line


def _as_written(name: str, line: Mapping[str, Any]) -> str:
    """Returns an option as it stands on the command line, or the file of settings."""
    return str(line["file"]) if name == "file" else "--set" if name == "sets" else f"--{name.replace('_', '-')}"


def _of_run(run: Path) -> dict[str, Any]:
    """Returns the settings that a run was begun with, by name."""
    from difffract_jax.transcoders.training import run_settings

    return run_settings(run).model_dump(mode="json")


@opt.command(
    TrainConfig,
    layers=("sets",),
    without=SWITCHED_OFF,
    before={
        "out": ("model", "lora", "prompts", "layers", "streams", "sites", "rows"),
        "role": ("resume", "export", "max_minutes", "max_restarts"),
    },
    prepare=_given,
    renamed=False,
)
def train(
    settings: TrainConfig,
    *,
    line: dict[str, Any],
    file: ConfigFile = None,
    layers: Layers = None,
    streams: Streams = None,
    resume: Resume = False,
    export: Export = None,
    join: Join = None,
    max_restarts: MaxRestarts = None,
    dry_run: bool,
    json: bool,
) -> None:
    """Train transcoders, or SAEs, of a model's MLPs, or of rows of your own.

    Ctrl-C and SIGTERM finish the step, save and exit with 0; `--resume` goes on, `--export` writes what there is.
    Without a file of settings, `--k`, `--target-l0`, `--lr`, `--tokens-per-step` and `--model-dtype` suit the rows,
    instead of the defaults below; `--dry-run` shows them.

    Example: `difffract train --model organism --layers 0,1 --steps 200 --out run`; by a file,
    `difffract train configs/smoke.yaml --set out=run`; on arrays, `difffract train --rows DIR --out run`
    """
    from difffract_jax.cli.output import emit

    if export is not None:
        return emit(_export(export, settings.out), as_json=json)
    if max_restarts is not None and not is_supervised() and not dry_run:
        raise typer.Exit(supervise(max_restarts, sys.argv[1:]))
    if is_supervised() and not resume:
        from difffract_jax.transcoders.run_place import has

        resume = has(settings.out, "train.json")
    with as_one_of(join, settings, run=settings.out):
        if join is not None:
            from difffract_jax.transcoders.processes import texts

            resume = bool(texts("resume" if resume else "")[0])  # hosts may see a file that is new at different times
        _train(settings, line, resume=resume, dry_run=dry_run, json=json)


def _train(settings: TrainConfig, line: dict[str, Any], *, resume: bool, dry_run: bool, json: bool) -> None:
    """Trains as the line says, in this process or as one of several."""
    from difffract_jax.cli.output import emit
    from difffract_jax.transcoders.processes import is_first

    if settings.rows is not None and settings.weights != "device":
        typer.echo(f"Note: weights: {settings.weights} has no effect here: rows are read, and no model.", err=True)
    settings = with_origin(settings)
    source = None if settings.rows is None else rows_in(settings, "train")
    work = work_of(settings, source)
    settings, origins = _completed(work, line, timed=source is None or source.timed)
    if settings.model_dtype != work.settings.model_dtype:
        work = work_of(settings, source)
    plan = _described(work._replace(settings=settings), origins)
    if dry_run:
        return emit(plan, as_json=json) if is_first() else None
    check_training_fits(work._replace(settings=settings))
    shown = is_first() and not json
    done = run_training(settings, resume, source=source, begin=lambda: shown and emit(plan))
    result: dict[str, Any] = {"run": str(settings.out), "step": done.step} | done.metrics
    if done.transcoders is None:
        out = shlex.quote(str(settings.out))
        result["stopped"] = f"after {done.step} of {settings.steps} steps, saved; go on with --resume, or export now"
        result["resume"] = f"difffract train --resume --out {out}"
        result["export"] = f"difffract train --export {out}"
    else:
        result["transcoders"] = str(settings.out / "transcoders")
    if is_first():
        emit(result, as_json=json)


def _completed(work: Any, line: Mapping[str, Any], *, timed: bool) -> tuple[TrainConfig, dict[str, str]]:
    """Returns the settings with what suits the rows filled in, and where each came from that is not a default."""
    from difffract_jax.transcoders.defaults import RESUMED, choose
    from difffract_jax.transcoders.plan import bytes_per_chip

    settings, file, origins = work.settings, line["file"], {}
    if file is not None:
        origins |= dict.fromkeys(read_yaml(local_file(file)), str(file))
    elif line["resume"]:
        origins |= dict.fromkeys(TrainConfig.model_fields, RESUMED)
    origins |= {name: f"--{name.replace('_', '-')}" for name, value in line.items() if value not in (None, [], False)}
    if line["layers"] is not None or line["streams"] is not None:
        origins["sites"] = "--layers" if line["layers"] is not None else "--streams"
    origins |= {text.partition("=")[0]: "--set" for text in line["sets"] or ()}
    chosen: dict[str, str] = {}
    if file is None and not line["resume"]:
        large = bytes_per_chip(work.model) > LARGE
        settings, chosen = choose(settings, work.width, timed=timed, large=large)
    return settings, {name: origin for name, origin in (chosen | origins).items() if name in TrainConfig.model_fields}


def _described(work: Any, origins: Mapping[str, str]) -> dict[str, Any]:
    """Returns what is shown before a run: memory that it will need, and its settings; refuses what does not fit."""
    from difffract_jax.transcoders.arrays import width_text
    from difffract_jax.transcoders.defaults import shown
    from difffract_jax.transcoders.plan import estimate, held_bytes
    from difffract_jax.transcoders.setup import open_mesh, set_up
    from difffract_jax.transcoders.sources import open_prompts

    settings = work.settings
    mesh = open_mesh(settings)
    if settings.rows is None:
        check_weights(settings, mesh)
        open_prompts(settings, "train", world_of(settings))
    setup = set_up(settings, work.sites, work.width, mesh)
    held = held_bytes(setup, work.model)
    parts = ", ".join(f"{name} {held[name] / GIB:.2f}" for name in ("state", "buffer", "model") if held[name])
    return {
        "sites": f"{len(work.sites.names)}: {', '.join(work.sites.names[:12])}{' ...' * (len(work.sites.names) > 12)}",
        "width": width_text(work.width),
        "memory per device": f"about {estimate(work, setup.mesh.shape) / GIB:.2f} GiB, of it {parts}",
        "out": str(settings.out),
        "settings": shown(settings, work.width, origins),
    }


def run_training(
    settings: TrainConfig, resume: bool, *, source: Any = None, begin: Callable[[], Any] = lambda: None
) -> Any:
    """Trains with a progress bar, saves what was made, and returns how the run ended.

    Args:
        settings: of the run.
        resume: go on with the run in `settings.out`.
        source: rows that are open already; opened as the settings say if left out.
        begin: called before the first row is read, once everything fits.
    """
    from difffract_jax.cli.bars import training_progress
    from difffract_jax.loading import save_transcoders
    from difffract_jax.transcoders.checkpoints import writing
    from difffract_jax.transcoders.processes import check_alike, is_first, together
    from difffract_jax.transcoders.setup import open_mesh
    from difffract_jax.transcoders.sources import inputs_told
    from difffract_jax.transcoders.training import Watch
    from difffract_jax.transcoders.training import train as run

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's threads log what the command then tells
    if settings.rows is not None:
        source, sources = source or rows_in(settings, "train"), {"rows": str(settings.rows)}
    else:
        source, sources = _sampler(settings, open_mesh(settings))
    if resume:
        _refuse_other_loras(settings, sources)
    check_alike(sources | {"rows or prompts": inputs_told(source)}, "inputs")
    record = provenance("train", settings, **sources)
    with training_progress(shown=is_first()) as (advance, note):
        done = run(settings, source, record, Watch(advance, note, begin), resume=resume)
    made = done.transcoders
    if made is not None:
        record |= {"step": done.step}
        with writing(settings.out):
            together(lambda: save_transcoders(made, settings.out / "transcoders", overwrite=True, provenance=record))
    return done


def _refuse_other_loras(settings: TrainConfig, sources: Mapping[str, str]) -> None:
    """Refuses to go on with a LoRA whose file has become another since the run was begun."""
    from difffract_jax.transcoders.run_place import SETTINGS, has
    from difffract_jax.transcoders.training import run_record

    if not has(settings.out, SETTINGS):
        return  # which `train` tells
    begun, now = run_record(settings.out), sources.get("model_loras")
    before = begun.get("sources", {}).get("model_loras")
    if before != now and begun["settings"].get("lora") == list(settings.lora):
        raise UserError(
            f"The run in {settings.out} was begun with the LoRA {before}, but {', '.join(settings.lora)} is now {now}; "
            "put the file back, or begin another run."
        )


def _sampler(settings: TrainConfig, mesh: Any) -> tuple[Any, dict[str, str]]:
    """Returns the model as a source of rows, and what it is."""
    from difffract_jax.transcoders.recipe import encoders_on_host
    from difffract_jax.transcoders.sources import open_sampler

    model_of(settings)
    pipe, caption = pipeline_of(settings, mesh)
    sae = settings.role == "sae"
    on_host = encoders_on_host(settings, mesh.devices.flat[0].platform)
    sampler = open_sampler(settings, pipe, "train", caption=caption, mesh=mesh, sae=sae, encoders_on_host=on_host)
    return sampler, opt.sources(model=pipe)


def _export(run: Path, out: Path) -> dict[str, Any]:
    """Writes the transcoders of a run's newest checkpoint, and returns what to tell of them."""
    from difffract_jax.loading import save_transcoders
    from difffract_jax.storage.files import is_occupied
    from difffract_jax.transcoders.exporting import newest_transcoders, shape_of_run
    from difffract_jax.transcoders.training import run_settings

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    mine = out == run / "transcoders"
    if not mine and is_occupied(out):
        raise UserError(f"{out} exists already; name another --out.")
    settings = run_settings(run)
    shape = shape_of_run(run)
    if shape is None:
        work = work_of(settings)
        shape = work.sites, work.width
    made = newest_transcoders(run, shape)
    for sentence in made.passed:
        typer.echo(f"Note: {sentence}; exporting checkpoint {made.step}.", err=True)
    save_transcoders(made.transcoders, out, overwrite=mine, provenance=made.record)
    return {"transcoders": str(out), "run": str(run), "step": made.step, "of steps": settings.steps}
