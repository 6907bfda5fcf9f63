"""The arrays of a trace, and the runs of the model that give them (docs/method.md, section 3).

`record_step` runs the blocks up to the last that is needed and keeps of the recorded ones what the replacement holds
fixed; `read_live` keeps only what targets read. `Blocks` says which are recorded, `Weights` are theirs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.mmdit import Final, Inputs
from difffract_jax.models.stacks import Visit, depth_of, per_group, run_stack, sequences, slice_layer, streams
from difffract_jax.models.streaming import Streamed
from difffract_jax.ops import layer_norm, widen
from difffract_jax.spread import spread
from difffract_jax.trees import brief


class Weights(NamedTuple):
    """The recorded part of the model, in its own type: products widen it. Stacks have a leading layer axis.

    Attributes:
        stacks: the recorded blocks of each of the model's stacks; none of a stack that is not recorded.
        final: the last norm and projection; None unless the velocity is recorded.
        img_in: projection of packed latents into the image stream.
        txt_in: projection of the text embedding into the text stream.
        streamed: the recorded blocks as they are fetched, where those of `stacks` are slim (`sweep`); else ().
    """

    stacks: tuple[Any, ...]
    final: Final | None
    img_in: nnx.Linear
    txt_in: nnx.Linear
    streamed: tuple[Streamed, ...] = ()

    @property
    def live(self) -> tuple[Any, ...]:
        """The recorded blocks with all that is in them."""
        return self.streamed or self.stacks

    __repr__ = brief


class RunOutputs(NamedTuple):
    """Results of a run of the recorded blocks, live or replaced.

    Attributes:
        mlp_in: inputs x of the MLP sublayers, [layer rows d_model] per group.
        velocity: the model's output, [img channels]; None unless it is recorded.
        latents: packed latents entering the step, [img channels].
    """

    mlp_in: tuple[Array, ...]
    velocity: Array | None
    latents: Array


class Record(NamedTuple):
    """The arrays of a trace. Stacks have a leading layer axis over the recorded blocks.

    Attributes:
        weights: of the recorded blocks.
        cond: conditioning vector and rotary angles.
        boundary: residual streams entering the first recorded block, h0.
        frozen: queries, keys and norm scales of each stack's blocks, in a type of the stack's own.
        inv_std: scale of the last norm; None unless the velocity is recorded.
        mlp_in: inputs x of the MLP sublayers, [layer rows d_model] per group.
        mlp_out: their outputs y, alike.
        velocity: the model's output; None unless it is recorded.
        replaceable: positions whose MLPs may be replaced, [rows] per group.
        latents: packed latents entering the step.
        text: text embedding.
        t: denoising time, the value the transformer was fed.
        unpooled: what the live model gives with the pooled embedding of the empty prompt; None if that was not run.
    """

    weights: Weights
    cond: Cond
    boundary: Streams
    frozen: tuple[Any, ...]
    inv_std: Float[Array, "img"] | None
    mlp_in: tuple[Float[Array, "_ _ d_model"], ...]
    mlp_out: tuple[Float[Array, "_ _ d_model"], ...]
    velocity: Float[Array, "img outputs"] | None
    replaceable: tuple[Bool[Array, "_"], ...]
    latents: Float[Array, "img channels"]
    text: Float[Array, "txt text_width"]
    t: Float[Array, ""]
    unpooled: RunOutputs | None

    @property
    def reading(self) -> RunOutputs:
        """What the model itself gave."""
        return RunOutputs(self.mlp_in, self.velocity, self.latents)

    @property
    def side_lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each stream that a sequence holds, in order, per group."""
        groups = (group for stack in self.weights.stacks for group in stack.groups)
        return tuple(tuple(getattr(self.boundary, stream).shape[0] for stream in group.streams) for group in groups)

    @property
    def replaceable_text(self) -> Bool[Array, "txt"]:
        """Text positions whose MLPs may be replaced: the prompt's own, or all with padding."""
        groups = (group for stack in self.weights.stacks for group in stack.groups)
        for group, rows, lengths in zip(groups, self.replaceable, self.side_lengths, strict=True):
            if "txt" in group.streams:
                first = sum(lengths[: group.streams.index("txt")])
                return rows[first : first + self.boundary.txt.shape[0]]
        return jnp.zeros(self.boundary.txt.shape[0], bool)

    @property
    def first_layers(self) -> tuple[int, ...]:
        """Where each group's layers begin, counted through all recorded layers."""
        firsts, layers = [], 0
        for stack in self.weights.stacks:
            firsts += [layers] * len(stack.groups)
            layers += depth_of(stack)
        return tuple(firsts)

    __repr__ = brief


class Blocks(NamedTuple):
    """Which blocks are recorded: a run of them, numbered through the model.

    Attributes:
        first: the first.
        end: the one behind the last.
        output: whether the velocity is recorded.
    """

    first: int
    end: int
    output: bool

    def layers(self, stacks: Sequence[Any]) -> tuple[range, ...]:
        """Returns which layers of each stack are recorded; what comes before them runs unrecorded."""
        found, first = [], 0
        for depth in map(depth_of, stacks):
            low, high = (min(max(block - first, 0), depth) for block in (self.first, self.end))
            found.append(range(low, high))
            first += depth
        return tuple(found)


def take_weights(model: Any, blocks: Blocks, grid: tuple[int, int]) -> Weights:
    """Takes the recorded part of the model's weights; whole stacks are not copied.

    Args:
        model: the transformer: `stacks`, `final` and `projections`.
        blocks: which are recorded.
        grid: rows and columns of image tokens.
    """
    pairs = zip(model.stacks, blocks.layers(model.stacks), strict=True)
    taken = tuple(
        stack if len(some) == depth_of(stack) else _layers(stack, some.start, some.stop) for stack, some in pairs
    )
    return Weights(taken, model.final if blocks.output else None, *model.projections(grid))


@partial(jax.jit, static_argnames=("first", "end"))
def _layers(stack: Any, first: int, end: int) -> Any:
    return slice_layer(stack, slice(first, end))


@partial(jax.jit, static_argnames=("grid", "blocks"))
def read_live(model: Any, weights: Weights, inputs: Inputs, grid: tuple[int, int], blocks: Blocks) -> RunOutputs:
    """Runs the model, and reports what a target reads."""
    record = record_step(model, weights, inputs, jnp.zeros(inputs.text.shape[0], bool), grid, blocks)
    return record.reading


@partial(jax.jit, static_argnames=("grid", "blocks"))
def record_step(
    model: Any,
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
    boundary, frozen, mlp_in, mlp_out = None, [], [], []
    for stack, recorded, layers in zip(model.stacks, weights.stacks, blocks.layers(model.stacks), strict=True):
        joined = sequences(h, stack.groups)
        joined, _ = run_stack(slice_layer(stack, slice(0, layers.start)), joined, cond)
        if boundary is None and layers:
            boundary = streams(joined, stack.groups, h)
        joined, (held, x, y) = run_stack(recorded, joined, cond, tap=_keep)
        h = streams(joined, stack.groups, h)
        frozen.append(held)
        mlp_in.append(x)
        mlp_out.append(y)
    assert boundary is not None, "some block is recorded"
    inv_std = velocity = None
    if weights.final is not None:
        inv_std = layer_norm(h.img)[1]
        velocity = weights.final(h.img, cond)
    mask = Streams(jnp.ones(boundary.img.shape[0], bool), text_mask)
    return Record(
        weights=None,  # type: ignore[arg-type]  # the caller has them
        cond=cond,
        boundary=boundary,
        frozen=tuple(frozen),
        inv_std=inv_std,
        mlp_in=per_group(mlp_in),
        mlp_out=per_group(mlp_out),
        velocity=velocity,
        replaceable=replaceable_rows(model.stacks, mask),
        latents=widen(inputs.latents),
        text=widen(inputs.text),
        t=inputs.t,
        unpooled=None,
    )


def replaceable_rows(stacks: Sequence[Any], mask: Streams) -> tuple[Bool[Array, "_"], ...]:
    """Returns which rows of each group's sequence may be replaced.

    Args:
        stacks: of the model.
        mask: tokens of each stream that may.
    """
    return per_group([sequences(mask, stack.groups, axis=0) for stack in stacks])


def _keep(visit: Visit) -> tuple[Any, tuple[Array, ...], tuple[Array, ...]]:
    kept = visit.acts.frozen, tuple(visit.acts.mlp_in), tuple(visit.acts.mlp_out)
    return jax.tree.map(lambda leaf: spread(leaf, 1, 0) if leaf.ndim > 1 else leaf, kept)
