"""Prompts by number: deterministic, without end, and split into training and validation by what they say.

1. `read_prompts` reads a text file (one prompt a line), JSONL or Parquet (a column of them), or a Hugging Face dataset.
2. A prompt belongs to validation if the hash of its text falls into the validation share. So a prompt that occurs twice
   is never on both sides, in whatever order and however often the file is read.
3. `PromptFile` gives prompt number i: epoch after epoch in a new order (Grain). `PromptWorld` does so for a function
   `caption(i)` with no end, and steps over captions of the other side.

Both are `Prompts`: a function of a number. A run that stops and goes on needs to remember the number alone, and process
p of n takes the numbers p, p + n, p + 2n ... of the same order.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import grain

from difffract_jax.config import UserError

Split = Literal["train", "validation"]
COLUMNS = ("prompt", "caption", "text")
"""Names under which a JSONL file, a Parquet file or a dataset may hold its prompts."""
CANDIDATES = 4096
"""Captions of a world that are looked at for one prompt; at a validation share of 1% all fail once in 10^17."""


Prompts = Callable[[int], str]
"""Prompt number i, for any i from 0."""


def in_validation(prompt: str, share: float) -> bool:
    """Says whether a prompt belongs to validation.

    Args:
        prompt: its text.
        share: share of all prompts that do.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class PromptFile:
    """Prompts of a finite list, epoch after epoch in new orders.

    Attributes:
        prompts: those of one split.
        seed: of the orders.
    """

    prompts: tuple[str, ...]
    seed: int

    def __call__(self, number: int) -> str:
        """Returns prompt number `number`."""
        order: Any = grain.MapDataset.source(self.prompts).seed(self.seed).shuffle().repeat()
        return order[number]


@dataclass(frozen=True)
class PromptWorld:
    """Prompts of a function with no end.

    Attributes:
        caption: caption number i of the world, the same whenever it is asked for.
        split: side of the captions to give.
        share: share of captions that belong to validation.
    """

    caption: Callable[[int], str]
    split: Split
    share: float

    def __call__(self, number: int) -> str:
        """Returns prompt number `number`: the first of its own captions that lies on the right side."""
        for attempt in range(CANDIDATES):
            prompt = self.caption(number * CANDIDATES + attempt)
            if in_validation(prompt, self.share) == (self.split == "validation"):
                return prompt
        raise UserError(
            f"None of {CANDIDATES} captions belongs to {self.split} at a validation share of {self.share}; change it."
        )


def split_prompts(prompts: Sequence[str], share: float, seed: int) -> dict[Split, PromptFile]:
    """Splits a list of prompts.

    Args:
        prompts: all of them.
        share: share of prompts that belong to validation, in (0, 1).
        seed: of the orders.

    Raises:
        UserError: if a side would be empty.
    """
    sides: dict[Split, list[str]] = {"train": [], "validation": []}
    for prompt in prompts:
        sides["validation" if in_validation(prompt, share) else "train"].append(prompt)
    empty = [side for side, members in sides.items() if not members]
    if empty:
        raise UserError(
            f"Of {len(prompts)} prompts none falls to {empty[0]} at a validation share of {share}; "
            "give more prompts or another validation_share."
        )
    return {side: PromptFile(tuple(members), seed) for side, members in sides.items()}


def read_prompts(source: str) -> list[str]:
    """Reads prompts.

    Args:
        source: path of a `.txt`, `.jsonl` or `.parquet` file, or `hf:OWNER/NAME[:SPLIT[:COLUMN]]`.

    Raises:
        UserError: if there is nothing to read, or it is not text.
    """
    if source.startswith("hf:"):
        return _checked(source, _read_dataset(source))
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source} is not a file of prompts; give a .txt, .jsonl or .parquet file, or hf:OWNER/NAME.")
    if path.suffix == ".parquet":
        return _checked(source, _read_parquet(path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{source} is binary, no text; give one prompt a line, JSONL or Parquet.") from None
    if any("\0" in line for line in lines):
        raise UserError(f"{source} is binary, no text; give one prompt a line, JSONL or Parquet.")
    if path.suffix == ".jsonl":
        return _checked(source, [_field(source, number, line) for number, line in enumerate(lines, 1) if line.strip()])
    return _checked(source, lines)


def _checked(source: str, prompts: Sequence[Any]) -> list[str]:
    found = [prompt.strip() for prompt in prompts if isinstance(prompt, str) and prompt.strip()]
    if not found:
        raise UserError(f"{source} holds no prompts; give one prompt a line, or a column {', '.join(COLUMNS)}.")
    return found


def _field(source: str, number: int, line: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError:
        raise UserError(f"Line {number} of {source} is not valid JSON; give one object or string a line.") from None
    if isinstance(record, str):
        return record
    names = [name for name in COLUMNS if isinstance(record, dict) and name in record]
    if not names:
        raise UserError(f"Line {number} of {source} has no field {', '.join(COLUMNS)}; name the prompt one of these.")
    return record[names[0]]


def _extra(module: str, what: str) -> Any:
    """Imports a module of the extra `data`."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs the extra `data`; install it with pip install 'difffract_jax[data]'.") from None


def _read_parquet(path: Path) -> list[Any]:
    parquet = _extra("pyarrow.parquet", f"Reading {path}")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet ({said}); write or copy the file again.") from None
    names = [name for name in COLUMNS if name in table.column_names]
    if not names:
        raise UserError(f"{path} has the columns {', '.join(table.column_names)}; one must be {', '.join(COLUMNS)}.")
    return table.column(names[0]).to_pylist()


def _read_dataset(source: str) -> list[Any]:
    given = source.removeprefix("hf:").split(":")
    name, split, column = (*given, *("", "train", "")[len(given) :])[:3]
    if "@" in name or name.count("/") > 1:
        raise UserError(
            f"{source} is written like a model on the hub; a data set of prompts is hf:OWNER/NAME[:SPLIT[:COLUMN]], "
            "without revision or folder."
        )
    datasets = _extra("datasets", f"Reading {source}")
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The dataset {name} could not be read ({' '.join(str(error).split())[:200]}).") from None
    found = [name for name in (column, *COLUMNS) if name in rows.column_names]
    if not found:
        raise UserError(f"{source} has the columns {', '.join(rows.column_names)}; write hf:{name}:{split}:COLUMN.")
    return list(rows[found[0]])
