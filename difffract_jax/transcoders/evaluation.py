"""How faithful transcoders are (docs/method.md, section 9), on prompts that training never saw.

1. Rows, by site and denoising step: FVU, cosine, L0, shrinkage (length of y^ over that of y); by site also the share of
   features that never fire, and a histogram of how often they do. Padding is left out. Sums are kept, not rows.
2. Velocity recovered, by step, along the original run: 1 - |v_rep - v|^2 / |v_abl - v|^2, summed over prompts, where
   v_abl has the replaced MLPs' mean outputs instead; for each site alone, and for all together.
3. Images: the run with all MLPs replaced against the original from the same noise, PSNR and SSIM.
4. On the organism: the share of images that show what was asked, with all MLPs replaced and without (`scored`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.ndimage import uniform_filter

from difffract_jax.config import UserError
from difffract_jax.models.pipeline import (
    EncodedPrompt,
    Pipeline,
    decode_latents,
    encode,
    euler_step,
    model_velocity,
    sample,
    step_inputs,
)
from difffract_jax.models.streaming import jit_resident
from difffract_jax.transcoders.harvest import Sampler
from difffract_jax.transcoders.objective import ActivationRows, Objective, encoder_input, encoder_preactivations
from difffract_jax.transcoders.objective import decode_codes as decode_rows
from difffract_jax.transcoders.replaced import MEAN, TRANSCODER, TRUE, Replaced, replaced_velocity, swaps_of
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.sources import Caption, open_sampler
from difffract_jax.transcoders.training import SETTINGS, run_settings
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderSet, check_fit

DENSITY_EDGES = np.linspace(-6, 0, 25)
"""Edges of the histogram of log10 of how often a feature fires."""


class Sums(NamedTuple):
    """Sums over rows of one group's sites, by denoising step; `fired` over all steps.

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
        steps: one row per site and step.
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
    if (directory / SETTINGS).is_file() and not (directory / "transcoders" / "config.json").exists():
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
    """
    check_fit(tcs, pipe.config.transformer)
    sites = tcs.sites
    source = open_sampler(trained, pipe, "validation", caption=caption, sae=tcs.config.role == "sae")
    source = replace_sites(source, sites)
    count = -(-settings.prompts_count // source.prompts_at_once)
    images_judged = 0 if judge is None else settings.scored
    total = count + settings.velocity_count + settings.images + images_judged
    sums: dict[str, Sums] = {}
    for number in range(count):
        chunk = source.chunk(number)
        for name, rows in chunk.rows.items():
            more = row_sums(tcs.stacks[name], rows, jnp.asarray(chunk.valid[name]), jnp.asarray(source.run.sigmas[:-1]))
            sums[name] = more if name not in sums else jax.tree.map(jnp.add, sums[name], more)
        progress(number + 1, total)
    means = {name: np.asarray(s.y / jnp.maximum(s.rows, 1)[..., None]) for name, s in sums.items()}
    build = _Builder(source, tcs, means)
    velocity, alone = _velocities(build, settings.velocity_count, lambda done: progress(count + done, total))
    images = [_image(build, n) for n in range(settings.images)]
    judged = []
    if judge is not None and images_judged:
        judged = judge(pipe, tcs, images_judged, lambda done: progress(total - images_judged + done, total))
    progress(total, total)
    times = source.run.sigmas[:-1].tolist()
    return Evaluation(
        tcs.config.role, times, *tables_of(sites, sums, times), velocity, alone, images, judged, densities(sites, sums)
    )


def replace_sites(source: Sampler, sites: Any) -> Sampler:
    """Returns the sampler with other sites tapped, and all tokens of a prompt."""
    return dataclasses.replace(source, sites=sites, tokens_per_step=None)


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
    sites: SiteSet, sums: dict[str, Sums], times: list[float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns what sums over rows say: one row per site and step, and one row per site.

    Args:
        sites: that were measured.
        sums: by group.
        times: denoising time of every step.
    """
    by_step, by_site = [], []
    for name, one in _each_site(sites, sums):
        by_step += [
            {"site": name, "step": step, "sigma": time} | measures(one, slice(step, step + 1))
            for step, time in enumerate(times)
        ]
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


class _Builder(NamedTuple):
    """What replaced models are built from."""

    source: Sampler
    tcs: TranscoderSet
    means: dict[str, Float[np.ndarray, "site step d_model"]]

    def model(self, kinds: np.ndarray, prompt: EncodedPrompt) -> Replaced:
        transformer = self.source.pipe.transformer
        swaps = swaps_of(self.source.sites, transformer, self.means, kinds)
        stacks = self.tcs.per_group(transformer.config.layout)
        return Replaced(transformer, stacks, swaps, jnp.asarray(prompt.mask))

    def start(self, number: int) -> tuple[EncodedPrompt, Array]:
        source = self.source
        encoded = encode(source.pipe, source.prompts(number), source.run.text_tokens)
        return encoded, source.noise(np.array([number]))[0]


_velocity = jit_resident(model_velocity, static_argnames="grid")


@partial(jit_resident, static_argnames="grid")
def _squared_change(params: Replaced, inputs: Any, step: Array, v: Array, grid: tuple[int, int]) -> Array:
    return jnp.sum(jnp.square(replaced_velocity(params, inputs, step, grid) - v))


def _velocities(
    build: _Builder, prompts: int, progress: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns velocity recovered with all sites replaced, by step, and with each alone."""
    run, names = build.source.run, build.source.sites.names
    steps = run.steps
    choices = [np.full(len(names), TRUE) for _ in range(len(names) + 1)]
    choices[-1] = np.ones(len(names), int)
    for i in range(len(names)):
        choices[i][i] = 1
    changed = np.zeros((2, len(choices), steps))
    for number in range(prompts):
        encoded, z = build.start(number)
        models = [[build.model(c * kind, encoded) for c in choices] for kind in (TRANSCODER, MEAN)]
        for step in range(steps):
            inputs = step_inputs(run, encoded, z, step)
            v = _velocity(build.source.pipe.transformer, inputs, jnp.asarray(step), run.grid)
            for k, row in enumerate(models):
                for c, params in enumerate(row):
                    changed[k, c, step] += float(_squared_change(params, inputs, jnp.asarray(step), v, run.grid))
            after = jnp.asarray(run.sigmas[step + 1], z.dtype)
            z = euler_step(model_velocity, build.source.pipe.transformer, inputs, after, jnp.asarray(step), run.grid)
        progress(number + 1)
    recovered = 1 - changed[0] / np.maximum(changed[1], 1e-30)
    whole = 1 - changed[0].sum(axis=1) / np.maximum(changed[1].sum(axis=1), 1e-30)
    by_step = [{"step": s, "sigma": float(run.sigmas[s]), "recovered": float(recovered[-1, s])} for s in range(steps)]
    return by_step, [{"site": name, "recovered": float(whole[i])} for i, name in enumerate(names)]


def _image(build: _Builder, number: int) -> dict[str, Any]:
    source = build.source
    encoded, noise = build.start(number)
    kinds = np.full(len(source.sites.names), TRANSCODER)
    ends = [
        sample(velocity, params, source.run, encoded, noise)
        for velocity, params in (
            (model_velocity, source.pipe.transformer),
            (replaced_velocity, build.model(kinds, encoded)),
        )
    ]
    original, ours = (decode_latents(source.pipe, end, source.run.grid) for end in ends)
    return {"prompt": source.prompts(number), "psnr": psnr(ours, original), "ssim": ssim(ours, original)}


def psnr(a: UInt8[np.ndarray, "H W rgb"], b: UInt8[np.ndarray, "H W rgb"]) -> float:
    """Returns the peak signal-to-noise ratio of two images in decibels; 99 if they are the same."""
    error = float(np.mean(np.square(a.astype(np.float64) - b)))
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def ssim(a: UInt8[np.ndarray, "H W rgb"], b: UInt8[np.ndarray, "H W rgb"], window: int = 7) -> float:
    """Returns the structural similarity of two images (Wang et al. 2004), over square windows of pixels.

    Args:
        a: one image.
        b: the other.
        window: side of a window.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    size: Any = (window, window, 1)
    smooth = partial(uniform_filter, size=size)
    scale = window**2 / (window**2 - 1)
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = scale * (smooth(x * x) - mean_x**2), scale * (smooth(y * y) - mean_y**2)
    covariance = scale * (smooth(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    values /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    edge = window // 2
    return float(np.mean(values[edge : x.shape[0] - edge, edge : x.shape[1] - edge]))
