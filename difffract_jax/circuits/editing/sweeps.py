"""Many edited images in one compiled call: over prompts, seeds, and whatever differs between their edits.

1. Every image has its own prompt, starting noise and edits. The edits of all are laid out in tables of one width.
2. Scan over the steps; one step evaluates the edited velocities of all images by `jax.vmap`, tables included. Which
   blocks are edited at all is shared, so that untouched blocks cost nothing.
3. Decode all latents.

A sweep is the product of seeds with `no edit` and the edits at several strengths: one compilation for all of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from difffract_jax.circuits.editing.edit_tables import EditLayers, edits_per_block, lay_out
from difffract_jax.circuits.editing.interventions import (
    EditedModel,
    check_form,
    edited_model,
    edited_velocity,
    table_dtype,
)
from difffract_jax.circuits.notation.edits import Edit, WholeSite
from difffract_jax.config import UserError
from difffract_jax.generators import check_distinct
from difffract_jax.models.batch import pixels
from difffract_jax.models.guidance import guided
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import Pipeline, Run, encode_run, initial_noise
from difffract_jax.models.sampler import euler_scan
from difffract_jax.models.streaming import jit_resident, streams_layers
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit
from difffract_jax.trees import brief

PerGroup = tuple[Any, ...]
"""One thing per group of sites; None where nothing of the group is edited."""
AT_ONCE = 64
"""Images computed together unless the caller says otherwise."""


class EditedImages(NamedTuple):
    """Edited images.

    Attributes:
        images: pixels.
        latents: packed latents after the last step.
        norms: size of each image's edits: root of the sum of squares of what they changed of the MLPs' outputs.
        cut: the ends of prompts that did not fit.
    """

    images: UInt8[np.ndarray, "image H W rgb"]
    latents: Float[np.ndarray, "image img channels"]
    norms: Float[np.ndarray, "image"]
    cut: tuple[str, ...]

    __repr__ = brief


class Sweep(NamedTuple):
    """Images of one prompt over seeds and strengths; the first column is the original.

    Attributes:
        images: pixels.
        norms: size of each image's edits, 0 in the first column of form `delta`.
        columns: what each column is: "original", then the strengths.
        seeds: of the rows.
        cut: the end of the prompt that did not fit; "" if all did.
    """

    images: UInt8[np.ndarray, "seed column H W rgb"]
    norms: Float[np.ndarray, "seed column"]
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    cut: str

    __repr__ = brief


def steer_batch(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompts: Sequence[str],
    edits: Sequence[Sequence[Edit]],
    seeds: Sequence[int],
    *,
    form: str = "delta",
    replaced: Sequence[WholeSite] = (),
    include_padding: bool = False,
    run: Run | None = None,
    latents: Any = None,
    batch: int = AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> EditedImages:
    """Generates one edited image per prompt, list of edits and seed.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs.
        prompts: one per image.
        edits: those of each image, in order.
        seeds: of the starting noise, one per image.
        form: `delta` or `replace`, see `interventions`.
        replaced: sites to treat as edited though no edit names them, in form `replace`.
        include_padding: let edits without positions act on padded text positions too.
        run: sizes and schedule; the pipeline's defaults if left out.
        latents: packed starting noise of each image, [image img channels], instead of the seeds'.
        batch: images computed together; on a large model 1.
        progress: called with (images done, images in all).

    Raises:
        UserError: as `interventions.steer`, or if there are not as many lists of edits and seeds as prompts.
    """
    check_form(form)
    check_fit(tcs, pipe.config.transformer)
    if not len(prompts) == len(edits) == len(seeds) or not prompts:
        raise UserError(
            f"Every image needs a prompt, a list of edits and a seed, but got {len(prompts)} prompts, {len(edits)} "
            f"lists of edits and {len(seeds)} seeds."
        )
    run = run or pipe.plan()
    encoded = {prompt: encode_run(pipe, prompt, run) for prompt in dict.fromkeys(prompts)}
    masks = [np.stack([np.asarray(one.mask) | include_padding for one in encoded[p].branches]) for p in prompts]
    params, live, tables = _tables(pipe, tcs, edits, masks, run, replaced)
    text, pooled = (
        jnp.stack([jnp.stack([getattr(one, name) for one in encoded[p].branches]) for p in prompts])
        for name in ("text", "pooled")
    )
    rows_of_noise = [None] * len(seeds) if latents is None else latents
    noise = jnp.stack([initial_noise(pipe, run, s, z) for s, z in zip(seeds, rows_of_noise, strict=True)])
    found = []
    for first in range(0, len(prompts), batch):
        rows = np.arange(first, min(first + batch, len(prompts)))
        # The last batch is filled up, so that every batch has the compiled size.
        at = np.resize(rows, batch) if first else rows
        mine, edited = (jax.tree.map(lambda a, at=at: jnp.asarray(a[at]), tree) for tree in (live, tables))
        given = *_rows((text, pooled, noise), at), jnp.asarray(run.sigmas)
        z, norms = sample_edited(params, mine, edited, *given, run.grid, run.fed_guidance, run.branch_scale, form)
        image = pixels(pipe.vae, z, run.grid)
        found.append([np.asarray(a)[: len(rows)] for a in (image, z, norms)])
        if progress is not None:
            progress(int(rows[-1]) + 1, len(prompts))
    images, final, norms = map(np.concatenate, zip(*found, strict=True))
    return EditedImages(images, final, norms, tuple(encoded[p].cut for p in prompts))


@jax.jit
def _rows(arrays: tuple[Array, ...], at: Int[Array | np.ndarray, "batch"]) -> tuple[Array, ...]:
    """Returns some rows of each array."""
    return tuple(rows[at] for rows in arrays)


def _tables(
    pipe: Pipeline,
    tcs: TranscoderSet,
    edits: Sequence[Sequence[Edit]],
    masks: Sequence[np.ndarray],
    run: Run,
    replaced: Sequence[WholeSite],
) -> tuple[EditedModel, PerGroup, PerGroup]:
    """Returns the model with what all images share, and per group what each has its own of: live positions, tables."""
    model = pipe.transformer
    width = max(edits_per_block(own, tcs.sites, run.branches) for own in edits)
    laid: dict[tuple[int, bytes], tuple[EditLayers, ...]] = {}
    for own, mask in zip(edits, masks, strict=True):
        key = id(own), mask.tobytes()
        if key not in laid:
            laid[key] = lay_out(own, model.config.layout, tcs, run, mask, replaced, width, table_dtype(model))
    groups = list(zip(*(laid[id(own), mask.tobytes()] for own, mask in zip(edits, masks, strict=True)), strict=True))
    shared = [images[0]._replace(touched=np.any([one.touched for one in images], axis=0)) for images in groups]
    params = edited_model(model, tcs, shared)
    live, tables = (
        tuple(
            None if layers is None else jax.tree.map(lambda *a: np.stack(a), *(getattr(one, name) for one in images))
            for layers, images in zip(params.layers, groups, strict=True)
        )
        for name in ("live", "edits")
    )
    return params, live, tables


@partial(jit_resident, static_argnames=("grid", "guidance", "branch_scale", "form"))
def sample_edited(
    params: EditedModel,
    live: PerGroup,
    tables: PerGroup,
    text: Array,
    pooled: Array,
    noise: Array,
    sigmas: Array,
    grid: tuple[int, int],
    guidance: float | None,
    branch_scale: float | None,
    form: str,
) -> tuple[Array, Array]:
    """Takes all Euler steps of many edited images; returns the last latents, and the size of each image's edits.

    Args:
        params: the model with what all images share.
        live: per group, each image's positions that form `replace` replaces; None where nothing is edited.
        tables: per group, each image's edits; None likewise.
        text: text embeddings [image, branch, ...]; branches as in `models.guidance`.
        pooled: pooled prompt embeddings, alike.
        noise: packed starting noise, one per image.
        sigmas: noise levels.
        grid: rows and columns of image tokens.
        guidance: scale that a model distilled for guidance is fed; None for others.
        branch_scale: scale of guidance by two branches; None for one.
        form: `delta` or `replace`.
    """
    scale = None if guidance is None else jnp.asarray(guidance, noise.dtype)

    def evaluate(latents: Array, sigma: Array, step: Array, _: None) -> tuple[Array, Array]:
        def one(number: Array, z: Array, txt: Array, vec: Array, live: PerGroup, tables: PerGroup) -> tuple[Any, Any]:
            layers = tuple(
                None if shared is None else EditLayers(shared.slot, shared.touched, own, table)
                for shared, own, table in zip(params.layers, live, tables, strict=True)
            )
            inputs = Inputs(z, txt, vec, sigma, scale)
            return edited_velocity(params._replace(layers=layers), inputs, number, grid, form)

        if branch_scale is None:
            return jax.vmap(partial(one, step))(latents, text[:, 0], pooled[:, 0], live, tables)
        both = partial(jax.vmap(one, in_axes=(0, None, 0, 0, None, None)), 2 * step + jnp.arange(2))
        v, sizes = jax.vmap(both)(latents, text, pooled, live, tables)
        v = v.swapaxes(0, 1).astype(latents.dtype)
        return guided(v, branch_scale), jnp.sum(sizes, axis=1)

    latents, sizes = euler_scan(evaluate, noise, sigmas.astype(noise.dtype), streamed=streams_layers(params))
    return latents, jnp.sqrt(jnp.sum(sizes, axis=0))


def sweep(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    edits: Sequence[Edit],
    amounts: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    *,
    form: str = "delta",
    include_padding: bool = False,
    run: Run | None = None,
    latents: Any = None,
    batch: int = AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Generates a prompt's images with no edit and with edits at several strengths, for several seeds.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs.
        prompt: what the images shall show.
        edits: what to change.
        amounts: strengths, see `Edit.swept`: `zero`, `scale` and `invert` become `scale:a`, `set` and `add` take a
            times their amount. None of them: the edits as they are.
        seeds: of the starting noise.
        form: `delta` or `replace`; in form `replace` the original column has the edited sites replaced, as the others
            have, but not edited.
        include_padding: let edits without positions act on padded text positions too.
        run: sizes and schedule; the pipeline's defaults if left out.
        latents: packed starting noise of each seed, [seed img channels], instead of the seeds'.
        batch: images computed together.
        progress: called with (images done, images in all).

    Raises:
        UserError: as `steer_batch`, or if there are no seeds, or one occurs twice.
    """
    if not seeds:
        raise UserError("A sweep needs at least one seed, but got none; write for example --seeds 0..4.")
    if latents is None:
        check_distinct(seeds)
    strengths = [[edit.swept(amount) for edit in edits] for amount in amounts] or [list(edits)]
    names = tuple(f"x {amount:g}" for amount in amounts) or ("edited",)
    sites = tuple(dict.fromkeys(WholeSite(part.stream, part.block) for edit in edits for part in edit.parts))
    columns: list[list[Edit]] = [[], *strengths]
    many = len(columns)
    made = steer_batch(
        pipe,
        tcs,
        [prompt] * (many * len(seeds)),
        columns * len(seeds),
        [seed for seed in seeds for _ in columns],
        form=form,
        replaced=sites,
        include_padding=include_padding,
        run=run,
        latents=None if latents is None else np.repeat(np.asarray(latents), many, axis=0),
        batch=batch,
        progress=progress,
    )
    shape = len(seeds), many
    images = made.images.reshape(*shape, *made.images.shape[1:])
    return Sweep(images, made.norms.reshape(shape), ("original", *names), tuple(seeds), made.cut[0])
