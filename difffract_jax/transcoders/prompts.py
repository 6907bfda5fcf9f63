"""Prompts by number: deterministic, without end, and split into training and validation by what they say.

1. `read_prompts` of `prompt_files.py`, offered here too, reads a text file (one prompt a line), JSONL or Parquet (a
   column of them), or a Hugging Face dataset.
2. A prompt belongs to validation if the hash of its text falls into the validation share. So a prompt that occurs twice
   is never on both sides, in whatever order and however often the file is read.
3. `PromptFile` gives prompt number i: epoch after epoch in a new order (Grain). `PromptWorld` does so for a function
   `caption(i)` with no end, and steps over captions of the other side.

Both are `Prompts`: a function of a number. A run that stops and goes on needs to remember the number alone, and process
p of n takes the numbers p, p + n, p + 2n ... of the same order.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grain

from difffract_jax.config import UserError
from difffract_jax.text_files import unicode_problem
from difffract_jax.transcoders.prompt_files import read_prompts

__all__ = ["PromptFile", "PromptWorld", "Prompts", "Split", "in_validation", "read_prompts", "split_prompts"]

Split = Literal["train", "validation"]
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
        UserError: if a side would be empty, or a prompt is not valid Unicode.
    """
    for number, prompt in enumerate(prompts, 1):
        problem = unicode_problem(prompt)
        if problem:
            raise UserError(f"Prompt {number} is not valid Unicode: it {problem}.")
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
