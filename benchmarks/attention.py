"""Attention as part of a graph, on the organism: what its nodes are worth, and what they cost.

1. From scores to a target: for the scores with the largest edges, what the target loses when a score becomes its
   query's mean, with the softmax of its block live and all else frozen, and in the real model, where all that follows
   is live too. Slope and correlation of either on the edges; remainders as a distribution.
2. From features to scores: for the largest edges into these scores, what the score loses when a feature is taken off
   the residual stream, with live norms. An edge into a score is a share of a sum of second degree, so that up to twice
   the edge is lost.
3. Cost: seconds per expanded node with attention frozen and explained, and what the scores alone take.

    python benchmarks/attention.py [--scores 100] [--nodes 100] [--json]

Settings and machine are printed.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import Engine, make_engine, output_value
from difffract_jax.circuits.attribution.explained import forward_derivatives
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.score_gradients import ChosenScores, choose_scores, removal_effects
from difffract_jax.circuits.attribution.score_sides import entering_blocks, sides_of_block
from difffract_jax.circuits.frozen.replacement import prepare, residuals
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.circuits.trace.record import Record
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.stacks import depth_of, group_slices, sequences, slice_layer, streams

PROMPT = "a red circle left of a blue square"
TARGETS = ("pixels:color=red,box=0,0,24,48", "velocity:")
STEP = 1


def fit(told: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Returns slope and correlation of what was seen on what was told."""
    slope = float(told @ seen / (told @ told))
    return {"slope": slope, "pearson": float(np.corrcoef(told, seen)[0, 1])}


@partial(jax.jit, static_argnames="at")
def run_live(record: Record, added: jax.Array, at: int) -> jax.Array:
    """Returns the real model's velocity with numbers added to the scores of the recorded block `at`."""
    h, number = record.boundary, 0
    for stack in record.weights.stacks:
        for layer in range(depth_of(stack)):
            scores = {"scores": added} if number == at else {}
            joined, _ = slice_layer(stack, layer)(sequences(h, stack.groups), record.cond, **scores)
            h = streams(joined, stack.groups, h)
            number += 1
    assert record.weights.final is not None
    return record.weights.final(h.img, record.cond)


def to_target(engine: Engine, chosen: ChosenScores) -> dict[str, Any]:
    """Holds edges from scores against the scores' removal."""
    record, first = engine.steps[0].record, engine.infos[0].recorded[0]
    output, edges = engine.outputs[0], chosen.edges[0]
    told = removal_effects(edges, chosen.value, chosen.pattern)
    real = np.zeros(edges.size)
    heads, tokens = record.frozen[0].q.shape[2], record.frozen[0].q.shape[1]
    none = jnp.zeros((heads, tokens, tokens))
    before = output_value(output, run_live(record, none, 0), record.latents)
    for i in range(edges.size):
        at = int(chosen.head[i]), int(chosen.query[i]), int(chosen.key[i])
        velocity = run_live(record, none.at[at].set(-chosen.value[i]), int(chosen.block[i]) - first)
        real[i] = before - output_value(output, velocity, record.latents)
    apart = np.abs(told - edges) / np.abs(edges)
    total, forward = chosen.total[0].sum(), float(forward_derivatives(engine, np.array([engine.sources]))[0])
    return {
        "softmax live": fit(edges, told),
        "real model": fit(edges, real),
        "remainder over edge": {f"{share:.0%}": float(np.quantile(apart, share)) for share in (0.5, 0.9, 1)},
        "sum of all edges": float(total),
        "forward mode": forward,
    }


def to_scores(engine: Engine, chosen: ChosenScores, most: int) -> dict[str, Any]:
    """Holds edges from features into scores against the features' removal, with live norms."""
    info, entering, table, pairs = engine.infos[0], entering_blocks(engine, 0), engine.table, []
    features = np.flatnonzero((table.kind == FEATURE) & (table.value > 0))
    for i in range(chosen.block.size):
        columns = np.array([[chosen.head[i], chosen.query[i], chosen.key[i]]], np.int32)
        sides = sides_of_block(engine, 0, int(chosen.block[i]) - info.recorded[0], columns, entering)
        edges = (sides.query + sides.key)[0]
        best = features[np.argmax(np.abs(edges[features]))]
        pairs.append((abs(edges[best]), i, int(best), edges[best]))
    pairs = [pair for pair in sorted(pairs, reverse=True)[:most] if pair[0] > 0]
    told, seen = np.array([pair[3] for pair in pairs]), []
    for _, i, row, _ in pairs:
        seen.append(float(chosen.value[i]) - score_without(engine, chosen, i, row))
    return {"pairs": len(pairs), **fit(told, np.array(seen))}


def score_without(engine: Engine, chosen: ChosenScores, i: int, row: int) -> float:
    """Returns a score minus its query's mean, by the recorded pattern, without one feature, with live norms."""
    prepared, info = engine.steps[0], engine.infos[0]
    record, table = prepared.record, engine.table
    block, stream = int(table.block[row]), int(table.stream[row])
    group = int(info.layout.groups_at(block, stream))
    layer = block - info.recorded[0] - record.first_layers[group]
    at = int(info.layout.rows_at(group, stream, table.position[row], info.tokens_of))
    place = int(np.flatnonzero(np.asarray(prepared.sites[group].layers.index[layer, at]) == table.feature[row])[0])
    values = list(prepared.sources.values)
    values[group] = values[group].at[layer, at, place].set(0)
    h = residuals(record, prepared.sites, prepared.sources._replace(values=tuple(values)))
    stack = info.layout.stack_of_block(int(chosen.block[i]))
    within = int(chosen.block[i]) - info.layout.firsts[stack]
    weights = record.weights.stacks[stack]
    joined = tuple(one[within] for one in h[group_slices(record.weights.stacks)[stack]])
    acts = live_block(slice_layer(weights, within), joined, record.cond)
    q, k = acts.frozen.q[chosen.query[i], chosen.head[i]], acts.frozen.k[:, chosen.head[i]]
    held = slice_layer(record.frozen[stack], within)
    recorded = held.k[:, chosen.head[i]] @ held.q[chosen.query[i], chosen.head[i]] * q.size**-0.5
    scores = k @ q * q.size**-0.5
    return float(scores[chosen.key[i]] - jax.nn.softmax(recorded) @ scores)


@jax.jit
def live_block(block: Any, h: tuple[jax.Array, ...], cond: Any) -> Any:
    """Returns what a live block computes."""
    return block(h, cond)[1]


def cost(prepared: Any, tcs: Any, target: Any, nodes: int, scores: int) -> dict[str, float]:
    """Returns seconds per expanded node, with attention frozen and explained, compiled already."""
    seconds = {}
    for attention in ("frozen", "explained"):
        for _ in range(2):
            begin = time.perf_counter()
            graph = attribute(prepared, tcs, target=target, max_nodes=nodes, attention=attention, max_scores=scores)
            took = time.perf_counter() - begin
        seconds[attention] = took
        print(f"{attention}: {took:.2f} s, {graph.summary().nodes}", flush=True)
    expanded = min(nodes, int((graph.node_kind[graph.target_node] == FEATURE).sum()) + 1)
    more = seconds["explained"] - seconds["frozen"]
    each = {f"s per node, {name}": value / expanded for name, value in seconds.items()}
    return {"expanded": expanded, **each, "s for the scores": more, "s per score": more / max(scores, 1)}


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scores", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    trace = capture(pipe, tcs, PROMPT, step=STEP, output=True)
    prepared, found = prepare(trace, tcs), {}
    for text in TARGETS:
        target = resolve_target(pipe, trace, parse_target(text))
        engine = make_engine(prepared, tcs, (target,))
        with jax.default_matmul_precision("highest"):
            chosen = choose_scores(engine, np.array([engine.sources]), np.ones(1), args.scores)
            found[text] = {
                "scores to target": to_target(engine, chosen),
                "features to scores": to_scores(engine, chosen, args.scores),
            }
    found["cost"] = cost(prepared, tcs, target, args.nodes, args.scores)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "jax": jax.__version__}
    print(json.dumps({"settings": vars(args) | {"prompt": PROMPT, "step": STEP}, **machine, **found}, indent=1))


if __name__ == "__main__":
    main()
