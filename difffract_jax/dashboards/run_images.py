"""The image of a graph's run, made again, and what each of its steps predicted that image to be.

A flow model's velocity v at latents z and noise level sigma predicts the clean latents z - sigma v. From one step to
the next z moves by (sigma_next - sigma) v, so that v is known from the two.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from difffract_jax.config import UserError
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.pipeline import Pipeline, decode_latents, encode_run, initial_noise, model_velocity, sample
from difffract_jax.models.sampler import PATCH
from difffract_jax.spread import on_mesh_of


def run_images(
    pipe: Pipeline, run: TraceInfo, steps: Sequence[int], progress: Callable[[int, int], None] | None = None
) -> UInt8[np.ndarray, "image H W rgb"]:
    """Makes the finished image, then what each of some steps predicted.

    Args:
        pipe: the model of the run.
        run: what was traced.
        steps: whose predicted clean images to make.
        progress: called with (steps done, steps in all).

    Raises:
        UserError: if the model is another than that of the run, or the run started from given noise.
    """
    if pipe.source != run.model:
        raise UserError(
            f"The graph was traced in another model: its content hash is {run.model[:12]}..., but the one given has "
            f"{pipe.source[:12]}...; give the model that the graph was traced in, or --image FILE."
        )
    if run.latents_given:
        raise UserError("The graph's run started from noise that was given, so that its image cannot be made again.")
    unit, count = PATCH * pipe.config.vae.factor, len(run.sigmas) - 1
    height, width = (side * unit for side in run.grid)
    sizes = {"steps": count, "height": height, "width": width, "text_tokens": run.text_tokens}
    planned = pipe.plan(**sizes, guidance=run.guidance, negative_prompt=run.negative_prompt)
    planned = planned._replace(sigmas=np.asarray(run.sigmas, np.float32))
    prompt = encode_run(pipe, run.prompt, planned)
    latents = [initial_noise(pipe, planned, run.seed)]
    with on_mesh_of(pipe.transformer):
        for step in range(count):
            part = planned._replace(sigmas=planned.sigmas[step : step + 2])
            latents.append(sample(model_velocity, pipe.transformer, part, prompt, latents[-1]))
            if progress is not None:
                progress(step + 1, count)
    clean = [latents[-1]]
    for step in steps:
        sigma, after = (jnp.asarray(run.sigmas[i], latents[0].dtype) for i in (step, step + 1))
        clean.append(latents[step] - sigma * (latents[step + 1] - latents[step]) / (after - sigma))
    return np.stack([decode_latents(pipe, one, planned.grid) for one in clean])
