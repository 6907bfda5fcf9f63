"""What training needs on one device, counted: initialisation, the harvest that fills the buffer, and the step.

The step's arrays are those that `transcoders.plan` knows: state, rows, buffer and model are exact, what the step needs
in between is its `estimate`, which was fitted to what TPU compilers said.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from converters.pipelines import LAYERED_PARTS
from difffract_jax.estimate.counts import COMMANDS
from difffract_jax.estimate.weights import Transcoders, around_bytes
from difffract_jax.estimate.work import Estimate, Phase, Work
from difffract_jax.models.pipeline import plan_run
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.plan import TrainingWorkload, estimate, held_bytes
from difffract_jax.transcoders.recipe import encoders_on_host
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import set_up
from difffract_jax.transcoders.transcoder import TranscoderConfig

ONE = {"data": 1, "site": 1, "feature": 1}


def count_training(settings: TrainConfig, work: TrainingWorkload, platform: str, config: Any = None) -> Estimate:
    """Counts a training on one device.

    Args:
        settings: of the run.
        work: its sites and shapes.
        platform: of the device, `cpu`, `gpu` or `tpu`: beside an accelerator text encoders may lie on the host.
        config: the pipeline's, from `loading.described_pipeline`; None where rows come from disk.
    """
    setup = set_up(settings, work.sites, work.width, make_mesh(ONE, jax.devices()[:1]))
    held = held_bytes(setup, {})
    on_host = encoders_on_host(settings, platform)
    streamed = settings.weights != "device"
    resident = {name: tree for name, tree in work.model.items() if name == "transformer" or not on_host}
    model = sum(around_bytes(tree, streamed and name in LAYERED_PARTS) for name, tree in resident.items())
    lasting = {"state": held["state"], "buffer": held["buffer"], "model": model}
    step = lasting | {"rows": held["rows"]}
    between = max(0, round(estimate(work._replace(model={}), ONE)) - sum(held.values()))
    # Beside the state in the making there may be its weights once more.
    phases = [Phase("initialise", lasting, held["state"] // 3)]
    if config is not None:
        phases += _refresh(settings, work, config, lasting, on_host)
    return Estimate("train", (*phases, Phase("step", step, between)))


def _refresh(
    settings: TrainConfig, work: TrainingWorkload, config: Any, lasting: Mapping[str, int], on_host: bool
) -> list[Phase]:
    """Counts a refresh of the buffer: prompts through the text encoders, then runs of the model, and their rows."""
    names = {"height", "width", "text_tokens", "guidance", "negative_prompt"}
    run = plan_run(config, **settings.model_dump(include=names))
    shapes = {name: getattr(config, name) for name in ("transformer", "t5", "clip", "vae")}
    dtype = jax.tree.leaves(work.model["transformer"])[0].dtype
    streamed = settings.weights != "device"
    asked = Work("harvest", shapes, dtype, run.grid, run.text_tokens, batch=settings.prompts_at_once, streamed=streamed)
    evaluations = (settings.steps_per_image or run.steps) * run.branches
    asked = asked._replace(steps=evaluations, tokens=settings.tokens_per_step)
    # Rows are kept, nothing is encoded: of the transcoders only the sites count.
    shape = TranscoderConfig(d_model=config.transformer.d_model, features=1, time_embed=0, conditioning="none")
    asked = asked._replace(tcs=Transcoders(shape, work.sites, np.dtype(dtype).itemsize))
    encoders = asked._replace(shapes={name: shapes[name] for name in ("t5", "clip")})
    (text,), harvest = COMMANDS["encode"](encoders), COMMANDS["harvest"](asked)[-1]
    visiting = {"text encoders": sum(text.held.values())} if on_host else {}
    if streamed and not on_host:
        visiting = {"blocks on their way": text.held["two blocks"]}
    blocks = {"blocks on their way": harvest.held["two blocks"]} if streamed else {}
    rows = {"rows of the prompts": harvest.held["rows"]} | blocks
    return [
        Phase("encode prompts", {**lasting, **visiting}, text.passing),
        Phase("harvest", {**lasting, **rows}, harvest.passing),
    ]
