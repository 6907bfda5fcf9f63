"""How much memory and disk there is, as far as this process may use them, and sizes as people write them.

1. `parse_bytes` reads `16GB` and `24GiB`; `text_of_bytes` writes a size for people.
2. `host_memory` is the least of what the machine has, what the control groups of this process allow (a container's
   `--memory`, Slurm's, systemd's), and what its own limits allow (`ulimit -d`, `prlimit --data`, `ulimit -v`).
3. `device_memory` is what an accelerator's allocator says; None for a CPU, whose memory is the host's.
4. `memory_for` is either, capped by what a command's `--memory` allows (`allow`).
5. `share_memory` lets JAX take more of a GPU than it does by itself, before it is loaded.
6. `free_disk` is the space at a path that need not exist yet.

Memory that holds file pages is free for this purpose: the system drops them when it needs room. Nothing here imports
JAX.
"""

import os
import re
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # not a Unix: a process has no limits of its own there
    resource = None

from difffract_jax.config import UserError
from difffract_jax.display import size_text

GPU_SHARE = 0.92
"""Share of a GPU's memory that commands let JAX take; its own default is 0.75, which leaves 6 of 24 GB unused."""
SHARE_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that set it, the second the older name; XLA refuses both at once."""
_UNITS = {"": 1} | {
    f"{prefix}{middle}": base ** (place + 1)
    for middle, base in (("", 1000), ("i", 1024))
    for place, prefix in enumerate("kmgt")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?i?)(b)\s*", re.IGNORECASE)
_LIMITS = (("RLIMIT_DATA", "VmData", "ulimit -d"), ("RLIMIT_AS", "VmSize", "ulimit -v"))
"""Limit of this process, what of it is used in /proc/self/status, and the shell's name of it."""

_allowed: list[int] = []
"""What `allow` has set, if anything."""


class Memory(NamedTuple):
    """Memory of a host or a device.

    Attributes:
        total: bytes that this process could have if it were alone.
        available: bytes of it that it can still take.
        bound: what sets the limit, in words: "the machine", "its control group", "ulimit -d", "the device".
    """

    total: int
    available: int
    bound: str


def parse_bytes(text: str | int, name: str = "memory") -> int:
    """Reads a number of bytes: 16GB is 16 x 10^9, 16GiB is 16 x 2^30.

    Args:
        text: number and unit, B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, in any case; a whole number is bytes.
        name: of what it is, for the error.

    Raises:
        UserError: if it is no such size, or none at all.

    Example:
        >>> parse_bytes("16GB"), parse_bytes("1.5 GiB"), parse_bytes(512)
        (16000000000, 1610612736, 512)
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if isinstance(text, str) and match is None:
        unit = f", as in {text.strip()}GB" if re.fullmatch(r"\s*[\d.]+\s*", text) else ", as in 16GB, 24GiB or 500MB"
        raise UserError(f"{name} must be a size with its unit{unit}, but got {text!r}.")
    size = round(float(match[1]) * _UNITS[match[2].lower()]) if match else int(text)
    if size < 1:
        raise UserError(f"{name} must be more than nothing, but got {text!r}; give a size as in 16GB.")
    return size


def text_of_bytes(size: int) -> str:
    """Returns a number of bytes as messages show it.

    Example:
        >>> text_of_bytes(5_400_000_000)
        '5.0 GiB'
    """
    return size_text(size)


def host_memory(root: Path = Path("/")) -> Memory:
    """Returns the memory of this machine that this process may use: the tightest of all limits.

    Args:
        root: of the file system that holds `proc` and `sys`.
    """
    return min((_machine(root), *_control_groups(root), *_own_limits(root)), key=lambda one: one.available)


def device_memory(device: Any) -> Memory | None:
    """Returns the memory of a JAX device that its allocator may use; None for a CPU, or where it does not say.

    Args:
        device: one of `jax.devices()`.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return None
    total = int(stats["bytes_limit"])
    return Memory(total, max(0, total - int(stats.get("bytes_in_use", 0))), "the device")


def allow(most: int | None) -> None:
    """Sets how much memory this process shall use of what there is, as `--memory` says.

    Args:
        most: bytes; None for all.
    """
    _allowed.clear()
    if most is not None:
        _allowed.append(most)


def memory_for(device: Any) -> Memory:
    """Returns the memory that weights on a device are kept in: the device's own, or the host's, as far as is allowed.

    Args:
        device: one of `jax.devices()`.
    """
    there = device_memory(device) or host_memory()
    most = min(_allowed, default=there.available)
    return Memory(most, most, "--memory") if most < there.available else there


def share_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX take `GPU_SHARE` of a GPU's memory when it starts, unless the user has set a share.

    Args:
        environment: of this process, before JAX is loaded.
    """
    if not any(environment.get(name) for name in SHARE_SETTINGS):
        environment[SHARE_SETTINGS[0]] = str(GPU_SHARE)


def free_disk(path: str | Path) -> int:
    """Returns the free bytes of the disk that a path lies on, or will lie on.

    Args:
        path: of a file or directory, which need not exist.
    """
    given = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (given, *given.parents) if place.exists())).free


def _machine(root: Path) -> Memory:
    """Returns what the machine has; where there is no /proc, all of it counts as available."""
    known = _fields(root / "proc/meminfo")
    total = known.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # as on macOS
    return Memory(total, known.get("MemAvailable", total), "the machine")


def _own_limits(root: Path) -> Iterator[Memory]:
    """Yields what the limits of this process leave it."""
    used = _fields(root / "proc/self/status")
    for name, field, words in _LIMITS if resource is not None else ():
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            yield Memory(soft, max(0, soft - used.get(field, 0)), words)


def _control_groups(root: Path) -> Iterator[Memory]:
    """Yields what the control groups of this process allow, its own and those that it lies in, of either version."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            home, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            home = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        # In a container the path may be that of the host, where there is no such folder: the mount is then its group.
        inner = home / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(home):
                yield from _group(group, *names)


def _group(folder: Path, limit: str, usage: str, *cached: str) -> Iterator[Memory]:
    most, used = _number(folder / limit), _number(folder / usage)
    # "max", and version 1's largest number of whole pages, are no limit.
    if most is None or used is None or most >= 2**60:
        return
    stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    pages = sum(int(stat.get(name, 0)) for name in cached)
    yield Memory(most, max(0, most - max(0, used - pages)), "its control group")


def _number(file: Path) -> int | None:
    words = "".join(_lines(file)).strip()
    return int(words) if words.isdigit() else None


def _fields(file: Path) -> dict[str, int]:
    """Returns the sizes that a file of /proc lists, `Name:   123 kB`, in bytes."""
    found = (re.fullmatch(r"(\w+):\s+(\d+) kB", line.strip()) for line in _lines(file))
    return {match[1]: 1024 * int(match[2]) for match in found if match}


def _lines(file: Path) -> list[str]:
    """Returns a file's lines; none where it is not there or not for us."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
