"""Compiled programs, kept on disk, so that the next run of a command does not compile them again.

1. They lie in `difffract/programs` of the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`), in one folder
   for each version of JAX and kind of processor. JAX's own key covers the program, how it is compiled and for which
   device.
2. A process works on a folder of its own, filled with hard links, and links what it has compiled into the shared folder
   when it ends. A link is there whole or not at all, so that processes at once, or killed ones, never show one another
   half a program. JAX's own bounded cache writes in place and holds a lock for every program that it looks up.
3. The shared folders hold at most `MOST_BYTES`; what was used longest ago goes first.
4. Whatever fails costs time, never a result: without a home that can be written, everything is compiled.
5. Whoever has set `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE` is left to it.

Only the standard library is imported: commands call this before JAX is loaded, and JAX then reads its environment.
"""

import atexit
import contextlib
import hashlib
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

MOST_BYTES = 2**30
PROGRAMS = "*-cache"
"""The names that JAX gives compiled programs."""

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0,  # most programs are small and many: all are kept
    "jax_persistent_cache_enable_xla_caches": "none",  # XLA's own caches put the folder's name into every key
}
_RUNS = ".run-"


def enable_compile_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps what this process compiles for later ones, and uses what earlier ones have left.

    The commands call it; in Python call it once, before the first computation. It changes JAX's settings
    `jax_compilation_cache_dir`, `jax_persistent_cache_min_compile_time_secs` and
    `jax_persistent_cache_enable_xla_caches`.

    Args:
        folder: where programs are kept; None for `difffract/programs` in the user's cache directory.

    Returns:
        The folder of programs; None if JAX's cache is already set by the user, or the folder cannot be written.
    """
    if _set_by_user():
        return None
    root = user_cache() / "programs" if folder is None else Path(folder)
    shared = root / f"jax-{version('jax')}-{processor()}"
    try:
        shared.mkdir(parents=True, exist_ok=True)
        sweep(root)
        bound(root)
        own = link_programs(shared)
    except OSError:
        return None
    atexit.register(_publish_and_remove, own, shared, os.getpid())
    _tell_jax(own)
    return shared


def user_cache() -> Path:
    """Returns the directory of this package in the user's cache directory; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "difffract"


def processor() -> str:
    """Returns a short name of what this machine's compiled programs may use; JAX's key does not hold it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def link_programs(shared: Path) -> Path:
    """Makes a folder for this process beside the shared one, with a link to every program.

    Args:
        shared: folder of finished programs.

    Raises:
        OSError: if the file system has no hard links, or cannot be written.
    """
    own = Path(tempfile.mkdtemp(prefix=f"{_RUNS}{platform.node()}-{os.getpid()}-", dir=shared.parent))
    try:
        for program in shared.glob(PROGRAMS):
            with contextlib.suppress(FileNotFoundError):  # another process has just made room
                os.link(program, own / program.name)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        raise
    return own


def publish(own: Path, shared: Path) -> None:
    """Links the programs of a process, all of them whole, into the shared folder; what is there already stays."""
    for program in own.glob(PROGRAMS):
        with contextlib.suppress(FileExistsError):
            os.link(program, shared / program.name)


def sweep(root: Path) -> None:
    """Removes the folders of this machine's processes that were killed."""
    # The whole name is looked at: another machine may be called like this one with a number behind it.
    ours = re.compile(rf"{re.escape(f'{_RUNS}{platform.node()}')}-(\d+)-[^-]+")
    for own in root.glob(f"{_RUNS}*"):
        match = ours.fullmatch(own.name)
        if match is not None and not _runs(int(match[1])):
            shutil.rmtree(own, ignore_errors=True)


def bound(root: Path, most: int = MOST_BYTES) -> None:
    """Removes programs, least recently used first, until all folders together hold at most so many bytes."""
    held = [(path.stat(), path) for path in root.glob(f"[!.]*/{PROGRAMS}")]
    size = sum(stat.st_size for stat, _ in held)
    for stat, path in sorted(held, key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime)):
        if size <= most:
            return
        path.unlink(missing_ok=True)
        size -= stat.st_size


def _set_by_user() -> bool:
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    jax = sys.modules.get("jax")
    return any(name in os.environ for name in names) or bool(jax and jax.config.jax_compilation_cache_dir)


def _tell_jax(own: Path) -> None:
    """Sets JAX's cache: by its environment, which processes started from here inherit, and in JAX if it is loaded."""
    settings = _SETTINGS | {"jax_compilation_cache_dir": str(own)}
    os.environ |= {name.upper(): str(value) for name, value in settings.items()}
    jax: Any = sys.modules.get("jax")
    if jax is None:
        return
    for name, value in settings.items():
        jax.config.update(name, value)
    # Without it, a process that has compiled already would go on without the cache.
    importlib.import_module("jax.experimental.compilation_cache.compilation_cache").reset_cache()


def _publish_and_remove(own: Path, shared: Path, process: int) -> None:
    if os.getpid() != process:
        return  # a fork, which ends before the process whose folder this is
    with contextlib.suppress(OSError):
        publish(own, shared)
    shutil.rmtree(own, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
