"""The directory that a name stands for: what is embedded, a directory here, or a repository on the hub.

1. `organism` and `organism-saes` are embedded; `hf:OWNER/NAME` and OWNER/NAME lie on the
   hub (`hub.names` has the notation), gs://BUCKET/FOLDER and s3://BUCKET/FOLDER in buckets; anything else is a path.
2. Of a repository, or a folder in a bucket, what describes a pipeline comes first: one that this package cannot run is
   refused before its weights are downloaded.
3. What came from the hub or a bucket has an `origin`, the name with the commit, or the address, which images and graphs
   record.
"""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from converters.alone import refuse_alone
from converters.configurations import (
    check_architecture,
    check_base,
    is_diffusers_directory,
    pipeline_config,
    read_json,
)
from converters.contents import transformer_files, transformer_of
from converters.kinds import FLUX1, FOLDERS, KINDS, TRANSFORMERS
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
from difffract_jax.config import ORGANISMS, UserError
from difffract_jax.hub import repository as hub
from difffract_jax.hub.names import parse_hub_name
from difffract_jax.hub.repository import Repository, open_repository
from difffract_jax.storage.remote import cache
from difffract_jax.storage.remote.addresses import is_remote, parse_address, spelled
from difffract_jax.storage.remote.publication import Listing, listing

Place = Repository | Listing
"""A folder of a repository on the hub, or one in a bucket."""

ORGANISM = Path(__file__).parent / "organism" / "weights"
"""The embedded model, a diffusers directory."""
SIBLINGS = {name: ORGANISM.parent / "siblings" / name.partition("-")[2] for name in ORGANISMS[1:]}
"""The embedded siblings: a folder with `pipeline`, a directory of this package, and `transcoders`."""
EMBEDDED = {"organism": ORGANISM} | {name: home / "pipeline" for name, home in SIBLINGS.items()}
"""Embedded models, by the names that stand for them."""
SHIPPED = {"organism": ORGANISM.parent / "transcoders", "organism-saes": ORGANISM.parent / "saes"} | {
    name: home / "transcoders" for name, home in SIBLINGS.items()
}
"""The embedded models' transcoders and SAEs, by the names that stand for them."""
LABELS = "labels.json"
CHECKPOINT_SUFFIX = ".safetensors"


class Directory(NamedTuple):
    """A directory, or a file, on this machine.

    Attributes:
        path: where it lies.
        origin: its name on the hub, commit included, or its address in a bucket; "" for what lies here.
        weights: of a pipeline of diffusers, or of the reference's transcoders, from there, the files that are read;
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
    encoders: bool = True,
) -> Directory:
    """Returns the directory of a pipeline.

    Args:
        model: "organism", a directory, here or in a bucket, or a repository on the hub.
        revision: branch, tag or commit of a repository; the default branch if left out.
        parts: whose weights are needed; of a repository of diffusers, those of others are not downloaded. Of one that
            this package wrote, all weights are, or none for ().
        variant: which weights to download where there are several, as in fp16.
        encoders: whether the text encoders must be there; where no weights are needed, they need not, here or on the
            hub.

    Raises:
        UserError: if it is neither, or cannot be downloaded.
    """
    if str(model) in EMBEDDED:
        _refuse_beside(model, revision=revision)
        return Directory(EMBEDDED[str(model)])
    if _is_elsewhere(model) and str(model).endswith(CHECKPOINT_SUFFIX):
        raise UserError(_alone(spelled(model), "DIR"))
    repository = _place(model, revision)
    if repository is None:
        _refuse_beside(model, revision=revision)
        return Directory(_pipeline_here(Path(model)))
    name = str(repository.name)
    if is_diffusers_listing(repository.files):
        check_variant(name, listed_variants(repository.files), variant)
        path = fetch(repository, describing_files(repository.files), quiet=True)
        kind = check_architecture(path, encoders=encoders and bool(parts))
        pipeline_config(path)
        needed = [part for part in kind.folders_in(path) if part.removesuffix("_2") in parts]  # of two CLIPs both
        weights = weight_files(repository.files, needed, name, variant, folders=kind.folders)
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
        path: "organism", "organism-saes", a directory, here or in a bucket, or a repository on the hub.
        revision: branch, tag or commit of a repository; the default branch if left out.
        subfolder: folder within the directory or repository.
        sites: those wanted, as in img/0-3; of a repository of the reference's files, others are not downloaded.

    Raises:
        UserError: if it is none of these, or cannot be downloaded.
    """
    repository, local = _named(path, revision, subfolder)
    if repository is None:
        return local
    paths = list(repository.files)
    if is_own_listing(paths) and not is_reference_listing(paths):
        return _own(repository, "transcoders")
    files = transcoder_files(paths, sites, str(repository.name))
    return Directory(fetch(repository, files), repository.pinned, tuple(files))


def labels_file(path: str | Path) -> Path:
    """Returns where the labels of a set of transcoders lie, or would lie.

    Args:
        path: as for `transcoder_directory`.
    """
    repository, local = _named(path, None, None)
    if repository is None:
        return local.path / LABELS
    here = Path(str(repository.name)) / LABELS
    return fetch(repository, [LABELS]) / LABELS if LABELS in repository.files else here


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
    if is_remote(source) and str(source).endswith(CHECKPOINT_SUFFIX):
        return Directory(cache.local_file(source), spelled(source))
    repository = _place(source, revision)
    if repository is None:
        _refuse_beside(source, revision=revision)
        return Directory(_embedded_or_path(source))
    name, file = str(repository.name), Path(str(source)).name
    if str(source).endswith(CHECKPOINT_SUFFIX) and file in repository.files:
        return Directory(fetch(repository, [file]) / file, repository.pinned)
    if is_own_listing(repository.files):
        path = fetch(repository, ["config.json"], quiet=True)
        if read_json(path / "config.json", "a transformer").get("_class_name") in TRANSFORMERS:
            weights = transformer_files_of(repository.files, name, variant)
            return Directory(fetch(repository, weights), repository.pinned, tuple(weights))
    if completed and is_diffusers_listing(repository.files):
        weights = weight_files(repository.files, ("transformer",), name, variant)
        path = fetch(repository, [*describing_files(repository.files), *weights])
        return Directory(path, repository.pinned, tuple(weights))
    return pipeline_directory(source, revision=revision, variant=variant)


def lora_file(lora: str | Path) -> Directory:
    """Returns where a LoRA lies: a file, or a directory that PEFT wrote.

    Args:
        lora: here, in a bucket, or on the hub as hf:OWNER/NAME[@REVISION]/FILE.
    """
    if is_remote(lora):
        whole = cache.local_file if str(lora).endswith(CHECKPOINT_SUFFIX) else cache.local_directory
        return Directory(whole(lora), spelled(lora))
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
        base: a directory, here or in a bucket, or a repository on the hub.
        variant: which weights to download where there are several.
    """
    repository = _place(base)
    if repository is None:
        return Directory(_embedded_or_path(base))
    name = str(repository.name)
    described = describing_files(repository.files)
    if not described:
        raise UserError(f"{name} is not a diffusers pipeline, so that it cannot be a base; give another repository.")
    here = fetch(repository, described, quiet=True)
    kind = check_base(here)
    others = [part for part in kind.folders_in(here) if part != "transformer"]
    weights = weight_files(repository.files, others, name, variant, folders=kind.folders)
    return Directory(fetch(repository, weights), repository.pinned, tuple(weights))


def is_whole_pipeline(source: str | Path, *, revision: str | None = None) -> bool:
    """Says whether a checkpoint is a pipeline of diffusers with all its parts; on the hub, by its list of files.

    Args:
        source: as for `checkpoint`.
        revision: of a repository.
    """
    parts = (*FLUX1.classes, *FLUX1.tokenizers)
    if _is_elsewhere(source, revision) and str(source).endswith(CHECKPOINT_SUFFIX):
        return False
    repository = _place(source, revision)
    if repository is None:
        path = _embedded_or_path(source)
        if not is_diffusers_directory(path):
            return False
        named = read_json(path / "model_index.json", "a pipeline").get("_class_name")
        kind = KINDS.get(str(named), FLUX1)
        return all((path / part).is_dir() for part in (*kind.classes, *kind.tokenizers) if part not in kind.optional)
    paths = repository.files
    return is_diffusers_listing(paths) and {*parts} <= {path.partition("/")[0] for path in paths}


def is_transformer_directory(path: Path) -> bool:
    """Says whether a directory here holds a transformer alone: diffusers' folder of one, or a single file."""
    if is_diffusers_directory(path) or (path / "transformer").is_dir():
        return False
    config = path / "config.json"
    if config.is_file():
        return read_json(config, "a transformer").get("_class_name") in TRANSFORMERS
    return bool(transformer_files(path))


def _pipeline_here(path: Path) -> Path:
    """Returns the directory of a pipeline; a transformer alone is refused, with what completes it."""
    if path.is_file():
        transformer_of(Source(path))  # names what is given by mistake
    if path.name == "transformer" and path.is_dir() and is_diffusers_directory(path.parent):
        raise UserError(f"{path} is one part of the pipeline {path.parent}; give that directory.")
    if path.is_dir():
        refuse_alone(path, str(path))
    if path.is_file() or (path.is_dir() and is_transformer_directory(path)):
        raise UserError(_alone(str(path), str(path.parent) if is_diffusers_directory(path.parent) else "DIR"))
    return _directory(path, EMBEDDED)


def _embedded_or_path(model: str | Path) -> Path:
    refuse_mistyped(model)
    return EMBEDDED.get(str(model), Path(model))


def _alone(transformer: str, base: str) -> str:
    """Says that a transformer alone is not enough, and what completes it."""
    return (
        f"{transformer} is a transformer alone; name a diffusers directory with the other parts: --base {base}, in "
        f"generate, trace and `difffract convert flux {transformer} OUT --base {base}`."
    )


def fetch(place: Place, paths: Collection[str], *, quiet: bool = False, by_range: bool = False) -> Path:
    """Brings files of a repository, or of a folder in a bucket, to this machine.

    Args:
        place: the repository or folder.
        paths: some of its `files`.
        quiet: say nothing of how many come.
        by_range: of large weights in a bucket, fetch blocks when they are read.

    Returns:
        The folder in which they lie; nothing may be written there.
    """
    if isinstance(place, Listing):
        return cache.fetch(place, paths, by_range=by_range)
    return hub.fetch(place, paths, quiet=quiet)


def _place(text: str | Path, revision: str | None = None, subfolder: str | None = None) -> Place | None:
    """Opens the repository, or the folder in a bucket, that a text names; None for what lies here."""
    if is_remote(text):
        _refuse_beside(text, revision=revision)
        return listing(parse_address(f"{text}/{subfolder}" if subfolder else text))
    name = parse_hub_name(str(text), revision=revision, subfolder=subfolder)
    return None if name is None else open_repository(name)


def _is_elsewhere(text: str | Path, revision: str | None = None) -> bool:
    """Says whether a text names something on the hub or in a bucket."""
    return is_remote(text) or parse_hub_name(str(text), revision=revision) is not None


def _named(path: str | Path, revision: str | None, subfolder: str | None) -> tuple[Place | None, Directory]:
    """Returns the repository, or the folder in a bucket, that holds transcoders, or None and their directory."""
    if str(path) in SHIPPED:
        _refuse_beside(path, revision=revision, subfolder=subfolder)
        return None, Directory(SHIPPED[str(path)])
    place = _place(path, revision, subfolder)
    if place is not None:
        return place, Directory(Path())
    _refuse_beside(path, revision=revision)
    return None, Directory(_directory(Path(path) / (subfolder or ""), SHIPPED))


def _own(repository: Place, kind: str, *, weights: bool = True) -> Directory:
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
    if record.get("_class_name") in TRANSFORMERS:
        refuse_alone(path, str(name))
        raise UserError(_alone(str(name), "DIR"))
    if "format_version" not in record or record.get("kind") != kind:
        held = record.get("kind") if "format_version" in record else "files of another tool"
        raise UserError(f"{name} holds {held}, but {kind} is wanted here; {hint}.")
    files = own_files(repository.files)
    return Directory(fetch(repository, files, by_range=True) if weights else path, repository.pinned)


def _refuse_beside(path: str | Path, **given: str | None) -> None:
    """Refuses what was given beside a name or path that takes none of it."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(f"{path} does not lie on the hub, so it takes no {names[0]}; leave {names[0]} out.")


def refuse_mistyped(given: str | Path, embedded: Collection[str] = EMBEDDED) -> None:
    """Refuses a word that is much like the name of something embedded; names of files and paths are left alone.

    Args:
        given: what stands where a directory could.
        embedded: names; those of models if left out.

    Raises:
        UserError: with the name that was meant.
    """
    path = Path(given)
    near = get_close_matches(str(path), embedded, n=1, cutoff=0.7)
    known = str(path) in (*EMBEDDED, *SHIPPED)  # `evaluate` asks of transcoders whether they are a model
    if near and not known and not path.exists() and not path.suffix:
        raise UserError(f"{path} is not a directory, and nothing embedded has that name; did you mean `{near[0]}`?")


def _directory(path: Path, embedded: Collection[str]) -> Path:
    if not path.is_dir():
        refuse_mistyped(path, embedded)
        raise UserError(
            f"{path} is not a directory; give one that difffract or diffusers wrote, a repository as hf:OWNER/NAME, or "
            f"the name of what is embedded: {', '.join(embedded)}."
        )
    return path
