"""What the command line shows: results on stdout, progress on stderr, settings inside the files.

1. `emit` prints a result, a dictionary of JSON values, as a table of its plain values and one table per list of rows.
2. `progress` shows one bar on stderr while a command works; it hands out a callback `advance(done, total)`. While XLA
   compiles the bar says so.
3. `graph_summary` boils a graph down to what one wants to know first: its target, its size, the target's strongest
   sources, and whether edges and bias add up to the pre-activations. It reads the graph's arrays only.
4. `planned` lays plans of training beside one another.
5. `save_image` writes a PNG with its provenance.
6. Commands replace files that are there already, and `replacing` says so.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from difffract_jax.graphs.graph import FEATURE, SCORE, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.storage.files import atomic_file

Advance = Callable[[int, int], None]
EXPLAINED = {
    "rest": "features that were not expanded, as one node a site and position",
    "pinned": "the kept features alone, all others counted as error",
    "frozen pooled path": "what the prompt's one vector adds, held fixed, without nodes",
}
"""Words of tables that a newcomer asks for; the others are in docs/glossary.md."""


def emit(result: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Prints a result on stdout, for machines as one JSON object, for people as tables."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    console = Console(soft_wrap=True, markup=False, emoji=False)  # names and prompts may hold [brackets] and :colons:
    plain = Table(show_header=False, box=None, pad_edge=False)
    plain.add_column()
    plain.add_column(overflow="fold")  # an address or a path is wrapped, not cut
    tables = []
    for name, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            tables.append(_rows(name, value))
        else:
            plain.add_row(name, _text(value))
    console.print(plain, *tables, *_explained(result), sep="\n")


def _explained(result: Mapping[str, Any]) -> list[str]:
    """Returns a line for each word of `EXPLAINED` that a result shows as a name or in its rows."""
    shown = [*result]
    for value in result.values():
        if isinstance(value, Mapping):
            shown += value
        elif isinstance(value, list):
            shown += [str(next(iter(row.values()))) for row in value if isinstance(row, Mapping)]
    text = "\n".join(shown)
    return [f"{word}: {meaning}" for word, meaning in EXPLAINED.items() if re.search(rf"\b{word}\b", text)]


@contextmanager
def replacing(*targets: Path) -> Iterator[None]:
    """Tells on stderr, when the block ends well, which files it replaced that were there before.

    Args:
        targets: files that the block writes, or directories that it writes files into.
    """
    before = {path: _stamp(path) for target in targets for path in _files(target)}
    yield
    replaced = [str(path) for path, stamp in before.items() if path.is_file() and _stamp(path) != stamp]
    if replaced:
        verb = "was" if len(replaced) == 1 else "were"
        sys.stderr.write(f"Note: {', '.join(replaced)} existed and {verb} replaced; --out names another output.\n")


def _files(target: Path) -> list[Path]:
    if target.is_dir():
        return sorted(path for path in target.iterdir() if path.is_file())
    return [target] if target.is_file() else []


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """Shows a progress bar on stderr for as long as the context lasts."""
    console = Console(stderr=True)
    # Where there is no terminal, a bar would only leave an empty line beside what else is told.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        description = escape(description)
        task = bar.add_task(description, total=None)
        with _told_of_compiling(lambda text: bar.update(task, description=f"{description}{text}")):
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def byte_progress(description: str) -> Iterator[Advance]:
    """Shows a bar on stderr that counts bytes, with their rate and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn(escape(description)), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _told_of_compiling(show: Callable[[str], None]) -> Iterator[None]:
    """Calls `show` with " (compiling)" when XLA begins to compile or to read a program, and with "" when it ends."""
    import jax.monitoring

    # JAX tells when a stage ends: when a program has been lowered, its compilation begins.
    after = {"jaxpr_to_mlir_module_duration": " (compiling)", "backend_compile_duration": ""}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        text = after.get(event.rsplit("/", 1)[-1])
        if text is not None:
            show(text)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextmanager
def stages() -> Iterator[Callable[..., None]]:
    """Shows one bar per stage on stderr, with the time left, and yields `advance(stage, done, total, loss)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int, loss: float = math.nan) -> None:
            note = "" if math.isnan(loss) else f"loss {loss:.4f}"
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note=note)
            bar.update(tasks[stage], completed=done, total=total, note=note)

        yield advance


@contextmanager
def training_progress(
    *, shown: bool = True
) -> Iterator[tuple[Callable[[int, int, Mapping[str, float]], None], Callable[[str], None]]]:
    """Shows on stderr how training goes: a bar with time left, rows per second, FVU, L0 and share of dead features.

    Hands out `advance(done, total, values)` and `note(sentence)`, which prints above the bar.

    Args:
        shown: whether to show anything; of several processes one does.
    """
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[values]}"))
    with Progress(*columns, console=Console(stderr=True, quiet=not shown), transient=True) as bar:
        task = bar.add_task("Training", total=None, values="")

        def advance(done: int, total: int, values: Mapping[str, float]) -> None:
            shown = (
                f"{values['rows_per_second']:,.0f} rows/s  FVU {values['fvu']:.3f}  L0 {values['l0']:.1f}  "
                f"dead {values['dead']:.1%}"
            )
            bar.update(task, completed=done, total=total, values=shown)

        yield (
            advance,
            lambda sentence: bar.console.print(
                f"Note: {sentence}", soft_wrap=True, highlight=False, markup=False, emoji=False
            ),
        )


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


def save_image(image: UInt8[np.ndarray, "H W rgb"], path: Path, record: Mapping[str, Any]) -> None:
    """Writes a PNG whose text chunk `difffract_jax` is the record of how it was made, as JSON."""
    info = PngInfo()
    info.add_itxt("difffract_jax", json.dumps(record))
    with atomic_file(path) as partial:
        Image.fromarray(image).save(partial, format="PNG", pnginfo=info)


def parameter_counts(made: Any) -> dict[str, int]:
    """Returns how many parameters each module of a pipeline has, or a transformer alone."""
    from difffract_jax.storage.checkpoint import leaf_paths

    names = ("transformer", "t5", "clip", "vae")
    modules = {name: getattr(made, name) for name in names} if isinstance(made, tuple) else {"transformer": made}
    counts = {name: sum(leaf.size for leaf in leaf_paths(tree).values()) for name, tree in modules.items()}
    return {f"{name} parameters": count for name, count in counts.items()}


def graph_summary(graph: Graph, most: int = 8) -> dict[str, Any]:
    """Returns what one wants to know of a graph first.

    Args:
        graph: the graph.
        most: how many of the strongest edges into its targets to list.
    """
    names, targets = node_names(graph), graph.targets
    incoming = np.flatnonzero(np.isin(graph.edge_target, targets))
    strongest = incoming[np.argsort(-np.abs(graph.edge_attribution[incoming]), kind="stable")][:most]
    rows = [
        {"from": names[graph.edge_source[edge]]}
        | ({"to": names[graph.edge_target[edge]]} if targets.size > 1 else {})
        | {"attribution": float(graph.edge_attribution[edge])}
        for edge in strongest
    ]
    paths = graph.provenance.pooled_path
    pooled = {"share of the frozen pooled path": ", ".join(f"{path.share:.3g}" for path in paths)} if paths else {}
    rounding = graph.provenance.precision
    rounded = {"bfloat16 error": f"{rounding.edge_error:.2g} of the largest edge"} if rounding else {}
    unclear = graph.provenance.unclear_links
    left_out = {"links left out": unclear.left_out} if unclear is not None and unclear.left_out else {}
    by_step = expanded_by_step(graph)
    spread = ", ".join(f"step {step}: {count}" for step, count in by_step.items())
    weighted = [{"target": names[node], "weight": float(graph.root_weights[node])} for node in targets]
    return {
        "target": names[targets[0]],
        **({"targets": weighted} if len(weighted) > 1 else {}),
        "nodes": graph.summary().nodes,
        **({"features expanded": spread} if len(by_step) > 1 else {}),
        "edges": len(graph.edge_attribution),
        **left_out,
        "conservation error": graph.largest_conservation_error,
        **rounded,
        **pooled,
        "strongest sources": rows,
        **attention_tables(graph, most),
    }


def attention_tables(graph: Graph, most: int = 8) -> dict[str, Any]:
    """Returns what attention's scores add to a graph's targets, where they are nodes; else nothing.

    Args:
        graph: the graph.
        most: how many of the scores with the largest edges to list.
    """
    told = graph.provenance.attention
    if not told:
        return {}
    names = node_names(graph)
    from_scores = np.flatnonzero((graph.node_kind == SCORE)[graph.edge_source])
    own = from_scores[graph.node_head[graph.edge_source[from_scores]] >= 0]
    order = own[np.argsort(-np.abs(graph.edge_attribution[own]), kind="stable")][:most]
    rows = [
        {"score": names[graph.edge_source[edge]]}
        | ({"to": names[graph.edge_target[edge]]} if graph.targets.size > 1 else {})
        | {"above its query's mean": float(graph.node_value[graph.edge_source[edge]])}
        | {"attribution": float(graph.edge_attribution[edge]), "remainder": float(graph.edge_remainder[edge])}
        for edge in order
    ]
    shown, size = (float(np.abs(graph.edge_attribution[edges]).sum()) for edges in (own, from_scores))
    missed = [abs(one.total - one.forward) / one.absolute if one.absolute else 0.0 for one in told]
    return {
        "sum of edges from scores": ", ".join(f"{one.total:.4g}" for one in told),
        "its distance from forward mode, over absolute edges": max(missed),
        "share of these edges that is from single scores": shown / size if size else None,
        **({"strongest scores": rows} if rows else {}),
    }


def expanded_by_step(graph: Graph) -> dict[int, int]:
    """Returns how many expanded features a graph holds of each step that it was traced over; pruning leaves fewer."""
    mine = graph.node_step[graph.target_node[graph.node_kind[graph.target_node] == FEATURE]]
    steps = graph.provenance.steps or np.unique(graph.node_step).tolist()
    return {int(step): int(np.sum(mine == step)) for step in steps}


def _over(value: float | None, unit: float) -> str:
    """Returns a number in a unit with two decimals, or a dash where it is not known."""
    return "-" if value is None else f"{value / unit:.2f}"


def _rows(title: str, rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # a mesh is wrapped, not cut
    for row in rows:
        table.add_row(*map(_text, row.values()))
    return table


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping | list):
        return json.dumps(value)
    return "-" if value is None else str(value)
