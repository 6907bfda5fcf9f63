"""A sweep of sparsity: one run of transcoders and one of SAEs for every number of active features wanted.

    out/transcoder-4, out/sae-4, out/transcoder-8 ...     runs of `train`, otherwise alike
    out/report                                            what `evaluate` finds of all of them

A sweep that stops goes on where it was: a finished run is left alone, one that has begun is resumed.
"""

from typing import Literal

from difffract_jax.config import UserError
from difffract_jax.transcoders.run_place import SETTINGS, has, is_finished
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.training import check_directory

ROLES: tuple[Literal["transcoder", "sae"], ...] = ("transcoder", "sae")


def parse_ks(text: str) -> list[int]:
    """Reads `2,4,8` as numbers of active features, in ascending order."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"`--k {text}` names no numbers of active features; write them as in 2,4,8,16.")
    return sorted({int(part) for part in parts})


def sweep_settings(base: TrainConfig, ks: list[int]) -> list[TrainConfig]:
    """Returns the settings of every run of a sweep; their directories lie in that of `base`.

    Raises:
        UserError: if the activation cannot be told how many features shall be active.
    """
    if base.activation == "relu":
        raise UserError("--k sweeps topk, batchtopk and jumprelu; relu's sparsity follows from l1: train runs by hand.")
    knob, kind = ("target_l0", float) if base.activation == "jumprelu" else ("k", int)
    changes = ({"role": role, "out": base.out / f"{role}-{k}", knob: kind(k)} for k in ks for role in ROLES)
    return [base.model_copy(update=change) for change in changes]


def is_begun(settings: TrainConfig) -> bool:
    """Says whether a run is there to be resumed."""
    return has(settings.out, SETTINGS)


def is_done(settings: TrainConfig) -> bool:
    """Says whether a run is there and finished.

    Raises:
        UserError: if it was made with other settings.
    """
    if is_begun(settings):
        check_directory(settings, resume=True)
    return is_finished(settings.out)
