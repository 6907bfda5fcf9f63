"""Checkpoints of a run in a bucket: each process sends the pieces of its own devices, and reads those that it needs.

    RUN/checkpoints/STEP/SESSION-PROCESS.safetensors    the pieces that a process wrote
    RUN/checkpoints/STEP/SESSION-record.json            how every array is cut, and the values saved with it
    RUN/checkpoints/STEP/difffract-complete.json        the commit marker: a step counts once it is there

1. `write` copies the pieces to the host, and a thread writes them to this machine's disk and sends them while steps go
   on. The first process's thread waits for everybody's, and writes the marker (`storage.remote.steps`).
2. If a checkpoint could not be sent, the next one is tried; if that fails too, the run ends. What was not sent stays
   in `unsent` in the run's folder on each host, and `begin` sends it when the run goes on where all of it is; else, and
   once a later one has been sent, it goes.
3. `read` fetches from the parts what this process's devices need, whatever mesh and processes wrote them.

Not Orbax, which wants one directory that all processes see and joins their parts in it by itself.
"""

import json
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from difffract_jax.config import UserError, sentence_of
from difffract_jax.storage.files import TensorFile, write_tensors
from difffract_jax.storage.remote import steps
from difffract_jax.storage.remote.addresses import Address, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import fetch
from difffract_jax.storage.remote.claims import TakenOver
from difffract_jax.storage.remote.publication import listing
from difffract_jax.transcoders.logs import METRICS
from difffract_jax.transcoders.pieces import Piece, assembled, own_pieces, pieces_of
from difffract_jax.transcoders.processes import everywhere, jointly, texts, together
from difffract_jax.transcoders.run_place import home_of

UNSENT, ABOUT = "unsent", "about.json"
Flat = Mapping[str, Mapping[str, Any]]
"""Tree -> path of an array -> the array."""


class _Part(NamedTuple):
    """What this process writes of a checkpoint.

    Attributes:
        step: its number.
        arrays: name of a tensor -> piece of an array.
        record: for the first process, how everything is cut, and the values saved with it.
        started: of the run, by which a part that was not sent is known to be of it.
    """

    step: int
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]
    started: float


class BucketCheckpoints:
    """Checkpoints of a run in a bucket; every method is called by all processes of the run alike.

    Attributes:
        name: address of the checkpoints, as it is written.
    """

    def __init__(
        self, out: Path, folder: str, keep: int | None, allowed: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        """Opens the checkpoints of a run; nothing is asked yet.

        Args:
            out: of the run, in a bucket.
            folder: of the checkpoints within it.
            keep: how many of the newest to keep; None to read alone.
            allowed: raises where another process has taken the run over.
            tell: called with a sentence.
        """
        self._out, self._at = out, parse_address(out) / folder
        self.name = str(self._at)
        self._keep, self._allowed, self._tell = keep, allowed, tell
        self._session = texts(secrets.token_hex(4))[0] if keep is not None else ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._sent: Future[None] | None = None
        self._finished: Future[None] | None = None
        self._abandoned, self._last, self._lost = threading.Event(), -1, False

    def begin(self, started: float | None) -> int:
        """Sends what an earlier start of the run has left, and removes what is not complete.

        Args:
            started: when the run first was; None for one that begins now.

        Returns:
            The newest checkpoint; -1 if there is none.
        """
        unsent = home_of(self._out) / UNSENT
        mine = [] if started is None else _unsent_steps(unsent, started)
        on_all = set.intersection(*(set(json.loads(text)) for text in texts(json.dumps(mine))))
        kept, newest = max(on_all, default=-1), max(self.steps(), default=-1)
        if kept > newest:
            self._send_again(unsent, kept)
            newest = kept
        for folder in list(unsent.glob("*")):  # also those of processes that there are no longer
            shutil.rmtree(folder, ignore_errors=True)
        together(self._clear)
        return newest

    def steps(self) -> list[int]:
        """Returns the complete checkpoints in their order, as the first process sees them."""
        listed: list[int] = []
        together(lambda: listed.extend(steps.complete(self._at)))
        return list(json.loads(texts(json.dumps(listed))[0]))

    def write(self, step: int, flat: Flat, record: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays may be reused as soon as this returns.

        Args:
            step: its number.
            flat: its arrays.
            record: plain values to save with it; `started` among them.

        Raises:
            UserError: if neither the one before nor this one could be sent, or the run was taken over.
        """
        failed = self._settled()
        if failed and any(texts("lost" if self._lost else "")):
            raise UserError(f"{failed}.")
        arrays, layout = {}, {}
        for tree, leaves in flat.items():
            for path, leaf in leaves.items():
                name = f"{tree}/{path}"
                layout[name] = {"shape": list(leaf.shape), "pieces": [list(piece) for piece in pieces_of(leaf)]}
                arrays |= {f"{name}@{number}": piece for number, piece in own_pieces(leaf).items()}
        about = {"session": self._session, "arrays": layout, "values": dict(record)}
        self._begin(_Part(step, arrays, about, record["started"]))
        if failed:
            self._tell(f"{failed}; checkpoint {step} is sent instead.")
            self.finish()

    def read(self, step: int, wanted: Flat) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Reads a checkpoint; of its parts this process fetches what its devices need.

        Args:
            step: its number.
            wanted: shape, type and sharding of the arrays.

        Returns:
            The arrays, and the values saved with them.
        """
        at = self._at / str(step)
        there = listing(at)
        names = [name for name in there.files if name.endswith("-record.json")]
        about = json.loads((fetch(there, names) / names[0]).read_text(encoding="utf-8"))

        @cache
        def part(process: int) -> TensorFile:
            name = f"{about['session']}-{process}.safetensors"
            return TensorFile(fetch(there, [name], by_range=True) / name)

        def leaf(name: str, like: Any) -> Any:
            cut = about["arrays"][name]
            if tuple(cut["shape"]) != tuple(like.shape):
                raise ValueError(f"{name} has shape {cut['shape']}")
            pieces = [Piece(process, tuple(begin), tuple(end)) for process, begin, end in cut["pieces"]]

            def read(number: int, index: tuple[slice, ...]) -> np.ndarray:
                return part(pieces[number].process).part(f"{name}@{number}", index)

            return assembled(like, pieces, read)

        flat = {
            tree: {path: leaf(f"{tree}/{path}", one) for path, one in each.items()} for tree, each in wanted.items()
        }
        return flat, about["values"]

    def finish(self) -> None:
        """Waits until what is being written is complete.

        Raises:
            UserError: in every process, if it could not be sent; it says where it is kept.
        """
        failed = self._settled()
        if failed:
            raise UserError(f"{failed}; {self._what_is_kept()}")

    def close(self) -> None:
        """Ends the thread; what has no part of another process yet is given up."""
        if self._sent is not None and not self._sent.done():
            self._sent.exception()
        self._abandoned.set()
        self._thread.shutdown()

    def _begin(self, part: _Part) -> None:
        """Hands a part to the thread."""
        self._abandoned.clear()
        log = home_of(self._out) / METRICS
        text = log.read_bytes() if log.is_file() else b""  # as it is now: lines of later steps are not of this one
        sent = self._sent = self._thread.submit(self._send, part)
        first = jax.process_index() == 0
        self._finished = self._thread.submit(self._complete, part.step, text, sent) if first else None
        self._last = part.step

    def _send(self, part: _Part) -> None:
        folder = home_of(self._out) / UNSENT / f"{part.step}-{_mine()}"
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        kinds = [(name, array.dtype, array.shape) for name, array in part.arrays.items()]
        write_tensors(partial / _tensors(self._session), kinds, part.arrays.values())
        if jax.process_index() == 0:
            (partial / _record(self._session)).write_text(json.dumps(part.record), encoding="utf-8")
        about = {"started": part.started, "session": self._session}
        (partial / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        partial.rename(folder)
        self._upload(folder, part.step, self._session)

    def _upload(self, folder: Path, step: int, session: str) -> None:
        """Sends what a folder holds of a checkpoint."""
        files = {path.name: path for path in folder.iterdir() if path.name != ABOUT}
        steps.send(self._at / str(step), files, session, jax.process_index())

    def _complete(self, step: int, log: bytes, sent: Future[None], session: str | None = None) -> None:
        """Writes the marker once everybody has sent a part, and removes checkpoints that are not kept."""
        sent.result()
        at, count = self._at / str(step), jax.process_count()

        def allowed() -> None:
            try:
                self._allowed()
            except TakenOver:
                self._lost = True
                raise
            place = parse_address(self._out) / METRICS
            open_bucket(place).write(place.key, log)

        steps.finish(at, session or self._session, count, allowed, self._abandoned)
        with suppress(UserError, OSError):  # this one is complete, whatever becomes of old ones; the next tries again
            # Later ones are those that were passed over as damaged: they must not push out the ones that are good.
            before = [each for each in steps.complete(self._at) if each <= step]
            for old in before[: -(self._keep or 1)]:
                steps.forget(self._at / str(old))

    def _settled(self) -> str:
        """Waits for the checkpoint that is being written; returns what went wrong with it, "" for nothing.

        In every process the same, and without the full stop.
        """
        if self._sent is None:
            return ""
        unsent = [each for each in texts(_problem(self._sent)) if each]
        if unsent:  # or the first process would wait for a part that does not come
            self._abandoned.set()
        unmarked = [each for each in texts(_problem(self._finished)) if each]
        self._sent = self._finished = None
        if unsent + unmarked:
            return (unsent + unmarked)[0].removesuffix(".")
        for folder in (home_of(self._out) / UNSENT).glob(f"*-{_mine()}"):  # earlier ones that could not be sent, too
            shutil.rmtree(folder, ignore_errors=True)
        return ""

    def _what_is_kept(self) -> str:
        """Returns what becomes of the checkpoint that could not be sent, as the end of a sentence."""
        folder, every = home_of(self._out) / UNSENT / f"{self._last}-{_mine()}", ", and likewise on every other host"
        if not everywhere(folder.is_dir()):
            return f"checkpoint {self._last} could not be kept; go on from the one before with --resume."
        return (
            f"checkpoint {self._last} is complete, but not in the bucket: it is kept in {folder}"
            f"{every if jax.process_count() > 1 else ''}; go on from here with --resume, which sends it first."
        )

    def _send_again(self, unsent: Path, step: int) -> None:
        """Sends a checkpoint that is complete on all hosts."""
        folder = unsent / f"{step}-{_mine()}"
        session = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["session"]
        jointly(lambda: self._upload(folder, step, session))
        log = home_of(self._out) / METRICS
        done: Future[None] = Future()
        done.set_result(None)
        together(lambda: self._complete(step, log.read_bytes() if log.is_file() else b"", done, session))
        self._tell(f"Checkpoint {step}, which was kept on this machine, is in the bucket now.")

    def _clear(self) -> None:
        """Removes checkpoints that are not complete: a session that was killed has left them."""
        for step in steps.incomplete(self._at):
            steps.forget(self._at / str(step))


def newest_in(checkpoints: Address) -> int:
    """Returns the number of the newest complete checkpoint, -1 if there is none.

    Args:
        checkpoints: address of the directory of all.
    """
    return max(steps.complete(checkpoints), default=-1)


def _unsent_steps(folder: Path, started: float) -> list[int]:
    """Returns the checkpoints of a run of which this process has a part that was not sent."""
    unsent = []
    for path in folder.glob(f"*-{_mine()}"):
        try:
            about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            if about["started"] == started:
                unsent.append(int(path.name.partition("-")[0]))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return unsent


def _problem(work: "Future[None] | None") -> str:
    """Waits for a thread's work; returns what went wrong with it, "" for nothing."""
    try:
        if work is not None:
            work.result()
    except (UserError, OSError) as error:
        return sentence_of(error)
    return ""


def _mine() -> str:
    return f"{jax.process_index()}-of-{jax.process_count()}"


def _tensors(session: str) -> str:
    return f"{session}-{jax.process_index()}.safetensors"


def _record(session: str) -> str:
    return f"{session}-record.json"
