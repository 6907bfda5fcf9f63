"""Which files of a repository the package reads: no second copy of the weights, no pictures, no pickled pipelines.

1. A pipeline of diffusers: `model_index.json`, configurations, tokenizers, and per part one set of safetensors of one
   precision, whole or in shards.
2. A directory that this package wrote: everything it has, wherever it came to lie.
3. Transcoders of the reference: one file per site, of the sites that are wanted.

Everything here looks at paths alone; `where` is what messages call the repository.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress

from converters.kinds import FOLDERS
from converters.weight_files import STEMS
from difffract_jax.config import UserError
from difffract_jax.transcoders.sites import are_chosen

INDEX = "model_index.json"
DESCRIBING = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(?:transformer|text_encoder(?:_[23])?|vae)/config\.json"
    r"|tokenizer(?:_[23])?/[^/]+\.(?:json|txt|model|jinja)"
)
OWN = re.compile(
    r"config\.json|labels\.json|[^/]+\.safetensors(?:\.index\.json)?|tokenizer(?:_[23])?/[^/]+\.(?:json|txt|model|jinja)"
)
"""Files of a directory that this package wrote."""
SITE = re.compile(
    r"(transcoder|sae)_(img|txt)_(\d+)(?:_(?:final|best|last|latest|ema|(?:step|epoch|iter)_?\d+))?"
    r"(\.(?:pt|safetensors|pth|bin|ckpt))"
)
SITE_SUFFIXES = (".pt", ".safetensors", ".pth", ".bin", ".ckpt")
"""Formats of a site's file, the first being taken where a repository has several."""
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(STEMS)})(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<late>\w+))?\.safetensors"
    rf"|(?P<indexed>{'|'.join(STEMS)})\.safetensors\.index(?:\.(?P<of>\w+))?\.json"
)


def is_diffusers_listing(paths: Collection[str]) -> bool:
    """Says whether a folder is a pipeline of diffusers."""
    return INDEX in paths


def is_own_listing(paths: Collection[str]) -> bool:
    """Says whether a folder is one that this package wrote."""
    return "config.json" in paths and INDEX not in paths


def is_reference_listing(paths: Iterable[str]) -> bool:
    """Says whether a folder has transcoders of the reference in it, a file per site."""
    return any(SITE.fullmatch(path) for path in paths)


def describing_files(paths: Iterable[str]) -> list[str]:
    """Returns the files of a pipeline of diffusers that say what it is: configurations and tokenizers."""
    return [path for path in paths if DESCRIBING.fullmatch(path)]


def own_files(paths: Iterable[str]) -> list[str]:
    """Returns the files of a directory that this package wrote."""
    return [path for path in paths if OWN.fullmatch(path)]


def weight_files(
    paths: Collection[str],
    parts: Iterable[str],
    where: str,
    variant: str | None = None,
    *,
    folders: Mapping[str, str] = FOLDERS,
) -> list[str]:
    """Returns the weights of parts of a pipeline of diffusers, each in one precision.

    Args:
        paths: of the repository.
        parts: "transformer", "t5", "clip" or "vae".
        where: the repository, for messages.
        variant: precision that is taken where a part has it, as in fp16; else the release's own, which no name tells,
            or the only one that there is.
        folders: part -> its folder; FLUX.1's if left out.

    Raises:
        UserError: naming every part that has no safetensors, or one that has several precisions to choose from.
    """
    chosen: list[str] = []
    lacking = []
    for part in parts:
        names = _inside(paths, folders[part])
        files = _one_precision(names, f"{where}/{folders[part]}", variant)
        chosen += [f"{folders[part]}/{name}" for name in files]
        if not files:
            lacking.append(f"{folders[part]}/ (found {', '.join(sorted(names)) or 'nothing'})")
    if lacking:
        raise UserError(
            f"{where} holds no safetensors in {'; '.join(lacking)}, so nothing was downloaded; give a repository, or a "
            "revision of it, that has the weights as safetensors."
        )
    return chosen


def listed_variants(paths: Collection[str]) -> set[str]:
    """Returns the variants that parts of a pipeline have, without the plain one."""
    return {of for folder in FOLDERS.values() for of, _ in _sets(_inside(paths, folder))} - {""}


def _inside(paths: Iterable[str], folder: str) -> list[str]:
    """Returns the paths in a folder, within it."""
    return [path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")]


def transformer_files_of(paths: Collection[str], where: str, variant: str | None = None) -> list[str]:
    """Returns the files of a folder that holds a transformer alone: its configuration, and weights of one precision.

    Args:
        paths: of the folder.
        where: the folder, for messages.
        variant: as for `weight_files`.

    Raises:
        UserError: if there are no safetensors.
    """
    files = _one_precision(paths, where, variant)
    if not files:
        named = ", ".join(sorted(path for path in paths if path.endswith(".safetensors"))) or "none"
        raise UserError(
            f"{where} holds no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}, so nothing was downloaded (its "
            f"safetensors: {named}); give one of these files, or another repository."
        )
    return ["config.json", *files]


def transcoder_files(paths: Collection[str], sites: Sequence[str] | None, where: str) -> list[str]:
    """Returns the files of transcoders, one per site.

    Args:
        paths: of the repository's folder.
        sites: those wanted, as in img/0-3; None for all.
        where: the folder, for messages.

    Raises:
        UserError: if there are none, naming the folders that hold some; none of some sites that are wanted; or several
            files of one site.
    """
    matches = [match for match in map(SITE.fullmatch, paths) if match is not None]
    if not matches:
        folders = sorted({path.rpartition("/")[0] for path in paths if SITE.fullmatch(path.rpartition("/")[2])} - {""})
        hint = f"name the folder that holds them: {' or '.join(f'{where}/{folder}' for folder in folders)}"
        raise UserError(
            f"{where} holds no files of transcoders such as transcoder_img_0.pt; "
            f"{hint if folders else 'give another repository, or folder in it'}."
        )
    held = [(match[2], int(match[3])) for match in matches]
    are_wanted = [True] * len(held) if sites is None else are_chosen(sites, held, where)
    chosen = _one_format(list(compress(matches, are_wanted)))
    for site, count in Counter((match[1], match[2], int(match[3])) for match in chosen).items():
        if count > 1:
            files = [match[0] for match in chosen if (match[1], match[2], int(match[3])) == site]
            raise UserError(
                f"{where} holds {' and '.join(files)}, all of {site[1]}/{site[2]}, so nothing was downloaded; name the "
                "sites that have one file each, or another folder."
            )
    return [match[0] for match in chosen]


def _one_format(matches: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """Returns the files of every site in the format that most sites have; a site without it, in one that it has."""
    counts = Counter(match[4] for match in matches)
    order: list[str] = sorted(SITE_SUFFIXES, key=lambda suffix: -counts[suffix])
    formats: dict[tuple[str, int], set[str]] = {}
    for match in matches:
        formats.setdefault((match[2], int(match[3])), set()).add(match[4])
    chosen = {site: min(suffixes, key=order.index) for site, suffixes in formats.items()}
    return [match for match in matches if match[4] == chosen[match[2], int(match[3])]]


def _one_precision(names: Collection[str], where: str, variant: str | None = None) -> list[str]:
    """Returns the weights of a folder in one precision: shards and their index, or the whole file.

    It is the choice that `converters.weight_files` makes in a directory, so that what else is cached changes nothing.
    """
    sets = _sets(names)
    variants = sorted({of for of, _ in sets} - {""})
    if not any(of == "" for of, _ in sets) and variant not in variants and len(variants) > (variant is None):
        raise UserError(
            f"{where} holds its weights in the variants {' and '.join(variants)} alone; choose one with "
            f'--variant {variants[0]} (in Python: variant="{variants[0]}").'
        )
    if sets:
        return sets[min(sets, key=lambda key: (key[0] != variant, key[0], STEMS.index(key[1])))]
    others = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    return others if len(others) == 1 else []


def _sets(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Returns the files of every precision and stem, of each the shards or the whole file."""
    groups: dict[tuple[str, str], list[str]] = {}
    for match in filter(None, map(_WEIGHTS.fullmatch, names)):
        key = match["variant"] or match["late"] or match["of"] or "", match["stem"] or match["indexed"]
        groups.setdefault(key, []).append(match[0])
    sets = {}
    for key, group in groups.items():
        whole = [name for name in group if name.endswith(".safetensors") and "-of-" not in name]
        # Beside shards, the whole file would be the same weights again; without them, an index leads nowhere.
        sets[key] = [name for name in group if name not in whole] if any("-of-" in name for name in group) else whole
    return {key: files for key, files in sets.items() if files}
