"""Work shared out over processes, seen from one of them: whose part is which, what is compared; refreshes that stop."""

import errno
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import SharedError
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import checkpoints, processes
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.logs import Goodput
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.own_rows import open_rows, rows_of, spread_source
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.store import write_store


class Numbered:
    """A source whose rows are 1000 times their chunk and their number in it; the txt site has fewer that count."""

    sites, width = sites_of({"img": (0, 1), "txt": (4,)}), 4

    def chunk(self, number):
        rows, valid = {}, {}
        for name, count in (("img", 8), ("txt", 3)):
            value = 1000.0 * number + jnp.arange(8)
            y = jnp.broadcast_to(value[None, :, None], (len(self.sites.groups[name]), 8, 4))
            rows[name], valid[name] = ActivationRows(-y, y, value), np.arange(8) < count
        return Chunk(rows, valid)


@pytest.mark.parametrize("stops", [(0,), (1,), (0, 2), (1, 1)], ids=str)
def test_a_refresh_that_is_stopped_goes_on_as_if_it_had_not_been(stops):
    source, plan = Numbered(), buffers.plan_buffer(32, 4, 0.75, seed=0)

    def filled():
        empty = buffers.empty_store(source.sites, source.width, plan.capacity, jnp.float32, make_mesh({}))
        return buffers.fill_store(empty, source, plan)

    store, position = buffers.refresh(*filled()[:1], source, plan, filled()[1])
    stopped, at = filled()
    for chunks in stops:
        left = iter([False] * chunks + [True])
        stopped, at = buffers.refresh(stopped, source, plan, at, lambda left=left: next(left))
        assert at.left and at.served == 0 and at.round == 0 and at != position
        at = buffers.Position(**at._asdict())  # as from a checkpoint
    stopped, at = buffers.refresh(stopped, source, plan, at)
    assert at == position
    assert all(map(np.array_equal, jax.tree.leaves(stopped), jax.tree.leaves(store)))


@pytest.mark.parametrize("kind", ["harvested", "arrays"])
def test_rows_that_are_sent_to_all_devices_are_the_same(kind, tmp_path):
    if kind == "harvested":
        write_store({"train": Numbered()}, {"train": 3}, tmp_path / "rows", {})
        source = open_rows(tmp_path / "rows", "train", 0.1, 0)
    else:
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((1500, 6), np.float32), rng.standard_normal((1500, 4), np.float32)
        source = rows_of(rows, "train", 0.1, 0)
    mesh = make_mesh({"data": 2, "feature": 2})
    spread = spread_source(source, mesh)
    for number in range(2):
        here, there = source.chunk(number), spread.chunk(number)
        for name, rows in here.rows.items():
            assert all(map(np.array_equal, there.rows[name], rows))
            assert np.array_equal(here.valid[name], there.valid[name])
            assert there.rows[name].y.addressable_data(0).size == rows.y.size // 4, "a device has its part alone"
    assert spread_source(source, make_mesh({})) is source


def test_a_process_makes_the_parts_of_its_own_devices_alone():
    mesh = make_mesh({"data": 4, "feature": 2})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert processes.own_places(8, sharding) == list(range(8)) and processes.own_places(3, None) == [0, 1, 2]
    made = []

    def part(at):
        made.append((at[0].start, at[0].stop))
        return np.arange(8)[at]

    assert np.array_equal(processes.placed((8,), sharding, part), np.arange(8))
    assert sorted(made) == [(0, 2), (2, 4), (4, 6), (6, 8)], "each once, though two devices hold it"


@pytest.fixture
def three(monkeypatch):
    """Makes this process the middle one of three; the others' texts are to be given."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    others = []
    monkeypatch.setattr(processes, "texts", lambda text: [others[0], text, others[1]])
    return others


def test_all_differences_are_named_in_one_sentence(three):
    three[:] = ['{"lr": "1", "jax": "1.0"}', '{"lr": "2", "jax": "1.0", "k": "3"}']
    with pytest.raises(SharedError) as told:
        processes.check_alike({"lr": "1", "jax": "0.9"}, "settings or versions")
    assert not told.value.speaks
    assert str(told.value) == (
        "The processes have different settings or versions: lr is 1 in processes 0 to 1, 2 in process 2; jax is 1.0 in "
        "processes 0, 2, 0.9 in process 1; k is missing in processes 0 to 1, 3 in process 2; start all of them with "
        "the same."
    )
    three[:] = ['{"lr": "1"}'] * 2
    processes.check_alike({"lr": "1"}, "settings or versions")


def test_what_one_process_cannot_do_is_told_in_all(three):
    three[:] = ["", "The disk is full."]
    with pytest.raises(SharedError, match="The disk is full"):
        processes.jointly(lambda: None)
    three[:] = ["", ""]
    with pytest.raises(SharedError, match="mine"):
        processes.jointly(lambda: (_ for _ in ()).throw(ValueError("mine")))
    processes.jointly(lambda: None)


@pytest.mark.parametrize("seen", [True, False])
def test_a_directory_that_a_process_does_not_see_is_refused(three, monkeypatch, tmp_path, seen):
    asked = iter([["word", "x", ""], ["", "", ""], ["", "mine", ""]])
    monkeypatch.setattr(processes, "texts", lambda text: [text if one == "mine" else one for one in next(asked)])
    if seen:
        (tmp_path / ".word.seen").touch()
        processes.check_shared(tmp_path)
    else:
        with pytest.raises(SharedError, match="Process 1 on .* does not see what the first process writes to"):
            processes.check_shared(tmp_path)


def test_a_run_on_a_disk_without_locks_goes_without(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints.fcntl, "flock", refuse)
    with checkpoints.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_numbered_work_is_shared_out_and_comes_back_in_order(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    worked = []

    def work(number):
        worked.append(number)
        return number

    results = []
    for index in range(3):
        monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
        mine = {}
        # What the others would give: the numbers that follow from theirs.
        monkeypatch.setattr(processes, "gathered", lambda made, mine=mine: mine.setdefault(made, [made]))
        list(processes.divided(7, work))
        results.append(worked[:])
        worked.clear()
    assert results == [[0, 3, 6], [1, 4, 6], [2, 5, 6]], "who has nothing left does the last again"
    monkeypatch.setattr(processes, "gathered", lambda made: [made - made % 3 + n for n in range(3)])
    monkeypatch.setattr(processes.jax, "process_index", lambda: 0)
    assert list(processes.divided(7, work)) == list(range(7))


def test_goodput_counts_kept_steps_over_all_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    good = Goodput(started=100.0, useful=0.0)
    now[0] = 110.0  # starts and compiles
    good.go_on()
    now[0] = 140.0
    assert good.share() == 0.75
    good.pause()
    now[0] = 160.0  # killed; 20 s later it goes on, having lost nothing
    assert good.share() == 0.5 and Goodput(100.0, good.useful).share() == 0.5
