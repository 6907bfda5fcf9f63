"""The second pass of a scan: the prompts of all examples run again, each example's map is taken, images are drawn.

1. An example is a feature, a prompt and an evaluation (a step, or one branch of it). `Jobs` lists those of a group,
   sorted by prompt, evaluation and site.
2. Batch after batch of the prompts that any example needs runs all its steps. At every evaluation every site is encoded
   once, and the columns of the features that want it are picked, `ROUND` of a prompt at a time.
3. A map is an example's values over the tokens, as shares of the feature's largest value in 255 steps, 0 for inactive
   alone. Text tokens are kept one by one, image tokens as a picture of at most `SIDE` cells a side, the largest value
   of those that fall into a cell.
4. After the last step the images are drawn and made small.

Maps and thumbnails lie in files that are mapped into memory. What is finished is kept as in the first pass.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from difffract_jax.address import Group, Tokens
from difffract_jax.dashboards.features.choice import Examples
from difffract_jax.dashboards.features.corpus import Batch, Corpus, step_with_taps
from difffract_jax.dashboards.features.scan import SECONDS
from difffract_jax.dashboards.features.state import encoded
from difffract_jax.models.batch import pixels
from difffract_jax.models.blocks import Streams
from difffract_jax.models.stacks import streams
from difffract_jax.models.streaming import Streamed, stack_trees, wait_for
from difffract_jax.spread import on_mesh_of
from difffract_jax.storage.resumable import Output
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet

SIDE = 16
"""Most cells of a map's picture along a side."""
THUMB = 96
"""Most pixels of a thumbnail along a side."""
ROUND = 256
"""Most features of a site that are picked of one prompt at a time."""
NAME = "shown-"


class Jobs(NamedTuple):
    """Examples of a group's features, sorted by prompt, evaluation and site.

    Attributes:
        key: prompt * evaluations + evaluation.
        site: place of the site in its group.
        feature: of the site.
        slot: which of the feature's examples.
        most: of one site that are picked of a prompt in an evaluation at a time; a power of two, so that one
            program does.
    """

    key: Int[np.ndarray, "job"]
    site: Int[np.ndarray, "job"]
    feature: Int[np.ndarray, "job"]
    slot: Int[np.ndarray, "job"]
    most: int


def jobs_of(examples: Examples, rows: int, evaluations: int) -> Jobs:
    """Returns the jobs of a group.

    Args:
        examples: of all its sites, [site feat shown].
        rows: of its sequence.
        evaluations: of all steps.
    """
    site, feature, slot = np.nonzero(examples.prompt >= 0)
    at = site, feature, slot
    key = examples.prompt[at].astype(np.int64) * evaluations + examples.place[at] // rows
    order = np.lexsort((feature, site, key))
    sites = examples.prompt.shape[0]
    together = np.bincount(np.unique(key * sites + site, return_inverse=True)[1], minlength=1).max()
    room = min(ROUND, 1 << int(together - 1).bit_length() if together else 1)
    return Jobs(key[order], *(a[order].astype(np.int32) for a in at), room)


def cells_of(group: Group, grid: tuple[int, int], text_tokens: int) -> int:
    """Returns the length of a map: text tokens, if the sequence holds them, then cells of the image, if it does."""
    rows, columns = cell_grid(grid)
    return sum({"txt": text_tokens, "img": rows * columns}[stream] for stream in group.streams)


def cell_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Returns rows and columns of a map's picture."""
    return tuple(-(-side // -(-side // SIDE)) for side in grid)  # pyright: ignore[reportReturnType]


def thumb_size(height: int, width: int) -> tuple[int, int]:
    """Returns height and width of a thumbnail."""
    scale = min(1.0, THUMB / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def render(
    corpus: Corpus,
    tcs: TranscoderSet,
    jobs: Mapping[str, Jobs],
    peaks: Mapping[str, Float[np.ndarray, "site feat"]],
    maps: Mapping[str, UInt8[np.ndarray, "site feat shown cells"]],
    thumbs: UInt8[np.ndarray, "chosen height width rgb"],
    *,
    output: Output | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[np.ndarray, "chosen"]:
    """Runs the prompts of all examples again, and fills in their maps and thumbnails.

    Args:
        corpus: what runs.
        tcs: its transcoders, or SAEs.
        jobs: by group.
        peaks: largest value of every feature, by group.
        maps: to fill in, by group.
        thumbs: to fill in, a thumbnail per prompt that is run.
        output: where what is finished is noted; None for nowhere.
        progress: called with (prompts done, prompts in all).

    Returns:
        The prompts that were run, ascending.
    """
    chosen = chosen_prompts(jobs, corpus.run.evaluations)
    finished = [] if output is None else [name for name in output.finished if name.startswith(NAME)]
    done = max((int(name.removeprefix(NAME)) for name in finished), default=0)
    last = time.monotonic()
    with on_mesh_of(corpus.pipe.transformer):
        for first in range(done * corpus.batch, len(chosen), corpus.batch):
            if progress is not None:
                progress(first, len(chosen))
            numbers = chosen[first : first + corpus.batch]
            images = _render_batch(corpus, tcs, jobs, peaks, maps, numbers)
            for place, image in enumerate(images[: len(numbers)]):
                small = Image.fromarray(image).resize(thumbs.shape[2:0:-1], Image.Resampling.BOX)
                thumbs[first + place] = np.asarray(small)
            if output is not None and (time.monotonic() - last > SECONDS or first + corpus.batch >= len(chosen)):
                for array in (*maps.values(), thumbs):
                    if isinstance(array, np.memmap):
                        array.flush()
                output.finish(f"{NAME}{first // corpus.batch + 1:06}", 0)
                last = time.monotonic()
    if progress is not None:
        progress(len(chosen), len(chosen))
    return chosen


def chosen_prompts(jobs: Mapping[str, Jobs], evaluations: int) -> Int[np.ndarray, "chosen"]:
    """Returns the prompts that any example needs, ascending."""
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(one.key // evaluations for one in jobs.values())]))


def _render_batch(
    corpus: Corpus,
    tcs: TranscoderSet,
    jobs: Mapping[str, Jobs],
    peaks: Mapping[str, np.ndarray],
    maps: Mapping[str, np.ndarray],
    numbers: Int[np.ndarray, "wanted"],
) -> UInt8[np.ndarray, "prompt H W rgb"]:
    """Runs some prompts, fills in their maps, and returns their images, those of prompts that fill up included."""
    batch = corpus.batch_of(numbers.tolist())
    latents = batch.noise
    groups = {group.name: group for group, _ in tcs.sites.members}
    for step in range(corpus.run.steps):
        latents, read = step_with_taps(corpus, batch, latents, step, tcs.sites, tcs.config.role)
        for branch, name in [(branch, name) for branch, by_group in enumerate(read) for name in by_group]:
            number, own = step * corpus.run.branches + branch, (jobs[name], peaks[name], maps[name])
            _fill(corpus, batch, groups[name], tcs.stacks[name], read[branch].pop(name), number, *own)
    return np.asarray(pixels(corpus.pipe.vae, latents, corpus.run.grid))


def _fill(
    corpus: Corpus,
    batch: Batch,
    group: Group,
    stack: Any,
    read: Array,
    evaluation: int,
    jobs: Jobs,
    peaks: np.ndarray,
    maps: np.ndarray,
) -> None:
    """Takes the maps of one group's examples in one evaluation of a batch."""
    sites, slots = len(peaks), []
    for place, number in enumerate(batch.numbers[batch.own]):
        lowest, highest = np.searchsorted(jobs.key, [number * corpus.run.evaluations + evaluation + i for i in (0, 1)])
        mine = np.arange(lowest, highest)
        within = np.arange(len(mine)) - np.searchsorted(jobs.site[mine], jobs.site[mine])
        slots.append(np.stack([mine, np.full(len(mine), place), within]))
    job, prompt, within = np.concatenate(slots, axis=1).astype(np.int64)
    if not job.size:
        return
    step, branch = divmod(evaluation, corpus.run.branches)
    counted = jnp.asarray(corpus.counted(batch, group, branch))
    t, most = jnp.asarray(corpus.run.sigmas[step]), jnp.asarray(peaks)
    for first in range(0, int(within.max()) + 1, jobs.most):
        now = (within >= first) & (within < first + jobs.most)
        wanted = np.zeros((sites, corpus.batch, jobs.most), np.int32)
        at = jobs.site[job[now]], prompt[now], within[now] - first
        wanted[at] = jobs.feature[job[now]]
        fixed = group, corpus.run.grid
        picked = np.asarray(_pick(stack, read, counted, jnp.asarray(wanted), most, t, *fixed))
        maps[jobs.site[job[now]], jobs.feature[job[now]], jobs.slot[job[now]]] = picked[at]


def _pick(stack: Any, read: Array, counted: Array, wanted: Array, peaks: Array, t: Array, *fixed: Any) -> Array:
    """Returns maps [site prompt wanted cells] of the wanted features."""
    if not isinstance(stack, Streamed):
        return _pick_all(stack, read, counted, wanted, peaks, t, *fixed)
    maps = []
    for number, transcoder in stack.fetched(range(stack.depth)):
        of_site = read[:, number], counted, wanted[number], peaks[number]
        maps.append(_pick_one(transcoder, *of_site, t, *fixed))
        wait_for(maps[-1])
        del transcoder  # before the one after next is fetched
    return stack_trees(maps)


@partial(jax.jit, static_argnames=("group", "grid"))
def _pick_all(
    stack: Any,
    read: Array,
    counted: Array,
    wanted: Array,
    peaks: Array,
    t: Array,
    group: Group,
    grid: tuple[int, int],
) -> Array:
    def site(now: tuple[Any, Array, Array, Array]) -> Array:
        tc, rows, features, most = now
        return _pick_site(tc, rows, counted, features, most, t, group, grid)

    return jax.lax.map(site, (stack, jnp.moveaxis(read, 1, 0), wanted, peaks))


def _pick_site(
    tc: Transcoder,
    read: Float[Array, "prompt row d_model"],
    counted: Array,
    wanted: Int[Array, "prompt wanted"],
    peaks: Float[Array, "feat"],
    t: Array,
    group: Group,
    grid: tuple[int, int],
) -> UInt8[Array, "prompt wanted cells"]:
    """Returns the maps of some features at one site."""
    z = jnp.where(counted[:, :, None], encoded(tc, read, t), 0.0)
    values = jnp.take_along_axis(z, wanted[:, None, :], axis=2).transpose(0, 2, 1)
    share = values / jnp.maximum(peaks[wanted], 1e-30)[:, :, None]
    sizes = Tokens(img=grid[0] * grid[1], txt=read.shape[1] - (grid[0] * grid[1] if "img" in group.streams else 0))
    like = Streams(*(jnp.zeros((1, 1, count)) for count in sizes))
    sides = streams((share,), (group,), like, axis=2)
    cells = [
        sides.txt if stream == "txt" else _pooled(sides.img.reshape(*share.shape[:2], *grid))
        for stream in group.streams
    ]
    joined = jnp.concatenate(cells, axis=2)
    return jnp.where(joined > 0, jnp.clip(jnp.round(255 * joined), 1, 255), 0).astype(jnp.uint8)


_pick_one = jax.jit(_pick_site, static_argnames=("group", "grid"))


def _pooled(heat: Float[Array, "prompt wanted row column"]) -> Float[Array, "prompt wanted cell"]:
    """Returns pictures of at most `SIDE` cells a side, each the largest of the values that fall into it."""
    for axis in (2, 3):
        size = heat.shape[axis]
        each = -(-size // SIDE)
        cells = -(-size // each)
        pad = [(0, 0)] * 4
        pad[axis] = (0, cells * each - size)
        shape = list(heat.shape)
        shape[axis : axis + 1] = [cells, each]
        heat = jnp.max(jnp.pad(heat, pad).reshape(shape), axis=axis + 1)
    return heat.reshape(*heat.shape[:2], -1)
