"""Plans of training and of tracing, laid beside one another as tables for people."""

from collections.abc import Sequence
from typing import Any

from difffract_jax.memory import text_of_bytes


def planned(plans: Sequence[Any], smallest: Any) -> dict[str, Any]:
    """Returns a table of plans for people, one column each, and the smallest that fits.

    Args:
        plans: from `transcoders.plan`.
        smallest: one of them; None if none fits.
    """
    sizes = ("state", "rows", "buffer", "model", "arguments", "outputs", "temporaries", "peak", "needed", "hbm")
    moved = sorted({kind for plan in plans for kind in plan.communication})
    others = dict.fromkeys(name for plan in plans for name in plan.phases)

    def column(plan: Any) -> dict[str, str]:
        cells = {"chips": str(plan.chips), "mesh": ",".join(f"{axis}={size}" for axis, size in plan.mesh.items())}
        cells |= {f"{name}, GiB": _over(getattr(plan, name), 2**30) for name in sizes}
        cells |= {f"{name}, GiB": _over(plan.phases.get(name), 2**30) for name in others}
        cells |= {"fits": "yes" if plan.fits else "no", "matmul TFLOP/step": _over(plan.flops, 1e12)}
        cells["compiled TFLOP/chip"] = _over(plan.compiled_flops, 1e12)
        for kind in moved:
            seen = plan.communication.get(kind)
            cells[kind] = f"{seen['operations']} x, {_over(seen['bytes'], 2**30)} GiB" if seen else "-"
        return cells | {"compiled in, s": f"{plan.seconds:.0f}"}

    columns = {plan.topology: column(plan) for plan in plans}
    names = list(next(iter(columns.values())))
    rows = [{"per chip": name} | {title: cells[name] for title, cells in columns.items()} for name in names]
    best = "none of these" if smallest is None else f"{smallest.topology}, {columns[smallest.topology]['mesh']}"
    return {"smallest that fits": best, "plan": rows}


def planned_trace(plans: Sequence[Any]) -> dict[str, Any]:
    """Returns tables of plans of a trace for people: what lies in memory, and every program, topology by topology.

    Args:
        plans: from `circuits.attribution.plan`.
    """
    held = ("model", "transcoders", "weights", "record")

    def column(one: Any) -> dict[str, str]:
        cells = {f"{name}, GiB": _over(getattr(one, name), 2**30) for name in ("temporaries", "peak", "needed")}
        cells |= {"fits": "yes" if one.fits else "no", "TFLOP": _over(one.flops, 1e12)}
        cells |= {"s at peak": f"{one.seconds:.3g}", "GB, loops once": _over(one.bytes_accessed, 1e9)}
        return cells | {"compiled in, s": f"{one.compiled_in:.0f}"}

    def table(plan: Any) -> list[dict[str, str]]:
        columns = {one.name: column(one) for one in plan.programs}
        names = next(iter(columns.values()))
        return [{"per chip": name} | {title: cells[name] for title, cells in columns.items()} for name in names]

    first = plans[0]
    return {
        "fits": ", ".join(plan.topology for plan in plans if plan.fits) or "none of these",
        **{f"{name}, GiB": _over(getattr(first, name), 2**30) for name in held},
        "targets together, per chip": first.targets,
        **{f"{plan.topology}: GiB there are": _over(plan.hbm, 2**30) for plan in plans},
        **{f"{plan.topology}: s per node at peak": f"{plan.seconds_per_node:.3g}" for plan in plans},
        **{f"{plan.topology}: programs": table(plan) for plan in plans},
    }


def counted_json(command: str, found: Sequence[Any]) -> dict[str, Any]:
    """Returns what was counted of a command, for programs to read.

    Args:
        command: its name.
        found: device, way, estimate, and what would take less, of each device and way.
    """
    return {
        "command": command,
        "counted": [
            {"device": place.name, "kind": place.kind, "usable": place.usable, "weights": way, "compiled": False}
            | {"needed": one.needed, "held": one.held, "fits": one.needed <= place.usable, "takes_less": less}
            | {"phases": [phase._asdict() | {"needed": phase.needed} for phase in one.phases]}
            for place, way, one, less in found
        ],
    }


def counted_tables(command: str, found: Sequence[Any]) -> dict[str, Any]:
    """Returns a row per device and way, and the phases of each way; arguments as for `counted_json`."""
    rows = [
        {"device": place.name, "a command may use": text_of_bytes(place.usable), "weights": way}
        | {"needed": text_of_bytes(one.needed), "most to": one.largest.name}
        | {"fits": "yes" if one.needed <= place.usable else "no", "fits with": ", ".join(less) or "-"}
        for place, way, one, less in found
    ]
    parts = []
    for way in dict.fromkeys(way for _, way, _, _ in found):
        estimate = next(one for _, mine, one, _ in found if mine == way)
        for phase in estimate.phases:
            held = ", ".join(f"{name} {text_of_bytes(size)}" for name, size in phase.held.items() if size)
            row = {"weights": way, "phase": phase.name, "held": held, "in between": text_of_bytes(phase.passing)}
            parts.append(row | {"needed": text_of_bytes(phase.needed)})
    about = (
        "every figure, from shapes, not compiled: what is held is exact, what is needed in between an estimate from "
        "above, to which in a streamed trace the decoder rows of all features that can be active belong"
    )
    return {"planned": command, "counted": about, "devices": rows, "phases": parts}


def _over(value: float | None, unit: float) -> str:
    """Returns a number in a unit with two decimals, or a dash where it is not known."""
    return "-" if value is None else f"{value / unit:.2f}"
