"""What a scan keeps of every feature: a tree of arrays on the device, updated by pure functions.

1. A prompt's *peak* of a feature is its largest value over all evaluations and tokens that count, with the place where
   it is: evaluation * rows + row, rows being the tokens of the site's sequence. An evaluation is a step, or with
   guidance by two branches one branch of a step, as `models.guidance` counts. `Peaks` holds those of the prompts that
   run together.
2. `FeatureState` keeps the `top` prompts of the largest peaks, and of the prompts in which the feature is active a
   uniform sample: those that come first in a random order of all prompts. Both can be merged batch by batch, in any
   split, and need no second look.
3. It counts active tokens and sums values by evaluation, the prompts in which a feature is active, and the values of
   all active tokens in a histogram with half-octave bins: `EDGES` times the site's scale, a power of two near its
   largest value in the first prompt. Codes of one site may be of order 1, those of another of order 1000.

`count_evaluation` does 1 and 3 for one evaluation, site by site in one compiled scan, so that the codes of one site are
in memory at a time; `absorb` does 2 after the last step. Both give their first arguments' memory to the result.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from difffract_jax.models.streaming import Streamed, wait_for
from difffract_jax.transcoders.transcoder import Transcoder
from difffract_jax.trees import brief

EDGES = 2.0 ** np.arange(-12, 3.25, 0.5)
"""Inner edges of the histogram's bins, in units of the site's scale; the first bin holds all smaller values above 0,
the last all larger ones."""
BINS = len(EDGES) + 1
LAST = np.int32(2**31 - 1)
"""Rank of a place in the sample that is still free."""


class FeatureState(NamedTuple):
    """Statistics of a group's features so far; all arrays but the scale have the axes site and feature in front.

    Attributes:
        top_value: largest peaks, the first the largest; 0 where there are fewer.
        top_prompt: number of the prompt.
        top_place: evaluation * rows + row.
        sample_rank: places in the random order of prompts, ascending; `LAST` where there are fewer.
        sample_value: peak in that prompt.
        sample_prompt: number of the prompt.
        sample_place: as `top_place`.
        active: tokens above 0, by evaluation.
        total: sum of values, by evaluation.
        histogram: tokens above 0, by value.
        prompts: prompts with any token above 0.
        text: tokens above 0 that are of the text; the others are of the image.
        scale: of the histogram's edges, by site.
    """

    top_value: Float[Any, "site feat top"]
    top_prompt: Int[Any, "site feat top"]
    top_place: Int[Any, "site feat top"]
    sample_rank: Int[Any, "site feat sample"]
    sample_value: Float[Any, "site feat sample"]
    sample_prompt: Int[Any, "site feat sample"]
    sample_place: Int[Any, "site feat sample"]
    active: Int[Any, "site feat evaluation"]
    total: Float[Any, "site feat evaluation"]
    histogram: Int[Any, "site feat bins"]
    prompts: Int[Any, "site feat"]
    text: Int[Any, "site feat"]
    scale: Float[Any, "site"]

    __repr__ = brief


class Peaks(NamedTuple):
    """Peaks of the prompts that run together.

    Attributes:
        value: largest value so far; 0 if the feature has not been active.
        place: evaluation * rows + row of it.
    """

    value: Float[Any, "site prompt feat"]
    place: Int[Any, "site prompt feat"]


def empty_state(
    sites: int, features: int, *, top: int, sample: int, evaluations: int, sharding: Any = None
) -> FeatureState:
    """Returns the state before the first prompt.

    Args:
        sites: of the group.
        features: of each site.
        top: prompts kept of the largest peaks.
        sample: prompts kept of the uniform sample.
        evaluations: of all steps.
        sharding: where the arrays lie, split along features; None for the default device.
    """

    def full(value: Any, dtype: Any, *last: int) -> Any:
        return jnp.full((sites, features, *last), value, dtype, device=sharding)

    ints, floats = partial(full, 0, jnp.int32), partial(full, 0, jnp.float32)
    return FeatureState(
        *(floats(top), ints(top), ints(top)),
        *(full(LAST, jnp.int32, sample), floats(sample), ints(sample), ints(sample)),
        *(ints(evaluations), floats(evaluations), ints(BINS), ints(), ints(), jnp.ones(sites, jnp.float32)),
    )


def empty_peaks(sites: int, prompts: int, features: int, sharding: Any = None) -> Peaks:
    """Returns the peaks before the first step; arguments as for `empty_state`, and the prompts that run together."""
    shape = (sites, prompts, features)
    return Peaks(jnp.zeros(shape, jnp.float32, device=sharding), jnp.zeros(shape, jnp.int32, device=sharding))


def count_evaluation(
    state: FeatureState,
    peaks: Peaks,
    stack: Any,
    read: Float[Array, "prompt site row d_model"],
    counted: Bool[Array, "prompt row"],
    text: Bool[Array, "row"],
    number: Int[Array, ""],
    t: Float[Array, ""],
) -> tuple[FeatureState, Peaks]:
    """Counts one evaluation of the prompts that run together.

    Args:
        state: of the group; used up.
        peaks: of these prompts; used up.
        stack: the group's transcoders, or a streamed stack of them.
        read: what each site's transcoder reads.
        counted: rows that count: no padding, and no prompt that only fills the batch up.
        text: rows that are of the text.
        number: of the evaluation.
        t: denoising time, as the transcoders are fed.
    """
    if not isinstance(stack, Streamed):
        return _count_all(state, peaks, stack, read, counted, text, number, t)
    for site, transcoder in stack.fetched(range(stack.depth)):
        state, peaks = _count_one(state, peaks, site, transcoder, read[:, site], counted, text, number, t)
        wait_for(peaks)
        del transcoder  # before the one after next is fetched
    return state, peaks


def encoded(tc: Transcoder, read: Float[Array, "prompt row d_model"], t: Float[Array, ""]) -> Any:
    """Returns the codes of several prompts' rows, [prompt row feat], in float32."""
    return jax.vmap(lambda rows: tc.encode(rows.astype(tc.enc.kernel.dtype), t))(read).astype(jnp.float32)


def _count_site(
    state: FeatureState,
    peaks: Peaks,
    site: Any,
    tc: Transcoder,
    read: Array,
    counted: Array,
    text: Array,
    number: Array,
    t: Array,
) -> tuple[FeatureState, Peaks]:
    """Counts the evaluation of that number at one site."""
    z = jnp.where(counted[:, :, None], encoded(tc, read, t), 0.0)
    edges = jnp.asarray([0.0, *EDGES, np.inf], jnp.float32) * state.scale[site]
    above = jax.vmap(lambda edge: jnp.sum(z > edge, axis=(0, 1), dtype=jnp.int32))(edges)
    largest, row = jnp.max(z, axis=1), jnp.argmax(z, axis=1).astype(jnp.int32)
    higher = largest > peaks.value[site]
    state = state._replace(
        active=state.active.at[site, :, number].add(above[0]),
        total=state.total.at[site, :, number].add(jnp.sum(z, axis=(0, 1))),
        text=state.text.at[site].add(jnp.sum((z > 0) & text[None, :, None], axis=(0, 1), dtype=jnp.int32)),
        histogram=state.histogram.at[site].add((above[:-1] - above[1:]).T),
    )
    place = number.astype(jnp.int32) * z.shape[1] + row
    return state, Peaks(
        peaks.value.at[site].set(jnp.where(higher, largest, peaks.value[site])),
        peaks.place.at[site].set(jnp.where(higher, place, peaks.place[site])),
    )


@partial(jax.jit, donate_argnames=("state", "peaks"))
def _count_all(
    state: FeatureState, peaks: Peaks, stack: Any, read: Array, counted: Array, text: Array, number: Array, t: Array
) -> tuple[FeatureState, Peaks]:
    def one(carry: tuple[FeatureState, Peaks], now: tuple[Array, Any, Array]) -> tuple[Any, None]:
        site, tc, rows = now
        return _count_site(*carry, site, tc, rows, counted, text, number, t), None

    sites = jnp.arange(read.shape[1])
    return jax.lax.scan(one, (state, peaks), (sites, stack, jnp.moveaxis(read, 1, 0)))[0]


_count_one = jax.jit(_count_site, donate_argnames=("state", "peaks"))


@partial(jax.jit, donate_argnames=("state",))
def absorb(
    state: FeatureState, peaks: Peaks, numbers: Int[Array, "prompt"], ranks: Int[Array, "prompt"]
) -> FeatureState:
    """Merges the peaks of prompts whose last step is done.

    Args:
        state: of the group; used up.
        peaks: of the prompts; 0 for one that only fills the batch up.
        numbers: of the prompts.
        ranks: their places in the random order of all prompts.
    """

    def site(state: FeatureState, now: tuple[Array, Peaks]) -> tuple[FeatureState, None]:
        number, peaks = now
        value, place = peaks.value.T, peaks.place.T
        prompt = jnp.broadcast_to(numbers[None].astype(jnp.int32), value.shape)
        rank = jnp.where(value > 0, ranks[None].astype(jnp.int32), LAST)
        top = _joined((state.top_value, state.top_prompt, state.top_place), number, (value, prompt, place))
        kept = state.sample_rank, state.sample_value, state.sample_prompt, state.sample_place
        sample = _joined(kept, number, (rank, value, prompt, place))
        largest = jax.lax.top_k(top[0], state.top_value.shape[2])[1]
        first = jax.lax.top_k(-sample[0], state.sample_rank.shape[2])[1]
        top_value, top_prompt, top_place = (jnp.take_along_axis(one, largest, axis=1) for one in top)
        ranks_, values, prompts, places = (jnp.take_along_axis(one, first, axis=1) for one in sample)
        return state._replace(
            top_value=state.top_value.at[number].set(top_value),
            top_prompt=state.top_prompt.at[number].set(top_prompt),
            top_place=state.top_place.at[number].set(top_place),
            sample_rank=state.sample_rank.at[number].set(ranks_),
            sample_value=state.sample_value.at[number].set(values),
            sample_prompt=state.sample_prompt.at[number].set(prompts),
            sample_place=state.sample_place.at[number].set(places),
            prompts=state.prompts.at[number].add(jnp.sum(value > 0, axis=1, dtype=jnp.int32)),
        ), None

    return jax.lax.scan(site, state, (jnp.arange(peaks.value.shape[0]), peaks))[0]


def _joined(kept: tuple[Array, ...], number: Array, new: tuple[Array, ...]) -> list[Array]:
    """Returns what is kept of the features of a site, with new prompts behind, [feat kept_and_new]."""
    return [jnp.concatenate([old[number], more], axis=1) for old, more in zip(kept, new, strict=True)]
