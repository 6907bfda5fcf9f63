"""Compiled programs, kept on disk, so that the next run of a command does not compile them again.

1. They lie in `difffract/programs` of the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`), in one folder
   for each version of JAX and kind of processor. JAX's own key covers the program, how it is compiled and for which
   device.
2. A process works on a folder of its own, filled with hard links, and links what it has compiled into the shared folder
   when it ends, but not what a full disk or Ctrl-C has cut off. A link is there whole or not at all, so that processes
   at once, or killed ones, never show one another half a program. JAX's own bounded cache writes in place and holds a
   lock for every program that it looks up.
3. The shared folders hold at most `MOST_BYTES`; what was used longest ago goes first. What killed processes left goes
   too: those of this machine at once, those of others, as where a home is shared, when it is a month old.
4. Whatever fails costs time, never a result: without a home that can be written, everything is compiled.
5. Whoever has set `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE` is left to it.
6. Programs of several CPU devices are neither kept nor loaded from when `sharding.make_mesh` makes a mesh of such,
   whoever has set the cache: loaded ones may hang, see `compile_cpu_meshes_anew`.

Only the standard library is imported: commands call this before JAX is loaded, and JAX then reads its environment.
"""

import atexit
import contextlib
import hashlib
import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
import zlib
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
_ABANDONED = 30 * 24 * 3600
"""Seconds without a new program after which the folder of another machine's process counts as left behind."""


def enable_compile_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps what this process compiles for later ones, and uses what earlier ones have left.

    The commands call it; in Python call it once, before the first computation. It changes JAX's settings
    `jax_compilation_cache_dir`, `jax_persistent_cache_min_compile_time_secs` and
    `jax_persistent_cache_enable_xla_caches`, and leaves out its warnings on programs that cannot be read or kept.

    Args:
        folder: where programs are kept; None for `difffract/programs` in the user's cache directory.

    Returns:
        The folder of programs; None if JAX's cache is already set by the user, or the folder cannot be written.
    """
    if _set_by_user():
        return None
    try:
        root = user_cache() / "programs" if folder is None else Path(folder)
        shared = root / f"jax-{version('jax')}-{processor()}"
        shared.mkdir(parents=True, exist_ok=True)
        sweep(root)
        bound(root)
        own = link_programs(shared)
    except (OSError, RuntimeError):  # of the latter kind: a user without a home
        return None
    atexit.register(_publish_and_remove, own, shared, os.getpid())
    _tell_jax(own)
    return shared


def compile_cpu_meshes_anew() -> None:
    """Makes JAX pass over its cache for programs of several CPU devices, in one process or in several.

    XLA compiles a program so that its devices run their collectives in one order. What it loads has lost that order:
    of two all-reduces that do not need each other, one device may begin with the first and another with the second,
    and both wait for ever. Programs of one device are loaded as ever, and so are all of TPUs and GPUs.

    `sharding.make_mesh` calls it. It replaces a function of JAX that is not public; in a release that lacks it, this
    process goes on without the cache.
    """
    jax, compiler = (importlib.import_module(name) for name in ("jax", "jax._src.compiler"))
    through_cache, compile_anew = (
        getattr(compiler, name, None) for name in ("compile_or_get_cached", "backend_compile_and_load")
    )
    if getattr(through_cache, "passes_over_cpu_meshes", False):
        return
    if through_cache is None or compile_anew is None:
        jax.config.update("jax_enable_compilation_cache", False)
        importlib.import_module("jax.experimental.compilation_cache.compilation_cache").reset_cache()
        return

    def compile_or_get_cached(
        backend: Any, computation: Any, devices: Any, options: Any, callbacks: Any, runs_on: Any, *others: Any
    ) -> Any:
        if backend.platform == "cpu" and devices.size > 1:
            return compile_anew(backend, computation, runs_on, options, callbacks)
        return through_cache(backend, computation, devices, options, callbacks, runs_on, *others)

    compile_or_get_cached.passes_over_cpu_meshes = True  # type: ignore[attr-defined]
    compiler.compile_or_get_cached = compile_or_get_cached


def user_cache() -> Path:
    """Returns the directory of this package in the user's cache directory; it need not exist.

    Raises:
        RuntimeError: if the user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative paths do not count, says the specification of base directories: they would mean a folder per directory.
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "difffract"


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
    own = Path(tempfile.mkdtemp(prefix=f"{_RUNS}{_numbering()}-{os.getpid()}-", dir=shared.parent))
    try:
        for program in shared.glob(PROGRAMS):
            with contextlib.suppress(FileNotFoundError):  # another process has just made room
                os.link(program, own / program.name)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        raise
    return own


def publish(own: Path, shared: Path) -> None:
    """Links the programs of a process that are whole into the shared folder; what is there already stays."""
    for program in own.glob(PROGRAMS):
        if program.stat().st_nlink == 1 and _is_whole(program):  # others came from the shared folder
            with contextlib.suppress(FileExistsError):
                os.link(program, shared / program.name)


def _is_whole(program: Path) -> bool:
    """Says whether JAX can unpack a program that it has written."""
    packer: Any = sys.modules.get("jax._src.compilation_cache")
    unpack = getattr(packer, "decompress_executable", None)
    if unpack is None:
        return True
    zstd = getattr(packer, "zstd", None) or getattr(packer, "zstandard", None)  # if it is installed; else zlib packs
    errors = (zlib.error,) if zstd is None else (zlib.error, zstd.ZstdError)
    try:
        unpack(program.read_bytes())
    except errors:
        return False
    return True


def sweep(root: Path) -> None:
    """Removes the folders of processes that were killed; those of other machines when they are old."""
    for own in root.glob(f"{_RUNS}*"):
        if _is_abandoned(own):
            shutil.rmtree(own, ignore_errors=True)


def _is_abandoned(own: Path) -> bool:
    numbering, _, process = own.name.removeprefix(_RUNS).rpartition("-")[0].rpartition("-")
    if numbering == _numbering():
        return not _runs(int(process))
    try:
        return time.time() - own.stat().st_mtime > _ABANDONED
    except FileNotFoundError:  # another process has just removed it
        return False


def _numbering() -> str:
    """Returns a short name of what gives processes their numbers: this start of this machine, or a container on it."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:8]


def bound(root: Path, most: int = MOST_BYTES) -> None:
    """Removes programs, least recently used first, until all folders together hold at most so many bytes."""
    held = []
    for path in root.glob(f"[!.]*/{PROGRAMS}"):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            held.append((path.stat(), path))
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
    # On a full disk there would be two lines for every program.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
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
