"""How often Python looks for objects that hold one another in a circle, while a command runs.

1. Imports and tracing make hundreds of thousands of objects that stay. By its own settings Python looks through them a
   thousand times, a tenth of what `validate` computes on the organism; `seldom` has it look a tenth as often.
2. An array in a circle is held until then. Of a small model that is nothing; `often_if_large` goes back to Python's
   settings where a model is large.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from difffract_jax.cli.commands import WITHOUT_JAX

BRIEF = (*WITHOUT_JAX, "demo", "generate", "trace", "steer", "features", "heads", "effects", "validate")
"""Commands that open their model by `opening.open_model`, or none."""
SELDOM = 10_000
"""New objects after which Python looks; its own setting is 700."""
LARGE = 2**28
"""Bytes of a model's weights from which on memory counts for more than time."""
_OWN = gc.get_threshold()


@contextmanager
def seldom(command: str) -> Iterator[None]:
    """Lets Python look seldom while a command of `BRIEF` runs; of others nothing changes.

    Args:
        command: its name.
    """
    if command not in BRIEF:
        yield
        return
    before = gc.get_threshold()
    gc.set_threshold(max(SELDOM, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def often_if_large(nbytes: int) -> None:
    """Goes back to Python's own settings for the rest of a command.

    Args:
        nbytes: of the weights of the command's model.
    """
    if nbytes >= LARGE:
        gc.set_threshold(*_OWN)
