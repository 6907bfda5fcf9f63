"""Edits of many codes at once: every code of one run moved towards that of another, as far as one pleases.

A list of `Edit`s is applied one after the other, which is slow for hundreds of them. Here an image's edits are one
scale and one offset for every code of every step, block and token (`edit_tables.CodeTable`).

1. `run_codes` measures all codes of both runs.
2. `place_moves` moves the mean over an object's tokens of some places, as `choices.moves` does; `token_moves` the code
   of every token by itself. A code that falls is scaled, one that rises is added to. `token_settings` sets codes.
3. `steer_codes` makes the images.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from difffract_jax.address import GROUPS, Group
from difffract_jax.circuits.editing.edit_tables import CodeTable, EditLayers
from difffract_jax.circuits.editing.interventions import EditedModel
from difffract_jax.circuits.editing.sweeps import sample_edited
from difffract_jax.models.batch import pixels
from difffract_jax.models.pipeline import Pipeline, encode, initial_noise
from difffract_jax.studies.cases import Case
from difffract_jax.studies.choices import SIDES
from difffract_jax.studies.evaluations import plain_run, refuse_other_groups
from difffract_jax.transcoders.codes import reduced_codes
from difffract_jax.transcoders.transcoder import TranscoderSet

AT_ONCE = 32
"""Images, or runs, computed together."""
Codes = tuple[Float[np.ndarray, "step layer rows feat"], ...]
"""All codes of a run, per group of `address.GROUPS`."""
Tokens = tuple[Bool[np.ndarray, "img"], Bool[np.ndarray, "txt"]]
"""Which image and which text tokens count."""
Progress = Callable[[int, int], None]


def run_codes(
    pipe: Pipeline, tcs: TranscoderSet, cases: Sequence[Case], prompts: Sequence[str], progress: Progress | None = None
) -> list[Codes]:
    """Measures all codes of a run of each case's noise.

    Args:
        pipe: the organism.
        tcs: its transcoders, one at every site.
        cases: that say the noise.
        prompts: of the runs, one per case.
        progress: called with (runs done, runs in all).

    Raises:
        UserError: if the pipeline's guidance makes two evaluations a step.
    """
    run, found = plain_run(pipe), []
    refuse_other_groups(pipe.config.transformer.layout)
    encoded = {text: encode(pipe, text, run.text_tokens) for text in dict.fromkeys(prompts)}
    for first in range(0, len(cases), AT_ONCE):
        at = np.arange(first, first + AT_ONCE) % len(cases)
        text, pooled = (
            jnp.stack([getattr(encoded[prompts[row]], name) for row in at.tolist()]) for name in ("text", "pooled")
        )
        noise = jnp.stack([initial_noise(pipe, run, cases[row].seed) for row in at.tolist()])
        kept, _ = reduced_codes(pipe, tcs, run, text, pooled, noise, _keep, ())
        arrays = [np.asarray(kept[group.name]) for group in GROUPS]
        found += [tuple(array[:, i] for array in arrays) for i in range(min(AT_ONCE, len(cases) - first))]
        if progress is not None:
            progress(len(found), len(cases))
    return found


def _keep(group: Group, z: Float[Array, "rows feat"], extra: tuple[()]) -> Float[Array, "rows feat"]:
    del group, extra
    return z


def marked_rows(tokens: Tokens) -> list[tuple[int, Int[np.ndarray, "marked"]]]:
    """Returns, for each of `choices.SIDES`, the group's number and the rows of its sequence that count.

    Args:
        tokens: that count.
    """
    marked = dict(zip(("img", "txt"), tokens, strict=True))
    sides = []
    for group, stream in SIDES:
        rows = np.concatenate([marked[one] & (one == stream) for one in group.streams])
        sides.append((GROUPS.index(group), np.flatnonzero(rows)))
    return sides


def place_codes(codes: Codes, tokens: Tokens) -> Float[np.ndarray, "place"]:
    """Returns the mean code of every place over the tokens that count, in the order of `choices.all_places`.

    Args:
        codes: of a run.
        tokens: that count.
    """
    return np.concatenate([codes[number][:, :, rows].mean(axis=2).ravel() for number, rows in marked_rows(tokens)])


def no_moves(codes: Codes) -> tuple[CodeTable, ...]:
    """Returns tables of the shape of a run's codes that change nothing."""
    shapes = [np.moveaxis(array, 0, 1).shape for array in codes]
    return tuple(CodeTable(np.ones(shape, np.float32), np.zeros(shape, np.float32)) for shape in shapes)


def place_moves(
    tables: tuple[CodeTable, ...],
    chosen: Int[np.ndarray, "chosen"],
    before: Float[np.ndarray, "place"],
    after: Float[np.ndarray, "place"],
    strength: float,
    tokens: Tokens,
) -> None:
    """Adds to an image's tables what takes some places from one run's mean codes towards the other's.

    Args:
        tables: of the image; changed in place.
        chosen: places, in the order of `choices.all_places`.
        before: mean codes of the run that is edited.
        after: of the other.
        strength: share of the way.
        tokens: where to edit.
    """
    scale, offset = np.ones(before.size, np.float32), np.zeros(before.size, np.float32)
    scale[chosen], offset[chosen] = _affine(before[chosen], after[chosen], strength)
    parts = zip(marked_rows(tokens), _by_side(scale, tables), _by_side(offset, tables), strict=True)
    for (number, rows), factor, added in parts:
        table = tables[number]
        table.scale[:, :, rows] *= factor
        table.offset[:, :, rows] = table.offset[:, :, rows] * factor + added


def token_moves(tables: tuple[CodeTable, ...], before: Codes, after: Codes, strength: float, tokens: Tokens) -> None:
    """Puts into an image's tables what takes every token's own codes from one run towards the other's.

    Args:
        tables: of the image; changed in place.
        before: codes of the run that is edited.
        after: of the other.
        strength: share of the way.
        tokens: where to edit.
    """
    for number, rows in marked_rows(tokens):
        old, new = (codes[number].swapaxes(0, 1)[:, :, rows] for codes in (before, after))
        tables[number].scale[:, :, rows], tables[number].offset[:, :, rows] = _affine(old, new, strength)


def token_settings(
    tables: tuple[CodeTable, ...],
    chosen: Bool[np.ndarray, "place"],
    after: Codes,
    strength: float,
    tokens: Tokens,
) -> None:
    """Puts into an image's tables what takes tokens' codes to their values in another run, whatever they have become.

    A code z becomes z + strength (value - z): what moves it besides, as an edit before it does, is not counted twice.

    Args:
        tables: of the image; changed in place.
        chosen: whether a place is set, in the order of `choices.all_places`.
        after: codes of the other run.
        strength: share of the way; 1 sets them.
        tokens: where to edit.
    """
    for (number, rows), moved in zip(marked_rows(tokens), _by_side(chosen, tables), strict=True):
        table, new = tables[number], after[number].swapaxes(0, 1)[:, :, rows]
        table.scale[:, :, rows] = np.where(moved, 1 - strength, table.scale[:, :, rows])
        table.offset[:, :, rows] = np.where(moved, strength * new, table.offset[:, :, rows])


def _by_side(values: np.ndarray, tables: tuple[CodeTable, ...]) -> list[np.ndarray]:
    """Cuts one number per place into `SIDES`, each [layer step 1 feat]."""
    parts, first = [], 0
    for group, _ in SIDES:
        layers, steps, _, features = tables[GROUPS.index(group)].scale.shape
        end = first + steps * layers * features
        parts.append(values[first:end].reshape(steps, layers, 1, features).swapaxes(0, 1))
        first = end
    return parts


def _affine(old: np.ndarray, new: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and offset that take codes to others: `choices.moves` in numbers."""
    falls = new < old
    left = np.divide(new, old, out=np.ones_like(old), where=falls)
    return np.where(falls, 1 - strength * (1 - left), 1), np.where(falls, 0, strength * (new - old))


def steer_codes(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tables: Callable[[int], tuple[CodeTable, ...]],
    progress: Progress | None = None,
) -> tuple[UInt8[np.ndarray, "image H W rgb"], Float[np.ndarray, "image"]]:
    """Generates one edited image per prompt and seed, in form `delta`.

    Args:
        pipe: the organism.
        tcs: its transcoders, one at every site.
        prompts: one per image.
        seeds: of the starting noise, alike.
        tables: makes an image's edits, per group; called once for each image, in order.
        progress: called with (images done, images in all).

    Returns:
        Pixels, and the size of each image's edits.

    Raises:
        UserError: as `run_codes`.
    """
    run, model = plain_run(pipe), pipe.transformer
    encoded = {prompt: encode(pipe, prompt, run.text_tokens) for prompt in dict.fromkeys(prompts)}
    layers = []
    for number, slots in enumerate(tcs.sites.slots(model.config.layout)):
        slot = jnp.asarray([slots[block] for block in model.config.layout.blocks_of(number)], jnp.int32)
        layers.append(EditLayers(slot, jnp.ones(slot.shape, bool), None, None))
    params = EditedModel(model, tcs.per_group(model.config.layout), tuple(layers))
    found = []
    for first in range(0, len(prompts), AT_ONCE):
        rows = list(range(first, min(first + AT_ONCE, len(prompts))))
        made = [tables(row) for row in rows]
        # The last batch is filled up, so that every batch has the compiled size.
        at = (rows * AT_ONCE)[:AT_ONCE]
        edits = jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *(made[row - first] for row in at))
        text, pooled = (jnp.stack([getattr(encoded[prompts[row]], name) for row in at]) for name in ("text", "pooled"))
        noise = jnp.stack([initial_noise(pipe, run, seeds[row]) for row in at])
        given = edits, text[:, None], pooled[:, None], noise, jnp.asarray(run.sigmas), run.grid
        latents, norms = sample_edited(params, (None,) * len(edits), *given, run.fed_guidance, None, "delta")
        found.append([np.asarray(a)[: len(rows)] for a in (pixels(pipe.vae, latents, run.grid), norms)])
        if progress is not None:
            progress(rows[-1] + 1, len(prompts))
    images, norms = map(np.concatenate, zip(*found, strict=True))
    return images, norms
