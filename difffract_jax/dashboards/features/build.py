"""A corpus scan and its pages, into one directory: the two passes, what weights say, and everything written.

1. Refuse what can be refused: transcoders of another model, no prompts, features that there are not, an output that
   holds something else. Tell the disk's need.
2. First pass (`scan`); choose examples; write the scan's record.
3. Second pass (`maps`): maps of the examples, thumbnails.
4. The mean run, links by weights, effects on pixels.
5. Pages, site by site; the index last. The directory appears when it is complete; what is finished of an interrupted
   one stays beside it, and the same call goes on there.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8

from difffract_jax.address import Layout
from difffract_jax.dashboards.features import maps as example_maps
from difffract_jax.dashboards.features import pages
from difffract_jax.dashboards.features.choice import Examples, choose
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.effects import Effects, effects_of, token_pictures
from difffract_jax.dashboards.features.links import Links, find_links
from difffract_jax.dashboards.features.mean_run import MeanRun, mean_run
from difffract_jax.dashboards.features.record import (
    FOLDER,
    FORMAT_VERSION,
    KIND,
    TIERS,
    SiteScan,
    tokens_of,
    write_record,
    write_site,
)
from difffract_jax.dashboards.features.request import (
    DashboardOptions,
    check_request,
    identity_of,
    image_size,
    sizes_of,
)
from difffract_jax.dashboards.features.scan import WORK, Kept, Scanned, scan
from difffract_jax.dashboards.features.state import EDGES, FeatureState
from difffract_jax.estimate.scanning import disk_bytes
from difffract_jax.models.streaming import Streamed
from difffract_jax.spread import on_mesh_of
from difffract_jax.storage.resumable import Output, resumable_directory
from difffract_jax.transcoders.transcoder import TranscoderSet

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`."""


class Built(NamedTuple):
    """What was written.

    Attributes:
        pages: features that have a page.
        dead: those of them that are never active.
        rare: those that are active at less than `record.RARE` of the tokens.
        prompts: prompts that examples show.
    """

    pages: int
    dead: int
    rare: int
    prompts: int


def build_dashboards(
    corpus: Corpus,
    tcs: TranscoderSet,
    out: str | Path,
    options: DashboardOptions | None = None,
    *,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """Scans a corpus and writes a page for every feature.

    Args:
        corpus: prompts, and what they run on.
        tcs: its transcoders, or SAEs.
        out: directory to write; `index.html` in it opens in a browser from the disk.
        options: what the pages hold.
        overwrite: replace an existing folder of dashboards.
        provenance: how it was made, from `config.provenance`.
        progress: called with (stage, done, in all).

    Raises:
        UserError: if the transcoders do not fit, there is no prompt, a feature does not exist, the output holds
            something else, or the disk is full.
    """
    options = options or DashboardOptions()
    check_request(corpus, tcs, out, options, overwrite=overwrite)
    with resumable_directory(out, overwrite=overwrite) as output:
        sizes = (corpus.pipe.config, corpus.run, tcs.sites, tcs.config.features, len(corpus.prompts), options)
        output.begin(identity_of(corpus, tcs, options), disk_bytes(sizes_of(*sizes)).total)
        scanned = scan(
            corpus,
            tcs,
            top=options.top,
            sample=options.sample,
            kept=Kept(output, options.seconds),
            progress=partial(progress, "Scanning prompts"),
        )
        config = _config(corpus, tcs, scanned, options, provenance or {})
        sites, examples = _sites(tcs, scanned, options)
        sums = [np.asarray(a) / len(corpus.prompts) for a in scanned.sums]
        del scanned  # the device's memory is the second pass's
        for name, site in sites.items():
            write_site(output.files / FOLDER, name, site)
        drawn = _draw(corpus, tcs, sites, examples, output, progress)
        with on_mesh_of(corpus.pipe.transformer):
            mean = mean_run(corpus, tcs.sites, *sums)
        links = find_links(
            tcs,
            corpus.pipe.config.transformer.layout,
            mean,
            corpus.run.sigmas[:-1],
            _by_group(tcs, {name: site.usual for name, site in sites.items()}),
            _by_group(tcs, {name: site.sides for name, site in sites.items()}),
            options.links,
            partial(progress, "Comparing weights"),
        )
        built = _write_pages(corpus, tcs, options, output, config, sites, drawn, mean, links, progress)
        write_record(output.files / FOLDER, config, corpus.prompts)
        shutil.rmtree(output.files / WORK)
    return built


def _config(
    corpus: Corpus, tcs: TranscoderSet, scanned: Scanned, options: DashboardOptions, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what `scan/config.json` says."""
    run, names = corpus.run, ("tokens", "negative_tokens")
    sites = {
        f"{group.label}/{number}": {"streams": list(group.streams)}
        | dict(zip(names, scanned.tokens[group.name], strict=False))
        for group, numbers in tcs.sites.members
        for number in numbers
    }
    return {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "model": corpus.pipe.source,
        "transcoders": tcs.source,
        "role": tcs.config.role,
        "features": tcs.config.features,
        "seed": corpus.seed,
        "prompts": len(corpus.prompts),
        "tiers": list(TIERS),
        "top": options.top,
        "run": {
            "steps": run.steps,
            "sigmas": [float(sigma) for sigma in run.sigmas],
            "grid": list(run.grid),
            "text_tokens": run.text_tokens,
            "guidance": run.guidance,
        }
        | _negative(corpus),
        "sites": sites,
        "provenance": dict(provenance),
    }


def _negative(corpus: Corpus) -> dict[str, Any]:
    """Returns what is said of a run's second branch; nothing where a step is one evaluation."""
    if corpus.run.branches == 1:
        return {}
    prompt = corpus.run.negative_prompt
    return {"branches": corpus.run.branches, "negative_prompt": prompt, "negative_words": corpus.written(prompt)}


def _sites(
    tcs: TranscoderSet, scanned: Scanned, options: DashboardOptions
) -> tuple[dict[str, SiteScan], dict[str, Examples]]:
    """Returns what was found at every site, by its name; and the examples of every group, [site feat shown]."""
    chosen = None if options.features is None else {(f.stream, f.block, f.feature) for f in options.features}
    sites, examples = {}, {}
    for group, numbers in tcs.sites.members:
        state = FeatureState(*map(np.asarray, scanned.states[group.name]))
        every = []
        for slot, number in enumerate(numbers):
            measured = FeatureState(*(array[slot] for array in state))
            picked = choose(measured, options.per_third)
            if chosen is not None:
                named = [(group.label, number, f) in chosen for f in range(tcs.config.features)]
                picked = picked._replace(prompt=np.where(np.array(named)[:, None], picked.prompt, -1))
            every.append(picked)
            sites[f"{group.label}/{number}"] = SiteScan(
                active=measured.active,
                total=measured.total,
                histogram=measured.histogram,
                edges=(EDGES * float(measured.scale)).astype(np.float32),
                prompts=measured.prompts,
                text=measured.text,
                peak=measured.top_value[:, 0],
                example_prompt=picked.prompt,
                example_place=picked.place,
                example_value=picked.value,
                example_tier=picked.tier,
            )
        examples[group.name] = Examples(*map(np.stack, zip(*every, strict=True)))
    return sites, examples


def _by_group(tcs: TranscoderSet, by_site: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacks arrays of sites by group."""
    return {
        group.name: np.stack([by_site[f"{group.label}/{number}"] for number in numbers])
        for group, numbers in tcs.sites.members
    }


class Drawn(NamedTuple):
    """What the second pass made.

    Attributes:
        maps: of examples, by group, [site feat shown cells].
        thumbs: of the prompts that examples name.
        prompts: their numbers, ascending.
    """

    maps: Mapping[str, UInt8[np.ndarray, "site feat shown cells"]]
    thumbs: UInt8[np.ndarray, "chosen height width rgb"]
    prompts: Int[np.ndarray, "chosen"]


def _draw(
    corpus: Corpus,
    tcs: TranscoderSet,
    sites: Mapping[str, SiteScan],
    examples: Mapping[str, Examples],
    output: Output,
    progress: Progress,
) -> Drawn:
    """Runs the second pass; maps and thumbnails lie in files of the work in progress."""
    run, work = corpus.run, output.files / WORK
    jobs = {
        group.name: example_maps.jobs_of(examples[group.name], group.rows(run.tokens), run.evaluations)
        for group, _ in tcs.sites.members
    }
    chosen = example_maps.chosen_prompts(jobs, run.evaluations)
    shapes = {
        f"maps-{group.name}": (
            *examples[group.name].prompt.shape,
            example_maps.cells_of(group, run.grid, run.text_tokens),
        )
        for group, _ in tcs.sites.members
    }
    shapes["thumbs"] = (max(len(chosen), 1), *example_maps.thumb_size(*image_size(corpus.pipe.config, run)), 3)
    files = {name: _mapped(work / f"{name}.u8", shape, output) for name, shape in shapes.items()}
    maps = {name.removeprefix("maps-"): array for name, array in files.items() if name != "thumbs"}
    peaks = _by_group(tcs, {name: site.peak for name, site in sites.items()})
    thumbs = files["thumbs"][: len(chosen)]
    numbers = example_maps.render(
        corpus, tcs, jobs, peaks, maps, thumbs, output=output, progress=partial(progress, "Drawing examples")
    )
    return Drawn(maps, thumbs, numbers)


def _mapped(path: Path, shape: tuple[int, ...], output: Output) -> np.memmap:
    """Opens a file of bytes in memory; where it is not there, or of another size, the second pass begins anew."""
    if not path.is_file() or path.stat().st_size != int(np.prod(shape)):
        output.forget(*[name for name in output.finished if name.startswith(example_maps.NAME)])
        path.parent.mkdir(exist_ok=True)
        return np.memmap(path, np.uint8, "w+", shape=shape)
    return np.memmap(path, np.uint8, "r+", shape=shape)


def _write_pages(
    corpus: Corpus,
    tcs: TranscoderSet,
    options: DashboardOptions,
    output: Output,
    config: Mapping[str, Any],
    sites: Mapping[str, SiteScan],
    drawn: Drawn,
    mean: MeanRun,
    links: Links,
    progress: Progress,
) -> Built:
    """Writes all pages, and the index last."""
    pictures, folder, counted = None, output.files, []
    total, done = sum(len(_wanted(options, name, len(site.peak))) for name, site in sites.items()), 0
    for number, (name, site) in enumerate(sites.items()):
        group, slot = _group_of(tcs, name)
        effects = None
        if "img" in config["sites"][name]["streams"]:
            pictures = token_pictures(corpus, mean) if pictures is None else pictures
            effects = _effects(tcs, group, slot, site, mean, pictures)
        made = pages.SitePages(
            name=name,
            number=number,
            scan=site,
            maps=drawn.maps[group][slot],
            effects=effects,
            links=links,
            texts=options.texts or {},
            edges=options.edges or {},
            wanted=_wanted(options, name, len(site.peak)),
        )
        counted.append(pages.write_list(folder, made, config))
        for written in pages.write_chunks(folder, made, config):
            progress("Writing pages", done + written, total)
        done += len(made.wanted)
    prompts = [(int(n), corpus.prompts[n], corpus.tokens_of(int(n)), corpus.noise_seed(int(n))) for n in drawn.prompts]
    pages.write_prompts(folder, prompts, drawn.thumbs)
    pages.write_script(folder / "data" / "index.js", "index", _index(corpus, tcs, options, config, sites, counted))
    pages.write_assets(folder)
    count, dead, rare = (sum(one[key] for one in counted) for key in ("pages", "dead", "rare"))
    return Built(count, dead, rare, len(drawn.prompts))


def _wanted(options: DashboardOptions, site: str, features: int) -> Int[np.ndarray, "wanted"]:
    """Returns the features of a site that get a page, ascending."""
    if options.features is None:
        return np.arange(features)
    return np.array(sorted({f.feature for f in options.features if f"{f.stream}/{f.block}" == site}), np.int64)


def _group_of(tcs: TranscoderSet, site: str) -> tuple[str, int]:
    """Returns the group of a site, and its place there."""
    label, _, number = site.partition("/")
    group, numbers = next((group, numbers) for group, numbers in tcs.sites.members if group.label == label)
    return group.name, numbers.index(int(number))


def _effects(tcs: TranscoderSet, group: str, slot: int, site: SiteScan, mean: MeanRun, pictures: np.ndarray) -> Effects:
    """Returns the direct effects of a site's features on pixels."""
    stack = tcs.stacks[group]
    tc = stack.fetch(slot) if isinstance(stack, Streamed) else jax.tree.map(lambda leaf: leaf[slot], stack)
    return effects_of(np.asarray(tc.dec.kernel[...]), mean.last_gates[group][slot], site.usual, mean, pictures)


def _index(
    corpus: Corpus,
    tcs: TranscoderSet,
    options: DashboardOptions,
    config: Mapping[str, Any],
    sites: Mapping[str, SiteScan],
    counted: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns what the page knows of the scan."""
    run, size, rows = corpus.run, image_size(corpus.pipe.config, corpus.run), []
    for (name, site), counts in zip(sites.items(), counted, strict=True):
        facts, active = config["sites"][name], site.active.sum(axis=0, dtype=np.int64)
        tokens = tokens_of(config, name)
        rows.append(
            {"name": name, "streams": facts["streams"], "tokens": tokens.astype(int).tolist()}
            | {"l0": pages.short(active / np.maximum(1, tokens)), "edges": pages.short(site.edges), **counts}
        )
    return {
        "sites": rows,
        **{key: config[key] for key in ("features", "prompts", "role", "tiers", "top", "model", "transcoders")},
        "run": {**config["run"], "height": size[0], "width": size[1]},
        "cells": list(example_maps.cell_grid(run.grid)),
        "thumb": list(example_maps.thumb_size(*size)),
        "kind": pages.suffix_of(example_maps.thumb_size(*size)),
        "chunk": pages.CHUNK,
        "sheet": pages.SHEET,
        "names": list(options.names),
        "lora": list(options.lora),
        "graph": options.graph,
        "blocks": _blocks(corpus.pipe.config.transformer.layout, tcs),
    }


def _blocks(layout: Layout, tcs: TranscoderSet) -> list[str]:
    """Returns the block of every site, as text."""
    return [layout.block_name(layout.block_of(g.label, n)) for g, numbers in tcs.sites.members for n in numbers]
