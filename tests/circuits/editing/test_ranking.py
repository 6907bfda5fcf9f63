"""Rankings hold what they say: means over seeds and tokens, differences of them, and where a feature is strongest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import IMAGE, JOINT, TEXT
from difffract_jax.circuits.editing.ranking import rank_features, summarise_site
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.mmdit import Inputs, forward
from difffract_jax.models.pipeline import encode, encode_run, initial_noise, plan_run, step_inputs
from difffract_jax.models.stacks import keep_mlp_in
from difffract_jax.transcoders.harvest import sample_rows
from traces import guided_pipeline, layer_of, make_transcoders

RED, GREEN = "a red circle left of a blue square", "a green circle left of a blue square"
LEFT = box_mask("0,0,24,48", (48, 48))
SEEDS = (2, 5)
BOTH = {"contrast": GREEN, "seeds": SEEDS}
"""The same runs in every test, so that one compilation serves them all."""


@pytest.fixture(scope="module")
def organism():
    return load_pipeline("organism"), load_transcoders("organism")


@pytest.fixture(scope="module")
def codes(organism):
    """Codes of the image stream's block 1, [prompt seed step img feat], by the harvester's own run."""
    pipe, tcs = organism
    run = plan_run(pipe.config)
    pairs = [(prompt, seed) for prompt in (RED, GREEN) for seed in SEEDS]
    encoded = {prompt: encode(pipe, prompt, run.text_tokens) for prompt in (RED, GREEN)}
    text, pooled = (jnp.stack([getattr(encoded[p], name) for p, _ in pairs]) for name in ("text", "pooled"))
    noise = jnp.stack([initial_noise(pipe, run, seed) for _, seed in pairs])
    groups = {"img": jnp.broadcast_to(jnp.arange(36), (4, 4, 36))}
    inputs = Inputs(noise, text, pooled, jnp.zeros(()))
    rows = sample_rows(pipe.transformer, inputs, jnp.asarray(run.sigmas), groups, run.grid, tcs.sites)["img"]
    tc = layer_of(tcs.stacks["img"], 1)
    x = np.asarray(rows.x)[1].reshape(4, -1, 64)
    z = jax.jit(jax.vmap(tc.encode))(x, np.asarray(run.sigmas)[:4])
    return np.asarray(z).reshape(4, 2, 2, 36, -1).transpose(1, 2, 0, 3, 4)


def test_a_contrast_is_the_difference_of_means(organism, codes):
    found = rank_features(*organism, RED, **BOTH, top=5, sites=["img/1"])
    assert list(found) == ["img"]
    each = codes.mean(axis=3)
    mean = (each[0] - each[1]).mean(axis=0)  # step feat
    best = np.argsort(-np.abs(mean).max(axis=0))[:5]
    assert [row.feature.feature for row in found["img"]] == best.tolist()
    for row in found["img"]:
        feature, (step,) = row.feature.feature, row.feature.steps
        assert step == np.abs(mean[:, feature]).argmax()
        assert row.score == pytest.approx(mean[step, feature], rel=1e-3)
        assert row.value - row.against == pytest.approx(row.score, rel=1e-3)
        signs = np.sign(each[0] - each[1])[:, step, feature]
        assert (row.agreeing, row.seeds) == ((signs == np.sign(row.score)).sum(), 2)
        strong = codes[int(row.score < 0), :, step, :, feature]
        assert row.feature.positions == (strong[strong.mean(axis=1).argmax()].argmax(),)


def test_a_region_is_held_against_the_rest_of_the_image(organism, codes):
    found = rank_features(*organism, RED, **BOTH, mask=LEFT, by="region", top=3, step=2, sites=["img/1"])["img"]
    inside = np.arange(36) % 6 < 3
    z = codes[0, :, 2].mean(axis=0)
    score = z[inside].mean(axis=0) - z[~inside].mean(axis=0)
    assert [row.feature.feature for row in found] == np.argsort(-score)[:3].tolist()
    assert found[0].score == pytest.approx(score.max(), rel=1e-3)
    assert all(row.feature.steps == (2,) and row.feature.positions[0] % 6 < 3 for row in found)


def test_a_trend_is_the_last_step_minus_the_first(organism, codes):
    found = rank_features(*organism, RED, **BOTH, by="trend", top=4, sites=["img/1"])["img"]
    mean = codes[0].mean(axis=(0, 2))
    rise = mean[-1] - mean[0]
    assert [row.feature.feature for row in found] == np.argsort(-np.abs(rise))[:4].tolist()
    assert [row.feature.steps[0] for row in found] == [3 if row.score > 0 else 0 for row in found]


def test_activations_come_per_stream_and_padding_does_not_count(organism):
    found = rank_features(*organism, RED, **BOTH, by="activation", top=6)
    assert list(found) == ["img", "txt", "single"]
    for stream, rows in found.items():
        scores = [row.score for row in rows]
        assert len(rows) == 6 and scores == sorted(scores, reverse=True)
        assert all(row.feature.stream == stream and row.against == 0 for row in rows)
    assert all(row.feature.positions[0] <= 8 for row in found["txt"])  # eight words and the closing token


def test_only_what_counts_is_averaged():
    z = jnp.asarray([[1.0, 0.0], [3.0, 4.0], [9.0, 9.0], [5.0, 1.0], [7.0, 3.0]])
    found = summarise_site(JOINT, z, (jnp.asarray([True, False]), jnp.asarray([True, True, False])))
    assert (found["txt"].inside.tolist(), found["txt"].position.tolist()) == ([2, 2], [1, 1])
    assert (found["img"].inside.tolist(), found["img"].outside.tolist()) == ([5, 1], [7, 3])
    alone = summarise_site(IMAGE, z[3:], (jnp.asarray([True, False]), jnp.asarray([True, True, False])))
    assert list(alone) == ["img"] and alone["img"].inside.tolist() == [5, 1]
    alone = summarise_site(TEXT, z[:3], (jnp.asarray([True, False]), jnp.asarray([True, True, False])))
    assert list(alone) == ["txt"] and alone["txt"].inside.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"by": "luck"}, "Features are ranked by one of contrast, region, trend, activation, but got 'luck'."),
        ({"by": "contrast"}, "Ranking by contrast needs another prompt"),
        ({"by": "region"}, "Ranking by region needs a region"),
        ({"by": "trend", "step": 1}, "A trend is over all steps"),
        ({"step": 4}, "The step 4 does not exist: the run has steps 0 to 3."),
        ({"seeds": ()}, "Features are averaged over seeds, but got none"),
    ],
)
def test_what_cannot_be_ranked_is_refused(organism, options, told):
    with pytest.raises(UserError) as caught:
        rank_features(*organism, RED, **options)
    assert told in str(caught.value)


def test_a_site_that_the_model_lacks_is_refused(organism):
    with pytest.raises(UserError, match="The site img/7 does not exist"):
        rank_features(*organism, RED, sites=["img/7"])


@pytest.fixture(scope="module")
def guided():
    """A small pipeline with two branches, its transcoders, a run, and codes of img/2 [step branch img feat] by hand."""
    pipe = guided_pipeline()
    tcs = make_transcoders(pipe.config.transformer, img=(0, 2), txt=(1,), dtype=jnp.float32)
    run = pipe.plan(height=16, width=24, text_tokens=16, steps=3, guidance=2.5, negative_prompt="a blurred square")
    encoded, z, codes = encode_run(pipe, RED, run), initial_noise(pipe, run, 0), []
    tc, encode_one = layer_of(tcs.stacks["img"], 1), jax.jit(lambda tc, x, t: tc.encode(x, t))
    evaluate = jax.jit(lambda model, inputs: forward(model, inputs, run.grid, tap=keep_mlp_in))
    for step in range(run.steps):
        velocity, of_step = [], []
        for prompt in encoded.branches:
            v, reports = evaluate(pipe.transformer, step_inputs(run, prompt, z, step))
            velocity.append(v)
            of_step.append(np.asarray(encode_one(tc, np.asarray(reports[0][0])[2], np.asarray(run.sigmas[step]))))
        codes.append(of_step)
        z = z + (run.sigmas[step + 1] - run.sigmas[step]) * (2.5 * velocity[0] - 1.5 * velocity[1])
    return pipe, tcs, run, np.asarray(codes)


def test_a_feature_is_ranked_in_the_branch_where_it_scores_most(guided):
    pipe, tcs, run, codes = guided
    mean = codes.mean(axis=2)  # step branch feat
    found = rank_features(pipe, tcs, RED, run=run, top=8, sites=["img/2"])["img"]
    best = mean.max(axis=(0, 1))
    assert [row.score for row in found] == pytest.approx(np.sort(best)[::-1][:8], rel=1e-4)
    branches = set()
    for row in found:
        (step,), branch = row.feature.steps, row.feature.branch
        place = step, ("prompt", "negative").index(branch)
        assert place == np.unravel_index(mean[:, :, row.feature.feature].argmax(), mean.shape[:2])
        assert row.feature.positions == (codes[place][:, row.feature.feature].argmax(),)
        assert Feature.parse(str(row.feature)) == row.feature and str(row.feature).endswith(f"~{branch}")
        branches.add(branch)
    assert branches == {"prompt", "negative"}


def test_steps_and_trends_go_by_branch(guided):
    pipe, tcs, run, codes = guided
    mean = codes.mean(axis=2)
    of_step = rank_features(pipe, tcs, RED, run=run, step=1, top=4, sites=["img/2"])["img"]
    assert {row.feature.steps for row in of_step} == {(1,)}
    assert [row.score for row in of_step] == pytest.approx(np.sort(mean[1].max(axis=0))[::-1][:4], rel=1e-4)
    trend = rank_features(pipe, tcs, RED, run=run, by="trend", top=4, sites=["img/2"])["img"]
    rise = mean[-1] - mean[0]
    for row in trend:
        branch = np.abs(rise[:, row.feature.feature]).argmax()
        assert row.feature.branch == ("prompt", "negative")[branch]
        assert row.score == pytest.approx(rise[branch, row.feature.feature], rel=1e-3)
        assert row.feature.steps == ((2,) if row.score > 0 else (0,))


def test_only_a_branch_s_own_words_count(guided):
    pipe, tcs, run, _ = guided
    lengths = [int(one.mask.sum()) for one in encode_run(pipe, RED, run).branches]
    found = rank_features(pipe, tcs, RED, run=run, top=40, sites=["txt/*"])["txt"]
    assert {row.feature.branch for row in found} == {"prompt", "negative"}
    for row in found:
        assert row.feature.positions[0] < lengths[("prompt", "negative").index(row.feature.branch)]
