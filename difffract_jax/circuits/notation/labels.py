"""What features stand for: a labels file, read and written (NumPy only). `studies.scan` makes them.

The file is JSON, column by column so that it stays small. Per site, one entry per feature:

    kind step auroc                 what it detects best and how well; -1 for a feature that is never active
    content_kind _step _auroc       the same among factors other than the token's own place in its sequence
    density                         share of the tokens at which it is active
    examples                        `EXAMPLES` images in which it is strongest: image, step, position, value
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from difffract_jax.address import LABELS
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, text_of
from difffract_jax.storage.remote.cache import local_file

FORMAT_VERSION = 1
EXAMPLES = 3
"""Images kept of each feature."""
CLEAR = 0.6
"""AUROC from which on a label says what its feature detects; below lie features that are rarely active, too."""


class LabelExample(NamedTuple):
    """Where a feature is strong.

    Attributes:
        prompt: of the image.
        seed: of its starting noise.
        feature: with the position and the step.
        value: of the code there.
    """

    prompt: str
    seed: int
    feature: Feature
    value: float


class Detected(NamedTuple):
    """A factor that a feature detects.

    Attributes:
        factor: "shape", "colour", "object", "place", "relation", "row", "column" of an image token; "word", "shape",
            "colour", "relation", "position" of a text token; "" for a feature that is never active.
        value: which, as in "red".
        auroc: how well its code tells tokens with it from tokens without, on captions that did not choose the factor.
        step: denoising step in which it does.
        side: whose tokens, "img" or "txt".
    """

    factor: str
    value: str
    auroc: float
    step: int
    side: str

    def __str__(self) -> str:
        if not self.factor:
            return "never active"
        return f"{self.factor} {self.value} ({self.auroc:.2f})" if self.auroc >= CLEAR else "unclear"


class Label(NamedTuple):
    """What one feature stands for.

    Attributes:
        best: what it detects best.
        content: the same, among all factors but "row", "column" and "position".
        density: share of the tokens of its site at which it is active.
        examples: strongest first.
    """

    best: Detected
    content: Detected
    density: float
    examples: tuple[LabelExample, ...]

    def __str__(self) -> str:
        if self.best == self.content or str(self.content) == "unclear":
            return str(self.best)
        return f"{self.best}, {self.content}"


class Labels(NamedTuple):
    """The labels of a set of transcoders.

    Attributes:
        sites: site, as in "img/0" -> its labels, by feature.
        transcoders: content hash of the transcoders that they are about.
        record: how they were made.
    """

    sites: Mapping[str, Sequence[Label]]
    transcoders: str
    record: dict[str, Any]

    def __repr__(self) -> str:
        count = sum(map(len, self.sites.values()))
        facts = {"sites": ", ".join(self.sites), "transcoders": hash_text(self.transcoders)}
        return text_of(f"Labels of {count:,} features", facts)

    def of(self, feature: Feature) -> Label:
        """Returns the label of a feature.

        Raises:
            UserError: if there is none.
        """
        labels = self.sites.get(f"{feature.stream}/{feature.block}", ())
        if feature.feature >= len(labels):
            raise UserError(f"There is no label of {feature}; there are labels of {', '.join(self.sites)}.")
        return labels[feature.feature]


def read_labels(path: Path) -> Labels:
    """Reads a labels file.

    Args:
        path: the file, here or in a bucket.

    Raises:
        UserError: if it is not a labels file of this version.
    """
    try:
        stored = json.loads(local_file(path).read_text(encoding="utf-8"))
        version = stored["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not a file of labels; write one with `difffract features ... --scan`.") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, but this package reads {FORMAT_VERSION}.")
    sites = {name: _SiteLabels(name, columns, stored) for name, columns in stored["sites"].items()}
    return Labels(sites, stored["transcoders"], stored["record"])


@dataclass(frozen=True)
class _SiteLabels(Sequence[Label]):
    """A site's labels in a file's columns: thousands of objects in all, of which most callers want a few."""

    name: str
    columns: Mapping[str, Any]
    stored: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["examples"])

    @overload
    def __getitem__(self, number: int) -> Label: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[Label, ...]: ...

    def __getitem__(self, number: int | slice) -> Label | tuple[Label, ...]:
        if isinstance(number, slice):
            return tuple(self[one] for one in range(*number.indices(len(self))))
        stream, block = self.name.split("/")
        stored, number = self.stored, range(len(self))[number]
        flat, feature = self.columns["examples"][number], Feature(stream, int(block), number)
        starts = range(0, len(flat), 4)
        examples = (_example(feature, flat[i : i + 4], stored["text_tokens"], stored["images"]) for i in starts)
        best, content = (_detected(self.columns, prefix, number, stored["kinds"]) for prefix in ("", "content_"))
        return Label(best, content, self.columns["density"][number], tuple(examples))


def _detected(columns: Mapping[str, Any], prefix: str, number: int, kinds: list[Any]) -> Detected:
    kind, step, auroc = (columns[f"{prefix}{name}"][number] for name in ("kind", "step", "auroc"))
    side, factor, value = kinds[kind] if kind >= 0 else ("", "", "")
    return Detected(factor, value, auroc, step, side)


def _example(feature: Feature, flat: list[Any], text_tokens: int, images: list[Any]) -> LabelExample:
    image, step, position, value = flat
    side, group = None, LABELS[feature.stream]
    if len(group.streams) > 1:
        side = group.streams[int(position >= text_tokens)]
        position -= 0 if side == group.streams[0] else text_tokens
    prompt, seed = images[image]
    at = Feature(feature.stream, feature.block, feature.feature, (position,), (step,), side)
    return LabelExample(prompt, seed, at, value)
