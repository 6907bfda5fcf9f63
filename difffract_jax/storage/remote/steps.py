"""Numbered directories in a bucket that several processes fill together, such as the checkpoints of a training run.

1. Each process sends files of its own with `send`, and last a small one that lists them with their sums.
2. One process calls `finish`, which waits for everybody's list and writes the commit marker over all of it, so that a
   number counts once everything is there, and to readers it is a directory like any other (`publication.listing`).
3. `complete` says which numbers count; `forget` removes one, its marker first.

Files carry the word of the session that sent them: two sessions that write the same number never mix.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.publication import AT_ONCE, MARKER, Entry, mark, remove, upload

SHORTEST, LONGEST = 0.05, 2.0
"""Seconds between two questions whether everybody's list is there."""
PATIENT = 1800.0
"""Seconds after which a process that sends nothing is no longer waited for."""


def complete(at: Address) -> list[int]:
    """Returns the numbers that are complete, in their order.

    Args:
        at: address of the directory that holds the numbered ones.
    """
    return sorted(number for number, whole in _numbers(at).items() if whole)


def incomplete(at: Address) -> list[int]:
    """Returns the numbers of which something is there, but no marker: what a killed session has left."""
    return sorted(number for number, whole in _numbers(at).items() if not whole)


def _numbers(at: Address) -> dict[int, bool]:
    """Returns every number of which something is there, and whether it is complete."""
    numbers: dict[int, bool] = {}
    for stat in open_bucket(at).below(at.key):
        number, _, name = stat.key[len(at.key) + 1 :].partition("/")
        if number.isdecimal():
            numbers[int(number)] = numbers.get(int(number), False) or name == MARKER
    return numbers


def send(at: Address, files: Mapping[str, Path], session: str, process: int) -> None:
    """Writes the files of one process, and then the list of them.

    Args:
        at: address of the numbered directory.
        files: name within it -> file on this machine.
        session: word that everybody's files of this session carry.
        process: number of this process.
    """
    bucket = open_bucket(at)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        entries = pool.map(lambda name: upload(bucket, at, name, files[name])._asdict(), files)
        listed = dict(zip(files, entries, strict=True))
    bucket.write((at / _list_of(session, process)).key, json.dumps(listed).encode())


def finish(at: Address, session: str, processes: int, allowed: Callable[[], None], abandoned: threading.Event) -> None:
    """Waits until every process has sent its files, and writes the marker.

    Args:
        at: address of the numbered directory.
        session: word that everybody's files carry.
        processes: how many there are.
        allowed: raises if the marker may not be written, as another session has taken the place over.
        abandoned: set when it is known that a process will not send its files.

    Raises:
        UserError: if it is abandoned, or a process sends nothing for `PATIENT` seconds.
    """
    bucket, names = open_bucket(at), {_list_of(session, process) for process in range(processes)}
    wait, ends = SHORTEST, time.monotonic() + PATIENT
    while True:
        present = {stat.key[len(at.key) + 1 :] for stat in bucket.below(at.key)} if processes > 1 else names
        if names <= present:
            break
        if abandoned.wait(wait) or time.monotonic() > ends:
            raise UserError(
                f"{at} is not complete, since {len(names - present)} of {processes} processes sent nothing."
            )
        wait = min(LONGEST, 2 * wait)
    entries: dict[str, Entry] = {}
    for name in sorted(names):
        listed = json.loads(bucket.read((at / name).key))
        entries |= {file: Entry.of(entry) for file, entry in listed.items()}
    allowed()
    mark(bucket, at, entries)


def forget(at: Address) -> None:
    """Removes a numbered directory, its marker first.

    Args:
        at: its address.
    """
    bucket = open_bucket(at)
    remove(bucket, [stat.key for stat in bucket.below(at.key)])


def _list_of(session: str, process: int) -> str:
    """Returns the name of the list of what a process has sent."""
    return f"{session}-{process}.json"
