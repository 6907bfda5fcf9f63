"""A sweep for people and machines: a table's rows, JSON values, Markdown, and the figure.

Every row says whether its memory is compiled or modelled; times are modelled throughout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from difffract_jax.config import UserError
from difffract_jax.estimate.sweep import LeftOut, Point
from difffract_jax.storage.files import atomic_file
from difffract_jax.transcoders.chips import GIB
from difffract_jax.transcoders.plan import mesh_text

PICTURES = (".png", ".svg", ".pdf")
COLOURS = {"v5e": "#2a78b5", "v5p": "#d1603d", "v6e": "#3d8f5f"}
BOUNDS = {"compute": "o", "memory": "s", "network": "^", "host": "D"}
"""Resource -> the mark of a slice that waits for it most."""


def sweep_rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """Returns a row of words per slice: sizes in GiB of one chip, times at the maker's peak rates."""
    return [
        {
            "slice": point.topology,
            "chips": str(point.chips),
            "mesh": mesh_text({axis: size for axis, size in point.mesh.items() if size > 1}) or "-",
            "set besides": ", ".join(f"{name}={value}" for name, value in point.changes.items()) or "-",
            "memory": "compiled" if point.compiled else "modelled",
            **{name: f"{size / GIB:.2f}" for name, size in point.parts.items()},
            "needed": f"{point.needed / GIB:.2f}",
            "fits": "yes" if point.fits else f"{(point.needed - point.hbm) / GIB:.2f} short",
            "exchanged, GB": f"{sum(point.communication.values()) / 1e9:.2f}",
            "ms a step": f"{1e3 * point.step.longest:.3g} ({point.step.bound})",
            "ms a chunk": "-" if point.chunk is None else f"{1e3 * point.chunk.longest:.3g} ({point.chunk.bound})",
            "bound": point.bound,
            "tokens/s": f"{point.tokens:,.0f}",
            "days": f"{point.days:.2f}",
            "chip-hours": f"{point.chip_hours:,.0f}",
        }
        for point in points
    ]


def sweep_values(points: Sequence[Point], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Returns a sweep as JSON values; bytes and seconds are plain numbers."""
    listed = []
    for point in points:
        named = {"step": point.step._asdict(), "run": point.run._asdict()}
        named["chunk"] = None if point.chunk is None else point.chunk._asdict()
        told = {"bound": point.bound, "days": point.days, "chip_hours": point.chip_hours}
        listed.append(point._asdict() | named | told)
    return {"points": listed, "left_out": [one._asdict() for one in left_out]}


def sweep_words(points: Sequence[Point], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Returns a sweep as tables for people."""
    fitting = [point for point in points if point.fits]
    absent = [
        {"slice": one.topology, "state": f"{one.state / GIB:.2f}", "a chip has": f"{one.hbm / GIB:.2f}"}
        for one in left_out
    ]
    fewest = min(fitting, key=lambda point: (point.chips, point.chips * point.hbm), default=None)
    return {
        "smallest that fits": "none of these" if fewest is None else fewest.topology,
        "memory": "GiB of one chip; compiled or modelled as told, state, rows, buffer and model exact",
        "times": "modelled, at the maker's peak rates, which no program reaches",
        "sweep": sweep_rows(points),
    } | ({"left out: the state alone is more than a chip has": absent} if absent else {})


def sweep_markdown(points: Sequence[Point]) -> str:
    """Returns the rows as a table of Markdown."""
    rows = sweep_rows(points)
    titles = [*rows[0]] if rows else []
    lines = [titles, ["---"] * len(titles), *([row[title] for title in titles] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def check_picture(path: Path) -> None:
    """Refuses a figure whose name says no format that can be drawn.

    Raises:
        UserError: if it does.
    """
    if path.suffix not in PICTURES:
        raise UserError(f"--figure {path} must end in one of {', '.join(PICTURES)}, which says its format.")


def draw_sweep(sweeps: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draws days and memory of slices against their chips, one pair of panels for each training.

    Args:
        sweeps: title -> points.
        path: file to write, `.png`, `.svg` or `.pdf`.

    Raises:
        UserError: if its name says no format.
    """
    check_picture(path)
    figure = Figure(figsize=(10, 3.6 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), 2, squeeze=False)
    for (title, points), (days, memory) in zip(sweeps.items(), panels, strict=True):
        for name, colour in COLOURS.items():
            mine = [point for point in points if point.topology.partition(":")[0] == name]
            if mine:
                _draw_days(days, mine, name, colour)
                chips = [point.chips for point in mine]
                memory.plot(chips, [point.needed / GIB for point in mine], "-", color=colour, label=f"{name}: needed")
                memory.plot(chips, [point.parts["state"] / GIB for point in mine], ":", color=colour, label="state")
                memory.axhline(mine[0].hbm / GIB, color=colour, linewidth=0.7, alpha=0.5)
        days.set(title=f"{title}: days of a run, modelled", ylabel="days at peak rates", yscale="log")
        memory.set(title="memory of a chip", ylabel="GiB; thin lines: what a chip has", yscale="log")
        for panel in (days, memory):
            _axis_of_chips(panel, sorted({point.chips for point in points}))
    with atomic_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=130)


def _draw_days(panel: Any, points: Sequence[Point], name: str, colour: str) -> None:
    panel.plot([p.chips for p in points], [p.days for p in points], "-", color=colour, label=name)
    for bound, mark in BOUNDS.items():
        mine = [point for point in points if point.bound == bound]
        filled = [colour if point.fits else "white" for point in mine]
        if mine:
            panel.scatter([p.chips for p in mine], [p.days for p in mine], marker=mark, c=filled, edgecolors=colour)
            panel.scatter([], [], marker=mark, color="grey", label=None if _labelled(panel, bound) else bound)


def _labelled(panel: Any, label: str) -> bool:
    return label in panel.get_legend_handles_labels()[1]


def _axis_of_chips(panel: Any, chips: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(chips, [str(size) for size in chips])
    panel.set_xlabel("chips")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
