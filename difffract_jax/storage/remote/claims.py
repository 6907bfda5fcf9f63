"""One process at a time works in a directory of a bucket, for as long as it lives, however it ends.

1. The claim is an object, `difffract-writing.json`, that can be made only if there is none. Its holder writes it anew
   every `BEAT` seconds: a claim that changes has a process behind it.
2. A claim that is found is watched for `LOST` seconds. If it changes, the place is taken. If it does not, its holder is
   gone, and the claim is taken over; of a holder on this very host that is known at once. A claim that `publication`
   has made shows no signs of life, and is never taken over.
3. Whoever takes a claim over, writes it anew or removes it names the version that it has read, and the bucket refuses
   what names another: of several heirs one wins, and a holder that wakes up late overwrites and removes nothing.
4. A holder that was only asleep, or cut off from the network, finds another claim in its place: `Claim.check`, called
   before anything is made visible, then raises.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address
from difffract_jax.storage.remote.bucket import Bucket, open_bucket
from difffract_jax.storage.remote.objects import Stat
from difffract_jax.storage.remote.patience import Patience
from difffract_jax.storage.remote.publication import CLAIM

BEAT, LOST = 10.0, 35.0
"""Seconds between two signs of life; and without one, after which a holder is gone."""
LOOKS = 20
"""How often a claim is looked at in this time."""
_living: set[str] = set()
"""Tokens of the claims that this process holds."""
_ONCE = Patience(tries=1)
"""For what is asked again by itself, or may be left undone, as its claim is missed soon."""


class TakenOver(UserError):
    """A claim of this process is another's by now, or nobody's: what it protects is not this process's any more."""


class Claim:
    """A claim that this process holds.

    Attributes:
        at: address of the directory.
    """

    def __init__(self, at: Address) -> None:
        """Describes this process; nothing is written yet."""
        self.at = at
        self._about = {"process": os.getpid(), "host": socket.gethostname(), "begun": _begun(os.getpid())}
        self._about |= {"numbers": _numbers_of_processes(), "token": secrets.token_hex(8)}
        self._beats, self._alone, self._ended = 0, threading.Lock(), threading.Event()

    def take(self) -> None:
        """Makes the claim, or takes over that of a process that is gone.

        Raises:
            UserError: if another process works in the directory.
        """
        _living.add(self._about["token"])  # before others can read it
        try:
            self._make()
        except BaseException:
            _living.discard(self._about["token"])
            raise
        threading.Thread(target=self._live, name="claim", daemon=True).start()

    def _make(self) -> None:
        """Does what `take` says, but for the signs of life."""
        bucket, key = open_bucket(self.at), (self.at / CLAIM).key
        while not bucket.create(key, self._content()):
            seen = _read(bucket, self.at)
            if seen is None:
                continue
            holder, version = seen
            if "beats" not in holder:
                raise UserError(
                    f"Another process is writing {self.at}: {_named(holder)}; name another out, or, if it was killed, "
                    f"remove {self.at / CLAIM}."
                )
            if (_is_gone(holder) or self._is_still(holder)) and bucket.replace(version, self._content()):
                return  # else another heir was faster, whose claim is looked at next

    def check(self) -> None:
        """Refuses to go on where another process has taken the directory over.

        Raises:
            TakenOver: then.
            UserError: if the bucket cannot be asked.
        """
        with self._alone:
            seen = _read(open_bucket(self.at), self.at)
        if seen is None or not self._is_own(seen[0]):
            by = "is held by nobody any more" if seen is None else f"was taken over by {_named(seen[0])}"
            raise TakenOver(f"{self.at} {by}, so that this run ends; go on with it from one place alone.")

    def release(self) -> None:
        """Ends the signs of life, and removes the claim if it is still this process's."""
        self._ended.set()
        _living.discard(self._about["token"])
        with self._alone, suppress(UserError):
            bucket = self._impatient()
            seen = _read(bucket, self.at)
            if seen is not None and self._is_own(seen[0]):
                bucket.delete_version(seen[1])

    def _is_still(self, holder: dict[str, Any]) -> bool:
        """Waits for a sign of life of another holder; returns whether its claim is there and has not changed."""
        for _ in range(LOOKS):
            time.sleep(LOST / LOOKS)
            now = _read(open_bucket(self.at), self.at)
            if now is None:
                return False
            if now[0] != holder:
                raise UserError(
                    f"Another run is working in {self.at}: {_named(now[0])}; wait for it, or name another out."
                )
        return True

    def _live(self) -> None:
        """Writes the claim anew as long as it is this process's; a bucket that is away for a while may be back."""
        while not self._ended.wait(BEAT):
            with self._alone, suppress(UserError):
                bucket = self._impatient()
                seen = _read(bucket, self.at)
                if self._ended.is_set() or seen is None or not self._is_own(seen[0]):
                    return
                self._beats += 1
                bucket.replace(seen[1], self._content())

    def _is_own(self, holder: dict[str, Any]) -> bool:
        return holder.get("token") == self._about["token"]

    def _impatient(self) -> Bucket:
        """Returns the bucket as one that asks for everything once."""
        bucket = open_bucket(self.at)
        return Bucket(bucket.at, bucket.client, _ONCE)

    def _content(self) -> bytes:
        return json.dumps({**self._about, "beats": self._beats}).encode()


@contextmanager
def claimed(at: Address) -> Iterator[Claim]:
    """Holds a directory of a bucket for a block.

    Args:
        at: its address.

    Raises:
        UserError: if another process holds it.
    """
    claim = Claim(at)
    claim.take()
    try:
        yield claim
    finally:
        claim.release()


def _read(bucket: Bucket, at: Address) -> tuple[dict[str, Any], Stat] | None:
    """Returns what a claim says, and the version that says it; None if there is none."""
    key = (at / CLAIM).key
    while (of := bucket.stat(key)) is not None:
        try:
            content = bucket.read_version(of)
        except UserError:
            if bucket.stat(key) == of:
                raise  # the bucket cannot be asked
            continue  # it was written anew, or went, meanwhile
        try:
            return dict(json.loads(content)), of
        except (ValueError, TypeError):
            return {}, of
    return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Says whether a holder is known to be gone: its number is of this host, and no such process is, or this one."""
    try:
        number, begun = int(holder["process"]), str(holder["begun"])
    except (LookupError, ValueError, TypeError):
        return False
    ours = number == os.getpid() and holder.get("token") not in _living
    return holder.get("numbers") == _numbers_of_processes() != "" and (ours or _begun(number) != begun)


def _numbers_of_processes() -> str:
    """Returns what is the same for all who number processes alike; "" where the kernel does not say.

    The host's name does not tell: containers may share it, and do not see one another's processes.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _begun(process: int) -> str:
    """Returns when a process of this host began, in the kernel's words; "" if there is none, or no such words."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return ""


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process', '?')} on {holder.get('host', '?')}"
