"""What a page calls the features of a graph, where nobody said (NumPy)."""

from pathlib import Path

import difffract_jax
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.labels import CLEAR, Labels, read_labels
from difffract_jax.config import UserError, read_yaml
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.names import feature_names
from difffract_jax.storage.remote.cache import local_file

ORGANISM_LABELS = Path(difffract_jax.__file__).parent / "organism" / "transcoders" / "labels.json"
"""Labels of the transcoders that ship with the package."""


def known_labels(graph: Graph, file: Path | None, *, figures: bool = False) -> dict[str, str]:
    """Returns what features stand for, as `labels_of`; else as the document says that the graph was read from.

    Args:
        graph: as it was read.
        file: see `labels_of`.
        figures: see `labels_of`.

    Raises:
        UserError: as `labels_of`.
    """
    return dict(graph.provenance.labels or {}) | labels_of(graph, file, figures=figures)


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
        return {str(name): str(label) for name, label in read_yaml(local_file(file)).items()}
    labels = read_labels(ORGANISM_LABELS if file is None else file)
    if file is None and labels.transcoders != graph.provenance.transcoders:
        return {}
    return texts_by_feature(graph, labels, str(file), figures=figures)


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
