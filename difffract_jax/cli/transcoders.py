"""The command that keeps rows for training: `harvest`; registered by `main`.

It follows the rules there: settings in, artefacts and a short table out; progress on stderr; imports when a command
runs.
"""

from pathlib import Path
from typing import Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.hosts import Join, as_one_of
from difffract_jax.cli.models import pipeline_of
from difffract_jax.cli.preflight import check_fits
from difffract_jax.cli.training import ConfigFile
from difffract_jax.config import provenance, resolve
from difffract_jax.transcoders.settings import HarvestConfig, RowSettings, TrainConfig


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(harvest)


def harvest(config: ConfigFile = None, sets: opt.Sets = None, join: Join = None, json: opt.Json = False) -> None:
    """Write the inputs and outputs of a model's MLPs to disk, for `train --rows DIR` to read.

    Example: `difffract harvest configs/smoke.yaml --set out=rows`
    """
    settings = resolve(HarvestConfig, _shared(config, HarvestConfig), sets=sets or ())
    with as_one_of(join, settings):
        _harvest(settings, json)


def _harvest(settings: HarvestConfig, json: bool) -> None:
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.output import emit
    from difffract_jax.transcoders.processes import check_alike, is_first
    from difffract_jax.transcoders.sources import inputs_told, open_sampler
    from difffract_jax.transcoders.store import write_store

    check_fits("harvest", settings, batch=settings.prompts_at_once)
    pipe, caption = pipeline_of(settings)
    sources: dict[Any, Any] = {
        split: open_sampler(settings, pipe, split, caption=caption) for split in ("train", "validation")
    }
    wanted = {"train": settings.train_prompts, "validation": settings.validation_prompts}
    chunks: dict[Any, int] = {split: -(-count // settings.prompts_at_once) for split, count in wanted.items()}
    found = opt.sources(model=pipe)
    check_alike(found | {"prompts": inputs_told(sources["train"])}, "inputs")
    record = provenance("harvest", settings, **found)
    with progress("Harvesting") as advance:
        made = write_store(sources, chunks, settings.out, record, advance)
    rows = {split: sum(max(shard.values()) for shard in shards) for split, shards in made["rows"].items()}
    if is_first():
        emit({"rows": str(settings.out), "sites": len(sources["train"].sites.names)} | rows, as_json=json)


def _shared(config: Path | None, cls: type[RowSettings]) -> dict[str, Any]:
    """Returns the settings of a file that `cls` has: one file serves training and harvesting alike."""
    from difffract_jax.config import read_yaml

    other = TrainConfig.model_fields.keys() - cls.model_fields.keys()
    return {} if config is None else {key: v for key, v in read_yaml(config).items() if key not in other}
