"""Schedules of noise levels, as diffusers' `FlowMatchEulerDiscreteScheduler` is configured."""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import AllowList, read_attributes
from difffract_jax.config import UserError
from difffract_jax.models.sampler import SchedulerConfig

CLASS = "FlowMatchEulerDiscreteScheduler"
RESPACINGS = ("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas")
"""Attributes of which at most one is set: how levels lie between their ends."""
SCHEDULER = AllowList(
    component="scheduler",
    read={
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "num_train_timesteps": 1000,
        **dict.fromkeys(RESPACINGS, False),
    },
    fixed={
        "_class_name": (CLASS,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "stochastic_sampling": (False,),
        "time_shift_type": ("exponential",),
        **dict.fromkeys(RESPACINGS, (False, True)),
    },
    inert=frozenset(("_diffusers_version",)),
)
"""What is understood of every model's."""


def scheduler_config_from_diffusers(attributes: Mapping[str, object]) -> SchedulerConfig:
    """Reads the configuration of a `FlowMatchEulerDiscreteScheduler`.

    Args:
        attributes: the contents of its `scheduler_config.json`.

    Raises:
        UserError: naming every attribute that is not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, SCHEDULER)
    chosen = [name for name in RESPACINGS if read[name]]
    if len(chosen) > 1:
        raise UserError(
            f"The scheduler has {' and '.join(chosen)}, of which one alone can be true; correct its "
            "scheduler_config.json."
        )
    return SchedulerConfig(**read)
