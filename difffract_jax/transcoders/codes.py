"""Feature codes of whole sampling runs, reduced where they are made: a run's codes are too many to keep.

1. Run the sampler on many prompts at once, with a tap at every site, one compiled scan over the steps.
2. At every step every site's rows are encoded, SAEs from y, and handed to `reduce`, site by site.
3. What it returns leaves the scan, with axes evaluation, prompt and site in front. An evaluation is a step, or with
   guidance by two branches one branch of a step, numbered as in `models.guidance`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.address import Group, Tokens
from difffract_jax.models.guidance import NegativeBranch, step_velocity
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.pipeline import Pipeline, Run, negative_branch
from difffract_jax.models.sampler import euler_scan
from difffract_jax.models.streaming import Streamed, jit_resident, stack_trees, streams_layers, wait_for
from difffract_jax.transcoders.harvest import tapped_velocity
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet

Reduce = Callable[[Group, Float[Array, "rows feat"], Any], Any]
"""`reduce(group, z, extra)`: a named function, since each is compiled once."""


def reduced_codes(
    pipe: Pipeline,
    tcs: TranscoderSet,
    run: Run,
    text: Float[Array, "prompt txt text_width"],
    pooled: Float[Array, "prompt pooled_width"],
    noise: Float[Array, "prompt img channels"],
    reduce: Reduce,
    extra: Any,
) -> tuple[dict[str, Any], Float[Array, "prompt img channels"]]:
    """Runs the sampler on several prompts at once and reduces every site's codes at every evaluation.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs.
        run: sizes and schedule.
        text: text embeddings.
        pooled: pooled prompt embeddings.
        noise: packed starting noise.
        reduce: what to keep of one site's code at one evaluation of one prompt.
        extra: its last argument; arrays with axes evaluation and prompt in front.

    Returns:
        By group what `reduce` returned, with axes [evaluation prompt site] in front; and the latents after the last
        step.
    """
    sigmas = jnp.asarray(run.sigmas, noise.dtype)
    negative = negative_branch(pipe, run, noise.dtype)
    by_step = jax.tree.map(lambda a: jnp.reshape(jnp.asarray(a), (run.steps, run.branches, *np.shape(a)[1:])), extra)
    fixed = run.grid, run.fed_guidance, tcs.sites, reduce
    kept, latents = _scan(pipe.transformer, tcs.stacks, text, pooled, noise, sigmas, negative, by_step, *fixed)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept), latents


@partial(jit_resident, static_argnames=("grid", "guidance", "sites", "reduce"))
def _scan(
    model: MMDiT,
    stacks: dict[str, Any],
    text: Array,
    pooled: Array,
    noise: Array,
    sigmas: Array,
    negative: NegativeBranch | None,
    extra: Any,
    grid: tuple[int, int],
    guidance: float | None,
    sites: SiteSet,
    reduce: Reduce,
) -> tuple[dict[str, Any], Array]:
    """Returns what is kept, [step branch prompt site] in front, and the latents after the last step."""
    counts = Tokens(img=grid[0] * grid[1], txt=text.shape[1])
    tokens = {group.name: jnp.arange(group.rows(counts)) for group, _ in sites.members}
    scale = None if guidance is None else jnp.asarray(guidance, noise.dtype)

    def one(z: Array, txt: Array, vec: Array, extra: Any, t: Array, step: Array) -> tuple[Array, dict[str, Any]]:
        def branch(number: Array, txt: Array, vec: Array) -> tuple[Array, dict[str, Any]]:
            v, rows = tapped_velocity(model, Inputs(z, txt, vec, t, scale), tokens, grid=grid, sites=sites)
            own = jax.tree.map(lambda a: a[0 if negative is None else number % 2], extra)
            kept = {
                group.name: _each_site(
                    group, reduce, stacks[group.name], (rows[group.name].x, rows[group.name].y), t, own
                )
                for group, _ in sites.members
            }
            return v, kept

        return step_velocity(branch, txt, vec, negative, step, z.dtype)

    def evaluate(z: Array, sigma: Array, number: Array, extra: Any) -> tuple[Array, dict[str, Any]]:
        over_prompts = jax.vmap(one, in_axes=(0, 0, 0, 1, None, None), out_axes=(0, 1))
        return over_prompts(z, text, pooled, extra, sigma, number)

    latents, kept = euler_scan(evaluate, noise, sigmas, extra, streamed=streams_layers(model, stacks))
    return kept, latents


def _each_site(group: Group, reduce: Reduce, stack: Any, rows: tuple[Array, Array], t: Array, extra: Any) -> Any:
    """Reduces the codes of a group's sites, one after the other."""
    if not isinstance(stack, Streamed):
        return jax.lax.map(lambda site: _at_site(group, reduce, site[0], site[1], t, extra), (stack, rows))
    kept = []
    for number, transcoder in stack.fetched(range(stack.depth)):
        here = jax.tree.map(lambda leaf, i=number: leaf[i], rows)
        kept.append(_at_site_alone(group, reduce, transcoder, here, t, extra))
        wait_for(kept[-1])
        del transcoder  # before the one after next is fetched
    return stack_trees(kept)


def _at_site(group: Group, reduce: Reduce, tc: Transcoder, rows: tuple[Array, Array], t: Array, extra: Any) -> Any:
    x, y = rows
    read = (y if tc.config.role == "sae" else x).astype(tc.enc.kernel.dtype)
    return reduce(group, tc.encode(read, t), extra)


_at_site_alone = jax.jit(_at_site, static_argnames=("group", "reduce"))


def repeat_steps(extra: Any, steps: int) -> Any:
    """Returns arrays [... prompt ...] with an axis of so many steps in front, the same at all."""
    return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (steps, *np.shape(a))), extra)
