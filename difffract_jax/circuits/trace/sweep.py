"""Recording a step of a model whose blocks are streamed: one sweep over the layers for everything that a trace needs.

`record_sweep` gives what `record_step` and `read_live` give, in one go: every block is fetched once, and runs for the
prompt and, where the model takes one, for the same prompt with the pooled embedding of the empty one. Of a recorded
block it keeps what the frozen block reads (`Block.slim`), about a tenth; the block itself is fetched again where
someone needs more of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from difffract_jax.circuits.trace.record import Blocks, Record, RunOutputs, Weights, replaceable_rows
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.mmdit import Final, Inputs
from difffract_jax.models.stacks import per_group, sequences, streams
from difffract_jax.models.streaming import Streamed, no_layers, stack_trees
from difffract_jax.ops import layer_norm, widen

Runs = tuple[tuple[Array, ...], ...]
"""Residual streams per group: of the run, and of the run without the prompt's pooled embedding if there is one."""


class _Kept(NamedTuple):
    """What a recorded block leaves: what is held, x and y per group, x of the other run, and its slim weights."""

    frozen: Any
    mlp_in: tuple[Array, ...]
    mlp_out: tuple[Array, ...]
    unpooled_in: tuple[Array, ...]
    slim: Any


def record_sweep(
    model: Any,
    inputs: Inputs,
    unpooled: Inputs | None,
    text_mask: Bool[Array, "txt"],
    grid: tuple[int, int],
    blocks: Blocks,
    weights: Weights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Records a step.

    Args:
        model: the transformer, its stacks streamed.
        inputs: of the step.
        unpooled: the same with the pooled embedding of the empty prompt, and the latents that it led to; None for a
            model that takes none.
        text_mask: text positions whose MLPs may be replaced.
        grid: rows and columns of image tokens.
        blocks: which are recorded.
        weights: slim ones that another step of the run kept; taken from this sweep if left out.
        progress: called with (blocks done, blocks in all).
    """
    given = [inputs] if unpooled is None else [inputs, unpooled]
    runs = [_embed(model, one, grid, blocks.output and not blocks.first) for one in given]
    conds, h = tuple(cond for _, cond in runs), tuple(streams for streams, _ in runs)
    boundary, kept = None, []
    chosen = blocks.layers(model.stacks)
    for place, (stack, layers) in enumerate(zip(model.stacks, chosen, strict=True)):
        done = sum(range_.stop for range_ in chosen[:place])
        tell = None if progress is None else (lambda n, done=done: progress(done + n, sum(r.stop for r in chosen)))
        states = tuple(sequences(one, stack.groups) for one in h)
        states, entering, held = _sweep(stack, states, conds, layers, weights is None, tell)
        if boundary is None and layers:
            boundary = streams(entering[0], stack.groups, h[0])
        h = tuple(streams(joined, stack.groups, before) for joined, before in zip(states, h, strict=True))
        kept.append(held)
    assert boundary is not None, "some block is recorded"
    final = model.final if blocks.output else None
    ends = [(None, None) if final is None else _end(final, one.img, c) for one, c in zip(h, conds, strict=True)]
    if weights is None:
        parts = [(stack, slice(r.start, r.stop)) for stack, r in zip(model.stacks, chosen, strict=True)]
        live = tuple(stack.layers(part) for stack, part in parts)
        weights = Weights(tuple(one.slim for one in kept), final, *model.projections(grid), live)
    return Record(
        weights=weights,
        cond=conds[0],
        boundary=boundary,
        frozen=tuple(one.frozen for one in kept),
        inv_std=ends[0][0],
        mlp_in=per_group([one.mlp_in for one in kept]),
        mlp_out=per_group([one.mlp_out for one in kept]),
        velocity=ends[0][1],
        replaceable=replaceable_rows(model.stacks, Streams(jnp.ones(boundary.img.shape[0], bool), text_mask)),
        latents=widen(inputs.latents),
        text=widen(inputs.text),
        t=inputs.t,
        unpooled=None
        if unpooled is None
        else RunOutputs(per_group([one.unpooled_in for one in kept]), ends[1][1], widen(unpooled.latents)),
    )


def _sweep(
    stack: Streamed,
    states: Runs,
    conds: tuple[Cond, ...],
    recorded: range,
    slim: bool,
    tell: Callable[[int], None] | None,
) -> tuple[Runs, Runs, _Kept]:
    """Runs a stack's layers up to the last that is recorded.

    Returns:
        What leaves them; what enters the first that is recorded; and what the recorded ones leave.
    """
    entering, kept = states, []
    for number, block in stack.fetched(range(recorded.stop)):
        if number < recorded.start:
            states = entering = _run_block(block, states, conds)
        else:
            states, held = _record_block(block, states, conds)
            kept.append(held._replace(slim=_slim(block) if slim else None))
        jax.block_until_ready((states, kept[-1:]))
        del block  # before the one after next is fetched
        if tell is not None:
            tell(number + 1)
    if kept:
        return states, entering, stack_trees(kept)
    held = jax.eval_shape(_record_block, stack.abstract(), states, conds)[1]
    return states, entering, no_layers(held._replace(slim=jax.eval_shape(_slim, stack.abstract()) if slim else None))


@partial(jax.jit, static_argnames=("grid", "anew"))
def _embed(model: Any, inputs: Inputs, grid: tuple[int, int], anew: bool) -> tuple[Streams, Cond]:
    h, cond = jax.tree.map(widen, model.embed(inputs, grid))
    if anew:
        # A span carries its inputs through these very projections.
        img_in, txt_in = model.projections(grid)
        h = Streams(img_in(widen(inputs.latents)), txt_in(widen(inputs.text)))
    return h, cond


@jax.jit
def _run_block(block: Any, states: Runs, conds: tuple[Cond, ...]) -> Runs:
    return tuple(tuple(block(h, cond)[0]) for h, cond in zip(states, conds, strict=True))


@jax.jit
def _record_block(block: Any, states: Runs, conds: tuple[Cond, ...]) -> tuple[Runs, _Kept]:
    after, acts = block(states[0], conds[0])
    others = [block(h, cond) for h, cond in zip(states[1:], conds[1:], strict=True)]
    unpooled_in = tuple(x for _, seen in others for x in seen.mlp_in)
    kept = _Kept(acts.frozen, tuple(acts.mlp_in), tuple(acts.mlp_out), unpooled_in, None)
    return (tuple(after), *(tuple(other) for other, _ in others)), kept


@jax.jit
def _slim(block: Any) -> Any:
    return block.slim()


@jax.jit
def _end(final: Final, h: Float[Array, "img d_model"], cond: Cond) -> tuple[Array, Array]:
    return layer_norm(h)[1], final(h, cond)
