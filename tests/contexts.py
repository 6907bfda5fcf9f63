"""One MLIR context for many programs, in place of one for each, which is most of what a small program costs.

Before JAX compiles a program, or looks for it in the cache, it makes an MLIR context and loads all dialects into it:
3.5 ms of processor time, and 1 ms more to free it, for each of the tens of thousands of programs of a run, most of them
a single operation. A context may hold any number of modules; what it keeps of each is small. It is changed now and then
all the same, so that it does not grow without bound.

This replaces a function of JAX that is not public. Where a release of JAX lacks it, nothing is replaced, the tests take
longer, and `test_contexts.py` says so. What is lowered stays the same to the letter, and so do the keys of the
compilation cache.
"""

import threading
from collections.abc import Callable
from typing import Any

from jax._src.interpreters import mlir

MODULES = 2_000
"""How many programs share a context."""


class Reused:
    """Gives the main thread what `make` makes, the same one `uses` times in a row; other threads get their own.

    Two threads may not change one context, says JAX of the dialects in it; and others go on while one compiles.
    """

    def __init__(self, make: Callable[[], Any], uses: int = MODULES) -> None:
        self.make, self.uses = make, uses
        self.made: Any = None
        self.given = 0

    def __call__(self) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return self.make()
        if self.given % self.uses == 0:
            self.made = self.make()
        self.given += 1
        return self.made


def share() -> None:
    """Lets the programs of this process share contexts."""
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = Reused(mlir.make_ir_context)
