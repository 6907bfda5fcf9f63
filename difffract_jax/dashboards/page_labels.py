"""What a page calls the features of a graph, and the groups that it opens with, where nobody gave any (NumPy)."""

from dataclasses import replace
from json import loads
from pathlib import Path

import difffract_jax
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.labels import CLEAR, Labels, read_labels
from difffract_jax.config import UserError, read_yaml
from difffract_jax.graphs.files.viewer_groups import document_labels
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import feature_names, find_nodes, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.graphs.supernodes import find_supernodes

ORGANISM_LABELS = Path(difffract_jax.__file__).parent / "organism" / "transcoders" / "labels.json"
"""Labels of the transcoders that ship with the package."""
MOST_GROUPED = 1000
"""Features up to which a page opens with groups that were found; finding them among more takes seconds."""


def known_labels(graph: Graph, file: Path | None, source: Path, *, figures: bool = False) -> dict[str, str]:
    """Returns what features stand for, as `labels_of`; else as the document says that the graph was read from.

    Args:
        graph: as it was read.
        file: see `labels_of`.
        source: the graph's own file.
        figures: see `labels_of`.

    Raises:
        UserError: as `labels_of`.
    """
    return document_labels(source, graph) | labels_of(graph, file, figures=figures)


def labels_of(graph: Graph, file: Path | None, *, figures: bool = False) -> dict[str, str]:
    """Returns what the graph's features stand for: from a file, or of the organism if the graph is about its features.

    Args:
        graph: the graph.
        file: of names for features, or a labels.json of `features --scan`; None for those at hand.
        figures: whether to say how well a feature detects it, "colour blue (0.99)", where that was measured.

    Raises:
        UserError: if the file is neither, or is about other transcoders.
    """
    if file is not None and file.suffix != ".json":
        return {str(name): str(label) for name, label in read_yaml(file).items()}
    shipped = file is None
    if shipped and graph.provenance.transcoders != loads(ORGANISM_LABELS.read_text(encoding="utf-8"))["transcoders"]:
        return {}  # before an object is made of every example of every feature
    return texts_by_feature(graph, read_labels(ORGANISM_LABELS if file is None else file), str(file), figures=figures)


def texts_by_feature(
    graph: Graph, labels: Labels, source: str = "`labels`", *, figures: bool = False
) -> dict[str, str]:
    """Returns what the graph's features stand for, by labels of its transcoders.

    Args:
        graph: the graph.
        labels: of its transcoders.
        source: where they come from, for the message.
        figures: see `labels_of`.

    Raises:
        UserError: if they are of other transcoders.
    """
    if labels.transcoders != graph.provenance.transcoders:
        raise UserError(f"{source} holds labels of other transcoders than the graph's; give those of the graph's own.")
    return {name: _label(labels, name, figures) for name in {*feature_names(graph)} - {""}}


def _label(labels: Labels, name: str, figures: bool) -> str:
    """Returns what a feature detects; "" where that is not clear."""
    feature = Feature.parse(name)
    mine = labels.sites.get(f"{feature.stream}/{feature.block}", ())
    if feature.feature >= len(mine):
        return ""
    best = max((mine[feature.feature].content, mine[feature.feature].best), key=lambda one: one.auroc >= CLEAR)
    if not best.factor or best.auroc < CLEAR:
        return ""
    return f"{best.factor} {best.value}" + (f" ({best.auroc:.2f})" if figures else "")


def grouped(graph: Graph) -> Graph:
    """Returns a graph with the groups that are found in what is left of it after pruning, if it has none.

    Args:
        graph: as a page shows it.
    """
    if graph.supernodes or graph.provenance.grouping is not None:
        return graph
    pruned = graph if graph.provenance.pruning is not None else prune(graph, by_position=True)
    if int((pruned.node_kind == FEATURE).sum()) > MOST_GROUPED:
        return graph
    names, found = node_names(pruned), find_supernodes(pruned).supernodes
    groups = {title: find_nodes(graph, [names[node] for node in members]).tolist() for title, members in found.items()}
    return replace(graph, supernodes=groups)
