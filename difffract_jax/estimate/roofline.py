"""How long a program takes at least: the slowest of its products, memory, links and host, at a chip's peak rates.

A collective over n chips in a line, whose result has B bytes on each; w bytes per second on a link in one direction:

    all-gather, reduce-scatter   B (n - 1) / (n w)         all-to-all           B n / (4 w): what crosses the middle
    all-reduce                   twice that                collective-permute   B / w

Where the line closes to a ring, half of that, but for the permutation; and a microsecond for each hop to the farthest
chip. One axis of a mesh is taken to lie along one line of links: one that lies across several sides of a slice may do
better.
"""

from typing import NamedTuple

from difffract_jax.estimate.step_model import Cost
from difffract_jax.transcoders.chips import HOP, Chip, closes, hosts_of
from difffract_jax.transcoders.compiled import Collective

HOST_PROMPTS = 900.0
"""Prompts per second that a process prepares: tokens of both encoders, twice, and which rows a site keeps. Measured on
one core, with a vocabulary of 32,000 pieces, 40 words a prompt and rows of three groups at 4 steps of 512 px. Hosts
share the prompts out."""


class Seconds(NamedTuple):
    """How long each resource is busy.

    Attributes:
        compute: products.
        memory: between a chip's memory and what computes.
        network: links between chips, and for checkpoints the data centre's.
        host: the host, and its way to its chips.
    """

    compute: float
    memory: float
    network: float
    host: float

    @property
    def longest(self) -> float:
        """The program takes no less."""
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def price(cost: Cost, chip: Chip, chips: int) -> Seconds:
    """Returns how long a program takes on a slice, by resource.

    Args:
        cost: of one chip.
        chip: of the slice.
        chips: how many it has.
    """
    network = sum(one.times * exchange_seconds(one, chip, chips) for one in cost.exchanged)
    host = max(cost.sent / chip.host_rate, cost.prompts / hosts_of(chip, chips) / HOST_PROMPTS)
    return Seconds(cost.flops / chip.flops, cost.traffic / chip.hbm_rate, network, host)


def exchange_seconds(one: Collective, chip: Chip, chips: int) -> float:
    """Returns how long a collective takes once.

    Example:
        >>> from difffract_jax.transcoders.chips import CHIPS
        >>> round(1e3 * exchange_seconds(Collective("all-gather", 16, 10**8), CHIPS["v5e"], 256), 2)  # a ring of 16
        0.95
        >>> round(1e3 * exchange_seconds(Collective("all-gather", 8, 10**8), CHIPS["v5e"], 8), 2)  # a line of 8
        1.76
    """
    n = one.devices
    if n < 2:
        return 0.0
    ring = closes(chip, chips, n)
    hops = n // 2 if ring else n - 1
    rate = chip.link_rate * (2 if ring else 1)
    match one.kind:
        case "all-reduce":
            busiest, hops = 2 * one.bytes * (n - 1) / n, 2 * hops
        case "all-to-all":
            busiest = one.bytes * n / 4  # what crosses the middle of a line in one direction
        case "collective-permute":
            busiest, rate, hops = float(one.bytes), chip.link_rate, 1
        case _:
            busiest = one.bytes * (n - 1) / n
    return busiest / rate + hops * HOP
