"""Evaluation: what is replaced and what is not, and numbers that are those of their definitions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import model_velocity
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.transcoders.evaluation import evaluate, psnr, row_sums, ssim
from difffract_jax.transcoders.evaluation_report import write_evaluation_report
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.replaced import MEAN, TRANSCODER, TRUE, Replaced, replaced_velocity, swaps_of
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig
from tolerances import TOL, relative_error
from traces import make_transcoders, with_joint

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
    return Replaced(pipe.transformer, tcs.per_group(TINY.layout), swaps, jnp.ones(TEXT, bool) if mask is None else mask)


def test_nothing_replaced_is_the_model(pipe, tcs):
    ours = replaced_velocity(replaced(pipe, tcs, [TRUE] * 5), inputs(), jnp.asarray(1), GRID)
    assert relative_error(ours, model_velocity(pipe.transformer, inputs(), jnp.asarray(1), GRID)) <= TOL.f32_block


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
        padding = replaced(pipe, tcs, kinds, mask=jnp.zeros(TEXT, bool))
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


def test_image_measures_against_values_worked_out_by_hand():
    a = np.full((16, 16, 3), 100, np.uint8)
    b = a + np.uint8(10)
    assert psnr(a, a) == 99.0 and abs(psnr(a, b) - 20 * np.log10(255 / 10)) <= 1e-9
    c1 = (0.01 * 255) ** 2
    assert abs(ssim(a, b) - (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)) <= 1e-9
    assert ssim(a, a) == 1.0
