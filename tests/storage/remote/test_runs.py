"""Training runs in a bucket: begun, stopped, gone on with and exported there, and what goes wrong with it."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from bucket_servers import Proxy
from difffract_jax.config import UserError, provenance
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.organism.train import Stage, fit
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.locks import sole_writer
from difffract_jax.storage.remote import cache, claims, steps
from difffract_jax.storage.remote.addresses import Address, parse_address
from difffract_jax.storage.remote.bucket import Bucket, open_bucket
from difffract_jax.storage.remote.claims import Claim, claimed
from difffract_jax.storage.remote.publication import CLAIM, MARKER
from difffract_jax.transcoders import checkpoints
from difffract_jax.transcoders.bucket_checkpoints import BucketCheckpoints
from difffract_jax.transcoders.exporting import newest_transcoders
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.run_place import home_of
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.training import Trained, Watch, train

WIDTH = 8
OUT = "gs://bucket/runs/one"
AT = parse_address(OUT)


class Rows:
    """Rows y = tanh(A x) of one site, by chunk number."""

    sites, width = sites_of({"img": (0,)}), WIDTH

    def chunk(self, number: int) -> Chunk:
        rng = np.random.default_rng(number)
        x = rng.standard_normal((1, 64, WIDTH), np.float32)
        times = rng.choice(np.float32([1, 0.5]), 64)
        rows = ActivationRows(*map(jax.numpy.asarray, (x, np.tanh(x[:, :, ::-1]), times)))
        return Chunk({"img": rows}, {"img": np.ones(64, bool)})


class Stopped(Exception):
    pass


def settings(out: str | Path = OUT, **more: object) -> TrainConfig:
    given = {"model": "m", "prompts": "p", "out": out, "expansion": 4, "k": 4, "time_embed": 4, "batch": 32}
    given |= {"steps": 8, "buffer_rows": 128, "checkpoint_every": 2, "log_every": 1, "warmup": 2, "lr": 3e-3}
    return TrainConfig(**(given | more))


def run(config: TrainConfig, *, resume: bool = False, at: dict | None = None, notes: list | None = None) -> Trained:
    """Trains; `at` has what happens at a step."""

    def progress(done: int, total: int, values: object) -> None:
        if at and done in at:
            at[done]()

    watch = Watch(progress, [].append if notes is None else notes.append)
    return train(config, Rows(), provenance("train", config), watch, resume=resume)


def stopped() -> None:
    raise Stopped


def leaves(done: Trained) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(done.transcoders.stacks)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[np.ndarray], list[float]]:
    """What a run on this machine makes: its weights, and its losses."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(settings(out))
    return leaves(done), losses((out / "metrics.jsonl").read_text(encoding="utf-8"))


def losses(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines()]


def read(name: str) -> str:
    return open_bucket(AT).read((AT / name).key).decode()


@pytest.fixture
def empty(gs: Proxy) -> Proxy:
    """The emulated bucket without a run."""
    for stat in open_bucket(AT).below(AT.key):
        open_bucket(AT).delete(stat.key)
    return gs


def test_a_run_in_a_bucket_goes_on_on_another_host_and_is_the_one_made_here(
    whole: tuple, empty: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        run(settings(), at={5: stopped})
    assert steps.complete(AT / "checkpoints") == [2, 4]
    assert newest_transcoders(Path(OUT)).step == 4
    with pytest.raises(UserError, match=f"{AT.bucket}/runs/one holds a run already; pass --resume"):
        run(settings())
    shutil.rmtree(cache.root())
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "another host"))
    done = run(settings(), resume=True)
    assert all(map(np.array_equal, leaves(done), whole[0]))
    assert losses(read("metrics.jsonl")) == whole[1]
    assert steps.complete(AT / "checkpoints") == [6, 8], "two are kept"
    names = [stat.key.removeprefix(f"{AT.key}/") for stat in open_bucket(AT).below(AT.key)]
    assert CLAIM not in names and len([name for name in names if name.endswith(MARKER)]) == 2
    assert not list((cache.root() / "outputs").rglob("*.safetensors")), "what is sent is not kept here"
    save_transcoders(done.transcoders, Path(OUT) / "transcoders", overwrite=True)
    assert load_transcoders(f"{OUT}/transcoders").sites == done.transcoders.sites


@pytest.mark.slow
def test_a_run_whose_bucket_goes_away_keeps_its_checkpoint_and_sends_it_later(whole: tuple, empty: Proxy) -> None:
    def lose() -> None:
        deadline = time.monotonic() + 60
        while steps.complete(AT / "checkpoints") != [2] and time.monotonic() < deadline:
            time.sleep(0.01)  # else it may be what is lost, and 4 what is kept
        empty.fault = lambda method, path: 503

    with pytest.raises(
        UserError, match=r"503.*checkpoint 6 is complete, but not in the bucket: it is kept in "
    ) as told:
        run(settings(), at={4: lose})
    kept = Path(str(told.value).partition("it is kept in ")[2].partition(";")[0])
    assert [path.suffix for path in kept.glob("*.safetensors")], "the sentence says where it is"
    empty.fault = lambda method, path: None
    assert steps.complete(AT / "checkpoints") == [2]
    notes: list[str] = []
    done = run(settings(), resume=True, notes=notes)
    assert notes == ["Checkpoint 6, which was kept on this machine, is in the bucket now."]
    assert all(map(np.array_equal, leaves(done), whole[0])) and losses(read("metrics.jsonl")) == whole[1]


@pytest.mark.slow
def test_faults_change_nothing_and_damage_is_passed_over(whole: tuple, empty: Proxy) -> None:
    chance = np.random.default_rng(0)
    faults = (503, 429, "drop", "cut", "flip")
    empty.fault = lambda method, path: faults[chance.integers(5)] if chance.random() < 0.3 else None
    with pytest.raises(Stopped):
        run(settings(), at={7: stopped})
    empty.fault = lambda method, path: None
    newest = AT / "checkpoints" / "6"
    part = next(stat for stat in open_bucket(AT).below(newest.key) if stat.key.endswith(".safetensors"))
    open_bucket(AT).write(part.key, bytes(part.size))
    notes: list[str] = []
    assert all(map(np.array_equal, leaves(run(settings(), resume=True, notes=notes)), whole[0]))
    assert notes == ["checkpoint 6 cannot be read (UserError); going on from checkpoint 4."]


def test_what_could_not_be_sent_goes_and_damage_pushes_out_nothing_good(empty: Proxy) -> None:
    told: list[str] = []
    saved = BucketCheckpoints(Path(OUT), "checkpoints", 1, lambda: None, told.append)
    state = {"state": {"weights": np.arange(3.0)}}
    empty.fault = lambda method, path: 503
    saved.write(4, state, {"started": 1.0})
    assert saved._sent.exception() and list((home_of(Path(OUT)) / "unsent").iterdir())
    empty.fault = lambda method, path: None
    saved.write(6, state, {"started": 1.0})
    assert len(told) == 1 and told[0].endswith("; checkpoint 6 is sent instead.") and "--resume" not in told[0]
    assert not list((home_of(Path(OUT)) / "unsent").iterdir())
    for step, left in ((4, [4, 6]), (5, [5, 6]), (6, [6])):  # as where 6 is damaged, and the run goes on from before
        saved.write(step, state, {"started": 1.0})
        saved.finish()
        assert steps.complete(AT / "checkpoints") == left
    saved.close()


def test_a_checkpoint_counts_although_old_ones_cannot_be_removed(empty: Proxy) -> None:
    saved = BucketCheckpoints(Path(OUT), "checkpoints", 1, lambda: None, pytest.fail)
    for step, left in ((2, [2]), (4, [2, 4]), (6, [6])):
        lost = {"DELETE"} if step == 4 else set()
        empty.fault = lambda method, path, lost=lost: 503 if method in lost else None
        saved.write(step, {"state": {"weights": np.arange(3.0)}}, {"started": 1.0})
        saved.finish()
        assert steps.complete(AT / "checkpoints") == left
    saved.close()


@pytest.mark.slow
def test_a_half_written_checkpoint_is_none_and_goes_when_the_run_goes_on(whole: tuple, empty: Proxy) -> None:
    with pytest.raises(Stopped):
        run(settings(), at={7: stopped})
    newest = AT / "checkpoints" / "6"
    open_bucket(AT).delete((newest / MARKER).key)  # as where a host was killed before everybody's part was there
    assert (steps.complete(AT / "checkpoints"), steps.incomplete(AT / "checkpoints")) == ([4], [6])
    assert newest_transcoders(Path(OUT)).step == 4
    done = run(settings(), resume=True)
    assert all(map(np.array_equal, leaves(done), whole[0])) and losses(read("metrics.jsonl")) == whole[1]
    assert (steps.complete(AT / "checkpoints"), steps.incomplete(AT / "checkpoints")) == ([6, 8], [])


def test_a_second_run_in_the_same_place_is_one_sentence_and_changes_nothing(
    empty: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "LOST", 5.0)
    with claimed(AT):
        with pytest.raises(
            UserError, match=rf"^Another run is working in {OUT}: process \d+ on .*; wait for it, or name"
        ):
            run(settings())
        assert [stat.key.removeprefix(f"{AT.key}/") for stat in open_bucket(AT).below(AT.key)] == [CLAIM]


def test_fingerprints_wait_for_every_process_to_have_read_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"weights": np.arange(3, dtype=np.float32)}
    flat = {"state": leaf_paths(tree)}
    prints = {"state": checkpoints.fingerprints(flat["state"])}
    computed: list[int] = []

    class Saved(BucketCheckpoints):
        def __init__(self) -> None:
            self.name = "run"

        def steps(self) -> list[int]:
            return [4, 8]

        def read(self, step: int, wanted: object) -> tuple[dict, dict]:
            return flat, {"step": step, "fingerprints": prints}

    def fingerprints(leaves: dict) -> dict[str, int]:
        computed.append(len(computed))
        return prints["state"]

    others = iter([False, True, True])  # another process cannot read its part of 8
    monkeypatch.setattr(checkpoints, "everywhere", lambda good: next(others) and good)
    monkeypatch.setattr(checkpoints, "fingerprints", fingerprints)
    found = checkpoints.restore(Saved(), {"state": tree})
    assert (found.step, found.record, computed) == (4, {"step": 4}, [0])
    assert found.passed == ["checkpoint 8 cannot be read by another process"]


def test_a_run_that_was_taken_over_ends_at_its_next_checkpoint(empty: Proxy) -> None:
    def taken_over() -> None:
        raise claims.TakenOver("It was taken over.")

    told: list[str] = []
    saved = BucketCheckpoints(Path(OUT), "checkpoints", 1, taken_over, told.append)
    saved.write(4, {"state": {"weights": np.arange(3.0)}}, {"started": 1.0})
    with pytest.raises(UserError, match=r"^It was taken over\.$"):
        saved.write(6, {"state": {"weights": np.arange(3.0)}}, {"started": 1.0})
    saved.close()
    assert not told and not steps.complete(AT / "checkpoints")


class Toy(NamedTuple):
    """State of a toy stage of the organism's training."""

    weights: jax.Array
    step: jax.Array


def test_a_stage_of_the_organism_goes_on_from_its_newest_checkpoint(
    empty: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(state: Toy, data: np.ndarray, key: jax.Array) -> tuple[Toy, dict]:
        return Toy(0.9 * state.weights + data, state.step + 1), {"loss": jax.numpy.sum(data)}

    def report(name: str, done: int, total: int, loss: float) -> None:
        if done == 5 and not finished:
            raise Stopped

    def init() -> Toy:
        return Toy(jax.numpy.zeros(3), jax.numpy.zeros((), np.int32))

    stage = Stage("toy", 8, init, lambda number: np.full(3, number, np.float32), step, jax.random.key(1))
    finished = []
    home_of(Path(OUT)).mkdir(parents=True)
    with pytest.raises(Stopped):
        fit(stage, Path(OUT), 2, report)
    assert steps.complete(AT / "toy") == [4] and not steps.incomplete(AT / "toy")
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "another host"))
    home_of(Path(OUT)).mkdir(parents=True)
    finished.append(True)
    ended = fit(stage, Path(OUT), 2, report)
    assert steps.complete(AT / "toy") == [8] and json.loads(read("metrics.jsonl").splitlines()[-1])["step"] == 8
    expected = sum(np.float32(0.9) ** (7 - number) * number for number in range(8))
    longer = stage._replace(steps=10)

    def taken_over() -> None:
        raise UserError("was taken over")

    with pytest.raises(UserError, match="was taken over"):
        fit(longer, Path(OUT), 2, report, taken_over)
    assert steps.complete(AT / "toy") == [8], "who was only cut off writes and removes nothing"
    assert np.allclose(ended.weights, expected) and np.array_equal(
        fit(stage, Path(OUT), 2, report).weights, ended.weights
    )


def test_two_runs_in_one_place_are_told_apart(empty: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "LOST", 2.0)
    with claimed(AT) as first:
        with pytest.raises(UserError, match=rf"Another run is working in {OUT}: process \d+ on .*; wait for it, or"):
            Claim(AT).take()
        first.check()
    assert open_bucket(AT).stat((AT / CLAIM).key) is None
    about = {"process": 2**22 + 1, "host": "pod-2", "begun": "1", "token": "t", "beats": 0}
    about |= {"numbers": claims._numbers_of_processes()}
    open_bucket(AT).write((AT / CLAIM).key, json.dumps(about).encode())
    with claimed(AT) as heir:  # at once: there is no such process on this host
        open_bucket(AT).write((AT / CLAIM).key, json.dumps(about | {"host": "pod-3", "numbers": "others"}).encode())
        with pytest.raises(UserError, match=rf"{OUT} was taken over by process \d+ on pod-3, so that this run ends"):
            heir.check()
    assert json.loads(read(CLAIM))["host"] == "pod-3", "the other's claim stays"
    monkeypatch.setattr(claims, "LOST", 0.2)
    before = time.monotonic()
    with claimed(AT) as late:  # whose holder shows no sign of life; its number says nothing to another container
        assert time.monotonic() - before > 0.2
        late.check()
    with sole_writer(OUT), pytest.raises(UserError, match=f"Another process is writing {OUT}: .*remove {OUT}/{CLAIM}"):
        Claim(AT).take()


def test_of_heirs_at_one_instant_one_takes_over(either: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "LOST", 5.0)
    at = parse_address(f"{either[0]}://bucket/heirs")
    bucket, key = open_bucket(at), (at / CLAIM).key
    about = {"process": 2**22 + 1, "host": "pod-2", "begun": "1", "token": "t", "beats": 0}
    bucket.write(key, json.dumps(about | {"numbers": claims._numbers_of_processes()}).encode())
    sights, seen = threading.Barrier(4), claims._is_gone

    def at_once(holder: dict) -> bool:
        if holder.get("token") == "t":
            sights.wait(120)  # until every heir has seen that the holder is gone
        return seen(holder)

    monkeypatch.setattr(claims, "_is_gone", at_once)
    heirs, refused = [Claim(at) for _ in range(4)], list[str]()

    def inherit(heir: Claim) -> None:
        try:
            heir.take()
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=inherit, args=[heir]) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and all(text.startswith(f"Another run is working in {at}: process ") for text in refused)
    token = claims._read(bucket, at)[0]["token"]  # again where a sign of life came in between
    (winner,) = [heir for heir in heirs if heir._about["token"] == token]
    winner.check()
    winner.release()
    assert bucket.stat(key) is None


def test_a_holder_that_wakes_up_late_overwrites_and_removes_no_other_claim(
    either: tuple[str, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = parse_address(f"{either[0]}://bucket/late")
    bucket, key = open_bucket(at), (at / CLAIM).key
    monkeypatch.setattr(claims, "BEAT", 3600.0)
    late, read = Claim(at), claims._read
    late.take()

    def overtaken(bucket: Bucket, at: Address) -> object:
        seen = read(bucket, at)
        bucket.write(key, b'{"token": "of an heir", "beats": 0}')  # between its look and what it does
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(claims, "_read", overtaken)
        patch.setattr(late, "_ended", OneBeat())
        late._live()
    assert late._beats == 1 and json.loads(bucket.read(key))["token"] == "of an heir"
    bucket.write(key, late._content())
    with monkeypatch.context() as patch:
        patch.setattr(claims, "_read", overtaken)
        late.release()
    assert json.loads(bucket.read(key))["token"] == "of an heir"
    bucket.delete(key)


class OneBeat:
    """The end of a claim that lives for one sign of life."""

    def __init__(self) -> None:
        self._waits = iter((False, True))

    def wait(self, seconds: float) -> bool:
        return next(self._waits)

    def is_set(self) -> bool:
        return False


def test_a_claim_outlives_a_bucket_that_cannot_be_read_for_a_while(
    empty: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.02)
    with claimed(AT) as claim:
        empty.fault = lambda method, path: 503 if "alt=media" in path else None
        with pytest.raises(UserError, match="503"):
            claim.check()
        time.sleep(0.2)
        empty.fault = lambda method, path: None
        claim.check()
        beats, deadline = claim._beats, time.monotonic() + 60
        while claim._beats == beats:
            assert time.monotonic() < deadline, "no sign of life any more"
            time.sleep(0.02)
    assert open_bucket(AT).stat((AT / CLAIM).key) is None
