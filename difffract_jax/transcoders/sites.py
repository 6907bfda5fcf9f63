"""Which MLP sublayers have a transcoder: sites by name, in the order in which they are stacked.

A site is `img/3`, `txt/3` (double-stream blocks) or `single/5` (single-stream blocks). The img sites form one group,
the txt sites another, the single-stream sites a third, `joint`: within a group all sites have the same tokens. A stack
over all sites holds the groups in this order, each ascending.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from difffract_jax.config import UserError
from difffract_jax.models.blocks import FluxConfig

_PATTERN = re.compile(r"(img|txt|single|\*)/(\*|\d+(?:-\d+)?)")


class Sites(NamedTuple):
    """Blocks with a transcoder, ascending.

    Attributes:
        img: double-stream blocks, image stream.
        txt: double-stream blocks, text stream.
        joint: single-stream blocks, counted from the first of them.
    """

    img: tuple[int, ...]
    txt: tuple[int, ...]
    joint: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every site's name, in the order of the stack."""
        groups = zip(("img", "txt", "single"), self, strict=True)
        return tuple(f"{stream}/{layer}" for stream, layers in groups for layer in layers)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The groups that have sites, by name."""
        return {name: layers for name, layers in self._asdict().items() if layers}

    @property
    def slices(self) -> dict[str, slice]:
        """Where each group that has sites lies in the stack."""
        found, start = {}, 0
        for name, layers in self.groups.items():
            found[name] = slice(start, start + len(layers))
            start += len(layers)
        return found


def parse_sites(patterns: Sequence[str], config: FluxConfig) -> Sites:
    """Reads which sites are meant.

    Args:
        patterns: `img/3`, `txt/0-5`, `single/*`, `*/*` and the like.
        config: of the model.

    Raises:
        UserError: if a pattern is of another form, or names a block that the model does not have.
    """
    depths = {"img": config.depth_double, "txt": config.depth_double, "single": config.depth_single}
    found: dict[str, set[int]] = {stream: set() for stream in depths}
    for pattern in patterns:
        match = _PATTERN.fullmatch(pattern)
        if match is None:
            raise UserError(f"{pattern!r} names no sites; write STREAM/BLOCKS, as in img/3, txt/0-5, single/* or */*.")
        for stream in depths if match[1] == "*" else (match[1],):
            first, _, last = match[2].partition("-")
            chosen = range(depths[stream]) if first == "*" else range(int(first), int(last or first) + 1)
            beyond = [layer for layer in chosen if layer >= depths[stream]]
            if beyond and match[1] != "*":
                raise UserError(
                    f"The site {stream}/{beyond[0]} does not exist: the model has {config.depth_double} double-stream "
                    f"blocks (img, txt) and {config.depth_single} single-stream blocks, counted from 0."
                )
            found[stream].update(layer for layer in chosen if layer < depths[stream])
    if not any(found.values()):
        raise UserError(f"The sites {', '.join(patterns) or '(none)'} name no block of this model; write */* for all.")
    return Sites(*(tuple(sorted(layers)) for layers in found.values()))
