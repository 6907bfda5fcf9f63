"""Outputs and spans on the organism: what adds up, and what a graph predicts of the image.

1. Conservation: per kind of target, over one step and over all, the largest |edges + bias - value| over the sum of
   absolute edges and bias, in float32 and float64.
2. Prediction: for each of many prompts, the graph of a `pixels:` target (the colour of its first object, in the box
   around it, at the last step), its most influential supernode scaled by +-20% at every position, and the change of the
   objective: as the graph says, and in the readings `propagated`, `live` and `full` (docs/method.md, section 7). Slope
   and correlation of each reading on the graph's prediction. A graph of every active feature predicts the first
   exactly.

    python benchmarks/outputs.py [--prompts 50] [--max-nodes 1500] [--json]

The supernode is the one of `find_supernodes` on the pruned graph with the largest influence, by rule. Settings and
machine are printed.
"""

import argparse
import json
import os
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import Output, make_engine, read_targets
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.effects.readings import factors_for, predict, scaled
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.organism.vocabulary import COLOUR_NAMES
from difffract_jax.organism.world import scenes

WORLD = 60_000
"""World of the prompts; another than those of training and scores."""
PROMPT = "a red circle left of a blue square"
TARGETS = (
    *("img/1", "txt/1", "single/1", "velocity:"),
    'velocity:contrast="a green circle"',
    "pixels:color=red,box=0,0,24,48",
)
READINGS = ("propagated", "live", "full")
CHANGES = (-0.2, 0.2)


def widen(tree: Any) -> Any:
    """Casts a tree's floats to float64."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def conservation(dtype: str) -> list[dict[str, Any]]:
    """Returns one row per kind of target."""
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    if dtype == "float64":
        pipe = pipe._replace(**{part: widen(getattr(pipe, part)) for part in ("transformer", "t5", "clip", "vae")})
        tcs = tcs._replace(stacks=widen(tcs.stacks))
    one = capture(pipe, tcs, PROMPT, step=3, output=True)
    span = capture_steps(pipe, tcs, PROMPT, first=0, last=3)
    rows = []
    for text in TARGETS:
        row: dict[str, Any] = {"target": text, "dtype": dtype}
        for name, trace in (("one step", one), ("all steps", span)):
            stream, _, block = text.partition("/")
            feature = ":" not in text
            target: Any = strongest_feature(trace, tcs, stream, int(block)) if feature else None
            target = target or resolve_target(pipe, trace, parse_target(text))
            graph = attribute(trace, tcs, target=target, max_nodes=100, expansion_batch=50)
            row[name] = graph.largest_conservation_error
            row[f"{name}, nodes"] = int(graph.target_node.size)
        rows.append(row)
    return rows


def top_supernode(graph: Graph) -> np.ndarray:
    """Returns the nodes, position by position, of the most influential supernode."""
    pruned = find_supernodes(prune(graph))
    groups = pruned.supernodes or {"": np.flatnonzero(pruned.node_kind == FEATURE).tolist()}
    best = max(groups.values(), key=lambda group: float(np.sum(pruned.node_influence[group])))
    columns = ("node_stream", "node_block", "node_feature")
    wanted = {tuple(int(getattr(pruned, c)[n]) for c in columns) for n in best}
    keys = zip(*(getattr(graph, c).tolist() for c in columns), strict=True)
    inside = np.array([key in wanted for key in keys])
    return np.flatnonzero(inside & (graph.node_kind == FEATURE))


def prediction(prompts: int, max_nodes: int) -> list[dict[str, Any]]:
    """Returns one row per prompt and change."""
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    drawn, rows = scenes(WORLD, 0, prompts), []
    size = pipe.config.defaults.height
    for number in range(prompts):
        target, box = objective(drawn, number, size)
        trace = capture(pipe, tcs, drawn.captions[number], step=3, output=True, seed=number)
        output = resolve_target(pipe, trace, parse_target(f"pixels:color={target},box={box}"))
        graph = attribute(trace, tcs, target=output, max_nodes=max_nodes, expansion_batch=100, min_attribution=1e-6)
        nodes = top_supernode(graph)
        asked = {"prompt": drawn.captions[number]}
        rows += [asked | change_of(trace, tcs, output, graph, nodes, change) for change in CHANGES]
        print(f"{number + 1} of {prompts}: {drawn.captions[number]}", flush=True)
    return rows


def objective(drawn: Any, number: int, size: int) -> tuple[str, str]:
    """Returns the colour of a prompt's first object, and the box around its place."""
    colour = COLOUR_NAMES[drawn.colour[number, 0]]
    x, y = drawn.centre[number, 0]
    radius = float(drawn.radius[number, 0])
    low, high = (np.clip([x + d, y + d], 0, size).astype(int) for d in (-radius, radius))
    return colour, f"{low[0]},{low[1]},{max(high[0], low[0] + 1)},{max(high[1], low[1] + 1)}"


def change_of(trace: Any, tcs: Any, output: Output, graph: Graph, nodes: np.ndarray, change: float) -> dict[str, float]:
    """Returns the objective's change as predicted and as read."""
    engine = make_engine(trace, tcs, (output,))
    row, prepared = np.array([engine.sources], np.int64), engine.steps[0]
    before = read_targets(engine, row, (prepared.record.reading,))[0]
    factors = np.ones(graph.node_kind.size)
    factors[nodes] = 1 + change
    scale = factors_for(prepared, graph, nodes, 1 + change)
    moved = {mode: float(read_targets(engine, row, (scaled(prepared, scale, mode),))[0] - before) for mode in READINGS}
    told = {"change": change, "nodes": len(nodes), "value": float(before)}
    return told | {"graph": float(predict(graph, factors)[0])} | moved


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns slope and correlation of each reading on the graph's prediction."""
    x = np.array([row["graph"] for row in rows])
    found = []
    for mode in READINGS:
        y = np.array([row[mode] for row in rows])
        error = np.median(np.abs(y - x) / np.maximum(np.abs(x), 1e-12))
        found.append(
            {
                "reading": mode,
                "slope": float(x @ y / (x @ x)),
                "Pearson r": float(np.corrcoef(x, y)[0, 1]),
                "median |error| / |prediction|": float(error),
            }
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as Markdown."""
    show = lambda v: f"{v:.3g}" if isinstance(v, float) else str(v)  # noqa: E731  (one use)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([show(v) for v in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints settings, machine and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, help="for the table of predictions")
    parser.add_argument("--max-nodes", type=int, default=1500, help="of their graphs; about 4,600 features are active")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    print(f"{vars(options)}; {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}", flush=True)
    rows = prediction(options.prompts, options.max_nodes)
    print(table(slopes(rows)), "", sep="\n", flush=True)
    kept = conservation("float32")
    jax.config.update("jax_enable_x64", True)
    kept += conservation("float64")
    print(table(kept))
    if options.json:
        print(json.dumps({"prediction": rows, "conservation": kept}))


if __name__ == "__main__":
    main()
