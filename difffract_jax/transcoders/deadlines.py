"""Processes that wait in vain for one another: what JAX says then, as a part of a sentence.

1. At first each waits `START_UP` seconds until all have come to the address of the first; then JAX aborts it from C++.
2. When devices are asked for, each waits two minutes for the others to list theirs.
3. On CPUs, Gloo connects the processes when a program first spans some set of devices, and waits 30 s for each.
   Neither JAX nor XLA has a setting for that.
4. Who comes later than that finds the others gone.
5. Within a program a process waits for what another sends, on CPUs half an hour.

`lifeline.joined` tells these sentences, each with what to do.
"""

import re
import sys
from typing import Any

START_UP = 300
"""Seconds in which all processes must have come together."""
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_WAITED = re.compile(r"duration: ((?:[\d.]+(?:ms|s|m|h))+)|waiting ((?:[\d.]+)ms)")
_GONE = re.compile(r"Gloo .*failed|UNAVAILABLE|detected fatal errors", re.DOTALL)


def is_deadline(said: str) -> bool:
    """Says whether a message of JAX means that it has waited for another process in vain."""
    if "Unable to initialize backend" in said and "GetKeyValue" not in said:
        return False  # a driver or a device that is in use, which no other process can help
    return "DEADLINE_EXCEEDED" in said or "Timed out waiting" in said


def waited(said: str) -> float | None:
    """Returns the seconds that a message says were waited; None where it does not say."""
    match = _WAITED.search(said)
    if match is None:
        return None
    parts = re.findall(r"([\d.]+)(ms|s|m|h)", match[1] or match[2])
    return round(sum(float(number) * _UNITS[unit] for number, unit in parts), 3)


def not_together(said: str, join: str) -> str | None:
    """Returns why processes did not come together; None for a message about something else.

    Args:
        said: the message, of an error or before C++ ended the process.
        join: as the option of this name has it.
    """
    number, count = _expected(join)
    everybody = f"all {count} processes" if count else "all processes"
    this = "this process" if number is None else f"process {number}"
    if "GetKeyValue" in said and is_deadline(said):
        return (
            f"Not {everybody} came to their first shared computation within {waited(said) or START_UP:g} s, and {this} "
            "waits no longer; a host may be slow or short of memory, or a process may have ended"
        )
    if is_deadline(said):
        place = f" to {join.partition(',')[0]}" if "," in join else " together"
        return (
            f"Not {everybody} came{place} within {START_UP} s, and {this} waits no longer; they must be started within "
            "that time of one another, and reach the first one's address"
        )
    if _GONE.search(said) and "Unable to initialize backend" not in said:
        return f"Another of {everybody} had ended when {this} came to their first shared computation"
    return None


def _expected(join: str) -> tuple[int | None, int | None]:
    """Returns this process's number and how many there are to be, as far as that is known before they have met."""
    numbers = join.split(",")[1:]
    if numbers:
        return int(numbers[0]), int(numbers[1])
    # What JAX has found by itself; its public functions would wait for the others.
    state: Any = getattr(sys.modules.get("jax._src.distributed"), "global_state", None)
    count = getattr(state, "num_processes", 1)
    return (state.process_id, count) if count > 1 else (None, None)
