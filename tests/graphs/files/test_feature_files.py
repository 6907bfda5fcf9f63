"""Feature files are found by the viewers' rules, in both forms."""

import gzip
import json
import struct
import zlib

import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs.files.feature_files import FeatureExample, FeatureRecord, write_feature_files
from difffract_jax.graphs.files.viewer_nodes import cantor, dictionary_number

TOP = FeatureExample(("a", "red", "cube"), (0.0, 2.5, 0.5), 1)
RECORDS = [
    FeatureRecord(7, 2, {"Top activations": [TOP], "Subsample Interval 0": []}, 0.01, (3.0, 1.0)),
    FeatureRecord(7, 0, {"Top activations": [TOP]}),
    FeatureRecord(4, 5, {}),
]


def read_pack(directory, dictionary, feature):
    """As the viewer does: the index by layer, then a range of bytes that ends one too late."""
    index = json.loads(gzip.decompress((directory / "index.json.gz").read_bytes()))
    entry = index[str(dictionary)]
    raw = (directory / entry["filename"]).read_bytes()
    raw = raw[entry["offsets"][feature] : entry["offsets"][feature + 1] + 1]
    (length,) = struct.unpack("<I", raw[:4])
    return json.loads(zlib.decompress(raw[4 : 4 + length])), len(entry["offsets"])


def test_single_files_are_named_by_the_viewers_integer(tmp_path):
    write_feature_files(RECORDS, tmp_path / "files", transcoders="organism")
    assert {path.name for path in (tmp_path / "files").iterdir()} == {f"{cantor(r[0], r[1])}.json" for r in RECORDS}
    found = json.loads((tmp_path / "files" / f"{cantor(7, 2)}.json").read_text())
    assert found["index"] == 2 and found["transcoder_id"] == "organism" and found["activation_frequency"] == 0.01
    example = found["examples_quantiles"][0]["examples"][0]
    assert example["tokens"] == ["a", "red", "cube"] and example["tokens_acts_list"] == [0.0, 2.5, 0.5]
    assert (found["act_min"], found["act_max"], found["histogram"]) == (0.0, 2.5, [3.0, 1.0])
    assert [group["quantile_name"] for group in found["examples_quantiles"]] == [
        "Top activations",
        "Subsample Interval 0",
    ]


def test_a_pack_holds_the_same(tmp_path):
    write_feature_files(RECORDS, tmp_path / "files", transcoders="organism")
    write_feature_files(RECORDS, tmp_path / "pack", form="pack", features=9, transcoders="organism")
    assert {path.name for path in (tmp_path / "pack").iterdir()} == {"index.json.gz", "layer_4.bin", "layer_7.bin"}
    for record in RECORDS:
        found, offsets = read_pack(tmp_path / "pack", record.dictionary, record.feature)
        name = f"{cantor(record.dictionary, record.feature)}.json"
        assert found == json.loads((tmp_path / "files" / name).read_text()) and offsets == 10
    nothing, _ = read_pack(tmp_path / "pack", 7, 8)
    assert nothing["index"] == 8 and nothing["examples_quantiles"] == []


def test_the_streams_of_a_block_have_dictionaries_of_their_own():
    assert [dictionary_number(3, stream) for stream in (1, 0)] == [6, 7]


@pytest.mark.parametrize(
    ("records", "more", "sentence"),
    [
        ([RECORDS[0], RECORDS[0]], {}, "comes twice"),
        (RECORDS, {"features": 3}, "lies past its dictionary"),
        ([FeatureRecord(0, 0, {"x": [FeatureExample(("a",), (1.0, 2.0), 0)]})], {}, "1 words, 2 values"),
        ([FeatureRecord(0, 0, {"x": [FeatureExample(("a",), (1.0,), 1)]})], {}, "centre at 1"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, records, more, sentence):
    with pytest.raises(UserError, match=sentence):
        write_feature_files(records, tmp_path / "files", **more)
    assert not list(tmp_path.iterdir())
