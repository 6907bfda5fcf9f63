"""Harvested rows on disk: numbered safetensors shards that training reads instead of running the model.

    config.json                         format version, kind "rows", sites, width, shards of each split, provenance
    train-00000.safetensors ...         per group of sites: GROUP.x, GROUP.y [site rows d_model], GROUP.t [rows]
    validation-00000.safetensors ...    the same of prompts that training never sees

One chunk of the source is one shard, its filling left out. A store is written whole or not at all. `StoredRows` is a
source of rows as the sampler is: chunk after chunk, epoch after epoch in a new order, each moved to the device when it
is asked for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import FORMAT_VERSION, atomic_directory, atomic_file, read_config
from difffract_jax.storage.files import TensorFile, write_tensors
from difffract_jax.transcoders.harvest import Chunk, RowSource
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.prompts import Split
from difffract_jax.transcoders.sites import SiteSet, sites_of

KIND = "rows"


def write_store(
    sources: Mapping[Split, RowSource],
    chunks: Mapping[Split, int],
    out: Path,
    provenance: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the first chunks of both splits.

    Args:
        sources: where each split's rows come from; of the same sites.
        chunks: how many chunks of each.
        out: directory to write; it appears only when it is complete.
        provenance: how the rows were made.
        progress: called with (chunks done, chunks in all).

    Returns:
        What `config.json` says.
    """
    first = next(iter(sources.values()))
    rows: dict[str, list[dict[str, int]]] = {split: [] for split in sources}
    with atomic_directory(out) as partial:
        done = 0
        for split, source in sources.items():
            for number in range(chunks[split]):
                rows[split].append(_write_shard(partial / f"{split}-{number:05}.safetensors", source.chunk(number)))
                done += 1
                if progress is not None:
                    progress(done, sum(chunks.values()))
        record = {
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "sites": first.sites.to_json(),
            "width": first.width,
            "rows": rows,
            "provenance": dict(provenance),
        }
        with atomic_file(partial / "config.json") as file:
            file.write_text(json_text(record), encoding="utf-8")
    return record


def json_text(record: Mapping[str, Any]) -> str:
    """Returns a record as indented JSON with a final newline."""
    return json.dumps(record, indent=2) + "\n"


def _write_shard(path: Path, chunk: Chunk) -> dict[str, int]:
    """Writes one chunk, and returns how many rows every group has."""
    arrays = {}
    for group, rows in chunk.rows.items():
        keep = np.flatnonzero(chunk.valid[group])
        x, y, t = (np.asarray(a) for a in rows)
        arrays |= {f"{group}.x": x[:, keep], f"{group}.y": y[:, keep], f"{group}.t": t[keep]}
    kinds = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_tensors(path, kinds, arrays.values())
    return {group: len(arrays[f"{group}.t"]) for group in chunk.rows}


@dataclass(frozen=True)
class StoredRows:
    """Rows of one split of a store; a `RowSource`.

    Attributes:
        directory: the store.
        split: which prompts' rows.
        seed: of the order of shards.
        sites: sites it has rows of.
        width: channels of a row.
        rows: by shard, how many rows every group has.
        sae: report y for x, for an SAE.
    """

    directory: Path
    split: Split
    seed: int
    sites: SiteSet
    width: int
    rows: tuple[dict[str, int], ...]
    sae: bool = False

    @property
    def timed(self) -> bool:
        """Whether rows have times of their own; those of a model do."""
        return True

    def chunk(self, number: int) -> Chunk:
        """Reads shard `number` of the order; rows are filled up to those of the largest, so that shapes stay."""
        order: Any = grain.MapDataset.range(len(self.rows)).seed(self.seed).shuffle().repeat()
        file = TensorFile(self.directory / f"{self.split}-{order[number]:05}.safetensors")
        if file.missing_bytes:
            raise UserError(f"{file.path} is cut off by {file.missing_bytes} bytes; harvest the rows again.")
        rows, valid = {}, {}
        for group in self.sites.groups:
            most = max(shard[group] for shard in self.rows)
            x, y, t = (np.asarray(file[f"{group}.{name}"]) for name in ("x", "y", "t"))
            missing = most - len(t)
            wide = [np.pad(a, ((0, 0), (0, missing), (0, 0))) for a in ((y if self.sae else x), y)]
            rows[group] = ActivationRows(*map(jnp.asarray, (*wide, np.pad(t, (0, missing)))))
            valid[group] = np.arange(most) < len(t)
        return Chunk(rows, valid)


def open_store(directory: Path, split: Split, seed: int, *, sae: bool = False) -> StoredRows:
    """Opens one split of a store.

    Args:
        directory: that `write_store` wrote.
        split: which prompts' rows.
        seed: of the order of shards.
        sae: report y for x.

    Raises:
        UserError: if it is not a store, or lacks shards.
    """
    record = read_config(directory)
    if record.get("kind") != KIND:
        raise UserError(f"{directory} holds {record.get('kind', 'something else')}, no harvested rows; harvest first.")
    rows = tuple(record["rows"].get(split, ()))
    absent = [n for n in range(len(rows)) if not (directory / f"{split}-{n:05}.safetensors").exists()]
    if absent or not rows:
        raise UserError(f"{directory} lacks shards of the {split} split; harvest the rows again.")
    return StoredRows(directory, split, seed, sites_of(record["sites"]), record["width"], rows, sae)
