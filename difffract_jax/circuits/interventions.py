"""Edits of features in the running model (METHOD section 7, reading `full`): what a user sees.

1. An `Edit` names a feature, or a whole site, what happens to its code z, and where: positions, steps, or the positions
   above a share of its maximum.
2. In every denoising step each edited MLP sublayer runs its transcoder on its own live input, and edits the code in the
   order the edits were given.
3. Form `delta` adds what the edits changed to the true output: y + W_dec (z' - z); no edit changes nothing. Form
   `replace`, the reference's, puts the reconstruction in place of the output: y^(z'), also in steps without an edit.

All modes are affine in the code: z' = scale * z + offset.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.circuits.feature import Feature
from difffract_jax.circuits.replacement import site
from difffract_jax.config import UserError
from difffract_jax.models.blocks import DoubleBlock, Streams, both, run_mlps
from difffract_jax.models.mmdit import Inputs, MMDiT, run_double
from difffract_jax.models.pipeline import GeneratedImage, Pipeline, Run, decode, encode, plan_run, sample, start
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet, check_fit

MODES = ("zero", "scale", "invert", "set", "add")
FORMS = ("delta", "replace")
STREAMS = ("img", "txt")
LEAST_MAXIMUM = 1e-6
"""A feature's maximum counts as at least this where a threshold is a share of it, as in the reference."""


class Site(NamedTuple):
    """An MLP sublayer as a whole: every feature of its transcoder.

    Attributes:
        stream: "img" or "txt".
        block: the model's double-stream block.
    """

    stream: str
    block: int


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        feature: what to edit: a feature, its text form `img/2/f401@0-15#0,1`, or a `Site` for all features of it.
            Its positions and steps say where; all if it names none.
        mode: `zero`; `scale` and `set`, to `amount` times or to `amount`; `invert`, the sign; `add`, `amount`.
        amount: see `mode`.
        steps: denoising steps, from 0, instead of the feature's own; all if left out.
        threshold: edit only positions whose value exceeds this share of the feature's maximum over positions.

    Example:
        >>> Edit("img/2/f401", "scale", 3.0, threshold=0.2).mode
        'scale'
    """

    feature: Feature | Site | str
    mode: str
    amount: float | int = 1.0
    steps: frozenset[int] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"An edit's mode must be one of {', '.join(MODES)}, but got {self.mode!r}.")
        if not math.isfinite(self.amount):
            raise UserError(f"An edit's amount must be a finite number, but got {self.amount}.")
        if isinstance(self.feature, str):
            object.__setattr__(self, "feature", Feature.parse(self.feature))
        if self.threshold is not None and isinstance(self.feature, Site):
            raise UserError(
                "A threshold is a share of one feature's maximum; leave it out where a whole site is edited."
            )

    @property
    def site(self) -> Site:
        """The MLP sublayer that is edited."""
        assert not isinstance(self.feature, str)  # parsed when the edit was made
        return Site(self.feature.stream, self.feature.block)

    @property
    def affine(self) -> tuple[float, float]:
        """Scale and offset of the code."""
        return {
            "zero": (0.0, 0.0),
            "scale": (float(self.amount), 0.0),
            "invert": (-1.0, 0.0),
            "set": (0.0, float(self.amount)),
            "add": (1.0, float(self.amount)),
        }[self.mode]


class EditTable(NamedTuple):
    """The edits of one stream, block by block; `edit` counts a block's, filled up with edits that do nothing.

    Attributes:
        feature: feature of each edit; -1 for all.
        scale: of the code.
        offset: added to it.
        threshold: share of the maximum; -1 for all positions.
        positions: positions each edit acts on.
        steps: steps each edit acts in.
    """

    feature: Int[Array, "layer edit"]
    scale: Float[Array, "layer edit"]
    offset: Float[Array, "layer edit"]
    threshold: Float[Array, "layer edit"]
    positions: Bool[Array, "layer edit rows"]
    steps: Bool[Array, "layer edit step"]


class EditLayers(NamedTuple):
    """One stream's edited sites.

    Attributes:
        slot: place of each block's transcoder in the stack.
        touched: whether the block is edited, or replaced.
        edits: what is done there.
    """

    slot: Int[Array, "layer"]
    touched: Bool[Array, "layer"]
    edits: EditTable


class EditedModel(NamedTuple):
    """A transformer with edits: the argument of `delta_velocity` and `replace_velocity`.

    Attributes:
        model: the transformer.
        stacks: its transcoders.
        layers: the edits.
    """

    model: MMDiT
    stacks: Streams
    layers: Streams


def steer(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    edits: Sequence[Edit],
    *,
    form: str = "delta",
    replaced: Sequence[Site] = (),
    seed: int = 0,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    latents: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedImage:
    """Generates an image with features edited.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs, which read the MLPs' outputs.
        prompt: what the image shall show.
        edits: what to change; none leaves the image as it is, in form `delta`.
        form: `delta` or `replace`, see the module.
        replaced: sites to treat as edited though no edit names them; changes nothing in form `delta`.
        seed: of the starting noise; this and the rest as for `generate`.
        steps: denoising steps.
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence.
        guidance: guidance scale.
        latents: packed starting noise.
        progress: called with (steps done, steps in all).

    Raises:
        UserError: if an edit names a site, feature, position or step that does not exist, or a size does not fit.
    """
    if form not in FORMS:
        raise UserError(f"The form of edits must be one of {', '.join(FORMS)}, but got {form!r}.")
    check_fit(tcs, pipe.config.transformer)
    run = plan_run(pipe.config, steps=steps, height=height, width=width, text_tokens=text_tokens, guidance=guidance)
    edited = edit_model(pipe.transformer, tcs, edits, run, replaced)
    encoded = encode(pipe, prompt, run.text_tokens)
    velocity = delta_velocity if form == "delta" else replace_velocity
    final = sample(velocity, edited, run, encoded, start(pipe, run, seed, latents), progress=progress)
    return GeneratedImage(decode(pipe, final, run.grid), final, encoded.cut)


def edit_model(
    model: MMDiT, tcs: TranscoderSet, edits: Sequence[Edit], run: Run, replaced: Sequence[Site] = ()
) -> EditedModel:
    """Lays out edits for the sizes of a run.

    Args:
        model: the transformer.
        tcs: its transcoders.
        edits: what to change.
        run: sizes and schedule.
        replaced: further sites that form `replace` shall replace.
    """
    depth = model.config.depth_double
    rows = Streams(run.grid[0] * run.grid[1], run.text_tokens)
    layers = []
    for stream, blocks, count in zip(STREAMS, (tcs.img_layers, tcs.txt_layers), rows, strict=True):
        mine = [edit for edit in edits if edit.site.stream == stream]
        also = {block for name, block in replaced if name == stream}
        absent = sorted(({edit.site.block for edit in mine} | also) - set(blocks))
        if absent:
            raise UserError(
                f"There is no transcoder at {stream}/{absent[0]}; blocks with one: {', '.join(map(str, blocks))}."
            )
        for edit in mine:
            _check_edit(edit, tcs.config.features, count, len(run.sigmas) - 1)
        layers.append(_lay_out(mine, also, blocks, depth, count, len(run.sigmas) - 1, model.img_in.kernel.dtype))
    unknown = [edit.feature for edit in edits if edit.site.stream not in STREAMS]
    if unknown:
        raise UserError(f"{unknown[0]} lies in the single-stream blocks, but only img and txt sites can be edited.")
    return EditedModel(model, Streams(tcs.img, tcs.txt), Streams(*layers))


def _where(edit: Edit) -> tuple[int, Sequence[int] | None, Any]:
    """Returns an edit's feature (-1 for all), positions and steps."""
    if isinstance(edit.feature, Feature):
        return edit.feature.feature, edit.feature.positions, edit.feature.steps if edit.steps is None else edit.steps
    return -1, None, edit.steps


def _check_edit(edit: Edit, features: int, rows: int, steps: int) -> None:
    feature, positions, at_steps = _where(edit)
    for what, values, end in (
        ("feature", (feature,), features),
        ("position", positions or (), rows),
        ("step", at_steps or (), steps),
    ):
        beyond = [value for value in values if value >= end or (value < 0 and what != "feature")]
        if beyond:
            raise UserError(f"The edit of {edit.feature} names {what} {beyond[0]}, but there are 0 to {end - 1}.")


def _lay_out(
    edits: Sequence[Edit], also: set[int], blocks: tuple[int, ...], depth: int, rows: int, steps: int, dtype: Any
) -> EditLayers:
    per_block = [[edit for edit in edits if edit.site.block == block] for block in range(depth)]
    most = max(map(len, per_block))
    feature, threshold = np.full((depth, most), -1), np.full((depth, most), -1.0)
    scale, offset = np.ones((depth, most)), np.zeros((depth, most))
    positions, on = np.zeros((depth, most, rows), bool), np.zeros((depth, most, steps), bool)
    for block, here in enumerate(per_block):
        for number, edit in enumerate(here):
            feature[block, number], at_positions, at_steps = _where(edit)
            scale[block, number], offset[block, number] = edit.affine
            threshold[block, number] = -1.0 if edit.threshold is None else edit.threshold
            positions[block, number, slice(None) if at_positions is None else list(at_positions)] = True
            on[block, number, slice(None) if at_steps is None else list(at_steps)] = True
    slot = [blocks.index(block) if block in blocks else 0 for block in range(depth)]
    touched = [bool(here) or block in also for block, here in enumerate(per_block)]
    wide = np.promote_types(dtype, np.float32)
    scales, offsets, thresholds = (jnp.asarray(array, wide) for array in (scale, offset, threshold))
    table = EditTable(
        jnp.asarray(feature, jnp.int32), scales, offsets, thresholds, jnp.asarray(positions), jnp.asarray(on)
    )
    return EditLayers(jnp.asarray(slot, jnp.int32), jnp.asarray(touched), table)


def delta_velocity(params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int]) -> Float[Array, "img out"]:
    """Velocity of an edited model, form `delta`; see `models.pipeline.Velocity`."""
    return _velocity(params, inputs, step, grid, _delta)


def replace_velocity(
    params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int]
) -> Float[Array, "img out"]:
    """Velocity of an edited model, form `replace`."""
    return _velocity(params, inputs, step, grid, _replace)


def _velocity(
    params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int], form: Callable[..., Any]
) -> Float[Array, "img out"]:
    def mlp(layers: Streams, block: DoubleBlock, x: Streams) -> Streams:
        y = run_mlps(block, x)

        def one(stack: Transcoder | None, layer: EditLayers, x: Any, y: Any) -> Any:
            if stack is None:
                return y
            return jax.lax.cond(
                layer.touched, lambda: form(site(stack, layer.slot), layer, x, y, inputs.t, step), lambda: y
            )

        return both(one, params.stacks, layers, x, y)

    h, cond = params.model.embed(inputs, grid)
    h, _ = run_double(params.model.double, h, cond, mlp=mlp, per_layer=params.layers)
    return params.model.finish(h, cond)


def _delta(transcoder: Transcoder, layer: EditLayers, x: Any, y: Any, t: Array, step: Array) -> Any:
    z = transcoder.encode(_read(transcoder, x, y), t)
    change = apply_edits(layer.edits, z, step) - z
    return y + (change @ transcoder.dec.kernel[...]).astype(y.dtype)


def _replace(transcoder: Transcoder, layer: EditLayers, x: Any, y: Any, t: Array, step: Array) -> Any:
    read = _read(transcoder, x, y)
    return transcoder.decode(apply_edits(layer.edits, transcoder.encode(read, t), step), read).astype(y.dtype)


def _read(transcoder: Transcoder, x: Any, y: Any) -> Any:
    """Returns what the module reads, in its own dtype: x, or y if it is an SAE."""
    return (y if transcoder.config.role == "sae" else x).astype(transcoder.enc.kernel.dtype)


def apply_edits(edits: EditTable, z: Float[Array, "rows feat"], step: Array) -> Float[Array, "rows feat"]:
    """Edits the code of one site.

    Args:
        edits: one block's.
        z: the code.
        step: number of the denoising step.
    """

    def one(z: Array, edit: EditTable) -> tuple[Array, None]:
        column = z[:, edit.feature]
        above = column > edit.threshold.astype(z.dtype) * jnp.maximum(jnp.max(column), LEAST_MAXIMUM)
        rows = edit.steps[step] & edit.positions & (above | (edit.threshold < 0))
        columns = (jnp.arange(z.shape[1]) == edit.feature) | (edit.feature < 0)
        changed = edit.scale.astype(z.dtype) * z + edit.offset.astype(z.dtype)
        return jnp.where(rows[:, None] & columns[None, :], changed, z), None

    return jax.lax.scan(one, z, edits)[0]
