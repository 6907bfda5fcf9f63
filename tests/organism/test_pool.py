"""The pool: scenes, encoded as the pipeline encodes prompts and decodes latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.pipeline import encode
from difffract_jax.models.sampler import scale_for_decoder, unpack
from difffract_jax.organism import pool
from difffract_jax.organism.flow import GRID
from difffract_jax.organism.world import scenes
from tolerances import TOL, relative_error

SEED = 77


@pytest.fixture(scope="module")
def built(trained):
    """A pool of a tiny pipeline, with what its progress was told."""
    pipe, told = trained.pipeline, []
    rows = pool.build_pool(
        pipe.vae, pipe.t5, pipe.clip, pipe.tokenizers, SEED, 40, lambda done, total: told.append((done, total))
    )
    return rows, told


def test_the_pool_is_filled_up_to_whole_batches(built):
    rows, told = built
    assert [len(part) for part in rows] == [48, 48, 48]
    assert told == [(16, 40), (32, 40), (48, 40)]
    assert all(part.dtype == np.float32 for part in rows)


def test_latents_have_about_unit_variance(built):
    """Scaling and shift were measured on 128 other scenes."""
    assert np.mean(built[0].latents) == pytest.approx(0, abs=0.1)
    assert np.std(built[0].latents) == pytest.approx(1, abs=0.1)


def test_scaling_and_shift_are_those_of_the_latents(trained):
    vae = trained.pipeline.vae
    scaling, shift = pool.measure_latents(vae, SEED, batches=2)
    images = np.concatenate([scenes(SEED, batch, pool.AT_ONCE).images() for batch in range(2)])
    latents = np.asarray(pool.encode_images(vae, images), np.float64)
    assert scaling == pytest.approx(1 / latents.std(), rel=TOL.f32_block)
    assert shift == pytest.approx(latents.mean(), rel=TOL.f32_block, abs=TOL.f32_block)


def test_texts_are_those_of_the_pipeline(built, trained):
    rows, drawn = built[0], scenes(SEED, 1, 16)
    for row in (0, 7):
        one = encode(trained.pipeline, drawn.captions[row], rows.text.shape[1])
        assert relative_error(rows.text[16 + row], one.text) <= TOL.f32_block
        assert relative_error(rows.pooled[16 + row], one.pooled) <= TOL.f32_block


def test_latents_go_back_to_what_the_autoencoder_made_of_the_image(built, trained):
    vae, image = trained.pipeline.vae, scenes(SEED, 2, 16).images()[5]
    mean = jax.jit(lambda model, pixels: model.encode(pixels)[0])(vae, 2 * image - 1)
    latent = unpack(jnp.asarray(built[0].latents[32 + 5]), GRID)
    undone = scale_for_decoder(latent, vae.config.scaling_factor, vae.config.shift_factor)
    assert relative_error(undone, mean) <= TOL.f32_block
