"""The arrays of a trace, and the runs of the model that give them (METHOD section 3).

`record_step` runs the blocks up to the last that is needed and keeps of the recorded ones what the replacement holds
fixed; `read_live` keeps only what targets read. `Blocks` says which are recorded, `Weights` are theirs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from difffract_jax.models.blocks import (
    BlockActs,
    Cond,
    DoubleBlock,
    Frozen,
    Groups,
    SingleActs,
    SingleBlock,
    SingleFrozen,
    Streams,
    join,
    split,
)
from difffract_jax.models.mmdit import Final, Inputs, MMDiT, run_double, run_single
from difffract_jax.ops import layer_norm, widen
from difffract_jax.trees import brief


class Weights(NamedTuple):
    """The recorded part of the model, in its own type: products widen it. Stacks have a leading layer axis.

    Attributes:
        double: the recorded double-stream blocks.
        single: the recorded single-stream blocks.
        final: the last norm and projection; None unless the velocity is recorded.
        img_in: projection of packed latents into the image stream.
        txt_in: projection of the text embedding into the text stream.
    """

    double: DoubleBlock
    single: SingleBlock
    final: Final | None
    img_in: nnx.Linear
    txt_in: nnx.Linear

    __repr__ = brief


class Reading(NamedTuple):
    """What a run of the recorded blocks gives, live or replaced.

    Attributes:
        mlp_in: inputs x of the MLP sublayers, [layer rows d_model] per group.
        velocity: the model's output, [img channels]; None unless it is recorded.
        latents: packed latents entering the step, [img channels].
    """

    mlp_in: Groups
    velocity: Array | None
    latents: Array


class Record(NamedTuple):
    """The arrays of a trace. Stacks have a leading layer axis over the recorded blocks.

    Attributes:
        weights: of the recorded blocks.
        cond: conditioning vector and rotary angles.
        boundary: residual streams entering the first recorded block, h0.
        frozen: queries, keys and norm scales of the double-stream blocks.
        frozen_single: the same of the single-stream blocks.
        inv_std: scale of the last norm; None unless the velocity is recorded.
        mlp_in: inputs x of the MLP sublayers.
        mlp_out: their outputs y.
        velocity: the model's output; None unless it is recorded.
        replaceable: positions whose MLPs may be replaced.
        latents: packed latents entering the step.
        text: text embedding.
        t: denoising time, the value the transformer was fed.
        unpooled: what the live model gives with the pooled embedding of the empty prompt; None if that was not run.
    """

    weights: Weights
    cond: Cond
    boundary: Streams
    frozen: Frozen
    frozen_single: SingleFrozen
    inv_std: Float[Array, "img"] | None
    mlp_in: Groups
    mlp_out: Groups
    velocity: Float[Array, "img outputs"] | None
    replaceable: Groups
    latents: Float[Array, "img channels"]
    text: Float[Array, "txt text_width"]
    t: Float[Array, ""]
    unpooled: Reading | None

    @property
    def reading(self) -> Reading:
        """What the model itself gave."""
        return Reading(self.mlp_in, self.velocity, self.latents)

    __repr__ = brief


class Blocks(NamedTuple):
    """Which blocks are recorded; of each kind from `first` up to `end`, exclusive.

    Attributes:
        first: double-stream block.
        end: double-stream block.
        first_single: single-stream block.
        end_single: single-stream block.
        output: whether the velocity is recorded.
    """

    first: int
    end: int
    first_single: int
    end_single: int
    output: bool


def take_weights(model: MMDiT, blocks: Blocks) -> Weights:
    """Takes the recorded part of the model's weights; whole stacks are not copied."""
    double = _layers(model.double, blocks.first, blocks.end)
    single = _layers(model.single, blocks.first_single, blocks.end_single)
    return Weights(double, single, model.final if blocks.output else None, model.img_in, model.txt_in)


@partial(jax.jit, static_argnames=("first", "end"))
def _layers(stack: Any, first: int, end: int) -> Any:
    # What a jitted function returns as it was given is the same array: a whole stack is not copied.
    depth = jax.tree.leaves(stack)[0].shape[0]
    return stack if (first, end) == (0, depth) else jax.tree.map(lambda w: w[first:end], stack)


@partial(jax.jit, static_argnames=("grid", "blocks"))
def read_live(model: MMDiT, weights: Weights, inputs: Inputs, grid: tuple[int, int], blocks: Blocks) -> Reading:
    """Runs the model, and reports what a target reads."""
    record = record_step(model, weights, inputs, jnp.zeros(inputs.text.shape[0], bool), grid, blocks)
    return record.reading


@partial(jax.jit, static_argnames=("grid", "blocks"))
def record_step(
    model: MMDiT,
    weights: Weights,
    inputs: Inputs,
    text_mask: Bool[Array, "txt"],
    grid: tuple[int, int],
    blocks: Blocks,
) -> Record:
    """Runs the blocks up to the last recorded one; returns a record without weights."""
    h, cond = jax.tree.map(widen, model.embed(inputs, grid))
    if blocks.output and not blocks.first:
        # A span carries its inputs through these very projections.
        h = Streams(weights.img_in(widen(inputs.latents)), weights.txt_in(widen(inputs.text)))
    text_tokens = inputs.text.shape[0]
    before = jax.tree.map(lambda w: w[: blocks.first], model.double)
    boundary, _ = run_double(before, h, cond)
    h, (frozen, mlp_in, mlp_out) = run_double(weights.double, boundary, cond, tap=_keep)
    joint = join(h)
    if not blocks.end - blocks.first:
        skipped = jax.tree.map(lambda w: w[: blocks.first_single], model.single)
        joint, _ = run_single(skipped, joint, cond)
        boundary = split(joint, text_tokens)
    joint, (frozen_single, single_in, single_out) = run_single(weights.single, joint, cond, tap=_keep_single)
    inv_std = velocity = None
    if weights.final is not None:
        last = split(joint, text_tokens).img
        inv_std = layer_norm(last)[1]
        velocity = weights.final(last, cond)
    rows = jnp.ones(boundary.img.shape[0], bool)
    return Record(
        weights=None,  # type: ignore[arg-type]  # the caller has them
        cond=cond,
        boundary=boundary,
        frozen=frozen,
        frozen_single=frozen_single,
        inv_std=inv_std,
        mlp_in=Groups(mlp_in.img, mlp_in.txt, single_in),
        mlp_out=Groups(mlp_out.img, mlp_out.txt, single_out),
        velocity=velocity,
        replaceable=Groups(rows, text_mask, jnp.concatenate([text_mask, rows])),
        latents=widen(inputs.latents),
        text=widen(inputs.text),
        t=inputs.t,
        unpooled=None,
    )


def _keep(acts: BlockActs) -> tuple[Frozen, Any, Any]:
    return acts.frozen, acts.mlp_in, acts.mlp_out


def _keep_single(acts: SingleActs) -> tuple[SingleFrozen, Any, Any]:
    return acts.frozen, acts.mlp_in, acts.mlp_out
