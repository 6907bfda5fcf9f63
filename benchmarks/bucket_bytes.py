"""Bytes that each host of a pod reads from a bucket, against the bytes of its shard: run by `bucket_runs.py bytes`.

1. A transformer of random weights (`SHAPE`, 0.4 GB in bfloat16) is saved in the emulated bucket, cut into tiles as all
   weights in buckets are, and once more row by row.
2. For each host of four, on each of `MESHES`, what its device needs is read into a cache of the host's own, leaf by
   leaf, and what was fetched is counted, headers included. The hosts are places of one process's mesh of four virtual
   devices; `--processes` makes a process of each, which read by `checkpoint.read_leaf`.

Reported are the sums over leaves that are split alike, and of the four hosts the one that reads most.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.shapes import abstract_module
from difffract_jax.models.tiny import TINY
from difffract_jax.sharding import EVERYWHERE, MMDIT, PLACEMENT, make_mesh, shardings, tilings
from difffract_jax.storage.checkpoint import leaf_paths, open_tree, read_leaf, save_trees
from difffract_jax.storage.files import atomic_directory
from difffract_jax.storage.remote import cache

ROOT, BUCKET, HOSTS = Path(__file__).parents[1], "gs://bucket", 4
SHAPE = replace(TINY, depth_double=3, depth_single=6, heads=8, head_dim=128, rope_axes=(16, 56, 56), text_width=1024)
MESHES = {
    "feature=4": ({"feature": 4}, PLACEMENT),
    "data=2,feature=2, every matrix over both": ({"data": 2, "feature": 2}, EVERYWHERE),
    "data=4, every matrix over it": ({"data": 4}, EVERYWHERE),
}
"""What is reported -> the mesh, and which axes are split over it."""
Row = dict[str, list[int]]
"""How leaves are split -> their number, the bytes of this process's shards, and the bytes that it has fetched."""


def abstract() -> Any:
    """Returns the shapes of the transformer."""
    return abstract_module(MMDiT, SHAPE, ml_dtypes.bfloat16)


def save(name: str, *, tiled: bool) -> int:
    """Writes random weights into the bucket; returns their bytes."""
    rng, tree = np.random.default_rng(0), abstract()
    leaves = leaf_paths(tree)
    made = {
        path: rng.integers(0, 2**14, leaf.shape, np.uint16).view(ml_dtypes.bfloat16) for path, leaf in leaves.items()
    }
    with atomic_directory(f"{BUCKET}/{name}") as partial:
        values = jax.tree.unflatten(jax.tree.structure(tree), list(made.values()))
        save_trees({"model": values}, partial, {}, {"model": tilings(leaves, MMDIT)} if tiled else None)
    return sum(array.nbytes for array in made.values())


def split_of(sharding: NamedSharding, leaf: Any) -> str:
    """Says along which of its last two axes a leaf is split."""
    across = [spec is not None for spec in (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]]
    rows, columns = (*(False, False), *across)[-2:]
    if leaf.ndim < 2 or leaf.size < 2**16 or not (rows or columns):
        return "biases, and what is whole on each host" if not (rows or columns) else "biases that are split"
    return "rows and columns" if rows and columns else "rows" if rows else "columns"


def own_bytes(array: jax.Array) -> int:
    """Returns the bytes of this process's part of an array, each place counted once."""
    return sum({str(shard.index): shard.data.nbytes for shard in array.addressable_shards}.values())


def read(name: str, mesh: str, host: int | None = None) -> Row:
    """Reads what a host's device needs of the weights, or this process's devices; returns what that took."""
    tree, (shape, placement) = abstract(), MESHES[mesh]
    devices = make_mesh(shape)
    wanted = leaf_paths(shardings(tree, devices, MMDIT, placement))
    files = open_tree(cache.local_directory(f"{BUCKET}/{name}", by_range=True), tree)
    rows: Row = {"headers": [0, 0, sum({id(file): file.fetched for file in files.values()}.values())]}
    for path, leaf in leaf_paths(tree).items():
        before = files[path].fetched
        if host is None:
            own = own_bytes(read_leaf(files[path], path, leaf, wanted[path]))
        else:
            index = wanted[path].devices_indices_map(leaf.shape)[devices.devices.flat[host]]
            own = files[path].part(path, index).nbytes
        row = rows.setdefault(split_of(wanted[path], leaf), [0, 0, 0])
        for place, count in enumerate((1, own, files[path].fetched - before)):
            row[place] += count
    return rows


def read_here(path: Path, name: str, mesh: str, hosts: int) -> list[Row]:
    """Reads as each of some hosts in turn, with a cache of its own."""
    rows = []
    for host in range(hosts):
        os.environ[cache.FOLDER] = str(path / f"{name}-{list(MESHES).index(mesh)}-{host}")
        rows.append(read(name, mesh, host))
    return rows


def on_hosts(path: Path, *words: str) -> list[Any]:
    """Runs this module in four processes without a common disk; returns what each has read."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(HOSTS):
        home = path / "-".join((*words, str(number))).replace(",", "-").replace(" ", "-")
        own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", cache.FOLDER: str(home), "PYTHONPATH": str(ROOT)}
        line = [sys.executable, __file__, *words, f"localhost:{port}", str(number)]
        started.append(subprocess.Popen(line, env=os.environ | own, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=1800)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "a host has failed"
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def report(title: str, hosts: list[Row]) -> None:
    """Prints a table of the host that reads most, and of all."""
    print(
        f"\n{title}\n\n| split along | tensors | MB of a host's shards | MB read | ratio, worst of {len(hosts)} hosts |"
    )
    print("|---|---|---|---|---|")
    sums: dict[str, Mapping[str, Any]] = {}
    for kind in hosts[0]:
        sums[kind] = {"n": hosts[0][kind][0], "each": [(host[kind][1], host[kind][2]) for host in hosts]}
    whole = [(sum(row[1] for row in host.values()), sum(row[2] for row in host.values())) for host in hosts]
    sums["all"] = {"n": sum(row[0] for row in hosts[0].values()), "each": whole}
    for kind, one in sums.items():
        own, fetched = max(one["each"], key=lambda pair: pair[1] / max(1, pair[0]))
        ratio = f"{fetched / own:.3f}" if own else ""
        print(f"| {kind} | {one['n']} | {own / 1e6:.1f} | {fetched / 1e6:.1f} | {ratio} |")
    sys.stdout.flush()


def measure(path: Path, *, processes: bool) -> None:
    """Prints what four hosts read of weights in tiles, and what one reads of the same row by row."""
    jax.config.update("jax_num_cpu_devices", HOSTS)
    for name, hosts in (("tiles", HOSTS), ("plain", 1)):
        size = save(name, tiled=name == "tiles")
        for mesh in MESHES if name == "tiles" else ["feature=4"]:
            how = "in tiles" if name == "tiles" else "row by row"
            rows = on_hosts(path, name, mesh) if processes else read_here(path, name, mesh, hosts)
            report(f"{size / 1e6:.0f} MB {how}, mesh {mesh}:", rows)


def main() -> None:
    """Reads as one of the processes."""
    name, mesh, coordinator, number = sys.argv[1:]
    jax.distributed.initialize(coordinator, HOSTS, int(number))
    print(json.dumps(read(name, mesh)))


if __name__ == "__main__":
    main()
