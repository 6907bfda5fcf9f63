"""Seconds per expanded node, on the golden pipeline, a middle size and FLUX's; compilation apart.

1. `golden`: the reference's small pipeline and its transcoders, the target of golden graph 0.
2. `middle`: 8 double- and 4 single-stream blocks, width 512, 256 + 64 tokens, 4,096 features per site, random
   weights, encoder biases such that about 7% of the features are active; the target lies in img block 7.
3. `flux`: FLUX.1[schnell]'s shape, random weights drawn on the device; 49,152 features per site, 0.2% of them active.
   `--sites 16`: double-stream blocks 3 to 18, in float32; `--sites all`: every MLP of the 57 blocks, in bfloat16.
   `--pixels 512|1024`. It is for an accelerator of 80 GB, or more with all blocks, and goes with `--nodes 1000`.
4. Each is traced once to compile, then five times; the median counts. It includes encoding the trace, expansion,
   influence and compaction, and not the capture, as the reference's figure does not either.
5. Beside it stand two floors: multiplications, counted, over the rate of a matrix product measured around each run;
   and bytes that must move at least once, over the rate of a copy. Machines are shared and noisy: on a processor one
   thread is measured in processor time, which is the clock's on a quiet machine; yet others take caches and memory
   away. Compare ratios within one run. An accelerator's peak of memory is its own count, from the process's start.
6. `--profile` adds the seconds of each part. `--scaling` instead varies the nodes (of the middle size), the tokens or
   the sites (width 128, 512 features), and writes a table and a plot; what would take longer than `--budget` seconds
   is left out, and said so.

    python benchmarks/attribution.py [--size golden|middle] [--threads 1] [--profile]
    python benchmarks/attribution.py --size flux --nodes 1000 --repeats 1 [--pixels 1024] [--sites all]
    python benchmarks/attribution.py --scaling nodes|tokens|sites [--out scaling]

Reference (PyTorch, one thread, same sizes): 0.213 s per node on the middle size at threshold 1e-4.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument(
    "--size", choices=["golden", "middle", "both", "flux"], default="both", help="what to trace; both: the first two"
)
PARSER.add_argument("--pixels", type=int, choices=[512, 1024], default=512, help="width and height, of size flux")
PARSER.add_argument("--sites", choices=["16", "all"], default="16", help="blocks with transcoders, of size flux")
PARSER.add_argument("--threads", type=int, default=1, help="processor threads; 0 leaves the choice to XLA")
PARSER.add_argument("--nodes", type=int, default=100, help="features to expand")
PARSER.add_argument(
    "--expansion-batch", type=int, default=50, help="features expanded between computations of influence"
)
PARSER.add_argument("--min-attribution", type=float, default=1e-4, help="smallest edge kept")
PARSER.add_argument("--repeats", type=int, default=5, help="runs whose median is taken")
PARSER.add_argument("--profile", action="store_true", help="add the seconds of each part")
PARSER.add_argument("--scaling", choices=["nodes", "tokens", "sites"], help="vary this instead")
PARSER.add_argument("--budget", type=float, default=300, help="seconds that one point of a curve may take")
PARSER.add_argument("--out", type=Path, default=Path("scaling"), help="where curves go: .csv and .png are added")

ARGS = PARSER.parse_args() if __name__ == "__main__" else PARSER.parse_args([])
if ARGS.size == "flux" and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    # Three quarters, JAX's default, would be too little.
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.96")
if ARGS.threads == 1 and ARGS.size != "flux" and __name__ == "__main__":
    # One core, and one thread in XLA's pool: both must be set before JAX starts.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax  # noqa: E402  (after the settings above)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from difffract_jax.address import GROUPS  # noqa: E402
from difffract_jax.circuits.attribution import engine, expansion  # noqa: E402
from difffract_jax.circuits.attribution.attribute import attribute  # noqa: E402
from difffract_jax.circuits.attribution.selection import strongest_feature  # noqa: E402
from difffract_jax.circuits.frozen.replacement import Replacement, prepare_step  # noqa: E402
from difffract_jax.circuits.notation.feature import Feature  # noqa: E402
from difffract_jax.circuits.trace.capture import Trace, capture  # noqa: E402
from difffract_jax.loading import load_pipeline, load_transcoders  # noqa: E402
from difffract_jax.models.mmdit import FluxConfig  # noqa: E402
from difffract_jax.models.pipeline import Pipeline  # noqa: E402
from difffract_jax.models.presets import PRESETS  # noqa: E402
from difffract_jax.models.stacks import group_slices  # noqa: E402
from difffract_jax.models.tiny import random_pipeline  # noqa: E402
from difffract_jax.transcoders.sites import sites_of  # noqa: E402
from difffract_jax.transcoders.transcoder import TranscoderConfig, TranscoderSet, random_transcoders  # noqa: E402

REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "reference"
ON_CPU = jax.default_backend() == "cpu"
MIDDLE = FluxConfig(
    depth_double=8,
    depth_single=4,
    heads=8,
    head_dim=64,
    rope_axes=(16, 24, 24),
    in_channels=64,
    out_channels=64,
    text_width=256,
    pooled_width=128,
    guidance=False,
)
ACTIVE = 0.07
REFERENCE_SECONDS = {"middle": 0.213}
"""The reference's seconds per expanded node, measured with PyTorch 2.13 on one thread of a 2-core Xeon with AVX-512."""


ACTIVE_IN_FLUX = 0.002


def golden() -> tuple[Trace, TranscoderSet, Feature]:
    """The trace of golden graph 0, but for its starting noise."""
    pipe, tcs = load_pipeline(REFERENCE / "pipeline"), load_transcoders(REFERENCE / "transcoders")
    prompt = json.loads((REFERENCE / "golden_graph_0.json").read_text(encoding="utf-8"))["target"]["prompt"]
    noise = np.load(REFERENCE / "golden_forward.npz")["p0_initial_latents"]
    size = {"height": 96, "width": 96, "text_tokens": 16}
    trace = capture(pipe, tcs, prompt, step=1, latents=noise, include_padding=True, run=pipe.plan(**size))
    return trace, tcs, Feature.parse("img/2/f326@14")


def middle() -> tuple[Trace, TranscoderSet, Feature]:
    """A random trace of the middle size."""
    return small_trace(MIDDLE, 4096, 16, 64)


def flux(
    config: FluxConfig = PRESETS["flux-schnell"], features: int = 49_152, side: int = ARGS.pixels // 16, text: int = 512
) -> tuple[Trace, TranscoderSet, Feature]:
    """A random trace of FLUX's shape. Smaller shapes are for trying it out."""
    every, dtype = ARGS.sites == "all", jnp.bfloat16 if ARGS.sites == "all" else jnp.float32
    double = tuple(range(0 if every else max(config.depth_double - 16, 0), config.depth_double))
    joint = tuple(range(config.depth_single)) if every else ()
    pipe = random_pipeline(transformer=config, dtype=jnp.bfloat16, on_device=True)
    # Recording asks of transcoders only where they are; drawn later, they never lie beside the model.
    shape = TranscoderConfig(d_model=config.d_model, features=features, time_embed=0, conditioning="none")
    sites = sites_of({"img": double, "txt": double, "joint": joint})
    trace = record(pipe, TranscoderSet({}, sites, shape, ""), side, text)
    tell("recorded", peak_memory())
    del pipe
    tcs = random_transcoders(config, features=features, dtype=dtype, sites=sites.groups)
    return calibrated(trace, tcs, ACTIVE_IN_FLUX)


def small_trace(config: FluxConfig, features: int, side: int, text: int) -> tuple[Trace, TranscoderSet, Feature]:
    """A random trace of a shape whose weights a processor draws, with a transcoder at every double-stream MLP."""
    tcs = random_transcoders(config, features=features)
    return calibrated(record(random_pipeline(transformer=config), tcs, side, text), tcs, ACTIVE)


def record(pipe: Pipeline, tcs: TranscoderSet, side: int, text: int) -> Trace:
    """Records a run of side x side image tokens."""
    prompt, pixels = "a red circle left of a blue square", 8 * side
    return capture(
        pipe, tcs, prompt, step=1, include_padding=True, run=pipe.plan(height=pixels, width=pixels, text_tokens=text)
    )


def calibrated(trace: Trace, tcs: TranscoderSet, active: float) -> tuple[Trace, TranscoderSet, Feature]:
    """Sets encoder biases such that a share of the features is active, and chooses a target in the last block."""
    for group, inputs in zip(GROUPS, trace.record.mlp_in, strict=True):
        stack = tcs.stacks.get(group.name)
        for layer, x in enumerate(inputs if stack is not None else ()):
            # Of FLUX's rows 64 are enough: they have three million pre-activations.
            rows = x if ON_CPU else x[:: max(1, len(x) // 64)]
            with jax.default_matmul_precision("highest"):
                cutoff = np.quantile(np.asarray(rows @ stack.enc.kernel[layer]), 1 - active)
            bias = stack.enc.bias[...]
            stack.enc.bias[...] = bias.at[layer].set(jnp.asarray(-cutoff, bias.dtype))
    label = "single" if "single" in tcs.sites.labels else "img"
    return trace, tcs, strongest_feature(trace, tcs, label, tcs.sites.labels[label][-1])


def tell(what: str, figures: Any) -> None:
    """Says at once what is known, so that a run that is cut off has told it."""
    sys.stderr.write(f"{what}: {json.dumps(figures)}\n")
    sys.stderr.flush()


def describe(prepared: Replacement) -> dict[str, Any]:
    """Returns the sizes that decide how long a trace takes."""
    record, values = prepared.record, [v for v in prepared.sources.values if v.size]
    return {
        "blocks": [rows.shape[0] for rows in (record.mlp_in[0], record.mlp_in[-1])],
        "tokens": [rows.shape[1] for rows in record.mlp_in[:2]],
        "width": record.boundary.img.shape[1],
        "features": next(site.stack.config.features for site in prepared.sites if site.stack is not None),
        "active": [round(float(np.mean(np.asarray(v) > 0) * v.shape[2]), 1) for v in values],
        "places": [v.shape[2] for v in values],
    }


class Layers(NamedTuple):
    """What the recorded blocks hold, a number each.

    Attributes:
        decoders: bytes of the decoder vectors that are active somewhere.
        projections: bytes of the weights of values and output, two matrices of width x width per stream.
        active: active features, over all tokens.
        places: places for features, over all tokens.
    """

    decoders: np.ndarray
    projections: np.ndarray
    active: np.ndarray
    places: np.ndarray


def layers_of(prepared: Replacement) -> Layers:
    """Counts what the recorded blocks hold."""
    width = prepared.record.boundary.img.shape[1]
    weight = jax.tree.leaves(prepared.record.weights.stacks[0])[0].dtype.itemsize
    counts = []
    for values, (stack, layers, _) in zip(prepared.sources.values, prepared.sites, strict=True):
        active = np.asarray(values) > 0
        index = np.where(active, np.asarray(layers.index), -1)
        vector = 0 if stack is None else width * stack.dec.kernel.dtype.itemsize
        decoders = [vector * np.unique(layer[layer >= 0]).size for layer in index]
        projections = [2 * width**2 * weight] * values.shape[0]
        places = [values.shape[1] * values.shape[2]] * values.shape[0]
        counts.append(np.array([decoders, projections, active.sum(axis=(1, 2)), places], np.int64))
    slices = group_slices(prepared.record.weights.stacks)
    return Layers(*np.concatenate([sum(counts[part]) for part in slices], axis=1))


def reach(trace: Trace, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many recorded blocks' attention, and how many blocks' MLPs, lead to targets in the given blocks.

    A single-stream MLP reads what its block's attention reads; a double-stream one reads what attention has added to.
    """
    layers = blocks - trace.info.recorded[0]
    return layers + (blocks < trace.info.layout.stacks[0].depth), layers


def floor_flops(trace: Trace, held: Layers, blocks: np.ndarray) -> float:
    """Counts the multiplications and additions that targets in the given blocks need.

    Per block below the target's and token: two projections (values and output) of width x width, the pattern applied to
    values, and one product per active feature.
    """
    rows = sum(rows.shape[1] for rows in trace.record.mlp_in[:2])
    width = trace.record.boundary.img.shape[1]
    per_block = 4 * rows * width**2 + 2 * rows**2 * width
    pairs = zip(*reach(trace, blocks), strict=True)
    return float(sum(hops * per_block + 2 * width * held.active[:layers].sum() for hops, layers in pairs))


def floor_bytes(trace: Trace, held: Layers, blocks: np.ndarray) -> float:
    """Counts the bytes that must move: edges below each target, written and read; and per expansion, of every block
    below its highest target, the two projections' weights and each decoder vector that is active somewhere."""
    hops, layers = reach(trace, blocks)
    rows = sum(held.places[:count].sum() for count in layers)
    order = [slice(0, 1), *(slice(at, at + ARGS.expansion_batch) for at in range(1, blocks.size, ARGS.expansion_batch))]
    walks = sum(held.decoders[: layers[b].max()].sum() + held.projections[: hops[b].max()].sum() for b in order)
    return float(4 * 2 * rows + walks)


def matmul_rate(repeats: int = 5) -> float:
    """Returns the best floating-point operations per second of a square float32 matrix product."""
    size = 2048 if ON_CPU else 8192
    a = jnp.ones((size, size), jnp.float32)
    with jax.default_matmul_precision("highest"):
        product = jax.jit(lambda x: x @ x)
        product(a).block_until_ready()
        return max(2 * size**3 / seconds(lambda: product(a).block_until_ready()) for _ in range(repeats))


def copy_rate(size: int = 2**28, repeats: int = 5) -> float:
    """Returns the best bytes per second, read and written, of a copy."""
    if not ON_CPU:
        a, add = jnp.ones(size, jnp.float32), jax.jit(lambda x: x + 1)
        add(a).block_until_ready()
        return max(8 * size / seconds(lambda: add(a).block_until_ready()) for _ in range(repeats))
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return max(2 * size / seconds(lambda: np.copyto(target, source)) for _ in range(repeats))


def peak_memory() -> dict[str, float]:
    """Returns the most of an accelerator's memory that was in use so far, what is, and what there is.

    Nothing on a processor.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"peak_bytes_in_use": "peak", "bytes_in_use": "in use", "bytes_limit": "limit"}
    return {f"{name}, GiB": round(stats[key] / 2**30, 1) for key, name in names.items() if key in stats}


def profile(run: Any) -> dict[str, float]:
    """Returns the seconds that each part of a run takes, the rest, and the whole."""
    spent: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            done: list[Any] = []
            took = seconds(lambda: done.append(jax.block_until_ready(work(*args, **kwargs))))
            spent[name] = spent.get(name, 0.0) + took
            return done[0]

        return wrapped

    parts = [(engine, n) for n in ("prepare_steps", "source_table", "affine_constants", "exact_preactivations")]
    parts += [(engine, "pull"), *((expansion, n) for n in ("add", "next_batch", "compact"))]
    originals = [(module, name, getattr(module, name)) for module, name in parts]
    try:
        for module, name, work in originals:
            setattr(module, name, timed(name, work))
        whole = seconds(run)
    finally:
        for module, name, work in originals:
            setattr(module, name, work)
    return {
        name: round(took, 3) for name, took in (*spent.items(), ("rest", whole - sum(spent.values())), ("all", whole))
    }


def seconds(work: Any) -> float:
    """Returns how long `work()` takes: on one processor thread in its time, which other processes do not add to."""
    clock = time.process_time if ON_CPU and ARGS.threads == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def measure(name: str, trace: Trace, tcs: TranscoderSet, target: Feature) -> dict[str, Any]:
    """Traces repeatedly; returns settings and figures."""
    settings = {
        "max_nodes": ARGS.nodes,
        "expansion_batch": ARGS.expansion_batch,
        "min_attribution": ARGS.min_attribution,
    }

    def run() -> Any:
        return attribute(trace, tcs, target=target, **settings)

    before = peak_memory()
    begin = time.perf_counter()
    graph = run()
    first = time.perf_counter() - begin
    memory_used = {"memory before": before, "memory after the first run": peak_memory()} if before else {}
    nodes = len(graph.target_node)
    tell("first run, with compilation, s", round(first, 2))
    tell("memory", memory_used)
    blocks = graph.node_block[graph.target_node].astype(int)
    prepared = prepare_step(trace, tcs)
    sizes, held = describe(prepared), layers_of(prepared)
    del prepared
    flops = floor_flops(trace, held, blocks) / nodes
    # The rate drifts with the machine's other work: each run is held against the products just before and after it.
    rates, times = [matmul_rate(repeats=3)], []
    for _ in range(ARGS.repeats):
        times.append(seconds(run) / nodes)
        tell("s per node", times[-1])
        rates.append(matmul_rate(repeats=3))
    around = [(before + after) / 2 for before, after in itertools.pairwise(rates)]
    shares = [flops / rate / took for rate, took in zip(around, times, strict=True)]
    memory = copy_rate()
    result = {
        "size": name,
        **sizes,
        **settings,
        "target": str(target),
        "expanded": nodes,
        "edges": int(graph.edge_source.size),
        "sources": engine.make_engine(trace, tcs).sources,
        "first run, with compilation, s": round(first, 2),
        "runs, s": [round(t * nodes, 3) for t in times],
        "median s per node": round(statistics.median(times), 5),
        "matmul GFLOP/s, around each run": [round(rate / 1e9, 1) for rate in around],
        "floor s per node": round(flops / statistics.median(around), 5),
        "floor over measured, each run": [round(share, 3) for share in shares],
        "floor over measured": round(statistics.median(shares), 3),
        "copy GB/s": round(memory / 1e9, 1),
        "bytes' floor s per node": round(floor_bytes(trace, held, blocks) / memory / nodes, 5),
        **memory_used,
    }
    if ARGS.profile:
        result["parts, s"] = profile(run)
    if name in REFERENCE_SECONDS:
        result["reference over measured"] = round(REFERENCE_SECONDS[name] / statistics.median(times), 2)
    return result


def points() -> Any:
    """Yields (abscissa, nodes, trace, transcoders, target) of the curve that is asked for."""
    if ARGS.scaling == "nodes":
        made = middle()
        yield from ((nodes, nodes, *made) for nodes in (100, 300, 1000, 2000, 5000))
    small = dataclasses.replace(MIDDLE, heads=2, depth_double=4, depth_single=1)
    if ARGS.scaling == "tokens":
        for side, text in ((8, 64), (16, 64), (32, 64), (48, 64), (64, 512)):
            yield side**2 + text, ARGS.nodes, *small_trace(small, 512, side, text)
    if ARGS.scaling == "sites":
        for depth in (2, 4, 8, 19, 38):
            yield 2 * depth, ARGS.nodes, *small_trace(dataclasses.replace(small, depth_double=depth), 512, 16, 64)


def scaling() -> None:
    """Measures one curve; writes its table and plot."""
    rows: list[dict[str, float]] = []
    for x, nodes, trace, tcs, target in points():
        settings = {"expansion_batch": ARGS.expansion_batch, "min_attribution": ARGS.min_attribution}
        if rows:
            last = rows[-1]
            expected = last["s per node"] * nodes * (1 if ARGS.scaling == "nodes" else x / last[ARGS.scaling])
            if expected > ARGS.budget:
                sys.stdout.write(f"{ARGS.scaling} {x} left out: about {expected:.0f} s, more than --budget.\n")
                continue
        attribute(trace, tcs, target=target, max_nodes=min(nodes, 2 * ARGS.expansion_batch), **settings)
        done: list[Any] = []
        took = seconds(lambda: done.append(attribute(trace, tcs, target=target, max_nodes=nodes, **settings)))  # noqa: B023
        blocks = done[0].node_block[done[0].target_node].astype(int)
        row = {ARGS.scaling: x, "expanded": blocks.size, "s": round(took, 3), "s per node": took / blocks.size}
        row["floor s per node"] = (
            floor_flops(trace, layers_of(prepare_step(trace, tcs)), blocks) / matmul_rate() / blocks.size
        )
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    with ARGS.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    curve(rows, ARGS.scaling).savefig(ARGS.out.with_suffix(".png"), dpi=150)


def curve(rows: list[dict[str, Any]], what: str) -> Figure:
    """Draws seconds per node, measured and floor, against `what`, with the measured sizes as ticks."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    axes, sizes = figure.subplots(), [row[what] for row in rows]
    for name, label in (("s per node", "measured"), ("floor s per node", "floor")):
        axes.loglog(sizes, [row[name] for row in rows], "o-", label=label)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=what, ylabel="seconds per node")
    axes.legend()
    return figure


def main() -> None:
    """Prints the machine, then one block per size."""
    record = {
        "machine": platform.processor() or platform.machine(),
        "cpu": next(
            (
                line.split(": ")[1]
                for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                if line.startswith("model name")
            ),
            "?",
        )
        if Path("/proc/cpuinfo").exists()
        else "?",
        "devices": [str(device) for device in jax.devices()],
        "threads": ARGS.threads,
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    if ARGS.scaling:
        scaling()
        return
    for name, make in (("golden", golden), ("middle", middle), ("flux", flux)):
        if ARGS.size == name or (ARGS.size == "both" and name != "flux"):
            sys.stdout.write(json.dumps(measure(name, *make()), indent=1) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
