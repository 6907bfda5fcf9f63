"""What commands that make a run say of it: sizes, starting noise, a region of its image, a prompt that was cut.

Imports when a command runs, as in all of `cli`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from difffract_jax.cli.settings import EffectsConfig, RunSettings
from difffract_jax.config import GenerateConfig, UserError
from difffract_jax.trace_settings import TraceConfig


def run_of(pipe: Any, settings: Any) -> Any:
    """Returns the sizes and the schedule that the settings of a run name."""
    names = {"steps", "height", "width", "text_tokens", "guidance", "negative_prompt"}
    return pipe.plan(**settings.model_dump(include=names))


def region_of(pipe: Any, run: Any, settings: RunSettings | EffectsConfig) -> Any:
    """Returns the pixels of --box or --mask; None if neither is given.

    Args:
        pipe: the pipeline.
        run: from `plan_run`.
        settings: of the command.
    """
    if settings.box is not None and settings.mask is not None:
        raise UserError("Both --box and --mask describe the region; give one of them.")
    from difffract_jax.circuits.notation.region import box_mask, read_mask
    from difffract_jax.models.sampler import PATCH

    rows, columns = (side * PATCH * pipe.config.vae.factor for side in run.grid)
    if settings.box is not None:
        return box_mask(settings.box, (rows, columns))
    return None if settings.mask is None else read_mask(settings.mask, (rows, columns))


def starting_noise(pipe: Any, settings: GenerateConfig | TraceConfig | EffectsConfig) -> Any:
    """Returns the packed starting noise that --latents or --noise asks for; None leaves it to the seed.

    Args:
        pipe: the pipeline.
        settings: of a command that makes one run.
    """
    if settings.latents is not None:
        from difffract_jax.storage.files import read_array

        return read_array(settings.latents)
    if settings.noise == "jax":
        return None
    from difffract_jax.models.pipeline import plan_run

    grid = plan_run(pipe.config, height=settings.height, width=settings.width).grid
    return torch_latents(pipe, grid, [settings.seed])[0]


def torch_latents(pipe: Any, grid: Sequence[int], seeds: Sequence[int]) -> Any:
    """Returns packed starting noise as diffusers draws it, [seed img channels].

    Args:
        pipe: the pipeline.
        grid: rows and columns of image tokens.
        seeds: of the noise.

    Raises:
        UserError: if two of them are one seed to PyTorch.
    """
    import numpy as np

    from converters.torch_files import torch_noise, torch_seed
    from difffract_jax.models.sampler import pack

    if len({torch_seed(seed) for seed in seeds}) < len(seeds):
        raise UserError(
            "PyTorch's generator reads the lower 32 bits of a seed, so that seeds that differ by a multiple of 2**32 "
            "give the same noise; give --seeds below 2**32, or leave --noise torch out."
        )
    for seed in seeds:
        if torch_seed(seed) != seed:
            sys.stderr.write(
                f"Warning: PyTorch reads the lower 32 bits of a seed; its noise of {seed} is that of "
                f"{torch_seed(seed)}.\n"
            )
    size = pipe.config.vae.latent_channels, 2 * grid[0], 2 * grid[1]
    return np.stack([pack(torch_noise(seed, *size)[0].transpose(1, 2, 0)) for seed in seeds])


def warn_cut(cut: str) -> None:
    """Warns of the end of a prompt that did not fit; "" if all did."""
    if cut:
        sys.stderr.write(
            f"Warning: the prompt is longer than the text length; cut off was: {cut!r}. Raise --text-tokens.\n"
        )
