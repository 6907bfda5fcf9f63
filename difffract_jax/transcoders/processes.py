"""Several processes as one run: what each of them does, what the first alone does, and how all learn of it.

1. `join_processes` makes this process one of several, each with devices of its own. From then on `jax.devices()` are
   those of all, and every process runs the same program.
2. `divided` shares numbered work out: process p of n does numbers p, p + n, p + 2n, ..., and all get all results, in
   the order of the numbers. `placed` makes an array that is spread over all devices, of which each process makes the
   parts of its own devices alone; `own_places` says which those are.
3. What a process does for all happens under `together`, in the first one, or under `jointly`, in each: then all go on,
   or all stop with one sentence, which the first tells.
4. `check_alike` compares what must be the same everywhere, `check_shared` whether all see one directory.

With a single process nothing here communicates.
"""

import json
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from difffract_jax.config import SharedError, UserError, sentence_of
from difffract_jax.sharding import initialize_distributed
from difffract_jax.transcoders import deadlines

T = TypeVar("T")


def join_processes(text: str) -> None:
    """Joins this process to the others; to be called before anything else uses JAX.

    Args:
        text: `auto` on a TPU pod or under Slurm, where JAX finds the others; elsewhere `HOST:PORT,NUMBER,PROCESSES`:
            where process 0 listens, this process's number from 0, and how many there are.

    Raises:
        UserError: if it is neither, or the others cannot be found.
        RuntimeError: if JAX tells that not all have come in time; most releases end the process instead (`deadlines`).
    """
    address, *numbers = text.split(",")
    explicit = ":" in address and len(numbers) == 2 and all(number.isdecimal() for number in numbers)
    if text != "auto" and not (explicit and int(numbers[0]) < int(numbers[1])):
        raise UserError(
            f"`--join {text}` names no processes; write auto, or HOST:PORT,NUMBER,PROCESSES as in host:1234,0,2."
        )
    try:
        if explicit:
            initialize_distributed(address, int(numbers[1]), int(numbers[0]), seconds=deadlines.START_UP)
        else:
            initialize_distributed(seconds=deadlines.START_UP)
    except (ValueError, RuntimeError) as error:
        if deadlines.is_deadline(str(error)):
            raise
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
    jointly(work if is_first() else lambda: None)


def jointly(work: Callable[[], Any]) -> None:
    """Does work in every process, and waits for all.

    Raises:
        UserError: in every process, if one could not do it; of several, the sentence of the first.
    """
    if jax.process_count() == 1:
        work()
        return
    sentence = ""
    try:
        work()
    except (ValueError, OSError) as error:
        sentence = sentence_of(error)
    told = [each for each in texts(sentence) if each]
    if told:
        raise SharedError(told[0], speaks=is_first())


def everywhere(good: bool) -> bool:
    """Says whether something is so in every process; each must ask."""
    return all(bool(each) for each in gathered(np.array(good)))


def whole(tree: Any) -> Any:
    """Returns a tree whose arrays every process can read in full: on the host, if other processes hold parts."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


def gathered(tree: Any) -> list[Any]:
    """Returns, by process, what each has given: trees of arrays of the same shapes and types, bit for bit, on the host.

    Args:
        tree: of this process; of NumPy's arrays, or of arrays that it can read in full.
    """
    if jax.process_count() == 1:
        return [tree]
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # As bytes, since JAX would round float64 to float32 on its way.
    raw = np.concatenate([np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8) for leaf in leaves])
    ends = np.cumsum([leaf.nbytes for leaf in leaves])[:-1]
    trees = []
    for row in np.asarray(multihost_utils.process_allgather(raw)):
        parts = zip(leaves, np.split(row, ends), strict=True)
        arrays = [np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape) for leaf, part in parts]
        trees.append(jax.tree.unflatten(structure, arrays))
    return trees


def texts(text: str) -> list[str]:
    """Returns, by process, the text that each has given."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = [int(size) for size in gathered(np.array(raw.size))]
    if not any(sizes):
        return [""] * len(sizes)
    padded = np.zeros(max(sizes), np.uint8)
    padded[: raw.size] = raw
    return [row[:size].tobytes().decode() for row, size in zip(gathered(padded), sizes, strict=True)]


def divided(count: int, work: Callable[[int], T]) -> Iterator[T]:
    """Shares numbered work out, and yields all results in every process, in the order of the numbers.

    Args:
        count: the numbers are 0 to count - 1.
        work: makes the result of one: a tree of arrays, in every case of the same shapes and types.
    """
    processes = jax.process_count()
    for first in range(0, count, processes):
        # Who has nothing left does the last again: the others' results have to be waited for anyway.
        mine = work(min(first + jax.process_index(), count - 1))
        yield from gathered(mine)[: count - first]


def own_places(count: int, sharding: Any) -> list[int]:
    """Returns which of `count` things, spread along the first axis, lie on this process's devices.

    Args:
        count: how many there are.
        sharding: of the first axis; None for all on every process.
    """
    if sharding is None:
        return list(range(count))
    slices = [index[0] for index in sharding.addressable_devices_indices_map((count,)).values()]
    return sorted({place for each in slices for place in range(count)[each]})


def placed(shape: tuple[int, ...], sharding: Any, part: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """Returns an array on the devices that a sharding names; each process makes the parts of its own alone.

    Args:
        shape: of the whole array.
        sharding: where it goes; None for the default device.
        part: makes a part of it, given a slice for every axis, each with its beginning and end.
    """
    if sharding is None:
        return jax.device_put(part(tuple(slice(0, size) for size in shape)))
    made: dict[str, np.ndarray] = {}

    def callback(index: tuple[slice, ...]) -> np.ndarray:
        full = tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True))
        if str(full) not in made:
            made[str(full)] = part(full)
        return made[str(full)]

    return jax.make_array_from_callback(shape, sharding, callback)


def check_alike(facts: Mapping[str, str], what: str) -> None:
    """Compares facts that must be the same in every process.

    Args:
        facts: name -> value, as text.
        what: what is compared, for the sentence, as in `settings or versions`.

    Raises:
        UserError: in every process, if one differs from the first; it names all differences.
    """
    if jax.process_count() == 1:
        return
    every = [json.loads(text) for text in texts(json.dumps(dict(facts)))]
    differences = []
    for name in dict.fromkeys(name for one in every for name in one):
        by_value: dict[str, list[int]] = {}
        for number, one in enumerate(every):
            by_value.setdefault(one.get(name, "missing"), []).append(number)
        if len(by_value) > 1:
            said = ", ".join(f"{value} in {_numbers(numbers)}" for value, numbers in by_value.items())
            differences.append(f"{name} is {said}")
    if differences:
        raise SharedError(
            f"The processes have different {what}: {'; '.join(differences)}; start all of them with the same.",
            speaks=is_first(),
        )


def check_shared(directory: Path) -> None:
    """Compares whether every process sees what the first one writes in a directory.

    Args:
        directory: that the first process has made.

    Raises:
        UserError: in every process, if one does not see it.
    """
    if jax.process_count() == 1:
        return
    mark = directory / f".{texts(secrets.token_hex(8))[0]}.seen"  # of a new name, which no host remembers as absent
    together(mark.touch)
    try:
        jointly(lambda: _check_seen(mark))
    finally:
        if is_first():
            mark.unlink(missing_ok=True)


def _check_seen(mark: Path) -> None:
    if not mark.is_file():
        raise UserError(
            f"Process {jax.process_index()} on {socket.gethostname()} does not see what the first process writes to "
            f"{mark.parent}; name an `out` on a disk that all hosts share, by its whole path."
        )


def _numbers(numbers: list[int]) -> str:
    """Returns numbers of processes as words, consecutive ones shortened."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"process {parts[0]}" if len(numbers) == 1 else f"processes {', '.join(parts)}"
