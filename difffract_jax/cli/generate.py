"""The commands that make an image: `generate`, and `demo`, which goes on from there to a circuit and its report.

They follow the rules of `main`: settings in, artefacts and a short table out; progress on stderr; imports when a
command runs.
"""

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.models import mesh_for, spread_model
from difffract_jax.cli.preflight import check_fits
from difffract_jax.cli.runs import run_of, starting_noise, warn_cut
from difffract_jax.cli.settings import DemoConfig
from difffract_jax.config import GenerateConfig, UserError, provenance


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(demo)
    app.command()(generate)


@opt.command(DemoConfig, layers=(), fills="out")
def demo(settings: DemoConfig, *, json: bool) -> None:
    """Make an image, trace why it has a colour, edit and validate that circuit, and write a report of it all.

    It runs on the embedded model and needs no files.

    Example: `difffract demo --out demo`
    """
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.demo import STEERED, VALIDATED, run
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.storage.remote.outputs import sent_files

    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, but the demonstration is a directory; give another --out.")
    written = [settings.out / name for name in ("", STEERED, VALIDATED)]
    with replacing(*written), progress("Tracing") as advance, sent_files(settings.out) as folder:
        result = run(settings, folder, advance)
    emit(result, as_json=json)


@opt.command(
    GenerateConfig,
    arguments=("model", "prompt"),
    before={"latents": ("steps", "height", "width", "text_tokens", "guidance", "negative_prompt")},
)
def generate(settings: GenerateConfig, *, dry_run: bool, json: bool) -> None:
    """Generate an image from a prompt.

    Example: `difffract generate flux-schnell "a red fox at dawn" --seed 0 --steps 4 --out image.png`
    """
    opt.check_out(settings.out, ".png")
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.storage.images import save_image

    record = provenance("generate", settings)
    if dry_run:
        return emit(record, as_json=json)
    from difffract_jax.cli.opening import open_model
    from difffract_jax.models import pipeline

    mesh = mesh_for(settings.mesh)
    if mesh is not None and mesh.shape["data"] > 1:
        raise UserError("One image leaves the mesh axis data idle; split the model alone, as in --mesh feature=8.")
    check_fits("generate", settings)
    pipe = open_model("generate", settings, sharding=spread_model(mesh)).pipe
    with progress("Denoising") as advance:
        result = pipeline.generate(
            pipe,
            settings.prompt,
            seed=settings.seed,
            run=run_of(pipe, settings),
            latents=starting_noise(pipe, settings),
            progress=advance,
        )
    warn_cut(result.cut)
    record |= {"sources": opt.sources(model=pipe)}
    with replacing(settings.out):
        save_image(result.image, settings.out, record)
    emit({"image": str(settings.out), "size": f"{result.image.shape[1]}x{result.image.shape[0]}"}, as_json=json)
