"""A training run from begin to end: what it leaves behind, how it stops and goes on, and what it refuses."""

import gc
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import finish, start

from difffract_jax.config import UserError, provenance
from difffract_jax.transcoders.checkpoints import CHECKPOINTS, locked
from difffract_jax.transcoders.exporting import newest_transcoders
from difffract_jax.transcoders.harvest import Chunk
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.training import Watch, train
from tolerances import TOL, relative_error

WIDTH = 8
FORMATS = Path(__file__).parents[1] / "data" / "formats"


class Synthetic:
    """Rows y = tanh(A x) of two img sites and one txt site, by chunk number."""

    sites, width = sites_of({"img": (0, 1), "txt": (4,)}), WIDTH

    def __init__(self, broken_from=10**9):
        self.broken_from = broken_from

    def chunk(self, number):
        rng = np.random.default_rng(number)
        rows, valid = {}, {}
        for name, layers in self.sites.groups.items():
            x = rng.standard_normal((len(layers), 64, WIDTH), np.float32)
            y = np.tanh(x[:, :, ::-1]) + np.float32(0.1)
            if number >= self.broken_from:
                y = y * np.float32("nan")
            rows[name] = ActivationRows(*map(jax.numpy.asarray, (x, y, rng.choice(np.float32([1, 0.5]), 64))))
            valid[name] = np.ones(64, bool) if name == "img" else rng.random(64) < 0.5
        return Chunk(rows, valid)


def settings(out, **more):
    given = {"model": "m", "prompts": "p", "out": out, "expansion": 4, "k": 4, "time_embed": 4, "batch": 32}
    given |= {"steps": 12, "buffer_rows": 256, "checkpoint_every": 4, "log_every": 2, "warmup": 2, "lr": 3e-3}
    return TrainConfig(**(given | more))


class Stopped(Exception):
    pass


def run(config, source=None, resume=False, stop_at=None, notes=None):
    def progress(done, total, values):
        if done == stop_at:
            raise Stopped

    watch = Watch(progress, [].append if notes is None else notes.append)
    return train(config, source or Synthetic(), provenance("train", config), watch, resume=resume)


def leaves(done):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(done.transcoders.stacks)]


def same(a, b):
    return all(map(np.array_equal, leaves(a), leaves(b)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(settings(out))


def test_a_run_leaves_settings_metrics_checkpoints_and_transcoders(whole):
    out, done = whole
    assert (done.step, done.transcoders.sites) == (12, sites_of({"img": (0, 1), "txt": (4,)}))
    assert done.transcoders.config.activation == "jumprelu"
    assert json.loads((out / "train.json").read_text())["settings"]["lr"] == 3e-3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert set(lines[0]["sites"]) == {"img/0", "img/1", "txt/4"} and lines[-1]["fvu"] < lines[0]["fvu"]
    assert lines[-1]["rows_per_second"] > 0 and lines[-1]["matmul_share"] > 0
    assert sorted(path.name for path in (out / CHECKPOINTS).iterdir()) == ["12", "8"]


def test_products_at_active_features_alone_train_alike_and_can_be_profiled(whole, tmp_path):
    done = run(settings(tmp_path / "run", sparse_code="on", profile=True))
    assert relative_error(*(np.concatenate([a.ravel() for a in leaves(d)]) for d in (done, whole[1]))) <= TOL.f32_run
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("stop_at", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 10))])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole, tmp_path, stop_at):
    config = settings(tmp_path / "run", checkpoint_every=2)
    with pytest.raises(Stopped):
        run(config, stop_at=stop_at + 2)
    assert same(run(config, resume=True), whole[1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_finishes_the_step_saves_and_leaves_the_signals_as_they_were(whole, tmp_path, sent):
    config = settings(tmp_path / "run", checkpoint_every=100)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    watch = Watch(lambda done, total, values: done == 4 and os.kill(os.getpid(), sent), print)
    stopped = train(config, Synthetic(), provenance("train", config), watch)
    # Before step 5 there are new rows to make: it does not wait for them, but saves a refresh that goes on.
    assert (stopped.step, stopped.transcoders) == (4, None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    early = newest_transcoders(config.out)
    assert (early.step, early.transcoders.sites) == (4, whole[1].transcoders.sites)
    assert same(run(config, resume=True), whole[1])


def test_sigterm_before_the_first_step_saves_what_there_is_and_the_run_goes_on_from_it(whole, tmp_path):
    class Told(Synthetic):
        def chunk(self, number):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().chunk(number)

    config, before = settings(tmp_path / "run", checkpoint_every=100), signal.getsignal(signal.SIGTERM)
    stopped = run(config, Told())
    assert (stopped.step, stopped.transcoders, signal.getsignal(signal.SIGTERM)) == (0, None, before)
    assert same(run(config, resume=True), whole[1])


def test_a_run_that_the_first_release_began_goes_on(whole, tmp_path):
    """0.1.0 wrote `training-v1` with these settings and stopped after step 4; bits may differ by the compiler."""
    shutil.copytree(FORMATS / "training-v1", tmp_path / "run")
    with pytest.raises(UserError, match="does not say its shape; export it with difffract train --export"):
        newest_transcoders(tmp_path / "run")
    early = newest_transcoders(tmp_path / "run", (Synthetic.sites, WIDTH))
    assert early.step == 4 and early.transcoders.config == whole[1].transcoders.config
    done = run(settings(tmp_path / "run", checkpoint_every=4, keep=1), resume=True)
    assert relative_error(*(np.concatenate([a.ravel() for a in leaves(d)]) for d in (done, whole[1]))) <= TOL.f32_run


def test_a_damaged_checkpoint_is_passed_over_and_told(whole, tmp_path):
    config = settings(tmp_path / "run", checkpoint_every=2, keep=4)
    with pytest.raises(Stopped):
        run(config, stop_at=10)
    checkpoints = tmp_path / "run" / CHECKPOINTS
    files = sorted((p for p in (checkpoints / "8").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[-1].write_bytes(data)
    notes = []
    assert same(run(config, resume=True, notes=notes), whole[1])
    assert len(notes) == 1 and "checkpoint 8 " in notes[0] and "going on from checkpoint 6" in notes[0]


# Orbax leaves the coroutine of a reader that failed; it is collected here, not in whatever test comes next.
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path):
    config = settings(tmp_path / "run", steps=4)
    run(config)
    for path in (tmp_path / "run" / CHECKPOINTS).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match="No checkpoint of .* can be used"):
        run(config, resume=True)
    gc.collect()


@pytest.mark.slow
def test_pmap_trains_as_jit_does(whole, tmp_path):
    done = run(settings(tmp_path / "run", mesh="data=8", parallel="pmap"))
    errors = [relative_error(a, b) for a, b in zip(leaves(done), leaves(whole[1]), strict=True) if np.any(b)]
    assert max(errors) <= TOL.sharded


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_intact(tmp_path):
    config = settings(tmp_path / "run", checkpoint_every=2, log_every=1)
    with pytest.raises(UserError, match=r"loss is not finite at step \d+ \(img/0.*checkpoint \d+ is intact; lower lr"):
        run(config, Synthetic(broken_from=6))
    newest = max(int(path.name) for path in (tmp_path / "run" / CHECKPOINTS).iterdir())
    notes = []
    with pytest.raises(UserError, match="not finite"):
        run(config, Synthetic(broken_from=6), resume=True, notes=notes)
    assert newest >= 2 and not notes


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    config = settings(tmp_path / "run")
    with locked(config.out), pytest.raises(UserError, match="Another run is working in"):
        run(config)
    run(config.model_copy(update={"steps": 2}))
    with pytest.raises(UserError, match="holds a run already; pass --resume"):
        run(config)


def test_resuming_with_other_settings_names_them(tmp_path):
    config = settings(tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="holds no run to resume"):
        run(config, resume=True)
    run(config)
    other = config.model_copy(update={"lr": 0.1, "batch": 16, "log_every": 1})
    with pytest.raises(UserError, match=r"begun with other settings \(lr: 0.003 -> 0.1; batch: 32 -> 16\)"):
        run(other, resume=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mesh": "data=3"}, "data=3, but batch, 32, is not divisible by it"),
        ({"mesh": "site=2"}, "site=2, but the number of sites, 3, is not divisible by it"),
        ({"mesh": "data=2,feature=2", "parallel": "pmap"}, "pmap spreads rows alone"),
        ({"activation": "jumprelu", "target_l0": 33.0}, "target_l0 must be at most 32"),
        ({"k": 33}, r"k must lie in \[1, 32\]"),
        ({"out": Path("ftp://bucket/run")}, "gs:// or s3://, but got ftp://"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(settings(**({"out": tmp_path / "run"} | change)))
    assert not list(tmp_path.iterdir())


def test_extras_that_are_missing_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="needs the extra `tensorboard`"):
        run(settings(tmp_path / "run", tensorboard=True))


SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def test_sigterm_saves_and_exits_with_0_and_sigkill_loses_nothing_before_the_last_checkpoint(tmp_path):
    sets = ["steps=100000", "checkpoint_every=5", "log_every=1", "buffer_rows=512", "batch=64", "sites=[img/0]"]
    sets += [f"out={tmp_path / 'run'}", "k=4", "refresh=1.0", f"prompts={SMOKE.parent / 'prompts.txt'}"]
    command = ["train", SMOKE, *(part for each in sets for part in ("--set", each))]
    metrics, seen = tmp_path / "run" / "metrics.jsonl", 0
    for sent in (signal.SIGKILL, signal.SIGTERM):
        # A process that is killed could leave half a compiled program in the cache, so none is added.
        process = start(command, tmp_path / "said", cache=os.environ["JAX_COMPILATION_CACHE_DIR"], adds=False)
        while (now := len(metrics.read_text().splitlines()) if metrics.exists() else 0) < seen + 12:
            assert process.is_alive(), (tmp_path / "said.err").read_text()
            time.sleep(0.05)
        seen = now
        os.kill(process.pid, sent)
        status, said = finish(process, tmp_path / "said")
        assert status == (0 if sent == signal.SIGTERM else -signal.SIGKILL), said
        steps = [int(path.name) for path in (tmp_path / "run" / CHECKPOINTS).iterdir() if path.name.isdecimal()]
        assert max(steps) >= (seen if sent == signal.SIGTERM else seen - 10)
        if sent == signal.SIGKILL:
            command.append("--resume")
