"""Training on processes that share no disk but a bucket: what it makes, and what it loses when it is stopped.

    python benchmarks/bucket_runs.py rows                        harvest on four processes, and on one
    python benchmarks/bucket_runs.py model                       train from the organism on four processes, and on one
    python benchmarks/bucket_runs.py stops --kills 20            SIGKILL and SIGTERM, 20 times each
    python benchmarks/bucket_runs.py faults --faults 1000        answers that fail, are slow, cut off or wrong
    python benchmarks/bucket_runs.py bytes                       what a host reads, against the bytes of its shard

The bucket is fake-gcs-server's behind the tests' proxy, on this machine. Every process has a working directory and a
cache of its own; compiled programs of one device alone are shared, and those of several are compiled by each.

1. `rows`: `difffract harvest` of the organism's rows into the bucket; every shard is compared with one process's.
2. `model`: the recipe of configs/train-organism.yaml, shortened, four devices in four processes, into the bucket;
   losses and weights are compared with those of one process of four devices, bit for bit.
3. `stops`: rows of a synthetic function in the bucket; a run is stopped at random moments and gone on with on four
   processes, two and one in turn, then taken to its end; checked as in `preemption.py`.
4. `faults`: the same run, on as many processes as `--hosts` says first, while a quarter of the bucket's answers go
   wrong; its result is unchanged.
5. `bytes`: see `bucket_bytes.py`.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

import bucket_bytes
from preemption import ROWS, WIDTH, finish, row, stop

from bucket_servers import Proxy, google_server
from difffract_jax.loading import load_transcoders
from difffract_jax.storage.files import atomic_directory
from difffract_jax.storage.remote import cache, steps
from difffract_jax.storage.remote.addresses import parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.outputs import kept_for

ROOT = Path(__file__).parents[1]
BUCKET = "gs://bucket"
HOSTS = 4
MESH = "mesh=data=2,feature=2"
"""No sum has more than two parts, which can be added in one order alone: so results can be compared bit for bit."""
SHARE = 0.25
"""Share of the answers that go wrong: eight in a row, which a run does not survive, come once in 65,000 requests."""
KINDS: tuple[int | str, ...] = (503, 502, 500, "slow", "drop", "cut", "flip")
"""What goes wrong; 429 is left out, since each would only add the seconds that the proxy asks for."""
SMALL = ("expansion=4", "k=4", "batch=64", "buffer_rows=512", "warmup=2", "lr=3e-3", "time_embed=0")
MODEL = ("model=organism", 'sites=["img/0","txt/1"]', "steps_per_image=2", "prompts_at_once=8", "tokens_per_step=64")
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("what", choices=("rows", "model", "stops", "faults", "bytes"))
PARSER.add_argument("--kills", type=int, default=20, help="how often each signal is sent")
PARSER.add_argument("--faults", type=int, default=1000, help="answers that go wrong")
PARSER.add_argument("--steps", type=int, default=2000, help="steps of a run")
PARSER.add_argument("--checkpoint-every", type=int, default=20, help="steps between checkpoints")
PARSER.add_argument("--longest", type=float, default=3.0, help="seconds after its first step in which it is stopped")
PARSER.add_argument("--hosts", type=int, nargs="+", default=[4, 2, 1], help="processes of the starts, in turn")
PARSER.add_argument("--processes", action="store_true", help="of `bytes`: a process for each host")
PARSER.add_argument("--seed", type=int, default=0, help="of the moments and the faults")


class Place:
    """Hosts without a common disk, a bucket, and runs in it."""

    def __init__(self, path: Path, settings: tuple[str, ...]) -> None:
        self.path, self.settings = path, settings
        os.environ[cache.FOLDER] = str(path / "reader")

    def start(self, name: str, processes: int, *, command: str = "train", out: str = "") -> list[subprocess.Popen]:
        """Starts the processes of a run in the bucket, or goes on with it; `out` is a place on this machine."""
        remote = f"{BUCKET}/{name}"
        begun = command == "train" and not out and open_bucket(at := parse_address(remote)).stat(f"{at.key}/train.json")
        sets = (*self.settings, f"out={out or remote}")
        line = [command, *(part for each in sets for part in ("--set", each)), *(["--resume"] if begun else [])]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        started = []
        for number in range(processes):
            home = self.path / f"host-{number}"
            home.mkdir(exist_ok=True)
            join = ["--join", f"localhost:{port},{number},{processes}"] if processes > 1 else []
            own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(HOSTS // processes)}
            own |= {"JAX_COMPILATION_CACHE_DIR": str(self.path / "programs"), cache.FOLDER: str(home / "copies")}
            own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "difffract_jax", *line, *join],
                    cwd=home,
                    env=os.environ | own,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    def log(self, name: str) -> Path:
        """Returns the path of the log that the first host writes."""
        return (
            self.path / "host-0" / "copies" / kept_for(f"{BUCKET}/{name}").relative_to(cache.root()) / "metrics.jsonl"
        )

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of this log that are whole."""
        path = self.log(name)
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(text) for text in texts if text.endswith("\n")]

    def newest(self, name: str) -> int:
        """Returns the newest complete checkpoint, -1 for none."""
        return max(steps.complete(parse_address(f"{BUCKET}/{name}/checkpoints")), default=-1)

    def losses(self, where: str | Path) -> list[float]:
        """Returns the losses that a run logged, by the log that lies with it."""
        at = None if isinstance(where, Path) else parse_address(f"{where}/metrics.jsonl")
        raw = (where / "metrics.jsonl").read_bytes() if isinstance(where, Path) else open_bucket(at).read(at.key)
        return [json.loads(line)["loss"] for line in raw.splitlines()]


def weights(run: str | Path) -> list[np.ndarray]:
    """Returns the arrays that a finished run has made."""
    there = f"{run}/transcoders" if isinstance(run, str) else run / "transcoders"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_transcoders(there).stacks)]


def ended(processes: list[subprocess.Popen]) -> None:
    """Waits for processes that are to end well."""
    for status, said in finish(processes):
        assert status == 0, said


def compare(place: Place, run: str, whole: Path) -> None:
    """Holds a run in the bucket to one on this machine, bit for bit."""
    assert all(map(np.array_equal, weights(run), weights(whole))), "other weights"
    assert place.losses(run) == place.losses(whole), "other losses"
    print(f"{run}: weights, and {len(place.losses(run))} losses, are those of one process.")


def synthetic(path: Path, arguments: argparse.Namespace) -> Place:
    """Puts rows into the bucket, and makes the uninterrupted run of them on this machine."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, WIDTH), np.float32)
    y = np.tanh(x[:, ::-1] @ rng.standard_normal((WIDTH, WIDTH), np.float32))
    with atomic_directory(f"{BUCKET}/arrays") as partial:
        np.save(partial / "x.npy", x)
        np.save(partial / "y.npy", y)
    sets = (f"rows={BUCKET}/arrays", f"steps={arguments.steps}", f"checkpoint_every={arguments.checkpoint_every}")
    place = Place(path, (*sets, MESH, "log_every=1", "conditioning=none", *SMALL))
    ended(place.start("whole", 1, out=str(path / "whole")))
    return place


def rows(path: Path) -> None:
    """Compares rows that four processes harvest into the bucket with those of one."""
    place = Place(path, (*MODEL, "train_prompts=64", "validation_prompts=16"))
    ended(place.start("rows", HOSTS, command="harvest"))
    ended(place.start("rows", 1, command="harvest", out=str(path / "rows")))
    there = cache.local_directory(f"{BUCKET}/rows")
    shards = sorted(each.name for each in (path / "rows").glob("*.safetensors"))
    assert shards and all((path / "rows" / each).read_bytes() == (there / each).read_bytes() for each in shards)
    print(f"{len(shards)} shards of rows are those of one process, byte for byte.")


def model(path: Path, arguments: argparse.Namespace) -> None:
    """Compares a training from the organism on four processes with one on one."""
    sizes = (f"steps={arguments.steps}", "buffer_rows=4096", "batch=256", "expansion=4", "k=8", "warmup=5")
    every = (f"checkpoint_every={arguments.checkpoint_every}", "log_every=1", MESH)
    place = Place(path, (*MODEL, *sizes, *every))
    ended(place.start("whole", 1, out=str(path / "whole")))
    ended(place.start("model", HOSTS))
    compare(place, f"{BUCKET}/model", path / "whole")


def stops(path: Path, arguments: argparse.Namespace) -> None:
    """Stops a run as often as asked, and compares what it makes in the end with the uninterrupted one."""
    place, rng = synthetic(path, arguments), np.random.default_rng(arguments.seed)
    print("| signal | processes | to | last step | newest checkpoint | steps lost | seconds until all had ended |")
    print("|---|---|---|---|---|---|---|")
    lost = 0
    for turn in range(2 * arguments.kills):
        number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
        processes = arguments.hosts[turn // 2 % len(arguments.hosts)]
        at, pause = int(rng.integers(processes)), float(rng.uniform(0, arguments.longest))
        one = stop(place, "stopped", number, processes, pause, at)
        print(row(one), flush=True)
        lost = max(lost, one.reached - max(one.kept, 0))
    ended(place.start("stopped", arguments.hosts[-1]))
    compare(place, f"{BUCKET}/stopped", path / "whole")
    print(f"{2 * arguments.kills} times stopped; most steps lost {lost}.")


def faults(path: Path, arguments: argparse.Namespace, proxy: Proxy) -> None:
    """Trains while answers go wrong, again until so many have, and compares."""
    place, chance, made = synthetic(path, arguments), random.Random(arguments.seed), Counter[str]()

    def fault(method: str, path: str) -> int | str | None:
        if made.total() >= arguments.faults or chance.random() > SHARE:
            return None
        kind = chance.choice(KINDS)
        made[str(kind)] += 1
        return kind

    proxy.fault = fault
    runs = 0
    while made.total() < arguments.faults:
        runs += 1
        ended(place.start(f"faults-{runs}", arguments.hosts[0]))
        compare(place, f"{BUCKET}/faults-{runs}", path / "whole")
        print(f"{made.total()} faults so far: {dict(made)}", flush=True)
    proxy.fault = lambda method, path: None


def main() -> None:
    """Runs what is asked for."""
    arguments = PARSER.parse_args()
    with tempfile.TemporaryDirectory() as name, google_server() as proxy:
        os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
        path = Path(name)
        match arguments.what:
            case "rows":
                rows(path)
            case "model":
                model(path, arguments)
            case "stops":
                stops(path, arguments)
            case "bytes":
                bucket_bytes.measure(path, processes=arguments.processes)
            case _:
                faults(path, arguments, proxy)


if __name__ == "__main__":
    main()
