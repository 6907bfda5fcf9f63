"""Edits laid out as arrays for the sizes of a run, so that what is edited is data and one compilation serves all.

1. `lay_out` makes one table per group of sites, block by block; edits that do nothing fill up what a block has fewer.
2. `apply_edits` runs one block's table over its code, in the order of the edits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.address import BRANCHES, PROMPT, Group, Layout
from difffract_jax.circuits.notation.edits import (
    Edit,
    Part,
    WholeSite,
    check_stream,
    refuse_contradictions,
    site_part,
)
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Streams
from difffract_jax.models.pipeline import Run
from difffract_jax.models.stacks import sequences
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.transcoder import TranscoderSet

LEAST_MAXIMUM = 1e-6
"""A feature's maximum counts as at least this where a threshold is a share of it, as in the reference."""


class EditTable(NamedTuple):
    """The edits of one group, block by block; `edit` counts a block's, filled up with edits that do nothing.

    Attributes:
        feature: feature of each edit; -1 for all.
        scale: of the code.
        offset: added to it.
        threshold: share of the maximum; -1 for all positions.
        positions: positions each edit acts on; `rows` are those of the group's sequence.
        steps: evaluations each edit acts in; with guidance by two branches a step has two.
    """

    feature: Int[Any, "*table"]
    scale: Float[Any, "*table"]
    offset: Float[Any, "*table"]
    threshold: Float[Any, "*table"]
    positions: Bool[Any, "*table rows"]
    steps: Bool[Any, "*table evaluation"]


class CodeTable(NamedTuple):
    """Edits of every code of one group, block by block; the code becomes scale * code + offset.

    Attributes:
        scale: of each code.
        offset: added to it.
    """

    scale: Float[Any, "*table step rows feat"]
    offset: Float[Any, "*table step rows feat"]


class EditLayers(NamedTuple):
    """One group's edited sites.

    Attributes:
        slot: place of each block's transcoder in the stack.
        touched: whether the block is edited, or replaced.
        live: positions that form `replace` replaces in each branch: all that count, and those that an edit names.
        edits: what is done there.
    """

    slot: Int[Any, "layer"]
    touched: Bool[Any, "layer"]
    live: Bool[Any, "*batch layer branch rows"]
    edits: EditTable | CodeTable


def lay_out(
    edits: Sequence[Edit],
    layout: Layout,
    tcs: TranscoderSet,
    run: Run,
    text_mask: Bool[np.ndarray, "*branch txt"],
    replaced: Sequence[WholeSite] = (),
    width: int | None = None,
    dtype: DTypeLike = np.float32,
) -> tuple[EditLayers, ...]:
    """Lays out the edits of one image.

    Args:
        edits: what to change, in order.
        layout: of the model.
        tcs: its transcoders.
        run: sizes and schedule.
        text_mask: text positions that edits without positions act on, those of each branch or the same of all.
        replaced: sites that count as edited though no edit names them.
        width: edits that every block gets, filling included; as many as the fullest needs if left out.
        dtype: of the tables' numbers.

    Returns:
        `EditLayers` of NumPy arrays, per group.

    Raises:
        UserError: if an edit names a site, feature, position or step that does not exist, acts on no token, or
            contradicts another.
    """
    refuse_contradictions(edits)
    parts = _placed(edits, tcs.sites, run.branches)
    wholes = [site_part(site) for site in replaced]
    also = {_block(part, layout) for whole in wholes for part in _split(whole, tcs.sites, str(whole[:2]))}
    for edit, part in parts:
        _check(edit, part, layout, tcs.config.features, run)
    widest = _fullest(parts) if width is None else width
    masks = np.broadcast_to(text_mask, (run.branches, run.text_tokens))
    by_block: dict[tuple[str, int], list[tuple[Edit, Part]]] = {}
    for edit, part in parts:
        by_block.setdefault(_block(part, layout), []).append((edit, part))
    tables = []
    for number, (group, slots) in enumerate(zip(layout.groups, tcs.sites.slots(layout), strict=True)):
        blocks = layout.blocks_of(number)
        edited = [by_block.get((group.label, block), []) for block in blocks]
        slot = np.array([slots.get(block, 0) for block in blocks], np.int32)
        touched = [bool(own) or (group.label, block) in also for own, block in zip(edited, blocks, strict=True)]
        live, table = _tables(group, edited, run, masks, widest, dtype)
        tables.append(EditLayers(slot, np.array(touched, bool), live, table))
    return tuple(tables)


def edits_per_block(edits: Sequence[Edit], sites: SiteSet, branches: int = 1) -> int:
    """Returns how many edits the fullest block has, rounded up to a power of two so that compilations are shared.

    Args:
        edits: of one image.
        sites: that have a transcoder.
        branches: of the run; an edit that names none acts in each by a place of its own.
    """
    return _fullest(_placed(edits, sites, branches))


def _placed(edits: Sequence[Edit], sites: SiteSet, branches: int) -> list[tuple[Edit, Part]]:
    """Returns every part of the edits once for each site and branch that it means."""
    pairs = [(edit, part) for edit in edits for whole in edit.parts for part in _split(whole, sites, str(edit))]
    if branches == 1:
        return pairs
    named = [(edit, part, BRANCHES if part.branch is None else (part.branch,)) for edit, part in pairs]
    return [(edit, part._replace(branch=branch)) for edit, part, means in named for branch in means]


def _fullest(parts: Sequence[tuple[Edit, Part]]) -> int:
    at = [part[:2] for _, part in parts]
    most = max((at.count(place) for place in set(at)), default=0)
    return 1 << (most - 1).bit_length() if most else 0


def _split(part: Part, sites: SiteSet, name: str) -> list[Part]:
    """Returns the part once for every site that it means."""
    check_stream(part.stream)
    numbers = sites.labels.get(part.stream, ())
    if part.block is None and numbers:
        return [part._replace(block=number) for number in numbers]
    if part.block not in numbers:
        where = part.stream if part.block is None else f"{part.stream}/{part.block}"
        known = ", ".join(map(str, numbers)) or "none"
        raise UserError(f"There is no transcoder at {where}; blocks with one: {known}.")
    return [part]


def _block(part: Part, layout: Layout) -> tuple[str, int]:
    """Returns label and block of a part's site."""
    assert part.block is not None  # `_split` has numbered it
    return part.stream, layout.block_of(part.stream, part.block)


def _check(edit: Edit, part: Part, layout: Layout, features: int, run: Run) -> None:
    streams = (part.side,) if part.side else layout.streams_of(part.stream)
    for what, values, end in (
        ("feature", (part.feature,), features),
        ("position", part.positions or (), sum(getattr(run.tokens, stream) for stream in streams)),
        ("step", part.steps or (), run.steps),
        ("image token", edit.region or (), run.tokens.img),
    ):
        beyond = [value for value in values if value >= end or (value < 0 and what != "feature")]
        if beyond:
            raise UserError(f"The edit of {edit.feature} names {what} {beyond[0]}, but there are 0 to {end - 1}.")
    if part.branch not in (None, *BRANCHES[: run.branches]):
        raise UserError(
            f"The edit of {edit.feature} names the branch {part.branch}, but each step of this run is one evaluation, "
            "with the prompt; leave the branch out."
        )
    if part.steps is not None and not part.steps:
        raise UserError(f"The edit of {edit.feature} names an empty set of steps; leave the steps out for all.")


def _positions(edit: Edit, part: Part, group: Group, live: Streams) -> Bool[np.ndarray, "rows"]:
    """Returns the rows of the group's sequence that a part acts on; `live` are those of edits without positions."""
    several = len(group.streams) > 1
    if part.positions is not None:
        stream = part.side or group.streams[-1]
        named = np.zeros_like(getattr(live, stream))
        named[list(part.positions)] = True
        live = live._replace(**{stream: named})
    if edit.region is not None:
        live = live._replace(img=live.img & np.isin(np.arange(live.img.size), edit.region))
    if several and (part.side or edit.region is not None):
        # A side, or else a region, which is of the image, leaves the other stream alone.
        other = "txt" if (part.side or "img") == "img" else "img"
        live = live._replace(**{other: np.zeros_like(getattr(live, other))})
    rows = _rows(group, live)
    if not rows.any():
        raise UserError(
            f"The edit of {edit.feature} acts on no token: its positions and region have none in common, or are empty."
        )
    return rows


def _rows(group: Group, live: Streams) -> Bool[np.ndarray, "rows"]:
    """Returns which rows of the group's sequence are marked in its streams."""
    return sequences(live, (group,), axis=0)[0]


def _tables(
    group: Group,
    edited: Sequence[Sequence[tuple[Edit, Part]]],
    run: Run,
    text_masks: Bool[np.ndarray, "branch txt"],
    width: int,
    dtype: DTypeLike,
) -> tuple[Bool[np.ndarray, "layer branch rows"], EditTable]:
    """Returns a group's live positions and its edits, block by block.

    Args:
        group: of the sites.
        edited: each block's edits.
        run: sizes and schedule.
        text_masks: text positions that edits without positions act on.
        width: edits that every block gets.
        dtype: of the table's numbers.
    """
    shape, tokens = (len(edited), width), [Streams(np.ones(run.tokens.img, bool), mask) for mask in text_masks]
    feature, threshold = np.full(shape, -1, np.int32), np.full(shape, -1.0, dtype)
    scale, offset = np.ones(shape, dtype), np.zeros(shape, dtype)
    live = np.tile(np.stack([_rows(group, one) for one in tokens]), (shape[0], 1, 1))
    positions, on = np.zeros((*shape, live.shape[2]), bool), np.zeros((*shape, run.steps, run.branches), bool)
    for layer, own in enumerate(edited):
        for place, (edit, part) in enumerate(own):
            at = layer, place
            feature[at] = part.feature
            scale[at], offset[at] = edit.affine
            threshold[at] = -1.0 if edit.threshold is None else edit.threshold
            branch = PROMPT if part.branch is None else BRANCHES.index(part.branch)
            positions[at] = _positions(edit, part, group, tokens[branch])
            on[at][slice(None) if part.steps is None else list(part.steps), branch] = True
            live[layer, branch] |= positions[at]
    return live, EditTable(feature, scale, offset, threshold, positions, on.reshape(*shape, run.steps * run.branches))


def apply_edits(edits: EditTable | CodeTable, z: Float[Array, "rows feat"], step: Array) -> Float[Array, "rows feat"]:
    """Edits the code of one site.

    Args:
        edits: one block's.
        z: the code.
        step: number of the evaluation, see `models.guidance`.
    """
    if isinstance(edits, CodeTable):
        return edits.scale[step].astype(z.dtype) * z + edits.offset[step].astype(z.dtype)

    def one(z: Array, edit: EditTable) -> tuple[Array, None]:
        column = z[:, edit.feature]
        largest = jnp.max(jnp.where(edit.positions, column, 0))
        above = column > edit.threshold.astype(z.dtype) * jnp.maximum(largest, LEAST_MAXIMUM)
        rows = edit.steps[step] & edit.positions & (above | (edit.threshold < 0))
        columns = (jnp.arange(z.shape[1]) == edit.feature) | (edit.feature < 0)
        changed = edit.scale.astype(z.dtype) * z + edit.offset.astype(z.dtype)
        return jnp.where(rows[:, None] & columns[None, :], changed, z), None

    return jax.lax.scan(one, z, edits)[0]
