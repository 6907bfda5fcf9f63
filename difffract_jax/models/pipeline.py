"""From a prompt to an image: the pieces of a FLUX pipeline, and the loop that runs them.

1. `plan_run` fixes sizes and schedule, and refuses what does not divide.
2. `encode` turns the prompt into a text embedding (T5) and a pooled embedding (CLIP).
3. `initial_noise` gives packed noise; `sample` takes Euler steps along velocities. The velocity is an argument: the
   model's own, or that of an edited or replaced model.
4. `decode_latents` turns packed latents into pixels (autoencoder).

`generate` does all four. Weights are arguments of the jitted functions; one step is compiled once per size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from difffract_jax.address import Tokens
from difffract_jax.config import UserError
from difffract_jax.display import html_of, text_of
from difffract_jax.graphs.loras import MergedLora
from difffract_jax.models import sampler
from difffract_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from difffract_jax.models.clip import CLIPConfig, CLIPTextEncoder
from difffract_jax.models.encoded import Embeddings, EncodedPrompt
from difffract_jax.models.mmdit import FluxConfig, Inputs, MMDiT
from difffract_jax.models.sampler import PATCH, SchedulerConfig
from difffract_jax.models.shown import pipeline_facts
from difffract_jax.models.streaming import jit_resident
from difffract_jax.models.t5 import T5Config, T5Encoder
from difffract_jax.models.tokenizers import Tokenizers, encode_prompt
from difffract_jax.ops import widen
from difffract_jax.spread import on_mesh_of
from difffract_jax.trees import brief


@dataclass(frozen=True)
class GenerationDefaults:
    """What a run takes that names nothing else.

    Attributes:
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence, padding included.
        steps: denoising steps.
        guidance: guidance scale, for models that take one.
    """

    height: int
    width: int
    text_tokens: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class PipelineConfig:
    """Shapes of a pipeline's parts, its schedule, and the defaults of a run."""

    transformer: FluxConfig
    t5: T5Config
    clip: CLIPConfig
    vae: AutoencoderConfig
    scheduler: SchedulerConfig
    defaults: GenerationDefaults


class Pipeline(NamedTuple):
    """A FLUX pipeline.

    Attributes:
        transformer: the MM-DiT.
        t5: encoder of the text stream.
        clip: encoder of the pooled prompt.
        vae: autoencoder between latents and pixels.
        tokenizers: both tokenizers.
        config: shapes, schedule, defaults.
        source: content hash of the weights; "" if not known.
        origin: the repository on the hub that it came from, commit included; "" if it did not.
        known: embeddings of some prompts, from `embeddings.read_embeddings`; then there are no text encoders.
        base: `source` of the same pipeline without the LoRAs that were merged into it; "" if none were.
        loras: that were merged.
    """

    transformer: MMDiT
    t5: T5Encoder
    clip: CLIPTextEncoder
    vae: Autoencoder
    tokenizers: Tokenizers
    config: PipelineConfig
    source: str = ""
    origin: str = ""
    known: Embeddings | None = None
    base: str = ""
    loras: tuple[MergedLora, ...] = ()

    def plan(self, **sizes: Any) -> "Run":
        """Fixes the sizes and the schedule of a run; keyword arguments as for `plan_run`."""
        return plan_run(self.config, **sizes)

    def __repr__(self) -> str:
        return text_of(*pipeline_facts(self))

    def _repr_html_(self) -> str:
        return html_of(*pipeline_facts(self))


class Run(NamedTuple):
    """Sizes and schedule of one run.

    Attributes:
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        sigmas: noise level entering every step, and the final 0.
        guidance: guidance scale; None for models that take none.
    """

    grid: tuple[int, int]
    text_tokens: int
    sigmas: Float32[np.ndarray, "step_and_end"]
    guidance: float | None

    @property
    def tokens(self) -> Tokens:
        """Length of each stream."""
        return Tokens(img=self.grid[0] * self.grid[1], txt=self.text_tokens)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.sigmas) - 1


class GeneratedImage(NamedTuple):
    """The result of a run.

    Attributes:
        image: pixels.
        latents: packed latents after the last step.
        cut: the end of the prompt that did not fit; "" if all did.
    """

    image: UInt8[np.ndarray, "H W rgb"]
    latents: Float[Array, "img channels"]
    cut: str

    __repr__ = brief


Velocity = Callable[[Any, Inputs, Array, tuple[int, int]], Float[Array, "img outputs"]]
"""`velocity(params, inputs, step, grid)`: a named function, since each is compiled once."""


def plan_run(
    config: PipelineConfig,
    *,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
) -> Run:
    """Fixes the sizes and the schedule of a run; what is left out comes from the pipeline's defaults.

    Args:
        config: of the pipeline.
        steps: denoising steps.
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence.
        guidance: guidance scale.

    Raises:
        UserError: if a size does not divide, a number is too small, or the guidance scale is none, or of a model that
            takes none.
    """
    defaults = config.defaults
    height = defaults.height if height is None else height
    width = defaults.width if width is None else width
    unit = PATCH * config.vae.factor
    if height < unit or width < unit or height % unit or width % unit:
        nearest = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (width, height))
        raise UserError(
            f"Width and height must be multiples of {unit} pixels, but got {width} x {height}; "
            f"the nearest size is {nearest}."
        )
    takes_guidance = config.transformer.guidance
    if guidance and not takes_guidance:
        raise UserError(f"This model takes no guidance scale (FLUX.1-dev does), but got {guidance}; leave it out.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"The guidance scale must be at least 0, and finite, but got {guidance}; 3.5 is usual.")
    grid = height // unit, width // unit
    return Run(
        grid,
        defaults.text_tokens if text_tokens is None else text_tokens,
        sampler.sigmas(config.scheduler, defaults.steps if steps is None else steps, grid[0] * grid[1]),
        (defaults.guidance if guidance is None else guidance) if takes_guidance else None,
    )


def encode(pipe: Pipeline, prompt: str, text_tokens: int) -> EncodedPrompt:
    """Encodes one prompt.

    Args:
        pipe: the pipeline.
        prompt: any text, also the empty one.
        text_tokens: length of the text sequence.

    Raises:
        UserError: if the pipeline has embeddings from a file, but not those of this prompt or length.
    """
    if pipe.known is not None:
        return pipe.known.of(prompt, text_tokens)
    ids = encode_prompt(pipe.tokenizers, prompt, text_tokens)
    text, pooled = _encode_text(pipe.t5, jnp.asarray(ids.t5_ids)), _pool(pipe.clip, jnp.asarray(ids.clip_ids))
    return EncodedPrompt(text, pooled, ids.t5_mask, ids.cut)


@jit_resident
def _encode_text(t5: T5Encoder, ids: Array) -> Float[Array, "txt text_width"]:
    return t5(ids)


@jax.jit
def _pool(clip: CLIPTextEncoder, ids: Array) -> Float[Array, "pooled_width"]:
    return clip(ids)[1]


def initial_noise(pipe: Pipeline, run: Run, seed: int, latents: Any = None) -> Float[Array, "img channels"]:
    """Returns the packed noise a run starts from.

    Args:
        pipe: the pipeline.
        run: sizes of the run.
        seed: seed of the noise.
        latents: noise to use instead, packed, [img channels].

    Raises:
        UserError: if given noise has another shape, or holds NaN or infinity.
    """
    shape = run.grid[0] * run.grid[1], pipe.config.transformer.in_channels
    dtype = np.promote_types(pipe.transformer.img_in.kernel.dtype, np.float32)
    if latents is None:
        return sampler.draw_noise(seed, run.grid, shape[1]).astype(dtype)
    if np.shape(latents) != shape:
        raise UserError(
            f"Starting latents must be packed, of shape {shape} (image tokens, channels) for this image size, "
            f"but got {np.shape(latents)}."
        )
    if not np.all(np.isfinite(np.asarray(latents, np.float64))):
        raise UserError("Starting latents must be finite, but hold NaN or infinity.")
    return jnp.asarray(latents, dtype)


def model_velocity(model: MMDiT, inputs: Inputs, step: Array, grid: tuple[int, int]) -> Float[Array, "img outputs"]:
    """The model's own velocity; see `Velocity`."""
    del step  # the model sees the step through its time
    return model(inputs, grid)


@partial(jit_resident, static_argnames=("velocity", "grid"))
def euler_step(
    velocity: Velocity, params: Any, inputs: Inputs, sigma_next: Array, step: Array, grid: tuple[int, int]
) -> Float[Array, "img channels"]:
    """Takes one step, z + (sigma_next - sigma) v, in at least float32.

    Args:
        velocity: whose velocity.
        params: its first argument.
        inputs: with the latents entering the step, and sigma as t.
        sigma_next: noise level after the step.
        step: number of the step.
        grid: rows and columns of image tokens.
    """
    v = velocity(params, inputs, step, grid)
    return inputs.latents + (sigma_next - inputs.t) * v.astype(inputs.latents.dtype)


def step_inputs(run: Run, prompt: EncodedPrompt, latents: Float[Array, "img channels"], step: int) -> Inputs:
    """Returns what the transformer is given at a step."""
    dtype = latents.dtype
    guidance = None if run.guidance is None else jnp.asarray(run.guidance, dtype)
    return Inputs(latents, prompt.text, prompt.pooled, jnp.asarray(run.sigmas[step], dtype), guidance)


def sample(
    velocity: Velocity,
    params: Any,
    run: Run,
    prompt: EncodedPrompt,
    latents: Float[Array, "img channels"],
    *,
    stop: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "img channels"]:
    """Takes Euler steps.

    Args:
        velocity: whose velocity, see `Velocity`.
        params: its first argument: weights, edits.
        run: sizes and schedule.
        prompt: the encoded prompt.
        latents: packed noise to start from.
        stop: number of steps to take; all if left out.
        progress: called with (steps done, steps in all).

    Returns:
        Packed latents entering step `stop`, or after the last.
    """
    steps = len(run.sigmas) - 1 if stop is None else stop
    for step in range(steps):
        inputs = step_inputs(run, prompt, latents, step)
        after = jnp.asarray(run.sigmas[step + 1], latents.dtype)
        latents = euler_step(velocity, params, inputs, after, jnp.asarray(step), run.grid)
        if progress is not None:
            jax.block_until_ready(latents)
            progress(step + 1, steps)
    return latents


def decode_latents(
    pipe: Pipeline, latents: Float[Array, "img channels"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "H W rgb"]:
    """Turns packed latents into pixels.

    Args:
        pipe: the pipeline.
        latents: packed latents after the last step.
        grid: rows and columns of image tokens.
    """
    raw = decode_raw(pipe.vae, latents, grid)
    return np.asarray(jnp.round(255 * jnp.clip(raw / 2 + 0.5, 0, 1)).astype(jnp.uint8))


@partial(jax.jit, static_argnames="grid")
def decode_raw(
    vae: Autoencoder, latents: Float[Array, "img channels"], grid: tuple[int, int]
) -> Float[Array, "H W rgb"]:
    """Returns the decoder's own output, black at -1 and white at 1, in at least float32."""
    latent = sampler.scale_for_decoder(
        sampler.unpack(latents, grid), vae.config.scaling_factor, vae.config.shift_factor
    )
    return widen(vae.decode(latent.astype(vae.decoder.conv_in.kernel.dtype)))


def generate(
    pipe: Pipeline,
    prompt: str,
    *,
    seed: int = 0,
    run: Run | None = None,
    latents: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> GeneratedImage:
    """Generates an image from a prompt.

    Args:
        pipe: the pipeline.
        prompt: what the image shall show.
        seed: seed of the starting noise.
        run: sizes and schedule, from `pipe.plan`; the pipeline's defaults if left out.
        latents: packed starting noise, [img channels], instead of the seed's.
        progress: called with (steps done, steps in all).

    Returns:
        The image, its latents, and what of the prompt was cut off.

    Raises:
        UserError: if a size or the noise does not fit.
    """
    run = run or pipe.plan()
    encoded = encode(pipe, prompt, run.text_tokens)
    noise = initial_noise(pipe, run, seed, latents)
    with on_mesh_of(pipe.transformer):
        final = sample(model_velocity, pipe.transformer, run, encoded, noise, progress=progress)
    return GeneratedImage(decode_latents(pipe, final, run.grid), final, encoded.cut)
