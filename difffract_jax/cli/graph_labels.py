"""What a graph's features stand for: labels from a file, of the embedded model, or of the document that was read."""

from json import loads
from pathlib import Path
from typing import Any

import difffract_jax
from difffract_jax.config import UserError, read_yaml

ORGANISM_LABELS = Path(difffract_jax.__file__).parent / "organism" / "transcoders" / "labels.json"
"""Labels of the transcoders that ship with the package."""


def known_labels(graph: Any, file: Path | None, source: Path, *, figures: bool = False) -> dict[str, str]:
    """Returns what features stand for, as `labels_of`; else as the document says that the graph was read from."""
    from difffract_jax.graphs.files.viewer_groups import document_labels

    return document_labels(source, graph) | labels_of(graph, file, figures=figures)


def labels_of(graph: Any, file: Path | None, *, figures: bool = False) -> dict[str, str]:
    """Returns what the graph's features stand for: from a file, or of the organism if the graph is about its features.

    Args:
        graph: the graph.
        file: of names for features, or a labels.json of `features --scan`; None for those at hand.
        figures: whether to say how well a feature detects it, "colour blue (0.99)", where that was measured.

    Raises:
        UserError: if the file is neither, or is about other transcoders.
    """
    from difffract_jax.circuits.notation.labels import read_labels
    from difffract_jax.graphs.names import feature_names

    told = graph.provenance.transcoders
    if file is not None and file.suffix != ".json":
        return {str(name): str(label) for name, label in read_yaml(file).items()}
    if file is None and told != loads(ORGANISM_LABELS.read_text(encoding="utf-8"))["transcoders"]:
        return {}  # before an object is made of every example of every feature
    labels = read_labels(ORGANISM_LABELS if file is None else file)
    if labels.transcoders != told:
        raise UserError(f"{file} holds labels of other transcoders than the graph's; give those of the graph's own.")
    return {name: _label(labels, name, figures) for name in {*feature_names(graph)} - {""}}


def _label(labels: Any, name: str, figures: bool) -> str:
    """Returns what a feature detects; "" where that is not clear."""
    from difffract_jax.circuits.notation.feature import Feature
    from difffract_jax.circuits.notation.labels import CLEAR

    feature = Feature.parse(name)
    mine = labels.sites.get(f"{feature.stream}/{feature.block}", ())
    if feature.feature >= len(mine):
        return ""
    best = max((mine[feature.feature].content, mine[feature.feature].best), key=lambda one: one.auroc >= CLEAR)
    if not best.factor or best.auroc < CLEAR:
        return ""
    return f"{best.factor} {best.value}" + (f" ({best.auroc:.2f})" if figures else "")
