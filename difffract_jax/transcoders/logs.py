"""What a run writes about itself while it goes: one line of JSON per `log_every` steps, and optional extras.

Each line has the step, rows and seconds, goodput, the means over sites, and every site's own numbers. A resumed run
drops the lines of steps that it does again. TensorBoard and Weights & Biases get the means.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import atomic_file

PROFILED = (5, 8)
"""Steps, counted from the run's first, between which the profiler is on."""
METRICS = "metrics.jsonl"
Sink = Callable[[int, Mapping[str, float]], None]


def cut_metrics(directory: Path, step: int) -> None:
    """Drops the lines of later steps than `step`, and a last line that was cut off."""
    path = directory / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    with atomic_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def write_metrics(directory: Path, record: Mapping[str, Any]) -> None:
    """Adds one line."""
    with (directory / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def open_sinks(directory: Path, tensorboard: bool, project: str | None, settings: Mapping[str, Any]) -> list[Sink]:
    """Opens the optional logs.

    Args:
        directory: of the run.
        tensorboard: whether to write TensorBoard events.
        project: Weights & Biases project; None for none.
        settings: of the run.

    Raises:
        UserError: if the extra is not installed.
    """
    sinks: list[Sink] = []
    if tensorboard:
        writer = _extra("tensorboardX", "tensorboard").SummaryWriter(str(directory / "tensorboard"))

        def to_tensorboard(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        sinks.append(to_tensorboard)
    if project is not None:
        run = _extra("wandb", "wandb").init(project=project, dir=str(directory), config=dict(settings), resume="allow")
        sinks.append(lambda step, values: run.log(dict(values), step=step))
    return sinks


def _extra(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(
            f"This log needs the extra `{extra}`: pip install 'difffract_jax[{extra}]'; or leave it out."
        ) from None


class Clock:
    """Time between two lines of the log.

    Attributes:
        rows: rows of all sites in a step.
        row_flops: floating point operations that a row needs.
        peak: operations per second that the devices manage in a plain matrix product.
    """

    def __init__(self, rows: int, row_flops: int, peak: float) -> None:
        self.rows, self.row_flops, self.peak = rows, row_flops, peak
        self.since, self.step = time.perf_counter(), -1

    def lap(self, step: int) -> tuple[float, float]:
        """Returns rows per second and the share of the matmul rate since the last lap."""
        now = time.perf_counter()
        steps = step - self.step if self.step >= 0 else 0
        rate = steps * self.rows / (now - self.since)
        self.since, self.step = now, step
        return rate, rate * self.row_flops / self.peak


class Goodput:
    """Share of a run's time, from its first start on, in which it took steps that were kept, or made rows for them.

    The rest is what a run loses: starting and compiling, the first rows, checkpoints, waiting to be started again, and
    steps after the last checkpoint before it was killed, which are done twice.

    Attributes:
        useful: seconds of such steps, up to the last pause.
    """

    def __init__(self, started: float, useful: float) -> None:
        """Goes on from a checkpoint.

        Args:
            started: when the run was first started, in seconds since the epoch.
            useful: seconds of the steps before the checkpoint.
        """
        self.started, self.useful = started, useful
        self._since: float | None = None

    def go_on(self) -> None:
        """Counts from now on."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Counts no longer."""
        if self._since is not None:
            self.useful += time.monotonic() - self._since
        self._since = None

    def share(self) -> float:
        """Returns the share up to now, in [0, 1]."""
        more = 0.0 if self._since is None else time.monotonic() - self._since
        return min(1.0, (self.useful + more) / max(time.time() - self.started, 1e-9))


@lru_cache(maxsize=8)
def matmul_rate(bf16: bool, devices: tuple[Any, ...]) -> float:
    """Returns the floating point operations per second of square matrix products, best of three, on all devices.

    They are measured once in a process, and remembered.

    On an accelerator a product must be large, and several must run in one program, or starting them is what is timed.
    Virtual devices of a CPU share its cores: their number does not count.

    Args:
        bf16: precision of the factors.
        devices: of one kind.
    """
    size, repeats, count = (1024, 1, 1) if devices[0].platform == "cpu" else (4096, 16, len(devices))
    a = jnp.full((size, size), 1 / size, jnp.bfloat16 if bf16 else jnp.float32)

    @jax.jit
    def products(a: jax.Array) -> jax.Array:
        def multiply(_: Any, b: jax.Array) -> jax.Array:
            return jnp.matmul(b, a, preferred_element_type=jnp.float32).astype(a.dtype)

        return jax.lax.fori_loop(0, repeats, multiply, a)

    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(products(a))
        times.append(time.perf_counter() - start)
    return count * repeats * 2 * size**3 / min(times[1:])


@contextmanager
def profiled(directory: Path, wanted: bool, first: int) -> Iterator[Callable[[int, Any], None]]:
    """Hands out a function to call after every step, which turns the profiler on and off.

    Args:
        directory: of the run; the trace goes into `profile`.
        wanted: whether to profile at all.
        first: step that the run begins or goes on with.
    """
    running = False

    def after(step: int, metrics: Any) -> None:
        nonlocal running
        if wanted and step - first == PROFILED[0]:
            # Without Python's own calls: the hook into every thread has crashed the interpreter, and a run with it.
            recorded = jax.profiler.ProfileOptions()
            recorded.python_tracer_level = 0
            jax.profiler.start_trace(str(directory / "profile"), profiler_options=recorded)
            running = True
        if running and step - first == PROFILED[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            running = False

    try:
        yield after
    finally:
        if running:
            jax.profiler.stop_trace()
