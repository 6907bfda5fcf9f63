"""From a prompt to an image: the pieces of a FLUX pipeline, and the loop that runs them.

1. `runs.plan_run` fixes sizes and schedule, and refuses what does not divide.
2. `encode` turns the prompt into a text embedding (T5) and a pooled embedding (CLIP).
3. `initial_noise` gives packed noise; `sample` takes Euler steps along velocities. The velocity is an argument: the
   model's own, or that of an edited or replaced model.
4. `decode_latents` turns packed latents into pixels (autoencoder).

`generate` does all four. Weights are arguments of the jitted functions; one step is compiled once per size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from difffract_jax.config import UserError
from difffract_jax.display import html_of, text_of
from difffract_jax.graphs.loras import MergedLora
from difffract_jax.models import sampler
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.encoded import Embeddings, EncodedPrompt
from difffract_jax.models.guidance import NegativeBranch, guided
from difffract_jax.models.mmdit import Inputs, MMDiT
from difffract_jax.models.qwen3 import NoPooled, Qwen3Encoder
from difffract_jax.models.runs import PipelineConfig, Run, plan_run
from difffract_jax.models.sd3_text import NoText, TwoClips, t5_ids, text_stream
from difffract_jax.models.shown import pipeline_facts
from difffract_jax.models.streaming import jit_resident
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.models.tokenizers import Tokenizers, encode_prompt
from difffract_jax.ops import widen
from difffract_jax.spread import on_mesh_of
from difffract_jax.trees import brief


class Pipeline(NamedTuple):
    """A FLUX pipeline.

    Attributes:
        transformer: the MM-DiT.
        t5: encoder of the text stream: T5, in FLUX.2 Qwen3, or one that gives zeros.
        clip: encoder of the pooled prompt: CLIP, in FLUX.2 one that gives no channels, in Stable Diffusion 3 two CLIPs.
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
    t5: T5Encoder | Qwen3Encoder | NoText
    clip: CLIPTextEncoder | NoPooled | TwoClips
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


class GeneratedImage(NamedTuple):
    """The result of a run.

    Attributes:
        image: pixels.
        latents: packed latents after the last step.
        cut: the end of the prompt that did not fit, and of its negative prompt; "" if all did.
    """

    image: UInt8[np.ndarray, "H W rgb"]
    latents: Float[Array, "img channels"]
    cut: str

    __repr__ = brief


Velocity = Callable[[Any, Inputs, Array, tuple[int, int]], Float[Array, "img outputs"]]
"""`velocity(params, inputs, number, grid)`: a named function, since each is compiled once. `number` is that of the
evaluation within the run: of the step, or with two branches as `guidance` counts."""


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
    text = _encode_text(pipe.t5, jax.device_put(t5_ids(pipe.clip, ids.t5_ids)))
    states, pooled = _read_clip(pipe.clip, jax.device_put(ids.clip_ids))
    return EncodedPrompt(text_stream(pipe.clip, states, text), pooled, ids.t5_mask, ids.cut)


def encode_run(pipe: Pipeline, prompt: str, run: Run) -> EncodedPrompt:
    """Encodes the prompt of a run, and with guidance by two branches the negative prompt too; see `encode`.

    What did not fit of the negative prompt is told behind what did not fit of the prompt.
    """
    encoded = encode(pipe, prompt, run.text_tokens)
    if run.branches == 1:
        return encoded
    negative = encode(pipe, run.negative_prompt, run.text_tokens)
    cut = f"{encoded.cut} (of the negative prompt: {negative.cut})".strip() if negative.cut else encoded.cut
    return encoded._replace(negative=negative, cut=cut)


def negative_branch(pipe: Pipeline, run: Run, dtype: DTypeLike) -> NegativeBranch | None:
    """Encodes a run's negative prompt; None where a step is one evaluation.

    Args:
        pipe: the pipeline.
        run: which says the negative prompt and the guidance scale.
        dtype: of the latents.
    """
    if run.branch_scale is None:
        return None
    negative = encode(pipe, run.negative_prompt, run.text_tokens)
    return NegativeBranch(negative.text, negative.pooled, jnp.asarray(run.branch_scale, dtype))


@jit_resident
def _encode_text(t5: Any, ids: Array) -> Float[Array, "txt text_width"]:
    return t5(ids)


@jax.jit
def _read_clip(
    clip: CLIPTextEncoder | NoPooled | TwoClips, ids: Array
) -> tuple[Float[Array, "clip clip_width"], Float[Array, "pooled_width"]]:
    return clip(ids)


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


@partial(jit_resident, static_argnames=("velocity", "grid"))
def guided_step(
    velocity: Velocity,
    params: Any,
    inputs: Inputs,
    scale: Array,
    sigma_next: Array,
    step: Array,
    grid: tuple[int, int],
) -> Float[Array, "img channels"]:
    """Takes one step with guidance by two branches; arguments as for `euler_step`.

    Args:
        velocity: whose velocity.
        params: its first argument.
        inputs: `text` and `pooled` of both branches, on a leading axis.
        scale: guidance scale.
        sigma_next: noise level after the step.
        step: number of the step.
        grid: rows and columns of image tokens.
    """

    def one(text: Array, pooled: Array, number: Array) -> Array:
        return velocity(params, inputs._replace(text=text, pooled=pooled), number, grid)

    v = jax.vmap(one)(inputs.text, inputs.pooled, 2 * step + jnp.arange(2)).astype(inputs.latents.dtype)
    return inputs.latents + (sigma_next - inputs.t) * guided(v, scale)


def step_inputs(run: Run, prompt: EncodedPrompt, latents: Float[Array, "img channels"], step: int) -> Inputs:
    """Returns what the transformer is given at a step, in the prompt's branch if there are two."""
    dtype = latents.dtype
    guidance = None if run.fed_guidance is None else jnp.asarray(run.fed_guidance, dtype)
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
        prompt: the encoded prompt, from `encode_run`.
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
        if run.branch_scale is None:
            latents = euler_step(velocity, params, inputs, after, jnp.asarray(step), run.grid)
        else:
            text, pooled = (jnp.stack([getattr(one, name) for one in prompt.branches]) for name in ("text", "pooled"))
            both, scale = inputs._replace(text=text, pooled=pooled), jnp.asarray(run.branch_scale, latents.dtype)
            latents = guided_step(velocity, params, both, scale, after, jnp.asarray(step), run.grid)
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
    raw = np.asarray(decode_raw(pipe.vae, latents, grid))
    with np.errstate(invalid="ignore"):  # where a latent is not a number
        return np.round(255 * np.clip(raw / 2 + 0.5, 0, 1)).astype(np.uint8)


@partial(jax.jit, static_argnames="grid")
def decode_raw(
    vae: Autoencoder, latents: Float[Array, "img channels"], grid: tuple[int, int]
) -> Float[Array, "H W rgb"]:
    """Returns the decoder's own output, black at -1 and white at 1, in at least float32."""
    latent = vae.unpacked(latents, grid)
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
    encoded = encode_run(pipe, prompt, run)
    noise = initial_noise(pipe, run, seed, latents)
    with on_mesh_of(pipe.transformer):
        final = sample(model_velocity, pipe.transformer, run, encoded, noise, progress=progress)
    return GeneratedImage(decode_latents(pipe, final, run.grid), final, encoded.cut)
