"""What training needs on one device, counted: initialisation, the harvest that fills the buffer, and the step.

The step's arrays are those that `transcoders.plan` knows: state, rows, buffer and model are exact, what the step needs
in between is its `estimate`, which was fitted to what TPU compilers said.
"""

from typing import Any

import jax
import numpy as np

from difffract_jax.estimate.counts import COMMANDS
from difffract_jax.estimate.weights import Transcoders
from difffract_jax.estimate.work import Estimate, Phase, Work
from difffract_jax.models.pipeline import plan_run
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.plan import TrainingWorkload, estimate, held_bytes
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import set_up
from difffract_jax.transcoders.transcoder import TranscoderConfig

ONE = {"data": 1, "site": 1, "feature": 1}


def count_training(settings: TrainConfig, work: TrainingWorkload, config: Any = None) -> Estimate:
    """Counts a training on one device.

    Args:
        settings: of the run.
        work: its sites and shapes.
        config: the pipeline's, from `loading.described_pipeline`; None where rows come from disk.
    """
    setup = set_up(settings, work.sites, work.width, make_mesh(ONE, jax.devices()[:1]))
    held = held_bytes(setup, work.model)
    lasting = {name: held[name] for name in ("state", "buffer", "model")}
    between = max(0, round(estimate(work, ONE)) - sum(lasting.values()))
    # Made leaf by leaf: beside the state there is a copy of its largest part, the weights.
    phases = [Phase("initialise", lasting, held["state"] // 3)]
    if config is not None:
        phases.append(Phase("harvest", lasting, _harvest(settings, work, config)))
    return Estimate("train", (*phases, Phase("step", lasting | {"rows": held["rows"]}, between)))


def _harvest(settings: TrainConfig, work: TrainingWorkload, config: Any) -> int:
    """Returns what a refresh of the buffer needs beside what lies there: a run of some prompts, and their rows."""
    run = plan_run(config, height=settings.height, width=settings.width, text_tokens=settings.text_tokens)
    shapes = {name: getattr(config, name) for name in ("transformer", "t5", "clip", "vae")}
    dtype = jax.tree.leaves(work.model["transformer"])[0].dtype
    asked = Work("harvest", shapes, dtype, run.grid, run.text_tokens, batch=settings.prompts_at_once)
    width = config.transformer.d_model
    # Rows are kept, nothing is encoded: of the transcoders only the sites count.
    shape = TranscoderConfig(d_model=width, features=1, time_embed=0, conditioning="none")
    asked = asked._replace(tcs=Transcoders(shape, work.sites, np.dtype(dtype).itemsize))
    last = COMMANDS["harvest"](asked)[-1]
    return last.passing + last.held["rows"]
