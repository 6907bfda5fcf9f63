"""The commands that find features and edit them: `features`, `steer`; registered by `cli.py`.

They follow its rules: settings in, artefacts and a short table out; progress on stderr; imports when a command runs.
"""

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.cli import options as opt
from difffract_jax.cli.feature_pages import Pages, page_table, pages_at_hand, with_pages
from difffract_jax.cli.group_edits import check_groups, edits_of
from difffract_jax.cli.preflight import check_fits
from difffract_jax.cli.runs import region_of, run_of, torch_latents, warn_cut
from difffract_jax.cli.settings import FeaturesConfig, SteerConfig
from difffract_jax.config import UserError, provenance
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.storage.remote.outputs import ask

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
        "latents": ("steps", "height", "width", "text_tokens", "guidance", "negative_prompt"),
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
    from difffract_jax.cli.bars import progress

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
        "captions": ("scan", "steps", "height", "width", "text_tokens", "guidance", "negative_prompt"),
    },
)
def features(settings: FeaturesConfig, *, scan: Scan = False, pages: Pages = None, json: bool) -> None:
    """Find features: by contrast with another prompt, in a region, by rise or fall over steps, or by activation.

    Prints them with position and step, ready to be a target of `trace` or an edit of `steer`. With --scan, labels every
    feature of the organism's transcoders instead: what it detects, and where it is strongest.

    Example: `difffract features organism organism "a red ring" --contrast "a blue ring" --seeds 0..4`
    """
    if scan:
        _check_scan(settings, pages)
        return _scan(settings, json)
    opt.check_used(settings, ("captions", "out"), "without --scan; add that, or leave it out.")
    if settings.prompt is None:
        raise typer.BadParameter("PROMPT missing; see --help.")
    from difffract_jax.circuits.editing.ranking import rank_features
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit
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


def _check_scan(settings: FeaturesConfig, pages: Path | None) -> None:
    """Refuses what a scan does not read: it labels every feature, over captions of its own."""
    why = "with --scan, which labels every feature over captions of its own; leave it out, or --scan."
    names = ("prompt", "contrast", "by", "step", "top", "sites", "seeds", "box", "mask")
    opt.check_used(settings, names, why, arguments=("prompt",))
    if pages is not None:
        raise UserError(f"--pages does nothing {why}")


def _scan(settings: FeaturesConfig, json: bool) -> None:
    """Labels every feature of the organism's transcoders."""
    if settings.model != "organism":
        raise UserError("A scan reads what images show from the organism's scenes; other models have none.")
    if settings.out is None or settings.out.suffix != ".json":
        raise UserError("A scan writes a labels file: give --out FILE.json in a folder that exists.")
    opt.check_out(settings.out, ".json")
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.output import emit, replacing
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
    from difffract_jax.organism.vocabulary import is_of_the_world
    from difffract_jax.studies.metrics import intent

    if not is_of_the_world(settings.model):
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
    if is_remote(out):
        return ask(out)
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
    from difffract_jax.organism.evaluate import summary
    from difffract_jax.storage.files import atomic_file, make_directory
    from difffract_jax.storage.images import save_image
    from difffract_jax.studies.sheets import sheet

    make_directory(out)
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
