"""Checkpoints of a run (Orbax, written in the background), and the directory that they live in.

1. `locked` lets one process at a time work in a run's directory; the lock goes with the process, however it ends.
   `stop_signal` turns SIGTERM and Ctrl-C into a question that the run asks itself between two steps; `writing` turns a
   full disk into a sentence.
2. `save` writes state and buffer under their paths, and a record of plain values: where the data are, the last metrics,
   and a fingerprint of every array. Orbax shows a checkpoint under its name only when it is complete.
3. `restore` takes the newest checkpoint that can be read and whose arrays have their fingerprints, and tells which ones
   it had to pass over. Arrays go where the current mesh wants them, whatever mesh they were saved from.
"""

import errno
import fcntl
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.transcoders.processes import everywhere, together

CHECKPOINTS = "checkpoints"
Checkpointer = Any
"""Orbax's `training.Checkpointer`; its annotations refuse what its functions take."""
WORDS = 2**22
"""Words of an array in this machine's memory whose fingerprint is computed together."""
_TRAINING: Any = ocp.training
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_SYSTEM_CODE = re.compile(r"os_error_code='(\d+)'")


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: its number.
        trees: name -> tree.
        record: the plain values saved with it.
        passed: newer checkpoints that could not be used, and why.
    """

    step: int
    trees: dict[str, Any]
    record: dict[str, Any]
    passed: list[str]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a run's directory for this process, or for all that have joined.

    Raises:
        UserError: if another process holds it.
    """
    with ExitStack() as held:
        together(lambda: held.enter_context(_lock(directory)))
        yield


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another run is working in {directory}; wait for it, or name another out.") from None
        yield


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Says so where a run's disk is full or read-only, which Orbax reports late, from a thread, and with its own words.

    Raises:
        UserError: then, naming the newest checkpoint.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        found = _SYSTEM_CODE.search(str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        if code not in _NO_ROOM:
            raise
        raise UserError(
            f"{directory} cannot be written ({os.strerror(code)}); {intact(newest(directory))}; make room and go on."
        ) from None


def newest(directory: Path) -> int:
    """Returns the number of a run's newest complete checkpoint, -1 if it has none."""
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def intact(step: int) -> str:
    """Returns half a sentence on what a run that ends with an error has kept."""
    return f"checkpoint {step} is intact" if step >= 0 else "there is no checkpoint yet"


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Turns SIGTERM and Ctrl-C into an answer: the function handed out, asked after every step, says if one has come.

    A second Ctrl-C interrupts at once, as ever. Of several processes each may be told, by SIGTERM alone, at another
    step; JAX then chooses one that none has passed, for all.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: came.is_set()
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: Any) -> None:
        del frame
        came.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, stop)
    try:
        yield lambda step: came.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_checkpoints(directory: Path, keep: int | None) -> Checkpointer:
    """Opens the checkpoints of a run; to be closed, which waits for what is being written.

    Args:
        directory: of the run.
        keep: how many of the newest to keep; None to read alone, also while the run is going on.
    """
    if keep is None:
        return _TRAINING.Checkpointer((directory / CHECKPOINTS).absolute())
    return _TRAINING.Checkpointer(
        (directory / CHECKPOINTS).absolute(),
        preservation_policy=_TRAINING.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpoints: Checkpointer, step: int, trees: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint; the arrays may be reused as soon as this returns.

    Args:
        checkpoints: from `open_checkpoints`.
        step: its number.
        trees: name -> tree of arrays.
        record: plain values to save with it.
    """
    flat = {name: leaf_paths(tree) for name, tree in trees.items()}
    prints = {name: fingerprints(leaves) for name, leaves in flat.items()}
    if jax.default_backend() == "cpu":
        # Here an array and its NumPy view share memory, which the next step would overwrite under the writer.
        flat = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, flat)
    # A step is written again when a run goes on from before a damaged checkpoint of it.
    checkpoints.save_checkpointables_async(
        step, flat, force=True, overwrite=True, custom_metadata={**record, "fingerprints": prints}
    )


def restore(checkpoints: Checkpointer, abstract: Mapping[str, Any]) -> Restored:
    """Reads the newest good checkpoint.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: name -> tree of shapes with the shardings wanted; NumPy's arrays where such are wanted.

    Raises:
        UserError: if there is none.
    """
    passed = []
    for entry in reversed(checkpoints.checkpoints):
        wanted = {name: leaf_paths(tree) for name, tree in abstract.items()}
        flat, record, problem = _read(checkpoints, entry.step, wanted)
        if not everywhere(problem is None):
            passed.append(f"checkpoint {entry.step} {problem or 'cannot be read by another process'}")
            continue
        trees = {
            name: jax.tree.unflatten(jax.tree.structure(tree), [flat[name][path] for path in wanted[name]])
            for name, tree in abstract.items()
        }
        return Restored(entry.step, trees, record, passed)
    reason = "; ".join(passed) or "it has none"
    raise UserError(f"No checkpoint of {checkpoints.directory} can be used: {reason}; start again in another out.")


def _read(checkpoints: Checkpointer, step: int, wanted: dict[str, Any]) -> tuple[Any, Any, str | None]:
    """Returns arrays and record of a checkpoint, and what is wrong with it, None for nothing."""
    try:
        flat = checkpoints.load_checkpointables(step, wanted)
        record = dict(checkpoints.metadata(step).custom_metadata)
        prints = record.pop("fingerprints")
    # Whatever a damaged file makes the readers say, it is damage; an interrupt is not among these.
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        return None, None, f"cannot be read ({type(error).__name__})"
    wrong = [f"{n}.{p}" for n, leaves in flat.items() for p, f in fingerprints(leaves).items() if prints[n][p] != f]
    return flat, record, f"is damaged ({wrong[0]})" if wrong else None


def fingerprints(leaves: Mapping[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Returns a number per array that changes with any of its bits: the sum of its words, each times an odd number."""
    here = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    there = {path: leaf for path, leaf in leaves.items() if path not in here}
    found = {path: int(value) for path, value in _fingerprints(there).items()} if there else {}
    return {path: found[path] if path in found else _fingerprint_here(here[path]) for path in leaves}


def _fingerprint_here(leaf: np.ndarray) -> int:
    """Computes the same of an array in this machine's memory, some words at a time."""
    words = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}")
    total = 0
    for first in range(0, words.size, WORDS):
        part = words[first : first + WORDS].astype(np.uint32)
        weights = np.arange(first, first + part.size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        total += int(np.sum(part * weights, dtype=np.uint32))
    return total % 2**32


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _fingerprint(leaf) for path, leaf in leaves.items()}


def _fingerprint(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    weights = jnp.arange(words.size, dtype=jnp.uint32).reshape(words.shape) * np.uint32(2) + np.uint32(1)
    return jnp.sum(words.astype(jnp.uint32) * weights, dtype=jnp.uint32)
