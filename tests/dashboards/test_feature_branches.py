"""Pages of features where a step is two evaluations: both are counted, and an example says which one it is of."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scans import AWAY, PROMPTS, SEED, guided_small

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.dashboards.features.build import build_dashboards
from difffract_jax.dashboards.features.mean_run import mean_run
from difffract_jax.dashboards.features.record import load_scan
from difffract_jax.dashboards.features.request import DashboardOptions, identity_of
from difffract_jax.dashboards.features.scan import scan
from tolerances import TOL, relative_error

SITES = {"img/0": "img", "txt/1": "txt", "single/0": "joint"}


@pytest.fixture(scope="module")
def found():
    one = guided_small()
    return scan(one.corpus, one.tcs, top=3, sample=2)


@pytest.mark.parametrize("site", SITES)
def test_every_evaluation_is_counted_as_it_is_recorded_alone(found, site):
    codes, state = guided_small().codes[site], found.states[SITES[site]]
    assert codes.shape[1] == 4, "two steps of two branches"
    peaks = codes.max(axis=(1, 2))
    assert np.abs(state.active[0] - (codes > 0).sum(axis=(0, 2)).T).max() <= 1  # a code may be 0 but for rounding
    assert relative_error(state.total[0], codes.sum(axis=(0, 2)).T) <= TOL.f32_run
    assert relative_error(state.top_value[0], np.sort(peaks, axis=0)[::-1].T) <= TOL.f32_run
    firing = np.flatnonzero(peaks.min(axis=0) > 0)
    places = [codes[prompt, :, :, f].argmax() for f, prompt in zip(firing, peaks.argmax(axis=0)[firing], strict=True)]
    assert np.mean(np.asarray(state.top_place[0])[firing, 0] == places) > 0.9
    assert len({place // codes.shape[2] % 2 for place in places}) == 2, "peaks of both branches"


def test_words_of_the_negative_prompt_count_in_its_branch(found):
    corpus = guided_small().corpus
    words = sum(int(corpus.batch_of([n]).masks[0].sum()) for n in range(3)), 3 * int(corpus.negative.mask.sum())
    images = 3 * corpus.run.tokens.img
    assert found.tokens == {"img": (images, images), "txt": words, "joint": tuple(images + one for one in words)}


def calls(path):
    """Returns the arguments of the one call that a file of data is."""
    return json.loads(re.fullmatch(r"difffract\.\w+\((.*)\);\n", path.read_text(), re.DOTALL)[1].join("[]"))


@pytest.mark.slow
def test_a_page_says_the_branch_of_an_example(found, tmp_path):
    one = guided_small()
    options = DashboardOptions(top=2, per_third=1, sample=2, links=2)
    build_dashboards(one.corpus, one.tcs, tmp_path / "out", options)
    record = load_scan(tmp_path / "out")
    (index,) = calls(tmp_path / "out" / "data" / "index.js")
    assert (index["run"]["branches"], index["run"]["negative_prompt"]) == (2, AWAY)
    assert index["run"]["negative_words"] == one.corpus.written(AWAY)
    _, _, features = calls(tmp_path / "out" / "data" / "txt-1" / "0000.js")
    branches, codes = set(), one.codes["txt/1"]
    for number, page in features.items():
        examples = record.of(f"txt/1/f{number}").examples
        for example, shown in zip(examples, page["examples"], strict=True):
            (step,), (position,), branch = example.feature.steps, example.feature.positions, example.feature.branch
            assert shown[7] == branch and shown[1:4] == [step, "txt", position]
            evaluation = 2 * step + ("prompt", "negative").index(branch)
            value = codes[PROMPTS.index(example.prompt), evaluation, position, int(number)]
            assert example.value == pytest.approx(value, rel=1e-3)
            branches.add(branch)
    assert branches == {"prompt", "negative"}
    best = record.of("txt/1/f0")
    assert len(best.frequency) == 4 and Feature.parse(str(best.examples[0].feature)) == best.examples[0].feature


@pytest.mark.slow
def test_gates_are_of_both_branches_and_effects_are_the_guided_step_s():
    """A change of the prompt's velocity counts by the guidance scale; all by hand from the records of one prompt."""
    small, tcs = guided_small(), guided_small().tcs
    corpus, run = replace(small.corpus, prompts=PROMPTS[:1], batch=1), small.corpus.run
    model, given = corpus.pipe.transformer, {"seed": SEED, "run": run}
    latents = np.zeros((run.tokens.img, 16), np.float32)
    mean = mean_run(corpus, tcs.sites, latents, np.asarray(corpus.batch_of([0]).pooled[0]))
    traces = capture_steps(corpus.pipe, tcs, PROMPTS[0], first=0, last=1, **given).traces
    gates = [np.asarray(jax.vmap(lambda block, c=t.record.cond: block.gates(c))(model.double)[0][0]) for t in traces]
    assert len(gates) == 4 and relative_error(mean.gates["img"][0], np.mean(gates, axis=0)) <= TOL.f32_block
    assert relative_error(mean.last_gates["img"][0], gates[2]) <= TOL.f32_block
    record, width = traces[2].record, 32
    scales = jnp.full(width + 1, record.inv_std.mean())
    out = model.final(jnp.concatenate([jnp.zeros((1, width)), jnp.eye(width)]), record.cond, scales)
    assert relative_error(mean.final, -run.sigmas[1] * 3.0 * (out[1:] - out[:1])) <= TOL.f32_block


def test_what_is_finished_depends_on_the_negative_prompt():
    one, options = guided_small(), DashboardOptions()
    other = one.corpus.pipe.plan(height=16, width=24, text_tokens=16, steps=2, guidance=3.0, negative_prompt="fog")
    assert identity_of(one.corpus, one.tcs, options) != identity_of(replace(one.corpus, run=other), one.tcs, options)
