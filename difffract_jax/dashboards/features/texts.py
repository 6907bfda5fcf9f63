"""What features are called: labels of this package, texts from a file, and what a graph at hand says of a feature.

A file of texts is JSON, {"img/1/f159": "a text", ...}, as the pages' own "Save labels" writes it; or a table with the
columns feature and label, separated by commas (.csv) or tabs (.tsv); or a labels file of `difffract features --scan`.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.labels import Detected, Labels, read_labels
from difffract_jax.config import UserError
from difffract_jax.dashboards.records import feature_of
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import node_names
from difffract_jax.text_files import decoded

SHOWN = 8
"""Edges of a graph that a page shows in each direction."""


class Text(NamedTuple):
    """What a feature is called.

    Attributes:
        text: in short.
        rows: what it detects, if that was measured: factor, value, AUROC, step, side.
    """

    text: str
    rows: tuple[tuple[str, str, float, int, str], ...] = ()


def texts_of(labels: Labels) -> dict[str, Text]:
    """Returns the labels of a set of transcoders, by feature; those of features that are never active are left out."""
    return {
        f"{site}/f{number}": Text(str(label), tuple(map(_row, dict.fromkeys((label.best, label.content)))))
        for site, each in labels.sites.items()
        for number, label in enumerate(each)
        if label.best.factor
    }


def _row(detected: Detected) -> tuple[str, str, float, int, str]:
    return detected.factor, detected.value, detected.auroc, detected.step, detected.side


def read_texts(path: Path, transcoders: str) -> dict[str, Text]:
    """Reads a file of texts, see the module.

    Args:
        path: the file.
        transcoders: content hash of the transcoders, which a labels file must be about.

    Raises:
        UserError: if it is none, names something that is no feature, or is about other transcoders.
    """
    try:
        raw = decoded(path.read_bytes())
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save it in that encoding.") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        return _checked(path, _table(path, raw))
    try:
        stored = json.loads(raw)
    except (ValueError, RecursionError):
        stored = None
    if isinstance(stored, dict) and "format_version" in stored:
        labels = read_labels(path)
        if labels.transcoders != transcoders:
            raise UserError(f"{path} has labels of other transcoders; make some with `difffract features ... --scan`.")
        return texts_of(labels)
    if not isinstance(stored, dict) or not all(isinstance(text, str) for text in stored.values()):
        raise UserError(
            f'{path} is not a file of labels; give JSON as in {{"img/1/f159": "red"}}, or a .csv with the columns '
            "feature and label."
        )
    return _checked(path, stored)


def _table(path: Path, raw: str) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(raw), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if not {"feature", "label"} <= set(rows.fieldnames or ()):
        raise UserError(f"{path} must have the columns feature and label, but has {', '.join(rows.fieldnames or ())}.")
    return {(row["feature"] or "").strip(): row["label"] or "" for row in rows}


def _checked(path: Path, texts_by_name: Mapping[str, str]) -> dict[str, Text]:
    """Returns texts by the features' own names; refuses names that are none."""
    texts = {}
    for name, text in texts_by_name.items():
        try:
            feature = Feature.parse(name)
        except UserError:
            raise UserError(f"{path} names {name!r}, which is not a feature; write for example img/1/f159.") from None
        texts[f"{feature.stream}/{feature.block}/f{feature.feature}"] = Text(text)
    return texts


def edges_by_feature(graph: Graph) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Returns the strongest edges in and out of every feature of a graph, summed over positions and steps.

    Args:
        graph: of the same model and transcoders.

    Returns:
        Feature -> "up" and "down" -> the other end's name, and the edge as a share of its target's absolute edges.
    """
    whole = aggregate(graph)
    names, features = node_names(whole), whole.node_kind == FEATURE
    named = {int(node): str(feature_of(whole, int(node))) for node in np.flatnonzero(features)}
    size = np.bincount(whole.edge_target, np.abs(whole.edge_attribution), whole.node_kind.size)
    share = whole.edge_attribution / np.maximum(size[whole.edge_target], 1e-30)
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for source, target, part in zip(whole.edge_source.tolist(), whole.edge_target.tolist(), share, strict=True):
        if target in named:
            sums[named[target], "up"][named.get(source, names[source])] += float(part)
        if source in named:
            sums[named[source], "down"][named.get(target, names[target])] += float(part)
    strongest: dict[str, dict[str, list[tuple[str, float]]]] = defaultdict(lambda: {"up": [], "down": []})
    for (name, way), others in sums.items():
        strongest[name][way] = sorted(others.items(), key=lambda one: -abs(one[1]))[:SHOWN]
    return dict(strongest)


def merged(*sources: Mapping[str, Text]) -> dict[str, Text]:
    """Returns texts of several sources; a later one's text stands before what was measured of an earlier one."""
    texts: dict[str, Text] = {}
    for source in sources:
        for name, text in source.items():
            rows: Any = text.rows or (texts[name].rows if name in texts else ())
            texts[name] = Text(text.text, rows)
    return texts
