"""The training run: rows in, transcoders out, and at every moment something on disk to go on from.

    out/train.json           settings, versions, source hashes
    out/metrics.jsonl        one line per `log_every` steps
    out/checkpoints/STEP     weights, optimiser, buffer, position in the data (`checkpoints`)

`out` may lie in a bucket, which then is all that processes share: `run_place` says what each has on its own disk.

1. Take the directory's lock. Begin, or with `resume` go on from the newest good checkpoint, which gives bit for bit
   what an uninterrupted run would have.
2. Until the last step: a batch from the buffer, a step; at the end of a round, new rows.
3. Every `checkpoint_every` steps, when told to stop and at the end: check that the losses are finite, and save. It is
   told by SIGTERM, Ctrl-C or `max_minutes`.

One random seed and the numbers in a `Position` decide everything that is drawn: there are no generator states to keep.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difffract_jax.config import UserError, resolve
from difffract_jax.storage.checkpoint import atomic_file, tree_hash
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.storage.remote.outputs import ask
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders.buffer import Position
from difffract_jax.transcoders.checkpoints import (
    Checkpoints,
    intact,
    locked,
    newest,
    noted_sigterm,
    open_checkpoints,
    restore,
    save,
    stop_signal,
    writing,
)
from difffract_jax.transcoders.harvest import RowSource
from difffract_jax.transcoders.logs import (
    METRICS,
    Clock,
    Goodput,
    Sink,
    cut_metrics,
    matmul_rate,
    open_sinks,
    profiled,
    write_metrics,
)
from difffract_jax.transcoders.objective import widths
from difffract_jax.transcoders.overlap import refresh_served, upcoming
from difffract_jax.transcoders.own_rows import spread_source
from difffract_jax.transcoders.processes import check_shared, is_first, jointly, texts, together, whole
from difffract_jax.transcoders.recipe import row_flops
from difffract_jax.transcoders.run_place import SETTINGS, bring, check_place, has, home_of, send, text_of
from difffract_jax.transcoders.serving import abstract_buffer, empty_buffer, moments_sharding, restored_buffer, serving
from difffract_jax.transcoders.settings import TrainConfig, changed_fields
from difffract_jax.transcoders.setup import Setup, abstract_state, first_state, open_mesh, set_up
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.state import TrainState, export_transcoders, measure_moments
from difffract_jax.transcoders.step import Metrics, jit_step, pmap_step, repeat_state, split_rows
from difffract_jax.transcoders.transcoder import TranscoderSet

FOLDERS = ("tensorboard", "profile")
"""What a run may write besides, which goes into its bucket at the end."""
MEASURED_ROWS = 8192
"""Rows of a site that the scales and first biases are taken from."""


class Trained(NamedTuple):
    """How a run ended.

    Attributes:
        step: steps done.
        transcoders: what it made; None if it was stopped before the last step.
        metrics: means over sites of the last line that was logged.
    """

    step: int
    transcoders: TranscoderSet | None
    metrics: dict[str, float]


class Watch(NamedTuple):
    """Who is told how a run goes.

    Attributes:
        progress: called with (steps done, steps in all, means over sites).
        note: called with a sentence.
        begin: called once everything fits and the directory is this run's, before the first row is read.
    """

    progress: Callable[[int, int, Mapping[str, float]], None]
    note: Callable[[str], None]
    begin: Callable[[], Any] = lambda: None


class _Run(NamedTuple):
    """What a run keeps from step to step."""

    state: TrainState
    store: buffers.Store
    position: Position
    goodput: Goodput


def train(
    settings: TrainConfig, source: RowSource, record: Mapping[str, Any], watch: Watch, *, resume: bool = False
) -> Trained:
    """Trains transcoders for every site of a source of rows.

    Args:
        settings: of the run.
        source: where rows come from.
        record: settings, versions and sources, from `config.provenance`.
        watch: who is told.
        resume: go on with the run in `settings.out`.

    Raises:
        UserError: if the settings do not fit one another or the run to be resumed, or the loss ceases to be finite.
    """
    started = float(texts(repr(time.time()))[0])
    check_place(settings.out)
    setup = set_up(settings, source.sites, source.width, open_mesh(settings))
    source = spread_source(source, setup.mesh)
    together(lambda: check_directory(settings, resume))
    with noted_sigterm() as came, writing(settings.out), locked(settings.out) as allowed:
        _check_reached(settings.out)
        together(lambda: check_directory(settings, resume))
        watch.begin()
        checkpoints = open_checkpoints(settings.out, settings.keep, allowed, watch.note)
        try:
            begun = checkpoints.begin(_started(settings.out) if resume else None) >= 0 and resume
            run = _resume(setup, checkpoints, watch) if begun else _begin(setup, source, record, started)
            done = _loop(setup, source, run, checkpoints, watch, came)
            checkpoints.finish()
            together(lambda: send(settings.out, [METRICS, *FOLDERS]))
            return done
        finally:
            checkpoints.close()


def _check_reached(out: Path) -> None:
    """Refuses an `out` that some process cannot reach."""
    if is_remote(out):
        jointly(lambda: ask(out))
        home_of(out).mkdir(parents=True, exist_ok=True)
    else:
        check_shared(out)


def _started(out: Path) -> float | None:
    """Returns when a run was first started; None if it does not say."""
    return run_record(out).get("started")


def check_directory(settings: TrainConfig, resume: bool) -> None:
    """Refuses to begin where a run has begun, or to go on where none has or with other settings."""
    if not is_remote(settings.out) and settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, but a run is a directory; name another out.")
    begun = has(settings.out, SETTINGS)
    if not resume:
        if begun:
            raise UserError(f"{settings.out} holds a run already; pass --resume to go on with it, or name another out.")
        return
    if not begun:
        raise UserError(f"{settings.out} holds no run to resume; leave --resume out to begin one.")
    before = run_settings(settings.out)
    changed = changed_fields(before.model_dump(mode="json"), settings.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"The run in {settings.out} was begun with other settings ({'; '.join(changed)}); "
            "resume with the same, or begin another run."
        )


def run_record(directory: Path) -> dict[str, Any]:
    """Returns what a run wrote down when it began: command, settings, versions, sources, shape.

    Raises:
        UserError: if the directory holds no run.
    """
    if not has(directory, SETTINGS):
        raise UserError(f"{directory} holds no training run; give the `out` of difffract train.")
    text = text_of(directory, SETTINGS)
    try:
        record = json.loads(text)
        record["settings"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / SETTINGS} is damaged; copy it again from where the run was made.") from None
    return record


def run_settings(directory: Path) -> TrainConfig:
    """Returns the settings of a run.

    Raises:
        UserError: if the directory holds no run.
    """
    return resolve(TrainConfig, run_record(directory)["settings"])


def _begin(setup: Setup, source: RowSource, record: Mapping[str, Any], started: float) -> _Run:
    """Fills the buffer, makes the first weights, and writes down the settings: from then on there is a run."""
    settings = setup.settings
    store, position = buffers.fill_store(empty_buffer(setup), source, setup.plan)
    count = min((MEASURED_ROWS, *position.counts))
    first = {name: np.arange(count, dtype=np.int32) for name in store}
    rows = buffers.gather(store, first, moments_sharding(setup, count))
    state = first_state(setup, measure_moments(rows, settings.scale_rows))
    shape = {"sites": setup.sites.to_json(), "width": list(widths(setup.width)), "groups": setup.sites.foreign_groups()}
    if has(settings.out, SETTINGS):  # as where a run was killed before its first checkpoint
        started = _started(settings.out) or started
    together(lambda: _write_settings(settings.out, {**record, "shape": shape, "started": started}))
    return _Run(state, store, position, Goodput(started, 0.0))


def _write_settings(out: Path, record: Mapping[str, Any]) -> None:
    cut_metrics(home_of(out), 0)
    with atomic_file(out / SETTINGS) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _resume(setup: Setup, checkpoints: Checkpoints, watch: Watch) -> _Run:
    """Reads the newest good checkpoint onto this run's mesh."""
    found = restore(checkpoints, {"state": abstract_state(setup), "buffer": abstract_buffer(setup)})
    for sentence in found.passed:
        watch.note(f"{sentence}; going on from checkpoint {found.step}.")
    together(lambda: _go_on_with_log(setup.settings.out, found.step))
    stored = found.record["position"]
    position = Position(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
    goodput = Goodput(_started(setup.settings.out) or time.time(), found.record.get("useful_seconds", 0.0))
    return _Run(found.trees["state"], restored_buffer(setup, found.trees["buffer"]), position, goodput)


def _go_on_with_log(out: Path, step: int) -> None:
    bring(out, METRICS)
    cut_metrics(home_of(out), step)


def _loop(
    setup: Setup, source: RowSource, run: _Run, checkpoints: Checkpoints, watch: Watch, came: threading.Event
) -> Trained:
    settings, home = setup.settings, home_of(setup.settings.out)
    step_function = _step_function(setup, run.state)
    shown = settings.model_dump(mode="json")
    sinks = open_sinks(home, settings.tensorboard, settings.wandb, shown) if is_first() else []
    state, store, position, goodput = run
    if settings.parallel == "pmap":
        state = _per_device(repeat_state(state, setup.mesh.size), setup.mesh)
    first = step = int(run.state.step)
    saved, means, clock = step if step else -1, {}, _clock(setup)
    with stop_signal(came) as asked, profiled(home, settings.profile, first) as profile, ExitStack() as held:
        serve, stopped, coming = held.enter_context(serving(setup)), asked(), None
        if step < settings.steps and not stopped:  # the first chunk takes as long as a refresh
            coming = held.enter_context(upcoming(setup, source, position))
            stopped = asked()
        ends = time.monotonic() + 60 * (settings.max_minutes or float("inf"))

        def stop() -> bool:
            return asked() or time.monotonic() >= ends

        while step < settings.steps and not stopped:
            if position.served == setup.plan.round_batches:
                if setup.mesh.devices.flat[0].platform == "cpu":
                    # Steps that are still under way hold as much memory as the model that makes the rows.
                    jax.block_until_ready(state)
                store, position = buffers.refresh(store, coming or source, setup.plan, position, stop)
                stopped = bool(position.left)
                if stopped:
                    break
            state, metrics = step_function(state, serve(store, position))
            step, position = step + 1, position._replace(served=position.served + 1)
            if coming is not None and step + setup.plan.round_batches - position.served < settings.steps:
                store, position = refresh_served(store, coming, setup.plan, position)
            stopped = stop()
            if step == first + 1:
                jax.block_until_ready(metrics)
                goodput.go_on()
            profile(step, metrics)
            if step % settings.log_every == 0 or step == settings.steps:
                means = _log(setup, step, metrics, clock, sinks, goodput)
                watch.progress(step, settings.steps, means)
            if step % settings.checkpoint_every == 0 or step == settings.steps or stopped:
                _check_finite(setup, step, metrics, saved)
                _save(setup, checkpoints, _Run(state, store, position, goodput))
                saved = step
    if stopped and saved != step:
        _save(setup, checkpoints, _Run(state, store, position, goodput))
    done = step >= settings.steps
    return Trained(step, transcoders_of(_one(setup, state), setup.sites) if done else None, means)


def _one(setup: Setup, state: TrainState) -> TrainState:
    """Returns the state itself; of pmap's copies the first."""
    return jax.tree.map(lambda a: a[0], state) if setup.settings.parallel == "pmap" else state


def _save(setup: Setup, checkpoints: Checkpoints, run: _Run) -> None:
    one = _one(setup, run.state)
    step = int(one.step)  # which waits for all steps
    run.goodput.pause()
    position = {
        name: list(value) if isinstance(value, tuple) else value for name, value in run.position._asdict().items()
    }
    record = {"position": position, "useful_seconds": run.goodput.useful, "started": run.goodput.started}
    save(checkpoints, step, {"state": one, "buffer": run.store}, record)
    run.goodput.go_on()


def _step_function(setup: Setup, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    if setup.settings.parallel == "jit":
        return jit_step(setup.recipe, setup.mesh, state)
    step = pmap_step(setup.recipe, list(setup.mesh.devices.flat))

    def on_devices(state: TrainState, rows: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, _per_device(split_rows(rows, setup.mesh.size), setup.mesh))
        return state, jax.tree.map(lambda a: a[0], metrics)

    return on_devices


def _per_device(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with a leading device axis spread as pmap wants it."""
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))), tree)


def _check_finite(setup: Setup, step: int, metrics: Metrics, saved: int | None = None) -> None:
    """Refuses a loss that is not finite; `saved` is the newest checkpoint, which is looked up if it is left out."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(metrics.loss)))
    if bad.size:
        names = ", ".join(setup.sites.names[i] for i in bad[:4])
        saved = newest(setup.settings.out) if saved is None else saved
        raise UserError(
            f"The loss is not finite at step {step} ({names}); {intact(saved)}; lower lr, or set clip, and go on."
        )


def _clock(setup: Setup) -> Clock:
    peak = matmul_rate(setup.settings.matmul == "bf16", tuple(setup.mesh.devices.flat))
    return Clock(setup.settings.batch * len(setup.sites.names), row_flops(setup.shape, setup.recipe), peak)


def _log(
    setup: Setup, step: int, metrics: Metrics, clock: Clock, sinks: list[Sink], goodput: Goodput
) -> dict[str, float]:
    """Writes a line, and returns the means over sites."""
    per_site: dict[str, np.ndarray] = {name: np.asarray(value) for name, value in metrics._asdict().items()}
    rate, share = clock.lap(step)
    means = {name: float(np.mean(values)) for name, values in per_site.items()}
    means |= {"rows_per_second": rate, "matmul_share": share, "goodput": goodput.share()}
    sites = {
        name: {what: float(values[i]) for what, values in per_site.items()} for i, name in enumerate(setup.sites.names)
    }
    line = {"step": step, "time": time.time(), **means, "sites": sites}
    together(lambda: write_metrics(home_of(setup.settings.out), line))
    for sink in sinks:
        sink(step, means)
    _check_finite(setup, step, metrics)
    return means


def transcoders_of(state: TrainState, sites: SiteSet) -> TranscoderSet:
    """Returns what a state exports, taken apart by group.

    Args:
        state: of the training.
        sites: in the order of its stack.
    """
    stack, config = export_transcoders(state)
    stack = whole(stack)
    stacks: dict[str, Any] = {
        name: jax.tree.map(lambda leaf, at=at: leaf[at], stack) for name, at in sites.slices.items()
    }
    return TranscoderSet(stacks, sites, config, tree_hash(stacks))
