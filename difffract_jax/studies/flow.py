"""`flow`: how much attribution crosses from text to image, by layer and step. Registered in docs/studies.md.

1. Runs: held-out scenes of two shapes whose images are right, with the colour of one object in its box as target; or,
   for any pipeline, prompts, with the last step's velocity along itself.
2. A circuit of each over all steps, `NODES` features expanded, `AT_A_TIME` between two computations of influence, so
   that it reaches back to the first step.
3. Edges have scores, their share of the target times the target's influence (`pruning.edge_scores`). Of those into the
   image side, `crossing` sums what has its source on the text side, and all, by block and step of either end.
4. Shares are means over runs with bootstrap intervals; a run counts where it has edges.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure

from difffract_jax.address import TXT, Layout
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.pruning import edge_scores
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.studies import removing
from difffract_jax.studies.outcomes import mean_with_interval
from difffract_jax.studies.results import Advance, Result, quiet
from difffract_jax.transcoders.transcoder import TranscoderSet

WORLD, SIZE, FIRST_SEED = 92_000, 50, 10_000_000
NODES, AT_A_TIME, SMALLEST = 400, 50, 1e-5
ENDS = ("target", "source")


class Crossing(NamedTuple):
    """Edge scores into the image side of one graph, by end, step and block.

    Axis `end` is `ENDS`; blocks count from the inputs, which come first, to the output, which comes last.

    Attributes:
        text: of those whose source lies on the text side.
        all: of all.
    """

    text: Float64[np.ndarray, "end step block"]
    all: Float64[np.ndarray, "end step block"]


def flow(
    pipe: Pipeline,
    tcs: TranscoderSet,
    *,
    prompts: Sequence[str] | None = None,
    size: int | None = None,
    advance: Advance = quiet,
) -> Result:
    """Runs the study.

    Args:
        pipe: the organism; any pipeline if prompts are given.
        tcs: its transcoders.
        prompts: to explain the velocity of, from seed 0, instead of the organism's scenes.
        size: scenes to draw instead of the registered number.
        advance: gives a progress callback for a named stage.

    Raises:
        UserError: if there are no prompts.
    """
    if prompts is not None:
        runs = [(prompt, 0, "velocity:") for prompt in prompts]
    else:
        material = removing.right_images(pipe, removing.draw_plain(WORLD, size or SIZE, FIRST_SEED), advance("images"))
        runs = [
            (case.prompt, case.seed, f"pixels:color={removing.drawn_colour(case)},box={material.box(row)}")
            for row, case in enumerate(material.cases)
        ]
    if not runs:
        raise UserError("The study `flow` needs at least one prompt, but got none; give one or more.")
    found, progress = [], advance("circuits")
    for row, (prompt, seed, target) in enumerate(runs):
        found.append(crossing(deep_circuit(pipe, tcs, prompt, seed, target)))
        progress(row + 1, len(runs))
    return report(found, pipe.config.transformer.layout, runs)


def deep_circuit(pipe: Pipeline, tcs: TranscoderSet, prompt: str, seed: int, target: str) -> Graph:
    """Traces the circuit of an output of the last step, through all steps.

    Args:
        pipe: the pipeline.
        tcs: its transcoders.
        prompt: of the run.
        seed: of its starting noise.
        target: as text, see `outputs`.
    """
    span, (output,) = removing.explained(pipe, tcs, prompt, seed, [target])
    return attribute(span, tcs, target=output, max_nodes=NODES, expansion_batch=AT_A_TIME, min_attribution=SMALLEST)


def crossing(graph: Graph) -> Crossing:
    """Sums a graph's edge scores into the image side, by block and step of their ends.

    Args:
        graph: position by position, from the first step on.
    """
    scores, text = edge_scores(graph), graph.node_stream == TXT
    into_image = ~text[graph.edge_target]
    shape = len(graph.provenance.steps), graph.provenance.layout.depth + 2
    sums = np.zeros((2, len(ENDS), *shape))
    step = graph.node_step - graph.provenance.steps[0]
    for end, node in enumerate((graph.edge_target, graph.edge_source)):
        for kept, which in enumerate((into_image & text[graph.edge_source], into_image)):
            at = node[which]
            np.add.at(sums[kept, end], (step[at], graph.node_block[at] + 1), scores[which])
    return Crossing(*sums)


def report(found: Sequence[Crossing], layout: Layout, runs: Sequence[tuple[str, int, str]]) -> Result:
    """Puts tables, figure and verdict together.

    Args:
        found: of every run.
        layout: of the model.
        runs: prompt, seed and target of each.
    """
    text, every = (np.stack([getattr(one, name) for one in found]) for name in Crossing._fields)
    names = block_names(layout)
    total = text[:, 0].sum(axis=(1, 2)) / every[:, 0].sum(axis=(1, 2))
    mean, low, high = mean_with_interval(total)
    tables: dict[str, list[dict[str, Any]]] = {
        "Share of attribution into the image side that comes from text": [
            {"runs": len(found), "share": mean, "95% from": low, "to": high}
        ]
    }
    for end, name in enumerate(ENDS):
        tables[f"By step of the {name}"] = _rows(text[:, end].sum(axis=2), every[:, end].sum(axis=2), "step")
        rows = _rows(text[:, end].sum(axis=1), every[:, end].sum(axis=1), "block", names)
        tables[f"By block of the {name}"] = rows
    for end, name in enumerate(ENDS):
        cells = [f"{step}, {block}" for step in range(text.shape[2]) for block in names]
        some, whole = (a[:, end].reshape(len(found), -1) for a in (text, every))
        tables[f"By step and block of the {name}"] = _rows(some, whole, "step, block", cells)
    where = {name: max(tables[f"By step of the {name}"], key=lambda row: row["of all crossing"]) for name in ENDS}
    block = max(tables["By block of the target"], key=lambda row: row["of all crossing"])
    verdict = (
        f"In {len(found)} runs {mean:.1%} (95% interval {low:.1%} to {high:.1%}) of the attribution into the image "
        f"side has its source on the text side. Most of what crosses enters in block {block['block']} "
        f"({block['of all crossing']:.0%}) and in step {where['target']['step']} "
        f"({where['target']['of all crossing']:.0%})."
    )
    raw = {"tables": tables, "runs": [list(run) for run in runs], "share": total.tolist()}
    raw["text"], raw["all"] = text.mean(axis=0).tolist(), every.mean(axis=0).tolist()
    return Result("flow", verdict, tables, {"flow": _figure(text, every, names)}, raw)


def block_names(layout: Layout) -> list[str]:
    """Returns names of a model's blocks, with those of the inputs before and the output behind."""
    blocks = (layout.block_name(block).replace("/", " ") for block in range(layout.depth))
    return ["input", *blocks, "output"]


def _rows(
    text: Float64[np.ndarray, "run cell"], every: Float64[np.ndarray, "run cell"], what: str, names: Any = None
) -> list[dict[str, Any]]:
    """Returns a row per cell in which any run has edges."""
    crossing = (text / text.sum(axis=1, keepdims=True)).mean(axis=0)
    rows = []
    for cell in np.flatnonzero(every.sum(axis=0)):
        here = every[:, cell] > 0
        mean, low, high = mean_with_interval(text[here, cell] / every[here, cell])
        row = {what: int(cell) if names is None else names[cell], "runs": int(here.sum()), "share": mean}
        rows.append(row | {"95% from": low, "to": high, "of all crossing": float(crossing[cell])})
    return rows


def _figure(text: np.ndarray, every: np.ndarray, names: list[str]) -> Figure:
    """Draws for either end the share that comes from text, and how what crosses divides."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    all_axes = figure.subplots(2, 2)
    for end, name in enumerate(ENDS):
        with np.errstate(invalid="ignore"):
            each = np.where(every[:, end] > 0, text[:, end] / every[:, end], np.nan)
        known = np.isfinite(each).any(axis=0)
        share = np.where(known, np.nansum(each, axis=0) / np.maximum(np.isfinite(each).sum(axis=0), 1), np.nan)
        part = (text[:, end] / text[:, end].sum(axis=(1, 2), keepdims=True)).mean(axis=0)
        pictures = (share, f"from text, by the {name}'s place"), (np.where(known, part, np.nan), "of all that crosses")
        for axes, (values, title) in zip(all_axes[end], pictures, strict=True):
            axes.imshow(values.T, aspect="auto", cmap="viridis", vmin=0, origin="lower")
            axes.set(title=title, xlabel=f"step of the {name}", xticks=range(values.shape[0]))
            axes.set_yticks(range(len(names)), names)
            top = np.nanmax(values)
            for (step, block), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = "white" if value < 0.6 * top else "black"
                    axes.text(step, block, f"{100 * value:.1f}%", ha="center", va="center", color=dark, fontsize=8)
    return figure
