"""What is asked of a scan: its options, what is refused before anything runs, and what identifies it."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.dashboards.features import maps as example_maps
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.record import FOLDER, FORMAT_VERSION
from difffract_jax.dashboards.features.scan import SECONDS
from difffract_jax.dashboards.features.texts import Text
from difffract_jax.estimate.scanning import ScanSizes
from difffract_jax.models.pipeline import Run
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.streaming import Streamed
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.storage.files import check_vacant, is_occupied
from difffract_jax.storage.remote.cache import has_file
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit

_LOG = logging.getLogger(__name__)
CORPUS_SEED = 90_000
"""World of the organism's captions that are scanned where a number of prompts is given; neither training nor labels use
it."""
MOST_TOKENS = 2**31
"""Tokens, those of all steps together, that counters hold: a bin of a histogram may count each of them."""


@dataclass(frozen=True, kw_only=True)
class DashboardOptions:
    """What pages shall hold beside what the corpus says.

    Attributes:
        top: strongest examples of a feature.
        per_third: examples of each third of the others.
        sample: prompts of the uniform sample that the thirds are of.
        links: partners by weights, in each direction, and neighbours.
        features: those that get a page; None for all.
        texts: what features are called.
        edges: of a graph, from `texts.edges_by_feature`.
        graph: name of that graph.
        names: of the model and the transcoders, as commands take them.
        lora: LoRAs of the model, as commands take them.
        seconds: between two times that what is finished is kept.
    """

    top: int = 10
    per_third: int = 2
    sample: int = 32
    links: int = 8
    features: tuple[Feature, ...] | None = None
    texts: Mapping[str, Text] | None = None
    edges: Mapping[str, Any] | None = None
    graph: str = ""
    names: tuple[str, str] = ("MODEL", "TRANSCODERS")
    lora: tuple[str, ...] = ()
    seconds: float = SECONDS

    @property
    def shown(self) -> int:
        """Places for examples of a feature."""
        return self.top + 3 * self.per_third


def check_request(
    corpus: Corpus, tcs: TranscoderSet, out: str | Path, options: DashboardOptions, *, overwrite: bool
) -> None:
    """Refuses what can be refused before anything runs; arguments and errors as for `build_dashboards`."""
    check_fit(tcs, corpus.pipe.config.transformer)
    if not corpus.prompts:
        raise UserError("A scan needs prompts, but there are none; give --prompts FILE with one prompt a line.")
    evaluations, rows = corpus.run.evaluations, max(group.rows(corpus.run.tokens) for group, _ in tcs.sites.members)
    if evaluations * rows * len(corpus.prompts) >= MOST_TOKENS:
        both = " of two evaluations" * (corpus.run.branches - 1)
        raise UserError(
            f"{len(corpus.prompts):,} prompts of {rows:,} tokens in {corpus.run.steps:,} steps{both} are more than the "
            f"{MOST_TOKENS:,} tokens that counters hold; give at most {(MOST_TOKENS - 1) // (evaluations * rows):,} "
            "prompts."
        )
    for feature in options.features or ():
        site = f"{feature.stream}/{feature.block}"
        if site not in tcs.sites.names:
            raise UserError(f"There are no transcoders of {site}, as {feature} needs; there are {_spoken(tcs)}.")
        if feature.feature >= tcs.config.features:
            raise UserError(f"{feature} does not exist: the transcoders have features 0 to {tcs.config.features - 1}.")
    check_output(out, overwrite=overwrite)
    # Unknown words are told now, and not after an hour.
    ids = (encode_prompt(corpus.pipe.tokenizers, prompt, corpus.run.text_tokens) for prompt in corpus.prompts)
    cut = sum(bool(one.cut) for one in ids)
    if cut:
        _LOG.warning(
            "%s of %s prompts are longer than %s text tokens and are cut; raise --text-tokens.",
            *(f"{count:,}" for count in (cut, len(corpus.prompts), corpus.run.text_tokens)),
        )


def check_output(out: str | Path, *, overwrite: bool) -> None:
    """Refuses an output that holds something else than dashboards, or dashboards without `overwrite`.

    Args:
        out: directory to write.
        overwrite: whether existing dashboards may be replaced.

    Raises:
        UserError: if it is refused.
    """
    if is_occupied(Path(out)) and not has_file(Path(out) / FOLDER / "config.json"):
        raise UserError(f"{out} exists and is not a folder of dashboards, so that it stays; name another --out.")
    check_vacant(out, overwrite=overwrite)


def _spoken(tcs: TranscoderSet) -> str:
    names = tcs.sites.names
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def sizes_of(
    config: PipelineConfig, run: Run, sites: SiteSet, features: int, prompts: int, options: DashboardOptions
) -> ScanSizes:
    """Returns what the bytes of a scan follow from; nothing need be loaded.

    Args:
        config: of the pipeline.
        run: sizes and schedule.
        sites: that are scanned.
        features: of each.
        prompts: how many.
        options: what the pages hold.
    """
    thumb = example_maps.thumb_size(*image_size(config, run))
    return ScanSizes(
        features=features,
        sites=tuple(
            (example_maps.cells_of(group, run.grid, run.text_tokens), "img" in group.streams)
            for group, numbers in sites.members
            for _ in numbers
        ),
        evaluations=run.evaluations,
        prompts=prompts,
        text_tokens=run.text_tokens,
        thumb=thumb[0] * thumb[1] * 3,
        top=options.top,
        sample=options.sample,
        shown=options.shown,
        links=options.links,
        pages=None if options.features is None else len(options.features),
    )


def image_size(config: PipelineConfig, run: Run) -> tuple[int, int]:
    """Returns height and width of the images of a run."""
    unit = PATCH * config.vae.factor
    return run.grid[0] * unit, run.grid[1] * unit


def identity_of(corpus: Corpus, tcs: TranscoderSet, options: DashboardOptions) -> str:
    """Returns a text that says all that finished work depends on."""
    run = corpus.run
    prompts = hashlib.sha256("\0".join(corpus.prompts).encode()).hexdigest()
    facts = [FORMAT_VERSION, corpus.pipe.source, tcs.source, tcs.sites.names, prompts, corpus.seed, corpus.batch]
    facts += [run.grid, run.text_tokens, run.sigmas.tolist(), run.guidance, options.top, options.per_third]
    # Another type rounds otherwise, and the transcoders' hash is that of their files.
    stacks = [one.abstract() if isinstance(one, Streamed) else one for one in tcs.stacks.values()]
    facts += [sorted({str(leaf.dtype) for leaf in jax.tree.leaves(stacks)})]
    facts += [run.branches, run.negative_prompt] if run.branches > 1 else []
    facts += [options.sample, None if corpus.mesh is None else dict(corpus.mesh.shape)]
    facts += [None if options.features is None else [str(one) for one in options.features]]
    return json.dumps(facts)
