"""`SHA256SUMS`: the hash of every file of a directory, in the format that `sha256sum --check` reads.

1. `write_sums` lists all files below a directory, by their paths within it.
2. `check_sums` compares them; every file that is missing or differs is named in one sentence. Files that are not
   listed, such as notes a user has put there, do not matter.
"""

import hashlib
from pathlib import Path

from difffract_jax.config import UserError

SUMS = "SHA256SUMS"


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


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
