"""The run behind a saved graph, captured anew, so that the graph can be held against the model.

1. The graph's provenance names model, transcoders, prompt, seed, sizes, steps and targets. A graph of another model or
   of other transcoders is refused; so is one that does not tell, or has been summed over positions.
2. Capture that run, and resolve the targets.
3. Find every node's row in the table of sources, and hold the features' values against the graph's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from difffract_jax.address import BRANCHES, IMG, LATENT
from difffract_jax.circuits.attribution.engine import Engine, Output, make_engine
from difffract_jax.circuits.attribution.expansion import SourceTable
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import Span, Trace, capture, capture_steps, run_of_trace
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import EXPLAINING, FEATURE, INPUT, OUTPUT, REST, Graph
from difffract_jax.graphs.loras import texts_of
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.provenance import TraceInfo
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.transcoders.transcoder import TranscoderSet

SAME_VALUE = 1e-3
"""How far a feature's value may be from the graph's, over the largest value: above float32, below other noise."""


class Rerun(NamedTuple):
    """A graph's run, ready to be compared with it.

    Attributes:
        engine: of the run; its outputs are the graph's, in the order of its nodes.
        rows: row of the engine's table of every node; -1 for rest nodes, which stand for several, and for what is
            no source of the frozen map.
    """

    engine: Engine
    rows: Int64[np.ndarray, "node"]


def capture_again(
    pipe: Pipeline, tcs: TranscoderSet, graph: Graph, *, latents: Any = None, trace: Trace | None = None
) -> Rerun:
    """Captures the run of a graph.

    Args:
        pipe: the pipeline it was traced in.
        tcs: the transcoders it was traced with.
        graph: from `attribute`, or pruned position by position.
        latents: packed starting noise, where the graph's run started from given noise.
        trace: of the graph's run, for one that was made of imported activations; else it is captured.

    Raises:
        UserError: if the graph is of another model, of other transcoders or of another run, does not tell which, or is
            summed over positions.
    """
    check_same(pipe, tcs, graph)
    again = capture_run(pipe, tcs, graph, latents=latents) if trace is None else trace
    outputs = outputs_of(pipe, again, graph)
    engine = make_engine(again, tcs, tuple(outputs))
    rows = _find_rows(engine.table, graph)
    rows[graph.node_kind == OUTPUT] = engine.sources + np.arange(len(outputs))
    _check_values(engine, graph, rows)
    return Rerun(engine, rows)


def check_same(pipe: Pipeline, tcs: TranscoderSet, graph: Graph) -> None:
    """Refuses a graph that does not tell its run, is summed over positions, or is of another model or transcoders."""
    told = graph.provenance
    if told.combined is not None:
        raise UserError(
            "The graph combines the circuits of several runs, and is checked against none; give the graph of one run, "
            "as `difffract trace` wrote it."
        )
    run = told.traced_run
    if told.transcoders is None or told.attribution is None or not told.steps:
        raise UserError("The graph does not tell how it was traced; give an .npz that `difffract trace` wrote.")
    if np.any(graph.node_position[~np.isin(graph.node_kind, (OUTPUT, *EXPLAINING))] < 0):
        raise UserError(
            "The graph is summed over positions, as by `difffract prune`, and single edges cannot be checked any more; "
            "give the graph that `difffract trace` wrote, or prune it with --by-position."
        )
    hashes = {"model": (pipe.source, run.model)}
    hashes["set of transcoders"] = (tcs.source, told.transcoders)
    for what, (ours, theirs) in hashes.items():
        if ours != theirs:
            raise UserError(
                f"The graph was traced with another {what}: its content hash is {theirs[:12]}..., but the one given "
                f"has {ours[:12]}...; give the {what} that the graph was traced with"
                f"{_told_loras(pipe, run) if what == 'model' else ''}."
            )


def _told_loras(pipe: Pipeline, run: TraceInfo) -> str:
    """Says which LoRAs a graph's model had, where that differs."""
    if run.loras == pipe.loras:
        return ""
    return f", with --lora: {texts_of(run.loras)}" if run.loras else f", without {texts_of(pipe.loras)}"


def capture_run(
    pipe: Pipeline,
    tcs: TranscoderSet,
    graph: Graph,
    *,
    latents: Any = None,
    seed: int | None = None,
    all_steps: bool = False,
) -> Trace | Span:
    """Captures the run that a graph tells of.

    Args:
        pipe: the pipeline it was traced in.
        tcs: the transcoders it was traced with.
        graph: the graph.
        latents: packed starting noise, where the graph's run started from given noise.
        seed: of other starting noise than the graph's run had.
        all_steps: whether the steps before the graph's own are recorded too.

    Raises:
        UserError: if noise was given and is not given again, or the graph's steps are not those of the model.
    """
    told = graph.provenance.traced_run
    if told.latents_given and latents is None and seed is None:
        raise UserError(
            "The graph's run started from noise that was given, not drawn from its seed; give the same noise again, "
            "with --latents or --noise."
        )
    count = len(told.sigmas) - 1
    steps: Sequence[int] = graph.provenance.steps
    outside = [step for step in (*steps, *graph.node_step.tolist()) if not 0 <= step < count]
    if outside:
        raise UserError(
            f"The graph names step {outside[0]}, but its run has the steps 0 to {count - 1}; trace it again."
        )
    run = {
        "seed": told.seed if seed is None else seed,
        "run": run_of_trace(pipe, told),
        "include_padding": told.include_padding,
        "latents": latents,
    }
    inputs = {*graph.node_stream[graph.node_kind == INPUT].tolist()}
    outputs = bool(np.any(graph.node_kind == OUTPUT))
    both = told.branches > 1 and (outputs or np.unique(graph.node_branch[graph.node_kind == FEATURE]).size > 1)
    if all_steps or len(steps) > 1 or both or (LATENT in inputs and IMG not in inputs):
        first = 0 if all_steps else min(steps)
        made: Trace | Span = capture_steps(pipe, tcs, told.prompt, first=first, last=max(steps), **run)
    else:
        output = LATENT in inputs or outputs
        made = capture(pipe, tcs, told.prompt, step=min(steps), output=output, branch=BRANCHES[told.branch], **run)
    if not np.allclose(made.info.sigmas, told.sigmas):
        raise UserError("The graph's run had other noise levels than the model has for as many steps; trace it again.")
    return made


def outputs_of(pipe: Pipeline, trace: Trace | Span, graph: Graph) -> list[Output]:
    """Returns a graph's outputs, in the order of its nodes, as they read in a run.

    Args:
        pipe: the pipeline.
        trace: of the run.
        graph: whose outputs these are.

    Raises:
        UserError: if the graph calls an output what is a feature.
    """
    settings = graph.provenance.attribution
    texts = settings.targets if settings is not None else ()
    found = []
    for node in np.flatnonzero(graph.node_kind == OUTPUT):
        target = parse_target(texts[node])
        if isinstance(target, Feature):
            raise UserError(f"The graph calls its output {target}, which is a feature; trace it again.")
        found.append(resolve_target(pipe, trace, target, step=int(graph.node_step[node])))
    return found


def _find_rows(table: SourceTable, graph: Graph) -> Int64[np.ndarray, "node"]:
    """Returns every node's row in the table; outputs, rest, scores, modulations and words have -1."""
    there = np.flatnonzero((table.kind != FEATURE) | (table.value > 0))
    columns = [
        (table.kind, graph.node_kind),
        (table.step, graph.node_step),
        (table.branch, graph.node_branch),
        (table.stream, graph.node_stream),
        (table.block, graph.node_block),
        (table.position, graph.node_position),
        (table.feature, graph.node_feature),
    ]
    ours, theirs = np.zeros(there.size, np.int64), np.zeros(graph.node_kind.size, np.int64)
    for all_rows, nodes in columns:
        width = int(max(all_rows.max(), nodes.max())) + 2
        ours = ours * width + all_rows[there].astype(np.int64) + 1
        theirs = theirs * width + nodes.astype(np.int64) + 1
    order = np.argsort(ours, kind="stable")
    place = np.minimum(np.searchsorted(ours, theirs, sorter=order), there.size - 1)
    rows = there[order[place]]
    found = ours[order[place]] == theirs
    named = ~np.isin(graph.node_kind, (OUTPUT, REST, *EXPLAINING))
    if np.any(named & ~found):
        name = node_names(graph)[int(np.flatnonzero(named & ~found)[0])]
        raise UserError(
            f"The run captured anew has no {name}, which the graph names: it is another run, or the feature is not "
            "active there; give the model, transcoders and starting noise that the graph was traced with."
        )
    return np.where(named, rows, -1).astype(np.int64)


def _check_values(engine: Engine, graph: Graph, rows: Int64[np.ndarray, "node"]) -> None:
    """Refuses a run whose features have other values than the graph's."""
    features = np.flatnonzero(graph.node_kind == FEATURE)
    ours, theirs = engine.table.value[rows[features]], graph.node_value[features]
    apart = np.abs(ours - theirs) / max(float(np.max(np.abs(theirs), initial=0)), float(np.finfo(np.float32).tiny))
    if features.size and not apart.max() <= SAME_VALUE:
        worst = int(np.argmax(apart))
        raise UserError(
            f"The run captured anew is not the graph's: {node_names(graph)[int(features[worst])]} has the value "
            f"{ours[worst]:.4g}, but {theirs[worst]:.4g} in the graph; give the starting noise that it was traced with "
            "and, where the model's weights are in bf16, the same --weights, since steps before the traced one round."
        )
