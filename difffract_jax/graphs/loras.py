"""LoRAs that were merged into a model's weights: what images and graphs record of them (pure Python)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MergedLora:
    """A LoRA that was merged.

    Attributes:
        name: of its file; of one from the hub, that of the file there, commit included.
        sha256: hash of the file.
        scale: factor of its change of the weights, 1 as trained.
    """

    name: str
    sha256: str
    scale: float

    def __str__(self) -> str:
        return f"{self.name}:{self.scale:g} (sha256 {self.sha256[:12]})"


def merged_identity(base: str, loras: Sequence[MergedLora]) -> str:
    """Returns the identity of a model with LoRAs merged: a hash of its own and theirs, and of their scales.

    Args:
        base: content hash of the model without them.
        loras: at least one; their order does not matter.
    """
    named = sorted((lora.sha256, lora.scale) for lora in loras)
    return hashlib.sha256(json.dumps([base, named]).encode()).hexdigest()


def texts_of(loras: Sequence[MergedLora]) -> str:
    """Returns how some LoRAs are written in a sentence, or in what a result records."""
    return ", ".join(map(str, loras))
