"""Training as real processes: killed at any moment, spread over several, resumed on fewer devices, on a full disk."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, start

from difffract_jax.loading import load_transcoders
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.store import write_store
from tolerances import TOL, relative_error

WIDTH = 8
SETS = ("model=m", "prompts=p", "expansion=4", "k=4", "time_embed=4", "batch=32", "buffer_rows=256", "warmup=2")
SETS += ("lr=3e-3", "log_every=1", "keep=3")
STEPS = 16


class Synthetic:
    """Rows y = tanh(A x) of an img and a txt site, by chunk number."""

    sites, width = sites_of({"img": (0,), "txt": (4,)}), WIDTH

    def chunk(self, number):
        rng = np.random.default_rng(number)
        rows, valid = {}, {}
        for name in self.sites.groups:
            x = rng.standard_normal((1, 64, WIDTH), np.float32)
            y = np.tanh(x[:, :, ::-1]) + np.float32(0.1)
            rows[name] = ActivationRows(*map(jnp.asarray, (x, y, rng.choice(np.float32([1, 0.5]), 64))))
            valid[name] = np.ones(64, bool)
        return Chunk(rows, valid)


class Place:
    """A directory with harvested rows, a cache of compiled programs, and runs."""

    def __init__(self, path):
        self.path, self.cache = path, path / "cache"
        write_store({"train": Synthetic()}, {"train": 8}, path / "rows", {})

    def train(self, name, *more, log=None, steps=STEPS, every=1, mesh="data=1", **how):
        """Starts a run, or goes on with it where it has begun."""
        out = self.path / name
        resume = ("--resume",) if (out / "train.json").exists() else ()
        sets = (*SETS, f"rows={self.path / 'rows'}", f"out={out}")
        sets += (f"steps={steps}", f"mesh={mesh}", f"checkpoint_every={every}")
        arguments = ("train", *(a for each in sets for a in ("--set", each)), *resume, *more)
        return start(arguments, self.path / (log or name), cache=self.cache, **how)

    def trained(self, name, *more, **how):
        """Trains to the end, and returns the weights."""
        process = self.train(name, *more, **how)
        status, said = finish(process, self.path / name)
        assert status == 0, said
        return self.weights(name)

    def weights(self, name):
        tcs = load_transcoders(self.path / name / "transcoders")
        return [np.asarray(leaf) for leaf in jax.tree.leaves(tcs.stacks)]

    def checkpoints(self, name):
        """Returns the numbers of a run's complete checkpoints, and whether one is being written."""
        names = [path.name for path in (self.path / name / "checkpoints").glob("*")]
        numbers = sorted(int(each) for each in names if each.isdecimal())
        return numbers, any("tmp" in each for each in names)

    def joined(self, name, *more, processes=2, devices=1, differing=None, **how):
        """Starts a run of several processes, and returns them.

        Args:
            name: of the run.
            more: options.
            processes: how many.
            devices: of each.
            differing: by number of the process, what it is given besides.
            how: as for `train`.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [
            self.train(
                name,
                *more,
                *(differing or {}).get(n, ()),
                *("--join", f"localhost:{port},{n},{processes}"),
                log=f"{name}-{n}",
                devices=devices,
                **how,
            )
            for n in range(processes)
        ]

    def ended(self, name, processes):
        """Waits for processes, and returns their exit statuses and what each said on stderr."""
        return [finish(process, self.path / f"{name}-{n}") for n, process in enumerate(processes)]

    def wait_for(self, name, step, processes):
        """Waits until a run has a checkpoint of a step or a later one."""
        while max(self.checkpoints(name)[0], default=-1) < step:
            assert all(process.is_alive() for process in processes), self.ended(name, processes)
            time.sleep(0.01)


def same(a, b):
    return all(map(np.array_equal, a, b))


def close(a, b):
    return max(relative_error(*pair) for pair in zip(a, b, strict=True) if np.any(pair[1])) <= TOL.sharded


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def eight(place):
    """The weights of an uninterrupted run on eight devices of one process."""
    return place.trained("eight", every=STEPS // 2, mesh="data=4,feature=2", devices=8)


@pytest.mark.slow
def test_two_processes_harvest_and_measure_what_one_does(place):
    root = Path(__file__).parents[2]
    small = (
        "tokens_per_step=8",
        "steps_per_image=2",
        "height=16",
        "width=24",
        f"prompts={root / 'configs/prompts.txt'}",
    )
    small += ("model=tiny", "sites=[img/0,txt/1]", "prompts_at_once=2", "validation_share=0.2")
    given = [part for each in small for part in ("--set", each)]

    def run(name, processes, *arguments, more=()):
        sets = [part for each in more for part in ("--set", each)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        joins = [("--join", f"localhost:{port},{n},{processes}") if processes > 1 else () for n in range(processes)]
        logs = [place.path / f"{name}-{processes}-{n}" for n in range(processes)]
        started = [
            start((*arguments, *sets, *join), log, cache=place.cache) for join, log in zip(joins, logs, strict=True)
        ]
        for process, log in zip(started, logs, strict=True):
            status, said = finish(process, log)
            assert status == 0, said

    for processes in (1, 2):
        more = (f"out={place.path / f'rows-{processes}'}", "train_prompts=6", "validation_prompts=3")
        run("harvest", processes, "harvest", *given, more=more)
    files = [{p.name: p.read_bytes() for p in (place.path / f"rows-{n}").glob("*.safetensors")} for n in (1, 2)]
    assert files[0] == files[1] and len(files[0]) == 5
    settings = (
        "steps=4",
        "batch=32",
        "buffer_rows=128",
        "time_embed=8",
        "warmup=2",
        "k=4",
        "expansion=2",
        f"out={place.path / 'tiny'}",
    )
    run("train", 1, "train", *given, more=settings)
    reports = []
    for processes in (1, 2):
        few = ("--prompts-count", 5, "--velocity-count", 3, "--images", 1, "--out", place.path / f"report-{processes}")
        run("evaluate", processes, "evaluate", place.path / "tiny", *few)
        reports.append(json.loads((place.path / f"report-{processes}" / "evaluation.json").read_text())["results"])
    assert reports[0] == reports[1]


def kill(place, name, more, pause, writing, **how):
    """Goes on with a run and kills it after some steps and a pause or, if asked, while it then writes a checkpoint.

    Returns:
        Its newest complete checkpoint just before, -1 for none.
    """
    metrics, begun = place.path / name / "metrics.jsonl", max(place.checkpoints(name)[0], default=0)
    old = metrics.stat().st_ino if metrics.exists() else None  # a run that goes on writes the file anew, without excess
    process = place.train(name, adds=False, **how)
    while process.is_alive() and not (
        metrics.exists() and metrics.stat().st_ino != old and metrics.read_bytes().count(b"\n") >= begun + more
    ):
        time.sleep(0.002)
    time.sleep(pause)
    while process.is_alive() and writing and not place.checkpoints(name)[1]:
        time.sleep(0.0005)
    kept = max(place.checkpoints(name)[0], default=-1)
    os.kill(process.pid, signal.SIGKILL)
    status, said = finish(process, place.path / name)
    assert status == -signal.SIGKILL, (status, said)
    assert "Note: checkpoint" not in said, said
    return kept


@pytest.mark.slow
def test_killed_at_random_moments_a_run_loses_nothing_past_its_last_checkpoint(place):
    kills, steps, name = 4, 32, "killed"
    whole = place.trained("whole", steps=steps, every=steps)
    rng, kept = np.random.default_rng(kills), []
    for number in range(kills):
        moment = int(rng.integers(2, 5)), rng.uniform(0, 0.08)
        kept.append(kill(place, name, *moment, writing=number % 2 == 0, steps=steps))
        assert max(place.checkpoints(name)[0], default=-1) >= kept[-1]
    assert kept[-1] > 0 and kept == sorted(kept), "every run went on from the one before"
    assert same(place.trained(name, steps=steps), whole)
    said = (place.path / f"{name}.err").read_text()
    assert "Note: checkpoint" not in said, "every checkpoint could be read"
    lines = (place.path / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert not place.checkpoints(name)[1], "what the kills left half-written is gone"


def test_two_processes_train_as_one(place, eight):
    ended = place.ended("two", place.joined("two", every=8, mesh="data=4,feature=2", devices=4))
    assert [status for status, _ in ended] == [0, 0], ended
    tables = ["rows_per_second" in (place.path / f"two-{n}.out").read_text() for n in range(2)]  # Gloo prints there too
    assert tables == [True, False], "the first process speaks for all"
    assert close(place.weights("two"), eight)
    lines = (place.path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


SOME = 60
"""Steps of a run that is to go on still when it is killed."""


@pytest.mark.parametrize(("dying", "goes_on"), [(1, False), pytest.param(0, True, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_other_in_one_sentence_and_one_process_goes_on_alone(place, dying, goes_on):
    name = f"dying-{dying}"
    processes = place.joined(name, every=4, steps=SOME, mesh="data=2", adds=False)
    place.wait_for(name, 4, processes)
    os.kill(processes[dying].pid, signal.SIGKILL)
    ended = place.ended(name, processes)
    assert ended[dying][0] == -signal.SIGKILL
    status, said = ended[1 - dying]
    kept = max(place.checkpoints(name)[0])
    assert status == 1 and said.count("\n") == 1, said
    assert said.startswith(f"Error: Process {dying} on {socket.gethostname()} has died, which ends all 2 processes; ")
    assert f"checkpoint {kept} is intact" in said and said.strip().endswith(" --resume"), said
    if goes_on:
        whole = place.trained(f"whole-{name}", every=SOME, steps=SOME, mesh="data=2", devices=2)
        assert same(place.trained(name, every=SOME, steps=SOME, mesh="data=2", devices=2), whole)


def test_what_differs_between_processes_is_named_by_the_first_alone(place):
    differing = {1: ("--set", "lr=0.5", "--set", "log_every=3")}
    ended = place.ended("differing", place.joined("differing", mesh="data=2", differing=differing))
    assert [status for status, _ in ended] == [1, 1]
    assert ended[1][1] == "" and ended[0][1] == (
        "Error: The processes have different settings or versions: lr is 0.003 in process 0, 0.5 in process 1; "
        "log_every is 1 in process 0, 3 in process 1; start all of them with the same.\n"
    )
    assert not (place.path / "differing").exists()


def test_a_checkpoint_of_eight_devices_resumes_on_one(place, eight):
    name = "on-one"
    shutil.copytree(place.path / "eight", place.path / name)
    for later in ("transcoders", f"checkpoints/{STEPS}"):
        shutil.rmtree(place.path / name / later)
    assert place.checkpoints(name)[0] == [STEPS // 2]
    assert close(place.trained(name, every=STEPS, mesh="data=1", devices=1), eight)
    said = json.loads((place.path / name / "metrics.jsonl").read_text().splitlines()[STEPS // 2])
    first = json.loads((place.path / "eight" / "metrics.jsonl").read_text().splitlines()[STEPS // 2])
    assert said["time"] > first["time"], "these steps were done again"


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(place, eight):
    name = "full"
    shutil.copytree(place.path / "eight", place.path / name)
    for later in ("transcoders", f"checkpoints/{STEPS}"):
        shutil.rmtree(place.path / name / later)
    process = place.train(name, every=STEPS // 4, adds=False, most_bytes=12_000)
    status, said = finish(process, place.path / name)
    sentence = f"Error: {place.path / name} cannot be written (File too large); checkpoint {STEPS // 2} is intact"
    assert status == 1 and said.strip().startswith(sentence) and "\n" not in said.strip()
    assert place.checkpoints(name)[0] == [STEPS // 2]
    assert close(place.trained(name, every=STEPS), eight)
