"""Processes that share no disk harvest and train into one bucket: what they write is what one process writes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from bucket_servers import Proxy
from difffract_jax import random_transcoders, sharding
from difffract_jax.cli.training import run_training
from difffract_jax.config import resolve
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.models.tiny import TINY
from difffract_jax.storage import headers
from difffract_jax.storage.files import atomic_directory
from difffract_jax.storage.remote import cache, steps
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.cache import local_directory
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.training import run_settings

ROOT = Path(__file__).parents[3]
SETTINGS = ("model=tiny", f"prompts={ROOT / 'configs' / 'prompts.txt'}", 'sites=["img/1"]', "steps_per_image=2")
SETTINGS += ("train_prompts=8", "validation_prompts=4", "prompts_at_once=4", "tokens_per_step=16")


TRAINING = {"rows": "gs://bucket/hosts/arrays", "steps": 8, "checkpoint_every": 4, "log_every": 4, "mesh": "data=2"}
TRAINING |= {
    "conditioning": "none",
    "time_embed": 0,
    "expansion": 4,
    "k": 4,
    "batch": 64,
    "buffer_rows": 256,
    "lr": 3e-3,
}


def start(home: Path, *words: str, **environment: str) -> subprocess.Popen:
    """Starts a command in a working directory of its own, with a cache of its own."""
    home.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "difffract_jax", *words],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT), cache.FOLDER: str(home / "copies")} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def end(processes: list[subprocess.Popen]) -> None:
    """Waits for processes, which are to end well."""
    for process in processes:
        try:
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, said


@pytest.mark.slow
def test_hosts_without_a_common_disk_harvest_what_one_process_does(gs: Proxy, tmp_path: Path) -> None:
    def harvest(name: str, out: str, *more: str) -> subprocess.Popen:
        given = [word for setting in (*SETTINGS, f"out={out}") for word in ("--set", setting)]
        return start(tmp_path / name, "harvest", *given, *more)

    port = free_port()
    hosts = [harvest(f"host-{n}", "gs://bucket/hosts/rows", "--join", f"localhost:{port},{n},2") for n in range(2)]
    end([*hosts, harvest("alone", str(tmp_path / "rows"))])
    there = local_directory("gs://bucket/hosts/rows")
    shards = {path.name: path.read_bytes() for path in (tmp_path / "rows").glob("*.safetensors")}
    assert len(shards) == 3 and shards == {path.name: path.read_bytes() for path in there.glob("*.safetensors")}


@pytest.mark.slow
def test_hosts_without_a_common_disk_train_what_one_process_does_and_it_goes_on_from_theirs(
    gs: Proxy, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 8), np.float32)
    with atomic_directory(TRAINING["rows"]) as partial:
        np.save(partial / "x.npy", x)
        np.save(partial / "y.npy", np.tanh(x[:, ::-1]))
    run, port = "gs://bucket/hosts/run", free_port()
    given = [word for name, value in (TRAINING | {"out": run}).items() for word in ("--set", f"{name}={value}")]
    joins = [f"localhost:{port},{n},2" for n in range(2)]
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    end([start(tmp_path / f"host-{n}", "train", *given, "--join", join, **devices) for n, join in enumerate(joins)])

    def weights(path: str | Path) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_transcoders(path).stacks)]

    run_training(resolve(TrainConfig, TRAINING | {"out": tmp_path / "run"}), False)
    alone = weights(tmp_path / "run" / "transcoders")
    assert all(map(np.array_equal, weights(f"{run}/transcoders"), alone))
    checkpoints = parse_address(run) / "checkpoints"
    assert steps.complete(checkpoints) == [4, 8]
    steps.forget(checkpoints / "8")
    run_training(run_settings(Path(run)), True)
    assert steps.complete(checkpoints) == [4, 8] and all(map(np.array_equal, weights(f"{run}/transcoders"), alone))


SHARE = """
import json, sys

import jax, numpy as np

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.models.tiny import TINY
from difffract_jax.storage import headers
from difffract_jax.sharding import TRANSCODER, make_mesh, shardings
from difffract_jax.storage.checkpoint import ShardingsOf
from difffract_jax.storage.remote import cache

cache.SPARSE_FROM = 1
where = ShardingsOf(lambda stack: shardings(stack, make_mesh({"feature": 2}), TRANSCODER))
stack = load_transcoders("gs://bucket/hosts/tiled", sharding=where).stacks["img"]
leaves = jax.tree.leaves(stack)
own = [leaf.addressable_shards[0] for leaf in leaves]
np.savez("own.npz", *[np.asarray(shard.data) for shard in own])
bounds = [[one.indices(size)[:2] for one, size in zip(shard.index, leaf.shape)] for shard, leaf in zip(own, leaves)]
fetched = 0
for path in cache.root().rglob("img.safetensors.origin"):
    ends = json.loads(path.read_text())["ends"]
    fetched += int(np.diff([0, *ends])[np.fromfile(path.with_suffix(".units"), np.uint8) == 1].sum())
print(json.dumps([bounds, fetched]))
"""


@pytest.mark.slow
def test_each_host_reads_its_shard_of_weights_in_tiles_and_little_else(
    gs: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "TILE", 2**12)
    monkeypatch.setattr(headers, "SHORTEST", 2**8)
    tcs = random_transcoders(replace(TINY, heads=4, head_dim=32), features=512)
    save_transcoders(tcs, "gs://bucket/hosts/tiled")
    leaves, port, started = jax.tree.leaves(tcs.stacks["img"]), free_port(), []
    for number in range(2):
        home = tmp_path / f"reader-{number}"
        home.mkdir()
        own = {"PYTHONPATH": str(ROOT), cache.FOLDER: str(home / "copies"), "JAX_PLATFORMS": "cpu"}
        line = [sys.executable, "-c", SHARE, f"localhost:{port}", str(number)]
        environment = os.environ | own | {"JAX_NUM_CPU_DEVICES": "1"}
        started.append(subprocess.Popen(line, cwd=home, env=environment, stdout=subprocess.PIPE, text=True))
    for number, process in enumerate(started):
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0
        bounds, fetched = json.loads(said.splitlines()[-1])
        shards = list(np.load(tmp_path / f"reader-{number}" / "own.npz").values())
        for leaf, shard, at in zip(leaves, shards, bounds, strict=True):
            assert np.array_equal(np.asarray(leaf)[tuple(slice(*each) for each in at)], shard)
        own_bytes = sum(shard.nbytes for shard in shards)
        assert own_bytes < 0.6 * sum(leaf.nbytes for leaf in leaves) and own_bytes <= fetched <= 1.1 * own_bytes
