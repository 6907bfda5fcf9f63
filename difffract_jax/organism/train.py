"""The organism's training, from nothing to a pipeline, resumable at any moment.

1. Three stages, each a pure `state, metrics = step(state, batch, key)`: `text`, then `images`, then `flow`, which needs
   the results of the other two and a pool of encoded scenes.
2. Batch and key of a step depend on the seed and on the step's number alone. A run that was interrupted and resumed
   therefore ends with the very same weights as one that was not.
3. Every `save_every` steps, at the end of a stage, and when the run is interrupted, the stage's state replaces its
   checkpoint on disk, whole or not at all. Metrics are appended to `metrics.jsonl`.
4. A loss that is not finite ends the run; the last checkpoint stays.

The directory: `recipe.json`, `metrics.jsonl`, and one checkpoint per stage. In a bucket, where nothing can be replaced
in one move, a stage's checkpoints lie in folders by their step, the newest of which counts, and metrics go with each.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from difffract_jax.config import UserError
from difffract_jax.generators import seed_words
from difffract_jax.models.autoencoder import Autoencoder
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.runs import PipelineConfig
from difffract_jax.models.tokenizers import Tokenizers
from difffract_jax.organism import flow, images, text
from difffract_jax.organism.architectures import ARCHITECTURES
from difffract_jax.organism.pool import build_pool, measure_latents
from difffract_jax.organism.recipe import OrganismRecipe, completed
from difffract_jax.seeds import random_key
from difffract_jax.storage.checkpoint import atomic_directory, atomic_file, load_tree, save_trees
from difffract_jax.storage.files import is_occupied
from difffract_jax.storage.remote import steps
from difffract_jax.storage.remote.addresses import is_remote, parse_address
from difffract_jax.storage.remote.bucket import open_bucket
from difffract_jax.storage.remote.cache import local_directory
from difffract_jax.storage.remote.publication import CLAIM
from difffract_jax.transcoders.run_place import bring, check_place, has, home_of, send, text_of

Progress = Callable[[str, int, int, float], None]
"""Called with stage, steps done, steps in all, and the latest loss."""
LOG_EVERY = 50
"""Steps between two lines of metrics."""
RECIPE, METRICS = "recipe.json", "metrics.jsonl"
LONGEST_GAP = 120.0
"""Seconds between two lines from which on the run counts as interrupted."""
SCALE_SEED, POOL_SEED, DATA_SEED, KEY_SEED = range(4)
"""What each stream of randomness is for; every stage adds its own number."""


class Stage(NamedTuple):
    """One stage of the training.

    Attributes:
        name: of its checkpoint.
        steps: how many.
        init: makes the first state.
        batch: step -> data.
        step: state, data, key -> state, metrics; jitted.
        key: of its randomness.
    """

    name: str
    steps: int
    init: Callable[[], Any]
    batch: Callable[[int], Any]
    step: Callable[[Any, Any, Key[Array, ""]], tuple[Any, dict[str, Array]]]
    key: Key[Array, ""]


def train(
    recipe: OrganismRecipe,
    directory: Path,
    *,
    resume: bool = False,
    begin: Pipeline | None = None,
    progress: Progress | None = None,
    allowed: Callable[[], None] = lambda: None,
) -> Pipeline:
    """Trains the organism, or a sibling of another architecture.

    Args:
        recipe: every number that the result depends on.
        directory: of the run.
        resume: go on with a run that was interrupted.
        begin: pipeline that the recipe names, whose parts are taken; all are trained if left out.
        progress: called after every step.
        allowed: called before a checkpoint is written; raises where another process has taken the run over.

    Returns:
        The pipeline, with the averaged weights of the transformer.

    Raises:
        UserError: if the directory holds a run already, or one of another recipe, or a loss is not finite.
    """
    _open_run(recipe, directory, resume)
    made_of = ARCHITECTURES[recipe.arch]
    tokenizers = made_of.tokenizers()
    report = progress or (lambda *_: None)
    run = partial(fit, directory=directory, save_every=recipe.save_every, report=report, allowed=allowed)
    encoders = run(_text_stage(recipe, tokenizers, begin))
    scale_seed = _seed(recipe, 1, SCALE_SEED)
    scaled = _scaled(run(_image_stage(recipe)).vae, scale_seed) if begin is None else begin.vae
    vae = made_of.autoencoder(scaled, scale_seed)

    @cache
    def pool() -> flow.EncodedScenes:
        seed, told = _seed(recipe, 2, POOL_SEED), partial(_pool_progress, report)
        size, dropped = recipe.flow.pool, recipe.flow.dropped
        return build_pool(vae, encoders.t5, encoders.clip, tokenizers, seed, size, told, dropped)

    model = run(_flow_stage(recipe, pool)).average
    config = PipelineConfig(
        transformer=model.config,
        t5=encoders.t5.config,
        clip=encoders.clip.config,
        vae=vae.config,
        scheduler=made_of.scheduler,
        defaults=made_of.defaults,
    )
    return Pipeline(model, encoders.t5, encoders.clip, vae, tokenizers, config)


def minutes_taken(directory: Path) -> float:
    """Returns how long the steps of a run have taken, interruptions left out, by the times in its `metrics.jsonl`."""
    text = (home_of(directory) / METRICS).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    total = 0.0
    for before, after in zip(lines, lines[1:], strict=False):
        gap = after["time"] - before["time"]
        if before["stage"] == after["stage"] and gap < LONGEST_GAP:
            total += gap
    return total / 60


def fit(
    stage: Stage, directory: Path, save_every: int, report: Progress, allowed: Callable[[], None] = lambda: None
) -> Any:
    """Runs a stage from its last checkpoint, or from the start, to its end; returns the final state."""
    home = directory / stage.name
    saved = _newest(home)
    state = stage.init() if saved is None else load_tree(saved, jax.eval_shape(stage.init))
    first = int(state.step)
    if first >= stage.steps:
        return state
    with ThreadPoolExecutor(1) as ahead, (home_of(directory) / METRICS).open("a", encoding="utf-8") as log:
        waiting = ahead.submit(stage.batch, first)
        try:
            for step in range(first, stage.steps):
                data = waiting.result()
                waiting = ahead.submit(stage.batch, step + 1)
                state, metrics = stage.step(state, data, jax.random.fold_in(stage.key, step))
                loss = float(metrics["loss"])
                if not np.isfinite(loss):
                    raise FloatingPointError
                report(stage.name, step + 1, stage.steps, loss)
                if (step + 1) % LOG_EVERY == 0 or step + 1 == stage.steps:
                    _log(log, stage.name, step + 1, metrics)
                if (step + 1) % save_every == 0 or step + 1 == stage.steps:
                    # The loss is of the state before the step: an update that is not finite shows one step late.
                    if not _finite(state):
                        raise FloatingPointError
                    _save(state, home, allowed)
        except FloatingPointError:
            raise UserError(
                f"The loss of stage {stage.name} is not finite at step {step}; {home} keeps the last good checkpoint. "
                "Lower the learning rate of that stage."
            ) from None
        except KeyboardInterrupt:
            # A step that was interrupted may have given its state away already; then the last checkpoint stays.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                _save(state, home, allowed)
            raise
    return state


def _finite(state: Any) -> bool:
    """Says whether every number is finite; looked at on the host, where it is written next, without a program."""
    floats = (leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in floats)


def _newest(home: Path) -> Path | None:
    """Returns where the checkpoint of a stage can be read; None if it has none."""
    if not is_remote(home):
        return home if home.is_dir() else None
    complete = steps.complete(parse_address(home))
    return local_directory(home / str(complete[-1])) if complete else None


def _save(state: Any, home: Path, allowed: Callable[[], None]) -> None:
    allowed()
    step, remote = int(state.step), is_remote(home)
    before = steps.complete(parse_address(home)) if remote else []
    if step in before:
        return  # to write it again would take it away first
    send(home.parent, [METRICS])
    with atomic_directory(home / str(step) if remote else home, overwrite=True) as partial:
        save_trees({"model": state}, partial, {"kind": "training state", "step": step})
    for old in before:
        allowed()
        steps.forget(parse_address(home) / str(old))


def _log(log: Any, stage: str, step: int, metrics: dict[str, Array]) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    log.write(json.dumps({"stage": stage, "step": step, "time": round(time.time(), 1)} | values) + "\n")
    log.flush()


def _open_run(recipe: OrganismRecipe, directory: Path, resume: bool) -> None:
    """Makes the directory of a new run, or checks that a run to resume is of the same recipe."""
    check_place(directory)
    path = directory / RECIPE
    wanted = recipe.model_dump(mode="json")
    begun = has(directory, RECIPE)
    if not begun and _holds_more(directory):
        raise UserError(f"{directory} holds other files; give a new directory for the run.")
    home_of(directory).mkdir(parents=True, exist_ok=True)
    if not begun:
        (home_of(directory) / METRICS).unlink(missing_ok=True)
        with atomic_file(path) as partial_file:
            partial_file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    if not resume:
        raise UserError(f"{directory} holds a run already; add --resume to go on with it, or give a new directory.")
    bring(directory, METRICS)
    found, wanted = completed(json.loads(text_of(directory, RECIPE))), completed(wanted)
    changed = [
        f"{part}.{name}" if isinstance(value, dict) else part
        for part, value in wanted.items()
        for name in (value if isinstance(value, dict) else [part])
        if (found.get(part, {}).get(name) if isinstance(value, dict) else found.get(part))
        != (value[name] if isinstance(value, dict) else value)
    ]
    if changed:
        raise UserError(
            f"The run in {directory} was started with other values of {', '.join(changed)}; "
            "resume it with the same, or give a new directory."
        )


def _holds_more(directory: Path) -> bool:
    """Says whether a place that holds no run holds something else; of a bucket, besides the claim of this process."""
    if not is_remote(directory):
        return is_occupied(directory)
    at = parse_address(directory)
    return any(stat.key != (at / CLAIM).key for stat in open_bucket(at).below(at.key))


def _seed(recipe: OrganismRecipe, stage: int, purpose: int) -> int:
    """Returns the seed of one stream of randomness of one stage."""
    return int(seed_words(recipe.seed, stage, purpose).generate_state(1)[0])


def _key(recipe: OrganismRecipe, stage: int) -> Key[Array, ""]:
    return random_key(_seed(recipe, stage, KEY_SEED))


def _text_stage(recipe: OrganismRecipe, tokenizers: Tokenizers, begin: Pipeline | None = None) -> Stage:
    shapes = ARCHITECTURES[recipe.arch].encoders(tokenizers)
    taken = begin is not None and text.takes(*shapes)
    step = jax.jit(partial(text.train_step, recipe.text, recipe.seed, taken=taken), donate_argnums=0)

    def init() -> text.TextState:
        state = text.init(recipe.text, tokenizers, recipe.seed, shapes)
        # Copies, since the step gives its state away.
        return text.with_taken(state, *jax.tree.map(jnp.copy, (begin.t5, begin.clip))) if taken else state

    return Stage(
        "text",
        recipe.text.steps,
        init,
        partial(text.batch, recipe.text, tokenizers, _seed(recipe, 0, DATA_SEED)),
        lambda state, prompts, key: step(state, prompts),
        _key(recipe, 0),
    )


def _image_stage(recipe: OrganismRecipe) -> Stage:
    return Stage(
        "images",
        recipe.images.steps,
        partial(images.init, recipe.images, recipe.seed),
        partial(images.batch, recipe.images, _seed(recipe, 1, DATA_SEED)),
        jax.jit(partial(images.train_step, recipe.images), donate_argnums=0),
        _key(recipe, 1),
    )


def _flow_stage(recipe: OrganismRecipe, pool: Callable[[], flow.EncodedScenes]) -> Stage:
    """The pool is made when the first step asks for it: a finished stage needs none."""
    return Stage(
        "flow",
        recipe.flow.steps,
        partial(flow.init, recipe.flow, recipe.seed, ARCHITECTURES[recipe.arch].transformer(recipe.flow)),
        lambda step: flow.batch(recipe.flow, _seed(recipe, 2, DATA_SEED), step, pool()),
        jax.jit(partial(flow.train_step, recipe.flow), donate_argnums=0),
        _key(recipe, 2),
    )


def _scaled(vae: Autoencoder, seed: int) -> Autoencoder:
    """Returns the autoencoder with its measured scaling and shift factors in its configuration."""
    config = images.autoencoder_config(*measure_latents(vae, seed))
    template = jax.eval_shape(lambda: Autoencoder(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(vae))


def _pool_progress(report: Progress, done: int, total: int) -> None:
    report("pool", done, total, float("nan"))
