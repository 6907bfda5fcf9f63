"""How trees of arrays show themselves: what they come to, never the numbers."""

from typing import Any

import jax

from difffract_jax.display import arrays_text


def tree_text(tree: Any) -> str:
    """Returns how many numbers a tree holds, of which types, and how many bytes."""
    return arrays_text(jax.tree.leaves(tree))


def brief(self: Any) -> str:
    """Returns a class and what its arrays come to; the `__repr__` of modules and records that hold arrays.

    Example:
        >>> import numpy as np
        >>> brief((np.zeros(3, np.float32), None))
        'tuple: 3 float32; 12 B'
    """
    return f"{type(self).__name__}: {tree_text(self)}"
