"""Circuit tracing for FLUX diffusion transformers in JAX.

Packages and modules, each importing only from those above it:

    config address ops display    settings; the order of streams, blocks, sites and rows; pure maths; how objects show
    memory                        what this machine and its limits allow
    storage hub                   files written whole or not at all, trees of arrays in them; repositories on the hub
    graphs                        what a circuit is once it is traced: pruned, grouped, compared, exported (NumPy only)
    sharding                      meshes and sharding rules
    models                        MM-DiT as a tuple of stacks, T5, CLIP, autoencoder, sampler: prompt -> image
    transcoders                   sparse stand-ins for the model's MLPs, harvested, trained, evaluated
    converters                    PyTorch checkpoints -> ours, by rule tables (a package beside this one)
    circuits                      a run recorded, frozen, attributed; features edited; graphs checked
    organism dashboards           the embedded model and its world; reports
    estimate                      what a command needs, counted from shapes before anything is loaded
    directories loading           models and transcoders by name: embedded, in a directory, or on the hub
    conversion                    checkpoints into directories of ours, and back, leaf by leaf
    feature_pages                 a feature by its name, with its page
    studies                       the paper's questions as experiments on the organism
    cli                           the `difffract` command

In a few lines, on the embedded model:

    import difffract_jax as dfx
    pipe, tcs = dfx.load_pipeline("organism"), dfx.load_transcoders("organism")
    trace = dfx.prepare(dfx.capture(pipe, tcs, "a red circle left of a blue square", seed=0, step=1), tcs)
    graph = dfx.attribute(trace, tcs, target=dfx.strongest_feature(trace, tcs, "img", 1), max_nodes=50)
    dfx.prune(graph).save("circuit.npz")

What is used less often lies in the namespaces `dfx.graphs`, `dfx.circuits`, `dfx.transcoders` and `dfx.models`.
The names below are loaded on first use, so that importing this package costs nothing.
"""

import logging

from difffract_jax.namespaces import lazy

__version__ = "0.1.0"

_HOME = {
    "UserError": "difffract_jax.config",
    "enable_compile_cache": "difffract_jax.storage.compile_cache",
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
    "compare": "difffract_jax.graphs.comparison",
    "read_graph": "difffract_jax.graphs.files.reader",
    "Edit": "difffract_jax.circuits.editing.interventions",
    "steer": "difffract_jax.circuits.editing.interventions",
    "sweep": "difffract_jax.circuits.editing.sweeps",
    "rank_features": "difffract_jax.circuits.editing.ranking",
    "load_labels": "difffract_jax.loading",
    "feature": "difffract_jax.feature_pages",
    "models": "difffract_jax.models",
    "transcoders": "difffract_jax.transcoders",
    "circuits": "difffract_jax.circuits",
    "graphs": "difffract_jax.graphs",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]
# transformers, of which tokenizers alone are used, says when it is imported that PyTorch is missing; nothing needs it.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
__getattr__, _names = lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
