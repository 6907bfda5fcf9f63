"""What the organism's tests share: a pipeline of its shape with random weights, and one tiny run of its training.

Compiling the three training steps takes longer than all tests together. `stages` therefore compiles each once for the
session, and makes its first state once: every training of `RECIPE` gets these, but batches and keys of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import GenerationDefaults, PipelineConfig
from difffract_jax.models.sampler import SchedulerConfig
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.models.tiny import random_weights
from difffract_jax.organism import flow, images, pool, text, train
from difffract_jax.organism.recipe import FlowRecipe, ImageRecipe, OrganismRecipe, TextRecipe
from difffract_jax.organism.render import SIDE
from difffract_jax.organism.vocabulary import TEXT_TOKENS, make_tokenizers

RECIPE = OrganismRecipe(
    text=TextRecipe(steps=12, batch=8),
    images=ImageRecipe(steps=8, batch=4, warm_up=2),
    flow=FlowRecipe(steps=12, depth_double=1, depth_single=1, heads=1, batch=8, pool=32, warm_up=2),
    save_every=5,
)


NO_ROWS = flow.EncodedScenes(
    np.zeros((0, 36, 32), np.float32), np.zeros((0, 20, 96), np.float32), np.zeros((0, 64), np.float32)
)


class TrainedRun(NamedTuple):
    """A run of the training that was not interrupted."""

    directory: Path
    pipeline: Pipeline


@pytest.fixture(scope="session")
def recipe() -> OrganismRecipe:
    """A handful of steps per stage, of the smallest transformer that has both kinds of block."""
    return RECIPE


@pytest.fixture(scope="session")
def stages() -> Iterator[SimpleNamespace]:
    """The stages of `RECIPE`, compiled once; `traces` counts how often each step was traced."""
    traces: Counter[str] = Counter()

    def remembered(init: Callable[[], Any]) -> Callable[[], Any]:
        @cache
        def first() -> Any:
            made = init()
            # NumPy does not know weak types, with which a step would be traced twice.
            assert not any(leaf.weak_type for leaf in jax.tree.leaves(made))
            return jax.tree.map(np.asarray, made)

        return lambda: jax.tree.map(jnp.array, first())  # copies, which a step may be given

    made: dict[str, train.Stage] = {}

    def counted(module: Any) -> Callable[..., Any]:
        step, name = module.train_step, module.__name__.rpartition(".")[2]

        def counting(*arguments: Any, **options: Any) -> Any:
            traces[name] += 1
            return step(*arguments, **options)

        return counting

    def once(build: Callable[..., train.Stage]) -> Callable[..., train.Stage]:
        def stage(recipe: OrganismRecipe, *rest: Any) -> train.Stage:
            fresh = build(recipe, *rest)
            if recipe != RECIPE:
                return fresh
            kept = made.setdefault(fresh.name, fresh._replace(init=remembered(fresh.init)))
            return fresh._replace(init=kept.init, step=kept.step)

        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "AT_ONCE", 16)
        for module in (text, images, flow):
            patch.setattr(module, "train_step", counted(module))
        for name in ("_text_stage", "_image_stage", "_flow_stage"):
            patch.setattr(train, name, once(getattr(train, name)))
        yield SimpleNamespace(
            text=train._text_stage(RECIPE, make_tokenizers()),
            images=train._image_stage(RECIPE),
            flow=train._flow_stage(RECIPE, lambda: NO_ROWS),
            traces=traces,
        )


@pytest.fixture(scope="session")
def trained(stages: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A tiny run; its images are nothing like scenes."""
    directory = tmp_path_factory.mktemp("organism") / "run"
    return TrainedRun(directory, train.train(RECIPE, directory))


@pytest.fixture(scope="session")
def organism() -> Pipeline:
    """A pipeline of the organism's shape with random weights; two double- and one single-stream block."""
    tokenizers = make_tokenizers()
    config = PipelineConfig(
        transformer=flow.transformer_config(FlowRecipe(depth_double=2, depth_single=1, heads=1)),
        t5=text.t5_config(),
        clip=text.clip_config(tokenizers),
        vae=images.autoencoder_config(0.8, 0.1),
        scheduler=SchedulerConfig(),
        defaults=GenerationDefaults(height=SIDE, width=SIDE, text_tokens=TEXT_TOKENS, steps=4, guidance=0.0),
    )
    classes = {"transformer": MMDiT, "t5": T5Encoder, "clip": CLIPTextEncoder, "vae": Autoencoder}
    parts = {
        name: random_weights(jax.eval_shape(lambda c=cls, n=name: c(getattr(config, n), rngs=nnx.Rngs(0))), number)
        for number, (name, cls) in enumerate(classes.items())
    }
    return Pipeline(**parts, tokenizers=tokenizers, config=config)
