"""What every activation keeps, what a configuration may not say, and sites in single-stream blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.models.stacks import slice_layer
from difffract_jax.models.tiny import TINY
from difffract_jax.sharding import TRANSCODER, match
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.transcoders.transcoder import TranscoderConfig, batch_cutoff, check_fit
from traces import make_transcoders, with_joint

ROWS, FEATURES, K = 24, 40, 5


def made(activation, **more):
    """One random transcoder, float32, with inputs for it."""
    tcs = make_transcoders(TINY, activation=activation, features=FEATURES, dtype=jnp.float32, **more)
    x = jax.random.normal(jax.random.key(1), (ROWS, TINY.d_model))
    return slice_layer(tcs.stacks["img"], jnp.int32(0)), x, jnp.float32(0.5)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_an_active_feature_has_its_pre_activation_for_a_value(activation):
    tc, x, t = made(activation, k=K if "topk" in activation else 0)
    u, z = tc.preactivation(x, t), tc.encode(x, t)
    assert np.all(z >= 0) and np.any(z > 0) and np.any(z == 0)
    assert np.array_equal(np.where(z > 0, u, 0), z)


def test_topk_keeps_the_largest_of_each_row():
    tc, x, t = made("topk", k=K)
    u, z = np.asarray(tc.preactivation(x, t)), np.asarray(tc.encode(x, t))
    for row, code in zip(u, z, strict=True):
        largest = np.sort(row)[-K:]
        assert sorted(code[code > 0]) == sorted(largest[largest > 0])


def test_batchtopk_keeps_the_largest_of_all_rows_together():
    tc, x, t = made("batchtopk", k=K)
    u, z = np.asarray(tc.preactivation(x, t)), np.asarray(tc.encode(x, t))
    assert sorted(z[z > 0]) == sorted(np.sort(u.ravel())[-K * ROWS :])
    assert len(set((z > 0).sum(axis=1))) > 1


def test_a_batch_with_fewer_positive_entries_keeps_them_all():
    u = jnp.array([[1.0, -1.0, 2.0], [-3.0, 0.5, -1.0]])
    assert 0 < batch_cutoff(u, 3) < 0.5


def test_the_cutoff_over_devices_is_that_of_all_rows():
    u = jax.random.normal(jax.random.key(0), (8, 16, FEATURES)) * jnp.arange(1.0, 9)[:, None, None]
    split = jax.pmap(lambda u: batch_cutoff(u, K, axis="data"), axis_name="data")(u)
    assert np.all(split == batch_cutoff(u.reshape(-1, FEATURES), K))


def test_jumprelu_has_a_threshold_per_feature():
    tc, x, t = made("jumprelu")
    u = np.asarray(tc.preactivation(x, t))
    assert np.array_equal(tc.encode(x, t), np.where(u > np.asarray(tc.threshold[...]), u, 0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activation": "gelu"}, "activation must be one of relu, topk, batchtopk, jumprelu, but is 'gelu'"),
        ({"conditioning": "step"}, "conditioning must be one of film, film_raw_t, none, but is 'step'"),
        ({"activation": "topk"}, r"k must lie in \[1, 64\], the number of features, with activation topk, but is 0"),
        ({"activation": "batchtopk", "k": 65}, "activation batchtopk, but is 65"),
        ({"k": 3}, "k is for topk and batchtopk, but is 3 with activation relu"),
        ({"time_embed": 0}, "time_embed is 0 with conditioning 'film'"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(change, told):
    with pytest.raises(UserError, match=told):
        TranscoderConfig(**({"d_model": 8, "features": 64, "time_embed": 4} | change))


def test_codes_that_depend_on_the_batch_are_not_traced():
    with pytest.raises(UserError, match="activation batchtopk, whose codes depend on which rows come together"):
        check_fit(make_transcoders(TINY, activation="batchtopk", k=K, dtype=jnp.float32), TINY)


def test_single_stream_sites_are_saved_loaded_and_checked(tmp_path):
    tcs = with_joint(make_transcoders(TINY, activation="jumprelu", dtype=jnp.float32, img=(0, 2)))
    save_transcoders(tcs, tmp_path / "out")
    loaded = load_transcoders(tmp_path / "out")
    assert (loaded.sites, loaded.config) == (tcs.sites, tcs.config) and loaded.sites.groups["joint"] == (0, 1)
    assert jax.tree.structure(loaded.stacks) == jax.tree.structure(tcs.stacks)
    assert all(map(np.array_equal, jax.tree.leaves(loaded.stacks), jax.tree.leaves(tcs.stacks)))
    check_fit(loaded, TINY)
    with pytest.raises(UserError, match="sites single/2, but the model has .* single/0 to single/1"):
        check_fit(with_joint(loaded, (0, 2)), TINY)


def test_every_parameter_has_one_sharding_rule():
    for shape in ({"activation": "jumprelu", "skip": True}, {"conditioning": "none"}):
        tcs = make_transcoders(TINY, dtype=jnp.float32, **shape)
        for path, leaf in leaf_paths(tcs.stacks["img"]).items():
            assert len(match(path, TRANSCODER).axes) == leaf.ndim
