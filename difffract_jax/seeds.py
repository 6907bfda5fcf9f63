"""Seeds of 64 bits, all of which count: from a seed to JAX's key.

`random_key` puts the upper and the lower half of a seed into the two words of a Threefry key. `jax.random.key` drops
the upper half unless x64 is enabled, so that seeds that differ by 2**32 would draw the same numbers. Seeds below 2**32
draw what `jax.random.key(seed)` draws. NumPy's generators come from `generators`.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from difffract_jax.generators import HALF_BITS, LOW_HALF, check_seed


def random_key(seed: int) -> Key[Array, ""]:
    """Returns JAX's key of a seed, the same whether x64 is enabled or not.

    Args:
        seed: in [0, 2**64).

    Raises:
        UserError: if it lies outside.

    Example:
        >>> jax.random.key_data(random_key(2**32 + 5)).tolist()
        [1, 5]
    """
    number = check_seed(seed)
    words: Any = np.array([number >> HALF_BITS, number & LOW_HALF], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
