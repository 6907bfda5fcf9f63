"""`train --max-restarts N`: a process that starts the run, and starts it again when something has ended it.

1. `supervise` runs the same command as a child and waits for it. SIGTERM is handed on, and the child saves.
2. It is started again when a signal has killed it, or when it says by its exit status that another process's death has
   ended it; with mistakes that another start would only repeat, it is left at that. Each restart waits twice as long as
   the one before.
3. The child goes on from the newest checkpoint if there is a run to go on with, also the first: so a scheduler may give
   the same command again.

On several hosts each has such a process; all runs end when one dies, so that all are started again.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import typer

from difffract_jax.transcoders.settings import SUPERVISED, TRY_AGAIN

PROGRAM = (sys.executable, "-m", "difffract_jax")
FIRST_WAIT = 1.0
"""Seconds before the first restart."""
LONGEST_WAIT = 300.0


def is_supervised() -> bool:
    """Says whether this process was started by `supervise`."""
    return SUPERVISED in os.environ


def supervise(most: int, arguments: Sequence[str], *, first_wait: float = FIRST_WAIT) -> int:
    """Runs `difffract ARGUMENTS` until it ends well, or may not be started again.

    Args:
        most: how many restarts there may be.
        arguments: of the command line.
        first_wait: seconds before the first restart.

    Returns:
        The exit status to leave with.
    """
    terminated = threading.Event()
    child: subprocess.Popen | None = None

    def hand_on(number: int, frame: Any) -> None:
        del frame
        terminated.set()
        if child is not None and number == signal.SIGTERM:  # a terminal sends Ctrl-C to both
            child.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for restarts in range(most + 1):
            environment = os.environ | {SUPERVISED: str(restarts)}
            child = subprocess.Popen([*PROGRAM, *arguments], env=environment)
            if terminated.is_set():
                child.send_signal(signal.SIGTERM)
            status = child.wait()
            if status == 0 or terminated.is_set() or not (status < 0 or status == TRY_AGAIN):
                return status if status >= 0 else 128 - status
            said = f"was killed by {signal.Signals(-status).name}" if status < 0 else "ended with another process"
            if restarts == most:
                times = "once" if most == 1 else f"{most} times"
                typer.echo(f"Error: The run {said}, and was restarted {times} already; see why, and go on.", err=True)
                return 1
            wait = min(first_wait * 2**restarts, LONGEST_WAIT)
            typer.echo(f"Note: the run {said}; restart {restarts + 1} of {most} in {wait:g} s.", err=True)
            if terminated.wait(wait):
                return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1
