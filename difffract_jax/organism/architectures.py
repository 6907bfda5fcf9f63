"""What a pipeline of each architecture is made of: the organism's own, FLUX.1's, and those of its siblings.

A sibling sees the same world, captions and noise levels, and has as many blocks of the same width. What differs is what
its architecture prescribes:

1. `flux`: 2 double- and 2 single-stream blocks; T5 for the text stream, CLIP for the pooled vector.
2. `sd3`, as Stable Diffusion 3.5 large: 4 double-stream blocks, the last of its own kind; a table of positions; two
   CLIPs and T5; guidance by two branches. Its schedule takes the organism's four noise levels, and one more at the end,
   the lowest, as that architecture's always does.
3. `flux2`: 2 double- and 2 single-stream blocks with gated MLPs and without biases; Qwen3 for the text stream, nothing
   pooled; latents scaled channel by channel; no guidance. Its schedule is not shifted: the published shift belongs to
   thousands of image tokens, and would leave seven tenths of the noise to the last step.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.blocks import FluxConfig
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.runs import GenerationDefaults
from difffract_jax.models.sampler import Flux2SchedulerConfig, SchedulerConfig, Sd3SchedulerConfig
from difffract_jax.models.sd3 import Sd3Config
from difffract_jax.models.tokenizers import Tokenizers
from difffract_jax.organism import flow, text
from difffract_jax.organism.pool import with_statistics
from difffract_jax.organism.recipe import Arch, FlowRecipe
from difffract_jax.organism.render import SIDE
from difffract_jax.organism.vocabulary import (
    CHAT_TOKENS,
    CLIP_TOKENS,
    TEXT_TOKENS,
    make_chat_tokenizers,
    make_sd3_tokenizers,
    make_tokenizers,
)


class Architecture(NamedTuple):
    """What a pipeline is made of.

    Attributes:
        tokenizers: makes its tokenizers.
        encoders: shapes of its text encoders, by the tokenizers.
        transformer: shape of its transformer, by the recipe.
        autoencoder: makes its autoencoder of one with measured scales, and a seed of scenes to measure on.
        scheduler: its schedule.
        defaults: of a run.
    """

    tokenizers: Callable[[], Tokenizers]
    encoders: Callable[[Tokenizers], text.Shapes]
    transformer: Callable[[FlowRecipe], FluxConfig]
    autoencoder: Callable[[Autoencoder, int], Autoencoder]
    scheduler: SchedulerConfig
    defaults: GenerationDefaults


def _as_it_is(vae: Autoencoder, seed: int) -> Autoencoder:
    del seed
    return vae


def _sd3_transformer(recipe: FlowRecipe) -> Sd3Config:
    encoders = text.sd3_shapes(make_sd3_tokenizers())
    return flow.sd3_config(recipe, encoders.t5.d_model, encoders.clip.d_model)


def _flux2_transformer(recipe: FlowRecipe) -> Flux2Config:
    return flow.flux2_config(recipe, text.flux2_shapes(make_chat_tokenizers()).t5.d_model)


def _run(text_tokens: int, steps: int = 4, guidance: float = 0.0, *, two_branches: bool = False) -> GenerationDefaults:
    return GenerationDefaults(SIDE, SIDE, text_tokens, steps, guidance, two_branches)


ARCHITECTURES: Mapping[Arch, Architecture] = {
    "flux": Architecture(
        tokenizers=make_tokenizers,
        encoders=text.flux_shapes,
        transformer=flow.transformer_config,
        autoencoder=_as_it_is,
        scheduler=SchedulerConfig(),
        defaults=_run(TEXT_TOKENS),
    ),
    "sd3": Architecture(
        tokenizers=make_sd3_tokenizers,
        encoders=text.sd3_shapes,
        transformer=_sd3_transformer,
        autoencoder=_as_it_is,
        scheduler=Sd3SchedulerConfig(),
        defaults=_run(CLIP_TOKENS + TEXT_TOKENS, 5, 1.0, two_branches=True),
    ),
    "flux2": Architecture(
        tokenizers=make_chat_tokenizers,
        encoders=text.flux2_shapes,
        transformer=_flux2_transformer,
        autoencoder=with_statistics,
        scheduler=Flux2SchedulerConfig(),
        defaults=_run(CHAT_TOKENS),
    ),
}
"""Name of an architecture -> what its pipeline is made of."""
