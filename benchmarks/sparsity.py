"""Sparsity against faithfulness: our default, the paper's recipe and SAEs, on the same rows with the same budget.

1. Harvest rows of every MLP of the organism once, training and validation prompts apart.
2. Train every recipe at several sparsities and learning rates: as many runs for each, of as many steps and rows.
3. Measure FVU and L0 of every site on the validation rows, over all steps and step by step.
4. Per recipe and site: the lower envelope over learning rates, FVU interpolated at given L0 (both logarithmic). A
   recipe that does not reach an L0 has no value there.

    python benchmarks/sparsity.py OUT [--steps 1000] [--batch 1024] [--prompts 2048] [--recipes ours,paper,...] [--json]

OUT keeps rows and runs; a run that is there is not trained again. It ends with `sparsity.md`, `sparsity.json` and
`sparsity.png`. Settings and machine are printed. docs/method.md, section 9 defines the measures.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from difffract_jax.loading import load_pipeline, load_transcoders, save_transcoders
from difffract_jax.organism.world import scenes
from difffract_jax.storage.checkpoint import atomic_file
from difffract_jax.transcoders.evaluation import Sums, measures, row_sums
from difffract_jax.transcoders.settings import HarvestConfig, TrainConfig
from difffract_jax.transcoders.sources import open_sampler
from difffract_jax.transcoders.store import open_store, write_store
from difffract_jax.transcoders.training import Watch, train

WORLD = 50_000
"""World of the captions; another than those of training and scores."""
K = (1, 3, 8, 20)
PAPER = {
    "activation": "relu",
    "conditioning": "film_raw_t",
    "init": "reference",
    "scale_rows": False,
    "project_decoder": False,
    "schedule": "cosine_cycles",
    "warmup": 0,
    "clip": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "ours": {"activation": "batchtopk", "skip": True},
    "ours-no-skip": {"activation": "batchtopk"},
    "paper": PAPER,
    "sae-ours": {"activation": "batchtopk", "role": "sae"},
    "sae-paper": PAPER | {"role": "sae"},
}
RATES = {"ours": (2e-3, 6e-3), "paper": (6e-3, 2e-2)}
L1 = (3e-5, 1e-4, 3e-4, 1e-3)
"""Weights of the paper's penalty on the image stream and the joint sequence, codes in units of the rows."""
L1_TXT = 1 / 6
"""The text stream's share of it, as the paper has it."""


def runs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every run of a recipe: a name for its directory, and its settings."""
    fixed = RECIPES[name]
    paper = fixed["activation"] == "relu"
    for rate in RATES["paper" if paper else "ours"]:
        for value in L1 if paper else K:
            sparsity = {"l1": value, "l1_txt": L1_TXT * value} if paper else {"k": value}
            label = f"{name}_{value:g}_{rate:g}"
            yield label, fixed | sparsity | {"lr": rate}


def harvest(out: Path, prompts: int) -> Path:
    """Writes the rows, unless they are there."""
    rows = out / "rows"
    if rows.exists():
        return rows
    shared = {"model": "organism", "prompts": "world", "prompts_at_once": 32, "tokens_per_step": 16}
    settings = HarvestConfig.model_validate(shared | {"out": rows, "train_prompts": prompts})
    pipe = load_pipeline("organism")

    def caption(number: int) -> str:
        return scenes(WORLD, number // 8, 8).captions[number % 8]

    sources: Any = {split: open_sampler(settings, pipe, split, caption=caption) for split in ("train", "validation")}
    chunks: Any = {"train": prompts // 32, "validation": 8}
    write_store(sources, chunks, rows, settings.model_dump(mode="json"))
    return rows


def measure_run(home: Path, rows: Path, settings: dict[str, Any], budget: dict[str, int]) -> list[dict[str, Any]]:
    """Trains a run, unless it is there, and returns its measures by site and step."""
    result = home / "measures.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    fixed: dict[str, Any] = {"model": "organism", "prompts": "world", "rows": rows, "out": home, "aux_k": 64}
    config = TrainConfig.model_validate(fixed | budget | settings)
    resume = (home / "train.json").exists()
    record = {"settings": config.model_dump(mode="json")}
    source: Any = open_store(rows, "train", config.seed, sae=config.role == "sae")
    done = train(config, source, record, Watch(lambda *_: None, print), resume=resume)
    assert done.transcoders is not None  # nothing stops it before its last step but an error
    save_transcoders(done.transcoders, home / "transcoders", overwrite=True)
    tcs = load_transcoders(home / "transcoders")
    valid = open_store(rows, "validation", config.seed, sae=config.role == "sae")
    times = jnp.asarray(load_pipeline("organism").config.defaults.steps)
    times = 1 - jnp.arange(times) / times
    sums: dict[str, Sums] = {}
    for number in range(len(valid.rows)):
        chunk = valid.chunk(number)
        for group, part in chunk.rows.items():
            more = row_sums(tcs.stacks[group], part, jnp.asarray(chunk.valid[group]), times)
            sums[group] = more if group not in sums else jax.tree.map(jnp.add, sums[group], more)
    found = []
    for group, at in tcs.sites.slices.items():
        for i, site in enumerate(tcs.sites.names[at]):
            one = jax.tree.map(lambda a, i=i: np.asarray(a[i]), sums[group])
            dead = float(np.mean(one.fired == 0))
            found.append({"site": site, "step": "all", "dead": dead} | measures(one, slice(None)))
            found += [{"site": site, "step": s} | measures(one, slice(s, s + 1)) for s in range(len(times))]
    with atomic_file(result) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def at_l0(points: list[tuple[float, float]], wanted: float) -> float | None:
    """Returns the least FVU at an L0 on the lower envelope of (L0, FVU) points; None outside of them."""
    logs = sorted((np.log(max(l0, 1e-9)), np.log(max(fvu, 1e-9))) for l0, fvu in points)
    target, best = np.log(wanted), np.inf
    # The envelope of all chords: what mixing two runs' settings between them can be expected to reach.
    for x0, y0 in logs:
        for x1, y1 in logs:
            if x0 <= target <= x1:
                share = 0.0 if x1 == x0 else (target - x0) / (x1 - x0)
                best = min(best, y0 + share * (y1 - y0))
    return float(np.exp(best)) if np.isfinite(best) else None


def table(results: dict[str, dict[str, list[dict[str, Any]]]], step: Any, wanted: tuple[float, ...]) -> list[list[str]]:
    """Returns rows of FVU by site and L0, a column per recipe."""
    first = next(iter(next(iter(results.values())).values()))
    lines = []
    for site in dict.fromkeys(row["site"] for row in first):
        for l0 in wanted:
            values = [at_l0(points(found, site, step), l0) for found in results.values()]
            lines.append([site, f"{l0:g}", *("-" if v is None else f"{v:.4f}" for v in values)])
    return lines


def points(found: dict[str, list[dict[str, Any]]], site: str, step: Any) -> list[tuple[float, float]]:
    """Returns (L0, FVU) of a recipe's runs at a site and step."""
    rows = [row for run in found.values() for row in run if row["site"] == site and row["step"] == step]
    return [(row["l0"], row["fvu"]) for row in rows]


def figure(results: dict[str, dict[str, list[dict[str, Any]]]]) -> Figure:
    """Draws all runs, a panel per site."""
    first = next(iter(next(iter(results.values())).values()))
    sites = list(dict.fromkeys(row["site"] for row in first))
    drawn = Figure(figsize=(4 * 3, 3 * -(-len(sites) // 3)), layout="constrained")
    for axes, site in zip(drawn.subplots(-(-len(sites) // 3), 3, squeeze=False).flat, sites, strict=False):
        for name, found in results.items():
            axes.plot(*zip(*sorted(points(found, site, "all")), strict=True), "o", ms=4, label=name)
        axes.set(title=site, xlabel="L0", ylabel="FVU", xscale="log", yscale="log")
    drawn.axes[0].legend(fontsize=7)
    return drawn


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Returns a table as Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def main() -> None:
    """Runs everything that is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="of every run")
    parser.add_argument("--batch", type=int, default=1024, help="rows per site and step")
    parser.add_argument("--prompts", type=int, default=2048, help="whose rows are harvested for training")
    parser.add_argument("--expansion", type=float, default=16, help="features over the width")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="which, separated by commas")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args()
    budget = {"steps": options.steps, "batch": options.batch, "expansion": options.expansion}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    print(f"{budget}, rows of {options.prompts} prompts; {machine}", flush=True)
    rows = harvest(options.out, options.prompts)
    budget |= {"checkpoint_every": options.steps, "keep": 1, "buffer_rows": 65536}
    results: dict[str, Any] = {}
    for name in options.recipes.split(","):
        for label, settings in runs(name):
            results.setdefault(name, {})[label] = measure_run(options.out / label, rows, settings, budget)
            print(f"{label} done", flush=True)
    width = load_pipeline("organism").config.transformer.d_model
    wanted = tuple(width / share for share in (32, 16, 8, 4))
    header = ["site", "L0", *results]
    parts = [
        f"# FVU by sparsity\n\n{budget}, {machine}\n\n## All steps",
        markdown(header, table(results, "all", wanted)),
    ]
    for step in range(4):
        parts += [f"## Step {step}", markdown(header, table(results, step, (width / 8,)))]
    with atomic_file(options.out / "sparsity.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (options.out / "sparsity.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure(results).savefig(options.out / "sparsity.png", dpi=120)
    print(json.dumps(results) if options.json else "\n\n".join(parts))


if __name__ == "__main__":
    main()
