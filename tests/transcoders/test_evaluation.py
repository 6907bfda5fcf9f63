"""Evaluation: what is replaced and what is not, and numbers that are those of their definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.mmdit import Inputs, forward
from difffract_jax.models.pipeline import encode_run, model_velocity, step_inputs
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.transcoders.evaluation import evaluate, row_sums
from difffract_jax.transcoders.evaluation_report import write_evaluation_report
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.recovered import branch_velocities, psnr, ssim
from difffract_jax.transcoders.replaced import MEAN, TRANSCODER, TRUE, Replaced, replaced_velocity, swaps_of
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from difffract_jax.transcoders.sources import open_sampler
from tolerances import TOL, relative_error
from traces import guided_pipeline, make_transcoders, with_joint

GRID, TEXT = (2, 3), 40


def caption(number):
    return f"a {('red', 'green', 'blue')[number % 3]} thing number {number // 3}"


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


@pytest.fixture(scope="module")
def tcs():
    return with_joint(make_transcoders(TINY, img=(0, 2), txt=(1,), dtype=jnp.float32))


def inputs(t=0.5):
    rng = np.random.default_rng(0)
    shapes = ((6, 16), (TEXT, 24), (16,))
    return Inputs(*(jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes), jnp.float32(t))


def replaced(pipe, tcs, kinds, means=None, mask=None):
    means = means or {name: np.zeros((len(layers), 4, 32), np.float32) for name, layers in tcs.sites.groups.items()}
    swaps = swaps_of(tcs.sites, pipe.transformer, means, np.array(kinds))
    mask = jnp.ones((1, TEXT), bool) if mask is None else mask
    return Replaced(pipe.transformer, tcs.per_group(TINY.layout), swaps, mask)


def test_nothing_replaced_is_the_model(pipe, tcs):
    ours = replaced_velocity(replaced(pipe, tcs, [TRUE] * 5), inputs(), jnp.asarray(1), GRID)
    assert relative_error(ours, model_velocity(pipe.transformer, inputs(), jnp.asarray(1), GRID)) <= TOL.f32_block


def test_velocities_come_in_the_type_of_the_latents():
    """As in a run, where guidance multiplies what bfloat16 would round off."""
    model, given = random_pipeline(dtype=jnp.bfloat16).transformer, inputs()
    both = given._replace(text=jnp.stack([given.text] * 2), pooled=jnp.stack([given.pooled] * 2))
    found = branch_velocities(model_velocity, model, both, jnp.arange(2), GRID)
    assert found.dtype == given.latents.dtype == jnp.float32 and found.shape[0] == 2


@pytest.mark.parametrize("site", range(5))
@pytest.mark.parametrize("kind", [TRANSCODER, MEAN])
def test_each_site_can_be_replaced_alone(pipe, tcs, site, kind):
    kinds = [TRUE] * 5
    kinds[site] = kind
    velocity = jax.jit(replaced_velocity, static_argnames="grid")
    base = velocity(replaced(pipe, tcs, [TRUE] * 5), inputs(), jnp.asarray(1), GRID)
    changed = velocity(replaced(pipe, tcs, kinds), inputs(), jnp.asarray(1), GRID)
    # The last single-stream block's text rows are not read, but its image rows are: every site shows.
    assert relative_error(changed, base) > 1e-4
    if site == 2:
        padding = replaced(pipe, tcs, kinds, mask=jnp.zeros((1, TEXT), bool))
        assert relative_error(velocity(padding, inputs(), jnp.asarray(1), GRID), base) <= TOL.f32_block


def test_row_sums_are_their_definitions(tcs):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 2, 50, 32), np.float32)
    t = rng.choice(np.float32([1, 0.5]), 50)
    valid = rng.random(50) < 0.7
    sums = row_sums(
        tcs.stacks["img"], ActivationRows(*map(jnp.asarray, (x, y, t))), jnp.asarray(valid), jnp.array([1.0, 0.5])
    )
    for site in range(2):
        tc = jax.tree.map(lambda leaf, site=site: leaf[site], tcs.stacks["img"])
        for step, time in enumerate((1.0, 0.5)):
            keep = valid & (t == time)
            z = np.asarray(tc.encode(jnp.asarray(x[site, keep]), jnp.float32(time)))
            guess = np.asarray(tc.decode(jnp.asarray(z), jnp.asarray(x[site, keep])))
            target = y[site, keep]
            assert sums.rows[site, step] == keep.sum()
            assert relative_error(sums.y[site, step], target.sum(0)) <= TOL.f32_block
            assert relative_error(sums.error2[site, step], ((target - guess) ** 2).sum()) <= TOL.f32_block
            assert relative_error(sums.l0[site, step], (z > 0).sum()) <= TOL.f32_block
            norms = np.linalg.norm(guess, axis=1) / np.linalg.norm(target, axis=1)
            assert relative_error(sums.shrinkage[site, step], norms.sum()) <= TOL.f32_block


def test_the_report_has_every_measure(pipe, tcs, tmp_path):
    trained = TrainConfig(
        model="tiny", prompts="world", out=tmp_path, validation_share=0.2, prompts_at_once=2, height=16, width=24
    )
    settings = EvaluateConfig(run=tmp_path, prompts_count=2, velocity_count=2, images=1)
    result = evaluate(settings, trained, pipe, tcs, caption=caption)
    assert [row["site"] for row in result.sites] == ["img/0", "img/2", "txt/1", "single/0", "single/1"]
    assert len(result.steps) == 5 * 4 and len(result.velocity) == 4 and len(result.images) == 1
    assert all(row["fvu"] > 0.5 and 0 < row["l0"] < 40 for row in result.sites), "random codes explain little"
    assert all(row["recovered"] < 1 for row in result.velocity)
    assert all(
        sum(counts) == round(40 * (1 - row["dead"]))
        for counts, row in zip(result.density.values(), result.sites, strict=True)
    )
    report = write_evaluation_report({"a": result, "b": result}, tmp_path / "report", {"command": "evaluate"})
    text = report.read_text()
    assert all(word in text for word in ("img/2", "single/1", "recovered", "shrinkage", "pareto.png", "psnr"))
    assert sorted(path.suffix for path in report.parent.iterdir()) == [".json", ".md", ".png", ".png", ".png"]
    assert json.loads((report.parent / "evaluation.json").read_text())["results"]["a"]["role"] == "transcoder"


def by_hand(pipe, prompts, run, noise):
    """What img/2 and the velocities are over a run of two branches: an evaluation at a time, combined as written down.

    Returns rows x and y of img/2 [prompt evaluation img d_model], and of every evaluation its velocity and inputs.
    """
    rows, velocities, entering = [], [], []
    tap = jax.jit(lambda given: forward(pipe.transformer, given, run.grid, tap=in_and_out))
    for prompt, z in zip(prompts, noise, strict=True):
        for step in range(run.steps):
            both = []
            for one in (prompt, prompt.negative):
                given = step_inputs(run, one, z, step)
                v, reports = tap(given)
                rows.append([reports[0][side][2] for side in range(2)])
                both.append(v)
                entering.append(given)
            velocities += both
            z = z + (run.sigmas[step + 1] - run.sigmas[step]) * (3 * both[0] - 2 * both[1])
    x, y = (np.asarray(jnp.stack(side)).reshape(len(prompts), -1, 6, 32) for side in zip(*rows, strict=True))
    return x, y, velocities, entering


def in_and_out(visit):
    """The tap of what the image stream's MLP reads and writes."""
    return visit.acts.mlp_in[0], visit.acts.mlp_out[0]


@pytest.mark.slow
def test_both_branches_are_measured_as_two_single_evaluations_say(tmp_path):
    pipe = guided_pipeline()
    tcs = make_transcoders(TINY, img=(2,), txt=(), dtype=jnp.float32)
    run = {"height": 16, "width": 24, "text_tokens": TEXT, "guidance": 3.0, "negative_prompt": "a dark thing"}
    trained = TrainConfig(
        model="tiny", prompts="world", out=tmp_path, validation_share=0.2, prompts_at_once=2, steps_per_image=2, **run
    )
    settings = EvaluateConfig(run=tmp_path, prompts_count=2, velocity_count=2, images=1)
    result = evaluate(settings, trained, pipe, tcs, caption=caption)
    assert [(row["step"], row["branch"]) for row in result.steps] == [
        (step, branch) for step in (0, 1) for branch in ("prompt", "negative")
    ]
    source = open_sampler(trained, pipe, "validation", caption=caption)
    prompts = [encode_run(pipe, source.prompts(n), source.run) for n in range(2)]
    x, y, velocities, entering = by_hand(pipe, prompts, source.run, source.noise(np.arange(2)))
    tc, means = jax.tree.map(lambda leaf: leaf[0], tcs.stacks["img"]), y.mean(axis=(0, 2))
    for number, row in enumerate(result.steps):
        t = jnp.asarray(source.run.sigmas[number // 2])
        guess = np.asarray(tc(jnp.asarray(x[:, number].reshape(-1, 32)), t))
        true = y[:, number].reshape(-1, 32)
        fvu = np.square(true - guess).sum() / np.square(true - true.mean(axis=0)).sum()
        assert row["fvu"] == pytest.approx(fvu, rel=1e-3)
    changed = np.zeros((2, 2, 3))  # transcoder or mean; step; both, prompt, negative
    velocity = jax.jit(replaced_velocity, static_argnames="grid")
    for kind in (TRANSCODER, MEAN):
        swapped = replaced(pipe, tcs, [kind], {"img": means[None]})
        moved = [
            velocity(swapped, given, jnp.asarray(place % 4), source.run.grid) - v
            for place, (given, v) in enumerate(zip(entering, velocities, strict=True))
        ]
        for place in range(0, len(moved), 2):
            own = 3 * moved[place] - 2 * moved[place + 1], *moved[place : place + 2]
            changed[kind - 1, place % 4 // 2] += [float(jnp.sum(one**2)) for one in own]
    expected = 1 - changed[0] / changed[1]
    for row, (both, *each) in zip(result.velocity, expected, strict=True):
        assert row["recovered"] == pytest.approx(both, rel=1e-3)
        assert [row["recovered, prompt"], row["recovered, negative"]] == pytest.approx(each, rel=1e-3)
    assert len(result.images) == 1 and np.isfinite(result.images[0]["psnr"])
    text = write_evaluation_report({"a": result}, tmp_path / "report", {"command": "evaluate"}).read_text()
    assert "| img/2 | 1 | negative | 0.5 |" in text and "recovered, negative" in text


def test_image_measures_against_values_worked_out_by_hand():
    a = np.full((16, 16, 3), 100, np.uint8)
    b = a + np.uint8(10)
    assert psnr(a, a) == 99.0 and abs(psnr(a, b) - 20 * np.log10(255 / 10)) <= 1e-9
    c1 = (0.01 * 255) ** 2
    assert abs(ssim(a, b) - (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)) <= 1e-9
    assert ssim(a, a) == 1.0
