"""Checkpoints of a run, written in the background, and the directory that they live in.

1. `locked` lets one process at a time work in a run's directory; the lock goes with the process, however it ends.
   `noted_sigterm` and `stop_signal` turn SIGTERM and Ctrl-C into a question that the run asks itself between two steps;
   `writing` turns a full disk into a sentence.
2. `save` writes state and buffer under their paths, and a record of plain values: where the data are, the last metrics,
   and a fingerprint of every array. Orbax shows a checkpoint under its name only when it is complete; those of a run in
   a bucket are in `bucket_checkpoints`.
3. `restore` takes the newest checkpoint that can be read and whose arrays have their fingerprints, and tells which ones
   it had to pass over. Arrays go where the current mesh wants them, whatever mesh they were saved from.
"""

import errno
import fcntl
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.claims import Claim, claimed
from difffract_jax.storage.remote.failures import Damaged, StorageError
from difffract_jax.transcoders.bucket_checkpoints import BucketCheckpoints, newest_in
from difffract_jax.transcoders.processes import everywhere, jointly, texts, together
from difffract_jax.transcoders.run_place import home_of

CHECKPOINTS = "checkpoints"
WORDS = 2**22
"""Words of an array in this machine's memory whose fingerprint is computed together."""
_TRAINING: Any = ocp.training
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What file systems without locks answer; there a run goes without, as other outputs do."""
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


@runtime_checkable
class Checkpoints(Protocol):
    """Checkpoints of a run; every method but `close` is called by all of its processes alike.

    Attributes:
        name: where they lie, as it is told.
    """

    name: str

    def begin(self, started: float | None) -> int:
        """Clears up what an earlier start has left; returns the newest checkpoint, -1 for none.

        Args:
            started: when the run first was; None for one that begins now.
        """
        ...

    def steps(self) -> list[int]:
        """Returns the complete checkpoints in their order."""
        ...

    def write(self, step: int, flat: Any, record: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays may be reused as soon as this returns."""
        ...

    def read(self, step: int, wanted: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns arrays, by tree and path, and the values saved with them."""
        ...

    def finish(self) -> None:
        """Waits until what is being written is complete, and raises if it could not be."""
        ...

    def close(self) -> None:
        """Ends what works in the background."""
        ...


@contextmanager
def locked(directory: Path) -> Iterator[Callable[[], None]]:
    """Holds a run's directory for this process, or for all that have joined.

    Yields:
        A function that raises a `UserError` where another process has taken the run over, as can be in a bucket; it
        does something in the first process alone.

    Raises:
        UserError: if another process holds it.
    """
    with ExitStack() as held:
        claims: list[Claim] = []
        if is_remote(directory):
            together(lambda: claims.append(held.enter_context(claimed(parse_address(directory)))))
        else:
            together(lambda: held.enter_context(_lock(directory)))

        def allowed() -> None:
            for claim in claims:
                claim.check()

        yield allowed


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another run is working in {directory}; wait for it, or name another out.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
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
            f"{home_of(directory)} cannot be written ({os.strerror(code)}); {intact(newest(directory))}; make room and "
            "go on."
        ) from None


def newest(directory: Path) -> int:
    """Returns the number of a run's newest complete checkpoint, -1 if it has none."""
    if is_remote(directory):
        return newest_in(parse_address(directory) / CHECKPOINTS)
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def intact(step: int) -> str:
    """Returns half a sentence on what a run that ends with an error has kept."""
    return f"checkpoint {step} is intact" if step >= 0 else "there is no checkpoint yet"


@contextmanager
def noted_sigterm() -> Iterator[threading.Event]:
    """Notes SIGTERM for a block instead of ending at once: what comes before the first step is answered after it.

    Yields:
        An event that is set once it has come. Of several processes it never is: there SIGTERM is JAX's, which tells the
        others; nor in a thread, where signals cannot be taken.
    """
    came = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_signal(came: threading.Event) -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and Ctrl-C into an answer: the function handed out, asked between steps, says if one has come.

    A second Ctrl-C interrupts at once, as ever. Of several processes each may be told at another moment, or one alone;
    all must ask equally often, and JAX then chooses a time of asking that none has passed, for all.

    Args:
        came: from `noted_sigterm`.
    """
    several, asked = jax.process_count() > 1, count()

    def has_come() -> bool:
        return multihost_utils.reached_preemption_sync_point(next(asked)) if several else came.is_set()

    if threading.current_thread() is not threading.main_thread():
        yield has_come
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        del number, frame
        came.set()
        signal.signal(signal.SIGINT, before)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    try:
        yield has_come
    finally:
        signal.signal(signal.SIGINT, before)


def open_checkpoints(
    directory: Path,
    keep: int | None,
    allowed: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Checkpoints:
    """Opens the checkpoints of a run; to be closed.

    Args:
        directory: of the run.
        keep: how many of the newest to keep; None to read alone, also while the run is going on.
        allowed: from `locked`.
        tell: called with a sentence.
    """
    if is_remote(directory):
        return BucketCheckpoints(directory, CHECKPOINTS, keep, allowed, tell)
    return OrbaxCheckpoints((directory / CHECKPOINTS).absolute(), keep)


class OrbaxCheckpoints:
    """Checkpoints in a directory that all processes see.

    Attributes:
        name: path of the directory.
    """

    def __init__(self, directory: Path, keep: int | None) -> None:
        """Opens them; `keep` as for `open_checkpoints`."""
        options: dict[str, Any] = {}
        if keep is not None:
            policy = _TRAINING.preservation_policies.LatestN(keep)
            options = {"preservation_policy": policy, "cleanup_tmp_directories": True}
        self.name, self._orbax = str(directory), _TRAINING.Checkpointer(directory, **options)

    def begin(self, started: float | None) -> int:
        """Returns the newest checkpoint, -1 for none; Orbax has cleared up already."""
        del started
        return max(self.steps(), default=-1)

    def steps(self) -> list[int]:
        """Returns the complete checkpoints in their order, as the first process sees them.

        A shared disk may show them to others later, who would then go on from other steps.
        """
        mine = sorted(entry.step for entry in self._orbax.checkpoints)
        return list(json.loads(texts(json.dumps(mine))[0]))

    def write(self, step: int, flat: Any, record: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays may be reused as soon as this returns."""
        if jax.default_backend() == "cpu":
            # Here an array and its NumPy view share memory, which the next step would overwrite under the writer.
            flat = jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, flat)
        # A step is written again when a run goes on from before a damaged checkpoint of it.
        self._orbax.save_checkpointables_async(step, flat, force=True, overwrite=True, custom_metadata=dict(record))

    def read(self, step: int, wanted: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns arrays, by tree and path, and the values saved with them."""
        flat = self._orbax.load_checkpointables(step, wanted)
        return flat, dict(self._orbax.metadata(step).custom_metadata)

    def finish(self) -> None:
        """Does nothing: `close` waits."""

    def close(self) -> None:
        """Waits until what is being written is complete, and raises if it could not be."""
        self._orbax.close()


def save(checkpoints: Checkpoints, step: int, trees: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Begins to write a checkpoint; the arrays may be reused as soon as this returns.

    Args:
        checkpoints: from `open_checkpoints`.
        step: its number.
        trees: name -> tree of arrays.
        record: plain values to save with it.
    """
    flat = {name: leaf_paths(tree) for name, tree in trees.items()}
    prints = {name: fingerprints(leaves) for name, leaves in flat.items()}
    checkpoints.write(step, flat, {**record, "fingerprints": prints})


def restore(checkpoints: Checkpoints, abstract: Mapping[str, Any]) -> Restored:
    """Reads the newest good checkpoint.

    Args:
        checkpoints: from `open_checkpoints`.
        abstract: name -> tree of shapes with the shardings wanted; NumPy's arrays where such are wanted.

    Raises:
        UserError: if there is none, or the place cannot be read at all; in every process alike.
    """
    passed: list[str] = []
    tries: list[tuple[Any, Any, str | None]] = []
    for step in reversed(checkpoints.steps()):
        wanted = {name: leaf_paths(tree) for name, tree in abstract.items()}
        jointly(lambda step=step, wanted=wanted: tries.append(_read(checkpoints, step, wanted)))
        flat, record, problem = tries.pop()
        good = everywhere(problem is None)
        if good:  # fingerprints are sums over all devices: they wait for every process
            problem = _damage(flat, record.pop("fingerprints"))
            good = everywhere(problem is None)
        if not good:
            passed.append(f"checkpoint {step} {problem or 'cannot be read by another process'}")
            continue
        trees = {
            name: jax.tree.unflatten(jax.tree.structure(tree), [flat[name][path] for path in wanted[name]])
            for name, tree in abstract.items()
        }
        return Restored(step, trees, record, passed)
    reason = "; ".join(passed) or "it has none"
    raise UserError(f"No checkpoint of {checkpoints.name} can be used: {reason}; start again in another out.")


def _read(checkpoints: Checkpoints, step: int, wanted: dict[str, Any]) -> tuple[Any, Any, str | None]:
    """Returns arrays and record of a checkpoint, and what is wrong with it, None for nothing."""
    try:
        flat, record = checkpoints.read(step, wanted)
        record["fingerprints"].items()
    # Whatever a damaged file makes the readers say, it is damage; an interrupt is not among these.
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error.__cause__, StorageError) and not isinstance(error.__cause__, Damaged):
            raise  # the bucket cannot be read at all
        if isinstance(error.__cause__, OSError) or getattr(error, "errno", None) in _NO_ROOM:
            raise  # nor can a copy be written here
        return None, None, f"cannot be read ({type(error).__name__})"
    return flat, record, None


def _damage(flat: Mapping[str, Any], prints: Mapping[str, Any]) -> str | None:
    """Returns which array is not the one that was saved, by its fingerprint; None if all are."""
    for name, leaves in flat.items():
        for path, found in fingerprints(leaves).items():
            if prints.get(name, {}).get(path) != found:
                return f"is damaged ({name}.{path})"
    return None


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
