"""What a training run loses when it is killed, or told to stop, at random moments: nothing past its last checkpoint.

    python benchmarks/preemption.py --kills 20            SIGKILL and SIGTERM, 20 times each, a table of all
    python benchmarks/preemption.py --kills 2 --steps 60

`bucket_runs.py` beside it does the same in a bucket, on processes that share no disk.

1. Rows of a synthetic function are written to disk, and a run of two virtual devices is made without interruption.
2. A second run of the same settings is started, on two processes of a device each or on one of both, and at a random
   moment one of its processes gets the signal. It is started again with `--resume`, as often as there are kills, on two
   processes and on one in turn, and then to its end.
3. Checked: after SIGKILL every other process ends with status 1 and one sentence; after SIGTERM all with 0; no
   checkpoint that was complete is lost; the weights in the end, and every loss, are those of the first run, bit for
   bit.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from difffract_jax.loading import load_transcoders
from difffract_jax.storage.files import atomic_directory

WIDTH, ROWS = 16, 4096
PATIENT = 7200
"""Seconds after which a run is taken for one that hangs."""
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--kills", type=int, default=20, help="how often each signal is sent")
PARSER.add_argument("--steps", type=int, default=2000, help="steps of the run")
PARSER.add_argument("--checkpoint-every", type=int, default=10, help="steps between checkpoints")
PARSER.add_argument("--longest", type=float, default=3.0, help="seconds after its first step in which it is stopped")
PARSER.add_argument("--seed", type=int, default=0, help="of the moments")


class Stop(NamedTuple):
    """What one signal did.

    Attributes:
        signal: its name.
        processes: how many the run had.
        at: process that got it.
        reached: last step in the log.
        kept: newest checkpoint.
        seconds: until all had ended.
    """

    signal: str
    processes: int
    at: int
    reached: int
    kept: int
    seconds: float


class Place:
    """A directory with rows, compiled programs and runs."""

    def __init__(self, path: Path, steps: int, every: int) -> None:
        self.path, rng = path, np.random.default_rng(0)
        x = rng.standard_normal((ROWS, WIDTH), np.float32)
        with atomic_directory(path / "rows") as partial:
            np.save(partial / "x.npy", x)
            np.save(partial / "y.npy", np.tanh(x[:, ::-1] @ rng.standard_normal((WIDTH, WIDTH), np.float32)))
        sets = (f"rows={path / 'rows'}", f"steps={steps}", f"checkpoint_every={every}", "mesh=data=2", "log_every=1")
        sets += ("expansion=4", "k=4", "batch=64", "buffer_rows=512", "warmup=2", "lr=3e-3", "time_embed=0")
        self.line = ["train", *(part for each in (*sets, "conditioning=none") for part in ("--set", each))]

    def start(self, name: str, processes: int) -> list[subprocess.Popen]:
        """Starts the processes of a run, or goes on with it."""
        out = self.path / name
        line = [*self.line, "--set", f"out={out}", *(["--resume"] if (out / "train.json").exists() else [])]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        places = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // processes)}
        places |= {"JAX_COMPILATION_CACHE_DIR": str(self.path / "programs")}
        places |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        joins = [["--join", f"localhost:{port},{n},{processes}"] if processes > 1 else [] for n in range(processes)]
        return [
            subprocess.Popen(
                [sys.executable, "-m", "difffract_jax", *line, *join],
                env=os.environ | places,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for join in joins
        ]

    def log(self, name: str) -> Path:
        """Returns the path of a run's log."""
        return self.path / name / "metrics.jsonl"

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of a run's log that are whole."""
        path = self.log(name)
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(text) for text in texts if text.endswith("\n")]

    def newest(self, name: str) -> int:
        """Returns the newest complete checkpoint, -1 for none."""
        names = [path.name for path in (self.path / name / "checkpoints").glob("*")]
        return max((int(each) for each in names if each.isdecimal()), default=-1)

    def weights(self, name: str) -> list[np.ndarray]:
        """Returns the arrays that a finished run has made."""
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_transcoders(self.path / name / "transcoders").stacks)]


def finish(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """Waits for processes, and returns their statuses and what they said on stderr; none outlives an error."""
    try:
        said = [process.communicate(timeout=PATIENT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def stop(place: Any, name: str, number: int, processes: int, pause: float, at: int) -> Stop:
    """Goes on with a run, sends one of its processes a signal a while after its first step, and checks how all end."""
    before, log = place.newest(name), place.log(name)
    stamp = log.stat().st_mtime_ns if log.exists() else None
    started = place.start(name, processes)
    # A run that goes on writes the log anew, up to the checkpoint that it has, before its first step adds a line.
    fewest = None
    while all(process.poll() is None for process in started):
        if log.exists() and log.stat().st_mtime_ns != stamp:
            count = len(place.lines(name))
            fewest = count if fewest is None else min(fewest, count)
            if count > fewest:
                break
        time.sleep(0.01)
    time.sleep(pause)
    kept, told = place.newest(name), time.monotonic()
    os.kill(started[at].pid, number)
    ended = finish(started)
    seconds = time.monotonic() - told
    for process, (status, said) in enumerate(ended):
        if number == signal.SIGTERM or all(status == 0 for status, _ in ended):
            assert status == 0, said
        elif process == at:
            assert status == -number, (status, said)
        else:  # one of the others tells it, or each if it was the first that died
            assert status == 1 and said.count("\n") <= 1 and (not said or said.startswith(f"Error: Process {at} on "))
    if number == signal.SIGKILL and any(status for status, _ in ended) and processes > 1:
        assert any(said for _, said in ended), "nobody has told"
    lines, newest = place.lines(name), place.newest(name)
    assert newest >= max(kept, before), "a complete checkpoint is lost"
    reached = lines[-1]["step"] if lines else 0
    return Stop(signal.Signals(number).name, processes, at, reached, newest, seconds)


def measure(arguments: argparse.Namespace, path: Path) -> list[Stop]:
    """Interrupts a run as often as asked, takes it to its end, and holds it to an uninterrupted one."""
    place, rng = Place(path, arguments.steps, arguments.checkpoint_every), np.random.default_rng(arguments.seed)
    assert finish(place.start("whole", 1))[0][0] == 0
    stops = []
    for turn in range(2 * arguments.kills):
        number, processes = (signal.SIGKILL, signal.SIGTERM)[turn % 2], 2 - turn // 2 % 2
        at, pause = int(rng.integers(processes)), float(rng.uniform(0, arguments.longest))
        stops.append(stop(place, "stopped", number, processes, pause, at))
        print(row(stops[-1]), flush=True)
    assert all(status == 0 for status, _ in finish(place.start("stopped", 2)))
    assert all(map(np.array_equal, place.weights("stopped"), place.weights("whole"))), "other weights"
    losses = [[line["loss"] for line in place.lines(name)] for name in ("stopped", "whole")]
    assert losses[0] == losses[1], "other losses"
    return stops


def row(one: Stop) -> str:
    """Returns a line of the table."""
    lost = one.reached - max(one.kept, 0)
    return f"| {one.signal} | {one.processes} | {one.at} | {one.reached} | {one.kept} | {lost} | {one.seconds:.1f} |"


def main() -> None:
    """Prints the table."""
    arguments = PARSER.parse_args()
    print("| signal | processes | to | last step | newest checkpoint | steps lost | seconds until all had ended |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as path:
        stops = measure(arguments, Path(path))
    lost = max(one.reached - max(one.kept, 0) for one in stops)
    print(
        f"\n{len(stops)} times stopped: weights and losses are those of the uninterrupted run; most steps lost {lost}."
    )


if __name__ == "__main__":
    main()
