"""The organism and the reference's pipeline, streamed or over devices: the images and graphs of resident weights."""

from functools import cache

import numpy as np
import pytest

from difffract_jax import attribute, capture, generate, strongest_feature
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.sharding import make_mesh, traced_pipeline, traced_transcoders
from tolerances import REFERENCE
from traces import PROMPTS, SIZE, same_edges

pytestmark = pytest.mark.slow
MODELS = {
    "organism": (("organism", "organism"), "a red circle left of a blue square", {}, "img/1"),
    "golden": ((REFERENCE / "pipeline", REFERENCE / "transcoders"), PROMPTS[0], SIZE, "img/1"),
}


@cache
def found(model: str, mode: str):
    """Returns an image and a graph, with weights in one of the modes; `mesh` splits them over two devices."""
    (pipeline, transcoders), prompt, size, site = MODELS[model]
    if mode == "mesh":
        mesh = make_mesh({"data": 1, "site": 1, "feature": 2})
        pipe = load_pipeline(pipeline, sharding=traced_pipeline(mesh))
        tcs = load_transcoders(transcoders, sharding=traced_transcoders(mesh))
    else:
        mesh, pipe = None, load_pipeline(pipeline, weights=mode)
        tcs = load_transcoders(transcoders, weights=mode)
    run = pipe.plan(**size)
    trace = capture(pipe, tcs, prompt, run=run)
    stream, block = site.split("/")
    target = strongest_feature(trace, tcs, stream, int(block))
    graph = attribute(trace, tcs, target=target, max_nodes=20, min_attribution=0.0, mesh=mesh)
    return generate(pipe, prompt, seed=3, run=run).image, graph


@pytest.mark.parametrize(("model", "mode"), [("organism", "disk"), ("organism", "mesh"), ("golden", "host")])
def test_images_and_graphs_are_the_same(model, mode):
    ours, theirs = found(model, mode), found(model, "device")
    apart = np.abs(ours[0].astype(int) - theirs[0])
    # A sum split over devices rounds otherwise, and a value in ten thousand may lie next to half a grey level.
    assert apart.max() <= (1 if mode == "mesh" else 0) and np.mean(apart > 0) <= 1e-4
    same_edges(theirs[1], ours[1])
