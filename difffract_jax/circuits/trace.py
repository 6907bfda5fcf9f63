"""A trace: everything the replacement of one denoising step holds fixed (METHOD section 3).

1. Run the sampler up to the step, and no further.
2. Run the transformer's double-stream blocks once, from the first to the last that has a transcoder, and record of each
   the queries and keys, the norm scales, and the MLPs' inputs and outputs.
3. Mark the positions whose MLPs may be replaced: all image tokens, and the prompt's own text tokens. Transcoders never
   saw padding in training, so that padded positions keep their true MLP unless `include_padding` says otherwise.

Nothing here depends on the transcoders but the range of blocks. Attention patterns are not stored: q and k give them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from difffract_jax.config import UserError
from difffract_jax.models.blocks import BlockActs, Cond, DoubleBlock, Frozen, Streams
from difffract_jax.models.mmdit import Inputs, MMDiT, run_double
from difffract_jax.models.pipeline import Pipeline, encode, model_velocity, plan_run, sample, start, step_inputs
from difffract_jax.ops import widen
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit


class Record(NamedTuple):
    """The arrays of a trace. Stacks have a leading layer axis over the recorded blocks.

    Attributes:
        blocks: weights of the recorded double-stream blocks.
        cond: conditioning vector and rotary angles.
        boundary: residual streams entering the first recorded block, h0.
        frozen: queries, keys and norm scales.
        mlp_in: inputs x of the MLP sublayers.
        mlp_out: their outputs y.
        replaceable: positions whose MLPs may be replaced.
        t: denoising time, the value the transformer was fed.
    """

    blocks: DoubleBlock
    cond: Cond
    boundary: Streams
    frozen: Frozen
    mlp_in: Streams
    mlp_out: Streams
    replaceable: Streams
    t: Float[Array, ""]


@dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """Where a trace comes from.

    Attributes:
        prompt: of the run.
        cut: the end of the prompt that did not fit; "" if all did.
        seed: of the starting noise; not what it started from if latents were given.
        step: the step, from 0.
        sigmas: noise level entering every step, and the final 0.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        first_block: the model's number of the first recorded block.
        include_padding: whether padded text positions are replaced like any other.
        latents_given: whether the run started from given latents.
        model: content hash of the pipeline.
    """

    prompt: str
    cut: str
    seed: int
    step: int
    sigmas: tuple[float, ...]
    grid: tuple[int, int]
    text_tokens: int
    first_block: int
    include_padding: bool
    latents_given: bool
    model: str


class Trace(NamedTuple):
    """One denoising step of one run, recorded.

    Attributes:
        record: the arrays.
        info: where they come from.
    """

    record: Record
    info: TraceInfo


def capture(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    *,
    seed: int = 0,
    step: int = 0,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    latents: Any = None,
    include_padding: bool = False,
) -> Trace:
    """Records one denoising step of a run, in at least float32 whatever the type of the weights.

    Args:
        pipe: the pipeline.
        tcs: transcoders that the trace is for; they tell which blocks to record.
        prompt: of the run.
        seed: seed of the starting noise.
        step: step to record, from 0.
        steps: denoising steps; this and the sizes below: the pipeline's defaults if left out.
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence.
        guidance: guidance scale, for models that take one.
        latents: packed starting noise instead of the seed's.
        include_padding: replace the MLPs of padded text positions too, as the reference does.

    Raises:
        UserError: if the step or a size is out of range, or the transcoders do not fit the model.
    """
    check_fit(tcs, pipe.config.transformer)
    layers = tcs.img_layers + tcs.txt_layers
    if tcs.config.role != "transcoder" or not layers:
        raise UserError(
            "Tracing needs transcoders, which map an MLP's input to its output, but these are "
            f"{'SAEs' if layers else 'none'}; give a directory of transcoders."
        )
    run = plan_run(pipe.config, steps=steps, height=height, width=width, text_tokens=text_tokens, guidance=guidance)
    count = len(run.sigmas) - 1
    if not 0 <= step < count:
        raise UserError(f"step must lie in [0, {count}), as the run has {count} steps counted from 0, but got {step}.")
    encoded = encode(pipe, prompt, run.text_tokens)
    mask = np.ones_like(encoded.mask) if include_padding else encoded.mask
    with jax.default_matmul_precision("highest"):
        z = sample(model_velocity, pipe.transformer, run, encoded, start(pipe, run, seed, latents), stop=step)
        inputs = step_inputs(run, encoded, z, step)
        record = _record(pipe.transformer, inputs, jnp.asarray(mask), run.grid, min(layers), max(layers) + 1)
    info = TraceInfo(
        prompt=prompt,
        cut=encoded.cut,
        seed=seed,
        step=step,
        sigmas=tuple(map(float, run.sigmas)),
        grid=run.grid,
        text_tokens=run.text_tokens,
        first_block=min(layers),
        include_padding=include_padding,
        latents_given=latents is not None,
        model=pipe.source,
    )
    return Trace(record, info)


@partial(jax.jit, static_argnames=("grid", "first", "end"))
def _record(
    model: MMDiT, inputs: Inputs, text_mask: Bool[Array, "txt"], grid: tuple[int, int], first: int, end: int
) -> Record:
    """Runs blocks 0 to `end`, and records those from `first` on."""
    h, cond = jax.tree.map(widen, model.embed(inputs, grid))
    blocks = jax.tree.map(widen, model.double)
    before, recorded = (jax.tree.map(lambda w, s=s: w[s], blocks) for s in (slice(first), slice(first, end)))
    boundary, _ = run_double(before, h, cond)
    _, (frozen, mlp_in, mlp_out) = run_double(recorded, boundary, cond, tap=_keep)
    replaceable = Streams(jnp.ones(boundary.img.shape[0], bool), text_mask)
    return Record(recorded, cond, boundary, frozen, mlp_in, mlp_out, replaceable, inputs.t)


def _keep(acts: BlockActs) -> tuple[Frozen, Any, Any]:
    return acts.frozen, acts.mlp_in, acts.mlp_out
