"""Edits laid out as arrays for the sizes of a run, so that what is edited is data and one compilation serves all.

1. Sites come in three groups: `img`, `txt`, and `joint` for single-stream blocks, whose sequence is text, then image.
2. `lay_out` makes one table per group, block by block; a block's edits are filled up with edits that do nothing.
3. `apply_edits` runs one block's table over its code, in the order of the edits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.circuits.edits import Edit, Part, Site, check_stream, refuse_contradictions
from difffract_jax.config import UserError
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.pipeline import Run
from difffract_jax.transcoders.transcoder import TranscoderSet

LEAST_MAXIMUM = 1e-6
"""A feature's maximum counts as at least this where a threshold is a share of it, as in the reference."""
GROUP = {"img": "img", "txt": "txt", "single": "joint"}
"""Stream as features name it -> group of sites."""


class EditTable(NamedTuple):
    """The edits of one group, block by block; `edit` counts a block's, filled up with edits that do nothing.

    Attributes:
        feature: feature of each edit; -1 for all.
        scale: of the code.
        offset: added to it.
        threshold: share of the maximum; -1 for all positions.
        positions: positions each edit acts on; `rows` are those of the group's sequence.
        steps: steps each edit acts in.
    """

    feature: Int[Any, "*table"]
    scale: Float[Any, "*table"]
    offset: Float[Any, "*table"]
    threshold: Float[Any, "*table"]
    positions: Bool[Any, "*table rows"]
    steps: Bool[Any, "*table step"]


class EditLayers(NamedTuple):
    """One group's edited sites.

    Attributes:
        slot: place of each block's transcoder in the stack.
        touched: whether the block is edited, or replaced.
        live: positions that form `replace` replaces: all that count, and those that an edit names.
        edits: what is done there.
    """

    slot: Int[Any, "layer"]
    touched: Bool[Any, "layer"]
    live: Bool[Any, "*batch layer rows"]
    edits: EditTable


class Groups(NamedTuple):
    """One thing per group of sites.

    Attributes:
        img: double-stream blocks, image stream.
        txt: double-stream blocks, text stream.
        joint: single-stream blocks.
    """

    img: Any
    txt: Any
    joint: Any


class Places(NamedTuple):
    """What a run has that edits can name.

    Attributes:
        depths: blocks of the model, by group.
        blocks: those with a transcoder, by group.
        features: features of a transcoder.
        img: image tokens.
        txt: text tokens, padding included.
        steps: denoising steps.
        dtype: of the tables' numbers.
    """

    depths: Groups
    blocks: Groups
    features: int
    img: int
    txt: int
    steps: int
    dtype: Any

    @property
    def rows(self) -> Groups:
        """Positions of each group's sequence."""
        return Groups(self.img, self.txt, self.txt + self.img)


def places_of(config: FluxConfig, tcs: TranscoderSet, run: Run, dtype: Any) -> Places:
    """Returns what edits of a run can name.

    Args:
        config: of the transformer.
        tcs: its transcoders.
        run: sizes and schedule.
        dtype: of the model's weights.
    """
    return Places(
        Groups(config.depth_double, config.depth_double, config.depth_single),
        Groups(tcs.img_layers, tcs.txt_layers, tcs.joint_layers),
        tcs.config.features,
        run.grid[0] * run.grid[1],
        run.text_tokens,
        len(run.sigmas) - 1,
        np.promote_types(dtype, np.float32),
    )


def lay_out(
    edits: Sequence[Edit],
    places: Places,
    text_mask: Bool[np.ndarray, "txt"],
    replaced: Sequence[Site] = (),
    width: int | None = None,
) -> Groups:
    """Lays out the edits of one image.

    Args:
        edits: what to change, in order.
        places: what there is.
        text_mask: text positions that edits without positions act on.
        replaced: sites that count as edited though no edit names them.
        width: edits that every block gets, filling included; as many as the fullest needs if left out.

    Returns:
        `EditLayers` of NumPy arrays by group.

    Raises:
        UserError: if an edit names a site, feature, position or step that does not exist, acts on no token, or
            contradicts another.
    """
    refuse_contradictions(edits)
    parts = [(edit, part) for edit in edits for whole in edit.parts for part in _blocks(whole, places, str(edit))]
    sites = [Part(*site[:2], -1, *site[2:]) for site in replaced]
    also = {(part.stream, part.block) for whole in sites for part in _blocks(whole, places, str(whole[:2]))}
    for edit, part in parts:
        _check(edit, part, places)
    widest = _fullest(parts) if width is None else width
    return Groups(
        *(
            _group(stream, [pair for pair in parts if pair[1].stream == stream], also, places, text_mask, widest)
            for stream in GROUP
        )
    )


def edits_per_block(edits: Sequence[Edit], places: Places) -> int:
    """Returns how many edits the fullest block has, rounded up to a power of two so that compilations are shared."""
    return _fullest([(edit, part) for edit in edits for whole in edit.parts for part in _blocks(whole, places, "")])


def _fullest(parts: Sequence[tuple[Edit, Part]]) -> int:
    at = [part[:2] for _, part in parts]
    most = max((at.count(place) for place in set(at)), default=0)
    return 1 << (most - 1).bit_length() if most else 0


def _blocks(part: Part, places: Places, name: str) -> list[Part]:
    """Returns the part once for every block that it means."""
    check_stream(part.stream)
    blocks = getattr(places.blocks, GROUP[part.stream])
    if part.block is None and blocks:
        return [part._replace(block=block) for block in blocks]
    if part.block not in blocks:
        where = part.stream if part.block is None else f"{part.stream}/{part.block}"
        known = ", ".join(map(str, blocks)) or "none"
        raise UserError(f"There is no transcoder at {where}; blocks with one: {known}.")
    return [part]


def _check(edit: Edit, part: Part, places: Places) -> None:
    rows = {"img": places.img, "txt": places.txt}.get(part.side or part.stream, places.img)
    for what, values, end in (
        ("feature", (part.feature,), places.features),
        ("position", part.positions or (), rows),
        ("step", part.steps or (), places.steps),
        ("image token", edit.region or (), places.img),
    ):
        beyond = [value for value in values if value >= end or (value < 0 and what != "feature")]
        if beyond:
            raise UserError(f"The edit of {edit.feature} names {what} {beyond[0]}, but there are 0 to {end - 1}.")
    if part.steps is not None and not part.steps:
        raise UserError(f"The edit of {edit.feature} names an empty set of steps; leave the steps out for all.")


def _positions(edit: Edit, part: Part, places: Places, text_mask: np.ndarray) -> Bool[np.ndarray, "rows"]:
    """Returns the positions of the group's sequence that a part acts on."""
    img, txt = np.ones(places.img, bool), text_mask.copy()
    if part.positions is not None:
        named = np.zeros(places.txt if "txt" in (part.stream, part.side) else places.img, bool)
        named[list(part.positions)] = True
        img, txt = (img, named) if "txt" in (part.stream, part.side) else (named, txt)
    if edit.region is not None:
        img &= np.isin(np.arange(places.img), edit.region)
    if part.stream == "single":
        of_text = part.side == "txt" or (part.side is None and edit.region is None)
        joint = np.concatenate([txt if of_text else np.zeros_like(txt), img if part.side != "txt" else img & False])
    else:
        joint = img if part.stream == "img" else txt
    if not joint.any():
        raise UserError(
            f"The edit of {edit.feature} acts on no token: its positions and region have none in common, or are empty."
        )
    return joint


def _group(
    stream: str,
    parts: Sequence[tuple[Edit, Part]],
    also: set[tuple[str, int | None]],
    places: Places,
    text_mask: np.ndarray,
    width: int,
) -> EditLayers:
    group = GROUP[stream]
    depth, rows, blocks = (getattr(field, group) for field in (places.depths, places.rows, places.blocks))
    shape = depth, width
    feature, threshold = np.full(shape, -1, np.int32), np.full(shape, -1.0, places.dtype)
    scale, offset = np.ones(shape, places.dtype), np.zeros(shape, places.dtype)
    positions, on = np.zeros((*shape, rows), bool), np.zeros((*shape, places.steps), bool)
    image = np.ones(places.img, bool)
    counted = {"img": image, "txt": text_mask, "joint": np.concatenate([text_mask, image])}[group]
    live = np.tile(counted, (depth, 1))
    filled = np.zeros(depth, int)
    for edit, part in parts:
        at = part.block, filled[part.block]
        filled[part.block] += 1
        feature[at] = part.feature
        scale[at], offset[at] = edit.affine
        threshold[at] = -1.0 if edit.threshold is None else edit.threshold
        positions[at] = _positions(edit, part, places, text_mask)
        on[at][slice(None) if part.steps is None else list(part.steps)] = True
        live[part.block] |= positions[at]
    slot = np.array([blocks.index(block) if block in blocks else 0 for block in range(depth)], np.int32)
    touched = np.array([bool(filled[block]) or (stream, block) in also for block in range(depth)], bool)
    return EditLayers(slot, touched, live, EditTable(feature, scale, offset, threshold, positions, on))


def apply_edits(edits: EditTable, z: Float[Array, "rows feat"], step: Array) -> Float[Array, "rows feat"]:
    """Edits the code of one site.

    Args:
        edits: one block's.
        z: the code.
        step: number of the denoising step.
    """

    def one(z: Array, edit: EditTable) -> tuple[Array, None]:
        column = z[:, edit.feature]
        largest = jnp.max(jnp.where(edit.positions, column, 0))
        above = column > edit.threshold.astype(z.dtype) * jnp.maximum(largest, LEAST_MAXIMUM)
        rows = edit.steps[step] & edit.positions & (above | (edit.threshold < 0))
        columns = (jnp.arange(z.shape[1]) == edit.feature) | (edit.feature < 0)
        changed = edit.scale.astype(z.dtype) * z + edit.offset.astype(z.dtype)
        return jnp.where(rows[:, None] & columns[None, :], changed, z), None

    return jax.lax.scan(one, z, edits)[0]
