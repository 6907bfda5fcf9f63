"""Outputs in buckets: written on this machine first, and published once they are complete.

`storage.files` and `storage.resumable` call these where the path of an output is remote. What is complete but cannot be
published, as the network is lost or credentials have expired, is kept on this machine: it may be hours of work.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address, is_remote, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import drop, root, staging
from difffract_jax.storage.remote.publication import AT_ONCE, CLAIM, is_taken, publish


@contextmanager
def remote_file(path: str | Path) -> Iterator[Path]:
    """Hands out a path on this machine whose file becomes an object when the block ends well.

    Args:
        path: of the object; one that exists is replaced.

    Raises:
        UserError: if it cannot be written; the sentence says where the file is kept.
    """
    at = parse_address(path)
    if not at.key:
        raise UserError(f"{at} is a whole bucket; name a file in it, as in {at}/NAME.")
    local = staging(at.name)
    try:
        yield local
        _deliver(local, lambda: open_bucket(at).upload(at.key, local))
    finally:
        drop(local.parent)


@contextmanager
def remote_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hands out a directory on this machine that is published when the block ends well.

    Args:
        path: of the directory in its bucket.
        overwrite: replace what is there, once the new one is complete here.

    Raises:
        UserError: if the place is taken; or if it cannot be written, and then where the directory is kept.
    """
    refuse_taken(path, overwrite=overwrite)
    at = parse_address(path)
    local = staging(at.name)
    try:
        local.mkdir()
        yield local
        _deliver(local, lambda: publish(local, at, overwrite=overwrite))
    finally:
        drop(local.parent)


@contextmanager
def working_folder(path: str | Path) -> Iterator[Path]:
    """Hands out a folder of this machine for what belongs to an output and is looked for by whoever makes it again.

    Args:
        path: of the output: a directory of this machine, which is handed out itself, or one in a bucket. What is kept
            of that goes when the block ends well.
    """
    if not is_remote(path):
        yield Path(path)
        return
    folder = kept_for(path)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder.parent, ignore_errors=True)


@contextmanager
def sent_files(path: str | Path) -> Iterator[Path]:
    """Hands out a folder of this machine, whose files go into a directory when the block ends well.

    Args:
        path: of the directory: one of this machine is handed out itself, and made if it does not exist. In one in a
            bucket, files of the same name are replaced, and others stay; who calls holds it, see `storage.locks`.

    Raises:
        UserError: if it cannot be written, and then where the files are kept.
    """
    if not is_remote(path):
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    at = parse_address(path)
    local = staging(at.name)
    try:
        local.mkdir()
        yield local
        _deliver(local, lambda: _send(local, at))
    finally:
        drop(local.parent)


def _send(local: Path, at: Address) -> None:
    """Writes every file of a folder into a directory of a bucket."""
    files = [path for path in local.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda file: open_bucket(at).upload((at / file.relative_to(local).as_posix()).key, file), files))


def _deliver(local: Path, work: Callable[[], None]) -> None:
    """Publishes what is complete here; if that fails, moves it to where it is kept, and says so."""
    try:
        work()
    except UserError as error:
        kept = root() / "unpublished" / local.parent.name / local.name
        kept.parent.mkdir(parents=True)
        local.replace(kept)
        raise UserError(
            f"{str(error).removesuffix('.')}. What was to go there is complete, and kept in {kept}."
        ) from error


def ask(path: str | Path) -> None:
    """Asks the bucket of an output for it, so that a bucket that cannot be reached is told before any work is done.

    Args:
        path: of the output in its bucket.

    Raises:
        UserError: if there is no such bucket, or it cannot be asked.
    """
    at = parse_address(path)
    if not at.key:
        raise UserError(f"{at} is a whole bucket; name a file or a folder in it, as in {at}/NAME.")
    open_bucket(at).stat(at.key)


def holds_files(path: str | Path) -> bool:
    """Says whether an output in a bucket holds something by now, but for the claim of who is going to write it.

    Args:
        path: of the output in its bucket.

    Raises:
        UserError: if the bucket cannot be asked.
    """
    at = parse_address(path)
    bucket = open_bucket(at)
    return bucket.stat(at.key) is not None or any(stat.key != (at / CLAIM).key for stat in bucket.below(at.key))


def kept_for(path: str | Path) -> Path:
    """Returns the path on this machine where an output is written whose finished parts outlive an interruption.

    Args:
        path: of the output in its bucket; the same one has the same path here.
    """
    at = parse_address(path)
    return root() / "outputs" / hashlib.sha256(str(at).encode()).hexdigest()[:24] / at.name


def refuse_taken(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuses a place in a bucket where something lies, unless `overwrite` is given; asks the bucket in any case.

    Raises:
        UserError: if something is there, or the bucket cannot be asked.
    """
    at = parse_address(path)
    if not at.key:
        raise UserError(f"{at} is a whole bucket; name a folder in it, as in {at}/NAME.")
    if is_taken(at) and not overwrite:
        raise UserError(f"{at} exists already; name another output, or pass --overwrite to replace it.")
