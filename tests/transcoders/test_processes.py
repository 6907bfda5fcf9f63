"""Training as real processes: killed at any moment, spread over several, resumed on fewer devices, on a full disk."""

import json
import os
import shutil
import signal
import socket
import time

import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, start

from difffract_jax.loading import load_transcoders
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import Rows
from difffract_jax.transcoders.sites import Sites
from difffract_jax.transcoders.store import write_store
from tolerances import TOL, relative_error

WIDTH, STEPS = 8, 24
SETS = ("model=m", "prompts=p", "expansion=4", "k=4", "time_embed=4", "batch=32", "buffer_rows=256", "warmup=2")
SETS += (f"steps={STEPS}", "lr=3e-3", "log_every=1", "keep=3")


class Synthetic:
    """Rows y = tanh(A x) of an img and a txt site, by chunk number."""

    sites, width = Sites((0,), (4,), ()), WIDTH

    def chunk(self, number):
        rng = np.random.default_rng(number)
        rows, valid = {}, {}
        for name in self.sites.groups:
            x = rng.standard_normal((1, 64, WIDTH), np.float32)
            y = np.tanh(x[:, :, ::-1]) + np.float32(0.1)
            rows[name] = Rows(*map(jnp.asarray, (x, y, rng.choice(np.float32([1, 0.5]), 64))))
            valid[name] = np.ones(64, bool)
        return Chunk(rows, valid)


class Place:
    """A directory with harvested rows, a cache of compiled programs, and runs."""

    def __init__(self, path):
        self.path, self.cache = path, path / "cache"
        write_store({"train": Synthetic()}, {"train": 8}, path / "rows", {})

    def train(self, name, *more, log=None, every=1, **how):
        """Starts a run, or goes on with it where it has begun."""
        out = self.path / name
        resume = ("--resume",) if (out / "train.json").exists() else ()
        sets = (*SETS, f"rows={self.path / 'rows'}", f"out={out}", f"checkpoint_every={every}")
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
        return [np.asarray(leaf) for leaf in _leaves(tcs)]

    def checkpoints(self, name):
        """Returns the numbers of a run's complete checkpoints, and whether one is being written."""
        names = [path.name for path in (self.path / name / "checkpoints").glob("*")]
        numbers = sorted(int(each) for each in names if each.isdecimal())
        return numbers, any("tmp" in each for each in names)


def _leaves(tcs):
    import jax

    return jax.tree.leaves((tcs.img, tcs.txt))


def same(a, b):
    return all(map(np.array_equal, a, b))


def close(a, b):
    return max(relative_error(*pair) for pair in zip(a, b, strict=True) if np.any(pair[1])) <= TOL.sharded


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def whole(place):
    """The weights of an uninterrupted run on one device."""
    return place.trained("whole")


def kill(place, name, rng, writing):
    """Kills a run at a random moment after its next step or, if asked, while it writes a checkpoint.

    Returns:
        Its newest complete checkpoint just before, -1 for none.
    """
    process, metrics = place.train(name, adds=False), place.path / name / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else b""
    while process.is_alive() and (not metrics.exists() or metrics.read_bytes() in (b"", before)):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    while process.is_alive() and writing and not place.checkpoints(name)[1]:
        time.sleep(0.0005)
    kept = max(place.checkpoints(name)[0], default=-1)
    os.kill(process.pid, signal.SIGKILL)
    status, said = finish(process, place.path / name)
    assert status == -signal.SIGKILL, (status, said)
    assert "Note: checkpoint" not in said, said
    return kept


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_loses_nothing_past_its_last_checkpoint(place, whole, kills):
    name, rng = f"killed-{kills}", np.random.default_rng(kills)
    for number in range(kills):
        kept = kill(place, name, rng, writing=number % 2 == 0)
        assert max(place.checkpoints(name)[0], default=-1) >= kept
    weights = place.trained(name)
    assert "Note: checkpoint" not in (place.path / f"{name}.err").read_text(), "every checkpoint could be read"
    assert same(weights, whole)
    lines = (place.path / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not place.checkpoints(name)[1], "what the kills left half-written is gone"
