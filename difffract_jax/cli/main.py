"""The `difffract` command: settings in, artefacts and a short table out.

1. `main` runs one command and turns its end into an exit status: 0 done, 1 failed with one sentence, 2 wrong usage,
   130 interrupted. `--debug`, anywhere on the line, shows the traceback instead of the sentence;
   `--no-compile-cache` compiles every program anew, `--no-preflight` tries what by count does not fit.
2. A command merges its options into settings: defaults, then `--config FILE`, then options, then `--set`.
3. What can be refused cheaply is refused before weights are read; the work itself is the package's own functions.
4. Progress goes to stderr, results to stdout: a table for people, one JSON object with `--json` for machines.

Functions import what they use when they run, and only here, so that `difffract --help` answers without loading JAX.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, NoReturn

import typer

from difffract_jax import __version__
from difffract_jax.cli import dashboards as cli_dashboards
from difffract_jax.cli import doctor as cli_doctor
from difffract_jax.cli import encoding as cli_encoding
from difffract_jax.cli import evaluation as cli_evaluation
from difffract_jax.cli import explain as cli_explain
from difffract_jax.cli import graphs as cli_graphs
from difffract_jax.cli import options as opt
from difffract_jax.cli import plan as cli_plan
from difffract_jax.cli import preflight
from difffract_jax.cli import steer as cli_steer
from difffract_jax.cli import study as cli_study
from difffract_jax.cli import training as cli_training
from difffract_jax.cli import transcoders as cli_transcoders
from difffract_jax.cli import validate as cli_validate
from difffract_jax.cli import view as cli_view
from difffract_jax.cli.convert import convert
from difffract_jax.cli.failures import sentence_for, told_when_terminated
from difffract_jax.cli.feature_pages import Pages, page_table, pages_at_hand, with_pages
from difffract_jax.cli.models import dtype_named, mesh_for, spread_model
from difffract_jax.cli.organism import organism
from difffract_jax.cli.settings import DemoConfig
from difffract_jax.config import (
    GenerateConfig,
    TraceConfig,
    UserError,
    provenance,
    sentence_of,
)
from difffract_jax.memory import allow, share_memory
from difffract_jax.storage.compile_cache import enable_compile_cache

ANYWHERE = ("--debug", "--no-compile-cache", preflight.OFF)
STYLE: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(name="difffract", pretty_exceptions_enable=False, **STYLE)
app.add_typer(convert, name="convert")
app.add_typer(organism, name="organism")
for commands in (
    *(cli_encoding, cli_graphs, cli_transcoders, cli_plan, cli_doctor, cli_training, cli_evaluation),
    *(cli_steer, cli_study, cli_explain, cli_validate, cli_view, cli_dashboards),
):
    commands.register(app)


class _Notes(logging.Handler):
    """Shows on stderr what is noted in passing, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one note."""
        sys.stderr.write(f"Note: {record.getMessage()}\n")


def main() -> None:
    """Runs the command line; the entry point `difffract`."""
    with _showing_notes():
        _run()


@contextmanager
def _showing_notes() -> Iterator[None]:
    """Shows what the packages note, once: other libraries give the root logger a handler that would tell it again."""
    loggers = [logging.getLogger(package) for package in ("converters", "difffract_jax")]
    for notes in loggers:
        notes.handlers, notes.propagate = [_Notes()], False
        notes.setLevel(logging.INFO)
    try:
        yield
    finally:
        for notes in loggers:
            notes.propagate = True


def _run() -> None:
    # Typer takes the options of `_root` before the command's name alone.
    first = [argument for argument in sys.argv[1:] if argument in ANYWHERE]
    others = [argument for argument in sys.argv[1:] if argument not in ANYWHERE]
    compiles = _compiles(others)
    preflight.switched_off = preflight.OFF in first
    allow(None)
    if compiles:
        share_memory()
    if "--no-compile-cache" not in first and compiles:
        enable_compile_cache()
    options = _options_of(others) if compiles else ()
    try:
        with told_when_terminated(options, others) if compiles else nullcontext():
            app(first + others, prog_name="difffract")
    except (ValueError, OSError, RuntimeError, AssertionError, MemoryError, ImportError) as error:
        if "--debug" in first:
            raise
        sentence = sentence_for(error, options, others)
        if sentence is None and isinstance(error, ValueError | OSError):
            sentence = sentence_of(error)
        if sentence is None:
            raise
        _fail(sentence)


def _options_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the options of the command that a command line names; none if it names none."""
    command: Any = typer.main.get_command(app)
    for name in arguments:
        if name not in getattr(command, "commands", {}):
            break
        command = command.commands[name]
    return tuple(one.name for one in getattr(command, "params", ()))


def _compiles(arguments: Sequence[str]) -> bool:
    """Says whether a command line may compile programs: it names a command, not one of saved graphs, and no help."""
    command = next(iter(arguments), "-")
    return not (command.startswith("-") or command in cli_graphs.WITHOUT_JAX or {"-h", "--help"} & {*arguments})


def _fail(sentence: str) -> NoReturn:
    sys.stderr.write(f"Error: {sentence}\n")
    sys.exit(1)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"difffract_jax {__version__}")
        raise typer.Exit()
    return wanted


Version = Annotated[
    bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a failure's traceback; anywhere on the line.")]
NoCompileCache = Annotated[
    bool,
    typer.Option(
        "--no-compile-cache", help="Neither use nor keep compiled programs (~/.cache/difffract); anywhere on the line."
    ),
]
NoPreflight = Annotated[
    bool,
    typer.Option(preflight.OFF, help="Load even what by count does not fit the memory; anywhere on the line."),
]


@app.callback()
def _root(
    version: Version = False,
    debug: Debug = False,
    no_compile_cache: NoCompileCache = False,
    no_preflight: NoPreflight = False,
) -> None:
    """Trace circuits in FLUX diffusion transformers, in JAX.

    Start with `difffract demo`. Exit status: 0 done, 1 failed with one sentence on stderr, 2 wrong usage.
    """


@app.command()
@opt.command(DemoConfig, layers=(), fills="out")
def demo(settings: DemoConfig, *, json: bool) -> None:
    """Make an image, trace why it has a colour, edit and validate that circuit, and write a report of it all.

    It runs on the embedded model and needs no files.

    Example: `difffract demo --out demo`
    """
    from difffract_jax.cli.demo import STEERED, VALIDATED, run
    from difffract_jax.cli.output import emit, progress, replacing

    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, but the demonstration is a directory; give another --out.")
    written = [settings.out / name for name in ("", STEERED, VALIDATED)]
    with replacing(*written), progress("Tracing") as advance:
        result = run(settings, advance)
    emit(result, as_json=json)


@app.command()
@opt.command(
    GenerateConfig,
    arguments=("model", "prompt"),
    before={"latents": ("steps", "height", "width", "text_tokens", "guidance")},
)
def generate(settings: GenerateConfig, *, dry_run: bool, json: bool) -> None:
    """Generate an image from a prompt.

    Example: `difffract generate flux-schnell "a red fox at dawn" --seed 0 --steps 4 --out image.png`
    """
    opt.check_out(settings.out, ".png")
    from difffract_jax.cli.output import emit, progress, replacing, save_image

    record = provenance("generate", settings)
    if dry_run:
        return emit(record, as_json=json)
    from difffract_jax.cli.opening import open_model
    from difffract_jax.models import pipeline

    mesh = mesh_for(settings.mesh)
    if mesh is not None and mesh.shape["data"] > 1:
        raise UserError("One image leaves the mesh axis data idle; split the model alone, as in --mesh feature=8.")
    preflight.check_fits("generate", settings)
    pipe = open_model("generate", settings, sharding=spread_model(mesh)).pipe
    with progress("Denoising") as advance:
        result = pipeline.generate(
            pipe,
            settings.prompt,
            seed=settings.seed,
            run=cli_steer.run_of(pipe, settings),
            latents=cli_steer.starting_noise(pipe, settings),
            progress=advance,
        )
    cli_steer.warn_cut(result.cut)
    record |= {"sources": opt.sources(model=pipe)}
    with replacing(settings.out):
        save_image(result.image, settings.out, record)
    emit({"image": str(settings.out), "size": f"{result.image.shape[1]}x{result.image.shape[0]}"}, as_json=json)


@app.command()
@opt.command(
    TraceConfig,
    arguments=("model", "transcoders", "prompt"),
    before={"seed": ("steps",), "max_nodes": ("height", "width", "text_tokens", "guidance")},
)
def trace(settings: TraceConfig, *, pages: Pages = None, json: bool) -> None:
    """Trace the circuit behind a feature, a direction of the velocity or a colour of the image, and save it as a graph.

    Example: `difffract trace organism organism "a red circle above a blue square" --target img/1/f12 --step 1`;
    all steps, from the pixels: `... --target pixels:color=red,box=0,0,32,16 --step 0-3`
    """
    opt.check_out(settings.out, ".npz")
    if settings.export_json:
        opt.check_out(settings.export_json, ".json")
    from difffract_jax.circuits.attribution.attribute import attribute
    from difffract_jax.circuits.attribution.outputs import parse_target
    from difffract_jax.circuits.notation.feature import Feature
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit, graph_summary, progress, replacing
    from difffract_jax.cli.requests import read_steps, read_weights, resolve_all
    from difffract_jax.cli.used import load_used, up_to_targets
    from difffract_jax.graphs.files.reference_json import write_reference_json
    from difffract_jax.sharding import traced_transcoders

    asked, devices = [parse_target(text) for text in _listed(settings.target)], mesh_for(settings.mesh)
    weights, traced = read_weights(settings.weight, len(asked)), read_steps(settings.step)
    outputs = any(not isinstance(one, Feature) for one in asked)
    _check_attention(settings, traced, devices)
    preflight.check_fits("trace", settings, output=outputs, targets=asked)
    pipe, place = open_model("trace", settings, sharding=spread_model(devices), output=outputs, targets=asked)
    used = up_to_targets(pipe.config.transformer.layout, asked, traced)
    options = {"dtype": dtype_named(settings.transcoder_dtype), "weights": place}
    options |= {} if devices is None else {"sharding": traced_transcoders(devices)}
    tcs = load_used(settings.transcoders, used, sites=settings.sites, **options)
    at_hand = pages_at_hand(pages, tcs.source)
    captured = _recorded(pipe, tcs, settings, asked, traced)
    if settings.activations is not None:
        settings = settings.model_copy(update={"step": str(captured.info.step), "seed": captured.info.seed})
    names = {"max_nodes", "expansion_batch", "min_attribution", "precision", "attention", "max_scores"}
    expansion = settings.model_dump(include=names)
    targets = list(zip(resolve_all(pipe, captured, asked), weights, strict=True))
    record = provenance("trace", settings, **opt.sources(model=pipe, transcoders=tcs))
    del pipe  # what the trace does not hold of it is memory for the pull-back
    with progress("Expanding nodes") as advance:
        graph = attribute(captured, tcs, target=targets, **expansion, mesh=devices, progress=advance)
    _warn(captured.info.cut, graph)
    graph = graph.with_provenance(**record)
    with replacing(settings.out, *([settings.export_json] if settings.export_json else [])):
        graph.save(settings.out)
        if settings.export_json:
            write_reference_json(graph, settings.export_json)
    told = graph_summary(graph)
    told |= {"strongest sources": with_pages(told["strongest sources"], at_hand, "from")}
    emit({"graph": str(settings.out)} | told | page_table(_listed(settings.target), at_hand), as_json=json)


def _check_attention(settings: TraceConfig, steps: tuple[int, int], devices: Any) -> None:
    """Refuses, before anything is loaded, what attention is not explained with."""
    if settings.attention == "frozen":
        return
    first, last = steps
    if first != last:
        raise UserError(
            f"Attention is explained within one step, but --step asks for {first} to {last}; trace one of them, as "
            f"--step {last}."
        )
    if devices is not None and devices.size > 1:
        raise UserError("Attention is explained on one device as yet; leave --mesh out, or --attention.")
    if settings.export_json is not None:
        raise UserError(
            "The reference's JSON has no attention scores as nodes; leave --export-json out, or --attention explained."
        )


def _recorded(pipe: Any, tcs: Any, settings: TraceConfig, asked: list[Any], steps: tuple[int, int]) -> Any:
    """Records the run that the settings describe, or takes it from the file they name."""
    from difffract_jax.cli.requests import import_run, record_run

    if settings.activations is not None:
        names = {"seed", "steps", "height", "width", "text_tokens", "guidance", "prompt", "step", "latents", "noise"}
        given = settings.model_dump(include=names, exclude_unset=True)
        padding = settings.include_padding
        return import_run(settings.activations, pipe, tcs, given, include_padding=padding)
    return record_run(
        pipe,
        tcs,
        settings.prompt,
        asked,
        steps,
        seed=settings.seed,
        run=cli_steer.run_of(pipe, settings),
        latents=cli_steer.starting_noise(pipe, settings),
        include_padding=settings.include_padding,
    )


def _listed(value: str | tuple[str, ...]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _warn(cut: str, graph: Any) -> None:
    """Tells if the prompt was cut, and if a graph of several steps knows nothing of the features of some."""
    from difffract_jax.cli.output import expanded_by_step

    cli_steer.warn_cut(cut)
    expanded = expanded_by_step(graph)
    missed = [str(step) for step, count in expanded.items() if not count]
    if missed and len(expanded) > 1:
        sys.stderr.write(
            f"Warning: no feature of step {', '.join(missed)} was expanded, since most influence lies in the last; "
            "raise --max-nodes, or lower --expansion-batch so that influence is computed more often.\n"
        )


opt.plain_usage(app)
