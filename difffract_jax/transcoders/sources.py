"""From settings to rows: the sampler on a model's prompts, or a store on disk, for one split.

`prompts` in the settings names a file or dataset, or `world`, the endless captions of a caller: any function from a
number to a caption. The embedded organism has one.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from difffract_jax.config import SharedError, UserError
from difffract_jax.models.pipeline import Pipeline, encode, plan_run
from difffract_jax.transcoders.harvest import Sampler, prompts_sharding
from difffract_jax.transcoders.own_rows import ArrayRows
from difffract_jax.transcoders.prompts import PromptFile, Prompts, PromptWorld, Split, read_prompts, split_prompts
from difffract_jax.transcoders.settings import WORLD, RowSettings
from difffract_jax.transcoders.sites import parse_sites
from difffract_jax.transcoders.store import StoredRows
from difffract_jax.transcoders.text_encoders import HostEncoders

Caption = Callable[[int], str]


def open_prompts(settings: RowSettings, split: Split, caption: Caption | None = None) -> Prompts:
    """Returns one split of the prompts that the settings name.

    Args:
        settings: say which.
        split: training or validation.
        caption: caption number i of a world; needed for `prompts: world`.
    """
    if settings.prompts is None:
        raise UserError(
            f"There are no prompts to run {settings.model} on; give --prompts FILE, or `prompts` in the settings: a "
            ".txt, .jsonl or .parquet file, or hf:OWNER/NAME."
        )
    if settings.prompts != WORLD:
        return split_prompts(read_prompts(settings.prompts), settings.validation_share, settings.seed)[split]
    if caption is None:
        raise UserError("prompts: world needs a model with a world of its own, the organism; give a file of prompts.")
    return PromptWorld(caption, split, settings.validation_share)


def inputs_told(source: Any) -> str:
    """Returns in a few words what a source reads, which differ where processes have other prompts, or other rows.

    Args:
        source: of rows.
    """
    prompts = getattr(source, "prompts", None)
    if isinstance(prompts, PromptFile):
        digest = hashlib.sha256("\n".join(prompts.prompts).encode()).hexdigest()
        return f"{len(prompts.prompts)} prompts with the hash {digest[:12]}"
    if isinstance(source, StoredRows):
        return f"{sum(max(shard.values()) for shard in source.rows)} rows in {len(source.rows)} shards"
    if isinstance(source, ArrayRows):
        return f"{sum(block.end - block.begin for block in source.blocks)} rows"
    return type(source).__name__


def open_sampler(
    settings: RowSettings,
    pipe: Pipeline,
    split: Split,
    *,
    caption: Caption | None = None,
    mesh: Mesh | None = None,
    sae: bool = False,
    encoders_on_host: bool = False,
) -> Sampler:
    """Returns the sampler as a source of rows.

    Args:
        settings: say which rows.
        pipe: the model.
        split: whose prompts.
        caption: see `open_prompts`.
        mesh: devices to spread the prompts over, by its axes `data` and `site` where these divide them.
        sae: report y for x.
        encoders_on_host: keep the text encoders, and the autoencoder, off the devices but while prompts are encoded.
    """
    run = plan_run(
        pipe.config,
        steps=settings.steps_per_image,
        height=settings.height,
        width=settings.width,
        text_tokens=settings.text_tokens,
        guidance=settings.guidance,
        negative_prompt=settings.negative_prompt,
    )
    negative = encode(pipe, run.negative_prompt, run.text_tokens) if run.branches > 1 else None
    spread: Any = None
    if mesh is not None:
        spread = prompts_sharding(settings.prompts_at_once, mesh)
    prompts = open_prompts(settings, split, caption)
    if isinstance(prompts, PromptFile) and len(prompts.prompts) < jax.process_count():
        raise SharedError(
            f"{settings.prompts} has {len(prompts.prompts)} prompts for {split}, fewer than the {jax.process_count()} "
            "processes that share them; give more prompts, or start fewer processes.",
            speaks=jax.process_index() == 0,
        )
    encoders = None
    if encoders_on_host:
        encoders = HostEncoders(pipe.t5, pipe.clip)
        pipe = pipe._replace(t5=None, clip=None, vae=None)
    return Sampler(
        pipe=pipe,
        sites=parse_sites(settings.sites, pipe.config.transformer.layout),
        run=run,
        prompts=prompts,
        seed=settings.seed,
        prompts_at_once=settings.prompts_at_once,
        tokens_per_step=settings.tokens_per_step,
        include_padding=settings.include_padding,
        sae=sae,
        spread=spread,
        encoders=encoders,
        negative=negative,
    )
