"""Edits of features in the running model (docs/method.md, section 7, reading `full`): what a user sees.

1. An `Edit` names features, or a whole site, what happens to their code z, and where: see `edits`.
2. In every denoising step each edited MLP sublayer, whatever its block, runs its transcoder on its own live input, and
   edits the code in the order the edits were given.
3. Form `delta` adds what the edits changed to the true output: y + W_dec (z' - z); no edit changes nothing. Form
   `replace`, the reference's, puts the reconstruction in place of the output: y^(z'), also in steps without an edit.
   Padded text positions keep the true MLP unless an edit names them or padding is counted in.

SAEs, which read y instead of the sublayer's input, are edited in the same way. Single-stream blocks share one bias
between attention and MLP; it lies outside y and is left alone.

`steer` makes one image; `sweeps` makes many in one compiled call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from difffract_jax.circuits.editing.edit_tables import EditLayers, EditTable, apply_edits, lay_out
from difffract_jax.circuits.notation.edits import Edit, Supernode, WholeSite
from difffract_jax.config import UserError
from difffract_jax.models.mmdit import Inputs, MMDiT, forward
from difffract_jax.models.pipeline import (
    GeneratedImage,
    Pipeline,
    Run,
    decode_latents,
    encode_run,
    initial_noise,
    model_velocity,
    sample,
)
from difffract_jax.models.stacks import Visit, slice_layer
from difffract_jax.models.streaming import Streamed, stack_trees
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet, check_fit

FORMS = ("delta", "replace")

__all__ = [
    "FORMS",
    "Edit",
    "EditLayers",
    "EditTable",
    "EditedModel",
    "WholeSite",
    "Supernode",
    "apply_edits",
    "delta_velocity",
    "edit_model",
    "edited_velocity",
    "replace_velocity",
    "steer",
]


class EditedModel(NamedTuple):
    """A transformer with edits: the argument of `delta_velocity` and `replace_velocity`.

    Attributes:
        model: the transformer.
        stacks: its transcoders per group; None where nothing of the group is edited.
        layers: the edits per group; None likewise.
    """

    model: MMDiT
    stacks: tuple[Transcoder | None, ...]
    layers: tuple[EditLayers | None, ...]


def steer(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    edits: Sequence[Edit],
    *,
    form: str = "delta",
    replaced: Sequence[WholeSite] = (),
    include_padding: bool = False,
    seed: int = 0,
    run: Run | None = None,
    latents: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedImage:
    """Generates an image with features edited.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs, which read the MLPs' outputs.
        prompt: what the image shall show.
        edits: what to change; none leaves the image as it is, bit for bit, in form `delta`.
        form: `delta` or `replace`, see the module.
        replaced: sites to treat as edited though no edit names them; changes nothing in form `delta`.
        include_padding: let edits without positions act on padded text positions too, as the reference does.
        seed: of the starting noise; this and the rest as for `generate`.
        run: sizes and schedule, from `pipe.plan`.
        latents: packed starting noise.
        progress: called with (steps done, steps in all).

    Raises:
        UserError: if an edit names a site, feature, position or step that does not exist, acts on no token or
            contradicts another, or a size does not fit.
    """
    check_form(form)
    check_fit(tcs, pipe.config.transformer)
    run = run or pipe.plan()
    encoded = encode_run(pipe, prompt, run)
    mask = np.stack([np.asarray(one.mask) | include_padding for one in encoded.branches])
    edited = edit_model(pipe.transformer, tcs, edits, run, replaced, mask)
    velocity: Any = delta_velocity if form == "delta" else replace_velocity
    params: Any = edited
    if not any(stack is not None for stack in edited.stacks) or (form == "delta" and not edits):
        velocity, params = model_velocity, pipe.transformer
    final = sample(velocity, params, run, encoded, initial_noise(pipe, run, seed, latents), progress=progress)
    return GeneratedImage(decode_latents(pipe, final, run.grid), final, encoded.cut)


def check_form(form: str) -> None:
    """Raises `UserError` if edits have no such form."""
    if form not in FORMS:
        raise UserError(f"The form of edits must be one of {', '.join(FORMS)}, but got {form!r}.")


def edit_model(
    model: MMDiT,
    tcs: TranscoderSet,
    edits: Sequence[Edit],
    run: Run,
    replaced: Sequence[WholeSite] = (),
    text_mask: Bool[np.ndarray, "*branch txt"] | None = None,
) -> EditedModel:
    """Lays out edits for the sizes of a run.

    Args:
        model: the transformer.
        tcs: its transcoders.
        edits: what to change.
        run: sizes and schedule.
        replaced: further sites that form `replace` shall replace.
        text_mask: text positions that edits without positions act on, of each branch or of all; all if left out.

    Raises:
        UserError: see `edit_tables.lay_out`.
    """
    mask = np.ones(run.text_tokens, bool) if text_mask is None else text_mask
    layers = lay_out(edits, model.config.layout, tcs, run, mask, replaced, dtype=table_dtype(model))
    return edited_model(model, tcs, layers)


def table_dtype(model: MMDiT) -> np.dtype:
    """Returns the type of the numbers of a model's edits: that of its weights, but at least float32."""
    return np.promote_types(model.img_in.kernel.dtype, np.float32)


def edited_model(model: MMDiT, tcs: TranscoderSet, layers: Sequence[EditLayers]) -> EditedModel:
    """Puts a laid-out edit on the device, and leaves out the groups that it does not touch.

    Args:
        model: the transformer.
        tcs: its transcoders.
        layers: from `lay_out`.
    """
    pairs = zip(tcs.per_group(model.config.layout), layers, strict=True)
    edited = [_read_touched(*pair) if pair[1].touched.any() else (None, None) for pair in pairs]
    stacks, used = zip(*edited, strict=True)
    return EditedModel(model, stacks, jax.tree.map(jnp.asarray, used))


def _read_touched(stack: Any, layer: EditLayers) -> tuple[Transcoder, EditLayers]:
    """Returns a group's transcoders and edits; of streamed transcoders those of the edited sites, which are read."""
    if not isinstance(stack, Streamed):
        return stack, layer
    used = np.unique(layer.slot[layer.touched])
    slot = np.minimum(np.searchsorted(used, layer.slot), used.size - 1).astype(layer.slot.dtype)
    return stack_trees([stack.fetch(int(place)) for place in used]), layer._replace(slot=slot)


def delta_velocity(params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int]) -> Float[Array, "img out"]:
    """Velocity of an edited model, form `delta`; see `models.pipeline.Velocity`."""
    return edited_velocity(params, inputs, step, grid, "delta")[0]


def replace_velocity(
    params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int]
) -> Float[Array, "img out"]:
    """Velocity of an edited model, form `replace`."""
    return edited_velocity(params, inputs, step, grid, "replace")[0]


def edited_velocity(
    params: EditedModel, inputs: Inputs, step: Array, grid: tuple[int, int], form: str
) -> tuple[Float[Array, "img out"], Float[Array, ""]]:
    """Returns the velocity of an edited model, and how large the edits were in this evaluation.

    Args:
        params: the model and its edits.
        inputs: of one evaluation.
        step: number of the evaluation, see `models.guidance`.
        grid: rows and columns of image tokens.
        form: `delta` or `replace`.

    Returns:
        The velocity; and the sum of squares, over sites, positions and channels, of W_dec (z' - z): what editing
        changed of the MLPs' outputs, without the reconstruction error that form `replace` brings in besides.
    """
    velocity, sizes = forward(
        params.model,
        inputs,
        grid,
        write=_WRITES[form],
        fixed=[None if stack is None else (stack, inputs.t, step) for stack in params.stacks],
        layers=params.layers,
        tap=_sum_reports,
    )
    return velocity, sum(map(jnp.sum, sizes), jnp.zeros((), jnp.float32))


def _sum_reports(visit: Visit) -> Float[Array, ""]:
    return sum(visit.reports, jnp.zeros((), jnp.float32))


def _write(form_of: Any, fixed: Any, layer: Any, x: Array, true: Callable[[], Array]) -> tuple[Array, Array]:
    """Stands in for one MLP sublayer; `fixed` is its group's transcoders, the time and the step."""
    untouched = true(), jnp.zeros((), jnp.float32)
    if layer is None:
        return untouched
    stack, t, step = fixed
    edited = partial(form_of, slice_layer(stack, layer.slot), layer, x, untouched[0], t, step)
    return jax.lax.cond(layer.touched, edited, lambda: untouched)


def _delta(tc: Transcoder, layer: EditLayers, x: Any, y: Any, t: Array, step: Array) -> tuple[Array, Array]:
    z = tc.encode(_read(tc, x, y), t)
    write = (apply_edits(layer.edits, z, step) - z) @ tc.dec.kernel[...]
    return y + write.astype(y.dtype), _square(write)


def _replace(tc: Transcoder, layer: EditLayers, x: Any, y: Any, t: Array, step: Array) -> tuple[Array, Array]:
    read = _read(tc, x, y)
    z = tc.encode(read, t)
    edited = apply_edits(layer.edits, z, step)
    stood_in = tc.decode(edited, read).astype(y.dtype)
    live = layer.live[step % layer.live.shape[0]]
    return jnp.where(live[:, None], stood_in, y), _square((edited - z) @ tc.dec.kernel[...])


_WRITES = {"delta": partial(_write, _delta), "replace": partial(_write, _replace)}
"""What stands in for MLP sublayers, by the form of the edits."""


def _square(write: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(write.astype(jnp.float32)))


def _read(tc: Transcoder, x: Any, y: Any) -> Any:
    """Returns what the module reads, in its own dtype: x, or y if it is an SAE."""
    return (y if tc.config.role == "sae" else x).astype(tc.enc.kernel.dtype)
