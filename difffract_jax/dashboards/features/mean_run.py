"""What of a run does not depend on its tokens, at the mean prompt: gates, time conditioning, the last norm and layer.

A feature writes its decoder vector times its block's gate into the residual stream. Gates follow from time and from the
pooled prompt alone; here the pooled prompt is the corpus's mean. Up- and downstream weights take the mean gate over the
steps, the effect on pixels that of the last step. Norms divide by the spread of a row, which hangs on the tokens: here
it is the mean over the rows of the first batch.
"""

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
    by_step = [_gates(corpus, sites, _cond(corpus, pooled, step)) for step in range(corpus.run.steps)]
    gates = {name: np.mean([one[name] for one in by_step], axis=0) for name in by_step[0]}
    last = corpus.run.steps - 1
    norms, scale = _scales(corpus, sites)
    cond = _cond(corpus, pooled, last)
    # With the scale of the norm held, the last layer is affine in the residual stream. What one unit changes is small
    # beside the constant, so that it is taken in float32 whatever the weights are in.
    sigma, wide = float(corpus.run.sigmas[last]), corpus.pipe.config.transformer.d_model
    layer, cond = jax.tree.map(widen, (corpus.pipe.transformer.final, cond))
    rows = jnp.concatenate([jnp.zeros((1, wide)), jnp.eye(wide)])
    out = np.asarray(_final(layer, rows, cond, jnp.full(wide + 1, scale, jnp.float32)), np.float32)
    # A change of the velocity v changes the predicted clean latents z - sigma v.
    return MeanRun(gates, by_step[-1], norms, -sigma * (out[1:] - out[:1]), latents)


def _cond(corpus: Corpus, pooled: np.ndarray, step: int) -> Cond:
    """Returns what the blocks of a step share at the mean prompt."""
    run, config = corpus.run, corpus.pipe.config.transformer
    guidance = None if run.guidance is None else jnp.asarray(run.guidance, jnp.float32)
    images, text = jnp.zeros((run.tokens.img, config.in_channels)), jnp.zeros((run.text_tokens, config.text_width))
    inputs = Inputs(images, text, jnp.asarray(pooled), jnp.asarray(run.sigmas[step]), guidance)
    return corpus.pipe.transformer.embed(inputs, run.grid)[1]


def _gates(corpus: Corpus, sites: SiteSet, cond: Cond) -> dict[str, Float[np.ndarray, "site d_model"]]:
    """Returns the gates of the sites, by group."""
    layout = corpus.pipe.config.transformer.layout
    found: dict[str, dict[int, np.ndarray]] = {group.name: {} for group, _ in sites.members}
    slots = sites.slots(layout)
    for number, stack in enumerate(corpus.pipe.transformer.stacks):
        for block, gates in zip(layout.blocks_of_stack(number), _stack_gates(stack, cond), strict=True):
            for group, gate in zip(layout.groups_of_stack(number), gates, strict=True):
                if block in slots[group]:
                    found[layout.groups[group].name][slots[group][block]] = np.asarray(gate, np.float32)
    return {name: np.stack([placed[i] for i in range(len(placed))]) for name, placed in found.items()}


def _stack_gates(stack: Any, cond: Cond) -> list[Any]:
    """Returns the gates of every block of a stack."""
    if isinstance(stack, Streamed):
        return [block.gates(cond) for _, block in stack.fetched(range(stack.depth))]
    every = jax.vmap(lambda block: block.gates(cond))(stack)
    return list(zip(*every, strict=True))


def _scales(corpus: Corpus, sites: SiteSet) -> tuple[dict[str, Float[np.ndarray, "site"]], float]:
    """Returns the mean scales of norms at the sites, by group, and that of the last norm in the last step."""
    batch = corpus.batch_of(range(min(corpus.batch, len(corpus.prompts))))
    counted = {group.name: corpus.counted(batch, group) for group, _ in sites.members}
    latents, by_step, last = batch.noise, [], 0.0
    for step in range(corpus.run.steps):
        inputs = _inputs(corpus, batch, latents, step)
        entering, final = _norm_scales(corpus.pipe.transformer, inputs, corpus.run.grid, sites)
        means = {
            name: (np.asarray(rows) * counted[name][:, None]).sum(axis=(0, 2)) / max(int(counted[name].sum()), 1)
            for name, rows in entering.items()
        }
        by_step.append(means)
        last = float(np.mean(np.asarray(final)[batch.own]))
        latents, _ = step_with_taps(corpus, batch, latents, step, sites, "transcoder")
    return {name: np.mean([one[name] for one in by_step], axis=0).astype(np.float32) for name in by_step[0]}, last


def _inputs(corpus: Corpus, batch: Batch, latents: Array, step: int) -> Inputs:
    run = corpus.run
    guidance = None if run.guidance is None else jnp.asarray(run.guidance, jnp.float32)
    return Inputs(latents, batch.text, batch.pooled, jnp.asarray(run.sigmas[step]), guidance)


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
