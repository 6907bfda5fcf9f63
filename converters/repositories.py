"""Which files of a repository the package reads: no second copy of the weights, no pictures, no pickled pipelines.

1. A pipeline of diffusers: `model_index.json`, configurations, tokenizers, and per part one set of safetensors of one
   precision, whole or in shards.
2. A directory that this package wrote: everything it has, wherever it came to lie.
3. Transcoders of the reference: one file per site, of the sites that are wanted.

Everything here looks at paths alone; `where` is what messages call the repository.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import compress

from converters.pipelines import FOLDERS
from converters.weight_files import STEMS
from difffract_jax.config import UserError
from difffract_jax.transcoders.sites import are_chosen

INDEX = "model_index.json"
DESCRIBING = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json|(?:transformer|text_encoder|text_encoder_2|vae)/config\.json"
    r"|tokenizer(?:_2)?/[^/]+\.(?:json|txt|model)"
)
OWN = re.compile(
    r"config\.json|labels\.json|[^/]+\.safetensors(?:\.index\.json)?|tokenizer(?:_2)?/[^/]+\.(?:json|txt|model)"
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
VARIANTS = ("", "bf16", "fp32", "fp16")
"""Precisions in the order in which they are taken, before all others; no name is the release's own."""


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


def weight_files(paths: Collection[str], parts: Iterable[str], where: str, variant: str | None = None) -> list[str]:
    """Returns the weights of parts of a pipeline of diffusers, each in one precision.

    Args:
        paths: of the repository.
        parts: "transformer", "t5", "clip" or "vae".
        where: the repository, for messages.
        variant: precision that is taken where a part has it, as in fp16; the first of `VARIANTS` if left out.

    Raises:
        UserError: naming every part that has no safetensors.
    """
    chosen: list[str] = []
    lacking = []
    for part in parts:
        names = [path.removeprefix(f"{FOLDERS[part]}/") for path in paths if path.startswith(f"{FOLDERS[part]}/")]
        files = _one_precision(names, variant)
        chosen += [f"{FOLDERS[part]}/{name}" for name in files]
        if not files:
            lacking.append(f"{FOLDERS[part]}/ (found {', '.join(sorted(names)) or 'nothing'})")
    if lacking:
        raise UserError(
            f"{where} holds no safetensors in {'; '.join(lacking)}, so nothing was downloaded; give a repository, or a "
            "revision of it, that has the weights as safetensors."
        )
    return chosen


def transformer_files_of(paths: Collection[str], where: str, variant: str | None = None) -> list[str]:
    """Returns the files of a folder that holds a transformer alone: its configuration, and weights of one precision.

    Args:
        paths: of the folder.
        where: the folder, for messages.
        variant: as for `weight_files`.

    Raises:
        UserError: if there are no safetensors.
    """
    files = _one_precision(paths, variant)
    if not files:
        raise UserError(f"{where} holds no safetensors, so nothing was downloaded; give another repository.")
    return ["config.json", *files]


def transcoder_files(paths: Collection[str], sites: Sequence[str] | None, where: str) -> list[str]:
    """Returns the files of transcoders, one per site.

    Args:
        paths: of the repository's folder.
        sites: those wanted, as in img/0-3; None for all.
        where: the folder, for messages.

    Raises:
        UserError: if there are none, naming the folders that hold some; or none of some sites that are wanted.
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
    chosen = [True] * len(held) if sites is None else are_chosen(sites, held, where)
    wanted = list(compress(matches, chosen))
    counts = {suffix: sum(match[4] == suffix for match in wanted) for suffix in SITE_SUFFIXES}
    suffix = max(SITE_SUFFIXES, key=lambda one: counts[one])
    return [match[0] for match in wanted if match[4] == suffix]


def _one_precision(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Returns the weights of a folder in one precision: shards and their index, or the whole file."""
    sets: dict[tuple[str, str], list[str]] = {}
    for match in filter(None, map(_WEIGHTS.fullmatch, names)):
        key = match["variant"] or match["late"] or match["of"] or "", match["stem"] or match["indexed"]
        sets.setdefault(key, []).append(match[0])
    for key in sorted(sets, key=lambda key: (key[0] != variant, *_rank(key))):
        whole = [name for name in sets[key] if name.endswith(".safetensors") and "-of-" not in name]
        if any("-of-" in name for name in sets[key]):
            return [name for name in sets[key] if name not in whole]  # the whole file would be the same weights again
        if whole:
            return whole  # without the index, which leads to no shards
    return []


def _rank(key: tuple[str, str]) -> tuple[int, str, int]:
    """Orders precisions and stems; precisions of other names come last, by the alphabet."""
    variant, stem = key
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant, STEMS.index(stem)
