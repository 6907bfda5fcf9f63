"""The pooled path as nodes, on the organism: what the integral misses, what words miss, and what both cost.

1. Completeness: what the sum of edges misses of the exchange of the pooled embedding, by the number of points; and at
   the prompt's end alone, as a first order has it.
2. What is direct; how far a modulation exchanged alone is from its edge; which part of the exchange no word makes.
3. Cost: seconds of a trace with the pooled path frozen and explained.

    python benchmarks/pooled.py [--nodes 30] [--prompts 3] [--json]

Settings and machine are printed.
"""

import argparse
import json
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import Engine, make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pooled_path import PooledEffects, integrate
from difffract_jax.circuits.attribution.pooled_words import word_parts
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.tokenizers import encode_prompt

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow circle",
    "a blue square",
)
TARGETS = ("pixels:color=red,box=0,0,24,48", "velocity:")
STEP = 1
PARTS = (1, 2, 4, 8, 16, 32)


def completeness(engine: Engine, pipe: Pipeline) -> tuple[list[dict[str, float]], PooledEffects]:
    """Returns what the sum misses by the number of points, and the effects with as many as are needed."""
    rows, table = np.array([engine.sources]), []
    for parts in (*PARTS, None):
        begin = time.perf_counter()
        found = integrate(engine, rows, pipe, parts)
        took, size = time.perf_counter() - begin, np.abs(found.edges).sum()
        told = {"points": found.points, "as many as are needed": parts is None, "s": took}
        errors = {
            "remainder over swap": found.remainder / found.swap,
            "remainder over sum of |edges|": found.remainder / size,
        }
        table.append(told | {name: float(value[0]) for name, value in errors.items()})
    return table, found


def split(pipe: Pipeline, engine: Engine, found: PooledEffects) -> dict[str, Any]:
    """Returns how the exchange divides: direct or not, alone or together, among words or not."""
    info, swap = engine.infos[0], float(found.swap[0])
    words = word_parts(pipe, info.prompt, info.text_tokens, found.weights[0], found.exchanged[0])
    assert words is not None
    edges, alone = found.edges[0], found.alone[0]
    return {
        "swap": swap,
        "direct over swap": float(found.direct[0]) / swap,
        "sum of single exchanges over swap": float(alone.sum()) / swap,
        "|edges| over |swap|": float(np.abs(edges).sum()) / abs(swap),
        "slope of single exchanges on edges": float(edges @ alone / (edges @ edges)),
        "their correlation": float(np.corrcoef(edges, alone)[0, 1]),
        "modulations for 80% of |edges|": int(
            np.searchsorted(np.cumsum(np.sort(np.abs(edges))[::-1]), 0.8 * np.abs(edges).sum())
        )
        + 1,
        "modulations": edges.size,
        "no word's, over swap": float(words.missed.sum()) / swap,
        "words": dict(
            zip(map("{}@{}".format, words.text, words.place), (words.edges.sum(axis=0) / swap).tolist(), strict=True)
        ),
    }


def missed_by_clip(pipe: Pipeline, prompt: str, text_tokens: int) -> dict[str, float]:
    """Returns what words miss of the exchanged part of the pooled embedding, linearised at the prompt and between."""
    ids, empty = (encode_prompt(pipe.tokenizers, text, text_tokens).clip_ids for text in (prompt, ""))
    at, before = pipe.clip.embedded(ids), pipe.clip.embedded(empty)
    pooled = jax.jit(lambda embedded: pipe.clip.encode_embedded(embedded, ids)[1])
    push = jax.jit(lambda share: jax.jvp(pooled, (before + share * (at - before),), (at - before,))[1])
    exchanged = pipe.clip(ids)[1] - pipe.clip(empty)[1]
    between = pooled(at) - pooled(before)
    found = {"at the prompt": push(jnp.ones(())), "between, exactly": between}
    return {name: float(jnp.linalg.norm(exchanged - one) / jnp.linalg.norm(exchanged)) for name, one in found.items()}


def cost(prepared: Any, tcs: Any, target: Any, pipe: Pipeline, nodes: int) -> dict[str, float]:
    """Returns seconds of a trace with the pooled path frozen and explained, compiled already."""
    seconds = {}
    for pooled in ("frozen", "explained"):
        for _ in range(2):
            begin = time.perf_counter()
            graph = attribute(prepared, tcs, target=target, max_nodes=nodes, pooled=pooled, pipe=pipe)
            took = time.perf_counter() - begin
        seconds[f"s, {pooled}"] = took
        print(f"{pooled}: {took:.2f} s, {graph.summary().nodes}, {graph.largest_conservation_error:.1e}", flush=True)
    return seconds


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    found: dict[str, Any] = {}
    for prompt in PROMPTS[: args.prompts]:
        trace = capture(pipe, tcs, prompt, step=STEP, output=True)
        prepared = prepare(trace, tcs)
        with jax.default_matmul_precision("highest"):
            found[prompt] = {"CLIP misses": missed_by_clip(pipe, prompt, trace.info.text_tokens)}
        for text in TARGETS:
            target = resolve_target(pipe, trace, parse_target(text))
            engine = make_engine(prepared, tcs, (target,))
            table, effects = completeness(engine, pipe)
            found[prompt][text] = {"completeness": table, **split(pipe, engine, effects)}
            print(json.dumps({prompt: found[prompt]}), flush=True)
    found["cost"] = cost(prepared, tcs, target, pipe, args.nodes)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
    print(json.dumps({"settings": vars(args) | {"step": STEP}, **machine, **found}, indent=1))


if __name__ == "__main__":
    main()
