"""The demonstration: everything this package does, end to end, with no files needed.

1. Load the embedded model and its transcoders.
2. Generate an image of `PROMPT`, and read from its pixels whether it shows what was asked.
3. Capture one denoising step, trace one feature's circuit, and check that its edges and bias add up.
4. Prune the circuit, and save image and graphs with the record of how they were made.
"""

from typing import Any

from difffract_jax.circuits.attribution import attribute
from difffract_jax.circuits.pruning import prune
from difffract_jax.circuits.selection import strongest_feature
from difffract_jax.circuits.trace import capture
from difffract_jax.config import DemoConfig, provenance
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.pipeline import generate
from difffract_jax.organism.evaluate import see
from difffract_jax.organism.scorer import describe, judge
from difffract_jax.organism.world import from_caption
from difffract_jax.report import Advance, graph_summary, save_image

PROMPT = "a red circle left of a blue square"
NOTICE = (
    "Model and transcoders are the embedded ones, trained on synthetic scenes: image, verdict, features, circuit and "
    "check are real."
)
ENLARGED = 8
"""Screen pixels per pixel of the image that is saved."""


def run(settings: DemoConfig, advance: Advance) -> dict[str, Any]:
    """Runs the demonstration and returns what to print.

    Args:
        settings: where to write, and the seed.
        advance: callback of the progress bar.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    record = provenance("demo", settings)
    paths = {name: settings.out / name for name in ("image.png", "graph.npz", "pruned.npz")}
    pipe = load_pipeline("organism")
    tcs = load_transcoders("organism")
    image = generate(pipe, PROMPT, seed=settings.seed).image
    save_image(image.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1), paths["image.png"], record)
    reading = see(image[None])
    right = judge(from_caption(PROMPT), reading).right[0]
    shown = {"prompt": PROMPT, "the image shows": describe(reading, 0), "as asked": "yes" if right else "no"}
    trace = capture(pipe, tcs, PROMPT, seed=settings.seed, step=1)
    target = strongest_feature(trace, tcs, "img", max(tcs.img_layers))
    graph = attribute(trace, tcs, target=target, max_nodes=100, expansion_batch=20, progress=advance)
    graph = graph.with_metadata(record)
    pruned = prune(graph)
    graph.save(paths["graph.npz"])
    pruned.save(paths["pruned.npz"])
    kept = {"edges kept by pruning": f"{len(pruned.edge_attribution)} of {len(graph.edge_attribution)}"}
    return {"note": NOTICE} | shown | {name: str(path) for name, path in paths.items()} | kept | graph_summary(graph)
