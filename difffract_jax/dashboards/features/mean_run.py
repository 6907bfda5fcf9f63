"""What of a run does not depend on its tokens, at the mean prompt: gates, time conditioning, the last norm and layer.

A feature writes its decoder vector times its block's gate into the residual stream. Gates follow from time and from the
pooled prompt alone; here the pooled prompt is the corpus's mean. Up- and downstream weights take the mean gate over the
steps, the effect on pixels that of the last step. Norms divide by the spread of a row, which hangs on the tokens: here
it is the mean over the rows of the first batch.

With guidance by two branches gates and norms of the residual streams are means over both, each with its own pooled
prompt. The last step's are the prompt's alone, and what its velocity changes counts by its weight, the guidance scale.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.dashboards.features.corpus import Batch, Corpus, step_with_taps
from difffract_jax.models.blocks import Cond
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.stacks import Visit, per_group, run_stacks
from difffract_jax.models.streaming import Streamed, jit_resident
from difffract_jax.ops import layer_norm, widen
from difffract_jax.transcoders.harvest import by_group, site_layers
from difffract_jax.transcoders.sites import SiteSet


class MeanRun(NamedTuple):
    """A corpus's mean run.

    Attributes:
        gates: by group, factor between what a site writes and its residual stream, mean over the steps.
        last_gates: by group, the same in the last step.
        norms: by group, scale of a norm of the residual stream entering each site's block, mean over rows and steps.
        final: of the last step: what the last norm and layer make of one more unit of each channel of the residual
            stream, a change of the predicted clean latents.
        latents: mean of the final latents.
    """

    gates: dict[str, Float[np.ndarray, "site d_model"]]
    last_gates: dict[str, Float[np.ndarray, "site d_model"]]
    norms: dict[str, Float[np.ndarray, "site"]]
    final: Float[np.ndarray, "d_model channels"]
    latents: Float[np.ndarray, "img channels"]


def mean_run(
    corpus: Corpus, sites: SiteSet, latents: Float[np.ndarray, "img channels"], pooled: Float[np.ndarray, "width"]
) -> MeanRun:
    """Returns the mean run of a corpus.

    Args:
        corpus: what was run.
        sites: whose gates are wanted.
        latents: mean of the final latents.
        pooled: mean of the pooled embeddings.
    """
    last, negative = corpus.run.steps - 1, corpus.negative_branch
    of_branches = [pooled] if negative is None else [pooled, negative.pooled]
    each = [[_gates(corpus, sites, _cond(corpus, one, step)) for one in of_branches] for step in range(last + 1)]
    gates = {name: np.mean([one[name] for step in each for one in step], axis=0) for name in each[0][0]}
    norms, scale = _scales(corpus, sites)
    cond = _cond(corpus, pooled, last)
    # With the scale of the norm held, the last layer is affine in the residual stream. What one unit changes is small
    # beside the constant, so that it is taken in float32 whatever the weights are in.
    sigma, wide = float(corpus.run.sigmas[last]), corpus.pipe.config.transformer.d_model
    layer, cond = jax.tree.map(widen, (corpus.pipe.transformer.final, cond))
    rows = jnp.concatenate([jnp.zeros((1, wide)), jnp.eye(wide)])
    out = np.asarray(_final(layer, rows, cond, jnp.full(wide + 1, scale, jnp.float32)), np.float32)
    # A change of the velocity v changes the predicted clean latents z - sigma v.
    weight = 1.0 if negative is None else float(negative.scale)
    return MeanRun(gates, each[-1][0], norms, -sigma * weight * (out[1:] - out[:1]), latents)


def _cond(corpus: Corpus, pooled: np.ndarray, step: int) -> Cond:
    """Returns what the blocks of a step share at the mean prompt."""
    run, config = corpus.run, corpus.pipe.config.transformer
    guidance = None if run.fed_guidance is None else jnp.asarray(run.fed_guidance, jnp.float32)
    images, text = jnp.zeros((run.tokens.img, config.in_channels)), jnp.zeros((run.text_tokens, config.text_width))
    inputs = Inputs(images, text, jnp.asarray(pooled), jnp.asarray(run.sigmas[step]), guidance)
    return _conditioned(corpus.pipe.transformer, inputs, grid=run.grid)


@partial(jit_resident, static_argnames="grid")
def _conditioned(model: Any, inputs: Inputs, *, grid: tuple[int, int]) -> Cond:
    return model.embed(inputs, grid)[1]


def _gates(corpus: Corpus, sites: SiteSet, cond: Cond) -> dict[str, Float[np.ndarray, "site d_model"]]:
    """Returns the gates of the sites, by group."""
    layout = corpus.pipe.config.transformer.layout
    by_group: dict[str, dict[int, np.ndarray]] = {group.name: {} for group, _ in sites.members}
    slots = sites.slots(layout)
    for number, stack in enumerate(corpus.pipe.transformer.stacks):
        for block, gates in zip(layout.blocks_of_stack(number), _stack_gates(stack, cond), strict=True):
            for group, gate in zip(layout.groups_of_stack(number), gates, strict=True):
                if block in slots[group]:
                    by_group[layout.groups[group].name][slots[group][block]] = np.asarray(gate, np.float32)
    return {name: np.stack([placed[i] for i in range(len(placed))]) for name, placed in by_group.items()}


def _stack_gates(stack: Any, cond: Cond) -> list[Any]:
    """Returns the gates of every block of a stack."""
    if isinstance(stack, Streamed):
        return [block.gates(cond) for _, block in stack.fetched(range(stack.depth))]
    return list(zip(*map(np.asarray, _every_gate(stack, cond)), strict=True))


@jax.jit
def _every_gate(stack: Any, cond: Cond) -> tuple[Float[Array, "layer d_model"], ...]:
    return jax.vmap(lambda block: block.gates(cond))(stack)


def _scales(corpus: Corpus, sites: SiteSet) -> tuple[dict[str, Float[np.ndarray, "site"]], float]:
    """Returns the mean scales of norms at the sites, by group, and that of the last norm in the last step."""
    batch, branches = corpus.batch_of(range(min(corpus.batch, len(corpus.prompts)))), range(corpus.run.branches)
    counted = {group.name: [corpus.counted(batch, group, one) for one in branches] for group, _ in sites.members}
    latents, by_step, last = batch.noise, [], 0.0
    for step in range(corpus.run.steps):
        # The prompt's branch comes last, so that the last norm's scale is its own.
        for branch in reversed(branches):
            inputs = _inputs(corpus, batch, latents, step, branch)
            entering, final = _norm_scales(corpus.pipe.transformer, inputs, corpus.run.grid, sites)
            masks = {name: of_branches[branch] for name, of_branches in counted.items()}
            means = {
                name: (np.asarray(rows) * masks[name][:, None]).sum(axis=(0, 2)) / max(int(masks[name].sum()), 1)
                for name, rows in entering.items()
            }
            by_step.append(means)
            last = float(np.mean(np.asarray(final)[batch.own]))
        latents, _ = step_with_taps(corpus, batch, latents, step, sites, "transcoder")
    return {name: np.mean([one[name] for one in by_step], axis=0).astype(np.float32) for name in by_step[0]}, last


def _inputs(corpus: Corpus, batch: Batch, latents: Array, step: int, branch: int) -> Inputs:
    """Returns the inputs of an evaluation, of every prompt of a batch."""
    run, text, pooled = corpus.run, batch.text, batch.pooled
    if branch and corpus.negative_branch is not None:
        negative = corpus.negative_branch
        text, pooled = (
            jnp.broadcast_to(jnp.asarray(one), own.shape)
            for one, own in ((negative.text, text), (negative.pooled, pooled))
        )
    guidance = None if run.fed_guidance is None else jnp.asarray(run.fed_guidance, jnp.float32)
    return Inputs(latents, text, pooled, jnp.asarray(run.sigmas[step]), guidance)


@jax.jit
def _final(layer: Any, rows: Array, cond: Cond, scales: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return layer(rows, cond, scales)


def _norm_scales_of(
    model: Any, inputs: Inputs, grid: tuple[int, int], sites: SiteSet
) -> tuple[dict[str, Float[Array, "prompt site row"]], Float[Array, "prompt img"]]:
    """Returns the scales of norms of what enters the sites' blocks, by group, and of the last norm."""
    layout = model.config.layout

    def one(latents: Array, text: Array, pooled: Array) -> tuple[dict[str, Array], Array]:
        h, cond = model.embed(inputs._replace(latents=latents, text=text, pooled=pooled), grid)
        h, reports = run_stacks(model.stacks, h, cond, tap=_entering, kept=site_layers(sites, layout))
        return by_group(per_group(reports), sites, layout), layer_norm(h.img)[1]

    return jax.vmap(one)(inputs.latents, inputs.text, inputs.pooled)


def _entering(visit: Visit) -> tuple[Array, ...]:
    return tuple(layer_norm(h)[1] for h in visit.entering)


_norm_scales = jit_resident(_norm_scales_of, static_argnames=("grid", "sites"))
