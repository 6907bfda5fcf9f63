"""Circuit tracing for FLUX diffusion transformers in JAX.

The packages, each importing only from those above it:

    config address ops checkpoint sharding  settings, places, pure maths, files, meshes; display: how objects show
    models                                  MM-DiT, T5, CLIP, autoencoder, sampler, pipeline: prompt -> image
    transcoders                             sparse stand-ins for the model's MLPs
    converters                              PyTorch checkpoints -> ours, by rule tables (a package beside this one)
    circuits                                capture -> replacement -> attribution -> graph -> pruning, interventions
    studies                                 what edits do to images, measured; what features stand for
    dashboards                              reports that people look at, one HTML file each
    loading cli                             models and transcoders by name or directory; the `difffract` command

In a few lines:

    import difffract_jax as dfx
    pipe, tcs = dfx.load_pipeline("flux"), dfx.load_transcoders("transcoders")
    trace = dfx.capture(pipe, tcs, "a red circle left of a blue square", seed=0, step=1)
    graph = dfx.attribute(trace, tcs, target=dfx.Feature.parse("img/2/f401@12"))
    dfx.prune(graph).save("circuit.npz")

The names below are loaded on first use, so that importing this package costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "UserError": "difffract_jax.config",
    "make_mesh": "difffract_jax.sharding",
    "load_pipeline": "difffract_jax.loading",
    "save_pipeline": "difffract_jax.loading",
    "load_transcoders": "difffract_jax.loading",
    "save_transcoders": "difffract_jax.loading",
    "generate": "difffract_jax.models.pipeline",
    "random_pipeline": "difffract_jax.models.tiny",
    "random_transcoders": "difffract_jax.transcoders.transcoder",
    "capture": "difffract_jax.circuits.trace.capture",
    "capture_steps": "difffract_jax.circuits.trace.capture",
    "prepare": "difffract_jax.circuits.frozen.replacement",
    "replacement": "difffract_jax.circuits.frozen.replacement",
    "attribute": "difffract_jax.circuits.attribution.attribute",
    "strongest_feature": "difffract_jax.circuits.attribution.selection",
    "Feature": "difffract_jax.circuits.notation.feature",
    "Graph": "difffract_jax.graphs.graph",
    "prune": "difffract_jax.graphs.pruning",
    "compare": "difffract_jax.graphs.compare",
    "read_graph": "difffract_jax.graphs.compare",
    "Edit": "difffract_jax.circuits.editing.interventions",
    "steer": "difffract_jax.circuits.editing.interventions",
    "sweep": "difffract_jax.circuits.editing.sweeps",
    "rank_features": "difffract_jax.circuits.editing.ranking",
    "load_labels": "difffract_jax.loading",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Imports the module of a public name when the name is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'difffract_jax' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
