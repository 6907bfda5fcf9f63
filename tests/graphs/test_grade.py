"""The rule of a graph's grade: what counts as an edit that works, its words, and that it is stored with the graph."""

import pytest

from difffract_jax.circuits.checks.grade_report import facts
from difffract_jax.graphs.grade import Grade, grade_of, median_error, share, word, words, works
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.graphs.pruning import prune
from random_graphs import random_graph


def edit(size, dose, predicted, full, **more):
    return {"size": size, "dose": dose, "predicted": predicted, "full": full, **more}


@pytest.mark.parametrize(
    ("predicted", "happened", "expected"),
    [
        (0.2, 0.2, True),
        (0.2, 0.1, True),
        (0.2, 0.4, True),
        (-0.2, -0.15, True),
        (0.2, 0.0999, False),
        (0.2, 0.4001, False),
        (0.2, -0.2, False),
        (0.2, 0.0, False),
        (0.0, 0.0, False),
    ],
)
def test_an_edit_works_in_the_predicted_direction_from_half_to_twice_as_much(predicted, happened, expected):
    assert works(predicted, happened) is expected


def test_a_grade_follows_from_what_edits_did():
    rows = [
        edit(1, -1.0, -0.2, -0.2, other=[-0.01, -0.2], control=0.01, distance=0.2),
        edit(1, 0.5, 0.1, 0.09, other=[0.08, 0.02], control=-0.03, distance=0.1),
        edit(1, 1.0, 0.2, 0.01, other=[0.01, 0.05], control=0.02, distance=0.4),
        edit(1, 2.0, 0.4, 0.1, other=[0.1], control=0.5, distance=1.2),
        edit(1, -2.0, -0.4, -0.3, other=[0.1], control=0.5, distance=1.4),
        edit(2, -1.0, -0.3, -0.1, control=None, distance=9.0),
        edit(7, 1.0, 0.3, 0.3, distance=None),
        edit(8, 1.0, 0.5, -0.3),
    ]
    grade = grade_of(rows, seeds=(0, 1), no_op=0.0)
    assert (grade.alone, grade.other_seeds) == pytest.approx((2 / 3, 1 / 3))
    assert grade.number == pytest.approx((2 / 3 + 2 * 1 / 3) / 3)
    assert (grade.large_doses, grade.small_groups, grade.large_groups) == (0.5, 0.5, 0.0)
    # The upper decile of 0.01, 0.02 and 0.03: controls at larger doses and of groups say nothing of single edges.
    assert grade.limit == pytest.approx(0.028) and grade.dose_limit == 2.0
    expected = (
        "Predicts single edits well, small groups fairly, large groups poorly, large doses fairly; with other seeds "
        "fairly. Do not read edges below 2.8% of the target. From dose 2 on, activations are not the run's own any "
        "more."
    )
    assert words(grade) == str(grade) == expected
    assert median_error(rows, "predicted", lambda row: row["size"] > 1) == pytest.approx(2.0)


def test_what_was_not_tried_has_no_share():
    assert share([], "full") is None and word(None) is None and word(0.0) == "poorly"
    alone = grade_of([edit(1, 1.0, 0.2, 0.2)])
    near = grade_of([edit(1, 1.0, 0.2, 0.2, control=0.001)])
    assert near.limit == 0.01  # below which nothing was tried
    assert (alone.number, alone.other_seeds, alone.limit, alone.dose_limit) == (1.0, None, None, None)
    assert str(alone) == "Predicts single edits well; with other seeds untried."
    assert words(Grade(number=1.0, alone=1.0, limit=1.53)).endswith("Do not read edges below 150% of the target.")
    nothing = grade_of([])
    assert nothing.number is None and str(nothing).startswith("Predicts no edit that is worth trying")
    assert facts(nothing)[0]["figure"] == "not tried" and facts(alone)[0]["figure"] == 1.0


@pytest.mark.parametrize(("alone", "number"), [(None, None), (0.0, 0.0)])
def test_a_number_of_earlier_files_is_that_of_what_was_tried(alone, number):
    values = {"grade": {"number": 0.0} | ({} if alone is None else {"alone": alone})}
    read = Provenance.from_json(values)
    assert (read.grade.number, read.grade.alone) == (number, alone)
    assert Provenance.from_json(read.to_json()) == read and not read.extra


def test_a_grade_is_stored_with_its_graph_and_shown_but_is_not_of_the_pruned_one(tmp_path):
    graph = random_graph(0)
    graded = graph.with_provenance(grade=Grade(number=0.5, alone=0.5, limit=0.02, seeds=(0, 1)))
    graded.save(tmp_path / "g.npz")
    again = Graph.load(tmp_path / "g.npz")
    assert again.provenance.grade == graded.provenance.grade
    assert "Predicts single edits fairly; with other seeds untried. Do not read edges below 2%" in " ".join(
        repr(again).split()
    )
    assert "Predicts" not in repr(graph) and prune(again).provenance.grade is None
