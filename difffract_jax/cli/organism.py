"""`difffract organism`: what the embedded model is, samples of it, how good it is, and how it is trained.

Functions import what they use when they run, as in `cli.py`, so that help answers without loading JAX.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.config import SEEDS, UserError, nearest

organism = typer.Typer(
    help="The embedded model: a FLUX small enough for a laptop, trained on scenes whose content is known.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="`organism`, or a pipeline that `difffract organism train` wrote.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.add_typer(organism, name="organism")


@organism.command()
def info(model: ModelName = "organism", json: opt.Json = False) -> None:
    """Print what the model knows: its words, its world, its size, and example captions.

    Example: `difffract organism info`
    """
    import jax

    from difffract_jax.cli.output import emit
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
    seed: Annotated[int, typer.Option("--seed", min=0, max=SEEDS - 1, help="Seed of captions and noise.")] = 0,
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
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.output import emit, replacing
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
    arch: Annotated[
        str | None, typer.Option("--arch", help="Architecture: flux, sd3 or flux2; flux when left out.")
    ] = None,
    config: opt.Config = None,
    sets: opt.Sets = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
) -> None:
    """Train the organism from nothing: text encoders, autoencoder, transformer; then save it and write its card.

    --arch sd3 and --arch flux2 train siblings of other architectures on the same world. They take the parts that they
    share with the embedded organism from it; with `--set begin=` they train all. Deterministic for a seed on a machine.
    Interrupt it at any moment and go on with --resume.

    Example: `difffract organism train --out run --set seed=1`
    """
    from difffract_jax.config import resolve
    from difffract_jax.organism.recipe import OrganismRecipe

    recipe = resolve(OrganismRecipe, {"arch": arch}, file=config, sets=sets or ())
    if dry_run:
        sys.stdout.write(recipe.model_dump_json(indent=2) + "\n")
        return
    import matplotlib

    matplotlib.use("Agg")
    from converters.export import export_pipeline
    from difffract_jax.cli.output import emit
    from difffract_jax.loading import load_pipeline, save_pipeline
    from difffract_jax.organism.card import measure_organism, write_card
    from difffract_jax.organism.train import minutes_taken
    from difffract_jax.organism.train import train as run
    from difffract_jax.storage.locks import sole_writer
    from difffract_jax.storage.remote.addresses import is_remote, parse_address
    from difffract_jax.storage.remote.claims import Claim, claimed
    from difffract_jax.storage.remote.publication import publish
    from difffract_jax.storage.sums import write_sums
    from difffract_jax.transcoders.run_place import home_of

    save = export_pipeline if recipe.arch == "flux" else save_pipeline
    begin = load_pipeline(recipe.begin) if recipe.begin else None
    command = shlex.join(["difffract", "organism", "train", *_chosen(out, arch, config, sets)])
    remote = is_remote(out)
    with claimed(parse_address(out)) if remote else sole_writer(out) as claim, _stages() as advance:
        allowed = {"allowed": claim.check} if isinstance(claim, Claim) else {}
        pipe = run(recipe, out, resume=resume, begin=begin, progress=advance, **allowed)
        minutes = minutes_taken(out)
        pipeline = home_of(out) / "pipeline"
        save(pipe, pipeline, overwrite=True)
        tables = measure_organism(pipe, images, progress=advance) if images else {}
        if images:
            write_card(pipe, pipeline, recipe, tables, command, minutes)
        write_sums(pipeline)
        if remote:
            publish(pipeline, parse_address(out) / "pipeline", overwrite=True)
    emit({"pipeline": str(out / "pipeline"), "minutes": round(minutes, 1)} | tables, as_json=json)


def _chosen(out: Path, arch: str | None, config: Path | None, sets: list[str] | None) -> list[str]:
    """Returns the options that decide the result, as they were given."""
    named = ["--out", out.name] + (["--arch", arch] if arch else []) + (["--config", str(config)] if config else [])
    return named + [word for value in sets or () for word in ("--set", value)]


def _stages() -> Any:
    """Shows one bar per stage of a long command, with time left; yields `advance(stage, done, total, loss=nan)`."""
    from difffract_jax.cli.bars import stages

    return stages()


def parameter_counts(made: Any) -> dict[str, int]:
    """Returns how many parameters each module of a pipeline has, or a transformer alone."""
    from difffract_jax.storage.checkpoint import leaf_paths

    names = ("transformer", "t5", "clip", "vae")
    modules = {name: getattr(made, name) for name in names} if isinstance(made, tuple) else {"transformer": made}
    counts = {name: sum(leaf.size for leaf in leaf_paths(tree).values()) for name, tree in modules.items()}
    return {f"{name} parameters": count for name, count in counts.items()}
