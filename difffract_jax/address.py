"""Where things stand in a model, and how that is written: streams, stacks, blocks, sites and positions.

1. A *stream* is a residual stream with tokens of its own: `img` and `txt`.
2. A *stack* is a run of blocks that are alike. FLUX has two, `double` and `single`. Blocks are numbered through the
   model, stack after stack; in text a block is STACK/N, counted from the first of its stack: double/2, single/0.
3. A *group* is what the MLP sublayers of one stack that read the same sequence of tokens have in common: in FLUX `img`
   and `txt` of the double-stream blocks, and `joint` of the single-stream blocks, whose sequence holds the text, then
   the image. A model's groups are numbered stack by stack; "one per group" is always a tuple in this order.
4. A *site* is one MLP sublayer: a group in a block. In text it is LABEL/N, counted from the first block that has the
   label: img/3, txt/0, single/5.
5. A *row* is a place in a group's sequence; a *position* is a place in a stream.

`Layout` knows the order of all of these for one model; no other module does arithmetic on them. Plain Python and NumPy.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.config import UserError

IMG, TXT, LATENT = range(3)
"""Codes of the streams in graph files; the packed latents count as a stream of their own."""
STREAMS = ("img", "txt", "latent")
"""The streams' names, by code."""

PROMPT, NEGATIVE = range(2)
"""Codes of the branches of guidance; where a step is one evaluation, it is of the prompt."""
BRANCHES = ("prompt", "negative")
"""The branches' names, by code."""


class Group(NamedTuple):
    """What the MLP sublayers of a stack that read the same sequence have in common.

    Attributes:
        name: as files of transcoders call it.
        label: as addresses of sites and features call it.
        streams: whose tokens the sequence holds, in order.
        modulations: names of the modulations that a block has for it, in the order of `Block.modulations`; none where a
            block does not offer them.
        mlp: whether there are MLP sublayers: False for a sequence that attention reads and nothing is written to, as
            the text in the last block of Stable Diffusion 3. It has no sites, and what stands for its MLPs gives zeros.
    """

    name: str
    label: str
    streams: tuple[str, ...]
    modulations: tuple[str, ...] = ()
    mlp: bool = True

    def rows(self, tokens: "Tokens") -> int:
        """Returns the length of the sequence."""
        return sum(getattr(tokens, stream) for stream in self.streams)


_OF_BOTH = tuple(f"{layer}_{kind}" for layer in ("attn", "mlp") for kind in ("shift", "scale", "gate"))
IMAGE = Group("img", "img", ("img",), _OF_BOTH)
TEXT = Group("txt", "txt", ("txt",), _OF_BOTH)
JOINT = Group("joint", "single", ("txt", "img"), ("shift", "scale", "gate"))
GROUPS = (IMAGE, TEXT, JOINT)
"""The groups that FLUX's blocks have, by number."""
LABELS = {group.label: group for group in GROUPS}
"""Labels that addresses may have where no model is at hand to ask."""
FINAL = ("shift", "scale")
"""Names of the modulations of the last norm."""


class Stack(NamedTuple):
    """A run of blocks that are alike.

    Attributes:
        name: as the model's weights and the names of blocks call it.
        depth: how many blocks.
        groups: of each block's MLP sublayers.
    """

    name: str
    depth: int
    groups: tuple[Group, ...]


class Tokens(NamedTuple):
    """How many tokens each stream has in a run.

    Attributes:
        img: image tokens.
        txt: text tokens, padding included.
    """

    img: int
    txt: int


@dataclass(frozen=True)
class Layout:
    """The order of a model's stacks, blocks and groups.

    Attributes:
        stacks: in the order of the forward pass.
    """

    stacks: tuple[Stack, ...]

    @property
    def flux_depths(self) -> tuple[int, int] | None:
        """Double- and single-stream blocks, if the layout is FLUX's; else None."""
        depths = [stack.depth for stack in self.stacks]
        return (depths[0], depths[1]) if len(depths) == 2 and self == flux_layout(*depths) else None

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return sum(stack.depth for stack in self.stacks)

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """First block of every stack."""
        return tuple(sum(stack.depth for stack in self.stacks[:i]) for i in range(len(self.stacks)))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups, stack by stack."""
        return tuple(group for stack in self.stacks for group in stack.groups)

    @cached_property
    def stack_of_group(self) -> tuple[int, ...]:
        """The stack of every group, by number."""
        return tuple(i for i, stack in enumerate(self.stacks) for _ in stack.groups)

    def stack_of_block(self, block: int) -> int:
        """Returns the stack that a block is in."""
        return next(i for i in range(len(self.stacks)) if block in self.blocks_of_stack(i))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The groups' names, each once."""
        return tuple(dict.fromkeys(group.name for group in self.groups))

    @cached_property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Label -> the blocks that have it, ascending; a site's number counts these."""
        sites = {
            (group.label, block)
            for number, group in enumerate(self.groups)
            if group.mlp
            for block in self.blocks_of(number)
        }
        return {label: tuple(b for b in blocks if (label, b) in sites) for label, blocks in self._numbered.items()}

    @cached_property
    def _numbered(self) -> dict[str, tuple[int, ...]]:
        """The same with blocks whose group of that label has no MLP, which modulations are named by too."""
        found: dict[str, tuple[int, ...]] = {}
        for group, stack in zip(self.groups, self.stack_of_group, strict=True):
            found[group.label] = found.get(group.label, ()) + tuple(self.blocks_of_stack(stack))
        return found

    @cached_property
    def sides(self) -> tuple[tuple[int, str], ...]:
        """Every group with each stream that its sequence holds: (number of the group, name of the stream)."""
        return tuple((number, stream) for number, group in enumerate(self.groups) for stream in group.streams)

    def groups_of_stack(self, stack: int) -> range:
        """Returns the numbers of a stack's groups."""
        first = sum(len(one.groups) for one in self.stacks[:stack])
        return range(first, first + len(self.stacks[stack].groups))

    def blocks_of_stack(self, stack: int) -> range:
        """Returns the blocks of a stack."""
        return range(self.firsts[stack], self.firsts[stack] + self.stacks[stack].depth)

    def blocks_of(self, group: int) -> range:
        """Returns the blocks of a group's stack."""
        return self.blocks_of_stack(self.stack_of_group[group])

    def depth_of(self, name: str) -> int:
        """Returns how many sites there are under a group's name."""
        return len(self.labels[self.named(name).label])

    def named(self, name: str) -> Group:
        """Returns the first group of a name."""
        return next(group for group in self.groups if group.name == name)

    @cached_property
    def _group_at(self) -> np.ndarray:
        """The group of every block and stream, [block stream]; -1 where the block has no MLP for the stream."""
        table = np.full((self.depth, len(STREAMS)), -1)
        for number, group in enumerate(self.groups):
            for stream in group.streams:
                table[self.blocks_of(number), STREAMS.index(stream)] = number
        return table

    def groups_at(self, block: Any, stream: Any) -> np.ndarray:
        """Returns the group of each block and stream; -1 where there is none, as for inputs and outputs.

        Args:
            block: numbers of blocks.
            stream: codes of streams, as many.
        """
        block, stream = np.asarray(block, np.int64), np.asarray(stream, np.int64)
        inside = (block >= 0) & (block < self.depth)
        return np.where(inside, self._group_at[np.where(inside, block, 0), stream], -1)

    def rows_at(self, group: Any, stream: Any, position: Any, tokens: Tokens) -> np.ndarray:
        """Returns the place in its group's sequence of each position of a stream; positions without a group stay.

        Args:
            group: numbers of groups, -1 for none.
            stream: codes of streams, as many.
            position: within the stream, as many.
            tokens: of the run.
        """
        group, stream = np.asarray(group, np.int64), np.asarray(stream, np.int64)
        before = np.zeros((len(self.groups) + 1, len(STREAMS)), np.int64)
        for number, one in enumerate(self.groups):
            for place, name in enumerate(one.streams):
                before[number, STREAMS.index(name)] = sum(getattr(tokens, s) for s in one.streams[:place])
        return np.asarray(np.asarray(position, np.int64) + before[group, stream])

    def place(self, group: int, row: int, tokens: Tokens) -> str:
        """Returns how a row of a group's sequence is written: 7, or img7 where the sequence holds several streams."""
        stream, position = (int(column[row]) for column in self.sequence(group, tokens))
        return f"{STREAMS[stream] if len(self.groups[group].streams) > 1 else ''}{position}"

    def group_of(self, label: str, number: int) -> int:
        """Returns the group of the site that is written LABEL/N.

        Raises:
            UserError: if the model does not have it.
        """
        block = self.block_of(label, number)
        return next(i for i, group in enumerate(self.groups) if group.label == label and block in self.blocks_of(i))

    def sequence(self, group: int, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Returns stream and position of every row of a group's sequence.

        Args:
            group: number of the group.
            tokens: of the run.
        """
        streams = self.groups[group].streams
        counts = [getattr(tokens, stream) for stream in streams]
        codes = np.repeat([STREAMS.index(stream) for stream in streams], counts)
        return codes, np.concatenate([np.arange(count) for count in counts])

    def block_name(self, block: int) -> str:
        """Returns how a block is written: double/2, single/0."""
        stack = max(i for i, first in enumerate(self.firsts) if first <= block)  # also of a block beyond the last
        return f"{self.stacks[stack].name}/{block - self.firsts[stack]}"

    def block_number(self, stack: str, number: int) -> int:
        """Returns the block that is written STACK/N.

        Raises:
            UserError: if the model does not have it.
        """
        for one, first in zip(self.stacks, self.firsts, strict=True):
            if one.name == stack and 0 <= number < one.depth:
                return first + number
        known = [f"{one.name}/0 to {one.name}/{one.depth - 1}" for one in self.stacks if one.depth]
        raise UserError(f"There is no block {stack}/{number}; the model has {' and '.join(known)}.")

    def site_number(self, block: int, stream: int) -> tuple[str, int]:
        """Returns label and number of the site that works on a stream in a block.

        Args:
            block: number of the block.
            stream: code of the stream.
        """
        label = self.groups[int(self.groups_at(block, stream))].label
        return label, self._numbered[label].index(block)

    def side(self, block: int, stream: int) -> str | None:
        """Returns the name of the stream where a site has several, so that a position must say which; else None."""
        group = self.groups[int(self.groups_at(block, stream))]
        return STREAMS[stream] if len(group.streams) > 1 else None

    def site_name(self, block: int, stream: int) -> str:
        """Returns how the site that works on a stream in a block is written: img/3, single/0."""
        return "/".join(map(str, self.site_number(block, stream)))

    def modulation_name(self, block: int, stream: int, row: int) -> str:
        """Returns how a modulation is written: img/3/mlp_gate, single/0/scale, or final/shift behind the last block.

        Args:
            block: number of the block; the number of all blocks for the last norm.
            stream: code of a stream that the modulation is of.
            row: of the modulations of the block's group, or of the last norm.
        """
        if block >= self.depth:
            return f"final/{FINAL[row]}"
        return f"{self.site_name(block, stream)}/{self.groups[int(self.groups_at(block, stream))].modulations[row]}"

    def block_of(self, label: str, number: int) -> int:
        """Returns the block of the site that is written LABEL/N.

        Raises:
            UserError: if the model does not have it.
        """
        blocks = self.labels.get(label, ())
        if not 0 <= number < len(blocks):
            raise UserError(f"The site {label}/{number} does not exist: the model has {self.describe()}.")
        return blocks[number]

    def describe(self) -> str:
        """Returns the sites that there are, in words."""
        return " and ".join(
            f"{label}/0 to {label}/{len(blocks) - 1}" for label, blocks in self.labels.items() if blocks
        )

    def streams_of(self, label: str) -> tuple[str, ...]:
        """Returns whose tokens the sequence of a label's sites holds, in order."""
        return next((group.streams for group in self.groups if group.label == label), ())


def flux_layout(double: int, single: int) -> Layout:
    """Returns the layout of FLUX.1: blocks of two streams, then blocks of the joint sequence.

    Args:
        double: double-stream blocks.
        single: single-stream blocks.
    """
    return Layout((Stack("double", double, (IMAGE, TEXT)), Stack("single", single, (JOINT,))))


STACKS = tuple(stack.name for stack in flux_layout(0, 0).stacks)
"""Names of stacks that addresses of blocks may have where no model is at hand to ask."""


def read_steps(text: int | str) -> tuple[int, int]:
    """Reads `2` or `0-3`.

    Args:
        text: a step, or the first and the last.

    Returns:
        First and last step; the same twice for one.

    Raises:
        UserError: if it is neither, or descends.

    Example:
        >>> read_steps("0-3"), read_steps(2)
        ((0, 3), (2, 2))
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text).strip())
    if match is None:
        raise UserError(f"step must be a step, as in 1, or steps in a row, as in 0-3, but got {str(text)!r}.")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UserError(f"The steps {text} count down; write {last}-{first}.")
    return first, last
