"""The directory that a name stands for: what is embedded, a directory here, or a repository on the hub.

1. `organism` and `organism-saes` are embedded; `hf:OWNER/NAME` and OWNER/NAME lie on the hub (`hub.names` has the
   notation); anything else is a path.
2. Of a repository, what describes a pipeline comes first: one that this package cannot run is refused before its
   weights are downloaded.
3. What came from the hub has an `origin`, the name with the commit, which images and graphs record.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from converters.pipelines import FOLDERS, check_architecture, pipeline_config, read_json
from converters.repositories import (
    describing_files,
    is_diffusers_listing,
    is_own_listing,
    is_reference_listing,
    own_files,
    transcoder_files,
    weight_files,
)
from difffract_jax.config import UserError
from difffract_jax.hub.names import HubName, parse_hub_name
from difffract_jax.hub.repository import Repository, fetch, open_repository

ORGANISM = Path(__file__).parent / "organism" / "weights"
"""The embedded model, a diffusers directory."""
SHIPPED = {"organism": ORGANISM.parent / "transcoders", "organism-saes": ORGANISM.parent / "saes"}
"""The embedded model's transcoders and SAEs, by the names that stand for them."""
LABELS = "labels.json"
CHECKPOINT_SUFFIX = ".safetensors"


class Directory(NamedTuple):
    """A directory, or a file, on this machine.

    Attributes:
        path: where it lies.
        origin: its name on the hub, commit included; "" for what does not come from there.
        weights: of a pipeline of diffusers from the hub, the files that are read; others may lie beside them, as other
            tools share the cache.
    """

    path: Path
    origin: str = ""
    weights: tuple[str, ...] = ()


def pipeline_directory(
    model: str | Path, *, revision: str | None = None, parts: Collection[str] = tuple(FOLDERS)
) -> Directory:
    """Returns the directory of a pipeline.

    Args:
        model: "organism", a directory, or a repository on the hub.
        revision: branch, tag or commit of a repository; the default branch if left out.
        parts: whose weights are needed; of a repository, those of others are not downloaded.

    Raises:
        UserError: if it is neither, or cannot be downloaded.
    """
    if str(model) == "organism":
        return Directory(ORGANISM)
    name = parse_hub_name(str(model), revision=revision)
    if name is None:
        _refuse_beside(model, revision=revision)
        return Directory(_directory(Path(model)))
    if name.folder.endswith(CHECKPOINT_SUFFIX):
        raise UserError(f"{name} is a single file; convert it first: difffract convert flux {name} OUT --base DIR.")
    repository = open_repository(name)
    if is_diffusers_listing(repository.files):
        path = fetch(repository, describing_files(repository.files), quiet=True)
        check_architecture(path)
        pipeline_config(path)
        weights = weight_files(repository.files, parts, str(name))
        return Directory(fetch(repository, weights) if weights else path, repository.pinned, tuple(weights))
    return _own(repository, "pipeline")


def transcoder_directory(
    path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    sites: Sequence[str] | None = None,
) -> Directory:
    """Returns the directory of a set of transcoders or SAEs.

    Args:
        path: "organism", "organism-saes", a directory, or a repository on the hub.
        revision: branch, tag or commit of a repository; the default branch if left out.
        subfolder: folder within the directory or repository.
        sites: those wanted, as in img/0-3; of a repository of the reference's files, others are not downloaded.

    Raises:
        UserError: if it is none of these, or cannot be downloaded.
    """
    name, local = _named(path, revision, subfolder)
    if name is None:
        return local
    repository = open_repository(name)
    paths = list(repository.files)
    if is_own_listing(paths) and not is_reference_listing(paths):
        return _own(repository, "transcoders")
    return Directory(fetch(repository, transcoder_files(paths, sites, str(name))), repository.pinned)


def labels_file(path: str | Path) -> Path:
    """Returns where the labels of a set of transcoders lie, or would lie.

    Args:
        path: as for `transcoder_directory`.
    """
    name, local = _named(path, None, None)
    if name is None:
        return local.path / LABELS
    repository = open_repository(name)
    return fetch(repository, [LABELS]) / LABELS if LABELS in repository.files else Path(str(name)) / LABELS


def checkpoint(source: str | Path, *, base: bool = False) -> Directory:
    """Returns a checkpoint that is to be converted.

    Args:
        source: a file, a directory, or a repository on the hub or a file in it.
        base: whether it only completes another file, with all parts but the transformer.
    """
    name = parse_hub_name(str(source))
    if name is None:
        return Directory(Path(source))
    if name.folder.endswith(CHECKPOINT_SUFFIX):
        repository = open_repository(name)
        file = Path(name.folder).name
        return Directory(fetch(repository, [file]) / file, repository.pinned)
    return pipeline_directory(source, parts=[part for part in FOLDERS if part != "transformer" or not base])


def is_checkpoint_file(source: str | Path) -> bool:
    """Says whether a checkpoint is one file, here or on the hub, and not a directory with all parts of a pipeline."""
    name = parse_hub_name(str(source))
    return not Path(source).is_dir() if name is None else name.folder.endswith(CHECKPOINT_SUFFIX)


def _named(path: str | Path, revision: str | None, subfolder: str | None) -> tuple[HubName | None, Directory]:
    """Returns the repository that holds transcoders, or None and their directory."""
    if str(path) in SHIPPED:
        _refuse_beside(path, revision=revision, subfolder=subfolder)
        return None, Directory(SHIPPED[str(path)])
    name = parse_hub_name(str(path), revision=revision, subfolder=subfolder)
    if name is not None:
        return name, Directory(Path())
    _refuse_beside(path, revision=revision)
    return None, Directory(_directory(Path(path) / (subfolder or "")))


def _own(repository: Repository, kind: str) -> Directory:
    """Fetches a directory of a kind that this package wrote, its `config.json` first: other tools' have one too."""
    name, hint = repository.name, "give another repository, or folder in it"
    if not is_own_listing(repository.files):
        files = sorted(path for path in repository.files if path.endswith(CHECKPOINT_SUFFIX) and "/" not in path)
        if files:
            hint = f"to convert a single file of it: difffract convert flux {name}/{files[0]} OUT --base DIR"
        raise UserError(
            f"{name} holds no {kind}: neither model_index.json, as diffusers writes it, nor config.json, as difffract "
            f"does; {hint}."
        )
    record = read_json(fetch(repository, ["config.json"], quiet=True) / "config.json", "a directory of difffract")
    if "format_version" not in record or record.get("kind") != kind:
        found = record.get("kind") if "format_version" in record else "files of another tool"
        raise UserError(f"{name} holds {found}, but {kind} is wanted here; {hint}.")
    return Directory(fetch(repository, own_files(repository.files)), repository.pinned)


def _refuse_beside(path: str | Path, **given: str | None) -> None:
    """Refuses what was given beside a name or path that takes none of it."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(f"{path} does not lie on the hub, so it takes no {names[0]}; leave {names[0]} out.")


def _directory(path: Path) -> Path:
    if path.suffix == CHECKPOINT_SUFFIX and path.is_file():
        raise UserError(f"{path} is a single file; convert it first: difffract convert flux {path} OUT --base DIR.")
    if not path.is_dir():
        raise UserError(
            f"{path} is not a directory; give one that difffract or diffusers wrote, or a repository as hf:OWNER/NAME."
        )
    return path
