"""Graphs: what a circuit is once it is traced. NumPy only: no weights, no accelerator, no JAX.

arrays          the arrays of a graph, checked; the one definition of the conservation error
graph           the graph and its file
provenance      where a graph comes from; json_values: frozen types as JSON
summary         what a graph says of itself
held_paths      what a graph says of the paths that the replacement holds
frozen_attention  a graph without its attention scores, or without its modulations
pooled_nodes    a graph with modulations and words
names           what nodes are called
aggregation     sums over positions
order           levels that every edge leads up, or the circle because of which there are none
checks          finite numbers and no circles, for what is read from files
influence       how much each node bears on another, on a graph without cycles
scoring         how much of a graph its features explain, rather than errors
pruning         which nodes and edges to keep
supernodes      features that do the same, grouped
combine         averages and differences of circuits over prompts and seeds
comparison      two graphs side by side
collection      graphs of many runs in one directory
population      edges over many runs: intervals, and differences of two sets
unclear_links   links of other tools' documents that could not be taken as they stand
files           formats of other tools, read and written; any readable file as a graph

The names below are public: `from difffract_jax import graphs`, then `graphs.prune`. Loaded on first use.
"""

from difffract_jax.namespaces import lazy

_HOME = {
    "Graph": "difffract_jax.graphs.graph",
    "Provenance": "difffract_jax.graphs.provenance",
    "read_graph": "difffract_jax.graphs.files.reader",
    "compare": "difffract_jax.graphs.comparison",
    "prune": "difffract_jax.graphs.pruning",
    "aggregate": "difffract_jax.graphs.aggregation",
    "scores": "difffract_jax.graphs.scoring",
    "node_influence": "difffract_jax.graphs.influence",
    "find_supernodes": "difffract_jax.graphs.supernodes",
    "edit_supernodes": "difffract_jax.graphs.supernodes",
    "Groups": "difffract_jax.graphs.groups",
    "read_groups": "difffract_jax.graphs.groups",
    "write_groups": "difffract_jax.graphs.groups",
    "with_groups": "difffract_jax.graphs.groups",
    "average": "difffract_jax.graphs.combine",
    "difference": "difffract_jax.graphs.combine",
    "fill_collection": "difffract_jax.graphs.collection",
    "read_collection": "difffract_jax.graphs.collection",
    "edge_table": "difffract_jax.graphs.population",
    "intervals": "difffract_jax.graphs.population",
    "contrast": "difffract_jax.graphs.population",
    "without_scores": "difffract_jax.graphs.frozen_attention",
    "without_pooled": "difffract_jax.graphs.frozen_attention",
    "node_names": "difffract_jax.graphs.names",
    "find_nodes": "difffract_jax.graphs.names",
    "write_reference_json": "difffract_jax.graphs.files.reference_json",
    "write_viewer_json": "difffract_jax.graphs.files.viewer_json",
    "write_csv": "difffract_jax.graphs.files.tables",
    "write_graphml": "difffract_jax.graphs.files.tables",
    "write_feature_files": "difffract_jax.graphs.files.feature_files",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy(__name__, _HOME)
