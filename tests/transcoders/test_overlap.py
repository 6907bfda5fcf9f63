"""Rows made while steps run: what is served, saved and learned is what a run serves that does one after the other."""

import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError, provenance, resolve
from difffract_jax.memory import Memory
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import overlap
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.overlap import Upcoming, last_served, refresh_served, upcoming
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import open_mesh, set_up
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.training import Watch, train

WIDTH = 8


class Rows:
    """Rows of two groups, by chunk number; of the text's fewer count, and another number of them every time."""

    sites, width = sites_of({"img": (0, 1), "txt": (4,)}), WIDTH

    def __init__(self, ends: int = 10**9) -> None:
        self.ends, self.made, self.threads = ends, [], set()

    def chunk(self, number: int) -> Chunk:
        if number >= self.ends:
            raise UserError("The rows end here.")
        self.made.append(number)
        self.threads.add(threading.current_thread().name.partition("_")[0])
        rng, rows, valid = np.random.default_rng(number), {}, {}
        for name, count in (("img", 24), ("txt", 9 + number % 3)):
            x = rng.standard_normal((len(self.sites.groups[name]), 24, WIDTH), np.float32)
            t = rng.choice(np.float32([1, 0.5]), 24)
            rows[name] = ActivationRows(*map(jnp.asarray, (x, np.tanh(x[:, :, ::-1]), t)))
            valid[name] = rng.permutation(24) < count
        return Chunk(rows, valid)


def settings(out: Path, **more: object) -> TrainConfig:
    given = {"model": "m", "prompts": "p", "out": out, "expansion": 4, "k": 4, "time_embed": 4, "batch": 16}
    given |= {"steps": 24, "buffer_rows": 128, "checkpoint_every": 5, "log_every": 1, "warmup": 2, "refresh": 0.5}
    return TrainConfig(**(given | more))


def run(config: TrainConfig, source: Rows, *, resume: bool = False, at: dict | None = None) -> list[np.ndarray]:
    """Trains, and returns the weights; `at` has what happens at a step."""

    def progress(done: int, total: int, values: object) -> None:
        if at and done in at:
            raise at[done]

    done = train(config, source, provenance("train", config), Watch(progress, [].append), resume=resume)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(done.transcoders.stacks)]


def log(out: Path) -> list[str]:
    return [line.partition('"sites"')[2] for line in (out / "metrics.jsonl").read_text().splitlines()]


class Whole(NamedTuple):
    """What a run makes that does one after the other."""

    weights: list[np.ndarray]
    log: list[str]
    made: list[int]


def whole_run(out: Path, **more: object) -> Whole:
    source = Rows()
    weights = run(settings(out, overlap="off", **more), source)
    assert "rows" not in source.threads
    return Whole(weights, log(out), source.made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


def check_overlapped(out: Path, expected: Whole, **more: object) -> None:
    source = Rows()
    weights = run(settings(out, overlap="on", **more), source)
    assert all(map(np.array_equal, weights, expected.weights)) and log(out) == expected.log
    assert source.made[: len(expected.made)] == expected.made and "rows" in source.threads


def test_weights_and_losses_are_those_of_one_after_the_other(whole: Whole, tmp_path: Path) -> None:
    check_overlapped(tmp_path / "on", whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"refresh": 1.0}, {"refresh": 0.75, "buffer": "host"}, {"buffer": "disk"}], ids=str)
def test_they_are_so_wherever_the_buffer_lies_and_whatever_is_served(tmp_path: Path, more: dict) -> None:
    expected = whole_run(tmp_path / "off", model_dtype="bf16", **more)
    check_overlapped(tmp_path / "on", expected, model_dtype="bf16", **more)


@pytest.mark.parametrize("then", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_within_a_round_with_overlap_or_without(whole: Whole, tmp_path: Path, then: str) -> None:
    with pytest.raises(InterruptedError):
        run(settings(tmp_path / "run", overlap="on"), Rows(), at={13: InterruptedError()})
    weights = run(settings(tmp_path / "run", overlap=then), Rows(), resume=True)
    assert all(map(np.array_equal, whole.weights, weights)) and log(tmp_path / "run") == whole.log


def filled(plan: buffers.BufferSizes) -> tuple:
    source = Rows()
    empty = buffers.empty_store(source.sites, source.width, plan.capacity, jnp.float32, make_mesh({}))
    return buffers.fill_store(empty, source, plan)


@pytest.mark.parametrize("refresh", [0.5, 1.0])
def test_no_place_is_written_that_the_round_serves_again(refresh: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = buffers.plan_buffer(128, 16, refresh, seed=0)
    store, position = filled(plan)
    orders = buffers.serving_orders(buffers.groups_of(store), plan, position)
    assert any(np.unique(order).size < order.size for order in orders.values()), "some are served twice"
    source, early = Upcoming(Rows()), 0
    try:
        for served in range(1, plan.round_batches + 1):
            source.wait(position.chunk)  # so that it is there when it is looked for
            before = {name: np.asarray(rows.x) for name, rows in store.items()}
            store, position = refresh_served(store, source, plan, position._replace(served=served))
            early += served < plan.round_batches and any(
                (before[name] != np.asarray(store[name].x)).any() for name in before
            )
            for name, order in orders.items():
                again = np.unique(order[served * plan.batch :])
                np.testing.assert_array_equal(before[name][:, again], np.asarray(store[name].x)[:, again])
            now = buffers.serving_orders(buffers.groups_of(store), plan, position)
            assert all(np.array_equal(now[name], orders[name]) for name in orders), "the round stays what it was"
        store, position = buffers.refresh(store, source, plan, position)
    finally:
        source.close()
    other, at = buffers.refresh(*filled(plan)[:1], Rows(), plan, filled(plan)[1])
    assert at == position and early
    assert all(map(np.array_equal, jax.tree.leaves(store), jax.tree.leaves(other)))


def test_a_place_is_served_last_where_its_order_says() -> None:
    plan = buffers.BufferSizes(8, 4, 2, 0)
    orders = buffers.serving_orders(("img",), plan, buffers.Position(0, 0, 0, (3,)))["img"]
    places, last = last_served(("img",), plan, 0, (3,))["img"]
    assert orders.size == 8 and sorted(places.tolist()) == [0, 1, 2]
    assert places.tolist() == list(dict.fromkeys(orders.tolist()))
    assert last.tolist() == [np.flatnonzero(orders == place)[-1] for place in places]


def test_what_goes_wrong_in_the_making_is_told_when_it_is_needed(whole: Whole, tmp_path: Path) -> None:
    # The chunks that were needed are enough, though more are begun with; with one less the run ends.
    assert run(settings(tmp_path / "enough", overlap="on"), Rows(ends=len(whole.made)))
    with pytest.raises(UserError, match="The rows end here"):
        run(settings(tmp_path / "short", overlap="on"), Rows(ends=len(whole.made) - 1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_on_and_off_are_words_in_yaml_too() -> None:
    settings = resolve(TrainConfig, {"model": "m", "prompts": "p"}, sets=["overlap=on", "sparse_code=off"])
    assert (settings.overlap, settings.sparse_code) == ("on", "off")
    with pytest.raises(UserError, match="overlap"):
        resolve(TrainConfig, {"model": "m", "prompts": "p"}, sets=["overlap=maybe"])


def test_on_several_devices_rows_are_made_where_steps_are() -> None:
    rows = Rows()
    source = Upcoming(rows, devices=2)
    assert source.look(0) is not None and source.look(0) is source.chunk(0) and rows.made == [0]
    assert rows.threads == {"MainThread"}
    source.close()


class Device(NamedTuple):
    """What decides of a device."""

    platform: str


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the device one on which a run overlaps by itself."""
    monkeypatch.setattr(overlap, "first_device", lambda mesh: Device("gpu"))
    monkeypatch.setattr(overlap, "memory_for", lambda device: Memory(2**40, 2**40, "the device"))


def test_rows_are_made_ahead_only_where_a_step_follows(roomy: None, whole: Whole, tmp_path: Path) -> None:
    out, source = tmp_path / "run", Rows()
    weights = run(settings(out, overlap="auto"), source)
    assert all(map(np.array_equal, weights, whole.weights)) and log(out) == whole.log and "rows" in source.threads
    done = Rows()
    assert all(map(np.array_equal, run(settings(out, overlap="auto"), done, resume=True), weights))
    assert done.made == [], "a run that is done needs no rows"


@pytest.mark.parametrize(("platform", "free", "does"), [("cpu", 2**40, False), ("gpu", 2**40, True), ("gpu", 1, False)])
def test_memory_and_the_device_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, free: int, does: bool
) -> None:
    config, rows = settings(tmp_path), Rows()
    setup = set_up(config, rows.sites, rows.width, open_mesh(config))
    monkeypatch.setattr(overlap, "first_device", lambda mesh: Device(platform))
    monkeypatch.setattr(overlap, "memory_for", lambda device: Memory(free, free, "the device"))
    with upcoming(setup, rows, buffers.Position(3, 0, 0, (1, 1))) as coming:
        assert (coming is not None) == does
    assert rows.made == ([] if platform == "cpu" else [3])
