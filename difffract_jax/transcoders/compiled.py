"""What a compiled program says of itself, or the compiler of one that it refused: memory, operations, communication.

Bytes are those of one chip.
"""

import re
from math import prod
from typing import Any

import jax

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", re.MULTILINE
)
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


def communication(program: str) -> dict[str, dict[str, int]]:
    """Returns how many operations of each kind move data between chips, and the bytes of their results.

    Args:
        program: the compiled program's text, the part of one chip. What lies in a loop counts once.
    """
    found: dict[str, dict[str, int]] = {}
    for result, kind in _COLLECTIVE.findall(program):
        counts = found.setdefault(kind, {"operations": 0, "bytes": 0})
        parts = [
            prod(map(int, filter(None, shape.split(",")))) * (WIDTHS.get(name) or max(1, int(bits) // 8))
            for name, bits, shape in _ARRAY.findall(result)
        ]
        counts["operations"] += 1
        # An operation in two halves returns its operand beside the result; the larger of the two is what moves.
        counts["bytes"] += sum(parts) if kind == "all-reduce" else max(parts, default=0)
    return dict(sorted(found.items()))


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
