"""What a validation found, told shortly: the target's own figures first, each with what was done and what it means."""

import pytest

from difffract_jax.circuits.checks.report import page, perturbation_figure
from difffract_jax.circuits.checks.summaries import EVERY, at_size, own_figures, words

TARGET = "pixels:color=red"


def curve(reading, recovered, lost):
    rows = [{"size": size, "ranking": "influence", "recovered": recovered, "lost": lost} for size in (1, 7)]
    draws = [{"size": 7, "ranking": "random", "recovered": value, "lost": None} for value in (0.1, 0.3)]
    return {"reading": reading, "rows": rows + draws}


def correlations(prediction, of, spearman, pairs=9):
    return {"prediction": prediction, "of": of, "spearman": spearman, "pearson": spearman, "pairs": pairs}


@pytest.fixture
def found():
    """The values that `validate` returns, of a circuit of seven features."""
    rows = [correlations("influence", TARGET, 0.4), correlations("change", TARGET, 0.6)]
    rows += [correlations("influence", EVERY, 0.7), correlations("change", EVERY, 0.8)]
    pairs = {"influence": [0.5, 0.1, 0.2], "change": [-2.0, 1.0, 0.5], "measured": [-1.5, 1.0, 0.1]}
    exact = {"check": "edges", "worst": 1e-9, "median": 1e-9, "checked": 4, "of": 9, "bar": 1e-6, "holds": True}
    medians = dict.fromkeys(("influence", "change"), {"spearman": 0.5, "pearson": 0.5, "nodes": 3})
    perturbed = {"ablated": 9, "rows": rows, "pairs": pairs | {"own": [False, True, False]}, "median": medians}
    curves = [curve("propagated", 0.9, 0.95), curve("full", 0.8, 0.6)]
    completeness = {"ablation": "mean", "pruned": 7, "draws": 2, "curves": curves}
    return {"exactness": [exact], "perturbation": perturbed, "completeness": completeness}


def test_the_target_s_own_figures_are_those_of_the_real_model_and_say_what_they_mean(found):
    kept, removed, change, influence = own_figures(found)
    assert "only the pruned circuit's 7 features kept" in kept["what was done"]
    assert "in the real model" in kept["what was done"] and "1: the target keeps its value" in kept["what it means"]
    assert (kept["figure"], kept["as many at random"]) == (0.8, pytest.approx(0.2))
    assert (removed["figure"], removed["as many at random"]) == (0.6, None)
    assert (change["figure"], influence["figure"]) == (0.6, 0.4) and "the 9 most influential" in change["what was done"]


def test_without_the_real_model_the_reading_nearest_to_it_is_told(found):
    found["completeness"]["curves"].pop()
    assert own_figures(found)[0]["figure"] == 0.9 and "in the frozen model" in own_figures(found)[0]["what was done"]


def test_a_circuit_of_no_feature_has_correlations_alone(found):
    found["completeness"]["pruned"] = 0
    assert [row["figure"] for row in own_figures(found)] == [0.6, 0.4]
    assert all(row["recovered"] is None for row in at_size(found, 0))


def test_several_targets_are_told_apart(found):
    found["perturbation"]["rows"].insert(0, correlations("change", "img/1/f4@2", None, 2))
    told = [(row["what was done"].rpartition(", ")[2], row["figure"]) for row in own_figures(found)[2:]]
    assert told == [("img/1/f4@2", None), (TARGET, 0.6), (TARGET, 0.4)]


def test_a_report_and_its_figure_begin_with_the_target(found):
    text = page(found, {})
    assert text.index("## The target itself") < text.index("## Exactness") and "| 0.6 | - |" in text
    assert words("completeness", found) in text and "Pruning keeps 7 features" in text
    target, left, right = perturbation_figure(found).axes
    assert target.get_title() == "The target itself\nSpearman 0.6, 9 pairs"
    assert left.get_title() == "Every node downstream\nSpearman 0.7, 9 pairs" and "Spearman 0.8" in right.get_title()
    assert target.lines[0].get_xydata().tolist() == [[1.0, 1.0]] and len(right.lines[0].get_xdata()) == 3
