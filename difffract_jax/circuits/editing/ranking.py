"""Finding features: which stand out in a run, between two prompts, in a region, or over the steps.

1. Run the sampler for all seeds, and for a contrast prompt from the same noise, with a tap at every site.
2. Of every feature keep, per seed and evaluation, its mean over the tokens inside a region (all image tokens if there
   is none; the prompt's own tokens in text), its mean outside, and the token where it is strongest.
3. Score it, by one of

       activation   mean inside
       contrast     mean inside, minus the same for the contrast prompt
       region       mean inside minus mean outside
       trend        mean inside in the last step minus that in the first

   averaged over seeds, in a given step or where the score is largest. Contrast and trend rank by size, of either sign.
With guidance by two branches a feature is scored in both evaluations of a step, and shown in the branch where the score
is largest; in the negative one a contrast is that of the latents alone, which the prompts have led elsewhere.

Scores are in units of the code. Features are written with position and step, ready to be a target or an edit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from difffract_jax.address import BRANCHES, Group
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import tokens_in
from difffract_jax.config import UserError
from difffract_jax.generators import check_distinct
from difffract_jax.models.blocks import Streams
from difffract_jax.models.pipeline import Pipeline, Run, encode_run, initial_noise
from difffract_jax.models.stacks import streams
from difffract_jax.transcoders.codes import reduced_codes, repeat_steps
from difffract_jax.transcoders.sites import SiteSet, parse_sites
from difffract_jax.transcoders.transcoder import TranscoderSet, check_fit

ORDERS = ("contrast", "region", "trend", "activation")
AT_ONCE = 16
"""Runs computed together unless the caller says otherwise."""


class Summary(NamedTuple):
    """What is kept of one site's code, on one side of its sequence.

    Attributes:
        inside: mean over the tokens that count and lie in the region.
        outside: mean over those that count and do not; 0 if there are none.
        position: where the feature is strongest inside, within its stream.
    """

    inside: Float[Any, "*runs feat"]
    outside: Float[Any, "*runs feat"]
    position: Any


class Ranked(NamedTuple):
    """One feature of a ranking.

    Attributes:
        feature: with the position where it is strongest, and the step of the score, of two branches also the branch.
        score: see the module.
        value: mean inside, over seeds, in that step; for `trend` in the last one.
        against: what it is compared with: the contrast prompt's, outside, the first step's; 0 for `activation`.
        agreeing: seeds whose own score has the sign of the mean.
        seeds: seeds in all.
    """

    feature: Feature
    score: float
    value: float
    against: float
    agreeing: int
    seeds: int


def rank_features(
    pipe: Pipeline,
    tcs: TranscoderSet,
    prompt: str,
    *,
    contrast: str | None = None,
    mask: Bool[np.ndarray, "H W"] | None = None,
    by: str | None = None,
    step: int | None = None,
    seeds: Sequence[int] = (0,),
    top: int = 20,
    sites: Sequence[str] = ("*/*",),
    run: Run | None = None,
    batch: int = AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Ranked]]:
    """Ranks the features of the sites of every label.

    Args:
        pipe: the pipeline.
        tcs: its transcoders, or SAEs.
        prompt: the prompt.
        contrast: another prompt to compare with.
        mask: pixels of a region.
        by: one of `ORDERS`; left out, contrast or region if one is given, else activation.
        step: denoising step; left out, each feature's own with the largest score.
        seeds: of the starting noise, averaged over.
        top: features per stream.
        sites: which sites, as img/0-3 or single/*; all that have a transcoder if left out.
        run: sizes and schedule; the pipeline's defaults if left out.
        batch: runs computed together.
        progress: called with (runs done, runs in all).

    Returns:
        Label of sites -> features, highest score first; labels without a transcoder are left out.

    Raises:
        UserError: if what an order needs is missing, a seed occurs twice, a step or site does not exist, or the region
            holds no token.
    """
    check_fit(tcs, pipe.config.transformer)
    run = run or pipe.plan()
    by = by or ("contrast" if contrast is not None else "region" if mask is not None else "activation")
    _check(by, contrast, mask, step, seeds, run.steps)
    inside = np.ones(run.grid[0] * run.grid[1], bool)
    if mask is not None:
        inside = np.isin(np.arange(len(inside)), tokens_in(mask, run.grid))
    prompts = [prompt] if contrast is None else [prompt, contrast]
    wanted = parse_sites(sites, pipe.config.transformer.layout).groups
    kept = _summaries(pipe, tcs, run, prompts, seeds, inside, batch, progress)
    ranked: dict[str, list[Ranked]] = {}
    for group, side in sides_of(tcs.sites):
        rows = _rank(group, side, tcs, kept[group.name, side], wanted.get(group.name, ()), by, step, top, run.branches)
        if rows or group.label in ranked:
            every = (*ranked.get(group.label, ()), *rows)
            ranked[group.label] = sorted(every, key=lambda row: -_size(row, by))[:top]
    return ranked


def sides_of(sites: SiteSet) -> tuple[tuple[Group, str], ...]:
    """Returns the groups that have sites, and whose tokens are summarised in each, in the order of the result."""
    return tuple((group, stream) for group, _ in sites.members for stream in group.streams)


def _check(
    by: str, contrast: str | None, mask: np.ndarray | None, step: int | None, seeds: Sequence[int], steps: int
) -> None:
    if by not in ORDERS:
        raise UserError(f"Features are ranked by one of {', '.join(ORDERS)}, but got {by!r}.")
    if by == "contrast" and contrast is None:
        raise UserError("Ranking by contrast needs another prompt to compare with; give --contrast.")
    if by == "region" and mask is None:
        raise UserError("Ranking by region needs a region; give --box or --mask.")
    if by == "trend" and (step is not None or steps < 2):
        raise UserError("A trend is over all steps, at least two; leave --step out, and take more --steps.")
    if step is not None and not 0 <= step < steps:
        raise UserError(f"The step {step} does not exist: the run has steps 0 to {steps - 1}.")
    if not seeds:
        raise UserError("Features are averaged over seeds, but got none; write for example --seeds 0..4.")
    check_distinct(seeds)


def summarise_site(group: Group, z: Float[Array, "rows feat"], extra: tuple[Array, Array]) -> dict[str, Summary]:
    """Reduces one site's code to means and strongest positions; a `transcoders.codes.Reduce`.

    Args:
        group: of the site.
        z: the code.
        extra: which image tokens lie in the region, and which text tokens count.

    Returns:
        Side, "img" or "txt" -> summary.
    """
    inside, text = extra
    code = streams((z,), (group,), Streams(inside, text), axis=0)
    summaries = {}
    if "img" in group.streams:
        img = code.img
        summaries["img"] = Summary(_mean(img, inside), _mean(img, ~inside), _strongest(img, inside))
    if "txt" in group.streams:
        txt = code.txt
        summaries["txt"] = Summary(_mean(txt, text), jnp.zeros_like(txt[0]), _strongest(txt, text))
    return summaries


def _mean(z: Array, rows: Array) -> Array:
    return rows.astype(z.dtype) @ z / jnp.maximum(jnp.sum(rows), 1).astype(z.dtype)


def _strongest(z: Array, rows: Array) -> Array:
    return jnp.argmax(jnp.where(rows[:, None], z, -1), axis=0)


def _summaries(
    pipe: Pipeline,
    tcs: TranscoderSet,
    run: Run,
    prompts: Sequence[str],
    seeds: Sequence[int],
    inside: np.ndarray,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> dict[tuple[str, str], Summary]:
    """Returns (name of a group, side) -> summaries [evaluation prompt seed site feat]."""
    encoded = [encode_run(pipe, prompt, run) for prompt in prompts]
    pairs = [(one, seed) for one in encoded for seed in seeds]
    parts = []
    for first in range(0, len(pairs), batch):
        mine = pairs[first : first + batch]
        filled = [mine[i % len(mine)] for i in range(batch if first else len(mine))]
        text, pooled = (jnp.stack([getattr(one, name) for one, _ in filled]) for name in ("text", "pooled"))
        noise = jnp.stack([initial_noise(pipe, run, seed) for _, seed in filled])
        masks = np.stack([[np.asarray(branch.mask) for branch in one.branches] for one, _ in filled], axis=1)
        regions = np.broadcast_to(inside, (*masks.shape[:2], len(inside)))
        extra = [a.reshape(-1, *a.shape[2:]) for a in repeat_steps((regions, masks), run.steps)]
        found, _ = reduced_codes(pipe, tcs, run, text, pooled, noise, summarise_site, tuple(extra))
        flat = {(group, side): summary for group, sides in found.items() for side, summary in sides.items()}
        parts.append({key: [np.asarray(a)[:, : len(mine)] for a in value] for key, value in flat.items()})
        if progress is not None:
            progress(first + len(mine), len(pairs))

    def put_together(key: tuple[str, str], field: int) -> np.ndarray:
        whole = np.concatenate([part[key][field] for part in parts], axis=1)
        return whole.reshape(len(whole), len(prompts), len(seeds), *whole.shape[2:])

    return {key: Summary(*(put_together(key, field) for field in range(3))) for key in parts[0]}


def _rank(
    group: Group,
    side: str,
    tcs: TranscoderSet,
    kept: Summary,
    wanted: tuple[int, ...],
    by: str,
    step: int | None,
    top: int,
    branches: int,
) -> list[Ranked]:
    """Returns the highest features of a group's sites on one side of its sequence."""
    numbers = tcs.sites.groups[group.name]
    value, against = kept.inside[:, 0], np.zeros_like(kept.inside[:, 0])
    if by == "contrast":
        against = kept.inside[:, 1]
    elif by == "region":
        against = kept.outside[:, 0] if side == "img" else value  # text has no region
    elif by == "trend":
        value, against = value[-branches:], value[:branches]
    each = value - against
    mean = each.mean(axis=1)
    size = np.abs(mean) if by in ("contrast", "trend") else mean
    last = len(kept.inside) - branches
    # Of the evaluations that count, each feature's own with the largest score.
    first = 0 if step is None or by == "trend" else step * branches
    at = first + size[first : len(size) if step is None else first + branches].argmax(axis=0)
    best = np.take_along_axis(size, at[None], axis=0)[0]
    best[[number not in wanted for number in numbers]] = 0
    named = side if len(group.streams) > 1 else None
    rows = []
    for flat in np.argsort(-best, axis=None, kind="stable")[:top]:
        site, feature = np.unravel_index(flat, best.shape)
        if best[site, feature] <= 0:
            break
        number = int(at[site, feature])
        scores = each[number, :, site, feature]
        # What the contrast prompt has more of, or what falls over the steps, is shown where it is strong.
        less = scores.mean() < 0
        shown = number + (0 if less else last) if by == "trend" else number
        run = int(less and by == "contrast")
        strongest = kept.inside[shown, run, :, site, feature].argmax()
        position = int(kept.position[shown, run, strongest, site, feature])
        branch = BRANCHES[shown % branches] if branches > 1 else None
        rows.append(
            Ranked(
                Feature(group.label, numbers[site], int(feature), (position,), (shown // branches,), named, branch),
                float(scores.mean()),
                float(value[number, :, site, feature].mean()),
                float(against[number, :, site, feature].mean()),
                int((np.sign(scores) == np.sign(scores.mean())).sum()),
                len(scores),
            )
        )
    return rows


def _size(row: Ranked, by: str) -> float:
    return abs(row.score) if by in ("contrast", "trend") else row.score
