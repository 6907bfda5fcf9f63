"""Devices by name, and how much of their memory a command may use.

1. A size, `24GB`, is a GPU of that memory; `h100`, `a100-40` or `rtx4090` one by its name; `v5e:2x4` a slice of a TPU
   pod; `host:16GB` a machine whose processor computes, `host` this one.
2. JAX takes a share of a GPU's memory when it starts, `GPU_SHARE`, as the commands set it; what is left is for the
   driver's own needs. A TPU's is what its compiler lets a program use.
"""

import re
from difflib import get_close_matches
from typing import NamedTuple

from difffract_jax.config import UserError
from difffract_jax.memory import GPU_SHARE, host_memory, parse_bytes
from difffract_jax.transcoders.plan import GIB, HBM, SHAPES

GPUS = {
    "t4": 15_360,
    "v100-16": 16_384,
    "v100-32": 32_768,
    "a10": 23_028,
    "a100-40": 40_960,
    "a100-80": 81_920,
    "l4": 23_034,
    "l40s": 46_068,
    "h100": 81_559,
    "h200": 143_771,
    "gh200": 97_871,
    "b200": 183_359,
    "rtx3090": 24_576,
    "rtx4080": 16_376,
    "rtx4090": 24_564,
    "rtx5090": 32_607,
    "rtx6000-ada": 49_140,
}
"""GPU -> MiB of its memory, as its driver tells."""


class Place(NamedTuple):
    """Where a command shall run.

    Attributes:
        name: as it was given.
        kind: `gpu`, `tpu` or `host`.
        chips: how many; of GPUs and hosts one.
        usable: bytes of one that a command may use.
    """

    name: str
    kind: str
    chips: int
    usable: int


def read_place(name: str) -> Place:
    """Reads a device as it is written, see the module.

    Args:
        name: `24GB`, `h100`, `v5e:2x4`, `host:16GB`, `host`.

    Raises:
        UserError: if it is none of these.

    Example:
        >>> read_place("v5e:2x4")[:3], read_place("24GB").usable
        (('v5e:2x4', 'tpu', 8), 22080000000)
    """
    first, _, rest = name.strip().lower().partition(":")
    if first == "host":
        return Place(name, "host", 1, parse_bytes(rest, "--device host") if rest else host_memory().available)
    if first in HBM:
        shape = rest or SHAPES[first].partition(":")[2]
        if not re.fullmatch(r"\d+(x\d+)+", shape):
            raise UserError(f"--device {name} names no slice of a pod; write chip and shape, as in {SHAPES[first]}.")
        chips = 1
        for side in shape.split("x"):
            chips *= int(side)
        return Place(f"{first}:{shape}", "tpu", chips, round(HBM[first] * GIB))
    if first in GPUS and not rest:
        return Place(first, "gpu", 1, round(GPU_SHARE * GPUS[first] * 2**20))
    if re.match(r"[\d.]", first) and not rest:
        return Place(name, "gpu", 1, round(GPU_SHARE * parse_bytes(name, "--device")))
    close = get_close_matches(first, (*GPUS, *HBM, "host"), n=1)
    hint = f"; did you mean `{close[0]}`?" if close else "."
    raise UserError(
        f"--device {name} is not a device: give a memory as in 24GB, a GPU ({', '.join(GPUS)}), a slice of a TPU pod "
        f"as in v5e:2x4, or host:16GB{hint}"
    )
