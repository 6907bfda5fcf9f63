"""The first pass of a scan: every prompt once, statistics of every feature, kept now and then.

1. The first prompt is run once beforehand, for the scale of each site's histograms. Then batch after batch runs all its
   steps; `state` counts each, and absorbs the peaks after the last.
2. Beside features the sums of the final latents and of the pooled embeddings are kept: the mean run, at which the
   effects of features on pixels are taken.
3. What is finished is kept on disk at most every `SECONDS`, so that an interrupted scan goes on there. Batches are cut
   by number and merged in order: the result is the same, bit for bit.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.dashboards.features.corpus import Corpus, step_with_taps
from difffract_jax.dashboards.features.state import FeatureState, absorb, count_evaluation, empty_peaks, empty_state
from difffract_jax.spread import on_mesh_of, ways_of
from difffract_jax.storage.files import TensorFile, atomic_file, write_tensors
from difffract_jax.storage.resumable import Output, checksum_of
from difffract_jax.transcoders.transcoder import TranscoderSet

SECONDS = 60.0
"""Between two times that what is finished is kept."""
NAME = "scanned-"
WORK = "work"
"""Folder of what is kept until the directory is complete; it counts as held on the disk."""


class Means(NamedTuple):
    """Sums over prompts, which become means when they are divided by their number.

    Attributes:
        latents: packed latents after the last step.
        pooled: pooled embeddings.
    """

    latents: Float[Any, "img channels"]
    pooled: Float[Any, "pooled_width"]


class Scanned(NamedTuple):
    """What the first pass has found so far.

    Attributes:
        states: by group.
        tokens: by group, tokens that counted in each step, of each branch.
        sums: over prompts.
        done: batches that are finished.
    """

    states: dict[str, FeatureState]
    tokens: dict[str, tuple[int, ...]]
    sums: Means
    done: int


class Kept:
    """What is finished of a first pass, on disk in a directory that is being written.

    Attributes:
        output: the directory.
        seconds: between two times that it is kept.
    """

    def __init__(self, output: Output, seconds: float = SECONDS) -> None:
        """Takes the directory; nothing is written yet."""
        self.output, self.seconds = output, seconds
        self.folder = output.files / WORK
        self._last = time.monotonic()

    def load(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """Returns how many batches are finished, and their arrays; None if nothing that is sound was kept."""
        names = sorted((name for name in self.output.finished if name.startswith(NAME)), reverse=True)
        for name in names:
            path = self.folder / f"{name}.safetensors"
            if checksum_of(path) == self.output.finished[name]:
                file = TensorFile(path)
                return int(name.removeprefix(NAME)), {key: np.array(file[key]) for key in file.tensors}
        return None

    def save(self, done: int, arrays: Callable[[], Mapping[str, np.ndarray]], *, at_once: bool = False) -> None:
        """Keeps what is finished, if it is time.

        Args:
            done: batches that are finished.
            arrays: gives their arrays.
            at_once: keep them in any case.
        """
        if not at_once and time.monotonic() - self._last < self.seconds:
            return
        self.folder.mkdir(exist_ok=True)
        name, made = f"{NAME}{done:06}", arrays()
        path = self.folder / f"{name}.safetensors"
        with atomic_file(path) as partial:
            write_tensors(partial, [(key, a.dtype, a.shape) for key, a in made.items()], made.values())
        self.output.finish(name, checksum_of(path))
        for other in self.folder.glob(f"{NAME}*.safetensors"):
            if other != path:
                self.output.forget(other.stem)
                other.unlink()
        self._last = time.monotonic()


def scan(
    corpus: Corpus,
    tcs: TranscoderSet,
    *,
    top: int,
    sample: int,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scanned:
    """Runs every prompt, and counts every feature.

    Args:
        corpus: the prompts, and what they run on.
        tcs: its transcoders, or SAEs.
        top: prompts to keep of the largest peaks.
        sample: prompts to keep of a uniform sample.
        kept: where what is finished is kept; None for nowhere.
        progress: called with (prompts done, prompts in all).
    """
    stored = None if kept is None else kept.load()
    ranks = corpus.ranks
    with on_mesh_of(corpus.pipe.transformer):
        now = empty_scan(corpus, tcs, top=top, sample=sample)
        if stored is None:
            first = replace(corpus, prompts=corpus.prompts[:1])
            tried = scan_batch(first, tcs, empty_scan(first, tcs, top=1, sample=1), first.ranks)
            scales = {name: _scale(state) for name, state in tried.states.items()}
            states = {name: state._replace(scale=scales[name]) for name, state in now.states.items()}
            now = now._replace(states=states)
        else:
            now = _from_arrays(now, *stored)
        for number in range(now.done, corpus.batches):
            if progress is not None:
                progress(number * corpus.batch, len(corpus.prompts))
            now = scan_batch(corpus, tcs, now, ranks)
            if kept is not None:
                kept.save(now.done, lambda now=now: arrays_of(now), at_once=now.done == corpus.batches)
    jax.block_until_ready(now.states)
    if progress is not None:
        progress(len(corpus.prompts), len(corpus.prompts))
    return now


def empty_scan(corpus: Corpus, tcs: TranscoderSet, *, top: int, sample: int) -> Scanned:
    """Returns a scan before the first prompt; arguments as for `scan`."""
    features, run, config = tcs.config.features, corpus.run, corpus.pipe.config.transformer
    divides = corpus.mesh is not None and features % ways_of(corpus.mesh) == 0
    sharding = corpus.features_sharding() if divides else None
    kept = {"top": top, "sample": sample, "evaluations": run.evaluations, "sharding": sharding}
    states = {name: empty_state(len(numbers), features, **kept) for name, numbers in tcs.sites.groups.items()}
    sums = Means(
        jnp.zeros((run.tokens.img, config.in_channels), jnp.float32), jnp.zeros(config.pooled_width, jnp.float32)
    )
    return Scanned(states, dict.fromkeys(states, (0,) * run.branches), sums, 0)


def scan_batch(corpus: Corpus, tcs: TranscoderSet, now: Scanned, ranks: np.ndarray) -> Scanned:
    """Returns the scan after its next batch; the one before is used up."""
    first = now.done * corpus.batch
    batch = corpus.batch_of(range(first, min(first + corpus.batch, len(corpus.prompts))))
    features, latents, branches = tcs.config.features, batch.noise, range(corpus.run.branches)
    counted = {group.name: [corpus.counted(batch, group, one) for one in branches] for group, _ in tcs.sites.members}
    text = {group.name: corpus.text_rows(group) for group, _ in tcs.sites.members}
    divides = corpus.mesh is not None and features % ways_of(corpus.mesh) == 0
    sharding = corpus.peaks_sharding() if divides else None
    peaks = {
        name: empty_peaks(len(numbers), corpus.batch, features, sharding) for name, numbers in tcs.sites.groups.items()
    }
    states = dict(now.states)
    for step in range(corpus.run.steps):
        latents, read = step_with_taps(corpus, batch, latents, step, tcs.sites, tcs.config.role)
        t = jnp.asarray(corpus.run.sigmas[step])
        for branch, name in [(branch, name) for branch, by_group in enumerate(read) for name in by_group]:
            at = jnp.asarray(step * len(branches) + branch, jnp.int32)
            which = jnp.asarray(counted[name][branch]), jnp.asarray(text[name])
            given = tcs.stacks[name], read[branch].pop(name), *which, at, t
            states[name], peaks[name] = count_evaluation(states[name], peaks[name], *given)
    numbers, order = jnp.asarray(batch.numbers, jnp.int32), jnp.asarray(ranks[batch.numbers])
    states = {name: absorb(state, peaks[name], numbers, order) for name, state in states.items()}
    tokens = {
        name: tuple(count + int(mask.sum()) for count, mask in zip(now.tokens[name], masks, strict=True))
        for name, masks in counted.items()
    }
    return Scanned(states, tokens, _add(now.sums, latents, batch.pooled, jnp.asarray(batch.own)), now.done + 1)


@jax.jit
def _scale(state: FeatureState) -> Float[Array, "site"]:
    """Returns the power of two above the largest value at each site; 1 where nothing is active."""
    largest = jnp.max(state.top_value, axis=(1, 2))
    return jnp.exp2(jnp.ceil(jnp.log2(jnp.where(largest > 0, largest, 1.0))))


@jax.jit
def _add(sums: Means, latents: Array, pooled: Array, own: Array) -> Means:
    both = (jnp.tensordot(own.astype(jnp.float32), a.astype(jnp.float32), 1) for a in (latents, pooled))
    return Means(*(a + b for a, b in zip(sums, both, strict=True)))


def arrays_of(now: Scanned) -> dict[str, np.ndarray]:
    """Returns what a scan has found as arrays by name, for a file."""
    arrays = {
        f"{group}.{field}": np.asarray(array)
        for group, state in now.states.items()
        for field, array in state._asdict().items()
    }
    arrays |= {f"{group}.tokens": np.array(count, np.int64) for group, count in now.tokens.items()}
    return arrays | {f"sums.{field}": np.asarray(array) for field, array in now.sums._asdict().items()}


def _from_arrays(empty: Scanned, done: int, arrays: Mapping[str, np.ndarray]) -> Scanned:
    """Puts arrays of a file where those of an empty scan lie."""

    def put(name: str, like: Any) -> Any:
        return jax.device_put(arrays[name], like.sharding)

    states = {
        group: FeatureState(*(put(f"{group}.{field}", array) for field, array in state._asdict().items()))
        for group, state in empty.states.items()
    }
    sums = Means(*(put(f"sums.{field}", array) for field, array in empty.sums._asdict().items()))
    tokens = {group: tuple(int(count) for count in arrays[f"{group}.tokens"]) for group in states}
    return Scanned(states, tokens, sums, done)
