"""A saved graph held against the model it explains (docs/method.md, sections 3, 4, 7 and 9).

1. Exact in the frozen model, and held to bars:
   replacement     the replacement gives the model's own MLP inputs and velocity at the trace
   readings        the graph's pre-activations and biases are those of the run captured anew
   conservation    edges, summed before any threshold, and bias add up to the pre-activation, per expanded target
   edges           an edge is what taking its source away does to its target, all else held
2. Measured in the real model, and reported as they are:
   perturbation    features taken off alone, against what the graph predicts of every node downstream
   completeness    how much of the target a circuit's features keep alone, and how much goes when they go

`validate` does all; `failed_checks` names the bars that are missed. Errors of readings, conservation and edges are
relative to all that adds up to a target, its absolute edges and its bias: where the bias is many times the edges, as in
the organism's first block, float32 rounds it to more than 1e-6 of the edges.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from difffract_jax.circuits.attribution.engine import Engine, read_targets
from difffract_jax.circuits.checks.completeness import Ablation, curve
from difffract_jax.circuits.checks.faithfulness import perturb
from difffract_jax.circuits.checks.predictions import agreement, downstream, predicted_change, predicted_influence
from difffract_jax.circuits.checks.rerun import Rerun
from difffract_jax.circuits.checks.summaries import EVERY
from difffract_jax.circuits.checks.variants import push_edges
from difffract_jax.circuits.effects.readings import Mode
from difffract_jax.circuits.frozen.replacement import run_affine
from difffract_jax.config import UserError
from difffract_jax.generators import random_generator
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.frozen_attention import without_pooled, without_scores
from difffract_jax.graphs.graph import EXPLAINING, FEATURE, OUTPUT, REST, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.pruning import node_influence, prune

READINGS: tuple[Mode, ...] = ("propagated", "live", "full")
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Sizes of circuits, as far as the graph has features; that of the pruned circuit comes in between."""
BARS = {"replacement": 1e-4, "readings": 1e-4, "conservation": 1e-6, "edges": 1e-6}
"""Largest errors in float32, over one step."""
ACROSS = 1e-4
"""Largest error of conservation over several steps: a step's latents are a rounded sum of velocities."""
X64 = 1e-9
"""Largest error of conservation in float64."""
PREDICTIONS = ("influence", "change")


def validate(
    again: Rerun,
    graph: Graph,
    *,
    edges: int = 200,
    ablations: int = 50,
    ablation: Ablation = "mean",
    draws: int = 5,
    seed: int = 0,
    readings: tuple[Mode, ...] = READINGS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Holds a graph against its run.

    Args:
        again: the run, from `recapture.capture_again`.
        graph: position by position; attention's scores are left out.
        edges: how many to check, drawn by the seed; 0 for all.
        ablations: how many of the most influential features to take off.
        ablation: what features outside a circuit become.
        draws: random circuits of each size.
        seed: of the edges and the random circuits.
        readings: in which completeness is measured.
        progress: called with (parts done, parts in all).

    Returns:
        JSON values: `exactness`, rows of check, worst and median error, how many of how many, bar and whether it holds;
        `perturbation`, see `perturbation`; `completeness`, see `completeness`.

    Raises:
        UserError: if the graph has no features but its targets.
    """
    if not np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets).size:
        raise UserError(
            "The graph has no features besides its targets, so that there is nothing to take off; trace a target of a "
            "later block, or with a smaller --min-attribution, and prune less."
        )
    # What is checked is the frozen map, of which attention's scores and modulations are no part.
    again = again._replace(rows=again.rows[~np.isin(graph.node_kind, EXPLAINING)])
    graph = without_pooled(without_scores(graph))
    done, parts = 0, 4 + len(readings)

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, parts)

    rows = [_replacement(again.engine), *_sums(again, graph)]
    advance()
    rows.append(_edges(again, graph, edges, seed))
    advance()
    found: dict[str, Any] = {"exactness": [_held(row, again.engine) for row in rows]}
    found["perturbation"] = perturbation(again, graph, ablations)
    advance()
    sizes, pruned = circuit_sizes(graph)
    advance()
    curves = []
    for reading in readings:
        curves.append(curve(again, graph, sizes, reading, ablation=ablation, draws=draws, seed=seed))
        advance()
    found["completeness"] = {"ablation": ablation, "pruned": pruned, "draws": draws, "curves": curves}
    return found


def failed_checks(found: dict[str, Any]) -> str | None:
    """Returns one sentence that names every bar missed; None if all are held."""
    missed = [row for row in found["exactness"] if not row["holds"]]
    if not missed:
        return None
    told = "; ".join(f"{row['check']}, {row['worst']:.2g} where {row['bar']:g} is allowed" for row in missed)
    return (
        f"The graph is not what its run gives ({told}): it was changed, or traced by another release or on other "
        "hardware; trace it again."
    )


def _held(row: dict[str, Any], engine: Engine) -> dict[str, Any]:
    bar, dtype = BARS[row["kind"]], engine.steps[0].record.latents.dtype
    if row["kind"] == "conservation":
        bar = X64 if dtype == np.float64 else (ACROSS if engine.across else bar)
    return row | {"bar": bar, "holds": bool(row["worst"] <= bar)}


def _row(kind: str, check: str, errors: Float64[np.ndarray, "error"], of: int) -> dict[str, Any]:
    worst, median = (float(f(errors)) if errors.size else 0.0 for f in (np.max, np.median))
    return {"kind": kind, "check": check, "worst": worst, "median": median, "checked": int(errors.size), "of": of}


def _replacement(engine: Engine) -> dict[str, Any]:
    """Holds the replacement at the trace against the model, site by site."""
    errors, groups = [], engine.infos[0].layout.groups
    for prepared in engine.steps:
        with jax.default_matmul_precision("highest"):
            found = run_affine(prepared.record, prepared.sites, prepared.sources)
        pairs = [
            (a, b)
            for group, ours, theirs in zip(groups, found.mlp_in, prepared.record.mlp_in, strict=True)
            if group.mlp
            # Layer by layer in NumPy: in JAX every index would be a program of its own.
            for a, b in zip(np.asarray(ours), np.asarray(theirs), strict=True)
        ]
        if prepared.record.velocity is not None:
            pairs.append((found.velocity, prepared.record.velocity))
        for pair in pairs:
            ours, theirs = (np.asarray(array, np.float64) for array in pair)
            errors.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return _row("replacement", "replacement = model, every MLP input and velocity", np.array(errors), len(errors))


def _sums(again: Rerun, graph: Graph) -> list[dict[str, Any]]:
    """Holds each expanded target's sums against its pre-activation, and both against the run's."""
    engine, rows = again.engine, again.rows[graph.target_node]
    scale = graph.target_scale
    fresh = read_targets(engine, rows, tuple(step.record.reading for step in engine.steps))
    bias = read_targets(engine, rows, engine.constants)
    apart = np.maximum(np.abs(fresh - graph.target_preactivation), np.abs(bias - graph.target_bias)) / scale
    readings = _row("readings", "pre-activation and bias = those of the run", apart, rows.size)
    return [readings, _row("conservation", "edges + bias = pre-activation", graph.conservation_error, rows.size)]


def _edges(again: Rerun, graph: Graph, count: int, seed: int) -> dict[str, Any]:
    """Holds edges against their direct interventions."""
    checkable = np.flatnonzero(graph.node_kind[graph.edge_source] != REST)
    chosen = checkable
    if 0 < count < checkable.size:
        chosen = np.sort(random_generator(seed).choice(checkable, count, replace=False))
    sources, source = np.unique(graph.edge_source[chosen], return_inverse=True)
    targets, target = np.unique(graph.edge_target[chosen], return_inverse=True)
    pushed = push_edges(again.engine, again.rows[sources], again.rows[targets])[source, target]
    scale = np.ones(graph.node_kind.size)
    scale[graph.target_node] = graph.target_scale
    errors = np.abs(pushed - graph.edge_attribution[chosen]) / scale[graph.edge_target[chosen]]
    return _row("edges", "edge = its direct intervention", errors, checkable.size)


def perturbation(again: Rerun, graph: Graph, ablations: int) -> dict[str, Any]:
    """Takes features off in the real model, one at a time, and compares the changes with the graph's predictions.

    Args:
        again: the graph's run.
        graph: position by position.
        ablations: how many of its most influential features.

    Returns:
        JSON values: `rows`, per prediction the correlations over the features taken off with each of the graph's
        targets, then those over all pairs of feature taken off and node downstream; `median`, per prediction that of
        the correlations of single nodes downstream; `pairs`, the pairs themselves, `own` those with a target.
        `influence` is compared with the size of the change.
    """
    inside = np.setdiff1d(np.flatnonzero(graph.node_kind == FEATURE), graph.targets)
    top = inside[np.argsort(-node_influence(graph)[inside], kind="stable")][:ablations].astype(np.int64)
    readouts = np.flatnonzero((graph.node_kind == FEATURE) | (graph.node_kind == OUTPUT)).astype(np.int64)
    changed = perturb(again.engine, again.rows[top], again.rows[readouts])
    pairs, names = downstream(graph, top, readouts), node_names(graph)
    told = {
        "influence": predicted_influence(graph, top)[:, readouts],
        "change": predicted_change(graph, top)[:, readouts],
    }
    own_rows, rows, medians = [], [], {}
    for name in PREDICTIONS:
        happened = np.abs(changed) if name == "influence" else changed
        rows.append({"prediction": name, "of": EVERY} | agreement(told[name], happened, pairs))
        per_readout = [agreement(told[name][:, i], happened[:, i], pairs[:, i]) for i in range(readouts.size)]
        for target in graph.targets:
            mine = per_readout[int(np.searchsorted(readouts, target))]
            own_rows.append({"prediction": name, "of": names[target]} | mine)
        medians[name] = _median(per_readout)
    own = np.broadcast_to(np.isin(readouts, graph.targets), pairs.shape)
    shown = {name: told[name][pairs].tolist() for name in PREDICTIONS}
    shown |= {"measured": changed[pairs].tolist(), "own": own[pairs].tolist()}
    sizes = {"ablated": int(top.size), "nodes": int(readouts.size)}
    return sizes | {"rows": own_rows + rows, "median": medians, "pairs": shown}


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians of the correlations that are told, and of how many."""
    told = [one for one in found if one["spearman"] is not None]
    if not told:
        return {"spearman": None, "pearson": None, "nodes": 0}
    medians = {name: float(np.median([one[name] for one in told])) for name in ("spearman", "pearson")}
    return medians | {"nodes": len(told)}


def circuit_sizes(graph: Graph) -> tuple[list[int], int]:
    """Returns sizes of circuits to measure, and the number of features that pruning keeps.

    Args:
        graph: position by position; of one that is pruned already, all features count as kept.
    """
    many = _features(aggregate(graph))
    kept = many if graph.provenance.pruning is not None else _features(prune(graph))
    return sorted({*(size for size in SIZES if size < many), kept, many} - {0}), kept


def _features(summed: Graph) -> int:
    return int(np.setdiff1d(np.flatnonzero(summed.node_kind == FEATURE), summed.targets).size)
