"""Schedules of noise levels, as diffusers' `FlowMatchEulerDiscreteScheduler` is configured."""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import AllowList, read_attributes
from difffract_jax.models.sampler import ChromaSchedulerConfig, SchedulerConfig

CLASS = "FlowMatchEulerDiscreteScheduler"
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
    },
    fixed={
        "_class_name": (CLASS,),
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "stochastic_sampling": (False,),
        "time_shift_type": ("exponential",),
        "use_beta_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_karras_sigmas": (False,),
    },
    inert=frozenset(("_diffusers_version",)),
)
"""What is understood of FLUX.1's, FLUX.2's and Stable Diffusion 3's."""
_BETA = "use_beta_sigmas"
CHROMA_SCHEDULER = SCHEDULER._replace(
    read=dict(SCHEDULER.read) | {_BETA: False},
    fixed={name: values for name, values in SCHEDULER.fixed.items() if name != _BETA} | {_BETA: (False, True)},
)
"""What is understood of Chroma's."""


def scheduler_config_from_diffusers(attributes: Mapping[str, object]) -> SchedulerConfig:
    """Reads the configuration of a `FlowMatchEulerDiscreteScheduler`.

    Args:
        attributes: the contents of its `scheduler_config.json`.

    Raises:
        UserError: naming every attribute that is not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, SCHEDULER)
    return SchedulerConfig(**read)


def chroma_scheduler_from_diffusers(attributes: Mapping[str, object]) -> ChromaSchedulerConfig:
    """Reads the configuration of Chroma's `FlowMatchEulerDiscreteScheduler`, which may respace its levels.

    Args:
        attributes: the contents of its `scheduler_config.json`.

    Raises:
        UserError: naming every attribute that is not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, CHROMA_SCHEDULER)
    return ChromaSchedulerConfig(**read)
