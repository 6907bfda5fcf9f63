"""Where the tests keep compiled programs, for the next run and for one another.

1. The folder is `difffract-tests` in the user's cache directory, with one folder within it for each version of JAX and
   kind of processor. JAX's own key covers the program, its options and `XLA_FLAGS`.
2. JAX bounds it (what was used longest ago goes first) and locks it, so that runs and their processes can share it.
3. A process that was killed while it wrote can leave half a program; these are removed when a run begins.
4. It is named by environment variables, which worker processes and commands that tests start inherit. Where
   `JAX_COMPILATION_CACHE_DIR` is set already, nothing of this happens.
"""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

MOST_BYTES = 2**30
LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept: each costs a file, and making room looks at all of them."""


def share() -> None:
    """Makes JAX, here and in every process started from here, read and keep compiled programs."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = user_cache() / "difffract-tests" / f"jax-{version('jax')}-{processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_halves(folder)
    except OSError:
        return  # a home that cannot be written costs time alone
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(MOST_BYTES)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(LEAST_SECONDS)


def user_cache() -> Path:
    """The user's cache directory, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())


def processor() -> str:
    """A short name of what this machine's compiled programs may use; JAX's key does not hold it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def remove_halves(folder: Path) -> None:
    """Removes programs without the time of their last use, which JAX writes after a program, under the same lock."""
    with FileLock(folder / ".lockfile"):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
