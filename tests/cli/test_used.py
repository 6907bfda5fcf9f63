"""Only the transcoders of sites that a command uses are read, and what comes out is what all would give."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from difffract_jax.address import flux_layout
from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.outputs import parse_target
from difffract_jax.circuits.attribution.selection import strongest_feature
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.cli.used import edited, load_for_graph, load_used, matching, of_graph, traced_types, up_to_targets
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.storage import checkpoint
from difffract_jax.transcoders.transcoder import TranscoderSet, random_transcoders

LAYOUT = TINY.layout
FLUX = flux_layout(19, 38)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[TranscoderSet, str]:
    """Transcoders of every site of the tiny model, and where they lie."""
    out = tmp_path_factory.mktemp("used") / "transcoders"
    save_transcoders(random_transcoders(TINY, features=64), out)
    return load_transcoders(out), str(out)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts the bytes that are copied out of files; hashes, which read small files whole, are left out."""
    total = {"bytes": 0}
    plain = checkpoint.put

    def counted(array: np.ndarray, dtype: Any, sharding: Any) -> jax.Array:
        total["bytes"] += array.nbytes
        return plain(array, dtype, sharding)

    monkeypatch.setattr(checkpoint, "put", counted)
    yield total


def size(tcs: TranscoderSet) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tcs.stacks))


def test_only_the_sites_that_are_wanted_are_read(saved: tuple[TranscoderSet, str], read: dict[str, int]) -> None:
    tcs, path = saved
    one = load_used(path, lambda label, number: (label, number) == ("img", 1))
    assert one.sites.names == ("img/1",) and read["bytes"] == size(one) == size(tcs) // len(tcs.sites.names)
    assert one.source == tcs.source  # still known as the whole set
    mine, theirs = jax.tree.leaves(one.stacks["img"]), jax.tree.leaves(tcs.stacks["img"])
    assert all(np.array_equal(a[0], b[1]) for a, b in zip(mine, theirs, strict=True))


def test_all_are_read_where_nothing_is_known(saved: tuple[TranscoderSet, str], read: dict[str, int]) -> None:
    tcs, path = saved
    for wanted in (None, lambda label, number: True, lambda label, number: False):
        read["bytes"] = 0
        assert load_used(path, wanted).sites == tcs.sites and read["bytes"] == size(tcs)


def test_chosen_sites_are_known_by_their_own_hash(saved: tuple[TranscoderSet, str]) -> None:
    tcs, path = saved
    some = load_used(path, None, sites="img/0-1")
    assert some.sites.names == ("img/0", "img/1") and some.source not in ("", tcs.source)
    assert some.source == load_transcoders(path, sites=("img/0", "img/1")).source


def test_sites_up_to_the_highest_target_bear_on_it() -> None:
    targets = [Feature("img", 3, 1), Feature("txt", 16, 2)]
    wanted = up_to_targets(FLUX, targets, (1, 1))
    assert wanted is not None
    assert [wanted("img", 16), wanted("img", 17), wanted("txt", 0), wanted("single", 0)] == [True, False, True, False]
    high = up_to_targets(FLUX, [Feature("single", 2, 1)], (0, 0))
    assert high is not None and [high("img", 18), high("single", 2), high("single", 3)] == [True, True, False]
    assert up_to_targets(FLUX, targets, (0, 1)) is None  # all sites of an earlier step bear on a later one
    assert up_to_targets(FLUX, [parse_target("pixels:color=red")], (0, 0)) is None
    assert up_to_targets(FLUX, [Feature("img", 40, 1)], (0, 0)) is None  # told later, as ever


def test_edits_and_patterns_name_their_sites() -> None:
    wanted = edited([Edit.parse("img/2/f401=zero"), Edit.parse("txt=zero")])
    assert [wanted("img", 2), wanted("img", 3), wanted("txt", 7), wanted("single", 2)] == [True, False, True, False]
    some = matching(["img/0-3"])
    assert some("img", 3) and not some("img", 4) and not some("txt", 3)


def test_a_graph_is_the_same_with_the_sites_that_bear_on_it(saved: tuple[TranscoderSet, str]) -> None:
    tcs, path = saved
    pipe = random_pipeline()
    run = pipe.plan(height=32, width=32, text_tokens=12, steps=2)
    target = strongest_feature(capture(pipe, tcs, "a fox", run=run), tcs, "img", 1)
    few = load_used(path, up_to_targets(LAYOUT, [target], (0, 0)))
    assert len(few.sites.names) < len(tcs.sites.names)
    whole, part = (
        attribute(capture(pipe, mine, "a fox", run=run), mine, target=target, max_nodes=8) for mine in (tcs, few)
    )
    for name in ("node_feature", "node_block", "edge_source", "edge_target", "edge_attribution"):
        assert np.array_equal(getattr(whole, name), getattr(part, name)), name
    assert whole.provenance.transcoders == part.provenance.transcoders
    wanted = of_graph(LAYOUT, whole)
    assert wanted is not None and load_for_graph(path, LAYOUT, whole).sites == few.sites
    told = whole.with_provenance(settings={"sites": "img/0"})
    assert load_for_graph(path, LAYOUT, told).sites.names == ("img/0",)


def test_a_graph_of_an_output_or_of_several_steps_needs_all() -> None:
    kinds = np.array([0, 3])
    assert of_graph(FLUX, SimpleNamespace(provenance=SimpleNamespace(steps=(0, 1)), node_kind=kinds)) is None


def test_a_graph_is_captured_again_in_the_types_of_its_trace(saved: tuple[TranscoderSet, str]) -> None:
    def of(settings: dict[str, object] | None) -> SimpleNamespace:
        provenance = SimpleNamespace(settings=settings, steps=(0, 1))
        return SimpleNamespace(provenance=provenance, node_kind=np.array([0]))

    assert traced_types(of(None)) == {"dtype": "f32"}  # what `load_pipeline` gives
    assert traced_types(of({"model_dtype": None, "transcoder_dtype": "f32"})) == {"transcoder_dtype": "f32"}
    assert traced_types(of({"model_dtype": "bf16"})) == {"dtype": "bf16"}
    narrow = load_for_graph(saved[1], LAYOUT, of({"transcoder_dtype": "bf16"}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow.stacks)} == {"bfloat16"}
