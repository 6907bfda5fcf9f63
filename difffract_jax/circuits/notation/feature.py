"""How features are written: STREAM/BLOCK/fN[@POSITIONS][#STEPS][~BRANCH].

    img/3/f401          feature 401 of image-stream block 3, at every position
    txt/0/f7@2          at text position 2
    img/2/f4@0-15,20#0,1    at positions 0 to 15 and 20, in steps 0 and 1
    single/5/f9@img12   of single-stream block 5, at image position 12 of the joint sequence
    img/2/f4~negative   in the evaluations with the negative prompt, of guidance by two branches; else ~prompt

Blocks, features, positions and steps count from 0; positions within their stream.
"""

import re
from dataclasses import dataclass

from difffract_jax.address import BRANCHES, LABELS
from difffract_jax.config import UserError
from difffract_jax.display import spans

_RANGES = r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*"
_PATTERN = re.compile(
    rf"(?P<stream>{'|'.join(LABELS)})/(?P<block>\d+)/f(?P<feature>\d+)"
    rf"(?:@(?P<side>img|txt)?(?P<positions>{_RANGES}))?(?:#(?P<steps>{_RANGES}))?"
    rf"(?:~(?P<branch>{'|'.join(BRANCHES)}))?"
)


@dataclass(frozen=True)
class Feature:
    """A feature of one MLP sublayer's transcoder, and where and when it is meant.

    Attributes:
        stream: label of the site: "img", "txt" or, for single-stream blocks, "single".
        block: number of the site.
        feature: of the site's transcoder.
        positions: positions within the stream, ascending; None for all, or for wherever it is strongest.
        steps: denoising steps, ascending; None for all.
        side: for sites of several streams, whose positions are meant, "img" or "txt"; else None.
        branch: of guidance by two branches, "prompt" or "negative"; None for both, as a target the prompt's.
    """

    stream: str
    block: int
    feature: int
    positions: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    side: str | None = None
    branch: str | None = None

    def __post_init__(self) -> None:
        group = LABELS.get(self.stream)  # None for a label of a foreign model, whose layout tells
        if group and (self.side is not None) != (len(group.streams) > 1 and self.positions is not None):
            raise UserError(
                f"Positions in single-stream blocks need their stream, as in single/5/f9@img12, and only there; "
                f"got {self.stream}/{self.block}/f{self.feature}."
            )

    @staticmethod
    def parse(text: str) -> "Feature":
        """Reads a feature.

        Args:
            text: in the form of the module docstring.

        Raises:
            UserError: if it is not of that form.

        Example:
            >>> Feature.parse("img/2/f4@0-2,20#1").positions
            (0, 1, 2, 20)
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise UserError(
                f"{text!r} is not a feature; write STREAM/BLOCK/fN[@POSITIONS][#STEPS][~BRANCH] with a stream "
                f"{', '.join(LABELS)}, "
                "as in img/2/f401@12 or txt/0/f7@0-3#1."
            )
        part = match.groupdict()
        return Feature(
            part["stream"],
            int(part["block"]),
            int(part["feature"]),
            _numbers(part["positions"], text),
            _numbers(part["steps"], text),
            part["side"],
            part["branch"],
        )

    def __str__(self) -> str:
        positions = "" if self.positions is None else f"@{self.side or ''}{spans(self.positions)}"
        steps = "" if self.steps is None else f"#{spans(self.steps)}"
        branch = "" if self.branch is None else f"~{self.branch}"
        return f"{self.stream}/{self.block}/f{self.feature}{positions}{steps}{branch}"


def _numbers(ranges: str | None, text: str) -> tuple[int, ...] | None:
    """Reads `0-15,20`."""
    if ranges is None:
        return None
    found: set[int] = set()
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        if last and int(last) < int(first):
            raise UserError(f"{text!r} counts from {first} down to {last}; write {last}-{first}.")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
