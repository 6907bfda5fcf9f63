"""TPU chips as their maker describes them: rates, memory, links and the slices that there are.

1. `CHIPS` is the table. Google Cloud's pages on each chip ("TPU v5e", "TPU v5p", "TPU v6e") state 197, 459 and 918
   TFLOP/s of bfloat16; 819, 2,765 and 1,638 GB/s between memory and what computes; 400, 1,200 and 800 GB/s of links a
   chip, both directions together, over 4, 6 and 4 ports. One link in one direction has 50, 100 and 100 GB/s.
2. The data centre's network: a host of v5e has 2 x 100 Gb/s for its 8 chips, of v6e 4 x 200 Gb/s (page "TPU v6e"); v5p
   has 50 Gb/s a chip, 4 chips a host. No slice of the table needs it between chips; checkpoints go through it.
3. From a host to each of its chips: 16 GB/s, of v6e 32 GB/s; and about a microsecond for a hop between chips (Austin et
   al., "How to Scale Your Model", chapter on TPUs).
4. A side of a slice closes to a ring where it has 16 chips (v5e, v6e); of v5p every side that is a multiple of 4 does
   in slices of at least a cube of 4 x 4 x 4. Else its links are those of a line.
5. What the compiler lets a program use of a chip's memory is libtpu's own answer, less than is sold: 16, 95 and 32 GB.
6. Of the one step that was compiled for v6e (v6e:2x4) libtpu held about a third of the state twice.

Rates are those that the maker states and no program exceeds.
"""

import math
from typing import NamedTuple

from difffract_jax.config import UserError, nearest

GIB = 2**30
HOP = 1e-6
"""Seconds that a message takes from a chip to the next, however short it is."""


class Chip(NamedTuple):
    """A kind of chip.

    Attributes:
        name: as in `v5e`.
        hbm: bytes of its memory that a program may use.
        flops: bfloat16 operations per second of its products.
        hbm_rate: bytes per second between its memory and what computes.
        link_rate: bytes per second of one link in one direction.
        network_rate: bytes per second of a host's way to the data centre.
        host_rate: bytes per second from a host to one of its chips.
        host_chips: chips of a full host.
        ring_from: length from which a side of a slice closes to a ring.
        slices: number of chips -> shape of the slice.
        state_copied: share of a training's state that its compiler holds twice in a step.
    """

    name: str
    hbm: int
    flops: float
    hbm_rate: float
    link_rate: float
    network_rate: float
    host_rate: float
    host_chips: int
    ring_from: int
    slices: dict[int, str]
    state_copied: float = 0.0


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SOLID = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_SOLID |= {512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", round(15.75 * GIB), 197e12, 819e9, 50e9, 25e9, 16e9, 8, 16, _FLAT),
        Chip("v5p", round(95.74 * GIB), 459e12, 2765e9, 100e9, 25e9, 16e9, 4, 4, _SOLID),
        Chip("v6e", round(31.25 * GIB), 918e12, 1638e9, 100e9, 100e9, 32e9, 8, 16, _FLAT, 1 / 3),
    )
}


def chip_named(name: str) -> Chip:
    """Returns a chip of the table.

    Raises:
        UserError: if it has none of that name.
    """
    if name not in CHIPS:
        raise UserError(f"`{name}` is not a chip{nearest(name, tuple(CHIPS))}")
    return CHIPS[name]


def slice_named(chip: Chip, chips: int) -> str:
    """Returns the name of a slice of some chips, `v5e:4x8`.

    Raises:
        UserError: if there is none of that size.

    Example:
        >>> slice_named(CHIPS["v5p"], 16)
        'v5p:2x2x4'
    """
    if chips not in chip.slices:
        raise UserError(
            f"There is no slice of {chips} chips of {chip.name}; there are {', '.join(map(str, chip.slices))}."
        )
    return f"{chip.name}:{chip.slices[chips]}"


def closes(chip: Chip, chips: int, length: int) -> bool:
    """Says whether a line of chips along an axis of a mesh is taken to close to a ring.

    Args:
        chip: of the slice.
        chips: of the slice.
        length: chips along the axis.
    """
    sides = [int(side) for side in chip.slices[chips].split("x")]
    rings = [side for side in sides if side >= chip.ring_from and (chip.ring_from >= 16 or min(sides) >= 4)]
    return any(length % side == 0 for side in rings)


def hosts_of(chip: Chip, chips: int) -> int:
    """Returns how many hosts a slice has."""
    return math.ceil(chips / chip.host_chips)
