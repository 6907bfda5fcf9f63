"""Harvested rows on disk: numbered safetensors shards that training reads instead of running the model.

    config.json                         format version, kind "rows", sites, width, shards of each split, provenance
    train-00000.safetensors ...         per group of sites: GROUP.x, GROUP.y [site rows d_model], GROUP.t [rows]
    validation-00000.safetensors ...    the same of prompts that training never sees

One chunk of the source is one shard, its filling left out. A store is written whole or not at all. Several processes
share the chunks out and write into one directory; where that lies in a bucket, they need no other place that all see.
`StoredRows` is a source of rows as the sampler is: chunk after chunk, epoch after epoch in a new order, each moved to
the devices when it is asked for.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import FORMAT_VERSION, atomic_directory, atomic_file, read_config
from difffract_jax.storage.files import TensorFile, check_vacant, write_tensors
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.publication import filling
from difffract_jax.transcoders.buffer import spread
from difffract_jax.transcoders.harvest import Chunk, RowSource
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.processes import check_shared, divided, placed, texts, together
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
    with _shared_directory(out) as partial:
        done = 0
        for split, source in sources.items():

            def write(number: int, split: str = split, source: RowSource = source) -> dict[str, np.ndarray]:
                path = partial / f"{split}-{number:05}.safetensors"
                return {group: np.array(count) for group, count in _write_shard(path, source.chunk(number)).items()}

            for counts in divided(chunks[split], write):
                rows[split].append({group: int(counts[group]) for group in source.sites.groups})
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
        together(lambda: _write_record(partial, record))
    return record


def _write_record(directory: Path, record: Mapping[str, Any]) -> None:
    with atomic_file(directory / "config.json") as file:
        file.write_text(json_text(record), encoding="utf-8")


@contextmanager
def _shared_directory(out: Path) -> Iterator[Path]:
    """Hands out a directory to fill, the same to all processes; the first one makes and publishes it."""
    with ExitStack() as held:
        made: list[str] = []
        if is_remote(out):  # each process writes its shards there, and the first one holds the place and ends it
            together(lambda: check_vacant(out))
            together(lambda: held.enter_context(filling(parse_address(out), keep=False)))
            yield out
            return
        together(lambda: made.append(str(held.enter_context(atomic_directory(out)))))
        directory = Path(texts(made[0] if made else "")[0])
        check_shared(directory)
        yield directory


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
    with atomic_file(path) as file:
        write_tensors(file, kinds, arrays.values())
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
        mesh: devices that a chunk's rows are spread over as the buffer's are, each process reading its own part; None
            for the default device.
    """

    directory: Path
    split: Split
    seed: int
    sites: SiteSet
    width: int
    rows: tuple[dict[str, int], ...]
    sae: bool = False
    mesh: Mesh | None = None

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
            most, there = max(shard[group] for shard in self.rows), self.rows[order[number]][group]
            arrays = (file[f"{group}.{name}"] for name in ("y" if self.sae else "x", "y", "t"))
            rows[group] = ActivationRows(
                *(spread_rows(a.shape, a.dtype, most, self.mesh, a.__getitem__) for a in arrays)
            )
            valid[group] = np.arange(most) < there
        return Chunk(rows, valid)


def spread_rows(
    shape: tuple[int, ...],
    dtype: np.dtype,
    size: int,
    mesh: Mesh | None,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> Array:
    """Returns rows on the devices, filled up with zeros; each process reads what its own devices get.

    Args:
        shape: of what there is, [rows] or [site rows channels].
        dtype: its type.
        size: rows that the array shall have.
        mesh: devices; None for the default one.
        read: returns a part, given a slice of every axis; where slices go beyond the rows, those that there are.
    """
    wanted = (size,) if len(shape) == 1 else (shape[0], size, shape[2])

    def part(at: tuple[slice, ...]) -> np.ndarray:
        made, taken = np.zeros([each.stop - each.start for each in at], dtype), read(at)
        made[tuple(slice(0, each) for each in taken.shape)] = taken
        return made

    if mesh is None:
        return placed(wanted, None, part)
    flat = PartitionSpec("data" if size % mesh.shape["data"] == 0 else None)
    return placed(wanted, NamedSharding(mesh, flat if len(shape) == 1 else spread(wanted, mesh)), part)


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
