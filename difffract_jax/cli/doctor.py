"""`difffract doctor`: what this machine has, what is installed, where things are kept, and what fits.

1. Devices are asked for in a process of its own with a time limit: a driver or another program's TPU may never answer.
2. Versions come from what is installed, without importing it; a package that is absent is a word in a table.
3. Memory and disk are those that this process may use (`memory`).
4. What fits is counted from shapes (`estimate`), for every kind of device that was found and for the host.

Whatever is missing or fails is told in its place; the command itself ends well.
"""

import json as json_text
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from difffract_jax.cli import options as opt
from difffract_jax.memory import SHARE_SETTINGS, free_disk, host_memory, text_of_bytes

EXTRAS = {
    "cuda13": ("jax-cuda13-plugin",),
    "cuda12": ("jax-cuda12-plugin",),
    "tpu": ("libtpu",),
    "torch": ("torch", "diffusers"),
    "hub": ("huggingface_hub",),
    "gcs": ("google-auth", "google-crc32c", "requests"),
    "s3": ("botocore",),
    "data": ("datasets", "pyarrow"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "networkx": ("networkx",),
    "notebook": ("anywidget", "traitlets"),
}
"""Extra -> the packages that it brings."""
PATIENCE = 60.0
"""Seconds that JAX may take to find its devices; a TPU takes about ten."""
MOST_FILES = 200_000
"""Files of a cache whose sizes are added up; more are told as "more than"."""
PROBE = """
import json, jax
found = [[d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")] for d in jax.local_devices()]
print(json.dumps([jax.default_backend(), found]))
"""
FLUX = {"model": "flux-schnell", "text_tokens": 512}
SIZES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("organism: trace", "trace", {"model": "organism", "transcoders": "organism", "sites": ("*/*",)}),
    ("FLUX.1-schnell: generate, 1024 px", "generate", FLUX),
    ("FLUX.1-schnell: generate, 512 px", "generate", FLUX | {"height": 512, "width": 512}),
    (
        "FLUX.1-schnell: trace of 16 double blocks, 512 px",
        "trace",
        FLUX | {"height": 512, "width": 512, "sites": ("img/3-18", "txt/3-18")},
    ),
)
"""What is counted: name, command, settings."""
TRAINED = "FLUX.1-schnell: train at 3 double blocks"
TROUBLE = (OSError, RuntimeError, ValueError, AssertionError, ImportError, subprocess.SubprocessError)


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(doctor)


def doctor(json: opt.Json = False) -> None:
    """Say what this machine has and lacks: devices, versions, memory, disk, caches, and what fits.

    Give its output when you report a problem. `difffract plan` counts other sizes, and devices that are elsewhere.

    Example: `difffract doctor`; for machines, `difffract doctor --json`
    """
    found = devices()
    os.environ["JAX_PLATFORMS"] = "cpu"  # from here on shapes alone are counted
    from difffract_jax.cli.output import emit

    sections = {"devices": found["devices"], **_trouble(found), "memory": _memory(), "disk": _disk()}
    result = {"versions": _versions()} | sections | {"extras": _extras(), "what fits": _fits(found["devices"])}
    emit(result if json else _for_people(result), as_json=json)


def devices(code: str = PROBE, patience: float = PATIENCE) -> dict[str, Any]:
    """Asks JAX for its devices in a process of its own.

    Args:
        code: that the process runs.
        patience: seconds to wait for it.

    Returns:
        Under `devices` a row per kind of device: platform, kind, how many, bytes that JAX may use; under `trouble` what
        went wrong, if anything did.
    """
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience)
        _, listed = json_text.loads(run.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        what = f"JAX did not find its devices within {patience:.0f} s; another program may hold them"
        return {"devices": [], "trouble": f"{what}, or set JAX_PLATFORMS=cpu to do without."}
    except (OSError, ValueError, IndexError):
        said = run.stderr.strip().splitlines() if "run" in locals() else []
        return {"devices": [], "trouble": f"JAX cannot start: {said[-1] if said else 'it says nothing'}"}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, name, limit in listed:
        row = rows.setdefault((kind, name), {"platform": kind, "kind": name, "count": 0, "memory for JAX": limit})
        row["count"] += 1
    return {"devices": list(rows.values()), "trouble": None}


def _trouble(found: dict[str, Any]) -> dict[str, Any]:
    return {} if found["trouble"] is None else {"trouble": found["trouble"]}


def _versions() -> dict[str, Any]:
    names = ("difffract_jax", "jax", "jaxlib", "flax", "numpy")
    told = {name: _version(name) for name in names} | {"python": sys.version.split()[0]}
    told |= {"system": f"{os.uname().sysname} {os.uname().machine}"}
    return told | {"NVIDIA driver": _driver()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Returns the driver's version and the GPUs it knows; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    return "; ".join(run.stdout.strip().splitlines()) or f"nvidia-smi fails: {run.stderr.strip()[:100]}"


def _memory() -> dict[str, Any]:
    try:
        there = host_memory()
    except TROUBLE as error:
        return {"host": None, "trouble": str(error)}
    share = next((f"{name}={os.environ[name]}" for name in SHARE_SETTINGS if os.environ.get(name)), "JAX's 75%")
    return {"host": there.total, "free": there.available, "limited by": there.bound, "share of a GPU": share}


def _disk() -> list[dict[str, Any]]:
    """Returns a row per place where files are kept: where it lies, what it holds, what is free."""
    from difffract_jax.storage.compile_cache import MOST_BYTES, user_cache

    environment = os.environ
    home = Path(environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    places = {
        "working directory": Path.cwd(),
        f"compiled programs, at most {text_of_bytes(MOST_BYTES)}": user_cache() / "programs",
        "models of the hub": Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser(),
    }
    rows = []
    for name, path in places.items():
        held = None if name == "working directory" else _size(path)
        try:
            free: int | None = free_disk(path)
        except OSError:
            free = None
        rows.append({"kept": name, "where": str(path), "holds": held, "free": free})
    return rows


def _size(folder: Path) -> int:
    """Returns the bytes of a folder's files, links not followed."""

    def sizes(path: str) -> Iterator[int]:
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        yield from sizes(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        yield entry.stat(follow_symlinks=False).st_size
        except OSError:
            return

    return sum(size for size, _ in zip(sizes(str(folder)), range(MOST_FILES), strict=False))


def _extras() -> list[dict[str, Any]]:
    """Returns a row per extra: what it brings, and what of it is missing."""
    rows = []
    for extra, packages in EXTRAS.items():
        there = {name: _version(name) for name in packages}
        missing = [name for name, found in there.items() if found is None]
        told = ", ".join(f"{name} {found}" for name, found in there.items() if found) or None
        rows.append({"extra": extra, "installed": told, "missing": ", ".join(missing) or None})
    return rows


def _fits(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per piece of work and device: what it needs, and whether it fits, resident and streamed."""
    try:
        from difffract_jax.estimate.places import Place

        places = [
            Place(f"{row['platform']} {row['kind']}", row["platform"], row["count"], row["memory for JAX"])
            for row in found
            if row["memory for JAX"]
        ]
        places.append(Place("this host", "host", 1, host_memory().available))
        return [_row(name, needs, place) for place in places for name, needs in _needs(place)]
    except TROUBLE as error:
        return [{"work": "nothing could be counted", "reason": str(error).split("\n")[0]}]


def _needs(place: Any) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields every piece of work with the bytes that it needs on a device by way."""
    from difffract_jax.cli.models import work_of
    from difffract_jax.cli.settings import PlanConfig
    from difffract_jax.cli.workloads import workload
    from difffract_jax.config import resolve
    from difffract_jax.estimate.counts import count
    from difffract_jax.estimate.training import count_training
    from difffract_jax.loading import described_pipeline
    from difffract_jax.transcoders.settings import TrainConfig

    ways, host = {"resident": "device", "streamed": "disk"}, place.kind == "host"
    for name, command, settings in SIZES:
        asked = resolve(PlanConfig, settings)
        works = {
            way: workload(command, asked, host=host, streamed=way == "streamed", room=place.usable) for way in ways
        }
        yield name, {way: count(work).needed for way, work in works.items()}
    sites = ("img/6", "img/12", "img/18", "txt/6", "txt/12", "txt/18")
    training = TrainConfig(model="flux-schnell", sites=sites, model_dtype="bf16")
    platform, flux = "cpu" if host else place.kind, described_pipeline("flux-schnell")
    asked = {way: training.model_copy(update={"weights": weights}) for way, weights in ways.items()}
    yield TRAINED, {way: count_training(one, work_of(one), platform, flux).needed for way, one in asked.items()}


def _row(name: str, needs: dict[str, int], place: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"work": name, "on": place.name}
    for way, needed in needs.items():
        row |= {f"{way} needs": needed, f"{way} fits": needed <= place.usable}
    return row


def _for_people(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the sections as tables, with sizes in words."""

    def told(name: str, value: Any) -> Any:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int) and name != "count":
            return text_of_bytes(value)
        return "-" if value is None else value

    shown: dict[str, Any] = {}
    for title, section in result.items():
        if isinstance(section, dict):
            shown[title] = ", ".join(f"{name} {told(name, value)}" for name, value in section.items())
        elif isinstance(section, list):
            shown[title] = [{name: told(name, value) for name, value in row.items()} for row in section] or "none"
        else:
            shown[title] = section
    return shown
