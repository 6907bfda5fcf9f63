"""What a scan found of features, as examples for circuit-tracer's viewer and Neuronpedia (NumPy only).

These show words and no images, so an example is the prompt of its run, with the place and the value of its peak.
"""

from collections.abc import Sequence

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.dashboards.features.record import TIERS, Scan
from difffract_jax.graphs.files.feature_files import FeatureExample, FeatureRecord
from difffract_jax.graphs.files.viewer_nodes import dictionary_number
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.names import feature_names


def with_scan(records: Sequence[FeatureRecord], graph: Graph, scan: Scan) -> list[FeatureRecord]:
    """Returns records of a graph's features with the examples, frequencies and histograms of a scan.

    Args:
        records: of the graph's features, from `run_features`.
        graph: that they are of.
        scan: of the same transcoders. Features of sites that it did not scan stay as they are.

    Raises:
        UserError: if the scan is of other transcoders.
    """
    theirs, ours = scan.config["transcoders"], graph.provenance.transcoders
    if theirs != ours:
        raise UserError(
            f"{scan.directory} is about other transcoders than the graph ({str(theirs)[:12]}... and "
            f"{str(ours)[:12]}...); give the pages of the graph's own."
        )
    known = {(record.dictionary, record.feature): record for record in records}
    for node, name in enumerate(feature_names(graph)):
        if graph.node_kind[node] != FEATURE or name.rpartition("/")[0] not in scan.sites:
            continue
        place = dictionary_number(int(graph.node_block[node]), int(graph.node_stream[node]))
        feature = int(graph.node_feature[node])
        before = known.get((place, feature)) or FeatureRecord(place, feature, {})
        if before.frequency is None:
            known[place, feature] = _with(before, scan, name)
    return list(known.values())


def _with(record: FeatureRecord, scan: Scan, name: str) -> FeatureRecord:
    """Returns a record with what a scan found of its feature."""
    measured, site = scan.of(name), scan.site(name.rpartition("/")[0])
    examples: dict[str, list[FeatureExample]] = {}
    for tier in TIERS:
        mine = [one for one in measured.examples if one.tier == tier]
        if mine:
            kind = f"Corpus of {len(scan.prompts):,} prompts, {tier}"
            examples[kind] = [FeatureExample([f"{one.prompt} ({one.feature})"], [one.value], 0) for one in mine]
    histogram = site.histogram[record.feature].astype(np.float64).tolist()
    return record._replace(examples={**record.examples, **examples}, frequency=measured.density, histogram=histogram)
