"""`SHA256SUMS`: the hash of every file of a directory, in the format that `sha256sum --check` reads.

1. `write_sums` lists all files below a directory, by their paths within it.
2. `check_sums` compares them; every file that is missing or differs is named in one sentence. Files that are not
   listed, such as notes a user has put there, do not matter.
3. `sample_hash` tells weights apart that are too large to hash in passing, by the ends of their files.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from difffract_jax.config import UserError

SUMS = "SHA256SUMS"
SAMPLE_BYTES = 2**20


def write_sums(directory: Path) -> None:
    """Writes the hashes of all files below a directory into its `SHA256SUMS`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_sum(path)}  {path.relative_to(directory).as_posix()}\n" for path in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> None:
    """Compares a directory's files with its `SHA256SUMS`, if it has one.

    Raises:
        UserError: naming every file that is missing or differs.
    """
    if not (directory / SUMS).is_file():
        return
    problems = []
    # A byte that is not UTF-8 is of a name that is then missed.
    for line in (directory / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        wanted, _, name = line.partition("  ")
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif _sum(path) != wanted:
            problems.append(f"{name} differs")
    if problems:
        raise UserError(
            f"{directory} is damaged ({'; '.join(problems)}, against {SUMS}); install the package or copy it again."
        )


def sample_hash(directory: Path, files: Sequence[str] = ()) -> str:
    """Returns a hash of the names, sizes, first and last MiB of safetensors files.

    Args:
        directory: holds them; or a file, whose own it is.
        files: their paths in the directory; all that there are if left out. Others, as the indices of shards, do not
            matter.
    """
    digest = hashlib.sha256()
    home = directory.parent if directory.is_file() else directory
    chosen = [directory] if directory.is_file() else [home / name for name in files if not name.endswith(".json")]
    for path in sorted(chosen or home.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(home).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
