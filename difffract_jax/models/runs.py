"""What a run of a pipeline is: sizes, schedule and guidance, and what it takes that names nothing else.

1. `PipelineConfig` has the shapes of a pipeline's parts, its schedule, and the defaults of a run.
2. `plan_run` fixes sizes, schedule and guidance, and refuses what does not fit.

Guidance goes in one of two ways. A model that was distilled for it (FLUX.1-dev) is fed the scale. Others
(FLUX.2-klein's base, Stable Diffusion 3) are evaluated twice a step, with the prompt and with a negative one:
`guidance` has these two branches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from difffract_jax.address import Tokens
from difffract_jax.config import UserError
from difffract_jax.models import sampler
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.autoencoder import AutoencoderConfig
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.guidance import check_branches
from difffract_jax.models.qwen3 import NoPooledConfig, Qwen3Config
from difffract_jax.models.sampler import PATCH, SchedulerConfig
from difffract_jax.models.sd3_text import NoTextConfig, TwoClipsConfig
from difffract_jax.models.t5 import T5Config


@dataclass(frozen=True)
class GenerationDefaults:
    """What a run takes that names nothing else.

    Attributes:
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence, padding included.
        steps: denoising steps.
        guidance: guidance scale, for models that take one.
        two_branches: whether guidance is by two evaluations a step, with the prompt and with a negative one.
    """

    height: int
    width: int
    text_tokens: int
    steps: int
    guidance: float
    two_branches: bool = False


@dataclass(frozen=True)
class PipelineConfig:
    """Shapes of a pipeline's parts, its schedule, and the defaults of a run.

    Attributes:
        transformer: of the MM-DiT.
        t5: of the encoder of the text stream: T5, in FLUX.2 Qwen3, in Stable Diffusion 3 without T5 none; None for an
            encoder of one's own.
        clip: of the encoder of the pooled prompt: CLIP, in FLUX.2 and Chroma none, in Stable Diffusion 3 two CLIPs.
            Both are `AbsentConfig` where the text encoders are missing.
        vae: of the autoencoder.
        scheduler: the schedule.
        defaults: of a run.
    """

    transformer: FluxConfig
    t5: T5Config | Qwen3Config | NoTextConfig | AbsentConfig | None
    clip: CLIPConfig | NoPooledConfig | TwoClipsConfig | AbsentConfig
    vae: AutoencoderConfig
    scheduler: SchedulerConfig
    defaults: GenerationDefaults


class Run(NamedTuple):
    """Sizes and schedule of one run.

    Attributes:
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        sigmas: noise level entering every step, and the final 0.
        guidance: guidance scale; None for models that take none.
        two_branches: whether guidance is by two branches, and not fed to the model.
        negative_prompt: of the second branch, where there is one.
    """

    grid: tuple[int, int]
    text_tokens: int
    sigmas: Float32[np.ndarray, "step_and_end"]
    guidance: float | None
    two_branches: bool = False
    negative_prompt: str = ""

    @property
    def tokens(self) -> Tokens:
        """Length of each stream."""
        return Tokens(img=self.grid[0] * self.grid[1], txt=self.text_tokens)

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return len(self.sigmas) - 1

    @property
    def evaluations(self) -> int:
        """Evaluations of the model in all steps, numbered as in `guidance`."""
        return self.steps * self.branches

    @property
    def fed_guidance(self) -> float | None:
        """The guidance scale that the model itself is fed; None if it is fed none."""
        return None if self.two_branches else self.guidance

    @property
    def branch_scale(self) -> float | None:
        """The guidance scale between two branches; None where every step is one evaluation."""
        return self.guidance if self.two_branches and self.guidance != 1 else None

    @property
    def branches(self) -> int:
        """Evaluations of a step: 2 with guidance by two branches, else 1."""
        return 1 if self.branch_scale is None else 2


def plan_run(
    config: PipelineConfig,
    *,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
) -> Run:
    """Fixes sizes, schedule and guidance of a run; what is left out comes from the pipeline's defaults.

    Args:
        config: of the pipeline.
        steps: denoising steps.
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence.
        guidance: guidance scale.
        negative_prompt: what guidance by two branches leads away from; the empty prompt if left out.

    Raises:
        UserError: if a size does not divide, a sequence has a length that the model cannot have, a number is too small,
            the guidance scale is none, or of a model that takes none, or there is a negative prompt without guidance by
            two branches.
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
    grid = height // unit, width // unit
    words = defaults.text_tokens if text_tokens is None else text_tokens
    _check_units(config, grid, words)
    return Run(
        grid,
        words,
        sampler.sigmas(config.scheduler, defaults.steps if steps is None else steps, grid[0] * grid[1]),
        _guidance(config, guidance, negative_prompt),
        defaults.two_branches,
        negative_prompt or "",
    )


def _check_units(config: PipelineConfig, grid: tuple[int, int], text_tokens: int) -> None:
    """Refuses lengths of the sequences that a model cannot have; see `plan_run`."""
    shape, side = config.transformer, PATCH * config.vae.factor
    if text_tokens > 0 and text_tokens % shape.text_unit:
        nearest = max(1, round(text_tokens / shape.text_unit)) * shape.text_unit
        raise UserError(
            f"This model reads text in multiples of {shape.text_unit} tokens, but text_tokens is {text_tokens}; take "
            f"{nearest}."
        )
    if grid[0] * grid[1] % shape.image_unit:
        rows, columns = grid
        wider = next(more for more in range(columns, columns + shape.image_unit) if not rows * more % shape.image_unit)
        raise UserError(
            f"This model makes images of multiples of {shape.image_unit} tokens, of {side} x {side} pixels each, but "
            f"{columns * side} x {rows * side} pixels are {rows * columns}; the next width that fits is "
            f"{wider * side} (multiples of {side * smallest_side(shape.image_unit)} pixels on both sides always do)."
        )


def smallest_side(unit: int) -> int:
    """Returns the smallest side, in tokens, whose multiples on both sides make multiples of a unit.

    Args:
        unit: the number of image tokens must be a multiple of it.
    """
    return next(side for side in range(1, unit + 1) if not side * side % unit)


def _guidance(config: PipelineConfig, guidance: float | None, negative_prompt: str | None) -> float | None:
    """Returns a run's guidance scale; arguments as for `plan_run`."""
    defaults, fed = config.defaults, config.transformer.guidance
    if defaults.two_branches:
        return check_branches(guidance, defaults.guidance, negative_prompt)
    if negative_prompt is not None:
        raise UserError(
            "This model takes no negative prompt, which is read by guidance of two evaluations a step alone "
            "(FLUX.2-klein's base model, Stable Diffusion 3 and Chroma have it); leave --negative-prompt out."
        )
    if guidance and not fed:
        raise UserError(f"This model takes no guidance scale (FLUX.1-dev does), but got {guidance}; leave it out.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"The guidance scale must be at least 0, and finite, but got {guidance}; 3.5 is usual.")
    return (defaults.guidance if guidance is None else guidance) if fed else None
