"""Transcoders and SAEs against the golden data, and what their options mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from difffract_jax.config import UserError
from difffract_jax.loading import load_transcoders
from difffract_jax.models.tiny import TINY, random_weights
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig, check_fit, random_transcoders
from tolerances import REFERENCE, TOL, relative_error

FOLDERS = {"tc": "transcoders", "sae": "saes"}


@pytest.fixture(scope="module", params=FOLDERS)
def kind(request):
    """Which modules, and their set."""
    return request.param, load_transcoders(REFERENCE / FOLDERS[request.param])


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(REFERENCE / "golden_transcoder.npz"))


@jax.jit
def everything(stack, layer, x, t):
    """Scale, shift, pre-activation, code and reconstruction of rows that each have their own time."""
    module = jax.tree.map(lambda leaf: leaf[layer], stack)

    def row(x, t):
        scale, shift = module.scale_shift(t)
        z = module.encode(x[None], t)
        return {"scale": scale, "shift": shift, "h_pre": module.preactivation(x[None], t)[0], "z": z[0]} | {
            "rec": module(x[None], t)[0],
            "decoded": module.decode(z, x[None])[0],
        }

    return jax.vmap(row)(x, t)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("stream", ["img", "txt"])
def test_golden_forward_passes_are_met(kind, golden, stream, layer):
    name, tcs = kind
    place = f"{name}_{stream}_{layer}"
    found = everything(tcs.stacks[stream], layer, golden[f"{place}_x"], golden[f"{place}_t"])
    for array in ("scale", "shift", "h_pre", "z", "rec"):
        assert relative_error(found[array], golden[f"{place}_{array}"]) <= TOL.f32_block, array
    assert np.array_equal(found["rec"], found["decoded"])
    assert np.array_equal(found["z"] > 0, golden[f"{place}_z"] > 0)


@pytest.mark.parametrize("stream", ["img", "txt"])
def test_what_time_and_the_block_s_shift_add_to_a_feature_is_golden(golden, stream):
    tcs = load_transcoders(REFERENCE / "transcoders")
    for layer in range(3):
        module = jax.tree.map(lambda leaf, n=layer: leaf[n], tcs.stacks[stream])
        place = f"tc_{stream}_{layer}_effbias"
        features, shifts = golden[f"{place}_feats"], jnp.asarray(golden[f"{place}_block_shift"])
        for row, t in enumerate(golden[f"{place}_t"]):
            bare = module.preactivation(jnp.zeros((1, 64)), jnp.asarray(t))[0, features]
            assert relative_error(bare, golden[f"{place}_noshift"][row]) <= TOL.f32_block
            shifted = module.preactivation(shifts[row][None], jnp.asarray(t))[0, features]
            assert relative_error(shifted, golden[place][row]) <= TOL.f32_block


def make(dtype=jnp.float64, **config):
    shape = TranscoderConfig(**{"d_model": 6, "features": 20, "time_embed": 8} | config)
    return random_weights(jax.eval_shape(lambda: Transcoder(shape, rngs=nnx.Rngs(0), dtype=dtype)), 0)


X = np.random.default_rng(0).standard_normal((5, 6))


def test_a_skip_adds_one_linear_path(x64):
    module, x = make(skip=True), jnp.asarray(X)
    z = module.encode(x, jnp.asarray(0.5))
    assert relative_error(module.decode(z, x) - module.decode(z, 0 * x), x @ module.skip.kernel[...]) <= TOL.x64
    assert relative_error(module(x, jnp.asarray(0.5)), module.decode(z, x)) <= TOL.x64


def test_the_default_tells_steps_apart_and_the_reference_s_form_hardly_does(x64):
    near = {}
    for conditioning in ("film", "film_raw_t"):
        module = make(conditioning=conditioning, time_embed=256)
        early, late = (jnp.concatenate(module.scale_shift(jnp.asarray(t))) for t in (1.0, 0.25))
        near[conditioning] = relative_error(early, late)
    assert near["film"] > 3 * near["film_raw_t"]
    bare = make(conditioning="none", time_embed=0)
    assert not any(part.any() for part in bare.scale_shift(jnp.asarray(0.3)))
    assert np.array_equal(bare.encode(jnp.asarray(X), jnp.asarray(1.0)), bare.encode(jnp.asarray(X), jnp.asarray(0.1)))


def test_a_code_is_never_negative_and_decodes_linearly(x64):
    module, x = make(), jnp.asarray(X)
    z = module.encode(x, jnp.asarray(0.5))
    assert np.all(np.asarray(z) >= 0) and np.any(np.asarray(z) > 0)
    u = module.preactivation(x, jnp.asarray(0.5))
    assert np.array_equal(z, np.maximum(u, 0))
    zero = module.decode(0 * z, x)
    assert relative_error(module.decode(2 * z, x) - zero, 2 * (module.decode(z, x) - zero)) <= TOL.x64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"time_embed": 0}, "it must be 0 exactly where conditioning is none"),
        ({"conditioning": "none"}, "time_embed is 8 with conditioning 'none'"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        TranscoderConfig(**{"d_model": 6, "features": 20, "time_embed": 8} | change)


def test_random_transcoders_have_unit_vectors_and_the_share_that_was_asked_for():
    tcs = random_transcoders(TINY, features=500, active=0.07)
    assert tcs.sites.groups == {"img": (0, 1, 2), "txt": (0, 1, 2)}
    for stack in tcs.stacks.values():
        norms = np.linalg.norm(stack.dec.kernel[...], axis=2)
        assert np.abs(norms - 1).max() <= TOL.f32_block
        assert np.array_equal(stack.enc.kernel[...], np.swapaxes(stack.dec.kernel[...], 1, 2))
    x = np.random.default_rng(0).standard_normal((400, 32)).astype(np.float32)
    module = jax.tree.map(lambda leaf: leaf[0], tcs.stacks["img"])
    assert 0.06 < float((module.encode(jnp.asarray(x), jnp.float32(1)) > 0).mean()) < 0.08
    other = random_transcoders(TINY, seed=1, features=500)
    assert not np.array_equal(tcs.stacks["img"].enc.kernel[...], other.stacks["img"].enc.kernel)


def test_random_transcoders_of_chosen_sites_are_those_of_all():
    every = random_transcoders(TINY, features=40, sites={"img": range(3), "txt": range(3), "joint": range(2)})
    some = random_transcoders(TINY, features=40, sites={"txt": (2, 0), "joint": (1,)})
    assert some.sites.names == ("txt/0", "txt/2", "single/1") and list(some.stacks) == ["txt", "joint"]
    for name, numbers in some.sites.groups.items():
        expected = jax.tree.map(lambda leaf, at=numbers: leaf[np.array(at)], every.stacks[name])
        assert all(map(np.array_equal, jax.tree.leaves(some.stacks[name]), jax.tree.leaves(expected)))
    assert [stack is None for stack in some.per_group(TINY.layout)] == [True, False, False]
    with pytest.raises(UserError, match="There are no sites called 'single'; the model has img, txt, joint"):
        random_transcoders(TINY, sites={"single": (0,)})


def test_another_width_or_site_is_refused():
    tcs = random_transcoders(TINY)
    check_fit(tcs, TINY)
    with pytest.raises(UserError, match="sites img/7, txt/9, but the model has img/0 to img/2 and txt/0 to txt/2"):
        check_fit(tcs._replace(sites=sites_of({"img": (0, 1, 7), "txt": (0, 1, 9)})), TINY)
    wider = TranscoderConfig(**(vars(tcs.config) | {"d_model": 128}))
    with pytest.raises(UserError, match="The transcoders are 128 wide, but the model is 32 wide"):
        check_fit(tcs._replace(config=wider), TINY)
