"""Choosing features by rule: places hold what the runs hold, circuits' effects add up, and no move changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffract_jax.circuits.effects.readings import node_effects, predict
from difffract_jax.circuits.trace.capture import capture
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.organism.captions import parse
from difffract_jax.studies import choices
from difffract_jax.studies.cases import Case, draw_cases, recoloured, recolourings
from difffract_jax.studies.errors import caption_of_seen
from difffract_jax.studies.outcomes import Outcomes, outcomes, paired_difference
from difffract_jax.studies.precision import choose_settings, colour_target
from difffract_jax.studies.repair import blame
from difffract_jax.transcoders.transcoder import Transcoder
from random_graphs import random_graph, random_output_graph
from tolerances import TOL
from traces import IMAGE, JOINT, TEXT, layer_of

PROMPT, WANTED = "a red circle left of a blue square", "an orange circle left of a blue square"


@pytest.fixture(scope="module")
def organism():
    return load_pipeline("organism"), load_transcoders("organism")


@pytest.fixture(scope="module")
def material(organism):
    """Two cases that are kept, and between them one of three objects, which the organism has not learnt to draw."""
    three = " and a green ring and a yellow cross"
    hopeless = Case(f"a red circle{three}", f"an orange circle{three}", 1, 0)
    return draw_cases(organism[0], [Case(PROMPT, WANTED, 0, 0), hopeless, Case(PROMPT, WANTED, 2, 0)])


@pytest.fixture(scope="module")
def codes(organism, material):
    return [choices.mean_codes(*organism, material, [text] * len(material.cases)) for text in (PROMPT, WANTED)]


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_node_s_effect_is_what_is_lost_without_it(seed, several):
    graph = random_output_graph(seed) if several else random_graph(seed)
    found, weights = node_effects(graph), graph.root_weights[graph.targets]
    free = np.setdiff1d(np.flatnonzero((graph.node_kind == FEATURE) & (graph.node_value > 0.1)), graph.targets)
    size = np.abs(graph.edge_attribution).sum()
    for node in free[:6]:
        factors = np.ones(graph.node_kind.size)
        factors[node] = 0
        assert abs(predict(graph, factors) @ weights + found[node]) <= TOL.x64 * max(size, abs(found[node]))


def test_recolourings_change_one_word_and_its_article_only():
    cases = recolourings(79_000, 12, 5)
    assert cases == recolourings(79_000, 12, 5) and [case.seed for case in cases] == list(range(5, 17))
    for case in cases:
        before, after = parse(case.prompt).objects, parse(case.wanted).objects
        assert before[case.slot]._replace(colour="") == after[case.slot]._replace(colour="")
        assert before[1 - case.slot] == after[1 - case.slot]
        assert after[case.slot].colour not in {thing.colour for thing in before}
        words = list(zip(case.prompt.split(), case.wanted.split(), strict=True))
        assert 1 <= sum(a != b for a, b in words) <= 2
    assert recoloured("there is an orange ring over a leaf", 1, "blue") == "there is an orange ring over a blue leaf"


def test_a_caption_of_what_is_shown_names_the_noun_that_is_seen():
    assert caption_of_seen("there is a small black cross", 5, 5).split()[-1] != "cross"
    assert parse(caption_of_seen("a lemon at the top", 0, 1)).objects[0].colour  # shapes need a colour


def test_cases_that_are_wrong_unedited_are_dropped(material):
    assert material.drawn == 3 and [case.seed for case in material.cases] == [0, 2]
    x0, y0, x1, y1 = map(int, material.box(0).split(","))
    assert 0 <= x0 < x1 <= 30 and 8 <= y0 < y1 <= 48  # the circle is on the left
    assert np.flatnonzero(material.phrase[0]).tolist() == [0, 1, 2]
    assert not (material.inside[0].reshape(6, 6)[:, 4:]).any() and material.inside[0].any()
    kept = material.take(np.array([1]))
    assert kept.cases == material.cases[1:] and np.array_equal(kept.images[0], material.images[1])


def test_places_hold_the_mean_codes_of_the_run(organism, material, codes):
    pipe, tcs = organism
    places = choices.all_places(tcs, 4)
    assert codes[0].shape == (2, places.feature.size) == (2, 4 * 4 * 2 * 512)
    trace = capture(pipe, tcs, PROMPT, seed=2, step=2)
    record = trace.record
    for group, (stack, x, mask) in enumerate(
        (
            (tcs.stacks["img"], record.mlp_in[IMAGE], material.inside[1]),
            (tcs.stacks["txt"], record.mlp_in[TEXT], material.phrase[1]),
            (tcs.stacks["joint"], record.mlp_in[JOINT], np.append(material.phrase[1], np.zeros(36, bool))),
            (
                tcs.stacks["joint"],
                record.mlp_in[JOINT],
                np.append(0 * material.phrase[1], material.inside[1]) > 0,
            ),
        )
    ):
        tc: Transcoder = layer_of(stack, 1)
        z = np.asarray(tc.encode(jnp.asarray(x[1 if x.shape[0] == 2 else -1]), record.t))
        mine = codes[0][1][(places.group == group) & (places.step == 2) & (places.site == 1)]
        assert np.abs(mine - z[mask].mean(axis=0)).max() <= 1e-4 * z.max()  # two samplers, float32


def test_what_places_add_is_what_their_features_add(organism, material):
    pipe, tcs = organism
    places = choices.all_places(tcs, 4)
    graph = choices.circuit_of(pipe, tcs, PROMPT, 0, colour_target(PROMPT, WANTED, 0, material.box(0)))
    everywhere = np.ones(36, bool), np.ones(material.phrase.shape[1], bool)
    feature = graph.node_kind == FEATURE
    whole = choices.circuit_effects(graph, places, *everywhere)
    assert whole.sum() == pytest.approx(node_effects(graph)[feature].sum(), rel=1e-9)
    inner = choices.circuit_effects(graph, places, material.inside[0], material.phrase[0])
    outer = choices.circuit_effects(graph, places, ~material.inside[0], ~material.phrase[0])
    assert np.abs(inner + outer - whole).max() <= TOL.x64 * np.abs(whole).max()
    summed = aggregate(graph)
    one = np.flatnonzero((summed.node_kind == FEATURE) & (summed.node_stream == 0) & (summed.node_block == 1))[0]
    place = np.flatnonzero(
        (places.group == 0)
        & (places.block == 1)
        & (places.step == summed.node_step[one])
        & (places.feature == summed.node_feature[one])
    )
    same = feature & (graph.node_stream == 0) & (graph.node_block == 1) & (graph.node_step == summed.node_step[one])
    same &= graph.node_feature == summed.node_feature[one]
    assert whole[place[0]] == pytest.approx(node_effects(graph)[same].sum(), rel=1e-9)


def test_by_circuit_is_exact_where_the_output_is_linear_in_the_codes():
    before, after = np.array([2.0, 0.0, 3.0, 1.0], np.float32), np.array([0.0, 4.0, 1.0, 1.0], np.float32)
    slope = np.array([0.5, -1.0, 2.0, 7.0])
    gain = choices.by_circuit(before, after, slope * before, slope * after)
    assert gain == pytest.approx(slope * (after - before))
    assert choices.first(gain, 10).size == 0 or (gain[choices.first(gain, 10)] > 0).all()
    assert choices.first(np.array([0.0, 3.0, -1.0, 5.0]), 3).tolist() == [3, 1]


def test_blame_ranks_what_speaks_against_by_side():
    effect = np.array([1.0, -3.0, -1.0, -2.0, 0.0])
    side = np.array([True, True, False, True, False])
    blamed = blame([effect], (side, ~side))
    assert [one[0].tolist() for one in blamed.sides] == [[1, 3], [2]]
    assert blamed.taken(0, 1).tolist() == [1, 2]


def test_moves_of_no_strength_change_nothing_and_whole_moves_do(organism, material, codes):
    places = choices.all_places(organism[1], 4)
    edits = []
    for strength in (0.0, 1.5):
        for row in range(2):
            before, after = codes[0][row], codes[1][row]
            chosen = choices.first(choices.by_contrast(before, after), 24)
            edits.append(
                choices.moves(places, chosen, before, after, strength, material.inside[row], material.phrase[row])
            )
    none, moved = outcomes(*organism, material, edits)
    assert np.array_equal(none.images, material.images) and not none.norm.any() and not none.success.any()
    assert not none.outside.any() and not none.others.any()
    assert (moved.norm > 0).all() and not np.array_equal(moved.images, material.images)


def made_up(success, outside):
    zeros = np.zeros(len(success))
    collateral = np.full(len(success), outside)
    return Outcomes(
        np.array(success), zeros.astype(bool), *[zeros] * 4, ~zeros.astype(bool), collateral, zeros, zeros, zeros
    )


def test_settings_are_matched_in_collateral():
    scores = {(way, 8, 1.0): made_up([False] * 4, 0.3) for way in ("contrast", "activation", "random")}
    scores |= {("SAE", 8, 1.0): made_up([True, False, False, False], 0.1)}
    scores |= {("SAE", 8, 2.0): made_up([True, True, False, False], 0.2)}
    scores |= {
        ("circuit", 8, s): made_up([True] * n + [False] * (4 - n), 0.1 * s) for s, n in ((1.0, 2), (2.0, 3), (3.0, 4))
    }
    chosen = choose_settings(scores)
    assert chosen["SAE"] == (8, 2.0) and chosen["circuit"] == (8, 2)  # the third, better, has more collateral
    assert chosen["random"] == (8, 1.0)  # none is within: the least


def test_a_paired_difference_knows_pairs():
    first = np.array([True] * 60 + [False] * 40)
    gap = paired_difference(first, first)
    assert gap == {"difference": 0.0, "95% from": 0.0, "to": 0.0}
    other = first.copy()
    other[:10] = False
    gap = paired_difference(first, other)
    assert gap["difference"] == pytest.approx(0.1) and 0.03 < gap["95% from"] < 0.1 < gap["to"] < 0.18
