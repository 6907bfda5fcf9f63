"""Whether the grade of a graph foresees that edits work: 100 targets of the organism, held-out features and seeds.

docs/faithfulness.md registers the protocol. For each target:

1. Draw: a caption held out of training; a site above the first block, a feature active there, a denoising step.
2. Trace it, and grade the graph on its units of even rank, in its own run and in four from other seeds.
3. Edit the units of odd rank in two further seeds, and see whether the target does what the graph predicted.

    python benchmarks/verdict.py --out FOLDER [--targets 100] [--world 90000] [--parts number|all] [--figure FILE.png]

`--parts number` leaves out what the grade's number does not need; `all` grades as `difffract validate --grade` does,
and tells of groups, controls and distances too. A run that was stopped goes on where it was: FOLDER holds a file per
target. Settings and machine are printed; seeds are fixed.
"""

import argparse
import itertools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from difffract_jax.address import STREAMS
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.selection import named
from difffract_jax.circuits.checks import edit_runs
from difffract_jax.circuits.checks.grading import (
    SEEDS,
    OtherRun,
    changes,
    grade,
    in_other_seeds,
    other_runs,
    rows_of,
    trials_of,
)
from difffract_jax.circuits.checks.report import markdown_table
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.trial_edits import trial, units_of
from difffract_jax.circuits.frozen import encoding
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.graphs.grade import grade_of, happened, works
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.organism.world import scenes
from difffract_jax.storage.compile_cache import enable_compile_cache
from difffract_jax.storage.files import atomic_file

SITES = (("img", 1), ("txt", 1), ("single", 0), ("single", 1))
DOSES = (-1.0, 1.0)
LEAST = 2
"""Units that each half must have."""
HELD = ("held out 1", "held out 2")
"""Columns of the held-out seeds."""
SINGLES = 8
"""Held-out units."""
PLACES, EDITS, MOST = 64, 72, 32
"""Features per position and edits are rounded up to these, and groups have no more features, so that all targets share
their programs."""


def draw(pipe: Any, tcs: Any, caption: str, rng: np.random.Generator, number: int) -> tuple[Any, Any]:
    """Returns a run at a random step, encoded, and a random feature of it where that is strongest."""
    stream, block = SITES[rng.integers(len(SITES))]
    step = int(rng.integers(pipe.config.defaults.steps))
    prepared = prepare(capture(pipe, tcs, caption, seed=100 * number, step=step, output=True), tcs)
    engine = make_engine(prepared, tcs)
    table, layout = engine.table, prepared.info.layout
    at_site = (table.kind == FEATURE) & (table.value > 0) & (table.block == layout.block_of(stream, block))
    at_site &= np.isin(table.stream, [STREAMS.index(name) for name in layout.streams_of(stream)])
    rows = np.flatnonzero(at_site)
    feature = rng.choice(np.unique(table.feature[rows]))
    mine = rows[table.feature[rows] == feature]
    return prepared, named(engine, int(mine[np.argmax(table.value[mine])]))


def measure(pipe: Any, tcs: Any, caption: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one target's grade, and what held-out edits do; draws until the target can be tried."""
    refused: list[str] = []
    for attempt in itertools.count():
        rng = np.random.default_rng([options.world, number, attempt])
        prepared, target = draw(pipe, tcs, caption, rng, number)
        graph = attribute(prepared, tcs, target=target, max_nodes=options.max_nodes, expansion_batch=50)
        again = capture_again(pipe, tcs, graph, trace=prepared)
        units = units_of(again, graph)
        if len(units[1::2]) < LEAST:
            refused.append(f"{target}: {len(units)} units")
            continue
        runs = list(itertools.islice(other_runs(pipe, tcs, graph), SEEDS + len(HELD)))
        if len(runs) < SEEDS + len(HELD):
            refused.append(f"{target}: active in {len(runs)} other seeds")
            continue
        break
    made, found = graded(pipe, tcs, again, graph, units[0::2][:MOST], runs[:SEEDS], options.parts)
    held = units[1::2][:SINGLES]
    trials = [trial([unit], dose) for unit in held for dose in DOSES] + [trial(held, -1.0)]
    rows = rows_of(graph, trials)
    for name, run in zip(HELD, runs[SEEDS:], strict=True):
        for row, value in zip(rows, changes(run, graph, trials, "full")[0].tolist(), strict=True):
            row[name] = value
    return {
        "target": str(target),
        "caption": caption,
        "step": prepared.info.step,
        "worth trying": len(units),
        "drawn again": refused,
        "seeds": [graph.provenance.traced_run.seed, *(run.seed for run in runs)],
        "grade": to_json_values(made),
        "words": str(made),
        **found,
        "held out": rows,
    }


def graded(
    pipe: Any, tcs: Any, again: Any, graph: Any, units: list[Any], runs: list[Any], parts: str
) -> tuple[Any, dict[str, Any]]:
    """Returns a graph's grade on some of its units, and the edits behind it."""
    if parts == "all":
        less: dict[str, Any] = {"circuit": {}, "reproducible": False}
        return grade(pipe, tcs, again, graph, units=lambda every: every[0::2][:MOST], others=runs, **less)
    trials = [one for one in trials_of(units) if len(one.units) == 1 and abs(one.doses[0]) <= 1]
    rows, own = rows_of(graph, trials), OtherRun(0, again.engine, again.rows[graph.targets])
    for row, value in zip(rows, changes(own, graph, trials, "full")[0].tolist(), strict=True):
        row["full"] = value
    in_other_seeds(runs, graph, trials, rows)
    return grade_of(rows), {"edits": rows}


def shares(row: dict[str, Any], columns: tuple[str, ...], sizes: Any) -> float:
    """Returns the share of a target's held-out edits that work."""
    tried = [works(one["predicted"], one[name]) for one in row["held out"] if sizes(one["size"]) for name in columns]
    return float(np.mean(tried))


def area(score: np.ndarray, outcome: np.ndarray) -> float:
    """Returns the area under the curve of a score for an outcome: ties count half; NaN where all are alike."""
    good, bad = score[outcome], score[~outcome]
    if not good.size or not bad.size:
        return float("nan")
    ordered = np.sort(bad)
    below = np.searchsorted(ordered, good, "left") + np.searchsorted(ordered, good, "right")
    return float(np.mean(below)) / (2 * bad.size)


def interval(score: np.ndarray, outcome: np.ndarray, groups: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Returns the 95% interval of the area by bootstrap over groups of rows."""
    rng, names = np.random.default_rng(0), np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    found = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(names.size, size=names.size)])
        found.append(area(score[rows], outcome[rows]))
    low, high = np.nanquantile(found, (0.025, 0.975)).tolist()
    return low, high


def outcomes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the table of areas, the registered criterion first."""
    grades = {
        name: np.array([row["grade"].get(key, 0.0) for row in rows])
        for name, key in (("number", "number"), ("own run's share", "alone"), ("other seeds' share", "other_seeds"))
    }
    edits = [
        (i, works(one["predicted"], one[name]))
        for i, row in enumerate(rows)
        for one in row["held out"]
        if one["size"] == 1
        for name in HELD
    ]
    at, works_each = np.array([i for i, _ in edits]), np.array([done for _, done in edits])
    every = np.arange(len(rows))
    majority = np.array([shares(row, HELD, lambda size: size == 1) >= 0.5 for row in rows])
    group = np.array([shares(row, HELD, lambda size: size > 1) >= 0.5 for row in rows])
    tried = [
        (
            "at least half of the held-out single edits work in held-out seeds (the criterion)",
            "number",
            majority,
            every,
        ),
        *((f"the same, foreseen by the {name}", name, majority, every) for name in list(grades)[1:]),
        ("each held-out edit by itself", "number", works_each, at),
        ("all held-out features taken off at once, held-out seeds", "number", group, every),
    ]
    table = []
    for what, name, outcome, place in tried:
        score = grades[name][place]
        low, high = interval(score, outcome, place)
        table.append(
            {"outcome": what, "works": f"{int(outcome.sum())} of {outcome.size}", "area": f"{area(score, outcome):.3f}"}
            | {"95%": f"{low:.2f} to {high:.2f}"}
        )
    return table


def hypotheses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the figures of the other hypotheses."""
    edits = [edit | {"row": i} for i, row in enumerate(rows) for edit in row["edits"]]
    usual = [one for one in edits if one["size"] == 1 and abs(one["dose"]) <= 1]

    def worked(chosen: list[dict[str, Any]], name: str = "full") -> str:
        tried = [works(one["predicted"], value) for one in chosen for value in happened(one, name)]
        return f"{np.mean(tried):.2f} of {len(tried)}" if tried else "-"

    def missed(name: str, chosen: list[dict[str, Any]]) -> str:
        errors = [abs(one[name] - one["full"]) / abs(one["full"]) for one in chosen if one["full"] != 0]
        return f"{np.median(errors):.2f}" if errors else "-"

    large = [one for one in edits if one["size"] >= 8 and abs(one["dose"]) <= 1]
    beside = [one for one in usual if one["control"] is not None]
    more = np.mean([abs(one["full"]) > abs(one["control"]) for one in beside])
    table = [
        {"what": "single edits that work, doses -1 to 1", "figure": worked(usual)},
        {"what": "groups of 2 to 7", "figure": worked([o for o in edits if 1 < o["size"] < 8 and abs(o["dose"]) <= 1])},
        {"what": "groups of 8 and more", "figure": worked(large)},
        {"what": "single edits that move the target more than their control", "figure": f"{more:.2f} of {len(beside)}"},
        {"what": "single edits that work with other seeds", "figure": worked(usual, "other")},
    ]
    for dose in (0.5, 1.0, 2.0):
        chosen = [one for one in edits if one["size"] == 1 and abs(one["dose"]) == dose]
        beyond = np.mean([one["distance"] > 1 for one in chosen])
        table.append({"what": f"single edits that work, doses -{dose:g} and {dose:g}", "figure": worked(chosen)})
        table.append({"what": f"single edits that leave the run's own activations, doses -{dose:g} and {dose:g}"})
        table[-1]["figure"] = f"{beyond:.2f}"
    for name in ("predicted", "live"):
        said = "the graph" if name == "predicted" else name
        figure = f"{missed(name, usual)} single, {missed(name, large)} groups of 8 and more"
        table.append({"what": f"median error over the change: {said}", "figure": figure})
    limits = [row["grade"]["limit"] for row in rows if row["grade"].get("limit") is not None]
    low, median, high = np.quantile(limits, (0.25, 0.5, 0.75))
    table.append(
        {"what": "limit of reading, median and quartiles", "figure": f"{median:.3f} ({low:.3f} to {high:.3f})"}
    )
    no_op = max(row["grade"].get("no_op", 0.0) for row in rows)
    table.append({"what": "largest change by dose 0, share of the target", "figure": f"{no_op:.1e}"})
    return table


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Returns targets by grade and what held-out edits did; the curve; single edits as predicted and as measured."""
    made = Figure(figsize=(12.5, 4.1), layout="constrained")
    left, middle, right = made.subplots(1, 3)
    number = np.array([row["grade"]["number"] for row in rows])
    worked = np.array([shares(row, HELD, lambda size: size == 1) for row in rows])
    outcome = worked >= 0.5
    for chosen, colour, name in ((outcome, "#0072b2", "its edits work"), (~outcome, "#d55e00", "they do not")):
        left.plot(number[chosen], worked[chosen], "o", ms=4, alpha=0.7, color=colour, label=f"{name} ({chosen.sum()})")
    left.axhline(0.5, lw=0.6, color="#7a7a7a")
    left.set(xlabel="the grade's number", ylabel="held-out edits that work, held-out seeds", title="100 targets")
    left.set_title(f"{len(rows)} targets")
    left.legend(fontsize=8, loc="upper left")
    limits = np.r_[np.inf, np.sort(np.unique(number))[::-1]]
    middle.plot(
        [np.mean(number[~outcome] >= limit) for limit in limits],
        [np.mean(number[outcome] >= limit) for limit in limits],
        color="#0072b2",
    )
    middle.plot([0, 1], [0, 1], lw=0.8, color="#7a7a7a")
    middle.set(xlabel="targets whose edits fail, called good", ylabel="targets whose edits work, called good")
    middle.set_title(f"area under the curve {area(number, outcome):.2f}")
    singles = [one for row in rows for one in row["held out"] if one["size"] == 1]
    for name, colour in zip(HELD, ("#0072b2", "#d55e00"), strict=True):
        pairs = np.array([(one["predicted"], one[name]) for one in singles])
        right.plot(*pairs.T, ".", ms=3, alpha=0.4, color=colour, label=name)
    right.axline((0, 0), slope=1, lw=0.8, color="#7a7a7a")
    right.set_xscale("symlog", linthresh=0.02)
    right.set_yscale("symlog", linthresh=0.02)
    ticks = [-1, -0.1, 0, 0.1, 1]
    right.set_xticks(ticks)
    right.set_yticks(ticks)
    right.set(xlabel="predicted, share of the target", ylabel="in the real model", title="held-out single edits")
    right.legend(fontsize=8, loc="upper left", markerscale=3)
    return made


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every target that has no file yet; returns all."""
    encoding.BY_EIGHTS, edit_runs.LEAST = PLACES, EDITS
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    captions = scenes(options.world, 0, options.targets, "held out").captions
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, caption in enumerate(captions):
        path = options.out / f"{number:03}.json"
        if not path.exists():
            begun, used = time.perf_counter(), time.process_time()
            row = measure(pipe, tcs, caption, number, options)
            row["seconds"] = {"clock": time.perf_counter() - begun, "processor": time.process_time() - used}
            with atomic_file(path) as partial:
                partial.write_text(json.dumps(row), encoding="utf-8")
            took = f"{row['seconds']['clock']:.1f} s, {row['seconds']['processor']:.1f} of the processor"
            print(f"{number + 1} of {options.targets}, {took}: {row['target']}, {caption}: {row['words']}", flush=True)
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    return rows


def main() -> None:
    """Prints settings, machine and tables; draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of a file per target; kept, and gone on with")
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--world", type=int, default=90_000, help="of the captions and draws")
    parser.add_argument("--parts", choices=("number", "all"), default="number", help="of the grade")
    parser.add_argument("--max-nodes", type=int, default=300, help="of each graph")
    parser.add_argument("--figure", type=Path, help="file to draw to")
    options = parser.parse_args()
    print(f"{vars(options)}; {platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}", flush=True)
    enable_compile_cache()
    rows = run(options)
    seconds = [row["seconds"]["processor"] for row in rows]
    redrawn = sum(len(row["drawn again"]) for row in rows)
    print(f"{len(rows)} targets, {redrawn} drawn again; processor seconds of each: median {np.median(seconds):.1f}\n")
    for table in (outcomes(rows), *([hypotheses(rows)] if options.parts == "all" else [])):
        print(markdown_table(table), "", sep="\n")
    if options.figure is not None:
        with atomic_file(options.figure) as partial:
            figure(rows).savefig(partial, dpi=110, format="png")


if __name__ == "__main__":
    main()
