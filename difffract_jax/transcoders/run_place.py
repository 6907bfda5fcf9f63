"""Where a run lies: a directory of this machine, or a place in a bucket with a directory on each host to work in.

1. What is asked of a run before it is opened, `has` and `text_of`, works for both.
2. `home_of` is the directory of this machine: the run's own, or, of one in a bucket, a folder of the cache in which the
   log grows, the buffer lies, and checkpoints wait to be sent. It is the same for every start of the run.
3. `send` copies small files from there into the bucket, `bring` back; of a local run both are there already.
"""

import json
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.outputs import kept_for

SETTINGS, MADE = "train.json", "transcoders/config.json"
"""Files that a run writes first, and last."""


def home_of(out: Path) -> Path:
    """Returns the directory of this machine that a run works in.

    Args:
        out: of the run.
    """
    return kept_for(out) if is_remote(out) else out


def has(out: Path, name: str) -> bool:
    """Says whether a run has a file.

    Args:
        out: of the run.
        name: of the file within it.

    Raises:
        UserError: if its bucket cannot be asked.
    """
    if not is_remote(out):
        return (out / name).is_file()
    at = parse_address(out) / name
    return open_bucket(at).stat(at.key) is not None


def text_of(out: Path, name: str) -> str:
    """Returns what a file of a run holds.

    Args:
        out: of the run.
        name: of the file within it.

    Raises:
        UserError: if it lies in a bucket and cannot be read.
        OSError: if it lies here and cannot be.
    """
    if not is_remote(out):
        return (out / name).read_text(encoding="utf-8")
    at = parse_address(out) / name
    return open_bucket(at).read(at.key).decode()


def is_finished(out: str | Path) -> bool:
    """Says whether a run has made its transcoders, all steps done; for what starts runs again until they have.

    Args:
        out: of the run, on this machine or in a bucket.

    Raises:
        UserError: if its bucket cannot be asked.

    Example:
        >>> is_finished("no-such-run")
        False
    """
    run = Path(out)
    if not (has(run, SETTINGS) and has(run, MADE)):
        return False
    steps = json.loads(text_of(run, SETTINGS))["settings"]["steps"]
    # Transcoders that were exported early say after which step; those of before this was written down are finished.
    return json.loads(text_of(run, MADE))["provenance"].get("step", steps) == steps


def send(out: Path, names: list[str]) -> None:
    """Copies files of this machine into the bucket of a run; does nothing for a run that lies here.

    Args:
        out: of the run.
        names: of files or folders within it; those that there are not are left out.
    """
    if not is_remote(out):
        return
    home, at = home_of(out), parse_address(out)
    for name in names:
        path = home / name
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        for file in files:
            place = at / file.relative_to(home).as_posix()
            open_bucket(place).upload(place.key, file)


def bring(out: Path, name: str) -> None:
    """Copies a file of a run from its bucket to this machine, over one that is here; see `send`.

    Args:
        out: of the run.
        name: of the file within it; if there is none, one that is here goes.
    """
    if not is_remote(out):
        return
    path = home_of(out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if has(out, name):
        path.write_text(text_of(out, name), encoding="utf-8")


def check_place(out: Path) -> None:
    """Refuses a path in a bucket that no run can lie at.

    Args:
        out: of the run.

    Raises:
        UserError: if it is a whole bucket, or of a kind of storage that is not known.
    """
    scheme, colon, _ = str(out).partition(":/")
    if is_remote(out):
        if not parse_address(out).key:
            raise UserError(
                f"{parse_address(out)} is a whole bucket; name a folder in it, as in {parse_address(out)}/NAME."
            )
    elif colon and scheme.isalnum() and len(scheme) > 1:
        raise UserError(f"Runs lie on this machine or in a bucket, gs:// or s3://, but got {scheme}://; name another.")
