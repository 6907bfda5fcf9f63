"""Several processes as one run: what each of them does, what the first alone does, and how all learn of it.

1. `join_processes` makes this process one of several, each with devices of its own. From then on `jax.devices()` are
   those of all, and every process runs the same program on the same host data; XLA moves what has to move.
2. The directory of the run is shared. Orbax writes each process's part of a checkpoint; everything else is written by
   the first process, under `together`, so that all go on or all stop with the same sentence.

With a single process nothing here communicates.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from difffract_jax.config import UserError, sentence_of
from difffract_jax.sharding import initialize_distributed

LONGEST = 2000
"""Bytes of a sentence that all processes are told."""


def join_processes(text: str) -> None:
    """Joins this process to the others; to be called before anything else uses JAX.

    Args:
        text: `auto` on a TPU pod or under Slurm, where JAX finds the others; elsewhere `HOST:PORT,NUMBER,PROCESSES`:
            where process 0 listens, this process's number from 0, and how many there are.

    Raises:
        UserError: if it is neither, or the others cannot be found.
    """
    address, *numbers = text.split(",")
    explicit = ":" in address and len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    if text != "auto" and not (explicit and int(numbers[0]) < int(numbers[1])):
        raise UserError(
            f"`--join {text}` names no processes; write auto, or HOST:PORT,NUMBER,PROCESSES as in host:1234,0,2."
        )
    try:
        if explicit:
            initialize_distributed(address, int(numbers[1]), int(numbers[0]))
        else:
            initialize_distributed()
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The processes could not be joined ({said}); write --join HOST:PORT,NUMBER,PROCESSES."
        ) from None


def is_first() -> bool:
    """Says whether this is the process that speaks and writes for all."""
    return jax.process_index() == 0


def together(work: Callable[[], Any]) -> None:
    """Does work in the first process while the others wait.

    Raises:
        UserError: in every process, if the first could not do it.
    """
    if jax.process_count() == 1:
        work()
        return
    told = np.zeros(LONGEST, np.uint8)
    if is_first():
        try:
            work()
        except (ValueError, OSError) as error:
            said = np.frombuffer(sentence_of(error).encode(), np.uint8)[:LONGEST]
            told[: said.size] = said
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    if told.any():
        raise UserError(told[told > 0].tobytes().decode(errors="ignore"))


def everywhere(good: bool) -> bool:
    """Says whether something is so in every process; each must ask."""
    return good if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(good))))


def whole(tree: Any) -> Any:
    """Returns a tree whose arrays every process can read in full: on the host, if other processes hold parts."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)
