"""Files of feature examples for the viewers of graphs (docs/viewers.md).

json    N.json for every feature, N Cantor's pairing of its dictionary's number and its index: for Neuronpedia, and for
        circuit-tracer's viewer when `scan` starts with `./`
pack    index.json.gz and layer_K.bin for every dictionary K: for circuit-tracer's local server, `scan` starting with
        `/`. The index holds for every K its filename and offsets, one more of these than the dictionary has features.
        At offsets[i] stand four bytes, little-endian: how many bytes follow, zlib's compression of the feature's JSON.

Neither viewer shows images: give words, the text stream's tokens or prompts.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from difffract_jax.config import UserError
from difffract_jax.graphs.files.viewer_nodes import cantor
from difffract_jax.storage.files import atomic_directory


class FeatureExample(NamedTuple):
    """One example of a feature.

    Attributes:
        tokens: the words around.
        activations: the feature's value at each.
        centre: the word that it is about, counted from 0, which stands in the middle; None for none, so that several
            examples begin one below the other.
    """

    tokens: Sequence[str]
    activations: Sequence[float]
    centre: int | None


class FeatureRecord(NamedTuple):
    """What is known of a feature.

    Attributes:
        dictionary: k, from `viewer_json.dictionary_number`.
        feature: of that dictionary.
        examples: by name of their kind, as "Top activations", the strongest first.
        frequency: share of positions at which it is active; None if not known.
        histogram: how often its values occur, in bins of equal width; empty if not known.
    """

    dictionary: int
    feature: int
    examples: Mapping[str, Sequence[FeatureExample]]
    frequency: float | None = None
    histogram: Sequence[float] = ()


def write_feature_files(
    records: Iterable[FeatureRecord],
    directory: str | Path,
    *,
    form: Literal["json", "pack"] = "json",
    features: int | None = None,
    transcoders: str = "",
    overwrite: bool = False,
) -> None:
    """Writes the examples of features for a viewer.

    Args:
        records: the features, each once.
        directory: to write; it appears only when it is complete.
        form: one file each, or a pack.
        features: of each dictionary, for a pack; without it as many as the records name. Those without a record get one
            without examples.
        transcoders: name of the transcoders, kept in every record.
        overwrite: replace the directory if it exists.

    Raises:
        UserError: if a feature comes twice or lies past the dictionary, or an example's lists differ in length.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for record in records:
        place = record.dictionary, record.feature
        if place in found or not 0 <= record.feature < (features or record.feature + 1):
            raise UserError(f"Feature {place[1]} of dictionary {place[0]} comes twice or lies past its dictionary.")
        found[place] = _document(record, transcoders)
    with atomic_directory(directory, overwrite=overwrite) as partial:
        if form == "json":
            for (dictionary, feature), document in found.items():
                (partial / f"{cantor(dictionary, feature)}.json").write_text(json.dumps(document), encoding="utf-8")
        else:
            _pack(partial, found, features, transcoders)


def _document(record: FeatureRecord, transcoders: str) -> dict[str, Any]:
    """Returns the JSON of a feature."""
    for examples in record.examples.values():
        for example in examples:
            if len(example.tokens) != len(example.activations) or not 0 <= (example.centre or 0) < len(example.tokens):
                raise UserError(
                    f"An example of feature {record.feature} has {len(example.tokens)} words, "
                    f"{len(example.activations)} values and its centre at {example.centre}; give a value for each word."
                )
    values = [float(v) for group in record.examples.values() for example in group for v in example.activations]
    shown = {
        "transcoder_id": transcoders,
        "index": record.feature,
        "examples_quantiles": [
            {
                "quantile_name": name,
                "examples": [
                    {
                        "tokens": list(example.tokens),
                        "tokens_acts_list": [float(v) for v in example.activations],
                        "train_token_ind": -1 if example.centre is None else example.centre,
                        "is_repeated_datapoint": False,
                    }
                    for example in group
                ],
            }
            for name, group in record.examples.items()
        ],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": min(values, default=0.0),
        "act_max": max(values, default=1.0),
        "histogram": [float(v) for v in record.histogram],
    }
    return shown if record.frequency is None else shown | {"activation_frequency": record.frequency}


def _pack(directory: Path, found: Mapping[tuple[int, int], Any], features: int | None, transcoders: str) -> None:
    """Writes one file per dictionary, and the index."""
    index: dict[str, dict[str, Any]] = {}
    for dictionary in sorted({place[0] for place in found}):
        count = features or max(feature for place, feature in found if place == dictionary) + 1
        name, offsets = f"layer_{dictionary}.bin", [0]
        with (directory / name).open("wb") as stream:
            for feature in range(count):
                nothing = FeatureRecord(dictionary, feature, {})
                document = found.get((dictionary, feature)) or _document(nothing, transcoders)
                packed = zlib.compress(json.dumps(document).encode())
                stream.write(struct.pack("<I", len(packed)) + packed)
                offsets.append(stream.tell())
        index[str(dictionary)] = {"filename": name, "offsets": offsets}
    (directory / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))
