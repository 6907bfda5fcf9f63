"""A scan finds what NumPy finds on the codes of recorded runs, whole or in pieces, on one device or several."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scans import PROMPTS, SEED, SITES, TOP, places, small

from difffract_jax.circuits.trace.capture import capture
from difffract_jax.config import UserError
from difffract_jax.dashboards.features import maps as example_maps
from difffract_jax.dashboards.features.choice import Examples, choose
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.record import TIERS
from difffract_jax.dashboards.features.request import DashboardOptions, check_request
from difffract_jax.dashboards.features.scan import arrays_of, scan
from difffract_jax.dashboards.features.state import EDGES, LAST, FeatureState
from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline, save_transcoders
from difffract_jax.models.streaming import streams_layers
from difffract_jax.sharding import make_mesh, traced_pipeline, traced_transcoders
from tolerances import TOL, relative_error
from traces import layer_of, make_transcoders

SAMPLE = 5


@pytest.fixture(scope="module")
def found():
    one = small()
    return scan(one.corpus, one.tcs, top=TOP, sample=SAMPLE)


def state_of(found, name):
    """Returns a site's state without the axis of sites, as NumPy arrays."""
    group, slot = places(small())[name]
    return FeatureState(*(np.asarray(array)[slot] for array in found.states[group]))


@pytest.fixture(params=SITES)
def site(request, found):
    return small().codes[request.param], state_of(found, request.param)


def test_the_largest_peaks_are_those_of_the_recorded_codes(site):
    codes, state = site
    peaks = codes.max(axis=(1, 2))
    order = np.argsort(-peaks, axis=0, kind="stable")[:TOP]
    assert relative_error(state.top_value, np.take_along_axis(peaks, order, axis=0).T) <= TOL.f32_run
    for feature in np.flatnonzero(peaks.max(axis=0) > 0):
        count = min(TOP, int((peaks[:, feature] > 0).sum()))
        assert state.top_prompt[feature, :count].tolist() == order[:count, feature].tolist()
        for prompt, place in zip(state.top_prompt[feature, :count], state.top_place[feature, :count], strict=True):
            assert place == codes[prompt, :, :, feature].argmax()


def test_counts_and_sums_are_those_of_the_recorded_codes(site):
    codes, state = site
    assert np.abs(state.active - (codes > 0).sum(axis=(0, 2)).T).max() <= 1  # a code may be 0 but for rounding
    assert relative_error(state.total, codes.sum(axis=(0, 2)).T) <= TOL.f32_run
    assert np.all(state.text <= state.active.sum(axis=1))
    assert np.array_equal(state.prompts, (codes.max(axis=(1, 2)) > 0).sum(axis=0))


def test_densities_add_up(site):
    codes, state = site
    assert np.array_equal(state.histogram.sum(axis=1), state.active.sum(axis=1))
    bins = np.array([0.0, *EDGES * float(state.scale), np.inf])
    expected = np.stack([np.histogram(z[z > 0], bins)[0] for z in codes.reshape(-1, codes.shape[3]).T])
    assert np.abs(state.histogram - expected).sum() <= 4  # of thousands: values on an edge but for rounding
    assert state.prompts.max() <= len(PROMPTS) and state.active[7].sum() == 0


def test_the_sample_is_of_the_prompts_that_come_first_in_a_random_order(site):
    codes, state = site
    peaks, ranks = codes.max(axis=(1, 2)), small().corpus.ranks
    for feature in range(codes.shape[3]):
        firing = np.flatnonzero(peaks[:, feature] > 0)
        first = firing[np.argsort(ranks[firing])][:SAMPLE]
        kept = state.sample_prompt[feature][state.sample_rank[feature] < LAST]
        assert kept.tolist() == first.tolist()
        if not kept.size:
            continue
        assert relative_error(state.sample_value[feature, : len(kept)], peaks[first, feature]) <= TOL.f32_run


def test_active_text_tokens_are_counted(found):
    for name, codes in small().codes.items():
        state, words = state_of(found, name), codes[:, :, : 0 if name.startswith("img") else 16]
        assert np.abs(state.text - (words > 0).sum(axis=(0, 1, 2))).max() <= 1, name


def test_tokens_and_means_are_counted(found):
    corpus = small().corpus
    words = sum(int(corpus.batch_of([n]).masks[0].sum()) for n in range(len(PROMPTS)))
    images = len(PROMPTS) * corpus.run.tokens.img
    assert found.tokens == {"img": (images,), "txt": (words,), "joint": (images + words,)}
    pooled = np.mean([corpus.batch_of([n]).pooled[0] for n in range(len(PROMPTS))], axis=0)
    assert relative_error(np.asarray(found.sums.pooled) / len(PROMPTS), pooled) <= TOL.f32_block


def test_batches_of_another_size_find_the_same(found):
    one = small()
    again = scan(Corpus(one.corpus.pipe, one.corpus.run, PROMPTS, SEED, 7), one.tcs, top=TOP, sample=SAMPLE)
    same_scan(again, found)


@pytest.mark.parametrize(
    "shape", [{"data": 2, "feature": 2}, pytest.param({"data": 4}, marks=pytest.mark.slow)], ids=str
)
def test_several_devices_find_the_same(found, shape):
    one, mesh = small(), make_mesh(shape)
    place = traced_pipeline(mesh)
    parts = {name: getattr(one.corpus.pipe, name) for name in ("transformer", "t5", "clip", "vae")}
    pipe = one.corpus.pipe._replace(**{name: jax.device_put(part, place(name, part)) for name, part in parts.items()})
    stacks = {
        name: jax.device_put(stack, traced_transcoders(mesh).tree(stack)) for name, stack in one.tcs.stacks.items()
    }
    corpus = Corpus(pipe, one.corpus.run, PROMPTS, SEED, 4, mesh)
    again = scan(corpus, one.tcs._replace(stacks=stacks), top=TOP, sample=SAMPLE)
    spread = again.states["img"].top_value.sharding
    assert spread.num_devices == mesh.size
    same_scan(again, found)


def same_scan(ours, expected):
    """The same prompts and counts, and values up to the rounding of another split."""
    assert ours.tokens == expected.tokens
    theirs = arrays_of(expected)
    for name, array in arrays_of(ours).items():
        if array.dtype.kind == "f":
            assert relative_error(array, theirs[name]) <= TOL.f32_run, name
        elif not name.endswith(("place", "prompt", "histogram")):
            assert np.abs(array - theirs[name]).max() <= 1, name
        else:
            assert np.mean(array != theirs[name]) <= 0.002, name


def test_examples_are_the_strongest_and_some_of_each_third():
    values = np.linspace(1, 12, 12, dtype=np.float32)
    top = np.array([[12, 11]], np.float32)
    zeros, state = np.zeros((1, 2), np.int32), {}
    state |= {"top_value": top, "top_prompt": np.array([[11, 10]], np.int32), "top_place": zeros}
    state |= {"sample_rank": np.arange(12, dtype=np.int32)[None], "sample_value": values[None]}
    state |= {"sample_prompt": np.arange(12, dtype=np.int32)[None], "sample_place": np.zeros((1, 12), np.int32)}
    rest = dict.fromkeys(set(FeatureState._fields) - set(state), zeros)
    found = choose(FeatureState(**state, **rest), 2)
    # Of the ten that are left, by thirds: 1 to 3.3, to 6.7, to 10.
    assert found.value.tolist() == [[12, 11, 10, 8, 6, 5, 3, 1]]
    assert found.prompt.tolist() == [[11, 10, 9, 7, 5, 4, 2, 0]]
    assert [TIERS[code] for code in found.tier[0]] == ["strongest"] * 2 + [t for t in TIERS[1:] for _ in range(2)]


@pytest.mark.parametrize("count", range(7))
def test_no_example_is_shown_twice(count):
    sample = {"sample_rank": np.where(np.arange(8) < count, np.arange(8), LAST).astype(np.int32)[None]}
    sample |= {"sample_value": np.arange(8, 0, -1, dtype=np.float32)[None]}
    sample |= {name: np.arange(8, dtype=np.int32)[None] for name in ("sample_prompt", "sample_place")}
    top = {"top_value": np.array([[9.0, 0.0]], np.float32)}
    top |= {name: np.array([[8, 0]], np.int32) for name in ("top_prompt", "top_place")}
    rest = dict.fromkeys(set(FeatureState._fields) - sample.keys() - top.keys(), np.zeros((1, 1), np.int32))
    found = choose(FeatureState(**sample, **top, **rest), 2)
    shown = found.prompt[found.prompt >= 0].tolist()
    assert len(set(shown)) == len(shown) and set(shown) <= {8, *range(count)}
    assert len(shown) == 1 + min(count, 6) or count > 2, "few others are all shown"
    assert np.all(np.diff(found.value[0][found.prompt[0] >= 0]) <= 0)


def test_maps_are_the_activations_that_capture_records(found):
    one = small()
    examples, peaks = examples_of(found), {name: np.asarray(s.top_value)[:, :, 0] for name, s in found.states.items()}
    maps, compared = drawn_maps(one.corpus, one.tcs, examples, found), 0
    for name, (group, slot) in places(one).items():
        codes, rows = one.codes[name], one.codes[name].shape[2]
        for feature, shown in np.argwhere(examples[group].prompt[slot] >= 0):
            prompt, place = (int(a[slot, feature, shown]) for a in examples[group][:2])
            true = codes[prompt, place // rows, :, feature] / peaks[group][slot, feature]
            ours = maps[group][slot, feature, shown] / 255
            faint = true < 0.5 / 255  # shown at least as 1 of 255, where it is active at all
            assert np.all(np.abs(ours - true) <= np.where(faint, 1 / 255, 0.5 / 255 + 1e-3))
            assert np.array_equal(ours > 0, true > 1e-6)
            compared += 1
    assert compared > 500


def examples_of(found):
    """Returns the examples of every group, [site feat shown]."""
    return {
        group.name: Examples(
            *map(np.stack, zip(*(choose(state_of(found, f"{group.label}/{n}"), 1) for n in numbers), strict=True))
        )
        for group, numbers in small().tcs.sites.members
    }


def test_large_images_are_kept_in_a_few_cells_each_the_largest_of_its_tokens():
    heat = np.arange(40 * 24, dtype=np.float32).reshape(1, 1, 40, 24)
    pooled = np.asarray(example_maps._pooled(jnp.asarray(heat))).reshape(14, 12)
    assert example_maps.cell_grid((40, 24)) == (14, 12)
    expected = np.pad(heat[0, 0], ((0, 2), (0, 0))).reshape(14, 3, 12, 2).max(axis=(1, 3))
    assert np.array_equal(pooled, expected)


def test_more_examples_of_a_prompt_than_one_round_holds_are_all_drawn(found, monkeypatch):
    monkeypatch.setattr(example_maps, "ROUND", 4)
    test_maps_are_the_activations_that_capture_records(found)


def test_transcoders_of_another_model_are_refused():
    one = small()
    other = one.tcs._replace(sites=one.tcs.sites._replace(members=((one.tcs.sites.members[0][0], (0, 1, 9)),)))
    with pytest.raises(UserError, match="img/9"):
        check_request(one.corpus, other, "nowhere", DashboardOptions(), overwrite=False)


def test_streamed_weights_find_the_same(found, tmp_path):
    one = small()
    save_pipeline(one.corpus.pipe, tmp_path / "model")
    save_transcoders(one.tcs, tmp_path / "tcs")
    pipe = load_pipeline(tmp_path / "model", weights="host")
    tcs = load_transcoders(tmp_path / "tcs", weights="host")
    assert streams_layers(pipe.transformer) and streams_layers(tcs.stacks)
    corpus = Corpus(pipe, one.corpus.run, PROMPTS, SEED, 3)
    same_scan(scan(corpus, tcs, top=TOP, sample=SAMPLE), found)
    examples = examples_of(found)
    drawn = [drawn_maps(corpus, tcs, examples, found) for corpus, tcs in ((corpus, tcs), (one.corpus, one.tcs))]
    for name, maps in drawn[0].items():
        assert np.abs(maps.astype(int) - drawn[1][name]).max() <= 1 and maps.any()


def drawn_maps(corpus, tcs, examples, found):
    """Returns the maps of some examples, by group."""
    run, groups = corpus.run, [group for group, _ in tcs.sites.members]
    jobs = {g.name: example_maps.jobs_of(examples[g.name], g.rows(run.tokens), run.steps) for g in groups}
    cells = {g.name: example_maps.cells_of(g, run.grid, run.text_tokens) for g in groups}
    maps = {g.name: np.zeros((*examples[g.name].prompt.shape, cells[g.name]), np.uint8) for g in groups}
    peaks = {name: np.asarray(state.top_value)[:, :, 0] for name, state in found.states.items()}
    thumbs = np.zeros((len(PROMPTS), *example_maps.thumb_size(16, 24), 3), np.uint8)
    chosen = example_maps.render(corpus, tcs, jobs, peaks, maps, thumbs)
    assert chosen.tolist() == list(range(len(PROMPTS))) and thumbs.std(axis=(1, 2, 3)).min() > 0
    return maps


def test_saes_read_what_mlps_wrote():
    one = small()
    tcs = make_transcoders(one.corpus.pipe.config.transformer, joint=(0, 1), dtype=jnp.float32, role="sae", seed=4)
    corpus = replace(one.corpus, prompts=PROMPTS[:2])
    state = scan(corpus, tcs, top=2, sample=2).states["img"]
    active = np.zeros((40, 2), int)
    for number, prompt in enumerate(corpus.prompts):
        for step in range(2):
            record = capture(corpus.pipe, one.tcs, prompt, seed=SEED + number, step=step, run=corpus.run).record
            sae = layer_of(tcs.stacks["img"], 1)
            active[:, step] += np.sum(np.asarray(sae.encode(record.mlp_out[0][1], record.t)) > 0, axis=0)
    assert np.abs(np.asarray(state.active)[1] - active).max() <= 1 and active.sum() > 50
