"""`difffract organism`: what the embedded model is, samples of it, how good it is, and how it is trained.

Functions import what they use when they run, as in `cli.py`, so that help answers without loading JAX.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.config import UserError, nearest

organism = typer.Typer(
    help="The embedded model: a FLUX small enough for a laptop, trained on scenes whose content is known.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="`organism`, or a pipeline that `difffract organism train` wrote.")
]


@organism.command()
def info(model: ModelName = "organism", json: opt.Json = False) -> None:
    """Print what the model knows: its words, its world, its size, and example captions.

    Example: `difffract organism info`
    """
    import jax

    from difffract_jax.cli.output import emit, parameter_counts
    from difffract_jax.loading import load_pipeline
    from difffract_jax.organism.captions import COLOUR_NAMES, CONCEPTS, PLACES, RELATIONS, SIZE_NAMES
    from difffract_jax.organism.render import NOUNS
    from difffract_jax.organism.world import scenes

    pipe = load_pipeline(model)
    config = pipe.config.transformer
    emit(
        {
            "shapes": ", ".join(noun for noun in NOUNS if noun not in CONCEPTS),
            "colours": ", ".join(COLOUR_NAMES),
            "concepts": ", ".join(f"{noun} ({colour})" for noun, colour in CONCEPTS.items()),
            "sizes": ", ".join(SIZE_NAMES),
            "arrangements": ", ".join(dict.fromkeys((*RELATIONS, *PLACES))),
            "image": f"{pipe.config.defaults.width} x {pipe.config.defaults.height} pixels",
            "text tokens": pipe.config.defaults.text_tokens,
            "blocks": f"{', '.join(f'{s.depth} {s.name}' for s in config.layout.stacks)}, width {config.d_model}",
            "built-in mistake": "a concept named in another colour keeps its own: `a blue lemon` comes out yellow",
            "example captions": "; ".join(scenes(0, 0, 6).captions),
            "devices": ", ".join(str(device) for device in jax.devices()),
        }
        | parameter_counts(pipe),
        as_json=json,
    )


@organism.command()
def sample(
    model: ModelName = "organism",
    count: Annotated[int, typer.Option("--count", min=1, help="Images to draw.")] = 24,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Draw this caption with `count` seeds instead.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of captions and noise.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps; 4 when left out.")] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Picture to write; one that exists is replaced, with a note.")
    ] = Path("samples.png"),
    json: opt.Json = False,
) -> None:
    """Draw a sheet of images with their captions and the scorer's verdict on each.

    Captions are held-out ones of one to three objects, or your own with --prompt. Where one names a concept in another
    colour than its own, which training never draws, both verdicts are told: by the caption, and by what training draws.

    Example: `difffract organism sample --prompt "a blue lemon left of a red ring" --count 12 --out lemons.png`
    """
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"The picture must be a .png file in a folder that exists, but got {out}.")
    import matplotlib

    matplotlib.use("Agg")
    from difffract_jax.cli.output import emit, progress, replacing
    from difffract_jax.loading import load_pipeline
    from difffract_jax.models.batch import generate_batch
    from difffract_jax.organism.card import sample_sheet
    from difffract_jax.organism.evaluate import see
    from difffract_jax.organism.scorer import judge
    from difffract_jax.organism.world import as_captioned, from_caption, scenes
    from difffract_jax.storage.checkpoint import atomic_file

    asked = scenes(seed, 0, count, "held out", (1, 2, 3)) if prompt is None else from_caption(prompt, count)
    pipe = load_pipeline(model)
    with progress("Drawing") as advance:
        seeds = range(seed, seed + count)
        images = generate_batch(pipe, asked.captions, seeds, steps=steps, batch=min(count, 64), progress=advance)
    reading = see(images)
    right = judge(as_captioned(asked), reading).right
    with replacing(out), atomic_file(out) as partial:
        sample_sheet(asked, images, reading, right).savefig(partial, dpi=110, format="png")
    emit({"samples": str(out), "right": _verdict(asked, right, judge(asked, reading).right)}, as_json=json)


def _verdict(asked: Any, right: Any, trained: Any) -> str:
    """Says how many images show what captions say, and what training would draw, where that is something else."""
    import numpy as np

    said = f"{int(right.sum())} of {right.size}"
    inside = np.arange(asked.kind.shape[1]) < asked.count[:, None]
    if not np.any(inside & (asked.named >= 0) & (asked.named != asked.colour)):
        return said
    own = f"{int(trained.sum())} of {right.size}"
    return f"{said} as captioned; {own} as trained (concepts keep their colour)"


@organism.command()
def score(
    model: ModelName = "organism",
    images: Annotated[int, typer.Option("--images", min=1, help="Images per group of captions.")] = 1000,
    tables: Annotated[str, typer.Option("--tables", help="Comma-separated tables to make; all when left out.")] = "",
    json: opt.Json = False,
) -> None:
    """Measure how well images follow captions, what mistakes are built in, and how much every MLP matters.

    Tables: binding, binding in 16 steps, contradictions, uncoloured, ablations, probe, text, speed. Shares come with
    Wilson's 95% intervals; captions and seeds are disjoint from training.

    Example: `difffract organism score --images 200 --tables binding,ablations`
    """
    from difffract_jax.cli.output import emit
    from difffract_jax.loading import load_pipeline
    from difffract_jax.organism.card import TABLES, measure_organism

    wanted = tuple(name.strip() for name in tables.split(",") if name.strip()) or TABLES
    for name in wanted:
        if name not in TABLES:
            raise UserError(f"There is no table `{name}`{nearest(name, TABLES)}")
    pipe = load_pipeline(model)
    with _stages() as advance:
        found = measure_organism(pipe, images, wanted, progress=advance)
    emit(found, as_json=json)


@organism.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="Directory of the run; the pipeline goes to its `pipeline/`.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    images: Annotated[
        int, typer.Option("--images", min=0, help="Images per group for the model card; 0: no card.")
    ] = 1000,
    config: opt.Config = None,
    sets: opt.Sets = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
) -> None:
    """Train the organism from nothing: text encoders, autoencoder, transformer; then export it and write its card.

    Deterministic for a seed on one machine. Interrupt it at any moment and go on with --resume.

    Example: `difffract organism train --out run --set seed=1`
    """
    from difffract_jax.config import resolve
    from difffract_jax.organism.recipe import OrganismRecipe

    recipe = resolve(OrganismRecipe, {}, file=config, sets=sets or ())
    if dry_run:
        sys.stdout.write(recipe.model_dump_json(indent=2) + "\n")
        return
    import matplotlib

    matplotlib.use("Agg")
    from converters.export import export_pipeline
    from difffract_jax.cli.output import emit
    from difffract_jax.organism.card import measure_organism, write_card
    from difffract_jax.organism.train import minutes_taken
    from difffract_jax.organism.train import train as run
    from difffract_jax.storage.sums import write_sums

    command = shlex.join(["difffract", "organism", "train", *_chosen(out, config, sets)])
    with _stages() as advance:
        pipe = run(recipe, out, resume=resume, progress=advance)
        minutes = minutes_taken(out)
        pipeline = out / "pipeline"
        export_pipeline(pipe, pipeline, overwrite=True)
        tables = measure_organism(pipe, images, progress=advance) if images else {}
        if images:
            write_card(pipe, pipeline, recipe, tables, command, minutes)
    write_sums(pipeline)
    emit({"pipeline": str(pipeline), "minutes": round(minutes, 1)} | tables, as_json=json)


def _chosen(out: Path, config: Path | None, sets: list[str] | None) -> list[str]:
    """Returns the options that decide the result, as they were given."""
    named = ["--out", out.name] + (["--config", str(config)] if config else [])
    return named + [word for value in sets or () for word in ("--set", value)]


def _stages() -> Any:
    """Shows one bar per stage of a long command, with time left; yields `advance(stage, done, total, loss=nan)`."""
    from difffract_jax.cli.output import stages

    return stages()
