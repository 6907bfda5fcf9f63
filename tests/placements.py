"""The same model with its weights in other places: on the device, on disk, spread over a mesh."""

import jax
import numpy as np

from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.loading import load_pipeline, save_pipeline
from difffract_jax.models.families import PARTS
from difffract_jax.models.pipeline import generate
from difffract_jax.sharding import make_mesh, traced_pipeline
from difffract_jax.storage.checkpoint import leaf_paths
from tolerances import TOL, relative_error


def same_wherever_weights_lie(pipe, tcs, prompt, run, folder):
    """Asserts that the record of step 1 and the image are those of resident weights; the model goes into `folder`."""
    save_pipeline(pipe, folder / "model")
    whole, place = load_pipeline(folder / "model"), traced_pipeline(make_mesh({"feature": 2}, jax.devices()[:2]))
    parts = {name: jax.device_put(getattr(whole, name), place(name, getattr(whole, name))) for name in PARTS}
    pipes = {
        "device": whole,
        "disk": load_pipeline(folder / "model", weights="disk"),
        "mesh": whole._replace(**parts),
    }
    made, images = {}, {}
    for name, one in pipes.items():
        span = capture_steps(one, tcs, prompt, first=1, last=1, run=run)
        made[name] = leaf_paths([trace.record._replace(weights=None) for trace in span.traces])
        images[name] = generate(one, prompt, run=run).latents
    for name in ("disk", "mesh"):
        assert made[name].keys() == made["device"].keys()
        for path, leaf in made[name].items():
            expected = made["device"][path]
            assert np.array_equal(leaf, expected) or relative_error(leaf, expected) <= TOL.f32_run, path
        assert relative_error(images[name], images["device"]) <= TOL.f32_run
