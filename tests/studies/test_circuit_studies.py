"""The studies of circuits: shares add up, nothing taken away changes nothing, masks part all tokens, choices part."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import STREAMS, TXT, flux_layout
from difffract_jax.circuits.attribution.outputs import GREY, colour_of, parse_target
from difffract_jax.circuits.effects.effect_tables import side_sums
from difffract_jax.circuits.effects.total_effects import TotalEffects
from difffract_jax.circuits.notation.region import box_mask
from difffract_jax.config import UserError
from difffract_jax.graphs.provenance import KnownRun
from difffract_jax.graphs.pruning import edge_scores
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
from difffract_jax.organism.captions import COLOUR_NAMES
from difffract_jax.organism.evaluate import contradicting
from difffract_jax.organism.world import from_caption
from difffract_jax.studies import choices, code_moves, flow, removing, steps, suppressor
from difffract_jax.studies.binding import by_block
from difffract_jax.studies.cases import Case, Material
from difffract_jax.studies.choices import all_places, first
from difffract_jax.studies.concept_context import context_of
from difffract_jax.studies.patterns import with_patterns_of
from difffract_jax.studies.results import quiet
from difffract_jax.studies.scan import scan
from random_graphs import random_output_graph
from tolerances import TOL

FLOAT32 = 1e-5
"""Effects of float32 runs, summed in another order."""


@pytest.fixture(scope="module")
def made():
    pipe, tcs = load_pipeline("organism"), load_transcoders("organism")
    material = removing.right_images(pipe, removing.draw_plain(7, 4, 500))
    case = material.cases[0]
    target = f"pixels:color={removing.drawn_colour(case)},box={material.box(0)}"
    (effects,) = removing.effects_on(pipe, tcs, case.prompt, case.seed, [target])
    return pipe, tcs, material, effects


def test_without_a_right_image_there_is_nothing_to_study(made, monkeypatch):
    pipe, _, material, _ = made
    nothing = material._replace(cases=())
    monkeypatch.setattr(removing, "draw_cases", lambda *_: nothing)
    with pytest.raises(UserError, match="None of 3 images shows what its caption says"):
        removing.right_images(pipe, removing.draw_plain(7, 3, 500))


def test_parts_of_an_output_s_effects_sum_to_one(made):
    *_, effects = made
    parts = steps.shares(effects)
    total = parts.features.sum() + parts.errors.sum() + parts.text + parts.noise
    assert total == pytest.approx(1.0) and parts.features.min() >= 0 and parts.noise > 0
    assert parts.features.shape == (4, len(steps.SIDES))


def test_concept_and_context_part_all_tokens_and_effects(made):
    pipe, tcs, material, effects = made
    around = context_of(pipe, material)
    assert np.array_equal(material.inside ^ around.inside, np.ones_like(material.inside))
    words = [len(case.prompt.split()) + 1 for case in material.cases]  # and the closing token
    both = material.phrase | around.phrase
    assert not (material.phrase & around.phrase).any() and both.sum(axis=1).tolist() == words
    parts = [removing.place_effects(effects, tcs, m.inside[0], m.phrase[0]) for m in (material, around)]
    whole = removing.place_effects(effects, tcs, np.ones_like(material.inside[0]), both[0])
    size = np.abs(whole).max()
    assert np.abs(sum(parts) - whole).max() <= FLOAT32 * size
    summed = sum(float(np.asarray(group, np.float64).sum()) for group in effects.features)
    assert whole.sum() == pytest.approx(summed, rel=1e-6)  # padding has no features
    assert len(whole) == all_places(tcs, 4).feature.size


@pytest.mark.parametrize("model", ["organism", "organism-sd3"])
def test_places_and_tables_name_the_feature_that_has_the_effect(model):
    """Stable Diffusion 3 has sites of one label in two stacks."""
    layout, tcs, rng = load_pipeline(model).config.transformer.layout, load_transcoders(model), np.random.default_rng(0)
    tokens = {"img": 3, "txt": 4}
    shapes = [
        (2, len(layout.blocks_of(number)), sum(tokens[stream] for stream in group.streams), 2)
        for number, group in enumerate(layout.groups)
    ]
    features, index = (
        [draw(shape) for shape in shapes]
        for draw in (rng.standard_normal, lambda shape: rng.integers(0, tcs.config.features, shape))
    )
    effects = TotalEffects(
        tuple(features), tuple(index), tuple(np.ones(shape[:3]) for shape in shapes), np.zeros(4), np.zeros(3), layout
    )
    inside, phrase = np.array([True, False, True]), np.array([False, True, True, False])
    expected, sums = {}, {}
    for number, group in enumerate(layout.groups):
        rows = [(stream, token) for stream in group.streams for token in range(tokens[stream])]
        for (step, layer, row, at), value in np.ndenumerate(features[number]):
            side, token = rows[row]
            label, site = layout.site_number(layout.blocks_of(number)[layer], STREAMS.index(side))
            if group.mlp and {"img": inside, "txt": phrase}[side][token]:
                key = label, side, step, site, index[number][step, layer, row, at]
                expected[key] = expected.get(key, 0) + value
            if side == "txt" or inside[token]:
                sums[step, label, side] = sums.get((step, label, side), 0) + value
    places = all_places(tcs, 2)
    made = removing.place_effects(effects, tcs, inside, phrase)
    columns = zip(*(getattr(places, name).tolist() for name in ("group", "step", "block", "feature")), strict=True)
    sides = [(group.label, side) for group, side in choices.SIDES]
    told = {
        (*sides[group], step, block, feature): value
        for (group, step, block, feature), value in zip(columns, made, strict=True)
        if value
    }
    assert told.keys() == expected.keys() and all(told[key] == pytest.approx(expected[key]) for key in told)
    rows = side_sums(effects, inside)
    assert len(rows) == len(sums) and all(
        one.features == pytest.approx(sums[one.step, one.stream, one.side]) for one in rows
    )


def test_effects_stand_at_their_places(made):
    """Zeroing the strongest place lowers the colour; taking nothing away gives the very image."""
    pipe, tcs, material, effects = made
    material = Material(
        material.cases[:1],
        1,
        *(column[:1] for column in (material.images, *material[3:])),
    )
    places = all_places(tcs, 4)
    score = removing.place_effects(effects, tcs, material.inside[0], material.phrase[0])
    way = removing.Removal((first(score, 8),), np.ones(1), material.inside, material.phrase)
    looks = removing.run_removals(
        pipe, tcs, material, places, {("off",): way.at(0.0), ("on",): way, ("2",): way.at(2.0)}
    )
    colour = [removing.drawn_colour(material.cases[0])]
    off, on, twice = looks.values()
    assert np.array_equal(off.images, material.images) and off.norm[0] == 0 == off.outside[0]
    assert off.has(colour)[0] and off.noun[0] and off.others[0]
    values = [removing.colour_values(material, one.images, colour)[0] for one in (off, on, twice)]
    assert values[0] > values[1] > values[2] and on.norm[0] < twice.norm[0]
    # As many ways as above, so that both runs share a compilation.
    same = {("a",): way, ("b",): way, ("c",): way}
    found = removing.matched(pipe, tcs, material, places, same, {("a", 1): 3 * on.norm})["a", 1]
    assert found.strength[0] == pytest.approx(3.0, rel=1e-5)


def test_a_colour_value_is_the_objective_of_the_pixels(made):
    _, _, material, _ = made
    names = ["red", "black", "green", "purple"][: len(material.cases)]
    found = removing.colour_values(material, material.images, names)
    for row, name in enumerate(names):
        inside = jnp.asarray(box_mask(material.box(row), (48, 48)))
        colour = jnp.asarray(parse_target(f"pixels:color={name}").colour)
        expected = colour_of(jnp.asarray(material.images[row] / np.float32(255)), inside, colour, jnp.asarray(GREY))
        assert found[row] == pytest.approx(float(expected), abs=1e-6)


def test_an_object_is_looked_at_where_it_was(made):
    *_, material, _ = made
    prompt, changed = "a red circle left of a blue square", "a red circle left of a green square"
    original, recoloured = (np.round(from_caption(text).images() * 255).astype(np.uint8) for text in (prompt, changed))
    nothing = np.repeat(np.round(from_caption("a red circle on the left").images() * 255).astype(np.uint8), 1, axis=0)
    base = Material((Case(prompt, prompt, 0, 1),), 1, original, *(column[:1] for column in material[3:]))
    other = base._replace(cases=(Case(prompt, prompt, 0, 0),))
    norms = np.zeros(1)
    assert removing.look(base, recoloured, norms).colour[0] == COLOUR_NAMES.index("green")
    seen = removing.look(other, recoloured, norms)
    assert seen.has(["red"])[0] and seen.noun[0] and not seen.others[0]
    gone = removing.look(base, nothing, norms)
    assert gone.colour[0] == removing.NOTHING and not gone.noun[0] and gone.others[0]


def test_random_places_are_active_and_as_many():
    codes = np.array([[0, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]], np.float32)
    allowed = np.array([1, 1, 1, 0, 1, 1], bool)
    found = removing.random_places(codes, [np.arange(2), np.arange(3)], 5, allowed)
    assert len(found[0]) == 2 and set(found[0]) <= {1, 2, 5} and found[1].tolist() == [0]


@pytest.mark.parametrize("seed", range(3))
def test_what_crosses_divides_among_blocks_and_steps(seed):
    graph = random_output_graph(seed).with_provenance(steps=(0, 1), shared=KnownRun(layout=flux_layout(2, 2)))
    found = flow.crossing(graph)
    scores, text = edge_scores(graph), graph.node_stream == TXT
    into = ~text[graph.edge_target]
    for end in range(len(flow.ENDS)):
        assert found.all[end].sum() == pytest.approx(scores[into].sum())
        assert found.text[end].sum() == pytest.approx(scores[into & text[graph.edge_source]].sum())
    assert (found.text <= found.all + TOL.x64).all()


def test_suppressors_and_carriers_part():
    rng = np.random.default_rng(0)
    own, competing = rng.normal(size=(2, 500))
    lower, carry = suppressor.choose(own, competing, 40)
    assert len(lower) == len(carry) == 40 and not set(lower) & set(carry)
    assert (competing[lower] < 0).all() and (own[lower] <= suppressor.MOST_OWN * -competing[lower]).all()
    allowed = (competing < 0) & (own <= -suppressor.MOST_OWN * competing)
    assert competing[lower].max() <= np.sort(competing[allowed])[39]
    assert own[carry].min() >= np.sort(own[own > suppressor.MOST_OWN * np.abs(competing)])[-40]


def test_competing_colours_are_the_other_object_s_or_the_one_asked_for():
    case = Case("a red circle left of a blue square", "", 0, 1)
    assert (removing.drawn_colour(case), suppressor.competing_colour(case)) == ("blue", "red")
    lemon = Case("a blue lemon above a tomato", "", 0, 0)
    assert (removing.drawn_colour(lemon), suppressor.competing_colour(lemon)) == ("yellow", "blue")
    asked = contradicting(20, 3)
    for text, named, colour in zip(asked.captions, asked.named[:, 0], asked.colour[:, 0], strict=True):
        case = Case(text, text, 0, 0)
        expected = COLOUR_NAMES[colour], COLOUR_NAMES[named]
        assert (removing.drawn_colour(case), suppressor.competing_colour(case)) == expected


def test_frequent_features_are_counted_once_per_case(made):
    _, tcs, *_ = made
    places = all_places(tcs, 4)
    same = np.flatnonzero((places.group == 0) & (places.block == 1) & (places.feature == 469))
    rows = suppressor.frequent(places, [same, same[:1], np.array([0])], load_labels("organism"))
    assert rows[0] | {"label": ""} == {"feature": "img/1/f469", "side": "img", "cases": 2, "of": 3, "label": ""}
    assert "pink" in rows[0]["label"]
    shares = suppressor.where(places, [same, same[:1], np.array([0])])
    assert shares[0]["all"] == pytest.approx(1.0) and shares[1]["all"] == 0
    assert shares[0]["step 0"] == pytest.approx(3 / 6) and shares[0]["step 3"] == pytest.approx(1 / 6)


@pytest.fixture(scope="module")
def guided():
    """The sibling of Stable Diffusion 3's shape, guided by two branches unless something else is said."""
    pipe = load_pipeline("organism-sd3")
    defaults = replace(pipe.config.defaults, guidance=3.0)
    return pipe._replace(config=replace(pipe.config, defaults=defaults)), load_transcoders("organism-sd3")


NOTHING = Material(
    (),
    0,
    np.zeros((0, 48, 48, 3), np.uint8),
    np.zeros((0, 36), bool),
    np.zeros((0, 48, 48), bool),
    np.zeros((0, 41), bool),
)
READ_BY_RUNNING = {
    "codes of places": lambda pipe, tcs: choices.mean_codes(pipe, tcs, NOTHING, []),
    "all codes": lambda pipe, tcs: code_moves.run_codes(pipe, tcs, [], []),
    "edits of codes": lambda pipe, tcs: code_moves.steer_codes(pipe, tcs, [], [], lambda row: ()),
    "total effects": lambda pipe, tcs: removing.effects_on(pipe, tcs, "a red circle", 0, ["pixels:color=red"]),
    "patterns": lambda pipe, tcs: with_patterns_of(pipe, [], [], []),
    "labels": lambda pipe, tcs: scan(pipe, tcs, 200),
}


@pytest.mark.parametrize("read", READ_BY_RUNNING)
def test_a_run_with_two_evaluations_a_step_is_refused_where_places_are_features_at_a_step(guided, read):
    pipe, tcs = guided
    assert pipe.plan().branches == 2
    with pytest.raises(UserError, match="reads one evaluation of the model at each step, but here are 2") as error:
        READ_BY_RUNNING[read](pipe, tcs)
    assert "\n" not in str(error.value)


def test_effects_and_graphs_of_two_branches_are_refused_where_they_are_divided_among_places(made):
    _, tcs, material, effects = made
    both, tokens = effects._replace(negative_text=effects.text), (material.inside[0], material.phrase[0])
    graph = random_output_graph(0).with_provenance(shared=KnownRun(layout=flux_layout(2, 2)))
    branch = (np.arange(graph.node_kind.size) % 2).astype(np.uint8)
    for read in (
        lambda: removing.place_effects(both, tcs, *tokens),
        lambda: steps.shares(both),
        lambda: by_block(both, *tokens[::-1]),
        lambda: choices.circuit_effects(replace(graph, node_branch=branch), all_places(tcs, 4), *tokens),
    ):
        with pytest.raises(UserError, match="give a pipeline whose default guidance scale is 1"):
            read()


def test_other_groups_of_sites_are_refused_where_they_are_read_by_number(made):
    *_, effects = made
    pipe, tcs = load_pipeline("organism-sd3"), load_transcoders("organism-sd3")
    for read in (
        lambda: steps.shares(effects._replace(layout=pipe.config.transformer.layout)),
        lambda: code_moves.run_codes(pipe, tcs, [], []),
    ):
        with pytest.raises(UserError, match="but the model has img, txt, img, txt, stack by stack; give a pipeline of"):
            read()


def test_flow_needs_a_prompt(made):
    with pytest.raises(UserError, match="at least one prompt, but got none"):
        flow.flow(*made[:2], prompts=[], advance=quiet)


@pytest.mark.slow
def test_flow_explains_any_prompts(made, monkeypatch):
    pipe, tcs, *_ = made
    monkeypatch.setattr(flow, "NODES", 16)
    monkeypatch.setattr(flow, "AT_A_TIME", 8)
    result = flow.flow(pipe, tcs, prompts=["a red circle left of a blue square"], advance=quiet)
    for end in flow.ENDS:
        rows = result.tables[f"By step of the {end}"]
        assert sum(row["of all crossing"] for row in rows) == pytest.approx(1.0)
    assert 0 < result.tables["Share of attribution into the image side that comes from text"][0]["share"] < 1
