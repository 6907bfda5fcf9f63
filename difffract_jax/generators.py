"""Seeds of 64 bits, all of which count: from a seed to NumPy's generator; what needs no JAX.

`random_generator` gives NumPy the lower half, the numbers of a draw, and the upper half in a place of its own. In a
list, `[2**32 + 5, 0]` and `[5, 1]` are the same words to NumPy, and draw the same numbers. Seeds below 2**32 draw what
`numpy.random.default_rng([seed, ...])` draws.
"""

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from difffract_jax.config import SEEDS, UserError

HALF_BITS = 32
LOW_HALF = 2**HALF_BITS - 1
"""Mask of a seed's lower half."""


def check_seed(seed: Any) -> int:
    """Returns a seed as a Python integer.

    Args:
        seed: a whole number, NumPy's too.

    Raises:
        UserError: unless it is one in [0, 2**64).
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < SEEDS:
        raise UserError(f"A seed must be a whole number from 0 to 2**64 - 1 = {SEEDS - 1}, but got {seed}.")
    return number


def check_distinct(seeds: Sequence[int]) -> None:
    """Refuses a list that names a seed twice: its images would be counted as two independent ones.

    Args:
        seeds: of the starting noise.

    Raises:
        UserError: naming the seeds that occur more than once.
    """
    twice = [seed for seed, times in Counter(map(check_seed, seeds)).items() if times > 1]
    if twice:
        names = ", ".join(map(str, twice))
        raise UserError(f"Every seed must be given once, but {names} occurs more than once; leave the others out.")


def random_generator(seed: int, *numbers: int) -> np.random.Generator:
    """Returns NumPy's generator of one draw of a seed; arguments as for `seed_words`."""
    return np.random.default_rng(seed_words(seed, *numbers))


def seed_words(seed: int, *numbers: int) -> np.random.SeedSequence:
    """Returns what NumPy makes a generator of.

    Args:
        seed: not negative; the sum of a seed and a constant may exceed 64 bits.
        numbers: up to three, each below 2**32, that tell the draws of a seed apart.

    Raises:
        UserError: if the seed is negative.
    """
    number = operator.index(seed)
    if number < 0:
        check_seed(number)
    upper = number >> HALF_BITS
    # NumPy fills the list up to four words before it appends the key.
    return np.random.SeedSequence([number & LOW_HALF, *numbers], spawn_key=(upper,) if upper else ())
