"""From a run's settings to the constants of its step: recipe, shapes, weights of penalties, and what a row costs."""

from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from difffract_jax.config import UserError
from difffract_jax.sharding import AnyMesh
from difffract_jax.transcoders.objective import Objective, Width, widths
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import SiteSet
from difffract_jax.transcoders.step import Recipe
from difffract_jax.transcoders.transcoder import TranscoderConfig

SPARSE_SHARE = 1 / 64
"""Share of active features up to which products at these alone win on a CPU, with room to spare."""


TOGETHER_BYTES = 64 * 2**20
"""Pre-activations of one site on one device, up to which all of a device's sites take their step together."""


def recipe_of(settings: TrainConfig, shape: TranscoderConfig, mesh: AnyMesh, round_batches: int) -> Recipe:
    """Returns the constants of the training step.

    Args:
        settings: of the run.
        shape: of each transcoder.
        mesh: devices of the run.
        round_batches: steps between two refreshes of the buffer, the cycle of `cosine_cycles`.
    """
    names = ("lr", "b1", "b2", "weight_decay", "schedule", "warmup", "decay", "steps", "sparsity_warmup", "clip")
    objective = Objective(
        bf16=settings.matmul == "bf16",
        sparse=multiplies_sparsely(settings, shape, mesh),
        **settings.model_dump(include={"aux_weight", "lift_weight", "aux_k", "dead_after", "l0_weight", "bandwidth"}),
    )
    constants = settings.model_dump(include={*names, "project_decoder"})
    in_turn = takes_turns(settings, shape, mesh.shape)
    return Recipe(objective=objective, cycle=round_batches, in_turn=in_turn, **constants)


def shape_of(settings: TrainConfig, width: Width) -> TranscoderConfig:
    """Returns the shape of each transcoder on rows of a width.

    Raises:
        UserError: if it would have no feature, or k does not fit.
    """
    d_model, d_out = widths(width)
    features = round(settings.expansion * d_model)
    if not features:
        raise UserError(
            f"expansion is {settings.expansion}, which leaves no feature at a width of {d_model}; raise it."
        )
    return TranscoderConfig(
        d_model=d_model,
        d_out=d_out,
        features=features,
        k=settings.k if "topk" in settings.activation else 0,
        **settings.model_dump(include={"time_embed", "conditioning", "activation", "skip", "role"}),
    )


def sparsities(settings: TrainConfig, sites: SiteSet) -> Float[np.ndarray, "site"]:
    """Returns what `objective.site_loss` is given as sparsity for every site."""
    if settings.activation == "jumprelu":
        return np.full(len(sites.names), settings.target_l0, np.float32)
    return np.array(
        [
            settings.l1_txt if group.streams == ("txt",) else settings.l1
            for group, numbers in sites.members
            for _ in numbers
        ],
        np.float32,
    )


def multiplies_sparsely(settings: TrainConfig, shape: TranscoderConfig, mesh: AnyMesh) -> bool:
    """Returns whether codes are multiplied at their active features alone, see `settings.sparse_code`.

    Raises:
        UserError: if that is asked for on several devices.
    """
    if settings.sparse_code == "on" and mesh.size > 1:
        raise UserError(
            f"sparse_code: on needs a single device, but the mesh has {mesh.size}; "
            "use mesh: data=1, or sparse_code: auto."
        )
    if settings.sparse_code != "auto":
        return settings.sparse_code == "on"
    on_cpu = isinstance(mesh, Mesh) and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return on_cpu and 0 < shape.k <= SPARSE_SHARE * shape.features


def takes_turns(settings: TrainConfig, shape: TranscoderConfig, mesh: Mapping[str, int]) -> bool:
    """Returns whether the sites of a device take their step one after another, see `settings.sites_at_once`."""
    if settings.sites_at_once != "auto":
        return settings.sites_at_once == "one"
    return 4 * settings.batch * shape.features / (mesh["data"] * mesh["feature"]) > TOGETHER_BYTES


def encoders_on_host(settings: TrainConfig, platform: str) -> bool:
    """Returns whether the text encoders lie on the host between uses, see `settings.text_encoders`."""
    return platform != "cpu" if settings.text_encoders == "auto" else settings.text_encoders == "host"


def row_flops(shape: TranscoderConfig, recipe: Recipe) -> int:
    """Counts the operations of a row's products with encoder and decoder; FiLM, skip and `aux` are left out.

    Args:
        shape: of the transcoder.
        recipe: of the step.
    """
    # Encoder and decoder forward, and three products backward; one more, to x, where FiLM learns from it.
    products = 5 + (shape.conditioning != "none")
    if recipe.objective.sparse:
        return 2 * shape.d_model * shape.features + products * (shape.d_model + shape.d_model_out) * shape.k
    return products * (shape.d_model + shape.d_model_out) * shape.features
