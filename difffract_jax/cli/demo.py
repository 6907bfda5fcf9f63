"""The demonstration: everything this package does, end to end, with no files needed.

1. Load the embedded model and its transcoders.
2. Capture one denoising step, make the image, and read from its pixels whether it shows what was asked.
3. Trace why the first object has its colour, and prune.
4. Take the circuit's features that detect this colour off while images are made anew; beside it, as many features at
   random. The directory is that of `steer`.
5. Hold the circuit against the model: `validate`, with fewer draws than by default. The directory is that command's.
6. Write the report: the one of `report`, on what the other steps wrote.

The example was chosen by a rule, which docs/dashboards.md tells with those that it left behind.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import PixelTarget, parse_target, resolve_target
from difffract_jax.circuits.checks.completeness import candidates
from difffract_jax.circuits.checks.report import write_validation
from difffract_jax.circuits.checks.rerun import Rerun, capture_again
from difffract_jax.circuits.checks.summaries import own_figures
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.circuits.editing.sweeps import Sweep, steer_batch
from difffract_jax.circuits.notation.edits import Edit, Supernode
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.cli import options as opt
from difffract_jax.cli.bars import Advance
from difffract_jax.cli.graph_tables import graph_summary
from difffract_jax.cli.settings import DemoConfig, ReportConfig, SteerConfig, ValidateConfig, ViewConfig
from difffract_jax.cli.steer import write_sweep
from difffract_jax.cli.view import page_parts, run_key
from difffract_jax.config import SEEDS, provenance
from difffract_jax.dashboards.graph_report import graph_report
from difffract_jax.dashboards.image_files import KeptImages, keep, kept_path, shown_images
from difffract_jax.dashboards.page_data import summed_where_possible
from difffract_jax.dashboards.page_groups import grouped
from difffract_jax.dashboards.page_labels import labels_of
from difffract_jax.dashboards.records import feature_of, top_features
from difffract_jax.dashboards.render import write_report
from difffract_jax.dashboards.run_images import run_images
from difffract_jax.dashboards.viewer_page import viewer_page
from difffract_jax.generators import random_generator
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.pruning import prune
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import SeenScenes, describe, judge
from difffract_jax.organism.vocabulary import COLOUR_NAMES
from difffract_jax.organism.world import from_caption
from difffract_jax.storage.images import save_image
from difffract_jax.studies.metrics import intent, sweep_table

PROMPT = "a blue ring left of a red square"
COLOUR = COLOUR_NAMES[int(from_caption(PROMPT).colour[0, 0])]
IN_BOX = f"{COLOUR} in the traced box, first seed"
NOTICE = (
    "Model and transcoders are the embedded ones, trained on synthetic scenes: image, verdict, features, circuit, edit "
    "and checks are real."
)
ENLARGED = 8
"""Screen pixels per pixel of the image that is saved."""
STEP = 3
"""Denoising step that is traced: the last, whose prediction is the image."""
FEW = 8
"""Features of the circuit that are taken off where none is known to detect the colour, and no group was found."""
REACH = 9
"""Pixels around the middle of the first object whose colour is traced."""
NODES = 300
"""Features that are expanded."""
SURE = 0.8
"""AUROC from which on the demonstration says of a feature that it detects a colour."""
IMAGES = 4
"""Images that are made with the edit and without, each from noise of its own; the first is the one that was traced."""
PARTS = 10
"""Parts of the work that the progress bar counts: tracing, the images, and eight of the checks and the report."""
VALIDATED, STEERED = "validation", "steered"
"""Directories within the demonstration's, as `difffract validate` and `difffract steer` write them."""


class Made(NamedTuple):
    """What is made of the run, and worked with from then on.

    Attributes:
        pipe: the embedded model.
        tcs: its transcoders.
        graph: position by position.
        box: whose colour is traced, X0,Y0,X1,Y1.
        kept: the image, and what the traced step predicted it to be.
        shows: what the scorer reads in the image.
        right: whether that is what was asked.
    """

    pipe: Any
    tcs: Any
    graph: Graph
    box: str
    kept: KeptImages
    shows: str
    right: bool


def run(settings: DemoConfig, folder: Path, advance: Advance) -> dict[str, Any]:
    """Runs the demonstration and returns what to print.

    Args:
        settings: where the demonstration goes, and the seed.
        folder: to write into, which is of this machine.
        advance: callback of the progress bar.
    """
    names = ("image.png", "graph.npz", "pruned.npz", "graph.html", "report.html")
    paths = {name: folder / name for name in names}
    made = _made(settings, paths, advance)
    summed = grouped(summed_where_possible(made.graph))
    pruned = grouped(prune(made.graph))
    pruned.save(paths["pruned.npz"])
    advance(2, PARTS)
    again = capture_again(made.pipe, made.tcs, made.graph)
    features, edits = _edit(made, pruned, again, settings, folder)
    advance(3, PARTS)
    found = _validated(made, again, settings, folder, advance)
    verdict = _in_short(features, edits)
    write_report(paths["graph.html"], viewer_page(*page_parts(made.graph, ViewConfig(graph=paths["graph.npz"]))))
    _report(made, summed, folder, verdict)
    kept = {"edges kept by pruning": f"{len(pruned.edge_attribution)} of {len(made.graph.edge_attribution)}"}
    seen = {"prompt": PROMPT, "the image shows": made.shows, "as asked": "yes" if made.right else "no"}
    files = {name: str(settings.out / name) for name in (*names, STEERED, VALIDATED)}
    told = {"note": NOTICE} | seen | files | {"in short": verdict} | kept | graph_summary(made.graph)
    exact = next(row["worst"] for row in found["exactness"] if row["kind"] == "edges")
    return told | {"edges against interventions": exact, "the edit": edits, "the target itself": own_figures(found)}


def _validated(made: Made, again: Rerun, settings: DemoConfig, folder: Path, advance: Advance) -> dict[str, Any]:
    """Holds the graph against the model, and writes what was found as `validate` does."""
    checks = ValidateConfig(
        model="organism",
        transcoders="organism",
        graph=settings.out / "graph.npz",
        edges=100,
        ablations=30,
        draws=3,
        readings="propagated,full",
        out=settings.out / VALIDATED,
    )
    found = validate(
        again,
        made.graph,
        **checks.model_dump(include={"edges", "ablations", "draws"}),
        readings=("propagated", "full"),
        progress=lambda done, parts: advance(3 + done * (PARTS - 3) // parts, PARTS),
    )
    write_validation(found, folder / VALIDATED, _record("validate", checks, made))
    return found


def _made(settings: DemoConfig, paths: dict[str, Path], advance: Advance) -> Made:
    """Captures the run, makes its image, and traces the colour of the first object; saves image and graph."""
    record = provenance("demo", settings)
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    trace = capture(pipe, tcs, PROMPT, seed=settings.seed, step=STEP, output=True)
    kept = KeptImages(run_images(pipe, trace.info, (STEP,)), (STEP,))
    image = kept.pixels[0]
    save_image(image.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1), paths["image.png"], record)
    reading = see(image[None])
    advance(1, PARTS)
    box = box_of(reading, image.shape[0])
    target = resolve_target(pipe, trace, parse_target(f"pixels:color={COLOUR},box={box}"))
    graph = attribute(trace, tcs, target=target, max_nodes=NODES, min_attribution=1e-6).with_provenance(**record)
    graph.save(paths["graph.npz"])
    keep(kept, kept_path(paths["graph.npz"]), run_key(graph))
    return Made(pipe, tcs, graph, box, kept, describe(reading, 0), bool(judge(from_caption(PROMPT), reading).right[0]))


def _record(command: str, settings: Any, made: Made) -> dict[str, Any]:
    """Returns what a directory of `steer` or `validate` records."""
    return provenance(command, settings, **opt.sources(model=made.pipe, transcoders=made.tcs))


def box_of(reading: SeenScenes, size: int) -> str:
    """Returns the box around the first object that an image shows, X0,Y0,X1,Y1; the left half if it shows none.

    Args:
        reading: of the image.
        size: its height and width in pixels.
    """
    if not reading.count[0]:
        return f"0,0,{size // 2},{size}"
    x, y = (int(value) for value in reading.centre[0, 0])
    low, high = (max(x - REACH, 0), max(y - REACH, 0)), (min(x + REACH, size), min(y + REACH, size))
    return ",".join(map(str, (*low, *high)))


def edited_features(pruned: Graph) -> tuple[tuple[Feature, ...], str]:
    """Returns the features of a circuit that detect the asked colour, its strongest group where none does, and in words
    which they are.

    Args:
        pruned: the circuit, with groups.
    """
    labels = load_labels("organism")
    features = dict.fromkeys(feature_of(pruned, node) for node in top_features(pruned, pruned.node_kind.size))
    if labels.transcoders == pruned.provenance.transcoders:
        content = {feature: labels.of(feature).content for feature in features}
        sure = [f for f, one in content.items() if (one.factor, one.value) == ("colour", COLOUR) and one.auroc >= SURE]
        if sure:
            return tuple(sure), f"that detect {COLOUR}"
    members = next(iter(pruned.supernodes.values()), ())
    grouped = tuple(dict.fromkeys(feature_of(pruned, node) for node in members))
    return (grouped, "of its strongest group") if grouped else (tuple(features)[:FEW], "with the most influence")


def _edit(
    made: Made, pruned: Graph, again: Rerun, settings: DemoConfig, folder: Path
) -> tuple[str, list[dict[str, Any]]]:
    """Makes images with features of the circuit taken off, and as many at random, and writes them as `steer` does.

    Returns which features they are, in words, and a row of figures for each of the three.
    """
    features, which = edited_features(pruned)
    _, places = candidates(again, made.graph)
    layout = again.engine.infos[0].layout
    others = {Feature(*layout.site_number(block, stream), number) for _, stream, block, number, _ in places}
    drawn = random_generator(settings.seed).permutation(sorted(map(str, others - {*features})))[: len(features)]
    random = tuple(Feature.parse(text) for text in drawn.tolist())
    columns = ("original", f"the {len(features)} off", f"{len(random)} at random off")
    edits = [[], [Edit(Supernode("", features), "zero")], [Edit(Supernode("", random), "zero")]]
    seeds = tuple((settings.seed + number) % SEEDS for number in range(IMAGES))
    images = steer_batch(
        made.pipe, made.tcs, [PROMPT] * 3 * IMAGES, edits * IMAGES, [seed for seed in seeds for _ in columns]
    )
    shape = IMAGES, len(columns)
    pixels, norms = images.images.reshape(*shape, *images.images.shape[1:]), images.norms.reshape(shape)
    rows = sweep_table(columns, pixels, norms, prompt=PROMPT, meant=intent(PROMPT))
    for row, value in zip(rows, _target_in(pixels[0], made.box), strict=True):  # elsewhere the object lies elsewhere
        row[IN_BOX] = float(value)
    asked = SteerConfig(
        model="organism",
        transcoders="organism",
        prompt=PROMPT,
        edit=(f"{'+'.join(map(str, features))}=zero",),
        seeds=",".join(map(str, seeds)),
        out=settings.out / STEERED,
    )
    record = _record("steer", asked, made) | {"taken off at random": list(map(str, random))}
    write_sweep(Sweep(pixels, norms, columns, seeds, ""), rows, record, folder / STEERED)
    told = [{"images": row["edit"], "as asked": f"{row['success']} of {IMAGES}", IN_BOX: row[IN_BOX]} for row in rows]
    return f"{len(features)} features {which}", told


def _target_in(images: UInt8[np.ndarray, "image H W rgb"], box: str) -> Float64[np.ndarray, "image"]:
    """Returns the target's value of finished images: how much of the colour is in the traced box."""
    asked = parse_target(f"pixels:color={COLOUR}")
    assert isinstance(asked, PixelTarget)
    minus, along = np.array(asked.minus), np.array(asked.colour) - np.array(asked.minus)
    inside = images[:, box_mask(box, images.shape[1:3])] / 255
    return ((inside - minus) @ (along / np.linalg.norm(along))).mean(axis=1)


def _in_short(features: str, edits: list[dict[str, Any]]) -> str:
    """Returns the outcome in two sentences."""
    original, off, random = edits
    as_asked = [row["as asked"].split()[0] for row in edits]
    values = [f"{row[IN_BOX]:.2f}" for row in (original, off, random)]
    return (
        f"With the circuit's {features} taken off, {as_asked[1]} of {IMAGES} images show what was asked; with as many "
        f"other features off, drawn at random, {as_asked[2]} do, and without an edit {as_asked[0]}. How {COLOUR} the "
        f"traced box is goes from {values[0]} to {values[1]}, where 0 is grey; with the others off, to {values[2]}."
    )


def _report(made: Made, summed: Graph, folder: Path, verdict: str) -> None:
    """Writes the report that `difffract report` writes of the graph and the two directories."""
    lead = [
        f"The image shows: {made.shows}. As asked: {'yes' if made.right else 'no'}. {NOTICE}",
        f"In short: {verdict[0].lower()}{verdict[1:]}",
    ]
    page = graph_report(
        summed,
        labels=labels_of(made.graph, None, figures=True),
        images=shown_images(made.kept),
        image_note="",
        groups=None,
        top=ReportConfig.model_fields["top"].default,
        validation=folder / VALIDATED,
        edit=folder / STEERED,
        lead=lead,
    )
    write_report(folder / "report.html", page)
