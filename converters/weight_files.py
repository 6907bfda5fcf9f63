"""Which files of a directory hold its weights: by the names that diffusers, transformers and people give them.

1. The name is taken apart: STEM, a variant as in `model.fp16.safetensors`, and a number as in `-00001-of-00003`, before
   or after the variant. An index, `STEM.safetensors.index.json` or `STEM.safetensors.index.VARIANT.json`, lists shards.
2. Names of one stem and variant are one `Choice`. An index comes before a single file, that before numbered shards
   without an index. An index none of whose shards is there counts only where there is nothing else: a download of one
   variant often brings the other's index.
3. The variant that is asked for is taken, else the files without one, else the only variant there is.
4. The stems of diffusers and transformers come first; a file of another name is taken where it is the only one.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from converters.quantised import BF16_FILES
from difffract_jax.config import UserError

STEMS = ("diffusion_pytorch_model", "model")
_NAME = re.compile(
    r"(?P<stem>[^.]+?)(\.(?P<variant>[^.]+?))?(-(?P<number>\d+)-of-(?P<count>\d+))?(\.(?P<late>[^.]+))?\.safetensors"
)
_INDEX = re.compile(r"(?P<stem>[^.]+)\.safetensors\.index(\.(?P<variant>[^.]+))?\.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class WeightFiles(NamedTuple):
    """The files of one checkpoint.

    Attributes:
        home: directory they lie in.
        names: their names.
        listed: key -> name of the file that an index says holds it; empty where there is no index.
        index: name of the index, "" where there is none.
    """

    home: Path
    names: tuple[str, ...]
    listed: dict[str, str]
    index: str


class Choice(NamedTuple):
    """Files of a directory that are one checkpoint.

    Attributes:
        stem: what their names begin with.
        variant: as in fp16, "" for none.
        order: 0 for an index, 1 for a single file, 2 for complete shards, 3 for incomplete ones.
        names: of the files that there should be.
        listed: see `WeightFiles`.
        index: see `WeightFiles`.
    """

    stem: str
    variant: str
    order: int
    names: tuple[str, ...]
    listed: dict[str, str]
    index: str


def locate(path: Path, variant: str | None = None) -> WeightFiles:
    """Finds the weights.

    Args:
        path: a file, which stands for all shards where it is one; or a directory.
        variant: which of several to take, as in fp16; a directory that has none takes its plain files.

    Raises:
        UserError: if there are none, several to choose from, or shards are missing.
    """
    if path.is_file():
        return WeightFiles(path.parent, _set_of(path), {}, "")
    if not path.exists():
        raise UserError(f"{path} does not exist; give a directory or a .safetensors file.")
    choices = _choices(path)
    if not choices:
        raise UserError(_lacking(path))
    chosen = _of_variant(path, choices, variant)
    best = min(chosen, key=lambda choice: (_place(choice.stem), choice.order))
    _check_complete(path, best)
    return WeightFiles(path, best.names, best.listed, best.index)


def variants(path: Path) -> set[str]:
    """Returns the variants that a directory holds, without the plain one."""
    return {choice.variant for choice in _choices(path)} - {""} if path.is_dir() else set()


def check_variant(what: str | Path, known: Collection[str], variant: str | None) -> None:
    """Refuses a variant that no part of a model has: most likely it is misspelt.

    Args:
        what: the model, for messages.
        known: variants that its parts have.
        variant: the one that is wanted, None for any.

    Raises:
        UserError: naming those that there are.
    """
    if variant is not None and variant not in known:
        held = f"those of {' and '.join(sorted(known))}" if known else "plain ones alone"
        raise UserError(
            f"{what} has no files of the variant {variant}, but {held}; leave --variant out, or name another."
        )


def _set_of(file: Path) -> tuple[str, ...]:
    """Returns the names of all shards of which a file is one; its own where it is whole."""
    for choice in _plain(file.parent):
        if choice.order > 1 and file.name in choice.names:
            _check_complete(file.parent, choice)
            return choice.names
    return (file.name,)


def _check_complete(path: Path, choice: Choice) -> None:
    if choice.order == 3:
        absent = [name for name in choice.names if not (path / name).exists()]
        raise UserError(
            f"{path} lacks {', '.join(absent)} of {len(choice.names)} numbered shards; download what is missing."
        )


def _choices(path: Path) -> list[Choice]:
    """Returns what there is to choose from: of the usual stems, or of the only other one."""
    choices = [*_indexed(path), *_plain(path)]
    present = [choice for choice in choices if any((path / name).exists() for name in choice.names)]
    usable = present or choices
    usual = [choice for choice in usable if choice.stem in STEMS]
    return usual or (usable if len({choice.stem for choice in usable}) == 1 else [])


def _indexed(path: Path) -> list[Choice]:
    matches = [match for file in sorted(path.glob("*.json")) if (match := _INDEX.fullmatch(file.name))]
    choices = []
    for match in matches:
        listed = _read_index(path / match[0])
        choices.append(
            Choice(match["stem"], match["variant"] or "", 0, tuple(dict.fromkeys(listed.values())), listed, match[0])
        )
    return choices


def _plain(path: Path) -> list[Choice]:
    """Returns single files and sets of numbered shards."""
    choices = []
    shards: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for file in sorted(path.glob("[!.]*.safetensors")):
        match = _NAME.fullmatch(file.name)
        if match is None or (match["variant"] and match["late"]):
            choices.append(Choice(file.name, "", 1, (file.name,), {}, ""))
            continue
        variant = match["variant"] or match["late"] or ""
        if match["number"] is None:
            choices.append(Choice(match["stem"], variant, 1, (file.name,), {}, ""))
        else:
            around = file.name[: match.start("number")], file.name[match.end("number") :]
            shards[match["stem"], variant, *around, match["count"]].add(file.name)
    for (stem, variant, before, after, count), names in shards.items():
        wanted = tuple(f"{before}{number:0{len(count)}}{after}" for number in range(1, int(count) + 1))
        choices.append(Choice(stem, variant, 2 if names >= set(wanted) else 3, wanted, {}, ""))
    return choices


def _of_variant(path: Path, choices: list[Choice], variant: str | None) -> list[Choice]:
    names = sorted({choice.variant for choice in choices} - {""})
    plain = [choice for choice in choices if not choice.variant]
    if variant is not None and variant not in names and not plain:
        raise UserError(
            f"{path} holds no weights of the variant {variant}, only of {', '.join(names)}; name one of them."
        )
    if variant is None and not plain and len(names) > 1:
        raise UserError(
            f"{path} holds its weights in the variants {' and '.join(names)}; choose one with --variant {names[0]} "
            f'(in Python: variant="{names[0]}").'
        )
    taken = variant if variant in names else "" if plain else names[0]
    return [choice for choice in choices if choice.variant == taken]


def _place(stem: str) -> int:
    return STEMS.index(stem) if stem in STEMS else len(STEMS)


def _lacking(path: Path) -> str:
    """Says what a directory holds in place of weights, and what to do."""
    names = sorted(item.name for item in path.iterdir())
    several = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if several:
        return f"{path} holds several checkpoints ({', '.join(several)}); give the file that is wanted."
    if pickles:
        return (
            f"{path} holds PyTorch's {', '.join(pickles)} and no safetensors; write them once more with "
            f'{_class_name(path)}.from_pretrained("{path}").save_pretrained("{path}"), which needs PyTorch.'
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{path} holds {', '.join(gguf)}, quantised weights that are not read; {BF16_FILES}."
    usual = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    return (
        f"{path} holds no {usual} (found {', '.join(names) or 'nothing'}); "
        "other formats must be saved as safetensors first."
    )


def _class_name(path: Path) -> str:
    """Returns which class of which library reads a directory's weights, by its configuration."""
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8-sig"))
        if "_class_name" in config:
            return f"diffusers.{config['_class_name']}"
        return f"transformers.{config['architectures'][0]}"
    except (OSError, ValueError, LookupError, TypeError):
        return "transformers.AutoModel"


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"])
        if not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError
        return listed
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{index} is not a valid index of shards; download it again.") from None
