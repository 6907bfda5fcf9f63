"""The commands that find features and edit them: `features`, `steer`; registered by `cli.py`.

They follow its rules: settings in, artefacts and a short table out; progress on stderr; imports when a command runs.
"""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.cli import options as opt
from difffract_jax.cli.feature_pages import Pages, page_table, pages_at_hand, with_pages
from difffract_jax.cli.group_edits import check_groups, edits_of
from difffract_jax.cli.preflight import check_fits
from difffract_jax.cli.settings import EffectsConfig, FeaturesConfig, RunSettings, SteerConfig
from difffract_jax.config import GenerateConfig, TraceConfig, UserError, provenance

Scan = Annotated[
    bool, typer.Option("--scan", help="Label every feature of the organism's transcoders over many captions instead.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command()(steer)
    app.command()(features)


@opt.command(
    SteerConfig,
    arguments=("model", "transcoders", "prompt"),
    before={
        "sweep": ("seeds",),
        "expect": ("box", "mask"),
        "latents": ("steps", "height", "width", "text_tokens", "guidance"),
        "out": ("batch",),
    },
    fills="out",
)
def steer(settings: SteerConfig, *, pages: Pages = None, json: bool) -> None:
    """Edit features while images are made, over seeds and strengths, and measure what changed.

    A region (--box, --mask) confines edits that name no positions, and parts what was meant to change from the rest.

    Example: `difffract steer organism organism "a red ring" --edit img/1/f299=zero --seeds 0..9 --sweep 0,-1,-2`
    """
    edits, groups = edits_of(settings)
    check_directory(settings.out)
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.cli.used import edited, load_used
    from difffract_jax.studies.metrics import sweep_table

    meant = _intent(settings)
    sites = tuple(dict.fromkeys(_patterns(edits)))
    check_fits("steer", settings, sites=sites)
    pipe, tcs = open_model("steer", settings, sites=sites).pipe, load_used(settings.transcoders, edited(edits))
    if groups is not None:
        check_groups(groups, pipe.source, tcs.source, settings)
    named = page_table(_features(edits), pages_at_hand(pages, tcs.source))
    run = run_of(pipe, settings)
    pixels = region_of(pipe, run, settings)
    made = _draw(pipe, tcs, run, edits, pixels, settings)
    rows = sweep_table(made.columns, made.images, made.norms, pixels, settings.prompt if meant else None, meant)
    record = provenance("steer", settings, **opt.sources(model=pipe, transcoders=tcs))
    with replacing(settings.out):
        files = write_sweep(made, rows, record, settings.out)
    shown = {"out": str(settings.out)} | {"metrics": [_brief(row) for row in rows]}
    emit((files | {"metrics": rows} if json else shown) | named, as_json=json)


def _patterns(edits: Sequence[Edit]) -> list[str]:
    """Returns the sites that edits name, as patterns."""
    parts = [part for edit in edits for part in edit.parts]
    return [f"{part.stream}/{'*' if part.block is None else part.block}" for part in parts]


def _features(edits: Sequence[Edit]) -> list[str]:
    """Returns the features that edits name; whole sites are none."""
    parts = [part for edit in edits for part in edit.parts]
    return [f"{part.stream}/{part.block}/f{part.feature}" for part in parts if part.feature >= 0]


def _draw(pipe: Any, tcs: Any, run: Any, edits: list[Edit], pixels: Any, settings: SteerConfig) -> Any:
    """Returns the sweep that the settings ask for."""
    from difffract_jax.circuits.editing.sweeps import sweep
    from difffract_jax.circuits.notation.region import tokens_in
    from difffract_jax.cli.output import progress

    region = None if pixels is None else tokens_in(pixels, run.grid)
    with progress("Drawing") as advance:
        made = sweep(
            pipe,
            tcs,
            settings.prompt,
            [_confined(one, settings, region) for one in edits],
            settings.amounts,
            settings.seed_list,
            latents=_noise(pipe, run, settings),
            run=run,
            **settings.model_dump(include={"form", "include_padding", "batch"}),
            progress=advance,
        )
    warn_cut(made.cut)
    return made


@opt.command(
    FeaturesConfig,
    arguments=("model", "transcoders", "prompt"),
    before={
        "by": ("box", "mask"),
        "top": ("seeds",),
        "captions": ("scan", "steps", "height", "width", "text_tokens", "guidance"),
    },
)
def features(settings: FeaturesConfig, *, scan: Scan = False, pages: Pages = None, json: bool) -> None:
    """Find features: by contrast with another prompt, in a region, by rise or fall over steps, or by activation.

    Prints them with position and step, ready to be a target of `trace` or an edit of `steer`. With --scan, labels every
    feature of the organism's transcoders instead: what it detects, and where it is strongest.

    Example: `difffract features organism organism "a red ring" --contrast "a blue ring" --seeds 0..4`
    """
    if scan:
        return _scan(settings, json)
    if settings.prompt is None:
        raise typer.BadParameter("PROMPT missing; see --help.")
    from difffract_jax.circuits.editing.ranking import rank_features
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit, progress
    from difffract_jax.cli.used import load_used, matching
    from difffract_jax.transcoders.sites import parse_sites

    sites = settings.sites.split(",")
    check_fits("features", settings)
    pipe, place = open_model("features", settings)
    parse_sites(sites, pipe.config.transformer.layout)  # what is no pattern is told before more is loaded
    tcs = load_used(settings.transcoders, matching(sites), weights=place)
    at_hand, run = pages_at_hand(pages, tcs.source), run_of(pipe, settings)
    with progress("Sampling") as advance:
        found = rank_features(
            pipe,
            tcs,
            settings.prompt,
            mask=region_of(pipe, run, settings),
            seeds=settings.seed_list,
            sites=sites,
            run=run,
            **settings.model_dump(include={"contrast", "by", "step", "top", "batch"}),
            progress=advance,
        )
    labels = labels_of(settings.transcoders, tcs.source)
    streams = {
        stream: [
            {"feature": str(row.feature), "score": row.score, "value": row.value, "against": row.against}
            | {"seeds": f"{row.agreeing} of {row.seeds}"}
            | ({} if labels is None else {"detects": str(labels.of(row.feature))})
            for row in rows
        ]
        for stream, rows in found.items()
    }
    record = provenance("features", settings, **opt.sources(model=pipe, transcoders=tcs))
    emit((record if json else {}) | {name: with_pages(rows, at_hand) for name, rows in streams.items()}, as_json=json)


def _scan(settings: FeaturesConfig, json: bool) -> None:
    """Labels every feature of the organism's transcoders."""
    if settings.model != "organism":
        raise UserError("A scan reads what images show from the organism's scenes; other models have none.")
    if settings.out is None or settings.out.suffix != ".json" or not settings.out.parent.is_dir():
        raise UserError("A scan writes a labels file: give --out FILE.json in a folder that exists.")
    from difffract_jax.cli.output import emit, progress, replacing
    from difffract_jax.loading import load_pipeline, load_transcoders
    from difffract_jax.studies.scan import scan, write_labels

    pipe, tcs = load_pipeline(settings.model, lora=settings.lora), load_transcoders(settings.transcoders)
    with progress("Scanning") as advance:
        found = scan(pipe, tcs, settings.captions, advance)
    # The path is of this machine; where the labels lie does not change what they are.
    placed = settings.model_copy(update={"out": Path(settings.out.name)})
    record = provenance("features --scan", placed, **opt.sources(model=pipe, transcoders=tcs))
    with replacing(settings.out):
        write_labels(found, record, settings.out)
    clear = sum(value >= 0.9 for site in found["sites"].values() for value in site["auroc"])
    total = sum(len(site["auroc"]) for site in found["sites"].values())
    images = f"{found['right']} of {found['captions']}"
    emit(
        {"labels": str(settings.out), "right images": images, "AUROC at least 0.9": f"{clear} of {total}"}, as_json=json
    )


def _intent(settings: SteerConfig) -> Any:
    """Returns what an edit is meant to change; None where there is no scorer, or no caption of the organism's."""
    from difffract_jax.studies.metrics import intent

    if settings.model != "organism":
        if settings.expect is not None:
            raise UserError("--expect is judged by the organism's scorer, and other models have none; leave it out.")
        return None
    try:
        return intent(settings.prompt, settings.expect)
    except UserError:
        if settings.expect is not None:
            raise
        return None


def _confined(edit: Edit, settings: SteerConfig, region: tuple[int, ...] | None) -> Edit:
    """Returns an edit with the steps, threshold and region of the command, where it names none of its own."""
    import dataclasses

    edit = edit.during(settings.edited_steps)
    if settings.threshold is not None:
        edit = dataclasses.replace(edit, threshold=settings.threshold)
    placed = any(part.positions is not None for part in edit.parts)
    return edit if region is None or placed else edit.within(region)


def run_of(pipe: Any, settings: Any) -> Any:
    """Returns the sizes and the schedule that the settings of a run name."""
    return pipe.plan(**settings.model_dump(include={"steps", "height", "width", "text_tokens", "guidance"}))


def region_of(pipe: Any, run: Any, settings: RunSettings | EffectsConfig) -> Any:
    """Returns the pixels of --box or --mask; None if neither is given.

    Args:
        pipe: the pipeline.
        run: from `plan_run`.
        settings: of the command.
    """
    if settings.box is not None and settings.mask is not None:
        raise UserError("Both --box and --mask describe the region; give one of them.")
    from difffract_jax.circuits.notation.region import box_mask, read_mask
    from difffract_jax.models.sampler import PATCH

    rows, columns = (side * PATCH * pipe.config.vae.factor for side in run.grid)
    if settings.box is not None:
        return box_mask(settings.box, (rows, columns))
    return None if settings.mask is None else read_mask(settings.mask, (rows, columns))


def _noise(pipe: Any, run: Any, settings: SteerConfig) -> Any:
    """Returns packed starting noise of every seed that --latents or --noise asks for; None leaves it to the seeds."""
    many = len(settings.seed_list)
    if settings.latents is not None:
        from difffract_jax.storage.files import read_array

        found = read_array(settings.latents)
        found = found[None] if found.ndim == 2 else found
        if found.ndim != 3 or len(found) != many:
            raise UserError(
                f"{settings.latents} has shape {found.shape}, but --seeds names {many}; give [seeds, image tokens, "
                "channels] with as many seeds, or one seed."
            )
        return found
    if settings.noise == "jax":
        return None
    return torch_latents(pipe, run.grid, settings.seed_list)


def starting_noise(pipe: Any, settings: GenerateConfig | TraceConfig | EffectsConfig) -> Any:
    """Returns the packed starting noise that --latents or --noise asks for; None leaves it to the seed.

    Args:
        pipe: the pipeline.
        settings: of a command that makes one run.
    """
    if settings.latents is not None:
        from difffract_jax.storage.files import read_array

        return read_array(settings.latents)
    if settings.noise == "jax":
        return None
    from difffract_jax.models.pipeline import plan_run

    grid = plan_run(pipe.config, height=settings.height, width=settings.width).grid
    return torch_latents(pipe, grid, [settings.seed])[0]


def torch_latents(pipe: Any, grid: Sequence[int], seeds: Sequence[int]) -> Any:
    """Returns packed starting noise as diffusers draws it, [seed img channels].

    Args:
        pipe: the pipeline.
        grid: rows and columns of image tokens.
        seeds: of the noise.

    Raises:
        UserError: if two of them are one seed to PyTorch.
    """
    import numpy as np

    from converters.torch_files import torch_noise, torch_seed
    from difffract_jax.models.sampler import pack

    if len({torch_seed(seed) for seed in seeds}) < len(seeds):
        raise UserError(
            "PyTorch's generator reads the lower 32 bits of a seed, so that seeds that differ by a multiple of 2**32 "
            "give the same noise; give --seeds below 2**32, or leave --noise torch out."
        )
    for seed in seeds:
        if torch_seed(seed) != seed:
            sys.stderr.write(
                f"Warning: PyTorch reads the lower 32 bits of a seed; its noise of {seed} is that of "
                f"{torch_seed(seed)}.\n"
            )
    size = pipe.config.vae.latent_channels, 2 * grid[0], 2 * grid[1]
    return np.stack([pack(torch_noise(seed, *size)[0].transpose(1, 2, 0)) for seed in seeds])


def labels_of(transcoders: str, source: str) -> Any:
    """Returns the labels of a set of transcoders; None if there are none, or they are of others.

    Args:
        transcoders: as given on the command line.
        source: their content hash.
    """
    from difffract_jax.loading import load_labels

    try:
        labels = load_labels(transcoders)
    except UserError:
        return None
    return labels if labels.transcoders == source else None


def warn_cut(cut: str) -> None:
    """Warns of the end of a prompt that did not fit; "" if all did."""
    if cut:
        sys.stderr.write(
            f"Warning: the prompt is longer than the text length; cut off was: {cut!r}. Raise --text-tokens.\n"
        )


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns of a table of metrics that fit a terminal; the files hold all."""
    psnr, far = ("psnr outside", "inside") if "inside" in row else ("psnr", "difference")
    brief = {name: row[name] for name in ("edit", "norm", far)} | {psnr: f"{row[psnr]:.1f}"}
    if "success" in row:
        brief |= {"success": f"{row['success']}/{row['images']}"}
        brief |= {"others": f"{row['others changed']}/{row['compared']}", "flipped": row["flipped"]}
    return brief


def check_directory(out: Path) -> None:
    """Refuses an output directory that could not be written."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, but the results go to a directory; give another --out.")
    if not out.parent.is_dir():
        raise UserError(f"The folder {out.parent} of the output directory {out.name} does not exist; create it first.")


def write_sweep(made: Any, rows: list[dict[str, Any]], record: dict[str, Any], out: Path) -> dict[str, str]:
    """Writes the grid of images and the table, both with the record of how they were made.

    Args:
        made: a `Sweep`.
        rows: of `sweep_table`.
        record: settings of `steer`, versions and sources.
        out: directory; created if need be.

    Returns:
        Paths by name.
    """
    from difffract_jax.cli.output import save_image
    from difffract_jax.organism.evaluate import summary
    from difffract_jax.storage.checkpoint import atomic_file
    from difffract_jax.studies.sheets import sheet

    out.mkdir(exist_ok=True)
    files = {name: out / name for name in ("grid.png", "metrics.md", "metrics.json")}
    save_image(sheet(made.images, [f"seed {seed}" for seed in made.seeds], made.columns), files["grid.png"], record)
    settings = record["settings"]
    title = f"{settings['prompt']}: {', '.join(settings['edit'])}"
    lines = [summary({title: rows}), "```json", json_text.dumps(record, indent=2), "```", ""]
    with atomic_file(files["metrics.md"]) as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    with atomic_file(files["metrics.json"]) as partial:
        partial.write_text(
            json_text.dumps(record | {"metrics": rows, "norms": made.norms.tolist()}, indent=2) + "\n", encoding="utf-8"
        )
    return {name: str(path) for name, path in files.items()}
