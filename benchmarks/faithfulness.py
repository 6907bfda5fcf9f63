"""How faithful circuits of the organism are, over 100 targets drawn at random.

1. Draw: captions held out of training, one run each; of each a site with transcoders above the first block, one of the
   features active there and one of its positions, and a denoising step, all uniformly by seed.
2. Trace each target over its step, and validate the graph as `difffract validate` does.
3. Report medians and quartiles over targets: pairwise Spearman and Pearson in the real model; what the pruned circuit
   recovers and loses in every reading, beside circuits of its size by largest value and at random.

    python benchmarks/faithfulness.py [--targets 100] [--ablation mean|zero] [--figure FILE.png] [--json]

A target whose circuit keeps no feature, or whose correlation is not defined, is counted and left out of that figure.
Sites of the first block are left out: below them are inputs alone. Settings and machine are printed; seeds are fixed.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from difffract_jax.address import STREAMS  # noqa: E402
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.selection import named
from difffract_jax.circuits.checks.report import COLOURS, markdown_table
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.summaries import EVERY, at_size
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.circuits.frozen import encoding
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.organism.world import scenes
from difffract_jax.storage.checkpoint import atomic_file

WORLD = 70_000
"""World of the prompts; another than those of training and scores."""
SITES = (("img", 1), ("txt", 1), ("single", 0), ("single", 1))
READINGS = ("propagated", "live", "full")
MEASURES = ("spearman", "pearson")
QUARTILES = (25, 50, 75)


def draw(pipe: Any, tcs: Any, caption: str, number: int) -> tuple[Any, Any]:
    """Returns a run captured at a random step, and a random active feature of it."""
    rng = np.random.default_rng([WORLD, number])
    stream, block = SITES[rng.integers(len(SITES))]
    step = int(rng.integers(pipe.config.defaults.steps))
    trace = capture(pipe, tcs, caption, seed=number, step=step, output=True)
    engine = make_engine(trace, tcs)
    table, layout = engine.table, trace.info.layout
    at_site = (table.kind == FEATURE) & (table.value > 0) & (table.block == layout.block_of(stream, block))
    at_site &= np.isin(table.stream, [STREAMS.index(name) for name in layout.streams_of(stream)])
    rows = np.flatnonzero(at_site)
    feature = rng.choice(np.unique(table.feature[rows]))
    return trace, named(engine, int(rng.choice(rows[table.feature[rows] == feature])))


def measure(pipe: Any, tcs: Any, caption: str, number: int, options: Any) -> dict[str, Any]:
    """Returns one target's figures."""
    trace, target = draw(pipe, tcs, caption, number)
    graph = attribute(trace, tcs, target=target, max_nodes=options.max_nodes, expansion_batch=50)
    again = capture_again(pipe, tcs, graph)
    row: dict[str, Any] = {"caption": caption, "seed": number, "step": trace.info.step, "target": str(target)}
    try:
        found = validate(again, graph, edges=50, ablation=options.ablation, readings=READINGS, draws=5)
    except UserError as error:
        return row | {"left out": str(error)}
    row |= {test["kind"]: test["worst"] for test in found["exactness"]}
    row |= {"pruned": found["completeness"]["pruned"]}
    for one in found["perturbation"]["rows"]:
        place = "all" if one["of"] == EVERY else "target"
        row |= {f"{one['prediction']}, {place}, {name}": one[name] for name in (*MEASURES, "pairs")}
    for one in at_size(found, found["completeness"]["pruned"]) if row["pruned"] else ():
        row |= {f"{one['reading']}, {one['ranking']}, {name}": one[name] for name in ("recovered", "lost")}
    return row


def column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """Returns the values of a figure where it is defined."""
    return np.array([row[name] for row in rows if row.get(name) is not None], np.float64)


def spread(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Returns median and quartiles of a figure, and of how many targets."""
    values = column(rows, name)
    low, median, high = np.percentile(values, QUARTILES).tolist() if values.size else (None, None, None)
    return {"median": median, "lower quartile": low, "upper quartile": high, "targets": int(values.size)}


def correlations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of pairwise perturbations."""
    return [
        {"prediction": prediction, "nodes downstream": place, "correlation": name}
        | spread(rows, f"{prediction}, {key}, {name}")
        for prediction in ("influence", "change")
        for key, place in (("all", "all"), ("target", "the target"))
        for name in MEASURES
    ]


def circuits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of completeness and minimality."""
    found = []
    for reading in READINGS:
        for ranking in COLOURS:
            row: dict[str, Any] = {"reading": reading, "circuit": ranking}
            for name in ("recovered", "lost"):
                told = spread(rows, f"{reading}, {ranking}, {name}")
                quartiles = f"{told['lower quartile']:.2f} to {told['upper quartile']:.2f}"
                row |= {f"{name}, median": f"{told['median']:.2f}", f"{name}, quartiles": quartiles}
            found.append(row)
    return found


def beaten(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns in how many targets the graph's circuit is closer to the whole than each baseline."""
    found = []
    for reading in READINGS:
        for ranking in ("largest value", "random"):
            row: dict[str, Any] = {"reading": reading, "beside": ranking}
            for name in ("recovered", "lost"):
                ours, other = (column(rows, f"{reading}, {one}, {name}") for one in ("influence", ranking))
                row[name] = f"{int(np.sum(np.abs(ours - 1) < np.abs(other - 1)))} of {ours.size}"
            found.append(row)
    return found


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Returns histograms of the correlations, and boxes of what circuits recover and lose."""
    made = Figure(figsize=(11, 6.4), layout="constrained")
    upper, lower = made.subfigures(2, 1)
    for axes, (prediction, key) in zip(
        upper.subplots(1, 4, sharey=True),
        [(prediction, key) for prediction in ("influence", "change") for key in ("all", "target")],
        strict=True,
    ):
        for name, colour in zip(MEASURES, ("#0072b2", "#d55e00"), strict=True):
            values = column(rows, f"{prediction}, {key}, {name}")
            axes.hist(values, np.linspace(-1, 1, 21), histtype="step", color=colour, label=f"{name} ({values.size})")
        axes.set(
            title=f"{prediction}, {'every node downstream' if key == 'all' else 'the target'}", xlabel="correlation"
        )
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7, loc="upper left")
    upper.axes[0].set_ylabel("targets")
    for axes, name in zip(lower.subplots(1, 2, sharey=True), ("recovered", "lost"), strict=True):
        for place, ranking in enumerate(COLOURS):
            values = [column(rows, f"{reading}, {ranking}, {name}") for reading in READINGS]
            boxes = axes.boxplot(
                values, positions=[i + 0.25 * (place - 1) for i in range(len(READINGS))], widths=0.2, showfliers=False
            )
            for part in boxes.values():
                for line in part:
                    line.set_color(COLOURS[ranking])
            axes.plot([], color=COLOURS[ranking], label=ranking)
        axes.axhline(1, lw=0.6, color="#bbbbbb")
        axes.set_xticks(range(len(READINGS)), READINGS)
        axes.set(title=f"{name}, circuits of the pruned size", ylim=(-0.8, 2.0))
    lower.axes[0].legend(fontsize=8, loc="upper left")
    return made


def main() -> None:
    """Prints settings, machine and the tables; draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--max-nodes", type=int, default=300, help="of each graph")
    parser.add_argument("--ablation", choices=("mean", "zero"), default="mean")
    parser.add_argument("--figure", type=Path, help="file to draw to")
    parser.add_argument("--json", action="store_true", help="print every target's figures as JSON")
    options = parser.parse_args()
    print(f"{vars(options)}; {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}", flush=True)
    # Places for features per position, rounded up this far, are the same in all runs, which then share their programs.
    encoding.BY_EIGHTS = 64
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    captions, begun, rows = scenes(WORLD, 0, options.targets, "held out").captions, time.perf_counter(), []
    for number, caption in enumerate(captions):
        rows.append(measure(pipe, tcs, caption, number, options))
        told = f"{number + 1} of {options.targets}, {time.perf_counter() - begun:.0f} s: {rows[-1]['target']}"
        print(f"{told}, {caption}", flush=True)
    left = [row for row in rows if "left out" in row]
    print(f"{len(left)} targets left out, whose graphs have no features: {', '.join(row['target'] for row in left)}")
    kept = [row for row in rows if "left out" not in row]
    print(f"Features that pruning keeps: {spread(kept, 'pruned')}")
    worst = {kind: float(column(kept, kind).max()) for kind in ("replacement", "readings", "conservation", "edges")}
    print(f"Worst errors of what is exact: {worst}", "", sep="\n")
    for table in (correlations(kept), circuits(kept), beaten(kept)):
        print(markdown_table(table), "", sep="\n")
    if options.figure is not None:
        with atomic_file(options.figure) as partial:
            figure(kept).savefig(partial, dpi=110, format="png")
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
