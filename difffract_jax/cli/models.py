"""What the commands that make transcoders read: a model and its world's captions, or rows; or their shapes alone."""

from typing import Any

from difffract_jax.config import UserError, resolve
from difffract_jax.transcoders.settings import RowSettings, TrainConfig

CAPTION_SEED = 40_000
"""World of the captions that transcoders are trained on: another than those of the model's training and scores."""
AT_ONCE = 8
"""Captions drawn together."""


def pipeline_of(settings: RowSettings, mesh: Any = None) -> tuple[Any, Any]:
    """Returns the model, spread over a mesh if one is given, and its world's captions if it has a world."""
    from difffract_jax.loading import load_pipeline
    from difffract_jax.sharding import EVERYWHERE, pipeline_shardings

    model, dtype = model_of(settings), dtype_of(settings)
    check_weights(settings, mesh)
    if model == "tiny":
        from difffract_jax.lora import open_loras, with_loras
        from difffract_jax.models.tiny import random_pipeline

        return with_loras(random_pipeline(dtype=dtype), open_loras(settings.lora)), None
    sharding = None if mesh is None or mesh.size == 1 else pipeline_shardings(mesh, EVERYWHERE)
    options = {"dtype": dtype, "sharding": sharding, "weights": settings.weights, "lora": settings.lora}
    return load_pipeline(model, **options), world_of(settings)


def check_weights(settings: RowSettings, mesh: Any = None) -> None:
    """Refuses to keep blocks elsewhere than on the device where that cannot be had.

    Args:
        settings: say where, and of which model.
        mesh: devices of the run; None for one.

    Raises:
        UserError: if the model is made in memory, or spread over several devices.
    """
    if settings.weights == "device":
        return
    if settings.model == "tiny":
        raise UserError(
            f"weights: {settings.weights} fetches a model's blocks from its files, but `tiny` has none: it is made in "
            "memory, and is small; leave weights out."
        )
    if mesh is not None and mesh.size > 1:
        raise UserError(
            f"weights: {settings.weights} fetches a model's blocks to one device, but the mesh has {mesh.size}; use "
            "weights: device, which splits the model over them."
        )


def mesh_for(text: str | None) -> Any:
    """Returns the mesh that a setting names; None for one device.

    Raises:
        UserError: if it names none, or more devices than there are.
    """
    from difffract_jax.sharding import make_mesh, parse_mesh

    mesh = None if text is None else make_mesh(parse_mesh(text))
    return None if mesh is None or mesh.size == 1 else mesh


def spread_model(mesh: Any) -> Any:
    """Returns where `load_pipeline` puts a model that is evaluated on a mesh; None for one device."""
    from difffract_jax.sharding import traced_pipeline

    return None if mesh is None else traced_pipeline(mesh)


def model_of(settings: RowSettings) -> str:
    """Returns the name of the model that shall be read.

    Raises:
        UserError: if there is none.
    """
    if settings.model is None:
        raise UserError(
            "There is no model to read: `model` is missing; give `organism`, a converted or diffusers directory, or "
            "rows of your own (--rows)."
        )
    return settings.model


def dtype_of(settings: RowSettings) -> Any:
    """Returns the type of the model's weights."""
    return dtype_named(settings.model_dtype)


def dtype_named(name: str) -> Any:
    """Returns the type called f32 or bf16."""
    import jax.numpy as jnp

    return {"f32": jnp.float32, "bf16": jnp.bfloat16}[name]


def world_of(settings: RowSettings) -> Any:
    """Returns the organism's captions by number, drawn apart from those that it was trained and is scored on.

    None for a model that is neither the organism nor a sibling of it.
    """
    from difffract_jax.organism.vocabulary import is_of_the_world
    from difffract_jax.organism.world import scenes

    if not is_of_the_world(str(settings.model)):
        return None

    def caption(number: int) -> str:
        return scenes(CAPTION_SEED + settings.seed, number // AT_ONCE, AT_ONCE).captions[number % AT_ONCE]

    return caption


def rows_in(settings: TrainConfig, split: Any) -> Any:
    """Opens one split of the directory of rows that the settings name."""
    from difffract_jax.transcoders.own_rows import open_rows

    assert settings.rows is not None  # else a model is read
    sae = settings.role == "sae"
    return open_rows(settings.rows, split, settings.validation_share, settings.seed, sae=sae)


def with_origin(settings: TrainConfig) -> TrainConfig:
    """Returns settings that say which model and prompts harvested rows came from, so that `evaluate` knows it, too."""
    from difffract_jax.storage.checkpoint import read_config
    from difffract_jax.storage.remote.cache import local_directory

    if settings.rows is None or settings.model is not None:
        return settings
    rows = local_directory(settings.rows, by_range=True)
    if not (rows / "config.json").is_file():
        return settings
    harvested = read_config(rows).get("provenance", {}).get("settings", {})
    names = RowSettings.model_fields.keys() - settings.model_fields_set - {"seed"}
    known = {name: harvested[name] for name in names if harvested.get(name) is not None}
    return resolve(TrainConfig, known | settings.model_dump(exclude_unset=True))


def work_of(settings: TrainConfig, source: Any = None) -> Any:
    """Returns what shall be planned: sites, width, and the model that is read, as shapes alone.

    Args:
        settings: of the run.
        source: its rows, if they are open already.
    """
    from difffract_jax.loading import PARTS, abstract_pipeline, described_pipeline
    from difffract_jax.models.pipeline import plan_run
    from difffract_jax.transcoders.plan import TrainingWorkload
    from difffract_jax.transcoders.sites import parse_sites

    if settings.rows is not None:
        rows = source or rows_in(settings, "train")
        return TrainingWorkload(settings, rows.sites, rows.width, {})
    model = model_of(settings)
    if model == "tiny":
        pipe, _ = pipeline_of(settings)
        config, parts = pipe.config.transformer, {name: getattr(pipe, name) for name in PARTS}
    else:
        config, parts = abstract_pipeline(model, dtype_of(settings))
    described = pipe.config if model == "tiny" else described_pipeline(model)
    # What takes no guidance is told before weights are read.
    run = plan_run(described, guidance=settings.guidance, negative_prompt=settings.negative_prompt)
    sites = parse_sites(settings.sites, config.layout)
    return TrainingWorkload(settings, sites, config.d_model, parts, _run_of(settings, run, parts["vae"]))


def _run_of(settings: TrainConfig, run: Any, vae: Any) -> Any:
    """Returns sizes and length of the sampler's runs, as far as a plan needs them; None if the settings lack one.

    Args:
        settings: of the run.
        run: of the model's own sizes, with the guidance that is asked for.
        vae: abstract, of the model.
    """
    import numpy as np

    from difffract_jax.models.sampler import PATCH

    height, width, tokens, steps = (getattr(settings, n) for n in ("height", "width", "text_tokens", "steps_per_image"))
    if None in (height, width, tokens, steps):
        return None
    unit = PATCH * vae.config.factor
    sigmas = np.zeros(steps + 1, np.float32)  # a program does not depend on the levels
    return run._replace(grid=(height // unit, width // unit), text_tokens=tokens, sigmas=sigmas)
