"""How faithful transcoders are (docs/method.md, section 9), on prompts that training never saw.

1. Rows, by site and denoising step: FVU, cosine, L0, shrinkage (length of y^ over that of y); by site also the share of
   features that never fire, and a histogram of how often they do. Padding is left out. Sums are kept, not rows.
2. Velocity recovered, by step, along the original run: 1 - |v_rep - v|^2 / |v_abl - v|^2, summed over prompts, where
   v_abl has the replaced MLPs' mean outputs instead; for each site alone, and for all together.
3. Images: the run with all MLPs replaced against the original from the same noise, PSNR and SSIM.
4. On the organism: the share of images that show what was asked, with all MLPs replaced and without (`scored`).

With guidance by two branches a step is two evaluations: rows of both are measured, each about its own mean, and in 2
the velocity of a step is that of both, with MLPs replaced in both; that of each branch is told beside it.

Several processes share out the chunks of 1 and the prompts of 2 and 3; each adds all up in the same order.
2 and 3 are in `recovered.py`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from difffract_jax.address import BRANCHES
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.transcoders.harvest import Sampler
from difffract_jax.transcoders.objective import ActivationRows, Objective, encoder_input, encoder_preactivations
from difffract_jax.transcoders.objective import decode_codes as decode_rows
from difffract_jax.transcoders.processes import divided
from difffract_jax.transcoders.recovered import Builder, image_likeness, velocities
from difffract_jax.transcoders.run_place import SETTINGS, has
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.sources import Caption, open_sampler
from difffract_jax.transcoders.training import run_settings
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet, check_fit

DENSITY_EDGES = np.linspace(-6, 0, 25)
"""Edges of the histogram of log10 of how often a feature fires."""


class Sums(NamedTuple):
    """Sums over rows of one group's sites, by denoising step, or by evaluation; `fired` over all.

    Attributes:
        rows: number of rows.
        y: of y.
        y2: of |y|^2.
        error2: of |y - y^|^2.
        cosine: of the cosines of y and y^.
        l0: of active features.
        shrinkage: of |y^| / |y|.
        fired: rows in which each feature is active.
    """

    rows: Float[Array, "site step"]
    y: Float[Array, "site step d_model"]
    y2: Float[Array, "site step"]
    error2: Float[Array, "site step"]
    cosine: Float[Array, "site step"]
    l0: Float[Array, "site step"]
    shrinkage: Float[Array, "site step"]
    fired: Float[Array, "site feat"]


class Evaluation(NamedTuple):
    """Everything that was measured of one set of transcoders.

    Attributes:
        role: `transcoder` or `sae`.
        sigmas: noise level of every step; of foreign rows, the times that they were sorted by.
        steps: one row per site and step, with guidance by two branches one for each.
        sites: one row per site.
        velocity: one row per step: what is recovered with all MLPs replaced; empty where there is no model.
        alone: one row per site: the same with that MLP alone, over all steps; empty where there is no model.
        images: one row per prompt.
        scored: shares of images that show what was asked; empty but for the organism.
        density: by site, counts of features in `DENSITY_EDGES`.
    """

    role: str
    sigmas: list[float]
    steps: list[dict[str, Any]]
    sites: list[dict[str, Any]]
    velocity: list[dict[str, Any]]
    alone: list[dict[str, Any]]
    images: list[dict[str, Any]]
    scored: list[dict[str, Any]]
    density: dict[str, list[int]]

    def summary(self) -> dict[str, float]:
        """Returns the means that one looks at first."""
        means = {name: float(np.mean([row[name] for row in self.sites])) for name in ("fvu", "l0", "dead")}
        if self.velocity:
            means["least velocity recovered"] = min(row["recovered"] for row in self.velocity)
        if self.images:
            means["psnr"] = float(np.mean([row["psnr"] for row in self.images]))
        if self.scored:
            original, replaced = (row["share"] for row in self.scored[:2])
            means |= {"accuracy": original, "accuracy, replaced": replaced}
        return means


def read_run(directory: Path) -> TrainConfig:
    """Returns the settings of a training run that has transcoders.

    Raises:
        UserError: if it is none, or has neither finished nor been exported.
    """
    if has(directory, SETTINGS) and not has(directory / "transcoders", "config.json"):
        raise UserError(
            f"The run in {directory} has not finished; go on with difffract train --resume --out {directory}, or "
            f"export what there is with difffract train --export {directory}."
        )
    return run_settings(directory)


Judge = Callable[[Pipeline, TranscoderSet, int, Callable[[int], None]], list[dict[str, Any]]]
"""`judge(pipe, tcs, images, progress)`: rows `what`, `right`, `share` of images that show what their captions say."""


def evaluate(
    settings: EvaluateConfig,
    trained: TrainConfig,
    pipe: Pipeline,
    tcs: TranscoderSet,
    *,
    caption: Caption | None = None,
    judge: Judge | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measures a set of transcoders on validation prompts.

    Args:
        settings: how much to measure.
        trained: settings of the training, which say what validation is.
        pipe: the model.
        tcs: the transcoders.
        caption: captions of the model's world, if the run was trained on them.
        judge: says how many of `settings.scored` images show what was asked, for a model whose images can be judged.
        progress: called with (parts done, parts in all).

    Raises:
        UserError: if the transcoders do not fit the model.
    """
    check_fit(tcs, pipe.config.transformer)
    sites = tcs.sites
    source = open_sampler(trained, pipe, "validation", caption=caption, sae=tcs.config.role == "sae")
    source = replace_sites(source, sites)
    count = -(-settings.prompts_count // source.prompts_at_once)
    images_judged = 0 if judge is None else settings.scored
    total = count + settings.velocity_count + settings.images + images_judged
    sums: dict[str, Sums] = {}

    def sums_of(number: int) -> dict[str, Sums]:
        chunk, times = source.chunk(number), jnp.asarray(source.run.sigmas[:-1])
        return {
            name: _by_evaluation(tcs.stacks[name], rows, jnp.asarray(chunk.valid[name]), times, source.run.branches)
            for name, rows in chunk.rows.items()
        }

    for done, more in enumerate(divided(count, sums_of), 1):
        sums = jax.tree.map(jnp.add, sums, more) if sums else more
        progress(done, total)
    means = {name: np.asarray(s.y / jnp.maximum(s.rows, 1)[..., None]) for name, s in sums.items()}
    build = Builder(source, tcs, means)
    velocity, alone = velocities(build, settings.velocity_count, lambda done: progress(count + done, total))
    likeness = divided(settings.images, lambda n: image_likeness(build, n))
    images = [
        {"prompt": source.prompts(n), "psnr": float(psnr_), "ssim": float(ssim_)}
        for n, (psnr_, ssim_) in enumerate(likeness)
    ]
    judged = []
    if judge is not None and images_judged:
        judged = judge(pipe, tcs, images_judged, lambda done: progress(total - images_judged + done, total))
    progress(total, total)
    times = source.run.sigmas[:-1].tolist()
    tables = tables_of(sites, sums, times, source.run.branches)
    return Evaluation(tcs.config.role, times, *tables, velocity, alone, images, judged, densities(sites, sums))


def replace_sites(source: Sampler, sites: Any) -> Sampler:
    """Returns the sampler with other sites tapped, and all tokens of a prompt."""
    return dataclasses.replace(source, sites=sites, tokens_per_step=None)


def _by_evaluation(
    stack: Transcoder, rows: ActivationRows, valid: Array, times: Float[Array, "step"], branches: int
) -> Sums:
    """Returns the sums of one group's sites by evaluation; rows are (step, branch, prompt, place), as sampled."""
    steps, of_branch = times.shape[0], []
    for branch in range(branches):

        def own(a: Array, branch: int = branch) -> Array:
            return a.reshape(steps, branches, -1, *a.shape[1:])[:, branch].reshape(-1, *a.shape[1:])

        mine = ActivationRows(jax.vmap(own)(rows.x), jax.vmap(own)(rows.y), own(rows.t))
        of_branch.append(row_sums(stack, mine, own(valid), times))
    fired = sum(one.fired for one in of_branch)

    def interleaved(*parts: Array) -> Array:
        return jnp.stack(parts, axis=2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:])

    return jax.tree.map(interleaved, *(one._replace(fired=one.rows) for one in of_branch))._replace(fired=fired)


@jax.jit
def row_sums(stack: Transcoder, rows: ActivationRows, valid: Array, times: Float[Array, "step"]) -> Sums:
    """Returns the sums of one group's sites over rows.

    Args:
        stack: transcoders of the sites.
        rows: x and y [site rows d_model], t [rows].
        valid: rows that count.
        times: denoising times that occur.
    """
    at = jnp.argmin(jnp.abs(rows.t[:, None] - times[None]), axis=1)
    weight = jax.nn.one_hot(at, times.shape[0]) * valid[:, None]

    def one(tc: Transcoder, x: Array, y: Array) -> Sums:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        z = tc.activate(encoder_preactivations(tc, encoder_input(tc, ActivationRows(x, y, rows.t)), Objective()))
        guess = decode_rows(tc, z, x, Objective())
        size, guessed = (jnp.maximum(jnp.linalg.norm(a, axis=1), 1e-12) for a in (y, guess))
        columns = [
            jnp.sum(jnp.square(y), axis=1),
            jnp.sum(jnp.square(y - guess), axis=1),
            jnp.sum(y * guess, axis=1) / (size * guessed),
            jnp.sum(z > 0, axis=1).astype(jnp.float32),
            guessed / size,
        ]
        sums = [column @ weight for column in columns]
        return Sums(jnp.sum(weight, axis=0), weight.T @ y, *sums, fired=valid.astype(jnp.float32) @ (z > 0))

    return jax.vmap(one)(stack, rows.x, rows.y)


def measures(sums: Any, where: Any) -> dict[str, float]:
    """Returns the measures of one site from sums over some steps."""
    n = float(np.sum(sums.rows[where]))
    y = np.asarray(sums.y[where], np.float64)
    # The variance about the mean of each step: a constant per step is no merit of a code.
    between = np.sum(np.square(y).sum(-1) / np.maximum(np.asarray(sums.rows[where], np.float64), 1))
    variance = float(np.sum(np.asarray(sums.y2[where], np.float64))) - float(between)
    return {
        "fvu": float(np.sum(sums.error2[where])) / max(variance, 1e-12),
        "cosine": float(np.sum(sums.cosine[where])) / max(n, 1),
        "l0": float(np.sum(sums.l0[where])) / max(n, 1),
        "shrinkage": float(np.sum(sums.shrinkage[where])) / max(n, 1),
    }


def tables_of(
    sites: SiteSet, sums: dict[str, Sums], times: list[float], branches: int = 1
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns what sums over rows say: one row per site and step, of two branches also per branch; and one per site.

    Args:
        sites: that were measured.
        sums: by group.
        times: denoising time of every step.
        branches: evaluations of a step.
    """
    by_step, by_site = [], []
    for name, one in _each_site(sites, sums):
        for step, time in enumerate(times):
            for number in range(step * branches, (step + 1) * branches):
                branch = {"branch": BRANCHES[number % branches]} if branches > 1 else {}
                here = {"site": name, "step": step} | branch | {"sigma": time}
                by_step.append(here | measures(one, slice(number, number + 1)))
        by_site.append({"site": name} | measures(one, slice(None)) | {"dead": float(np.mean(_firing(one) == 0))})
    return by_step, by_site


def densities(sites: SiteSet, sums: dict[str, Sums]) -> dict[str, list[int]]:
    """Returns by site how many features fire how often, counted in `DENSITY_EDGES`; dead ones are left out."""
    counts = {}
    for name, one in _each_site(sites, sums):
        share = _firing(one)
        counts[name] = np.histogram(np.log10(np.maximum(share[share > 0], 1e-6)), DENSITY_EDGES)[0].tolist()
    return counts


def _each_site(sites: SiteSet, sums: dict[str, Sums]) -> Iterator[tuple[str, Any]]:
    """Yields every site's name and its sums."""
    for group, at in sites.slices.items():
        for i, name in enumerate(sites.names[at]):
            yield name, jax.tree.map(lambda a, i=i: np.asarray(a[i]), sums[group])


def _firing(one: Any) -> np.ndarray:
    """Returns the share of rows in which each feature of a site fires."""
    return one.fired / max(float(one.rows.sum()), 1)
