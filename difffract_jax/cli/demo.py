"""The demonstration: everything this package does, end to end, with no files needed.

1. Load the embedded model and its transcoders.
2. Generate an image of `PROMPT`, and read from its pixels whether it shows what was asked.
3. Capture one denoising step, trace why the first object has its colour, check that edges and bias add up, prune.
4. Group the features that do the same, and take the strongest group off while the image is made anew; beside it, as
   many features at random.
5. Hold the circuit against the model: `validate`, with fewer draws than by default.
6. Save image, graphs and the report, each with the record of how it was made.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from difffract_jax.address import IMG, TXT
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.checks.completeness import candidates
from difffract_jax.circuits.checks.report import curves_figure, perturbation_figure, words
from difffract_jax.circuits.checks.rerun import Rerun, capture_again
from difffract_jax.circuits.checks.validation import at_size, validate
from difffract_jax.circuits.editing.sweeps import steer_batch
from difffract_jax.circuits.notation.edits import Edit, Supernode
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.cli.output import Advance, graph_summary, save_image
from difffract_jax.cli.settings import DemoConfig
from difffract_jax.config import provenance
from difffract_jax.dashboards.pictures import enlarged, figure_address, png_address
from difffract_jax.dashboards.records import card, edges_among, feature_of, top_features
from difffract_jax.dashboards.render import Picture, Section, drawing, feature_card, render, write_report
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
from difffract_jax.models.pipeline import generate
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import SeenScenes, describe, judge
from difffract_jax.organism.vocabulary import COLOUR_NAMES
from difffract_jax.organism.world import from_caption
from difffract_jax.seeds import random_generator

PROMPT = "a red circle left of a blue square"
NOTICE = (
    "Model and transcoders are the embedded ones, trained on synthetic scenes: image, verdict, features, circuit, edit "
    "and checks are real."
)
ENLARGED = 8
"""Screen pixels per pixel of the image that is saved."""
STEP = 1
"""Denoising step that is traced."""
REACH = 9
"""Pixels around the middle of the first object whose colour is traced."""
NODES = 300
"""Features that are expanded."""
SHOWN = (6, 2)
"""Features of image and of text positions that the report shows."""
DRAWN = 16
"""Features in its drawing of the circuit."""
PARTS = 10
"""Parts of the work that the progress bar counts: tracing, the images, and eight of the report and the checks."""


class Steered(NamedTuple):
    """The edit of the strongest supernode.

    Attributes:
        name: of the supernode.
        features: of it.
        images: without an edit, with these features taken off, with as many others taken off, [image H W rgb].
        shows: what the scorer reads in each.
        colour: how red the traced box of each is: red less the mean of green and blue, in [-1, 1].
    """

    name: str
    features: tuple[Feature, ...]
    images: UInt8[np.ndarray, "image H W rgb"]
    shows: tuple[str, ...]
    colour: tuple[float, ...]


def run(settings: DemoConfig, advance: Advance) -> dict[str, Any]:
    """Runs the demonstration and returns what to print.

    Args:
        settings: where to write, and the seed.
        advance: callback of the progress bar.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    record = provenance("demo", settings)
    paths = {name: settings.out / name for name in ("image.png", "graph.npz", "pruned.npz", "report.html")}
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    image = generate(pipe, PROMPT, seed=settings.seed).image
    save_image(image.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1), paths["image.png"], record)
    reading = see(image[None])
    right = bool(judge(from_caption(PROMPT), reading).right[0])
    seen = {"prompt": PROMPT, "the image shows": describe(reading, 0), "as asked": "yes" if right else "no"}
    advance(1, PARTS)
    trace = capture(pipe, tcs, PROMPT, seed=settings.seed, step=STEP, output=True)
    asked = parse_target(f"pixels:color={COLOUR},box={box_of(reading, image.shape[0])}")
    assert not isinstance(asked, Feature)
    target = resolve_target(pipe, trace, asked)
    graph = attribute(trace, tcs, target=target, max_nodes=NODES, min_attribution=1e-6).with_provenance(**record)
    pruned = find_supernodes(prune(graph))
    graph.save(paths["graph.npz"])
    pruned.save(paths["pruned.npz"])
    advance(2, PARTS)
    again = capture_again(pipe, tcs, graph)
    steered = _steer(pipe, tcs, again, graph, pruned, settings.seed)
    advance(3, PARTS)
    found = validate(
        again,
        graph,
        edges=100,
        ablations=30,
        draws=3,
        readings=("propagated", "full"),
        progress=lambda done, parts: advance(3 + done * (PARTS - 3) // parts, PARTS),
    )
    whole = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    page = report(image, seen, whole, pruned, steered, found, json.dumps(record, indent=2))
    write_report(paths["report.html"], page)
    kept = {"edges kept by pruning": f"{len(pruned.edge_attribution)} of {len(graph.edge_attribution)}"}
    edit = {"with the top supernode off": steered.shows[1], "with as many at random off": steered.shows[2]}
    told = {name: str(path) for name, path in paths.items()} | kept | edit | graph_summary(graph) | _figures(found)
    return {"note": NOTICE} | seen | told


COLOUR = COLOUR_NAMES[int(from_caption(PROMPT).colour[0, 0])]


def box_of(reading: SeenScenes, size: int) -> str:
    """Returns the box around the first object that an image shows, X0,Y0,X1,Y1; the left half if it shows none."""
    if not reading.count[0]:
        return f"0,0,{size // 2},{size}"
    x, y = (int(value) for value in reading.centre[0, 0])
    low, high = (max(x - REACH, 0), max(y - REACH, 0)), (min(x + REACH, size), min(y + REACH, size))
    return ",".join(map(str, (*low, *high)))


def _steer(pipe: Any, tcs: Any, again: Rerun, graph: Graph, pruned: Graph, seed: int) -> Steered:
    """Draws the image again with the strongest supernode taken off in every step, and with as many other features."""
    name, members = next(iter(pruned.supernodes.items()), ("", top_features(pruned, DRAWN)))
    features = tuple(dict.fromkeys(feature_of(pruned, node) for node in members))
    _, places = candidates(again, graph)
    layout = again.engine.infos[0].layout
    others = {Feature(*layout.site_number(block, stream), number) for _, stream, block, number in places}
    drawn = random_generator(seed).permutation(sorted(map(str, others - {*features})))[: len(features)]
    random = tuple(Feature.parse(text) for text in drawn.tolist())
    edits = [[], [Edit(Supernode("", features), "zero")], [Edit(Supernode("", random), "zero")]]
    made = steer_batch(pipe, tcs, [PROMPT] * 3, edits, [seed] * 3)
    reading = see(made.images)
    return Steered(
        name,
        features,
        made.images,
        tuple(describe(reading, i) or "nothing that can be read" for i in range(3)),
        tuple(float(value) for value in _colour_of(made.images, pruned)),
    )


def _colour_of(images: UInt8[np.ndarray, "image H W rgb"], graph: Graph) -> np.ndarray:
    """Returns how red the traced box of each image is: red less the mean of green and blue, in [-1, 1]."""
    settings = graph.provenance.attribution
    assert settings is not None
    x0, y0, x1, y1 = map(int, settings.targets[0].partition("box=")[2].split(","))
    inside = images[:, y0:y1, x0:x1].astype(np.float64).mean(axis=(1, 2)) / 255
    return inside[:, 0] - inside[:, 1:].mean(axis=1)


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what a terminal shows of the validation."""
    rows = [row for row in found["perturbation"]["rows"] if row["of"] == "every node downstream"]
    told = {"edges against interventions": next(r["worst"] for r in found["exactness"] if r["kind"] == "edges")}
    told |= {f"Spearman, {row['prediction']}": row["spearman"] for row in rows}
    return told | {"the pruned circuit, kept alone and removed": at_size(found, found["completeness"]["pruned"])}


def report(
    image: UInt8[np.ndarray, "H W rgb"],
    seen: dict[str, Any],
    whole: Graph,
    pruned: Graph,
    steered: Steered,
    found: dict[str, Any],
    record: str,
) -> str:
    """Returns the report as HTML.

    Args:
        image: of the run.
        seen: what it shows.
        whole: the graph, summed over positions, with influence.
        pruned: the circuit, likewise, with supernodes.
        steered: the edit.
        found: from `validate`.
        record: how it was made.
    """
    summary = [
        f"The prompt was: {seen['prompt']}. The image shows: {seen['the image shows']}. As asked: {seen['as asked']}.",
        NOTICE,
    ]
    sections = [
        _image_section(image),
        _circuit_section(image, whole, pruned),
        _edit_section(steered),
        _check_section(found),
    ]
    return render(f"Why a circle is {COLOUR}: a circuit, an edit, and how far to trust it", summary, sections, record)


def _image_section(image: UInt8[np.ndarray, "H W rgb"]) -> Section:
    words = "The embedded model, a FLUX of a million parameters, made this image in four denoising steps."
    shows = "The image, enlarged; what it shows was read from its pixels by a fixed rule."
    return Section("The image", [words], [Picture(png_address(enlarged(image)), shows, small=True)])


def _circuit_section(image: UInt8[np.ndarray, "H W rgb"], whole: Graph, pruned: Graph) -> Section:
    told, labels = graph_summary(pruned), load_labels("organism")
    labels = labels if labels.transcoders == pruned.provenance.transcoders else None
    target = told["target"]
    text = [
        f"The target is {target}: how {COLOUR} the pixels of that box will be, as step {STEP} predicts them. With "
        "attention and norms held at this run, it is the sum of the features' contributions, errors, inputs and a "
        "bias; the largest gap in that sum, over the sum of absolute edges and bias, is "
        f"{told['conservation error']:.1e}.",
        f"Pruning keeps {told['nodes'].get('feature', 0)} features. Shown are, with the most influence, those of image "
        "positions, and before pruning those of text: where each is active, in orange, over the image's tokens or the "
        "prompt's words, and what it detects on other captions (in brackets how well, 0.5 to 1).",
        "In the drawing columns are blocks. A line's width is its share of all that enters its end; blue lines raise "
        "it, dashed orange ones lower it. Hover for names and figures.",
    ]
    nodes = [*top_features(pruned, DRAWN), int(pruned.target)]
    best = [feature_card(card(pruned, node, labels), image) for node in top_features(pruned, SHOWN[0], [IMG])]
    best += [feature_card(card(whole, node, labels), image) for node in top_features(whole, SHOWN[1], [TXT])]
    cards = {node: card(pruned, node, labels) for node in nodes[:-1]}
    blocks = sorted({int(pruned.node_block[node]) for node in nodes})
    heads = [pruned.provenance.layout.block_name(block) for block in blocks[:-1]] + ["target"]
    laid = drawing(
        [node_names(pruned)[node] for node in nodes],
        [*(cards[node].detects for node in nodes[:-1]), target],
        [blocks.index(int(pruned.node_block[node])) for node in nodes],
        heads,
        [edge for edge in edges_among(pruned, nodes) if abs(edge[2]) > 0.004],
    )
    return Section("The circuit", text, (), {}, best, laid)


def _edit_section(steered: Steered) -> Section:
    count = len(steered.features)
    text = [
        f"The circuit's strongest group of features that do the same, {steered.name or 'its top features'}, was taken "
        "off at every position in every step, and the image made again from the same noise: "
        f"{', '.join(map(str, steered.features))}. Beside it, {count} other active features, drawn at random.",
    ]
    titles = ("Without an edit", f"With the {count} features off", f"With {count} features at random off")
    pictures = [
        Picture(png_address(enlarged(one)), f"{title}: {shows}; {COLOUR} in the traced box {colour:.2f}.", small=True)
        for title, one, shows, colour in zip(titles, steered.images, steered.shows, steered.colour, strict=True)
    ]
    return Section("An edit, before and after", text, pictures)


def _check_section(found: dict[str, Any]) -> Section:
    tests = [
        {key: row[key] for key in ("check", "worst", "median", "checked", "of", "bar", "holds")}
        for row in found["exactness"]
    ]
    tables = {
        "Exact in the frozen model, relative errors": tests,
        "Correlations with the real model": found["perturbation"]["rows"],
        "The pruned circuit, kept alone and removed": at_size(found, found["completeness"]["pruned"]),
    }
    pictures = [
        Picture(
            figure_address(perturbation_figure(found)),
            "Features taken off one at a time in the real model: how far every node downstream moved, against what the "
            "graph predicts without sign (left) and with it (right). Points on the diagonal were predicted exactly.",
        ),
        Picture(
            figure_address(curves_figure(found)),
            "Circuits of growing size. Above, what a circuit recovers of the target when all else is averaged out; "
            "below, what is lost when the circuit is. Blue is the graph's order; the shaded range, random circuits.",
        ),
    ]
    return Section(
        "How far to trust it",
        [words(part, found) for part in ("exactness", "perturbation", "completeness")],
        pictures,
        tables,
    )
