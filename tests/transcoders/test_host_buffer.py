"""The shuffle buffer in memory or on disk: the rows, the run and the checkpoints of one that lies on the device."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError, provenance
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import host_buffer
from difffract_jax.transcoders.checkpoints import CHECKPOINTS, fingerprints
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.training import Watch, train

WIDTH = 8


class Synthetic:
    """Rows y = tanh(A x) of two img sites and one txt site, by chunk number."""

    sites, width = sites_of({"img": (0, 1), "txt": (4,)}), WIDTH

    def chunk(self, number):
        rng = np.random.default_rng(number)
        rows, valid = {}, {}
        for name, layers in self.sites.groups.items():
            x = rng.standard_normal((len(layers), 64, WIDTH), np.float32)
            t = rng.choice(np.float32([1, 0.5]), 64)
            rows[name] = ActivationRows(*map(jnp.asarray, (x, np.tanh(x[:, :, ::-1]) + np.float32(0.1), t)))
            valid[name] = np.ones(64, bool) if name == "img" else rng.random(64) < 0.5
        return Chunk(rows, valid)


class Stopped(Exception):
    pass


def run(out, stop_at=None, resume=False, **more):
    given = {"model": "m", "prompts": "p", "out": out, "expansion": 4, "k": 4, "time_embed": 4, "batch": 32}
    given |= {"steps": 12, "buffer_rows": 256, "checkpoint_every": 4, "log_every": 2, "lr": 3e-3, "model_dtype": "bf16"}

    def progress(done, total, values):
        if done == stop_at:
            raise Stopped

    config = TrainConfig(**(given | more))
    done = train(config, Synthetic(), provenance("train", config), Watch(progress, print), resume=resume)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(done.transcoders.stacks)]


def same(a, b):
    return all(map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run with its buffer on the device."""
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("where", [pytest.param("host", marks=pytest.mark.slow), "disk"])
def test_a_run_and_its_resumption_are_those_with_a_buffer_on_the_device_bit_for_bit(whole, tmp_path, where):
    assert same(run(tmp_path / "run", buffer=where), whole)
    assert not (tmp_path / "run" / host_buffer.FILE).exists(), "what is left of the buffer is in the checkpoints"
    with pytest.raises(Stopped):
        run(tmp_path / "cut", buffer=where, stop_at=10)
    assert (tmp_path / "cut" / CHECKPOINTS / "8").is_dir()
    assert same(run(tmp_path / "cut", buffer=where, resume=True), whole)


@pytest.mark.parametrize(
    ("first", "then"), [("device", "host"), pytest.param("disk", "device", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_its_buffer_elsewhere(whole, tmp_path, first, then):
    with pytest.raises(Stopped):
        run(tmp_path / "run", buffer=first, stop_at=6)
    assert same(run(tmp_path / "run", buffer=then, resume=True), whole)


def test_fingerprints_do_not_depend_on_where_an_array_lies(monkeypatch):
    monkeypatch.setattr("difffract_jax.transcoders.checkpoints.WORDS", 10)
    rng = np.random.default_rng(0)
    arrays = {"f32": rng.standard_normal((3, 7, 5), np.float32), "int": rng.integers(-9, 9, 33, np.int32)}
    arrays["bf16"] = np.asarray(jnp.asarray(arrays["f32"], jnp.bfloat16))
    assert fingerprints(arrays) == fingerprints({name: jnp.asarray(array) for name, array in arrays.items()})


def test_a_disk_without_room_says_so_before_the_first_row_is_read(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(Synthetic, "chunk", read)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); there is no checkpoint yet"):
        run(tmp_path / "run", buffer="disk")
    assert not (tmp_path / "run" / host_buffer.FILE).exists()


def test_batches_are_prepared_one_ahead_but_not_beyond_the_round():
    made = []
    ahead = host_buffer.Ahead(lambda number: made.append(number) or number)
    assert [ahead.take(number, 3) for number in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert ahead.take(7, 9) == 7  # elsewhere than announced
    ahead.close()
    assert made == [0, 1, 2, 3, 7, 8]


def test_rows_go_to_a_mesh_as_those_of_a_device_buffer_do():
    mesh = make_mesh({"data": 2, "site": 1, "feature": 4})
    places: dict = {"img": np.array([3, 1, 2, 8]), "txt": np.array([0, 5, 4, 4])}
    stores = []
    for store in (
        buffers.empty_store(Synthetic.sites, WIDTH, 64, jnp.bfloat16, mesh),
        host_buffer.empty(buffers.abstract_store(Synthetic.sites, WIDTH, 64, jnp.bfloat16, mesh)),
    ):
        plan = buffers.plan_buffer(64, 4, 0.5, seed=0)
        filled, _ = buffers.fill_store(store, Synthetic(), plan)
        stores.append(buffers.gather(filled, places))
    for ours, expected in zip(*stores, strict=True):
        assert ours.dtype == expected.dtype and np.array_equal(ours, expected)
