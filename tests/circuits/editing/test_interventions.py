"""Edits in the running model do what the reference's do, and nothing where there is nothing to do."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.editing.interventions import Edit, WholeSite, apply_edits, edit_model, steer
from difffract_jax.config import UserError
from difffract_jax.loading import load_transcoders
from difffract_jax.models.pipeline import generate, plan_run
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import REFERENCE, TOL, relative_error
from traces import PROMPTS, SIZE

CASES = json.loads((REFERENCE / "golden_intervention.json").read_text())
MODES = {"amplify": "scale", "zero": "zero", "invert": "invert", "set": "set"}


def edits_of(case):
    """The reference's description of an intervention as edits."""
    for edit in case["features"]:
        yield Edit(
            f"{edit['stream']}/{edit['layer']}/f{edit['feat_idx']}",
            MODES[edit["mode"]],
            edit["scale"],
            steps=None if edit["steps"] is None else frozenset(edit["steps"]),
            threshold=edit["token_threshold"] if edit["token_mode"] == "threshold" else None,
        )
    for site in case["streams"]:
        yield from (Edit(WholeSite(site["stream"], b), "zero", steps=frozenset(site["steps"])) for b in site["layers"])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_interventions_are_the_reference_s(golden, case):
    expected = np.load(REFERENCE / "golden_intervention.npz")[f"final_{case['name']}"]
    noise = golden.forward["p0_initial_latents"]
    result = steer(
        golden.pipe,
        golden.tcs,
        PROMPTS[0],
        list(edits_of(case)),
        form="replace",
        latents=noise,
        include_padding=True,
        run=golden.pipe.plan(**SIZE),
    )
    assert relative_error(result.latents, expected) <= TOL.intervention_f32
    # What is agreed upon must be an effect: clearly larger than the tolerance. The smallest of these edits moves 0.5%.
    assert relative_error(expected, golden.forward["p0_final_latents"]) > 10 * TOL.intervention_f32


@pytest.mark.parametrize(
    ("role", "prompt"),
    [
        ("transcoder", 0),
        ("sae", 1),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in (("transcoder", 1), ("sae", 0))),
    ],
)
def test_replacing_every_mlp_is_the_reference_s(golden, prompt, role):
    tcs = golden.tcs if role == "transcoder" else load_transcoders(REFERENCE / "saes")
    sites = [WholeSite(label, number) for label, numbers in tcs.sites.labels.items() for number in numbers]
    noise = golden.forward[f"p{prompt}_initial_latents"]
    result = steer(
        golden.pipe,
        tcs,
        PROMPTS[prompt],
        [],
        form="replace",
        replaced=sites,
        latents=noise,
        include_padding=True,
        run=golden.pipe.plan(**SIZE),
    )
    expected = np.load(REFERENCE / "golden_replacement.npz")[f"p{prompt}_final_{role}"]
    assert relative_error(result.latents, expected) <= TOL.intervention_f32


@pytest.mark.parametrize("edits", [[], [Edit("img/2/f326", "scale", 1.0), Edit("txt/0/f7", "add", 0.0)]])
def test_changing_nothing_changes_nothing(golden, edits):
    noise = golden.forward["p0_initial_latents"]
    result = steer(golden.pipe, golden.tcs, PROMPTS[0], edits, latents=noise, run=golden.pipe.plan(**SIZE))
    plain = generate(golden.pipe, PROMPTS[0], latents=noise, run=golden.pipe.plan(**SIZE))
    assert relative_error(result.latents, plain.latents) <= TOL.f32_block
    assert np.array_equal(result.image, plain.image)


@pytest.fixture(scope="module")
def tiny():
    pipe = random_pipeline()
    return pipe, random_transcoders(pipe.config.transformer)


def code(tiny, edits, z, step=0, block=1):
    """The code of img/1 after edits."""
    pipe, tcs = tiny
    table = edit_model(pipe.transformer, tcs, edits, plan_run(pipe.config)).layers[0].edits
    return np.asarray(apply_edits(type(table)(*(column[block] for column in table)), jnp.asarray(z), jnp.asarray(step)))


@pytest.mark.parametrize(
    ("mode", "amount", "expected"),
    [("zero", 1, 0.0), ("scale", 3, 6.0), ("invert", 1, -2.0), ("set", 1.5, 1.5), ("add", 0.5, 2.5)],
)
def test_every_mode_edits_one_feature_and_no_other(tiny, mode, amount, expected):
    z = np.full((36, 256), 2.0, np.float32)
    edited = code(tiny, [Edit("img/1/f5", mode, amount)], z)
    assert np.all(edited[:, 5] == expected)
    assert np.array_equal(np.delete(edited, 5, 1), np.delete(z, 5, 1))


def test_an_edit_acts_at_its_positions_and_steps_alone(tiny):
    z = np.ones((36, 256), np.float32)
    edits = [Edit("img/1/f5@3,7-8#0,2", "zero")]
    assert np.array_equal(np.flatnonzero(code(tiny, edits, z, step=2)[:, 5] == 0), [3, 7, 8])
    assert np.array_equal(code(tiny, edits, z, step=1), z)
    assert np.array_equal(code(tiny, [Edit("img/1/f5", "zero", steps=frozenset([1]))], z, step=0), z)


def test_a_threshold_is_a_share_of_the_maximum(tiny):
    z = np.zeros((36, 256), np.float32)
    z[:4, 5] = [1.0, 0.5, 0.21, 0.2]
    edited = code(tiny, [Edit("img/1/f5", "set", 9.0, threshold=0.2)], z)
    assert np.array_equal(np.flatnonzero(edited[:, 5] == 9.0), [0, 1, 2])
    assert np.array_equal(code(tiny, [Edit("img/1/f6", "set", 9.0, threshold=0.2)], z), z)


def test_edits_of_one_feature_follow_one_another(tiny):
    z = np.ones((36, 256), np.float32)
    edited = code(tiny, [Edit("img/1/f5", "scale", 3.0), Edit("img/1/f5", "add", 1.0)], z)
    assert np.all(edited[:, 5] == 4.0)


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ([Edit("img/3/f0", "zero")], "There is no transcoder at img/3; blocks with one: 0, 1, 2."),
        ([Edit("img/1/f256", "zero")], "names feature 256, but there are 0 to 255."),
        ([Edit("img/1/f0@36", "zero")], "names position 36, but there are 0 to 35."),
        ([Edit("img/1/f0#4", "zero")], "names step 4, but there are 0 to 3."),
        ([Edit("single/1/f0", "zero")], "There is no transcoder at single/1; blocks with one: none."),
    ],
)
def test_an_edit_of_what_does_not_exist_is_refused(tiny, edits, sentence):
    with pytest.raises(UserError) as caught:
        steer(*tiny, "a red circle", edits)
    assert sentence in str(caught.value)


def test_an_edit_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="mode must be one of zero, scale, invert, set, add, but got 'double'"):
        Edit("img/1/f0", "double")
    with pytest.raises(UserError, match="amount must be a finite number, but got nan"):
        Edit("img/1/f0", "scale", float("nan"))
    with pytest.raises(UserError, match="leave it out where a whole site is edited"):
        Edit(WholeSite("img", 0), "zero", threshold=0.2)
