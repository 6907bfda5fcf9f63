"""A trace from activations that another program recorded, so that edges are compared on identical activations.

1. Read the file (`models/activations.py`), and hold it against the pipeline: shapes, the prompt's tokens, and whether
   our weights make of the recorded inputs what was recorded, up to the rounding of a bfloat16 run.
2. The record is the file's activations with our weights, of all blocks and the velocity.

Nothing of the model is run again. With activations of a bfloat16 run the replacement is not exact at the traced point:
what it explains differs from what was recorded by that run's rounding (docs/cross-check.md).
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from difffract_jax.circuits.trace.capture import Trace, TraceInfo
from difffract_jax.circuits.trace.record import Blocks, Record, Weights, replaceable_rows, take_weights
from difffract_jax.config import UserError
from difffract_jax.models.activations import Activations, array_shapes, read_activations, records_of
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.mmdit import position_ids
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.streaming import refuse_streamed
from difffract_jax.models.tokenizers import TokenIds, encode_prompt
from difffract_jax.ops import rope_table
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit

MISFIT = 0.1
"""Largest relative error of what our weights make of recorded inputs; bfloat16's is about 0.01, other weights' 1."""


def load_trace(path: str | Path, pipe: Pipeline, tcs: TranscoderSet, *, include_padding: bool = False) -> Trace:
    """Makes a trace of a file of activations.

    Args:
        path: from `python -m converters.torch_trace`.
        pipe: the pipeline that the activations are of, converted.
        tcs: transcoders that the trace is for.
        include_padding: replace the MLPs of padded text positions too.

    Returns:
        The trace, of all blocks and the velocity; its `unpooled` is None.

    Raises:
        UserError: if the file is broken, not finite, of another format or model, or the transcoders do not fit.
    """
    refuse_streamed(pipe.transformer)
    found, config = read_activations(path), pipe.config.transformer
    check_fit(tcs, config)
    if tcs.config.role != "transcoder":
        raise UserError("Tracing needs transcoders, which map an MLP's input to its output, but these are SAEs.")
    _check_shapes(path, found, pipe)
    ids = encode_prompt(pipe.tokenizers, found.prompt, len(found.text_mask))
    if not np.array_equal(ids.t5_mask, found.text_mask):
        raise UserError(
            f"{path} has {found.text_mask.sum()} tokens of its prompt, but the model's tokenizer makes "
            f"{ids.t5_mask.sum()}; give the model that the activations are of."
        )
    blocks = Blocks(0, config.layout.depth, True)
    with jax.default_matmul_precision("highest"):
        record = _record(found, pipe, take_weights(pipe.transformer, blocks, found.grid), include_padding)
        errors = {name: float(error) for name, error in _misfits(record, records_of(found.arrays).names).items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= MISFIT:
        raise UserError(
            f"{path} was recorded from other weights: its {worst} is off by {errors[worst]:.2g} of its size; give the "
            "model that the activations are of."
        )
    return Trace(record, _info(found, pipe, ids, include_padding))


def _check_shapes(path: str | Path, found: Activations, pipe: Pipeline) -> None:
    for name, shape in array_shapes(pipe.config.transformer, found.grid, len(found.text_mask)).items():
        if found.arrays[name].shape != shape:
            raise UserError(
                f"{path} holds {name} of shape {found.arrays[name].shape}, but this model and the file's sizes make it "
                f"{shape}; give the model that the activations are of."
            )


def _record(found: Activations, pipe: Pipeline, weights: Weights, include_padding: bool) -> Record:
    dtype = np.promote_types(pipe.transformer.img_in.kernel.dtype, np.float32)
    arrays = {name: jnp.asarray(array, dtype) for name, array in found.arrays.items()}
    config, records = pipe.config.transformer, records_of(arrays)
    angles = rope_table(position_ids(found.grid, len(found.text_mask)), config.rope_axes, config.rope_theta)
    mask = jnp.asarray(np.ones_like(found.text_mask) if include_padding else found.text_mask)
    replaceable = Streams(jnp.ones(arrays["residual_img"].shape[0], bool), mask)
    return Record(
        weights=weights,
        cond=Cond(arrays["cond"], *(jnp.asarray(table, dtype) for table in angles)),
        boundary=Streams(arrays["residual_img"], arrays["residual_txt"]),
        frozen=records.frozen,
        inv_std=arrays["final_inv_std"],
        mlp_in=records.mlp_in,
        mlp_out=records.mlp_out,
        velocity=arrays["velocity"],
        replaceable=replaceable_rows(weights.stacks, replaceable),
        latents=arrays["latents"],
        text=arrays["text"],
        t=jnp.asarray(found.t, dtype),
        unpooled=None,
    )


@partial(jax.jit, static_argnames="names")
def _misfits(record: Record, names: tuple[str, ...]) -> dict[str, Array]:
    """Returns the relative error of what our weights make of recorded inputs, for every kind of recorded output."""
    weights, x, y = record.weights, record.mlp_in, record.mlp_out
    made = {
        "residual_img": (weights.img_in(record.latents), record.boundary.img),
        "residual_txt": (weights.txt_in(record.text), record.boundary.txt),
    }
    group = 0
    for stack in weights.stacks:
        for number in range(len(stack.groups)):
            if x[group].shape[0]:
                outputs = jax.lax.map(
                    lambda layer, number=number: layer[0].run_mlp(number, layer[1]), (stack, x[group])
                )
                made[names[group]] = outputs, y[group]
            group += 1
    return {name: jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs) for name, (ours, theirs) in made.items()}


def _info(found: Activations, pipe: Pipeline, ids: TokenIds, include_padding: bool) -> TraceInfo:
    layout = pipe.config.transformer.layout
    return TraceInfo(
        prompt=found.prompt,
        cut=ids.cut,
        seed=found.seed,
        step=found.step,
        sigmas=found.sigmas,
        grid=found.grid,
        text_tokens=len(found.text_mask),
        tokens=tuple(pipe.tokenizers.pieces(ids.t5_ids)),
        guidance=found.guidance,
        recorded=tuple(range(layout.depth)),
        layout=layout,
        include_padding=include_padding,
        latents_given=found.latents_given,
        model=pipe.source,
        model_origin=pipe.origin or None,
        base_model=pipe.base or None,
        loras=pipe.loras,
    )
