"""What a model gives with its MLPs replaced by transcoders: velocities along the original run, and images.

1. Velocity recovered, by step: 1 - |v_rep - v|^2 / |v_abl - v|^2, summed over prompts, where v_abl has the replaced
   MLPs' mean outputs instead; for each site alone, and for all together. With guidance by two branches v is the
   velocity of the step, and MLPs are replaced in both of its evaluations; each branch's own velocity is measured
   beside it.
2. Images: the run with all MLPs replaced against the original from the same noise, PSNR and SSIM.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.ndimage import uniform_filter

from difffract_jax.address import BRANCHES
from difffract_jax.models.guidance import guided
from difffract_jax.models.pipeline import (
    EncodedPrompt,
    Velocity,
    decode_latents,
    encode_run,
    model_velocity,
    sample,
    step_inputs,
)
from difffract_jax.models.streaming import jit_resident
from difffract_jax.transcoders.harvest import Sampler
from difffract_jax.transcoders.processes import divided
from difffract_jax.transcoders.replaced import MEAN, TRANSCODER, TRUE, Replaced, replaced_velocity, swaps_of
from difffract_jax.transcoders.transcoder import TranscoderSet


class Builder(NamedTuple):
    """What replaced models are built from.

    Attributes:
        source: the sampler, whose prompts and noise are run.
        tcs: the transcoders.
        means: by group each site's mean output at every evaluation of a run.
    """

    source: Sampler
    tcs: TranscoderSet
    means: dict[str, Float[np.ndarray, "site evaluation d_model"]]

    def model(self, kinds: np.ndarray, prompt: EncodedPrompt) -> Replaced:
        """Returns the model with its MLPs replaced.

        Args:
            kinds: of every site, see `replaced`.
            prompt: of the run, whose padding keeps the true MLPs.
        """
        transformer = self.source.pipe.transformer
        swaps = swaps_of(self.source.sites, transformer, self.means, kinds)
        stacks = self.tcs.per_group(transformer.config.layout)
        masks = jnp.stack([jnp.asarray(branch.mask) for branch in prompt.branches])
        return Replaced(transformer, stacks, swaps, masks)

    def start(self, number: int) -> tuple[EncodedPrompt, Array]:
        """Returns a prompt, encoded, and its starting noise."""
        source = self.source
        return encode_run(source.pipe, source.prompts(number), source.run), source.noise(np.array([number]))[0]


@partial(jit_resident, static_argnames=("velocity", "grid"))
def branch_velocities(
    velocity: Velocity, params: Any, inputs: Any, numbers: Array, grid: tuple[int, int]
) -> Float[Array, "branch img outputs"]:
    """Returns the velocities of a step's evaluations, in the type of the latents, in which runs put branches together.

    Args:
        velocity: whose velocity, see `pipeline.Velocity`.
        params: its first argument.
        inputs: of the step, with text and pooled of each evaluation on a leading axis.
        numbers: of the evaluations.
        grid: rows and columns of image tokens.
    """

    def one(text: Array, pooled: Array, number: Array) -> Array:
        v = velocity(params, inputs._replace(text=text, pooled=pooled), number, grid)
        return v.astype(inputs.latents.dtype)

    return jax.vmap(one)(inputs.text, inputs.pooled, numbers)


def velocities(
    build: Builder, prompts: int, progress: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns velocity recovered with all sites replaced, by step, and with each alone.

    Args:
        build: what replaced models are built from.
        prompts: how many to run.
        progress: called with the number of prompts done.
    """
    run, names, model = build.source.run, build.source.sites.names, build.source.pipe.transformer
    steps, branches = run.steps, run.branches
    choices = [np.full(len(names), TRUE) for _ in range(len(names) + 1)]
    choices[-1] = np.ones(len(names), int)
    for i in range(len(names)):
        choices[i][i] = 1
    # The step's velocity, and of two branches each one's.
    parts = 1 if branches == 1 else 1 + branches

    def apart(v: Array) -> Array:
        return v if run.branch_scale is None else jnp.stack([guided(v, run.branch_scale), *v])

    def changes(number: int) -> np.ndarray:
        changed = np.zeros((2, len(choices), steps, parts))
        encoded, z = build.start(number)
        text, pooled = (jnp.stack([getattr(one, name) for one in encoded.branches]) for name in ("text", "pooled"))
        models = [[build.model(c * kind, encoded) for c in choices] for kind in (TRANSCODER, MEAN)]
        for step in range(steps):
            inputs = step_inputs(run, encoded, z, step)._replace(text=text, pooled=pooled)
            given = inputs, branches * step + jnp.arange(branches), run.grid
            v = apart(branch_velocities(model_velocity, model, *given))
            for k, row in enumerate(models):
                for c, params in enumerate(row):
                    moved = apart(branch_velocities(replaced_velocity, params, *given)) - v
                    changed[k, c, step] = np.asarray(jnp.sum(jnp.square(moved), axis=(1, 2)))
            taken = jnp.asarray(run.sigmas[step + 1], z.dtype) - inputs.t
            z = z + taken * v[0]
        return changed

    changed = np.zeros((2, len(choices), steps, parts))
    for done, more in enumerate(divided(prompts, changes), 1):
        changed += more
        progress(done)
    recovered = 1 - changed[0, -1] / np.maximum(changed[1, -1], 1e-30)
    total = changed[..., 0].sum(axis=2)
    whole = 1 - total[0] / np.maximum(total[1], 1e-30)
    names_of = ["recovered", *(f"recovered, {branch}" for branch in BRANCHES)][:parts]
    by_step = [
        {"step": s, "sigma": float(run.sigmas[s])} | dict(zip(names_of, map(float, recovered[s]), strict=True))
        for s in range(steps)
    ]
    return by_step, [{"site": name, "recovered": float(whole[i])} for i, name in enumerate(names)]


def image_likeness(build: Builder, number: int) -> Float[np.ndarray, "2"]:
    """Returns PSNR and SSIM of a prompt's image with all MLPs replaced, against the original.

    Args:
        build: what replaced models are built from.
        number: of the prompt.
    """
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
    return np.array([psnr(ours, original), ssim(ours, original)])


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
