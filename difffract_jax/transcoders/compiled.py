"""What a compiled program says of itself, or the compiler of one that it refused: memory, operations, communication.

Bytes are those of one chip.
"""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?!= ).*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](\d+))\[([\d,]*)\]")
_TOLD = re.compile(r"(HLO temporaries|Used) \(?([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_unkept(lowered: Any) -> Any:
    """Compiles a program without writing it to JAX's compilation cache, which could not read it back without the chip.

    Args:
        lowered: what `jax.jit`'s `lower` returns.
    """
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, before)


def memory_of(compiled: Any) -> dict[str, Any]:
    """Returns bytes and operations of a compiled program on one chip."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = given + returned + temporaries + memory.generated_code_size_in_bytes
    names = {"arguments": given, "outputs": returned, "temporaries": temporaries, "peak": peak}
    return names | {"compiled_flops": costs.get("flops")}


def memory_asked(message: str, arguments: int) -> dict[str, int]:
    """Returns what a program would have needed that the compiler refused for want of memory, as far as it says so.

    Args:
        message: of the compiler.
        arguments: bytes of what the program is given.
    """
    said = {what: round(float(size) * _UNITS[unit]) for what, size, unit in _TOLD.findall(message)}
    if "Used" in said:
        return {"arguments": arguments, "temporaries": said["Used"] - arguments, "peak": said["Used"]}
    if "HLO temporaries" in said:
        temporaries = said["HLO temporaries"]
        return {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries}
    return {}


class Collective(NamedTuple):
    """An operation that moves data between chips.

    Attributes:
        kind: as in `all-reduce`.
        devices: that exchange data with one another; 0 if all do or the program does not say.
        bytes: of its result on one chip.
        times: how often a program runs it.
    """

    kind: str
    devices: int
    bytes: int
    times: int = 1


def communication(program: str) -> dict[str, dict[str, int]]:
    """Returns how many operations of each kind move data between chips, and the bytes of their results.

    Args:
        program: the compiled program's text, the part of one chip. What lies in a loop counts once.
    """
    kinds: dict[str, dict[str, int]] = {}
    for line in program.splitlines():
        for one in _collective(line):
            counts = kinds.setdefault(one.kind, {"operations": 0, "bytes": 0})
            counts["operations"] += 1
            counts["bytes"] += one.bytes
    return dict(sorted(kinds.items()))


def collectives(program: str) -> list[Collective]:
    """Returns the operations that move data between chips, with how often each runs.

    What a loop repeats counts as often as its turns, where the program says how many; else, and in branches, once.

    Args:
        program: the compiled program's text, the part of one chip.

    Example:
        >>> collectives("ENTRY %main {\\n %a = f32[8]{0} all-reduce(%b), replica_groups={{0,1},{2,3}}\\n}")
        [Collective(kind='all-reduce', devices=2, bytes=32, times=1)]
    """
    bodies, entry = _computations(program)
    runs, waiting = Counter({entry: 1}), [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        for line in bodies.get(name, ()):
            for called, turns in _calls(line):
                runs[called] += times * turns
                waiting.append((called, times * turns))
    return [
        one._replace(times=runs[name])
        for name, lines in bodies.items()
        if runs[name]
        for line in lines
        for one in _collective(line)
    ]


def moved(operations: list[Collective]) -> dict[str, int]:
    """Returns kind -> bytes of the results of all its operations, each as often as it runs."""
    total: Counter[str] = Counter()
    for one in operations:
        total[one.kind] += one.bytes * one.times
    return dict(sorted(total.items()))


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation by its name, and the name of the one that begins."""
    bodies: dict[str, list[str]] = {"": []}
    name = entry = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line.strip())
        if header is not None:
            name = header[2]
            entry = name if header[1] else entry
            bodies[name] = []
        bodies[name].append(line)
    return bodies, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction runs, and how often."""
    loop = _LOOP.search(line)
    if loop is not None:
        turns = _TRIPS.search(line)
        yield loop[2], int(turns[1]) if turns else 1
        return
    branches = _BRANCHES.search(line)
    names = [] if branches is None else branches[1].replace("%", "").split(", ")
    yield from ((name, 1) for name in (*names, *_CALLED.findall(line)))


def _collective(line: str) -> Iterator[Collective]:
    """Yields the collective operation of an instruction, if it is one that moves anything."""
    match = _COLLECTIVE.search(line)
    devices = 0 if match is None else _devices(line)
    if match is None or devices == 1:
        return
    parts = [
        prod(map(int, filter(None, shape.split(",")))) * (WIDTHS.get(name) or max(1, int(bits) // 8))
        for name, bits, shape in _ARRAY.findall(match[1])
    ]
    # An operation in two halves returns its operand beside the result; the larger of the two is what moves. Where one
    # operation reduces or exchanges several arrays, all of them do.
    whole = match[2] in ("all-reduce", "all-to-all")
    yield Collective(match[2], devices, sum(parts) if whole else max(parts, default=0))


def _devices(line: str) -> int:
    """Returns how many devices exchange data with one another; 0 if an instruction does not say."""
    mesh, counted, listed = (form.search(line) for form in (_MESH_GROUPS, _COUNTED_GROUPS, _LISTED_GROUPS))
    if mesh is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        return prod(sizes[axis] for axis in re.findall(r"'([^']+)'", mesh[2]))
    if counted is not None:
        return int(counted[2])
    return 0 if listed is None else len(listed[1].split(","))


def bytes_per_chip(tree: Any, shardings: Any = None) -> int:
    """Returns the bytes of a tree's arrays that one chip holds.

    Args:
        tree: of arrays, or their shapes.
        shardings: of its arrays; left out, their own, and arrays without one are whole.
    """
    leaves = jax.tree.leaves(tree)
    places = [getattr(leaf, "sharding", None) for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    return sum(
        prod(leaf.shape if place is None else place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )
