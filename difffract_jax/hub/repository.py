"""A repository at one commit: what it holds, and its files in the cache of this machine.

1. `open_repository` asks the hub which commit a revision is and which files it holds. Offline (HF_HUB_OFFLINE=1), or if
   the hub cannot be reached, the cache answers instead, if it knows the revision.
2. `fetch` takes the files that are wanted. Those that the cache lacks are downloaded, after a line that says how many
   and how large they are and a look at the free space; whole files are never downloaded twice.
3. What came is held against the sizes and SHA-256 hashes that the hub lists. A file that differs is removed again.
4. The revision is remembered in the cache, so that its name serves offline.
"""

import glob
import hashlib
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from difffract_jax.config import UserError
from difffract_jax.hub.failures import client, client_errors, explained, is_unreachable, sentence
from difffract_jax.hub.names import HubName

SLOW_TO_HASH = 10**9
"""Bytes from which on hashing is announced: it takes seconds."""


class HubFile(NamedTuple):
    """One file of a repository.

    Attributes:
        path: within the repository.
        size: in bytes; None where it is not known.
        sha256: of its content; None where the hub lists none, as for small files.
    """

    path: str
    size: int | None
    sha256: str | None


class Repository(NamedTuple):
    """A folder of a repository at one commit.

    Attributes:
        name: as it was asked for.
        commit: the commit's hash.
        files: path within the folder -> the file.
        reachable: whether the hub answered; if not, `files` are what the cache knows of.
    """

    name: HubName
    commit: str
    files: Mapping[str, HubFile]
    reachable: bool

    @property
    def pinned(self) -> str:
        """The name with the commit in place of the revision, to be given again."""
        return str(self.name._replace(revision=self.commit))


def open_repository(name: HubName) -> Repository:
    """Finds out what a repository holds.

    Args:
        name: of the repository; its folder may also be a file.

    Raises:
        UserError: if there is no such repository, revision or folder, access is refused, or neither the hub nor the
            cache knows it.
    """
    if client().is_offline_mode():
        with explained(name):
            repository = _cached(name)
        if repository is None:
            cache = client("constants").HF_HUB_CACHE
            raise UserError(
                f"{name.repository} at {name.revision or 'main'} is not in the cache {cache}, and HF_HUB_OFFLINE "
                "forbids to download it; unset HF_HUB_OFFLINE once, or give the cache that has it with HF_HOME=FOLDER."
            )
        return repository
    try:
        commit, files = _listed(name)
    except client_errors() as error:
        repository = _cached(name) if is_unreachable(error) else None
        if repository is None:
            raise UserError(sentence(error, name, downloading=False)) from error
        _tell(
            f"The hub cannot be reached; using the cache's copy of {name.repository}, commit {repository.commit[:12]}"
        )
        return repository
    return Repository(name, commit, _within(files, name), reachable=True)


def fetch(repository: Repository, paths: Collection[str], *, quiet: bool = False) -> Path:
    """Brings files of a repository to this machine.

    Args:
        repository: from `open_repository`.
        paths: some of its `files`.
        quiet: say nothing of how many come; for small ones that others follow.

    Returns:
        The folder in which they lie by their paths, in the cache; nothing may be written there.

    Raises:
        UserError: if they cannot be had; the message says why and what to do.
    """
    missing = [path for path in sorted(paths) if _cached_file(repository, path) is None]
    if missing and not repository.reachable:
        raise UserError(
            f"The cache lacks {_some(missing)} of {repository.name.repository}, and the hub cannot be reached, or "
            "HF_HUB_OFFLINE is set; run this once with a network."
        )
    if missing:
        _download(repository, missing, quiet)
    if repository.reachable:
        _remember(repository)
    first = sorted(paths)[0]
    located = _located(repository, first)
    assert located is not None, first
    return located.parents[len(PurePosixPath(first).parts) - 1]


def _listed(name: HubName) -> tuple[str, dict[str, HubFile]]:
    """Asks the hub for the commit of a revision and its files, by their paths in the repository."""
    api = client().HfApi()
    timeout = client("constants").HF_HUB_ETAG_TIMEOUT
    commit = api.model_info(name.repository, revision=name.revision, timeout=timeout).sha
    tree = api.list_repo_tree(name.repository, recursive=True, revision=commit)
    return commit, {file.path: _file(file) for file in tree if hasattr(file, "blob_id")}


def _file(listed: Any) -> HubFile:
    return HubFile(listed.path, listed.size, None if listed.lfs is None else listed.lfs.sha256)


def _cached(name: HubName) -> Repository | None:
    """Returns what the cache knows of a revision; None if it does not know it."""
    hub, errors = client(), client("errors")
    try:
        commit = hub.HfApi().resolve_revision(name.repository, revision=name.revision, local_files_only=True).resolved
        home = Path(hub.snapshot_download(name.repository, revision=commit, local_files_only=True))
    except errors.IncompleteSnapshotError as error:
        home, commit = Path(error.snapshot_path), Path(error.snapshot_path).name
    except (errors.LocalEntryNotFoundError, errors.RevisionResolutionError):
        return None
    try:
        tree = hub.get_cached_repo_tree(name.repository, revision=commit)
        files = {file.path: HubFile(file.path, file.size, None) for file in tree}
    except errors.CachedRepoTreeNotFoundError:
        paths = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
        files = {path: HubFile(path, None, None) for path in paths}
    return Repository(name, commit, _within(files, name), reachable=False)


def _within(files: Mapping[str, HubFile], name: HubName) -> dict[str, HubFile]:
    """Returns the files of the name's folder by their paths in it; a single file by its own name."""
    if name.folder in files:
        return {PurePosixPath(name.folder).name: files[name.folder]}
    prefix = f"{name.folder}/" if name.folder else ""
    inside = {path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix)}
    if not inside:
        folders = sorted({path.rpartition("/")[0] for path in files} - {""})
        held = f"its folders are {_some(folders)}" if folders else "it has no folders"
        raise UserError(
            f"{name.repository} has no folder or file {name.folder or '/'} at {name.revision or 'main'}; {held}."
        )
    return inside


def _located(repository: Repository, path: str) -> Path | None:
    """Returns where a file lies in the cache."""
    name = repository.name.repository
    cached = client().try_to_load_from_cache(name, repository.files[path].path, revision=repository.commit)
    return Path(cached) if isinstance(cached, str) else None


def _cached_file(repository: Repository, path: str) -> Path | None:
    """Returns where a file lies in the cache; one of another size than the hub lists is removed."""
    cached = _located(repository, path)
    if cached is not None and not _is_of_size(repository, path, cached):
        _remove(cached)
        return None
    return cached


def _is_of_size(repository: Repository, path: str, cached: Path) -> bool:
    size = repository.files[path].size if repository.reachable else None
    return size is None or cached.stat().st_size == size


def _download(repository: Repository, missing: list[str], quiet: bool) -> None:
    """Downloads files and checks them, those that arrived before a failure too."""
    name, cache = repository.name.repository, Path(client("constants").HF_HUB_CACHE)
    coming = [repository.files[path] for path in missing if not _is_held(repository, path)]
    size = sum(file.size or 0 for file in coming)
    _check_space(name, size, cache)
    if coming and not quiet:
        count = f"{len(coming)} file{'s' * (len(coming) > 1)}"
        _tell(f"Downloading {count} ({_bytes(size)}) of {name}, commit {repository.commit[:12]}, to {cache}")
    failure: UserError | None = None
    try:
        with explained(repository.name, downloading=True):
            patterns = [glob.escape(repository.files[path].path) for path in missing]
            client().snapshot_download(name, revision=repository.commit, allow_patterns=patterns)
    except UserError as error:
        failure = error
    if size > SLOW_TO_HASH and failure is None:
        _tell("Comparing the files with the hub's SHA-256 hashes")
    damaged = [path for path in missing if not _is_whole(repository, path)]
    if damaged:
        raise UserError(
            f"What arrived as {_some(damaged)} of {name} is not what the hub lists (another size or SHA-256), and was "
            "removed; run this again, and if it happens twice, check the disk and the network's proxy."
        ) from failure
    if failure is not None:
        raise failure
    absent = [path for path in missing if _located(repository, path) is None]
    if absent:
        raise UserError(f"{_some(absent)} of {name} did not arrive, without a word why; run this again.")


def _is_held(repository: Repository, path: str) -> bool:
    """Says whether the cache has a large file already, from another commit; the client then only links it."""
    sha256 = repository.files[path].sha256
    folder = client("file_download").repo_folder_name(repo_id=repository.name.repository, repo_type="model")
    return sha256 is not None and (Path(client("constants").HF_HUB_CACHE) / folder / "blobs" / sha256).exists()


def _check_space(name: str, size: int, cache: Path) -> None:
    """Refuses a download that the disk has no room for."""
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise UserError(
            f"{name} needs {_bytes(size)} more in the cache {cache}, but its disk has {_bytes(free)} free; free some "
            "space, or keep the cache elsewhere with HF_HOME=FOLDER."
        )


def _is_whole(repository: Repository, path: str) -> bool:
    """Says whether a file is the one that the hub lists, if it arrived; removes it otherwise."""
    cached = _located(repository, path)
    if cached is None:
        return True
    # Where the list has no hash, the name under which the cache keeps a large file is one.
    content = cached.resolve().name
    wanted = repository.files[path].sha256 or (content if len(content) == 64 else None)
    whole = _is_of_size(repository, path, cached) and wanted in (None, _sha256(cached))
    if not whole:
        _remove(cached)
    return whole


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(cached: Path) -> None:
    """Removes a file of the cache, and what its link leads to."""
    content = cached.resolve()
    cached.unlink()
    content.unlink(missing_ok=True)


def _remember(repository: Repository) -> None:
    """Lets the cache know which commit the revision is, for use offline."""
    api, name = client().HfApi(), repository.name
    try:
        known = api.resolve_revision(name.repository, revision=name.revision, local_files_only=True).resolved
    except client("errors").RevisionResolutionError:
        known = None
    if known != repository.commit:
        with explained(name):
            api.resolve_revision(name.repository, revision=name.revision)


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}.\n")


def _some(names: list[str], most: int = 6) -> str:
    """Returns the first of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bytes(size: int) -> str:
    """Returns a size in words, as in 33.7 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
