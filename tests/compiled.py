"""Where the tests keep compiled programs, for the next run and for one another.

1. The folder is `difffract-tests` in the user's cache directory, with one folder within it for each version of JAX and
   kind of processor. JAX's own key covers the program, how it is compiled and `XLA_FLAGS`.
2. It is bounded when a run begins: what was used longest ago goes first. JAX's own bound looks at every file for each
   that it adds (0.04 s where there are a thousand), and holds a lock meanwhile.
3. Without a lock a process may read what another has half written or just removed, or a killed one left. Programs are
   compressed with a checksum: JAX then warns, which `pyproject.toml` lets pass, and compiles.
4. All is said by environment variables, which worker processes and commands that tests start inherit. Where
   `JAX_COMPILATION_CACHE_DIR` is set already, nothing of this happens.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

MOST_BYTES = 2**30


def share() -> None:
    """Makes JAX, here and in every process started from here, read and keep compiled programs."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "difffract-tests"
    folder = caches / f"jax-{version('jax')}-{processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        bound(caches)
    except OSError:
        return  # a home that cannot be written costs time alone
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Most programs are small and many: all are kept.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def processor() -> str:
    """A short name of what this machine's compiled programs may use; JAX's key does not hold it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def bound(caches: Path, most: int = MOST_BYTES) -> None:
    """Removes programs, least recently used first, until all folders together hold at most so many bytes."""
    found = [(path.stat(), path) for path in caches.glob("*/*-cache")]
    held = sum(stat.st_size for stat, _ in found)
    for stat, path in sorted(found, key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime)):
        if held <= most:
            return
        path.unlink(missing_ok=True)
        held -= stat.st_size
