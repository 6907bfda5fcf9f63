"""Where the tests keep compiled programs, for the next run and for one another.

1. The folder is `difffract-tests` in the user's cache directory, with one folder within it for each version of JAX and
   kind of processor, as for users: `difffract_jax/storage/compile_cache.py`, loaded here by its path, since it must run
   before JAX and the package are imported.
2. Unlike users' processes, those of a test run share the folder as it is: what one compiles another reads at once. So a
   process may read what another has half written or just removed, or a killed one left. Programs are compressed with a
   checksum: JAX then warns, which `pyproject.toml` lets pass, and compiles.
3. It is bounded when a run begins.
4. All is said by environment variables, which worker processes and commands that tests start inherit. Where
   `JAX_COMPILATION_CACHE_DIR` is set already, nothing of this happens.
"""

import os
import runpy
from importlib.metadata import version
from pathlib import Path

CACHE = runpy.run_path(str(Path(__file__).parents[1] / "difffract_jax" / "storage" / "compile_cache.py"))


def share() -> None:
    """Makes JAX, here and in every process started from here, read and keep compiled programs."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    caches = CACHE["user_cache"]().with_name("difffract-tests")
    folder = caches / f"jax-{version('jax')}-{CACHE['processor']()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        CACHE["bound"](caches)
    except OSError:
        return  # a home that cannot be written costs time alone
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Most programs are small and many: all are kept.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
