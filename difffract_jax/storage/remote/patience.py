"""Trying again: what may pass is asked for again after waits that double, each shortened at random.

Waits of one process are thus not those of a thousand others that lost the same server ("full jitter").
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from difffract_jax.storage.remote.failures import Answered, StorageError

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
NOTED = 5.0
"""Seconds; longer waits are told."""


@dataclass(frozen=True)
class Patience:
    """How often a request is made, and how long is waited in between.

    Attributes:
        tries: most times that it is made.
        first: seconds, the longest first wait.
        longest: seconds, the longest of all waits.
        sleep: waits so many seconds.
        chance: returns a number in [0, 1).
    """

    tries: int = 8
    first: float = 0.5
    longest: float = 32.0
    sleep: Callable[[float], object] = time.sleep
    chance: Callable[[], float] = random.random

    def until(self, request: Callable[[], T], what: str) -> T:
        """Makes a request until it succeeds, fails for good, or has been made `tries` times.

        Args:
            request: raises a `StorageError` when it fails; it begins anew each time.
            what: it is about, for the note on long waits.

        Returns:
            What the request returns.

        Raises:
            StorageError: the last one.
        """
        for tried in range(1, self.tries + 1):
            try:
                return request()
            except StorageError as error:
                if not error.passes or tried == self.tries:
                    raise
                wait = self.wait(tried, error)
                if wait >= NOTED:
                    _LOG.info("%s: %s; try %d of %d follows in %.0f s.", what, error, tried + 1, self.tries, wait)
                self.sleep(wait)
        raise AssertionError("tries is at least 1")

    def wait(self, tried: int, error: StorageError) -> float:
        """Returns the seconds to wait after a try that failed.

        Args:
            tried: how many tries there were, at least 1.
            error: the last one's.
        """
        doubled = min(self.longest, self.first * 2 ** (tried - 1))
        wanted = error.after if isinstance(error, Answered) and error.after is not None else 0.0
        return max(min(wanted, self.longest), doubled * self.chance())
