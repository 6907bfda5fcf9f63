"""Commands that several processes run as one: how they are joined, and what must be the same on all of them."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from difffract_jax.config import Settings, UserError, provenance
from difffract_jax.storage.remote.addresses import spelled

Join = Annotated[
    str | None,
    typer.Option(
        "--join",
        help="Make this one of several processes: `auto` on a TPU pod or under Slurm, else HOST:PORT,NUMBER,PROCESSES.",
    ),
]
PACKAGES = ("jaxlib", "orbax-checkpoint")
"""Packages whose versions must be the same everywhere, beside those that results record."""


@contextmanager
def as_one_of(join: str | None, settings: Settings, *, run: Path | None = None) -> Iterator[None]:
    """Makes this process one of several for a block, if `join` says so, and compares them all.

    Args:
        join: as the option of this name has it.
        settings: of the command.
        run: directory of the training run, if it is one that can be gone on with.

    Raises:
        UserError: if the others cannot be found, or have other settings or versions.
    """
    if join is None:
        yield
        return
    from difffract_jax.transcoders.lifeline import joined
    from difffract_jax.transcoders.processes import check_alike

    with joined(join, lambda: _how_to_go_on(run)):
        check_alike(_facts(settings), "settings or versions")
        if run is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which JAX has taken, to be asked for by a training alone
        yield


def _facts(settings: Settings) -> dict[str, str]:
    """Returns what must be the same in every process, by name."""
    import jax

    made = provenance("", settings)
    facts = {name: str(value) for name, value in made["settings"].items()}
    facts |= made["versions"] | {name: version(name) for name in PACKAGES}
    return facts | {"kind of devices": jax.local_devices()[0].device_kind, "devices": str(jax.local_device_count())}


def _how_to_go_on(run: Path | None) -> str:
    """Returns what to do when another process has died."""
    from difffract_jax.transcoders.checkpoints import intact, newest
    from difffract_jax.transcoders.run_place import has

    command = shlex.join(["difffract", *sys.argv[1:]])
    more = "" if "--resume" in sys.argv else " --resume"
    try:
        if run is None or not has(run, "train.json"):
            return f"nothing was saved; start all again with: {command}"
        kept = intact(newest(run))
    except UserError:
        kept = f"{spelled(run or '')} cannot be asked for its newest checkpoint"
    return f"{kept}; go on, on as many hosts as there are, with: {command}{more}"
