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

from converters.configurations import (
    CLASSES,
    TOKENIZERS,
    check_architecture,
    check_base,
    is_diffusers_directory,
    pipeline_config,
    read_json,
)
from converters.contents import transformer_files, transformer_of
from converters.pipelines import FOLDERS
from converters.repositories import (
    describing_files,
    is_diffusers_listing,
    is_own_listing,
    is_reference_listing,
    listed_variants,
    own_files,
    transcoder_files,
    transformer_files_of,
    weight_files,
)
from converters.source import Source
from converters.weight_files import check_variant
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
        weights: of a pipeline of diffusers, or of the reference's transcoders, from the hub, the files that are read;
            others may lie beside them, as other tools share the cache.
    """

    path: Path
    origin: str = ""
    weights: tuple[str, ...] = ()


def pipeline_directory(
    model: str | Path,
    *,
    revision: str | None = None,
    parts: Collection[str] = tuple(FOLDERS),
    variant: str | None = None,
) -> Directory:
    """Returns the directory of a pipeline.

    Args:
        model: "organism", a directory, or a repository on the hub.
        revision: branch, tag or commit of a repository; the default branch if left out.
        parts: whose weights are needed; of a repository of diffusers, those of others are not downloaded. Of one that
            this package wrote, all weights are, or none for ().
        variant: which weights to download where there are several, as in fp16.

    Raises:
        UserError: if it is neither, or cannot be downloaded.
    """
    if str(model) == "organism":
        _refuse_beside(model, revision=revision)
        return Directory(ORGANISM)
    name = parse_hub_name(str(model), revision=revision)
    if name is None:
        _refuse_beside(model, revision=revision)
        return Directory(_pipeline_here(Path(model)))
    if name.folder.endswith(CHECKPOINT_SUFFIX):
        raise UserError(_alone(str(name), "DIR"))
    repository = open_repository(name)
    if is_diffusers_listing(repository.files):
        check_variant(str(name), listed_variants(repository.files), variant)
        path = fetch(repository, describing_files(repository.files), quiet=True)
        check_architecture(path)
        pipeline_config(path)
        weights = weight_files(repository.files, parts, str(name), variant)
        return Directory(fetch(repository, weights) if weights else path, repository.pinned, tuple(weights))
    return _own(repository, "pipeline", weights=bool(parts))


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
    files = transcoder_files(paths, sites, str(name))
    return Directory(fetch(repository, files), repository.pinned, tuple(files))


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


def checkpoint(
    source: str | Path, *, revision: str | None = None, variant: str | None = None, completed: bool = False
) -> Directory:
    """Returns a checkpoint that is to be converted: a pipeline, or a transformer alone.

    Args:
        source: a file, a directory, or a repository on the hub, a folder or a file in it.
        revision: branch, tag or commit of a repository.
        variant: which weights to download where there are several, as in fp16.
        completed: whether a base has the parts beside the transformer; of a pipeline, the transformer alone is then
            downloaded.
    """
    name = parse_hub_name(str(source), revision=revision)
    if name is None:
        _refuse_beside(source, revision=revision)
        return Directory(_embedded_or_path(source))
    repository = open_repository(name)
    file = Path(name.folder).name
    if name.folder.endswith(CHECKPOINT_SUFFIX) and file in repository.files:
        return Directory(fetch(repository, [file]) / file, repository.pinned)
    if is_own_listing(repository.files):
        path = fetch(repository, ["config.json"], quiet=True)
        if read_json(path / "config.json", "a transformer").get("_class_name") in CLASSES["transformer"]:
            weights = transformer_files_of(repository.files, str(name), variant)
            return Directory(fetch(repository, weights), repository.pinned, tuple(weights))
    if completed and is_diffusers_listing(repository.files):
        weights = weight_files(repository.files, ("transformer",), str(name), variant)
        path = fetch(repository, [*describing_files(repository.files), *weights])
        return Directory(path, repository.pinned, tuple(weights))
    return pipeline_directory(source, revision=revision, variant=variant)


def lora_file(lora: str | Path) -> Directory:
    """Returns where a LoRA lies: a file, or a directory that PEFT wrote.

    Args:
        lora: here, or on the hub as hf:OWNER/NAME[@REVISION]/FILE.
    """
    name = parse_hub_name(str(lora))
    if name is None:
        return Directory(Path(lora))
    repository = open_repository(name)
    file = Path(name.folder).name
    if not name.folder.endswith(CHECKPOINT_SUFFIX) or file not in repository.files:
        there = sorted(path for path in repository.files if path.endswith(CHECKPOINT_SUFFIX))
        raise UserError(
            f"{name} is not a file of a LoRA on the hub; name one as hf:OWNER/NAME/FILE"
            f"{f', as in {name}/{there[0]}' if there else ''}."
        )
    return Directory(fetch(repository, [file]) / file, repository.pinned)


def base_directory(base: str | Path, *, variant: str | None = None) -> Directory:
    """Returns the directory of a pipeline that completes a transformer, and needs none itself.

    Args:
        base: a directory, or a repository on the hub.
        variant: which weights to download where there are several.
    """
    name = parse_hub_name(str(base))
    if name is None:
        return Directory(_embedded_or_path(base))
    repository = open_repository(name)
    described = describing_files(repository.files)
    if not described:
        raise UserError(f"{name} is not a diffusers pipeline, so that it cannot be a base; give another repository.")
    check_base(fetch(repository, described, quiet=True))
    weights = weight_files(repository.files, [part for part in FOLDERS if part != "transformer"], str(name), variant)
    return Directory(fetch(repository, weights), repository.pinned, tuple(weights))


def is_whole_pipeline(source: str | Path, *, revision: str | None = None) -> bool:
    """Says whether a checkpoint is a pipeline of diffusers with all its parts; on the hub, by its list of files.

    Args:
        source: as for `checkpoint`.
        revision: of a repository.
    """
    name, parts = parse_hub_name(str(source), revision=revision), (*CLASSES, *TOKENIZERS)
    if name is None:
        path = _embedded_or_path(source)
        return is_diffusers_directory(path) and all((path / part).is_dir() for part in parts)
    if name.folder.endswith(CHECKPOINT_SUFFIX):
        return False
    paths = open_repository(name).files
    return is_diffusers_listing(paths) and {*parts} <= {path.partition("/")[0] for path in paths}


def is_transformer_directory(path: Path) -> bool:
    """Says whether a directory here holds a transformer alone: diffusers' folder of one, or a single file."""
    if is_diffusers_directory(path) or (path / "transformer").is_dir():
        return False
    config = path / "config.json"
    if config.is_file():
        return read_json(config, "a transformer").get("_class_name") in CLASSES["transformer"]
    return bool(transformer_files(path))


def _pipeline_here(path: Path) -> Path:
    """Returns the directory of a pipeline; a transformer alone is refused, with what completes it."""
    if path.is_file():
        transformer_of(Source(path))  # names what is given by mistake
    if path.name == "transformer" and path.is_dir() and is_diffusers_directory(path.parent):
        raise UserError(f"{path} is one part of the pipeline {path.parent}; give that directory.")
    if path.is_file() or (path.is_dir() and is_transformer_directory(path)):
        raise UserError(_alone(str(path), str(path.parent) if is_diffusers_directory(path.parent) else "DIR"))
    return _directory(path)


def _embedded_or_path(model: str | Path) -> Path:
    return ORGANISM if str(model) == "organism" else Path(model)


def _alone(transformer: str, base: str) -> str:
    """Says that a transformer alone is not enough, and what completes it."""
    return (
        f"{transformer} is a transformer alone; name a diffusers directory with the other parts: --base {base}, in "
        f"generate, trace and `difffract convert flux {transformer} OUT --base {base}`."
    )


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


def _own(repository: Repository, kind: str, *, weights: bool = True) -> Directory:
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
    path = fetch(repository, ["config.json"], quiet=True)
    record = read_json(path / "config.json", "a directory of difffract")
    if record.get("_class_name") in CLASSES["transformer"]:
        raise UserError(_alone(str(name), "DIR"))
    if "format_version" not in record or record.get("kind") != kind:
        held = record.get("kind") if "format_version" in record else "files of another tool"
        raise UserError(f"{name} holds {held}, but {kind} is wanted here; {hint}.")
    return Directory(fetch(repository, own_files(repository.files)) if weights else path, repository.pinned)


def _refuse_beside(path: str | Path, **given: str | None) -> None:
    """Refuses what was given beside a name or path that takes none of it."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(f"{path} does not lie on the hub, so it takes no {names[0]}; leave {names[0]} out.")


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(
            f"{path} is not a directory; give one that difffract or diffusers wrote, or a repository as hf:OWNER/NAME."
        )
    return path
