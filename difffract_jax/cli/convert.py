"""The commands that convert checkpoints: `convert model` (`convert flux`), `convert transcoders`, `convert check`.

They convert leaf by leaf, see `conversion`, and show how many bytes are written.
"""

from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.models import dtype_named
from difffract_jax.config import ConvertConfig, UserError

convert = typer.Typer(
    help="Convert PyTorch checkpoints into this package's files, and check the result.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
ToTorch = Annotated[bool, typer.Option("--to-torch", help="The other way: from our directory to `.pt` files.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.add_typer(convert, name="convert")


@convert.command("model")
@opt.command(ConvertConfig, arguments=("source", "out"), layers=(), without=("sites",))
def convert_model(settings: ConvertConfig, *, json: bool) -> None:
    """Convert a model: a diffusers directory, or a transformer alone, here or on the hub.

    Which model it is, its class and its keys say: one of those in docs/models.md; FLUX.1, FLUX.2-klein and Stable
    Diffusion 3 also as one safetensors file. Weights are written as they are read, leaf by leaf, in about 1 GB of
    memory whatever their size. Interrupted, the same command goes on where it was.

    Example: `difffract convert model hf:black-forest-labs/FLUX.2-klein-4B flux2-klein`
    """
    _convert_model(settings, json)


@convert.command("flux")
@opt.command(ConvertConfig, arguments=("source", "out"), layers=(), without=("sites",))
def convert_flux(settings: ConvertConfig, *, json: bool) -> None:
    """Convert a FLUX pipeline; another name of `difffract convert model`.

    Example: `difffract convert flux hf:black-forest-labs/FLUX.1-schnell flux-schnell`
    """
    _convert_model(settings, json)


def _convert_model(settings: ConvertConfig, json: bool) -> None:
    from difffract_jax import conversion
    from difffract_jax.cli.bars import byte_progress
    from difffract_jax.cli.output import emit
    from difffract_jax.graphs.loras import texts_of

    with byte_progress("Converting") as advance:
        made = conversion.convert_flux(
            settings.source,
            settings.out,
            base=settings.base,
            variant=settings.variant,
            dtype=settings.dtype and dtype_named(settings.dtype),
            lora=settings.lora,
            overwrite=settings.overwrite,
            progress=advance,
        )
    merged = {"LoRA": texts_of(made.loras)} if made.loras else {}
    emit({"converted": str(settings.out)} | merged | _written(made), as_json=json)


@convert.command("transcoders")
@opt.command(
    ConvertConfig,
    arguments=("source", "out"),
    layers=(),
    without=("base", "variant", "lora"),
    before={"overwrite": ("to_torch",)},
)
def convert_transcoders(settings: ConvertConfig, *, to_torch: ToTorch = False, json: bool) -> None:
    """Convert a directory of the reference's `.pt` transcoders or SAEs (needs the extra `torch`), or back.

    Example: `difffract convert transcoders checkpoints/transcoders transcoders`; from the hub, some sites alone:
    `... transcoders hf:Artalmaz31/DifFRACT/temporal-aware-transcoders transcoders --sites img/0-3,txt/0-3`
    """
    from difffract_jax import conversion
    from difffract_jax.cli.bars import byte_progress
    from difffract_jax.cli.output import emit

    with byte_progress("Converting") as advance:
        made = conversion.convert_transcoders(
            settings.source,
            settings.out,
            sites=None if settings.sites is None else settings.sites.split(","),
            to_torch=to_torch,
            dtype=settings.dtype and dtype_named(settings.dtype),
            overwrite=settings.overwrite,
            progress=advance,
        )
    sites = {f"{name} layers": numbers for name, numbers in made.sites.to_json().items()}
    emit({"converted": str(settings.out)} | sites | {"features": made.config.features} | _types(made), as_json=json)


def _written(made: Any) -> dict[str, Any]:
    """Returns what a conversion shows of a pipeline: the parameters of each part, and their type."""
    return {f"{name} parameters": count for name, count in made.parameters.items()} | _types(made)


def _types(made: Any) -> dict[str, str]:
    kinds = {name: {"bfloat16": "bf16", "float32": "f32"}[kind] for name, kind in made.dtypes.items()}
    if len({*kinds.values()}) == 1:
        return {"type": next(iter(kinds.values()))}
    return {"type": ", ".join(f"{name} {kind}" for name, kind in kinds.items())}


@convert.command("check")
def convert_check(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="The PyTorch pipeline, a diffusers directory or hf:OWNER/NAME.")
    ],
    converted: Annotated[
        str | None,
        typer.Argument(metavar="CONVERTED", help="Our directory of it; SOURCE, converted as it is read, if left out."),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="Largest relative error of a block.")] = 1e-5,
    json: opt.Json = False,
) -> None:
    """Compare a converted pipeline with the PyTorch one, block by block (needs the extra `torch`).

    Both are read block by block, in float32.

    Example: `difffract convert check FLUX.1-schnell flux-schnell`
    """
    from converters.check import check
    from difffract_jax.cli.output import emit
    from difffract_jax.conversion import open_model
    from difffract_jax.directories import checkpoint

    rows = check(checkpoint(source).path, open_model(converted or source), tolerance=tolerance)
    emit({"blocks": [row._asdict() for row in rows]}, as_json=json)
    wrong = [row.part for row in rows if not row.equal]
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(rows)} parts differ from PyTorch's: {', '.join(wrong)}; convert the source again, "
            "or allow for --dtype bf16 with --tolerance 2e-2."
        )
