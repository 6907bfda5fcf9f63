"""The scan finds what was planted, tokens have the factors they should, and the shipped labels fit the shipped set."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from difffract_jax.circuits.editing.ranking import rank_features
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.labels import CLEAR, Detected, read_labels
from difffract_jax.config import UserError
from difffract_jax.directories import SHIPPED
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
from difffract_jax.organism.scorer import read_scenes
from difffract_jax.organism.world import from_caption
from difffract_jax.studies import scan
from difffract_jax.studies.truth import KINDS, image_truth, text_truth


def kinds_of(truth, side):
    return {KINDS[side][number] for number in np.flatnonzero(truth)}


def test_an_image_token_is_of_the_object_that_covers_it():
    asked = from_caption("a red circle left of a blue square")
    tokens = np.array([[[13, 16, 0]]])
    circle, square, corner = image_truth(asked, read_scenes(asked.images()), (6, 6), tokens)[0, 0]
    beside = {("relation", "left"), ("object", "any")}
    assert kinds_of(circle, "img") == beside | {("shape", "circle"), ("colour", "red"), ("place", "left")} | {
        ("row", "2"),
        ("column", "1"),
    }
    assert kinds_of(square, "img") >= beside | {("shape", "square"), ("colour", "blue"), ("place", "right")}
    assert kinds_of(corner, "img") == {("relation", "left"), ("row", "0"), ("column", "0")}


def test_a_text_token_is_of_the_object_whose_phrase_it_lies_in():
    asked = from_caption("there is a lemon above a big blue square")
    tokens = np.arange(10)[None, None]
    found = [kinds_of(row, "txt") for row in text_truth(asked, tokens)[0, 0]]
    above, lemon = ("relation", "above"), {("shape", "lemon"), ("colour", "yellow")}
    assert found[0] == {above, ("word", "there"), ("position", "0")}
    assert found[3] == {above, ("word", "lemon"), ("position", "3")} | lemon
    assert found[4] == {above, ("word", "above"), ("position", "4")}
    assert found[6] == {above, ("word", "big"), ("position", "6"), ("shape", "square"), ("colour", "blue")}
    assert found[9] == {above, ("word", "(end)"), ("position", "9")}


def test_auroc_is_scipy_s():
    rng = np.random.default_rng(0)
    code, truth = rng.integers(0, 5, (200, 3)).astype(float), rng.random((200, 2)) < 0.4
    truth[:, 1] = np.arange(200) < 5
    found = scan.auroc(code, truth)
    for f in range(3):
        inside, outside = code[truth[:, 0], f], code[~truth[:, 0], f]
        assert found[0, f] == pytest.approx(mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))
    assert np.isnan(found[1]).all()  # too few


def test_a_site_s_features_get_the_factors_that_were_planted():
    rng = np.random.default_rng(1)
    steps, captions, tokens = 2, 400, 6
    truth = {side: rng.random((steps, captions, tokens, len(KINDS[side]))) < 0.1 for side in KINDS}
    red, middle = KINDS["img"].index(("colour", "red")), KINDS["img"].index(("row", "3"))
    code = np.zeros((steps, captions, tokens, 3), np.float16)
    code[1, ..., 0] = truth["img"][1, ..., red]
    code[..., 1] = truth["img"][..., middle] + 0.5 * truth["img"][..., red]
    largest = np.zeros((steps, captions, 3))
    largest[..., :2] = code.astype(float).max(axis=2)[..., :2]
    largest[1, 7, 0] = 9.0
    kept = scan.Kept(largest, np.full(largest.shape, 4), (code > 0).sum(axis=2), {"img": code})
    columns = scan._site([kept], truth, np.ones(captions, bool), tokens)
    assert columns["kind"] == [red, middle, -1]
    assert columns["content_kind"] == [red, red, -1]
    assert (columns["step"][0], columns["auroc"]) == (1, [1.0, 1.0, 0.5])
    assert 0.5 < columns["content_auroc"][1] < 0.95
    assert columns["examples"][0][:4] == [7, 1, 4, 9.0] and columns["examples"][2] == []
    assert columns["density"][2] == 0


def test_the_shipped_labels_are_of_the_shipped_transcoders():
    labels, tcs = load_labels("organism"), load_transcoders("organism")
    assert labels.transcoders == tcs.source
    assert (SHIPPED["organism"] / "labels.json").stat().st_size < 400_000
    assert {site: len(rows) for site, rows in labels.sites.items()} == {
        f"{stream}/{block}": tcs.config.features for stream in ("img", "txt", "single") for block in (0, 1)
    }
    every = [label for rows in labels.sites.values() for label in rows]
    assert sum(label.best.auroc >= 0.9 for label in every) >= 200
    assert all(0 <= label.best.auroc <= 1 and len(label.examples) <= 3 for label in every)
    assert {"shape", "colour", "place", "word", "position"} <= {label.best.factor for label in every}


def test_a_shipped_example_is_where_its_feature_is_strong():
    pipe, tcs, labels = load_pipeline("organism"), load_transcoders("organism"), load_labels("organism")
    label = labels.of(Feature("img", 1, 469))
    assert (label.best.factor, label.best.value) == ("colour", "pink")
    example = label.examples[0]
    assert "pink" in example.prompt
    (step,) = example.feature.steps
    found = rank_features(pipe, tcs, example.prompt, seeds=(example.seed,), step=step, top=512, sites=["img/1"])["img"]
    here = next(row for row in found if row.feature.feature == 469)
    assert here.feature == example.feature


def test_a_label_says_what_it_knows(tmp_path):
    assert str(Detected("colour", "red", 0.91, 2, "img")) == "colour red (0.91)"
    assert str(Detected("colour", "red", CLEAR - 0.01, 2, "img")) == "unclear"
    assert str(Detected("", "", 0.5, 0, "")) == "never active"
    with pytest.raises(UserError, match="There is no label of img/1/f512"):
        load_labels("organism").of(Feature.parse("img/1/f512"))
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="is not a file of labels"):
        read_labels(tmp_path / "labels.json")
    with pytest.raises(UserError, match="There are no labels of organism-saes"):
        load_labels("organism-saes")


def test_too_few_captions_are_refused():
    with pytest.raises(UserError, match="A scan takes a multiple of 100 captions, at least 200, but got 150"):
        scan.scan(load_pipeline("organism"), load_transcoders("organism"), 150)
